"""A simulated clock: when each computation of a pipeline begins and ends."""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import argument_error

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
Key = tuple[int, str, int]


class Action(NamedTuple):
    """One thing that a rank does in a step. It prints as in PyTorch: stage, kind, micro-batch.

    ===============  ====================================================================
    ``stage``        the rank's own stage that computes, sends or receives
    ``kind``         ``"F"``: forward; ``"B"``: backward; ``"I"``, ``"W"``: its two halves, the gradients of
                     inputs and of weights; ``"SEND_F"``, ``"RECV_F"``: an activation, to the next stage and
                     from the previous one; ``"SEND_B"``, ``"RECV_B"``: the gradient of one, to the previous
                     stage and from the next one
    ``micro_batch``  from 0
    ``peer``         the rank at the other end of a send or receive
    ``batch``        the number of its moment. A rank's sends and receives of one moment are neighbours, and
                     may go into one ``batch_isend_irecv``
    ===============  ====================================================================

    >>> print(Action(2, "F", 0), Action(2, "SEND_F", 0, peer=3, batch=5))
    2F0 2SEND_F0
    """

    stage: int
    kind: Kind
    micro_batch: int
    peer: int | None = None
    batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Costs:
    """Times that a stage takes for a micro-batch: one number for all stages, or a tuple of one for each.

    ============  ==========================================================================
    ``forward``   of a forward, ``F``
    ``input``     of the gradients of inputs, ``I``; those of the first stage are needed by nobody
    ``weight``    of the gradients of weights, ``W``; a whole backward takes ``input + weight``
    ``transfer``  a number: from where a computation ends to where its result is on another rank
    ============  ==========================================================================

    >>> Costs(weight=(0.5, 2.0)).of(Action(1, "B", 0))
    3.0
    """

    forward: float | tuple[float, ...] = 1.0
    input: float | tuple[float, ...] = 1.0
    weight: float | tuple[float, ...] = 1.0
    transfer: float = 0.0

    def of(self, action: Action) -> float:
        """The time of a computation."""
        named = {"F": [self.forward], "I": [self.input], "W": [self.weight], "B": [self.input, self.weight]}
        return sum(c[action.stage] if isinstance(c, tuple) else c for c in named[action.kind])


def check_costs(function: str, costs: Costs, num_stages: int) -> None:
    """Raise ``ValueError`` for costs that aren't times of ``num_stages`` stages."""
    parts = {name: getattr(costs, name) for name in ("forward", "input", "weight")}
    times = {name: cost if isinstance(cost, tuple) else (cost,) * num_stages for name, cost in parts.items()}
    for name, each in times.items():
        if len(each) != num_stages:
            expected = f"one for each of {num_stages} stages"
            raise argument_error(function, f"costs.{name}", got=f"{len(each)} times", expected=expected)
        if not all(isinstance(time, int | float) and 0 <= time < math.inf for time in each):
            expected = "a finite time of at least 0, or a tuple of one for each stage"
            raise argument_error(function, f"costs.{name}", got=repr(parts[name]), expected=expected)
    if isinstance(costs.transfer, bool | tuple) or not 0 <= costs.transfer < math.inf:
        expected = "a finite time of at least 0"
        raise argument_error(function, "costs.transfer", got=repr(costs.transfer), expected=expected)
    if not any(map(any, times.values())):
        raise argument_error(function, "costs", got="only zeros", expected="a time above 0")


UNIT = Costs()


class Timed(NamedTuple):
    """A computation on the clock, in the units of its costs.

    >>> timed = Timed(Action(0, "F", 1), rank=0, start=1.0, end=2.0)
    >>> timed.end - timed.start
    1.0
    """

    action: Action
    rank: int
    start: float
    end: float


class Moment(NamedTuple):
    """A time at which computations end, and others begin."""

    ended: list[Timed]
    began: list[Timed]


