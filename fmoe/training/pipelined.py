"""A step of a model in stages, on a mesh with ``pp``, for :mod:`fmoe.training.gradients`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..models import decoder
from ..models.checks import check_mtp
from ..models.config import DecoderConfig
from ..models.params import ModelParams, specs
from ..models.stages import Stages, check_stages, cut
from ..ops.balance import MORE_SUMS, moe_stats
from ..ops.core.axes import Group, axis_sizes, describe, group_of
from ..ops.core.dtensors import is_dtensor
from ..ops.core.dtypes import accumulator
from ..ops.kernels.scaled import keeping_rounded
from ..parallel.collective_ops import psum_op
from ..parallel.mesh import stage_mesh
from ..parallel.placement import is_placed, token_axes, use, where_placed
from ..parallel.shard_map import check_captured
from ..parallel.together import check_alike, from_all, together
from ..params import P
from ..pipeline.run import Gradients, Line, Made, Stage, run, run_forwards, swap
from ..pipeline.schedule import Schedule, make_schedule
from .zero import by_parts, collected, parts_of, scattered

NUMBERS = len(decoder.NUMBERS)


class Setup(NamedTuple):
    """What all steps share: this rank along ``pp``, and the mesh of its stages' devices.

    ``everywhere`` are the devices that tokens or stages lie on. ``on`` goes to ``run_on``, and ``each`` to a
    stage.
    """

    function: str
    config: DecoderConfig
    rank: int
    group: Any
    mesh: DeviceMesh
    everywhere: Group
    schedule: Schedule
    stages: Stages
    on: dict[str, Any]
    each: dict[str, Any]

    @property
    def described(self) -> ModelParams:
        return self.stages.of_rank(specs(self.config), self.rank)


class Inputs(NamedTuple):
    """The names of a batch's tensors, and the key of its noise."""

    names: tuple[str, ...] = ("tokens", "targets", "segment_ids")
    key: torch.Tensor | None = None


def set_up(
    function: str,
    config: DecoderConfig,
    mesh: DeviceMesh,
    micro_batches: int,
    schedule: str | Schedule,
    stages: Stages | None,
    how: dict[str, Any],
) -> Setup:
    """Check what was asked for. All ranks call it, and raise together."""
    with together():
        check_mtp(function, config, how.get("mtp_weight", 0.0))
        schedule, stages = chosen(function, config, mesh, micro_batches, schedule, stages)
    actions = [" ".join(map(str, rank)) for rank in schedule.actions]
    check_alike(function, {"schedule": actions, "stages": [list(ends) for ends in stages.layers]})
    inner = stage_mesh(function, mesh)
    group = mesh.get_group("pp")
    from_all((), group)  # NCCL wants all of a group's ranks in its first call
    each = {name: value for name, value in how.items() if name in decoder.OF_STAGE}
    on = {name: value for name, value in how.items() if name not in decoder.OF_STAGE}
    everywhere = group_of(mesh, ("pp", *token_axes(mesh)))
    rank = mesh.get_local_rank("pp")
    return Setup(function, config, rank, group, inner, everywhere, schedule, stages, on, each)


def chosen(
    function: str,
    config: DecoderConfig,
    mesh: DeviceMesh,
    micro_batches: int,
    schedule: str | Schedule,
    stages: Stages | None,
) -> tuple[Schedule, Stages]:
    """The schedule and the stages that were asked for. Raises ``ValueError`` if they don't fit the mesh."""
    pp = axis_sizes(mesh)["pp"]
    if isinstance(schedule, str):
        schedule = make_schedule(schedule, pp=pp, micro_batches=micro_batches)
    if (len(schedule.actions), schedule.micro_batches) != (pp, micro_batches):
        got = f"one of {len(schedule.actions)} ranks and {schedule.micro_batches} micro-batches"
        expected = f"{pp} ranks, as {describe(mesh)} has, and micro_batches={micro_batches}"
        raise argument_error(function, "schedule", got=got, expected=expected)
    if stages is None:
        if (number := len(schedule.stage_to_rank)) > config.num_layers:
            expected = f"at most {config.num_layers}, one for each layer"
            remedy = "Have fewer ranks along pp, or fewer stages a rank."
            raise argument_error(
                function, "schedule", got=f"{number} stages", expected=expected, remedy=remedy
            )
        stages = cut(config, schedule.stage_to_rank)
    stages = check_stages(function, stages, config, mesh)
    if stages.ranks != schedule.stage_to_rank:
        expected, remedy = f"{schedule.stage_to_rank}, as the schedule has", "Cut the model for it."
        raise argument_error(function, "stages.ranks", got=stages.ranks, expected=expected, remedy=remedy)
    return schedule, stages


