"""DeepSeek-V3: latent attention, dense first layers, mixture-of-experts layers with shared experts."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F

from ..errors import argument_error
from ..ops.balance import MoEStats, update_expert_bias
from ..ops.experts import ExpertParams
from ..tree import P, init_params, is_spec, param
from ..tree import num_params as num_numbers
from .attention import (
    FSDP,
    AttentionParams,
    Rope,
    attention_forward,
    attention_specs,
    rms_norm,
    rope_table,
)
from .config import DeepSeekV3Config as DeepSeekV3Config  # re-exported
from .config import preset as preset
from .moe import MoEParams, mlp_forward, mlp_specs, moe_forward, moe_specs


class LayerParams(NamedTuple):
    """One layer; ``mlp`` is :class:`ExpertParams` in a dense layer and :class:`MoEParams` otherwise."""

    attention_norm: torch.Tensor
    attention: AttentionParams
    mlp_norm: torch.Tensor
    mlp: ExpertParams | MoEParams


class ModelParams(NamedTuple):
    """``embedding`` (vocab, D), ``layers``, ``norm`` (D,), ``head`` (vocab, D) or ``()`` if tied."""

    embedding: torch.Tensor
    layers: tuple[LayerParams, ...]
    norm: torch.Tensor
    head: torch.Tensor | tuple[()]


def specs(config: DeepSeekV3Config) -> ModelParams:
    """Shapes, initial values and placement of every parameter: a tree of ``ParamSpec``."""
    c = config

    def norm() -> Any:
        return param((c.dim,), P(None), init="ones")

    def mlp(layer: int) -> Any:
        if layer < c.num_dense_layers:
            return mlp_specs(c.dim, c.hidden_dim, FSDP)
        return moe_specs(
            dim=c.dim,
            hidden_dim=c.moe_hidden_dim,
            num_experts=c.num_experts,
            num_shared_experts=c.num_shared_experts,
        )

    tree = ModelParams(
        param((c.vocab_size, c.dim), P("tp", FSDP)),
        tuple(LayerParams(norm(), attention_specs(c), norm(), mlp(i)) for i in range(c.num_layers)),
        norm(),
        () if c.tied_head else param((c.vocab_size, c.dim), P("tp", FSDP)),
    )
    return optree.tree_map(lambda s: dataclasses.replace(s, scale=c.init_std), tree, is_leaf=is_spec)


def init(
    config: DeepSeekV3Config,
    seed: int | torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> ModelParams:
    """Random parameters: normal of deviation ``config.init_std``, norms one, biases zero.

    >>> params = init(preset("debug"), 0)
    >>> len(params.layers), params.embedding.shape
    (4, torch.Size([256, 128]))
    """
    return init_params(specs(config), seed, dtype=dtype, device=device)


def forward(
    params: ModelParams,
    tokens: torch.Tensor,
    config: DeepSeekV3Config,
    *,
    per_layer: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda layer: layer,
) -> tuple[torch.Tensor, tuple[MoEStats, ...]]:
    """Logits of every position's next token, and the statistics of every MoE layer.

    ==========  ==============  =============================================================
    params                      from :func:`init`
    tokens      (B, L)          int64, below ``config.vocab_size``
    per_layer                   wraps the function of one layer: ``fmoe.remat``, ``torch.compile``
    -> logits   (B, L, vocab)   dtype of the parameters
    -> stats                    one :class:`MoEStats` for each MoE layer
    ==========  ==============  =============================================================

    Raises ``ValueError`` for tokens of a wrong dtype or shape.

    Source: arXiv 2412.19437.

    >>> config = preset("debug")
    >>> logits, stats = forward(init(config, 0), torch.randint(256, (2, 16)), config)
    >>> logits.shape, len(stats)
    (torch.Size([2, 16, 256]), 3)
    """
    check_tokens("forward", "tokens", tokens, config)
    rope = rope_table(config, tokens.shape[1], tokens.device)
    x = F.embedding(tokens, params.embedding)
    # One function for all layers, so that what wraps it (a compiler, say) sees it as one.
    layer = per_layer(_layer)
    stats: list[MoEStats] = []
    for layer_params in params.layers:
        x, found = layer(layer_params, x, rope, config)
        stats += found
    x = rms_norm(x, params.norm, config.norm_eps)
    head = params.head if isinstance(params.head, torch.Tensor) else params.embedding
    return F.linear(x, head), tuple(stats)


def _layer(
    params: LayerParams, x: torch.Tensor, rope: Rope, config: DeepSeekV3Config
) -> tuple[torch.Tensor, tuple[MoEStats, ...]]:
    eps = config.norm_eps
    x = x + attention_forward(params.attention, rms_norm(x, params.attention_norm, eps), rope, config)
    normed = rms_norm(x, params.mlp_norm, eps)
    if isinstance(params.mlp, ExpertParams):
        return x + mlp_forward(params.mlp, normed), ()
    y, stats = moe_forward(params.mlp, normed, router=config.router, return_stats=True)
    return x + y, (stats,)


def loss(
    params: ModelParams,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    config: DeepSeekV3Config,
    **options: Any,
) -> tuple[torch.Tensor, tuple[MoEStats, ...]]:
    """Mean cross entropy in nats, float32 or wider, and the statistics of every MoE layer.

    ``tokens`` and ``targets`` are int64 (B, L); ``options`` are those of :func:`forward`. A training loop
    differentiates it with ``fmoe.value_and_grad(loss, has_aux=True)``.

    >>> config = preset("debug")
    >>> tokens = torch.randint(256, (2, 16))
    >>> value, stats = loss(init(config, 0), tokens, tokens, config)
    >>> abs(value.item() - 5.5) < 0.5      # near log(256) before any training
    True
    """
    check_tokens("loss", "targets", targets, config)
    logits, stats = forward(params, tokens, config, **options)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten()), stats


def update_biases(params: ModelParams, stats: tuple[MoEStats, ...], rate: float) -> ModelParams:
    """New params whose routers lean towards the experts that got too few tokens in ``stats``."""
    rest = iter(stats)
    layers = tuple(
        layer._replace(mlp=update_expert_bias(layer.mlp, next(rest).tokens_per_expert, rate))
        if isinstance(layer.mlp, MoEParams)
        else layer
        for layer in params.layers
    )
    return params._replace(layers=layers)


def num_params(config: DeepSeekV3Config) -> tuple[int, int]:
    """Parameters in all, and those active for one token; allocates nothing.

    Active are, of the routed experts, ``top_k``, and everything else but an embedding that is only looked up:
    with this count DeepSeek-V3 has its published 37 billion.

    >>> num_params(preset("debug"))
    (1695152, 777648)
    """
    tree = specs(config)
    return num_numbers(tree), _num_active(tree, config)


def flops_per_token(config: DeepSeekV3Config, seq_len: int) -> float:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    ``3 * (2 * matmul weights active for a token + layers * heads * (N + R + V) * (seq_len + 1))``

    Going forward a weight of a matrix product costs a multiplication and an addition, going backward twice
    that; the weights are those :func:`num_params` calls active, without norms and selection biases. A causal
    token attends to ``(seq_len + 1) / 2`` keys on average, in every head through one product of N + R
    dimensions for the scores and one of V for the values.

    Source: PaLM, arXiv 2204.02311, appendix B, with exact causal attention.

    >>> f"{flops_per_token(preset('debug'), 1024):.3g}"
    '7.81e+06'
    """
    c = config
    matrices = optree.tree_map(lambda s: () if len(s.shape) == 1 else s, specs(c), is_leaf=is_spec)
    attention = c.num_layers * c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 3.0 * (2 * _num_active(matrices, c) + attention * (seq_len + 1))


