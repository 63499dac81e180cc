"""A decoder: attention and experts, layer after layer, in the sizes of a :class:`DecoderConfig`.

On a mesh the model is one function inside :func:`fmoe.shard_map`. Tokens lie along ``dp`` and ``ep``, and
experts along ``ep``. Heads, hidden dimensions and the vocabulary lie along ``tp``. The rest is cut, and
gathered when used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ops.balance import MoEStats, balance_loss, update_expert_bias
from ..ops.core.axes import axis_names, binding, present
from ..ops.core.dtypes import accumulator
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.experts import ExpertParams
from ..parallel.backends import choose
from ..parallel.collectives import psum
from ..parallel.placement import computing, init_on, use
from ..params import P, partition_specs
from .checks import check_heads, check_on_one_device, check_params, check_same, check_tokens
from .config import DecoderConfig as DecoderConfig  # re-exported
from .counts import flops_per_token as flops_per_token
from .counts import num_params as num_params
from .families import preset as preset
from .moe import MoEParams, mlp_forward, moe_layer, stats_of
from .norm import rms_norm
from .on_mesh import on_mesh
from .params import LayerParams as LayerParams
from .params import ModelParams as ModelParams
from .params import specs as specs
from .rotary import Angles
from .vocabulary import IGNORED, embed, refuse_outside, summed_cross_entropy, within

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Stats = tuple[MoEStats, ...]


class LossStats(NamedTuple):
    """What :func:`loss` says beside the loss.

    ===========  ========================================
    num_targets  how many the loss is the mean of, over all devices, in the loss's dtype
    layers       one :class:`fmoe.MoEStats` per MoE layer, over all tokens
    balance      the part of the loss that ``config.balance_loss`` adds; 0 without it
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


def init(
    config: DecoderConfig,
    seed: int | torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    mesh: DeviceMesh | None = None,
) -> ModelParams:
    """Random parameters: normal weights of deviation ``config.init_std``, norms of one, zero biases.

    With a mesh they are DTensors placed by :func:`specs`. Every device draws only its own pieces, and the
    numbers are the same on every mesh. Raises ``ValueError`` listing what the mesh doesn't divide.

    >>> params = init(preset("debug"), 0)
    >>> len(params.layers), params.embedding.shape
    (4, torch.Size([256, 128]))
    """
    return init_on("init", mesh, specs(config), seed, dtype=dtype, device=device)


def forward(
    params: ModelParams,
    tokens: torch.Tensor,
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    backend: str = "auto",
    per_layer: Wrap = lambda layer: layer,
) -> tuple[torch.Tensor, Stats]:
    """The logits of every position's next token, and the statistics of every MoE layer.

    ==========  ==============  =============================================================
    params                      from :func:`init`
    tokens      (B, L)          int64, below ``config.vocab_size``
    mesh                        ``None``: this device alone. Else as for :func:`fmoe.moe_forward`, with plain
                                tokens (this device's own sequences) or a DTensor of them
    backend                     carries tokens to experts, as for :func:`fmoe.moe_forward`
    per_layer                   wraps the function of one layer: ``fmoe.remat``, ``torch.compile``
    -> logits   (B, L, vocab)   dtype of the parameters; for plain tokens this device's part, with
                                ``tp`` also of the vocabulary
    -> stats                    one :class:`fmoe.MoEStats` per MoE layer, over all tokens
    ==========  ==============  =============================================================

    Raises ``ValueError`` for tokens of a wrong dtype or shape. On a mesh, all devices raise ``RuntimeError``
    if one has an id outside the vocabulary.

    >>> config = preset("debug")
    >>> logits, stats = forward(init(config, 0), torch.randint(256, (2, 16)), config)
    >>> logits.shape, len(stats)
    (torch.Size([2, 16, 256]), 3)
    """
    check_tokens("forward", "tokens", tokens, config.max_seq_len)

    def run(params: ModelParams, tokens: torch.Tensor) -> Any:
        if binding().mesh is not None:
            tokens, outside = within(tokens, config.vocab_size)
            refuse_outside(psum(outside, binding().tokens))
        x, stats, _ = hidden(params, tokens, config, per_layer)
        return x @ head(params).mT, stats

    def out_specs(where: P) -> Any:
        rows, length = (*where, None, None)[:2]
        return P(rows, length, "tp" if mesh is not None and "tp" in axis_names(mesh) else None), P()

    return _on_mesh("forward", run, params, {"tokens": tokens}, config, mesh, backend, out_specs)


