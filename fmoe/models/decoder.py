"""A decoder: attention and experts, layer after layer, in the sizes of a :class:`DecoderConfig`.

On a mesh the model is one function inside :func:`fmoe.shard_map`. Tokens lie along ``dp`` and ``ep``, and
experts along ``ep``. Heads, hidden dimensions and the vocabulary lie along ``tp``. The rest is cut, and
gathered when used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.balance import MoEStats, balance_loss, moe_stats, stats_sums, update_expert_bias
from ..ops.core.axes import axis_names, binding, describe, present
from ..ops.core.derive import Tensors
from ..ops.core.dtypes import accumulator
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.experts import ExpertParams
from ..ops.precision import Recipe, recipe_of
from ..ops.random import check_one_key, fold_in
from ..ops.segments import Segments, halves_of, segments_of
from ..ops.transport import in_halves
from ..parallel.backends import Backend, choose
from ..parallel.collectives import psum
from ..parallel.mesh import is_pipeline
from ..parallel.placement import computing, init_on, placed, use
from ..parallel.stack import stack
from ..params import P, leaf_mask, partition_specs, trained_mask
from .checks import (
    check_drawing,
    check_heads,
    check_mtp,
    check_on_one_device,
    check_params,
    check_same,
    check_tokens,
)
from .config import DecoderConfig as DecoderConfig  # re-exported
from .counts import flops_per_token as flops_per_token
from .counts import num_params as num_params
from .families import preset as preset
from .moe import Begun, MoEParams, begin_layer, end_layer, experts_of, mlp_forward, send_layer
from .mtp import predict_further
from .noise import Keyed, Noise, keyed
from .norm import rms_norm
from .on_mesh import on_mesh, token_places
from .params import LayerParams as LayerParams
from .params import ModelParams as ModelParams
from .params import MTPParams as MTPParams
from .params import specs as specs
from .rotary import Angles, angles
from .stages import Stages, held_on
from .vocabulary import IGNORED, embed, refuse_outside, summed_cross_entropy, within

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Stats = tuple[MoEStats, ...]

# Options of the loss that stage_sums takes.
OF_STAGE = "per_layer", "logits_bytes", "mtp_weight", "precision"
NUMBERS = "total", "balance", "mtp", "num_targets", "outside", "below"  # of StageSums


class LossStats(NamedTuple):
    """What :func:`loss` says beside the loss.

    ===========  ========================================
    num_targets  how many the loss is the mean of, over all devices, in the loss's dtype
    layers       one :class:`fmoe.MoEStats` per MoE layer, over all tokens
    balance      the part of the loss that ``config.balance_loss`` adds; 0 without it
    mtp          the part that ``mtp_weight`` adds; 0 without it
    mtp_layers   one :class:`fmoe.MoEStats` per module of multi-token prediction; ``()`` without it
    ===========  ========================================

    :func:`fmoe.training.gradients.accumulate` and :func:`fmoe.training.metrics.mean_loss` weigh a mean by
    its ``num_targets``.

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


def init(
    config: DecoderConfig,
    seed: int | torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    mesh: DeviceMesh | None = None,
    stages: Stages | None = None,
) -> ModelParams:
    """Random parameters: normal weights of deviation ``config.init_std``, norms of one, zero biases.

    With a mesh they are DTensors placed by :func:`specs`. Every device draws only its own pieces, and the
    numbers are the same on every mesh. With ``pp``, ``()`` stands for what a rank doesn't hold. ``stages``
    says what that is, as for :func:`fmoe.training.gradients.of_model`; by default a rank has one stage.

    Raises ``ValueError`` listing what the mesh doesn't divide, and for stages that don't fit.

    >>> params = init(preset("debug"), 0)
    >>> len(params.layers), params.embedding.shape
    (4, torch.Size([256, 128]))
    """
    tree = specs(config)
    if mesh is not None:
        tree, mesh = held_on("init", config, mesh, stages)
    return init_on("init", mesh, tree, seed, dtype=dtype, device=device)


