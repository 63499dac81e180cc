"""The parameters of a decoder: their tree, shapes, initial values and placement."""

import dataclasses
from typing import Any, NamedTuple

import optree
import torch

from ..ops.core.dynamo import remembered
from ..ops.experts import ExpertParams
from ..params import P, is_spec, param
from .config import DecoderConfig
from .moe import FSDP, MoEParams, mlp_specs, moe_specs
from .norm import norm_spec


class LayerParams(NamedTuple):
    """One layer. ``mlp`` is :class:`fmoe.ExpertParams` in a dense layer, else :class:`fmoe.MoEParams`.

    ``attention`` holds the params of ``config.attention``. Both norms are (D,).

    >>> from fmoe.models.decoder import preset
    >>> [type(layer.mlp).__name__ for layer in specs(preset("debug")).layers]
    ['ExpertParams', 'MoEParams', 'MoEParams', 'MoEParams']
    """

    attention_norm: torch.Tensor
    attention: Any
    mlp_norm: torch.Tensor
    mlp: ExpertParams | MoEParams


class ModelParams(NamedTuple):
    """A model's parameters, as :func:`fmoe.models.decoder.init` makes them.

    =========  ==========  ========================================
    embedding  (vocab, D)
    layers                 a tuple of :class:`LayerParams`
    norm       (D,)        of the last layer's output
    head       (vocab, D)  ``()`` where the embedding is also the head
    =========  ==========  ========================================

    >>> from fmoe.models.decoder import preset
    >>> tied = specs(dataclasses.replace(preset("debug"), tied_head=True))
    >>> tied.embedding.shape, tied.head
    ((256, 128), ())
    """

    embedding: torch.Tensor
    layers: tuple[LayerParams, ...]
    norm: torch.Tensor
    head: torch.Tensor | tuple[()]


@remembered
def specs(config: DecoderConfig) -> ModelParams:
    """Shapes, initial values and placement of every parameter: a tree of :class:`~fmoe.params.ParamSpec`.

    >>> from fmoe.models.decoder import preset
    >>> tree = specs(preset("671B"))  # nothing is allocated
    >>> tree.layers[3].mlp.experts.w_in.shape, tree.layers[3].mlp.experts.w_in.partition
    ((256, 2, 2048, 7168), P('ep', None, 'tp', 'dp'))
    """
    c = config

    def mlp(layer: int) -> Any:
        if layer < c.num_dense_layers:
            return mlp_specs(c.dim, c.hidden_dim)
        return moe_specs(
            dim=c.dim,
            hidden_dim=c.moe_hidden_dim,
            num_experts=c.num_experts,
            num_shared_experts=c.num_shared_experts,
            shared_gate=c.shared_gate,
        )

    norm, vocabulary = norm_spec(c.dim), param((c.vocab_size, c.dim), P("tp", FSDP))
    tree = ModelParams(
        vocabulary,
        tuple(LayerParams(norm, c.attention.specs(c.dim), norm, mlp(i)) for i in range(c.num_layers)),
        norm,
        () if c.tied_head else vocabulary,
    )
    return optree.tree_map(lambda s: dataclasses.replace(s, scale=c.init_std), tree, is_leaf=is_spec)
