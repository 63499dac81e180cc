"""Dispatch that never asks the host: it keeps the laws, and a step that had no room for a row is repeated."""

import functools
import math
import re

import laws
import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from helpers import CONFIGS, error, quick, random_layer
from laws import Where, ranks_of
from test_laws import MOST, check_training, hold, losses_alone  # noqa: F401  (a fixture)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import fmoe
from fmoe.bench.timing import syncs
from fmoe.models import decoder, deepseek_v3
from fmoe.models.moe import COMPUTING, of_layer
from fmoe.ops.core.axes import Binding, MeshOfSizes, bound, group_of
from fmoe.ops.core.dtensors import local
from fmoe.ops.dispatch import layout
from fmoe.parallel import AllToAll, Backend, Bound, distribute
from fmoe.parallel.backends import at_once, bounds, choose, ways
from fmoe.testing import check_backend
from fmoe.testing.samples import same_bits
from fmoe.training import gradients, optim
from fmoe.training.step import training_step

NEVER_WAITS = Backend("all_to_all", host_sync=False, max_tokens=40)


# ---- the laws ------------------------------------------------------------------------------------------


def obey(axes, names, tokens=8, capacity=None, **how):
    mesh = bare_mesh(axes)
    backend = AllToAll(group_of(mesh, ("ep",)), Bound(tokens, capacity))
    check_backend(backend, mesh, dtype=torch.float64, tokens=8, dim=16, laws=names, **how)


@pytest.mark.parametrize("axes", quick(["ep=2"], ["ep=2", "ep=4", "dp=2,ep=2", "ep=2,tp=2"]))
def test_it_keeps_the_laws(pool, axes):
    pool.run(ranks_of(axes), obey, axes, [name for name in MOST if name != "no_leak"])


@pytest.mark.slow
def test_it_compiles(pool):
    pool.run(2, obey, "ep=2", ["compilation"], 8, 2.0, timeout=240)


def compiled_of_dtensors(backend):
    """How far compiled layers of several sizes are off, and how many were compiled."""
    where = Where("ep=2", backend)
    mesh, params, sizes = where.mesh(), where.layer(), (8, 12, 4)
    layer, spread = where.forward(mesh, CONFIGS["sigmoid, groups"]), fmoe.shard_params(params, mesh)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, found = torch.compile(layer, fullgraph=True, backend=counter), []
    for rows in sizes:
        x = distribute(torch.randn(rows, laws.DIM, dtype=torch.float64), fmoe.P("ep"), mesh)
        found.append(error(compiled(spread, x), layer(spread, x)))
    return max(found), counter.frame_count


OF_DTENSORS = {
    "bound": NEVER_WAITS,
    "their own": NEVER_WAITS._replace(max_tokens=None),
    "waits": "all_to_all",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_DTENSORS)
def test_layers_of_dtensors_compile(pool, kind):
    for off, graphs in pool.run(2, compiled_of_dtensors, OF_DTENSORS[kind], timeout=240):
        assert off < 1e-12 and graphs == 2  # one for the first size, one for all others


@pytest.mark.parametrize("forwards", quick([30], [30, 1000]))
def test_forwards_leave_nothing_behind(pool, forwards):
    pool.run(2, functools.partial(obey, forwards=forwards), "ep=2", ["no_leak"], 11)


def test_room_that_nobody_needs_changes_nothing(pool):
    pool.run(2, obey, "ep=2", ["oracle", "adjoint"], 100)


MESHES = ["ep=4", "dp=2,ep=2", "ep=2,tp=2"]


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], MESHES))
def test_the_layer_equals_the_oracle(pool, axes):
    hold(pool, laws.oracle, Where(axes, NEVER_WAITS), "softmax, before")


@pytest.mark.parametrize("axes", quick(["ep=2"], ["ep=2", *MESHES]))
def test_any_number_of_plain_tokens_on_each_device(pool, axes):
    hold(pool, laws.plain_tokens, Where(axes, NEVER_WAITS), [0, 4, 0, 1])


@pytest.mark.parametrize("axes", quick(["ep=2"], MESHES))
def test_the_models_gradients_are_those_of_one_process(pool, axes):
    hold(pool, laws.model, Where(axes, NEVER_WAITS), "GQA", timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.how_often, laws.compiled_layers])
