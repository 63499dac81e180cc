"""Families of published models: each is a module of tables, and a line here."""

import dataclasses
from typing import Any

from ...errors import argument_error
from ..config import DecoderConfig
from . import deepseek, glm4_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from . import family as family  # for those who add one

PRESETS: dict[str, DecoderConfig] = {
    **deepseek.PRESETS,
    **glm4_moe.PRESETS,
    **mixtral.PRESETS,
    **olmoe.PRESETS,
    **qwen2_moe.PRESETS,
    **qwen3_moe.PRESETS,
}
FAMILIES: dict[str, family.Family] = {
    **deepseek.FAMILIES,
    **glm4_moe.FAMILIES,
    **mixtral.FAMILIES,
    **olmoe.FAMILIES,
    **qwen2_moe.FAMILIES,
    **qwen3_moe.FAMILIES,
}


def preset(name: str, *, layers: int | None = None, **sizes: int | None) -> DecoderConfig:
    """A published configuration by name, or ``debug``, a small DeepSeek-V3.

    ===========  ==========================================
    DeepSeek     ``16B`` (V2-Lite), ``236B`` (V2), ``671B`` (V3)
    Kimi         ``Kimi-K2``
    Qwen3-MoE    ``30B-A3B``, ``235B-A22B``
    Qwen2-MoE    ``Qwen1.5-MoE-A2.7B``, ``Qwen2-57B-A14B``
    GLM          ``GLM-4.5``, ``GLM-4.5-Air``
    OLMoE        ``OLMoE-1B-7B``
    Mixtral      ``Mixtral-8x7B``, ``Mixtral-8x22B``
    ===========  ==========================================

    With ``layers`` it has only so many, one of them dense if any is. ``sizes`` are other fields of
    :class:`~fmoe.models.config.DecoderConfig` to replace, unless they are ``None``.

    Raises ``ValueError`` for any other name, and for more layers than the model has.

    >>> preset("debug").num_experts, preset("671B", layers=4).num_dense_layers
    (16, 1)
    >>> preset("30B-A3B", dim=64, vocab_size=None).dim
    64
    """
    if name not in PRESETS:
        raise argument_error("preset", "name", got=repr(name), expected=f"one of {sorted(PRESETS)}")
    whole = PRESETS[name]
    given: dict[str, Any] = {field: size for field, size in sizes.items() if size is not None}
    if layers is not None:
        if not 1 <= layers <= whole.num_layers:
            expected, remedy = f"1 to {whole.num_layers}, as {name} has", "Leave it out for all of them."
            raise argument_error("preset", "layers", got=layers, expected=expected, remedy=remedy)
        given |= dict(num_layers=layers, num_dense_layers=min(1, whole.num_dense_layers))
    return dataclasses.replace(whole, **given)
