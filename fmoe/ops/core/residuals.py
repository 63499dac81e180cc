"""What lives between forward and backward: which values, who made them, and where in the source."""

import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from rich.console import Console
from rich.jupyter import JupyterMixin
from rich.table import Table
from rich.text import Text
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...tree import dotted_names
from .compress import COMPRESS_OP
from .dtensors import local
from .host import beneath
from .naming import observed
from .primitive import GIVEN, NAMESPACE, operators
from .recompute import Region
from .refuse import refusing_combinations
from .tape import Layout, current_tape

KINDS = ("kept", "kept in fp8", "offloaded", "recomputed", "captured", "argument")


class Residual(NamedTuple):
    """A value that the backward needs; :func:`fmoe.introspect.saved_residuals` says what its fields are.

    >>> from fmoe.introspect import saved_residuals
    >>> (x,) = saved_residuals(torch.sin, torch.ones(3))
    >>> x.how, x.bytes
    ('argument', 12)
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    operator: str
    source: str
    how: str


class Residuals(tuple[Residual, ...], JupyterMixin):
    """The rows of :func:`fmoe.introspect.saved_residuals`; printed, and in a notebook, they are a table.

    >>> from fmoe.introspect import saved_residuals
    >>> found = saved_residuals(lambda x: x.exp().sin(), torch.ones(3))
    >>> found.total("kept"), str(found).splitlines()[-1].strip()
    (12, 'bytes: kept 12')
    """

    __slots__ = ()

    def total(self, *how: str) -> int:
        """The bytes of the rows with such a ``how``."""
        return sum(row.bytes for row in self if row.how in how)

    def __rich__(self) -> Table:
        totals = [f"{how} {self.total(how):,}" for how in KINDS if any(row.how == how for row in self)]
        table = Table(caption=f"bytes: {', '.join(totals) or 'none'}")
        for column in Residual._fields:
            table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
        for row in self:
            shape, dtype = ", ".join(map(str, row.shape)), str(row.dtype).removeprefix("torch.")
            cells = row.name, shape, dtype, f"{row.bytes:,}", row.operator, row.source, row.how
            table.add_row(*map(Text, cells))  # names and paths may have what rich takes for markup
        return table

    def __str__(self) -> str:
        console = Console()
        with console.capture() as shown:
            console.print(self)
        return shown.get().rstrip("\n")

    __repr__ = __str__


def residuals_of(fn: Callable[..., Any], args: Any, kwargs: Any) -> Residuals:
    """The rows of :func:`fmoe.introspect.saved_residuals`, of one run of ``fn``."""
    leaves, structure = optree.tree_flatten((args, kwargs), none_is_leaf=True)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not any(t.requires_grad for t in tensors):
        leaves = [leaf.detach().requires_grad_() if _is_float(leaf) else leaf for leaf in leaves]
    args, kwargs = optree.tree_unflatten(structure, leaves)
    watch, saved = _Watch(), _Saved()
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept)
    with refusing_combinations("saved_residuals"), torch.enable_grad(), hooks, watch, _Names(watch):
        out = fn(*args, **kwargs)  # its graph holds what was kept
        by_regions = _of_regions(out)
    named = [*zip(dotted_names(args), optree.tree_leaves(args))]
    named += zip(dotted_names(kwargs), optree.tree_leaves(kwargs))
    arguments = {_storage(t): (name, t) for name, t in named if isinstance(t, torch.Tensor)}
    largest: dict[int, torch.Tensor] = {}
    for kept in sorted(saved.held, key=torch.Tensor.numel):
        largest[_storage(kept)] = kept
    del out
    rows = []
    for storage, kept in largest.items():
        made = watch.made.get(storage, _Made())
        if storage in arguments:
            name, kept = arguments[storage]
            made, how = _Made(name), "argument"
        elif storage in saved.captured:
            how = "captured"
        else:
            how = by_regions.get(storage, "kept")
        rows.append((made, made.row(kept, how)))
    kept_ones = {id(made) for made, _ in rows}
    rows += [(made, row) for made, row in watch.named.values() if id(made) not in kept_ones]
    rows.sort(key=lambda row: (KINDS.index(row[1].how), row[0].time, row[1].name))
    return Residuals(row for _, row in rows)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _storage(t: torch.Tensor) -> int:
    return local(t).untyped_storage()._cdata


def _of_regions(out: Any) -> dict[int, str]:
    """How the regions of a result's graph keep storages."""
    coming: list[Any] = [t.grad_fn for t in optree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    seen, found = set[Any](), dict[int, str]()
    while coming:
        node = coming.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        coming += [earlier for earlier, _ in node.next_functions]
        if isinstance(region := getattr(node, "region", None), Region):
            kept = node.saved_tensors[region.num_tensors :]
            found |= {_storage(t): how for t, how in zip(kept, _hows(region.found.recorded))}
    return found


def _hows(layout: Layout) -> Iterator[str]:
    for entry, n in layout:
        for dtype in entry.dtypes or [None] * (n or 0):
            how = "offloaded" if entry.homes else "kept" if dtype is None else "kept in fp8"
            yield from [how] * (1 if dtype is None else 2)


class _Saved:
    """Holds on to what graphs keep for as long as they do."""

    def __init__(self) -> None:
        self.held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.captured: set[int] = set()

    def pack(self, t: torch.Tensor) -> torch.Tensor:
        kept = t.detach()  # undetached, an output would hold its own graph
        self.held.add(kept)
        origin = t if t._base is None else t._base
        if origin.is_leaf and origin.requires_grad:
            self.captured.add(_storage(t))
        return kept


@dataclass(eq=False)
class _Made:
    """Who made a storage, and when."""

    name: str = ""
    operator: str = ""
    source: str = ""
    time: int = -1

    def row(self, t: torch.Tensor, how: str) -> Residual:
        t = local(t)
        nbytes = t.untyped_storage().nbytes()
        return Residual(self.name, tuple(t.shape), t.dtype, nbytes, self.operator, self.source, how)


class _Watch(TorchDispatchMode):
    """Notes who makes which storage. ``named`` are those that have a name in a region, as if recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.named: dict[int, tuple[_Made, Residual]] = {}
        self._times = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in optree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        storages = {_storage(t) for t in given}
        name = func.name().partition(".")[0]
        op = operators().get(name.removeprefix(f"{NAMESPACE}::"))
        for t in optree.tree_leaves(out):
            if not isinstance(t, torch.Tensor) or _storage(t) in storages:
                continue
            to_host = given and given[0].is_cuda and not t.is_cuda
            moved = to_host or func.name() == COMPRESS_OP
            made = self.made.get(_storage(given[0])) if moved else None
            self.made[_storage(t)] = made or _Made("", name, _source(), next(self._times))
            if op and op.checkpoint != GIVEN:
                self.name(t, op.checkpoint)
        return out

    def name(self, t: torch.Tensor, name: str) -> None:
        t = beneath(t)
        made = self.made.setdefault(_storage(t), _Made())
        made.name = name
        if current_tape():
            self.named[id(made)] = made, made.row(t, "recomputed")


class _Names(TorchFunctionMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is observed:
            self.watch.name(*args)
        return func(*args, **(kwargs or {}))


_OTHERS = tuple(
    os.path.dirname(os.path.abspath(str(module.__file__))) + os.sep
    for module in (torch, optree, sys.modules[__package__])
)
_MODULES = os.path.join(_OTHERS[0], "nn", "modules")


def _source() -> str:
    """The innermost line that is neither PyTorch's nor of fmoe's machinery; of a module's, if all are."""
    frame: Any = sys._getframe(1)
    module = None
    while frame and frame.f_code is not residuals_of.__code__:
        path = frame.f_code.co_filename
        if not path.startswith((*_OTHERS, "<")):
            return _line(frame)
        if module is None and path.startswith(_MODULES):
            module = frame
        frame = frame.f_back
    return _line(module) if module else ""


def _line(frame: Any) -> str:
    path = frame.f_code.co_filename
    roots = [root + os.sep for root in (os.getcwd(), *sys.path) if path.startswith(root + os.sep)]
    path = path.removeprefix(max(roots, key=len, default=""))
    return f"{path}:{frame.f_lineno} ({frame.f_code.co_qualname})"
