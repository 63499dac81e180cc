"""Multi-token prediction: modules after the last layer, each of which predicts one token further.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.2. The published weights have one module. In its projection
the embedding comes first, unlike in equation 21. Its input is what the model gives its head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops.core.dtypes import accumulator
from ..ops.linear import linear
from ..ops.precision import Recipe
from ..ops.segments import Segments, shortened
from ..parallel.placement import use
from ..parallel.stack import stack
from .config import DecoderConfig
from .noise import Noise, keyed
from .norm import rms_norm
from .params import MTPParams
from .rotary import angles
from .vocabulary import IGNORED, embed, summed_cross_entropy


class Further(NamedTuple):
    """Sums that the modules compute, on this device alone.

    ==========  ================================================================
    ``total``   the sum of their cross entropies
    ``uneven``  how uneven loads are (B,)
    ``layers``  :func:`stats_sums` of each one's MoE layer
    ==========  ================================================================
    """

    total: torch.Tensor
    uneven: torch.Tensor
    layers: list[torch.Tensor]


def predict_further(
    modules: tuple[MTPParams, ...],
    x: torch.Tensor,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    *,
    layer: Callable[..., Any],
    embedding: torch.Tensor,
    head: torch.Tensor,
    segments: Segments | tuple[()],
    noise: Noise | tuple[()],
    logits_bytes: int,
    recipe: Recipe,
) -> Further:
    """The cross entropies of tokens after the next, from what the model gives its head, ``x`` (B, L, D).

    Module ``k`` has the positions with a token ``k`` places later in their segment. It predicts that token's
    target.
    """
    eps, length = config.norm_eps, x.shape[1]
    total = x.new_zeros((), dtype=accumulator(x.dtype))
    uneven = x.new_zeros((x.shape[0],), dtype=total.dtype)
    sums: list[torch.Tensor] = []
    later = embed(tokens, embedding)
    for k, module in enumerate(modules, 1):
        own: Any = use(module._replace(layer=()))  # type: ignore[arg-type]
        short = max(length - k, 0)
        ids, within = targets[:, length - short :], segments
        if isinstance(segments, Segments):
            within = shortened(segments, k)
            ids = torch.where(within.valid, ids, IGNORED)
        embedded = rms_norm(later[:, length - short :], own.embedding_norm, eps)
        x = rms_norm(x[:, :short], own.hidden_norm, eps)
        x = linear(torch.cat([embedded, x], -1), own.proj, precision=recipe.dense)
        drawn = noise._replace(places=noise.places[:, :short]) if isinstance(noise, Noise) else ()
        layers, places = keyed([module.layer], drawn, first=config.num_layers + k - 1)
        table = angles(config.attention.rope, x, within)
        x, ((counted, balances),) = stack(layer, layers, x, table, config, within, places, recipe)
        x = rms_norm(x, own.norm, eps)
        total = total + summed_cross_entropy(x, head, ids, logits_bytes=logits_bytes)[0]
        uneven, sums = sum(balances, uneven), [*sums, *counted]
    return Further(total, uneven, sums)
