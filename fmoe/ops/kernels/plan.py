"""Laying (token, choice) pairs out by expert: a stable counting sort that never asks the host.

Blocks of pairs are counted, and the counts are summed up expert by expert. A pair's place is where its block
starts plus how many equal ones come before it in the block.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _count(ids, counts, num_pairs, num_experts, num_blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
    for start in range(0, num_experts, BLOCK):
        column = start + tl.arange(0, BLOCK)
        count = tl.sum((expert[:, None] == column[None, :]).to(tl.int32), 0)
        tl.store(counts + column.to(tl.int64) * num_blocks + block, count, mask=column < num_experts)


@triton.jit
def _place(ids, ends, slot, row, num_pairs, num_rows, num_experts, num_blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    pair = block * BLOCK + index
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
    # Read once more along the other axis: cheaper than a transpose.
    other = tl.load(ids + block * BLOCK + index, mask=pair < num_pairs, other=-1)
    before = tl.sum(((expert[:, None] == other[None, :]) & (index[None, :] < index[:, None])).to(tl.int32), 1)
    held = (expert >= 0) & (expert < num_experts)
    cell = expert * num_blocks + block - 1  # the counts before this block's
    start = tl.load(ends + cell, mask=held & (cell >= 0), other=0)
    place = tl.where(held, start + before, -1).to(tl.int64)
    tl.store(row + pair, place, mask=pair < num_pairs)
    tl.store(slot + place, pair.to(tl.int64), mask=held & (place < num_rows))


def layout(
    ids: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The raw kernel of :data:`fmoe.ops.dispatch.layout`; ids of no expert are dropped."""
    ids, num_pairs = ids.contiguous(), ids.numel()
    slot, row = ids.new_full((num_rows,), -1, dtype=torch.int64), torch.empty_like(ids, dtype=torch.int64)
    if num_pairs == 0:
        return slot, row, ids.new_zeros(num_experts, dtype=torch.int32)
    num_blocks = triton.cdiv(num_pairs, BLOCK)
    counts = ids.new_empty(num_experts, num_blocks, dtype=torch.int32)
    _count[(num_blocks,)](ids, counts, num_pairs, num_experts, num_blocks, BLOCK)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    _place[(num_blocks,)](ids, ends, slot, row, num_pairs, num_rows, num_experts, num_blocks, BLOCK)
    return slot, row, ends.view(num_experts, num_blocks)[:, -1].contiguous()


@triton.jit
def _ways(
    ids, slot, copy, lost, num_tokens, copies, held,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    device, size = tl.program_id(0), tl.num_programs(0)
    choice, index = tl.arange(0, CHOICES), tl.arange(0, BLOCK)
    before = device * 0
    for start in range(0, num_tokens, BLOCK):
        token = (start + index).to(tl.int64)
        inside = token < num_tokens
        mask = inside[:, None] & (choice < TOP_K)[None, :]
        expert = tl.load(ids + token[:, None] * TOP_K + choice[None, :], mask=mask, other=-1)
        goes = (expert >= device * held) & (expert < (device + 1) * held)
        hit = tl.max(goes.to(tl.int32), 1)
        place = before + tl.cumsum(hit, 0) - hit
        fits = (hit > 0) & (place < copies)
        row = tl.where(fits, device * copies + place, -1).to(tl.int64)
        tl.store(copy + token * size + device, row, mask=inside)
        tl.store(slot + row, token * size + device, mask=fits)
        before += tl.sum(hit, 0)
    tl.store(lost + device, tl.maximum(before - copies, 0).to(tl.int64))
    for start in range(0, copies, BLOCK):
        place = start + index
        empty = (place >= before) & (place < copies)
        tl.store(slot + device * copies + place, tl.full([BLOCK], -1, tl.int64), mask=empty)


def ways(
    ids: torch.Tensor, size: int, held: int, copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The raw kernel of ``bounded_way``: one program for each of ``size`` devices goes through all tokens."""
    ids, (num_tokens, top_k) = ids.contiguous(), ids.shape
    slot, copy = ids.new_empty(size * copies), ids.new_empty(num_tokens, size)
    lost = ids.new_empty(size)
    choices = triton.next_power_of_2(top_k)
    block = max(4096 // choices, 16)
    _ways[(size,)](ids, slot, copy, lost, num_tokens, copies, held, top_k, choices, block)
    return slot, copy, lost
