"""One step of one device, run on fake tensors and described."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import optree
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import argument_error
from ..introspect import operator_class
from ..models.config import DecoderConfig
from ..models.decoder import stage_loss
from ..models.params import ModelParams, specs
from ..ops.core.axes import Binding, axis_sizes, bound, group_of
from ..ops.core.host import on_host
from ..ops.precision import Recipe
from ..parallel.backends import AllToAll
from ..parallel.boundary import enter
from ..parallel.placement import computing, moves, placed, token_axes
from ..parallel.spec import axes_by_dim, known_axes
from ..params import is_spec
from ..training.gradients import accumulate, of_placed
from ..training.optim import Optimizer, clip_factor, global_norm
from ..training.zero import collected
from ..transforms import value_and_grad
from .dry_run import DryRun, Mark, Rows, Totals
from .rates import Rates
from .stopwatch import Stopwatch
from .workspaces import CUBLAS

PARTS = ("parameters", "converted", "gradients", "optimizer", "activations", "workspace")

# Bytes by part and, of activations and workspace, by kind of operator; what is offloaded is of part "host".
Memory = Counter[tuple[str, str]]
Owned = dict[str, set[int]]  # storages by part


class RankPlan(NamedTuple):
    """One device of a rank along ``pp``, in bytes. All devices of a rank are alike.

    ===============  ====================================================================
    ``layers``       for each of its stages, the first layer and the one after the last
    ``parameters``   in the dtype they are kept in
    ``converted``    copies of them, gathered, cast or kept in fp8, between forward and backward, of all
                     micro-batches in flight; in ``phases`` all that exist
    ``gradients``    as the optimizer gets them; in ``phases`` also the sums of micro-batches
    ``optimizer``    its state
    ``activations``  between forward and backward, by kind of operator, of all micro-batches in flight
    ``offloaded``    in the host's memory between forward and backward, of all micro-batches in flight
    ``in_flight``    how many forwards those are of, at most
    ``phases``       for each phase of a step, the parts of its peak
    ``workspaces``   the workspace among those parts, by kind of operator
    ``sent``         bytes sent in a step, by purpose
    ``seconds``      with rates, the device's working time in a step, by kind of operator
    ``exposed``      with rates, for how long it waits in a step for what is sent within a stage, by purpose
    ===============  ====================================================================

    >>> from fmoe.models.decoder import preset
    >>> from fmoe.plan import plan
    >>> (rank,) = plan(preset("debug", layers=2), batch_size=2, seq_len=16, device_type="cpu").ranks
    >>> rank.gradients == rank.parameters, sum(rank.at_peak.values()) == rank.peak
    (True, True)
    """

    layers: tuple[tuple[int, int], ...]
    parameters: int
    converted: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    offloaded: int
    in_flight: int
    phases: dict[str, dict[str, int]]
    workspaces: dict[str, dict[str, int]]
    sent: dict[str, int]
    seconds: dict[str, float]
    exposed: dict[str, float]

    @property
    def busy(self) -> float:
        """The seconds of a step in which the device works, or waits for what is sent within a stage."""
        return sum(self.seconds.values()) + sum(self.exposed.values())

    @property
    def peaks(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """The value that ``torch.cuda.max_memory_allocated`` should give."""
        return max(self.peaks.values())

    @property
    def at_peak(self) -> dict[str, int]:
        """The parts of the peak."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))


class Job(NamedTuple):
    """The inputs that all ranks share. ``mesh`` is that of a rank's devices, and ``batch`` a micro-batch."""

    config: DecoderConfig
    mesh: Any
    batch: tuple[int, int]
    micro_batches: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype | None
    zero: int
    per_layer: Callable[..., Any]
    optimizer: Optimizer
    max_norm: float | None
    logits_bytes: int
    segments: bool
    rows: Rows | None
    on_cuda: bool
    rates: Rates | None = None
    compiled: bool = False
    recipe: Recipe = Recipe()
    payload: str | None = None
    keep_rounded: bool = False