def loss(
    params: ModelParams,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    backend: str = "auto",
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[torch.Tensor, LossStats]:
    """The mean cross entropy in nats, float32 or wider, and its :class:`LossStats`.

    ``tokens`` and ``targets`` are int64 (B, L), and a target of -100 doesn't count. With
    ``config.balance_loss``, every MoE layer adds that of each sequence, which weighs as many as its targets
    are. The rest is as for
    :func:`forward`. On a mesh the mean is over all devices' tokens, and the same on each. Logits are never
    gathered. At most ``logits_bytes`` of them, in float32, exist at once. A training loop differentiates the
    loss with ``fmoe.value_and_grad(loss, has_aux=True)``.

    Raises ``ValueError`` for tokens and targets of a wrong dtype, or of different shapes. On a mesh, all
    devices raise ``RuntimeError`` if one has an id outside the vocabulary.

    >>> config = preset("debug")
    >>> tokens = torch.randint(256, (2, 16))
    >>> value, stats = loss(init(config, 0), tokens, tokens, config)
    >>> abs(value.item() - 5.5) < 0.5      # near log(256) before any training
    True
    >>> len(stats.layers), stats.num_targets
    (3, tensor(32.))
    """
    check_tokens("loss", "tokens", tokens, config.max_seq_len)
    check_tokens("loss", "targets", targets, config.max_seq_len)
    check_same("loss", "of shape", "targets", tuple(targets.shape), tuple(tokens.shape))

    def run(params: ModelParams, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        return stage_loss(params, tokens, targets, config, per_layer, logits_bytes)

    inputs = {"tokens": tokens, "targets": targets}
    return _on_mesh("loss", run, params, inputs, config, mesh, backend, lambda where: (P(), P()))


def update_biases(params: ModelParams, stats: LossStats | Stats, rate: float) -> ModelParams:
    """:func:`fmoe.update_expert_bias` of every MoE layer, by what :func:`loss` or :func:`forward` counted.

    >>> params = init(preset("debug"), 0)
    >>> _, stats = forward(params, torch.randint(256, (2, 16)), preset("debug"))
    >>> update_biases(params, stats, 0.001).layers[1].mlp.router.bias_E.abs().max()
    tensor(0.0010)
    """
    rest = iter(stats.layers if isinstance(stats, LossStats) else stats)
    layers = tuple(
        layer._replace(mlp=update_expert_bias(layer.mlp, next(rest).tokens_per_expert, rate))
        if isinstance(layer.mlp, MoEParams)
        else layer
        for layer in params.layers
    )
    return params._replace(layers=layers)


def _on_mesh(
    function: str,
    run: Callable[..., Any],
    params: ModelParams,
    inputs: dict[str, torch.Tensor],
    config: DecoderConfig,
    mesh: DeviceMesh | None,
    backend: str,
    out_specs: Callable[[P], Any],
) -> Any:
    if mesh is None:
        check_on_one_device(function, params.embedding)
        choose(function, backend, None)
        return run(params, *inputs.values())
    described = specs(config)
    wanted = optree.tree_map(computing, partition_specs(described))
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
        like=params.embedding,
    )


# ---- on one device, inside shard_map ---------------------------------------------------------------
#
# The params say whether this is the whole model or a stage of a pipeline. A stage has some of the layers. The
# first has the embedding and takes tokens. A later one takes the output of the stage before it. The last has
# the norm and the head.


def stage_loss(
    params: ModelParams,
    x: torch.Tensor,
    targets: torch.Tensor,
    config: DecoderConfig,
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[torch.Tensor, LossStats]:
    """The loss or, unless the stage is the last, the input of the next.

    A stage before the last has no targets. Its ``balance`` is a sum, to be added to the loss.
    """
    is_whole = not (x.is_floating_point() or isinstance(params.norm, tuple))
    outside = torch.zeros((), dtype=torch.int64, device=x.device)
    if is_whole and binding().mesh is not None:
        x, of_tokens = within(x, config.vocab_size)
        targets, of_targets = within(targets, config.vocab_size, also=IGNORED)
        outside = of_tokens + of_targets
    x, stats, uneven = hidden(params, x, config, per_layer)
    balance = x.new_zeros((), dtype=accumulator(x.dtype))
    if config.balance_loss:  # a sequence weighs as many as it has targets, as in the cross entropy
        weighed = (uneven * (targets != IGNORED).sum(-1)).sum(0, keepdim=True)
        balance = (config.balance_loss * weighed).squeeze(0)
    if isinstance(params.norm, tuple):
        return x, LossStats(x.new_zeros(()), stats, balance)
    total, count = summed_cross_entropy(x, head(params), targets, logits_bytes=logits_bytes)
    sums = torch.stack([number.to(total.dtype) for number in (total, balance, count, outside)])
    # Each with a dimension, since under vmap over no example PyTorch can't multiply or divide scalars.
    total, balance, count, outside = psum(sums, binding().tokens).split(1)
    if binding().mesh is not None:
        refuse_outside(outside)
    total, balance = total / count.clamp_min(1), balance / count.clamp_min(1)
    value, balance, count = (part.squeeze(0) for part in (total + balance, balance, count))
    return value, LossStats(count.detach(), stats, balance.detach())


def hidden(
    params: ModelParams, x: torch.Tensor, config: DecoderConfig, per_layer: Wrap
) -> tuple[torch.Tensor, Stats, torch.Tensor]:
    """The last layer's output (B, L, D), normalised if there is a norm, and how uneven loads are (B,).

    ``x`` is tokens (B, L) or a layer's output.
    """
    table = config.attention.rope.table(x.shape[1], x.device)
    if not x.is_floating_point():
        x = embed(x, use(params.embedding))
    # One function for all layers, so that a wrapper such as a compiler sees only one.
    layer = per_layer(one_layer)
    stats: list[MoEStats] = []
    uneven = torch.zeros((x.shape[0],), dtype=accumulator(x.dtype), device=x.device)
    for layer_params in params.layers:
        x, found, balance = layer(layer_params, x, table, config)
        stats += found
        uneven = sum(balance, uneven)
    if not isinstance(params.norm, tuple):
        x = rms_norm(x, use(params.norm), config.norm_eps)
    return x, tuple(stats), uneven


def head(params: ModelParams) -> torch.Tensor:
    """The matrix (vocab, D) whose products with hidden states are logits."""
    tied = isinstance(params.head, tuple)
    return use(params.embedding if tied else params.head)


def one_layer(
    params: LayerParams, x: torch.Tensor, table: Angles, config: DecoderConfig
) -> tuple[torch.Tensor, Stats, tuple[torch.Tensor, ...]]:
    """The layer's output, its statistics if it has experts, and with ``config.balance_loss`` that (B,)."""
    params, eps = use(params), config.norm_eps
    x = x + config.attention.forward(params.attention, rms_norm(x, params.attention_norm, eps), table, eps)
    normed = rms_norm(x, params.mlp_norm, eps)
    if isinstance(params.mlp, ExpertParams):
        return x + psum(mlp_forward(params.mlp, normed), present("tp")), (), ()
    y, routing = moe_layer(params.mlp, normed, config.router)
    balance = (balance_loss(routing, x.shape[0]),) if config.balance_loss else ()
    return x + y, (stats_of(routing),), balance
