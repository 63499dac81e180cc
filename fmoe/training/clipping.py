"""The norm of all gradients, and gradients scaled by it."""

from collections import defaultdict
from typing import Any

import optree
import torch
import torch.distributed as dist

from ..errors import argument_error
from ..ops.core.dtensors import is_dtensor, local, map_local
from ..ops.core.dtypes import accumulator
from ..tree import check_tensors


def global_norm(grads: Any) -> torch.Tensor:
    """The Euclidean norm of all leaves as one vector: a float32 scalar, summed in float32 or wider.

    Leaves may be DTensors; those sharded alike share one collective, and the result is a plain
    tensor with the same bits on every rank. Nothing waits for the device, and no leaf is copied but by
    the CPU's kernel for dtypes narrower than float32, one at a time.

    Raises ``ValueError`` for leaves that aren't tensors.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    leaves = check_tensors("global_norm", "grads", grads)
    device = leaves[0].device if leaves else None
    norms: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for leaf in leaves:
        piece, groups = _piece(leaf)
        # Not torch._foreach_norm, which has neither vmap nor jvp.
        norm = torch.linalg.vector_norm(piece, dtype=accumulator(piece.dtype))
        norms[groups].append(norm.to(device, torch.float32))
    total = torch.zeros((), device=device)
    for groups, parts in norms.items():
        part = torch.stack(parts).square().sum()
        for group in groups:
            # Gathered and then summed, in one order, so that the norm has the same bits on every rank.
            gathered = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(gathered, part, group=group)
            part = torch.stack(gathered).sum()
        total = total + part
    return total.sqrt()


def _piece(leaf: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """What this device holds of a leaf, and the process groups over which the rest of it lies."""
    if not is_dtensor(leaf):
        return leaf, ()
    from torch.distributed.tensor import Replicate

    summed = [Replicate() if p.is_partial() else p for p in leaf.placements]
    if summed != list(leaf.placements):
        leaf = leaf.redistribute(placements=summed)
    groups = [leaf.device_mesh.get_group(i) for i, p in enumerate(summed) if not p.is_replicate()]
    return local(leaf), tuple(groups)


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What to multiply gradients of this norm by, so that it is at most ``max_norm``: a float32 scalar.

    It is ``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al.,
    arXiv:1211.5063), but 1 where the norm isn't finite, so that one can see which gradient is at fault.
    An optimizer's ``update`` takes it as ``scale``.

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> grads = [torch.tensor([3.0, 4.0])]
    >>> clip_factor(global_norm(grads), 1.0)
    tensor(0.2000)
    """
    if not max_norm > 0:
        raise argument_error(
            "clip_factor",
            "max_norm",
            got=max_norm,
            expected="a positive number",
            remedy="Pass math.inf for no clipping.",
        )
    return torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, torch.Tensor]:
    """Gradients times :func:`clip_factor`, in their dtype, and their :func:`global_norm` before that.

    Where they go to an optimizer next, let it multiply: that needs no copy of them, nor time.

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 1.0)
    ([tensor([0.6000, 0.8000])], tensor(5.))
    """
    norm = global_norm(grads)
    factor = clip_factor(norm, max_norm)

    def scaled(piece: torch.Tensor) -> torch.Tensor:
        return (piece * factor.to(piece.device)).to(piece.dtype)  # a product of two scalars has the wider

    return optree.tree_map(lambda leaf: map_local(scaled, leaf), grads), norm
