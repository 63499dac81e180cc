"""A model on one device, or a stage of it: hidden states, and the sums that its loss is made of.

On a mesh this runs inside :func:`fmoe.shard_map`. The params say whether this is the whole model or a stage
of a pipeline. A stage has some of the layers. The first has the embedding and takes tokens. A later one takes
the output of the stage before it. The last has the norm and the head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.balance import MoEStats, moe_stats
from ..ops.core.axes import binding
from ..ops.core.dtypes import accumulator
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.precision import Recipe, recipe_of
from ..ops.segments import Segments, segments_of
from ..parallel.collectives import psum
from ..parallel.placement import use
from ..parallel.stack import stack
from .config import DecoderConfig
from .layer import one_layer
from .mtp import predict_further
from .noise import Noise, keyed
from .norm import rms_norm
from .params import ModelParams
from .rotary import angles
from .vocabulary import IGNORED, embed, refuse_outside, summed_cross_entropy, within

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Stats = tuple[MoEStats, ...]

# Options of the loss that stage_sums takes.
OF_STAGE = "per_layer", "logits_bytes", "mtp_weight", "precision"
NUMBERS = "total", "balance", "mtp", "num_targets", "outside", "below"  # of StageSums


class LossStats(NamedTuple):
    """What :func:`fmoe.models.decoder.loss` says beside the loss.

    ===========  ========================================
    num_targets  how many the loss is the mean of, over all devices, in the loss's dtype
    layers       one :class:`fmoe.MoEStats` per MoE layer, over all tokens
    balance      the part of the loss that ``config.balance_loss`` adds; 0 without it
    mtp          the part that ``mtp_weight`` adds; 0 without it
    mtp_layers   one :class:`fmoe.MoEStats` per module of multi-token prediction; ``()`` without it
    ===========  ========================================

    :func:`fmoe.training.gradients.accumulate` and :func:`fmoe.training.metrics.mean_loss` weigh a mean by
    its ``num_targets``.

    >>> from fmoe.models.decoder import init, loss, preset
    >>> config, tokens = preset("debug"), torch.randint(256, (2, 16))
    >>> targets = tokens.masked_fill(torch.arange(16) < 10, -100)
    >>> loss(init(config, 0), tokens, targets, config)[1].num_targets
    tensor(12.)
    """

    num_targets: torch.Tensor
    layers: Stats
    balance: torch.Tensor
    mtp: torch.Tensor
    mtp_layers: Stats = ()

    @property
    def overflow(self) -> torch.Tensor:
        """The sum of all layers' ``overflow``: unless it is 0, nothing of this step counts."""
        counts = [layer.overflow for layer in (*self.layers, *self.mtp_layers)]
        return torch.stack(counts).sum() if counts else torch.zeros_like(self.num_targets, dtype=torch.int64)


def counted_segments(
    function: str, ids: torch.Tensor | None, like: torch.Tensor
) -> tuple[Segments | tuple[()], torch.Tensor]:
    """The segments that ids make, and how many ids are below zero: on a mesh, all devices raise together."""
    none = torch.zeros((), dtype=torch.int64, device=like.device)
    if ids is None:
        return (), none
    below = (ids < 0).sum()
    if binding().mesh is not None:
        return segments_of(ids), below
    found = segments_of(ids, function)
    refuse_outside(none, below)  # where the host can't look
    return found, none


def stage_loss(
    params: ModelParams,
    x: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
    mtp_weight: float = 0.0,
    segment_ids: torch.Tensor | None = None,
    noise: Noise | tuple[()] = (),
    precision: str | Recipe | None = None,
) -> tuple[torch.Tensor, LossStats]:
    """The loss or, unless the stage is the last, the input of the next.

    A stage before the last has no targets. Its ``balance`` is a sum, to be added to the loss. Every stage
    takes the same ``segment_ids`` and ``noise``.
    """
    made = stage_sums(
        params, x, targets, config, per_layer=per_layer, logits_bytes=logits_bytes, mtp_weight=mtp_weight,
        segment_ids=segment_ids, noise=noise, precision=precision,
    )  # fmt: skip
    if isinstance(params.norm, tuple):
        stats = over_devices([], made.layers)[1]
        return made.x, LossStats(x.new_zeros(()), stats, made.balance, made.mtp)
    numbers, stats = over_devices(made.numbers, [*made.layers, *made.mtp_layers])
    number = len(made.layers)
    return loss_of_sums(made.total.dtype, numbers, stats[:number], stats[number:])


class StageSums(NamedTuple):
    """What a stage computes, on this device alone, before any sum over devices or micro-batches.

    ===============  ================================================================
    ``x``            what the next stage takes; of the last stage its own
    ``total``        the sum of cross entropies, of the last stage; else 0
    ``balance``      what is added to it for uneven loads
    ``mtp``          what is added to it for tokens after the next, of the last stage; else 0
    ``num_targets``  of the last stage; else 0
    ``outside``      ids outside the vocabulary: tokens of the first stage, targets of the last
    ``below``        segment ids below zero, of the first stage
    ``layers``       :func:`stats_sums` of each MoE layer
    ``mtp_layers``   those of modules of multi-token prediction, of the last stage
    ===============  ================================================================

    >>> from fmoe.models.decoder import init, preset
    >>> config, tokens = preset("debug"), torch.randint(256, (2, 16))
    >>> made = stage_sums(init(config, 0), tokens, tokens, config)
    >>> made.num_targets, len(made.layers)
    (tensor(32), 3)
    """

    x: torch.Tensor
    total: torch.Tensor
    balance: torch.Tensor
    mtp: torch.Tensor
    num_targets: torch.Tensor
    outside: torch.Tensor
    below: torch.Tensor
    layers: list[torch.Tensor]
    mtp_layers: list[torch.Tensor]

    @property
    def numbers(self) -> list[torch.Tensor]:
        """All but hidden states and layers."""
        return [getattr(self, name) for name in NUMBERS]


