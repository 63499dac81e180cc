"""Laying (token, choice) pairs out by expert: a stable counting sort that never asks the host.

Blocks of pairs are counted, and each expert's counts summed up block by block. A pair's place is where its
expert starts, plus those of earlier blocks, plus how many equal ones come before it in its block.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, power_of_2

BLOCK = 128


@triton.jit
def _expert(ids, pair, num_pairs, num_experts):
    """The experts of pairs, and ``num_experts`` for a pair of none."""
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit
def _count(ids, counts, num_pairs, num_experts, num_blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    expert = _expert(ids, block * BLOCK + tl.arange(0, BLOCK), num_pairs, num_experts)
    bin = tl.arange(0, BINS)
    place = counts + bin.to(tl.int64) * num_blocks + block
    tl.store(place, tl.histogram(expert, BINS), mask=bin < num_experts)


@triton.jit
def _sum_up(counts, totals, num_blocks, BLOCK: tl.constexpr):
    """Turn each expert's counts into those of earlier blocks."""
    expert = tl.program_id(0).to(tl.int64)
    earlier = 0
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        cell = counts + expert * num_blocks + block
        count = tl.load(cell, mask=block < num_blocks, other=0)
        tl.store(cell, earlier + tl.cumsum(count, 0) - count, mask=block < num_blocks)
        earlier += tl.sum(count, 0)
    tl.store(totals + expert, earlier)


@triton.jit
def _place(
    ids, counts, totals, slot, row, ends, num_pairs, num_rows, num_experts, num_blocks,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    pair = block * BLOCK + index
    expert = _expert(ids, pair, num_pairs, num_experts)
    # Summed over the axis that a thread holds whole.
    equal = (expert[:, None] == expert[None, :]) & (index[:, None] < index[None, :])
    before = tl.sum(equal.to(tl.int32), 0)
    held = expert < num_experts
    earlier = tl.load(counts + expert.to(tl.int64) * num_blocks + block, mask=held, other=0)
    bin = tl.arange(0, BINS)
    total = tl.load(totals + bin, mask=bin < num_experts, other=0)
    end = tl.cumsum(total, 0)
    tl.store(ends + bin, end, mask=(bin < num_experts) & (block == 0))
    all_held = tl.sum(total, 0)
    place = tl.where(held, tl.gather(end - total, expert, 0) + earlier + before, -1).to(tl.int64)
    tl.store(row + pair, place, mask=pair < num_pairs)
    tl.store(slot + place, pair.to(tl.int64), mask=held & (place < num_rows))
    nothing = tl.zeros([BLOCK], tl.int64) - 1
    tl.store(slot + pair, nothing, mask=(pair >= all_held) & (pair < num_rows))


def layout(
    ids: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The raw kernel of :data:`fmoe.ops.dispatch.layout`; ids of no expert are dropped."""
    ids, num_pairs = ids.contiguous(), ids.numel()
    if num_pairs == 0:
        slot = ids.new_full((num_rows,), -1, dtype=torch.int64)
        return slot, torch.empty_like(ids, dtype=torch.int64), ids.new_zeros(num_experts, dtype=torch.int32)
    num_blocks = cdiv(num_pairs, BLOCK)
    slot, row = ids.new_empty(num_rows, dtype=torch.int64), torch.empty_like(ids, dtype=torch.int64)
    counts = ids.new_empty(num_experts, num_blocks, dtype=torch.int32)
    totals, ends = (ids.new_empty(num_experts, dtype=torch.int32) for _ in range(2))
    bins = power_of_2(num_experts + 1)
    launch(_count, (num_blocks,), ids, counts, num_pairs, num_experts, num_blocks, BLOCK, bins)
    launch(_sum_up, (num_experts,), counts, totals, num_blocks, min(1024, power_of_2(num_blocks)))
    launch(
        _place,
        (cdiv(max(num_pairs, num_rows), BLOCK),),
        ids,
        counts,
        totals,
        slot,
        row,
        ends,
        num_pairs,
        num_rows,
        num_experts,
        num_blocks,
        BLOCK,
        bins,
    )
    return slot, row, ends


@triton.jit
def _rows(
    slot, offsets, weights, source, starts, row_weights, num_rows, num_experts,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, held = place < num_rows, place < tl.load(offsets + num_experts - 1)
    pair = tl.load(slot + place, mask=inside & held, other=-1)
    tl.store(source + place, (tl.maximum(pair, 0) // TOP_K).to(tl.int32), mask=inside)
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)
        tl.store(row_weights + place, weight, mask=inside)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, EXPERTS)
        end = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert <= num_experts), other=0)
        tl.store(starts + expert, end, mask=expert <= num_experts)


def rows(
    slot: torch.Tensor, offsets: torch.Tensor, top_k: int, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The raw kernel of ``gathered.rows_of``."""
    num_rows, num_experts = slot.shape[0], offsets.shape[0]
    source, starts = slot.new_empty(num_rows, dtype=torch.int32), offsets.new_empty(num_experts + 1)
    of_rows = None if weights is None else weights.new_empty(num_rows, dtype=torch.float32)
    launch(
        _rows, (max(1, cdiv(num_rows, 1024)),),
        slot, offsets, offsets if weights is None else weights.contiguous(), source, starts,
        source if of_rows is None else of_rows, num_rows, num_experts,
        top_k, weights is not None, power_of_2(num_experts + 1), 1024,
    )  # fmt: skip
    return source, starts, of_rows


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
    choices = power_of_2(top_k)
    block = max(4096 // choices, 16)
    launch(_ways, (size,), ids, slot, copy, lost, num_tokens, copies, held, top_k, choices, block)
    return slot, copy, lost