def value_and_grad_of(setup: Setup, zero: int, keep_rounded: bool) -> Callable[..., Any]:
    """The step that :func:`fmoe.training.gradients.of_model` promises, on one rank of a pipeline."""

    def call(params: Any, tokens: Any, targets: Any, segment_ids: Any = None, key: Any = None) -> Any:
        def here(inputs: Inputs, params: Any, *batch: torch.Tensor) -> Any:
            return differentiated(setup, zero, params, batch, inputs=inputs, keep_rounded=keep_rounded)

        def out_specs(where: P, have: Any) -> Any:
            return (P(), P()), have

        _check_held(setup, params)
        have = where_placed(params, decoder.computing_specs(setup.described), setup.mesh)
        out, grads = _on_mesh(setup, here, params, tokens, targets, segment_ids, key, out_specs)
        return out, collected(params, grads, have, setup.mesh)

    return call


def loss_of(setup: Setup) -> Callable[..., Any]:
    """The loss alone, by the forwards of a schedule."""

    def call(params: Any, tokens: Any, targets: Any, segment_ids: Any = None, key: Any = None) -> Any:
        def here(inputs: Inputs, params: Any, *batch: torch.Tensor) -> Any:
            parts, line = _parts(setup, batch, params, inputs)
            stages = {
                s: Stage(_forward(setup, s, setup.stages.of_stage(params, s), parts), ())
                for s in setup.schedule.stages(setup.rank)
            }
            return _known_to_all(setup, run_forwards(setup.schedule, line, stages), line.like)[0]

        def out_specs(*_: Any) -> Any:
            return P(), P()

        _check_held(setup, params)
        return _on_mesh(setup, here, params, tokens, targets, segment_ids, key, out_specs)

    return call


def _on_mesh(
    setup: Setup,
    here: Callable[..., Any],
    params: Any,
    tokens: Any,
    targets: Any,
    segment_ids: Any,
    key: Any,
    out_specs: Callable[..., Any],
) -> Any:
    function, config = setup.function, setup.config
    inputs = {"tokens": tokens, "targets": targets}
    inputs = decoder.inputs_of(function, config, inputs, segment_ids, key, None, setup.mesh)
    here = functools.partial(here, Inputs((*inputs,), key))
    for name, value in inputs.items():
        if is_dtensor(value):
            expected = "a plain tensor, this device's own sequences"
            raise argument_error(function, name, got="a DTensor", expected=expected)
    with torch.no_grad():
        return decoder.run_on(
            function, here, params, inputs, config, setup.mesh,
            out_specs=out_specs, described=setup.described, **setup.on,
        )  # fmt: skip


def _check_held(setup: Setup, params: Any) -> None:
    """Raise ``ValueError`` unless params are those of this rank's stages."""
    mine, theirs = map(_held, (setup.described, params))
    if mine != theirs:
        got = f"a tree that has {theirs}"
        expected = f"{mine} on rank {setup.rank} along pp"
        remedy = "Give decoder.init the stages of the schedule, as fmoe.models.stages.cut makes them."
        raise argument_error(setup.function, "params", got=got, expected=expected, remedy=remedy)


def _held(tree: ModelParams) -> str:
    layers, mtp = ([f"{name}.{i}" for i in range(len(getattr(tree, name)))] for name in ("layers", "mtp"))
    names = ["embedding", *layers, "norm", "head", *mtp]
    return ", ".join(name for name, part in zip(names, parts_of(tree)) if part != ()) or "nothing"


# ---- on one device, inside shard_map ---------------------------------------------------------------


def _parts(setup: Setup, batch: Any, params: Any, inputs: Inputs) -> tuple[list[Any], Line]:
    """The micro-batches, with arguments by name in the end, and what stages send for each."""
    cut = zip(*(tensor.tensor_split(setup.schedule.micro_batches) for tensor in batch))
    parts = [(*part[:2], decoder.optional(inputs.names, part[2:], inputs.key)) for part in cut]
    shapes = [torch.Size([*part[0].shape, setup.config.dim]) for part in parts]
    dtype = decoder.computing_dtype(params, setup.on.get("dtype"))
    return parts, Line(setup.rank, setup.group, shapes, batch[0].new_empty(0, dtype=dtype))


