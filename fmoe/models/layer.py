"""A decoder's layer on one device: attention, then experts or a dense layer."""

from typing import Any

import torch

from ..ops.balance import balance_loss, stats_sums
from ..ops.core.axes import present
from ..ops.core.derive import Tensors
from ..ops.experts import ExpertParams
from ..ops.precision import Recipe
from ..ops.random import fold_in
from ..ops.segments import Segments, halves_of
from ..ops.transport import in_halves
from ..parallel.collectives import psum
from ..parallel.placement import use
from .config import DecoderConfig
from .moe import Begun, MoEParams, begin_layer, end_layer, experts_of, mlp_forward, send_layer
from .noise import Keyed
from .norm import rms_norm
from .params import LayerParams
from .rotary import Angles


def one_layer(
    params: Any,  # LayerParams, or Keyed
    x: torch.Tensor,
    table: Angles,
    config: DecoderConfig,
    segments: Segments | tuple[()] = (),
    places: torch.Tensor | tuple[()] = (),
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
) -> tuple[torch.Tensor, Tensors, Tensors]:
    """The layer's output, what it counted if it has experts, and with ``config.balance_loss`` that (B,)."""
    keys: torch.Tensor | tuple[()] = ()
    if isinstance(params, Keyed):
        params, key = params
        if isinstance(params.mlp, MoEParams) and isinstance(places, torch.Tensor):
            keys = fold_in(key, places)
    params = use(params)
    if isinstance(params.mlp, ExpertParams):
        x, normed = _attended(params, x, table, config, segments, recipe.dense)
        return x + psum(mlp_forward(params.mlp, normed, recipe.dense), present("tp")), (), ()
    # In halves, one's rows are on their way while the other computes. What a half launches comes before what
    # waits for the rows of the other, here and, in reverse, in the backward.
    parts = _halves(x, table, segments, keys) if in_halves("ep") else [(x, table, segments, keys)]
    before: list[torch.Tensor] = []
    begun: list[Begun] = []
    for x, table, segments, keys in parts:
        x, normed = _attended(params, x, table, config, segments, recipe.dense)
        before.append(x)
        begun = [send_layer(half) for half in begun]
        valid = segments.valid if isinstance(segments, Segments) else ()
        begun.append(begin_layer(params.mlp, normed, config.router, valid, keys))
    for i in range(len(begun)):
        begun = experts_of(params.mlp, begun, i, recipe)
    made = [end_layer(params.mlp, half, recipe) for half in begun]
    y = [x + y for x, (y, _, _) in zip(before, made)]
    sums = [stats_sums(routing, overflow) for _, routing, overflow in made]
    sequences = [(half.routing, len(x)) for half, x in zip(begun, before) if config.balance_loss]
    uneven = [balance_loss(routing, number) for routing, number in sequences if number or len(begun) == 1]
    if len(made) > 1:
        y, sums, uneven = [torch.cat(y)], [torch.stack(sums).sum(0)], [torch.cat(uneven)] if uneven else []
    return y[0], (sums[0],), (*uneven,)


def _attended(
    params: LayerParams,
    x: torch.Tensor,
    table: Angles,
    config: DecoderConfig,
    segments: Segments | tuple[()],
    precision: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` with the attention added, and the same normalised for what follows."""
    eps = config.norm_eps
    within_segments = (segments,) if isinstance(segments, Segments) else ()
    normed = rms_norm(x, params.attention_norm, eps)
    of_products: dict[str, Any] = {} if precision is None else {"precision": precision}
    x = x + config.attention.forward(params.attention, normed, table, eps, *within_segments, **of_products)
    return x, rms_norm(x, params.mlp_norm, eps)


def _halves(
    x: torch.Tensor, table: Angles, segments: Segments | tuple[()], keys: torch.Tensor | tuple[()]
) -> list[tuple[Any, ...]]:
    """Halves of a device's sequences, the second of which may have none."""
    sizes = [rows := (x.shape[0] + 1) // 2, x.shape[0] - rows]
    tables = [table] * 2
    if table.cos.dim() > 2:  # positions begin again in every segment
        tables = [Angles(*angles) for angles in zip(*(t.split(sizes) for t in table))]
    parts: Any = halves_of(segments, rows) if isinstance(segments, Segments) else [()] * 2
    drawn: Any = keys.split(sizes) if isinstance(keys, torch.Tensor) else [()] * 2
    return [*zip(x.split(sizes), tables, parts, drawn)]