def forward(
    params: ModelParams,
    tokens: torch.Tensor,
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    segment_ids: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    backend: str | Backend = "auto",
    dtype: torch.dtype | None = None,
    precision: str | Recipe | None = None,
    per_layer: Wrap = lambda layer: layer,
) -> tuple[torch.Tensor, Stats]:
    """The logits of every position's next token, and the statistics of every MoE layer.

    ===========  ==============  =============================================================
    params                       from :func:`init`
    tokens       (B, L)          int64, below ``config.vocab_size``
    mesh                         ``None``: this device alone. Else as for :func:`fmoe.moe_forward`, with plain
                                 tokens (this device's own sequences) or a DTensor of them
    segment_ids  (B, L)          int64, placed as the tokens are; 0 for padding. A run of equal ids is a
                                 segment, as a packed document is. ``None``: every row is one
    key          (2,)            int64, from :mod:`fmoe.ops.random`, the same on every device: for
                                 ``config.router.noise``, which it needs. Fold the step into it
    places       (B, L)          int64, placed as the tokens are: the place of each token in the batch, on
                                 which its noise depends. ``None``: in order, over all devices
    backend                      carries tokens to experts, as for :func:`fmoe.moe_forward`
    dtype                        to compute in; ``None``: that of the parameters
    precision                    of products: ``"fp8_rowwise"``, say, or a :class:`fmoe.ops.precision.Recipe`,
                                 which says it by kind of layer. ``None``: they take operands as they are
    per_layer                    wraps the function of one layer: ``fmoe.remat``, ``torch.compile``
    -> logits    (B, L, vocab)   in ``dtype``; for plain tokens this device's part, with
                                 ``tp`` also of the vocabulary
    -> stats                     one :class:`fmoe.MoEStats` per MoE layer, over all tokens
    ===========  ==============  =============================================================

    A segment's logits are those that it has alone: attention stays within it, and positions start again.
    Padding goes to no routed expert and isn't counted. Its logits are finite, and nothing depends on them.

    Layer ``i`` draws its noise with ``fold_in(key, i)``, as :func:`fmoe.moe_forward` does.

    Raises ``ValueError`` for tokens of a wrong dtype or shape, and for segment ids below zero. On a mesh, all
    devices raise ``RuntimeError`` if one has an id outside the vocabulary, or a segment id below zero.

    >>> config = preset("debug")
    >>> logits, stats = forward(init(config, 0), torch.randint(256, (2, 16)), config)
    >>> logits.shape, len(stats)
    (torch.Size([2, 16, 256]), 3)
    >>> ids = torch.tensor([[1] * 5 + [2] * 7 + [0] * 4])       # two documents, and padding
    >>> _, stats = forward(init(config, 0), torch.randint(256, (1, 16)), config, segment_ids=ids)
    >>> stats[0].tokens_per_expert.sum() == 12 * config.router.top_k
    tensor(True)
    """
    inputs = inputs_of("forward", config, {"tokens": tokens}, segment_ids, key, places, mesh)
    recipe = recipe_of("forward", precision)

    def run(params: ModelParams, tokens: torch.Tensor, *others: torch.Tensor) -> Any:
        layer, given = per_layer(one_layer), optional(inputs, others, key)
        segments, below = _segments("forward", given.get("segment_ids"), tokens)
        on_mesh = binding().mesh is not None
        tokens, outside = within(tokens, config.vocab_size) if on_mesh else (tokens, tokens.new_zeros(()))
        x, sums, _ = hidden(params, tokens, config, layer, segments, given.get("noise", ()), recipe)
        wrong, stats = _over_devices([outside, below], sums)
        if on_mesh:
            refuse_outside(*wrong)
        return x @ head(params).mT, stats

    def out_specs(where: P, _: Any) -> Any:
        rows, length = (*where, None, None)[:2]
        return P(rows, length, "tp" if mesh is not None and "tp" in axis_names(mesh) else None), P()

    return run_on(
        "forward", run, params, inputs, config, mesh,
        out_specs=out_specs, backend=backend, dtype=dtype,
    )  # fmt: skip


