"""Keys of the noise of a model's routers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..ops.random import fold_in
from .params import LayerParams


class Noise(NamedTuple):
    """What a router's noise is drawn from: a key (2,), and the tokens' places in the batch (B, L)."""

    key: torch.Tensor
    places: torch.Tensor


class Keyed(NamedTuple):
    """A layer's params, and the key of its noise."""

    params: LayerParams
    key: torch.Tensor


def keyed(
    layers: Sequence[Any], noise: Noise | tuple[()], first: int = 0
) -> tuple[list[Any], torch.Tensor | tuple[()]]:
    """The layers that are held, and the places of tokens: layer ``i`` has the key ``first + i``.

    A key is a tensor, so that one compiled function serves all layers.
    """
    if not isinstance(noise, Noise):
        return [*filter(None, layers)], ()
    keys = fold_in(noise.key, torch.arange(first, first + len(layers), device=noise.places.device))
    return [Keyed(held, key) for held, key in zip(layers, keys.unbind()) if held], noise.places
