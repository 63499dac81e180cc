"""The small DeepSeek-V3: parity with transformers, gradients, transforms, errors."""

import dataclasses
import functools
import itertools
import re

import optree
import parity
import pytest
import torch
from helpers import ORACLE_TRANSFORMS, TRANSFORMS, Example, change, error, fresh_seed, quick
from parity import MODELS, TINY, clear_tokens, small, their_model, their_tensors, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import fmoe
from fmoe.models import deepseek_v3
from fmoe.models.decoder import one_layer, stage_loss
from fmoe.models.gqa import GQA
from fmoe.models.params import ModelParams
from fmoe.models.rotary import Rotary, Yarn
from fmoe.ops.balance import moe_stats
from fmoe.ops.core.tape import plain_operators
from fmoe.params import is_spec
from fmoe.training import gradients


def with_biases(params):
    """Selection biases so far apart, and any two's sums too, that no rounding can change a choice."""
    layers = []
    for layer in params.layers:
        if isinstance(layer.mlp, fmoe.MoEParams):
            bias = 3 * 2.0 ** torch.randperm(layer.mlp.router.bias_E.shape[0])
            router = layer.mlp.router._replace(bias_E=bias)
            layer = layer._replace(mlp=layer.mlp._replace(router=router))
        layers.append(layer)
    return params._replace(layers=tuple(layers))


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_transformers(name):
    config = small(name)
    params = parity.init(config)
    model = their_model(config, params)
    batch, targets = clear_tokens(model, params, config), tokens(config)
    logits, _ = deepseek_v3.forward(params, batch, config)
    expected = model(batch).logits
    assert (logits - expected).abs().max() < 1e-4

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    grads, _ = grad(deepseek_v3.loss, has_aux=True)(params, batch, targets, config)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    found = their_tensors(grads, config)
    biases = {name for name in found if name.endswith("e_score_correction_bias")}
    assert set(found) - biases == set(wanted)
    assert not any(found[name].any() for name in biases)
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= 1e-3 * g.norm(), name


def test_gradients_agree_with_each_other_and_with_differences():
    params = with_biases(deepseek_v3.init(TINY, 0, dtype=torch.float64))
    batch, targets = tokens(), tokens()

    def loss(p):
        return deepseek_v3.loss(p, batch, targets, TINY)[0]

    g = grad(loss)(params)
    assert error(g, fmoe.value_and_grad(loss)(params)[1]) < 1e-12
    direction = optree.tree_map(torch.randn_like, params)
    # The bias decides which experts are chosen; along it the loss jumps, so it stays.
    direction = optree.tree_map(lambda d, p: d * (p.dtype == torch.float64), direction, params)
    step = 1e-6
    ahead, behind = (
        loss(optree.tree_map(lambda p, d, s=s: p + s * step * d, params, direction)) for s in (1, -1)
    )
    slope = sum((a * b).sum() for a, b in zip(optree.tree_leaves(g), optree.tree_leaves(direction)))
    assert abs((ahead - behind) / (2 * step) - slope) < 1e-5 * (1 + abs(slope))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 2, 3)])
