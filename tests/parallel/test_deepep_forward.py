"""``moe_forward`` over DeepEP: the buffer it keeps, what ``backend="auto"`` chooses, and why."""

import dataclasses
import itertools
import logging
import sys

import deep_ep_double
import deep_ep_wire
import laws
import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from helpers import error, quick, random_layer
from test_deepep import DIM

import fmoe
from fmoe.parallel import AllToAll, Backend, DeepEP, backends
from fmoe.parallel.backends.deepep import adapter
from fmoe.parallel.backends.deepep import buffers as deepep_buffers

CONFIG = fmoe.RouterConfig(top_k=3, num_groups=4, top_groups=2)


def kept_buffers(generation, size):
    """``moe_forward(backend="deepep")``: one buffer for all calls, larger when one is larger."""
    deep_ep_double.install(generation, payloads=(torch.bfloat16, torch.float32))
    chosen = adapter.choose_kind
    adapter.choose_kind = lambda module, size, kind: "buffer" if generation == 1 else "elastic"
    live, results, buffers = deep_ep_wire.Settings.live, [], []
    mesh = fmoe.make_mesh(f"ep={size}", device_type="cpu")
    try:
        for tokens, dim in ((5, 256), (3, 256), (300, 256), (4, 512)):
            params = random_layer(dim, 16, 8, 1, dtype=torch.float32, scale=4.0)
            xs = [torch.randn(tokens + i, dim) for i in range(size)]
            spread = fmoe.shard_params(params, mesh)
            y = fmoe.moe_forward(spread, xs[dist.get_rank()], mesh, router=CONFIG, backend="deepep")
            results.append(error(y, fmoe.moe_forward(params, xs[dist.get_rank()], router=CONFIG)))
            (name,) = deepep_buffers.names()
            buffers.append(deepep_buffers.find(name).engine)
            assert deep_ep_wire.Settings.live == live + 1
    finally:
        adapter.choose_kind = chosen
    deepep_buffers.free_kept()
    assert deep_ep_wire.Settings.live == live
    return results, [a is b for a, b in itertools.pairwise(buffers)]


@pytest.mark.parametrize("generation", [1, 2])
def test_a_run_keeps_one_buffer_that_grows(pool, generation):
    for errors, same in pool.run(2, kept_buffers, generation, 2):
        assert max(errors) < 2e-5
        assert same == ([True, True, False] if generation == 1 else [True, False, False])


def kept_without_a_wait(generation):
    """The same where no host waits, and devices with different numbers of tokens ask nobody for the most."""
    deep_ep_double.install(generation, payloads=(torch.bfloat16, torch.float32))
    chosen, asked = adapter.choose_kind, dist.all_reduce
    adapter.choose_kind = lambda module, size, kind: "buffer" if generation == 1 else "elastic"
    mesh, results = bare_mesh("ep=2"), []
    params = random_layer(DIM, 16, 8, 1, dtype=torch.float32, scale=4.0)
    spread = fmoe.shard_params(params, mesh)
    try:
        dist.all_reduce = None
        for max_tokens in (8, 5):
            x = torch.randn(2, 5, DIM)[dist.get_rank(), : 5 - dist.get_rank()]
            backend = Backend("deepep", host_sync=False, max_tokens=max_tokens)
            y = fmoe.moe_forward(spread, x, mesh, router=CONFIG, backend=backend)
            results.append(error(y, fmoe.moe_forward(params, x, router=CONFIG)))
    finally:
        adapter.choose_kind, dist.all_reduce = chosen, asked
    deepep_buffers.free_kept()
    return max(results)


@pytest.mark.parametrize("generation", [1, 2])
def test_a_kept_buffer_without_a_wait(pool, generation):
    assert max(pool.run(2, kept_without_a_wait, generation)) < 2e-5


WIDE = dataclasses.replace(laws.MODEL, dim=DIM, num_layers=2)


def trained(backend):
    """The losses of ten steps over DeepEP, which weighs in float32."""
    deep_ep_double.install(1, payloads=(torch.bfloat16, torch.float64))
    laws.MODELS["wide"] = WIDE
    losses, _ = laws.train(laws.Where("ep=2", backend), name="wide")
    deepep_buffers.free_kept()
    return losses


NEVER_WAITS = Backend("deepep", host_sync=False, max_tokens=4 * 9)
KINDS = {"waits": Backend("deepep"), "never waits": NEVER_WAITS, "room": NEVER_WAITS._replace(capacity=1.9)}