@pytest.mark.parametrize("capacity", [None, 2.0])
def test_the_models_other_laws_hold(pool, law, capacity):
    hold(pool, law, Where("ep=2", NEVER_WAITS._replace(capacity=capacity)), "GQA", timeout=240)


@pytest.mark.parametrize("axes", quick(["ep=2"], MESHES))
def test_ten_steps_of_training_are_those_of_one_process(pool, axes, losses_alone):  # noqa: F811
    check_training(pool, Where(axes, NEVER_WAITS), losses_alone)


def room_of_dtensors():
    """The layer of a DTensor, with a backend that isn't told how many tokens a device has."""
    mesh, config, params = bare_mesh("ep=2"), CONFIGS["sigmoid, groups"], Where("ep=2").layer()
    x = torch.randn(3, 4, laws.DIM, dtype=torch.float64)
    spread = distribute(x, fmoe.P(None, "ep"), mesh)
    backend = Backend("all_to_all", host_sync=False)
    y = fmoe.moe_forward(fmoe.shard_params(params, mesh), spread, mesh, router=config, backend=backend)
    return error(y.full_tensor(), fmoe.moe_forward(params, x, router=config))


def test_dtensors_say_how_many_tokens_there_are(pool):
    assert max(pool.run(2, room_of_dtensors)) < 1e-12


# ---- the host is never asked ---------------------------------------------------------------------------


def training_step_on_fake_tensors(bound_of_dispatch):
    """A model's gradient, clipping and update on one device of four, without values: reading one raises."""
    mesh, config, optimizer = MeshOfSizes({"ep": 4}), laws.MODEL, optim.adamw()
    transport = AllToAll(group_of(mesh, ("ep",)), bound_of_dispatch)
    params, tokens = deepseek_v3.init(config, 7), torch.zeros(2, 9, dtype=torch.int64)
    held = config.num_experts // 4
    with FakeTensorMode() as fake, bound(Binding(mesh, (("ep", transport),), ("ep",))):
        params, tokens = optree.tree_map(fake.from_tensor, (params, tokens))
        params = optree.tree_map(
            lambda leaf, spec: leaf[:held].clone() if spec and spec[0] == ("ep",) else leaf,
            params,
            decoder.computing_specs(decoder.specs(config)),
        )
        loss = functools.partial(decoder.stage_loss, config=config)
        (_, stats), grads = fmoe.value_and_grad(loss, has_aux=True)(params, tokens, tokens)
        scale = optim.clip_factor(optim.global_norm(grads), 1.0)
        optimizer.update(params, grads, optimizer.init(params), 1e-3, scale=scale, donate=True)
        return stats.overflow


def test_a_training_step_asks_the_host_for_nothing():
    assert training_step_on_fake_tensors(Bound(18, 1.5)).shape == ()
    with pytest.raises(DynamicOutputShapeException):
        training_step_on_fake_tensors(None)


@pytest.mark.parametrize("narrow", [False, True])
def test_no_kernel_reads_what_is_on_the_device(monkeypatch, narrow):
    """Each runs on tensors without values; what was read only where it is on the host is left out."""
    for module in (at_once, bounds, ways):
        monkeypatch.setattr(
            module, "layout_kernel", layout.raw
        )  # the CPU's, unlike the GPU's, sorts by values
    monkeypatch.setattr(ways, "check_ids", lambda *_: None)  # looks at the CPU's tensors only
    monkeypatch.setattr(ways, "agree", lambda *_: None)
    monkeypatch.setattr(ways, "process_group", lambda name: name)
    splits = torch.full((2, 2), 4)  # always on the host
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weights, ids = torch.randn(5, 4), torch.rand(5, 2), torch.zeros(5, 2, dtype=torch.int64)
        outs = at_once._bounded_kernel(x, weights, ids, 8, 2, 0, False, narrow, 4, 9, "fake")
        x_SD, weights_SK, slot_R, *_, slot_Q, copy_Tn, _, overflow = outs
        assert (len(x_SD), len(slot_R), len(slot_Q), overflow.shape) == (8, 9, 8, ())
        way = slot_Q, copy_Tn, splits
        assert at_once._send_kernel(x, *way, 8, "fake").shape == x_SD.shape
        assert at_once._send_back_kernel(x_SD, *way, "fake").shape == x.shape
        both = at_once._send_both_back_kernel(x_SD, weights_SK, *way, "fake")
        assert [t.shape for t in both] == [x.shape, weights.shape]
        with pytest.raises(DataDependentOutputException):
            at_once._exchange_kernel(x, weights, ids, 8, 2, 0, False, narrow, "fake")


