"""Parameters on a mesh: placed by their specs, and brought to where a computation wants them.

With FSDP, a device holds a smaller piece of a parameter than it computes with. *Moves* lead from one to the
other: gather a dimension along axes, or take this device's part of one. Inside :func:`fmoe.shard_map` a
leaf carries its moves, as :class:`~fmoe.parallel.buckets.Placed`, and :func:`use` applies them where a layer
computes. They are plain tuples, so that compilers see constants.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.core.axes import axis_names, axis_sizes, check_mesh
from ..ops.core.dtypes import accumulator
from ..ops.core.dynamo import remembered
from ..params import P, init_params, is_spec
from ..tree import dotted_names
from . import buckets
from .boundary import dtensor_beneath, unwrapped
from .buckets import Move, Placed
from .mesh import check_device
from .spec import (
    as_dtensor,
    axes_by_dim,
    broadcast,
    fitting_specs,
    known_axes,
    local_piece,
    raise_misfits,
    size_problems,
    spec_of,
)

Moves = tuple[tuple[Move, ...], ...]


def init_on(
    function: str,
    mesh: DeviceMesh | None,
    specs: Any,
    seed: int | torch.Generator,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
) -> Any:
    """Initial values for a tree of ``ParamSpec``. With a mesh they are DTensors, and only pieces are drawn.

    Raises ``ValueError`` listing every spec that doesn't fit the mesh, and for a seed, dtype or device that
    isn't one.
    """
    check_mesh(function, mesh)
    if not isinstance(seed, Integral | torch.Generator):  # NumPy's integers, too
        got = "a tensor" if isinstance(seed, torch.Tensor) else repr(seed)
        expected = "an integer or a torch.Generator, and no key of fmoe.random"
        raise argument_error(function, "seed", got=got, expected=expected, remedy="Pass 0, say.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        expected, remedy = "a floating dtype", "Use torch.bfloat16, say."
        raise argument_error(function, "dtype", got=repr(dtype), expected=expected, remedy=remedy)
    if device is not None and not str(device).startswith("meta"):
        check_device(device, f"{function}: device")
    if mesh is None:
        return init_params(specs, seed, dtype=dtype, device=device)
    device = mesh.device_type if device is None else device
    flat, pieces = held_pieces(function, specs, mesh)
    structure = optree.tree_structure(specs, is_leaf=is_spec)
    tree = optree.tree_unflatten(structure, pieces)
    values = optree.tree_leaves(init_params(specs, seed, dtype=dtype, device=device, pieces=tree))
    return optree.tree_unflatten(structure, [as_dtensor(v, mesh, spec) for v, spec in zip(values, flat)])


def held_pieces(function: str, specs: Any, mesh: DeviceMesh) -> tuple[list[P], list[tuple[slice, ...]]]:
    """For each parameter of a tree of ``ParamSpec``, its placement and the piece that this device holds.

    Raises ``ValueError`` listing every spec that doesn't fit the mesh.
    """
    shapes = init_params(specs, 0, dtype=torch.float32, device="meta")
    flat = fitting_specs(function, "params", specs, shapes, mesh)
    leaves = optree.tree_leaves(shapes)
    return flat, [local_piece(spec, leaf.shape, mesh) for spec, leaf in zip(flat, leaves)]


def computing(spec: P) -> P:
    """The placement to compute with: gathered along FSDP's axes, which include ``dp``."""
    return P(*(None if "dp" in axes else axes or None for axes in axes_by_dim(spec)))


def where_placed(tree: Any, wanted: Any, mesh: DeviceMesh) -> Any:
    """The spec of every leaf: a DTensor's own, or ``wanted`` for a plain tensor, which is a piece."""
    specs = broadcast("where_placed", "wanted", wanted, tree)
    leaves, structure = optree.tree_flatten(tree)
    found = [
        spec_of(unwrapped(leaf)) if dtensor_beneath(leaf) else known_axes(spec, mesh)
        for leaf, spec in zip(leaves, specs)
    ]
    return optree.tree_unflatten(structure, found)


