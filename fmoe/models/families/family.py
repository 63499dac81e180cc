"""How a family of models is published: the words of its ``config.json``, and the names of its tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..config import DecoderConfig

Json = dict[str, Any]

# The layout that transformers has in memory, and writes on request.
FUSED = {
    "mlp.experts.w_in": ("mlp.experts.gate_up_proj",),
    "mlp.experts.w_out": ("mlp.experts.down_proj",),
}


class Family(NamedTuple):
    """One ``model_type``. Our fields have dotted names such as ``router.top_k`` and ``attention.rope.dim``.

    ============  =========================================================================
    architecture  transformers' class
    attention     ours, of which ``config.attention`` is one
    fields        theirs -> ours
    names         our leaf, without its layer -> their tensors; ``{}`` is an expert's number
    constants     ours -> what every such model has, and its ``config.json`` doesn't say
    fixed         theirs -> the values that fmoe can compute; the first is also what absence means. A value
                  may be a function of the ``config.json``, and ``...`` allows any
    absent        theirs -> what absence means
    null          theirs -> what ``null`` means; such a field may not be absent
    read          a ``config.json`` in the words of ``fields``
    written       what to write beyond ``fields`` and ``fixed``
    wrong         what transformers can't compute of a configuration
    fused         further ``names`` that differ where a layer's experts are two tensors
    theta         the base of rotary positions where ``config.json`` has none
    ============  =========================================================================

    >>> from fmoe.models.families import FAMILIES
    >>> FAMILIES["qwen3_moe"].fields["num_key_value_heads"]
    'attention.num_kv_heads'
    """

    architecture: str
    attention: type
    fields: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Any] = {}
    fixed: Mapping[str, tuple[Any, ...]] = {}
    absent: Mapping[str, Any] = {}
    null: Mapping[str, Any] = {}
    read: Callable[[Json], Json] = lambda raw: raw
    written: Callable[[DecoderConfig], Json] = lambda config: {}
    wrong: Callable[[DecoderConfig], list[str]] = lambda config: []
    fused: Mapping[str, tuple[str, ...]] = {}
    theta: float = 10000.0


# ---- what families have in common ------------------------------------------------------------------

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "num_experts_per_tok": "router.top_k",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
ABSENT = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}
NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attention_norm": ("input_layernorm.weight",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "mlp.w_in": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.w_out": ("mlp.down_proj.weight",),
    "mlp.router.weight_ED": ("mlp.gate.weight",),
    "mlp.router.bias_E": (),  # most families have none, and ours is zero
    "mlp.experts.w_in": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.w_out": ("mlp.experts.{}.down_proj.weight",),
    "mlp.shared.w_in": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "mlp.shared.w_out": ("mlp.shared_experts.down_proj.weight",),
}
SELECTION_BIAS = {"mlp.router.bias_E": ("mlp.gate.e_score_correction_bias",)}

# Multi-token prediction: layers after the last. Each stores the embedding and the head, too, which it shares.
NEXTN = {"num_nextn_predict_layers": (0, ...)}  # any number, passed over unless asked for
NEXTN_NAMES = {
    "mtp.embedding_norm": ("enorm.weight",),
    "mtp.hidden_norm": ("hnorm.weight",),
    "mtp.proj": ("eh_proj.weight",),
    "mtp.norm": ("shared_head.norm.weight",),
}
NEXTN_SHARED = {"embedding": "embed_tokens.weight", "head": "shared_head.head.weight"}

# Routers: softmax of all experts without groups, and DeepSeek-V3's.
SOFTMAX = {
    "router.score_func": "softmax",
    "router.num_groups": 1,
    "router.top_groups": 1,
    "router.group_best": 1,
    "router.scale": 1.0,
}
GROUPED = {"router.score_func": "sigmoid", "router.group_best": 2}
GROUPED_FIELDS = {
    "n_group": "router.num_groups",
    "topk_group": "router.top_groups",
    "norm_topk_prob": "router.normalize",
    "routed_scaling_factor": "router.scale",
}

# Sizes of dense layers, experts and shared experts, as most families write them.
EXPERTS_FIELDS = {
    "first_k_dense_replace": "num_dense_layers",
    "intermediate_size": "hidden_dim",
    "moe_intermediate_size": "moe_hidden_dim",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
}

# Grouped-query attention.
GQA_FIELDS = {
    "num_key_value_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "rotary_dim": "attention.rope.dim",
}
GQA_NAMES = {
    f"attention.{ours}.{kind}": (f"self_attn.{theirs}_proj.{kind}",)
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    for kind in ("weight", "bias")
}
QK_NORM_NAMES = {
    "attention.query.norm": ("self_attn.q_norm.weight",),
    "attention.key.norm": ("self_attn.k_norm.weight",),
}


def read_gqa(raw: Json) -> Json:
    """With heads of keys, ``head_dim`` and ``rotary_dim``, which a ``config.json`` may leave out."""
    found, heads, dim = dict(raw), raw.get("num_attention_heads"), raw.get("hidden_size")
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = heads
    if found.get("head_dim") is None and type(heads) is int and type(dim) is int and heads > 0:
        found["head_dim"] = dim // heads
    rope = raw.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if type(found.get("head_dim")) is int and isinstance(part, (int, float)):
        found["rotary_dim"] = int(found["head_dim"] * part)
    return found


def bias_of(kind: str) -> Callable[[Json], Json]:
    """A reader that turns ``attention_bias`` into the projections that have one: ``"qkv"`` or ``"all"``."""

    def read(raw: Json) -> Json:
        return read_gqa(raw) | {"projections_with_bias": kind if raw.get("attention_bias") else "none"}

    return read


def written_bias(config: DecoderConfig) -> Json:
    return {"attention_bias": getattr(config.attention, "bias", "none") != "none"}


def without_gate(config: DecoderConfig) -> list[str]:
    return ["shared_gate=True, not False"] if config.shared_gate else []


def without_shared(config: DecoderConfig) -> list[str]:
    shared = config.num_shared_experts
    return [f"num_shared_experts={shared}, not 0"] if shared else []
