"""What every backend promises, as functions to run on each rank: ``law_*(device, axes, backend)``.

``axes`` is ``"ep=2"``, say. ``backend`` is ``"all_to_all"``, ``"deepep"`` or ``"deepep elastic"``, the latter
two with ``", apart"`` for no overlap. Each raises ``AssertionError`` where the promise is broken. All ranks
start with the same seed, so that each knows everybody's tokens.
"""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
import torch.distributed as dist
from helpers import error, random_layer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.func import grad, vjp

import fmoe
from fmoe import ExpertParams, MoEParams, P, RouterParams, Routing
from fmoe.introspect import raw_calls
from fmoe.models.moe import moe_layer
from fmoe.ops.axes import group_of
from fmoe.ops.combine import combine_start, join
from fmoe.parallel import AllToAll, deepep

DIM, EXPERTS, TOP_K = 256, 8, 3
CONFIG = fmoe.RouterConfig(top_k=TOP_K, num_groups=4, top_groups=2)
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 2e-5}
SPECS = MoEParams(RouterParams(P(), P()), ExpertParams(P("ep"), P("ep")), ExpertParams(P(), P()))


@contextmanager
def setting(device: str, axes: str, backend: str, tokens: int = 16) -> Iterator[tuple[DeviceMesh, Any]]:
    """A mesh of these axes, and the backend along ``ep``."""
    sizes = {name: int(size) for name, size in (item.split("=") for item in axes.split(","))}
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if backend == "all_to_all":
        yield mesh, AllToAll(group_of(mesh, ("ep",)))
        return
    how = dict(kind="elastic" if "elastic" in backend else "buffer", overlap="apart" not in backend)
    sizes = dict(max_tokens_per_rank=tokens, dim=DIM, top_k=TOP_K, num_experts=EXPERTS)
    with deepep(mesh["ep"], **sizes, **how) as transport:
        yield mesh, transport