def token_axes(mesh: DeviceMesh) -> tuple[str, ...]:
    """The axes that tokens are spread over."""
    return tuple(axis for axis in axis_names(mesh) if axis in ("dp", "ep"))


def moves(function: str, argument: str, tree: Any, have: Any, wanted: Any, mesh: DeviceMesh) -> Moves:
    """The moves that bring every leaf of an argument of ``function`` to where it is wanted.

    Raises ``ValueError`` if an axis would have to change its dimension, or doesn't divide.
    """
    specs = [known_axes(spec, mesh) for spec in broadcast("moves", "wanted", wanted, tree)]
    problems = [
        size_problems(spec, unwrapped(leaf), mesh) if dtensor_beneath(leaf) else []
        for spec, leaf in zip(specs, optree.tree_leaves(tree))
    ]
    raise_misfits(function, argument, mesh, tree, specs, problems)
    trios = zip(dotted_names(tree), broadcast("moves", "have", have, tree), specs)
    return tuple(_moves(function, f"{argument}.{name}", old, new, mesh) for name, old, new in trios)


@remembered
def _moves(function: str, argument: str, have: P, wanted: P, mesh: DeviceMesh) -> tuple[Move, ...]:
    sizes = axis_sizes(mesh)

    def many(spec: P) -> list[tuple[str, ...]]:
        return [tuple(a for a in axes if sizes.get(a, 1) > 1) for axes in axes_by_dim(spec)]

    rank = max(len(have), len(wanted))
    here, there = (many(spec) + [()] * (rank - len(spec)) for spec in (have, wanted))
    gathers: list[Move] = []
    cuts: list[Move] = []
    for dim, (old, new) in enumerate(zip(here, there)):
        kept = tuple(a for a in old if a in new)
        fits = old[: len(kept)] == kept and new[: len(kept)] == kept
        missing = new[len(kept) :]
        if not fits or any(a in axes for a in missing for axes in here):
            got = f"a DTensor placed by {have!r}"
            expected = f"{wanted!r}, with dimensions further cut along other axes, or whole"
            remedy = "Place it with fmoe.shard_params."
            raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)
        if old != kept:
            gathers.append(("gather", dim, old[len(kept) :]))
        if missing:
            cuts.append(("cut", dim, missing))
    return (*gathers, *cuts)


def placed(
    tree: Any,
    how: Moves | None = None,
    dtypes: Sequence[torch.dtype | None] | None = None,
    summed: torch.dtype | None = None,
) -> Any:
    """A tree whose leaves carry their moves, what to compute in, and what to sum their gradients in.

    ``dtypes`` has one for each leaf, where ``None`` is the leaf's own. Gradients are summed in float32 or
    wider, unless ``summed`` says otherwise. Leaves that stay as they are remain plain tensors.
    """
    leaves, structure = optree.tree_flatten(tree)
    how, dtypes = how or ((),) * len(leaves), dtypes or (None,) * len(leaves)
    carried = [
        Placed(leaf, steps, to or leaf.dtype, summed or accumulator(leaf.dtype))
        if steps or (to and to != leaf.dtype)
        else leaf
        for leaf, steps, to in zip(leaves, how, dtypes)
    ]
    return optree.tree_unflatten(structure, carried)


def use(tree: Any) -> Any:
    """Tensors to compute with: what is :class:`Placed` is cast and moved, and the rest stays as it is.

    What moves along the same axes in the same dtypes moves in one collective.
    """
    leaves, structure = optree.tree_flatten(tree, is_leaf=is_placed)
    return optree.tree_unflatten(structure, buckets.use(leaves)) if any(map(is_placed, leaves)) else tree


def is_placed(value: Any) -> bool:
    return isinstance(value, Placed)
