"""Plans of training: memory by part on each device, and what devices send each other.

A step of the library's own code runs on fake tensors of one device's sizes, so a plan follows the code. It
needs no GPU, no process group and no memory.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import argument_error
from ..models.config import DecoderConfig
from ..ops.core.axes import MeshOfSizes, axis_sizes
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.route import topk
from ..parallel.backends import Backend, backend_of
from ..parallel.backends.bounds import Bound
from ..parallel.mesh import AXES, parse_axes
from ..parallel.placement import token_axes
from ..training.gradients import check_zero
from ..training.optim import Optimizer, adamw
from .dry_run import Rows
from .stage import Job, StagePlan, check_divides, dry_run_stage

SAMPLED_TOKENS = 8192


class Plan(NamedTuple):
    """A plan, with its stages in order: one if there is no pipeline.

    ``rows`` are those of a dispatch, or ``None`` along ``ep=1``. ``peak`` is the most bytes on any device.

    >>> from fmoe.models.decoder import preset
    >>> found = plan(preset("debug", layers=2), "pp=2", batch_size=2, seq_len=16, device_type="cpu")
    >>> [stage.layers for stage in found.stages], found.peak == max(stage.peak for stage in found.stages)
    ([(0, 1), (1, 2)], True)
    """

    mesh: dict[str, int]
    tokens_per_device: int
    stages: tuple[StagePlan, ...]
    rows: Rows | None
    copies_per_token: float

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)


def plan(
    config: DecoderConfig,
    mesh: str | Mapping[str, int] = "",
    *,
    batch_size: int,
    seq_len: int,
    micro_batches: int = 1,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    zero: int = 3,
    per_layer: Callable[..., Any] = lambda layer: layer,
    optimizer: Optimizer | None = None,
    max_norm: float | None = 1.0,
    imbalance: float = 1.0,
    backend: str | Backend = "all_to_all",
    logits_bytes: int = LOGITS_BYTES,
    segments: bool = False,
    device_type: str = "cuda",
) -> Plan:
    """Plan the memory and traffic of a training step on each device, without using any.

    =============  =======================================================================
    mesh           axes and sizes, as ``"dp=2,ep=4"`` or a dict; ``pp`` divides the layers, and can be
                   planned but not yet trained
    batch_size     sequences per step, over all devices, of ``seq_len`` tokens each
    micro_batches  the parts in which a step's batch is computed
    dtype          of parameters; ``compute_dtype`` is that of the arithmetic, ``None`` for the same
    reduce_dtype   what gradients are summed in over devices, as for ``decoder.loss``
    zero           1, 2 or 3, as for :func:`fmoe.training.gradients.of_model`
    per_layer      as for ``decoder.loss``, such as ``fmoe.remat``. Leave ``torch.compile`` out; it can
                   keep less than is planned
    optimizer      its ``init`` and ``update`` run, too; ``None``: ``adamw()``
    max_norm       gradients are clipped to it; ``None``: they aren't
    imbalance      how many times its fair share of rows the busiest device along ``ep`` gets
    backend        as for ``decoder.loss``; without ``host_sync`` rows are those that there is room for
    segments       whether the loss gets ``segment_ids``
    device_type    ``"cuda"``: with its allocator's rounding, and what kernels hold while they run;
                   ``"cpu"``: tensors only
    -> Plan
    =============  =======================================================================

    Raises ``ValueError`` for sizes below 1, for sizes that the mesh doesn't divide, for another ``zero``, and
    for other devices.

    >>> from fmoe.models.decoder import num_params, preset
    >>> found = plan(preset("debug"), batch_size=4, seq_len=64, device_type="cpu")
    >>> found.stages[0].parameters == 4 * num_params(preset("debug"))[0]
    True
    """
    error = functools.partial(argument_error, "plan")
    for name, number in (("batch_size", batch_size), ("seq_len", seq_len), ("micro_batches", micro_batches)):
        if not isinstance(number, int) or number < 1:
            raise error(name, got=number, expected="an integer of at least 1")
    check_zero("plan", zero)
    bounded = backend_of("plan", backend)
    if not 1 <= imbalance < math.inf:
        expected, remedy = "a number of at least 1", "An even router has 1."
        raise error("imbalance", got=imbalance, expected=expected, remedy=remedy)
    if device_type not in ("cuda", "cpu"):
        expected, remedy = "cuda or cpu, whose allocations are known", "Other devices can't be planned yet."
        raise error("device_type", got=repr(device_type), expected=expected, remedy=remedy)
    if not isinstance(mesh, str | Mapping):
        expected, remedy = "axes and sizes, as a text or a dict", 'Write "dp=2,ep=4", say.'
        raise error("mesh", got=repr(mesh), expected=expected, remedy=remedy)
    words, named = (mesh, {}) if isinstance(mesh, str) else ("", mesh)
    sizes = dict(zip(AXES, parse_axes("plan", words, named)))
    pp = sizes["pp"]
    here: Any = MeshOfSizes({axis: n for axis, n in sizes.items() if axis != "pp"})
    devices = math.prod(axis_sizes(here)[axis] for axis in token_axes(here))
    check_divides("batch_size", batch_size, devices * micro_batches, "dp * ep * micro_batches")
    check_divides("config.num_experts", config.num_experts, sizes["ep"], "ep")
    heads = config.attention.num_kv_heads
    check_divides("config.attention.num_kv_heads", heads, sizes["tp"], "tp")
    if not 1 <= pp <= config.num_layers:
        raise error("mesh", got=f"pp={pp}", expected=f"at most num_layers={config.num_layers}")
    batch = batch_size // devices // micro_batches, seq_len
    copies = copies_per_token(config, sizes["ep"])
    rows, tokens = None, math.prod(batch)
    if sizes["ep"] > 1:
        sent, pairs = tokens * copies, tokens * config.router.top_k
        rows = Rows(math.ceil(sent), math.ceil(sent * imbalance), math.ceil(pairs * imbalance))
        if not bounded.host_sync:
            ep, bound = sizes["ep"], Bound(bounded.max_tokens or tokens, bounded.capacity)
            room = bound.room(ep, config.router.top_k, config.num_experts // ep)
            rows = Rows(ep * room.copies, ep * room.copies, room.pairs)
    job = Job(
        config, here, batch, micro_batches, dtype, compute_dtype or dtype, reduce_dtype, zero, per_layer,
        optimizer or adamw(), max_norm, logits_bytes, segments, rows, device_type == "cuda",
    )  # fmt: skip
    run = functools.cache(lambda *shape: dry_run_stage(job, *shape))
    stages, cuts = [], [round(i * config.num_layers / pp) for i in range(pp + 1)]
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        dense = max(0, min(b, config.num_dense_layers) - a)
        found = run(dense, b - a - dense, i == 0, i == pp - 1)._replace(layers=(a, b))
        # As in a 1F1B schedule. Parameters that are gathered once serve all micro-batches.
        shared = zero < 3 and here.size() > 1
        stages.append(_in_flight(found, min(micro_batches, pp - i), shared))
    return Plan(sizes, tokens * micro_batches, tuple(stages), rows, copies)


def copies_per_token(config: DecoderConfig, ep: int) -> float:
    """The devices along ``ep`` that a token goes to, its own included, if all experts are equally likely.

    >>> from fmoe.models.decoder import preset
    >>> 3.9 < copies_per_token(preset("671B"), 8) <= 4.0      # a group of experts to a device, 4 of 8 groups
    True
    """
    c, generator = config.router, torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"):
        scores = torch.rand(SAMPLED_TOKENS, config.num_experts, generator=generator)
        reached = torch.zeros(SAMPLED_TOKENS, ep, dtype=torch.bool)
    ids = topk(scores, c.num_groups, c.top_groups, c.group_best, c.top_k)
    reached.scatter_(1, ids // (config.num_experts // ep), True)
    return reached.sum().item() / SAMPLED_TOKENS


def _in_flight(stage: StagePlan, count: int, shared: bool) -> StagePlan:
    """The stage with ``count`` micro-batches between forward and backward; ``shared``: parameters' copies."""
    more = {"activations": (count - 1) * sum(stage.activations.values())}
    more["converted"] = 0 if shared else (count - 1) * stage.converted
    phases = {
        phase: {part: n + more.get(part, 0) * (phase in ("forward", "backward")) for part, n in parts.items()}
        for phase, parts in stage.phases.items()
    }
    kept = {kind: count * n for kind, n in stage.activations.items()}
    converted = stage.converted + more["converted"]
    return stage._replace(activations=kept, converted=converted, in_flight=count, phases=phases)
