"""Rows as e4m3 numbers with scales, made where the data passes anyway.

They are read once, where a program can hold one.
"""

import torch
import triton
import triton.language as tl

from ..precision import E4M3, LARGEST, SMALLEST_SCALE, Scaled
from .activation import sigmoid
from .launch import cdiv, launch, power_of_2

BLOCK = 1024
LONGEST = 8192  # numbers of a row that a program holds
WARPS = 4  # of a program that rounds rows
AT_ONCE = 256  # numbers of a row that a warp reads at once
PER_WARP = 1536  # that it holds at most


@triton.jit
def largest(most, AXIS: tl.constexpr):
    """The largest of absolute numbers along an axis, NaN if one is: their bits have this order."""
    bits = tl.max(most.to(tl.int32, bitcast=True), AXIS, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_of(most, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of numbers of which ``most`` is the largest."""
    scale = tl.maximum(tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32)), SMALLEST)
    return tl.where(most == most, tl.where(most == 0, 1.0, scale), float("nan"))


@triton.jit
def divisor_of(scale):
    """Arguments of :func:`rounded`: a factor, scale times factor, its reciprocal, and if any factor isn't 1.

    The factor keeps remainders of tiny scales from underflowing. It is zero for infinite ones, NaN for NaN.
    """
    finite, tiny = scale < float("inf"), scale < 2.0**-64
    factor = tl.where(finite, tl.where(tiny, 2.0**64, 1.0), tl.where(scale == scale, 0.0, scale))
    scale = tl.where(finite, scale * factor, 1.0)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return factor, scale, reciprocal, tl.max((factor != 1).to(tl.int32)) > 0


@triton.jit
def rounded(value, factor, scale, reciprocal, unusual):
    """The e4m3 number nearest to ``value / scale``, ties to even, bit for bit as if divided.

    That is a product with the reciprocal and Markstein's correction, negated so that zeros keep their sign.
    Over all scales, no quotient near the middle of two e4m3 numbers differed from that of a division.
    Infinite numbers become 1 or -1, for their scale is infinite or NaN.
    """
    if unusual:
        sign = tl.where(value > 0, 1.0, -1.0)
        value = tl.where(tl.abs(value) == float("inf"), sign, value * factor)
    quotient = value * reciprocal
    excess = tl.fma(quotient, tl.broadcast_to(scale, value.shape), value * -1.0)
    return tl.fma(excess, tl.broadcast_to(reciprocal * -1.0, value.shape), quotient).to(tl.float8e4nv)


@triton.jit
def swiglu_at(h, up, mask):
    """SwiGLU of the gates at ``h`` and of the numbers ``up`` places further."""
    gate = tl.load(h, mask=mask, other=0.0).to(tl.float32)
    return gate * sigmoid(gate) * tl.load(h + up, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row(x, row, col, num_cols, mask, ACTIVATION: tl.constexpr):
    if ACTIVATION:
        value = swiglu_at(x + row * 2 * num_cols + col, num_cols, mask)
    else:
        value = tl.load(x + row * num_cols + col, mask=mask, other=0.0)
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _rows(
    x, end, out, scales, num_rows, num_cols,
    ACTIVATION: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Hold the ``BLOCKS`` blocks of a row, so that it is read once. If zero, read it twice."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    if ACTIVATION:
        num_rows = tl.load(end)
    here = row < num_rows
    if tl.program_id(0) * TILE < num_rows:
        col = tl.arange(0, BLOCK)[None, :]
        most = tl.zeros([TILE, BLOCK], tl.float32)
        if BLOCKS > 0:
            held = ()
            for i in tl.static_range(BLOCKS):
                mask = here & (i * BLOCK + col < num_cols)
                value = _row(x, row, i * BLOCK + col, num_cols, mask, ACTIVATION)
                most = tl.maximum(most, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
                held += (value,)  # type: ignore[assignment]
            scale = scale_of(largest(most, 1), LARGEST, SMALLEST)
            factor, divisor, reciprocal, unusual = divisor_of(scale)
            for i in tl.static_range(BLOCKS):
                mask = here & (i * BLOCK + col < num_cols)
                value = rounded(held[i], factor, divisor, reciprocal, unusual)
                tl.store(out + row * num_cols + i * BLOCK + col, value, mask=mask)
        else:
            for start in range(0, num_cols, BLOCK):
                mask = here & (start + col < num_cols)
                value = _row(x, row, start + col, num_cols, mask, ACTIVATION)
                most = tl.maximum(most, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
            scale = scale_of(largest(most, 1), LARGEST, SMALLEST)
            factor, divisor, reciprocal, unusual = divisor_of(scale)
            for start in range(0, num_cols, BLOCK):
                mask = here & (start + col < num_cols)
                value = _row(x, row, start + col, num_cols, mask, ACTIVATION)
                value = rounded(value, factor, divisor, reciprocal, unusual)
                tl.store(out + row * num_cols + start + col, value, mask=mask)
        tl.store(scales + row, scale, mask=here)


def rows(x: torch.Tensor) -> Scaled:
    """Rows (..., K) of any tensor."""
    return _run_rows(x.contiguous(), None)


@triton.jit
def _restored(values, scales, out, stride, num_cols, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < num_cols
    value = tl.load(values + row * stride + col, mask=inside).to(tl.float32)
    scale = tl.load(scales + row * (num_cols // width) + col // width, mask=inside)
    tl.store(out + row * num_cols + col, tl.where(value == 0, value, value * scale), mask=inside)


def restored(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, B, K) times scales (R, B) in a dtype. Rows of values may lie apart, as in a message."""
    out, num_cols = scale.new_empty(values.shape, dtype=dtype), values[0:1].numel()
    if out.numel():
        given = values, scale.contiguous(), out, values.stride(0), num_cols, values.shape[2]
        launch(_restored, (len(out), cdiv(num_cols, BLOCK)), *given, BLOCK)
    return out


def activated(h: torch.Tensor, offsets: torch.Tensor) -> Scaled:
    """SwiGLU of pre-activations (R, 2, F), up to the last offset; further rows are left as they are."""
    return _run_rows(h.contiguous(), offsets[-1:])


def _run_rows(x: torch.Tensor, end: torch.Tensor | None) -> Scaled:
    shape = x.shape if end is None else (x.shape[0], x.shape[2])
    out, scale = x.new_empty(shape, dtype=E4M3), x.new_empty(shape[:-1], dtype=torch.float32)
    if out.numel():
        num_rows, num_cols = scale.numel(), shape[-1]
        warps = min(WARPS, power_of_2(cdiv(num_cols, PER_WARP)))  # for each row
        block = min(warps * AT_ONCE, power_of_2(num_cols))
        tile, blocks = WARPS * AT_ONCE // block, cdiv(num_cols, block) if num_cols <= LONGEST else 0
        values = x, x if end is None else end, out, scale, num_rows, num_cols
        how = end is not None, blocks, tile, block, LARGEST, SMALLEST_SCALE
        launch(_rows, (cdiv(num_rows, tile),), *values, *how, num_warps=WARPS)
    else:
        scale.fill_(1)
    return Scaled(out, scale)
