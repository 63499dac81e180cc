"""The base operators: gather, scatter, grouped products. Closed under differentiation.

An index of -1 stands for "no row": gathering it gives zeros, scattering to it gives nothing.
Rows past the last group of a grouped product belong to nobody; their values are undefined and
reach no result.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum, rearrange

from . import kernels
from .core.batches import Fold, fold_rows, front, more_rows
from .core.derive import Dims, Tensors
from .core.dtypes import accumulator
from .core.primitive import Operator, declare, linear
from .core.tape import checkpoint
from .kernels import grouped, scaled
from .precision import PRECISIONS

GATHER = checkpoint("gather", save=False)
GROUPED_MM = checkpoint("grouped_mm", save=False)


# ---- gather and scatter_add: each other's transpose --------------------------------------------


def gather_kernel(x_ND: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(index_R.shape[0], *x_ND.shape[1:])
    if x_ND.dim() == 2 and kernels.fused(x_ND):
        from .kernels import rows

        return rows.gather(x_ND, index_R)
    found = x_ND.index_select(0, index_R.clamp_min(0))
    return found.masked_fill_(_column(index_R < 0, x_ND), 0)


def scatter_add_kernel(y_RD: torch.Tensor, index_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    # One row more than asked for takes what goes nowhere, NaN included.
    out = y_RD.new_zeros(num_rows + 1, *y_RD.shape[1:], dtype=accumulator(y_RD.dtype))
    where = torch.where(index_R < 0, num_rows, index_R)
    return out.index_add_(0, where, y_RD.to(out.dtype))[:num_rows].to(y_RD.dtype, copy=True)


def _offset(index_BR: torch.Tensor, stride: int) -> torch.Tensor:
    """Per-example indices as indices into the examples laid end to end."""
    start_B1 = torch.arange(index_BR.shape[0], device=index_BR.device)[:, None] * stride
    return torch.where(index_BR < 0, -1, index_BR + start_B1).flatten()


def _gather_vmap(size: int, dims: Dims, x: torch.Tensor, index: torch.Tensor) -> Fold:
    index = front(index, dims[1], size)
    if dims[0] is not None:
        index, x = _offset(index, x.shape[1]), fold_rows(x)
    return more_rows(size, x, index.flatten())


def _scatter_vmap(size: int, dims: Dims, y: torch.Tensor, index: torch.Tensor, num: int) -> Fold:
    y, index = front(y, dims[0], size), front(index, dims[1], size)
    return more_rows(size, fold_rows(y), _offset(index, num), size * num)


def _column(mask_R: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A mask of rows, to broadcast over them."""
    return mask_R.view(*mask_R.shape, *[1] * (rows.dim() - 1))


