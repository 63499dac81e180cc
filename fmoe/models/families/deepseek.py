"""DeepSeek-V2, DeepSeek-V3 and Kimi-K2, which is a DeepSeek-V3 of other sizes.

Source: the published configurations; for the initialisation, arXiv 2405.04434 and 2412.19437.
"""

import dataclasses
from typing import Any

from ...ops.route import RouterConfig
from ..config import DecoderConfig
from ..mla import MLA
from ..rotary import Rotary, Yarn
from . import family


def DeepSeekV3Config(
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    q_lora_rank: int = 0,
    rope_theta: float = 10000.0,
    yarn: Yarn | None = None,
    **sizes: Any,
) -> DecoderConfig:
    """A :class:`~fmoe.models.config.DecoderConfig` with latent attention, from flat names.

    ``sizes`` are its other fields.

    Raises ``ValueError`` for sizes that don't fit together.

    >>> import fmoe
    >>> config = DeepSeekV3Config(
    ...     vocab_size=256, dim=64, num_layers=2, num_heads=2, kv_lora_rank=16, qk_nope_head_dim=16,
    ...     qk_rope_head_dim=8, v_head_dim=16, moe_hidden_dim=32, num_experts=8,
    ...     router=fmoe.RouterConfig(), max_seq_len=128,
    ... )
    >>> config.attention.num_heads
    2
    """
    rope = Rotary(qk_rope_head_dim, theta=rope_theta, interleaved=True, yarn=yarn)
    attention = MLA(num_heads, kv_lora_rank, qk_nope_head_dim, v_head_dim, rope, q_lora_rank)
    return DecoderConfig(attention=attention, **sizes)


# DeepSeek-V3 routes each token to the best 8 of 256 experts, in the best 4 of 8 groups.
ROUTER = RouterConfig(top_k=8, num_groups=8, top_groups=4, group_best=2, scale=2.5)

_YARN = Yarn(factor=40, original_max_seq_len=4096)
_HEADS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
_V2 = DeepSeekV3Config(
    vocab_size=102400,
    dim=5120,
    num_layers=60,
    num_dense_layers=1,
    hidden_dim=12288,
    num_heads=128,
    q_lora_rank=1536,
    moe_hidden_dim=1536,
    num_experts=160,
    num_shared_experts=2,
    router=RouterConfig(
        top_k=6, score_func="softmax", num_groups=8, top_groups=3, group_best=1, normalize=False, scale=16.0
    ),
    max_seq_len=163840,
    yarn=dataclasses.replace(_YARN, mscale=0.707, mscale_all_dim=0.707),
    init_std=0.006,
    **_HEADS,
)
_V3 = DeepSeekV3Config(
    vocab_size=129280,
    dim=7168,
    num_layers=61,
    num_dense_layers=3,
    hidden_dim=18432,
    num_heads=128,
    q_lora_rank=1536,
    moe_hidden_dim=2048,
    num_experts=256,
    num_shared_experts=1,
    router=ROUTER,
    max_seq_len=163840,
    yarn=_YARN,
    init_std=0.006,
    balance_loss=1e-4,
    **_HEADS,
)

PRESETS = {
    "debug": DeepSeekV3Config(
        vocab_size=256,
        dim=128,
        num_layers=4,
        num_dense_layers=1,
        hidden_dim=384,
        num_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        moe_hidden_dim=64,
        num_experts=16,
        num_shared_experts=1,
        router=dataclasses.replace(ROUTER, top_k=4, num_groups=4, top_groups=2),
        max_seq_len=1024,
    ),
    "16B": dataclasses.replace(
        _V2,
        dim=2048,
        num_layers=27,
        hidden_dim=10944,
        attention=dataclasses.replace(_V2.attention, num_heads=16, q_lora_rank=0),
        moe_hidden_dim=1408,
        num_experts=64,
        router=dataclasses.replace(_V2.router, num_groups=1, top_groups=1, scale=1.0),
    ),
    "236B": _V2,
    "671B": _V3,
    "Kimi-K2": dataclasses.replace(
        _V3,
        vocab_size=163840,
        num_dense_layers=1,
        attention=dataclasses.replace(
            _V3.attention,
            num_heads=64,
            rope=Rotary(
                64,
                theta=50000.0,
                interleaved=True,
                yarn=Yarn(factor=32, original_max_seq_len=4096, beta_fast=1.0, beta_slow=1.0),
            ),
        ),
        num_experts=384,
        router=RouterConfig(top_k=8, scale=2.827),
        max_seq_len=131072,
        init_std=0.02,
        balance_loss=0.0,
    ),
}


# ---- as published ----------------------------------------------------------------------------------


def _greedy(raw: dict[str, Any]) -> dict[str, Any]:
    whole = raw.get("topk_method", "greedy") == "greedy"
    return raw | {"n_group": 1, "topk_group": 1} if whole else raw


def _method(config: DecoderConfig) -> dict[str, Any]:
    limited = config.router.top_groups < config.router.num_groups
    return {"topk_method": "group_limited_greedy"} if limited else {}


def _wrong(config: DecoderConfig) -> list[str]:
    r, wrong = config.router, family.without_gate(config)
    if r.score_func == "sigmoid" and r.num_groups > 1 and config.num_experts < 2 * r.num_groups:
        wrong.append(f"router.num_groups={r.num_groups} of one expert each, not of two or more")
    if config.num_shared_experts < 1:
        wrong.append("num_shared_experts=0, not 1 or more")
    return wrong


_PUBLISHED = family.Family(
    "DeepseekV3ForCausalLM",
    MLA,
    family.FIELDS
    | family.EXPERTS_FIELDS
    | family.GROUPED_FIELDS
    | {
        "q_lora_rank": "attention.q_lora_rank",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_nope_head_dim": "attention.qk_nope_head_dim",
        "qk_rope_head_dim": "attention.rope.dim",
        "v_head_dim": "attention.v_head_dim",
    },
    family.NAMES
    | family.SELECTION_BIAS
    | family.NEXTN_NAMES
    | {
        "attention.query": ("self_attn.q_proj.weight",),
        "attention.query.down": ("self_attn.q_a_proj.weight",),
        "attention.query.norm": ("self_attn.q_a_layernorm.weight",),
        "attention.query.up": ("self_attn.q_b_proj.weight",),
        "attention.kv_down": ("self_attn.kv_a_proj_with_mqa.weight",),
        "attention.kv_norm": ("self_attn.kv_a_layernorm.weight",),
        "attention.kv_up": ("self_attn.kv_b_proj.weight",),
        "attention.out": ("self_attn.o_proj.weight",),
    },
    constants=family.GROUPED | {"attention.rope.interleaved": True},
    fixed=family.FIXED
    | family.NEXTN
    | {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "num_key_value_heads": (lambda raw: raw.get("num_attention_heads"), None),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    absent=family.ABSENT,
    null={"q_lora_rank": 0, "n_shared_experts": 0},
    wrong=_wrong,
)
FAMILIES = {
    "deepseek_v3": _PUBLISHED,
    "deepseek_v2": _PUBLISHED._replace(
        architecture="DeepseekV2ForCausalLM",
        names={**_PUBLISHED.names, "mlp.router.bias_E": ()},
        constants={
            **_PUBLISHED.constants,
            "router.score_func": "softmax",
            "router.group_best": 1,
        },
        fixed={
            **_PUBLISHED.fixed,
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },
        read=_greedy,
        written=_method,
    ),
    "kimi_k2": _PUBLISHED,
}
