"""A function of parameters and tokens, on a mesh: the one way from global values to a device's own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ops.core.axes import Binding, axis_names, axis_sizes, binding, bound, group_of
from ..ops.core.dtensors import is_dtensor
from ..ops.random import places
from ..parallel.backends import Backend, backend_of, choose
from ..parallel.boundary import dtensor_beneath, unwrapped
from ..parallel.collective_ops import all_gather_op
from ..parallel.placement import moves, placed, token_axes, where_placed
from ..parallel.shard_map import shard_map
from ..parallel.spec import as_dtensor, named_axes, spec_of
from ..params import P
from .checks import check_same, check_token_spec


def on_mesh(
    function: str,
    fn: Callable[..., Any],
    params: Any,
    inputs: dict[str, torch.Tensor],
    mesh: DeviceMesh,
    *,
    wanted: Any,
    out_specs: Callable[[P, Any], Any],
    backend: str | Backend,
    rows: tuple[torch.dtype, int],
    dtypes: Sequence[torch.dtype | None] | None = None,
    summed: torch.dtype | None = None,
) -> Any:
    """``fn(params, *inputs)`` of each device's own.

    The params that ``fn`` gets carry the moves to where they are ``wanted``, the dtype to compute in, and
    that to sum their gradients in, as for :func:`~fmoe.parallel.placement.placed`. It calls
    :func:`~fmoe.parallel.placement.use` where it computes with them. ``out_specs`` is a function of the
    tokens' placement and the params'. The axes that tokens lie along stand in the binding, as ``tokens``.
    ``rows`` are the dtype and the last dimension of what the backend carries.
    """
    tokens = tuple(inputs.values())
    have, *where = where_placed((params, *tokens), (wanted, *[P(token_axes(mesh))] * len(tokens)), mesh)
    for (name, value), spec in zip(inputs.items(), where):
        check_token_spec(function, name, value, spec)
        check_same(function, "placed by", name, spec, where[0])
    how = moves(function, "params", params, have, wanted, mesh)
    in_halves = backend_of(function, backend).in_halves
    along = tuple(axis for axis in axis_names(mesh) if axis in named_axes(where[0]))

    def here(params: Any, *tokens: torch.Tensor) -> Any:
        with bound(binding()._replace(tokens=along)):
            return fn(placed(params, how, dtypes, summed), *tokens)

    return shard_map(
        here,
        mesh,
        in_specs=(have, *where),
        out_specs=out_specs(where[0], have),
        backends=choose(function, backend, mesh, rows, _tokens_at_once(tokens[0], along, mesh, in_halves)),
        local_results=not dtensor_beneath(tokens[0]),
    )(params, *tokens)


def _tokens_at_once(x: Any, along: tuple[str, ...], mesh: DeviceMesh, in_halves: bool) -> int | None:
    """How many tokens of ``x``, ids or vectors, each device dispatches at once, if it is a DTensor."""
    if not dtensor_beneath(x):
        return None
    shape = unwrapped(x).shape
    tokens = math.prod(shape[:-1] if x.is_floating_point() else shape)
    for axis in along:
        tokens = tokens // axis_sizes(mesh)[axis]
    if in_halves:  # of ids (B, L), the larger half of a device's sequences
        tokens = (tokens // shape[1] + 1) // 2 * shape[1] if shape[1] else 0
    return tokens


def token_places(function: str, tokens: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The place of each token among those of all devices: int64 (...), placed as the tokens are.

    ``tokens`` are ids (...) or vectors (..., D). Devices may have different numbers of plain tokens; they
    tell each other how many.
    """
    inner, device = unwrapped(tokens), tokens.device
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    if mesh is None:
        return places(function, shape, P(), device)
    if is_dtensor(inner):
        with bound(Binding(mesh)):
            spec = P(*spec_of(inner)[: len(shape)])
            mine = places(function, inner.to_local().shape[: len(shape)], spec, device)
            return as_dtensor(mine, mesh, spec)
    everyone = group_of(mesh, token_axes(mesh))
    if everyone.size == 1:
        return places(function, shape, P(), device)
    count = torch.full((1,), math.prod(shape), dtype=torch.int64, device=device)
    counts = all_gather_op.raw(count, everyone.size, everyone.name)
    return counts[: everyone.position].sum() + places(function, shape, P(), device)
