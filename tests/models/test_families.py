"""Families of models: transformers' own directories, their logits and gradients, and the way back."""

import dataclasses
import itertools
import random

import optree
import pytest
import torch
from helpers import quick
from pages import run_page
from torch.func import grad

from fmoe.models import decoder
from fmoe.models.families import FAMILIES, PRESETS
from fmoe.models.huggingface import load, save
from fmoe.models.published import export_config, import_config
from fmoe.models.published_tensors import published_leaves

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)


def common(draw):
    """What every family has; drawn at random, like all that follows."""
    heads_of_keys = draw.choice([1, 2, 3])
    heads = heads_of_keys * draw.choice([1, 2, 4])
    fields = dict(
        vocab_size=40,
        hidden_size=heads * draw.choice([4, 8]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=heads_of_keys,
        max_position_embeddings=32,
        num_experts_per_tok=draw.choice([1, 2, 3]),
        tie_word_embeddings=draw.random() < 0.3,
        rms_norm_eps=draw.choice([1e-6, 1e-5, 1e-2]),
        rope_parameters=dict(rope_type="default", rope_theta=draw.choice([100.0, 10000.0, 1e6])),
    )
    if draw.random() < 0.3:
        fields["rope_parameters"] |= YARN
    return fields


def dense_first(draw, layers):
    return [*range(draw.choice([0, 0, 1, layers]))]


def qwen3_moe(draw):
    fields = common(draw)
    return fields | dict(
        head_dim=draw.choice([4, 6, 8]),
        intermediate_size=20,
        moe_intermediate_size=draw.choice([5, 12]),
        num_experts=draw.choice([4, 9]),
        norm_topk_prob=draw.random() < 0.7,
        attention_bias=draw.random() < 0.3,
        mlp_only_layers=dense_first(draw, fields["num_hidden_layers"]),
    )


def qwen2_moe(draw):
    fields = common(draw)
    one = draw.choice([5, 12])
    return fields | dict(
        intermediate_size=20,
        moe_intermediate_size=one,
        shared_expert_intermediate_size=one * draw.choice([1, 2, 4]),
        num_experts=draw.choice([4, 9]),
        norm_topk_prob=draw.random() < 0.3,
        qkv_bias=draw.random() < 0.7,
        mlp_only_layers=dense_first(draw, fields["num_hidden_layers"]),
    )


def glm4_moe(draw):
    groups = draw.choice([1, 2])
    fields = common(draw)
    return fields | dict(
        head_dim=draw.choice([4, 8]),
        partial_rotary_factor=draw.choice([0.5, 1.0]),
        intermediate_size=20,
        moe_intermediate_size=draw.choice([5, 12]),
        n_routed_experts=8,
        n_shared_experts=draw.choice([1, 2]),
        n_group=groups,
        topk_group=1,
        first_k_dense_replace=draw.choice([0, 1]),
        attention_bias=draw.random() < 0.5,
        use_qk_norm=draw.random() < 0.5,
        norm_topk_prob=draw.random() < 0.7,
        routed_scaling_factor=draw.choice([1.0, 1.7]),
    )


def olmoe(draw):
    return common(draw) | dict(
        intermediate_size=draw.choice([5, 12]),
        num_experts=draw.choice([4, 9]),
        norm_topk_prob=draw.random() < 0.3,
        attention_bias=draw.random() < 0.3,
        pad_token_id=None,  # that token's embedding has no gradient there
    )


def mixtral(draw):
    return common(draw) | dict(
        head_dim=draw.choice([4, 6, 8]),
        intermediate_size=draw.choice([5, 12]),
        num_local_experts=draw.choice([4, 9]),
    )


def deepseek_v3(draw):
    fields, groups = common(draw), draw.choice([1, 2])
    fields["rope_parameters"] = dict(rope_type="default", rope_theta=draw.choice([100.0, 10000.0]))
    return fields | dict(
        num_key_value_heads=fields["num_attention_heads"],
        intermediate_size=20,
        moe_intermediate_size=draw.choice([5, 12]),
        n_routed_experts=8,
        n_shared_experts=draw.choice([1, 2]),
        first_k_dense_replace=draw.choice([0, 1]),
        q_lora_rank=draw.choice([None, 7]),
        kv_lora_rank=10,
        qk_nope_head_dim=draw.choice([5, 6]),
        qk_rope_head_dim=draw.choice([4, 6]),
        v_head_dim=draw.choice([8, 11]),
        n_group=groups,
        topk_group=1,
        norm_topk_prob=draw.random() < 0.7,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
    )


def deepseek_v2(draw):
    return deepseek_v3(draw) | dict(
        n_group=1, norm_topk_prob=False, topk_method="greedy", scoring_func="softmax", qk_nope_head_dim=6
    )


def dots1(draw):
    """The family that docs/families.md adds."""
    with_a_shared_expert = dict(n_shared_experts=1, sliding_window=None, norm_topk_prob=True)
    fields = glm4_moe(draw)
    for key in ("use_qk_norm", "partial_rotary_factor"):
        del fields[key]
    return fields | with_a_shared_expert


@pytest.fixture(scope="module", autouse=True)
def page():
    """Declares the family of docs/families.md while these tests run."""
    run_page("families.md", sessions=False)
    yield
    del FAMILIES["dots1"]


DRAW = {
    "deepseek_v3": ("DeepseekV3", deepseek_v3),
    "deepseek_v2": ("DeepseekV2", deepseek_v2),
    "qwen3_moe": ("Qwen3Moe", qwen3_moe),
    "qwen2_moe": ("Qwen2Moe", qwen2_moe),
    "glm4_moe": ("Glm4Moe", glm4_moe),
    "olmoe": ("Olmoe", olmoe),
    "mixtral": ("Mixtral", mixtral),
    "dots1": ("Dots1", dots1),
}


def their_model(name, seed):
    import transformers

    kind, draw = DRAW[name]
    config = getattr(transformers, kind + "Config")(**draw(random.Random(seed)))
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key or key.endswith(("bias", "e_score_correction_bias")):
                tensor.add_(0.3 * torch.randn_like(tensor))
            elif "inv_freq" not in key:
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model.eval()


def clear_tokens(params, config):
    """Tokens whose experts are no close call in float64, so that rounding can't decide a comparison."""
    wide = optree.tree_map(lambda leaf: leaf.double(), params)
    for _ in range(200):
        tokens, targets = torch.randint(config.vocab_size, (2, 2, 11)).unbind()
        noise = optree.tree_map(lambda leaf: leaf * (1 + 1e-5 * torch.randn_like(leaf)), wide)
        loads = [decoder.forward(tree, tokens, config)[1] for tree in (wide, noise, params)]
        counts = [[s.tokens_per_expert.tolist() for s in stats] for stats in loads]
        if counts[0] == counts[1] == counts[2]:
            return tokens, targets
    raise AssertionError("every batch has a close call")


@pytest.mark.parametrize(
    ("name", "case"), quick([(name, 0) for name in DRAW], [(name, i) for name in DRAW for i in range(20)])
)
def test_a_directory_of_transformers_gives_equal_logits_and_gradients(name, case, tmp_path, seed):
    """Of random configurations, with experts apart and fused; and what fmoe saves, transformers reads."""
    model = their_model(name, seed + case)
    model.save_pretrained(tmp_path / "theirs", save_original_format=case % 2 == 0)
    config, params = load(tmp_path / "theirs")
    tokens, targets = clear_tokens(params, config)
    logits, _ = decoder.forward(params, tokens, config)
    expected = model(tokens).logits
    assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())

    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    grads, _ = grad(decoder.loss, has_aux=True)(params, tokens, targets, config)
    leaves = published_leaves(config, fused=True, model_type=name)
    found = {
        part.name: value[part.at].reshape(part.shape)
        for leaf, value in zip(leaves, optree.tree_leaves(grads))
        for part in leaf.parts
    }
    wanted = {key: p.grad for key, p in model.named_parameters()}
    biases = {key for key in found if key.endswith("e_score_correction_bias")}  # a buffer there
    assert found.keys() - biases == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values() if g is not None)
    for key, g in wanted.items():
        g = torch.zeros_like(found[key]) if g is None else g
        assert (found[key] - g).abs().max() < 1e-4 * largest, key

    save(tmp_path / "ours", config, params, model_type=name)
    again, back = load(tmp_path / "ours")
    assert again == config
    assert all(map(torch.equal, optree.tree_leaves(params), optree.tree_leaves(back)))
    options = dict(attn_implementation="eager", experts_implementation="eager")
    other = type(model).from_pretrained(tmp_path / "ours", **options)
    assert (other(tokens).logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    # To the bit in the same memory: tensors mapped from a file are aligned otherwise, and so round otherwise.
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_expressible_and_comes_back(name):
    raw = export_config(PRESETS[name])
    assert import_config(raw) == dataclasses.replace(PRESETS[name], balance_loss=0.0)
    assert raw["architectures"] == [FAMILIES[raw["model_type"]].architecture]


# Billions of parameters in all and active for a token, as their authors give them.
PUBLISHED_SIZES = {
    "16B": (15.7, 2.4),
    "236B": (236, 21),
    "671B": (671, 37),
    "Kimi-K2": (1030, 32),
    "30B-A3B": (30.5, 3.3),
    "235B-A22B": (235, 22),
    "GLM-4.5": (355, 32),
    "GLM-4.5-Air": (106, 12),
    "OLMoE-1B-7B": (6.9, 1.3),
    "Mixtral-8x7B": (46.7, 12.9),
    "Mixtral-8x22B": (141, 39),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "Qwen2-57B-A14B": (57.4, 14.2),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_parameters_are_as_many_as_published(name):
    """Authors differ on whether an embedding that is only looked up is active."""
    assert PUBLISHED_SIZES.keys() == PRESETS.keys() - {"debug"}
    config, (total, active) = PRESETS[name], PUBLISHED_SIZES[name]
    in_all, without = decoder.num_params(config)
    embedding = config.vocab_size * config.dim
    assert in_all / 1e9 == pytest.approx(total, rel=0.01)
    nearest = min((without, without + embedding), key=lambda number: abs(number / 1e9 - active))
    assert nearest / 1e9 == pytest.approx(active, rel=0.07)


REFUSED = {
    "num_hidden_layers missing": dict(num_hidden_layers=None),
    "use_sliding_window=True, not False": dict(use_sliding_window=True),
    "decoder_sparse_step=2, not 1": dict(decoder_sparse_step=2),
    r"mlp_only_layers=[1], not [0]": dict(mlp_only_layers=[1]),
    "a rope type of 'linear', not 'default' or 'yarn'": dict(
        rope_scaling=dict(rope_type="linear", factor=2.0)
    ),
    "hidden_act='gelu', not 'silu'": dict(hidden_act="gelu"),
    "head_dim='128', not of type int": dict(head_dim="128"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_config_asks_for_and_fmoe_cannot_compute_is_named(text):
    raw = export_config(PRESETS["30B-A3B"]) | REFUSED[text]
    with pytest.raises(ValueError, match=r"huggingface\.load: config\.json") as error:
        import_config(raw)
    assert text in str(error.value)


def test_kimi_k2_as_published():
    raw = export_config(PRESETS["Kimi-K2"], "kimi_k2") | dict(
        aux_loss_alpha=0.001,
        ep_size=1,
        seq_aux=True,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128]),
    )
    assert raw["model_type"] == "kimi_k2"
    assert import_config(raw) == PRESETS["Kimi-K2"]


A_MODEL_OF = dict(qwen2_moe="Qwen2-57B-A14B", qwen3_moe="30B-A3B", glm4_moe="GLM-4.5", olmoe="OLMoE-1B-7B")
A_MODEL_OF |= dict(mixtral="Mixtral-8x7B", deepseek_v3="671B", deepseek_v2="236B", kimi_k2="Kimi-K2")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_with_any_field_lost_or_odd_is_read_or_refused(kind):
    """Never another error than a ``ValueError``."""
    raw, refused = export_config(PRESETS[A_MODEL_OF[kind]], kind), 0
    for key, odd in itertools.product(raw, [..., None, -1, 0, 1.5, "x", [], {}, True]):
        changed = {k: v for k, v in (raw | {key: odd}).items() if v is not ...}
        try:
            import_config(changed)
        except ValueError:
            refused += 1
    assert refused > 2 * len(raw)


def test_an_attention_that_no_family_has_is_named():
    @dataclasses.dataclass(frozen=True)
    class Other:
        inner: object

    config = PRESETS["30B-A3B"]
    odd = dataclasses.replace(config, attention=Other(config.attention))
    with pytest.raises(ValueError, match=r"huggingface\.save: config: got an attention that is Other"):
        export_config(odd)
