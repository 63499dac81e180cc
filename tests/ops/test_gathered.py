"""Products that gather rows: right on a double of quack-kernels, chosen where they run, right on a GPU."""

import dataclasses
import importlib.metadata

import optree
import pytest
import quack_double
import torch
from helpers import error
from rich.console import Console
from torch._inductor.utils import fresh_cache

import fmoe
from fmoe.bench import tune as tuning
from fmoe.bench.layers import Shape, layers, skewed
from fmoe.introspect import saved_residuals
from fmoe.ops import experts_kernels
from fmoe.ops.kernels import gathered, tuned
from fmoe.ops.kernels.tuned import Choice
from fmoe.transforms import per_layer

DIM, HIDDEN, EXPERTS, TOP_K = 16, 6, 5, 2


@pytest.fixture
def quack(monkeypatch, tmp_path):
    monkeypatch.setenv("FMOE_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setenv("FMOE_GROUPED_MM", "quack")
    tuned.forget()
    quack_double.install(monkeypatch)
    yield quack_double.calls
    gathered._quack.cache_clear()
    tuned.forget()


def layer(dtype=torch.float64, **config):
    params = fmoe.moe_init(0, dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, dtype=torch.float64)
    params = optree.tree_map(lambda t: torch.randn_like(t).to(dtype) / 2, params)
    return params, fmoe.RouterConfig(top_k=TOP_K, **config)


def layer_of(hidden):
    """A float32 layer of so many hidden numbers."""
    params, config = layer(torch.float32)
    w_in, w_out = params.experts
    experts = fmoe.ExpertParams(w_in[:, :, :hidden].clone(), w_out[..., :hidden].clone())
    return params._replace(experts=experts), config


def pieces(plan_of, wanted, number=13, **config):
    """The gradients of what is wanted, through dispatch, experts and combine."""
    (params, config), x = layer(**config), torch.randn(number, DIM, dtype=torch.float64)
    routing = fmoe.route(params.router, x, config)
    weights = routing.weights_TK.double()
    seed = torch.randn(number, DIM, dtype=torch.float64)

    def loss(w_in, w_out, x, weights):
        rows, plan = fmoe.dispatch(x, dataclasses.replace(routing, weights_TK=weights))
        y = fmoe.experts_grouped_mm(fmoe.ExpertParams(w_in, w_out), rows, plan_of(plan))
        return (y * seed).sum() + y.square().sum()

    args = [*params.experts, x, weights]
    found = torch.func.grad(loss, argnums=wanted)(*args)
    return loss(*args), found


PLANS = {
    "plain": lambda plan: plan,
    "aligned": lambda plan: fmoe.align_rows(plan, 4),
    "room for more": lambda plan: dataclasses.replace(
        plan, slot_R=torch.nn.functional.pad(plan.slot_R, (0, 5), value=-1)
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2)])
def test_values_and_gradients_are_those_of_the_other_kernels(monkeypatch, quack, plan, wanted):
    seed = torch.randint(2**31, ()).item()
    torch.manual_seed(seed)
    value, grads = pieces(PLANS[plan], wanted)
    assert "gated" in quack
    monkeypatch.setenv("FMOE_GROUPED_MM", "loop")
    before = len(quack)
    torch.manual_seed(seed)
    want, want_grads = pieces(PLANS[plan], wanted)
    assert len(quack) == before, "the other kernels are to be compared with"
    assert error(value, want) < 1e-12
    assert error(grads, want_grads, unit=1e-2) < 1e-12


def test_a_step_copies_no_token_and_activates_in_passing(monkeypatch, quack):
    monkeypatch.setattr(experts_kernels, "_expand", None)
    monkeypatch.setattr(experts_kernels, "_activation", None)
    pieces(PLANS["plain"], (0, 1, 2, 3))
    step = ["gated", "gemm", "dgated", "gemm summed", "gemm", "gemm summed"]
    assert quack == [*step, "gated", "gemm"]  # and the value, once more


@pytest.mark.parametrize("number", [0, 1])
def test_few_tokens(quack, number):
    value, grads = pieces(PLANS["plain"], (0, 1, 2, 3), number=number)
    assert torch.isfinite(value) and all(map(torch.isfinite, (g.sum() for g in grads)))


def test_weights_that_multiply_tokens_first_take_the_other_kernels(quack):
    pieces(PLANS["plain"], (0, 1, 2, 3), score_before_experts=True)
    assert not quack


def test_it_compiles_with_the_layout_that_it_has(quack):
    (params, config), x = layer(), torch.randn(7, DIM, dtype=torch.float64)

    def loss(params, x):
        return fmoe.moe_forward(params, x, router=config).square().sum()

    compiled = torch.compile(fmoe.value_and_grad(loss, (0, 1)), backend="aot_eager")
    step = torch.compile(
        lambda *args: fmoe.moe_forward(*args, router=config), backend="aot_eager", fullgraph=True
    )
    assert error(step(params, x), fmoe.moe_forward(params, x, router=config)) < 1e-12
    assert error(compiled(params, x), fmoe.value_and_grad(loss, (0, 1))(params, x), unit=1e-2) < 1e-12


