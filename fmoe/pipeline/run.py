"""A step of a pipeline: one rank's actions of a schedule, run on values.

A stage is a function of what it receives. What is in flight is local to one call of :func:`run`: what was
received, what waits to be sent, and what forwards keep for their backwards.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import argument_error
from ..ops.core import engine
from ..ops.core.dtypes import accumulator
from ..ops.core.primitive import kernel
from ..parallel.backends.wire import process_group
from .clock import Action, receiver
from .halves import Gradients, Rest, input_gradient, weight_gradients
from .schedule import Schedule


class Made(NamedTuple):
    """The results of a stage's forward.

    =========  =======================================================================
    ``x``      what the next stage takes; ``None`` on the last one
    ``value``  a scalar that is part of the objective; ``None`` where there is none
    ``sums``   numbers to be added up over micro-batches, without a gradient
    =========  =======================================================================

    >>> Made(None, torch.tensor(2.0), torch.zeros(3)).value
    tensor(2.)
    """

    x: torch.Tensor | None
    value: torch.Tensor | None
    sums: torch.Tensor


class Stage(NamedTuple):
    """A stage of this rank, as functions.

    ===========  =====================================================================
    ``forward``  ``(micro_batch, x)`` -> :class:`Made`; ``x`` is what the stage before made, or ``None``
    ``uses``     which of the rank's variables it computes with, by number
    ``reduce``   of their gradients for one micro-batch, before these are summed
    ===========  =====================================================================

    >>> stage = Stage(lambda m, x: Made(x * 2, None, torch.zeros(0)), uses=())
    >>> stage.forward(0, torch.ones(1)).x
    tensor([2.])
    """

    forward: Callable[[int, torch.Tensor | None], Made]
    uses: Sequence[int]
    reduce: Callable[[Gradients], Gradients] = lambda gradients: gradients


class Line(NamedTuple):
    """The ranks along ``pp``, and what they send each other.

    ==========  ======================================================================
    ``rank``    this one
    ``group``   their process group; ``None``: there is only this one
    ``shapes``  of what a stage sends, for each micro-batch
    ``like``    an empty tensor of its dtype and device
    ==========  ======================================================================

    >>> Line(0, None, [torch.Size([1])], torch.empty(0)).rank
    0
    """

    rank: int
    group: Any
    shapes: Sequence[torch.Size]
    like: torch.Tensor


class Ran(NamedTuple):
    """The results of one rank.

    =============  ====================================================================
    ``sums``       for each of its stages, those of its forwards, added up
    ``gradients``  of each variable, in float32 or wider, summed over micro-batches; ``None``: no stage
                   uses it
    ``peak``       the most forwards whose residuals were held at once
    =============  ====================================================================

    >>> Ran({}, [], 0).peak
    0
    """

    sums: dict[int, torch.Tensor]
    gradients: Gradients
    peak: int


def run(
    schedule: Schedule,
    line: Line,
    stages: Mapping[int, Stage],
    variables: Sequence[torch.Tensor],
    *,
    seed: float = 1.0,
) -> Ran:
    """Do this rank's part of a step. Every rank of the line calls it with the same schedule.

    ===========  ======================================================================
    stages       those of this rank
    variables    leaves of the graphs that forwards make
    seed         the gradient of every ``value``
    -> Ran
    ===========  ======================================================================

    A rank's error leaves its call at once. A note on it names the stage and the micro-batch.

    >>> from .schedule import make_schedule
    >>> w = torch.tensor(3.0, requires_grad=True)
    >>> def forward(m, x):
    ...     value = w**2 * (m + 1)
    ...     return Made(None, value, value.detach()[None])
    >>> schedule = make_schedule("1f1b", pp=1, micro_batches=2)
    >>> found = run(schedule, Line(0, None, [], torch.empty(0)), {0: Stage(forward, [0])}, [w])
    >>> found.sums, found.gradients
    ({0: tensor([27.])}, [tensor(18.)])
    """
    return Step(schedule, line, stages, variables, seed).run(schedule.actions[line.rank])


def forwards(schedule: Schedule, rank: int) -> tuple[Action, ...]:
    """A rank's forwards, and their sends and receives. Nothing waits longer than with the rest in between.

    >>> from .schedule import make_schedule
    >>> print(*forwards(make_schedule("1f1b", pp=2, micro_batches=2), 1))
    1RECV_F0 1F0 1RECV_F1 1F1
    """
    return tuple(action for action in schedule.actions[rank] if action.kind in ("F", "SEND_F", "RECV_F"))


def run_forwards(schedule: Schedule, line: Line, stages: Mapping[int, Stage]) -> dict[int, torch.Tensor]:
    """The ``sums`` of :func:`run`, without gradients."""
    return Step(schedule, line, stages).run(forwards(schedule, line.rank)).sums


class _Kept(NamedTuple):
    """What a forward keeps for its backward. Not its output, whose memory goes when it has been sent."""

    x: torch.Tensor | None
    made: GradientEdge | None
    value: torch.Tensor | None


class _Roots(NamedTuple):
    """Where a backward begins: the outputs that have a graph, and their cotangents; and the stage's input."""

    outputs: list[GradientEdge]
    cotangents: list[torch.Tensor]
    x: torch.Tensor | None


