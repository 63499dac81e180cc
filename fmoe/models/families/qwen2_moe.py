"""Qwen2-MoE and Qwen1.5-MoE: shared experts that a sigmoid of the token weighs.

Source: arXiv 2407.10671, and the published configurations.
"""

import dataclasses

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..gqa import GQA
from ..rotary import Rotary
from . import family
from .qwen3_moe import DENSE, SIZES, dense_first, dense_layers

_A2_7B = DecoderConfig(
    vocab_size=151936,
    dim=2048,
    num_layers=24,
    hidden_dim=5632,
    attention=GQA(num_heads=16, num_kv_heads=16, head_dim=128, bias="qkv", rope=Rotary(128, theta=1e6)),
    moe_hidden_dim=1408,
    num_experts=60,
    num_shared_experts=4,
    shared_gate=True,
    router=RouterConfig(top_k=4, score_func="softmax", group_best=1, normalize=False),
    max_seq_len=8192,
)
PRESETS = {
    "Qwen1.5-MoE-A2.7B": _A2_7B,
    "Qwen2-57B-A14B": dataclasses.replace(
        _A2_7B,
        dim=3584,
        num_layers=28,
        hidden_dim=18944,
        attention=dataclasses.replace(_A2_7B.attention, num_heads=28, num_kv_heads=4),
        moe_hidden_dim=2560,
        num_experts=64,
        num_shared_experts=8,
        router=dataclasses.replace(_A2_7B.router, top_k=8),
        max_seq_len=131072,
    ),
}


def _read(raw: family.Json) -> family.Json:
    """One shared expert as large as several is several."""
    raw = dense_first(family.read_gqa(raw))
    whole, one = raw.get("shared_expert_intermediate_size"), raw.get("moe_intermediate_size")
    if type(whole) is int and type(one) is int and one > 0:
        raw["num_shared_experts"] = whole // one
    return raw | {"projections_with_bias": "qkv" if raw.get("qkv_bias", True) else "none"}


def _write(config: DecoderConfig) -> family.Json:
    whole = config.num_shared_experts * config.moe_hidden_dim
    bias = {"qkv": True, "none": False}.get(getattr(config.attention, "bias", ""))
    return dense_layers(config) | {"shared_expert_intermediate_size": whole, "qkv_bias": bias}


FAMILIES = {
    "qwen2_moe": family.Family(
        "Qwen2MoeForCausalLM",
        GQA,
        family.FIELDS
        | family.GQA_FIELDS
        | SIZES
        | {"projections_with_bias": "attention.bias", "num_shared_experts": "num_shared_experts"},
        family.NAMES
        | family.GQA_NAMES
        | {
            "mlp.shared.w_in": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
            "mlp.shared.w_out": ("mlp.shared_expert.down_proj.weight",),
            "mlp.shared_gate": ("mlp.shared_expert_gate.weight",),
        },
        constants=family.SOFTMAX | {"shared_gate": True},
        fixed=family.FIXED
        | DENSE
        | {
            "shared_expert_intermediate_size": (
                lambda raw: raw.get("num_shared_experts", 0) * (raw.get("moe_intermediate_size") or 0),
            )
        },
        absent=family.ABSENT | {"norm_topk_prob": False},
        read=_read,
        written=_write,
    )
}
