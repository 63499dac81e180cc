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


class MTPParams(NamedTuple):
    """A module of multi-token prediction, without the embedding and the head, which are the model's.

    ==============  =========  ================================================================
    embedding_norm  (D,)       of a later token's embedding
    hidden_norm     (D,)       of what the module before, or the model, gives its head
    proj            (D, 2 D)   of both, the embedding first
    layer                      :class:`LayerParams`, with experts
    norm            (D,)       of the layer's output, before the head
    ==============  =========  ================================================================

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, and its published weights.

    >>> from fmoe.models.decoder import preset
    >>> (module,) = specs(preset("671B", mtp_layers=1)).mtp
    >>> module.proj.shape
    (7168, 14336)
    """

    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor
    proj: torch.Tensor
    layer: LayerParams
    norm: torch.Tensor


class ModelParams(NamedTuple):
    """A model's parameters, as :func:`fmoe.models.decoder.init` makes them.

    =========  ==========  ========================================
    embedding  (vocab, D)
    layers                 a tuple of :class:`LayerParams`
    norm       (D,)        of the last layer's output
    head       (vocab, D)  ``()`` where the embedding is also the head
    mtp                    a tuple of ``config.mtp_layers`` :class:`MTPParams`
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
    mtp: tuple[MTPParams, ...] = ()


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
    number = c.num_layers
    layers = [LayerParams(norm, c.attention.specs(c.dim), norm, mlp(i)) for i in range(number + c.mtp_layers)]
    both = param((c.dim, 2 * c.dim), P(None, FSDP))
    tree = ModelParams(
        vocabulary,
        tuple(layers[:number]),
        norm,
        () if c.tied_head else vocabulary,
        tuple(MTPParams(norm, norm, both, layer, norm) for layer in layers[number:]),
    )
    return optree.tree_map(lambda s: dataclasses.replace(s, scale=c.init_std), tree, is_leaf=is_spec)