def test_stages_one_after_another_are_the_model_bit_for_bit(tied, cuts):
    """A stage of a pipeline has some of the layers, be it none, and passes on what it computed."""
    config = dataclasses.replace(TINY, tied_head=tied, num_layers=3)
    params, batch, targets = deepseek_v3.init(config, 0), tokens(config), tokens(config)

    def in_stages(params):
        x, layers = batch, ()
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            last = i == len(cuts) - 2
            stage = ModelParams(
                params.embedding if i == 0 or (last and tied) else (),
                params.layers[start:stop],
                params.norm if last else (),
                params.head if last else (),
            )
            x, found = stage_loss(stage, x, targets, config)
            layers += found.layers
        return x, found._replace(layers=layers)

    whole = fmoe.value_and_grad(deepseek_v3.loss, has_aux=True)(params, batch, targets, config)
    for found, expected in zip(
        optree.tree_leaves(fmoe.value_and_grad(in_stages, has_aux=True)(params)),
        optree.tree_leaves(whole),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_remat_per_layer_changes_no_bit():
    params = deepseek_v3.init(TINY, 0)
    batch, targets = tokens(), tokens()
    results = []
    for per_layer in (
        lambda f: f,
        fmoe.remat,
        functools.partial(fmoe.remat, policy=fmoe.save_nothing),
        functools.partial(fmoe.remat, policy=fmoe.save("experts_grouped_mm")),
    ):
        for differentiate in (fmoe.value_and_grad, torch.func.grad_and_value):
            out = differentiate(deepseek_v3.loss, has_aux=True)(
                params, batch, targets, TINY, per_layer=per_layer
            )
            results.append(optree.tree_leaves(out) if differentiate is fmoe.value_and_grad else out)
    first = results[0]
    for other in results[2::2]:
        assert all(map(torch.equal, first, other))
    for other in results[3::2]:
        assert error(results[1], other) == 0


def test_vmap_over_sequences_and_per_example_gradients_equal_a_loop():
    params = with_biases(deepseek_v3.init(TINY, 0, dtype=torch.float64))
    batch, targets = tokens(batch=32), tokens(batch=32)

    def loss(p, x, y):
        return deepseek_v3.loss(p, x[None], y[None], TINY)[0]

    got = vmap(grad(loss), (None, 0, 0))(params, batch, targets)
    loop = [grad(loss)(params, x, y) for x, y in zip(batch, targets)]
    assert error(got, optree.tree_map(lambda *g: torch.stack(g), *loop)) < 1e-12


def test_vmap_over_no_sequence():
    params, none = deepseek_v3.init(TINY, 0), torch.zeros(0, 2, 8, dtype=torch.int64)
    logits = lambda t: deepseek_v3.forward(params, t, TINY)[0]  # noqa: E731
    assert vmap(logits)(none).shape == (0, *logits(none.new_zeros(2, 8)).shape)
    total = grad(lambda p: vmap(lambda t: deepseek_v3.loss(p, t, t, TINY)[0])(none).sum())(params)
    assert error(total, optree.tree_map(torch.zeros_like, params)) == 0


SMALL = change(
    TINY,
    vocab_size=9,
    dim=6,
    num_layers=2,
    hidden_dim=5,
    kv_lora_rank=4,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=3,
    moe_hidden_dim=3,
    num_shared_experts=1,
    init_std=0.5,
)


@pytest.mark.parametrize("balance", [0.0, 0.3])
@pytest.mark.parametrize(
    "transform",
    {
        "grad": grad,
        "grad of remat": grad,
        "jacrev": jacrev,
        "jvp": lambda f: lambda p, t: jvp(lambda p: f(p, t), (p,), (p,))[1],
        "jvp(grad)": lambda f: lambda p, t: jvp(lambda p: grad(f)(p, t), (p,), (p,))[1],
    }.items(),
    ids=lambda item: item[0],
)
def test_derivatives_for_each_of_no_sequence_have_the_shapes_of_those_of_one(balance, transform):
    name, of = transform
    config = change(SMALL, balance_loss=balance)
    how = {"per_layer": fmoe.remat} if name == "grad of remat" else {}
    params = deepseek_v3.init(config, 0, dtype=torch.float64)
    each = vmap(of(lambda p, t: deepseek_v3.loss(p, t, t, config, **how)[0]), (None, 0))
    one, none = (each(params, torch.randint(9, (n, 2, 5))) for n in (1, 0))
    assert optree.tree_map(lambda g: (0, *g.shape[1:]), one) == optree.tree_map(
        lambda g: tuple(g.shape), none
    )
    assert optree.tree_map(lambda g: g.dtype, one) == optree.tree_map(lambda g: g.dtype, none)


PER_LAYER = {
    "plain": lambda layer: layer,
    "remat": fmoe.remat,
    "nested remat": lambda layer: fmoe.remat(
        lambda *a: fmoe.remat(layer, fmoe.save("topk", "attention"))(*a), fmoe.save("dispatch")
    ),
}


# The layer and each operator have tests of every transform.
SOME_TRANSFORMS = ["grad", "jvp", "vmap both", "vmap(grad) tokens", "vmap(grad) params", "grad(vmap)"]
SOME_TRANSFORMS += ["grad(grad)", "jvp(grad)", "hessian", "compile"]


@pytest.mark.parametrize("transform", quick(SOME_TRANSFORMS, TRANSFORMS))
def test_the_model_under_every_transform(transform, slow):
    """Against the same model made of plain PyTorch functions; ``x`` scales the embedding's columns."""
    params = deepseek_v3.init(SMALL, fresh_seed(), dtype=torch.float64)
    example = Example(params, torch.rand(SMALL.dim, dtype=torch.float64) + 0.5, batch=2)
    batch, targets = tokens(SMALL, length=4), tokens(SMALL, length=4)

    def scalar(per_layer):
        def loss(p, x, ints=()):
            p = p._replace(embedding=p.embedding * x)
            return deepseek_v3.loss(p, batch, targets, SMALL, per_layer=per_layer)[0]

        return loss

    with plain_operators():
        expected = ORACLE_TRANSFORMS[transform](scalar(PER_LAYER["plain"]), example)
    wraps = [*PER_LAYER.items()]
    if not slow:
        wraps = [wraps[[*TRANSFORMS].index(transform) % len(wraps)]]
    for name, per_layer in wraps:
        assert error(TRANSFORMS[transform](scalar(per_layer), example), expected) < 1e-9, name


GROUPED = dataclasses.replace(
    TINY,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="head", bias="all", rope=Rotary(4)),
    shared_gate=True,
)


