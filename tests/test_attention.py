"""Latent attention against transformers', rotary positions, norms."""

import dataclasses

import pytest
import torch
from helpers import error
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from fmoe.models.attention import LowRankQuery, attention_forward, attention_specs, rms_norm, rope_table
from fmoe.models.deepseek_v3 import preset
from fmoe.ops.attention import attention
from fmoe.ops.tape import plain_operators
from fmoe.tree import init_params

SIZES = {
    "query matrix": dict(q_lora_rank=0),
    "query bottleneck": dict(q_lora_rank=12),
    "unequal heads, odd sizes": dict(
        dim=30,
        num_heads=3,
        q_lora_rank=7,
        kv_lora_rank=9,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=11,
    ),
}


def theirs(config):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    hf = DeepseekV3Config(
        hidden_size=config.dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank or None,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return hf, DeepseekV3Attention(hf, 0)


def load(layer, params):
    weights = {
        "kv_a_proj_with_mqa": params.kv_down,
        "kv_a_layernorm": params.kv_norm,
        "kv_b_proj": params.kv_up,
        "o_proj": params.out,
    }
    if isinstance(params.query, LowRankQuery):
        weights |= dict(zip(("q_a_proj", "q_a_layernorm", "q_b_proj"), params.query))
    else:
        weights["q_proj"] = params.query
    layer.load_state_dict({f"{k}.weight": v for k, v in weights.items()})


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_parity_with_transformers(sizes):
    config = dataclasses.replace(preset("debug"), init_std=0.3, **sizes)
    params = init_params(attention_specs(config), 0, dtype=torch.float32, device="cpu")
    hf, layer = theirs(config)
    load(layer, params)
    x = torch.randn(2, 13, config.dim)
    positions = torch.arange(13)[None].expand(2, -1)
    embedding = DeepseekV3RotaryEmbedding(hf)(x, positions)
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    expected = layer(x, embedding, mask)[0]
    got = attention_forward(params, x, rope_table(config, 13), config)
    assert error(got, expected) < 2e-6


DTYPES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
WIDTHS = {
    "equal": (8, 8),
    "wider queries": (24, 16),
    "wider values": (8, 24),
    "odd": (5, 3),
    "V3": (192, 128),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("length", [1, 37])
def test_attention_equals_softmax_attention(dtype, widths, length):
    """Values and gradients, on the kernel chosen for each dtype, width and device, against float64."""
    q, k, v = (torch.randn(2, length, 3, n).to(dtype) for n in (widths[0], *widths))
    g, scale = torch.randn(2, length, 3, widths[1]), widths[0] ** -0.5
    y, pull = torch.func.vjp(lambda *qkv: attention(*qkv, scale), q, k, v)
    with plain_operators():
        expected, expected_pull = torch.func.vjp(
            lambda *qkv: attention(*qkv, scale), *(t.double() for t in (q, k, v))
        )
    assert y.dtype == dtype
    assert error((y, pull(g.to(dtype))), (expected, expected_pull(g.double()))) < DTYPES[dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 0, 3, 8)])
def test_attention_over_nothing(shape):
    q = torch.randn(shape)
    y, pull = torch.func.vjp(lambda q: attention(q, q, q, 1.0), q)
    assert y.shape == shape == pull(y)[0].shape


def test_no_position_sees_a_later_one():
    config = preset("debug")
    params = init_params(attention_specs(config), 1, dtype=torch.float64, device="cpu")
    x = torch.randn(1, 9, config.dim, dtype=torch.float64)
    changed = torch.cat([x[:, :5], torch.randn_like(x[:, 5:])], 1)
    rope = rope_table(config, 9)
    a, b = (attention_forward(params, v, rope, config) for v in (x, changed))
    assert error(a[:, :5], b[:, :5]) < 1e-14
    assert error(a[:, 5:], b[:, 5:]) > 1e-3


def test_attention_depends_on_distances_only():
    config = preset("debug")
    params = init_params(attention_specs(config), 1, dtype=torch.float64, device="cpu")
    x = torch.randn(1, 6, config.dim, dtype=torch.float64)
    table = rope_table(config, 40)
    late = type(table)(table.cos[30:36], table.sin[30:36])
    early = type(table)(table.cos[:6], table.sin[:6])
    assert error(*(attention_forward(params, x, rope, config) for rope in (early, late))) < 1e-6


def test_rms_norm_in_low_precision_takes_the_mean_in_float32():
    x = torch.full((4096,), 100.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert error(rms_norm(x, torch.ones(4096, dtype=torch.float16), 0.0), torch.ones(4096)) < 1e-3