class Step:
    """What one call holds."""

    def __init__(
        self,
        schedule: Schedule,
        line: Line,
        stages: Mapping[int, Stage],
        variables: Sequence[torch.Tensor] = (),
        seed: float | None = None,
    ) -> None:
        self.line, self.stages, self.variables = line, stages, variables
        self.records, self.seed = seed is not None, seed or 0.0
        self.stage_to_rank, self.last = schedule.stage_to_rank, len(schedule.stage_to_rank) - 1
        self.kept: dict[tuple[int, int], _Kept] = {}
        self.halves: dict[tuple[int, int], Rest | _Roots] = {}
        self.arrived: dict[tuple[int, str, int], tuple[torch.Tensor, list[Any]]] = {}
        self.leaving: dict[tuple[int, str, int], torch.Tensor] = {}
        self.sent: deque[tuple[Any, torch.Tensor]] = deque()  # held until they have gone
        self.sums: dict[int, torch.Tensor] = {}
        self.gradients: Gradients = [None] * len(variables)
        self.peak = 0

    def run(self, actions: Iterable[Action]) -> Ran:
        for _, several in groupby(actions, key=_moment):
            listed = [*several]
            with _named(self.line.rank, listed):
                if listed[0].batch is None:
                    for action in listed:
                        self.compute(action)
                else:
                    self.transfer(listed)
        while self.sent:
            self.sent.popleft()[0].wait()
        return Ran(self.sums, self.gradients, self.peak)

    # ---- between ranks

    def transfer(self, actions: Sequence[Action]) -> None:
        """Begin the sends and receives of one moment."""
        begun: list[tuple[Any, torch.Tensor, Any, tuple[int, str, int]]] = []
        for stage, kind, m, peer, _ in actions:
            sends, key, shape = kind in ("SEND_F", "SEND_B"), (stage, kind[-1], m), self.line.shapes[m]
            tensor = self.leaving.pop(key) if sends else self.line.like.new_empty(shape)
            if tensor.numel():
                begun.append((dist.isend if sends else dist.irecv, tensor, peer, key))
            elif not sends:  # of no rows, nothing is sent
                self.arrived[key] = tensor, []
        if not begun:
            return
        group = self.line.group
        works: list[Any] = dist.batch_isend_irecv(
            [dist.P2POp(op, tensor, group=group, group_peer=peer) for op, tensor, peer, _ in begun]
        )
        one_each = len(works) == len(begun)  # else one for all of them, as with NCCL
        for i, (op, tensor, _, key) in enumerate(begun):
            mine = [works[i]] if one_each else works
            if op is dist.irecv:
                self.arrived[key] = tensor, mine
            else:
                self.sent += [(work, tensor) for work in mine]
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()[0].wait()

    def take(self, stage: int, kind: str, m: int) -> torch.Tensor:
        """What has come from another stage."""
        tensor, works = self.arrived.pop((stage, kind, m))
        for work in works:
            work.wait()
        return tensor

    def give(self, stage: int, kind: Any, m: int, tensor: torch.Tensor) -> None:
        """Hand a result to the stage that needs it: here, or to be sent."""
        to, like = receiver(stage, kind), self.line.like
        if (tensor.shape, tensor.dtype) != (self.line.shapes[m], like.dtype):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            expected = f"{like.dtype} of shape {tuple(self.line.shapes[m])}"
            raise argument_error("run", f"stages[{stage}]", got=got, expected=expected)
        if self.stage_to_rank[to] == self.line.rank:
            self.arrived[to, kind, m] = tensor, []
        else:
            self.leaving[stage, kind, m] = tensor.contiguous()

    # ---- computations

    def compute(self, action: Action) -> None:
        of = {"F": self.forward, "B": self.backward, "I": self.backward_input, "W": self.backward_weight}
        of[action.kind](action.stage, action.micro_batch)

    def forward(self, stage: int, m: int) -> None:
        x = self.take(stage, "F", m) if stage else None
        if x is not None and self.records:
            x = x.detach().requires_grad_()
        with torch.set_grad_enabled(self.records):
            made, value, sums = self.stages[stage].forward(m, x)
        if self.records:
            self.kept[stage, m] = _Kept(x, _edge(made), value)
            self.peak = max(self.peak, len(self.kept) + len(self.halves))
        self.sums[stage] = self.sums[stage] + sums if stage in self.sums else sums
        if made is not None and stage < self.last:
            self.give(stage, "F", m, made.detach())

    def backward(self, stage: int, m: int) -> None:
        self.add(stage, self.pulled(stage, m, self.begun(stage, m)))

    def backward_input(self, stage: int, m: int) -> None:
        roots = self.begun(stage, m)
        outputs, cotangents, x = roots
        if x is None:  # nobody waits for its gradient
            self.halves[stage, m] = roots
            return
        g, self.halves[stage, m] = input_gradient(outputs, cotangents, x, self.used(stage))
        self.give(stage, "B", m, torch.zeros_like(x) if g is None else g)

    def backward_weight(self, stage: int, m: int) -> None:
        half = self.halves.pop((stage, m))
        if isinstance(half, Rest):
            self.add(stage, weight_gradients(half, self.used(stage)))
        else:
            self.add(stage, self.pulled(stage, m, half))

    def begun(self, stage: int, m: int) -> _Roots:
        x, made, value = self.kept.pop((stage, m))
        pairs = [(made, self.take(stage, "B", m))] if stage < self.last else []
        if value is not None:
            pairs.append((_edge(value), torch.full_like(value, self.seed)))
        found = [(edge, cotangent) for edge, cotangent in pairs if edge is not None]
        return _Roots([edge for edge, _ in found], [cotangent for _, cotangent in found], x)

    def pulled(self, stage: int, m: int, roots: _Roots) -> Gradients:
        """The gradients of what a stage uses; that of its input goes to the stage before."""
        outputs, cotangents, x = roots
        wanted = [*([] if x is None else [x]), *self.used(stage)]
        found: Gradients = [None] * len(wanted)
        if outputs:
            found = [*engine.grad(outputs, wanted, cotangents, allow_unused=True)]
        if x is not None:
            g, *found = found
            self.give(stage, "B", m, torch.zeros_like(x) if g is None else g)
        return found

    def used(self, stage: int) -> list[torch.Tensor]:
        return [self.variables[i] for i in self.stages[stage].uses]

    def add(self, stage: int, found: Gradients) -> None:
        for i, gradient in zip(self.stages[stage].uses, self.stages[stage].reduce(found)):
            if gradient is None:
                continue
            if (total := self.gradients[i]) is None:  # a copy, as two gradients may be one tensor
                self.gradients[i] = gradient.to(accumulator(gradient.dtype), copy=True)
            else:
                total.add_(gradient)


def _swap(x: torch.Tensor, peer: int, group: str) -> torch.Tensor:
    line, theirs = process_group(group), torch.empty_like(x)
    both = (dist.isend, x), (dist.irecv, theirs)
    for work in dist.batch_isend_irecv([dist.P2POp(op, t, group=line, group_peer=peer) for op, t in both]):
        work.wait()
    return theirs


# What a peer of the group has, for what this rank has. Both call it.
swap = kernel(
    "swap(Tensor x, int peer, str group) -> Tensor",
    impl=_swap,
    fake=lambda x, peer, group: x.new_empty(x.shape),
)


def _edge(tensor: torch.Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor is not None and tensor.requires_grad else None


def _moment(action: Action) -> Any:
    """Sends and receives of one moment have one; a computation has its own."""
    return action if action.batch is None else action.batch


@contextmanager
def _named(rank: int, actions: Sequence[Action]) -> Iterator[None]:
    """An error inside gets a note that names the rank, the stage and the micro-batch."""
    try:
        yield
    except Exception as error:
        stage, _, m, *_ = actions[0]
        named = " ".join(map(str, actions))
        error.add_note(f"pipeline: rank {rank} along pp, stage {stage}, micro-batch {m}, at {named}")
        raise
