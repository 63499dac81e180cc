"""Causal softmax attention as one operator, by the fastest of PyTorch's kernels that computes it correctly.

B sequences, L positions, H heads; N and V are a head's query and value dimensions. PyTorch's own
attention kernels have no forward derivative and no second one; here both follow from the reference.
"""

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

ATTENTION = checkpoint("attention", save=False)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """``softmax(scale * q k^T) v``, each position seeing itself and those before it.

    =========  ==============  ==============================================================
    q, k       (B, L, H, N)    any floating dtype
    v          (B, L, H, V)    the same
    -> y       (B, L, H, V)
    =========  ==============  ==============================================================

    Raises ``ValueError`` for shapes, dtypes or devices that differ.

    >>> q, v = torch.zeros(1, 3, 1, 4), torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1, 1)
    >>> causal_attention(q, q, v, 1.0).flatten()        # equal scores: means of what came so far
    tensor([3., 2., 2.])
    """
    same = {(t.dtype, t.device) for t in (q, k, v)}
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1] or len(same) > 1:
        got = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (q, k, v))
        expected = "(B, L, H, N), (B, L, H, N) and (B, L, H, V) of one dtype on one device"
        remedy = "Repeat the heads that queries share; convert with .to()."
        raise argument_error("causal_attention", "q, k, v", got=got, expected=expected, remedy=remedy)
    return attention(q, k, v, scale)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Tensors:
    y, lse = kernels.PLAIN.forward(*(rearrange(t, "b l h n -> b h l n") for t in (q, k, v)), scale)
    return rearrange(y, "b h l v -> b l h v"), rearrange(lse, "b h l -> b l h")


# ---- the operator --------------------------------------------------------------------------------


def _forward_kernel(q: Any, k: Any, v: Any, scale: float) -> Tensors:
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    y, lse = kernels.engine(*heads).forward(*heads, scale)
    return y.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _backward_kernel(g: Any, q: Any, k: Any, v: Any, scale: float, y: Any, lse: Any) -> Tensors:
    g, q, k, v, y, lse = (t.transpose(1, 2) for t in (g.contiguous(), q, k, v, y, lse))
    grads = kernels.engine(q, k, v).backward(g, q, k, v, scale, y, lse.contiguous())
    return tuple(grad.to(q.dtype).transpose(1, 2).contiguous() for grad in grads)


def _vmap(size: int, dims: Dims, *args: Any) -> Fold:
    """A batch of sequences is more sequences."""
    folded = (fold_rows(front(a, d, size)) if isinstance(a, torch.Tensor) else a for a, d in zip(args, dims))
    return more_rows(size, *folded)


def _example() -> tuple[Any, ...]:
    return random(2, 4, 3, 5), random(2, 4, 3, 5), random(2, 4, 3, 2), 0.7


attention_backward: Operator = declare(
    "attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, float scale, Tensor y, Tensor lse) "
    "-> (Tensor, Tensor, Tensor)",
    impl=_backward_kernel,
    fake=lambda g, q, k, v, scale, y, lse: tuple(torch.empty_like(t).contiguous() for t in (q, k, v)),
    checkpoint=ATTENTION,
    vmap=_vmap,
    reference=pullback(_reference),
    example=lambda: (random(2, 4, 3, 2), *_example()),
    dependent=lambda g, *inputs: attention.outputs(*inputs),
)

# q, k (B, L, H, N), v (B, L, H, V) -> y (B, L, H, V); each position sees itself and those before.
attention: Operator = declare(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    impl=_forward_kernel,
    fake=lambda q, k, v, scale: (v.new_empty(v.shape), v.new_empty(v.shape[:-1], dtype=accumulator(v.dtype))),
    checkpoint=ATTENTION,
    residual_outputs=1,
    residuals=lambda inputs, outputs: (*inputs, *outputs),
    vjp=lambda res, needs, g: attention_backward(g, *res),
    vmap=_vmap,
    reference=_reference,
    example=_example,
)
