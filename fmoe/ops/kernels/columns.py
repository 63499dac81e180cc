"""Columns of rows in groups as e4m3 numbers with scales, made where the data passes anyway.

They are read twice: for the largest, then to write them, backwards, so that the second time many are still in
the cache. Where few groups would leave most of the device idle, a group's columns are split over several
programs, and a kernel before finds the largest of each part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..precision import E4M3, LARGEST, SMALLEST_SCALE, Scaled
from .launch import cdiv, launch, power_of_2, processors
from .quantise import divisor_of, largest, rounded, scale_of, swiglu_at
from .scaled import MULTIPLE, Columns

BUSY = 4  # programs that keep a multiprocessor busy
PLAIN, GATHERED, ACTIVATED = range(3)


class Walk(NamedTuple):
    """How a program goes through its columns: blocks of rows, loads that are under way meanwhile."""

    rows: int
    cols: int
    stages: int
    warps: int


# What was fastest on an H200 of 40 choices, on layers of 16B, 30B-A3B and 671B.
WALKS = {PLAIN: Walk(256, 64, 5, 8), GATHERED: Walk(64, 32, 3, 2), ACTIVATED: Walk(64, 64, 3, 4)}
SPLIT = Walk(64, 64, 3, 4)  # where several programs share columns


@triton.jit
def _tile(
    x, slot, weights, start, row, col, last, num_cols,
    TOP_K: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Rows of one group, counted from ``start``, by columns; zeros past its last row."""
    # Only ``start`` has 64 bits, so that a thread computes in 32: of few rows, and of fewer pairs than 2**31.
    inside = row < tl.minimum(last - start, 2**30).to(tl.int32)
    here = inside[:, None] & (col < num_cols)[None, :]
    if KIND != 0:
        pair = tl.load(slot + start + row, mask=inside, other=-1).to(tl.int32)
    if KIND == 1:
        here = here & (pair >= 0)[:, None]
        token = (pair // TOP_K).to(tl.int64)[:, None]
        value = tl.load(x + token * num_cols + col[None, :], mask=here, other=0.0).to(tl.float32)
    elif KIND == 2:
        place = row[:, None] * (2 * num_cols) + col[None, :]
        value = swiglu_at(x + start * 2 * num_cols + place, num_cols, here)
    else:
        place = row[:, None] * num_cols + col[None, :]
        value = tl.load(x + start * num_cols + place, mask=here, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)[:, None]
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _place(KIND: tl.constexpr):
    """A program's group, block of columns and part of the rows, and the number of parts.

    Neighbours read the same rows, where these lie in order; else the same columns, which the cache can hold.
    """
    group, block = tl.program_id(0 if KIND == 1 else 1), tl.program_id(1 if KIND == 1 else 0)
    return group.to(tl.int64), block, tl.program_id(2), tl.num_programs(2)


@triton.jit
def _span(
    offsets, group, num_groups, num_cols, width,
    EQUAL: tl.constexpr, GROUPS: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """A group's first and last row, and where its columns begin in the result and how long they are there."""
    if EQUAL:  # groups of ``width`` rows, each written to a matrix of its own
        first, last, place, padded = group * width, (group + 1) * width, group * width * num_cols, width
    else:
        index = tl.arange(0, GROUPS)
        end = tl.load(offsets + index, mask=index < num_groups, other=0)
        begin = tl.load(offsets + index - 1, mask=(index > 0) & (index < num_groups), other=0)
        size = tl.where(index < num_groups, (end - begin + MULTIPLE - 1) // MULTIPLE, 0)
        first = tl.sum(tl.where(index == group, begin, 0), 0).to(tl.int64)
        last = tl.sum(tl.where(index == group, end, 0), 0).to(tl.int64)
        # Multiplied last, so that the compiler knows the multiple and writes 16 bytes at a time.
        place = tl.sum(tl.where(index < group, size, 0), 0) * MULTIPLE
        padded = tl.sum(tl.where(index == group, size, 0), 0) * MULTIPLE
    return first, last, place, padded


@triton.jit
def _most(
    x, slot, weights, first, last, step, col, num_cols,
    TOP_K: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    most = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(first, last, step, num_stages=STAGES):
        value = _tile(x, slot, weights, start, tl.arange(0, ROWS), col, last, num_cols, TOP_K, KIND, WEIGHTED)
        most = tl.maximum(most, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    return most


@triton.jit
def _parts(
    x, slot, weights, offsets, parts, num_groups, num_cols, width,
    TOP_K: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, EQUAL: tl.constexpr,
    GROUPS: tl.constexpr, MULTIPLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The largest number of each part of a group's columns: every so many blocks of rows."""
    group, block, part, num_parts = _place(KIND)
    col = block * COLS + tl.arange(0, COLS)
    first, last, _, _ = _span(offsets, group, num_groups, num_cols, width, EQUAL, GROUPS, MULTIPLE)
    first, step = first + part * ROWS, num_parts * ROWS
    most = _most(
        x, slot, weights, first, last, step, col, num_cols, TOP_K, KIND, WEIGHTED, ROWS, COLS, STAGES
    )
    target = parts + (group * num_parts + part) * num_cols + col[None, :]
    tl.store(target, largest(most, 0), mask=(col < num_cols)[None, :])


@triton.jit
def _columns(
    x, slot, weights, offsets, parts, out, scales, ends, num_groups, num_cols, width,
    TOP_K: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, EQUAL: tl.constexpr,
    GROUPS: tl.constexpr, MULTIPLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    group, block, part, num_parts = _place(KIND)
    col = block * COLS + tl.arange(0, COLS)
    first, last, place, padded = _span(offsets, group, num_groups, num_cols, width, EQUAL, GROUPS, MULTIPLE)
    if not EQUAL:
        if (block == 0) & (part == 0):
            tl.store(ends + group, place + padded)
        if num_groups == 1:  # PyTorch's product of one group reads all
            padded = width
    if SPLIT:
        most = _most(
            parts + group * num_parts * num_cols, slot, weights, 0, num_parts, ROWS, col, num_cols,
            1, 0, False, ROWS, COLS, STAGES,
        )  # fmt: skip
    else:
        most = _most(
            x, slot, weights, first, last, ROWS, col, num_cols, TOP_K, KIND, WEIGHTED, ROWS, COLS, STAGES
        )
    scale = scale_of(largest(most, 0), LARGEST, SMALLEST)
    tl.store(scales + group * num_cols + col[None, :], scale, mask=(col < num_cols)[None, :])
    factor, divisor, reciprocal, unusual = divisor_of(scale)
    # One thread makes a word of four rows' e4m3 numbers, which goes to the thread that writes the column.
    every = 4 * tl.arange(0, ROWS // 4)
    num_blocks = tl.cdiv(padded, ROWS).to(tl.int32)
    for index in tl.range(part, num_blocks, num_parts, num_stages=STAGES):
        start = (num_blocks - 1 - index) * ROWS
        a = _tile(x, slot, weights, first + start, every, col, last, num_cols, TOP_K, KIND, WEIGHTED)
        b = _tile(x, slot, weights, first + start, every + 1, col, last, num_cols, TOP_K, KIND, WEIGHTED)
        c = _tile(x, slot, weights, first + start, every + 2, col, last, num_cols, TOP_K, KIND, WEIGHTED)
        d = _tile(x, slot, weights, first + start, every + 3, col, last, num_cols, TOP_K, KIND, WEIGHTED)
        value = rounded(
            tl.join(tl.join(a, c), tl.join(b, d)),
            factor[:, :, None, None], divisor[:, :, None, None], reciprocal[:, :, None, None], unusual,
        )  # fmt: skip
        value = tl.reshape(tl.permute(value, 1, 0, 2, 3), [COLS, ROWS])
        row = start + tl.arange(0, ROWS)[None, :]
        target = out + place + col[:, None].to(tl.int64) * width + row
        tl.store(target, value, mask=(row < padded) & (col < num_cols)[:, None])


def of_rows(x: torch.Tensor, offsets: torch.Tensor) -> Columns:
    """The columns of rows (R, C)."""
    return _run(x, offsets, x.shape[0], x.shape[1], PLAIN)


def of_tokens(
    x: torch.Tensor, slot: torch.Tensor, offsets: torch.Tensor, top_k: int, weights: torch.Tensor | None
) -> Columns:
    """Those of a copy of each token for each of its rows, times the pair's weight."""
    return _run(x, offsets, slot.shape[0], x.shape[1], GATHERED, slot, weights, top_k)


def of_activations(
    h: torch.Tensor, slot: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
) -> Columns:
    """Those of SwiGLU of pre-activations (R, 2, F), times the weight of each row's pair."""
    return _run(h, offsets, h.shape[0], h.shape[2], ACTIVATED, slot, weights)


def _run(
    x: torch.Tensor,
    offsets: torch.Tensor,
    num_rows: int,
    num_cols: int,
    kind: int,
    slot: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    top_k: int = 1,
) -> Columns:
    x, num_groups = x.contiguous(), offsets.shape[0]
    width = cdiv(num_rows + num_groups * (MULTIPLE - 1), MULTIPLE) * MULTIPLE
    out, ends = x.new_empty(num_cols, width, dtype=E4M3), torch.empty_like(offsets)
    scale = x.new_empty(num_groups, num_cols, dtype=torch.float32)
    slot, weighted = offsets if slot is None else slot, weights is not None
    given = x, slot, offsets if weights is None else weights.contiguous(), offsets
    how = top_k, kind, weighted, False, power_of_2(num_groups)
    _write(given, out, scale, ends, num_rows, width, how)
    return Columns(Scaled(out, scale), ends, x.dtype)


def of_weights(w_eIO: torch.Tensor) -> Scaled:
    """Weights (e, I, O) by columns: values (e, O, I), scales (e, O)."""
    num_groups, width, num_cols = w_eIO.shape
    out = w_eIO.new_empty(num_groups, num_cols, width, dtype=E4M3)
    scale = w_eIO.new_empty(num_groups, num_cols, dtype=torch.float32)
    _write([w_eIO] * 4, out, scale, w_eIO, width, width, (1, PLAIN, False, True, 1))
    return Scaled(out, scale)


def _write(
    given: Sequence[torch.Tensor],
    out: torch.Tensor,
    scale: torch.Tensor,
    ends: torch.Tensor,
    num_rows: int,
    width: int,
    how: tuple[int, ...],
) -> None:
    (num_groups, num_cols), kind = scale.shape, how[1]
    splits = num_splits(num_groups * cdiv(num_cols, SPLIT.cols), num_rows, out.device)
    walk = SPLIT if splits > 1 or given[0].element_size() > 2 else WALKS[kind]
    places = num_groups, cdiv(num_cols, walk.cols)
    grid = (*(places if kind == GATHERED else places[::-1]), splits)
    sizes, how, parts = (num_groups, num_cols, width), (*how, MULTIPLE, *walk[:3]), scale
    if splits > 1:
        parts = scale.new_empty(num_groups, splits, num_cols)
        launch(_parts, grid, *given, parts, *sizes, *how, num_warps=walk.warps)
    values = *given, parts, out, scale, ends, *sizes, *how, splits > 1, LARGEST, SMALLEST_SCALE
    # With SwiGLU's registers, a multiprocessor would have room for three programs instead of four.
    few = {"maxnreg": 128} if kind == ACTIVATED else {}
    launch(_columns, grid, *values, num_warps=walk.warps, **few)


def num_splits(programs: int, num_rows: int, device: torch.device) -> int:
    """The programs for each block of columns, where one for each would be so many.

    >>> num_splits(2048, 98304, torch.device("cpu")), num_splits(2, 98304, torch.device("cpu"))
    (1, 6)
    """
    return max(1, min(BUSY * processors(device) // programs, cdiv(num_rows, SPLIT.rows)))