class Stepped(NamedTuple):
    """A dry run of a step: who owns which storage, and the bytes of the gradients that the update gets."""

    run: DryRun
    owned: Owned
    gradients: int

    def memory(self, numbers: Iterable[int]) -> Memory:
        found: Memory = Counter()
        for number in numbers:
            part = next((part for part, mine in self.owned.items() if number in mine), "workspace")
            kind = operator_class(self.run.maker[number]) if part in ("activations", "workspace") else ""
            found[part, kind] += self.run.bytes_of[number]
            if number in self.run.host:
                found["host", ""] += self.run.host[number]
        return found

    def most(self, *spans: tuple[Mark, Mark]) -> Memory:
        """The parts of the peak between some places."""
        _, at = max(self.run.peak(start.at, stop.at) for start, stop in spans)
        return self.memory(self.run.alive(at))

    def of_update(self) -> dict[str, Memory]:
        """The peaks of the phases that come after the gradient."""
        (start,), (clipped,), (done,) = (self.run.marks[m] for m in ("differentiated", "clipped", "done"))
        return {"clip": self.most((start, clipped)), "update": self.most((clipped, done))}


def on_device(memory: Memory) -> int:
    """Bytes of all parts but the host's."""
    return memory.total() - memory["host", ""]


Differentiate = Callable[[DryRun, Owned, ModelParams], Any]


def step(job: Job, tree: ModelParams, differentiate: Differentiate) -> Stepped:
    """A step on fake tensors, of parameters with the specs of ``tree``.

    ``differentiate`` gives a result and gradients. It notes in :data:`Owned` what storages are.
    """
    run = DryRun(rows=job.rows, on_cuda=job.on_cuda)
    watch = run.watch = job.rates and Stopwatch(job.rates, run.number)
    backend = AllToAll(group_of(job.mesh, ("ep",)), payload=job.payload)
    binding = Binding(job.mesh, (("ep", backend),) if job.rows else (), token_axes(job.mesh))
    host = on_host(run if job.on_cuda else None)
    # Always on the CPU, whose backward runs in this thread, which the dry run watches.
    with torch.device("cpu"), FakeTensorMode(), bound(binding), host, run:
        params = optree.tree_map(lambda spec: _local(spec, job), tree, is_leaf=is_spec)
        state = job.optimizer.init(params)
        owned = {"parameters": run.numbers(params), "optimizer": run.numbers(state), "gradients": set[int]()}
        run.params = owned["parameters"]
        if watch:
            watch.compiled = job.compiled
        out, grads = differentiate(run, owned, params)  # held as in a training loop
        run.mark("differentiated")
        if watch:
            watch.compiled, watch.kind = False, "optimizer"
        owned["converted"] = run.copies | run.kept
        owned["gradients"] |= run.numbers(grads)
        scale = None if job.max_norm is None else clip_factor(global_norm(grads), job.max_norm)
        run.mark("clipped")
        gradients = run.size(run.numbers(grads))
        job.optimizer.update(params, grads, state, 1e-3, scale=scale, donate=True)
        run.mark("done")
        del out
    if watch:
        watch.count(run.totals)
    return Stepped(run, owned, gradients)


def on_its_devices(job: Job, tree: ModelParams, params: ModelParams) -> tuple[Any, Any]:
    """Where parameters are, and what a device computes with: as inside ``decoder.loss`` on a mesh."""
    have = optree.tree_map(lambda spec: known_axes(spec, job.mesh), tree, is_leaf=is_spec)
    wanted = optree.tree_map(lambda spec: computing(spec.partition), tree, is_leaf=is_spec)
    how = moves("plan", "params", params, have, wanted, job.mesh)
    flat = optree.tree_leaves(tree, is_leaf=is_spec)
    dtypes = [job.compute_dtype if spec.trained else None for spec in flat]
    leaves, structure = optree.tree_flatten(params)
    pieces = structure.unflatten(enter(leaves, job.mesh, optree.tree_leaves(have)))
    return have, placed(pieces, how, dtypes, job.reduce_dtype)


def plan_alone(job: Job) -> RankPlan:
    """The plan where there is no pipeline, so that every device has all layers."""
    tree, parts = specs(job.config), min(job.micro_batches, 2)  # the third is like the second
    done = step(job, tree, functools.partial(_differentiated, job, tree, parts))
    run, owned, marks = done.run, done.owned, done.run.marks
    began, forward, ended = marks["began"], marks["forward"], marks["ended"]
    for stop, resumed in zip(ended, began[1:]):  # gradients are summed in between
        owned["gradients"] |= run.alive(resumed.at) - run.alive(stop.at)
    owned["activations"] = set()
    for start, end in zip(began, forward):
        alive = run.alive(end.at)
        kept = alive - run.alive(start.at) - owned["converted"] - owned["gradients"]
        owned["activations"] |= kept
    phases = {
        "forward": done.most(*zip(marks["started"] + began[1:], forward)),
        "backward": done.most(*zip(forward, began[1:] + marks["differentiated"])),
        **done.of_update(),
    }
    totals = run.totals.copy()
    for _ in range(job.micro_batches - parts):  # computed like the second, and added like the first
        totals.update(run.since(began[1], ended[1]) + run.since(ended[0], began[1]))
    held = done.memory(kept | (alive & owned["converted"]))
    return described(job, ((0, job.config.num_layers),), done, phases, held, 1, totals)


