"""Multi-head latent attention, whose keys and values go through one low-rank bottleneck.

Shape letters beyond those of ``fmoe/ops``: B sequences, L positions, H heads. N and R are the dimensions of a
head's query and key without and with position. V is the dimension of its value.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from ..ops.attention import causal_attention
from ..ops.core.axes import present
from ..ops.core.dynamo import rearrange, repeat
from ..ops.linear import linear
from ..ops.segments import Segments
from ..parallel.collectives import psum
from ..params import P, param
from .checks import check_sizes
from .moe import FSDP
from .norm import norm_spec, rms_norm
from .rotary import Angles, Rotary

LATENT_NORM_EPS = 1e-6  # published models have this one, whatever their other norms have


class LowRankQuery(NamedTuple):
    """Queries through a bottleneck of their own: ``down`` (r, D), ``norm`` (r,), ``up`` (H * (N + R), r)."""

    down: torch.Tensor
    norm: torch.Tensor
    up: torch.Tensor


class MLAParams(NamedTuple):
    """``query`` is one matrix (H * (N + R), D) or a :class:`LowRankQuery`.

    ``kv_down`` (C + R, D) gives the latent and the one rotary key that all heads share. ``kv_norm`` is (C,).
    ``kv_up`` (H * (N + V), C) gives each head's key and value. ``out`` is (D, H * V).
    """

    query: torch.Tensor | LowRankQuery
    kv_down: torch.Tensor
    kv_norm: torch.Tensor
    kv_up: torch.Tensor
    out: torch.Tensor


@dataclasses.dataclass(frozen=True)
class MLA:
    """Sizes of a multi-head latent attention. A ``q_lora_rank`` of 0 means queries without a bottleneck.

    ``rope.dim`` is R. Raises ``ValueError`` for sizes below one.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

    >>> MLA(num_heads=4, kv_lora_rank=64, qk_nope_head_dim=16, v_head_dim=32, rope=Rotary(dim=8)).widths
    (24, 32)
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope: Rotary
    q_lora_rank: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, least={"q_lora_rank": 0})

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def widths(self) -> tuple[int, int]:
        """The dimensions of a head's query and key, and of its value."""
        return self.qk_nope_head_dim + self.rope.dim, self.v_head_dim

    @property
    def scale(self) -> float:
        """``(N + R) ** -0.5``, which YaRN changes."""
        return self.widths[0] ** -0.5 * self.rope.softmax_factor

    def specs(self, dim: int) -> MLAParams:
        """Shapes, initial values and placement of the parameters in a model of this dimension."""
        queries, latent = self.num_heads * self.widths[0], self.kv_lora_rank
        query: Any = param((queries, dim), P("tp", FSDP))
        if r := self.q_lora_rank:
            down, up = param((r, dim), P(None, FSDP)), param((queries, r), P("tp", FSDP))
            query = LowRankQuery(down, norm_spec(r), up)
        return MLAParams(
            query,
            param((latent + self.rope.dim, dim), P(None, FSDP)),
            norm_spec(latent),
            param((self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), latent), P("tp", FSDP)),
            param((dim, self.num_heads * self.v_head_dim), P(FSDP, "tp")),
        )

    def forward(
        self,
        params: MLAParams,
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
        nope, eps = self.qk_nope_head_dim, LATENT_NORM_EPS
        project = functools.partial(linear, precision=precision)
        if isinstance(params.query, LowRankQuery):
            down, norm, up = params.query
            q = project(rms_norm(project(x, down), norm, eps), up)
        else:
            q = project(x, params.query)
        q = rearrange(q, "B L (H head) -> B L H head", head=self.widths[0])  # the heads held here
        q_nope, q_rope = q.split([nope, self.rope.dim], -1)
        latent, k_rope = project(x, params.kv_down).split([self.kv_lora_rank, self.rope.dim], -1)
        kv = project(rms_norm(latent, params.kv_norm, eps), params.kv_up)
        kv = rearrange(kv, "B L (H head) -> B L H head", H=q.shape[2])
        k_nope, v = kv.split([nope, self.v_head_dim], -1)
        k_rope = repeat(self.rope.turn(k_rope[:, :, None], table), "B L 1 R -> B L H R", H=q.shape[2])
        q, k = torch.cat([q_nope, self.rope.turn(q_rope, table)], -1), torch.cat([k_nope, k_rope], -1)
        y = causal_attention(q, k, v, self.scale, segments)
        return psum(project(rearrange(y, "B L H V -> B L (H V)"), params.out), present("tp"))
