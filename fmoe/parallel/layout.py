"""Places of a tensor's pieces on the devices of a mesh, as values."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.core.axes import MeshOfSizes, axis_names, axis_sizes
from ..ops.core.dtensors import is_dtensor
from ..params import P, is_spec
from ..tree import dotted_names
from .mesh import AXES, parse_axes
from .spec import (
    axes_by_dim,
    broadcast,
    known_axes,
    mesh_problems,
    raise_misfits,
    rank_problems,
    size_problems,
    spec_of,
)

Side = tuple[str, dict[int, int]]


class Layout(NamedTuple):
    """Where one tensor lies: which devices hold each of its pieces.

    ===========  =====================================================================
    ``name``     in its tree, dotted
    ``shape``    of the whole tensor
    ``spec``     over the mesh's axes
    ``cuts``     into how many equal parts each dimension is cut
    ``devices``  by the piece's place along each dimension: the ranks that hold it
    ===========  =====================================================================

    >>> import fmoe
    >>> mesh = fmoe.make_mesh("ep=1")
    >>> layout = layouts_of("show", fmoe.parallel.distribute(torch.ones(4, 2), fmoe.P("ep"), mesh))[0]
    >>> layout.held, layout.devices
    ((4, 2), {(0, 0): (0,)})
    """

    name: str
    shape: tuple[int, ...]
    spec: P
    cuts: tuple[int, ...]
    devices: dict[tuple[int, ...], tuple[int, ...]]

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of the piece that a device holds."""
        return tuple(size // cut for size, cut in zip(self.shape, self.cuts))

    def sides(self) -> tuple[list[Side], list[Side]]:
        """Rows and columns of a table of pieces: the first dimension that is cut, and all others that are.

        Each has what it covers, as ``"0:4"``, and its places by dimension.
        """
        cut = [dim for dim, n in enumerate(self.cuts) if n > 1]
        return self._side(cut[:1]), self._side(cut[1:])

    def _side(self, dims: list[int]) -> list[Side]:
        found: list[Side] = []
        for place in itertools.product(*(range(self.cuts[dim]) for dim in dims)):
            at = dict(zip(dims, place))
            ends = [f"{i * self.held[dim]}:{(i + 1) * self.held[dim]}" for dim, i in at.items()]
            found.append((", ".join(ends), at))
        return found

    def holders(self, *sides: dict[int, int]) -> tuple[int, ...]:
        """The ranks that hold the piece at places by dimension."""
        at = {dim: i for side in sides for dim, i in side.items()}
        return self.devices[tuple(at.get(dim, 0) for dim in range(len(self.shape)))]


def layouts_of(
    function: str,
    tree: Any,
    mesh: DeviceMesh | MeshOfSizes | str | Mapping[str, int] | None = None,
    specs: Any = None,
) -> list[Layout]:
    """The layout of every leaf: a DTensor, a ``ParamSpec``, or with ``specs`` a whole tensor.

    The arguments are those of :func:`fmoe.introspect.show_placement`, and errors name ``function``.

    >>> import fmoe
    >>> params = {"w": torch.empty(4, 6), "b": torch.empty(6)}
    >>> specs = {"w": fmoe.P(None, "tp"), "b": fmoe.P()}
    >>> [(x.name, x.held, x.devices) for x in layouts_of("show", params, "tp=2", specs)]
    [('b', (6,), {(0,): (0, 1)}), ('w', (4, 3), {(0, 0): (0,), (0, 1): (1,)})]
    """
    leaves, names = optree.tree_leaves(tree), dotted_names(tree)
    given = [None] * len(leaves) if specs is None else broadcast(function, "specs", specs, tree)
    here = None if mesh is None else _mesh_of(function, mesh)
    placed = [_placed(function, *each, here) for each in zip(names, leaves, given)]
    flat = [spec for _, spec in placed]
    problems = [
        mesh_problems(spec, on) or rank_problems(spec, leaf) or size_problems(spec, leaf, on)
        for leaf, (on, spec) in zip(leaves, placed)
    ]
    if placed:
        raise_misfits(function, "tree", placed[0][0], tree, flat, problems)
    return [_layout(name, leaf, *where) for name, leaf, where in zip(names, leaves, placed)]


def _mesh_of(function: str, mesh: Any) -> Any:
    if isinstance(mesh, str | Mapping):
        words, sizes = (mesh, {}) if isinstance(mesh, str) else ("", mesh)
        return MeshOfSizes(dict(zip(AXES, parse_axes(function, words, sizes))))
    if not isinstance(mesh, DeviceMesh | MeshOfSizes):
        expected = 'a mesh, or axes and sizes, as "dp=2,ep=4"'
        raise argument_error(function, "mesh", got=repr(mesh), expected=expected)
    return mesh


def _placed(function: str, name: str, leaf: Any, spec: P | None, mesh: Any) -> tuple[Any, P]:
    """The mesh that a leaf lies on, and its spec there."""
    argument = ".".join(filter(None, ("tree", name)))
    if isinstance(leaf, torch.Tensor) and is_dtensor(leaf):
        return leaf.device_mesh, spec_of(leaf)
    if spec is None and not is_spec(leaf):
        got = f"a {type(leaf).__name__}, of which nothing says where it lies"
        expected = "a DTensor or a ParamSpec, or specs"
        raise argument_error(function, argument, got=got, expected=expected)
    if not (isinstance(leaf, torch.Tensor) or is_spec(leaf)):
        got, expected = type(leaf).__name__, "a tensor or a ParamSpec"
        raise argument_error(function, argument, got=got, expected=expected)
    if mesh is None:
        got, expected = "None", f"a mesh, as {argument} is no DTensor"
        remedy = 'Pass one, or axes and sizes, as "dp=2,ep=4".'
        raise argument_error(function, "mesh", got=got, expected=expected, remedy=remedy)
    # A ParamSpec names axes that a mesh may lack.
    dims = axes_by_dim(spec if isinstance(spec, P) else known_axes(leaf if spec is None else spec, mesh))
    return mesh, P(*(axes[0] if len(axes) == 1 else axes or None for axes in dims))


def _layout(name: str, leaf: Any, mesh: Any, spec: P) -> Layout:
    sizes, dims = axis_sizes(mesh), axes_by_dim(spec)
    cuts = [math.prod(sizes[axis] for axis in axes) for axes in dims] + [1] * (len(leaf.shape) - len(dims))
    ranks = mesh.mesh.flatten().tolist() if isinstance(mesh, DeviceMesh) else itertools.count()
    devices: dict[tuple[int, ...], list[int]] = {}
    for at, rank in zip(itertools.product(*map(range, sizes.values())), ranks):
        where = dict(zip(axis_names(mesh), at))
        place = [functools.reduce(lambda i, a: i * sizes[a] + where[a], axes, 0) for axes in dims]
        devices.setdefault((*place, *[0] * (len(cuts) - len(dims))), []).append(rank)
    held = {place: tuple(some) for place, some in sorted(devices.items())}
    return Layout(name, tuple(leaf.shape), spec, tuple(cuts), held)


def spoken(ranks: Sequence[int], most: int = 4) -> str:
    """Ranks in few words.

    >>> spoken((0, 4)), spoken(range(0, 64, 2))
    ('0 4', '0 2 … 62')
    """
    few = [*map(str, ranks)]
    return " ".join(few if len(few) <= most else [*few[:2], "…", few[-1]])
