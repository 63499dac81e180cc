"""Grouped products of fp8 numbers: by kernels where they can, else by a reference.

``kernels``    our persistent ones, or ``torch._scaled_mm`` for one group, with fast accumulation: Hopper,
               precisions by rows, bfloat16 and float16, dimensions that are multiples of 16
``reference``  rounded operands, multiplied in float32; on CUDA it asks the host where groups end
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..precision import FAST, Scaled, of_weight_gradient, quantise, rounded
from . import fused, grouped
from .tuned import Tile

ALIGNED = 16  # numbers that a row is a multiple of
MULTIPLE = 128  # of rows that each group of columns begins at: the depth of TILE
# What was fastest on an H200 of ten choices, on layers of 16B, 30B-A3B and 671B.
TILE = Tile(rows=128, cols=256, depth=MULTIPLE, warps=8, stages=3)


class Columns(NamedTuple):
    """The columns of rows (R, C) in groups as rows, which a sum over each group's rows takes.

    Of ``scaled``, ``values`` are (C, R'), ``scale`` (e, C). In R' each group begins at a multiple of 128, and
    zeros fill the gaps; ``ends`` are int32, where groups end there. Sums over them are in ``dtype``.
    """

    scaled: Scaled
    ends: torch.Tensor
    dtype: torch.dtype


def fast(precision: str | None, x: torch.Tensor, *dims: int) -> bool:
    """Whether kernels take such rows, and weights of these dimensions."""
    narrow = precision in FAST and x.dtype in (torch.bfloat16, torch.float16)
    fits = x.numel() > 0 and not any(dim % ALIGNED for dim in dims)
    return narrow and fits and x.is_cuda and fused(x) and grouped.hopper(x.device)


def mm(
    x_RI: torch.Tensor | Scaled, w_eIO: torch.Tensor, offsets_e: torch.Tensor, precision: str
) -> torch.Tensor:
    """(R, I) in groups times (e, I, O) -> (R, O), in the dtype of ``w_eIO``; rows of no group are undefined.

    Rows may be scaled already, where :func:`fast` says that kernels take them.
    """
    if isinstance(x_RI, Scaled):
        return multiply(x_RI, _weights(w_eIO), offsets_e, w_eIO.dtype)
    if x_RI.dtype == torch.float64:
        return grouped.mm(x_RI, w_eIO, offsets_e)
    if fast(precision, x_RI, *w_eIO.shape[1:]):
        return mm(rows(x_RI), w_eIO, offsets_e, precision)
    weights = rounded(w_eIO.mT, precision, weight=True).mT
    return grouped.mm(rounded(x_RI, precision), weights, offsets_e).to(x_RI.dtype)


def outer(
    x_RI: torch.Tensor | Columns, y_RO: torch.Tensor | Columns, offsets_e: torch.Tensor, precision: str
) -> torch.Tensor:
    """(R, I), (R, O) in groups -> (e, I, O): each group's x transposed times its y.

    Both may be :class:`Columns`, where :func:`fast` says that kernels take them.
    """
    if isinstance(x_RI, Columns) and isinstance(y_RO, Columns):
        return multiply_columns(x_RI, y_RO)
    assert isinstance(x_RI, torch.Tensor) and isinstance(y_RO, torch.Tensor)
    if x_RI.dtype == torch.float64 or of_weight_gradient(precision) is None:
        return grouped.outer(x_RI, y_RO, offsets_e)
    if fast(precision, x_RI, x_RI.shape[1], y_RO.shape[1]):
        return multiply_columns(columns(x_RI, offsets_e), columns(y_RO, offsets_e))
    x, y = (_rounded_columns(t, offsets_e, precision) for t in (x_RI, y_RO))
    return grouped.outer(x, y, offsets_e).to(x_RI.dtype)


def _rounded_columns(x_RC: torch.Tensor, offsets_e: torch.Tensor, precision: str) -> torch.Tensor:
    out = x_RC.new_zeros(x_RC.shape, dtype=torch.float32)
    for a, b in grouped.groups(offsets_e):
        out[a:b] = rounded(x_RC[a:b].mT, precision).mT
    return out


# ---- operands of kernels ---------------------------------------------------------------------------------


def rows(x: torch.Tensor) -> Scaled:
    """:func:`quantise`, by a kernel where there is one."""
    if fused(x):
        from . import quantise as kernel

        return kernel.rows(x)
    return quantise(x)


def columns(x_RC: torch.Tensor, offsets_e: torch.Tensor) -> Columns:
    """The columns of rows in groups."""
    from . import columns as kernel

    return kernel.of_rows(x_RC, offsets_e)


def _weights(w_eIO: torch.Tensor) -> Scaled:
    """Weights with values (e, O, I) and scales (e, O)."""
    kept = _kept.get(w_eIO.data_ptr()) if _kept else None
    if kept is None or kept.captured != _capturing():  # a graph of less than the block is replayed after it
        return _rounded_weights(w_eIO)
    key = *w_eIO.shape, *w_eIO.stride(), w_eIO.dtype
    if key not in kept.found:
        kept.found[key] = _rounded_weights(w_eIO)
    return kept.found[key]


def _rounded_weights(w_eIO: torch.Tensor) -> Scaled:
    from . import columns as kernel

    w_eOI = w_eIO.mT
    return rows(w_eOI) if w_eOI.is_contiguous() else kernel.of_weights(w_eIO.contiguous())


class _Kept(NamedTuple):
    """A weight of :func:`keeping_rounded`: by shape and strides, and whether the block is part of a graph."""

    found: dict[Any, Scaled]
    captured: bool


# By where weights lie. Shared by threads: on CUDA a backward runs in one of its own.
_kept: dict[int, _Kept] = {}


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def keeping_rounded(weights: Iterable[torch.Tensor]) -> Iterator[list[_Kept]]:
    """While the block runs, weights that nobody changes meanwhile are rounded once by rows and by columns.

    It changes no result. What isn't among ``weights``, such as a copy in another dtype, is rounded each time.
    A block within another one keeps what the other one doesn't. It gets what is kept of each weight.
    """
    held = [weight for weight in weights if weight.numel()]  # so that nothing else comes to lie there
    places = {weight.data_ptr() for weight in held} - _kept.keys()
    captured = bool(places) and _capturing()
    mine = {place: _Kept({}, captured) for place in places}
    try:
        _kept.update(mine)
        yield [*mine.values()]
    finally:
        for place in places:
            _kept.pop(place, None)


# ---- kernels ---------------------------------------------------------------------------------------------


def multiply(x: Scaled, w: Scaled, offsets_e: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (R, I) times weights (e, O, I) -> (R, O)."""
    if len(w.values) == 1:  # rows of no group, which are undefined, are multiplied too
        return _product(x.values, w.values[0].mT, x.scale[:, None], w.scale).to(dtype)
    from . import persistent

    out = x.values.new_empty(x.values.shape[0], w.values.shape[1], dtype=dtype)
    persistent.mm(x.values, w.values.mT, offsets_e, out, TILE, (x.scale, w.scale))
    return out


def multiply_columns(x: Columns, y: Columns) -> torch.Tensor:
    """Columns (I, R) and (O, R) -> (e, I, O)."""
    (a, scale_a), (b, scale_b) = x.scaled, y.scaled
    if len(x.ends) == 1:
        return _product(a, b.mT, scale_a.mT, scale_b)[None].to(x.dtype)
    from . import persistent

    out = a.new_empty(len(x.ends), a.shape[0], b.shape[0], dtype=x.dtype)
    persistent.outer(a, b, x.ends, out, TILE, (scale_a, scale_b))
    return out


def _product(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)
