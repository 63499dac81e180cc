"""A backward in two halves: exact on random graphs, nothing runs twice that needn't, and no memory stays."""

import random
import weakref
from typing import Any

import optree
import pytest
import torch
from helpers import CONFIGS, error, fresh_seed, random_layer
from torch.autograd.graph import get_gradient_edge

import fmoe
from fmoe.introspect import raw_calls
from fmoe.pipeline.clock import Action
from fmoe.pipeline.halves import input_gradient, weight_gradients
from fmoe.pipeline.run import Line, Made, Stage, run
from fmoe.pipeline.schedule import from_computations


class Opaque(torch.autograd.Function):
    """A product whose backward computes everything, whatever is asked for."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        Opaque.calls += 1
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


def random_graph(rng: random.Random, x: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Products, at several depths, with leaves that are used once, often or never, and with each other."""
    values = [x]
    for _ in range(rng.randint(3, 10)):
        a, w = rng.choice(values), rng.choice(leaves)
        kind = rng.choice(["mm", "opaque", "scaled", "sum", "remat", "leaves", "opaque leaves"])
        if kind == "mm":
            values.append((a @ w).tanh())
        elif kind == "opaque":
            values.append(Opaque.apply(a, w))
        elif kind == "scaled":
            values.append(a * (w * w).sum().sin())
        elif kind == "sum":
            values.append(a + rng.choice(values))
        elif kind == "remat":
            values.append(fmoe.remat(lambda a, w: (a @ w).sin())(a, w))
        else:  # not on the way to x
            product = Opaque.apply if kind == "opaque leaves" else torch.matmul
            values.append(a + product(w, rng.choice(leaves)).sum())
    return [values[-1], rng.choice(values[1:]).sin().sum()]


@pytest.mark.parametrize("attempt", range(60))
def test_two_halves_of_a_random_graph_equal_the_whole(attempt: int) -> None:
    rng = random.Random(fresh_seed())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    outputs = random_graph(rng, x, leaves)
    cotangents = [torch.randn_like(out) for out in outputs]
    calls = [Opaque.calls]
    want = torch.autograd.grad(outputs, [x, *leaves], cotangents, retain_graph=True, allow_unused=True)
    calls.append(Opaque.calls)
    g, rest = input_gradient([get_gradient_edge(out) for out in outputs], cotangents, x, leaves)
    found = [g, *weight_gradients(rest, leaves)]
    assert Opaque.calls - calls[1] == calls[1] - calls[0], "each runs once"
    for mine, theirs in zip(found, want):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(mine, theirs) < 1e-13


def test_an_opaque_node_runs_once_and_a_product_only_for_what_is_asked() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    leaves = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    out = Opaque.apply(x @ leaves[0], leaves[1])
    before = Opaque.calls
    with torch.profiler.profile(acc_events=True) as first:
        _, rest = input_gradient([get_gradient_edge(out)], [torch.ones_like(out)], x, leaves)
    with torch.profiler.profile(acc_events=True) as second:
        weight_gradients(rest, leaves)
    assert Opaque.calls == before + 1
    products = [sum(e.count for e in p.key_averages() if e.key == "aten::mm") for p in (first, second)]
    assert products == [3, 1]  # two of the opaque node, and one of the other in each half


def test_an_output_that_the_input_does_not_reach() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    outputs = [x * 2 + w, (w * w).sin()]
    cotangents = [torch.randn(3) for _ in outputs]
    want = torch.autograd.grad(outputs, [x, w], cotangents, retain_graph=True)
    g, rest = input_gradient([get_gradient_edge(out) for out in outputs], cotangents, x, [w])
    assert error((g, *weight_gradients(rest, [w])), want) < 1e-6


