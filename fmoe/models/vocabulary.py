"""Embedding and loss over a vocabulary that may be cut along ``tp``. No device sees all logits."""

import torch
import torch.nn.functional as F

from ..errors import argument_error
from ..ops.core.axes import present
from ..ops.cross_entropy import LOGITS_BYTES, cross_entropy_sum, cross_entropy_terms
from ..parallel.boundary import unwrapped
from ..parallel.collectives import all_gather, axis_index, axis_size, psum

IGNORED = -100
OUTSIDE = (
    "vocabulary: tokens, targets: got an id outside of it, on this device or another, expected 0 to "
    "vocab_size - 1, or -100 among targets. Use the tokenizer that the model is for."
)

BELOW = (
    "decoder: segment_ids: got an id below zero, on this device or another, expected 0 for padding, else "
    "positive ids."
)


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows (..., D) of ``weight`` (vocab, D). Each device along ``tp`` holds its part of it."""
    axes = present("tp")
    if axis_size(axes) == 1:
        try:
            return _rows(ids, weight)
        except IndexError as error:  # on a CPU; CUDA reports it at its next wait
            got, expected = "an id outside the vocabulary", f"0 to {weight.shape[0] - 1}"
            remedy = "Use the tokenizer that the model is for."
            raise argument_error("embed", "ids", got=got, expected=expected, remedy=remedy) from error
    index, here = _mine(ids, weight.shape[0], axes)
    return psum(torch.where(here[..., None], _rows(index, weight), 0), axes)


def _rows(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if unwrapped(ids).numel():
        return F.embedding(ids, weight)
    return weight[ids]  # under vmap over no example F.embedding's gradient has a wrong shape


def summed_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, logits_bytes: int = LOGITS_BYTES
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropies of ``x @ weight.mT``, float32 or wider, and how many there are.

    ============  ==========  ==============================================================
    x             (..., D)    hidden states
    weight        (vocab, D)  each device along ``tp`` holds its part of it
    targets       (...)       int64; -100 means no cross entropy
    logits_bytes              the most bytes of float32 logits at once, but at least 64 rows or columns
    ============  ==========  ==============================================================

    Where both gradients are wanted, the forward computes them. They wait for the backward in float32 or
    wider. Along ``tp``, or where only one of them is wanted, ``x`` and a number per token wait, and the
    backward computes the logits again.
    """
    axes, counted, rows = present("tp"), targets != IGNORED, x.flatten(0, -2)
    # -1 means "no entry" to the operator, but is an invalid target. Like all below zero it is refused.
    index = torch.where(counted, torch.where(targets < 0, weight.shape[0], targets), -1).flatten()
    if axis_size(axes) == 1 and torch.is_grad_enabled() and x.requires_grad and weight.requires_grad:
        return cross_entropy_sum(rows, weight, index, logits_bytes), counted.sum()
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
    local = ids - axis_index(axes) * rows
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here


def within(ids: torch.Tensor, vocab_size: int, also: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with 0 in place of those outside the vocabulary, and how many these are. ``also`` is an id, too.

    On a mesh an error of one device would leave the others waiting. So each counts, and all raise together by
    :func:`refuse_outside`.
    """
    outside = (ids < 0) | (ids >= vocab_size)
    if also is not None:
        outside = outside & (ids != also)
    return torch.where(outside, 0, ids), outside.sum()


def refuse_outside(outside: torch.Tensor, below: torch.Tensor) -> None:
    """Raise ``RuntimeError`` if any device counted ids outside the vocabulary, or segment ids below zero.

    On CUDA the device does.
    """
    for number, text in ((outside, OUTSIDE), (below, BELOW)):
        # A batch of examples has a number for each.
        torch._assert_async((unwrapped(number) == 0).all(), text)
