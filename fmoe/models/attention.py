"""Multi-head latent attention, whose keys and values go through one low-rank bottleneck.

Shape letters beyond those of ``fmoe/ops``: B sequences, L positions, H heads. N and R are the dimensions of a
head's query and key without and with position. V is the dimension of its value.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..ops.attention import causal_attention
from ..ops.core.axes import present
from ..ops.core.dtypes import accumulator
from ..ops.core.dynamo import rearrange, repeat
from ..parallel.collectives import psum
from ..params import P, param
from .config import DeepSeekV3Config
from .moe import FSDP

LATENT_NORM_EPS = 1e-6  # published models have this one, whatever their other norms have


class LowRankQuery(NamedTuple):
    """Queries through a bottleneck of their own: ``down`` (r, D), ``norm`` (r,), ``up`` (H * (N + R), r)."""

    down: torch.Tensor
    norm: torch.Tensor
    up: torch.Tensor


class AttentionParams(NamedTuple):
    """``query`` is one matrix (H * (N + R), D) or a :class:`LowRankQuery`.

    ``kv_down`` (C + R, D) gives the latent and the one rotary key that all heads share. ``kv_norm`` is (C,).
    ``kv_up`` (H * (N + V), C) gives each head's key and value. ``out`` is (D, H * V).
    """

    query: torch.Tensor | LowRankQuery
    kv_down: torch.Tensor
    kv_norm: torch.Tensor
    kv_up: torch.Tensor
    out: torch.Tensor


class Rope(NamedTuple):
    """Cosines and sines of rotary positions, float32 (L, R / 2), times YaRN's factor."""

    cos: torch.Tensor
    sin: torch.Tensor


def attention_specs(config: DeepSeekV3Config) -> AttentionParams:
    """Shapes, initial values and placement of one attention's parameters."""
    c, weight = config, functools.partial(param, scale=config.init_std)
    query_dim = c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    query: Any = weight((query_dim, c.dim), P("tp", FSDP))
    if c.q_lora_rank:
        query = LowRankQuery(
            weight((c.q_lora_rank, c.dim), P(None, FSDP)),
            norm_spec(c.q_lora_rank),
            weight((query_dim, c.q_lora_rank), P("tp", FSDP)),
        )
    return AttentionParams(
        query,
        weight((c.kv_lora_rank + c.qk_rope_head_dim, c.dim), P(None, FSDP)),
        norm_spec(c.kv_lora_rank),
        weight((c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank), P("tp", FSDP)),
        weight((c.dim, c.num_heads * c.v_head_dim), P(FSDP, "tp")),
    )


def norm_spec(size: int) -> Any:
    return param((size,), P(None), init="ones")


def attention_forward(
    params: AttentionParams, x: torch.Tensor, rope: Rope, config: DeepSeekV3Config
) -> torch.Tensor:
    """Causal multi-head latent attention, with heads that may be cut along ``tp``.

    ==========  ===========  ================================================================
    params                   :class:`AttentionParams`
    x           (B, L, D)    hidden states, any floating dtype
    rope        (L, R / 2)   from :func:`rope_table`
    -> y        (B, L, D)
    ==========  ===========  ================================================================

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, with rotary pairs interleaved as published.
    """
    c, eps, head = config, LATENT_NORM_EPS, config.qk_nope_head_dim + config.qk_rope_head_dim
    if isinstance(params.query, LowRankQuery):
        down, norm, up = params.query
        q = F.linear(rms_norm(F.linear(x, down), norm, eps), up)
    else:
        q = F.linear(x, params.query)
    q = rearrange(q, "B L (H head) -> B L H head", head=head)  # the heads held here
    q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, k_rope = F.linear(x, params.kv_down).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    kv = F.linear(rms_norm(latent, params.kv_norm, eps), params.kv_up)
    kv = rearrange(kv, "B L (H head) -> B L H head", H=q.shape[2])
    k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
    k_rope = repeat(rotate(k_rope[:, :, None], rope), "B L 1 R -> B L H R", H=q.shape[2])
    q, k = torch.cat([q_nope, rotate(q_rope, rope)], -1), torch.cat([k_nope, k_rope], -1)
    y = causal_attention(q, k, v, softmax_scale(c))
    return psum(F.linear(rearrange(y, "B L H V -> B L (H V)"), params.out), present("tp"))


def softmax_scale(config: DeepSeekV3Config) -> float:
    """``(N + R) ** -0.5``, which YaRN multiplies by the square of ``magnitude(mscale_all_dim)``."""
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    return scale * config.yarn.magnitude(config.yarn.mscale_all_dim) ** 2 if config.yarn else scale


def rope_table(config: DeepSeekV3Config, length: int, device: torch.device | str | None = None) -> Rope:
    """Angles of positions 0 to ``length`` - 1, computed in float32 whatever the model's dtype."""
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequencies(config, device))
    yarn = config.yarn
    factor = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim) if yarn else 1.0
    return Rope(angle.cos() * factor, angle.sin() * factor)


def frequencies(config: DeepSeekV3Config, device: torch.device | str | None = None) -> torch.Tensor:
    """Radians per position of each rotary pair, float32 (R / 2,).

    YaRN keeps the pairs that turn at least ``beta_fast`` times in the original context. It slows those that
    turn at most ``beta_slow`` times by ``factor``, and goes linearly from one to the other in between.

    Source: YaRN, arXiv 2309.00071, section 3.2, with the bounds rounded outwards as DeepSeek published them.
    """
    size, yarn = config.qk_rope_head_dim, config.yarn
    index = torch.arange(size // 2, dtype=torch.float32, device=device)
    period = config.rope_theta ** (2 * index / size)
    if yarn is None:
        return 1 / period

    def pair(turns: float) -> float:
        """The (fractional) pair that turns this often in the original context."""
        per_radian = yarn.original_max_seq_len / (2 * math.pi * turns)
        return size * math.log(per_radian) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair(yarn.beta_fast)), 0)
    last = min(math.ceil(pair(yarn.beta_slow)), size - 1)
    slow = ((index - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - slow) / period + slow / (yarn.factor * period)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension, by float32 angles, in ``x``'s dtype.

    ``x`` is (B, L, H, R). The pairs' first members come out first, then the second ones. Queries and keys
    agree on this order.
    """
    cos, sin = (rearrange(angle, "L R -> L 1 R").to(x.dtype) for angle in rope)
    a, b = rearrange(x, "B L H (R pair) -> pair B L H R", pair=2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight``, with the root mean square in float32 or wider.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 0.0)
    tensor([0.8485, 1.1314])
    """
    wide = x.to(accumulator(x.dtype))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
