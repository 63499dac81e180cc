"""The laws of fmoe.testing and tests/support/laws.py on every mesh, backend and device there is."""

import functools

import laws
import pytest
import torch
from helpers import quick
from laws import Where, ranks_of
from workers import Pool

from fmoe.testing.backend import LAWS

BACKENDS = ["all_to_all"]
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
# Every mesh of up to four processes along which tokens or experts lie, and a plain one.
MESHES = ["ep=1", "ep=2", "ep=4", "dp=2", "dp=4", "tp=2", "tp=4", "dp=2,ep=2", "dp=2,tp=2", "ep=2,tp=2"]
ALONG_EP = [axes for axes in MESHES if "ep" in axes]
SOME = ["ep=4", "dp=2,ep=2", "ep=2,tp=2"]
TOLERANCE = 1e-10


def on(some, meshes):
    """Parametrize a test with meshes. Those not among ``some`` run with ``--slow`` only."""
    places = [Where(axes, b, device) for device in DEVICES for b in BACKENDS for axes in meshes]
    return pytest.mark.parametrize("where", quick([w for w in places if w.axes in some], places), ids=str)


def hold(pool, law, where, *args, tolerance=TOLERANCE, timeout=90):
    for rank, found in enumerate(pool.run(ranks_of(where.axes), law, where, *args, timeout=timeout)):
        wrong = {name: value for name, value in found.items() if not value <= tolerance}
        assert found and not wrong, (rank, wrong)


@on(["ep=1", "ep=4", "dp=2", "tp=2", "dp=2,ep=2", "ep=2,tp=2"], MESHES)
def test_equals_the_oracle(pool, where):
    hold(pool, laws.oracle, where, "sigmoid, groups")


# What differs between meshes doesn't differ between routers, nor between first and second derivatives.
@on(["dp=2,ep=2"], SOME)
@pytest.mark.parametrize("config", ["softmax, before", "balanced"])
def test_any_router_equals_the_oracle(pool, where, config):
    hold(pool, laws.oracle, where, config)


@on(["dp=2,ep=2", "ep=2,tp=2"], SOME)
def test_second_derivatives_equal_the_oracle(pool, where):
    hold(pool, laws.oracle, where, "sigmoid, groups", 2)


COUNTS = {"some": [5, 3, 4, 2], "none on one": [0, 4, 0, 1], "none": [0, 0, 0, 0]}


@on(["ep=2", "dp=2,ep=2", "ep=2,tp=2"], ALONG_EP)
@pytest.mark.parametrize("counts", quick(["none on one", "none"], COUNTS))
def test_any_number_of_plain_tokens_on_each_device(pool, where, counts):
    hold(pool, laws.plain_tokens, where, COUNTS[counts])


# Compiling is tried below, of moe_forward with DTensors.
MOST = [name for name in LAWS if name != "compilation"]


@on(["ep=1", "ep=2"], ALONG_EP)
def test_the_backend_keeps_the_laws(pool, where):
    pool.run(ranks_of(where.axes), laws.backend, where, MOST)


@pytest.mark.parametrize("dtype", quick([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
def test_the_backend_keeps_the_laws_in_lower_precision(pool, dtype):
    pool.run(2, laws.backend, Where("ep=2", dtype=dtype), MOST)


@pytest.mark.parametrize("where", [Where("dp=2,ep=2")], ids=str)
def test_parameters_are_gathered_again_under_remat(pool, where):
    hold(pool, laws.gathering, where, tolerance=0)


@pytest.mark.parametrize("where", [Where("ep=2")], ids=str)
def test_compiles_whole(pool, where, slow):
    hold(pool, laws.compilation, where, slow, timeout=300)


@pytest.mark.parametrize(
    ("axes", "model"),
    quick(
        [("dp=2,ep=2", "MLA"), ("ep=2,tp=2", "GQA"), ("tp=2", "GQA, norm over all heads")],
        [(a, m) for a in ("ep=2", "tp=2", "dp=2", "dp=2,ep=2", "ep=2,tp=2") for m in laws.MODELS],
    ),
)
@pytest.mark.parametrize("device", DEVICES)
def test_the_models_gradients_are_those_of_one_process(pool, axes, model, device):
    hold(pool, laws.model, Where(axes, device=device), model, timeout=240)


@on(["ep=2"], ["ep=2", "dp=2,ep=2", "ep=2,tp=2"])
@pytest.mark.parametrize("model", quick(["GQA"], ["MLA", "GQA"]))
def test_the_models_layers_compile_with_remat(pool, where, model):
    hold(pool, laws.compiled_layers, where, model, timeout=240)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the host and the device are one")
@pytest.mark.parametrize("axes", ["ep=2", "ep=4"])
def test_the_host_waits_once_a_layer_and_step(pool, axes):
    assert pool.run(ranks_of(axes), laws.synced, Where(axes, device="cuda")) == [1] * ranks_of(axes)


@pytest.fixture(scope="module")
def losses_alone():
    @functools.cache
    def on(device, model):
        with torch.device(device):
            return laws.train(None, name=model)

    return on


def check_training(pool, where, alone_on, steps=10, model="MLA"):
    alone = alone_on(where.device, model)  # initial values are drawn there
    for losses, norm in pool.run(ranks_of(where.axes), laws.train, where, steps, model, timeout=240):
        assert losses == pytest.approx(alone[0][:steps], rel=1e-9)
        assert steps < 10 or norm == pytest.approx(alone[1], rel=1e-6)


@on(["ep=2"], ["ep=2", "dp=2", "tp=2", "dp=2,ep=2"])
@pytest.mark.parametrize("model", quick(["GQA"], ["MLA", "GQA"]))
def test_how_often_parameters_travel_changes_nothing(pool, where, model):
    hold(pool, laws.how_often, where, model)


@on(["dp=2", "tp=2"], [axes for axes in MESHES if axes != "ep=1"])
def test_ten_steps_of_training_are_those_of_one_process(pool, where, losses_alone):
    check_training(pool, where, losses_alone)


@on(["ep=2,tp=2"], ["ep=2", "tp=2", "dp=2", "dp=2,ep=2", "ep=2,tp=2"])
@pytest.mark.parametrize("model", quick(["GQA"], [name for name in laws.MODELS if name != "MLA"]))
def test_ten_steps_of_other_models_are_those_of_one_process(pool, where, losses_alone, model):
    check_training(pool, where, losses_alone, model=model)


@pytest.mark.ranks
@pytest.mark.slow
def test_steps_with_everything_on_eight_processes(losses_alone):
    eight = Pool(8)
    try:
        for axes in ("dp=2,ep=2,tp=2", "ep=8"):
            check_training(eight, Where(axes), losses_alone, steps=3)
    finally:
        eight.stop(5)
