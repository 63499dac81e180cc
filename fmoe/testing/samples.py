"""Random layers, tokens and routings for the laws, and the distance of two results."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch

from ..models.moe import MoEParams, moe_specs
from ..ops.core.dtypes import accumulator
from ..ops.route import RouterConfig, Routing
from ..params import ParamSpec, is_spec

# The allowed error against float64, relative to the largest value: a few roundings.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 0.01, torch.bfloat16: 0.06}


def error(a: Any, b: Any, unit: float = 1.0) -> float:
    """The largest difference between two trees of tensors, relative to ``unit`` plus the largest value.

    NaN and another shape are infinitely wrong.

    >>> error((torch.ones(2), torch.zeros(1)), (torch.ones(2), torch.tensor([1.0])))
    0.5
    """
    worst = 0.0
    left, right = optree.tree_leaves(a), optree.tree_leaves(b)
    if [x.shape for x in left] != [x.shape for x in right]:
        return float("inf")
    for x, y in zip(left, right):
        if x.numel():
            x, y = x.detach().double().cpu(), y.detach().double().cpu()
            off = ((x - y).abs().max() / (unit + y.abs().max())).item()
            worst = max(worst, float("inf") if off != off else off)
    return worst


def same_bits(a: Any, b: Any) -> float:
    """Zero if two trees of tensors are equal bit for bit, else their :func:`error`, but above zero."""
    left, right = optree.tree_leaves(a), optree.tree_leaves(b)
    if len(left) == len(right) and all(map(torch.equal, left, right)):
        return 0.0
    return max(error(a, b), 1e-300)


def largest(tree: Any) -> float:
    """The largest absolute value in a tree of tensors."""
    return max((t.detach().abs().max().item() for t in optree.tree_leaves(tree) if t.numel()), default=0.0)


def dot(a: Any, b: Any) -> torch.Tensor:
    """The inner product of two trees of tensors."""
    pairs = zip(optree.tree_leaves(a), optree.tree_leaves(b))
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def noise(like: torch.Tensor) -> torch.Tensor:
    """Normal numbers, drawn on the CPU in float32, so that all devices and dtypes get the same."""
    return torch.randn(like.shape, device="cpu", dtype=torch.float32).to(like)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widened(tree: Any) -> Any:
    """The tree in float64."""
    return optree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def random_layer(
    *, dim: int, hidden_dim: int, num_experts: int, dtype: torch.dtype, device: str, shared: bool = True
) -> MoEParams:
    """A layer with one shared expert, or none, whose outputs and gradients are of order one.

    Its selection bias is large enough to matter. It is drawn on the CPU, so that all devices draw the same.
    """

    def draw(spec: ParamSpec) -> torch.Tensor:
        return (torch.randn(spec.shape) * spec.shape[-1] ** -0.5 * 1.2).to(device, dtype)

    specs = moe_specs(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, num_shared_experts=int(shared))
    params: MoEParams = optree.tree_map(draw, specs, is_leaf=is_spec)
    bias = torch.randn(num_experts) * 0.1
    return params._replace(router=params.router._replace(bias_E=bias.to(device)))


def router_config(num_experts: int, top_k: int) -> RouterConfig:
    """A router's configuration, with node-limited routing if these sizes permit it."""
    groups = next((n for n in (4, 2) if num_experts % n == 0 and top_k <= num_experts // 2), 1)
    return RouterConfig(top_k=top_k, num_groups=groups, top_groups=max(1, groups // 2), scale=2.5)


def whole_numbers(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random whole numbers, small enough for exact sums in any dtype."""
    return torch.randint(-4, 5, tuple(shape)).to(device, dtype)


def _distinct(tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    ids = torch.rand(tokens, num_experts).argsort(1)[:, :top_k]
    return torch.nn.functional.pad(ids, (0, top_k - ids.shape[1]), value=-1)


# Routes, extreme ones too: (rank, tokens, experts on a device, devices, top-k) -> ids.
ROUTES: dict[str, Callable[[int, int, int, int, int], torch.Tensor]] = {
    "any experts": lambda rank, t, e, n, k: _distinct(t, e * n, k),
    "some pairs dropped": lambda rank, t, e, n, k: torch.where(
        torch.rand(t, k) < 0.4, -1, _distinct(t, e * n, k)
    ),
    "all pairs dropped": lambda rank, t, e, n, k: torch.full((t, k), -1),
    "one expert for all": lambda rank, t, e, n, k: torch.tensor([e * n - 1] + [-1] * (k - 1)).expand(t, k),
    "one device for all": lambda rank, t, e, n, k: _distinct(t, e, k),
    "a device without tokens": lambda rank, t, e, n, k: _distinct(0 if rank == 0 else t, e * n, k),
    "no tokens at all": lambda rank, t, e, n, k: _distinct(0, e * n, k),
    "another number on each device": lambda rank, t, e, n, k: _distinct(max(1, t - rank), e * n, k),
}


def routing_of(ids_TK: torch.Tensor, num_experts: int, *, dtype: torch.dtype, device: str) -> Routing:
    """A routing to these experts, with random weights."""
    weights = torch.rand(ids_TK.shape, dtype=torch.float64).to(accumulator(dtype))
    counts = torch.bincount(ids_TK[ids_TK >= 0].reshape(-1), minlength=num_experts)
    scores = torch.rand(ids_TK.shape[0], num_experts)
    values: Any = [t.to(device) for t in (ids_TK, weights, counts, scores)]
    return Routing(*values)
