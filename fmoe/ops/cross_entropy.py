"""Cross entropies of a last projection as operators, which never hold all logits.

N tokens, V entries of the vocabulary. Logits are computed block by block, in float32.

``cross_entropy_sum`` computes the gradients, too, and so the logits once. Its blocks are of whole tokens, and
the gradients wait in float32 for their factor. ``cross_entropy_terms`` gives two numbers per token, for a
vocabulary of which other devices hold the rest, and where no gradient is wanted. It keeps only these numbers.
Its blocks run over the vocabulary. So each row of the weight's gradient is one product over all tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch

from . import kernels
from .bases import gather, random
from .core.derive import Tensors, pullback
from .core.dtypes import accumulator
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .route import product

LOSS = checkpoint("loss", save=False)
LOGITS_BYTES = 2**30
OUTSIDE = (
    "cross_entropy: index: got a target outside the vocabulary, expected 0 to vocab_size - 1, or -100 "
    "for none. Use the tokenizer that the model is for."
)
STEP = 64  # a block's columns are a multiple of it


def block_columns(num_tokens: int, block_bytes: int) -> int:
    """The number of entries of the vocabulary that have their float32 logits at once."""
    return max(STEP, block_bytes // (4 * max(1, num_tokens)) // STEP * STEP)


def block_rows(vocabulary: int, block_bytes: int) -> int:
    """The number of tokens that have all their float32 logits at once."""
    return max(STEP, block_bytes // (4 * max(1, vocabulary)) // STEP * STEP)


def _blocks(x: torch.Tensor, weight: torch.Tensor, block_bytes: int) -> Iterator[slice]:
    columns = block_columns(x.shape[0], block_bytes)
    for start in range(0, weight.shape[0], columns):
        yield slice(start, min(start + columns, weight.shape[0]))


def _reference(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, block_bytes: int) -> torch.Tensor:
    logits = product(x, weight.mT, accumulator(x.dtype))
    start_N = torch.arange(index.shape[0], device=index.device) * weight.shape[0]
    chosen = gather(logits.flatten(), torch.where(index < 0, -1, index + start_N))
    return torch.stack([logits.logsumexp(-1), chosen])


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32 or wider; neither is rounded on the way."""
    wide = accumulator(a.dtype)
    if a.dtype == b.dtype == wide:
        return a @ b
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype == b.dtype else a.to(wide) @ b.to(wide)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, likewise; on CUDA as the product is stored."""
    if a.is_cuda and a.dtype == b.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _check(index: torch.Tensor, weight: torch.Tensor) -> None:
    torch._assert_async(((index >= -1) & (index < weight.shape[0])).all(), OUTSIDE)


def _kernel(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, block_bytes: int) -> torch.Tensor:
    _check(index, weight)
    out = x.new_full((2, x.shape[0]), -torch.inf, dtype=accumulator(x.dtype))
    total, chosen = out[0], out[1].zero_()
    rows = x if x.is_cuda else x.to(out.dtype)
    for block in _blocks(x, weight, block_bytes):
        logits = _wide_product(rows, weight[block].mT)
        add_sums(logits, index, block.start, total, chosen)
        del logits  # before the next block's
    return out


def add_sums(logits: Any, index: Any, start: int, total: Any, chosen: Any) -> None:
    """Take a block of logits, which begins at entry ``start``, into both terms of each token, in place."""
    if kernels.fused(logits):
        from .kernels import logits as fused

        return fused.add_sums(logits, index, start, total, chosen)
    here, place = _in_block(index, start, logits.shape[1])
    chosen += torch.where(here, logits.gather(1, place[:, None]).squeeze(1), 0)
    top = logits.amax(1)
    torch.logaddexp(total, logits.sub_(top[:, None]).exp_().sum(1).log_() + top, out=total)


def cotangents(logits: Any, index: Any, start: int, total: Any, g: Any, dtype: torch.dtype) -> torch.Tensor:
    """The cotangent of a block of logits, which it writes over."""
    if kernels.fused(logits):
        from .kernels import logits as fused

        return fused.cotangents(logits, index, start, total, g, dtype)
    g_total, g_chosen = g[:, :, None]
    here, place = _in_block(index, start, logits.shape[1])
    g_logits = logits.sub_(total[:, None]).exp_().mul_(g_total)
    g_logits.scatter_add_(1, place[:, None], torch.where(here[:, None], g_chosen, 0))
    return g_logits.to(dtype)


def _in_block(index: torch.Tensor, start: int, columns: int) -> Tensors:
    """The tokens whose entries are in a block, and their columns there."""
    here = (index >= start) & (index < start + columns)
    return here, torch.where(here, index - start, 0)


def _backward_kernel(g: Any, x: Any, weight: Any, index: Any, block_bytes: int, out: torch.Tensor) -> Tensors:
    g = g.to(out.dtype)
    rows = x if x.is_cuda else x.to(out.dtype)
    g_x = torch.zeros_like(x, dtype=out.dtype, memory_format=torch.contiguous_format)
    g_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for block in _blocks(x, weight, block_bytes):
        logits = _wide_product(rows, weight[block].mT)
        g_logits = cotangents(logits, index, block.start, out[0], g, rows.dtype)
        del logits
        _add_product(g_x, g_logits, weight[block])
        g_weight[block] = g_logits.mT @ rows
        del g_logits  # before the next block's
    return g_x.to(x.dtype), g_weight


def _example() -> tuple[Any, ...]:
    return random(4, 3), random(150, 3), torch.randint(-1, 150, (4,)), 4 * 4 * STEP


cross_entropy_terms_backward: Operator = declare(
    "cross_entropy_terms_backward(Tensor g, Tensor x, Tensor weight, Tensor index, int block_bytes, "
    "Tensor out) -> (Tensor, Tensor)",
    impl=_backward_kernel,
    fake=lambda g, x, weight, *rest: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    checkpoint=LOSS,
    reference=pullback(_reference),
    example=lambda: (random(2, 4), *_example()),
    dependent=lambda g, *inputs: cross_entropy_terms.outputs(*inputs),
)

# x (N, D), weight (V, D), index (N,) -> (2, N), float32 or wider. The first row is the log of the sum of the
# exponentials of a token's logits. The second is its logit at the index, or 0 for the index -1.
cross_entropy_terms: Operator = declare(
    "cross_entropy_terms(Tensor x, Tensor weight, Tensor index, int block_bytes) -> Tensor",
    impl=_kernel,
    fake=lambda x, weight, index, block_bytes: x.new_empty(2, x.shape[0], dtype=accumulator(x.dtype)),
    checkpoint=LOSS,
    residuals=lambda inputs, outputs: (*inputs, *outputs),
    vjp=lambda res, needs, g: cross_entropy_terms_backward(g, *res),
    reference=_reference,
    example=_example,
)


# ---- the sum, with its gradients -----------------------------------------------------------------------


def _sum_reference(
    x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, block_bytes: int
) -> torch.Tensor:
    total, chosen = _reference(x, weight, index, block_bytes).unbind()
    return torch.where(index < 0, 0, total - chosen).sum()


def _sum_kernel(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, block_bytes: int) -> Tensors:
    _check(index, weight)
    wide, rows = accumulator(x.dtype), block_rows(weight.shape[0], block_bytes)
    losses, g_x = x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape, dtype=wide)
    g_weight = None
    x, weight = (t if t.is_cuda else t.to(wide) for t in (x, weight))
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        logits = _wide_product(x[block], weight.mT)
        losses[block], g_logits = losses_and_cotangents(logits, index[block], x.dtype)
        del logits
        g_x[block] = _wide_product(g_logits, weight)
        if g_weight is None:
            g_weight = _wide_product(g_logits.mT, x[block])
        else:
            _add_product(g_weight, g_logits.mT, x[block])
        del g_logits  # before the next block's
    return losses.sum(), g_x, weight.new_zeros(weight.shape, dtype=wide) if g_weight is None else g_weight


def losses_and_cotangents(logits: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """The cross entropy of each row, zero for the index -1, and the cotangent of the logits of their sum."""
    if kernels.fused(logits):
        from .kernels import logits as fused

        return fused.losses_and_cotangents(logits, index, dtype)
    here, place = index[:, None] >= 0, index[:, None].clamp_min(0)
    chosen, top = logits.gather(1, place), logits.amax(1, keepdim=True)
    spread = logits.sub_(top).exp_().sum(1, keepdim=True)
    losses = torch.where(here, spread.log() + top - chosen, 0).squeeze(1)
    g_logits = logits.div_(spread).scatter_add_(1, place, logits.new_full(place.shape, -1))
    return losses, g_logits.masked_fill_(~here, 0).to(dtype)


def _scaled(g: Any, x: Any, weight: Any, index: Any, block_bytes: int, g_x: Any, g_weight: Any) -> Tensors:
    return _times(g_x, g, x.dtype), _times(g_weight, g, weight.dtype)


def _times(t: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(t * factor).to(dtype)`` in one pass."""
    return torch.mul(t, factor, out=t.new_empty(t.shape, dtype=dtype))


