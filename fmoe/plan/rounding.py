"""Weights that products round to fp8, as ``fmoe.ops.kernels.scaled`` keeps them over micro-batches."""

import math
from typing import Any, NamedTuple

import torch

from ..ops.precision import FAST


class Rounds(NamedTuple):
    """Which arguments of an operator are its weight and its precision, and which dimensions are summed over.

    The numbers of a weight that a product sums over share a scale.
    """

    weight: int
    precision: int
    summed: tuple[int, ...]


_UP_BACKWARD, _DOWN_BACKWARD = Rounds(2, 8, (1, 2)), Rounds(2, 8, (1,))

ROUNDS = {
    "fmoe::scaled_grouped_mm": Rounds(1, 3, (1,)),  # (e, I, O)
    "fmoe::experts_up": Rounds(1, 7, (3,)),  # (e, 2, F, D)
    "fmoe::experts_up_backward": _UP_BACKWARD,
    "fmoe::experts_up_backward_inputs": _UP_BACKWARD,
    "fmoe::experts_down": Rounds(1, 7, (2,)),  # (e, D, F)
    "fmoe::experts_down_backward": _DOWN_BACKWARD,
    "fmoe::experts_down_backward_inputs": _DOWN_BACKWARD,
}


class Rounded(NamedTuple):
    """A weight, and the dimensions that the numbers which share a scale lie along."""

    weight: torch.Tensor
    summed: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers in fp8, and of their scales in float32."""
        numbers = self.weight.numel()
        return numbers + 4 * numbers // math.prod(self.weight.shape[dim] for dim in self.summed)

    @property
    def passed(self) -> int:
        """Bytes that a kernel reads and writes to round it."""
        return self.weight.numel() * (self.weight.element_size() + 1)


def rounded_by(name: str, args: Any) -> Rounded | None:
    """The weight that an operator rounds, if its kernels compute in fp8."""
    if name not in ROUNDS:
        return None
    weight, precision, summed = ROUNDS[name]
    return Rounded(args[weight], summed) if args[precision] in FAST else None
