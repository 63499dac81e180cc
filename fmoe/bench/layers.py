"""The shapes that layers are compared on, and two layers: ours and plain PyTorch.

All layers route with the same rule and hold the same weights, so their outputs and gradients must agree.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F

from ..introspect import kept_bytes, saved_bytes
from ..models.moe import MoEParams, moe_forward, moe_init, moe_specs
from ..ops.combine import combine
from ..ops.core.tape import Policy
from ..ops.dispatch import align_rows, dispatch
from ..ops.experts import ExpertParams, experts_grouped_mm
from ..ops.experts_kernels import swiglu
from ..ops.kernels import gathered, grouped, tuned
from ..ops.kernels.tuned import Choice
from ..ops.route import RouterConfig, RouterParams, route
from ..params import is_spec
from ..transforms import save, save_everything, save_nothing

Layer = Callable[[MoEParams, torch.Tensor], torch.Tensor]


class Shape(NamedTuple):
    """A layer without shared experts, and how many tokens go through it."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """FLOPs of the experts' products in one forward."""
        return 6 * self.tokens * self.top_k * self.dim * self.hidden


SHAPES = {
    "16B": Shape(16384, 2048, 1408, 64, 6),
    "30B-A3B": Shape(32768, 2048, 768, 128, 8),
    "671B-like": Shape(8192, 7168, 2048, 32, 8),
    "OLMoE": Shape(16384, 2048, 1024, 64, 8),
    "Qwen3-Next-like": Shape(16384, 2048, 512, 512, 10),
    "Granite-like": Shape(24576, 1536, 512, 40, 8),
    "16B-4096": Shape(4096, 2048, 1408, 64, 6),
    "small": Shape(512, 128, 64, 16, 4),
}

ROUTINGS = ("random", "balanced", "zipf", "hot")


def config_for(shape: Shape, routing: str) -> RouterConfig:
    return RouterConfig(top_k=shape.top_k, force_balance=routing == "balanced")


def layer_memory(shape: Shape) -> dict[str, dict[str, int]]:
    """Bytes that a bfloat16 layer keeps under each policy of ``remat``, by checkpoint name.

    They live between forward and backward, and :func:`fmoe.training.plot.plot_memory` draws them. Nothing is
    computed, so any size will do.

    >>> list(layer_memory(SHAPES["small"]))
    ['no remat', 'save_everything', 'save("experts_grouped_mm")', 'save("topk")', 'default', 'save_nothing']
    """
    layer = functools.partial(moe_forward, router=config_for(shape, "random"))
    specs = moe_specs(dim=shape.dim, hidden_dim=shape.hidden, num_experts=shape.experts)

    def empty(spec: Any) -> torch.Tensor:
        dtype = spec.dtype or torch.bfloat16
        return torch.empty(spec.shape, dtype=dtype, device="meta", requires_grad=True)

    params = optree.tree_map(empty, specs, is_leaf=is_spec)
    x = torch.empty(shape.tokens, shape.dim, dtype=torch.bfloat16, device="meta", requires_grad=True)
    policies: dict[str, Policy | None] = {
        "save_everything": save_everything,
        'save("experts_grouped_mm")': save("experts_grouped_mm"),
        'save("topk")': save("topk"),
        "default": None,
        "save_nothing": save_nothing,
    }

    plain = {"no remat": {"autograd": kept_bytes(layer, params, x)}}
    return plain | {name: saved_bytes(layer, params, x, policy=policy) for name, policy in policies.items()}


def random_params(shape: Shape, seed: int, *, dtype: torch.dtype, device: str) -> MoEParams:
    """Weights that keep activations of order one."""
    params = moe_init(
        seed, dim=shape.dim, hidden_dim=shape.hidden, num_experts=shape.experts, dtype=dtype, device=device
    )
    by_dim, by_hidden = (size**-0.5 / 0.02 for size in (shape.dim, shape.hidden))  # 0.02: of moe_init
    return params._replace(
        router=params.router._replace(weight_ED=params.router.weight_ED * by_dim),
        experts=ExpertParams(params.experts.w_in.mul_(by_dim), params.experts.w_out.mul_(by_hidden)),
    )