class Fill(NamedTuple):
    """Where to put each ``W`` that the orders lack, the oldest first.

    A rank computes one rather than wait for longer than ``share`` of its time. It also computes one before a
    forward that would make it hold the residuals of more than ``most`` forwards.
    """

    most: int
    share: float


@dataclass
class _Rank:
    queue: deque[Action]
    weights: deque[Action] = field(default_factory=deque)
    held: int = 0
    busy: bool = False

    def choose(self, ready: bool, wait: float, costs: Costs, fill: Fill | None) -> Action | None:
        """The computation to begin now; the next in the queue is ready, or will be after ``wait``."""
        if fill and self.weights:
            full = bool(self.queue) and self.queue[0].kind == "F" and self.held >= fill.most
            if full or wait > fill.share * costs.of(self.weights[0]):
                return self.weights.popleft()
        return self.queue.popleft() if ready else None

    def begin(self, action: Action, fill: Fill | None) -> None:
        self.busy = True
        self.held += {"F": 1, "I": 0}.get(action.kind, -1)
        if fill and action.kind == "I":
            self.weights.append(action._replace(kind="W"))


def run_clock(
    orders: Sequence[Iterable[Action]],
    stage_to_rank: Sequence[int],
    costs: Costs,
    fill: Fill | None = None,
) -> list[Moment]:
    """Run each rank's computations in order, each as soon as it can. Ranks that never can are left out."""
    ranks, last = [_Rank(deque(order)) for order in orders], len(stage_to_rank) - 1
    ends, arrived = dict[Key, float](), set[Key]()
    running: list[tuple[float, int, Timed]] = []
    coming: list[tuple[float, int]] = []  # when something arrives, and on which rank
    moments, ended, now, awake = [], list[Timed](), 0.0, {*range(len(ranks))}
    while True:
        began = []
        for number in sorted(awake):
            rank = ranks[number]
            if rank.busy:
                continue
            inputs = needs(rank.queue[0], last) if rank.queue else []
            there = [
                ends.get(key, math.inf) + costs.transfer * (stage_to_rank[key[0]] != number) for key in inputs
            ]
            at = max(there, default=now if rank.queue else math.inf)
            ready = bool(rank.queue) and arrived.issuperset(inputs) and at <= now
            if action := rank.choose(ready, at - now, costs, fill):
                rank.begin(action, fill)
                began.append(Timed(action, number, now, now + costs.of(action)))
                ends[result(action)] = began[-1].end
                heapq.heappush(running, (began[-1].end, number, began[-1]))
        moments.append(Moment(ended, began))
        if not running and not coming:
            return moments
        now, ended = min(heap[0][0] for heap in (running, coming) if heap), []
        while running and running[0][0] == now:
            ended.append(heapq.heappop(running)[-1])
            ranks[ended[-1].rank].busy = False
        arrived.update(result(done.action) for done in ended)  # not sooner, even if it took no time
        awake = {done.rank for done in ended}
        for done in ended:
            if 0 <= (stage := receiver(*done.action[:2])) <= last:
                late = costs.transfer * (stage_to_rank[stage] != done.rank)
                heapq.heappush(coming, (done.end + late, stage_to_rank[stage]))
        while coming and coming[0][0] == now:
            awake.add(heapq.heappop(coming)[1])


def result(action: Action) -> Key:
    """The value that a computation makes. A whole backward makes the gradients of inputs, too."""
    return action.stage, "I" if action.kind == "B" else action.kind, action.micro_batch


def receiver(stage: int, kind: Kind) -> int:
    """The stage that needs a computation's result. There may be none of that number."""
    return stage + {"F": 1, "W": 0}.get(kind, -1)


def needs(action: Action, last: int) -> list[Key]:
    """The results that a computation begins with; ``last`` is the last stage."""
    stage, kind, m = action[:3]
    if kind == "F":
        return [(stage - 1, "F", m)] if stage else []
    if kind == "W":
        return [(stage, "I", m)]
    return [(stage, "F", m)] + [(stage + 1, "I", m)] * (stage < last)
