"""Persistent grouped products for Hopper: tiles of every expert in one launch, moved by the TMA engine.

Rows of x are grouped by expert; a tile of 128 or so rows belongs to one expert, so its last rows may be
the next expert's. Loading those is harmless (a row of the product depends on its own row only),
and *ragged* descriptors keep them from being stored. Where rows are summed over, in weight
gradients, ragged loads give zeros for them instead.

Operands in fp8 come with the scales of what isn't summed over, and sums are multiplied by them. Where
rows are summed over they come as columns, whose groups are padded with zeros to whole tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import cdiv, launch, power_of_2, processors
from .tuned import Tile


class Tiles(NamedTuple):
    """The expert that each block of rows belongs to: ``expert`` (blocks,), ``start`` (e + 1,), both int32."""

    expert: torch.Tensor
    start: torch.Tensor


@triton.jit
def _blocks(
    offsets, expert_of, starts, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    me = tl.program_id(0)
    index = tl.arange(0, EXPERTS)
    end = tl.load(offsets + index, mask=index < num_experts, other=0)
    begin = tl.load(offsets + index - 1, mask=(index > 0) & (index < num_experts), other=0)
    size = tl.where(index < num_experts, (end - begin + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(index < me, size, 0), 0)
    mine = tl.sum(tl.where(index == me, size, 0), 0)
    tl.store(starts + me, first)
    if me + 1 == num_experts:
        tl.store(starts + num_experts, first + mine)
    for done in range(0, mine, BLOCK):
        place = done + tl.arange(0, BLOCK)
        tl.store(expert_of + first + place, tl.zeros([BLOCK], tl.int32) + me, mask=place < mine)


def row_blocks(offsets: torch.Tensor, num_rows: int, rows: int) -> Tiles:
    """The blocks of ``rows`` rows that cover every expert's rows."""
    num_experts = offsets.shape[0]
    expert = offsets.new_empty(cdiv(num_rows, rows) + num_experts)
    start = offsets.new_empty(num_experts + 1)
    launch(
        _blocks,
        (num_experts,),
        offsets,
        expert,
        start,
        num_experts,
        rows,
        power_of_2(num_experts),
        128,
    )
    return Tiles(expert, start)


@triton.jit
def _swizzle(index, num_row_blocks, num_col_blocks, BAND: tl.constexpr):
    """Neighbouring programs share rows and columns: bands of row blocks, columns after columns."""
    band = index // (BAND * num_col_blocks)
    height = min(num_row_blocks - band * BAND, BAND)
    inside = index % (BAND * num_col_blocks)
    return band * BAND + inside % height, inside // height