def test_other_transforms_take_it_too(quack):
    (params, config), x = layer(), torch.randn(7, DIM, dtype=torch.float64)
    how = dict(router=config)
    function = lambda x: fmoe.moe_forward(params, x, **how)  # noqa: E731
    along = torch.randn_like(x)
    _, tangent = torch.func.jvp(function, (x,), (along,))
    step = 1e-6
    between = (function(x + step * along) - function(x - step * along)) / (2 * step)
    assert error(tangent, between) < 1e-6
    both = torch.stack([x, 2 * x])
    assert error(torch.func.vmap(function)(both), torch.stack([*map(function, both)])) < 1e-12
    kept = fmoe.remat(function)
    assert error(*(torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (kept, function))) < 1e-12


def test_a_policy_keeps_no_activation(quack):
    """Its operators' outputs are handed back, so nobody would use it."""
    (params, config), x = layer(), torch.randn(7, DIM, dtype=torch.float64)
    kept = fmoe.remat(lambda x: fmoe.moe_forward(params, x, router=config), fmoe.save("experts_grouped_mm"))
    found = saved_residuals(kept, x.requires_grad_())
    assert [each.shape for each in found if each.how == "kept" and each.bytes] == [
        (7 * TOP_K, 2, HIDDEN),
        (7, DIM),
    ]
    want = torch.autograd.grad(fmoe.moe_forward(params, x, router=config).square().sum(), x)
    assert error(torch.autograd.grad(kept(x).square().sum(), x), want) < 1e-12


# ---- chosen ------------------------------------------------------------------------------------------------


def shapes(hidden):
    return torch.empty(3, DIM), torch.empty(EXPERTS, 2, hidden, DIM)


def test_the_environment_a_file_or_its_width_chooses_it(quack, monkeypatch):
    wide = gathered.WIDE
    assert gathered.chosen(*shapes(wide)) and not gathered.chosen(*shapes(3)), "rows must be whole"
    monkeypatch.setenv("FMOE_GROUPED_MM", "loop")
    assert not gathered.chosen(*shapes(4))
    monkeypatch.delenv("FMOE_GROUPED_MM")
    assert gathered.chosen(*shapes(4)) and gathered.chosen(*shapes(wide - 2))
    assert not gathered.chosen(*shapes(wide))
    keys = [tuned.key("layer", (EXPERTS, DIM, hidden), torch.float32) for hidden in (4, wide)]
    with tuned.using(torch.device("cpu"), {keys[0]: Choice("loop"), keys[1]: Choice("quack")}):
        assert gathered.chosen(*shapes(wide)) and not gathered.chosen(*shapes(4))


def test_the_environment_goes_with_a_file_of_single_products(quack):
    (params, config), x = layer(), torch.randn(7, DIM, dtype=torch.float64)
    key = tuned.key("mm transposed", (EXPERTS, HIDDEN, DIM), x.dtype)  # of the down product
    with tuned.using(x.device, {key: Choice("loop")}):
        fmoe.moe_forward(params, x, router=config)
    assert quack == ["gated", "gemm"], "it is about layers without these"


def test_code_compiled_for_other_kernels_is_not_taken_from_the_cache(quack, monkeypatch):
    (params, config), x = layer(torch.float32), torch.randn(7, DIM)

    def gradients():
        torch._dynamo.reset()
        step = per_layer(compiled=True)(lambda params, x: fmoe.moe_forward(params, x, router=config))
        return fmoe.value_and_grad(lambda params, x: step(params, x).square().sum(), (0, 1))(params, x)

    with fresh_cache():
        ours = gradients()
        assert quack
        monkeypatch.setenv("FMOE_GROUPED_MM", "loop")
        assert error(gradients(), ours, unit=1e-2) < 1e-5


def test_tuning_compares_tiles_and_then_whole_layers(quack, monkeypatch):
    monkeypatch.delenv("FMOE_GROUPED_MM")

    def timed(call, on_cuda):
        """The last tile of each product is fast, and so is the layer."""
        quack.clear()
        quack_double.configs.clear()
        call()
        fast = tuning.QUACK_TILES[-1]
        tiles = sum(
            2.0 - ((config["tile_n"], config["cluster_m"]) == (fast.cols, fast.cluster))
            for config in quack_double.configs
        )
        return tiles or 20.0

    monkeypatch.setattr(tuning, "timed", timed)
    monkeypatch.setattr(gathered, "CROWDED", 12)
    shape = Shape(tokens=32, dim=DIM, hidden=4, experts=EXPERTS, top_k=TOP_K)  # 12 rows an expert
    found = {each.product: each for each in tuning.tune(shape, dtype=torch.float32, device="cpu", rounds=2)}
    size = EXPERTS, DIM, 4
    layer = found.pop(tuned.key("layer", size, torch.float32))
    assert layer.choices == [Choice("loop"), Choice("quack")] and layer.best == Choice("quack")
    gathering = [found[gathered.key(product, size, torch.float32)] for product in gathered.PRODUCTS]
    assert all(each.best == Choice("quack", tuning.QUACK_TILES[-1]) for each in gathering)
    assert gathering[0].choices[0].tile.cluster == 2, "as without tuning"
    assert len(found) == len(gathering) + len(tuning.products(shape, torch.float32))
    quack_double.configs.clear()
    (params, config), x = layer_of(hidden=4), torch.randn(8, DIM)
    fmoe.value_and_grad(lambda p, x: fmoe.moe_forward(p, x, router=config).sum(), (0, 1))(params, x)
    assert [config["cluster_m"] for config in quack_double.configs] == [2] * 6, "the file is read"
    tuning.report([layer, *gathering], Console(quiet=True))


