"""The time of a planned step, from the work of its operators, what devices send, and rates of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..pipeline.clock import Action, Costs
from ..pipeline.schedule import Schedule, timeline
from .rank import RankPlan


class Time(NamedTuple):
    """The time of a step.

    =====================  ===============================================================
    ``seconds``            of a step
    ``bubble``             the share of it in which a rank is idle, as a mean over ranks
    ``exposed``            seconds in which devices wait for what is sent, by purpose, as a mean over ranks;
                           ``pipeline``: by which a step is longer than if stages' results came at once
    ``tokens_per_second``  of a device
    ``mfu``                model FLOPs, without recomputation, as a share of the device's peak; ``None`` if
                           that isn't known
    =====================  ===============================================================

    >>> time = Time(2.0, 0.25, {"tokens": 0.3, "sums": 0.1}, 512.0, None)
    >>> f"{sum(time.exposed.values()) / time.seconds:.0%}"
    '20%'
    """

    seconds: float
    bubble: float
    exposed: dict[str, float]
    tokens_per_second: float
    mfu: float | None


@dataclass(frozen=True)
class Measured(Costs):
    """A time for each computation."""

    times: Mapping[Action, float] = field(default_factory=dict)

    def of(self, action: Action) -> float:
        return self.times[action]


def of_pipeline(
    schedule: Schedule,
    times: Mapping[Action, float],
    around: Sequence[float],
    transfer: float,
) -> tuple[float, float]:
    """Seconds of a step, and by how many of these it is longer than if stages' results came at once.

    ``times`` are of all computations, ``around`` of what each rank does before and after all of its own,
    and ``transfer`` that in which a stage's result goes to another rank.
    """
    now, late = (
        max(timed.end for rank in timeline(schedule, Measured(transfer=t, times=times)) for timed in rank)
        for t in (0.0, transfer)
    )
    return late + max(around), late - now


def planned(
    ranks: Sequence[RankPlan],
    seconds: float,
    pipeline: float,
    tokens: float,
    flops: float,
    peak: float | None,
) -> Time:
    """The time of a step of some ``tokens`` a device, each of so many ``flops``."""
    purposes = dict.fromkeys(purpose for rank in ranks for purpose in rank.exposed)
    exposed = {p: sum(rank.exposed.get(p, 0.0) for rank in ranks) / len(ranks) for p in purposes}
    if len(ranks) > 1:
        exposed["pipeline"] = exposed.get("pipeline", 0.0) + pipeline
    busy = sum(rank.busy for rank in ranks) / len(ranks)
    rate = tokens / seconds
    return Time(seconds, 1 - busy / seconds, exposed, rate, flops * rate / peak if peak else None)
