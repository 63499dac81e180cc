"""Partition specs: their meaning on a mesh, and checks that they fit it and the tensors they place."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.core import dtensors
from ..ops.core.axes import axis_names, axis_sizes, check_mesh, describe, group_of, names_of
from ..ops.core.dynamo import constant_to_dynamo, remembered
from ..params import P, ParamSpec, is_spec
from ..tree import dotted_names

if TYPE_CHECKING:  # it takes half a second to import
    from torch.distributed.tensor import DTensor, Placement

Placements = tuple["Placement", ...]


@remembered
def axes_by_dim(spec: P) -> list[tuple[str, ...]]:
    """The axes that each dimension is cut along."""
    return [() if axes is None else names_of(axes) for axes in spec]


def named_axes(spec: P) -> set[str]:
    return {axis for axes in axes_by_dim(spec) for axis in axes}


@remembered
def unnamed_axes(spec: P, mesh: DeviceMesh) -> tuple[str, ...]:
    """The axes along which a value placed by ``spec`` is the same everywhere."""
    named = named_axes(spec)
    return tuple(axis for axis in axis_names(mesh) if axis not in named)


@remembered
def placements(spec: P, mesh: DeviceMesh) -> Placements:
    """A spec as DTensor placements.

    >>> import fmoe
    >>> placements(P(None, ("dp", "ep")), fmoe.make_mesh("dp=1"))
    (Replicate(), Shard(dim=1), Shard(dim=1), Replicate())
    """
    from torch.distributed.tensor import Replicate, Shard

    found: dict[str, Placement] = {a: Shard(d) for d, axes in enumerate(axes_by_dim(spec)) for a in axes}
    return tuple(found.get(axis, Replicate()) for axis in axis_names(mesh))


def spec_of(tensor: "DTensor") -> P:
    """A DTensor's placements as a spec, over axes of more than one device.

    Raises ``ValueError`` for placements that no spec describes, such as partial sums.

    >>> import fmoe
    >>> spec_of(distribute(torch.ones(4, 2), P("ep"), fmoe.make_mesh()))  # one device along ep: no axis
    P(None, None)
    """
    return _spec_of(tensor.device_mesh, tensor.placements, tensor.dim())


@remembered
def _spec_of(mesh: DeviceMesh, placements: Placements, dim: int) -> P:
    from torch.distributed.tensor import Replicate, Shard

    axes: list[tuple[str, ...]] = [()] * dim
    for axis, placement in zip(axis_names(mesh), placements):
        if axis_sizes(mesh)[axis] == 1 or placement == Replicate():
            continue
        if type(placement) is not Shard:
            got = f"placement {placement!r} along {axis!r}"
            expected = "Shard or Replicate along every axis"
            remedy = "Redistribute the tensor."
            raise argument_error("spec_of", "tensor", got=got, expected=expected, remedy=remedy)
        axes[placement.dim] += (axis,)
    return P(*(None if not a else a[0] if len(a) == 1 else a for a in axes))


def distribute(tree: Any, specs: Any, mesh: DeviceMesh) -> Any:
    """Whole tensors, equal on every device, as DTensors placed by specs.

    =======  ======================================================================
    tree     tensors
    specs    a tree prefix of it, of :class:`fmoe.P` or ``ParamSpec``; axes the mesh lacks are ignored
    -> tree  DTensors; every device keeps its own piece, and nothing is sent
    =======  ======================================================================

    Raises ``ValueError`` listing every spec that doesn't fit its tensor.

    >>> import fmoe
    >>> distribute({"w": torch.ones(4, 2)}, P("ep"), fmoe.make_mesh("ep=1"))["w"].placements
    (Replicate(), Replicate(), Shard(dim=0), Replicate())
    """
    if mesh is None:
        remedy = "Make one with fmoe.make_mesh."
        raise argument_error("distribute", "mesh", got="None", expected="a mesh", remedy=remedy)
    check_mesh("distribute", mesh)
    leaves, treedef = optree.tree_flatten(tree)
    flat = fitting_specs("distribute", "tree", specs, tree, mesh)
    pieces = [leaf.detach()[local_piece(spec, leaf.shape, mesh)] for spec, leaf in zip(flat, leaves)]
    # Copied, as a view would keep the whole tensor in memory.
    copies = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
    return optree.tree_unflatten(treedef, [as_dtensor(c, mesh, spec) for c, spec in zip(copies, flat)])


def as_dtensor(local: torch.Tensor, mesh: DeviceMesh, spec: P) -> "DTensor":
    return dtensors.as_dtensor(local, mesh, placements(spec, mesh))


def local_piece(spec: P, shape: Sequence[int], mesh: DeviceMesh) -> tuple[slice, ...]:
    """The slices of a tensor that this device holds."""
    found = []
    for axes, size in zip(axes_by_dim(spec), shape):
        group = group_of(mesh, axes)
        length = size // group.size
        found.append(slice(group.position * length, (group.position + 1) * length))
    return tuple(found)


# ---- fitting specs -----------------------------------------------------------------------------


def broadcast(function: str, argument: str, specs: Any, tree: Any) -> list[P]:
    """One spec for every leaf of ``tree``, of which ``specs`` is a prefix."""
    leaves, treedef = optree.tree_flatten(specs)
    try:
        subtrees = treedef.flatten_up_to(tree)
    except ValueError:
        got = f"a tree that is no prefix of what it describes: {_difference(treedef, tree)}"
        expected = "a tree prefix, as P() is of every tree"
        remedy = "One spec may stand for a whole subtree; a tuple of specs needs a tuple of values."
        raise argument_error(function, argument, got=got, expected=expected, remedy=remedy) from None
    return [spec for spec, sub in zip(leaves, subtrees) for _ in optree.tree_leaves(sub, none_is_leaf=True)]


def _difference(specs: Any, tree: Any) -> str:
    """optree's words for a tree that specs are no prefix of, with shapes instead of the tensors' numbers."""
    shapes = optree.tree_map(lambda leaf: getattr(leaf, "shape", leaf), tree, none_is_leaf=True)
    try:
        specs.flatten_up_to(shapes)
    except ValueError as error:
        return str(error).rstrip(".")
    return "they differ in None"


@remembered
def known_axes(spec: P | ParamSpec, mesh: DeviceMesh) -> P:
    """A spec without the axes the mesh lacks."""
    spec = spec.partition if isinstance(spec, ParamSpec) else spec
    if not isinstance(spec, P):
        return spec  # check_specs raises
    have = axis_names(mesh)
    return P(*(tuple(a for a in axes if a in have) or None for axes in axes_by_dim(spec)))


def fitting_specs(function: str, argument: str, specs: Any, tree: Any, mesh: DeviceMesh) -> list[P]:
    """A spec for every leaf, without axes the mesh lacks. Raises ``ValueError`` listing what doesn't fit."""
    specs = optree.tree_map(lambda spec: known_axes(spec, mesh), specs, is_leaf=is_spec)
    check_specs(function, "specs", specs, mesh)
    flat = broadcast(function, "specs", specs, tree)
    pairs = zip(flat, optree.tree_leaves(tree))
    problems = [[*rank_problems(spec, leaf), *size_problems(spec, leaf, mesh)] for spec, leaf in pairs]
    raise_misfits(function, argument, mesh, tree, flat, problems)
    return flat


