"""Random schedules on real processes: with delays anywhere, and with a rank that fails anywhere."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import error, fresh_seed, quick
from test_schedule import random_schedule
from workers import RankError

from fmoe.pipeline.run import Line, Made, Stage, Step, run
from fmoe.pipeline.schedule import Schedule

SHAPE = torch.Size([2, 4])


def forward_of(weight: torch.Tensor, inputs: torch.Tensor, stage: int) -> Callable[..., Made]:
    def forward(m: int, x: torch.Tensor | None) -> Made:
        x = ((inputs[m] if x is None else x) @ weight).tanh()
        value = x.square().sum() * (stage + 1)
        return Made(x, value, value.detach()[None])

    return forward


def step(schedule: Schedule, rng: random.Random) -> float:
    """A step of a stack of products. This rank's error against all of it in one process."""
    rank, stages, micro_batches = dist.get_rank(), schedule.stage_to_rank, schedule.micro_batches
    drawn = torch.Generator().manual_seed(rng.randrange(2**31))
    whole = torch.randn(len(stages), 4, 4, dtype=torch.float64, generator=drawn).requires_grad_()
    inputs = torch.randn(micro_batches, *SHAPE, dtype=torch.float64, generator=drawn)
    mine = {s: whole[s].detach().requires_grad_() for s, holder in enumerate(stages) if holder == rank}
    line = Line(rank, dist.group.WORLD, [SHAPE] * micro_batches, inputs.new_empty(0))
    parts = {s: Stage(forward_of(w, inputs, s), [i]) for i, (s, w) in enumerate(mine.items())}
    ran = run(schedule, line, parts, [*mine.values()])
    values = []
    for m in range(micro_batches):
        x = None
        for s in range(len(stages)):
            x, value, _ = forward_of(whole[s], inputs, s)(m, x)
            values.append(value)
    (want,) = torch.autograd.grad(sum(values), whole)
    return max([0.0, *(error(found, want[s]) for s, found in zip(mine, ran.gradients))])


def disturbed(disturb: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Every action of a pipeline begins with a disturbance."""
    for name in ("forward", "backward", "backward_input", "backward_weight", "transfer"):
        action = getattr(Step, name)

        def call(*args: Any, action: Any = action) -> Any:
            disturb()
            return action(*args)

        patch.setattr(Step, name, call)


def with_delays(seed: int, number: int) -> float:
    here, rng = random.Random(seed + dist.get_rank()), random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        disturbed(lambda: time.sleep(here.choice([0, 0, 0, 0, here.uniform(0, 0.01)])), patch)
        return max(step(random_schedule(rng, 4), rng) for _ in range(number))


@pytest.mark.parametrize("number", quick([5], [20]))
def test_delays_anywhere_block_nothing_and_change_nothing(pool: Any, number: int) -> None:
    assert max(pool.run(4, with_delays, fresh_seed(), number)) < 1e-12


def with_a_failure(seed: int, dies: bool) -> str:
    """One rank fails at one of its actions. The others say what they are told."""
    rng, count = random.Random(seed), 0
    schedule = random_schedule(rng, 3)
    failing = rng.randrange(3)
    number = rng.randrange(len({a if a.batch is None else a.batch for a in schedule.actions[failing]}))

    def fail() -> None:
        nonlocal count
        count += 1
        if dist.get_rank() == failing and count == number + 1:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OverflowError("enough")

    with pytest.MonkeyPatch.context() as patch:
        disturbed(fail, patch)
        step(schedule, rng)
    return "done"


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("attempt", range(8))
def test_a_rank_that_fails_at_any_action_holds_up_no_other(pool: Any, attempt: int, dies: bool) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"enough|died"):
        pool.run(3, with_a_failure, fresh_seed(), dies)
    assert time.monotonic() - began < 30
