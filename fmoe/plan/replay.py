"""One rank of a pipeline: a few of its computations run on fake tensors, and its whole schedule is replayed.

The computations are those of :mod:`fmoe.pipeline.run`, two micro-batches of each stage, each alone. What a
computation takes and leaves is the same whenever it comes. So the schedule's actions add up to a step.
"""

import functools
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..models.config import DecoderConfig
from ..models.params import ModelParams, specs
from ..models.stages import Stages
from ..ops.core.axes import Group
from ..pipeline.clock import Action, Kind, receiver
from ..pipeline.halves import Rest
from ..pipeline.run import Line, Ran, Step
from ..pipeline.schedule import Schedule
from ..training import pipelined
from ..training.pipelined import Setup
from ..training.zero import collected
from .dry_run import DryRun, Mark, Totals
from .rank import (
    Job,
    Memory,
    Owned,
    RankPlan,
    Stepped,
    described,
    mtp_weight,
    on_device,
    on_its_devices,
    spent,
    step,
)
from .time import of_pipeline


class Effect(NamedTuple):
    """One computation: a micro-batch's memory at its peak and afterwards, and what was counted.

    ``lasting`` is what it leaves to the rest of the step: sums of gradients, and weights kept in fp8.
    """

    peak: Memory
    after: Memory
    lasting: Memory
    totals: Totals


class Sample(NamedTuple):
    """A rank's computations, and what comes before and after all of them.

    ===========  ======================================================================
    ``done``     the dry run that they are from
    ``effects``  of each of the rank's stages and kinds: for the first micro-batch, and for a later one
    ``base``     what is held all the time
    ``phases``   the peaks of what isn't a stage's computation
    ``around``   what is counted there
    ===========  ======================================================================
    """

    done: Stepped
    effects: dict[tuple[int, Kind], list[Effect]]
    base: Memory
    phases: dict[str, Memory]
    around: Totals


class _Noted(NamedTuple):
    """Where each computation began and ended, and the storages of summed gradients."""

    spans: dict[Action, tuple[Mark, Mark]]
    sums: set[int]


class _Sampled(Step):
    """Runs computations each alone. What other stages give comes from nowhere."""

    dry: DryRun
    owned: Owned
    noted: _Noted

    def compute(self, action: Action) -> None:
        start = self.dry.mark("computes")
        super().compute(action)
        for half in self.halves.values():
            self.owned["gradients"] |= self.dry.numbers(half.found if isinstance(half, Rest) else ())
        self.noted.spans[action] = start, self.dry.mark("computed")

    def take(self, stage: int, kind: str, m: int) -> torch.Tensor:
        return self.line.like.new_empty(self.line.shapes[m])

    def give(self, stage: int, kind: Any, m: int, tensor: torch.Tensor) -> None:
        pass

    def add(self, stage: int, found: Any) -> None:
        self.owned["gradients"] |= self.dry.numbers(found)
        before = self.dry.numbers(self.gradients)
        super().add(stage, found)
        self.noted.sums.update(self.dry.numbers(self.gradients) - before)


def plan_in_stages(
    job: Job, schedule: Schedule, stages: Stages, everywhere: Group
) -> tuple[tuple[RankPlan, ...], float, float]:
    """The plans of all ranks and, with rates, a step's seconds and those that sending adds between stages.

    ``everywhere`` are the devices that tokens or stages lie on.
    """
    like = _first_alike(job.config, schedule, stages)
    samples = {rank: sample(job, schedule, stages, rank, everywhere) for rank in sorted({*like})}
    ranks = tuple(replay(job, schedule, stages, rank, samples[first]) for rank, first in enumerate(like))
    if not job.rates:
        return ranks, 0.0, 0.0
    times = {
        action: spent(effect.totals)
        for rank, first in enumerate(like)
        for action, effect in _of_each(schedule, rank, samples[first]).items()
    }
    around = [spent(samples[first].around) for first in like]
    transfer = job.rates.sending(message(job), "pp", "pipeline")
    return ranks, *of_pipeline(schedule, times, around, transfer)


