"""The oracle: a MoE layer as a dense sum over all experts, in plain PyTorch.

Every path of fmoe is tested against these few lines. They are slow on purpose, differentiable in
every way PyTorch knows, and compute in the dtype of their inputs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce

from .route import RouterConfig, RouterParams


def route_reference(
    params: RouterParams, x_TD: torch.Tensor, config: RouterConfig, ids_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight of each expert for each token, (T, E): zero where it wasn't chosen.

    ``ids_TK`` fixes the choice, so that a tie or a rounding can't decide a comparison.
    """
    logits = x_TD @ params.weight_ED.T
    scores = logits.sigmoid() if config.score_func == "sigmoid" else logits.softmax(-1)
    if config.force_balance:
        slot = torch.arange(x_TD.shape[0] * config.top_k, device=x_TD.device)
        ids_TK = slot.view(x_TD.shape[0], config.top_k) % scores.shape[1]
    if ids_TK is None:
        chosen = choose(scores.detach() + params.bias_E.detach(), config)
    else:
        chosen = (ids_TK[:, :, None] == torch.arange(scores.shape[1], device=x_TD.device)).any(1)
    weights = scores * chosen
    if config.normalize:  # by logarithms, since all chosen scores may be too small for a float
        logs = F.logsigmoid(logits) if config.score_func == "sigmoid" else logits
        weights = torch.where(chosen, logs, -torch.inf).softmax(-1)
    return weights * config.scale


def choose(choice_TE: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """The experts that each token uses, (T, E) bool: the best ``top_k`` of the best groups."""
    grouped = rearrange(choice_TE, "t (g e) -> t g e", g=config.num_groups)
    best = grouped.sort(-1, descending=True).values[:, :, : config.group_best]
    open_groups = among_best(reduce(best, "t g e -> t g", "sum"), config.top_groups)
    choice = torch.where(open_groups[:, :, None], grouped, -torch.inf)
    return among_best(rearrange(choice, "t g e -> t (g e)"), config.top_k)


def among_best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """True for the ``k`` greatest along the last dimension: fewer than k beat them."""
    mine, other = scores[..., :, None], scores[..., None, :]
    index = torch.arange(scores.shape[-1], device=scores.device)
    beaten = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return beaten.sum(-1) < k


def swiglu_reference(params: Any, x: torch.Tensor) -> torch.Tensor:
    """One expert on every token: ``w_in`` (2, F, D), ``w_out`` (D, F)."""
    gate, up = einsum(x, params.w_in, "... d, half f d -> half ... f")
    return einsum(F.silu(gate) * up, params.w_out, "... f, d f -> ... d")


def moe_reference(
    params: Any, x: torch.Tensor, config: RouterConfig, ids_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """The whole layer: every expert on every token, weighted by :func:`route_reference`."""
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weights_TE = route_reference(params.router, x_TD, config, ids_TK)
    ones = torch.ones_like(weights_TE)
    # x * 0 through a SwiGLU is 0, so tokens that didn't choose the expert add nothing either way.
    before, after = (weights_TE, ones) if config.score_before_experts else (ones, weights_TE)
    x_TED = einsum(x_TD, before, "t d, t e -> t e d")
    gate, up = einsum(x_TED, params.experts.w_in, "t e d, e half f d -> half t e f")
    y_TED = einsum(F.silu(gate) * up, params.experts.w_out, "t e f, e d f -> t e d")
    y_TD = einsum(y_TED, after, "t e d, t e -> t d")
    if params.shared:
        y_TD = y_TD + swiglu_reference(params.shared, x_TD)
    return y_TD.reshape(x.shape)