def stage_sums(
    params: ModelParams,
    x: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
    mtp_weight: float = 0.0,
    segment_ids: torch.Tensor | None = None,
    noise: Noise | tuple[()] = (),
    tokens: torch.Tensor | None = None,
    precision: str | Recipe | None = None,
) -> StageSums:
    """:class:`StageSums` of a stage, or of the whole model. Every stage takes all targets and segment ids.

    The last one also takes the ``tokens`` for multi-token prediction. The whole model has them.
    """
    recipe = recipe_of("loss", precision)
    first, last = not x.is_floating_point(), not isinstance(params.norm, tuple)
    count = outside = torch.zeros((), dtype=torch.int64, device=x.device)
    # One function for all layers, so that a wrapper such as a compiler sees only one. It comes before the
    # segments, whose number they mark as dynamic if there is a compiler.
    layer = per_layer(one_layer)
    segments, below = counted_segments("loss", segment_ids, x)
    if isinstance(segments, Segments):
        targets = torch.where(segments.valid, targets, IGNORED)
    if binding().mesh is not None:
        if first:
            x, outside = within(x, config.vocab_size)
        if last:
            targets, of_targets = within(targets, config.vocab_size, also=IGNORED)
            outside = outside + of_targets
    tokens = x if first else tokens
    x, sums, uneven = hidden(params, x, config, layer, segments, noise, recipe)
    total = balance = mtp = x.new_zeros((), dtype=accumulator(x.dtype))
    further: list[torch.Tensor] = []
    if last:
        weight = head(params)
        total, count = summed_cross_entropy(x, weight, targets, logits_bytes=logits_bytes)
        if mtp_weight:
            assert tokens is not None
            if binding().mesh is not None:
                tokens, _ = within(tokens, config.vocab_size)  # the first stage counted those outside
            found = predict_further(
                params.mtp, x, tokens, targets, config,
                layer=layer, embedding=use(params.embedding), head=weight,
                segments=segments, noise=noise, logits_bytes=logits_bytes, recipe=recipe,
            )  # fmt: skip
            mtp, further = mtp_weight / len(params.mtp) * found.total, found.layers
            uneven = uneven + found.uneven
    if config.balance_loss:  # a sequence weighs as many as it has targets, as in the cross entropy
        weighed = (uneven * (targets != IGNORED).sum(-1)).sum(0, keepdim=True)
        balance = (config.balance_loss * weighed).squeeze(0)
    below = below if first else torch.zeros_like(below)
    return StageSums(x, total, balance, mtp, count, outside, below, sums, further)


def loss_of_sums(
    dtype: torch.dtype, numbers: Sequence[torch.Tensor], stats: Stats, mtp_stats: Stats = ()
) -> tuple[torch.Tensor, LossStats]:
    """The mean of ``numbers`` (1,): those of :class:`StageSums`, summed over devices."""
    # Each with a dimension, since under vmap over no example PyTorch can't multiply or divide scalars.
    total, balance, mtp, count, outside, below = (number.to(dtype) for number in numbers)
    if binding().mesh is not None:
        refuse_outside(outside, below)
    total, balance, mtp = (number / count.clamp_min(1) for number in (total, balance, mtp))
    parts = total + balance + mtp, balance, mtp, count
    value, balance, mtp, count = (part.squeeze(0) for part in parts)
    return value, LossStats(count.detach(), stats, balance.detach(), mtp.detach(), mtp_stats)


def over_devices(numbers: list[torch.Tensor], sums: list[torch.Tensor]) -> tuple[list[torch.Tensor], Stats]:
    """Numbers (1,), in float64, and what layers counted, over the devices that tokens lie on, in one sum."""
    rows = [*(number.double().reshape(1) for number in numbers), *sums]
    if not rows:
        return [], ()
    total = psum(torch.cat(rows), binding().tokens).split([len(row) for row in rows])
    return [*total[: len(numbers)]], tuple(moe_stats(t.detach()) for t in total[len(numbers) :])


def hidden(
    params: ModelParams,
    x: torch.Tensor,
    config: DecoderConfig,
    layer: Callable[..., Any],
    segments: Segments | tuple[()] = (),
    noise: Noise | tuple[()] = (),
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The last layer's output (B, L, D), normalised if there is a norm; :func:`stats_sums` of each MoE layer;
    how uneven loads are (B,).

    ``x`` is tokens (B, L) or a layer's output.
    """
    table = angles(config.attention.rope, x, segments)
    if not x.is_floating_point():
        x = embed(x, use(params.embedding))
    layers, places = keyed(params.layers, noise)
    x, found = stack(layer, layers, x, table, config, segments, places, recipe)
    sums = [counted for layers, _ in found for counted in layers]
    uneven = torch.zeros((x.shape[0],), dtype=accumulator(x.dtype), device=x.device)
    uneven = sum((balance for _, balances in found for balance in balances), uneven)
    if not isinstance(params.norm, tuple):
        x = rms_norm(x, use(params.norm), config.norm_eps)
    return x, sums, uneven


def head(params: ModelParams) -> torch.Tensor:
    """The matrix (vocab, D) whose products with hidden states are logits."""
    tied = isinstance(params.head, tuple)
    return use(params.embedding if tied else params.head)
