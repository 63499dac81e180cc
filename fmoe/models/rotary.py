"""Rotary positions: pairs of a head's dimensions, turned by angles that grow with the position."""

import dataclasses
import math
from typing import NamedTuple

import torch

from ..errors import argument_error
from ..ops.core.dynamo import rearrange
from ..ops.segments import Segments


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched to a context longer than the one trained on (YaRN, arXiv 2309.00071).

    ====================  ========================================
    factor                how many times longer the context becomes
    original_max_seq_len  positions of the original context
    beta_fast             pairs that turn at least this often there keep their frequency
    beta_slow             pairs that turn at most this often there are slowed by ``factor``
    mscale                multiplies cosines and sines by ``magnitude(mscale)``
                          over ``magnitude(mscale_all_dim)``
    mscale_all_dim        multiplies the softmax's scale by ``magnitude(mscale_all_dim)`` squared
    ====================  ========================================

    Raises ``ValueError`` for numbers out of range. With ``mscale_all_dim`` 0, ``mscale`` must be 1, since the
    two published implementations disagree about other values.

    >>> round(Yarn(factor=40, original_max_seq_len=4096).magnitude(0.707), 4)
    1.2608
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("factor", self.factor >= 1, "at least 1"),
            ("original_max_seq_len", self.original_max_seq_len >= 1, "at least 1"),
            ("beta_slow", 0 < self.beta_slow <= self.beta_fast, f"above 0, to beta_fast={self.beta_fast}"),
            ("mscale", self.mscale > 0, "above 0"),
            ("mscale_all_dim", self.mscale_all_dim > 0 or self.mscale == 1, "above 0, or 0 with mscale=1"),
        ):
            if not ok:
                raise argument_error("Yarn", name, got=getattr(self, name), expected=expected)

    def magnitude(self, mscale: float) -> float:
        """The growth of attention's logits with the length of the context."""
        return 0.1 * mscale * math.log(self.factor) + 1


class Angles(NamedTuple):
    """Cosines and sines of rotary positions, float32 (L, dim / 2) or (B, L, dim / 2), times YaRN's factor."""

    cos: torch.Tensor
    sin: torch.Tensor

    def at(self, positions: torch.Tensor) -> "Angles":
        """Those of ``positions``, an integer tensor of any shape."""
        return Angles(self.cos[positions], self.sin[positions])


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which dimensions of a head turn, and how fast.

    ===========  ========================================
    dim          the first so many dimensions turn, and the rest have no position
    theta        the slowest pair turns by nearly ``1 / theta`` a position
    interleaved  pairs are (0, 1), (2, 3), ... instead of (0, dim / 2), (1, dim / 2 + 1), ...
    yarn         stretches positions
    ===========  ========================================

    Raises ``ValueError`` for a ``dim`` that isn't a positive even number, and a ``theta`` of at most 1.

    >>> Rotary(dim=4).table(3).cos.shape
    torch.Size([3, 2])
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if type(self.dim) is not int or self.dim < 2 or self.dim % 2:
            remedy = "Rotary positions turn pairs."
            raise argument_error("Rotary", "dim", got=self.dim, expected="an even number", remedy=remedy)
        if not self.theta > 1:
            raise argument_error("Rotary", "theta", got=self.theta, expected="above 1")

    @property
    def softmax_factor(self) -> float:
        """What YaRN multiplies the softmax's scale by: the square of ``magnitude(mscale_all_dim)``."""
        return self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2 if self.yarn else 1.0

    def table(self, length: int, device: torch.device | str | None = None) -> Angles:
        """Angles of positions 0 to ``length`` - 1, computed in float32 whatever the model's dtype."""
        position = torch.arange(length, dtype=torch.float32, device=device)
        angle, yarn = torch.outer(position, self.frequencies(device)), self.yarn
        factor = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim) if yarn else 1.0
        return Angles(angle.cos() * factor, angle.sin() * factor)

    def frequencies(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Radians per position of each pair, float32 (dim / 2,).

        YaRN keeps the pairs that turn at least ``beta_fast`` times in the original context. It slows those
        that turn at most ``beta_slow`` times by ``factor``, and goes linearly from one to the other.

        Source: YaRN, arXiv 2309.00071, section 3.2, with the bounds rounded outwards as DeepSeek published.
        """
        size, yarn = self.dim, self.yarn
        index = torch.arange(size // 2, dtype=torch.float32, device=device)
        period = self.theta ** (2 * index / size)
        if yarn is None:
            return 1 / period

        def pair(turns: float) -> float:
            """The (fractional) pair that turns this often in the original context."""
            per_radian = yarn.original_max_seq_len / (2 * math.pi * turns)
            return size * math.log(per_radian) / (2 * math.log(self.theta))

        first = max(math.floor(pair(yarn.beta_fast)), 0)
        last = min(math.ceil(pair(yarn.beta_slow)), size - 1)
        slow = ((index - first) / (last - first or 0.001)).clamp(0, 1)
        return (1 - slow) / period + slow / (yarn.factor * period)

    def turn(self, x: torch.Tensor, table: Angles) -> torch.Tensor:
        """``x`` (B, L, H, N) with its first ``dim`` dimensions turned, by float32 angles, in its own dtype.

        The pairs' first members come out first, then the second ones. Queries and keys agree on this order.
        """
        cos, sin = (rearrange(angle, "... R -> ... 1 R").to(x.dtype) for angle in table)
        turning = x[..., : self.dim]
        pairs = "B L H (R pair) -> pair B L H R" if self.interleaved else "B L H (pair R) -> pair B L H R"
        a, b = rearrange(turning, pairs, pair=2)
        still = [x[..., self.dim :]] if self.dim < x.shape[-1] else []
        return torch.cat([a * cos - b * sin, b * cos + a * sin, *still], -1)


def angles(rope: Rotary, x: torch.Tensor, segments: Segments | tuple[()] = ()) -> Angles:
    """Those of the positions of ``x`` (B, L, ...), which begin again in every segment."""
    table = rope.table(x.shape[1], x.device)
    if isinstance(segments, Segments):
        table = table.at(torch.arange(x.shape[1], device=x.device) - segments.first)
    return table