def check_specs(function: str, argument: str, specs: Any, mesh: DeviceMesh) -> None:
    """Raise ``ValueError`` listing every spec that no tensor could have on this mesh."""
    if not axis_names(mesh):
        got = "a mesh whose axes have no names"
        remedy = "Use fmoe.make_mesh, or init_device_mesh(..., mesh_dim_names=...)."
        raise argument_error(function, "mesh", got=got, expected="named axes", remedy=remedy)
    flat = optree.tree_leaves(specs, none_is_leaf=True)
    raise_misfits(function, argument, mesh, specs, flat, [mesh_problems(spec, mesh) for spec in flat])


def mesh_problems(spec: Any, mesh: DeviceMesh) -> list[str]:
    if not isinstance(spec, P) or [a for a in spec if not (a is None or isinstance(a, str | tuple))]:
        return ["not a P of names, tuples of names and None"]
    have, found = axis_names(mesh), []
    named = [axis for axes in axes_by_dim(spec) for axis in axes]
    for axis in dict.fromkeys(named):
        if axis not in have:
            found.append(f"{axis!r} isn't an axis of the mesh")
        elif named.count(axis) > 1:
            found.append(f"{axis!r} is used twice")
    for dim, axes in enumerate(axes_by_dim(spec)):
        if not found and list(axes) != [axis for axis in have if axis in axes]:
            found.append(f"the axes of dimension {dim} aren't in the mesh's order")
    return found


def rank_problems(spec: P, tensor: torch.Tensor) -> list[str]:
    fits = len(spec) <= len(tensor.shape)
    return [] if fits else [f"{len(spec)} entries for {len(tensor.shape)} dimensions"]


def size_problems(spec: P, tensor: torch.Tensor, mesh: DeviceMesh) -> list[str]:
    sizes, found = axis_sizes(mesh), []
    for dim, (axes, size) in enumerate(zip(axes_by_dim(spec), tensor.shape)):
        pieces = math.prod([sizes[a] for a in axes])
        if size % pieces:
            found.append(f"dimension {dim} of size {size} doesn't divide by {'*'.join(axes)}={pieces}")
    return found


def placement_problems(spec: P, tensor: "DTensor", mesh: DeviceMesh) -> tuple[str, ...]:
    return _placement_problems(mesh, placements(spec, mesh), tensor.device_mesh, tensor.placements)


@constant_to_dynamo
@remembered
def _placement_problems(
    mesh: DeviceMesh, wanted: Placements, tensor_mesh: DeviceMesh, have: Placements
) -> tuple[str, ...]:
    if tensor_mesh != mesh:
        return (f"the DTensor lies on another mesh, {describe(tensor_mesh)}",)
    same = all(a == b or n == 1 for a, b, n in zip(wanted, have, mesh.shape))
    return () if same else (f"the spec means {wanted}, the DTensor has {have}",)


def raise_misfits(
    function: str, argument: str, mesh: DeviceMesh, tree: Any, specs: Sequence[P], problems: list[list[str]]
) -> None:
    """Raise one ``ValueError`` for all problems with the specs of a tree's leaves, if there are any."""
    if not any(problems):
        return  # making names takes longer than this check
    lines = []
    leaves, names = optree.tree_leaves(tree, none_is_leaf=True), dotted_names(tree, none_is_leaf=True)
    for name, leaf, spec, found in zip(names, leaves, specs, problems):
        shape = f" for shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else ""
        where = ".".join(filter(None, (argument, name)))
        lines += [f"\n  {where}: {spec!r}{shape}: {problem}" for problem in found]
    got = f"{len(lines)} that don't fit"
    expected = f"specs that fit the mesh {describe(mesh)} and the tensors"
    remedy = "Correct these:" + "".join(lines)
    raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)
