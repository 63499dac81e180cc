"""Layers and models whose products are in fp8."""

import collections
from unittest import mock

import optree
import pytest
import torch
from helpers import error, fresh_seed, quick, random_layer

import fmoe
from fmoe.introspect import raw_calls
from fmoe.models import decoder
from fmoe.models.stages import cut
from fmoe.ops.kernels import scaled
from fmoe.ops.precision import FAST, PRECISIONS, Recipe, quantise, restored
from fmoe.ops.reference import moe_reference
from fmoe.training import data, gradients, optim, options
from fmoe.training.launch import World
from fmoe.training.step import training_step

MODEL = decoder.preset("debug", layers=2)
EXPERTS, DENSE = Recipe(experts="fp8_rowwise"), Recipe(dense="fp8_rowwise")


def relative(got, want):
    """The error of each tensor over its norm."""
    pairs = zip(optree.tree_leaves(got), optree.tree_leaves(want), strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in pairs]


def value_and_grads(layer, x, cotangent, **how):
    y, pull = torch.func.vjp(lambda layer, x: fmoe.moe_forward(layer, x, **how), layer, x)
    g_layer, g_x = pull(cotangent)
    return y, g_x, *g_layer.experts, *g_layer.shared, g_layer.router.weight_ED


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_has_the_error_of_its_products(precision):
    """Two products in a row, three backwards: at most some times that of one, 3.8e-2; bfloat16 a tenth."""
    layer, x, g = random_layer(64, 96, dtype=torch.bfloat16), torch.randn(80, 64), torch.randn(80, 64)
    x, g = x.bfloat16(), g.bfloat16()
    router = fmoe.RouterConfig()
    ids = fmoe.route(layer.router, x, router)  # the same experts for all

    def routed(params, x_TD):
        found = fmoe.route(params, x_TD, router)
        same = found.scores_TE.gather(1, ids.expert_ids_TK)
        return fmoe.Routing(
            ids.expert_ids_TK, same / same.sum(1, keepdim=True), ids.counts_E, found.scores_TE
        )

    wide = optree.tree_map(torch.Tensor.double, (layer, x, g))
    exact = value_and_grads(*wide, router=routed)
    fp8 = relative(value_and_grads(layer, x, g, router=routed, precision=precision), exact)
    bf16 = relative(value_and_grads(layer, x, g, router=routed), exact)
    assert all(0.02 < e < 0.12 for e in fp8[:-1]), fp8
    assert all(a > 5 * b for a, b in zip(fp8, bf16)), (fp8, bf16)


def test_float64_is_not_rounded_so_that_derivatives_can_be_checked():
    layer, x = random_layer(), torch.randn(9, 6, dtype=torch.float64)
    want = moe_reference(layer, x, fmoe.RouterConfig())
    assert error(fmoe.moe_forward(layer, x, precision="fp8_rowwise"), want) < 1e-12


def test_a_token_that_is_not_finite_spoils_itself_only():
    layer, x = random_layer(16, 16, dtype=torch.float32), torch.randn(12, 16)
    x[3, 2], x[5, 6] = torch.inf, torch.nan
    x[7] = 0
    y = fmoe.moe_forward(layer, x, precision="fp8_rowwise")
    finite = torch.ones(12, dtype=torch.bool)
    finite[[3, 5]] = False
    assert torch.equal(y.isfinite().all(1), finite) and not y[[3, 5]].isfinite().any()
    assert not y[7].any()
    assert torch.equal(y[finite], fmoe.moe_forward(layer, x, precision="fp8_rowwise")[finite])


def test_check_finite_names_the_step_of_a_weight_that_is_not():
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (2, 16))
    params.layers[1].mlp.experts.w_in[:, 0, 0, 0] = torch.inf  # a single expert may have no rows
    (value, _), grads = gradients.of_model(MODEL, precision="fp8_rowwise")(params, tokens, tokens)
    norm = optim.global_norm(grads).item()
    with pytest.raises(FloatingPointError, match=r"step 7: the loss is .*layers\.1\.mlp\.experts\.w_in"):
        gradients.check_finite(7, value.item(), norm, grads)


