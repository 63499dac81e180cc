"""AdamW's update of one leaf in one pass: each number is read once and written once, in its own dtype."""

import math

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch

BLOCK = 2048


@triton.jit
def _adamw(
    p, g, m, v, step, rate, scale, numbers, lr, eps, weight_decay,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr,
    HAS_RATE: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    if HAS_RATE:
        lr = tl.load(rate)
    # In float32 the first powers of a beta near 1 would leave few digits of their distance from 1.
    count = tl.load(step).to(tl.float64) + 1
    unbiased1 = (1 - tl.exp2(count * tl.full([], LOG1, tl.float64))).to(tl.float32)
    unbiased2 = (1 - tl.exp2(count * tl.full([], LOG2, tl.float64))).to(tl.float32)
    grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(scale)
    param = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    mean += (grad - mean) * (1 - BETA1)
    square = square * BETA2 + grad * grad * (1 - BETA2)
    param -= lr * weight_decay * param
    param -= lr / unbiased1 * mean / (tl.sqrt(square / unbiased2) + eps)
    tl.store(p + at, param, mask=inside)
    tl.store(m + at, mean, mask=inside)
    tl.store(v + at, square, mask=inside)


def adamw(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: torch.Tensor,
    lr: float,
    rate: torch.Tensor | None,
    scale: torch.Tensor | None,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update a contiguous param and its moments in place. A ``rate`` goes before ``lr``."""
    launch(
        _adamw, (cdiv(p.numel(), BLOCK),),
        p, g, m, v, step, step if rate is None else rate, step if scale is None else scale,
        p.numel(), lr, eps, weight_decay,
        *betas, *map(math.log2, (max(beta, 1e-300) for beta in betas)),
        rate is not None, scale is not None, BLOCK,
    )  # fmt: skip
