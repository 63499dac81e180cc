"""Parameters that move along the same axes in the same dtypes travel together, in one collective.

A bucket is the flat pieces of its parameters, one behind the other. Each begins at a multiple of 64 bytes, as
kernels want it. Gathering makes a row of every device's pieces, of which whole parameters are then copied.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..ops.core.axes import resolve
from ..tree import node, static
from .collective_ops import arrived, begin_gather, begin_reduce, gather_params_op
from .collectives import axis_index, axis_size, gather_params

ALIGNED = 64  # bytes

Move = tuple[str, int, tuple[str, ...]]


@node
class Placed:
    """This device's piece of a parameter, the moves to where it is computed with, and in which dtype that is.

    Its gradient is summed along the axes of its moves in the dtype ``summed``, and then has that of the
    piece.
    """

    piece: torch.Tensor
    moves: tuple[Move, ...] = static()
    dtype: torch.dtype = static()
    summed: torch.dtype = static()


class Bucket(NamedTuple):
    """Some of a list of parameters: ``where`` they are in it, and what is to be known of each.

    ``statics`` are what a collective wants: the three dtypes, the number of devices and their group.
    """

    statics: tuple[torch.dtype, torch.dtype, torch.dtype, int, str]
    where: tuple[int, ...]
    dims: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]


def buckets_of(leaves: Sequence[Any]) -> list[Bucket]:
    """The buckets of leaves whose only move is a gather. Other leaves move alone."""
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Placed) and [step for step, *_ in leaf.moves] == ["gather"]:
            along = leaf.moves[0][2], leaf.piece.dtype, leaf.dtype, leaf.summed
            found.setdefault(along, []).append(i)
    return [_bucket(leaves, along, where) for along, where in found.items()]


def _bucket(leaves: Sequence[Any], along: Any, where: list[int]) -> Bucket:
    axes, kept, moved, summed = along
    group = resolve("use", axes)
    shapes = [tuple(leaves[i].piece.shape) for i in where]
    step = ALIGNED // moved.itemsize
    lengths = [-(-math.prod(shape) // step) * step for shape in shapes]
    dims = [leaves[i].moves[0][1] for i in where]
    statics = (kept, moved, summed, group.size, group.name)
    return Bucket(statics, tuple(where), tuple(dims), tuple(shapes), tuple(lengths))


def use(tree_leaves: Sequence[Any]) -> list[torch.Tensor]:
    """Tensors to compute with: what is :class:`Placed` is cast and moved, and the rest stays as it is."""
    whole: dict[int, torch.Tensor] = {}
    for bucket in buckets_of(tree_leaves):
        pieces = [tree_leaves[i].piece for i in bucket.where]
        rows = [
            pad(piece.reshape(1, -1), (0, length - piece.numel()))
            for piece, length in zip(pieces, bucket.lengths)
        ]
        gathered = gather_params_op(torch.cat(rows, 1), *bucket.statics)
        whole |= zip(bucket.where, unpacked(gathered, bucket))
    return [whole[i] if i in whole else _alone(leaf) for i, leaf in enumerate(tree_leaves)]


def _alone(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, Placed):
        return leaf
    x, gathers = leaf.piece, [i for i, (step, *_) in enumerate(leaf.moves) if step == "gather"]
    if not gathers:
        x = x.to(leaf.dtype)
    for i, (step, dim, axes) in enumerate(leaf.moves):
        if step == "gather":  # the last one casts, so that no cotangent is rounded before its last sum
            to = leaf.dtype if i == gathers[-1] else x.dtype
            x = gather_params(x, axes, dim=dim, dtype=to, reduce_dtype=leaf.summed)
        else:
            size = x.shape[dim] // axis_size(axes)
            x = x.narrow(dim, axis_index(axes) * size, size)
    return x


def unpacked(gathered: torch.Tensor, bucket: Bucket) -> Iterator[torch.Tensor]:
    """Whole parameters of a gathered bucket (n, N)."""
    for row, dim, shape in zip(gathered.split(bucket.lengths, 1), bucket.dims, bucket.shapes):
        pieces = row[:, : math.prod(shape)].reshape(len(row), *shape)
        yield pieces.movedim(0, dim).flatten(dim, dim + 1)


def scatter(leaves: Sequence[Any], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The transpose of :func:`use`, without a derivative of its own: cotangents of the pieces."""
    found: dict[int, Any] = {}
    mine = buckets_of(leaves)
    sums = [
        begin_sum([cotangents[i] for i in bucket.where], bucket, leaves[bucket.where[0]].piece.device)
        for bucket in mine
    ]
    for bucket in mine:
        found |= zip(bucket.where, finish_sum(sums.pop(0), bucket))
    return [found[i] if i in found else _pulled(leaf, cotangents[i]) for i, leaf in enumerate(leaves)]


def _pulled(leaf: Any, cotangent: torch.Tensor) -> torch.Tensor:
    if not isinstance(leaf, Placed):
        return cotangent
    with torch.enable_grad():
        piece = leaf.piece.detach().requires_grad_()
        moved = _alone(Placed(piece, leaf.moves, leaf.summed, leaf.summed))  # not rounded before it is summed
    return torch.autograd.grad(moved, piece, cotangent.to(moved.dtype))[0]


# ---- begun now, waited for later; without derivatives ----------------------------------------------------


def begin(pieces: Iterable[torch.Tensor], bucket: Bucket) -> torch.Tensor:
    """Begin to gather a bucket; :func:`finish` waits for it."""
    _, moved, *_ = bucket.statics
    pieces = [piece.reshape(-1) for piece in pieces]
    flat = pieces[0].new_empty(1, sum(bucket.lengths), dtype=moved)
    rows = [row[: len(piece)] for row, piece in zip(flat[0].split(bucket.lengths), pieces)]
    torch._foreach_copy_(rows, pieces)
    return begin_gather(flat, *bucket.statics)


def finish(gathered: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    """Whole parameters of a bucket whose gathering was begun."""
    return list(unpacked(arrived(gathered), bucket))


def begin_sum(
    cotangents: Iterable[torch.Tensor | None], bucket: Bucket, device: torch.device
) -> torch.Tensor:
    """Begin to sum the cotangents of whole parameters; :func:`finish_sum` waits.

    Where this device has none, others may, so it sends zeros.
    """
    _, _, summed, size, _ = bucket.statics
    flat = torch.empty(size, sum(bucket.lengths), dtype=summed, device=device)
    rows, all_pieces = [], []
    for row, g, dim, shape in zip(flat.split(bucket.lengths, 1), cotangents, bucket.dims, bucket.shapes):
        if g is None:
            row.zero_()
        else:
            pieces = g.unflatten(dim, (size, shape[dim])).movedim(dim, 0)
            rows.append(row[:, : math.prod(shape)].view(pieces.shape))
            all_pieces.append(pieces)
    if rows:
        torch._foreach_copy_(rows, all_pieces)
    return begin_reduce(flat, *bucket.statics)


def finish_sum(sums: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    """The cotangents of the pieces."""
    kept, *_ = bucket.statics
    flat = arrived(sums).to(kept)[0].split(bucket.lengths)
    return [row[: math.prod(shape)].view(shape) for row, shape in zip(flat, bucket.shapes)]