def _forward(setup: Setup, stage: int, params: ModelParams, parts: list[Any]) -> Any:
    last = stage == len(setup.stages.ranks) - 1

    leaves, structure = optree.tree_flatten(params)

    def forward(m: int, received: torch.Tensor | None) -> Made:
        tokens, targets, optional = parts[m]
        given = [leaf.view_as(leaf) for leaf in leaves]
        x = tokens if received is None else received.view_as(received)
        made = decoder.stage_sums(
            structure.unflatten(given), x, targets, setup.config, tokens=tokens, **optional, **setup.each
        )
        out, value = None if last else made.x, made.total + made.balance + made.mtp
        check_captured([x, *given], [value] if out is None else [out, value])
        numbers = [number.detach().double() for number in made.numbers]
        counted = [found.detach() for found in (*made.layers, *made.mtp_layers)]
        sums = torch.cat([torch.stack(numbers), *counted])
        return Made(out, value, sums)

    return forward


def differentiated(
    setup: Setup,
    zero: int,
    params: Any,
    batch: Any,
    by: Any = None,
    inputs: Inputs = Inputs(),  # noqa: B008
    keep_rounded: bool = False,
) -> Any:
    """``(loss, LossStats)``, and the gradients of this rank's pieces. ``by`` takes the place of ``run``."""
    whole = params if zero == 3 else by_parts(use, params)
    leaves, structure = optree.tree_flatten(whole)
    variables = [leaf.detach().requires_grad_() for leaf in leaves]
    tree, numbers = structure.unflatten(variables), structure.unflatten(range(len(leaves)))
    del whole, leaves
    parts, line = _parts(setup, batch, params, inputs)
    stages = {}
    for s in setup.schedule.stages(setup.rank):
        uses = optree.tree_leaves(setup.stages.of_stage(numbers, s))
        forward = _forward(setup, s, setup.stages.of_stage(tree, s), parts)
        stages[s] = Stage(forward, uses)
        if zero == 2:
            stages[s] = Stage(
                forward, uses, _summed_over_devices(setup.stages.of_stage(params, s), variables, uses)
            )
    # Along tp all devices have the same value, and an equal share in it.
    share = 1 / axis_sizes(setup.mesh).get("tp", 1)
    with keeping_rounded(variables if keep_rounded else ()):
        ran = (by or run)(setup.schedule, line, stages, variables, seed=share)
    out, divisor = _known_to_all(setup, ran.sums, line.like)
    found = [
        torch.zeros_like(variable) if gradient is None else gradient.div_(divisor)
        for gradient, variable in zip(ran.gradients, variables)
    ]
    grads = optree.tree_structure(params, is_leaf=is_placed).unflatten(found)
    if zero == 1:
        grads = scattered(params, grads)
    return out, _with_tied(setup, grads)


def _summed_over_devices(params: Any, variables: Any, uses: Any) -> Callable[[Gradients], Gradients]:
    """For ``zero=2``: gradients of whole parameters as those of this device's pieces."""
    structure = optree.tree_structure(params, is_leaf=is_placed)

    def reduce(found: Gradients) -> Gradients:
        each = [torch.zeros_like(variables[i]) if g is None else g for i, g in zip(uses, found)]
        return optree.tree_leaves(scattered(params, structure.unflatten(each)))

    return reduce


def _known_to_all(setup: Setup, sums: dict[int, torch.Tensor], like: torch.Tensor) -> Any:
    """``(loss, LossStats)`` on every rank, and the number that summed gradients are divided by."""
    c, width = setup.config, setup.config.num_experts + MORE_SUMS
    dense, sparse = c.num_dense_layers, c.num_layers - c.num_dense_layers
    further = c.mtp_layers if setup.each.get("mtp_weight") else 0
    table = like.new_zeros(NUMBERS + (sparse + further) * width, dtype=torch.float64)
    for stage, found in sums.items():
        table[:NUMBERS] += found[:NUMBERS]
        start = NUMBERS + max(0, setup.stages.layers[stage][0] - dense) * width
        table[start : start + len(found) - NUMBERS] = found[NUMBERS:]
    table = psum_op.raw(table, setup.everywhere.name)
    stats = tuple(moe_stats(row) for row in table[NUMBERS:].split(width))
    numbers = table[:NUMBERS].split(1)
    out = decoder.loss_of_sums(accumulator(like.dtype), numbers, stats[:sparse], stats[sparse:])
    return out, out[1].num_targets.clamp_min(1)


def _with_tied(setup: Setup, grads: ModelParams) -> ModelParams:
    """The ranks of the first and the last stage may both hold the embedding, and get the same gradient."""
    first, last = setup.stages.ranks[0], setup.stages.ranks[-1]
    on_both = setup.config.tied_head or setup.config.mtp_layers
    if not on_both or first == last or setup.rank not in (first, last):
        return grads
    mine = grads.embedding.contiguous()
    theirs = swap(mine, last if setup.rank == first else first, setup.group.group_name)
    return grads._replace(embedding=mine + theirs)
