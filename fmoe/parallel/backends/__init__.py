"""Backends carry tokens to the devices that hold their experts, and back."""

import logging

import torch
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from ...ops.core.axes import axis_names, group_of
from ...ops.core.dynamo import constant_to_dynamo
from ...ops.transport import Transport
from .all_to_all import AllToAll
from .deepep import buffers as deepep_buffers
from .deepep.transport import DeepEP

NAMES = ("auto", "local", "all_to_all", "deepep")
_LOG = logging.getLogger("fmoe")
_SAID: set[str] = set()


def choose(
    function: str, name: str, mesh: DeviceMesh | None, rows: tuple[torch.dtype | None, int] = (None, 0)
) -> dict[str, Transport]:
    """The backend along ``ep``, as :func:`fmoe.shard_map` takes it, for ``function``.

    ``"auto"`` logs what it chose and why. ``rows`` are their dtype and last dimension.
    Raises ``ValueError`` if the wish can't be met.
    """
    if name not in NAMES:
        raise argument_error(
            function, "backend", got=repr(name), expected=f"one of {NAMES}", remedy="Use 'auto'."
        )
    if mesh is None or "ep" not in axis_names(mesh):
        return {}
    group = group_of(mesh, ("ep",))
    if group.size == 1:
        return {}
    if name == "local":
        got, expected = f"'local' with ep={group.size}", "a backend that moves tokens"
        raise argument_error(function, "backend", got=got, expected=expected, remedy="Use 'auto'.")
    if name == "auto":
        name, why = _best(group.name, mesh.device_type, *rows)
        _say(f"backend {name} along ep={group.size}: {why}")
    if name == "deepep":
        return {"ep": DeepEP(group, deepep_buffers.kept(group.name))}
    return {"ep": AllToAll(group)}


@constant_to_dynamo  # devices talk to each other, which Dynamo needn't see
def _best(group: str, device_type: str, dtype: torch.dtype | None, dim: int) -> tuple[str, str]:
    reason, can = deepep_buffers.supports(group, device_type, dtype, dim)
    return ("deepep", reason) if can else ("all_to_all", f"by torch.distributed; not DeepEP, as {reason}")


@constant_to_dynamo  # said while Dynamo traces, too
def _say(text: str) -> bool:
    if text not in _SAID:
        _SAID.add(text)
        _LOG.info(text)
    return True
