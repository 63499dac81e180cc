"""The norm of all gradients, and gradients scaled by it."""

from collections import Counter, defaultdict
from typing import Any

import optree
import torch
import torch.distributed as dist
from torch._C._functorch import is_functorch_wrapped_tensor

from .errors import argument_error
from .tree import check_tensors, is_dtensor, local, map_local


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
        wide = torch.promote_types(piece.dtype, torch.float32)
        # Not torch._foreach_norm, which has neither vmap nor jvp.
        norms[groups].append(torch.linalg.vector_norm(piece, dtype=wide).to(device, torch.float32))
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


def clip_by_global_norm(grads: Any, max_norm: float, *, donate: bool = False) -> tuple[Any, torch.Tensor]:
    """Gradients scaled to a norm of at most ``max_norm``, and their norm before that.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``
    (Pascanu et al., arXiv:1211.5063), but where the norm isn't finite the gradients stay as they are, so
    that one can see which is at fault. Leaves keep their dtype, and for those in bfloat16 the factor is
    rounded to it, as there; the norm is :func:`global_norm`.

    With ``donate=True`` they are scaled in their own memory: no copy is made, and the caller must not use
    ``grads`` again, nor what they share memory with. Leaves that share memory with each other or within
    themselves, as autograd may return them, are still copied, and so are all where one is part of a graph or
    a transform.

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 1.0)
    ([tensor([0.6000, 0.8000])], tensor(5.))
    """
    if not max_norm > 0:
        raise argument_error(
            "clip_by_global_norm",
            "max_norm",
            got=max_norm,
            expected="a positive number",
            remedy="Pass math.inf for no clipping.",
        )
    norm = global_norm(grads)
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    leaves, structure = optree.tree_flatten(grads)
    ours = _in_place(leaves, factor) if donate and _are_plain(leaves) else [False] * len(leaves)

    def scaled(piece: torch.Tensor) -> torch.Tensor:
        return (piece * _factor_for(piece, factor)).to(piece.dtype)  # a product of two scalars has the wider

    clipped = [leaf if done else map_local(scaled, leaf) for leaf, done in zip(leaves, ours)]
    return optree.tree_unflatten(structure, clipped), norm


def _are_plain(leaves: list[torch.Tensor]) -> bool:
    """Whether nothing follows what is done to these tensors."""
    if torch.compiler.is_compiling():
        return False
    return not any(leaf.requires_grad or is_functorch_wrapped_tensor(local(leaf)) for leaf in leaves)


@torch.no_grad()
def _in_place(leaves: list[torch.Tensor], factor: torch.Tensor) -> list[bool]:
    """Scale the leaves no number of which is also another's, and say which those are."""
    pieces = [local(leaf) for leaf in leaves]
    holders = Counter(piece.untyped_storage()._cdata for piece in pieces)
    alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
    done = []
    for piece in pieces:
        alone = holders[piece.untyped_storage()._cdata] == 1 and not torch._debug_has_internal_overlap(piece)
        done.append(alone)
        if alone:
            alike[piece.device, piece.dtype].append(piece)
    for several in alike.values():
        torch._foreach_mul_(several, _factor_for(several[0], factor))
    return done


def _factor_for(piece: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    # A factor of another dtype makes torch._foreach_mul_ slow; float16 hasn't the range for one.
    return factor.to(piece.device, piece.dtype if piece.dtype == torch.bfloat16 else factor.dtype)
