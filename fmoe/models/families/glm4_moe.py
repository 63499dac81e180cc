"""GLM-4.5: grouped-query attention of which half a head turns, and DeepSeek-V3's routing.

Source: arXiv 2508.06471, and the published configurations.
"""

import dataclasses
from typing import Any

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..gqa import GQA
from ..rotary import Rotary
from . import family

_AIR = DecoderConfig(
    vocab_size=151552,
    dim=4096,
    num_layers=46,
    num_dense_layers=1,
    hidden_dim=10944,
    attention=GQA(num_heads=96, num_kv_heads=8, head_dim=128, bias="qkv", rope=Rotary(64, theta=1e6)),
    moe_hidden_dim=1408,
    num_experts=128,
    num_shared_experts=1,
    router=RouterConfig(top_k=8),
    max_seq_len=131072,
    norm_eps=1e-5,
)
PRESETS = {
    "GLM-4.5-Air": _AIR,
    "GLM-4.5": dataclasses.replace(
        _AIR,
        dim=5120,
        num_layers=92,
        num_dense_layers=3,
        hidden_dim=12288,
        attention=dataclasses.replace(_AIR.attention, qk_norm="head"),
        moe_hidden_dim=1536,
        num_experts=160,
        router=RouterConfig(top_k=8, scale=2.5),
    ),
}


def _read(raw: family.Json) -> family.Json:
    half = {"partial_rotary_factor": 0.5, **raw}
    return family.bias_of("qkv")(half) | {"qk_norm": "head" if raw.get("use_qk_norm") else "none"}


def _write(config: DecoderConfig) -> family.Json:
    attention: Any = config.attention
    part = attention.rope.dim / attention.head_dim
    return family.written_bias(config) | {
        "use_qk_norm": attention.qk_norm == "head",
        "partial_rotary_factor": part,
    }


FAMILIES = {
    "glm4_moe": family.Family(
        "Glm4MoeForCausalLM",
        GQA,
        family.FIELDS
        | family.GQA_FIELDS
        | family.EXPERTS_FIELDS
        | family.GROUPED_FIELDS
        | {"qk_norm": "attention.qk_norm", "projections_with_bias": "attention.bias"},
        family.NAMES | family.GQA_NAMES | family.QK_NORM_NAMES | family.SELECTION_BIAS | family.NEXTN_NAMES,
        constants=family.GROUPED,
        fixed=family.FIXED | family.NEXTN,
        absent=family.ABSENT | {"rms_norm_eps": 1e-5},
        read=_read,
        written=_write,
        wrong=family.without_gate,
    )
}