# ---- room that runs out --------------------------------------------------------------------------------

EXPERTS, TOKENS = 4, 4  # of two devices; on each device
EVEN = [[0], [1], [2], [3]]
# name: capacity, what each device's tokens choose, how many rows and pairs have no room
ROOMS = {
    "enough, to the last row": (1.0, [EVEN, EVEN], 0),
    "rows to a device": (1.0, [[[0]] * 4, [[1]] * 4], 4),
    "rows of one device only": (1.0, [[[2]] * 4, EVEN], 2),
    "pairs on a device": (1.0, [[[0, 1]] * 4, [[1, 0]] * 4], 8),
    "both": (0.5, [[[0, 1]] * 4, [[1, 0]] * 4], 8),
    "one pair": (1.0, [[[0, 1], [0, 1], [2, 3], [2, 0]], [[0, 1], [0, 1], [2, 3], [2, 3]]], 1),
}


def ran_out(room):
    """Of a layer's step: which functions ran, what overflowed before and after, and how far it is off."""
    capacity, chosen, _ = ROOMS[room]
    mesh = bare_mesh("ep=2")
    params = random_layer(laws.DIM, 4, EXPERTS)
    ids = torch.tensor(chosen[mesh.get_rank()])
    x, weigh = torch.randn(2, 2 * TOKENS, laws.DIM, dtype=torch.float64)[:, TOKENS * mesh.get_rank() :][
        :, :TOKENS
    ]

    def router(router, x):
        scores = (x @ router.weight_ED.T).sigmoid()
        counts = (ids.flatten() == torch.arange(EXPERTS)[:, None]).sum(1)
        return fmoe.Routing(ids, scores.gather(1, ids), counts, scores)

    ran = []

    def step(name, backend):
        def loss(params, x):
            ran.append(name)
            y, stats = fmoe.moe_forward(params, x, mesh, router=router, backend=backend, return_stats=True)
            return (y.sin() * weigh).sum(), stats

        return fmoe.value_and_grad(loss, (0, 1), has_aux=True)

    spread = fmoe.shard_params(params, mesh)
    fast = step("fast", Backend("all_to_all", host_sync=False, capacity=capacity, max_tokens=TOKENS))
    exact = step("exact", "all_to_all")
    overflow = fast(spread, x)[0][1].overflow.item()
    ran.clear()
    got, want = laws.whole(fmoe.exact_on_overflow(fast, exact)(spread, x)), None
    calls, want = [*ran], laws.whole(exact(spread, x))
    return calls, overflow, got[0][1].overflow.item(), error(got, want), same_bits(got, want)


@pytest.mark.parametrize("room", ROOMS)
def test_a_step_without_room_is_counted_and_repeated(pool, room):
    for calls, overflow, left, off, bits in pool.run(2, ran_out, room):
        assert (overflow, left) == (ROOMS[room][2], 0)
        assert off < 1e-12
        if overflow:
            assert calls == ["fast", "exact"] and bits == 0
        else:
            assert calls == ["fast"]


def replicated(capacity):
    """What overflows of tokens that all devices have, where only the first device's experts get some."""
    mesh = bare_mesh("ep=2")
    params = random_layer(laws.DIM, 4, EXPERTS)
    x = distribute(torch.randn(TOKENS, laws.DIM, dtype=torch.float64), fmoe.P(), mesh)
    ids, counts = torch.tensor([[0, 1]] * TOKENS), torch.tensor([TOKENS, TOKENS, 0, 0])
    router = lambda _, x: fmoe.Routing(ids, x[:, :2].sigmoid(), counts, x[:, :EXPERTS].sigmoid())  # noqa: E731
    backend = Backend("all_to_all", host_sync=False, capacity=capacity)
    how = dict(router=router, return_stats=True)
    y, stats = fmoe.moe_forward(fmoe.shard_params(params, mesh), x, mesh, backend=backend, **how)
    want, expected = fmoe.moe_forward(params, x.full_tensor(), **how)
    found = laws.whole(stats)
    assert torch.equal(found.tokens_per_expert, expected.tokens_per_expert)
    return found.overflow.item(), error(y.full_tensor(), want)


