"""Communication buffers: made, found by name, grown, freed.

Raw operators can't take Python objects, so a process has one table from names to buffers. It never holds what
one call leaves for another; that is in the call's plan.
"""

import atexit
import itertools
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ....ops.core.axes import Group, axis_names, group_of
from ....ops.core.dynamo import constant_to_dynamo
from ...together import from_all
from ..wire import process_group
from . import adapter
from .adapter import CLASSES, Alone, Sizes, refuse
from .elastic import Elastic
from .legacy import Legacy

ENGINES: dict[str, Any] = {"buffer": Legacy, "elastic": Elastic}
ALONE = "deepep alone"
_SERIAL = itertools.count()


class Held:
    """A buffer and the sizes it was made for. One that ``grows`` is made at its first use."""

    def __init__(self, group: Any, kind: str | None, *, overlap: bool = True, grows: bool = False) -> None:
        self.group, self.overlap, self.grows = group, overlap, grows
        self.kind: Any = kind
        self.sizes = Sizes(0, 0, 0, 0)
        self.engine: Any = None
        self.device: torch.device | None = None

    def make(self, sizes: Sizes) -> None:
        """Make the buffer on all devices together and with one size, since DeepEP connects them."""
        self.destroy()
        kind, module = agree(self.group, self.kind)
        with adapter.setting_up(CLASSES[kind]):
            self.engine = ENGINES[kind](module, self.group, sizes)
        self.kind, self.sizes = kind, sizes
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())

    def ready(self, x: torch.Tensor, ids: torch.Tensor, num_experts: int, max_tokens: int = 0) -> Any:
        """The engine for this dispatch. Raises ``ValueError`` for what it can't take.

        ``max_tokens`` are the most that any device dispatches, if all know that; else 0.
        """
        wanted = Sizes(max_tokens or x.shape[0], x.shape[1], ids.shape[1], num_experts)
        check_rows(x)
        if self.grows:
            self._grow(wanted, x.device, max_tokens > 0)
        self._check(x, wanted)
        return self.engine

    def _grow(self, wanted: Sizes, device: torch.device, alike: bool) -> None:
        """Make a larger buffer if needed. Devices may differ only in tokens, which ElasticBuffer counts."""
        tokens, elastic = wanted.tokens, self.kind == "elastic"
        if elastic and not alike:
            most = torch.tensor([tokens], device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
            tokens = int(most)
        if elastic:
            tokens = 1 << max(0, tokens - 1).bit_length()
        grown = Sizes(*map(max, self.sizes, wanted._replace(tokens=tokens)))
        if self.engine is None or grown[1:] != self.sizes[1:] or (elastic and grown != self.sizes):
            self.make(grown)
        self.sizes = grown

    def _check(self, x: torch.Tensor, wanted: Sizes) -> None:
        align, most_dim = self.engine.rows(self.group.size())
        trios = zip(Sizes._fields, wanted, self.sizes)
        problems = [f"{n} {name} where it was sized for {most}" for name, n, most in trios if n > most]
        if problems:
            raise refuse("sizes", got=", ".join(problems), expected="at most what the buffer was sized for")
        if wanted.dim % align or (most_dim and wanted.dim > most_dim):
            most = f", at most {most_dim}" if most_dim else ""
            expected = f"a multiple of {align}{most}, for DeepEP's {CLASSES[self.kind]}"
            remedy = 'Change the model\'s dim, or use backend="all_to_all".'
            raise refuse("x_TD", got=f"dim {wanted.dim}", expected=expected, remedy=remedy)
        if self.device is not None and x.is_cuda and x.device != self.device:
            expected = f"one on {self.device}, where the buffer was made"
            remedy = "Call torch.cuda.set_device(local_rank) before you make it."
            raise refuse("x_TD", got=f"a tensor on {x.device}", expected=expected, remedy=remedy)

    def destroy(self) -> None:
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.destroy()


def check_rows(x: torch.Tensor) -> None:
    """Raise ``ValueError`` for rows that DeepEP's kernels take in no buffer."""
    if x.device.type not in adapter.DEVICES:
        remedy = 'Use backend="all_to_all" on other devices.'
        raise refuse("x_TD", got=f"a tensor on {x.device}", expected="one on cuda", remedy=remedy)
    if x.dtype not in adapter.PAYLOADS:
        expected = "bfloat16, in which DeepEP sends and sums rows"
        remedy = 'Convert params and x with .to(torch.bfloat16), or use backend="all_to_all".'
        raise refuse("x_TD", got=x.dtype, expected=expected, remedy=remedy)


class _HeldAlone(Held):
    def ready(self, x: torch.Tensor, ids: torch.Tensor, num_experts: int, max_tokens: int = 0) -> Any:
        return self.engine


def alone() -> str:
    """The name of a buffer for this device alone."""
    if ALONE not in _BUFFERS:
        _BUFFERS[ALONE] = held = _HeldAlone(None, None)
        held.engine = Alone()
    return ALONE


_BUFFERS: dict[str, Held] = {}


def find(name: str) -> Held:
    if name not in _BUFFERS:
        expected = "a buffer that is open"
        remedy = "Call the layer, and its backward, inside the `with deepep(...)` that made the buffer."
        raise refuse("backend", got=f"{name!r}, which was closed", expected=expected, remedy=remedy)
    return _BUFFERS[name]


def names() -> list[str]:
    """The names of the open buffers."""
    return [name for name in _BUFFERS if name != ALONE]


# ---- steps of all devices of a group together -----------------------------------------------------

# What the devices of each process group agreed on: a kind and DeepEP's module, or an error's text.
_AGREED: "weakref.WeakKeyDictionary[Any, dict[str | None, Any]]" = weakref.WeakKeyDictionary()


def agree(group: Any, kind: str | None) -> tuple[str, Any]:
    """The kind of buffer for a group, and DeepEP's module. One device's error is raised on all."""
    known = _AGREED.setdefault(group, {})
    if kind not in known:
        try:
            known[kind] = _agreement(group, kind)
        except ValueError as error:
            known[kind] = str(error)
    if isinstance(known[kind], str):
        raise ValueError(known[kind])
    return known[kind]


def _agreement(group: Any, kind: str | None) -> tuple[str, Any]:
    problem, module = "", None
    try:
        module = adapter.load()
        kind = adapter.choose_kind(module, group.size(), kind)
    except ValueError as error:
        problem = str(error)
    hosts, problems, kinds = zip(*from_all((socket.gethostname(), problem, kind), group))
    if any(problems):
        raise ValueError(next(filter(None, problems)))
    if len({*kinds}) > 1:
        raise refuse("deep_ep", got="different DeepEPs", expected="one version on all hosts")
    adapter.check_kind(kinds[0], [*hosts])
    return kinds[0], module


def check_waits(kind: str, size: int) -> None:
    """Raise ``ValueError`` for a kind of buffer whose host has to wait."""
    if kind == "buffer" and size > adapter.PEERS:
        expected = f"at most {adapter.PEERS} devices of one node, or ElasticBuffer"
        remedy = 'Pass kind="elastic" (2.x), leave host_sync out, or use "all_to_all".'
        raise refuse("host_sync", got=f"False, with a Buffer of {size}", expected=expected, remedy=remedy)


def supports(
    group_name: str, device_type: str, dtype: Any, dim: int, host_sync: bool = True
) -> tuple[str, bool]:
    """Why DeepEP can or can't serve a group and, if their dtype is known, its rows; and whether it can."""
    if device_type not in adapter.DEVICES:
        return f"the mesh is of {device_type} devices", False
    try:
        kind, module = agree(process_group(group_name), None)
        if not host_sync:
            check_waits(kind, process_group(group_name).size())
    except ValueError as error:
        return str(error), False
    align, most = ENGINES[kind].rows(process_group(group_name).size())
    if dtype is not None and (dtype not in adapter.PAYLOADS or dim % align or (most and dim > most)):
        return f"rows are {dtype} of {dim}, and DeepEP takes bfloat16 of a multiple of {align}", False
    return f"DeepEP {adapter.version_of(module)}'s {CLASSES[kind]}", True


@contextmanager
def opened(
    line: DeviceMesh, sizes: Sizes, kind: str | None, overlap: bool, host_sync: bool = True
) -> Iterator[tuple[Group, str]]:
    """A buffer of these sizes for the devices of a one-dimensional mesh, freed at the end."""
    group = _group(line)
    check(sizes, kind, group, line.device_type)
    if group.size == 1:
        yield group, alone()
        return
    name = f"deepep {next(_SERIAL)}"
    held = Held(process_group(group.name), kind, overlap=overlap)
    if not host_sync:
        check_waits(agree(held.group, kind)[0], group.size)
    held.make(sizes)
    _BUFFERS[name] = held
    try:
        yield group, name
    except BaseException:
        # Devices free their buffers together, and the others may never come. So only forget this one.
        del _BUFFERS[name]
        raise
    del _BUFFERS[name]
    held.destroy()


def _group(line: Any) -> Group:
    if not isinstance(line, DeviceMesh) or line.ndim != 1:
        got = f"a mesh of {line.ndim} dimensions" if isinstance(line, DeviceMesh) else f"{line!r}"
        raise refuse("line", got=got, expected="a mesh of one dimension", remedy='Pass mesh["ep"].')
    return group_of(line, axis_names(line))


def check(sizes: Sizes, kind: str | None, group: Group, device_type: str) -> None:
    for name, value in zip(("max_tokens_per_rank", *Sizes._fields[1:]), sizes):
        if not isinstance(value, int) or value < 1:
            raise refuse(name, got=repr(value), expected="an integer of at least 1")
    if kind not in (None, *CLASSES):
        raise refuse("kind", got=repr(kind), expected=f"one of {tuple(CLASSES)}, or None")
    if sizes.num_experts % group.size or sizes.num_experts // group.size > adapter.MOST_EXPERTS:
        got = f"{sizes.num_experts} experts for {group.size} devices"
        expected = f"a multiple of the devices, at most {adapter.MOST_EXPERTS} each"
        remedy = "Choose a number of experts, or an axis, that divides."
        raise refuse("num_experts", got=got, expected=expected, remedy=remedy)
    if sizes.top_k > adapter.MOST_CHOICES:
        raise refuse("top_k", got=sizes.top_k, expected=f"at most {adapter.MOST_CHOICES}")
    if group.size > 1 and device_type not in adapter.DEVICES:
        got, expected = f"a mesh of {device_type} devices", "one of CUDA devices"
        raise refuse("line", got=got, expected=expected, remedy='Use backend="all_to_all" on other devices.')


# ---- buffers kept for a run -------------------------------------------------------------------------


@constant_to_dynamo  # also found while Dynamo traces
def kept(group_name: str, host_sync: bool = True) -> str:
    """The name of the buffer that ``moe_forward`` keeps for a group. Made on first use, freed at exit."""
    name = f"deepep kept for {group_name}"
    group = process_group(group_name)
    if name in _BUFFERS and _BUFFERS[name].group is not group:
        with suppress(Exception):  # its process group is gone, and perhaps its connections
            _BUFFERS.pop(name).destroy()
    if name not in _BUFFERS:
        kind, _ = agree(group, None)
        _BUFFERS[name] = Held(group, kind, grows=True)
    if not host_sync:
        check_waits(_BUFFERS[name].kind, group.size())
    return name


def free_kept() -> None:
    """Free every buffer that ``moe_forward`` keeps, on all devices together."""
    for name in [name for name, held in _BUFFERS.items() if held.grows]:
        _BUFFERS.pop(name).destroy()


@atexit.register
def _free_at_exit() -> None:
    # As above, if this process failed, the others may not come.
    if not hasattr(sys, "last_value"):
        free_kept()
