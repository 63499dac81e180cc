"""Plans of training: memory by part on each device, and what devices send each other.

A step of the library's own code runs on fake tensors of one device's sizes, so a plan follows the code. It
needs no GPU, no process group and no memory. With ``pp`` a rank's actions of the schedule are replayed.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..errors import argument_error
from ..models.config import DecoderConfig, without_noise
from ..models.counts import flops_per_token
from ..models.stages import Stages
from ..ops.core.axes import MeshOfSizes, axis_sizes, group_of
from ..ops.cross_entropy import LOGITS_BYTES
from ..ops.precision import FAST, Recipe, recipe_of
from ..ops.route import topk
from ..parallel.backends import Backend, backend_of
from ..parallel.backends.bounds import Bound
from ..parallel.mesh import AXES, parse_axes
from ..parallel.placement import token_axes
from ..pipeline.schedule import Schedule
from ..training.gradients import check_zero, keeps
from ..training.optim import Optimizer, adamw
from ..training.pipelined import chosen
from .dry_run import Rows
from .rank import Job, RankPlan, check_divides, plan_alone
from .rates import Rates
from .replay import plan_in_stages
from .time import Time, planned
from .work import IN_FP8

SAMPLED_TOKENS = 8192


class Plan(NamedTuple):
    """A plan, with a :class:`RankPlan` for each rank along ``pp``.

    ``rows`` are those of a dispatch, or ``None`` along ``ep=1``. ``schedule`` is ``None`` without a pipeline,
    and ``time`` is without rates.
    ``peak`` is the most bytes on any device.

    >>> from fmoe.models.decoder import preset
    >>> found = plan(preset("debug"), "pp=2", batch_size=2, seq_len=16, schedule="zbv", device_type="cpu")
    >>> [rank.layers for rank in found.ranks], found.peak == max(rank.peak for rank in found.ranks)
    ([((0, 1), (3, 4)), ((1, 2), (2, 3))], True)
    """

    mesh: dict[str, int]
    tokens_per_device: int
    ranks: tuple[RankPlan, ...]
    rows: Rows | None
    copies_per_token: float
    schedule: Schedule | None = None
    time: Time | None = None

    @property
    def peak(self) -> int:
        return max(rank.peak for rank in self.ranks)


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
    schedule: str | Schedule = "1f1b",
    stages: Stages | None = None,
    per_layer: Callable[..., Any] = lambda layer: layer,
    optimizer: Optimizer | None = None,
    max_norm: float | None = 1.0,
    imbalance: float = 1.0,
    backend: str | Backend = "all_to_all",
    logits_bytes: int = LOGITS_BYTES,
    segments: bool = False,
    device_type: str = "cuda",
    rates: Rates | None = None,
    compiled: bool = False,
    precision: str | Recipe | None = None,
    keep_rounded: bool = False,
) -> Plan:
    """Plan the memory, the traffic and the time of a training step on each device, without using any.

    =============  =======================================================================
    mesh           axes and sizes, as ``"dp=2,ep=4"`` or a dict
    batch_size     sequences per step, over all devices, of ``seq_len`` tokens each
    micro_batches  the parts in which a step's batch is computed
    dtype          of parameters; ``compute_dtype`` is that of the arithmetic, ``None`` for the same
    reduce_dtype   what gradients are summed in over devices, as for ``decoder.loss``
    zero           1, 2 or 3, as for :func:`fmoe.training.gradients.of_model`, as are ``schedule`` and
                   ``stages`` with ``pp``
    per_layer      as for ``decoder.loss``, such as ``fmoe.remat``. Leave ``torch.compile`` out; it can
                   keep less than is planned
    optimizer      its ``init`` and ``update`` run, too; ``None``: ``adamw()``
    max_norm       gradients are clipped to it; ``None``: they aren't
    imbalance      how many times its fair share of rows the busiest device along ``ep`` gets
    backend        as for ``decoder.loss``; without ``host_sync`` rows are those that there is room for
    segments       whether the loss gets ``segment_ids``
    device_type    ``"cuda"``: with its allocator's rounding, and what kernels hold while they run;
                   ``"cpu"``: tensors only
    rates          those of the devices and their links, as :func:`read_rates` gives them; ``None``: no time
    compiled       for the time: whether each layer is compiled, so that neighbouring elementwise operators
                   run as one
    precision      of products, as for ``decoder.loss``; but only those that kernels compute
    keep_rounded   as for :func:`fmoe.training.gradients.of_model`; on a CPU nothing is kept
    -> Plan
    =============  =======================================================================

    A kernel takes as long as its products at their rate, and the bytes that it reads and writes at the
    memory's. Kernels run one after another. Tokens and sums are exposed in full: nobody computes meanwhile.
    Parameters that ``stack`` gathers and sums ahead are exposed where they take longer than what is computed
    meanwhile. The host is left out: it is taken to be ahead of its device. The noise of routers is left
    out, too. Modules of multi-token prediction are planned with their loss.

    Raises ``ValueError`` for sizes below 1, for a ``seq_len`` above ``config.max_seq_len``, for sizes that
    the mesh doesn't divide, for another ``zero``, for a schedule or stages that don't fit the mesh, for other
    devices, for a precision without kernels, and for ``keep_rounded`` where ``of_model`` refuses it.

    >>> from fmoe.models.decoder import num_params, preset
    >>> found = plan(preset("debug"), batch_size=4, seq_len=64, device_type="cpu")
    >>> found.ranks[0].parameters == 4 * num_params(preset("debug"))[0]
    True
    """
    error = functools.partial(argument_error, "plan")
    config = without_noise(config)
    for name, number in (("batch_size", batch_size), ("seq_len", seq_len), ("micro_batches", micro_batches)):
        if not isinstance(number, int) or number < 1:
            raise error(name, got=number, expected="an integer of at least 1")
    if seq_len > config.max_seq_len:
        most, remedy = config.max_seq_len, "Shorten the sequences, or raise max_seq_len."
        raise error("seq_len", got=seq_len, expected=f"at most max_seq_len={most}", remedy=remedy)
    check_zero("plan", zero)
    recipe = recipe_of("plan", precision)
    slow = sorted({*filter(None, (recipe.experts, recipe.dense))} - {*FAST})
    if slow and (rates or device_type == "cuda"):
        got, expected = ", ".join(map(repr, slow)), f"one of {FAST}, or None, which kernels compute"
        raise error("precision", got=got, expected=expected)
    if rates:
        _check_rates(rates, compute_dtype or dtype, recipe)
    bounded = backend_of("plan", backend)
    if bounded.in_halves:
        expected = "a backend without in_halves, which changes what a layer holds, and its time"
        raise error("backend", got="in_halves", expected=expected, remedy="Plan it without.")
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
    if keep_rounded:
        alone = math.prod(sizes.values()) == 1
        keep_rounded = keeps("plan", recipe, zero, micro_batches, alone=alone)
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
        optimizer or adamw(), max_norm, logits_bytes, segments, rows, device_type == "cuda", rates, compiled,
        recipe, bounded.payload, keep_rounded,
    )  # fmt: skip
    _check_links(rates, sizes)
    whole: Any = MeshOfSizes(sizes)
    made: Schedule | None = None
    if pp == 1:
        ranks: tuple[RankPlan, ...] = (plan_alone(job),)
        seconds, waits = ranks[0].busy, 0.0
    else:
        made, cuts = chosen("plan", config, whole, micro_batches, schedule, stages)
        ranks, seconds, waits = plan_in_stages(job, made, cuts, group_of(whole, ("pp", *token_axes(here))))
    time = None
    if rates:
        tokens_each, flops = batch_size * seq_len / whole.size(), flops_per_token(config, seq_len)
        time = planned(ranks, seconds, waits, tokens_each, flops, rates.peak_flops)
    return Plan(sizes, tokens * micro_batches, ranks, rows, copies, made, time)


def _check_links(rates: Rates | None, sizes: Mapping[str, int]) -> None:
    if rates and (without := [axis for axis, size in sizes.items() if size > 1 and axis not in rates.links]):
        got, expected = f"no link along {', '.join(without)}", "one for each axis of the mesh"
        remedy = "Add it to the file of rates, measured or assumed."
        raise argument_error("plan", "rates.links", got=got, expected=expected, remedy=remedy)


def _check_rates(rates: Rates, dtype: torch.dtype, recipe: Recipe) -> None:
    if rates.dtype != str(dtype).removeprefix("torch."):
        expected, remedy = f"those of {dtype}, which it computes in", "Measure them with --dtype."
        raise argument_error("plan", "rates", got=f"rates of {rates.dtype}", expected=expected, remedy=remedy)
    wanted = {IN_FP8["experts"]} if recipe.experts else set()
    wanted |= {IN_FP8["products"]} if recipe.dense else set()
    if without := sorted(wanted - {*rates.flops}):
        expected, remedy = "those of products in fp8", "Measure the file again with bench rates."
        got = f"no {' and no '.join(without)}"
        raise argument_error("plan", "rates.flops", got=got, expected=expected, remedy=remedy)


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
    ids = topk(
        scores, scores.new_zeros(config.num_experts), c.num_groups, c.top_groups, c.group_best, c.top_k
    )
    reached.scatter_(1, ids // (config.num_experts // ep), True)
    return reached.sum().item() / SAMPLED_TOKENS