def described(
    job: Job,
    layers: tuple[tuple[int, int], ...],
    done: Stepped,
    phases: dict[str, Memory],
    held: Memory,
    in_flight: int,
    totals: Totals,
) -> RankPlan:
    """``held`` is what lies between forward and backward, and ``totals`` are of a whole step."""
    for memory in phases.values():
        memory["workspace", "cuBLAS"] += CUBLAS * job.on_cuda
    size = done.run.size
    return RankPlan(
        layers,
        size(done.owned["parameters"]),
        held["converted", ""],
        done.gradients,
        size(done.owned["optimizer"]),
        _by_kind(held, "activations"),
        held["host", ""],
        in_flight,
        {
            phase: {part: sum(n for (mine, _), n in memory.items() if mine == part) for part in PARTS}
            for phase, memory in phases.items()
        },
        {phase: _by_kind(memory, "workspace") for phase, memory in phases.items()},
        _by_kind(totals, "sent"),
        *({kind: n / 1e9 for kind, n in _by_kind(totals, what).items()} for what in ("seconds", "exposed")),
    )


def spent(totals: Totals) -> float:
    """The seconds in which a device works, or waits for what is sent."""
    return sum(n for (what, _), n in totals.items() if what in ("seconds", "exposed")) / 1e9


def _by_kind(counted: Counter[tuple[str, str]], part: str) -> dict[str, int]:
    return {kind: n for (mine, kind), n in counted.most_common() if mine == part and n}


def _differentiated(
    job: Job, tree: ModelParams, parts: int, run: DryRun, owned: Owned, params: ModelParams
) -> Any:
    """The loss and its gradients, as :func:`fmoe.training.gradients.of_model` gives them."""
    tokens = torch.zeros(job.batch[0] * parts, job.batch[1], dtype=torch.int64)
    run.mark("started")

    def loss(params: ModelParams, tokens: torch.Tensor) -> Any:
        # Any tokens will do, also as targets.
        ids = torch.ones_like(tokens) if job.segments else None
        how: dict[str, Any] = dict(
            per_layer=job.per_layer, logits_bytes=job.logits_bytes, mtp_weight=mtp_weight(job),
            precision=job.recipe,
        )  # fmt: skip
        out = stage_loss(params, tokens, tokens, job.config, segment_ids=ids, **how)
        run.mark("forward")
        return out

    def of_pieces(params: ModelParams, tokens: torch.Tensor) -> Any:
        return loss(on_its_devices(job, tree, params)[1], tokens)

    def watched(value_and_grads: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: ModelParams, tokens: torch.Tensor) -> Any:
            run.mark("began")
            value, grads = value_and_grads(params, tokens)
            owned["gradients"] |= run.numbers(grads)
            run.mark("ended")
            return value, grads

        return call

    if (job.zero == 3 or job.mesh.size() == 1) and not job.keep_rounded:
        return accumulate(watched(value_and_grad(of_pieces, has_aux=True)), parts)(params, tokens)
    with torch.no_grad():
        have, here = on_its_devices(job, tree, params)
        value_and_grads = watched(value_and_grad(loss, has_aux=True))
        keeping = run.keeping_rounded if job.keep_rounded else nullcontext
        out, grads = of_placed(value_and_grads, here, (tokens,), parts, job.zero, keeping)
        return out, collected(params, grads, have, job.mesh)


def _local(spec: Any, job: Job) -> torch.Tensor:
    """This device's piece of a parameter."""
    sizes, shape = axis_sizes(job.mesh), []
    for size, axes in zip(spec.shape, axes_by_dim(spec.partition)):
        pieces = math.prod(sizes[axis] for axis in axes)
        check_divides(f"a dimension of a parameter of shape {spec.shape}", size, pieces, "*".join(axes))
        shape.append(size // pieces)
    return torch.empty(shape, dtype=spec.dtype or job.dtype)


def mtp_weight(job: Job) -> float:
    """Any weight costs the same, so a plan has multi-token prediction wherever there are modules of it."""
    return 1.0 if job.config.mtp_layers else 0.0


def check_divides(name: str, size: int, pieces: int, of: str) -> None:
    if size < 1 or size % pieces:
        raise argument_error("plan", name, got=size, expected=f"a multiple of {of}={pieces}")