def test_the_benchmark_has_it_beside_the_others(quack, monkeypatch):
    monkeypatch.delenv("FMOE_GROUPED_MM")
    monkeypatch.setattr(gathered, "installed", lambda: True)
    shape = Shape(tokens=32, dim=DIM, hidden=4, experts=EXPERTS, top_k=TOP_K)
    (params, config), x = layer_of(hidden=4), torch.randn(32, DIM)
    found = layers(shape, config)
    ours = found["fmoe, without quack"](params, x)
    assert not quack
    for name in ("fmoe", "fmoe, quack"):
        quack.clear()
        assert error(found[name](params, x), ours) < 1e-5 and quack


@pytest.mark.parametrize("crowded", [3, 4])  # experts have 3 rows on average
def test_a_tile_without_tuning_fits_the_sizes(quack, monkeypatch, crowded):
    cols = {hidden: gathered.usual("down inputs", hidden, 1).cols for hidden in (512, 768, 1408)}
    assert cols == {512: 256, 768: 256, 1408: 128}
    monkeypatch.setattr(gathered, "CROWDED", crowded)
    assert gathered.usual("up", 512, 3).cluster == (2 if crowded == 3 else 1)
    (params, config), x = layer_of(hidden=4), torch.randn(8, DIM)
    fmoe.value_and_grad(lambda p, x: fmoe.moe_forward(p, x, router=config).sum(), (0, 1))(params, x)
    used = [(config["tile_m"], config["tile_n"], config["cluster_m"]) for config in quack_double.configs]
    order = "up", "down", "down inputs", "down weight", "up inputs", "up weight"
    tiles = [gathered.usual(product, 4, 8 * TOP_K // EXPERTS) for product in order]
    assert used == [(tile.rows, tile.cols, tile.cluster) for tile in tiles]


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.3.10", False),
        ("0.3.11", True),
        ("0.3.12.post1", True),
        ("0.4.0", False),
        ("0.6.5", False),
        ("", False),
    ],
)
def test_another_interface_counts_as_not_installed(monkeypatch, version, fits):
    def of_package(name):
        assert name == "quack-kernels"
        if version:
            return version
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", of_package)
    gathered.installed.cache_clear()
    try:
        assert gathered.installed() == fits
    finally:
        gathered.installed.cache_clear()


def test_on_a_cpu_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.delenv("FMOE_GROUPED_MM", raising=False)
    assert not gathered.able(*shapes(2)) and not gathered.chosen(*shapes(2))


# ---- on a GPU ----------------------------------------------------------------------------------------------

GPU = torch.cuda.is_available() and gathered.installed()
SHAPES = {"narrow": (512, 128, 8, 4), "wide": (256, 768, 5, 2), "one expert": (256, 64, 1, 1)}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU and quack-kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ["random", "zipf", "hot"])
def test_on_a_gpu_they_are_as_right_as_the_other_kernels(monkeypatch, routing, shape, dtype):
    dim, hidden, experts, top_k = SHAPES[shape]
    config = fmoe.RouterConfig(top_k=top_k)
    params = fmoe.moe_init(0, dim=dim, hidden_dim=hidden, num_experts=experts, device="cuda")
    x, seed = (torch.randn(1000, dim, device="cuda") for _ in range(2))
    if experts > 1:
        params = skewed(params, x, config, routing)
    narrow = optree.tree_map(lambda t: t if t.dim() == 1 else t.to(dtype), params)

    def step(params, x):
        def loss(params, x):
            y = fmoe.moe_forward(params, x, router=config)
            return (y.float() * seed).sum(), y.detach()

        (_, y), grads = fmoe.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, *optree.tree_leaves(grads)

    wide = optree.tree_map(lambda t: t.double(), narrow)
    exact = step(wide, x.to(dtype).double())
    errors, bits = {}, {}
    for engine in ("quack", "triton"):
        monkeypatch.setenv("FMOE_GROUPED_MM", engine)
        found = step(narrow, x.to(dtype))
        again = step(narrow, x.to(dtype))
        bits[engine] = all(map(torch.equal, found, again))
        errors[engine] = [float((a.double() - b).norm() / (b.norm() + 1e-30)) for a, b in zip(found, exact)]
    assert bits == {"quack": True, "triton": True}
    assert all(q < 1.5 * t + 1e-3 for q, t in zip(errors["quack"], errors["triton"])), errors
