"""The router: choosing experts in one pass, and exact products of float32 with bfloat16 on tensor cores."""

import torch
import triton
import triton.language as tl

CHOSEN: tl.constexpr = tl.constexpr(-(2**31))
CLOSED: tl.constexpr = tl.constexpr(-(2**31) + 1)


@triton.jit
def _ranked(x):
    """Integers in the order of the floats; NaN counts as infinite, so that every row has its k experts."""
    bits = tl.where(x == x, x, float("inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _topk(
    choice, ids, num_tokens, num_experts, num_groups, top_groups, group_best,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    LIMITED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group, member = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    size = num_experts // num_groups
    expert = group[:, None] * size + member[None, :]
    exists = ((group < num_groups)[:, None] & (member < size)[None, :])[None, :, :]
    inside = exists & (token < num_tokens)[:, None, None]
    place = token.to(tl.int64)[:, None, None] * num_experts + expert[None, :, :]
    x = tl.load(choice + place, mask=inside, other=0.0)
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


def topk(choice: torch.Tensor, num_groups: int, top_groups: int, group_best: int, k: int) -> torch.Tensor:
    """The ``k`` best experts of the best groups, best first; of equals the first."""
    choice = choice.contiguous()
    num_tokens, num_experts = choice.shape
    ids = choice.new_empty(num_tokens, k, dtype=torch.int64)
    size = num_experts // num_groups
    limited = top_groups < num_groups
    if not limited:
        num_groups, size = 1, num_experts
    padded = triton.next_power_of_2(num_groups), triton.next_power_of_2(size)
    tokens = max(1, 4096 // (padded[0] * padded[1]))
    if num_tokens:
        _topk[(triton.cdiv(num_tokens, tokens),)](
            choice, ids, num_tokens, num_experts, num_groups, top_groups, min(group_best, size),
            k, tokens, *padded, limited,
        )  # fmt: skip
    return ids


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
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _thirds[x.shape[0], triton.cdiv(x.shape[1], block)](x, out, x.shape[1], block)
    return out


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` accumulated in float32, one of the two bfloat16 and the other bfloat16 or float32.

    A product of two bfloat16 numbers is a float32 number, and a float32 number is a sum of three of
    bfloat16: nothing is rounded before it is summed.
    """
    if a.dtype == torch.float32:
        return _mm(thirds(a).flatten(1), b.repeat(3, 1), dtype)
    if b.dtype == torch.float32:
        return _mm(a, thirds(b).flatten(1), torch.float32).unflatten(1, (3, -1)).sum(1).to(dtype)
    return _mm(a, b, dtype)


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32).to(dtype)


def multiplies(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether :func:`product` takes these."""
    dtypes, matrices = {a.dtype, b.dtype}, a.dim() == b.dim() == 2
    known = torch.bfloat16 in dtypes and dtypes <= {torch.bfloat16, torch.float32}
    return a.is_cuda and matrices and known