def _first_alike(config: DecoderConfig, schedule: Schedule, stages: Stages) -> list[int]:
    """For each rank, the first one whose stages have the same kinds of layers and of computations."""

    def kinds(rank: int) -> Any:
        found = []
        for s in schedule.stages(rank):
            a, b = stages.layers[s]
            dense = max(0, min(b, config.num_dense_layers) - a)
            computed = {action.kind for action in schedule.computations(rank) if action.stage == s}
            found.append((s == 0, s == len(stages.ranks) - 1, dense, b - a, computed))
        return found

    found = [*map(kinds, range(len(schedule.actions)))]
    return [*map(found.index, found)]


def message(job: Job) -> int:
    """Bytes of what one stage sends another for a micro-batch."""
    rows, length = job.batch
    return rows * length * job.config.dim * job.compute_dtype.itemsize


def sample(job: Job, schedule: Schedule, stages: Stages, rank: int, everywhere: Group) -> Sample:
    """Run a step of a rank in which every stage computes two micro-batches, or one if there is only one."""
    tree = stages.of_rank(specs(job.config), rank)
    mine = schedule.stages(rank)
    each = dict(
        per_layer=job.per_layer, logits_bytes=job.logits_bytes, mtp_weight=mtp_weight(job),
        precision=job.recipe,
    )  # fmt: skip
    group = SimpleNamespace(group_name=f"pp={len(schedule.actions)}")
    on = {"dtype": job.compute_dtype}
    setup = Setup("plan", job.config, rank, group, job.mesh, everywhere, schedule, stages, on, each)
    noted = _Noted({}, set())
    done = step(job, tree, functools.partial(_differentiated, job, setup, tree, noted))
    run, owned, spans, marks = done.run, done.owned, noted.spans, done.run.marks
    before = {
        (a.stage, a.micro_batch): run.alive(start.at) for a, (start, _) in spans.items() if a.kind == "F"
    }
    lasting = noted.sums | run.kept
    owned["gradients"] |= noted.sums
    owned["activations"] = set()
    for action, (_, end) in spans.items():
        made = run.alive(end.at) - before[action.stage, action.micro_batch]
        owned["activations"] |= made - owned["converted"] - owned["gradients"]
    effects: defaultdict[tuple[int, Kind], list[Effect]] = defaultdict(list)
    for action, (start, end) in spans.items():
        others, had = before[action.stage, action.micro_batch], lasting & run.alive(start.at)
        highest = run.alive(run.peak(start.at, end.at)[1]) - others - had
        left = run.alive(end.at) - others - had
        peak, after, more = map(done.memory, (highest, left - lasting, left & lasting))
        effect = Effect(peak, after, more, run.since(start, end))
        effects[mine.index(action.stage), action.kind].append(effect)
    (started,), (first,), (last,), (end,) = (marks[m] for m in ("started", "first", "last", "differentiated"))
    phases = {"forward": done.most((started, first)), "backward": done.most((last, end)), **done.of_update()}
    base = done.memory(run.alive(first.at))
    around = run.totals - run.since(first, last)
    return Sample(done, dict(effects), base, phases, around)


def _two_of_each(schedule: Schedule, rank: int) -> list[Action]:
    """Computations of two micro-batches of each stage, or of one, for each way to divide its backward.

    Those of a stage begin with its first micro-batch.
    """
    computed: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for action in schedule.computations(rank):
        computed[action.stage, action.micro_batch].append(action)
    ways: defaultdict[tuple[int, str], list[list[Action]]] = defaultdict(list)
    for (stage, _), listed in computed.items():
        ways[stage, "".join(action.kind for action in listed)].append(listed)
    by_stage = sorted(ways.items(), key=lambda way: way[0][0])
    return [action for _, several in by_stage for listed in several[:2] for action in listed]