def loss(
    params: ModelParams,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    segment_ids: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    backend: str | Backend = "auto",
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    precision: str | Recipe | None = None,
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
    mtp_weight: float = 0.0,
) -> tuple[torch.Tensor, LossStats]:
    """The mean cross entropy in nats, float32 or wider, and its :class:`LossStats`.

    ``tokens`` and ``targets`` are int64 (B, L), and a target of -100 doesn't count, nor does one of padding.
    With ``config.balance_loss``, every MoE layer adds that of each sequence, which weighs as many as its
    targets are. A row of several segments is one sequence there. The rest is as for :func:`forward`. On a
    mesh the mean is over all devices' tokens, and the same on each. Logits are never gathered. At most
    ``logits_bytes`` of them, in float32, exist at once. A training loop differentiates the loss with
    ``fmoe.value_and_grad(loss, has_aux=True)``.

    With ``mtp_weight``, ``config.mtp_layers`` modules predict tokens after the next. At position ``i``,
    module ``k`` predicts ``targets[:, i + k]`` from the tokens up to ``i + k``, all in one segment. The mean
    of the modules' sums of cross entropies, divided by ``num_targets``, is added with this weight. In
    DeepSeek-V3 it was 0.3, and 0.1 in the end (arXiv 2412.19437, sections 2.2 and 4.2).

    Parameters may be kept in another dtype than the ``dtype`` that is computed in: float32 beside bfloat16,
    say. They are cast before they are sent. Gradients come back in the dtype that the parameters are kept in.
    Over devices they are summed in ``reduce_dtype``: by default float32, or that of the parameters where it
    is wider. Those of parameters that are whole on each device are always summed in float32 or wider.
    Selection biases of routers stay as they are.

    Raises ``ValueError`` for tokens, targets and segment ids of a wrong dtype, or of different shapes, and
    for segment ids below zero. On a mesh, all devices raise ``RuntimeError`` if one has an id outside the
    vocabulary, or a segment id below zero.

    >>> config = preset("debug")
    >>> tokens = torch.randint(256, (2, 16))
    >>> value, stats = loss(init(config, 0), tokens, tokens, config)
    >>> abs(value.item() - 5.5) < 0.5      # near log(256) before any training
    True
    >>> len(stats.layers), stats.num_targets
    (3, tensor(32.))
    """
    check_mtp("loss", config, mtp_weight)
    inputs = {"tokens": tokens, "targets": targets}
    inputs = inputs_of("loss", config, inputs, segment_ids, key, places, mesh)
    recipe = recipe_of("loss", precision)

    def run(params: ModelParams, tokens: torch.Tensor, targets: torch.Tensor, *others: torch.Tensor) -> Any:
        given = optional(inputs, others, key)
        given |= dict(per_layer=per_layer, logits_bytes=logits_bytes, mtp_weight=mtp_weight)
        return stage_loss(params, tokens, targets, config, precision=recipe, **given)

    def out_specs(*_: Any) -> Any:
        return P(), P()

    return run_on(
        "loss", run, params, inputs, config, mesh,
        out_specs=out_specs, backend=backend, dtype=dtype, reduce_dtype=reduce_dtype,
    )  # fmt: skip


def update_biases(params: ModelParams, stats: LossStats | Stats, rate: float) -> ModelParams:
    """:func:`fmoe.update_expert_bias` of every MoE layer, by what :func:`loss` or :func:`forward` counted.

    >>> params = init(preset("debug"), 0)
    >>> _, stats = forward(params, torch.randint(256, (2, 16)), preset("debug"))
    >>> update_biases(params, stats, 0.001).layers[1].mlp.router.bias_E.abs().max()
    tensor(0.0010)
    """
    counts, further = (stats.layers, stats.mtp_layers) if isinstance(stats, LossStats) else (stats, ())
    dense = len(params.layers) - len(counts)

    def updated(layer: LayerParams, counted: MoEStats) -> LayerParams:
        return layer._replace(mlp=update_expert_bias(layer.mlp, counted.tokens_per_expert, rate))

    layers = tuple(
        updated(layer, counts[i - dense]) if layer and i >= dense else layer
        for i, layer in enumerate(params.layers)
    )
    if further:
        pairs = zip(params.mtp, further)
        params = params._replace(mtp=tuple(m._replace(layer=updated(m.layer, found)) for m, found in pairs))
    return params._replace(layers=layers)


