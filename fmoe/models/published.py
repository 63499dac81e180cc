"""What published DeepSeek-V2 and DeepSeek-V3 models are called: their tensors, and ``config.json`` both ways.

What fmoe computes differently, or not at all, is an error: a directory is read right or not at all.
"""

import itertools
import re
from typing import Any, NamedTuple

import optree

from ..errors import argument_error
from ..ops.route import RouterConfig
from ..tree import ParamSpec, dotted_names, is_spec
from .config import DeepSeekV3Config, Yarn
from .deepseek_v3 import specs

# Our leaf, without its layer -> their tensors; {} is an expert's number.
NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attention_norm": ("input_layernorm.weight",),
    "attention.query": ("self_attn.q_proj.weight",),
    "attention.query.down": ("self_attn.q_a_proj.weight",),
    "attention.query.norm": ("self_attn.q_a_layernorm.weight",),
    "attention.query.up": ("self_attn.q_b_proj.weight",),
    "attention.kv_down": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_norm": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_up": ("self_attn.kv_b_proj.weight",),
    "attention.out": ("self_attn.o_proj.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "mlp.w_in": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.w_out": ("mlp.down_proj.weight",),
    "mlp.router.weight_ED": ("mlp.gate.weight",),
    "mlp.router.bias_E": ("mlp.gate.e_score_correction_bias",),
    "mlp.experts.w_in": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.w_out": ("mlp.experts.{}.down_proj.weight",),
    "mlp.shared.w_in": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "mlp.shared.w_out": ("mlp.shared_experts.down_proj.weight",),
}
# The layout transformers has in memory, and writes on request.
FUSED = {
    "mlp.experts.w_in": ("mlp.experts.gate_up_proj",),
    "mlp.experts.w_out": ("mlp.experts.down_proj",),
}

# Their name -> ours.
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

# What fields that fmoe has no choice about must say, by model type; the first is also what absence means.
BOTH: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": BOTH
    | {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    "deepseek_v3": BOTH | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}
ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


def import_config(raw: dict[str, Any]) -> DeepSeekV3Config:
    """The configuration a ``config.json`` describes.

    Raises ``ValueError`` that lists every field fmoe can't honour.
    """
    kind = raw.get("model_type")
    if kind not in FIXED:
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
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wrong += _wrong_rope(rope)
    if (method := (raw.get("quantization_config") or {"quant_method": "fp8"}).get("quant_method")) != "fp8":
        wrong.append(f"quantization by {method!r}, not 'fp8'")
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
        absent = {"mscale_all_dim": 0.0}  # plain YaRN: cosines and sines grow, the softmax's scale stays
        yarn = Yarn(**absent | {ours: rope[key] for key, ours in YARN.items() if rope.get(key) is not None})
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return DeepSeekV3Config(**values, router=router, rope_theta=theta, yarn=yarn)


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _wrong_rope(rope: dict[str, Any]) -> list[str]:
    kind = _rope_type(rope)
    if kind == "default":
        return []
    if kind != "yarn":
        return [f"a rope type of {kind!r}, not 'default' or 'yarn'"]
    needed = list(YARN)[:2]
    if rope.get("mscale_all_dim"):
        needed.append("mscale")  # without it the published implementations disagree
    known = {*YARN, "rope_type", "type", "rope_theta"}
    harmless = {"attention_factor": None, "truncate": True}
    return [f"YaRN's {key} missing" for key in needed if rope.get(key) is None] + [
        f"YaRN's {key}={value!r}"
        for key, value in rope.items()
        if key not in known and harmless.get(key, ...) != value
    ]


def export_config(config: DeepSeekV3Config) -> dict[str, Any]:
    """The ``config.json`` of a configuration, DeepSeek-V3's if its scores are sigmoids, else DeepSeek-V2's.

    Raises ``ValueError`` that lists everything neither can express.
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
        raise argument_error(
            "huggingface.save",
            "config",
            got="; ".join(wrong),
            expected="what DeepseekV3ForCausalLM or DeepseekV2ForCausalLM can express",
            remedy="Keep such a model in fmoe's own checkpoints.",
        )
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


class Part(NamedTuple):
    """A published tensor and where it lies: ``leaf[at]``, viewed as ``shape``."""

    name: str
    at: tuple[int, ...]
    shape: tuple[int, ...]


class Leaf(NamedTuple):
    """One parameter: its dotted name, what it is, and the published tensors that make it up.

    DeepSeek-V2 has no selection biases: there they are made of nothing, and zero.
    """

    name: str
    spec: ParamSpec
    parts: list[Part]


def published_leaves(config: DeepSeekV3Config, *, fused: bool = False) -> list[Leaf]:
    """Every parameter in flattening order; with ``fused`` a layer's experts are two tensors, not 3 E.

    >>> from fmoe.models.config import preset
    >>> leaf = published_leaves(preset("671B"))[21]
    >>> leaf.name, leaf.parts[0].name, leaf.parts[0].at
    ('layers.1.mlp.w_in', 'model.layers.1.mlp.gate_proj.weight', (0,))
    """
    table = NAMES | FUSED if fused else NAMES
    if config.router.score_func == "softmax":
        table = table | {"mlp.router.bias_E": ()}
    tree = specs(config)
    leaves = []
    for name, spec in zip(dotted_names(tree, is_leaf=is_spec), optree.tree_leaves(tree, is_leaf=is_spec)):
        layer, key = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups()  # type: ignore[union-attr]
        leaves.append(Leaf(name, spec, _parts("model." + layer if layer else "", table[key], spec.shape)))
    return leaves


def _parts(prefix: str, templates: tuple[str, ...], shape: tuple[int, ...]) -> list[Part]:
    per_expert = "{}" in "".join(templates)
    parts = []
    for expert, which in itertools.product(range(shape[0] if per_expert else 1), range(len(templates))):
        at = (expert,) * per_expert + (which,) * (len(templates) > 1)
        rest = shape[len(at) :]
        if len(rest) == 4:  # gate and up are one dimension of a fused tensor
            rest = (rest[0], rest[1] * rest[2], rest[3])
        parts.append(Part(prefix + templates[which].format(expert), at, rest))
    return parts


def _error(wrong: list[str]) -> ValueError:
    return argument_error(
        "huggingface.load",
        "config.json",
        got="; ".join(wrong),
        expected="a DeepSeek-V2 or DeepSeek-V3 that fmoe computes exactly",
        remedy="Convert the model to one, with transformers for instance.",
    )