def here(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's experts of all."""
    return value.chunk(mesh["ep"].size())[mesh["ep"].get_local_rank()]


class Case:
    """A layer, everybody's tokens, and what one device makes of them all in float32."""

    def __init__(self, device: str, mesh: DeviceMesh, dtype: torch.dtype, tokens: Any = None) -> None:
        num = dist.get_world_size()
        tokens = tokens or [3 + 2 * ((i + 1) % num) for i in range(num)]
        # Of order one: the larger, the more bfloat16 rounds away.
        params = random_layer(DIM, 16, EXPERTS, 1, dtype=torch.float32, scale=4.0)
        as_used = lambda t: t.to(dtype if t.dim() > 1 else t.dtype).to(device)  # noqa: E731
        self.whole = optree.tree_map(as_used, params)
        self.own = self.whole._replace(experts=ExpertParams(*(here(w, mesh) for w in self.whole.experts)))
        self.xs = [torch.randn(n, DIM).to(dtype).to(device) for n in tokens]
        self.cs = [torch.randn(n, DIM).to(dtype).to(device) for n in tokens]
        self.rank, self.mesh = dist.get_rank(), mesh
        self.x, self.c, self.tolerance = self.xs[self.rank], self.cs[self.rank], TOLERANCE[dtype]

    def layer(self, transport: Any) -> Any:
        def layer(params: Any, x: torch.Tensor) -> torch.Tensor:
            return moe_layer(params, x, CONFIG)[0]

        tokens = P(tuple(self.mesh.mesh_dim_names))
        backends = {"ep": transport}
        return fmoe.shard_map(layer, self.mesh, in_specs=(SPECS, tokens), out_specs=tokens, backends=backends)

    def loss(self, transport: Any) -> Any:
        layer = self.layer(transport)
        return lambda params, x: (layer(params, x).float().sin() * self.c.float()).sum()

    def oracle(self) -> tuple[Any, torch.Tensor, Any]:
        """The loss as a function, what it takes, and this rank's part of values and gradients."""
        x = torch.cat(self.xs).float()
        params = optree.tree_map(lambda t: t.float(), self.whole)
        c = torch.cat(self.cs).float()
        return (
            lambda p, x: (fmoe.moe_forward(p, x, router=CONFIG).sin() * c).sum(),
            x,
            params,
        )

    def part(self, params: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        experts = ExpertParams(*(here(w, self.mesh) for w in params.experts))
        return params._replace(experts=experts), x.split([len(x) for x in self.xs])[self.rank]

    def check(self, got: Any, expected: Any, what: str) -> None:
        wrong = error(got, expected)
        assert wrong < self.tolerance, f"{what}: {wrong}"


def law_oracle(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Values and gradients are one device's, also where a rank has no tokens, or all go to one expert."""
    n = dist.get_world_size()
    with setting(device, axes, backend) as (mesh, transport):
        for name, tokens in (("some", None), ("none here", [0] + [5] * (n - 1)), ("nothing", [0] * n)):
            case = Case(device, mesh, dtype, tokens)
            check_against_oracle(case, transport, name)
        case = Case(device, mesh, dtype)
        for params in (case.whole, case.own):  # three experts of the last group take everything
            params.router.bias_E.copy_(torch.arange(EXPERTS).to(device) ** 2 * 10.0)
        check_against_oracle(case, transport, "all on few")


def check_against_oracle(case: Case, transport: Any, name: str) -> None:
    loss, x, params = case.oracle()
    y = fmoe.moe_forward(params, x, router=CONFIG)
    case.check(case.layer(transport)(case.own, case.x), case.part(params, y)[1], f"{name}: value")
    got = grad(case.loss(transport), (0, 1))(case.own, case.x)
    expected = case.part(*grad(loss, (0, 1))(params, x))
    for part, g, e in zip(
        ("router", "experts", "shared", "x"), (*got[0], got[1]), (*expected[0], expected[1])
    ):
        case.check(g, e, f"{name}: gradient of {part}")


def law_second_derivatives(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The gradient's own pullback is one device's."""
    with setting(device, axes, backend) as (mesh, transport):
        case = Case(device, mesh, dtype)
        loss, x, params = case.oracle()
        u = grad(loss, (0, 1))(params, x)
        u = optree.tree_map(lambda t: torch.randn(t.shape).to(t) / t.numel() ** 0.5, u)
        expected = case.part(*vjp(grad(loss, (0, 1)), params, x)[1](u))
        got, pull = vjp(grad(case.loss(transport), (0, 1)), case.own, case.x)
        mine = optree.tree_map(lambda t, like: t.to(like.dtype), case.part(*u), got)
        found = pull(mine)
        for part, g, e in zip(
            ("router", "experts", "shared", "x"), (*found[0], found[1]), (*expected[0], expected[1])
        ):
            wrong = error(g, e)
            assert wrong < 4 * case.tolerance, f"second derivative of {part}: {wrong}"


def random_routing(tokens: int, device: str) -> Routing:
    """Choices some of which are dropped; the first token has none."""
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K]
    ids = torch.where(torch.rand(tokens, TOP_K) < 0.3, -1, ids)
    ids[:1] = -1
    counts = torch.bincount(ids[ids >= 0], minlength=EXPERTS)
    scores = torch.rand(tokens, EXPERTS)
    return Routing(*(t.to(device) for t in (ids, torch.randn(tokens, TOP_K), counts, scores)))


def whole_numbers(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Few enough that sums of them are exact in bfloat16, too."""
    return torch.randint(-4, 5, shape).to(dtype).to(device)


def everybody(value: torch.Tensor) -> float:
    total = value.double().cpu()
    dist.all_reduce(total)
    return total.item()


def law_adjoint(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Dispatch and combine are each other's transpose, weights too, exactly; -1 goes nowhere."""
    with setting(device, axes, backend) as (_, transport):
        torch.manual_seed(torch.initial_seed() + dist.get_rank())
        numbers = lambda *shape: whole_numbers(*shape, device=device, dtype=dtype)  # noqa: E731
        for tokens in (7, 1 + dist.get_rank(), 0):
            routing, x = random_routing(tokens, device), numbers(tokens, DIM)
            x_SD, plan = transport.dispatch(x, routing)
            y = numbers(len(x_SD), DIM)
            back = transport.combine(y, plan)
            assert everybody((back * x).double().sum()) == everybody((y * x_SD).double().sum())
            assert not back[(routing.expert_ids_TK < 0).all(1)].any(), "a token without expert came back"

            w = whole_numbers(tokens, TOP_K, device=device, dtype=torch.float32)
            send = lambda x, w: transport.dispatch(x, dataclasses.replace(routing, weights_TK=w))  # noqa: E731, B023
            (w_SK, back), pull = vjp(lambda w: (send(x, w)[1].weights_SK, x), w)  # noqa: B023
            g = whole_numbers(*w_SK.shape, device=device, dtype=torch.float32)
            g_w = pull((g, torch.zeros_like(back)))[0]
            assert everybody((g_w * w).double().sum()) == everybody((g * w_SK).double().sum())


def law_plans(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Two dispatches in flight, a plan combined twice, combines begun in one order and joined in another."""
    with setting(device, axes, backend) as (mesh, transport):
        torch.manual_seed(torch.initial_seed() + dist.get_rank())
        xs = [whole_numbers(5 + i, DIM, device=device, dtype=dtype) for i in range(2)]
        routings = [random_routing(len(x), device) for x in xs]
        sent = [transport.dispatch(x, r) for x, r in zip(xs, routings)]
        shared = torch.ones_like(xs[1])
        begun = [combine_start(x_SD, plan) for x_SD, plan in sent]
        second, first = join(begun[1], sent[1][1], shared), join(begun[0], sent[0][1])
        ranks = [r.expert_ids_TK // (EXPERTS // mesh["ep"].size()) for r in routings]
        copies = [torch.stack([(r == i).any(1) for i in range(mesh["ep"].size())]).sum(0) for r in ranks]
        expected = [x * n[:, None] for x, n in zip(xs, copies)]
        assert torch.equal(first, expected[0])
        assert torch.equal(second, expected[1] + shared)
        for (x_SD, plan), e in zip(sent, expected):
            assert torch.equal(transport.combine(x_SD, plan), e)
            assert torch.equal(join(combine_start(x_SD, plan), plan), e)


def law_overlap(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """With and without overlap, the same bits, forward and backward."""
    found = []
    for how in ("", ", apart"):
        with setting(device, axes, backend + how) as (mesh, transport):
            if not found:
                case = Case(device, mesh, dtype)
            found.append(value_and_grads(case, transport))
    compare_bits(*found, "elastic" in backend)


def value_and_grads(case: Case, transport: Any, wrap: Any = lambda fn: fn) -> list[torch.Tensor]:
    value, grads = fmoe.value_and_grad(wrap(case.loss(transport)), (0, 1))(case.own, case.x)
    return [value, *optree.tree_leaves(grads)]


def compare_bits(a: list[torch.Tensor], b: list[torch.Tensor], any_order: bool) -> None:
    """ElasticBuffer's rows come in any order, in which the experts' gradients are summed."""
    for x, y in zip(a, b):
        assert torch.equal(x, y) or (any_order and error(x, y) < 1e-2), error(x, y)


def law_remat(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The same bits; by default what communicates runs once."""
    with setting(device, axes, backend) as (mesh, transport):
        case, counts = Case(device, mesh, dtype), {}
        plain = value_and_grads(case, transport)
        ways = {"plain": lambda fn: fn, "default": fmoe.remat, "nothing": recomputing_all}
        for name, wrap in ways.items():
            with raw_calls() as calls:
                found = value_and_grads(case, transport, wrap)
            counts[name] = {op: n for op, n in calls.items() if op in COMMUNICATING}
            compare_bits(found, plain, "elastic" in backend)
        assert counts["plain"] == counts["default"], counts
        assert sum(counts["nothing"].values()) == sum(counts["plain"].values()) + 2, counts
        assert set(counts["plain"].values()) == {1}, counts


def recomputing_all(fn: Any) -> Any:
    return fmoe.remat(fn, fmoe.save_nothing)


COMMUNICATING = {
    "exchange", "send", "send_back", "send_both_back",
    "deepep_dispatch", "deepep_send", "deepep_combine", "deepep_combine_both",
}  # fmt: skip


def law_compile(device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """``torch.compile(fullgraph=True)`` gives the same, also around remat."""
    with setting(device, axes, backend) as (mesh, transport):
        torch._dynamo.reset()
        case = Case(device, mesh, dtype)
        compiled = lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager")  # noqa: E731
        around_remat = lambda fn: compiled(fmoe.remat(fn))  # noqa: E731
        # Dynamo of 2.11 takes remat inside shard_map only.
        for wrap in (compiled, around_remat) if torch.__version__ >= "2.12" else (compiled,):
            for got, expected in zip(
                value_and_grads(case, transport, wrap), value_and_grads(case, transport)
            ):
                case.check(got, expected, "compiled")


def law_no_leak(
    device: str, axes: str, backend: str, dtype: torch.dtype = torch.bfloat16, rounds: int = 1000
) -> None:
    """Evaluation leaves no tensor behind."""
    with setting(device, axes, backend) as (mesh, transport):
        case = Case(device, mesh, dtype)
        layer = case.layer(transport)
        alive = []
        for count in (3, rounds):
            for _ in range(count):
                layer(case.own, case.x)
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        assert alive[1] <= alive[0], alive


LAWS = [
    law_oracle, law_second_derivatives, law_adjoint, law_plans, law_overlap, law_remat, law_compile,
    law_no_leak,
]  # fmt: skip