@pytest.mark.parametrize("kind", quick(["never waits"], KINDS))
def test_ten_steps_of_training_are_those_of_one_process(pool, monkeypatch, kind):
    monkeypatch.setitem(laws.MODELS, "wide", WIDE)
    alone, _ = laws.train(None, name="wide")
    for losses in pool.run(2, trained, KINDS[kind]):
        assert losses == pytest.approx(alone, rel=1e-5)


def tangents_of_routed_experts():
    """Nothing joins a combine without shared experts, so its tangent must have arrived by itself."""
    deep_ep_double.install(1, payloads=(torch.bfloat16, torch.float32))
    mesh = fmoe.make_mesh("ep=2", device_type="cpu")
    params, x, t = random_layer(256, 16, 8, 0, dtype=torch.float32, scale=4.0), *torch.randn(2, 5, 256)
    pieces = optree.tree_map(lambda leaf: leaf.to_local(), fmoe.shard_params(params, mesh))

    def over_deepep(x):
        return fmoe.moe_forward(pieces, x, mesh, router=CONFIG, backend="deepep")

    got = torch.func.jvp(over_deepep, (x,), (t,))[1]
    deepep_buffers.free_kept()
    return error(got, torch.func.jvp(lambda x: fmoe.moe_forward(params, x, router=CONFIG), (x,), (t,))[1])


def test_tangents_of_a_layer_without_shared_experts(pool):
    assert max(pool.run(2, tangents_of_routed_experts)) < 2e-5


def auto_choices():
    deep_ep_double.install(1)
    mesh, said = bare_mesh("ep=2"), []
    backends._SAID.clear()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("fmoe")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        choose = lambda dtype, dim=DIM: backends.choose("moe_forward", "auto", mesh, (dtype, dim))["ep"]  # noqa: E731
        kinds = [type(choose(torch.bfloat16)), type(choose(torch.float32)), type(choose(torch.bfloat16, 24))]
        deep_ep_double.install(1)
        del sys.modules["deep_ep"]
        kinds.append(type(choose(torch.bfloat16)))
        with pytest.raises(ValueError, match="got no package deep_ep"):
            backends.choose("moe_forward", "deepep", mesh)
        adapter.DEVICES = ("cuda",)
        kinds += [type(choose(torch.bfloat16))] * 2
    finally:
        log.removeHandler(handler)
    return kinds, said


def test_auto_chooses_and_says_why_once(pool):
    for kinds, lines in pool.run(2, auto_choices):
        assert kinds == [DeepEP, *[AllToAll] * 5]
        other = "backend all_to_all along ep=2: by torch.distributed; not DeepEP, as "
        takes = "and DeepEP takes bfloat16 of a multiple of 256"
        assert lines == [
            "backend deepep along ep=2: DeepEP 1.x's Buffer",
            f"{other}rows are torch.float32 of 256, {takes}",
            f"{other}rows are torch.bfloat16 of 24, {takes}",
            f"{other}deepep: deep_ep: got no package deep_ep, expected DeepEP, 1.2.1 or newer. "
            'Use backend="all_to_all", or install DeepEP as docs/deepep.md says.',
            f"{other}the mesh is of cpu devices",
        ]


def with_tensor_parallelism():
    deep_ep_double.install(1, payloads=(torch.bfloat16, torch.float32))
    mesh = fmoe.make_mesh("ep=2,tp=2", device_type="cpu")
    params = random_layer(DIM, 16, 8, 1, dtype=torch.float32, scale=4.0)
    xs = [torch.randn(5 + i, DIM) for i in range(2)]
    x = xs[mesh["ep"].get_local_rank()]
    y = fmoe.moe_forward(fmoe.shard_params(params, mesh), x, mesh, router=CONFIG, backend="deepep")
    deepep_buffers.free_kept()
    return error(y, fmoe.moe_forward(params, x, router=CONFIG))


def test_each_tensor_parallel_rank_has_a_buffer_of_its_own(pool):
    assert max(pool.run(4, with_tensor_parallelism)) < 2e-5


def compiled_with_a_kept_buffer():
    deep_ep_double.install(1, payloads=(torch.bfloat16, torch.float32))
    torch._dynamo.reset()
    mesh = bare_mesh("ep=2")
    params = fmoe.shard_params(random_layer(DIM, 16, 8, 1, dtype=torch.float32, scale=4.0), mesh)
    x = torch.randn(5 + dist.get_rank(), DIM)
    call = lambda p, x: fmoe.moe_forward(p, x, mesh, router=CONFIG, backend="deepep")  # noqa: E731
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(params, x)
    wrong = error(got, call(params, x))
    deepep_buffers.free_kept()
    return wrong


@pytest.mark.slow
def test_a_kept_buffer_under_compile(pool):
    assert max(pool.run(2, compiled_with_a_kept_buffer)) < 1e-6
