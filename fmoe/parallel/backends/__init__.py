"""Backends: what carries tokens to the devices that hold their experts, and back."""

import logging

import torch
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from ...ops.axes import Group, axis_names, group_of
from ...ops.transport import Transport
from .all_to_all import AllToAll

NAMES = ("auto", "local", "all_to_all")
_LOG = logging.getLogger("fmoe")
_SAID: set[str] = set()


def choose(name: str, mesh: DeviceMesh | None) -> dict[str, Transport]:
    """What carries tokens along ``ep``, as :func:`fmoe.shard_map` takes it.

    ``"auto"`` says in the log what it chose. Raises ``ValueError`` for what can't be met.
    """
    if name not in NAMES:
        raise argument_error(
            "moe_forward", "backend", got=repr(name), expected=f"one of {NAMES}", remedy="Use 'auto'."
        )
    along = mesh is not None and "ep" in axis_names(mesh)
    group = group_of(mesh, ("ep",)) if mesh is not None and along else Group("", 1, 0)
    if name == "local" and group.size > 1:
        raise argument_error(
            "moe_forward",
            "backend",
            got=f"'local' with ep={group.size}",
            expected="a backend that moves tokens",
            remedy="Use 'auto'.",
        )
    if group.size == 1:
        return {}
    if name == "auto":
        _say(f"backend all_to_all along ep={group.size}: tokens move by torch.distributed")
    return {"ep": AllToAll(group)}


@torch.compiler.assume_constant_result  # said while Dynamo traces, too
def _say(text: str) -> bool:
    if text not in _SAID:
        _SAID.add(text)
        _LOG.info(text)
    return True
