"""Collectives along named mesh axes: linear functions of every device's values, with exact adjoints.

They are called inside a function given to :func:`fmoe.shard_map`. ``axis`` is an axis's name or a tuple of
names in the mesh's order, which stand for all their devices, the last varying fastest. Along an axis
of one device nothing moves. Every operator works on blocks along dimension 0; the functions bring the
dimension asked for there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import argument_error
from ..ops.axes import Axes, Group, resolve
from ..ops.bases import random
from ..ops.derive import Dims, Tensors
from ..ops.primitive import Fold, Operator, declare
from ..ops.tape import checkpoint
from .mesh import make_mesh

_c10d = torch.ops._c10d_functional
_wait = _c10d.wait_tensor


def _collective(
    schema: str,
    *,
    impl: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    adjoint: Callable[..., torch.Tensor],
    alone: Callable[[], tuple[Any, ...]] = lambda: (1, group_alone()),
    blocks: bool = True,
    save: bool = True,
) -> Operator:
    """An operator linear in its first argument; the others are static.

    Its example is that of a device alone, on which nothing moves. Tests of many devices compare with devices
    simulated in one tensor. ``alone`` gives the static arguments then.
    ``adjoint(cotangent, *statics)`` is its transpose. ``blocks`` says that dimension 0 is special: a batch
    goes behind it.
    """
    name = schema.partition("(")[0]

    def swap(outs: Tensors) -> Tensors:
        return tuple(o.movedim(0, 1) if blocks else o for o in outs)

    def vmap(size: int, dims: Dims, x: torch.Tensor, *statics: Any) -> Fold:
        return Fold((*swap((x,)), *statics), swap, swap)

    def jvp(statics: tuple[Any, ...], tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        return op(tangent, *statics)

    op = declare(
        schema,
        impl=impl,
        fake=fake,
        checkpoint=checkpoint(name, save=save),
        example=lambda: (random(4, 3), *alone()),
        plain=lambda x, *statics: x.clone(),
        residuals=lambda inputs, outputs: inputs[1:],
        vjp=lambda statics, needs, g: (adjoint(g, *statics), *[None] * len(statics)),
        jvp=jvp,
        vmap=vmap,
    )
    return op


def group_alone() -> str:
    """The name of a group of this process alone."""
    return make_mesh().get_group("dp").group_name


def _psum_kernel(x: torch.Tensor, group: str) -> torch.Tensor:
    return _wait(_c10d.all_reduce(x.contiguous(), "sum", group))


def _all_gather_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    return _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, group))


def _reduce_scatter_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    return _wait(_c10d.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def _all_to_all_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    splits = [x.shape[0] // size] * size
    return _wait(_c10d.all_to_all_single(x.contiguous(), splits, splits, group))


def _ppermute_kernel(x: torch.Tensor, source: int, destination: int, size: int, group: str) -> torch.Tensor:
    flat = x.contiguous().view(-1)
    sent, received = ([flat.numel() if i == r else 0 for r in range(size)] for i in (destination, source))
    out = _wait(_c10d.all_to_all_single(flat if destination >= 0 else flat[:0], received, sent, group))
    return out.view(x.shape) if source >= 0 else torch.zeros_like(x)


psum_op: Operator = _collective(
    "psum(Tensor x, str group) -> Tensor",
    impl=_psum_kernel,
    fake=lambda x, group: x.new_empty(x.shape),
    adjoint=lambda g, group: psum_op(g, group),
    alone=lambda: (group_alone(),),
    blocks=False,
)

all_gather_op: Operator = _collective(
    "all_gather(Tensor x, int size, str group) -> Tensor",
    impl=_all_gather_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape[0] * size, *x.shape[1:]),
    adjoint=lambda g, size, group: reduce_scatter_op(g, size, group),
)

gather_params_op: Operator = _collective(
    "gather_params(Tensor x, int size, str group) -> Tensor",
    impl=_all_gather_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape[0] * size, *x.shape[1:]),
    adjoint=lambda g, size, group: reduce_scatter_op(g, size, group),
    save=False,
)

reduce_scatter_op: Operator = _collective(
    "reduce_scatter(Tensor x, int size, str group) -> Tensor",
    impl=_reduce_scatter_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape[0] // size, *x.shape[1:]),
    adjoint=lambda g, size, group: all_gather_op(g, size, group),
)

all_to_all_op: Operator = _collective(
    "all_to_all(Tensor x, int size, str group) -> Tensor",
    impl=_all_to_all_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape),
    adjoint=lambda g, size, group: all_to_all_op(g, size, group),
)

# source and destination are places in the group, or -1 for nobody.
ppermute_op: Operator = _collective(
    "ppermute(Tensor x, int source, int destination, int size, str group) -> Tensor",
    impl=_ppermute_kernel,
    fake=lambda x, source, destination, size, group: x.new_empty(x.shape),
    adjoint=lambda g, source, destination, *group: ppermute_op(g, destination, source, *group),
    alone=lambda: (0, 0, 1, group_alone()),
    blocks=False,
)


def axis_index(axis: Axes) -> int:
    """This device's place along ``axis``, from 0."""
    return resolve("axis_index", axis).position


def axis_size(axis: Axes) -> int:
    """How many devices lie along ``axis``."""
    return resolve("axis_size", axis).size


