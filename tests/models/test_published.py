"""Published configurations, both ways."""

import dataclasses
import re

import pytest
from parity import TINY, V2

import fmoe
from fmoe.models import deepseek_v3
from fmoe.models.published import export_config, import_config

# The fields of the published files that say what is computed.
SHARED = dict(
    attention_bias=False,
    attention_dropout=0.0,
    hidden_act="silu",
    initializer_range=0.02,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    moe_layer_freq=1,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    rms_norm_eps=1e-06,
    rope_theta=10000,
    tie_word_embeddings=False,
    v_head_dim=128,
)
YARN = dict(beta_fast=32, beta_slow=1, factor=40, original_max_position_embeddings=4096, type="yarn")
PUBLISHED = {
    "16B": dict(
        model_type="deepseek_v2",
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        q_lora_rank=None,
        rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=0.707),
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_group=1,
        topk_method="greedy",
        vocab_size=102400,
    ),
    "236B": dict(
        model_type="deepseek_v2",
        first_k_dense_replace=1,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_group=8,
        n_routed_experts=160,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=128,
        num_experts_per_tok=6,
        num_hidden_layers=60,
        num_key_value_heads=128,
        q_lora_rank=1536,
        rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=0.707),
        routed_scaling_factor=16.0,
        scoring_func="softmax",
        topk_group=3,
        topk_method="group_limited_greedy",
        vocab_size=102400,
    ),
    "671B": dict(
        model_type="deepseek_v3",
        first_k_dense_replace=3,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_group=8,
        n_routed_experts=256,
        n_shared_experts=1,
        norm_topk_prob=True,
        num_attention_heads=128,
        num_experts_per_tok=8,
        num_hidden_layers=61,
        num_key_value_heads=128,
        num_nextn_predict_layers=1,
        q_lora_rank=1536,
        quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128]),
        rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_group=4,
        topk_method="noaux_tc",
        vocab_size=129280,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configurations(name):
    preset, raw = deepseek_v3.preset(name), SHARED | PUBLISHED[name]
    assert import_config(raw) == dataclasses.replace(preset, init_std=0.02, balance_loss=0.0)
    written = export_config(preset)
    for key in raw.keys() - {"initializer_range", "quantization_config", "num_nextn_predict_layers"}:
        assert written[key] == raw[key], key


def changed(**changes):
    raw = {**SHARED, **PUBLISHED["671B"], **changes}
    return lambda: import_config({key: value for key, value in raw.items() if value is not ...})


def exported(**changes):
    return lambda: export_config(dataclasses.replace(TINY, **changes))


LOAD, SAVE = "huggingface.load: config.json: got ", "huggingface.save: config: got "
CONFIG_ERRORS = {
    LOAD + "model_type='llama', not deepseek_v3 or deepseek_v2 or kimi_k2 or": changed(model_type="llama"),
    LOAD + "attention_bias=True, not False; rope_interleave=False, not True, expected": changed(
        attention_bias=True, rope_interleave=False
    ),
    LOAD + "hidden_size missing; n_group missing; q_lora_rank missing, expected": changed(
        hidden_size=..., n_group=None, q_lora_rank=...
    ),
    LOAD + "scoring_func='softmax', not 'sigmoid', expected": changed(scoring_func="softmax"),
    LOAD + "num_key_value_heads=8, not 128 or None": changed(num_key_value_heads=8),
    LOAD + "a rope type of 'llama3', not 'default' or 'yarn'": changed(rope_scaling={"rope_type": "llama3"}),
    LOAD + "YaRN's factor missing; YaRN's truncate=False": changed(
        rope_scaling={"type": "yarn", "original_max_position_embeddings": 4096, "truncate": False}
    ),
    LOAD + "YaRN's mscale missing; YaRN's attention_factor=1.5": changed(
        rope_scaling=dict(YARN, mscale_all_dim=1.0, attention_factor=1.5)
    ),
    LOAD + "quantization by 'awq', not 'fp8'": changed(quantization_config={"quant_method": "awq"}),
    LOAD
    + "hidden_size='7168', not of type int; n_group=True, not of type int; norm_topk_prob=1, not of": changed(
        hidden_size="7168", n_group=True, norm_topk_prob=1
    ),
    LOAD + "rms_norm_eps='1e-6', not of type float; rope_theta=[1], not of type float": changed(
        rms_norm_eps="1e-6", rope_theta=[1]
    ),
    LOAD + "factor='40', not of type float, expected": changed(rope_scaling=dict(YARN, factor="40")),
    LOAD + "rotary positions by 'yarn', not an object; quantization_config='fp8', not an object": changed(
        rope_scaling="yarn", quantization_config="fp8"
    ),
    LOAD + "scale_fmt='int', not 'float' or 'ue8m0'": changed(quantization_config={"scale_fmt": "int"}),
    LOAD + "weight_block_size=[128], not two sizes": changed(
        quantization_config={"weight_block_size": [128]}
    ),
    LOAD + "model_type=['deepseek_v3'], not deepseek_v3 or deepseek_v2": changed(model_type=["deepseek_v3"]),
    "Other families can be added: docs/families.md says how.": changed(model_type="llama"),
    LOAD + "num_nextn_predict_layers=0, not at least 1 for mtp=True, expected a model that fmoe computes "
    "exactly. Load it without mtp=True.": lambda: import_config(
        {**SHARED, **PUBLISHED["671B"], "num_nextn_predict_layers": 0}, mtp=True
    ),
    "Yarn: mscale_all_dim: got 0.0": changed(rope_scaling=dict(YARN, mscale=0.707)),
    SAVE + "router.group_best=1, not 2; router.force_balance=True, not False; num_shared_experts=0": (
        exported(
            router=dataclasses.replace(TINY.router, force_balance=True, group_best=1), num_shared_experts=0
        )
    ),
    SAVE + "router.num_groups=8 of one expert each, not of two or more": exported(
        router=fmoe.RouterConfig(top_k=2, num_groups=8, top_groups=2)
    ),
    SAVE + "router.normalize=True, not False, expected what DeepseekV2ForCausalLM": exported(
        router=dataclasses.replace(V2, normalize=True)
    ),
}


@pytest.mark.parametrize(("text", "call"), CONFIG_ERRORS.items(), ids=range(len(CONFIG_ERRORS)))
def test_configurations_that_cannot_be_honoured_are_named(text, call):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
