"""Schedules of pipelines as values: what each rank computes, sends and receives in a step, in order."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from ..errors import argument_error, some
from .clock import UNIT, Action, Costs, Fill, Moment, Timed, check_costs, receiver, run_clock
from .orders import IN_HALVES, KINDS, order

SHARES = (0.01, 0.5)  # of Fill: both are tried, and the shorter step wins


@dataclass(frozen=True)
class Schedule:
    """A schedule of a pipeline. ``str`` draws its computations to scale, a line for each rank.

    =================  ======================================================================
    ``name``           as for :func:`make_schedule`
    ``micro_batches``  of a step
    ``stage_to_rank``  the rank that holds each stage
    ``actions``        for each rank, its :class:`Action` values in order
    =================  ======================================================================

    No rank ever blocks, even if every send waits for its receive. All ranks' sends and receives are parts of
    one sequence, and the first that is left can always go.

    >>> print(make_schedule("1f1b", pp=2, micro_batches=3))
    rank 0  0F0 0F1         0B0---- 0F2 0B1----     0B2----
    rank 1      1F0 1B0---- 1F1 1B1---- 1F2 1B2----
    >>> make_schedule("zbv", pp=2, micro_batches=3).stages(0)
    (0, 3)
    """

    name: str
    micro_batches: int
    stage_to_rank: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...] = field(repr=False)

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank."""
        return tuple(stage for stage, holder in enumerate(self.stage_to_rank) if holder == rank)

    def computations(self, rank: int) -> tuple[Action, ...]:
        """A rank's actions without sends and receives."""
        return tuple(action for action in self.actions[rank] if action.kind in ("F", "B", "I", "W"))

    def __str__(self) -> str:
        return drawn(self)


def drawn(schedule: Schedule, costs: Costs = UNIT) -> str:
    """The computations of a schedule to scale, a line for each rank. Those that take no time are left out."""
    ranks = [[timed for timed in rank if timed.end > timed.start] for rank in timeline(schedule, costs)]
    lines = []
    times = [timed for rank in ranks for timed in rank]
    shortest = min(timed.end - timed.start for timed in times)
    width = (1 + max(len(str(timed.action)) for timed in times)) / shortest
    for number, rank in enumerate(ranks):
        line = ""
        for action, _, start, end in rank:
            label = str(action).ljust(round(end * width) - round(start * width) - 1, "-")
            line = line.ljust(round(start * width)) + label
        lines.append(f"rank {number:<{len(str(len(ranks) - 1))}}  {line}")
    return "\n".join(lines)


def make_schedule(
    name: str, *, pp: int, micro_batches: int, stages_per_rank: int | None = None, costs: Costs = UNIT
) -> Schedule:
    """A schedule of one of four kinds.

    ===============  ====================================================================
    name             ``"1f1b"``: one forward and one backward in turn; ``"interleaved"``: the same with more,
                     smaller stages; ``"zero_bubble"``: gradients of weights wait until a rank would be idle;
                     ``"zbv"``: the same with stages placed as a V
    pp               ranks
    micro_batches    of a step; best a multiple of ``pp`` for ``"interleaved"`` and ``"zero_bubble"``
    stages_per_rank  ``None``: 1 for ``"1f1b"``, else 2
    costs            by which gradients of weights, sends and receives are placed
    -> Schedule
    ===============  ====================================================================

    Stage ``s`` is on rank ``s % pp``. With ``"zbv"``, rank ``r`` has the stages ``r`` and
    ``2 * pp - 1 - r``. So the first rank has the first stage and the last one.

    The first two are those of Narayanan et al. (arXiv:2104.04473), the others ZB-H1 and ZB-V of Qi et al.
    (arXiv:2401.10241). The orders of ``F`` and ``B``, or of ``F`` and ``I``, are PyTorch's.

    Raises ``ValueError`` for other names, for sizes below 1, for ``stages_per_rank`` that the kind can't
    have, and for ``costs`` that aren't times of that many stages.

    >>> schedule = make_schedule("zero_bubble", pp=2, micro_batches=2, stages_per_rank=1)
    >>> print(*schedule.actions[1])
    1RECV_F0 1F0 1RECV_F1 1I0 1SEND_B0 1F1 1I1 1SEND_B1 1W0 1W1
    """
    error = functools.partial(argument_error, "make_schedule")
    if name not in KINDS:
        raise error("name", got=repr(name), expected=f"one of {', '.join(map(repr, KINDS))}")
    per_rank = (1 if name == "1f1b" else 2) if stages_per_rank is None else stages_per_rank
    sizes = {"pp": pp, "micro_batches": micro_batches, "stages_per_rank": per_rank}
    for argument, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise error(argument, got=repr(size), expected="an integer of at least 1")
    misfits = {
        "1f1b": (per_rank != 1, "1", "'interleaved' has more"),
        "interleaved": (per_rank == 1, "at least 2", "'1f1b' has 1"),
        "zbv": (per_rank != 2, "2", "'zero_bubble' has any number"),
    }
    misfit, expected, other = misfits.get(name, (False, "", ""))
    if misfit:
        expected, remedy = f"{expected} with name={name!r}", f"Leave it out; {other}."
        raise error("stages_per_rank", got=per_rank, expected=expected, remedy=remedy)
    check_costs("make_schedule", costs, pp * per_rank)
    ranks = tuple(range(pp))
    stage_to_rank = ranks + ranks[::-1] if name == "zbv" else ranks * per_rank
    orders = [order(name, rank, pp, micro_batches, per_rank) for rank in ranks]
    fills = [Fill(pp * per_rank, share) for share in SHARES] if name in IN_HALVES else [None]
    moments = min((run_clock(orders, stage_to_rank, costs, fill) for fill in fills), key=_end)
    return Schedule(name, micro_batches, stage_to_rank, _with_transfers(moments, stage_to_rank, pp))