def psum(x: torch.Tensor, axis: Axes) -> torch.Tensor:
    """The sum of ``x`` over the devices along ``axis``, on each of them.

    ========  =====  ===============================================================
    x         any    the same shape and dtype on every device
    -> sum    any    the shape and dtype of ``x``
    ========  =====  ===============================================================

    Its transpose is itself. Raises ``ValueError`` for an axis that isn't bound.

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
    """The mean of ``x`` over the devices along ``axis``, on each of them; see :func:`psum`."""
    return psum(x, axis) / axis_size(axis)


def all_gather(x: torch.Tensor, axis: Axes, *, dim: int = 0) -> torch.Tensor:
    """``x`` of every device along ``axis``, concatenated along ``dim``, on each of them.

    Its transpose is :func:`reduce_scatter`. Raises ``ValueError`` for an axis that isn't bound and a
    dimension ``x`` lacks.
    """
    group, dim = resolve("all_gather", axis), _dimension("all_gather", "dim", x, dim)
    return x if group.size == 1 else _gathered(all_gather_op, x, dim, group)


def gather_params(x: torch.Tensor, axis: Axes, *, dim: int = 0) -> torch.Tensor:
    """:func:`all_gather` of a parameter, which ``fmoe.remat`` by default gathers again rather than keep."""
    group, dim = resolve("gather_params", axis), _dimension("gather_params", "dim", x, dim)
    return x if group.size == 1 else _gathered(gather_params_op, x, dim, group)


def _gathered(op: Operator, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """Pieces lie in front when they come; one copy brings them where they belong."""
    pieces = op(x[None], group.size, group.name)
    return pieces.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: torch.Tensor, axis: Axes, *, dim: int = 0) -> torch.Tensor:
    """The sum of ``x`` over the devices along ``axis``, cut along ``dim``; each device has its own piece.

    Its transpose is :func:`all_gather`. Raises ``ValueError`` for an axis that isn't bound and a
    dimension that ``x`` lacks or that doesn't divide.
    """
    group, dim = resolve("reduce_scatter", axis), _dimension("reduce_scatter", "dim", x, dim)
    _check_divides("reduce_scatter", "dim", x, dim, axis, group)
    if group.size == 1:
        return x
    pieces = x.unflatten(dim, (group.size, x.shape[dim] // group.size)).movedim(dim, 0)
    return reduce_scatter_op(pieces, group.size, group.name).squeeze(0)


psum_scatter = reduce_scatter


def all_to_all(x: torch.Tensor, axis: Axes, *, split_dim: int = 0, concat_dim: int = 0) -> torch.Tensor:
    """Cut ``x`` along ``split_dim``, send the pieces along ``axis``, concatenate along ``concat_dim``.

    Piece ``i`` goes to device ``i`` of the axis; the piece that device ``j`` sent comes ``j``-th. Its
    transpose swaps the two dimensions. Raises ``ValueError`` for an axis that isn't bound and a
    dimension that ``x`` lacks or that doesn't divide.
    """
    group = resolve("all_to_all", axis)
    split_dim = _dimension("all_to_all", "split_dim", x, split_dim)
    concat_dim = _dimension("all_to_all", "concat_dim", x, concat_dim)
    _check_divides("all_to_all", "split_dim", x, split_dim, axis, group)
    if group.size == 1:
        return x
    piece = x.shape[split_dim] // group.size
    pieces = x.unflatten(split_dim, (group.size, piece)).movedim(split_dim, 0)
    came = all_to_all_op(pieces, group.size, group.name)
    return came.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


def ppermute(x: torch.Tensor, axis: Axes, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Send ``x`` along ``axis`` by ``(source, destination)`` pairs; who receives nothing has zeros.

    Its transpose sends along the pairs reversed. Raises ``ValueError`` for an axis that isn't bound, and
    for pairs that name a place outside it, or one source or destination twice.
    """
    group = resolve("ppermute", axis)
    sources, destinations = [a for a, _ in pairs], [b for _, b in pairs]
    ends = {*sources, *destinations}
    if not ends <= set(range(group.size)) or len({*sources}) + len({*destinations}) < 2 * len(pairs):
        raise argument_error(
            "ppermute",
            "pairs",
            got=list(pairs),
            expected=f"places from 0 to {group.size - 1}, each at most once a source and a destination",
            remedy="Correct the pairs.",
        )
    source = sources[destinations.index(group.position)] if group.position in destinations else -1
    destination = destinations[sources.index(group.position)] if group.position in sources else -1
    if group.size == 1:
        return x if source == 0 else torch.zeros_like(x)
    return ppermute_op(x, source, destination, group.size, group.name)


def _dimension(function: str, argument: str, x: torch.Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise argument_error(
            function,
            argument,
            got=dim,
            expected=f"a dimension of x, whose shape is {tuple(x.shape)}",
            remedy="Correct it, or reshape x.",
        )
    return dim % x.dim()


def _check_divides(function: str, argument: str, x: torch.Tensor, dim: int, axis: Axes, group: Group) -> None:
    if x.shape[dim] % group.size:
        raise argument_error(
            function,
            argument,
            got=f"dimension {dim} of x, whose shape is {tuple(x.shape)}",
            expected=f"one that divides by {group.size}, the size of {axis!r}",
            remedy="Pad x, or choose another dimension.",
        )
