"""What the tests share: random layers, comparisons, the table of transforms."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import optree
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import fmoe
from fmoe.ops.core import compress
from fmoe.ops.core.primitive import Operator
from fmoe.ops.kernels import scaled
from fmoe.ops.precision import Scaled
from fmoe.testing.samples import dot, error  # noqa: F401

Scalar = Callable[..., torch.Tensor]

CONFIGS = {
    "sigmoid, groups": fmoe.RouterConfig(top_k=3, num_groups=4, top_groups=2, scale=2.5),
    "softmax, before": fmoe.RouterConfig(
        top_k=2, score_func="softmax", normalize=False, score_before_experts=True
    ),
    "balanced": fmoe.RouterConfig(top_k=3, force_balance=True),
}


def quick(some: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for ``pytest.mark.parametrize``. Those not among ``some`` run with ``--slow`` only.

    A tuple is a case of several arguments.
    """

    def param(case: Any) -> Any:
        marks = () if case in some else pytest.mark.slow
        return pytest.param(*(case if isinstance(case, tuple) else [case]), marks=marks)

    return [*map(param, cases)]


def change(config: Any, **fields: Any) -> Any:
    """A configuration with other values of fields, whether they are its own, its attention's or rotary."""
    rope = {"qk_rope_head_dim": "dim", "rope_theta": "theta", "yarn": "yarn"}
    attention = {f.name for f in dataclasses.fields(config.attention)} - {"rope"}
    turning = {rope[k]: v for k, v in fields.items() if k in rope}
    inner = {k: v for k, v in fields.items() if k in attention}
    inner["rope"] = dataclasses.replace(config.attention.rope, **turning)
    outer = {k: v for k, v in fields.items() if k not in {*rope, *attention}}
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **inner), **outer)


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


@contextmanager
def lossless() -> Iterator[None]:
    """Inside, float64 is compressed too, by rows that are scaled and not rounded."""

    def rows(x: torch.Tensor) -> Scaled:
        scale = 1 + x.abs().amax(-1)
        return Scaled(x / scale[..., None], scale)

    with mock.patch.object(compress, "DTYPES", (torch.float64,)), mock.patch.object(scaled, "rows", rows):
        yield


def squared(fn: Callable[..., torch.Tensor]) -> Scalar:
    """A layer as a scalar function."""
    return lambda p, x, ints=(): fn(p, x).pow(2).sum()


