"""A stopwatch for dry runs: how long operators would take, and how long they would wait for what is sent."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

from ..introspect import operator_class
from .dry_run import Mark, Totals
from .rates import Rates
from .sent import PURPOSE, SENT, axes_along
from .work import NONE, Work, touched, work

BEGUN = {"fmoe::begin_gather", "fmoe::begin_reduce"}


class Sent(NamedTuple):
    """What an operator sends: when it has all arrived, and why it is sent."""

    seconds: float
    along: str
    purpose: str
    begun: bool


class Ran(NamedTuple):
    """An operator that ran: its work, and bytes by the number of the storage read or made.

    ``compiled`` says whether it may have run together with its neighbours, or not at all.
    """

    kind: str
    work: Work
    read: dict[int, int]
    made: dict[int, int]
    compiled: bool
    sent: Sent | None


class Stopwatch:
    """Notes what runs, and counts nanoseconds: ``("seconds", kind of operator)``, ``("exposed", purpose)``.

    A device runs one kernel at a time. What is only begun is sent meanwhile, one after another along the same
    axes, and the first kernel that reads it waits. For whatever else is sent the device waits at once.

    While ``compiled``, neighbouring elementwise operators are one kernel. It reads what was made before it,
    and writes what is read after it. Operators whose results nobody reads are left out, such as the last ones
    of a layer that is recomputed. ``kind`` overrides that of all operators.
    """

    def __init__(self, rates: Rates, number: Callable[[torch.Tensor], int]) -> None:
        self.rates, self.number = rates, number
        self.compiled, self.kind = False, ""
        self._noted: list[Ran | Mark] = []

    def ran(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        outputs: Sequence[torch.Tensor],
        workspace: int,
        spared: int = 0,
    ) -> None:
        """An operator has run, which held ``workspace`` bytes. ``spared`` are bytes of passes left out."""
        sent = None
        if name in SENT:
            along, purpose, begun = axes_along(args), PURPOSE.get(name, "sums"), name in BEGUN
            seconds = self.rates.sending(SENT[name](args, outputs), along, purpose)
            sent = Sent(seconds, along, purpose, begun)
            done = Work("memory", 0, 0 if begun else 2 * max(0, workspace))  # packed, and unpacked
        elif (done := work(name, func, args, kwargs, outputs)) == NONE:
            return
        done = done._replace(passed=done.passed - spared)
        given = [t for t in optree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        read, made = ({self.number(t): touched(t) for t in tensors} for tensors in (given, outputs))
        compiled = self.compiled and not func._schema.is_mutable
        self._noted.append(Ran(self.kind or operator_class(name), done, read, made, compiled, sent))

    def mark(self, mark: Mark) -> None:
        self._noted.append(mark)

    def count(self, totals: Totals) -> None:
        """Add up what was noted, in the totals of all marks and in ``totals``."""
        needed, last_read = self._needed()
        clock = _Clock(self.rates, last_read)
        links: dict[str, tuple[float, str]] = {}  # until when they are busy, and with what
        arrives: dict[int, tuple[float, str]] = {}
        for i, ran in needed:
            if isinstance(ran, Mark):
                clock.fuse(i)
                ran.totals.update(clock.totals)
                continue
            for number in arrives.keys() & ran.read.keys():
                clock.wait(i, *arrives.pop(number))
            clock.run(i, ran)
            if ran.sent:
                seconds, along, purpose, begun = ran.sent
                busy = links.get(along, (0.0, purpose))
                if not begun:
                    clock.wait(i, *busy)
                links[along] = max(clock.now, busy[0]) + seconds, purpose
                if begun:
                    arrives |= dict.fromkeys(ran.made, links[along])
                else:
                    clock.wait(i, *links[along])
        clock.fuse(len(self._noted))
        totals.update(clock.totals)

    def _needed(self) -> tuple[list[tuple[int, Ran | Mark]], dict[int, int]]:
        """What was noted and is needed, with its place, and the place at which a storage is read last."""
        needed, last_read = [], dict[int, int]()
        for i, ran in reversed([*enumerate(self._noted)]):
            if isinstance(ran, Ran):
                if ran.compiled and not ran.made.keys() & last_read.keys():
                    continue
                for number in ran.read:
                    last_read.setdefault(number, i)
            needed.append((i, ran))
        return needed[::-1], last_read


class _Clock:
    """The time on a device, and what it was spent on."""

    def __init__(self, rates: Rates, last_read: dict[int, int]) -> None:
        self.rates, self.last_read = rates, last_read
        self.now, self.totals = 0.0, Counter[tuple[str, str]]()
        self._read: dict[int, int] = {}  # by operators that run as one
        self._made: dict[int, int] = {}

    def run(self, i: int, ran: Ran) -> None:
        if ran.compiled and ran.work.fusible:
            for number, nbytes in ran.read.items():
                if number not in self._made:
                    self._read[number] = max(nbytes, self._read.get(number, 0))
            self._made |= ran.made
        else:
            self.fuse(i)
            self.spend("seconds", ran.kind, self.rates.seconds(ran.work))

    def fuse(self, i: int) -> None:
        """Run what waits to be run as one."""
        if self._made:
            written = sum(nbytes for n, nbytes in self._made.items() if self.last_read.get(n, 0) >= i)
            done = Work("memory", 0, sum(self._read.values()) + written)
            self._read, self._made = {}, {}
            self.spend("seconds", "elementwise", self.rates.seconds(done))

    def wait(self, i: int, until: float, purpose: str) -> None:
        self.fuse(i)
        self.spend("exposed", purpose, max(0.0, until - self.now))

    def spend(self, what: str, on: str, seconds: float) -> None:
        self.now += seconds
        self.totals[what, on] += round(seconds * 1e9)
