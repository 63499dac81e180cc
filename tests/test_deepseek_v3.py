"""The small DeepSeek-V3: parity with transformers, gradients, transforms, errors."""

import dataclasses
import functools
import re

import optree
import pytest
import torch
from helpers import ORACLE_TRANSFORMS, TRANSFORMS, Example, error, fresh_seed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

import fmoe
from fmoe.models import deepseek_v3
from fmoe.models.attention import rope_table
from fmoe.ops.tape import plain_operators
from fmoe.tree import is_spec

TINY = dataclasses.replace(
    deepseek_v3.preset("debug"),
    vocab_size=40,
    dim=24,
    num_layers=3,
    hidden_dim=20,
    num_heads=2,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    moe_hidden_dim=12,
    num_experts=8,
    num_shared_experts=2,
    router=fmoe.RouterConfig(top_k=2, num_groups=4, top_groups=2),
    max_seq_len=32,
    init_std=0.2,
)


def tokens(config=TINY, batch=2, length=11):
    return torch.randint(config.vocab_size, (batch, length))


def with_biases(params):
    """Selection biases so far apart that no rounding of a score can change a choice."""
    layers = []
    for layer in params.layers:
        if isinstance(layer.mlp, fmoe.MoEParams):
            bias = torch.randperm(layer.mlp.router.bias_E.shape[0]).float() * 3
            router = layer.mlp.router._replace(bias_E=bias)
            layer = layer._replace(mlp=layer.mlp._replace(router=router))
        layers.append(layer)
    return params._replace(layers=tuple(layers))


def theirs(config):
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            first_k_dense_replace=config.num_dense_layers,
            intermediate_size=config.hidden_dim,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            q_lora_rank=config.q_lora_rank or None,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            moe_intermediate_size=config.moe_hidden_dim,
            n_routed_experts=config.num_experts,
            n_shared_experts=config.num_shared_experts,
            num_experts_per_tok=config.router.top_k,
            n_group=config.router.num_groups,
            topk_group=config.router.top_groups,
            routed_scaling_factor=config.router.scale,
            norm_topk_prob=config.router.normalize,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
    )


def their_names(params):
    """Parameters by the names transformers gives them, as the tensors transformers holds."""
    names = {"model.embed_tokens": params.embedding, "model.norm": params.norm, "lm_head": params.head}

    def mlp(prefix, p):
        gate, up = p.w_in
        names.update({prefix + "gate_proj": gate, prefix + "up_proj": up, prefix + "down_proj": p.w_out})

    for i, layer in enumerate(params.layers):
        at, moe = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        names |= {
            f"model.layers.{i}.input_layernorm": layer.attention_norm,
            f"model.layers.{i}.post_attention_layernorm": layer.mlp_norm,
            at + "kv_a_proj_with_mqa": layer.attention.kv_down,
            at + "kv_a_layernorm": layer.attention.kv_norm,
            at + "kv_b_proj": layer.attention.kv_up,
            at + "o_proj": layer.attention.out,
        }
        if isinstance(layer.attention.query, torch.Tensor):
            names[at + "q_proj"] = layer.attention.query
        else:
            names |= dict(
                zip((at + "q_a_proj", at + "q_a_layernorm", at + "q_b_proj"), layer.attention.query)
            )
        if isinstance(layer.mlp, fmoe.MoEParams):
            names[moe + "gate"] = layer.mlp.router.weight_ED
            names[moe + "experts.gate_up_proj"] = layer.mlp.experts.w_in.flatten(1, 2)
            names[moe + "experts.down_proj"] = layer.mlp.experts.w_out
            mlp(moe + "shared_experts.", layer.mlp.shared)
        else:
            mlp(moe, layer.mlp)
    return {k if "experts." in k and "shared" not in k else k + ".weight": v for k, v in names.items()}


