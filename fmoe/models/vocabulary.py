"""Embedding and loss over a vocabulary that may be cut along ``tp``. No device sees all logits."""

import torch
import torch.nn.functional as F

from ..errors import argument_error
from ..ops.core.axes import present
from ..ops.cross_entropy import LOGITS_BYTES, cross_entropy_terms
from ..parallel.collectives import all_gather, axis_index, axis_size, psum

IGNORED = -100


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows (..., D) of ``weight`` (vocab, D). Each device along ``tp`` holds its part of it."""
    axes = present("tp")
    if axis_size(axes) == 1:
        try:
            return F.embedding(ids, weight)
        except IndexError as error:  # on a CPU; CUDA reports it at its next wait
            got, expected = "an id outside the vocabulary", f"0 to {weight.shape[0] - 1}"
            remedy = "Use the tokenizer that the model is for."
            raise argument_error("embed", "ids", got=got, expected=expected, remedy=remedy) from error
    index, here = _mine(ids, weight.shape[0], axes)
    return psum(torch.where(here[..., None], F.embedding(index, weight), 0), axes)


def summed_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, logits_bytes: int = LOGITS_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropies of ``x @ weight.mT``, float32 or wider, and how many there are.

    ============  ==========  ==============================================================
    x             (..., D)    hidden states
    weight        (vocab, D)  each device along ``tp`` holds its part of it
    targets       (...)       int64; -100 means no cross entropy
    logits_bytes              the most bytes of float32 logits at once, but at least 64 columns
    ============  ==========  ==============================================================

    Between forward and backward it keeps ``x`` and a number per token. The backward recomputes the logits.
    """
    axes, counted, rows = present("tp"), targets != IGNORED, x.flatten(0, -2)
    # -1 means "no entry" to the operator, but is an invalid target. Like all below zero it is refused.
    index = torch.where(counted, torch.where(targets < 0, weight.shape[0], targets), -1).flatten()
    if axis_size(axes) > 1:
        local, here = _mine(torch.where(counted, targets, 0).flatten(), weight.shape[0], axes)
        index = torch.where(here & counted.flatten(), local, -1)
    total, chosen = cross_entropy_terms(rows, weight, index, logits_bytes).unbind()
    if axis_size(axes) > 1:
        top = all_gather(total.detach()[None], axes).amax(0)
        total, chosen = psum((total - top).exp(), axes).log() + top, psum(chosen, axes)
    return torch.where(counted.flatten(), total - chosen, 0).sum(), counted.sum()


def _mine(ids: torch.Tensor, rows: int, axes: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids as rows of this device's part of the vocabulary, and which of them are in it."""
    inside = (ids >= 0) & (ids < rows * axis_size(axes))
    torch._assert_async(
        inside.all(),
        "vocabulary: ids: got one outside of it, along tp. Use the tokenizer that the model is for.",
    )
    local = ids - axis_index(axes) * rows
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here
