"""SwiGLU of the rows experts hold, and its backward together with the routing weight's.

Only rows before the last offset are computed; the others belong to nobody. Of those, a row of no pair has
a weight of zero.
"""

import torch
import triton
import triton.language as tl

from .gathered import paired
from .launch import cdiv, launch

BLOCK = 512


@triton.jit
def sigmoid(x):
    """``tl.sigmoid`` with fewer instructions, on a GPU bit for bit the same.

    There ``tl.exp`` takes care of denormal results, which are lost anyway when 1 is added.
    """
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _swiglu(
    h, slot, weights, offsets, act, num_groups, num_cols,
    PAIRED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + num_groups - 1):
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = col < num_cols
        if PAIRED:
            both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
            pair = tl.load(h + row * 2 * num_cols + both, mask=both < 2 * num_cols, other=0.0)
            gate, up = tl.split(tl.reshape(pair.to(tl.float32), [BLOCK, 2]))
        else:
            gate = tl.load(h + row * 2 * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(h + (row * 2 + 1) * num_cols + col, mask=inside, other=0.0).to(tl.float32)
        value = gate * sigmoid(gate) * up
        if WEIGHTED:
            pair = tl.load(slot + row)
            value *= tl.load(weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)
        tl.store(act + row * num_cols + col, value, mask=inside)


def swiglu(
    h: torch.Tensor, slot: torch.Tensor, weights: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """``silu(gate) * up`` of pre-activations (R, 2, F), times the weight of each row's pair."""
    side_by_side = paired(h)
    h = h if side_by_side else h.contiguous()
    act = h.new_empty(h.shape[0], h.shape[2])
    if act.numel():
        grid = act.shape[0], cdiv(act.shape[1], BLOCK)
        scale = slot if weights is None else weights.contiguous()
        launch(
            _swiglu,
            grid,
            h,
            slot,
            scale,
            offsets,
            act,
            offsets.shape[0],
            act.shape[1],
            side_by_side,
            weights is not None,
            BLOCK,
        )
    return act


@triton.jit
def _swiglu_backward(
    g_act, h, slot, row_of, weights, offsets, g_h, g_weights, num_groups, num_cols, num_rows, num_pairs,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row >= num_rows:  # programs beyond the rows look for pairs without one
        other = (row - num_rows) * BLOCK + tl.arange(0, BLOCK)
        place = tl.load(row_of + other, mask=other < num_pairs, other=0)
        nowhere = (other < num_pairs) & ((place < 0) | (place >= num_rows))
        tl.store(g_weights + other, tl.zeros([BLOCK], tl.float32), mask=nowhere)
    elif row < tl.load(offsets + num_groups - 1):
        weight = 1.0
        if WEIGHTED:
            pair = tl.load(slot + row)
            weight = tl.load(weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = col < num_cols
            gate = tl.load(h + row * 2 * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(h + (row * 2 + 1) * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(g_act + row * num_cols + col, mask=inside, other=0.0).to(tl.float32)
            sig = sigmoid(gate)
            silu = gate * sig
            total += g * silu * up
            g *= weight
            tl.store(g_h + row * 2 * num_cols + col, g * up * (sig + silu * (1 - sig)), mask=inside)
            tl.store(g_h + (row * 2 + 1) * num_cols + col, g * silu, mask=inside)
        if WEIGHTED:
            tl.store(g_weights + pair, tl.sum(total, 0), mask=pair >= 0)


def swiglu_backward(
    g_act: torch.Tensor,
    h: torch.Tensor,
    slot: torch.Tensor,
    row: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    *,
    weighted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cotangents of the pre-activation and of the weights, from that of the activation before weights.

    The weight of a pair without a row gets zero. That of the weights has no element unless ``weighted``.
    """
    h, g_act, num_rows = h.contiguous(), g_act.contiguous(), h.shape[0]
    num_pairs = row.numel() if weighted else 0
    g_h, g_weights = torch.empty_like(h), weights.new_empty(weights.shape if weighted else 0)
    if grid := num_rows + cdiv(num_pairs, BLOCK):
        launch(
            _swiglu_backward, (grid,),
            g_act, h, slot, row.contiguous(), weights.contiguous(), offsets, g_h, g_weights,
            offsets.shape[0], h.shape[2], num_rows, num_pairs, weighted, BLOCK,
        )  # fmt: skip
    return g_h, g_weights