def skewed(params: MoEParams, x: torch.Tensor, config: RouterConfig, routing: str) -> MoEParams:
    """The same layer with a selection bias that spreads ``x`` as ``routing`` says.

    ``zipf`` chooses the i-th expert in proportion to 1 / i. ``hot`` has every token choose the first expert,
    and none the last quarter of them.
    """
    num_experts = params.router.bias_E.shape[0]
    index = torch.arange(num_experts, device=x.device)
    if routing == "hot":
        bias = torch.where(index == 0, 4.0, torch.where(index >= num_experts - num_experts // 4, -4.0, 0.0))
        return params._replace(router=params.router._replace(bias_E=bias))
    if routing != "zipf":
        return params
    wanted = 1.0 / (index + 1)
    wanted = wanted / wanted.sum() * config.top_k
    for _ in range(num_experts):  # a token can't choose an expert twice, so the others get the rest
        over = (wanted - 1).clamp_min(0).sum()
        wanted = wanted.clamp_max(1)
        wanted = wanted + over * torch.where(wanted < 1, wanted, 0) / wanted[wanted < 1].sum()
    bias = torch.zeros(num_experts, device=x.device)
    for step in range(400):
        router = RouterParams(params.router.weight_ED, bias)
        share = route(router, x, config).counts_E / max(1, x.shape[0])
        bias = bias + 0.1 * 0.99**step * (wanted - share).sign()
    return params._replace(router=params.router._replace(bias_E=bias))


def plain_layer(params: MoEParams, x: torch.Tensor, top_k: int, ids_TK: Any = None) -> torch.Tensor:
    """A layer in plain PyTorch: rows sorted by expert, grouped products, rows added back.

    ``ids_TK`` fixes the choice of experts. In float32 or wider it is the reference for all layers.
    """
    logits = x.float() @ params.router.weight_ED.float().T
    if ids_TK is None:
        ids_TK = (logits.sigmoid() + params.router.bias_E).topk(top_k, dim=-1).indices
    weights = F.logsigmoid(logits.gather(1, ids_TK)).softmax(-1)
    expert, order = ids_TK.reshape(-1).sort(stable=True)
    token, num_experts = order // top_k, params.experts.w_in.shape[0]
    experts = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(expert, experts, right=True).int()
    h = _grouped(x[token], params.experts.w_in.flatten(1, 2).mT, ends).unflatten(1, (2, -1))
    rows = _grouped(swiglu(h), params.experts.w_out.mT, ends) * weights.reshape(-1)[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, rows.float()).to(x.dtype)


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, w, offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(pairwise(starts))])


def layers(
    shape: Shape, config: RouterConfig, align: Sequence[int] = (), precision: Sequence[str] = ()
) -> dict[str, Layer]:
    """The layers by name: ours, and plain PyTorch.

    If quack-kernels are installed, ours is there also by them and without them, unless ``FMOE_GROUPED_MM``
    names one engine. It is there with rows aligned to each of ``align``, and with products in each
    ``precision``.
    """
    found: dict[str, Layer] = {"fmoe": functools.partial(moe_forward, router=config)}
    if gathered.installed() and grouped.OVERRIDE not in os.environ:
        found["fmoe, quack"] = functools.partial(_by_quack, config)
        found["fmoe, without quack"] = functools.partial(_by_engine, config, "triton")
    for name in precision:
        found[f"fmoe, {name}"] = functools.partial(moe_forward, router=config, precision=name)
    for multiple in align:
        found[f"fmoe, rows aligned to {multiple}"] = functools.partial(_aligned, config, multiple)
    if not config.force_balance:
        found["PyTorch eager"] = functools.partial(plain_layer, top_k=shape.top_k)
        found["PyTorch compiled"] = functools.partial(torch.compile(plain_layer), top_k=shape.top_k)
    return found


def _by_quack(config: RouterConfig, params: MoEParams, x: torch.Tensor) -> torch.Tensor:
    if not gathered.able(x, params.experts.w_in):
        raise ValueError(f"quack-kernels don't take {x.dtype} on {x.device}, or these sizes")
    return _by_engine(config, gathered.ENGINE, params, x)


def _by_engine(config: RouterConfig, engine: str, params: MoEParams, x: torch.Tensor) -> torch.Tensor:
    with by_engine(engine, params.experts.w_in):
        return moe_forward(params, x, router=config)


def by_engine(engine: str, w_in: torch.Tensor) -> AbstractContextManager[None]:
    """Inside, an engine computes layers of such experts, unless ``FMOE_GROUPED_MM`` names another."""
    layer = tuned.key("layer", gathered.sizes(w_in), w_in.dtype)
    return tuned.using(w_in.device, {layer: Choice(engine)})


def _aligned(config: RouterConfig, multiple: int, params: MoEParams, x: torch.Tensor) -> torch.Tensor:
    x_SD, plan = dispatch(x, route(params.router, x, config))
    plan = align_rows(plan, multiple)
    return combine(experts_grouped_mm(params.experts, x_SD, plan), plan)
