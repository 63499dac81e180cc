"""DeepSeek-V3: latent attention, dense first layers, mixture-of-experts layers with shared experts.

On a mesh the model is one function inside :func:`fmoe.shard_map`. Tokens lie along ``dp`` and ``ep``, and
experts along ``ep``. Heads, hidden dimensions and the vocabulary lie along ``tp``. The rest is cut, and
gathered when used.
"""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ops.balance import MoEStats, update_expert_bias
from ..ops.core.axes import axis_names
from ..ops.cross_entropy import LOGITS_BYTES
from ..parallel.backends import choose
from ..parallel.boundary import dtensor_beneath
from ..parallel.placement import computing, init_on, token_axes, where_placed
from ..parallel.shard_map import shard_map
from ..parallel.spec import named_axes
from ..params import P, partition_specs
from .checks import check_heads, check_on_one_device, check_params, check_same, check_token_spec, check_tokens
from .config import ROUTER as ROUTER  # re-exported
from .config import DeepSeekV3Config as DeepSeekV3Config
from .config import preset as preset
from .counts import flops_per_token as flops_per_token
from .counts import num_params as num_params
from .moe import MoEParams
from .params import LayerParams as LayerParams
from .params import ModelParams as ModelParams
from .params import specs as specs
from .stages import Stats, Wrap, head, hidden, moves_of, stage_loss


def init(
    config: DeepSeekV3Config,
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
    config: DeepSeekV3Config,
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

    Raises ``ValueError`` for tokens of a wrong dtype or shape.

    Source: arXiv 2412.19437.

    >>> config = preset("debug")
    >>> logits, stats = forward(init(config, 0), torch.randint(256, (2, 16)), config)
    >>> logits.shape, len(stats)
    (torch.Size([2, 16, 256]), 3)
    """
    check_tokens("forward", "tokens", tokens, config.max_seq_len)

    def run(how: ModelParams, along: tuple[str, ...], params: ModelParams, tokens: torch.Tensor) -> Any:
        x, stats = hidden(params, tokens, config, how, along, per_layer)
        return x @ head(params, how).mT, stats

    def out_specs(where: P) -> Any:
        rows, length = (*where, None, None)[:2]
        return P(rows, length, "tp" if mesh is not None and "tp" in axis_names(mesh) else None), P()

    return _on_mesh("forward", run, params, (tokens,), config, mesh, backend, out_specs)


def loss(
    params: ModelParams,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    config: DeepSeekV3Config,
    mesh: DeviceMesh | None = None,
    *,
    backend: str = "auto",
    per_layer: Wrap = lambda layer: layer,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[torch.Tensor, Stats]:
    """The mean cross entropy in nats, float32 or wider, and the statistics of every MoE layer.

    ``tokens`` and ``targets`` are int64 (B, L), and a target of -100 doesn't count. The rest is as for
    :func:`forward`. On a mesh the mean is over all devices' tokens, and the same on each. Logits are never
    gathered. At most ``logits_bytes`` of them, in float32, exist at once. A training loop differentiates the
    loss with ``fmoe.value_and_grad(loss, has_aux=True)``.

    Raises ``ValueError`` for tokens and targets of a wrong dtype, or of different shapes.

    >>> config = preset("debug")
    >>> tokens = torch.randint(256, (2, 16))
    >>> value, stats = loss(init(config, 0), tokens, tokens, config)
    >>> abs(value.item() - 5.5) < 0.5      # near log(256) before any training
    True
    """
    check_tokens("loss", "tokens", tokens, config.max_seq_len)
    check_tokens("loss", "targets", targets, config.max_seq_len)
    check_same("loss", "of shape", "targets", tuple(targets.shape), tuple(tokens.shape))

    def run(how: ModelParams, along: tuple[str, ...], params: ModelParams, *batch: torch.Tensor) -> Any:
        tokens, targets = batch
        return stage_loss(params, tokens, targets, config, how, along, per_layer, logits_bytes)

    return _on_mesh("loss", run, params, (tokens, targets), config, mesh, backend, lambda where: (P(), P()))


def _on_mesh(
    function: str,
    run: Callable[..., Any],
    params: ModelParams,
    inputs: tuple[torch.Tensor, ...],
    config: DeepSeekV3Config,
    mesh: DeviceMesh | None,
    backend: str,
    out_specs: Callable[[P], Any],
) -> Any:
    """Run ``run(how, along, params, *inputs)`` with the params' moves and the axes that tokens lie along."""
    if mesh is None:
        check_on_one_device(function, params.embedding)
        choose(function, backend, None)
        how = ModelParams._make([(), [()] * len(params.layers), (), ()])
        return run(how, (), params, *inputs)
    described = specs(config)
    wanted = optree.tree_map(computing, partition_specs(described))
    check_params(function, params, described, wanted, mesh)
    check_heads(function, config.num_heads, mesh)
    of_tokens = [P(token_axes(mesh))] * len(inputs)
    have, *where = where_placed((params, *inputs), (wanted, *of_tokens), mesh)
    for name, value, spec in zip(("tokens", "targets"), inputs, where):
        check_token_spec(function, name, value, spec)
        check_same(function, "placed by", name, spec, where[0])
    along = tuple(axis for axis in axis_names(mesh) if axis in named_axes(where[0]))
    how = moves_of(function, params, have, wanted, mesh)
    return shard_map(
        lambda *args: run(how, along, *args),
        mesh,
        in_specs=(have, *where),
        out_specs=out_specs(where[0]),
        backends=choose(function, backend, mesh, params.embedding),
        local_results=not dtensor_beneath(inputs[0]),
    )(params, *inputs)


def update_biases(params: ModelParams, stats: tuple[MoEStats, ...], rate: float) -> ModelParams:
    """Apply :func:`fmoe.update_expert_bias` to every MoE layer, by the step's ``stats`` from :func:`loss`.

    >>> params = init(preset("debug"), 0)
    >>> _, stats = forward(params, torch.randint(256, (2, 16)), preset("debug"))
    >>> update_biases(params, stats, 0.001).layers[1].mlp.router.bias_E.abs().max()
    tensor(0.0010)
    """
    rest = iter(stats)
    layers = tuple(
        layer._replace(mlp=update_expert_bias(layer.mlp, next(rest).tokens_per_expert, rate))
        if isinstance(layer.mlp, MoEParams)
        else layer
        for layer in params.layers
    )
    return params._replace(layers=layers)