@pytest.mark.parametrize(
    ("backend", "config"),
    quick(
        [("aot_eager", TINY)],
        itertools.product(["aot_eager", "inductor"], [TINY, GROUPED]),
    ),
    ids=lambda value: value if isinstance(value, str) else type(value.attention).__name__,
)
def test_a_layer_with_remat_compiles_whole_and_once(backend, config):
    """Attention, norms, router, experts, shared experts: one graph, though routing changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    params = deepseek_v3.init(config, fresh_seed()).layers[1]
    rope = config.attention.rope.table(11)
    loads = set()

    def loss(wrap):
        def call(p, x):
            y, (sums,), _ = wrap(one_layer)(p, x, rope, config)
            return y.pow(2).mean(), moe_stats(sums)

        return fmoe.value_and_grad(call, (0, 1), has_aux=True)

    def compiled(layer):
        return torch.compile(fmoe.remat(layer), fullgraph=True, backend=counter)

    for _ in range(4):
        x = torch.randn(2, 11, config.dim) * 5
        (value, stats), grads = loss(lambda layer: layer)(params, x)
        loads.add(str(stats.tokens_per_expert))
        assert error(loss(compiled)(params, x), ((value, stats), grads)) < 1e-5
    assert len(loads) > 1
    assert counter.frame_count == 1


def test_specs_and_params_agree():
    tree, params = deepseek_v3.specs(TINY), deepseek_v3.init(TINY, 0, dtype=torch.bfloat16)
    assert optree.tree_structure(tree, is_leaf=is_spec) == optree.tree_structure(params)
    for spec, leaf in zip(optree.tree_leaves(tree, is_leaf=is_spec), optree.tree_leaves(params)):
        assert spec.shape == tuple(leaf.shape)
        assert len(spec.partition) == leaf.dim()
        assert leaf.dtype == (spec.dtype or torch.bfloat16)
    assert deepseek_v3.num_params(TINY)[0] == sum(t.numel() for t in optree.tree_leaves(params))


def test_counts_move_the_biases():
    params = deepseek_v3.init(TINY, 0)
    stats = deepseek_v3.forward(params, tokens(), TINY)[1]
    moved = deepseek_v3.update_biases(params, stats, 0.5)
    counts = stats[1].tokens_per_expert.float()
    bias = moved.layers[2].mlp.router.bias_E
    assert torch.equal(bias, 0.5 * (counts.mean() - counts).sign())
    assert not params.layers[2].mlp.router.bias_E.any()


ERRORS = {
    "preset: name: got '17B', expected one of ['16B', '235B-A22B', '236B'": lambda: deepseek_v3.preset("17B"),
    "preset: layers: got 28, expected 1 to 27, as 16B has. Leave it out for all of them.": (
        lambda: deepseek_v3.preset("16B", layers=28)
    ),
    "DecoderConfig: num_dense_layers: got 4, expected at most num_layers=3.": (
        lambda: dataclasses.replace(TINY, num_dense_layers=4)
    ),
    "DecoderConfig: dim: got 0, expected an integer of at least 1.": lambda: dataclasses.replace(TINY, dim=0),
    "DecoderConfig: dim: got 8.0, expected an integer": lambda: dataclasses.replace(TINY, dim=8.0),
    "Rotary: dim: got 5, expected an even number.": (lambda: change(TINY, qk_rope_head_dim=5)),
    "DecoderConfig: router.top_k: got 8, expected at most 4, the experts that": (
        lambda: dataclasses.replace(TINY, router=deepseek_v3.ROUTER)
    ),
    "Yarn: factor: got 0.5, expected at least 1.": lambda: Yarn(0.5, 4096),
    "Yarn: original_max_seq_len: got 0, expected at least 1.": lambda: Yarn(4, 0),
    "Yarn: mscale: got -1.0, expected above 0.": lambda: Yarn(4, 4096, mscale=-1.0),
    "Yarn: beta_slow: got 40, expected above 0, to beta_fast=32.0.": lambda: Yarn(4, 4096, beta_slow=40),
    "Yarn: mscale_all_dim: got 0.0, expected above 0, or 0 with mscale=1.": (
        lambda: Yarn(4, 4096, mscale=0.707, mscale_all_dim=0.0)
    ),
    "forward: tokens: got torch.float32 of shape (2, 3), expected torch.int64 of shape (B, L).": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), torch.ones(2, 3), TINY)
    ),
    "forward: tokens: got 33 positions, expected at most max_seq_len=32.": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), tokens(length=33), TINY)
    ),
    "embed: ids: got an id outside the vocabulary, expected 0 to 39. Use the tokenizer": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), tokens() + 40, TINY)
    ),
    "forward: mesh: got None, for params that are DTensors, expected the mesh they lie on.": (
        lambda: deepseek_v3.forward(
            deepseek_v3.init(TINY, 0, mesh=fmoe.make_mesh(device_type="cpu")), tokens(), TINY
        )
    ),
    "forward: mesh: got 'ep=2', expected a mesh.": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), tokens(), TINY, "ep=2")
    ),
    "init: mesh: got 'ep=2', expected a mesh.": lambda: deepseek_v3.init(TINY, 0, mesh="ep=2"),
    "of_model: mesh: got 'ep=2', expected a mesh.": lambda: gradients.of_model(TINY, "ep=2"),
    "loss: targets: got torch.int64 of shape (11,), expected torch.int64 of shape (B, L).": (
        lambda: deepseek_v3.loss(deepseek_v3.init(TINY, 0), tokens(), tokens()[0], TINY)
    ),
}


@pytest.mark.parametrize(("text", "call"), ERRORS.items(), ids=range(len(ERRORS)))
def test_bad_input_is_named(text, call):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("name", ["query matrix, two shared experts", "tied head", "dense layers only"])
def test_flops_are_those_transformers_does(name):
    config = small(name)
    model, batch = their_model(config), tokens(config)
    with FlopCounterMode(display=False) as counted:
        model(batch, labels=batch).loss.backward()
    # Its attention computes all keys and masks half of them; a causal one of 2 L - 1 keys does as much.
    length = 2 * batch.shape[1] - 1
    ours = deepseek_v3.flops_per_token(config, length) * batch.numel()
    angles = config.attention.rope.dim * batch.shape[1]  # some versions multiply positions and frequencies
    assert counted.get_total_flops() in (ours, ours + angles)


@pytest.mark.parametrize(
    ("name", "total", "active", "digit"),
    # 2.45 billion were published as 2.4: cut, not rounded.
    [("16B", 15.7, 2.4, 0.06), ("236B", 236, 21, 0.5), ("671B", 671, 37, 0.5)],
)
def test_presets_have_their_published_sizes(name, total, active, digit):
    found = deepseek_v3.num_params(deepseek_v3.preset(name))
    assert abs(found[0] / 1e9 - total) < digit
    assert abs(found[1] / 1e9 - active) < digit


def test_a_tied_head_is_no_leaf():
    config = dataclasses.replace(TINY, tied_head=True)
    params = deepseek_v3.init(config, 0)
    assert params.head == ()
    untied = deepseek_v3.init(TINY, 0)._replace(head=params.embedding)
    batch = tokens()
    got, expected = deepseek_v3.forward(params, batch, config), deepseek_v3.forward(untied, batch, TINY)
    assert torch.equal(got[0], expected[0])
    assert deepseek_v3.num_params(TINY)[1] == deepseek_v3.num_params(config)[1]