def test_experts_without_rows_get_no_gradient():
    layer, x = random_layer(16, 16, shared=0, dtype=torch.bfloat16), torch.randn(5, 16).bfloat16()
    layer.router.bias_E[:4] = -100

    def loss(experts):
        return fmoe.moe_forward(layer._replace(experts=experts), x, precision="fp8_rowwise").square().sum()

    for gradient in torch.func.grad(loss)(layer.experts):
        assert not gradient[:4].any() and gradient.isfinite().all() and gradient[4:].any()


# ---- the model -----------------------------------------------------------------------------------------


def step(params, tokens, precision, mesh=None, **how):
    return gradients.of_model(MODEL, mesh, precision=precision, **how)(params, tokens, tokens)


@pytest.mark.parametrize(
    ("recipe", "experts", "dense"), [(EXPERTS, 1, 0), (DENSE, 0, 1), (None, 0, 0)], ids=str
)
def test_a_recipe_says_which_layers_round(recipe, experts, dense):
    """Two layers' attention has four projections each, their dense and shared SwiGLU two."""
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (2, 16))
    with raw_calls() as calls:
        rounding = decoder.loss(params, tokens, tokens, MODEL, precision=recipe)[0]
    assert calls.get("scaled_grouped_mm", 0) == dense * (2 * 4 + 2 + 2)
    plain = decoder.loss(params, tokens, tokens, MODEL)[0]
    assert (rounding != plain) == (experts or dense)
    assert abs(rounding - plain) < 0.02


@pytest.mark.parametrize("precision", FAST)
def test_recomputed_compiled_and_repeated_steps_have_the_same_bits(precision, aot_eager, slow):
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (2, 16))
    (value, _), grads = step(params, tokens, precision)
    wraps = [lambda f: f, fmoe.remat]
    if slow:
        wraps.append(lambda f: torch.compile(f, fullgraph=True))
    for wrap in wraps:
        (again, _), same = step(params, tokens, precision, per_layer=wrap)
        assert torch.equal(again, value)
        assert all(map(torch.equal, optree.tree_leaves(same), optree.tree_leaves(grads)))


def on_a_mesh(axes, params, tokens, zeros):
    mesh = fmoe.make_mesh(axes, device_type="cpu")
    pp, dp, ep, _ = mesh.shape
    specs, held, here = decoder.specs(MODEL), params, mesh
    if pp > 1:
        stages, rank = cut(MODEL, (0, 1)), mesh.get_local_rank("pp")
        specs, held, here = stages.of_rank(specs, rank), stages.of_rank(params, rank), mesh["dp", "ep", "tp"]
    spread = fmoe.shard_params(held, here, specs)
    mine = tokens.chunk(dp * ep)[mesh.get_local_rank("dp") * ep + mesh.get_local_rank("ep")]
    found = []
    for zero in zeros:
        (value, _), grads = step(spread, mine, EXPERTS, mesh, zero=zero)
        grads = optree.tree_map(lambda g: g.full_tensor(), grads)
        found.append((value, grads.layers[1].mlp.experts if grads.layers[1] else ()))
    return found


MESHES = [("ep=2", (3,)), ("ep=2", (1, 2)), ("dp=2", (3,)), ("pp=2", (2, 3))]


@pytest.mark.parametrize(("axes", "zeros"), quick(MESHES[:1], MESHES))
def test_a_mesh_rounds_what_one_device_does(pool, axes, zeros):
    """Experts have all their rows along ``ep``, and so the same scales. Along ``dp`` they have a part."""
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (4, 16))
    (value, _), grads = step(params, tokens, EXPERTS)
    plain = step(params, tokens, None)[1].layers[1].mlp.experts
    want = grads.layers[1].mlp.experts
    rounding = max(relative(want, plain))
    assert rounding > 0.03
    for ranks in pool.run(2, on_a_mesh, axes, params, tokens, zeros, timeout=300.0):
        for found, experts in ranks:
            assert abs(found - value) < 1e-3
            if experts:
                assert max(relative(experts, want)) < rounding * (1.5 if axes == "dp=2" else 0.3)