def remats(fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """``fn`` under every kind of policy, and nested."""
    return {
        "declared": fmoe.remat(fn),
        "nothing": fmoe.remat(fn, fmoe.save_nothing),
        "everything": fmoe.remat(fn, fmoe.save_everything),
        "names": fmoe.remat(fn, fmoe.save("topk", "experts_grouped_mm")),
        "callable": fmoe.remat(fn, lambda name: name.startswith("t")),
        "nested, outer keeps": fmoe.remat(
            lambda *a: fmoe.remat(fn, fmoe.save("topk"))(*a), fmoe.save("dispatch")
        ),
        "nested, inner keeps": fmoe.remat(
            lambda *a: fmoe.remat(fn, fmoe.save("dispatch", "router"))(*a), fmoe.save_nothing
        ),
        "nested thrice": fmoe.remat(
            lambda *a: fmoe.remat(lambda *b: fmoe.remat(fn)(*b), fmoe.save_nothing)(*a), fmoe.save("topk")
        ),
    }


def allocated_at_once(fn: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of the CPU's memory, mapped files included, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as run:
        kept = fn()
    live = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, kept


class Example:
    """Arguments for the table of transforms: params, tokens, indices; tangents; batches of them."""

    def __init__(self, params: Any, x: torch.Tensor, batch: int = 3) -> None:
        self.p, self.x = params, x
        self.X = torch.randn(batch, *x.shape, dtype=x.dtype)
        self.P = optree.tree_map(
            lambda t: torch.stack([t + 0.1 * torch.randn_like(t) for _ in range(batch)]), params
        )
        self.I: tuple[torch.Tensor, ...] = ()
        self.tp = optree.tree_map(torch.randn_like, params)
        self.tx, self.tX = torch.randn_like(x), torch.randn_like(self.X)


class OperatorExample(Example):
    """What an operator's declaration gives as example: its first floating argument is ``x``, the others and
    a factor are ``p``; integer tensors are indices."""

    def __init__(self, op: Operator, batch: int = 3) -> None:
        self.op, self.args = op, op.example()
        is_tensor = [isinstance(a, torch.Tensor) for a in self.args]
        floats = [i for i, t in enumerate(is_tensor) if t and self.args[i].is_floating_point()]
        self.where_ints = [i for i, t in enumerate(is_tensor) if t and i not in floats]
        self.where_x, self.where_p = floats[:1], floats[1:]
        factor = torch.rand((), dtype=torch.float64) + 0.5
        x = self.args[floats[0]] if floats else torch.randn(2, dtype=torch.float64)
        super().__init__((factor, *(self.args[i] for i in self.where_p)), x, batch)
        draws = [op.example() for _ in range(batch)]
        self.ints = tuple(self.args[i] for i in self.where_ints)
        self.I = tuple(torch.stack([d[i] for d in draws]) for i in self.where_ints)

    def scalar(self, wrap: Callable[..., Any] = lambda fn: fn) -> Scalar:
        """The operator, wrapped in a remat, say, as a scalar function."""

        def call(*args: Any) -> Any:
            return self.op(*args, *self.op.dependent(*args))

        wrapped = wrap(call)

        def loss(p: Any, x: torch.Tensor, ints: Any = self.ints) -> torch.Tensor:
            args = list(self.args)
            for i, value in zip(
                (*self.where_x, *self.where_p, *self.where_ints), (*[x][: len(self.where_x)], *p[1:], *ints)
            ):
                args[i] = value
            out = wrapped(*args)
            total = x.sum()
            for o in out if isinstance(out, tuple) else (out,):
                # Sizes may be known at run time only, which linspace can't take under torch.compile.
                place = torch.arange(1, o.numel() + 1, dtype=torch.float64).view(o.shape)
                weigh = 0.5 + place / 16
                total = total + (o.double() ** 2 * weigh).sum()
            return p[0] * total

        return loss


def compiled(L: Scalar, e: Example) -> Any:
    torch._dynamo.reset()
    return fmoe.value_and_grad(torch.compile(L, fullgraph=True, backend="aot_eager"), (0, 1))(e.p, e.x)


def autograd_twice(L: Scalar, e: Example) -> Any:
    """``grad(grad)`` by autograd alone, beside hooks that ``torch.func`` forbids."""
    leaves, treedef = optree.tree_flatten((e.p, e.x))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.autograd.graph.save_on_cpu():
        loss = L(*optree.tree_unflatten(treedef, leaves))
        slope = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        moved = dot(optree.tree_unflatten(treedef, slope), (e.tp, e.tx))
        found = torch.autograd.grad(moved, leaves, materialize_grads=True)
    return optree.tree_unflatten(treedef, found)


# name -> (scalar function L of (params, x, indices), example) -> result
TRANSFORMS: dict[str, Callable[[Scalar, Example], Any]] = {
    "grad": lambda L, e: grad(L, (0, 1))(e.p, e.x),
    "vjp": lambda L, e: vjp(L, e.p, e.x)[1](torch.tensor(2.0, dtype=e.x.dtype)),
    "jvp": lambda L, e: jvp(L, (e.p, e.x), (e.tp, e.tx)),
    "vmap tokens": lambda L, e: vmap(L, (None, 0))(e.p, e.X),
    "vmap params": lambda L, e: vmap(L, (0, None))(e.P, e.x),
    "vmap both": lambda L, e: vmap(L)(e.P, e.X),
    "vmap all": lambda L, e: vmap(L)(e.P, e.X, e.I),
    "vmap indices": lambda L, e: vmap(lambda i, _: L(e.p, e.x, i))(e.I, e.X),
    "vmap(vmap)": lambda L, e: vmap(lambda p: vmap(lambda x: L(p, x))(e.X))(e.P),
    "vmap(grad) tokens": lambda L, e: vmap(grad(L, (0, 1)), (None, 0))(e.p, e.X),
    "vmap(grad) params": lambda L, e: vmap(grad(L, (0, 1)), (0, None))(e.P, e.x),
    "vmap(grad) both": lambda L, e: vmap(grad(L, (0, 1)))(e.P, e.X),
    "vmap(grad) all": lambda L, e: vmap(grad(L, (0, 1)))(e.P, e.X, e.I),
    "grad(vmap)": lambda L, e: grad(lambda p: vmap(L, (None, 0))(p, e.X).sum())(e.p),
    "grad(grad)": lambda L, e: grad(lambda p, x: dot(grad(L, (0, 1))(p, x), (e.tp, e.tx)), (0, 1))(e.p, e.x),
    "autograd twice, saving on the CPU": autograd_twice,
    "grad^3": lambda L, e: grad(
        lambda p: dot(grad(lambda q: dot(grad(L)(q, e.x), e.tp))(p), e.tp), argnums=0
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
    "make_fx(grad)": lambda L, e: make_fx(grad(lambda p, x: L(p, x), (0, 1)))(e.p, e.x)(e.p, e.x),
    "compile": compiled,
}

# What the oracle does instead, where it would only test PyTorch.
ORACLE_TRANSFORMS = TRANSFORMS | {
    "autograd twice, saving on the CPU": TRANSFORMS["grad(grad)"],
    "make_fx(grad)": TRANSFORMS["grad"],
    "compile": lambda L, e: fmoe.value_and_grad(L, (0, 1))(e.p, e.x),
}
