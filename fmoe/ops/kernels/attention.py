"""Causal attention by the first of PyTorch's own kernels that is able, and proven here.

``cpu``        PyTorch's flash attention for CPUs
``cudnn``      cuDNN's, for bfloat16 and float16
``flash``      FlashAttention 2; narrower heads are filled with zeros
``varlen``     FlashAttention 2 over sequences of unequal lengths, for segments
``efficient``  the memory-efficient one, for float32 too; of segments it wants a mask of L x L
``plain``      products and a softmax in float32 or wider, which hold all L x L scores

All take and give (B, H, L, N), and ``lse`` is (B, H, L). Those that know segments take them as two more
arguments, ``first`` and ``offsets`` of :class:`~fmoe.ops.segments.Segments`. The environment variable
``FMOE_ATTENTION`` names an engine to use instead. What an engine of a GPU computes depends on driver, library
and card. So before its first use for a kind of heads it must agree with the plain products on a small example
on this very device. If it doesn't, or raises, a warning says so and the next one is tried.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..core.dtypes import accumulator
from .choice import chosen

OVERRIDE = "FMOE_ATTENTION"
# How far an engine may be from the plain products in float32, relative to the largest value.
AGREEMENT = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 0.003}

Tensors = tuple[torch.Tensor, ...]
aten = torch.ops.aten


class Engine(NamedTuple):
    """``forward(q, k, v, scale)`` -> y, lse; ``backward(g, q, k, v, scale, y, lse)`` -> three cotangents.

    ``first`` and ``offsets`` follow where there are segments. If it ``shares``, ``k`` and ``v`` may have
    fewer heads than ``q``, a divisor of them.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    shares: bool = False


def forward(q: Any, k: Any, v: Any, scale: float, *segments: Any, by: Engine | None = None) -> Tensors:
    """By the engine for such inputs. It sees repeated heads of keys and values unless it shares them."""
    by = by or engine(q, k, v, *segments)
    return by.forward(q, *_repeated(by, q, k, v), scale, *segments)


def backward(
    g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any, *segments: Any, by: Engine | None = None
) -> Tensors:
    by = by or engine(q, k, v, *segments)
    of_q, *rest = by.backward(g, q, *_repeated(by, q, k, v), scale, y, lse, *segments)
    groups = k.shape[1]
    return of_q, *(t if t.shape[1] == groups else t.unflatten(1, (groups, -1)).sum(2) for t in rest)


def _repeated(by: Engine, q: torch.Tensor, *of_keys: torch.Tensor) -> list[torch.Tensor]:
    """(B, G, L, N) -> (B, H, L, N), each head as often in a row as heads of queries share it."""
    times = 1 if by.shares else q.shape[1] // max(of_keys[0].shape[1], 1)
    if times == 1:
        return [*of_keys]
    return [t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in of_keys]


def later(length: int, device: torch.device) -> torch.Tensor:
    """(L, L), true where a key comes after its query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def earlier(first: torch.Tensor, keys: int) -> torch.Tensor:
    """(B, L) -> (B, 1, L, keys), true where a key comes before its query's segment."""
    return torch.arange(keys, device=first.device) < first[:, None, :, None]


def _hidden(q: torch.Tensor, segments: Tensors) -> torch.Tensor:
    """True where a query doesn't see a key."""
    after = later(q.shape[2], q.device)
    return after | earlier(segments[0], q.shape[2]) if segments else after


def _bias(q: torch.Tensor, segments: Tensors, multiple: int = 1) -> torch.Tensor | None:
    """Minus infinity where a key comes before its query's segment, as (B, 1, L, L); ``None`` without any.

    Its rows begin at multiples of ``multiple``.
    """
    if not segments:
        return None
    length = q.shape[2]
    before = earlier(segments[0], length + -length % multiple)
    bias = torch.zeros(before.shape, dtype=q.dtype, device=q.device).masked_fill_(before, -torch.inf)
    return bias[..., :length]


def _plain_forward(q: Any, k: Any, v: Any, scale: float, *segments: Any) -> Tensors:
    wide = accumulator(q.dtype)
    scores = (q.to(wide) @ k.to(wide).mT * scale).masked_fill(_hidden(q, segments), -torch.inf)
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype), scores.logsumexp(-1)


def _plain_backward(
    g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any, *segments: Any
) -> Tensors:
    wide = accumulator(q.dtype)
    g, q, k, v, y = (t.to(wide) for t in (g, q, k, v, y))
    p = (q @ k.mT * scale - lse[..., None]).exp().masked_fill(_hidden(q, segments), 0.0)
    g_scores = p * (g @ v.mT - (g * y).sum(-1, keepdim=True)) * scale
    return g_scores @ k, g_scores.mT @ q, p.mT @ g