# ---- weights that are rounded once a step --------------------------------------------------------------

DENSE_WEIGHTS = 2 * 4 + 2 + 2


def count_roundings(patch):
    """How often each weight is rounded each way, with PyTorch in place of the kernels of dense products."""
    found = collections.Counter()

    def weights(w_eIO):
        found[w_eIO.data_ptr(), w_eIO.stride()] += 1
        return quantise(w_eIO.mT)

    def product(a, b, dtype):
        return (restored(a, torch.float32) @ restored(b, torch.float32).mT).to(dtype)

    def columns(x_RC, ends):
        return scaled.Columns(quantise(x_RC.mT), ends, x_RC.dtype)

    patch.setattr(scaled, "fast", lambda precision, *how: precision in FAST)
    patch.setattr(scaled, "_rounded_weights", weights)
    patch.setattr(scaled, "multiply", lambda x, w, ends, dtype: product(x, w, dtype)[0])
    patch.setattr(scaled, "columns", columns)
    patch.setattr(scaled, "multiply_columns", lambda x, y: product(x.scaled, y.scaled, x.dtype)[None])
    return found


@pytest.mark.parametrize("precision", FAST)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_weights_are_rounded_once_a_step_if_they_are_kept(dtype, precision, monkeypatch):
    """Once each way, though the layers are recomputed, and to the same bits."""
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (6, 16))
    roundings = count_roundings(monkeypatch)
    how = dict(dtype=dtype, per_layer=fmoe.remat, micro_batches=3)
    (value, _), grads = step(params, tokens, Recipe(dense=precision), **how)
    assert sum(roundings.values()) == 3 * 3 * DENSE_WEIGHTS
    roundings.clear()
    (again, _), same = step(params, tokens, Recipe(dense=precision), **how, keep_rounded=True)
    assert len(roundings) == 2 * DENSE_WEIGHTS and {*roundings.values()} == {1}
    assert torch.equal(again, value)
    for a, b in zip(optree.tree_leaves(same), optree.tree_leaves(grads)):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert not scaled._kept
    roundings.clear()
    step(params, tokens, Recipe(dense=precision), dtype=dtype, keep_rounded=True)
    assert sum(roundings.values()) == 2 * DENSE_WEIGHTS  # one batch, nothing to keep


def test_nothing_stays_kept_after_an_error(monkeypatch):
    """Neither in a forward, nor of the weights: vmap's have no address."""
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (6, 16))
    roundings = count_roundings(monkeypatch)
    how = dict(micro_batches=2, keep_rounded=True)

    def of_norm(norm):
        return step(params._replace(norm=norm), tokens, DENSE, **how)[0][0]

    with pytest.raises(RuntimeError, match="data pointer"):
        torch.func.vmap(of_norm)(torch.stack([params.norm] * 2))
    monkeypatch.setattr(scaled, "multiply", None)
    with pytest.raises(TypeError):
        step(params, tokens, DENSE, **how)
    assert roundings and not scaled._kept


@pytest.mark.parametrize("recipe", [None, Recipe(experts="fp8_block")], ids=str)
def test_nothing_is_kept_where_no_kernel_rounds(recipe):
    with pytest.raises(ValueError, match="of_model: keep_rounded: got True, expected False without a prec"):
        gradients.of_model(MODEL, precision=recipe, micro_batches=2, keep_rounded=True)


