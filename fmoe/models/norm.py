"""Root mean square normalisation."""

from typing import Any

import torch

from ..ops.core.dtypes import accumulator
from ..parallel.collectives import axis_size, psum
from ..params import P, param


def norm_spec(size: int, place: P = P(None)) -> Any:  # noqa: B008  (frozen)
    return param((size,), place, init="ones")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, along: tuple[str, ...] = ()) -> torch.Tensor:
    """``x / rms(x) * weight``, with the root mean square in float32 or wider.

    ``along`` names the axes that the last dimension of ``x`` and ``weight`` is cut along.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
    tensor([0.8485, 1.1314])
    """
    wide = x.to(accumulator(x.dtype))
    square = wide.pow(2).mean(-1, keepdim=True)
    if axis_size(along) > 1:
        square = psum(square, along) / axis_size(along)
    return (wide * torch.rsqrt(square + eps)).to(x.dtype) * weight