def from_computations(
    orders: Sequence[Iterable[Action]],
    stage_to_rank: Sequence[int],
    *,
    name: str = "custom",
    costs: Costs = UNIT,
) -> Schedule:
    """A schedule of your own: give each rank's computations in order, and sends and receives are placed.

    =============  ======================================================================
    orders         for each rank, actions of the kinds ``"F"`` and ``"B"``, or ``"F"``, ``"I"`` and ``"W"``
    stage_to_rank  the rank that holds each stage
    costs          by which sends and receives are placed
    -> Schedule
    =============  ======================================================================

    Raises ``ValueError`` unless every micro-batch passes each stage once, on the stage's rank, and for orders
    in which ranks would wait for each other.

    >>> gpipe = [[Action(r, kind, m) for kind in "FB" for m in range(3)] for r in range(2)]
    >>> print(from_computations(gpipe, (0, 1)))
    rank 0  0F0 0F1 0F2             0B0---- 0B1---- 0B2----
    rank 1      1F0 1F1 1F2 1B0---- 1B1---- 1B2----
    """
    listed, error = [tuple(order) for order in orders], functools.partial(argument_error, "from_computations")
    if {*stage_to_rank} != {*range(len(listed))} or not listed:
        expected = f"for each stage its rank, of all {len(listed)} ranks that have orders"
        raise error("stage_to_rank", got=stage_to_rank, expected=expected)
    check_costs("from_computations", costs, len(stage_to_rank))
    if wrong := _misplaced(listed, stage_to_rank):
        expected = "F and B, or F, I and W, of each stage and micro-batch once, on the stage's rank"
        raise error("orders", got=some(wrong), expected=expected)
    moments = run_clock(listed, stage_to_rank, costs)
    _check_ended("from_computations", "orders", listed, moments)
    actions = _with_transfers(moments, stage_to_rank, len(listed))
    return Schedule(name, _micro_batches(listed), tuple(stage_to_rank), actions)


def timeline(schedule: Schedule, costs: Costs = UNIT) -> tuple[tuple[Timed, ...], ...]:
    """For each rank, when its computations begin and end.

    Raises ``ValueError`` for costs that aren't times of the schedule's stages, and for a schedule whose ranks
    wait for each other.

    >>> ranks = timeline(make_schedule("1f1b", pp=2, micro_batches=1))
    >>> [(str(timed.action), timed.start, timed.end) for timed in ranks[0]]
    [('0F0', 0.0, 1.0), ('0B0', 4.0, 6.0)]
    """
    return _timeline("timeline", schedule, costs)


def bubble(schedule: Schedule, costs: Costs = UNIT) -> float:
    """The share of a step's time in which a rank is idle, as a mean over ranks.

    A step's time goes from the first computation's start to the last one's end. Raises as :func:`timeline`.

    >>> kinds = ("1f1b", "interleaved", "zero_bubble", "zbv")
    >>> {kind: round(bubble(make_schedule(kind, pp=8, micro_batches=16)), 3) for kind in kinds}
    {'1f1b': 0.304, 'interleaved': 0.179, 'zero_bubble': 0.068, 'zbv': 0.068}
    """
    ranks = _timeline("bubble", schedule, costs)
    busy = sum(timed.end - timed.start for rank in ranks for timed in rank)
    return 1 - busy / (len(ranks) * max(timed.end for rank in ranks for timed in rank))


