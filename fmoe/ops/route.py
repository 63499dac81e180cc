"""Choosing experts for tokens: scores, group limits, top-k, weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange, reduce

from ..errors import argument_error, check_kind, is_pair
from ..tree import node, static
from . import kernels
from .bases import bilinear_jvp, random
from .core.batches import Fold, fold_rows, front, more_rows, same_rows
from .core.derive import Dims, Tensors
from .core.dtypes import accumulator
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .random import normal
from .weigh import ROUTER, weigh

TOPK = checkpoint("topk", save=True)


class RouterParams(NamedTuple):
    """A router's parameters, made by :func:`fmoe.moe_init`.

    =========  ======  ===================================================================
    weight_ED  (E, D)  scores experts, in the dtype of the other parameters
    bias_E     (E,)    float32 or float64, since it moves by small steps (:func:`fmoe.update_expert_bias`);
                       added for the choice only, never to weights, so its gradient is zero
    =========  ======  ===================================================================

    >>> import fmoe
    >>> router = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4, dtype=torch.bfloat16).router
    >>> router.weight_ED.shape, router.bias_E.dtype
    (torch.Size([4, 8]), torch.float32)
    """

    weight_ED: torch.Tensor
    bias_E: torch.Tensor


@dataclass(frozen=True)
class RouterConfig:
    """The way that tokens choose experts: by default the best two of all.

    ====================  ========================================
    top_k                 experts per token
    score_func            ``"sigmoid"`` or ``"softmax"`` of the router's logits
    num_groups            experts form this many groups of equal size, e.g. one per node
    top_groups            a token uses only this many groups, the best ones
    group_best            a group's score sums this many of its best experts: 2 in DeepSeek-V3, 1 in V2
    normalize             a token's weights sum to one before scaling, however small its scores are
    scale                 what weights are multiplied by
    score_before_experts  weigh an expert's input instead of its output
    force_balance         choose round robin, whatever the scores: for benchmarks
    noise                 standard deviation of normal noise on the logits, drawn with a key. It helps tokens
                          to try other experts while a model trains
    ====================  ========================================

    DeepSeek-V3's own configuration is ``fmoe.models.deepseek_v3.ROUTER``.

    Source: DeepSeek-V3, arXiv 2412.19437, equations 12 to 16; noise: V-MoE, arXiv 2106.05974, section 2.1.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=12)
    >>> limited = RouterConfig(top_k=4, num_groups=3, top_groups=2)  # four of the eight experts of two groups
    >>> fmoe.moe_forward(params, torch.randn(5, 8), router=limited).shape
    torch.Size([5, 8])
    """

    top_k: int = 2
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    normalize: bool = True
    scale: float = 1.0
    score_before_experts: bool = False
    force_balance: bool = False
    noise: float = 0.0

    def check(self, num_experts: int, function: str) -> None:
        """Raise ``ValueError`` unless ``num_experts`` can be routed to in this way."""

        def error(argument: str, expected: str, remedy: str) -> ValueError:
            got = repr(getattr(self, argument))
            return argument_error(function, f"router.{argument}", got=got, expected=expected, remedy=remedy)

        ungrouped = "Leave num_groups and top_groups out to choose among all experts."
        for name in ("top_k", "num_groups", "top_groups", "group_best"):
            if type(getattr(self, name)) is not int:
                raise error(name, "an integer", "Convert it with int().")
        if self.score_func not in ("sigmoid", "softmax"):
            raise error("score_func", "'sigmoid' or 'softmax'", "Choose one of the two.")
        if not 1 <= self.top_k <= num_experts:
            expected = f"between 1 and the number of experts, {num_experts}"
            raise error("top_k", expected, "Lower it, as in RouterConfig(top_k=1).")
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise error("num_groups", f"a divisor of the number of experts, {num_experts}", ungrouped)
        if not 1 <= self.top_groups <= self.num_groups:
            raise error("top_groups", f"between 1 and num_groups={self.num_groups}", ungrouped)
        if self.group_best < 1:
            raise error("group_best", "at least 1", "DeepSeek-V3 has 2, DeepSeek-V2 1.")
        if not (isinstance(self.noise, Real) and 0 <= self.noise < math.inf):
            raise error("noise", "a standard deviation, from 0 on", "Leave it out for none.")
        if not (isinstance(self.scale, Real) and abs(self.scale) < math.inf):
            raise error("scale", "a finite number", "Leave it out for 1.")
        reachable = num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            groups = f"top_groups={self.top_groups} of num_groups={self.num_groups}, {num_experts} experts"
            expected = f"at most {reachable}, the experts that the chosen groups hold ({groups})"
            raise error("top_k", expected, "Raise top_groups, or leave num_groups and top_groups out.")


@node
class Routing:
    """The experts that each token goes to; a value, made by :func:`route` or by hand.

    =============  ========================================
    expert_ids_TK  int64; -1 drops the pair
    weights_TK     float32 or wider; differentiable
    counts_E       int64, tokens per expert, of this device's tokens
    scores_TE      every expert's score, for statistics and auxiliary losses; differentiable
    valid_T        bool, false for padding, whose scores don't count (``without_padding``);
                   ``()`` where there is none
    =============  ========================================

    >>> ids = torch.tensor([[0, 2], [2, -1]])  # the second token goes to one expert only
    >>> routing = Routing(ids, torch.ones(2, 2), torch.tensor([1, 0, 2]), torch.ones(2, 3))
    >>> import fmoe
    >>> fmoe.dispatch(torch.randn(2, 4), routing)[1].offsets_e  # where the rows of each of 3 experts end
    tensor([1, 1, 3], dtype=torch.int32)
    """

    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    counts_E: torch.Tensor
    scores_TE: torch.Tensor
    score_before_experts: bool = static(default=False)
    valid_T: torch.Tensor | tuple[()] = ()


Router = Callable[[Any, torch.Tensor], Routing]  # of a router's parameters and tokens (T, D)


def route(
    router_params: RouterParams,
    x_TD: torch.Tensor,
    config: RouterConfig,
    keys_T2: torch.Tensor | tuple[()] = (),
) -> Routing:
    """Choose ``config.top_k`` experts for every token, and their weights.

    =============  ==========  ================================================================
    router_params              ``weight_ED`` (E, D), ``bias_E`` (E,)
    x_TD           (T, D)      tokens, any floating dtype
    keys_T2        (T, 2)      int64, a key for each token, for ``config.noise``: ``fold_in`` of
                               :mod:`fmoe.ops.random` makes them of one key and the tokens' positions
    -> Routing                 ids (T, K) int64, weights (T, K), counts (E,), scores (T, E)
    =============  ==========  ================================================================

    Arithmetic is float32 (float64 for float64 tokens) whatever the dtype of the tokens. Gradients
    reach ``weight_ED`` and ``x_TD`` through weights and scores; that of ``bias_E`` is zero.

    Raises ``ValueError`` for arguments of other kinds, for shapes that don't fit, for a bias in less than
    float32, for a ``config`` E experts can't satisfy, and for noise without keys.

    >>> router = RouterParams(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.zeros(3))
    >>> routing = route(router, torch.tensor([[4.0, 0.0]]), RouterConfig(top_k=2))
    >>> routing.expert_ids_TK, routing.weights_TK.sum()
    (tensor([[0, 1]]), tensor(1.))
    """
    if not is_pair(router_params):
        check_kind("route", "router_params", router_params, RouterParams, "Pass params.router.")
    check_kind("route", "x_TD", x_TD, torch.Tensor)
    check_kind("route", "config", config, RouterConfig)
    weight_ED, bias_E = router_params
    num_experts = weight_ED.shape[0]
    config.check(num_experts, "route")
    if not x_TD.is_floating_point():
        remedy = "Embed tokens before the layer, or use x.float()."
        raise argument_error("route", "x_TD", got=x_TD.dtype, expected="a floating dtype", remedy=remedy)
    if x_TD.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        got = f"shape {tuple(x_TD.shape)}"
        expected = f"(T, {weight_ED.shape[1]}), as weight_ED is {tuple(weight_ED.shape)}"
        raise argument_error("route", "x_TD", got=got, expected=expected, remedy="Flatten x to (T, D).")
    if weight_ED.dim() != 2 or bias_E.shape != weight_ED.shape[:1]:
        got = f"weight_ED {tuple(weight_ED.shape)} and bias_E {tuple(bias_E.shape)}"
        remedy = "Take them from moe_init."
        raise argument_error("route", "router_params", got=got, expected="(E, D) and (E,)", remedy=remedy)
    check_bias("route", "router_params.bias_E", bias_E)
    logits_TE = product(x_TD, weight_ED.mT, accumulator(x_TD.dtype))
    if config.noise:
        logits_TE = logits_TE + config.noise * _noise(keys_T2, x_TD.shape[0], num_experts).to(logits_TE)
    sigmoid = config.score_func == "sigmoid"
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    if config.force_balance:
        slot = torch.arange(x_TD.shape[0] * config.top_k, device=x_TD.device)
        ids_TK = (slot % num_experts).view(x_TD.shape[0], config.top_k)
    else:
        groups = config.num_groups, config.top_groups, config.group_best
        ids_TK = topk(scores_TE, bias_E, *groups, config.top_k)
    # From the chosen logits, where they suffice: autograd then keeps T x K numbers, not T x E.
    rows_TE = logits_TE if sigmoid or config.normalize else scores_TE
    weights_TK, counts_E, _ = weigh(rows_TE, ids_TK, sigmoid, config.normalize, config.scale)
    return Routing(ids_TK, weights_TK, counts_E, scores_TE, config.score_before_experts)


def _noise(keys_T2: torch.Tensor | tuple[()], tokens: int, experts: int) -> torch.Tensor:
    """Normal numbers (T, E), in float32 whatever the dtype of the tokens, so that it changes none."""
    if isinstance(keys_T2, tuple):
        got, expected = "none, with router.noise", "a key for each token"
        remedy = "Pass one, or evaluate with dataclasses.replace(config, noise=0.0)."
        raise argument_error("route", "keys_T2", got=got, expected=expected, remedy=remedy)
    if keys_T2.shape != (tokens, 2):
        expected = f"({tokens}, 2), a key for each token"
        raise argument_error("route", "keys_T2", got=f"shape {tuple(keys_T2.shape)}", expected=expected)
    return normal(keys_T2, (experts,))


def without_padding(routing: Routing, valid_T: torch.Tensor) -> Routing:
    """A routing in which tokens that aren't ``valid_T``, a bool for each, go nowhere and don't count.

    >>> ids = torch.tensor([[0, 2], [2, 1]])
    >>> routing = Routing(ids, torch.ones(2, 2), torch.tensor([1, 1, 2]), torch.ones(2, 3))
    >>> found = without_padding(routing, torch.tensor([True, False]))
    >>> found.expert_ids_TK, found.counts_E
    (tensor([[ 0,  2],
            [-1, -1]]), tensor([1, 0, 1]))
    """
    ids_TK = torch.where(valid_T[:, None], routing.expert_ids_TK, -1)
    pairs = ids_TK.flatten()  # a pair without an expert adds nothing, to whichever
    counts_E = torch.zeros_like(routing.counts_E).scatter_add(0, pairs.clamp_min(0), (pairs >= 0).to(pairs))
    return replace(routing, expert_ids_TK=ids_TK, counts_E=counts_E, valid_T=valid_T)


def check_bias(function: str, argument: str, bias_E: torch.Tensor) -> None:
    """Raise ``ValueError`` for a selection bias too narrow for its steps: 0.5 + 0.001 is 0.5 in bfloat16."""
    if bias_E.dtype not in (torch.float32, torch.float64):
        expected = "torch.float32 or torch.float64, which hold its small steps"
        remedy = "Convert every parameter but the selection biases, as moe_init(dtype=) does."
        raise argument_error(function, argument, got=bias_E.dtype, expected=expected, remedy=remedy)


# ---- operators -------------------------------------------------------------------------------


def _topk_kernel(
    scores_TE: torch.Tensor, bias_E: torch.Tensor, num_groups: int, top_groups: int, group_best: int, k: int
) -> torch.Tensor:
    if kernels.installed() and scores_TE.is_cuda and scores_TE.dtype == bias_E.dtype == torch.float32:
        from .kernels import router

        return router.topk(scores_TE, bias_E, num_groups, top_groups, group_best, k)
    choice_TE = scores_TE + bias_E
    if top_groups < num_groups:
        grouped = choice_TE.unflatten(1, (num_groups, -1))
        group_scores = grouped.topk(min(group_best, grouped.shape[2]), dim=2).values.sum(2)
        best = group_scores.topk(top_groups, dim=1, sorted=False).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        choice_TE = grouped.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
    return choice_TE.topk(k, dim=1).indices


def _topk_plain(
    scores: torch.Tensor, bias: torch.Tensor, num_groups: int, top_groups: int, group_best: int, k: int
) -> torch.Tensor:
    def from_rank(scores: torch.Tensor, rank: int) -> torch.Tensor:
        return scores >= scores.sort(-1, descending=True).values[..., rank - 1 : rank]

    grouped = rearrange(scores + bias, "t (g e) -> t g e", g=num_groups)
    best = grouped.sort(-1, descending=True).values[..., :group_best]
    open_groups = from_rank(reduce(best, "t g e -> t g", "sum"), top_groups)
    choice = rearrange(torch.where(open_groups[..., None], grouped, -torch.inf), "t g e -> t (g e)")
    return choice.argsort(1, descending=True)[:, :k]


def _topk_vmap(size: int, dims: Dims, scores: torch.Tensor, bias: torch.Tensor, *statics: int) -> Fold:
    if dims[1] is not None:
        scores, bias = scores + bias[:, None], torch.zeros_like(bias[0])
    return more_rows(size, fold_rows(scores), bias, *statics)


_GROUPS = "SymInt num_groups, SymInt top_groups, SymInt group_best"

# scores (T, E), bias (E,) -> (T, k) int64: the k best experts of the best groups by the sum of the two.
topk: Operator = declare(
    f"topk(Tensor scores, Tensor bias, {_GROUPS}, SymInt k) -> Tensor",
    impl=_topk_kernel,
    fake=lambda scores, *rest: scores.new_empty(scores.shape[0], rest[-1], dtype=torch.int64),
    checkpoint=TOPK,
    example=lambda: (random(4, 8), random(8), 4, 2, 1, 3),
    plain=_topk_plain,
    vmap=_topk_vmap,
)


def _product_kernel(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if kernels.installed() and a.is_cuda:
        from .kernels import router

        if router.multiplies(a, b):
            return router.product(a, b, dtype)
    return _product_plain(a, b, dtype)


def _product_plain(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = accumulator(torch.promote_types(a.dtype, b.dtype))
    return (a.to(wide) @ b.to(wide)).to(dtype)


def _product_vjp(inputs: tuple[Any, ...], needs: Any, g: torch.Tensor) -> tuple[Any, ...]:
    a, b, _ = inputs
    if needs[0] and needs[1]:
        g_a, g_b = product_backward(g, a, b)
        return g_a, g_b.mT
    return (
        product(g, b.mT, a.dtype) if needs[0] else None,
        product(a.mT, g, b.dtype) if needs[1] else None,
    )


def _product_vmap(size: int, dims: Dims, a: Any, b: Any, dtype: torch.dtype) -> Fold:
    if dims[1] is None and b.dim() == 2:
        return more_rows(size, fold_rows(a), b, dtype)
    return same_rows(front(a, dims[0], size), front(b, dims[1], size), dtype)


# a (..., N, I), b (..., I, O) -> (..., N, O) in dtype, accumulated in float32: keeps a and b as they are.
product: Operator = declare(
    "product(Tensor a, Tensor b, ScalarType dtype) -> Tensor",
    impl=_product_kernel,
    fake=lambda a, b, dtype: a.new_empty(*a.shape[:-1], b.shape[-1], dtype=dtype),
    checkpoint=ROUTER,
    example=lambda: (random(4, 3), random(3, 2), torch.float64),
    plain=_product_plain,
    vjp=_product_vjp,
    by_need=True,
    jvp=bilinear_jvp(lambda: product),
    vmap=_product_vmap,
)


def _product_backward_reference(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return product(g, b.mT, a.dtype), product(g.mT, a, b.dtype)


def _product_backward_kernel(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    if kernels.installed() and a.is_cuda and g.dtype == torch.float32:
        from .kernels import router

        if a.dtype == b.dtype and router.multiplies(g, a) and router.multiplies(g, b):
            return router.product_backward(g, a, b)
    return _product_kernel(g, b.mT, a.dtype), _product_kernel(g.mT, a, b.dtype)


# Both cotangents of a product, that of b transposed: what they need of g is made once.
product_backward: Operator = declare(
    "product_backward(Tensor g, Tensor a, Tensor b) -> (Tensor, Tensor)",
    impl=_product_backward_kernel,
    fake=lambda g, a, b: (a.new_empty(a.shape), b.new_empty(b.mT.shape)),
    checkpoint=ROUTER,
    example=lambda: (random(4, 2), random(4, 3), random(3, 2)),
    reference=_product_backward_reference,
)