@triton.jit
def _locate(index, offsets, expert_of, starts, num_col_blocks, BAND: tl.constexpr):
    """The expert of a tile, its first row and number of rows, and the tile's place among them."""
    expert = tl.load(expert_of + index // num_col_blocks)
    first = tl.load(starts + expert)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    size = tl.load(offsets + expert) - begin
    num_row_blocks = tl.load(starts + expert + 1) - first
    row, col = _swizzle(index - first * num_col_blocks, num_row_blocks, num_col_blocks, BAND)
    return expert, begin, size, row, col


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns: stored in turn, they need half the shared memory."""
    pair = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pair, [0, 2, 1]))


@triton.jit
def _times_scales(tile, down, across, row, num_rows, col, num_cols):
    """A tile of sums times the scale of each row and of each column."""
    i, j = row + tl.arange(0, tile.shape[0]), col + tl.arange(0, tile.shape[1])
    down = tl.load(down + i, mask=i < num_rows, other=0.0)
    across = tl.load(across + j, mask=j < num_cols, other=0.0)
    return tile * down[:, None] * across[None, :]


@triton.jit
def _mm(
    x, w, out, x_scale, w_scale, offsets, expert_of, starts, num_experts, num_cols, depth,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    num_col_blocks = tl.cdiv(num_cols, COLS)
    total = tl.load(starts + num_experts) * num_col_blocks
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
        expert, begin, size, row, col = _locate(index, offsets, expert_of, starts, num_col_blocks, BAND)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for k in tl.range(0, depth, DEPTH):
            a = x.load([begin + row * ROWS, k])
            if TRANSPOSED:
                b = tl.reshape(w.load([expert, col * COLS, k]), [COLS, DEPTH]).T
            else:
                b = tl.reshape(w.load([expert, k, col * COLS]), [DEPTH, COLS])
            acc = tl.dot(a, b, acc)
        if SCALED:
            across = w_scale + expert.to(tl.int64) * num_cols
            acc = _times_scales(acc, x_scale + begin, across, row * ROWS, size, col * COLS, num_cols)
        left, right = _halves(acc.to(out.dtype))
        i, j, k = to_ragged_indices(begin, size, row * ROWS)
        out.store([i, j, k, col * COLS], tl.reshape(left, [1, 1, ROWS, COLS // 2]))
        out.store([i, j, k, col * COLS + COLS // 2], tl.reshape(right, [1, 1, ROWS, COLS // 2]))


@triton.jit
def _outer(
    x, y, out, x_scale, y_scale, offsets, num_experts, num_x_cols, num_y_cols,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    num_row_blocks, num_col_blocks = tl.cdiv(num_x_cols, ROWS), tl.cdiv(num_y_cols, COLS)
    blocks = num_row_blocks * num_col_blocks
    for index in tl.range(tl.program_id(0), num_experts * blocks, tl.num_programs(0)):
        expert = index // blocks
        row, col = _swizzle(index % blocks, num_row_blocks, num_col_blocks, BAND)
        begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        size = tl.load(offsets + expert) - begin
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for k in tl.range(0, size, DEPTH):
            if SCALED:
                a = x.load([row * ROWS, begin + k])
                b = y.load([col * COLS, begin + k]).T
            else:
                i, j, first = to_ragged_indices(begin, size, k)
                a = tl.reshape(x.load([i, j, first, row * ROWS]), [DEPTH, ROWS]).T
                b = tl.reshape(y.load([i, j, first, col * COLS]), [DEPTH, COLS])
            acc = tl.dot(a, b, acc)
        if SCALED:
            down = x_scale + expert.to(tl.int64) * num_x_cols
            across = y_scale + expert.to(tl.int64) * num_y_cols
            acc = _times_scales(acc, down, across, row * ROWS, num_x_cols, col * COLS, num_y_cols)
        left, right = _halves(acc.to(out.dtype))
        out.store([expert, row * ROWS, col * COLS], tl.reshape(left, [1, ROWS, COLS // 2]))
        out.store([expert, row * ROWS, col * COLS + COLS // 2], tl.reshape(right, [1, ROWS, COLS // 2]))


# What was fastest on an H200 in whole steps, of twelve choices; docs/performance.md has the log.
TILE = Tile(rows=128, cols=256, depth=64, warps=8, stages=3)
BAND = 8


def mm(
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    tile: Tile | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """``x`` (R, I) in groups times ``w`` (e, I, O) into ``out`` (R, O), times scales (R,) and (e, O)."""
    tile, transposed = tile or TILE, w.stride(1) == 1
    blocks = row_blocks(offsets, x.shape[0], tile.rows)
    box = (1, tile.cols, tile.depth) if transposed else (1, tile.depth, tile.cols)
    launch(
        _mm, (processors(x.device),),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w.mT if transposed else w, list(box)),
        create_ragged_descriptor(out, [tile.rows, tile.cols // 2]),
        *(scales or (offsets, offsets)), offsets, *blocks, offsets.shape[0], w.shape[2], x.shape[1],
        transposed, scales is not None, tile.rows, tile.cols, tile.depth, BAND,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def outer(
    x: torch.Tensor,
    y: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    tile: Tile | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """``x`` (R, I), ``y`` (R, O) in groups into ``out`` (e, I, O): each group's x transposed times its y.

    With scales (e, I) and (e, O) these are columns ``x`` (I, R), ``y`` (O, R), in groups of whole tiles.
    """
    tile = tile or TILE
    if scales:
        a = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        b = TensorDescriptor.from_tensor(y, [tile.cols, tile.depth])
    else:
        a = create_ragged_descriptor(x, [tile.depth, tile.rows])
        b = create_ragged_descriptor(y, [tile.depth, tile.cols])
    launch(
        _outer, (processors(out.device),),
        a, b, TensorDescriptor.from_tensor(out, [1, tile.rows, tile.cols // 2]),
        *(scales or (offsets, offsets)), offsets, *out.shape,
        scales is not None, tile.rows, tile.cols, tile.depth, BAND,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
