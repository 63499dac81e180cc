"""Pytrees: nodes with static fields, and dotted names of leaves."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import optree
import torch
import torch.utils._pytree as torch_pytree

from .errors import argument_error

# optree wants a namespace for every registration but its own. This is its name for the global one.
_EVERYWHERE = getattr(optree.registry, "__GLOBAL_NAMESPACE")

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def node(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that optree and ``torch.func`` both see as a pytree node.

    Fields are children, except those declared with :func:`static`, which belong to the structure. Two nodes
    have the same treedef only if their static fields are equal.

    >>> @node
    ... class Scaled:
    ...     x: torch.Tensor
    ...     by: float = static(default=2.0)
    >>> optree.tree_leaves(Scaled(torch.tensor(3)))
    [tensor(3)]
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    children = [f.name for f in fields if not f.metadata.get("static")]
    statics = [f.name for f in fields if f.metadata.get("static")]

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in children], tuple(getattr(value, n) for n in statics)

    def unflatten(context: tuple[Any, ...], leaves: Iterable[Any]) -> T:
        return cls(**dict(zip(children, leaves)), **dict(zip(statics, context)))

    optree.register_pytree_node(
        cls,
        lambda value: (*flatten(value), children),
        unflatten,
        path_entry_type=optree.GetAttrEntry,
        namespace=_EVERYWHERE,
    )
    torch_pytree.register_pytree_node(cls, flatten, lambda leaves, context: unflatten(context, leaves))
    return cls


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field of a :func:`node` as part of the structure rather than a child.

    >>> @node
    ... class Scaled:
    ...     x: torch.Tensor
    ...     by: float = static(default=2.0)
    >>> one, two = Scaled(torch.tensor(3), by=1.0), Scaled(torch.tensor(3))
    >>> optree.tree_structure(one) == optree.tree_structure(two), optree.tree_map(torch.neg, two).by
    (False, 2.0)
    """
    return dataclasses.field(default=default, metadata={"static": True})


def dotted_names(tree: Any, *, is_leaf: Any = None, none_is_leaf: bool = False) -> list[str]:
    """The names of the leaves in flattening order, such as ``layers.0.moe.experts.w_in``.

    >>> dotted_names({"a": [torch.ones(1), torch.ones(2)]})
    ['a.0', 'a.1']
    """
    accessors = optree.tree_accessors(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf)
    return [".".join(str(getattr(e, "field", None) or e.entry) for e in a) for a in accessors]


def check_tensors(function: str, argument: str, tree: Any) -> list[torch.Tensor]:
    """The leaves of a tree, all of which must be tensors."""
    leaves = optree.tree_leaves(tree, none_is_leaf=True)
    if all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return leaves  # making names takes longer than this check
    named = zip(dotted_names(tree, none_is_leaf=True), leaves)
    name, leaf = next((name, leaf) for name, leaf in named if not isinstance(leaf, torch.Tensor))
    got = type(leaf).__name__
    remedy = "Leaves are tensors only; write an absent subtree as ()."
    raise argument_error(
        function, ".".join(filter(None, (argument, name))), got=got, expected="a tensor", remedy=remedy
    )
