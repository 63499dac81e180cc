"""The size of a decoder, and the cost of a token."""

import optree

from ..params import is_spec
from ..params import num_params as num_numbers
from .config import DecoderConfig
from .moe import MoEParams
from .params import LayerParams, ModelParams, specs


def num_params(config: DecoderConfig) -> tuple[int, int]:
    """Parameters in all, and those active for one token. Allocates nothing.

    Modules of multi-token prediction count, where the model has them.
    ``top_k`` of the routed experts are active, and everything else but an embedding that is only looked up.
    By this count DeepSeek-V3 has its published 37 billion.

    >>> from fmoe.models.decoder import preset
    >>> num_params(preset("debug"))
    (1695152, 777648)
    """
    tree = specs(config)
    return num_numbers(tree), _num_active(tree, config)


def flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    ``3 * (2 * matmul weights active for a token + layers * heads * (N + V) * (seq_len + 1))``

    In the forward, a weight of a matrix product costs a multiplication and an addition; in the backward,
    twice that. These weights are the active ones of :func:`num_params`, without norms and selection biases. A
    causal token attends to ``(seq_len + 1) / 2`` keys on average. In every head this takes one product of N
    dimensions for the scores and one of V for the values. Attention counts as over whole rows, also where
    segments make it less. A module of multi-token prediction has a layer, its projection, and a further
    product with the head.

    Source: PaLM, arXiv 2204.02311, appendix B, with exact causal attention.

    >>> from fmoe.models.decoder import preset
    >>> f"{flops_per_token(preset('debug'), 1024):.3g}"
    '7.81e+06'
    """
    c = config
    matrices = optree.tree_map(lambda s: () if len(s.shape) == 1 else s, specs(c), is_leaf=is_spec)
    attention = (c.num_layers + c.mtp_layers) * c.attention.num_heads * sum(c.attention.widths)
    weights = _num_active(matrices, c) + c.mtp_layers * _num_of_head(matrices)
    return 3.0 * (2 * weights + attention * (seq_len + 1))


def flops_of_parts(config: DecoderConfig, seq_len: int) -> list[float]:
    """:func:`flops_per_token` of the embedding, of each layer, and of all that comes after the last.

    >>> from fmoe.models.decoder import preset
    >>> parts = flops_of_parts(preset("debug"), 1024)
    >>> len(parts), sum(parts) == flops_per_token(preset("debug"), 1024)
    (6, True)
    """
    c = config
    tree = optree.tree_map(lambda s: () if len(s.shape) == 1 else s, specs(c), is_leaf=is_spec)
    attention = c.attention.num_heads * sum(c.attention.widths) * (seq_len + 1)
    layers = [num_numbers(layer) - _num_resting(layer, c) for layer in tree.layers]
    mtp = [num_numbers(module) - _num_resting(module.layer, c) for module in tree.mtp]
    last = 6.0 * (sum(mtp) + _num_of_head(tree) * (1 + len(mtp))) + 3.0 * attention * len(mtp)
    return [0.0, *(3.0 * (2 * weights + attention) for weights in layers), last]


def _num_active(tree: ModelParams, config: DecoderConfig) -> int:
    layers = *tree.layers, *(module.layer for module in tree.mtp)
    resting = sum(_num_resting(layer, config) for layer in layers)
    return num_numbers(tree) - resting - (0 if config.tied_head else num_numbers(tree.embedding))


def _num_of_head(tree: ModelParams) -> int:
    return num_numbers(tree.embedding if tree.head == () else tree.head)


def _num_resting(layer: LayerParams, config: DecoderConfig) -> int:
    """Those of the experts that a token isn't routed to."""
    experts = num_numbers(layer.mlp.experts) if isinstance(layer.mlp, MoEParams) else 0
    return experts - experts // config.num_experts * config.router.top_k
