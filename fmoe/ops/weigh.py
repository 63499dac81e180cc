"""The weights of chosen experts from the router's numbers, and how many tokens chose each expert."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import kernels
from .bases import gather, random, scatter_add, total
from .core.derive import Tensors
from .core.primitive import Operator, declare
from .core.tape import checkpoint

ROUTER = checkpoint("router", save=False)


class Weighting(NamedTuple):
    """The way from chosen numbers to weights.

    =========  ========================================
    sigmoid    the numbers are logits of sigmoids
    normalize  a token's weights are its scores over their sum; without ``sigmoid`` these are exponentials
    scale      what weights are multiplied by
    =========  ========================================
    """

    sigmoid: bool
    normalize: bool
    scale: float

    def of(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        if self.normalize:  # by logarithms, so that small scores don't vanish
            return self._shares(chosen_TK) * self.scale
        return (chosen_TK.sigmoid() if self.sigmoid else chosen_TK) * self.scale

    def moved(self, chosen_TK: torch.Tensor, tangent_TK: torch.Tensor) -> torch.Tensor:
        """The tangent of the weights."""
        return self._centred(chosen_TK, self._sloped(chosen_TK, tangent_TK)) * self.scale

    def pulled_back(self, chosen_TK: torch.Tensor, g_TK: torch.Tensor) -> torch.Tensor:
        """The cotangent of the chosen numbers."""
        return self._sloped(chosen_TK, self._centred(chosen_TK, g_TK * self.scale))

    def _shares(self, chosen_TK: torch.Tensor) -> torch.Tensor:
        return (F.logsigmoid(chosen_TK) if self.sigmoid else chosen_TK).softmax(-1)

    def _centred(self, chosen_TK: torch.Tensor, value_TK: torch.Tensor) -> torch.Tensor:
        """The derivative of the softmax, its own transpose."""
        if not self.normalize:
            return value_TK
        share_TK = self._shares(chosen_TK)
        return share_TK * (value_TK - (share_TK * value_TK).sum(-1, keepdim=True))

    def _sloped(self, chosen_TK: torch.Tensor, value_TK: torch.Tensor) -> torch.Tensor:
        """The derivative of the sigmoid or of its logarithm."""
        if not self.sigmoid:
            return value_TK
        slope_TK = (-chosen_TK).sigmoid()
        return value_TK * (slope_TK if self.normalize else slope_TK * chosen_TK.sigmoid())


class _Kept(NamedTuple):
    chosen_TK: torch.Tensor
    ids_TK: torch.Tensor
    num_experts: int
    how: Weighting


def _cells(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The places of (token, expert) pairs in a flat (T, E)."""
    return (ids_TK + num_experts * torch.arange(ids_TK.shape[0], device=ids_TK.device)[:, None]).flatten()


def _chosen(rows_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    return gather(rows_TE.flatten(), _cells(ids_TK, rows_TE.shape[1])).view(ids_TK.shape)


def _spread(chosen_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The transpose of :func:`_chosen`."""
    num_tokens = ids_TK.shape[0]
    rows_N = scatter_add(chosen_TK.flatten(), _cells(ids_TK, num_experts), num_tokens * num_experts)
    return rows_N.view(num_tokens, num_experts)


def _reference(rows_TE: torch.Tensor, ids_TK: torch.Tensor, *how: Any) -> Tensors:
    chosen_TK = _chosen(rows_TE, ids_TK)
    return Weighting(*how).of(chosen_TK), _counts(ids_TK, rows_TE.shape[1]), chosen_TK


def _counts(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    pairs = ids_TK.flatten()
    return pairs.new_zeros(num_experts).scatter_add(0, pairs, torch.ones_like(pairs))


def _kernel(rows_TE: torch.Tensor, ids_TK: torch.Tensor, *how: Any) -> Tensors:
    if _fused(rows_TE):
        from .kernels import router

        return router.weigh(rows_TE, ids_TK, *how)
    chosen_TK = rows_TE.gather(1, ids_TK)
    return Weighting(*how).of(chosen_TK), _counts(ids_TK, rows_TE.shape[1]), chosen_TK


def _fused(numbers: torch.Tensor) -> bool:
    return numbers.dtype == torch.float32 and kernels.fused(numbers)


def _backward_kernel(
    g_TK: torch.Tensor, chosen_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int, *how: Any
) -> torch.Tensor:
    if _fused(chosen_TK):
        from .kernels import router

        return router.weigh_backward(g_TK, chosen_TK, ids_TK, num_experts, *how)
    g_chosen_TK = Weighting(*how).pulled_back(chosen_TK, g_TK)
    return g_TK.new_zeros(ids_TK.shape[0], num_experts).scatter_(1, ids_TK, g_chosen_TK)


def _backward_reference(
    g_TK: torch.Tensor, chosen_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int, *how: Any
) -> torch.Tensor:
    return _spread(Weighting(*how).pulled_back(chosen_TK, g_TK), ids_TK, num_experts)


def _how_example() -> tuple[bool, bool, float]:
    return bool(torch.rand(()) < 0.5), bool(torch.rand(()) < 0.5), 2.5


def _ids_example() -> torch.Tensor:
    return torch.rand(4, 5).argsort(1)[:, :3]


def _vjp(kept: _Kept, needs: Any, g: Any, _: None, g_chosen: Any) -> tuple[torch.Tensor]:
    chosen_TK, ids_TK, num_experts, how = kept
    of_weights = None if g is None else weigh_backward(g, chosen_TK, ids_TK, num_experts, *how)
    return (total(of_weights, None if g_chosen is None else _spread(g_chosen, ids_TK, num_experts)),)


def _jvp(kept: _Kept, t_rows: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, torch.Tensor]:
    t_chosen = _chosen(t_rows, kept.ids_TK)
    return kept.how.moved(kept.chosen_TK, t_chosen), None, t_chosen


_HOW = "bool sigmoid, bool normalize, float scale"

weigh_backward: Operator = declare(
    f"weigh_backward(Tensor g, Tensor chosen, Tensor ids, SymInt num_experts, {_HOW}) -> Tensor",
    impl=_backward_kernel,
    fake=lambda g, chosen, ids, num_experts, *how: g.new_empty(g.shape[0], num_experts),
    checkpoint=ROUTER,
    example=lambda: (random(4, 3), random(4, 3), _ids_example(), 5, *_how_example()),
    reference=_backward_reference,
)

# rows (T, E), ids (T, K), a token's all different, -> weights (T, K), counts (E,), chosen numbers (T, K).
# The last are all that the backward needs of the rows.
weigh: Operator = declare(
    f"weigh(Tensor rows, Tensor ids, {_HOW}) -> (Tensor, Tensor, Tensor)",
    impl=_kernel,
    fake=lambda rows, ids, *how: (
        rows.new_empty(ids.shape),
        ids.new_empty(rows.shape[1]),
        rows.new_empty(ids.shape),
    ),
    checkpoint=ROUTER,
    example=lambda: (random(4, 5), _ids_example(), *_how_example()),
    by_need=True,
    residuals=lambda inputs, outputs: _Kept(
        outputs[2], inputs[1], inputs[0].shape[1], Weighting(*inputs[2:])
    ),
    vjp=_vjp,
    jvp=_jvp,
    reference=_reference,
)