def test_devices_that_have_the_same_tokens_know_of_each_others_room(pool):
    (few, off), other = pool.run(2, replicated, 1.0)
    assert few == other[0] == 2 * TOKENS and off > 1e-6
    assert all(found[0] == 0 and found[1] < 1e-12 for found in pool.run(2, replicated, 2.0))


def steps_without_room(axes, micro_batches, zero):
    """The model's step repeated where any layer of any part has no room, beside the exact step."""
    ranks, config = ranks_of(axes), laws.MODEL
    mesh = fmoe.make_mesh(axes, device_type="cpu") if "pp" in axes else bare_mesh(axes)
    params = deepseek_v3.init(config, 7, dtype=torch.float64, mesh=mesh)
    tokens, targets = (torch.randint(config.vocab_size, (ranks, 2, 9)) for _ in range(2))
    place = dist.get_rank() % 2  # along ep
    batch = tokens[place], targets[place]
    step_of = functools.partial(gradients.of_model, config, mesh, micro_batches=micro_batches, zero=zero)
    exact, found = step_of(backend="all_to_all"), []
    want = laws.whole(exact(params, *batch))
    for capacity in (0.4, float(ranks)):
        some = Backend("all_to_all", host_sync=False, capacity=capacity, max_tokens=18)
        fast, overflows = step_of(backend=some), []

        def noted(*args, fast=fast, overflows=overflows):
            out = fast(*args)
            overflows.append(out[0][1].overflow.item())
            return out

        got = laws.whole(fmoe.exact_on_overflow(noted, exact)(params, *batch))
        found.append((*overflows, got[0][1].overflow.item(), error(got, want), same_bits(got, want)))
    return found


@pytest.mark.parametrize(
    ("axes", "micro_batches", "zero"),
    quick([("ep=2", 2, 3)], [("ep=2", 1, 3), ("ep=2", 2, 3), ("ep=2", 2, 1), ("pp=2,ep=2", 2, 3)]),
)
def test_a_models_step_without_room_is_repeated(pool, axes, micro_batches, zero):
    counted = set()
    for small, large in pool.run(ranks_of(axes), steps_without_room, axes, micro_batches, zero, timeout=240):
        overflow, left, _, bits = small
        counted.add(overflow)
        assert overflow > 0 and left == bits == 0
        assert large[:2] == (0, 0) and large[2] < 1e-12
    assert len(counted) == 1  # all devices know the same


def test_a_repeated_step_is_logged(caplog):
    stats = [fmoe.MoEStats(*torch.zeros(4), torch.tensor(n)) for n in (2, 3)]
    step = fmoe.exact_on_overflow(lambda x: (x, {"a": stats}), lambda x: 2 * x)
    with caplog.at_level("INFO", "fmoe"):
        assert step(3) == 6
        stats[:] = [part._replace(overflow=torch.tensor(0)) for part in stats]
        assert step(3)[0] == 3
    (said,) = caplog.messages
    assert said.startswith("no room for 5 rows and pairs of rows and experts: the step is done again")


def test_results_without_statistics_are_refused():
    step = fmoe.exact_on_overflow(torch.sin, torch.sin)
    with pytest.raises(
        ValueError, match="exact_on_overflow: fast: got one that returns Tensor, expected a resu"
    ):
        step(torch.ones(2))


# ---- what is refused -----------------------------------------------------------------------------------


def chosen(backend, max_tokens=None):
    return choose("moe_forward", backend, MeshOfSizes({"ep": 2}), max_tokens=max_tokens)["ep"].bound


