"""Functions as CUDA graphs: the same bits as without, and clear errors for what can't be one."""

import dataclasses

import optree
import pytest
import torch

import fmoe
from fmoe.errors import TransformError
from fmoe.graphs import _Captured
from fmoe.models import decoder
from fmoe.training import gradients, optim
from fmoe.training.step import training_step
from fmoe.transforms import per_layer

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of CUDA")


def test_without_a_gpu_it_is_the_function(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fmoe.graphed(torch.sin) is torch.sin


class Swapping:
    """A graph whose replay adds ten times the second input to the first."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def replay(self):
        self.a.add_(self.b, alpha=10)


def test_arguments_that_lie_in_each_others_places():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    captured = _Captured(Swapping(a, b), {0: a, 1: b}, (a, b))
    assert [t.item() for t in captured.replay([b, a])] == [12.0, 1.0]
    assert [t.item() for t in captured.replay([torch.tensor([3.0]), a])] == [123.0, 12.0]


@pytest.mark.gpu
@ON_CUDA
def test_results_are_the_functions_for_any_arguments():
    calls = []

    def fn(tree, factor, scale):
        calls.append(factor)
        return {"sum": tree["a"] @ tree["b"][0] * factor, "scaled": tree["a"] * scale}

    with torch.device("cuda"):
        graph = fmoe.graphed(fn)
        for factor, rows in [(2.0, 3), (2.0, 3), (2.0, 5), (3.0, 3), (2.0, 3), (2.0, 5)]:
            args = {"a": torch.randn(rows, 4), "b": (torch.randn(4, 2), None)}, factor, torch.randn(())
            found, wanted = graph(*args), fn(*args)
            assert optree.tree_all(optree.tree_map(torch.equal, found, wanted))
        assert len(calls) == 6 + 2 * 3, "twice for each kind"


@pytest.mark.gpu
@ON_CUDA
def test_random_numbers_go_on():
    with torch.device("cuda"):
        draw = fmoe.graphed(lambda x: x + torch.rand_like(x))
        found = torch.stack([draw(torch.zeros(100)).clone() for _ in range(5)])
        assert len(found.unique(dim=0)) == 5


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled:UserWarning")
@pytest.mark.parametrize(("remat", "compiled"), [("none", False), ("full", False), ("full", True)])
def test_three_hundred_steps_have_the_bits_of_eager_ones(remat, compiled):
    config, optimizer = decoder.preset("debug"), optim.adamw()
    how = dict(per_layer=per_layer(remat, compiled=compiled), dtype=torch.bfloat16)
    step_of = gradients.of_model(config, **how)

    def losses(graph):
        step = training_step(step_of, optimizer, max_norm=1.0, bias_rate=0.01, graph=graph)
        params, found = decoder.init(config, 0), []
        state, drawn = optimizer.init(params), torch.Generator("cuda").manual_seed(0)
        for i in range(300):
            batch = torch.randint(256, (2, 4, 33), generator=drawn).unbind()
            params, state, loss, *_ = step(params, state, 1e-3 * (1 - i / 300), *batch)
            found.append(loss.clone())
        return torch.stack(found)

    with torch.device("cuda"):
        graphed, eager = losses(True), losses(False)
    assert torch.equal(graphed, eager)
    assert eager[-1] < eager[0]


@pytest.mark.gpu
@ON_CUDA
def test_donated_arguments_are_where_the_graph_writes():
    with torch.device("cuda"):
        graph = fmoe.graphed(lambda total, x: total.add_(x), donate=(0,))
        total = torch.zeros(3)
        address = total.data_ptr()
        for i in range(4):
            total = graph(total, torch.full((3,), float(i)))
        assert total.data_ptr() == address and total.tolist() == [6.0] * 3


@pytest.mark.gpu
@ON_CUDA
def test_donated_arguments_may_be_one_tensor_and_later_two():
    graph = fmoe.graphed(lambda a, b: a + 10 * b, donate=(0, 1))
    x, y = torch.ones(2, device="cuda").unbind()
    assert [graph(x, x).item(), graph(x, 2 * y).item()] == [11.0, 21.0]


@pytest.mark.gpu
@ON_CUDA
def test_what_cannot_be_captured_is_named():
    x = torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match=r"graphed: args.1.a: got cpu, expected a CUDA device. Move it"):
        fmoe.graphed(lambda x, t: x)(x, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"graphed: args.1: got array, expected a tensor or a hashable"):
        fmoe.graphed(lambda x, t: x)(x, __import__("array").array("i"))

    def asks(x):
        return x * x.sum().item()

    own = torch.Generator("cuda")
    for fn, line in [
        (asks, "x.sum"),
        (lambda x: x + torch.rand(3, device="cuda", generator=own), "torch.rand"),
    ]:
        with pytest.raises(TransformError, match=rf"can't be captured at .*test_graphs.py:\d+ \(.*{line}"):
            fmoe.graphed(fn)(x)
        assert fmoe.graphed(torch.sin)(x).equal(x.sin()), "nothing stays broken"
    for wrapped in (
        torch.func.grad(lambda x: fmoe.graphed(torch.sum)(x)),
        torch.vmap(fmoe.graphed(torch.sin)),
    ):
        with pytest.raises(TransformError, match="graphed: no derivative goes through a graph"):
            wrapped(x)
    with pytest.raises(TransformError, match="graphed: no derivative"):
        fmoe.graphed(torch.sin)(x.clone().requires_grad_())


@pytest.mark.gpu
@ON_CUDA
def test_a_layer_and_its_gradients():
    like = dict(dtype=torch.bfloat16, device="cuda")
    params = fmoe.moe_init(0, dim=64, hidden_dim=32, num_experts=12, **like)
    for router in (fmoe.RouterConfig(top_k=3), dataclasses.replace(fmoe.RouterConfig(), force_balance=True)):
        step = fmoe.value_and_grad(
            lambda p, x, r=router: fmoe.moe_forward(p, x, router=r).pow(2).sum(), (0, 1)
        )
        graph = fmoe.graphed(step)
        for _ in range(4):
            x = torch.randn(100, 64, **like)
            found, wanted = graph(params, x), step(params, x)
            assert optree.tree_all(optree.tree_map(torch.equal, found, wanted))
