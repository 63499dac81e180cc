"""Embedding and loss over a vocabulary that may be cut along ``tp``: no device sees all logits."""

import torch
import torch.nn.functional as F

from ..ops.axes import present
from ..parallel.collectives import all_gather, axis_index, axis_size, psum

IGNORED = -100


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows (..., D) of ``weight`` (vocab, D), of which each device along ``tp`` holds its part."""
    axes = present("tp")
    if axis_size(axes) == 1:
        return F.embedding(ids, weight)
    index, here = _mine(ids, weight.shape[0], axes)
    return psum(torch.where(here[..., None], F.embedding(index, weight), 0), axes)


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropies' sum, float32 or wider, and how many there are; a target of -100 has none.

    ``logits`` is (..., vocab), ``targets`` int64 (...); each device along ``tp`` holds its part of the
    vocabulary.
    """
    wide, axes = logits.to(torch.promote_types(logits.dtype, torch.float32)), present("tp")
    counted = targets != IGNORED
    if axis_size(axes) == 1:
        total = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="sum")
        return total, counted.sum()
    index, here = _mine(torch.where(counted, targets, 0), wide.shape[-1], axes)
    top = all_gather(wide.detach().amax(-1)[None], axes).amax(0)
    spread = psum((wide - top[..., None]).exp().sum(-1), axes).log() + top
    chosen = psum(torch.where(here, wide.gather(-1, index[..., None]).squeeze(-1), 0), axes)
    return torch.where(counted, spread - chosen, 0).sum(), counted.sum()


def _mine(ids: torch.Tensor, rows: int, axes: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids within this device's part of the vocabulary, and which of them are in it."""
    torch._assert_async(((ids >= 0) & (ids < rows * axis_size(axes))).all(), "an id outside the vocabulary")
    local = ids - axis_index(axes) * rows
    here = (local >= 0) & (local < rows)
    return torch.where(here, local, 0), here
