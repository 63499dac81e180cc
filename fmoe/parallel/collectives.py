"""Collectives along named mesh axes: linear functions of every device's values, with exact adjoints.

Call them inside a function given to :func:`fmoe.shard_map`. ``axis`` is an axis's name, or a tuple of names
in the mesh's order. A tuple stands for all their devices, the last axis varying fastest. Along an axis of one
device nothing moves. The operators beneath work on blocks along dimension 0, and the functions bring the
wanted dimension there.
"""

from collections.abc import Sequence

import torch

from ..errors import argument_error
from ..ops.core.axes import Axes, Group, resolve
from ..ops.core.dtypes import accumulator
from .collective_ops import (
    all_gather_op,
    all_to_all_op,
    gather_params_op,
    ppermute_op,
    psum_op,
    reduce_scatter_op,
)
from .collective_ops import group_alone as group_alone  # re-exported


def axis_index(axis: Axes) -> int:
    """This device's place along ``axis``, from 0.

    Raises ``ValueError`` for an axis that isn't bound.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> where = fmoe.shard_map(lambda x: x + axis_index("dp"), mesh, in_specs=P("dp"), out_specs=P("dp"))
    >>> where(torch.ones(2))
    tensor([1., 1.])
    """
    return resolve("axis_index", axis).position


def axis_size(axis: Axes) -> int:
    """The number of devices along ``axis``.

    Raises ``ValueError`` for an axis that isn't bound.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> where = fmoe.shard_map(lambda x: x * axis_size("dp"), mesh, in_specs=P("dp"), out_specs=P("dp"))
    >>> where(torch.ones(2))
    tensor([1., 1.])
    """
    return resolve("axis_size", axis).size


def psum(x: torch.Tensor, axis: Axes) -> torch.Tensor:
    """The sum of ``x`` over the devices along ``axis``, on each of them.

    ``x`` has the same shape and dtype on every device. The transpose is :func:`psum` itself.

    Raises ``ValueError`` for an axis that isn't bound.

    >>> import fmoe
    >>> total = fmoe.shard_map(
    ...     lambda x: psum(x.sum(), "dp"), fmoe.make_mesh("dp=1"), in_specs=fmoe.P("dp"), out_specs=fmoe.P()
    ... )
    >>> total(torch.arange(4))
    tensor(6)
    """
    group = resolve("psum", axis)
    return x if group.size == 1 else psum_op(x, group.name)


def pmean(x: torch.Tensor, axis: Axes) -> torch.Tensor:
    """The mean of ``x`` over the devices along ``axis``, on each of them. Otherwise like :func:`psum`.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> mean = fmoe.shard_map(lambda x: pmean(x.mean(), "dp"), mesh, in_specs=P("dp"), out_specs=P())
    >>> mean(torch.tensor([1.0, 3.0]))
    tensor(2.)
    """
    return psum(x, axis) / axis_size(axis)


def all_gather(x: torch.Tensor, axis: Axes, *, dim: int = 0) -> torch.Tensor:
    """``x`` of every device along ``axis``, concatenated along ``dim``, on each of them.

    ``x`` has the same shape and dtype on every device. Its transpose is :func:`reduce_scatter`.

    Raises ``ValueError`` for an axis that isn't bound and a dimension ``x`` lacks.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P  # x is (N/dp,) on each device, the result (N,)
    >>> whole = fmoe.shard_map(lambda x: all_gather(x, "dp"), mesh, in_specs=P("dp"), out_specs=P())
    >>> whole(torch.arange(3))
    tensor([0, 1, 2])
    """
    group, dim = resolve("all_gather", axis), _dimension("all_gather", "dim", x, dim)
    return x if group.size == 1 else _joined(all_gather_op(x[None], group.size, group.name), dim)