def _differentiated(
    job: Job,
    setup: Setup,
    tree: ModelParams,
    noted: _Noted,
    dry: DryRun,
    owned: Owned,
    params: ModelParams,
) -> Any:
    """The loss and gradients, as :mod:`fmoe.training.pipelined` computes them, of a few actions."""
    rows, length = job.batch
    batch = [
        torch.zeros(rows * job.micro_batches, length, dtype=torch.int64) for _ in range(2 + job.segments)
    ]
    dry.mark("started")

    def run(schedule: Schedule, line: Line, stages: Any, variables: Any, *, seed: float) -> Ran:
        sampled = _Sampled(schedule, line, stages, variables, seed)
        sampled.dry, sampled.owned, sampled.noted = dry, owned, noted
        dry.mark("first")
        with dry.keeping_rounded(variables if job.keep_rounded else ()):
            ran = sampled.run(_two_of_each(schedule, line.rank))
        dry.mark("last")
        return ran

    with torch.no_grad():
        have, here = on_its_devices(job, tree, params)
        out, grads = pipelined.differentiated(setup, job.zero, here, batch, run)
        del here
        return out, collected(params, grads, have, job.mesh)


def _of_each(schedule: Schedule, rank: int, sample: Sample) -> dict[Action, Effect]:
    """The effect of each of a rank's computations: of a stage's first micro-batch, or of a later one."""
    mine, found, begun = schedule.stages(rank), dict[Action, Effect](), set[tuple[int, Kind]]()
    for action in schedule.computations(rank):
        key = mine.index(action.stage), action.kind
        found[action] = sample.effects[key][-1 if key in begun else 0]
        begun.add(key)
    return found


def _kept(memory: Memory) -> int:
    """Bytes between forward and backward, without gradients that wait for a second half."""
    return sum(n for (part, _), n in memory.items() if part in ("activations", "converted"))


def replay(job: Job, schedule: Schedule, stages: Stages, rank: int, sample: Sample) -> RankPlan:
    """The plan of a rank whose stages are like those of ``sample``."""
    nbytes, effects = message(job), _of_each(schedule, rank, sample)
    phases, live, totals = dict(sample.phases), sample.base.copy(), sample.around.copy()
    held: dict[tuple[int, int], Memory] = {}  # of forwards whose backward isn't done
    most: Memory = Counter()  # of these, when they are largest
    waiting = Counter[tuple[int, str, int]]()  # what has come, and what will go
    going: list[Action] = []
    in_flight = 0
    for action in schedule.actions[rank]:
        stage, kind, m, _, moment = action
        if moment is not None:
            for sent in going:  # what went earlier has arrived when a later transfer begins
                if sent.batch != moment:
                    del waiting[sent.stage, sent.kind, sent.micro_batch]
            going = [sent for sent in going if sent.batch == moment]
            if kind in ("SEND_F", "SEND_B"):
                going.append(action)
                totals["sent", "pipeline"] += nbytes
            else:
                waiting[stage, kind, m] = nbytes
            continue
        waiting.pop((stage, "RECV_F" if kind == "F" else "RECV_B", m), None)
        effect = effects[action]
        live.subtract(held.pop((stage, m), Counter()))
        phase = "forward" if kind == "F" else "backward"
        peak = live + effect.peak
        peak["workspace", "pipeline"] += waiting.total()
        phases[phase] = max(phases[phase], peak, key=on_device)
        totals.update(effect.totals)
        live.update(effect.lasting)
        if kind in ("F", "I"):
            held[stage, m] = effect.after
            live.update(effect.after)
        in_flight = max(in_flight, len(held))
        most = max(most, sum(held.values(), Memory()), key=_kept)
        to = receiver(stage, "F" if kind == "F" else "I")
        if kind != "W" and 0 <= to < len(schedule.stage_to_rank):
            here = schedule.stage_to_rank[to] == rank
            way = "F" if kind == "F" else "B"
            waiting[(to, f"RECV_{way}", m) if here else (stage, f"SEND_{way}", m)] = nbytes
    # Parameters that are gathered once, and weights that are kept in fp8, are there to the end.
    most["converted", ""] += live["converted", ""]
    layers = tuple(stages.layers[s] for s in schedule.stages(rank))
    return described(job, layers, sample.done, phases, most, in_flight, totals)
