"""Grouped-query attention, in which several heads of queries share a head of keys and values.

B sequences, L positions, H heads of queries, G of keys and values, N dimensions of a head.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..errors import argument_error
from ..ops.attention import causal_attention
from ..ops.core.axes import present
from ..ops.core.dynamo import rearrange
from ..ops.linear import linear
from ..ops.segments import Segments
from ..parallel.collectives import psum
from ..params import P, param
from .checks import check_sizes
from .moe import FSDP
from .norm import norm_spec, rms_norm
from .rotary import Angles, Rotary

Norm = Literal["none", "head", "all"]
Bias = Literal["none", "qkv", "all"]


class Projection(NamedTuple):
    """``weight`` (heads * N, D). ``bias`` is (heads * N,), and ``norm`` (N,) or (heads * N,), or ``()``."""

    weight: torch.Tensor
    bias: torch.Tensor | tuple[()] = ()
    norm: torch.Tensor | tuple[()] = ()


class GQAParams(NamedTuple):
    """Projections to queries, keys and values. That of ``out`` has a weight (D, H * N) and a bias (D,)."""

    query: Projection
    key: Projection
    value: Projection
    out: Projection


@dataclasses.dataclass(frozen=True)
class GQA:
    """Sizes of a grouped-query attention. With as many heads of keys as of queries it is a plain one.

    ============  ====================================================================
    num_kv_heads  G, a divisor of ``num_heads``
    rope          its ``dim`` may be less than ``head_dim``
    qk_norm       whether queries and keys are normalised: by ``"head"``, over ``"all"`` heads, or ``"none"``
    bias          which projections add one: ``"qkv"``, ``"all"`` four, or ``"none"``
    ============  ====================================================================

    Raises ``ValueError`` for sizes that don't fit together.

    >>> GQA(num_heads=4, num_kv_heads=2, head_dim=8, rope=Rotary(dim=8)).widths
    (8, 8)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rotary
    qk_norm: Norm = "none"
    bias: Bias = "none"

    def __post_init__(self) -> None:
        check_sizes(self, least={})
        for name, fits, expected in (
            ("num_kv_heads", self.num_heads % self.num_kv_heads == 0, f"a divisor of {self.num_heads} heads"),
            ("rope.dim", self.rope.dim <= self.head_dim, f"at most head_dim={self.head_dim}"),
            ("qk_norm", self.qk_norm in get_args(Norm), f"one of {get_args(Norm)}"),
            ("bias", self.bias in get_args(Bias), f"one of {get_args(Bias)}"),
        ):
            if not fits:
                got = self.rope.dim if name == "rope.dim" else repr(getattr(self, name))
                raise argument_error("GQA", name, got=got, expected=expected)

    @property
    def widths(self) -> tuple[int, int]:
        """The dimensions of a head's query and key, and of its value."""
        return self.head_dim, self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 * self.rope.softmax_factor

    def specs(self, dim: int) -> GQAParams:
        """Shapes, initial values and placement of the parameters in a model of this dimension."""

        def projection(heads: int, qk_norm: Norm = "none") -> Projection:
            rows = heads * self.head_dim
            bias: Any = () if self.bias == "none" else param((rows,), P("tp"), init="zeros")
            norm: Any = {"none": (), "head": norm_spec(self.head_dim), "all": norm_spec(rows, P("tp"))}
            return Projection(param((rows, dim), P("tp", FSDP)), bias, norm[qk_norm])

        out: Any = param((dim, self.num_heads * self.head_dim), P(FSDP, "tp"))
        bias: Any = param((dim,), P(None), init="zeros") if self.bias == "all" else ()
        return GQAParams(
            projection(self.num_heads, self.qk_norm),
            projection(self.num_kv_heads, self.qk_norm),
            projection(self.num_kv_heads),
            Projection(out, bias),
        )

    def forward(
        self,
        params: GQAParams,
        x: torch.Tensor,
        table: Angles,
        norm_eps: float,
        segments: Segments | tuple[()] = (),
        precision: str | None = None,
    ) -> torch.Tensor:
        """``x`` (B, L, D) -> (B, L, D), with heads that may be cut along ``tp``.

        With ``segments``, a position sees its own only, and ``table`` is of its place in there. ``precision``
        is that of projections.
        """

        def heads(projection: Projection) -> torch.Tensor:
            weight, bias, norm = projection
            y = linear(x, weight, given(bias), precision)
            if self.qk_norm == "all" and isinstance(norm, torch.Tensor):
                y = rms_norm(y, norm, norm_eps, present("tp"))
            y = rearrange(y, "B L (heads N) -> B L heads N", N=self.head_dim)
            if self.qk_norm == "head" and isinstance(norm, torch.Tensor):
                y = rms_norm(y, norm, norm_eps)
            return y

        q, k, v = (heads(projection) for projection in params[:3])
        q, k = self.rope.turn(q, table), self.rope.turn(k, table)
        y = causal_attention(q, k, v, self.scale, segments)
        y = linear(rearrange(y, "B L H N -> B L (H N)"), params.out.weight, precision=precision)
        y = psum(y, present("tp"))
        bias = given(params.out.bias)
        return y if bias is None else y + bias


def given(value: torch.Tensor | tuple[()]) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) else None