def _cpu_forward(q: Any, k: Any, v: Any, scale: float, *segments: Any) -> Tensors:
    forward, how = aten._scaled_dot_product_flash_attention_for_cpu, {"scale": scale}
    y, lse = forward(*_equally_wide(q, k, v), 0.0, True, attn_mask=_bias(q, segments), **how)
    return y[..., : v.shape[-1]], lse


def _cpu_backward(g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any, *segments: Any) -> Tensors:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    wide, mask = _equally_wide(g, q, k, v, y), _bias(q, segments)
    return _cut(backward(*wide, lse, 0.0, True, attn_mask=mask, scale=scale), q, k, v)


def _cudnn_forward(q: Any, k: Any, v: Any, scale: float) -> Tensors:
    y, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return y, lse.view(q.shape[:-1])


def _cudnn_backward(g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any) -> Tensors:
    unused = torch.zeros(1, dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    length, rest = q.shape[2], (0.0, True)
    return aten._scaled_dot_product_cudnn_attention_backward(
        g, q, k, v, y, lse[..., None], unused, unused, None, None, None, length, length, *rest, scale=scale
    )


def _flash_forward(q: Any, k: Any, v: Any, scale: float) -> Tensors:
    y, lse, *_ = aten._scaled_dot_product_flash_attention(*_equally_wide(q, k, v), 0.0, True, scale=scale)
    return y[..., : v.shape[-1]], lse


def _flash_backward(g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any) -> Tensors:
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    length, rest = q.shape[2], (0.0, True, unused, unused)
    backward = aten._scaled_dot_product_flash_attention_backward
    wide = _equally_wide(g, q, k, v, y)
    return _cut(backward(*wide, lse, None, None, length, length, *rest, scale=scale), q, k, v)


def _varlen_forward(q: Any, k: Any, v: Any, scale: float, first: Any, offsets: Any) -> Tensors:
    length = q.shape[2]
    rows = (_as_one(t) for t in _equally_wide(q, k, v))
    how = offsets, offsets, length, length, 0.0, True, False
    y, lse, *_ = aten._flash_attention_forward(*rows, *how, scale=scale)
    return _as_many(y, length)[..., : v.shape[-1]], lse.unflatten(1, (-1, length)).transpose(0, 1)


def _varlen_backward(
    g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any, first: Any, offsets: Any
) -> Tensors:
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    length = q.shape[2]
    rows = (_as_one(t) for t in _equally_wide(g, q, k, v, y))
    how = offsets, offsets, length, length, 0.0, True, unused, unused
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    found = aten._flash_attention_backward(*rows, lse, *how, scale=scale)
    return _cut(tuple(_as_many(grad, length) for grad in found), q, k, v)


def _as_one(t: torch.Tensor) -> torch.Tensor:
    """(B, H, L, N) -> (B * L, H, N), as one sequence."""
    return t.transpose(1, 2).flatten(0, 1)


def _as_many(t: torch.Tensor, length: int) -> torch.Tensor:
    """(B * L, H, N) -> (B, H, L, N)."""
    return t.unflatten(0, (-1, length)).transpose(1, 2)


def _aligned_bias(q: torch.Tensor, segments: Tensors) -> torch.Tensor | None:
    """As the memory-efficient kernel wants it: for every head, with rows that begin at multiples of 16."""
    bias = _bias(q, segments, 16)
    return None if bias is None else bias.expand(-1, q.shape[1], -1, -1)


def _efficient_forward(q: Any, k: Any, v: Any, scale: float, *segments: Any) -> Tensors:
    bias = _aligned_bias(q, segments)
    y, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, True, scale=scale)
    return y, lse[..., : q.shape[2]]


def _efficient_backward(
    g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any, *segments: Any
) -> Tensors:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    lse = pad(lse, (0, -lse.shape[-1] % 32)).contiguous()  # rows are laid out in blocks of 32
    bias = _aligned_bias(q, segments)
    return aten._scaled_dot_product_efficient_attention_backward(
        g, q, k, v, bias, y, lse, unused, unused, 0.0, [True, True, True, False], True, scale=scale
    )[:3]


def _equally_wide(*tensors: torch.Tensor) -> Tensors:
    """The same with zeros behind, for kernels that want it so: zeros change no score and no sum."""
    width = max(t.shape[-1] for t in tensors)
    return tuple(t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1])) for t in tensors)


