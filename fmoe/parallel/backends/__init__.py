"""Backends carry tokens to the devices that hold their experts, and back."""

import logging
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from ...ops.core.axes import axis_names, group_of
from ...ops.core.dynamo import constant_to_dynamo
from ...ops.transport import Transport
from .all_to_all import AllToAll
from .bounds import Bound, check_bound
from .deepep import buffers as deepep_buffers
from .deepep.transport import DeepEP
from .payload import check_payload

NAMES = ("auto", "local", "all_to_all", "deepep")
_LOG = logging.getLogger("fmoe")
_SAID: set[str] = set()


class Backend(NamedTuple):
    """The backend along ``ep``, and whether the host waits for it: a value for ``backend=`` of any function.

    ===========  ========================================================================
    name         ``"auto"``, ``"local"``, ``"all_to_all"`` or ``"deepep"``, as one may pass it alone
    host_sync    false: the host never asks how many rows come. There is room for a number that is known
                 before, so a CUDA graph can hold a step
    in_halves    a model's layers take halves of a device's sequences in turn. The rows of one are on their
                 way while the other computes
    payload      ``"fp8"``: tokens on their way to experts are rounded to e4m3, in half the bytes of bfloat16.
                 Sums that come back and cotangents keep their dtype, and float64 is never rounded. ``None``:
                 tokens keep theirs
    ===========  ========================================================================

    The others are for ``host_sync=False``:

    ===========  ========================================================================
    capacity     room for this many times what an even router needs. ``MoEStats.overflow`` counts what had
                 none, and :func:`fmoe.exact_on_overflow` repeats such a step. ``None``: for the worst case
    max_tokens   the most tokens that any device dispatches at once, which only DTensors say themselves
    ===========  ========================================================================

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=12), torch.randn(5, 8)
    >>> mesh, never_waits = fmoe.make_mesh("ep=1"), Backend("all_to_all", host_sync=False, max_tokens=5)
    >>> fmoe.moe_forward(params, x, mesh, backend=never_waits).shape
    torch.Size([5, 8])
    """

    name: str = "auto"
    host_sync: bool = True
    capacity: float | None = None
    max_tokens: int | None = None
    in_halves: bool = False
    payload: str | None = None


def backend_of(function: str, backend: str | Backend) -> Backend:
    """A backend, by name or as it is. Raises ``ValueError`` for what can't be one."""
    found = backend if isinstance(backend, Backend) else Backend(backend)
    if found.name not in NAMES:
        raise argument_error(
            function, "backend", got=repr(found.name), expected=f"one of {NAMES}", remedy="Use 'auto'."
        )
    if found.host_sync and (found.capacity, found.max_tokens) != (None, None):
        got, expected = f"{found}", "a capacity and max_tokens for host_sync=False only"
        remedy = "Leave them out: there is room for whatever the host hears of."
        raise argument_error(function, "backend", got=got, expected=expected, remedy=remedy)
    check_bound(f"{function}: backend", found.max_tokens, found.capacity)
    check_payload(f"{function}: backend", found.payload)
    return found


def choose(
    function: str,
    backend: str | Backend,
    mesh: DeviceMesh | None,
    rows: tuple[torch.dtype | None, int] = (None, 0),
    max_tokens: int | None = None,
) -> dict[str, Transport]:
    """The backend along ``ep``, as :func:`fmoe.shard_map` takes it, for ``function``.

    ``"auto"`` logs what it chose and why. ``rows`` are their dtype and last dimension, and ``max_tokens`` the
    most of a device, if the tokens say it. Raises ``ValueError`` if the wish can't be met.
    """
    name, host_sync, capacity, most, in_halves, payload = backend_of(function, backend)
    if mesh is None or "ep" not in axis_names(mesh):
        return {}
    group = group_of(mesh, ("ep",))
    if group.size == 1:
        return {}
    if name == "local":
        got, expected = f"'local' with ep={group.size}", "a backend that moves tokens"
        raise argument_error(function, "backend", got=got, expected=expected, remedy="Use 'auto'.")
    bound, most = None, max_tokens if most is None else most
    if not host_sync:
        if most is None:
            expected = "the most tokens of any device, which plain tokens don't say"
            remedy = "Pass Backend(..., max_tokens=), the same on all devices."
            raise argument_error(function, "backend.max_tokens", got="None", expected=expected, remedy=remedy)
        bound = Bound(most, capacity)
    if name == "auto":
        name, why = _best(group.name, mesh.device_type, *rows, host_sync)
        _say(f"backend {name} along ep={group.size}: {why}")
    if name == "deepep":
        buffer = deepep_buffers.kept(group.name, host_sync)
        return {"ep": DeepEP(group, buffer, bound, in_halves, payload)}
    return {"ep": AllToAll(group, bound, in_halves, payload)}


@constant_to_dynamo  # devices talk to each other, which Dynamo needn't see
def _best(
    group: str, device_type: str, dtype: torch.dtype | None, dim: int, host_sync: bool
) -> tuple[str, str]:
    reason, can = deepep_buffers.supports(group, device_type, dtype, dim, host_sync)
    return ("deepep", reason) if can else ("all_to_all", f"by torch.distributed; not DeepEP, as {reason}")


@constant_to_dynamo  # said while Dynamo traces, too
def _say(text: str) -> bool:
    if text not in _SAID:
        _SAID.add(text)
        _LOG.info(text)
    return True