def gather_params(
    x: torch.Tensor,
    axis: Axes,
    *,
    dim: int = 0,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`all_gather` of a parameter, which ``fmoe.remat`` by default gathers again instead of keeping it.

    It is cast to ``dtype`` on the way. Its cotangent is summed in ``reduce_dtype``, by default float32 or
    wider, and then has the dtype of ``x``.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> def forward(w, x):  # w [3/dp], x [N/dp, 3]
    ...     return x @ gather_params(w, "dp")
    >>> forward = fmoe.shard_map(forward, mesh, in_specs=P("dp"), out_specs=P("dp"))
    >>> forward(torch.ones(3), torch.eye(3))
    tensor([1., 1., 1.])
    """
    group, dim = resolve("gather_params", axis), _dimension("gather_params", "dim", x, dim)
    if group.size == 1:
        return x if dtype is None else x.to(dtype)
    dtypes = (x.dtype, dtype or x.dtype, reduce_dtype or accumulator(x.dtype))
    return _joined(gather_params_op(x[None], *dtypes, group.size, group.name), dim)


def reduce_scatter(x: torch.Tensor, axis: Axes, *, dim: int = 0) -> torch.Tensor:
    """The sum of ``x`` over the devices along ``axis``, cut along ``dim``. Each device gets its own piece.

    ``x`` has the same shape and dtype on every device. The sum is taken in float32 or wider and rounded once.
    The transpose is :func:`all_gather`. JAX's name, ``psum_scatter``, is an alias.

    Raises ``ValueError`` for an axis that isn't bound and a dimension ``x`` lacks or that doesn't divide.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P  # x is (N,) on each device, the result (N/dp,)
    >>> total = fmoe.shard_map(lambda x: reduce_scatter(x, "dp"), mesh, in_specs=P(), out_specs=P("dp"))
    >>> total(torch.ones(3))
    tensor([1., 1., 1.])
    """
    group, dim = resolve("reduce_scatter", axis), _dimension("reduce_scatter", "dim", x, dim)
    if group.size == 1:
        return x
    pieces = _pieces("reduce_scatter", "dim", x, dim, axis, group)
    return reduce_scatter_op(pieces, group.size, group.name).squeeze(0)


psum_scatter = reduce_scatter


def all_to_all(x: torch.Tensor, axis: Axes, *, split_dim: int = 0, concat_dim: int = 0) -> torch.Tensor:
    """Cut ``x`` along ``split_dim``, send the pieces along ``axis``, concatenate along ``concat_dim``.

    Piece ``i`` goes to device ``i`` of the axis. The piece from device ``j`` comes ``j``-th. The transpose
    swaps the two dimensions.

    Raises ``ValueError`` for an axis that isn't bound and a dimension ``x`` lacks or that doesn't divide.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> def transposed(x):  # [N/ep, M] -> [N, M/ep]
    ...     return all_to_all(x, "ep", split_dim=1, concat_dim=0)
    >>> fmoe.shard_map(transposed, mesh, in_specs=P("ep"), out_specs=P(None, "ep"))(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    group = resolve("all_to_all", axis)
    split_dim = _dimension("all_to_all", "split_dim", x, split_dim)
    concat_dim = _dimension("all_to_all", "concat_dim", x, concat_dim)
    if group.size == 1:
        return x
    pieces = _pieces("all_to_all", "split_dim", x, split_dim, axis, group)
    return _joined(all_to_all_op(pieces, group.size, group.name), concat_dim)


def ppermute(x: torch.Tensor, axis: Axes, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Send ``x`` along ``axis`` by ``(source, destination)`` pairs. Devices without a source get zeros.

    The transpose sends along the reversed pairs.

    Raises ``ValueError`` for an axis that isn't bound, and for pairs that name a place outside it or a source
    or destination twice.

    >>> import fmoe
    >>> mesh, P = fmoe.make_mesh(), fmoe.P
    >>> def from_left(x):  # every device gets its left neighbour's, the first zeros
    ...     return ppermute(x, "dp", [(i, i + 1) for i in range(axis_size("dp") - 1)])
    >>> fmoe.shard_map(from_left, mesh, in_specs=P("dp"), out_specs=P("dp"))(torch.ones(2))
    tensor([0., 0.])
    """
    group = resolve("ppermute", axis)
    sources, destinations = [a for a, _ in pairs], [b for _, b in pairs]
    ends = {*sources, *destinations}
    if not ends <= set(range(group.size)) or len({*sources}) + len({*destinations}) < 2 * len(pairs):
        expected = f"places from 0 to {group.size - 1}, each at most once a source and a destination"
        raise argument_error("ppermute", "pairs", got=list(pairs), expected=expected)
    source = sources[destinations.index(group.position)] if group.position in destinations else -1
    destination = destinations[sources.index(group.position)] if group.position in sources else -1
    if group.size == 1:
        return x if source == 0 else torch.zeros_like(x)
    return ppermute_op(x, source, destination, group.size, group.name)


def _dimension(function: str, argument: str, x: torch.Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        expected = f"a dimension of x, whose shape is {tuple(x.shape)}"
        remedy = "Correct it, or reshape x."
        raise argument_error(function, argument, got=dim, expected=expected, remedy=remedy)
    return dim % x.dim()


def _joined(pieces: torch.Tensor, dim: int) -> torch.Tensor:
    """Pieces along a new first dimension, concatenated along ``dim`` in one copy."""
    return pieces.movedim(0, dim).flatten(dim, dim + 1)


def _pieces(
    function: str, argument: str, x: torch.Tensor, dim: int, axis: Axes, group: Group
) -> torch.Tensor:
    """The reverse: ``x`` cut along ``dim``, a piece for each device."""
    if x.shape[dim] % group.size:
        got = f"dimension {dim} of x, whose shape is {tuple(x.shape)}"
        expected = f"one that divides by {group.size}, the size of {axis!r}"
        remedy = "Pad x, or choose another dimension."
        raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)
    return x.unflatten(dim, (group.size, x.shape[dim] // group.size)).movedim(dim, 0)
