"""A dry run on fake tensors: what is allocated when, and what is sent.

The library's own functions run, so what they keep, free and send follows from them.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import optree
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.core.compress import COMPRESS_OP
from .rounding import rounded_by
from .sent import GATHERS, PURPOSE, SENT
from .workspaces import KEPT, ON_CPU, WORKSPACES

GRANULE = 512  # CUDA's allocator rounds sizes up to this

COPIES = {f"aten::{name}" for name in ("clone", "_to_copy", "cat", "constant_pad_nd")}
COPIES_INTO = {"aten::copy_", "aten::_foreach_copy_"}  # their first argument


class Rows(NamedTuple):
    """Rows of one dispatch along ``ep``: those that a device sends, receives, and has for its experts."""

    sent: int
    received: int
    expanded: int


Totals = Counter[tuple[str, str]]


class Mark(NamedTuple):
    """A place of a dry run's timeline, and what was counted until then."""

    at: int
    totals: Totals


class DryRun(TorchDispatchMode):
    """Follows every storage from its first tensor to its last, and counts the bytes that each operator sends.

    ``timeline`` has the number of each storage that came or went, and which of the two it did. ``totals``
    has, by purpose, the bytes ``"sent"``, and what ``watch`` counts. ``marks`` are places, by name, in order.
    ``copies`` are storages of nothing but ``params``, gathered, cast or laid out anew, and ``kept`` those of
    weights in fp8 that :meth:`keeping_rounded` keeps. ``host`` has the bytes of those in the host's memory,
    which take none of the device's. Enter it inside a ``FakeTensorMode``.
    """

    def __init__(self, *, rows: Rows | None = None, on_cuda: bool = True) -> None:
        super().__init__()
        self.rows, self.on_cuda = rows, on_cuda
        self.bytes_of: list[int] = []
        self.maker: list[str] = []
        self.timeline: list[tuple[int, bool]] = []
        self.totals: Totals = Counter()
        self.marks: defaultdict[str, list[Mark]] = defaultdict(list)
        self.params: set[int] = set()
        self.copies: set[int] = set()
        self.kept: set[int] = set()
        self.host: dict[int, int] = {}
        self.watch: Any = None  # a Stopwatch
        self._numbers: dict[int, int] = {}
        self._to_keep: set[Any] = set()  # where the weights of ``keeping_rounded`` lie
        self._rounded: dict[Any, int] = {}  # what is kept of them, by place, layout and direction

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == "aten::equal":  # remat asks whether random numbers were drawn; none were
            return True
        if name == "fmoe::exchange" and self.rows is not None:
            out = exchanged(self.rows, *args)
        else:
            out = func(*args, **(kwargs or {}))
        outputs = [t for t in optree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        # A copy in another layout or in fp8 counts as what it copies, such as a gathered parameter.
        maker = self.maker[self.number(args[0])] if name in ("aten::clone", COMPRESS_OP) else name
        for tensor in outputs:
            self.number(tensor, name if maker == "given" else maker)
        into, source = (args[0], args[1]) if name in COPIES_INTO else (outputs, args)
        if name in GATHERS or (name in COPIES | COPIES_INTO and self._are_params(source)):
            self.copies |= self.numbers(into)
        kept, spared = self._keep(name, args)
        workspaces = KEPT if kept else WORKSPACES if self.on_cuda else ON_CPU
        held = workspaces[name](args, outputs) if name in workspaces else 0
        if held > 0:
            self.timeline.append((self._new(held, name), False))
        if self.watch:
            self.watch.ran(name, func, args, kwargs or {}, outputs, held, spared)
        if name in SENT:
            self.totals["sent", PURPOSE.get(name, "sums")] += SENT[name](args, outputs)
        return out

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the host's memory."""
        taken = self.give(tensor)
        number = self.number(taken)
        self.host[number], self.bytes_of[number] = taken.nbytes, 0
        return taken

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host's in the device's memory. Copies between them take no kernel's time."""
        watch, self.watch = self.watch, None
        try:
            return tensor.clone()
        finally:
            self.watch = watch

    @contextmanager
    def keeping_rounded(self, weights: Iterable[torch.Tensor]) -> Iterator[None]:
        """As :func:`fmoe.ops.kernels.scaled.keeping_rounded`: it keeps nothing on a CPU."""
        self._to_keep = {self._place(weight) for weight in weights if weight.numel() and self.on_cuda}
        try:
            yield
        finally:
            self.timeline += [(number, False) for number in self._rounded.values()]
            self._to_keep, self._rounded = set(), {}

    def mark(self, name: str) -> Mark:
        self.marks[name].append(mark := Mark(len(self.timeline), self.totals.copy()))
        if self.watch:
            self.watch.mark(mark)
        return mark

    def number(self, tensor: torch.Tensor, maker: str = "given") -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        where = storage._cdata
        if where not in self._numbers:
            self._numbers[where] = self._new(storage.nbytes(), maker)
            weakref.finalize(storage, self._gone, where).atexit = False
        return self._numbers[where]

    def numbers(self, tree: Any) -> set[int]:
        return {self.number(t) for t in optree.tree_leaves(tree) if isinstance(t, torch.Tensor)}

    def _are_params(self, tree: Any) -> bool:
        """Whether a tree has tensors, and none but parameters and copies of them."""
        found = self.numbers(tree)
        return bool(found) and found <= self.params | self.copies

    def _place(self, tensor: torch.Tensor) -> Any:
        return self.number(tensor), tensor.storage_offset()

    def _keep(self, name: str, args: Any) -> tuple[bool, int]:
        """Whether an operator's weight is kept rounded, and the bytes of passes that this spares it."""
        rounded = rounded_by(name, args) if self._to_keep else None
        if rounded is None or (place := self._place(rounded.weight)) not in self._to_keep:
            return False, 0
        key = place, rounded.weight.shape, rounded.weight.stride(), rounded.summed
        if key in self._rounded:
            return True, rounded.passed
        self._rounded[key] = number = self._new(rounded.nbytes, name)
        self.kept.add(number)
        return True, 0

    def since(self, start: Mark, stop: Mark) -> Totals:
        """What was counted between two places."""
        return stop.totals - start.totals

    def alive(self, at: int) -> set[int]:
        """The storages that exist at a place of the timeline."""
        found: set[int] = set()
        for number, came in self.timeline[:at]:
            (found.add if came else found.discard)(number)
        return found

    def size(self, numbers: Iterable[int]) -> int:
        return sum(self.bytes_of[n] for n in numbers)

    def peak(self, start: int, stop: int) -> tuple[int, int]:
        """The most bytes between two places of the timeline, and where that is."""
        live = self.size(self.alive(start))
        most, where = live, start
        for at, (number, came) in enumerate(self.timeline[start:stop], start):
            live += self.bytes_of[number] if came else -self.bytes_of[number]
            if live > most:
                most, where = live, at + 1
        return most, where

    def _new(self, nbytes: int, maker: str) -> int:
        number = len(self.maker)
        self.bytes_of.append(-(-nbytes // GRANULE) * GRANULE if self.on_cuda else nbytes)
        self.maker.append(maker)
        self.timeline.append((number, True))
        return number

    def _gone(self, where: int) -> None:
        self.timeline.append((self._numbers.pop(where), False))


def exchanged(rows: Rows, x: Any, weights: Any, ids: Any, num_experts: int, size: int, *_: Any) -> Any:
    """The outputs of the operator ``exchange`` for these rows."""
    index = ids.new_empty
    return (
        x.new_empty(rows.received, x.shape[1]),
        weights.new_empty(rows.received, weights.shape[1]),
        index(rows.expanded),
        index(rows.received, ids.shape[1]),
        index(num_experts // size, dtype=torch.int32),
        index(rows.sent),
        index(ids.shape[0], size),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
    )