def test_compiled_nodes_that_write_into_what_they_kept() -> None:
    """As a pipeline's rank has them: one stage runs a backward whole, and then another one in two halves."""
    torch._dynamo.reset()

    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x @ w).sin().exp() * x).cos()

    def scaled(w: torch.Tensor) -> torch.Tensor:  # not on the way to x: it runs in the second half
        return (w @ w).sin().exp() * w / 4

    def whole(layer: Any, scaled: Any) -> torch.Tensor:
        return layer(layer(x, leaves[0]) @ scaled(leaves[1]), leaves[0])

    leaves = [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x, g = (torch.randn(5, 6, dtype=torch.float64, requires_grad=grad) for grad in (True, False))
    expected = torch.autograd.grad(whole(layer, scaled), [x, *leaves], g)
    compiled = [torch.compile(fn, fullgraph=True) for fn in (layer, scaled)]
    assert error(torch.autograd.grad(whole(*compiled), [x, *leaves], g), expected) < 1e-9
    of_x, rest = input_gradient([get_gradient_edge(whole(*compiled))], [g], x, leaves)
    assert rest.groups, "something is left for the second half"
    assert error((of_x, *weight_gradients(rest, leaves)), expected) < 1e-9


def test_memory_goes_with_the_second_half() -> None:
    kept = []

    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()
            kept.append(weakref.ref(self))

    x = torch.randn(3, 4, requires_grad=True)
    leaves = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        out = [get_gradient_edge((x @ leaves[0]).tanh() @ leaves[1])]
    _, rest = input_gradient(out, [torch.ones(3, 4)], x, leaves)
    assert any(ref() for ref in kept)
    weight_gradients(rest, leaves)
    del rest, out
    assert not any(ref() for ref in kept)


@pytest.mark.parametrize("attempt", range(10))
def test_any_schedule_of_one_rank_gives_the_gradients(attempt: int) -> None:
    """Stages in any number, backwards whole or in halves, variables that several stages share."""
    rng = random.Random(fresh_seed())
    stages, micro_batches = rng.randint(1, 4), rng.randint(1, 4)
    weights = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    uses = [rng.sample(range(3), rng.randint(1, 3)) for _ in range(stages)]
    inputs = torch.randn(micro_batches, 2, 4, dtype=torch.float64)

    def forward_of(stage: int) -> Any:
        def forward(m: int, x: Any) -> Made:
            x = inputs[m] if x is None else x
            for i in uses[stage]:
                x = (x @ weights[i]).tanh()
            value = x.square().sum() * (stage + 1)
            return Made(x, value, value.detach()[None])

        return forward

    halves = [rng.random() < 0.5 for _ in range(stages)]
    order = [Action(s, "F", m) for m in range(micro_batches) for s in range(stages)]
    for m in range(micro_batches):
        for s in reversed(range(stages)):
            order += [Action(s, "I", m)] if halves[s] else [Action(s, "B", m)]
    order += [Action(s, "W", m) for s in range(stages) if halves[s] for m in range(micro_batches)]
    schedule = from_computations([order], [0] * stages)
    line = Line(0, None, [torch.Size([2, 4])] * micro_batches, inputs.new_empty(0))
    ran = run(schedule, line, {s: Stage(forward_of(s), uses[s]) for s in range(stages)}, weights)
    total = torch.zeros((), dtype=torch.float64)
    for m in range(micro_batches):
        x = None
        for s in range(stages):
            x, value, _ = forward_of(s)(m, x)
            total = total + value
    assert error(sum(ran.sums.values())[0], total) < 1e-13
    want = torch.autograd.grad(total, weights, allow_unused=True)
    for mine, theirs in zip(ran.gradients, want):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(mine, theirs) < 1e-13


@pytest.mark.parametrize("name", CONFIGS)
def test_each_product_of_experts_runs_once_in_two_halves(name: str) -> None:
    """Beside the same products in one backward; recomputed layers have only a first half."""
    config, params = CONFIGS[name], random_layer()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    leaves, structure = optree.tree_flatten(optree.tree_map(lambda t: t.detach().requires_grad_(), params))
    g = torch.randn(10, 6, dtype=torch.float64)

    def graph(layer: Any) -> Any:
        return get_gradient_edge(layer(structure.unflatten(leaves), x, router=config))

    want = torch.autograd.grad(graph(fmoe.moe_forward), [x, *leaves], g, allow_unused=True)
    halves = ("experts_up_backward", "experts_down_backward")
    for layer, first, second in (
        (fmoe.moe_forward, [0, 1, 0], [0, 0, 1]),
        (fmoe.remat(fmoe.moe_forward), [1, 0, 0], [0, 0, 0]),
    ):
        made = graph(layer)
        with raw_calls() as early:
            g_x, rest = input_gradient([made], [g], x, leaves)
        with raw_calls() as late:
            found = [g_x, *weight_gradients(rest, leaves)]
        for half in halves:
            for counted, expected in ((early, first), (late, second)):
                assert [counted.get(half + part, 0) for part in ("", "_inputs", "_weight")] == expected
        for mine, theirs in zip(found, want):
            if theirs is None:
                assert mine is None or not mine.any()
            else:
                assert error(mine, theirs) < 1e-13


@pytest.mark.parametrize("halves", [False, True])
def test_low_precision_is_summed_in_float32(halves: bool) -> None:
    w = torch.tensor(1.0, dtype=torch.bfloat16, requires_grad=True)
    x = torch.tensor([256.0] + [1.0] * 255, dtype=torch.bfloat16)

    def forward(m: int, _: Any) -> Made:
        return Made(None, w * x[m], torch.zeros(1))

    kinds = "FIW" if halves else "FB"
    schedule = from_computations([[Action(0, k, m) for m in range(256) for k in kinds]], [0])
    ran = run(schedule, Line(0, None, [], x.new_empty(0)), {0: Stage(forward, [0])}, [w])
    assert ran.gradients[0] == 511, "in bfloat16, 256 + 1 is 256"
    assert ran.peak == 1
