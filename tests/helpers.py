"""What the tests share: random layers, comparisons, the table of transforms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fmoe

Scalar = Callable[[Any, torch.Tensor], torch.Tensor]

CONFIGS = {
    "sigmoid, groups": fmoe.RouterConfig(top_k=3, num_groups=4, top_groups=2),
    "softmax, before": fmoe.RouterConfig(
        top_k=2,
        num_groups=1,
        top_groups=1,
        score_func="softmax",
        normalize=False,
        scale=1.0,
        score_before_experts=True,
    ),
    "balanced": fmoe.RouterConfig(top_k=3, num_groups=1, top_groups=1, force_balance=True),
}


def fresh_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(2**31))


def random_layer(
    dim: int = 6,
    hidden: int = 5,
    experts: int = 8,
    shared: int = 1,
    dtype: torch.dtype = torch.float64,
    scale: float = 25.0,
) -> fmoe.MoEParams:
    """A layer whose outputs and gradients are of order one, with a selection bias that matters."""
    params = fmoe.moe_init(
        fresh_seed(), dim=dim, hidden_dim=hidden, num_experts=experts, num_shared_experts=shared, dtype=dtype
    )
    params = optree.tree_map(lambda t: t * scale, params)
    return params._replace(router=params.router._replace(bias_E=torch.randn(experts) * 0.1))


def error(a: Any, b: Any) -> float:
    """The largest difference between two trees, relative to one plus the largest value; NaN is infinite."""
    worst = 0.0
    left, right = optree.tree_leaves(a), optree.tree_leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right):
        assert x.shape == y.shape
        if x.numel():
            e = ((x.double() - y.double()).abs().max() / (1 + y.double().abs().max())).item()
            worst = max(worst, float("inf") if e != e else e)
    return worst


def dot(a: Any, b: Any) -> torch.Tensor:
    return sum((x * y).sum() for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b)))


@contextmanager
def raw_calls() -> Iterator[dict[str, int]]:
    """How often each raw fmoe kernel ran; filled when the block ends."""
    counts: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        yield counts
    for event in profile.key_averages():
        if event.key.startswith("fmoe::"):
            counts[event.key.removeprefix("fmoe::")] = event.count


def squared(fn: Callable[..., torch.Tensor]) -> Scalar:
    """A layer as a scalar function."""
    return lambda p, x: fn(p, x).pow(2).sum()


class Example:
    """Arguments for the table of transforms: params, tokens, tangents, and batches of them."""

    def __init__(self, params: Any, x: torch.Tensor, batch: int = 3) -> None:
        self.p, self.x = params, x
        self.X = torch.randn(batch, *x.shape, dtype=x.dtype)
        self.P = optree.tree_map(
            lambda t: torch.stack([t + 0.1 * torch.randn_like(t) for _ in range(batch)]), params
        )
        self.tp = optree.tree_map(torch.randn_like, params)
        self.tx, self.tX = torch.randn_like(x), torch.randn_like(self.X)


# name -> (scalar function L of (params, x), example) -> result
TRANSFORMS: dict[str, Callable[[Scalar, Example], Any]] = {
    "grad": lambda L, e: grad(L, (0, 1))(e.p, e.x),
    "vjp": lambda L, e: vjp(L, e.p, e.x)[1](torch.tensor(2.0, dtype=e.x.dtype)),
    "jvp": lambda L, e: jvp(L, (e.p, e.x), (e.tp, e.tx)),
    "vmap tokens": lambda L, e: vmap(L, (None, 0))(e.p, e.X),
    "vmap params": lambda L, e: vmap(L, (0, None))(e.P, e.x),
    "vmap both": lambda L, e: vmap(L)(e.P, e.X),
    "vmap(vmap)": lambda L, e: vmap(lambda p: vmap(lambda x: L(p, x))(e.X))(e.P),
    "vmap(grad) tokens": lambda L, e: vmap(grad(L, (0, 1)), (None, 0))(e.p, e.X),
    "vmap(grad) params": lambda L, e: vmap(grad(L, (0, 1)), (0, None))(e.P, e.x),
    "vmap(grad) both": lambda L, e: vmap(grad(L, (0, 1)))(e.P, e.X),
    "grad(vmap)": lambda L, e: grad(lambda p: vmap(L, (None, 0))(p, e.X).sum())(e.p),
    "grad(grad)": lambda L, e: grad(lambda p, x: dot(grad(L, (0, 1))(p, x), (e.tp, e.tx)), (0, 1))(e.p, e.x),
    "grad^3": lambda L, e: grad(
        lambda p: grad(lambda q: dot(grad(L)(q, e.x), e.tp))(p).experts.w_in.pow(2).sum()
    )(e.p),
    "jvp(grad)": lambda L, e: jvp(grad(L, (0, 1)), (e.p, e.x), (e.tp, e.tx)),
    "jacrev": lambda L, e: jacrev(L, (0, 1))(e.p, e.x),
    "jacfwd": lambda L, e: jacfwd(L, 1)(e.p, e.x),
    "jacfwd(jacfwd)": lambda L, e: jacfwd(jacfwd(L, 1), 1)(e.p, e.x),
    "jacrev(grad)": lambda L, e: jacrev(grad(L, 1), 1)(e.p, e.x),
    "hessian": lambda L, e: hessian(L, 1)(e.p, e.x),
    "jvp(jvp(grad))": lambda L, e: jvp(lambda p: jvp(grad(L), (p, e.x), (e.tp, e.tx))[1], (e.p,), (e.tp,)),
    "jvp(vmap(grad))": lambda L, e: jvp(lambda p: vmap(grad(L), (None, 0))(p, e.X), (e.p,), (e.tp,)),
    "vmap(jvp(grad))": lambda L, e: vmap(lambda x, t: jvp(grad(L), (e.p, x), (e.tp, t)))(e.X, e.tX),
    "grad(vmap(grad))": lambda L, e: grad(
        lambda p: dot(optree.tree_map(lambda g: g.sum(0), vmap(grad(L), (None, 0))(p, e.X)), e.tp)
    )(e.p),
    "make_fx(grad)": lambda L, e: make_fx(grad(L, (0, 1)))(e.p, e.x)(e.p, e.x),
}
