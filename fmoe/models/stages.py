"""The model on one device, inside :func:`fmoe.shard_map`: all of it, or a stage of a pipeline.

The params say which. A stage has some of the layers. The first stage has the embedding and takes tokens. A
later one takes the output of the stage before it. The last has the norm and the head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ops.balance import MoEStats, moe_stats
from ..ops.core.axes import present
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.experts import ExpertParams
from ..parallel.collectives import psum
from ..parallel.placement import Moves, moved, moves
from .attention import Rope, attention_forward, rms_norm, rope_table
from .config import DeepSeekV3Config
from .moe import mlp_forward, moe_layer
from .params import LayerParams, ModelParams
from .vocabulary import embed, summed_cross_entropy

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Stats = tuple[MoEStats, ...]


def stage_loss(
    params: ModelParams,
    x: torch.Tensor,
    targets: torch.Tensor,
    config: DeepSeekV3Config,
    how: Any,
    along: tuple[str, ...],
    per_layer: Wrap,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[torch.Tensor, Stats]:
    """The mean cross entropy or, unless the stage is the last, the input of the next."""
    x, stats = hidden(params, x, config, how, along, per_layer)
    if isinstance(params.norm, tuple):
        return x, stats
    total, count = summed_cross_entropy(x, head(params, how), targets, logits_bytes=logits_bytes)
    total, count = psum(torch.stack([total, count.to(total.dtype)]), along).unbind()
    return total / count.clamp_min(1), stats


def hidden(
    params: ModelParams,
    x: torch.Tensor,
    config: DeepSeekV3Config,
    how: Any,
    along: tuple[str, ...],
    per_layer: Wrap,
) -> tuple[torch.Tensor, Stats]:
    """The last layer's output (B, L, D), normalised if there is a norm.

    ``x`` is tokens (B, L) or a layer's output. ``how`` holds the params' moves, and ``along`` the axes that
    tokens lie along.
    """
    rope = rope_table(config, x.shape[1], x.device)
    if not x.is_floating_point():
        x = embed(x, moved(params.embedding, how.embedding))
    # One function for all layers, so that a wrapper such as a compiler sees only one.
    layer = per_layer(one_layer)
    stats: list[MoEStats] = []
    for layer_params, moves_of_layer in zip(params.layers, how.layers):
        x, found = layer(layer_params, x, rope, config, moves_of_layer, along)
        stats += found
    if not isinstance(params.norm, tuple):
        x = rms_norm(x, moved(params.norm, how.norm), config.norm_eps)
    return x, tuple(stats)


def head(params: ModelParams, how: Any) -> torch.Tensor:
    """The matrix (vocab, D) whose products with hidden states are logits."""
    if isinstance(params.head, torch.Tensor):
        return moved(params.head, how.head)
    return moved(params.embedding, how.embedding)


def one_layer(
    params: LayerParams,
    x: torch.Tensor,
    rope: Rope,
    config: DeepSeekV3Config,
    how: Moves = (),
    along: tuple[str, ...] = (),
) -> tuple[torch.Tensor, Stats]:
    params, eps = moved(params, how), config.norm_eps
    x = x + attention_forward(params.attention, rms_norm(x, params.attention_norm, eps), rope, config)
    normed = rms_norm(x, params.mlp_norm, eps)
    if isinstance(params.mlp, ExpertParams):
        return x + psum(mlp_forward(params.mlp, normed), present("tp")), ()
    y, routing = moe_layer(params.mlp, normed, config.router)
    return x + y, (moe_stats(routing, lambda t: psum(t, along)),)


def moves_of(
    function: str, params: ModelParams, have: ModelParams, wanted: ModelParams, mesh: DeviceMesh
) -> ModelParams:
    """The moves of all parameters. Those of a layer are grouped, since the layer applies them."""

    def of(name: str, trees: tuple[Any, Any, Any]) -> Moves:
        return moves(function, f"params.{name}", *trees, mesh)

    parts: dict[str, Any] = dict(zip(ModelParams._fields, zip(params, have, wanted)))
    layers: Any = [of(f"layers.{i}", trees) for i, trees in enumerate(zip(*parts.pop("layers")))]
    how: dict[str, Any] = {name: of(name, trees) for name, trees in parts.items()}
    return ModelParams(layers=layers, **how)