class InFlight(NamedTuple):
    """For each rank, the most forwards of its stages whose residuals are held at once.

    ================  =====================================================================
    ``until_input``   if the gradients of inputs, ``I``, would free them
    ``until_weight``  if the gradients of weights, ``W``, free them
    ================  =====================================================================

    A whole backward does both, so the two are equal where no backward is in halves.

    >>> InFlight((2, 1), (2, 2)).until_weight
    (2, 2)
    """

    until_input: tuple[int, ...]
    until_weight: tuple[int, ...]


def in_flight(schedule: Schedule) -> InFlight:
    """For each rank, the most forwards of its stages whose residuals are held at once.

    With several stages a rank, each is one of that many parts of the rank's layers.

    >>> in_flight(make_schedule("1f1b", pp=4, micro_batches=8)).until_weight
    (4, 3, 2, 1)
    >>> in_flight(make_schedule("zero_bubble", pp=4, micro_batches=8, stages_per_rank=1))
    InFlight(until_input=(4, 3, 2, 1), until_weight=(4, 4, 4, 4))
    """

    def most(half: str) -> tuple[int, ...]:
        change = {"F": 1, "B": -1, half: -1}
        return tuple(max(accumulate(change.get(a.kind, 0) for a in rank)) for rank in schedule.actions)

    return InFlight(most("I"), most("W"))


def _with_transfers(
    moments: Sequence[Moment], stage_to_rank: Sequence[int], num_ranks: int
) -> tuple[tuple[Action, ...], ...]:
    """Each rank's actions, where a send and its receive follow the computation at once."""
    actions: list[list[Action]] = [[] for _ in range(num_ranks)]
    for number, (ended, began) in enumerate(moments):
        for (stage, kind, m, *_), rank, *_ in ended:
            to = receiver(stage, kind)
            if 0 <= to < len(stage_to_rank) and (peer := stage_to_rank[to]) != rank:
                forward = kind == "F"
                actions[rank].append(Action(stage, "SEND_F" if forward else "SEND_B", m, peer, number))
                actions[peer].append(Action(to, "RECV_F" if forward else "RECV_B", m, rank, number))
        for timed in began:
            actions[timed.rank].append(timed.action)
    return tuple(map(tuple, actions))


def _timeline(function: str, schedule: Schedule, costs: Costs) -> tuple[tuple[Timed, ...], ...]:
    check_costs(function, costs, len(schedule.stage_to_rank))
    orders = [schedule.computations(rank) for rank in range(len(schedule.actions))]
    moments = run_clock(orders, schedule.stage_to_rank, costs)
    _check_ended(function, "schedule", orders, moments)
    ranks: list[list[Timed]] = [[] for _ in orders]
    for timed in (timed for moment in moments for timed in moment.began):
        ranks[timed.rank].append(timed)
    return tuple(map(tuple, ranks))


def _micro_batches(orders: Sequence[Sequence[Action]]) -> int:
    return 1 + max((action.micro_batch for order in orders for action in order), default=0)


def _misplaced(orders: Sequence[Sequence[Action]], stage_to_rank: Sequence[int]) -> list[str]:
    """The computations that ranks lack, or have against the rules, in words."""
    listed = [(rank, action) for rank, order in enumerate(orders) for action in order]
    found = Counter((rank, str(action)) for rank, action in listed)
    halves = {(action.stage, action.micro_batch) for _, action in listed if action.kind in ("I", "W")}
    wanted = Counter(
        (rank, f"{stage}{kind}{m}")
        for stage, rank in enumerate(stage_to_rank)
        for m in range(_micro_batches(orders))
        for kind in ("FIW" if (stage, m) in halves else "FB")
    )
    return [
        f"{what} {action} on rank {rank}"
        for what, which in (("no", wanted - found), ("a surplus", found - wanted))
        for rank, action in which
    ]


def _check_ended(
    function: str, argument: str, orders: Sequence[Sequence[Action]], moments: Sequence[Moment]
) -> None:
    done = Counter(timed.rank for moment in moments for timed in moment.began)
    stuck = [f"rank {r} before {order[done[r]]}" for r, order in enumerate(orders) if done[r] < len(order)]
    if stuck:
        got = f"ranks that wait for each other: {some(stuck)}"
        raise argument_error(function, argument, got=got, expected="an order in which one can always go on")


def _end(moments: Sequence[Moment]) -> float:
    return max(timed.end for moment in moments for timed in moment.began)
