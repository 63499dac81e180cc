"""Other implementations of the experts, where they are installed. Each runs after our router.

An adapter follows one version of its peer's interface. If it no longer fits, the benchmark reports that.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.func import functional_call

from ..ops.experts import ExpertParams
from ..ops.route import RouterConfig, route
from .layers import Layer, Shape

Weights = tuple[torch.Tensor, ...]


class Peer(NamedTuple):
    """An implementation. ``make`` makes a layer of it, and ``layout`` arranges the experts' weights for it.

    ``layout`` only moves numbers, so it takes gradients as well. The layer gets its result as
    ``params.experts``, so that a timed step converts nothing.
    """

    package: str
    make: Callable[[Shape, RouterConfig], Layer]
    layout: Callable[[ExpertParams], Weights]


def _in_three(experts: ExpertParams) -> Weights:
    """Gate (E, F, D), output (E, D, F), up (E, F, D)."""
    gate, up = (w.contiguous() for w in experts.w_in.unbind(1))
    return gate, experts.w_out, up


def _interleaved(experts: ExpertParams) -> Weights:
    """Gate and up row by row, (E, 2F, D), and output (E, D, F)."""
    return rearrange(experts.w_in, "E two F D -> E (F two) D"), experts.w_out


def _transformers(shape: Shape, config: RouterConfig) -> Layer:
    """The experts of transformers' DeepSeek-V3."""
    name = "transformers.models.deepseek_v3"
    theirs = importlib.import_module(f"{name}.modeling_deepseek_v3")
    settings = importlib.import_module(name).DeepseekV3Config(
        hidden_size=shape.dim, moe_intermediate_size=shape.hidden, n_routed_experts=shape.experts
    )
    settings._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = theirs.DeepseekV3Experts(settings)
    del experts.gate_up_proj, experts.down_proj

    def run(params: Any, x: torch.Tensor) -> torch.Tensor:
        routing = route(params.router, x, config)
        w_in, experts.down_proj = params.experts
        experts.gate_up_proj = w_in.flatten(1, 2)  # their (E, 2F, D) is a view of (E, 2, F, D)
        return experts(x, routing.expert_ids_TK, routing.weights_TK.to(x.dtype))

    return run


def _torchtitan(shape: Shape, config: RouterConfig) -> Layer:
    """torchtitan 0.3's part after the router, or 0.2's layer with a router that repeats ours."""
    if importlib.util.find_spec("torchtitan.models.moe"):
        return _torchtitan_0_2(shape, config)
    theirs = importlib.import_module("torchtitan.models.common.moe")
    dispatcher = importlib.import_module("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher
    with torch.device("meta"):
        experts = theirs.RoutedExperts(
            theirs.RoutedExperts.Config(
                inner_experts=theirs.GroupedExperts.Config(
                    dim=shape.dim, hidden_dim=shape.hidden, num_experts=shape.experts
                ),
                token_dispatcher=dispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
            )
        )

    def run(params: Any, x: torch.Tensor) -> torch.Tensor:
        routing = route(params.router, x, config)
        names = "inner_experts.w1_EFD", "inner_experts.w2_EDF", "inner_experts.w3_EFD"
        batch = x[None], routing.weights_TK[None], routing.expert_ids_TK[None], routing.counts_E
        return functional_call(experts, dict(zip(names, params.experts)), batch)[0]

    return run


class _Router(torch.nn.Module):
    """A router that returns what it holds, in torchtitan's order."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        for name in ("weights", "ids", "counts"):
            self.register_buffer(name, torch.empty(0))

    def forward(self, x: torch.Tensor, bias: Any) -> Any:
        return self.weights, self.ids, self.counts


def _torchtitan_0_2(shape: Shape, config: RouterConfig) -> Layer:
    theirs = importlib.import_module("torchtitan.models.moe.moe")
    settings = theirs.MoEArgs(
        num_experts=shape.experts, num_shared_experts=0, top_k=shape.top_k, score_before_experts=False,
        use_grouped_mm=True, load_balance_coeff=None,
    )  # fmt: skip
    with torch.device("meta"):
        layer = theirs.MoE(settings, dim=shape.dim, hidden_dim=shape.hidden)
        layer.router = _Router(shape.top_k)

    def run(params: Any, x: torch.Tensor) -> torch.Tensor:
        routing = route(params.router, x, config)
        held = dict(zip(("experts.w1", "experts.w2", "experts.w3"), params.experts))
        held |= {"router.weights": routing.weights_TK, "router.ids": routing.expert_ids_TK}
        held |= {"router.counts": routing.counts_E, "tokens_per_expert": torch.zeros_like(routing.counts_E)}
        return functional_call(layer, held, (x[None],))[0]

    return run


def _scattermoe(shape: Shape, config: RouterConfig) -> Layer:
    """ScatterMoE's two products, as in its ``GLUMLP``."""
    theirs = importlib.import_module("scattermoe.parallel_experts")

    def run(params: Any, x: torch.Tensor) -> torch.Tensor:
        routing = route(params.router, x, config)
        w_in, w_out = params.experts
        order = theirs.flatten_sort_count(routing.expert_ids_TK, num_experts=shape.experts)
        w_in = w_in.flatten(1, 2).mT
        gate, up = theirs.parallel_linear(x, w_in, shape.top_k, *order, grouped_out=True).chunk(2, -1)
        gates = routing.weights_TK.to(x.dtype)
        return theirs.parallel_linear(F.silu(gate) * up, w_out.mT, 1, *order, grouped_in=True, gates=gates)

    return run


def _sonicmoe(shape: Shape, config: RouterConfig) -> Layer:
    """SonicMoE's layer for a given routing."""
    theirs = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def run(params: Any, x: torch.Tensor) -> torch.Tensor:
        routing = route(params.router, x, config)
        w_in, w_out = (w.permute(1, 2, 0) for w in params.experts)
        token = torch.arange(shape.tokens, device=x.device, dtype=torch.int32).repeat_interleave(shape.top_k)
        ids = routing.expert_ids_TK.flatten().int()
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        y, _ = theirs.moe_general_routing_inputs(
            x, routing.weights_TK.flatten(), token, ids, w_in, None, w_out, None, shape.experts, stream,
            activation_type=swiglu,
        )  # fmt: skip
        return y

    return run


PEERS = {
    "transformers grouped_mm": Peer("transformers", _transformers, tuple),
    "torchtitan": Peer("torchtitan", _torchtitan, _in_three),
    "torchtitan compiled": Peer("torchtitan", lambda *how: torch.compile(_torchtitan(*how)), _in_three),
    "ScatterMoE": Peer("scattermoe", _scattermoe, tuple),
    "SonicMoE": Peer("sonicmoe", _sonicmoe, _interleaved),
}