def inputs_of(
    function: str,
    config: DecoderConfig,
    inputs: dict[str, torch.Tensor],
    segment_ids: torch.Tensor | None,
    key: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    mesh: DeviceMesh | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that lie as tokens do, once checked: with segment ids if there are any, and with the places
    of tokens if there is noise.
    """
    if not isinstance(config, DecoderConfig):  # a batch with segment ids, say, unpacked before the config
        got, remedy = type(config).__name__, "Pass segment ids by name, as segment_ids=."
        raise argument_error(function, "config", got=got, expected="a DecoderConfig", remedy=remedy)
    inputs = inputs if segment_ids is None else {**inputs, "segment_ids": segment_ids}
    check_drawing(function, config.router, key)
    if config.router.noise and key is not None:
        check_one_key(function, key, inputs["tokens"])
        places = token_places(function, inputs["tokens"], mesh) if places is None else places
        inputs = {**inputs, "places": places}
    for name, value in inputs.items():
        check_tokens(function, name, value, config.max_seq_len)
        check_same(function, "of shape", name, tuple(value.shape), tuple(inputs["tokens"].shape))
    return inputs


def optional(
    names: Iterable[str], values: Sequence[torch.Tensor], key: torch.Tensor | None
) -> dict[str, Any]:
    """Arguments of :func:`stage_sums` from ``values``: the last tensors of a batch, by their ``names``."""
    given: dict[str, Any] = dict(zip([*names][-len(values) :], values)) if values else {}
    if key is not None and "places" in given:
        given["noise"] = Noise(key, given.pop("places"))
    return given


def run_on(
    function: str,
    run: Callable[..., Any],
    params: ModelParams,
    inputs: dict[str, torch.Tensor],
    config: DecoderConfig,
    mesh: DeviceMesh | None,
    *,
    out_specs: Callable[[P, Any], Any],
    backend: str | Backend = "auto",
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    described: ModelParams | None = None,
) -> Any:
    """``run(params, *inputs)`` on this device or each of a mesh, with params as :func:`use` takes them.

    ``described`` are the specs of params that are part of a model.
    """
    if mesh is not None and is_pipeline(mesh):
        remedy = "Use fmoe.training.gradients.of_model, or loss_of_model without gradients."
        raise argument_error(function, "mesh", got=describe(mesh), expected="pp=1", remedy=remedy)
    for name, value in {"dtype": dtype, "reduce_dtype": reduce_dtype}.items():
        if value is not None and not value.is_floating_point:
            raise argument_error(function, name, got=value, expected="a floating dtype, or None")
    described = described or specs(config)
    trained = leaf_mask(function, "params", trained_mask(described), params)
    dtypes = [dtype if moves else None for moves in trained]
    if mesh is None:
        check_on_one_device(function, params.embedding)
        choose(function, backend, None)
        return run(placed(params, dtypes=dtypes), *inputs.values())
    wanted = computing_specs(described)
    check_params(function, params, described, wanted, mesh)
    check_heads(function, config.attention.num_kv_heads, mesh)
    return on_mesh(
        function,
        run,
        params,
        inputs,
        mesh,
        wanted=wanted,
        out_specs=out_specs,
        backend=backend,
        rows=(computing_dtype(params, dtype), config.dim),
        dtypes=dtypes,
        summed=reduce_dtype,
    )


def computing_specs(described: ModelParams) -> ModelParams:
    """Where parameters of these specs are computed with: a tree of :class:`P`."""
    return optree.tree_map(computing, partition_specs(described))


def computing_dtype(params: ModelParams, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of hidden states."""
    return dtype or optree.tree_leaves(params)[0].dtype


# ---- on one device, inside shard_map ---------------------------------------------------------------
#
# The params say whether this is the whole model or a stage of a pipeline. A stage has some of the layers. The
# first has the embedding and takes tokens. A later one takes the output of the stage before it. The last has
# the norm and the head.


def _segments(
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
        stats = _over_devices([], made.layers)[1]
        return made.x, LossStats(x.new_zeros(()), stats, made.balance, made.mtp)
    numbers, stats = _over_devices(made.numbers, [*made.layers, *made.mtp_layers])
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
    segments, below = _segments("loss", segment_ids, x)
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


def _over_devices(numbers: list[torch.Tensor], sums: list[torch.Tensor]) -> tuple[list[torch.Tensor], Stats]:
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
