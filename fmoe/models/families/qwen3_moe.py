"""Qwen3-MoE: grouped-query attention with normalised queries and keys, and a softmax of all experts.

Source: arXiv 2505.09388, and the published configurations.
"""

import dataclasses
from typing import Any

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..gqa import GQA
from ..rotary import Rotary
from . import family

_30B = DecoderConfig(
    vocab_size=151936,
    dim=2048,
    num_layers=48,
    hidden_dim=6144,
    attention=GQA(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head", rope=Rotary(128, theta=1e6)),
    moe_hidden_dim=768,
    num_experts=128,
    router=RouterConfig(top_k=8, score_func="softmax", group_best=1),
    max_seq_len=40960,
)
PRESETS = {
    "30B-A3B": _30B,
    "235B-A22B": dataclasses.replace(
        _30B,
        dim=4096,
        num_layers=94,
        hidden_dim=12288,
        attention=dataclasses.replace(_30B.attention, num_heads=64),
        moe_hidden_dim=1536,
    ),
}


def dense_first(raw: family.Json) -> family.Json:
    """With ``num_dense_layers``, if the layers without experts come first."""
    only = raw.get("mlp_only_layers") or []
    return raw | {"num_dense_layers": len(only) if isinstance(only, list) else 0}


def dense_layers(config: DecoderConfig) -> family.Json:
    return {"mlp_only_layers": [*range(config.num_dense_layers)]}


def _read(raw: family.Json) -> family.Json:
    named = {"num_experts": raw.get("num_local_experts"), **raw}  # transformers 5 writes num_local_experts
    return dense_first(family.bias_of("all")(named))


DENSE: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (lambda raw: [*range(raw["num_dense_layers"])], [], None),
    "use_sliding_window": (False,),
}
SIZES = {
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "moe_hidden_dim",
    "num_experts": "num_experts",
    "num_dense_layers": "num_dense_layers",
    "norm_topk_prob": "router.normalize",
}

FAMILIES = {
    "qwen3_moe": family.Family(
        "Qwen3MoeForCausalLM",
        GQA,
        family.FIELDS | family.GQA_FIELDS | SIZES | {"projections_with_bias": "attention.bias"},
        family.NAMES | family.GQA_NAMES | family.QK_NORM_NAMES,
        constants=family.SOFTMAX | {"attention.qk_norm": "head"},
        fixed=family.FIXED | DENSE,
        absent=family.ABSENT | {"norm_topk_prob": False},
        read=_read,
        written=lambda config: dense_layers(config) | family.written_bias(config),
        wrong=family.without_shared,
    )
}
