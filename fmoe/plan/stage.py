"""One step of one device of a pipeline stage, run on fake tensors and described."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import argument_error
from ..introspect import operator_class
from ..models.config import DecoderConfig
from ..models.decoder import stage_loss
from ..models.params import ModelParams, specs
from ..ops.core.axes import Binding, axis_sizes, bound
from ..parallel.boundary import enter
from ..parallel.placement import computing, moves, placed, token_axes
from ..parallel.spec import axes_by_dim, known_axes
from ..params import is_spec
from ..training.gradients import accumulate, of_placed
from ..training.optim import Optimizer, clip_factor, global_norm
from ..training.zero import collected
from ..transforms import value_and_grad
from .dry_run import CUBLAS, DryRun, Rows

PARTS = ("parameters", "converted", "gradients", "optimizer", "activations", "workspace")
_PURPOSE = dict.fromkeys(("exchange", "send", "send_back", "send_both_back"), "tokens")
_PURPOSE |= dict.fromkeys(("gather_params", "begin_gather", "reduce_params", "begin_reduce"), "parameters")


class StagePlan(NamedTuple):
    """One device of a pipeline stage, in bytes. All devices of a stage are alike.

    ===============  ====================================================================
    ``layers``       first layer, and the one after the last
    ``parameters``   in the dtype they are kept in
    ``converted``    copies of them, gathered or cast, between forward and backward, of all micro-batches in
                     flight; in ``phases`` all that exist
    ``gradients``    as the optimizer gets them; in ``phases`` also the sums of micro-batches
    ``optimizer``    its state
    ``activations``  between forward and backward, by kind of operator, of all micro-batches in flight
    ``in_flight``    how many those are
    ``phases``       for each phase of a step, the parts of its peak
    ``workspaces``   the workspace among those parts, by kind of operator
    ``sent``         bytes sent in a step, by purpose
    ===============  ====================================================================

    >>> from fmoe.models.decoder import preset
    >>> from fmoe.plan import plan
    >>> (stage,) = plan(preset("debug", layers=2), batch_size=2, seq_len=16, device_type="cpu").stages
    >>> stage.gradients == stage.parameters, sum(stage.at_peak.values()) == stage.peak
    (True, True)
    """

    layers: tuple[int, int]
    parameters: int
    converted: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    in_flight: int
    phases: dict[str, dict[str, int]]
    workspaces: dict[str, dict[str, int]]
    sent: dict[str, int]

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
    """The inputs that all stages share."""

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


def dry_run_stage(job: Job, dense: int, sparse: int, first: bool, last: bool) -> StagePlan:
    tree = _stage_specs(job.config, dense, sparse, first, last)
    parts = min(job.micro_batches, 2)  # the third is like the second
    rows = job.batch[0] * parts
    run = DryRun(rows=job.rows, on_cuda=job.on_cuda)
    binding = Binding(job.mesh, tokens=token_axes(job.mesh))
    # Always on the CPU, whose backward runs in this thread, which the dry run watches.
    with torch.device("cpu"), FakeTensorMode(), bound(binding), run:
        params = optree.tree_map(lambda spec: _local(spec, job), tree, is_leaf=is_spec)
        tokens = torch.zeros(rows, job.batch[1], dtype=torch.int64)
        state = job.optimizer.init(params)
        owned = {"parameters": run.numbers(params), "optimizer": run.numbers(state)}
        owned["gradients"], run.params = set(), owned["parameters"]
        run.mark("started")
        loss, watch = functools.partial(_stage_loss, run, job, first), functools.partial(_watched, run, owned)
        out, grads = _differentiated(job, tree, loss, watch, params, tokens)  # held as in a training loop
        run.mark("differentiated")
        owned["converted"] = {*run.copies}
        owned["gradients"] |= run.numbers(grads)
        scale = None if job.max_norm is None else clip_factor(global_norm(grads), job.max_norm)
        run.mark("clipped")
        gradients = run.size(run.numbers(grads))
        job.optimizer.update(params, grads, state, 1e-3, scale=scale, donate=True)
        run.mark("done")
        del out
    return _described(run, owned, gradients, job.micro_batches - parts)


def _differentiated(
    job: Job,
    tree: ModelParams,
    loss: Callable[..., Any],
    watch: Callable[..., Any],
    params: ModelParams,
    tokens: torch.Tensor,
) -> Any:
    """The loss and its gradients, as :func:`fmoe.training.gradients.of_model` gives them."""
    have = optree.tree_map(lambda spec: known_axes(spec, job.mesh), tree, is_leaf=is_spec)
    wanted = optree.tree_map(lambda spec: computing(spec.partition), tree, is_leaf=is_spec)
    how = moves("plan", "params", params, have, wanted, job.mesh)
    flat = optree.tree_leaves(tree, is_leaf=is_spec)
    dtypes = [job.compute_dtype if spec.trained else None for spec in flat]
    parts = len(tokens) // job.batch[0]

    def here(params: ModelParams) -> Any:
        leaves, structure = optree.tree_flatten(params)
        pieces = structure.unflatten(enter(leaves, job.mesh, optree.tree_leaves(have)))
        return placed(pieces, how, dtypes, job.reduce_dtype)

    def of_pieces(params: ModelParams, tokens: torch.Tensor) -> Any:
        return loss(here(params), tokens)

    if job.zero == 3 or job.mesh.size() == 1:
        return accumulate(watch(value_and_grad(of_pieces, has_aux=True)), parts)(params, tokens)
    with torch.no_grad():
        value_and_grads = watch(value_and_grad(loss, has_aux=True))
        out, grads = of_placed(value_and_grads, here(params), (tokens,), parts, job.zero)
        return out, collected(params, grads, have, job.mesh)


def _watched(run: DryRun, owned: dict[str, set[int]], value_and_grads: Callable[..., Any]) -> Any:
    """The function for a micro-batch, with marks before and after, and with its gradients noted as such."""

    def call(params: ModelParams, tokens: torch.Tensor) -> Any:
        run.mark("began")
        value, grads = value_and_grads(params, tokens)
        owned["gradients"] |= run.numbers(grads)
        run.mark("ended")
        return value, grads

    return call


def _described(run: DryRun, owned: dict[str, set[int]], gradients: int, more: int) -> StagePlan:
    """The plan of a run that ``more`` micro-batches would follow, which are like its last."""
    marks = run.marks
    began, forward = marks["began"], marks["forward"]
    for ended, resumed in zip(marks["ended"], began[1:]):  # gradients are summed in between
        owned["gradients"] |= run.alive(resumed) - run.alive(ended)
    owned["activations"] = set()
    for start, end in zip(began, forward):
        alive = run.alive(end)
        kept = alive - run.alive(start) - owned["converted"] - owned["gradients"]
        owned["activations"] |= kept
    spans = {
        "forward": zip(marks["started"] + began[1:], forward),
        "backward": zip(forward, began[1:] + marks["differentiated"]),
        "clip": zip(marks["differentiated"], marks["clipped"]),
        "update": zip(marks["clipped"], marks["done"]),
    }
    phases, workspaces = {}, {}
    for phase, places in spans.items():
        at = run.alive(max(run.peak(*ends) for ends in places)[1])
        parts = {part: run.size(at & owned[part]) for part in PARTS[:-1]}
        others = _by_kind(run, at - set().union(*owned.values())) | {"cuBLAS": CUBLAS * run.on_cuda}
        phases[phase], workspaces[phase] = {**parts, "workspace": sum(others.values())}, others
    sent: Counter[str] = Counter()
    first, *second = run.sent_at["began"]
    for name, nbytes in run.sent.items():
        if nbytes:
            each = second[0][name] - first[name] if second else 0
            sent[_PURPOSE.get(name.removeprefix("fmoe::"), "sums")] += nbytes + more * each
    return StagePlan(
        (0, 0), run.size(owned["parameters"]), run.size(alive & owned["converted"]), gradients,
        run.size(owned["optimizer"]), _by_kind(run, kept), 1, phases, workspaces, dict(sent),
    )  # fmt: skip


def _by_kind(run: DryRun, numbers: set[int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for number in numbers:
        found[operator_class(run.maker[number])] += run.bytes_of[number]
    return dict(found.most_common())


def _stage_loss(run: DryRun, job: Job, first: bool, params: ModelParams, tokens: torch.Tensor) -> Any:
    """The model's loss on this device. Any tokens will do, also as targets."""
    x = tokens
    if not first:  # the output of the stage before
        x = torch.empty(*tokens.shape, job.config.dim, dtype=job.compute_dtype, requires_grad=True)
    ids = torch.ones_like(tokens) if job.segments else None
    x, stats = stage_loss(params, x, tokens, job.config, job.per_layer, job.logits_bytes, ids)
    value = x.sum()
    run.mark("forward")
    return value, stats


def _stage_specs(config: DecoderConfig, dense: int, sparse: int, first: bool, last: bool) -> ModelParams:
    whole, start = specs(config), config.num_dense_layers
    here: dict[str, Any] = {"layers": whole.layers[:dense] + whole.layers[start : start + sparse]}
    if not (first or (last and config.tied_head)):
        here["embedding"] = ()
    if not last:
        here |= {"norm": (), "head": ()}
    return whole._replace(**here)


def _local(spec: Any, job: Job) -> torch.Tensor:
    """This device's piece of a parameter."""
    sizes, shape = axis_sizes(job.mesh), []
    for size, axes in zip(spec.shape, axes_by_dim(spec.partition)):
        pieces = math.prod(sizes[axis] for axis in axes)
        check_divides(f"a dimension of a parameter of shape {spec.shape}", size, pieces, "*".join(axes))
        shape.append(size // pieces)
    return torch.empty(shape, dtype=spec.dtype or job.dtype)


def check_divides(name: str, size: int, pieces: int, of: str) -> None:
    if size < 1 or size % pieces:
        raise argument_error("plan", name, got=size, expected=f"a multiple of {of}={pieces}")
