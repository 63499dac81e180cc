"""A block of float32 logits: what a cross entropy needs of it in one reading, its cotangent in another."""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

BLOCK = 2048


@triton.jit
def _log_sum_exp(logits, row, num_cols, so_far, BLOCK: tl.constexpr):
    """The logarithm of the sum of a row's exponentials, and of the exponential of ``so_far``."""
    top, spread = so_far, 1.0
    for first in range(0, num_cols, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(logits + row * num_cols + col, mask=col < num_cols, other=-float("inf"))
        higher = tl.maximum(top, tl.max(value, 0))
        spread = spread * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
    return top + tl.log(spread)


@triton.jit
def _add_sums(logits, index, total, chosen, start, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(total + row, _log_sum_exp(logits, row, num_cols, tl.load(total + row), BLOCK))
    place = tl.load(index + row) - start
    if (place >= 0) & (place < num_cols):
        tl.store(chosen + row, tl.load(logits + row * num_cols + place))


def add_sums(
    logits: torch.Tensor, index: torch.Tensor, start: int, total: torch.Tensor, chosen: torch.Tensor
) -> None:
    """Take a block (N, v) of logits, beginning at entry ``start``, into each token's terms, in place."""
    if logits.numel():
        launch(
            _add_sums,
            (logits.shape[0],),
            logits,
            index.contiguous(),
            total,
            chosen,
            start,
            logits.shape[1],
            BLOCK,
        )


@triton.jit
def _cotangents(logits, index, total, g_total, g_chosen, out, start, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < num_cols
    value = tl.load(logits + row * num_cols + col, mask=inside, other=-float("inf"))
    g = tl.exp(value - tl.load(total + row)) * tl.load(g_total + row)
    g += tl.where(col == tl.load(index + row) - start, tl.load(g_chosen + row), 0.0)
    tl.store(out + row * num_cols + col, g, mask=inside)


def cotangents(
    logits: torch.Tensor,
    index: torch.Tensor,
    start: int,
    total: torch.Tensor,
    g: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The cotangent of a block of logits, in ``dtype``; in place if that is float32."""
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    if logits.numel():
        grid = logits.shape[0], cdiv(logits.shape[1], BLOCK)
        g_total, g_chosen = g.contiguous()
        launch(
            _cotangents,
            grid,
            logits,
            index.contiguous(),
            total,
            g_total,
            g_chosen,
            out,
            start,
            logits.shape[1],
            BLOCK,
        )
    return out


@triton.jit
def _losses_and_cotangents(logits, index, losses, out, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(index + row)
    chosen = tl.load(logits + row * num_cols + place, mask=place >= 0, other=0.0)
    total = _log_sum_exp(logits, row, num_cols, -float("inf"), BLOCK)
    tl.store(losses + row, tl.where(place >= 0, total - chosen, 0.0))
    for first in range(0, num_cols, BLOCK):
        col = first + tl.arange(0, BLOCK)
        inside = col < num_cols
        value = tl.load(logits + row * num_cols + col, mask=inside, other=-float("inf"))
        g = tl.exp(value - total) - tl.where(col == place, 1.0, 0.0)
        tl.store(out + row * num_cols + col, tl.where(place >= 0, g, 0.0), mask=inside)


def losses_and_cotangents(
    logits: torch.Tensor, index: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of each row, and the cotangent of its logits in ``dtype``; in place if float32."""
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    losses = logits.new_empty(logits.shape[0])
    if logits.numel():
        rows, columns = logits.shape
        values = logits, index.contiguous(), losses, out, columns
        launch(_losses_and_cotangents, (rows,), *values, 2 * BLOCK, num_warps=8)
    return losses, out