def _num_active(tree: ModelParams, config: DeepSeekV3Config) -> int:
    experts = sum(num_numbers(layer.mlp.experts) for layer in tree.layers if isinstance(layer.mlp, MoEParams))
    resting = experts - experts // config.num_experts * config.router.top_k
    return num_numbers(tree) - resting - (0 if config.tied_head else num_numbers(tree.embedding))


def check_tokens(function: str, argument: str, tokens: torch.Tensor, config: DeepSeekV3Config) -> None:
    """Raise ``ValueError`` unless ``tokens`` are int64 (B, L) of at most ``max_seq_len`` positions."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise argument_error(
            function,
            argument,
            got=f"{tokens.dtype} of shape {tuple(tokens.shape)}",
            expected="torch.int64 of shape (B, L)",
            remedy="Convert with .long(), and give one sequence a batch dimension.",
        )
    if tokens.numel() == 0:
        raise argument_error(
            function,
            argument,
            got=f"no token, of shape {tuple(tokens.shape)}",
            expected="at least one",
            remedy="Leave empty batches out.",
        )
    if tokens.shape[1] > config.max_seq_len:
        raise argument_error(
            function,
            argument,
            got=f"{tokens.shape[1]} positions",
            expected=f"at most max_seq_len={config.max_seq_len}",
            remedy="Cut the sequences, or raise max_seq_len.",
        )