def test_a_block_within_another_keeps_what_that_does_not(monkeypatch):
    roundings = count_roundings(monkeypatch)
    ours, theirs, others = torch.randn(3, 1, 8, 4)
    with scaled.keeping_rounded([ours]):
        with scaled.keeping_rounded([ours, theirs, others[:0]]):
            for weight in (ours, theirs, others) * 2:
                scaled._weights(weight)
        scaled._weights(ours)
        scaled._weights(ours.mT)
        scaled._weights(theirs)
    assert not scaled._kept
    found = {(place, strides): count for (place, strides), count in roundings.items()}
    assert found == {
        (ours.data_ptr(), ours.stride()): 1,
        (ours.data_ptr(), ours.mT.stride()): 1,
        (theirs.data_ptr(), theirs.stride()): 2,
        (others.data_ptr(), others.stride()): 2,
    }


def test_an_option_keeps_rounded_weights():
    parser = options.Parser()
    options.add_layout(parser)
    for words, kept in (([], False), (["--keep-rounded"], True)):
        layout = options.Layout.of(parser.parse_args(words), World(None, (0, 1)))
        with mock.patch.object(gradients, "of_model") as of_model:
            layout.gradient(MODEL)
        assert of_model.call_args.kwargs["keep_rounded"] == kept


def kept_on_a_mesh(axes, params, tokens):
    mesh = fmoe.make_mesh(axes, device_type="cpu")
    specs, held, here = decoder.specs(MODEL), params, mesh
    if "pp" in axes:
        stages, rank = cut(MODEL, (0, 1)), mesh.get_local_rank("pp")
        specs, held, here = stages.of_rank(specs, rank), stages.of_rank(params, rank), mesh["dp", "ep", "tp"]
    spread, mine = fmoe.shard_params(held, here, specs), tokens
    if "dp" in axes:
        mine = tokens.chunk(2)[mesh.get_local_rank("dp")]
    how = dict(micro_batches=3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="of_model: zero: got 3, expected 1 or 2 with keep_rounded"):
        step(spread, mine, DENSE, mesh, **how, keep_rounded=True)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        roundings = count_roundings(patch)
        for zero in (1, 2):
            plain = step(spread, mine, DENSE, mesh, zero=zero, **how)
            roundings.clear()
            kept = step(spread, mine, DENSE, mesh, zero=zero, **how, keep_rounded=True)
            pairs = zip(optree.tree_leaves(kept[1]), optree.tree_leaves(plain[1]))
            equal = torch.equal(kept[0][0], plain[0][0])
            equal = equal and all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)
            found.append((equal, len(roundings), {*roundings.values()}))
    return found


@pytest.mark.parametrize(("axes", "weights"), [("dp=2", [12, 12]), ("pp=2", [6, 6])])
def test_weights_are_kept_on_a_mesh_with_whole_parameters(axes, weights, pool):
    params, tokens = decoder.init(MODEL, fresh_seed()), torch.randint(256, (12, 16))
    ranks = pool.run(2, kept_on_a_mesh, axes, params, tokens, timeout=300.0)
    assert ranks == [[(True, 2 * number, {1})] * 2 for number in weights]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_hundred_steps_learn_as_much_as_in_bfloat16(precision):
    """On fmoe's own source; seeds differ by as much."""
    text, seed = data.pack(data.read_documents([fmoe.__path__[0]], suffix=".py")), fresh_seed()

    def last(precision):
        params, optimizer, losses = decoder.init(MODEL, seed), optim.adamw(), []
        state = optimizer.init(params)
        of_batch = gradients.of_model(MODEL, dtype=torch.bfloat16, precision=precision)
        train = training_step(of_batch, optimizer, max_norm=1.0, bias_rate=0.01)
        for i, batch in zip(range(100), data.batches(text, batch_size=8, seq_len=64, seed=seed)):
            params, state, value, *_ = train(params, state, 3e-3 * min(1.0, (i + 1) / 20), *batch)
            losses.append(value.item())
        assert losses[0] > 5
        return sum(losses[-20:]) / 20

    plain, rounding = last(None), last(precision)
    assert plain < 3.2 and abs(rounding / plain - 1) < 0.03
