"""``config.json`` of published models, both ways, by the tables of their family.

A field that fmoe computes differently, or not at all, is an error.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import argument_error
from ..ops.route import RouterConfig
from .config import DecoderConfig
from .families import FAMILIES
from .families.family import NEXTN, Family, Json
from .rotary import Rotary, Yarn

YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_YARN_FIELDS = {field.name: field.type for field in dataclasses.fields(Yarn)}
ROPE_TYPES: dict[str, Any] = {theirs: _YARN_FIELDS[ours] for theirs, ours in YARN.items()}
ROPE_TYPES |= {"rope_theta": float, "partial_rotary_factor": float}


def import_config(raw: Json, *, mtp: bool = False) -> DecoderConfig:
    """The configuration that a ``config.json`` describes, with its multi-token prediction if ``mtp``.

    Raises ``ValueError`` listing every field that fmoe can't honour.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        remedy = "Other families can be added: docs/families.md says how."
        raise _error([f"model_type={kind!r}, not {' or '.join(FAMILIES)}"], remedy)
    family = FAMILIES[kind]
    if mistyped := _mistyped(raw, _types(family) | {"rope_theta": float, "num_nextn_predict_layers": int}):
        raise _error(mistyped)
    raw = family.read({**family.absent, **raw})
    wrong = _fixed_otherwise(family, raw)
    wrong += [f"{key} missing" for key in family.fields if raw.get(key) is None and key not in family.null]
    wrong += [f"{key} missing" for key in family.null if key not in raw]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wrong += _wrong_rope(rope)
    wrong += _wrong_quantization(raw.get("quantization_config") or {})
    if wrong:
        raise _error(wrong)
    if mtp and not _num_mtp(family, raw):
        found = raw.get("num_nextn_predict_layers")
        lacking = f"num_nextn_predict_layers={found!r}, not at least 1 for mtp=True"
        raise _error([lacking], "Load it without mtp=True.")
    return _config(family, raw, mtp)


def _num_mtp(family: Family, raw: Json) -> int:
    return sum(raw.get(key) or 0 for key in NEXTN if key in family.fixed)


def _config(family: Family, raw: Json, mtp: bool) -> DecoderConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    values = dict(family.constants)
    for key, ours in family.fields.items():
        values[ours] = family.null[key] if raw[key] is None else raw[key]
    if _rope_type(rope) == "yarn":
        absent = {"mscale_all_dim": 0.0}  # plain YaRN scales cosines and sines but not the softmax
        given = {ours: rope[key] for key, ours in YARN.items() if rope.get(key) is not None}
        values["attention.rope.yarn"] = Yarn(**absent | given)
    thetas = (where["rope_theta"] for where in (rope, raw) if where.get("rope_theta") is not None)
    values["attention.rope.theta"] = next(thetas, family.theta)
    values["mtp_layers"] = _num_mtp(family, raw) if mtp else 0
    return _built(family, values)


def _fixed_otherwise(family: Family, raw: Json, words: Mapping[str, str] = {}) -> list[str]:
    """Fields of values that fmoe can't compute, in their words or others."""
    return [
        f"{words.get(key, key)}={raw[key]!r}, not {' or '.join(map(repr, allowed))}"
        for key, allowed in _fixed(family, raw).items()
        if ... not in allowed and raw.get(key, allowed[0]) not in allowed
    ]


def export_config(config: DecoderConfig, model_type: str | None = None) -> Json:
    """The ``config.json`` of a configuration, by default as the first family that can express it.

    Raises ``ValueError`` listing everything that the family, or the one that comes closest, can't express.
    """
    if model_type is not None and model_type not in FAMILIES:
        expected = f"one of {sorted(FAMILIES)}"
        raise argument_error("huggingface.save", "model_type", got=repr(model_type), expected=expected)
    tried = []
    for kind in FAMILIES if model_type is None else [model_type]:
        if isinstance(config.attention, FAMILIES[kind].attention):
            raw = _exported(kind, config)
            if not (wrong := _inexpressible(raw, kind, config)):
                return raw
            tried.append((wrong, FAMILIES[kind].architecture))
    if not tried:
        tried = [([f"an attention that is {type(config.attention).__name__}"], "any family")]
    wrong, architecture = min(tried, key=lambda pair: len(pair[0]))
    got, expected = "; ".join(wrong), f"what {architecture} can express"
    remedy = "Keep such a model in fmoe's own checkpoints."
    raise argument_error("huggingface.save", "config", got=got, expected=expected, remedy=remedy)


