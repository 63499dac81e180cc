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