@pytest.mark.parametrize("q_lora_rank", [0, 7])
def test_parity_with_transformers(q_lora_rank):
    config = dataclasses.replace(TINY, q_lora_rank=q_lora_rank)
    params = with_biases(deepseek_v3.init(config, 3))
    model = theirs(config)
    biases = {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias": layer.mlp.router.bias_E
        for i, layer in enumerate(params.layers)
        if isinstance(layer.mlp, fmoe.MoEParams)
    }
    model.load_state_dict({**their_names(params), **biases})
    batch, targets = tokens(config), tokens(config)
    logits, _ = deepseek_v3.forward(params, batch, config)
    expected = model(batch).logits
    assert (logits - expected).abs().max() < 1e-4

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    grads, _ = grad(deepseek_v3.loss, has_aux=True)(params, batch, targets, config)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    found = their_names(grads)
    assert set(found) == set(wanted)
    for name, g in found.items():
        assert (g - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name


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
    batch, targets = tokens(batch=3), tokens(batch=3)

    def loss(p, x, y):
        return deepseek_v3.loss(p, x[None], y[None], TINY)[0]

    got = vmap(grad(loss), (None, 0, 0))(params, batch, targets)
    loop = [grad(loss)(params, x, y) for x, y in zip(batch, targets)]
    assert error(got, optree.tree_map(lambda *g: torch.stack(g), *loop)) < 1e-12


SMALL = dataclasses.replace(
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
PER_LAYER = {
    "plain": lambda layer: layer,
    "remat": fmoe.remat,
    "nested remat": lambda layer: fmoe.remat(
        lambda *a: fmoe.remat(layer, fmoe.save("topk", "attention"))(*a), fmoe.save("dispatch")
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_model_under_every_transform(transform):
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
    for name, per_layer in PER_LAYER.items():
        assert error(TRANSFORMS[transform](scalar(per_layer), example), expected) < 1e-9, name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_layer_with_remat_compiles_whole_and_once(backend):
    """Attention, norms, router, experts, shared experts: one graph, though routing changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    params = deepseek_v3.init(TINY, fresh_seed()).layers[1]
    rope = rope_table(TINY, 11)
    loads = set()

    def loss(wrap):
        def call(p, x):
            y, (stats,) = wrap(deepseek_v3._layer)(p, x, rope, TINY)
            return y.pow(2).mean(), stats

        return fmoe.value_and_grad(call, (0, 1), has_aux=True)

    def compiled(layer):
        return torch.compile(fmoe.remat(layer), fullgraph=True, backend=counter)

    for _ in range(4):
        x = torch.randn(2, 11, TINY.dim) * 5
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
    "preset: name: got '17B', expected one of ['debug']": lambda: deepseek_v3.preset("17B"),
    "DeepSeekV3Config: num_dense_layers: got 4, expected at most num_layers=3. Lower it.": (
        lambda: dataclasses.replace(TINY, num_dense_layers=4)
    ),
    "DeepSeekV3Config: dim: got 0, expected at least 1.": lambda: dataclasses.replace(TINY, dim=0),
    "DeepSeekV3Config: qk_rope_head_dim: got 5, expected an even number.": (
        lambda: dataclasses.replace(TINY, qk_rope_head_dim=5)
    ),
    "DeepSeekV3Config: router.top_k: got 8, expected at most 4, the experts that": (
        lambda: dataclasses.replace(TINY, router=fmoe.RouterConfig())
    ),
    "forward: tokens: got torch.float32 of shape (2, 3), expected torch.int64 of shape (B, L).": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), torch.ones(2, 3), TINY)
    ),
    "forward: tokens: got 33 positions, expected at most max_seq_len=32.": (
        lambda: deepseek_v3.forward(deepseek_v3.init(TINY, 0), tokens(length=33), TINY)
    ),
    "loss: targets: got torch.int64 of shape (11,), expected torch.int64 of shape (B, L).": (
        lambda: deepseek_v3.loss(deepseek_v3.init(TINY, 0), tokens(), tokens()[0], TINY)
    ),
}


@pytest.mark.parametrize(("text", "call"), ERRORS.items(), ids=range(len(ERRORS)))
def test_bad_input_is_named(text, call):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