def test_the_bound_that_a_backend_stands_for():
    assert chosen("all_to_all") is None
    assert chosen(Backend("all_to_all", host_sync=False), 7) == Bound(7)
    assert chosen(Backend("all_to_all", host_sync=False, capacity=2.0, max_tokens=9), 7) == Bound(9, 2.0)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (Backend("pigeons"), "backend: got 'pigeons', expected one of"),
        (
            Backend("all_to_all", host_sync=False),
            "backend.max_tokens: got None, expected the most tokens of any",
        ),
        (Backend("all_to_all", capacity=2.0), "expected a capacity and max_tokens for host_sync=False only"),
        (Backend("all_to_all", max_tokens=2), "expected a capacity and max_tokens for host_sync=False only"),
        (Backend(payload="fp4"), "backend: payload: got 'fp4', expected one of ('fp8',), or None: tokens"),
        (Backend(host_sync=False, capacity=0), "backend: capacity: got 0, expected a number above 0"),
        (
            Backend(host_sync=False, capacity=math.nan),
            "backend: capacity: got nan, expected a number above 0",
        ),
        (Backend(host_sync=False, capacity="2"), "backend: capacity: got '2', expected a number above 0"),
        (
            Backend(host_sync=False, max_tokens=0),
            "backend: max_tokens: got 0, expected an integer of at least 1",
        ),
        (Backend(host_sync=False, max_tokens=2.5), "backend: max_tokens: got 2.5, expected an integer"),
    ],
)
def test_other_bounds_are_refused(backend, text):
    with pytest.raises(ValueError, match=f"^moe_forward: .*{re.escape(text)}"):
        chosen(backend)


def test_a_capacity_needs_the_statistics():
    params, x = random_layer(), torch.randn(3, 6, dtype=torch.float64)
    backend = Backend(host_sync=False, capacity=2.0)
    with pytest.raises(
        ValueError, match="moe_forward: return_stats: got False, with a capacity, expected True"
    ):
        fmoe.moe_forward(params, x, backend=backend)
    assert fmoe.moe_forward(params, x, backend=backend, return_stats=True)[1].overflow == 0


def refused(tokens, capacities):
    """What devices say of their own bounds."""
    mesh = bare_mesh("ep=2")
    rank = mesh.get_rank()
    backend = AllToAll(group_of(mesh, ("ep",)), Bound(4, capacities[rank]))
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    routing = fmoe.Routing(
        ids, torch.ones(tokens, 1), torch.zeros(8, dtype=torch.int64), torch.rand(tokens, 8)
    )
    try:
        backend.dispatch(torch.randn(tokens, laws.DIM), routing)
    except ValueError as found:
        return str(found)


def test_devices_with_different_bounds_all_raise(pool):
    for rank, text in enumerate(pool.run(2, refused, 4, [1.0, 2.0])):
        assert f"{2 + 2 * rank} to each device, and others on the devices [{1 - rank}] of the axis" in text
        assert text.endswith("Give all devices the same router, dimension, dtypes, payload and bounds.")


def test_more_tokens_than_there_is_room_for(pool):
    for text in pool.run(2, refused, 5, [None, None]):
        assert text.startswith(
            "dispatch: x_TD: got 5 tokens, expected at most max_tokens=4. Raise max_tokens"
        )


# ---- on GPUs -------------------------------------------------------------------------------------------

on_gpus = pytest.mark.skipif(not torch.cuda.is_available(), reason="the host and the device are one")


def layer_on_gpus(axes):
    """A layer's step in bfloat16, whose products no engine asks the host for, and its arguments."""
    torch.set_default_device("cuda")
    mesh = bare_mesh(axes, "cuda")
    params = random_layer(256, 64, 8, dtype=torch.bfloat16, scale=4.0)
    held = distribute(params, of_layer(params, COMPUTING), mesh)  # plain pieces are whole but along ep, tp
    pieces = optree.tree_map(lambda leaf: leaf.to_local(), held)
    x = torch.randn(ranks_of(axes), 64, 256, dtype=torch.bfloat16)[mesh.get_rank()]

    def step_of(backend):
        def loss(params, x):
            y, stats = fmoe.moe_forward(params, x, mesh, backend=backend, return_stats=True)
            return y.float().sin().sum(), stats

        return fmoe.value_and_grad(loss, (0, 1), has_aux=True)

    return step_of, pieces, x