def _exported(kind: str, config: DecoderConfig) -> Json:
    family, yarn = FAMILIES[kind], config.attention.rope.yarn
    raw: Json = {"architectures": [family.architecture], "model_type": kind}
    for key, ours in family.fields.items():
        value: Any = config
        for name in ours.split("."):
            value = getattr(value, name)
        raw[key] = None if key in family.null and value == family.null[key] else value
    raw |= family.written(config)
    raw |= {key: allowed[0] for key, allowed in _fixed(family, raw).items() if key not in raw}
    raw |= {key: config.mtp_layers for key in NEXTN if key in family.fixed}
    raw["rope_theta"], raw["rope_scaling"] = config.attention.rope.theta, None
    if yarn:
        raw["rope_scaling"] = {key: getattr(yarn, ours) for key, ours in YARN.items()} | {"type": "yarn"}
    return raw


def _inexpressible(raw: Json, kind: str, config: DecoderConfig) -> list[str]:
    """What of a configuration is lost on the way out and back in."""
    family = FAMILIES[kind]
    raw = family.read({**family.absent, **raw})
    lost = _fixed_otherwise(family, raw, family.fields)
    try:
        back = _config(family, raw, mtp=True)
    except ValueError as error:
        return [*lost, str(error)]
    pairs = zip(_fields(_canonical(config)), _fields(_canonical(back)))
    lost += [f"{name}={value!r}, not {found!r}" for (name, value), (_, found) in pairs if value != found]
    return lost + family.wrong(config)


def _canonical(config: DecoderConfig) -> DecoderConfig:
    """Groups are none if all of them are chosen, and a loss isn't part of a published model."""
    config, r = dataclasses.replace(config, balance_loss=0.0), config.router
    if r.top_groups < r.num_groups:
        return config
    router = dataclasses.replace(r, num_groups=1, top_groups=1, group_best=1)
    return dataclasses.replace(config, router=router)


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        inner, path = getattr(value, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(inner) and not isinstance(inner, Yarn):
            yield from _fields(inner, path + ".")
        else:
            yield path, inner


# ---- the parts of a configuration ------------------------------------------------------------------


def _parts(family: Family) -> dict[str, type]:
    return {
        "": DecoderConfig,
        "attention.": family.attention,
        "attention.rope.": Rotary,
        "router.": RouterConfig,
    }


def _built(family: Family, values: Mapping[str, Any]) -> DecoderConfig:
    """A configuration from values by dotted names."""
    made: dict[str, Any] = dict(values)
    for prefix, make in reversed(_parts(family).items()):
        names = [field.name for field in dataclasses.fields(make) if prefix + field.name in made]
        made[prefix.removesuffix(".")] = make(**{name: made[prefix + name] for name in names})
    config: DecoderConfig = made[""]
    return config


def _types(family: Family) -> dict[str, Any]:
    kinds = {
        prefix + field.name: field.type
        for prefix, part in _parts(family).items()
        for field in dataclasses.fields(part)
    }
    return {theirs: kinds[ours] for theirs, ours in family.fields.items() if isinstance(kinds[ours], type)}


def _fixed(family: Family, raw: Json) -> dict[str, tuple[Any, ...]]:
    return {
        key: tuple(value(raw) if callable(value) else value for value in allowed)
        for key, allowed in family.fixed.items()
    }


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
    if (form := given.get("scale_fmt")) not in (None, "float", "ue8m0"):
        wrong.append(f"scale_fmt={form!r}, not 'float' or 'ue8m0'")
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
    known = {*ROPE_TYPES, "rope_type", "type", "partial_rotary_factor"}
    harmless = {"attention_factor": None, "truncate": True}
    wrong = [f"YaRN's {key} missing" for key in needed if rope.get(key) is None]
    odd = {key: value for key, value in rope.items() if key not in known and harmless.get(key, ...) != value}
    return wrong + [f"YaRN's {key}={value!r}" for key, value in odd.items()]


def _error(wrong: list[str], remedy: str | None = None) -> ValueError:
    got, expected = "; ".join(wrong), "a model that fmoe computes exactly"
    return argument_error("huggingface.load", "config.json", got=got, expected=expected, remedy=remedy)
