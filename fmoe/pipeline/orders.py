"""The four kinds of schedules, as the orders in which ranks compute."""

from collections import Counter
from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

from .clock import Action, Kind

KINDS = ("1f1b", "interleaved", "zero_bubble", "zbv")
IN_HALVES = ("zero_bubble", "zbv")


class Pattern(NamedTuple):
    """The order of one rank's computations. Stages are named by their place among the rank's own.

    ==============  =====================================================================
    ``stages``      the rank's own
    ``forwards``    the stage of each forward
    ``backwards``   the stage of each backward
    ``ahead``       the forwards that come before forwards and backwards take turns
    ==============  =====================================================================
    """

    stages: list[int]
    forwards: list[int]
    backwards: list[int]
    ahead: int


def order(name: str, rank: int, pp: int, micro_batches: int, per_rank: int) -> list[Action]:
    """A rank's computations, without ``W``: some forwards, then forwards and backwards in turn.

    Patterns have whole rounds, and so micro-batches too many. These are left out, which makes no other wait.
    """
    if name == "zbv":
        pattern = _vee(rank, pp, micro_batches)
    else:
        pattern = _loop(rank, pp, micro_batches, per_rank, hop=2 if name == "interleaved" else 1)
    stages, forwards, backwards, ahead = pattern
    f = _numbered("F", (stages[place] for place in forwards))
    b = _numbered("I" if name in IN_HALVES else "B", (stages[place] for place in backwards))
    in_turn = [action for pair in zip_longest(f[ahead:], b) for action in pair if action]
    return [action for action in f[:ahead] + in_turn if action.micro_batch < micro_batches]


def _loop(rank: int, pp: int, micro_batches: int, per_rank: int, hop: int) -> Pattern:
    """A round's micro-batches pass the first of the rank's stages, then the next, and come back in reverse.

    A rank is ``hop`` forwards ahead of the next one. The rounds are PyTorch's, where it allows the number of
    micro-batches: of ``pp`` where that divides them.
    """
    rounds = max(1, micro_batches // pp)
    size = -(-micro_batches // rounds)
    forwards = [place for _ in range(rounds) for place in range(per_rank) for _ in range(size)]
    backwards = [per_rank - 1 - place for place in forwards]
    ahead = (per_rank - 1) * size + hop * (pp - 1 - rank)
    return Pattern([rank + place * pp for place in range(per_rank)], forwards, backwards, ahead)


def _vee(rank: int, pp: int, micro_batches: int) -> Pattern:
    """Down the ranks and up again. The second stage begins when the first micro-batch has come back."""
    left, in_turn = pp - rank, [0, 1] * micro_batches
    forwards = [0] * (2 * left - 1) + [1, 0] * rank + [1] * left + in_turn
    return Pattern([rank, 2 * pp - 1 - rank], forwards, [1] * left + in_turn, 2 * pp - 1)


def _numbered(kind: Kind, stages: Iterable[int]) -> list[Action]:
    """Actions of stages, each of the stage's next micro-batch."""
    seen, actions = Counter[int](), []
    for stage in stages:
        actions.append(Action(stage, kind, seen[stage]))
        seen[stage] += 1
    return actions
