"""Mixtral: few large experts, of which a softmax chooses two.

Source: arXiv 2401.04088, and the published configurations.
"""

import dataclasses

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..gqa import GQA
from ..rotary import Rotary
from . import family

_8X7B = DecoderConfig(
    vocab_size=32000,
    dim=4096,
    num_layers=32,
    attention=GQA(num_heads=32, num_kv_heads=8, head_dim=128, rope=Rotary(128, theta=1e6)),
    moe_hidden_dim=14336,
    num_experts=8,
    router=RouterConfig(top_k=2, score_func="softmax", group_best=1),
    max_seq_len=32768,
    norm_eps=1e-5,
)
PRESETS = {
    "Mixtral-8x7B": _8X7B,
    "Mixtral-8x22B": dataclasses.replace(
        _8X7B,
        dim=6144,
        num_layers=56,
        attention=dataclasses.replace(_8X7B.attention, num_heads=48),
        moe_hidden_dim=16384,
        max_seq_len=65536,
    ),
}


def _wrong(config: DecoderConfig) -> list[str]:
    dense = config.num_dense_layers
    return family.without_shared(config) + ([f"num_dense_layers={dense}, not 0"] if dense else [])


FAMILIES = {
    "mixtral": family.Family(
        "MixtralForCausalLM",
        GQA,
        family.FIELDS
        | family.GQA_FIELDS
        | {"intermediate_size": "moe_hidden_dim", "num_local_experts": "num_experts"},
        family.NAMES
        | family.GQA_NAMES
        | {
            "mlp.router.weight_ED": ("block_sparse_moe.gate.weight",),
            "mlp.experts.w_in": (
                "block_sparse_moe.experts.{}.w1.weight",
                "block_sparse_moe.experts.{}.w3.weight",
            ),
            "mlp.experts.w_out": ("block_sparse_moe.experts.{}.w2.weight",),
        },
        constants=family.SOFTMAX | {"router.normalize": True},
        fixed=family.FIXED
        | {"sliding_window": (None,), "router_jitter_noise": (0.0, ...)},  # noise in training only
        absent=family.ABSENT | {"rms_norm_eps": 1e-5},
        read=family.read_gqa,
        wrong=_wrong,
        fused={"mlp.router.weight_ED": ("mlp.gate.weight",)},
        theta=1e6,
    )
}
