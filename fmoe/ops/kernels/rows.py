"""Moving rows between tokens and experts: gather, weighted sum, and its transpose.

Each row is read and written once. Sums are held in float32 and in a fixed order. ``slot`` is the (token,
choice) pair of each expanded row, ``token * K + choice``, or -1. ``row`` is its inverse.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, power_of_2

BLOCK, SLOTS = 1024, 128


@triton.jit
def _gather(x, index, out, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(index + row)
    value = tl.load(x + source * num_cols + col, mask=(col < num_cols) & (source >= 0), other=0.0)
    tl.store(out + row * num_cols + col, value, mask=col < num_cols)


@triton.jit
def _take(x, index, out, num_rows, num_cols, COLS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source, col = tl.load(index + row, mask=row < num_rows, other=-1), tl.arange(0, COLS)
    mask = (source >= 0)[:, None] & (col < num_cols)[None, :]
    value = tl.load(x + source[:, None] * num_cols + col[None, :], mask=mask, other=0.0)
    tl.store(out + row, tl.sum(value, 1), mask=row < num_rows)


def sums(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` (R, N), ``index`` of any shape -> that shape: the sum of each row of few numbers, zero for -1."""
    x, index, out = x.contiguous(), index.contiguous(), x.new_empty(index.shape)
    if out.numel():
        cols = power_of_2(x.shape[1])
        block = max(1, BLOCK // cols)
        launch(_take, (cdiv(out.numel(), block),), x, index, out, out.numel(), x.shape[1], cols, block)
    return out


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` by index; zeros for -1."""
    if x.shape[1] == 1:  # a program takes many such rows
        return sums(x, index)[:, None]
    x = x.contiguous()
    out = x.new_empty(index.shape[0], x.shape[1])
    if out.numel():
        launch(_gather, (out.shape[0], cdiv(out.shape[1], BLOCK)), x, index, out, out.shape[1], BLOCK)
    return out


@triton.jit
def _expand(
    x, row, slot, offsets, weights, out, num_tokens, num_groups, num_cols,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < num_cols
    if me < num_tokens:
        value = tl.load(x + me * num_cols + col, mask=inside, other=0.0)
        for k in tl.static_range(TOP_K):
            target = tl.load(row + me * TOP_K + k)
            scaled = value
            if WEIGHTED:
                scaled = value.to(tl.float32) * tl.load(weights + me * TOP_K + k).to(tl.float32)
            tl.store(out + target * num_cols + col, scaled, mask=inside & (target >= 0))
    else:  # programs beyond the tokens look for experts' rows of no pair, which are rare
        first, end = (me - num_tokens) * SLOTS, tl.load(offsets + num_groups - 1)
        place = first + tl.arange(0, SLOTS)
        if tl.min(tl.load(slot + place, mask=place < end, other=0), 0) < 0:
            for i in range(SLOTS):
                empty = tl.load(slot + first + i, mask=first + i < end, other=0) < 0
                zeros = tl.zeros([BLOCK], tl.float32)
                tl.store(out + (first + i) * num_cols + col, zeros, mask=inside & empty)


def expand(
    x: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """A copy of each token for each of its rows, times the pair's weight; zeros in experts' rows of no pair.

    It reads every token once, where :func:`gather` reads it K times from places far apart. Rows past the
    last offset are left as they are.
    """
    x, (num_tokens, top_k) = x.contiguous(), row.shape
    out = x.new_empty(slot.shape[0], x.shape[1])
    if x.numel() and out.numel():
        grid = num_tokens + cdiv(out.shape[0], SLOTS), cdiv(out.shape[1], BLOCK)
        scale = row if weights is None else weights.contiguous()
        launch(
            _expand, grid,
            x, row.contiguous(), slot, offsets, scale, out, num_tokens, offsets.shape[0], out.shape[1],
            top_k, weights is not None, BLOCK, SLOTS,
        )  # fmt: skip
    return out


@triton.jit
def _weighted_sum(
    y, row, weights, out, num_cols, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        source = tl.load(row + token * TOP_K + k)
        value = tl.load(y + source * num_cols + col, mask=(col < num_cols) & (source >= 0), other=0.0)
        if WEIGHTED:
            total += value.to(tl.float32) * tl.load(weights + token * TOP_K + k).to(tl.float32)
        else:
            total += value.to(tl.float32)
    tl.store(out + token * num_cols + col, total, mask=col < num_cols)


def weighted_sum(y: torch.Tensor, row: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``y`` (R, D), ``row`` (S, K) -> (S, D): each token's rows, weighted and summed."""
    y = y.contiguous()
    out = y.new_empty(row.shape[0], y.shape[1])
    if out.numel():
        grid = out.shape[0], cdiv(out.shape[1], BLOCK)
        scale = row if weights is None else weights.contiguous()
        launch(
            _weighted_sum,
            grid,
            y,
            row.contiguous(),
            scale,
            out,
            out.shape[1],
            row.shape[1],
            weights is not None,
            BLOCK,
        )
    return out


@triton.jit
def _spread(
    g, y, slot, weights, g_y, g_weights, num_cols,
    TOP_K: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(slot + row)
    if pair >= 0:
        weight = tl.load(weights + pair).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = col < num_cols
            cotangent = tl.load(g + (pair // TOP_K) * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            total += cotangent * tl.load(y + row * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            if WRITE:
                tl.store(g_y + row * num_cols + col, cotangent * weight, mask=inside)
        tl.store(g_weights + pair, tl.sum(total, 0))
    elif WRITE:
        for start in range(0, num_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            tl.store(g_y + row * num_cols + col, tl.zeros([BLOCK], tl.float32), mask=col < num_cols)


def spread(
    g: torch.Tensor, y: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The transpose of :func:`weighted_sum`: cotangents of ``y`` and of the weights.

    The weight of a pair without a row gets zero.
    """
    g_y = torch.empty_like(y, memory_format=torch.contiguous_format)
    return g_y, _run_spread(g, y, slot, weights, g_y)


def weight_gradients(
    g: torch.Tensor, y: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The cotangent of the weights alone."""
    return _run_spread(g, y, slot, weights, None)


def _run_spread(g: torch.Tensor, y: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor, g_y: Any) -> Any:
    g, y, g_weights = g.contiguous(), y.contiguous(), weights.new_zeros(weights.shape)
    if y.shape[0]:
        launch(
            _spread, (y.shape[0],),
            g, y, slot, weights.contiguous(), y if g_y is None else g_y, g_weights,
            y.shape[1], weights.shape[1], g_y is not None, BLOCK,
        )  # fmt: skip
    return g_weights
