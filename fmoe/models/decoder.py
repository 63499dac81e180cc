"""A decoder: attention and experts, layer after layer, in the sizes of a :class:`DecoderConfig`.

On a mesh the model is one function inside :func:`fmoe.shard_map`. Tokens lie along ``dp`` and ``ep``, and
experts along ``ep``. Heads, hidden dimensions and the vocabulary lie along ``tp``. The rest is cut, and
gathered when used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, check_kind
from ..ops.balance import MoEStats, update_expert_bias
from ..ops.core.axes import axis_names, binding, check_mesh, describe
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.precision import Recipe, recipe_of
from ..ops.random import check_one_key
from ..parallel.backends import Backend, choose
from ..parallel.mesh import is_pipeline
from ..parallel.placement import computing, init_on, placed
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
from .layer import one_layer as one_layer
from .noise import Noise
from .on_device import NUMBERS as NUMBERS
from .on_device import OF_STAGE as OF_STAGE
from .on_device import LossStats as LossStats
from .on_device import StageSums as StageSums
from .on_device import Stats, Wrap, counted_segments, head, hidden, over_devices
from .on_device import loss_of_sums as loss_of_sums
from .on_device import stage_loss as stage_loss
from .on_device import stage_sums as stage_sums
from .on_mesh import on_mesh, token_places
from .params import LayerParams as LayerParams
from .params import ModelParams as ModelParams
from .params import MTPParams as MTPParams
from .params import specs as specs
from .stages import Stages, held_on
from .vocabulary import refuse_outside, within


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
    check_kind("init", "config", config, DecoderConfig, "Pass a config, then a seed.")
    tree = specs(config)
    check_mesh("init", mesh)
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
        segments, below = counted_segments("forward", given.get("segment_ids"), tokens)
        on_mesh = binding().mesh is not None
        tokens, outside = within(tokens, config.vocab_size) if on_mesh else (tokens, tokens.new_zeros(()))
        x, sums, _ = hidden(params, tokens, config, layer, segments, given.get("noise", ()), recipe)
        wrong, stats = over_devices([outside, below], sums)
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
    check_mesh(function, mesh)
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
