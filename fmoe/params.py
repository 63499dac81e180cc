"""Descriptions of parameters: one tree of :class:`ParamSpec` gives a model's shapes, values and placement."""

import dataclasses
import hashlib
import math
from typing import Any, Literal

import optree
import torch

from .errors import argument_error
from .tree import dotted_names


class P(tuple[Any, ...]):
    """A partition spec: for each dimension a mesh axis, a tuple of axes, or ``None``.

    It describes placement and is a leaf, never a pytree node.

    >>> P("ep", None, ("dp", "tp"))
    P('ep', None, ('dp', 'tp'))
    """

    __slots__ = ()

    def __new__(cls, *axes: str | tuple[str, ...] | None) -> "P":
        return super().__new__(cls, axes)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)  # copying and unpickling call P with these

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, how it starts, and which mesh axes its dimensions lie on.

    ``init`` is ``"normal"``, ``"zeros"`` or ``"ones"``. A normal has the standard deviation ``scale`` and is
    cut at three of them. ``dtype`` overrides the dtype that the tree is initialised with. ``trained``
    says whether the optimiser moves it.

    >>> specs = {"w": ParamSpec((4, 2), P("ep", None)), "b": ParamSpec((4,), P("ep"), init="zeros")}
    >>> params = init_params(specs, 0, dtype=torch.float32)
    >>> params["b"], partition_specs(specs)["w"], num_params(specs)
    (tensor([0., 0., 0., 0.]), P('ep', None), 12)
    """

    shape: tuple[int, ...]
    partition: P
    init: Literal["normal", "zeros", "ones"] = "normal"
    scale: float = 0.02
    dtype: torch.dtype | None = None
    trained: bool = True

    def draw(
        self, seed: int, name: str, *, dtype: torch.dtype, device: Any, piece: tuple[slice, ...] = ()
    ) -> torch.Tensor:
        """The initial value, or a piece of it. A piece has the same numbers as the whole has there."""
        shape = torch.empty(self.shape, device="meta")[piece].shape
        out = torch.empty(shape, dtype=self.dtype or dtype, device=device)
        if out.is_meta:
            return out
        if self.init != "normal":
            return out.fill_(1.0 if self.init == "ones" else 0.0)
        if len(self.shape) < 3:
            return out.copy_(self._normal(f"{seed}/{name}", self.shape, device)[piece])
        # One matrix at a time, since a device holds only a few of the experts.
        first, *rest = piece or (slice(None),)
        for row, i in zip(out, range(self.shape[0])[first]):
            row.copy_(self._normal(f"{seed}/{name}/{i}", self.shape[1:], device)[tuple(rest)])
        return out

    def _normal(self, key: str, shape: tuple[int, ...], device: Any) -> torch.Tensor:
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
        # Draw in float32, so that a seed means the same parameters in every dtype.
        draw = torch.empty(shape, dtype=torch.float32, device=device)
        cut = 3 * self.scale
        return torch.nn.init.trunc_normal_(draw, std=self.scale, a=-cut, b=cut, generator=generator)


def param(shape: tuple[int, ...], partition: P, **how: Any) -> Any:
    """A :class:`ParamSpec`, typed so that it can stand in a tree where a tensor will.

    >>> param((4,), P("ep"), init="zeros").shape
    (4,)
    """
    return ParamSpec(shape, partition, **how)


def is_spec(value: Any) -> bool:
    return isinstance(value, ParamSpec)


def init_params(
    specs: Any,
    seed: int | torch.Generator,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    pieces: Any = None,
) -> Any:
    """Initial values for a tree of :class:`ParamSpec`, or pieces of them: a tree of tuples of slices.

    Every leaf draws from its own generator, seeded by ``seed`` and the leaf's dotted name. In a leaf of three
    or more dimensions, so does every entry of the first. So adding a parameter changes no other, and a device
    draws little more than its pieces. A generator as ``seed`` gives one number, the seed. Values depend on
    the device type, as PyTorch's generators do.

    Raises ``ValueError`` if ``pieces`` and ``specs`` are different trees.

    >>> specs = {"b": ParamSpec((3,), P(None), init="zeros"), "w": ParamSpec((2, 3), P(None, "tp"))}
    >>> params = init_params(specs, 0, dtype=torch.bfloat16)
    >>> right = init_params(specs, 0, dtype=torch.bfloat16, pieces={"b": (), "w": (slice(2), slice(1, 3))})
    >>> params["b"], torch.equal(right["w"], params["w"][:, 1:])
    (tensor([0., 0., 0.], dtype=torch.bfloat16), True)
    """
    device = torch.get_default_device() if device is None else device
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    leaves, treedef = optree.tree_flatten(specs)
    which = [()] * len(leaves) if pieces is None else treedef.flatten_up_to(pieces)
    named = zip(leaves, dotted_names(specs), which)
    values = [leaf.draw(seed, name, dtype=dtype, device=device, piece=piece) for leaf, name, piece in named]
    return treedef.unflatten(values)


def partition_specs(specs: Any) -> Any:
    """The :class:`P` of every parameter in a tree of :class:`ParamSpec`.

    >>> partition_specs({"w": ParamSpec((4, 2), P("ep", None)), "b": ParamSpec((4,), P("ep"))})
    {'w': P('ep', None), 'b': P('ep')}
    """
    return optree.tree_map(lambda spec: spec.partition, specs)


def trained_mask(specs: Any) -> Any:
    """Which parameters of a tree of :class:`ParamSpec` are trained: a tree of bools, for ``adamw(trained=)``.

    >>> trained_mask({"w": ParamSpec((4, 2), P()), "bias": ParamSpec((4,), P(), trained=False)})
    {'w': True, 'bias': False}
    """
    return optree.tree_map(lambda spec: spec.trained, specs)


def leaf_mask(function: str, argument: str, mask: Any, tree: Any) -> list[bool]:
    """A bool for every leaf of a tree, from a tree prefix of bools or a function of the tree that gives one.

    >>> leaf_mask("adamw", "trained", {"a": True, "b": False}, {"a": 1, "b": [2, 3]})
    [True, False, False]
    """
    mask = mask(tree) if callable(mask) else mask
    try:
        found = optree.broadcast_prefix(mask, tree)
    except ValueError as error:
        found = ["; ".join(str(error).split("; ")[:2])]  # what follows shows whole tensors
    if odd := [value for value in found if not isinstance(value, bool)]:
        expected = "a tree prefix of bools, as True is of every tree"
        remedy = "One bool may stand for a whole subtree."
        raise argument_error(function, argument, got=odd[0], expected=expected, remedy=remedy)
    return found


def num_params(specs: Any) -> int:
    """The number of elements in a tree of :class:`ParamSpec`. Allocates nothing.

    >>> num_params({"w": ParamSpec((256, 2048, 7168), P("ep", None, None)), "b": ParamSpec((256,), P("ep"))})
    3758096640
    """
    return sum(math.prod(spec.shape) for spec in optree.tree_leaves(specs))
