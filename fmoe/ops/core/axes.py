"""Named mesh axes: the mesh that is bound, and the process group that some of its axes stand for.

:func:`fmoe.shard_map` binds its mesh and backends while its function runs. Collectives resolve axis names
when they are called. Group names and sizes are their static arguments, so derivatives need no binding.
Whatever runs a function again later binds the same again.
"""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from .dynamo import constant_to_dynamo, remembered

Axes = str | tuple[str, ...]


class Group(NamedTuple):
    """The devices along some axes: a process group's name, its size, and this device's place in it.

    One device has no process group; its name is empty.

    >>> import fmoe
    >>> group_of(fmoe.make_mesh("ep=1", device_type="cpu"), ("ep",))
    Group(name='', size=1, position=0)
    """

    name: str
    size: int
    position: int


class Binding(NamedTuple):
    """A mesh whose axes have a meaning here.

    ``backends`` holds the backend of each axis that dispatch may go along, and ``tokens`` the axes that a
    layer's tokens lie along.
    """

    mesh: DeviceMesh | None = None
    backends: tuple[tuple[str, Any], ...] = ()
    tokens: tuple[str, ...] = ()


class MeshOfSizes:
    """The axes and sizes of a mesh without its devices, for runs on fake tensors.

    The name of a group says what it is along, as ``"dp=2,ep=4"``.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.mesh_dim_names = tuple(sizes)
        self._sizes = tuple(sizes.values())

    def size(self, dim: int | None = None) -> int:
        return math.prod(self._sizes) if dim is None else self._sizes[dim]


class _Bound(threading.local):
    # Dynamo traces no ContextVar, but a thread-local, whose default it must find on the instance.
    def __init__(self) -> None:
        self.now = Binding()


_BOUND = _Bound()

# Per default process group, so that nothing outlives it: flattening a mesh takes half a millisecond.
_GROUPS: "weakref.WeakKeyDictionary[Any, dict[Any, tuple[str, int, int]]]" = weakref.WeakKeyDictionary()


def binding() -> Binding:
    """The mesh and backends that are bound here."""
    return _BOUND.now


@contextmanager
def bound(binding: Binding) -> Iterator[None]:
    """Bind a mesh's axes inside."""
    outer, _BOUND.now = _BOUND.now, binding
    try:
        yield
    finally:
        _BOUND.now = outer


def present(*axes: str) -> tuple[str, ...]:
    """Those of the axes that are bound here; none outside :func:`fmoe.shard_map`."""
    mesh = _BOUND.now.mesh
    return () if mesh is None else tuple(axis for axis in axes if axis in axis_names(mesh))


def axis_names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


@remembered
def axis_sizes(mesh: DeviceMesh) -> dict[str, int]:
    # Dynamo on torch 2.11 knows a mesh's ndim, size() and mesh_dim_names, but not its shape.
    return {name: mesh.size(i) for i, name in enumerate(axis_names(mesh))}


@constant_to_dynamo
def check_mesh(function: str, mesh: Any) -> None:
    """Raise ``ValueError`` for what stands in a mesh's place and is neither a mesh nor ``None``.

    >>> check_mesh("moe_forward", "ep=1")
    Traceback (most recent call last):
    ValueError: moe_forward: mesh: got 'ep=1', expected a mesh. Make one with fmoe.make_mesh("ep=1").
    """
    if not isinstance(mesh, DeviceMesh | MeshOfSizes | None):
        remedy = "Make one with fmoe.make_mesh, and pass other options by name."
        if isinstance(mesh, str):
            remedy = f'Make one with fmoe.make_mesh("{mesh}").'
        raise argument_error(function, "mesh", got=repr(mesh), expected="a mesh", remedy=remedy)


def describe(mesh: DeviceMesh) -> str:
    return "(" + ", ".join(f"{name}={size}" for name, size in axis_sizes(mesh).items()) + ")"


def names_of(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def group_of(mesh: DeviceMesh, axes: tuple[str, ...]) -> Group:
    """The group of the devices along ``axes``, given in the mesh's order."""
    return Group(*_group(mesh, axes))


@constant_to_dynamo
def _group(mesh: DeviceMesh, axes: tuple[str, ...]) -> tuple[str, int, int]:
    sizes = axis_sizes(mesh)
    axes = tuple(a for a in axes if sizes[a] > 1)
    if not axes:
        return "", 1, 0
    if isinstance(mesh, MeshOfSizes):
        return ",".join(f"{a}={sizes[a]}" for a in axes), math.prod(sizes[a] for a in axes), 0
    known = _GROUPS.setdefault(dist.group.WORLD, {})
    if (mesh, axes) not in known:
        line = mesh[axes]._flatten() if len(axes) > 1 else mesh[axes[0]]
        known[mesh, axes] = line.get_group().group_name, line.size(), line.get_local_rank()
    return known[mesh, axes]


def resolve(function: str, axes: Axes) -> Group:
    """The group that ``axes`` stand for where ``function`` is called."""
    mesh, names = _BOUND.now.mesh, names_of(axes)
    if not names:
        return Group("", 1, 0)
    have = () if mesh is None else axis_names(mesh)
    if mesh is not None and [n for n in have if n in names] == list(names):
        return group_of(mesh, names)
    if mesh is None:
        expected = "a mesh axis that is bound; none is bound here"
        remedy = "Call it inside a function given to fmoe.shard_map."
    elif not set(names) <= set(have):
        expected = f"axes of the mesh {describe(mesh)} that shard_map bound"
        remedy = "Correct the name, or give shard_map a mesh with this axis."
    else:
        expected = f"each axis once, in the mesh's order {have}"
        remedy = "Reorder the axes."
    raise argument_error(function, "axis", got=repr(axes), expected=expected, remedy=remedy)