def synced(axes, backend):
    """How often the host waits in a step."""
    step_of, pieces, x = layer_on_gpus(axes)
    step = step_of(backend)
    step(pieces, x)
    return syncs(lambda: step(pieces, x))


def captured(axes, backend):
    """How far the replays of a step's graph are from the exact step, on tokens that it hasn't seen."""
    step_of, pieces, x = layer_on_gpus(axes)
    exact = step_of(Backend(backend.name, payload=backend.payload))
    graph, found = fmoe.graphed(step_of(backend)), []
    for _ in range(4):
        x = torch.randn_like(x)
        held = graph(pieces, x)
        found.append((held[0][1].overflow.item(), error(held, exact(pieces, x))))
    return found


def captured_model(capacity):
    """Losses and gradients of a model's step as one graph, beside those of the exact step."""
    torch.set_default_device("cuda")
    mesh, config = bare_mesh("ep=2", "cuda"), decoder.preset("debug", layers=2)
    params, found = decoder.init(config, 0, mesh=mesh), []
    some = Backend("all_to_all", host_sync=False, capacity=capacity, max_tokens=2 * 64)
    step_of = functools.partial(gradients.of_model, config, mesh, dtype=torch.bfloat16)
    graph, exact = fmoe.graphed(step_of(backend=some)), step_of(backend="all_to_all")
    for _ in range(4):
        batch = torch.randint(256, (2, 2, 2, 64))[mesh.get_rank()].unbind()
        (loss, stats), grads = graph(params, *batch)
        (want, _), expected = exact(params, *batch)
        apart = optim.global_norm(optree.tree_map(torch.sub, grads, expected)) / optim.global_norm(expected)
        found.append((stats.overflow.item(), abs(loss - want).item(), apart.item()))
    return found


def trained(name, steps=20):
    """Losses and parameters of training, where the whole step is one graph, and where nothing is."""
    torch.set_default_device("cuda")
    mesh, config, optimizer = bare_mesh("ep=2", "cuda"), decoder.preset("debug", dim=256), optim.adamw()
    backend = Backend(name, host_sync=False, max_tokens=2 * 33)
    step_of = gradients.of_model(config, mesh, backend=backend, dtype=torch.bfloat16)
    found = []
    for graph in (True, False):
        step = training_step(step_of, optimizer, max_norm=1.0, bias_rate=0.01, mesh=mesh, graph=graph)
        params = decoder.init(config, 0, mesh=mesh)
        state, drawn = optimizer.init(params), torch.Generator("cuda").manual_seed(mesh.get_rank())
        losses = []
        for _ in range(steps):
            batch = torch.randint(256, (2, 2, 33), generator=drawn).unbind()
            params, state, loss, *_ = step(params, state, 1e-3, *batch)
            losses.append(loss.item())
        found.append((losses, [local(leaf).double().sum().item() for leaf in optree.tree_leaves(params)]))
    return found


ON_GPUS = [Backend("all_to_all", host_sync=False, max_tokens=64, capacity=c) for c in (None, 1.9)]
ON_GPUS.append(ON_GPUS[0]._replace(payload="fp8"))


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("backend", ON_GPUS, ids=str)
def test_the_host_never_waits(pool, backend):
    assert pool.run(2, synced, "ep=2", backend) == [0, 0]


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("backend", ON_GPUS, ids=str)
def test_a_cuda_graph_holds_a_step(pool, backend):
    for found in pool.run(2, captured, "ep=2", backend):
        assert all(overflow == 0 and off < 2e-2 for overflow, off in found)


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("capacity", [None, 1.9])
def test_a_cuda_graph_holds_a_models_step(pool, capacity):
    for found in pool.run(2, captured_model, capacity, timeout=240):
        assert all(overflow == 0 and off < 1e-2 and apart < 5e-2 for overflow, off, apart in found)


@pytest.mark.gpu
@on_gpus
@pytest.mark.parametrize("name", ["all_to_all", "deepep"])
def test_a_training_step_as_one_graph_has_the_bits_of_an_eager_one(pool, name):
    if name == "deepep":
        pytest.importorskip("deep_ep")
    for graphed, eager in pool.run(2, trained, name, timeout=240):
        assert graphed == eager
        assert len(set(eager[0])) == len(eager[0])
