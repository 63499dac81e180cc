"""``config.json`` of published DeepSeek-V2 and DeepSeek-V3 models, both ways.

A field that fmoe computes differently, or not at all, is an error.
"""

import dataclasses
from typing import Any

from ..errors import argument_error
from ..ops.route import RouterConfig
from .config import DeepSeekV3Config, Yarn

# Their names -> ours.
MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "moe_intermediate_size": "moe_hidden_dim",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
ROUTER = {
    "num_experts_per_tok": "top_k",
    "n_group": "num_groups",
    "topk_group": "top_groups",
    "norm_topk_prob": "normalize",
    "routed_scaling_factor": "scale",
}
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
ABSENT = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
NULL = {"q_lora_rank": 0, "n_shared_experts": 0}

# Allowed values, by model type, of fields that fmoe has no choice about. The first is also the default.
BOTH: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {
        **BOTH,
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    "deepseek_v3": {**BOTH, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


def _types(table: dict[str, str], config: type) -> dict[str, Any]:
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    return {theirs: kinds[ours] for theirs, ours in table.items()}


TYPES = _types(MODEL, DeepSeekV3Config) | _types(ROUTER, RouterConfig)
TYPES |= {"rope_theta": float, "num_nextn_predict_layers": int}
ROPE_TYPES = _types(YARN, Yarn) | {"rope_theta": float}


def import_config(raw: dict[str, Any]) -> DeepSeekV3Config:
    """The configuration that a ``config.json`` describes.

    Raises ``ValueError`` listing every field that fmoe can't honour.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FIXED:
        raise _error([f"model_type={kind!r}, not {' or '.join(FIXED)}"])
    raw = {**ABSENT, **raw}
    if kind == "deepseek_v2" and raw.get("topk_method", "greedy") == "greedy":
        raw |= {"n_group": 1, "topk_group": 1}
    fixed = FIXED[kind] | {"num_key_value_heads": (raw.get("num_attention_heads"), None)}
    wrong = [
        f"{key}={raw[key]!r}, not {' or '.join(map(repr, allowed))}"
        for key, allowed in fixed.items()
        if raw.get(key, allowed[0]) not in allowed
    ]
    wrong += [f"{key} missing" for key in [*MODEL, *ROUTER] if raw.get(key) is None and key not in NULL]
    wrong += [f"{key} missing" for key in NULL if key not in raw]
    wrong += _mistyped(raw, TYPES)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wrong += _wrong_rope(rope)
    wrong += _wrong_quantization(raw.get("quantization_config") or {})
    if wrong:
        raise _error(wrong)
    values: Any = {ours: NULL[key] if raw[key] is None else raw[key] for key, ours in MODEL.items()}
    router = RouterConfig(
        **{ours: raw[key] for key, ours in ROUTER.items()},
        score_func=fixed["scoring_func"][0],
        group_best=1 if kind == "deepseek_v2" else 2,
    )
    yarn = None
    if _rope_type(rope) == "yarn":
        absent = {"mscale_all_dim": 0.0}  # plain YaRN scales cosines and sines but not the softmax
        yarn = Yarn(**absent | {ours: rope[key] for key, ours in YARN.items() if rope.get(key) is not None})
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return DeepSeekV3Config(**values, router=router, rope_theta=theta, yarn=yarn)


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _mistyped(raw: dict[str, Any], types: dict[str, Any]) -> list[str]:
    """Fields that are neither null nor of their type. An integer counts as a float, a boolean as neither."""
    return [
        f"{key}={raw[key]!r}, not of type {kind.__name__}"
        for key, kind in types.items()
        if raw.get(key) is not None and type(raw[key]) not in ((int, float) if kind is float else (kind,))
    ]


def _wrong_quantization(given: Any) -> list[str]:
    if not isinstance(given, dict):
        return [f"quantization_config={given!r}, not an object"]
    method = given.get("quant_method", "fp8")
    wrong = [] if method == "fp8" else [f"quantization by {method!r}, not 'fp8'"]
    block = given.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or [n for n in block if type(n) is not int or n < 1]:
        wrong.append(f"weight_block_size={block!r}, not two sizes")
    return wrong


def _wrong_rope(rope: Any) -> list[str]:
    if not isinstance(rope, dict):
        return [f"rotary positions by {rope!r}, not an object"]
    if mistyped := _mistyped(rope, ROPE_TYPES):
        return mistyped
    kind = _rope_type(rope)
    if kind == "default":
        return []
    if kind != "yarn":
        return [f"a rope type of {kind!r}, not 'default' or 'yarn'"]
    needed = list(YARN)[:2]
    if rope.get("mscale_all_dim"):
        needed.append("mscale")  # the published implementations disagree without it
    known = {*ROPE_TYPES, "rope_type", "type"}
    harmless = {"attention_factor": None, "truncate": True}
    wrong = [f"YaRN's {key} missing" for key in needed if rope.get(key) is None]
    odd = {key: value for key, value in rope.items() if key not in known and harmless.get(key, ...) != value}
    return wrong + [f"YaRN's {key}={value!r}" for key, value in odd.items()]


def export_config(config: DeepSeekV3Config) -> dict[str, Any]:
    """The ``config.json`` of a configuration: DeepSeek-V3's for sigmoid scores, else DeepSeek-V2's.

    Raises ``ValueError`` listing everything that neither can express.
    """
    r = config.router
    kind = "deepseek_v3" if r.score_func == "sigmoid" else "deepseek_v2"
    best = 2 if kind == "deepseek_v3" else 1
    limited = r.top_groups < r.num_groups
    wrong = [f"router.{name}=True" for name in ("score_before_experts", "force_balance") if getattr(r, name)]
    if limited and r.group_best != best:
        wrong.append(f"router.group_best={r.group_best} with {r.score_func} scores, not {best}")
    if kind == "deepseek_v2" and r.normalize:
        wrong.append("router.normalize=True with softmax scores")
    if kind == "deepseek_v3" and r.num_groups > 1 and config.num_experts < 2 * r.num_groups:
        wrong.append(f"router.num_groups={r.num_groups} of one expert each, not of two or more")
    if config.num_shared_experts < 1:
        wrong.append("num_shared_experts=0, not 1 or more")
    if wrong:
        got, expected = "; ".join(wrong), "what DeepseekV3ForCausalLM or DeepseekV2ForCausalLM can express"
        remedy = "Keep such a model in fmoe's own checkpoints."
        raise argument_error("huggingface.save", "config", got=got, expected=expected, remedy=remedy)
    fixed = {key: allowed[0] for key, allowed in FIXED[kind].items()}
    if kind == "deepseek_v2" and limited:
        fixed["topk_method"] = "group_limited_greedy"
    rope = None
    if config.yarn:
        rope = {key: getattr(config.yarn, ours) for key, ours in YARN.items()} | {"type": "yarn"}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(config, ours) for key, ours in MODEL.items()},
        **{key: getattr(r, ours) for key, ours in ROUTER.items()},
        **fixed,
        "q_lora_rank": config.q_lora_rank or None,
        "num_key_value_heads": config.num_heads,
        "num_nextn_predict_layers": 0,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
    }


def _error(wrong: list[str]) -> ValueError:
    got, expected = "; ".join(wrong), "a DeepSeek-V2 or DeepSeek-V3 that fmoe computes exactly"
    remedy = "Convert the model to one, with transformers for instance."
    return argument_error("huggingface.load", "config.json", got=got, expected=expected, remedy=remedy)
