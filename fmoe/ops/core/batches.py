"""The parts of ``vmap`` rules: a batch as one larger call of the same operator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange

from .derive import Dims, Tensors


class Fold(NamedTuple):
    """A ``vmap`` rule's answer: the batch as one larger call of the same operator.

    ``operator(*args)`` computes it, and ``unfold`` turns its outputs into batched ones, batch first. Kept
    outputs are handed back through ``refold``, the inverse of ``unfold``.

    >>> from fmoe.ops.bases import gather
    >>> x, index = torch.tensor([5.0, 7.0]), torch.tensor([[0, 1], [1, 1]])
    >>> fold = gather.rules.vmap(2, (None, 0), x, index)  # the same x for two examples
    >>> gather(*fold.args), fold.unfold((gather(*fold.args),))
    (tensor([5., 7., 7., 7.]), (tensor([[5., 7.],
            [7., 7.]]),))
    """

    args: tuple[Any, ...]
    unfold: Callable[[Tensors], Tensors]
    refold: Callable[[Tensors], Tensors]


def front(value: Any, dim: int | None, size: int) -> Any:
    """A value with its batch in front, which it has at ``dim`` if it has one."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def one_more(batch: torch.Tensor) -> torch.Tensor:
    """A batch, and an example of zeros after it."""
    return torch.cat([batch, batch.new_zeros(1, *batch.shape[1:])])


def fold_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of a batch as rows of one tensor."""
    return rearrange(x, "b n ... -> (b n) ...")


def more_rows(size: int, *args: Any) -> Fold:
    """A batch as more rows, which ``args`` have already: every output has as many rows for each example."""
    return Fold(
        args,
        lambda outs: tuple(rearrange(o, "(b n) ... -> b n ...", b=size) for o in outs),
        lambda outs: tuple(map(fold_rows, outs)),
    )


def wider_rows(size: int, dims: Dims, x: torch.Tensor, *others: Any) -> Fold | None:
    """The rule of an operator that moves rows: those of a batch that go one way are wider rows."""
    if any(d is not None for d in dims[1:]):
        return None

    def swap(outs: Tensors) -> Tensors:
        return tuple(rearrange(o, "a b ... -> b a ...") for o in outs)

    return Fold((*swap((x,)), *others), swap, swap)


def same_rows(*args: Any) -> Fold:
    """A batch that the operator takes as it is."""
    return Fold(args, lambda outs: outs, lambda outs: outs)


def elementwise(size: int, dims: Dims, x: torch.Tensor, *statics: Any) -> Fold:
    """The rule of an operator that treats every element of its only tensor alike."""
    return same_rows(x, *statics)


def one_by_one(size: int, dims: Dims, *inputs: Any) -> None:
    """The rule of an operator for which there is no larger call."""


def each(call: Callable[..., Tensors], size: int, dims: Dims, *inputs: Any) -> Tensors:
    """The outputs of ``call`` for one example after another."""
    examples = ([a if d is None else a[i] for a, d in zip(inputs, dims)] for i in range(size))
    return tuple(map(torch.stack, zip(*(call(*example) for example in examples))))