cross_entropy_sum_backward: Operator = declare(
    "cross_entropy_sum_backward(Tensor g, Tensor x, Tensor weight, Tensor index, int block_bytes, "
    "Tensor g_x, Tensor g_weight) -> (Tensor, Tensor)",
    impl=_scaled,
    fake=lambda g, x, weight, *rest: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    checkpoint=LOSS,
    reference=pullback(_sum_reference),
    example=lambda: (random(), *_example()),
    dependent=lambda g, *inputs: cross_entropy_sum.outputs(*inputs)[1:],
)

# x (N, D), weight (V, D), index (N,) -> float32 or wider. Tokens of the index -1 add nothing to it.
cross_entropy_sum: Operator = declare(
    "cross_entropy_sum(Tensor x, Tensor weight, Tensor index, int block_bytes) -> (Tensor, Tensor, Tensor)",
    impl=_sum_kernel,
    fake=lambda x, weight, index, block_bytes: tuple(
        x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in ((), x.shape, weight.shape)
    ),
    checkpoint=LOSS,
    residual_outputs=2,
    residuals=lambda inputs, outputs: (*inputs, *outputs[1:]),
    vjp=lambda res, needs, g: cross_entropy_sum_backward(g, *res),
    vmap=lambda size, dims, *inputs: None,
    reference=_sum_reference,
    example=_example,
)
