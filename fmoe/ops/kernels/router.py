"""The router: choosing experts, weighing them, and exact products of float32 with bfloat16."""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, power_of_2

CHOSEN: tl.constexpr = tl.constexpr(-(2**31))
CLOSED: tl.constexpr = tl.constexpr(-(2**31) + 1)


@triton.jit
def _ranked(x):
    """Integers in the order of the floats; NaN counts as infinite, so that every row has its k experts."""
    bits = tl.where(x == x, x, float("inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _topk(
    scores, bias, ids, num_tokens, num_groups, top_groups, group_best,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    size = EXPERTS // num_groups
    expert = group[:, None] * size + member[None, :]
    known = (group < num_groups)[:, None] & (member < size)[None, :]
    exists = known[None, :, :]
    inside = exists & (token < num_tokens)[:, None, None]
    place = token.to(tl.int64)[:, None, None] * EXPERTS + expert[None, :, :]
    x = tl.load(scores + place, mask=inside, other=0.0)
    x += tl.load(bias + expert, mask=known, other=0.0)[None, :, :]
    rank = tl.where(exists, _ranked(x), CHOSEN)
    if LIMITED:
        left, score = rank, tl.zeros([TOKENS, GROUPS], tl.float32)
        for _ in range(group_best):
            where = tl.argmax(left, 2)
            score += tl.sum(tl.where(member[None, None, :] == where[:, :, None], x, 0.0), 2)
            left = tl.where(member[None, None, :] == where[:, :, None], CHOSEN, left)
        group_rank = tl.where((group < num_groups)[None, :], _ranked(score), CHOSEN)
        opened = tl.zeros([TOKENS, GROUPS], tl.int32)
        for _ in range(top_groups):
            where = tl.argmax(group_rank, 1)
            mine = group[None, :] == where[:, None]
            opened = tl.where(mine, 1, opened)
            group_rank = tl.where(mine, CHOSEN, group_rank)
        rank = tl.where(exists & (opened == 0)[:, :, None], CLOSED, rank)
    flat = tl.reshape(rank, [TOKENS, GROUPS * SIZE])
    index = tl.arange(0, GROUPS * SIZE)
    for k in tl.static_range(TOP_K):
        where = tl.argmax(flat, 1)
        found = (where // SIZE) * size + where % SIZE
        tl.store(ids + token.to(tl.int64) * TOP_K + k, found.to(tl.int64), mask=token < num_tokens)
        flat = tl.where(index[None, :] == where[:, None], CHOSEN, flat)


def topk(
    scores: torch.Tensor, bias: torch.Tensor, num_groups: int, top_groups: int, group_best: int, k: int
) -> torch.Tensor:
    """The ``k`` best experts of the best groups by ``scores + bias``, best first; of equals the first."""
    scores, bias = scores.contiguous(), bias.contiguous()
    num_tokens, num_experts = scores.shape
    ids = scores.new_empty(num_tokens, k, dtype=torch.int64)
    size = num_experts // num_groups
    limited = top_groups < num_groups
    if not limited:
        num_groups, size = 1, num_experts
    padded = power_of_2(num_groups), power_of_2(size)
    tokens = max(1, 4096 // (padded[0] * padded[1]))
    if num_tokens:
        launch(
            _topk, (cdiv(num_tokens, tokens),),
            scores, bias, ids, num_tokens, num_groups, top_groups, min(group_best, size),
            num_experts, k, tokens, *padded, limited,
        )  # fmt: skip
    return ids


@triton.jit
def _sigmoid(x):
    """No power of it overflows."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def _shares(x, slot, TOP_K: tl.constexpr, SIGMOID: tl.constexpr):
    """The weights of a row's first ``TOP_K``, which sum to one, by logarithms of scores."""
    logs = x
    if SIGMOID:
        logs = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    logs = tl.where((slot < TOP_K)[None, :], logs, float("-inf"))
    powers = tl.exp(logs - tl.max(logs, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _weigh(
    rows, ids, weights, counts, chosen, num_tokens, num_experts, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    inside = (token < num_tokens)[:, None] & (slot < TOP_K)[None, :]
    pair = token[:, None] * TOP_K + slot[None, :]
    expert = tl.load(ids + pair, mask=inside, other=0)
    x = tl.load(rows + token[:, None] * num_experts + expert, mask=inside, other=0.0)
    tl.store(chosen + pair, x, mask=inside)
    weight = x
    if NORMALIZE:
        weight = _shares(x, slot, TOP_K, SIGMOID)
    elif SIGMOID:
        weight = _sigmoid(x)
    tl.store(weights + pair, weight * scale, mask=inside)
    # The same pairs in a row. Those beyond the last count for a bin beyond the experts.
    place = tl.arange(0, TOKENS * SLOTS)
    other = tl.program_id(0).to(tl.int64) * TOKENS * TOP_K + place
    mine = (place < TOKENS * TOP_K) & (other // TOP_K < num_tokens)
    found = tl.load(ids + other, mask=mine, other=num_experts).to(tl.int32)
    bin = tl.arange(0, BINS)
    count = tl.histogram(found, BINS)
    tl.atomic_add(counts + bin, count.to(tl.int64), mask=(bin < num_experts) & (count > 0))


def weigh(
    rows: torch.Tensor, ids: torch.Tensor, sigmoid: bool, normalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The raw kernel of :data:`fmoe.ops.weigh.weigh`. Counts are integers, so their order doesn't matter."""
    rows, ids = rows.contiguous(), ids.contiguous()
    (num_tokens, num_experts), top_k = rows.shape, ids.shape[1]
    weights, chosen = rows.new_empty(ids.shape), rows.new_empty(ids.shape)
    counts = ids.new_zeros(num_experts)
    if num_tokens:
        slots = power_of_2(top_k)
        tokens = max(1, 512 // slots)
        launch(
            _weigh, (cdiv(num_tokens, tokens),),
            rows, ids, weights, counts, chosen, num_tokens, num_experts, scale,
            top_k, sigmoid, normalize, tokens, slots, power_of_2(num_experts + 1),
        )  # fmt: skip
    return weights, counts, chosen


@triton.jit
def _weigh_backward(
    g, chosen, ids, g_rows, num_tokens, num_experts, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot, column = tl.arange(0, SLOTS), tl.arange(0, EXPERTS)
    inside = (token < num_tokens)[:, None] & (slot < TOP_K)[None, :]
    pair = token[:, None] * TOP_K + slot[None, :]
    x = tl.load(chosen + pair, mask=inside, other=0.0)
    cotangent = tl.load(g + pair, mask=inside, other=0.0) * scale
    if NORMALIZE:
        share = _shares(x, slot, TOP_K, SIGMOID)
        cotangent = share * (cotangent - tl.sum(share * cotangent, 1)[:, None])
    if SIGMOID:
        cotangent *= _sigmoid(-x)
        if not NORMALIZE:
            cotangent *= _sigmoid(x)
    row = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + k, mask=token < num_tokens, other=-1)
        value = tl.sum(tl.where(slot[None, :] == k, cotangent, 0.0), 1)
        row = tl.where(column[None, :] == expert[:, None], value[:, None], row)
    place = token[:, None] * num_experts + column[None, :]
    tl.store(g_rows + place, row, mask=(token < num_tokens)[:, None] & (column < num_experts)[None, :])


def weigh_backward(
    g: torch.Tensor,
    chosen: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """The raw kernel of :data:`fmoe.ops.weigh.weigh_backward`."""
    g, chosen, ids, (num_tokens, top_k) = g.contiguous(), chosen.contiguous(), ids.contiguous(), ids.shape
    g_rows = g.new_empty(num_tokens, num_experts)
    if num_tokens:
        experts = power_of_2(num_experts)
        tokens = max(1, 4096 // experts)
        launch(
            _weigh_backward, (cdiv(num_tokens, tokens),),
            g, chosen, ids, g_rows, num_tokens, num_experts, scale,
            top_k, sigmoid, normalize, tokens, power_of_2(top_k), experts,
        )  # fmt: skip
    return g_rows


@triton.jit
def _thirds(x, out, num_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + row * num_cols + col, mask=col < num_cols, other=0.0)
    for part in tl.static_range(3):
        piece = rest.to(tl.bfloat16)
        tl.store(out + (row * 3 + part) * num_cols + col, piece, mask=col < num_cols)
        rest -= piece.to(tl.float32)


def thirds(x: torch.Tensor) -> torch.Tensor:
    """A float32 matrix (N, I) as three of bfloat16 side by side, (N, 3, I), whose sum it is."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], 3, x.shape[1], dtype=torch.bfloat16)
    if x.numel():
        block = min(1024, power_of_2(x.shape[1]))
        launch(_thirds, (x.shape[0], cdiv(x.shape[1], block)), x, out, x.shape[1], block)
    return out


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` accumulated in float32, one of the two bfloat16 and the other bfloat16 or float32.

    A product of two bfloat16 numbers is a float32 number, and a float32 number is a sum of three of
    bfloat16: nothing is rounded before it is summed.
    """
    if a.dtype == torch.float32:
        return _mm(thirds(a).flatten(1), _thrice(b), dtype)
    if b.dtype == torch.float32:
        return _mm(a, thirds(b).flatten(1), torch.float32).unflatten(1, (3, -1)).sum(1).to(dtype)
    return _mm(a, b, dtype)


@triton.jit
def _sum_thirds(parts, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(3):
        total += tl.load(parts + part * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total, mask=place < size)


def sum_thirds(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the first dimension, (3, N, I) -> (N, I), in ``dtype``."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    if out.numel():
        launch(_sum_thirds, (cdiv(out.numel(), 1024),), parts, out, out.numel(), 1024)
    return out


def product_backward(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents of ``a @ b``, both bfloat16, from a float32 one, whose thirds serve both."""
    parts = thirds(g).flatten(1)
    g_b = torch.mm(parts.mT, a, out_dtype=torch.float32).unflatten(0, (3, -1))
    return _mm(parts, _thrice(b.mT), a.dtype), sum_thirds(g_b, b.dtype)


def _thrice(b: torch.Tensor) -> torch.Tensor:
    """``b.repeat(3, 1)``, but faster on the host."""
    return b.expand(3, -1, -1).flatten(0, 1)


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32).to(dtype)


def multiplies(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether :func:`product` takes these."""
    dtypes, matrices = {a.dtype, b.dtype}, a.dim() == b.dim() == 2
    known = torch.bfloat16 in dtypes and dtypes <= {torch.bfloat16, torch.float32}
    return a.is_cuda and matrices and known
