"""OLMoE: queries and keys normalised over all heads, and a softmax of all experts.

Source: arXiv 2409.02060, and the published configuration.
"""

from typing import Any

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..gqa import GQA
from ..rotary import Rotary
from . import family

PRESETS = {
    "OLMoE-1B-7B": DecoderConfig(
        vocab_size=50304,
        dim=2048,
        num_layers=16,
        attention=GQA(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="all", rope=Rotary(128)),
        moe_hidden_dim=1024,
        num_experts=64,
        router=RouterConfig(top_k=8, score_func="softmax", group_best=1, normalize=False),
        max_seq_len=4096,
        norm_eps=1e-5,
    )
}


def _wrong(config: DecoderConfig) -> list[str]:
    attention: Any = config.attention
    wrong = family.without_shared(config)
    if attention.num_heads * attention.head_dim != config.dim:
        wrong.append(f"attention.head_dim={attention.head_dim}, not dim / num_heads")
    if config.num_dense_layers:
        wrong.append(f"num_dense_layers={config.num_dense_layers}, not 0")
    return wrong


FAMILIES = {
    "olmoe": family.Family(
        "OlmoeForCausalLM",
        GQA,
        family.FIELDS
        | family.GQA_FIELDS
        | {
            "intermediate_size": "moe_hidden_dim",
            "num_experts": "num_experts",
            "norm_topk_prob": "router.normalize",
            "projections_with_bias": "attention.bias",
        },
        family.NAMES | family.GQA_NAMES | family.QK_NORM_NAMES,
        constants=family.SOFTMAX | {"attention.qk_norm": "all"},
        fixed=family.FIXED | {"clip_qkv": (None,)},
        absent=family.ABSENT | {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        read=family.bias_of("all"),
        written=family.written_bias,
        wrong=_wrong,
    )
}