def _cut(grads: Tensors, *like: torch.Tensor) -> Tensors:
    return tuple(grad[..., : t.shape[-1]] for grad, t in zip(grads, like))


PLAIN = Engine(_plain_forward, _plain_backward)
CPU: dict[str, Engine] = {"cpu": Engine(_cpu_forward, _cpu_backward, shares=True), "plain": PLAIN}
CUDA: dict[str, Engine] = {
    "cudnn": Engine(_cudnn_forward, _cudnn_backward, shares=True),
    "flash": Engine(_flash_forward, _flash_backward, shares=True),
    "efficient": Engine(_efficient_forward, _efficient_backward),
    "plain": PLAIN,
}
CUDA_SEGMENTS: dict[str, Engine] = {
    "varlen": Engine(_varlen_forward, _varlen_backward, shares=True),
    "efficient": CUDA["efficient"],
    "plain": PLAIN,
}


def engine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *segments: torch.Tensor) -> Engine:
    """The engine for inputs like these, which may have the ``first`` and ``offsets`` of segments."""
    if q.numel() == 0 or q.shape[2] == 1:  # one position: cuDNN's kernels die of it
        return PLAIN
    on_cuda, heads, shared = q.is_cuda, (q.shape[-1], v.shape[-1]), q.shape[1] != k.shape[1]
    engines = (CUDA_SEGMENTS if segments else CUDA) if on_cuda else CPU
    kind = q.device, q.dtype, *heads, shared, bool(segments)
    uncounted = bool(segments) and not segments[1].numel()
    names = (name for name in engines if not (uncounted and name == "varlen"))
    able = (name for name in names if not on_cuda or proven(name, *kind))
    if OVERRIDE not in os.environ:
        return engines[next(able)]  # the others' proofs would take a second or so
    what = "segments" if segments else "attention"
    work = f"{what} of {q.dtype} heads of {heads[0]} and {heads[1]} on {q.device.type}"
    return engines[chosen("causal_attention", OVERRIDE, [*able], work)]


@functools.cache
def proven(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    qk_dim: int,
    v_dim: int,
    shared: bool = False,
    segmented: bool = False,
) -> bool:
    """Whether an engine of a GPU agrees with the plain products there, for heads of these widths.

    With ``shared``, heads of queries share those of keys and values. With ``segmented``, there are segments.
    """
    if name == "plain":
        return True
    if dtype not in AGREEMENT or (name != "efficient" and dtype == torch.float32):
        return False
    # Of no round length, so that blocks end early; as the model lays tensors out.
    heads = 6 if shared else 3
    sizes = [(heads, qk_dim), (3, qk_dim), (3, v_dim), (heads, v_dim)]
    q, k, v, g = (_waves(i, (2, 150, *size), device, dtype) for i, size in enumerate(sizes))
    segments: Tensors = ()
    if segmented:  # one position, several blocks, and a whole row
        starts = torch.tensor([0, 1, 130, 137, 150], dtype=torch.int32, device=device)
        first = torch.repeat_interleave(starts[:4].long(), torch.diff(starts)).view(1, 150)
        segments = torch.cat([first, 0 * first]), torch.cat([starts, starts[-1:] * 2])
    try:
        found = _forward_and_backward((CUDA_SEGMENTS if segmented else CUDA)[name], g, q, k, v, *segments)
    except RuntimeError as error:
        problem = f"raises {str(error).splitlines()[0]}"
    else:
        expected = _forward_and_backward(PLAIN, *(t.float() for t in (g, q, k, v)), *segments)
        pairs = zip(found, expected)
        off = torch.stack([(a.float() - b).abs().max() / (1 + b.abs().max()) for a, b in pairs]).max().item()
        if off <= AGREEMENT[dtype]:  # NaN is not
            return True
        problem = f"is off by {off:.1e} from plain products"
    logging.getLogger("fmoe").warning(
        "attention%s by %s on %s, %s heads of %d and %d: not used, as it %s",
        *(" within segments" if segmented else "", name, device, dtype, qk_dim, v_dim, problem),
    )
    return False


def _forward_and_backward(engine: Engine, g: Any, q: Any, k: Any, v: Any, *segments: Any) -> Tensors:
    scale = q.shape[-1] ** -0.5
    y, lse = forward(q, k, v, scale, *segments, by=engine)
    return (y, lse, *backward(g, q, k, v, scale, y, lse.contiguous(), *segments, by=engine))


def _waves(number: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, L, N) numbers of order one that are alike nowhere, without touching the random ones."""
    index = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float64)
    return (1.5 * (index * (0.7 + number) ** 0.5).sin()).view(shape).to(dtype).transpose(1, 2)
