"""Causal softmax attention as one operator, by the fastest of PyTorch's kernels that computes it correctly.

B sequences, L positions, H heads of queries, G of keys and values; N and V are a head's query and value
dimensions. PyTorch's own attention kernels have no forward derivative and no second one; here both follow
from the reference.
"""

import functools
from typing import Any

import torch
from einops import rearrange

from ..errors import argument_error
from .bases import random
from .core.batches import Fold, fold_rows, front, more_rows
from .core.derive import Dims, Tensors, pullback
from .core.dtypes import accumulator
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .kernels import attention as kernels
from .segments import Segments

ATTENTION = checkpoint("attention", save=False)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, segments: Segments | tuple[()] = ()
) -> torch.Tensor:
    """``softmax(scale * q k^T) v``, each position seeing itself and those before it.

    =========  ==============  ==============================================================
    q          (B, L, H, N)    any floating dtype
    k          (B, L, G, N)    the same; G divides H, and H / G heads of queries in a row share a key
    v          (B, L, G, V)    the same
    segments                   a position sees only its own; ``()``: a row is one segment
    -> y       (B, L, H, V)
    =========  ==============  ==============================================================

    Raises ``ValueError`` for shapes, dtypes or devices that differ.

    >>> q, v = torch.zeros(1, 3, 1, 4), torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1, 1)
    >>> causal_attention(q, q, v, 1.0).flatten()        # equal scores: means of what came so far
    tensor([3., 2., 2.])
    >>> from fmoe.ops.segments import segments_of
    >>> causal_attention(q, q, v, 1.0, segments_of(torch.tensor([[1, 2, 2]]))).flatten()
    tensor([3.0000, 1.0000, 1.5000])
    """
    same = {(t.dtype, t.device) for t in (q, k, v)}
    fits = {t.dim() for t in (q, k, v)} == {4} and k.shape[:3] == v.shape[:3]
    fits = fits and (*k.shape[:2], k.shape[3]) == (*q.shape[:2], q.shape[3])
    if not fits or q.shape[2] % max(k.shape[2], 1) or len(same) > 1:
        got = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (q, k, v))
        expected = "(B, L, H, N), (B, L, G, N) and (B, L, G, V) of one dtype on one device, where G divides H"
        remedy = "Convert with .to()."
        raise argument_error("causal_attention", "q, k, v", got=got, expected=expected, remedy=remedy)
    if not isinstance(segments, Segments):
        return attention(q, k, v, scale)
    return segment_attention(q, k, v, segments.first, segments.offsets, scale)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Tensors:
    return _by_products(q, k, v, scale)


def _segment_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, offsets: Any, scale: float
) -> Tensors:
    return _by_products(q, k, v, scale, first, offsets)


def _by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *segments: Any) -> Tensors:
    q, k, v = (rearrange(t, "b l h n -> b h l n") for t in (q, k, v))
    y, lse = kernels.forward(q, k, v, scale, *segments, by=kernels.PLAIN)
    return rearrange(y, "b h l v -> b l h v"), rearrange(lse, "b h l -> b l h")


# ---- the operators: with segments, their first and offsets come before the scale -----------------------


def _forward_kernel(q: Any, k: Any, v: Any, *rest: Any) -> Tensors:
    *segments, scale = rest
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y, lse = kernels.forward(q, k, v, scale, *segments)
    return y.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _backward_kernel(g: Any, q: Any, k: Any, v: Any, *rest: Any) -> Tensors:
    *segments, scale, y, lse = rest
    g, q, k, v, y, lse = (t.transpose(1, 2) for t in (g.contiguous(), q, k, v, y, lse))
    grads = kernels.backward(g, q, k, v, scale, y, lse.contiguous(), *segments)
    return tuple(grad.to(q.dtype).transpose(1, 2).contiguous() for grad in grads)


def _fake(q: Any, k: Any, v: Any, *rest: Any) -> Tensors:
    return v.new_empty(*q.shape[:3], v.shape[-1]), v.new_empty(q.shape[:3], dtype=accumulator(v.dtype))