def _scatter_plain(y: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    to_NR = torch.arange(num_rows, device=y.device)[:, None] == index
    return torch.tensordot(to_NR.to(y.dtype), y, 1)


def random(*shape: int) -> torch.Tensor:
    """Random float64 numbers, for examples of operators."""
    return torch.randn(shape, dtype=torch.float64)


def _index_example(num_rows: int) -> torch.Tensor:
    return torch.randint(-1, num_rows, (5,))


gather: Operator = linear(
    "gather(Tensor x, Tensor index) -> Tensor",
    impl=gather_kernel,
    fake=lambda x, index: x.new_empty(index.shape[0], *x.shape[1:]),
    checkpoint=GATHER,
    example=lambda: (random(4, 3), _index_example(4)),
    plain=lambda x, index: torch.where(_column(index < 0, x), 0, x[index.clamp_min(0)]),
    transpose=lambda g, shape, index: scatter_add(g, index, shape[0]),
    vmap=_gather_vmap,
)

scatter_add: Operator = linear(
    "scatter_add(Tensor y, Tensor index, SymInt num_rows) -> Tensor",
    impl=scatter_add_kernel,
    fake=lambda y, index, num_rows: y.new_empty(num_rows, *y.shape[1:]),
    checkpoint=GATHER,
    example=lambda: (random(5, 3), _index_example(4), 4),
    plain=_scatter_plain,
    transpose=lambda g, shape, index, num_rows: gather(g, index),
    vmap=_scatter_vmap,
)


# ---- grouped products: bilinear, closed under differentiation ----------------------------------


def _rows_by_key(offsets_Be: torch.Tensor, num_rows: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a batch as rows of one grouped product: their order, and where each key's rows end.

    A row's key is its expert, or (example, expert) where the weights differ per example. Rows past the end
    come last.
    """
    size, num_experts = offsets_Be.shape
    ends_Be = offsets_Be.long()
    passed = ends_Be.new_zeros(size, num_rows + 1).scatter_add(1, ends_Be, torch.ones_like(ends_Be))
    key_BR = passed.cumsum(1)[:, :num_rows]  # how many experts end at or before a row
    num_keys = num_experts if shared else size * num_experts
    if not shared:
        first = torch.arange(size, device=key_BR.device)[:, None] * num_experts
        key_BR = torch.where(key_BR < num_experts, key_BR + first, num_keys)
    key = key_BR.flatten()
    counts = key.new_zeros(num_keys + 1).scatter_add(0, key, torch.ones_like(key))[:num_keys]
    return torch.argsort(key, stable=True), counts.cumsum(0).to(torch.int32)


def _grouped_mm_vmap(size: int, dims: Dims, x: Any, w: Any, offsets: Any, *precision: Any) -> Fold:
    x, offsets = front(x, dims[0], size), front(offsets, dims[2], size)
    order, ends = _rows_by_key(offsets, x.shape[1], shared=dims[1] is None)
    w = fold_rows(w) if dims[1] is not None else w

    def unfold(outs: Tensors) -> Tensors:
        return (rearrange(scatter_add(outs[0], order, order.shape[0]), "(b n) o -> b n o", b=size),)

    def refold(outs: Tensors) -> Tensors:
        return (gather(fold_rows(outs[0]), order),)

    return Fold((gather(fold_rows(x), order), w, ends, *precision), unfold, refold)


def _grouped_outer_vmap(size: int, dims: Dims, x: Any, y: Any, offsets: Any, *precision: Any) -> Fold:
    x, y, offsets = (front(v, d, size) for v, d in zip((x, y, offsets), dims))
    order, ends = _rows_by_key(offsets, x.shape[1], shared=False)
    return more_rows(size, gather(fold_rows(x), order), gather(fold_rows(y), order), ends, *precision)


def total(*terms: torch.Tensor | None) -> torch.Tensor:
    """The sum of one or two tensors, or the one that there is."""
    present = [t for t in terms if t is not None]
    return present[0] if len(present) == 1 else present[0] + present[1]


def bilinear_jvp(op: Any) -> Any:
    """The tangent of ``op(a, b, *others)``, linear in ``a`` and in ``b``."""

    def rule(inputs: tuple[Any, ...], ta: Any, tb: Any, *_: Any) -> torch.Tensor:
        a, b, *others = inputs
        return total(
            None if ta is None else op()(ta, b, *others), None if tb is None else op()(a, tb, *others)
        )

    return rule


def _grouped_mm_vjp(inputs: tuple[Any, ...], needs: Any, g: torch.Tensor) -> tuple[Any, ...]:
    x, w, offsets, *precision = inputs
    return (
        mm_in(*precision)(g, w.mT, offsets) if needs[0] else None,
        _outer_in(*precision)(x, g, offsets) if needs[1] else None,
    )


def _grouped_outer_vjp(inputs: tuple[Any, ...], needs: Any, g: torch.Tensor) -> tuple[Any, ...]:
    x, y, offsets, *precision = inputs
    return (
        mm_in(*precision)(y, g.mT, offsets) if needs[0] else None,
        mm_in(*precision)(x, g, offsets) if needs[1] else None,
    )


def mm_in(precision: str | None = None) -> Callable[..., torch.Tensor]:
    """``grouped_mm``, with operands rounded to a precision."""
    return grouped_mm if precision is None else lambda x, w, ends: scaled_grouped_mm(x, w, ends, precision)


def _outer_in(precision: str | None = None) -> Callable[..., torch.Tensor]:
    if precision is None:
        return grouped_outer
    return lambda x, y, ends: scaled_grouped_outer(x, y, ends, precision)


def _members(offsets_e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(R, e), one where a row of ``x`` belongs to a group, else zero."""
    before_Re = torch.arange(x.shape[0], device=offsets_e.device)[:, None] < offsets_e
    return (before_Re & ~torch.nn.functional.pad(before_Re, (1, -1))).to(x.dtype)


def _offsets_example(num_rows: int) -> torch.Tensor:
    """The ends of three groups, any of which may be empty."""
    return torch.cat([torch.randint(num_rows + 1, (2,)).sort().values, torch.tensor([num_rows])]).int()


def _precision_example() -> str:
    return PRECISIONS[int(torch.randint(len(PRECISIONS), ()))]


# x (R, I) in groups, w (e, I, O) -> (R, O): each group's rows times its own matrix.
grouped_mm: Operator = declare(
    "grouped_mm(Tensor x, Tensor w, Tensor offsets) -> Tensor",
    impl=grouped.mm,
    fake=lambda x, w, offsets: x.new_empty(x.shape[0], w.shape[2]),
    checkpoint=GROUPED_MM,
    example=lambda: (random(5, 2), random(3, 2, 4), _offsets_example(5)),
    plain=lambda x, w, offsets: einsum(_members(offsets, x), x, w, "r e, r i, e i o -> r o"),
    vjp=_grouped_mm_vjp,
    by_need=True,
    jvp=bilinear_jvp(lambda: grouped_mm),
    vmap=_grouped_mm_vmap,
)

# x (R, I), y (R, O) in groups -> (e, I, O): each group's x transposed times its y.
grouped_outer: Operator = declare(
    "grouped_outer(Tensor x, Tensor y, Tensor offsets) -> Tensor",
    impl=grouped.outer,
    fake=lambda x, y, offsets: x.new_empty(offsets.shape[0], x.shape[1], y.shape[1]),
    checkpoint=GROUPED_MM,
    example=lambda: (random(5, 2), random(5, 3), _offsets_example(5)),
    plain=lambda x, y, offsets: einsum(_members(offsets, x), x, y, "r e, r i, r o -> e i o"),
    vjp=_grouped_outer_vjp,
    by_need=True,
    jvp=bilinear_jvp(lambda: grouped_outer),
    vmap=_grouped_outer_vmap,
)


# ---- the same products of fp8 numbers ----------------------------------------------------------
#
# Their rules are straight-through: those of the product without rounding, in fp8 again. They don't round
# float64, in which all rules are compared with plain products.

# As grouped_mm, with operands rounded to a precision of ops/precision.py.
scaled_grouped_mm: Operator = declare(
    "scaled_grouped_mm(Tensor x, Tensor w, Tensor offsets, str precision) -> Tensor",
    impl=scaled.mm,
    fake=lambda x, w, offsets, precision: x.new_empty(x.shape[0], w.shape[2]),
    checkpoint=GROUPED_MM,
    example=lambda: (random(5, 2), random(3, 2, 4), _offsets_example(5), _precision_example()),
    plain=lambda x, w, offsets, precision: grouped_mm.plain(x, w, offsets),
    vjp=_grouped_mm_vjp,
    by_need=True,
    jvp=bilinear_jvp(lambda: scaled_grouped_mm),
    vmap=_grouped_mm_vmap,
)

# As grouped_outer.
scaled_grouped_outer: Operator = declare(
    "scaled_grouped_outer(Tensor x, Tensor y, Tensor offsets, str precision) -> Tensor",
    impl=scaled.outer,
    fake=lambda x, y, offsets, precision: x.new_empty(offsets.shape[0], x.shape[1], y.shape[1]),
    checkpoint=GROUPED_MM,
    example=lambda: (random(5, 2), random(5, 3), _offsets_example(5), _precision_example()),
    plain=lambda x, y, offsets, precision: grouped_outer.plain(x, y, offsets),
    vjp=_grouped_outer_vjp,
    by_need=True,
    jvp=bilinear_jvp(lambda: scaled_grouped_outer),
    vmap=_grouped_outer_vmap,
)
