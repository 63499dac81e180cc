"""Keeping experts evenly loaded without an auxiliary loss, and measuring how even they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import argument_error, check_kind
from .core.dtensors import is_dtensor, local, map_local
from .core.dtypes import accumulator
from .core.dynamo import rearrange
from .route import Routing, check_bias


class MoEStats(NamedTuple):
    """The spread of tokens over experts. It consists of tensors, so the caller chooses when to wait for them.

    =================  ========================================
    tokens_per_expert  int64 (E,)
    overload           float32, the most loaded expert's tokens over the mean; 1 is perfect balance
    empty_experts      int64, experts without a token
    router_entropy     float32, nats, of the router's normalised scores, mean over tokens
    overflow           int64, rows and pairs for which a backend with a ``capacity`` had no room; if there
                       were any, no result counts: see :func:`fmoe.exact_on_overflow`
    =================  ========================================

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16)
    >>> even = fmoe.RouterConfig(force_balance=True)
    >>> _, stats = fmoe.moe_forward(params, torch.randn(8, 8), router=even, return_stats=True)
    >>> stats.tokens_per_expert.tolist(), stats.overload, stats.empty_experts
    ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], tensor(1.), tensor(0))
    """

    tokens_per_expert: torch.Tensor
    overload: torch.Tensor
    empty_experts: torch.Tensor
    router_entropy: torch.Tensor
    overflow: torch.Tensor


MORE_SUMS = 3  # than there are experts, in stats_sums


def stats_sums(routing: Routing, overflow: torch.Tensor | tuple[()] = ()) -> torch.Tensor:
    """Sums from which devices make their :class:`MoEStats`: float64 (E + 3,), in which counts are exact.

    They are the tokens of each expert, the plan's overflow, the sum of the tokens' entropies, and how many
    these are. No gradient flows through them.
    """
    scores = routing.scores_TE.detach().float()
    whole = scores.sum(-1, keepdim=True)
    share = torch.where(whole == 0, 1 / scores.shape[-1], scores / whole)  # equal, if all are zero
    entropy = torch.special.entr(share).sum(-1)
    number = entropy.new_full((), entropy.shape[0])
    if isinstance(routing.valid_T, torch.Tensor):
        entropy, number = torch.where(routing.valid_T, entropy, 0), routing.valid_T.sum().to(entropy)
    over = overflow.reshape(1) if isinstance(overflow, torch.Tensor) else routing.counts_E.new_zeros(1)
    counts = torch.cat([routing.counts_E, over])
    return torch.cat([counts.double(), torch.stack([entropy.sum(), number]).double()])


def moe_stats(sums: torch.Tensor) -> MoEStats:
    """The statistics in the sums of :func:`stats_sums`."""
    counts, (entropy, tokens) = sums[:-2].long(), sums[-2:].unbind()
    return _of_counts(counts[:-1], (entropy / tokens.clamp_min(1)).float(), counts[-1])


def merge_stats(parts: Sequence[MoEStats]) -> MoEStats:
    """The statistics of one layer over several batches together.

    >>> rest = torch.tensor(0.5), torch.tensor(0)
    >>> parts = [_of_counts(torch.tensor(counts), *rest) for counts in ([3, 1], [0, 4])]
    >>> merge_stats(parts)[:3]
    (tensor([3, 5]), tensor(1.2500), tensor(0))
    """
    counts = torch.stack([part.tokens_per_expert for part in parts])
    tokens = counts.sum(-1).float()  # times top-k, which cancels
    entropies = torch.stack([part.router_entropy for part in parts])
    entropy = (entropies * tokens).sum() / tokens.sum().clamp_min(1)
    return _of_counts(counts.sum(0), entropy, torch.stack([part.overflow for part in parts]).sum())


def _of_counts(counts: torch.Tensor, router_entropy: torch.Tensor, overflow: torch.Tensor) -> MoEStats:
    mean = counts.float().mean().clamp_min(1e-20)
    return MoEStats(counts, counts.max() / mean, (counts == 0).sum(), router_entropy, overflow)


def balance_loss(routing: Routing, num_sequences: int = 1) -> torch.Tensor:
    """How unevenly the tokens of each sequence go to experts: 1 if evenly, at most E / K. Differentiable.

    =============  =====================  =====================================================
    routing        T = B * L tokens       of sequences of equal length, one after the other
    num_sequences                         B
    -> loss        (B,)                   float32 or wider; the gradient flows through scores only
    =============  =====================  =====================================================

    For softmax scores it is the auxiliary loss of Switch and GShard, of each sequence. A sequence decides it
    alone, so that micro-batches and devices change nothing. Padding doesn't count: L is the number of a
    sequence's other tokens. Documents packed into a row are one sequence.

    Raises ``ValueError`` unless sequences of equal length make up the tokens.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; Switch Transformers, arXiv 2101.03961.

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4).router, torch.randn(10, 8)
    >>> even = fmoe.route(params, x, fmoe.RouterConfig(force_balance=True))
    >>> balance_loss(even, num_sequences=2).shape
    torch.Size([2])
    """
    (tokens, experts), top_k = routing.scores_TE.shape, routing.expert_ids_TK.shape[1]
    if num_sequences < 1 or tokens % num_sequences:
        got, expected = f"{num_sequences} for {tokens} tokens", "a divisor of the number of tokens"
        raise argument_error("balance_loss", "num_sequences", got=got, expected=expected)
    scores = rearrange(routing.scores_TE, "(B L) E -> B L E", B=num_sequences)
    scores = scores.to(accumulator(scores.dtype))
    ids = rearrange(routing.expert_ids_TK, "(B L) K -> B (L K)", B=num_sequences)
    length: Any = max(tokens // num_sequences, 1)
    valid = routing.valid_T
    if isinstance(valid, torch.Tensor):
        valid = rearrange(valid, "(B L) -> B L 1", B=num_sequences)
        length = valid.sum(1).clamp_min(1).to(scores)
    chosen = scores.new_zeros(num_sequences, experts).scatter_add(1, ids.clamp_min(0), (ids >= 0).to(scores))
    frequency = chosen * (experts / (top_k * length))
    whole = scores.sum(-1, keepdim=True)
    none = whole == 0  # equal shares, if all are zero
    share = torch.where(none, 1 / experts, scores / torch.where(none, 1, whole))
    if isinstance(valid, torch.Tensor):
        share = torch.where(valid, share, 0)
    return (frequency * (share.sum(1) / length)).sum(-1)


@torch.no_grad()
def update_expert_bias(params: Any, counts_E: torch.Tensor, rate: float) -> Any:
    """New router params whose selection bias leans towards the experts that got too few tokens.

    ===========  ============  =============================================================
    params                     :class:`RouterParams`, or params with a field ``router`` of them
    counts_E     (E,)          tokens per expert, over all devices
    rate                       how far a bias moves; DeepSeek-V3 uses 0.001
    -> params                  the same structure; nothing passed in is modified. A bias does not require grad
    ===========  ============  =============================================================

    Raises ``ValueError`` unless there is one count per expert, for a rate below zero or not finite, and for a
    bias that is cut over devices or narrower than float32.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664: ``b += rate * sign(mean - counts)``.

    >>> import fmoe, torch
    >>> router = fmoe.RouterParams(torch.ones(3, 2), torch.zeros(3))
    >>> fmoe.update_expert_bias(router, torch.tensor([5, 1, 3]), 0.01).bias_E
    tensor([-0.0100,  0.0100,  0.0000])
    """
    check_kind("update_expert_bias", "counts_E", counts_E, torch.Tensor, "Pass MoEStats.tokens_per_expert.")
    if hasattr(params, "router"):
        return params._replace(router=update_expert_bias(params.router, counts_E, rate))
    if not hasattr(params, "bias_E"):
        got, expected = type(params).__name__, "RouterParams, or params with a field router of them"
        raise argument_error("update_expert_bias", "params", got=got, expected=expected)
    if counts_E.shape != params.bias_E.shape:
        got = f"shape {tuple(counts_E.shape)}"
        expected = f"{tuple(params.bias_E.shape)}, one count per expert"
        remedy = "Pass MoEStats.tokens_per_expert of this layer."
        raise argument_error("update_expert_bias", "counts_E", got=got, expected=expected, remedy=remedy)
    if isinstance(rate, float | int) and not 0 <= rate < math.inf:
        expected, remedy = "a finite number of at least 0", "DeepSeek-V3 uses 0.001."
        raise argument_error("update_expert_bias", "rate", got=rate, expected=expected, remedy=remedy)
    check_bias("update_expert_bias", "params.bias_E", params.bias_E)
    if is_dtensor(params.bias_E) and not all(p.is_replicate() for p in params.bias_E.placements):
        got = f"a DTensor placed by {params.bias_E.placements}"
        expected = "one that is whole on every device"
        remedy = "Place it with fmoe.shard_params."
        raise argument_error("update_expert_bias", "params.bias_E", got=got, expected=expected, remedy=remedy)
    counts = local(counts_E).double()
    step = (rate * (counts.mean() - counts).sign()).to(params.bias_E.dtype)
    return params._replace(bias_E=map_local(lambda bias: bias + step, params.bias_E))