def _backward_fake(g: Any, q: Any, k: Any, v: Any, *rest: Any) -> Tensors:
    return tuple(torch.empty_like(t).contiguous() for t in (q, k, v))


def _vmap(size: int, dims: Dims, *args: Any) -> Fold:
    """A batch of sequences is more sequences."""
    folded = (fold_rows(front(a, d, size)) if isinstance(a, torch.Tensor) else a for a, d in zip(args, dims))
    return more_rows(size, *folded)


def _segment_vmap(where: int, size: int, dims: Dims, *args: Any) -> Fold:
    """The same, with ``first`` at ``where``. Segments can be counted if all examples have the same ones."""
    first, offsets = args[where : where + 2]
    if dims[where] is None and dims[where + 1] is None:
        begin = torch.arange(size + 1, device=first.device, dtype=offsets.dtype)[:, None] * first.numel()
        end = begin[-1, : offsets.numel()]  # none, if nobody has counted
        offsets = torch.cat([(begin[:-1] + offsets[:-1]).flatten(), end])
    else:
        offsets = offsets.new_empty(0)
    fold = _vmap(size, dims, *args)
    return fold._replace(args=(*fold.args[: where + 1], offsets, *fold.args[where + 2 :]))


def _example() -> tuple[Any, ...]:
    return random(2, 4, 6, 5), random(2, 4, 3, 5), random(2, 4, 3, 2), 0.7


def _segment_example() -> tuple[Any, ...]:
    """Each row has two segments."""
    *qkv, scale = _example()
    starts = torch.randint(1, 4, (2, 1))
    first = torch.where(torch.arange(4) < starts, 0, starts)
    offsets = torch.cat([torch.tensor([[0], [4]]), starts + torch.tensor([[0], [4]])], 1).flatten()
    return *qkv, first, torch.cat([offsets, torch.tensor([8])]).int(), scale


attention_backward: Operator = declare(
    "attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, float scale, Tensor y, Tensor lse) "
    "-> (Tensor, Tensor, Tensor)",
    impl=_backward_kernel,
    fake=_backward_fake,
    checkpoint=ATTENTION,
    vmap=_vmap,
    reference=pullback(_reference),
    example=lambda: (random(2, 4, 6, 2), *_example()),
    dependent=lambda g, *inputs: attention.outputs(*inputs),
)

# q (B, L, H, N), k (B, L, G, N), v (B, L, G, V) -> y (B, L, H, V). A position sees itself and those before.
attention: Operator = declare(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    impl=_forward_kernel,
    fake=_fake,
    checkpoint=ATTENTION,
    residual_outputs=1,
    residuals=lambda inputs, outputs: (*inputs, *outputs),
    vjp=lambda res, needs, g: attention_backward(g, *res),
    vmap=_vmap,
    reference=_reference,
    example=_example,
)

segment_attention_backward: Operator = declare(
    "segment_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor first, Tensor offsets, "
    "float scale, Tensor y, Tensor lse) -> (Tensor, Tensor, Tensor)",
    impl=_backward_kernel,
    fake=_backward_fake,
    checkpoint=ATTENTION,
    vmap=functools.partial(_segment_vmap, 4),
    reference=pullback(_segment_reference),
    example=lambda: (random(2, 4, 6, 2), *_segment_example()),
    dependent=lambda g, *inputs: segment_attention.outputs(*inputs),
)

# The same with first (B, L) and offsets, as in Segments. A position sees no other segment.
segment_attention: Operator = declare(
    "segment_attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor offsets, float scale) "
    "-> (Tensor, Tensor)",
    impl=_forward_kernel,
    fake=_fake,
    checkpoint=ATTENTION,
    residual_outputs=1,
    residuals=lambda inputs, outputs: (*inputs, *outputs),
    vjp=lambda res, needs, g: segment_attention_backward(g, *res),
    vmap=functools.partial(_segment_vmap, 3),
    reference=_segment_reference,
    example=_segment_example,
)
