"""Around the gradient of a step: micro-batches, the dtype to compute in, and numbers that aren't finite."""

import functools
import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, some
from ..models import decoder
from ..models.checks import check_mtp
from ..models.config import DecoderConfig
from ..models.stages import Stages
from ..ops.balance import MoEStats, merge_stats
from ..ops.core import engine
from ..ops.core.axes import check_mesh
from ..ops.core.dtensors import as_dtensor, is_dtensor, local, map_local
from ..ops.core.dtypes import accumulator
from ..ops.kernels.scaled import keeping_rounded
from ..ops.precision import FAST, Recipe, recipe_of
from ..parallel.boundary import dtensor_beneath, unwrapped
from ..parallel.mesh import is_pipeline
from ..parallel.placement import use, where_placed
from ..parallel.shard_map import check_captured, shard_map
from ..parallel.spec import spec_of
from ..parallel.together import from_all
from ..params import P, leaf_mask
from ..pipeline.schedule import Schedule
from ..transforms import value_and_grad
from ..tree import check_tensors, dotted_names
from . import pipelined
from .optim import global_norm, trained_by_default
from .zero import by_parts, collected, scattered

REMEDY = "Resume from the last checkpoint with a lower learning rate, a longer warm-up or other data."


def accumulate(value_and_grad_fn: Callable[..., Any], num_micro_batches: int) -> Callable[..., Any]:
    """``value_and_grad_fn`` of a batch, taken a part at a time, to hold the activations of one part only.

    ==================  =======================================================================
    value_and_grad_fn   ``(params, *batch) -> (value, grads)`` or ``((value, aux), grads)``, as
                        ``fmoe.value_and_grad`` makes it; the value is a mean over the batch
    num_micro_batches   into how many parts, as equal as can be, a batch's first dimension is cut; a plain
                        tensor of fewer rows is cut into its rows
    -> function         the same function of the whole batch, within summation order
    ==================  =======================================================================

    If ``aux`` has ``num_targets``, as that of :func:`fmoe.models.decoder.loss` has, a part weighs as much as
    it says, so that the mean is that over the whole batch. Without it, a part weighs as much as it has rows.
    Values and gradients are summed in float32 or wider, divided once, and returned in their dtype. In
    ``aux``, ``num_targets`` are summed and every :class:`fmoe.MoEStats` is merged. Other tensors are averaged
    likewise, and those of integers summed.

    Raises ``ValueError`` for fewer than one part, and for tensors of different numbers of rows.

    >>> from fmoe import value_and_grad
    >>> mean = value_and_grad(lambda w, x: (w * x).mean())
    >>> accumulate(mean, 2)(torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    (tensor(3.), tensor(3.))
    """
    if num_micro_batches < 1:
        raise argument_error(
            "accumulate", "num_micro_batches", got=num_micro_batches, expected="at least 1", remedy="Use 1."
        )
    return value_and_grad_fn if num_micro_batches == 1 else _accumulated(value_and_grad_fn, num_micro_batches)


def _accumulated(value_and_grad_fn: Callable[..., Any], num_micro_batches: int, wide: bool = False) -> Any:
    """As :func:`accumulate`; ``wide`` leaves gradients in the dtype that they were summed in."""

    @functools.wraps(value_and_grad_fn)
    def call(params: Any, *batch: torch.Tensor) -> Any:
        rows = [len(tensor) for tensor in batch]
        if len({*rows}) > 1:
            raise argument_error(
                "accumulate", "batch", got=f"tensors of {rows} rows", expected="as many in each"
            )
        values, weights = [], []
        dtypes: list[torch.dtype] = []
        total: list[torch.Tensor] = []
        for part in zip(*(_split(tensor, num_micro_batches) for tensor in batch)):
            value, grads = value_and_grad_fn(params, *part)
            values.append(value)
            weights.append(_weight(value, part[0]))
            leaves, structure = optree.tree_flatten(grads)
            if not total:
                dtypes = [leaf.dtype for leaf in leaves]
                total = [map_local(_zeros, leaf) for leaf in leaves]
            _add(total, leaves, weights[-1])
            del grads, leaves  # before the next part's are made
        whole = torch.stack(weights).sum()
        divisor = torch.where(whole == 0, 1, whole)
        for mine in total:
            local(mine).div_(divisor)
        means = total
        if not wide:
            means = [map_local(operator.methodcaller("to", dtype), t) for t, dtype in zip(total, dtypes)]
        merge = functools.partial(_merged, torch.stack(weights) / divisor)
        merged = optree.tree_map(merge, *values, is_leaf=lambda x: isinstance(x, MoEStats))
        if (count := num_targets_of(merged)) is not None:
            merged = merged[0], merged[1]._replace(num_targets=map_local(lambda _: whole, count))
        return merged, structure.unflatten(means)

    return call


def of_model(
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    micro_batches: int = 1,
    zero: int = 3,
    keep_rounded: bool = False,
    schedule: str | Schedule = "1f1b",
    stages: Stages | None = None,
    **how: Any,
) -> Callable[..., Any]:
    """The value and gradient of :func:`fmoe.models.decoder.loss` for a training step.

    =============  ========================================================================
    micro_batches  into how many parts a batch is cut, as for :func:`accumulate`
    zero           how often, on a mesh, parameters are gathered and gradients summed over devices
    keep_rounded   whether weights that kernels round for products in fp8 are rounded once a step and kept,
                   and not rounded anew for every micro-batch. That takes up to two bytes for each of their
                   numbers. On several devices it wants ``zero`` 1 or 2. On one it casts parameters once a
                   step, too, keeps the copies, and sums gradients as with ``zero=1``
    schedule       on a mesh with ``pp``: the order of stages' computations, or the ``name`` of one, as for
                   :func:`fmoe.pipeline.make_schedule`
    stages         on a mesh with ``pp``: which layers a stage has; ``None``: as
                   :func:`fmoe.models.stages.cut` makes them for the schedule
    how            what else the loss takes: ``dtype``, ``backend``, ``per_layer`` ...
    -> function    ``(params, tokens, targets, segment_ids=None, key=None)`` ->
                   ``((loss, LossStats), gradients)``
    =============  ========================================================================

    ====  ===================================================================================
    zero  as the stages of ZeRO
    ====  ===================================================================================
    3     both for every micro-batch, a layer at a time: the least memory
    2     parameters are gathered once a step and kept; gradients are summed for every micro-batch
    1     gradients of whole parameters are summed here too, in float32, and once over devices
    ====  ===================================================================================

    All three give the same gradients, within summation order, because gathering is linear. On one device
    there is nothing to choose.

    Raises ``ValueError`` for another ``zero``, for 3 where something is to be kept on several devices, for
    ``keep_rounded`` where no kernel rounds, and for what the loss refuses.

    Source: ZeRO, arXiv 1910.02054.

    >>> config, tokens = decoder.preset("debug"), torch.randint(256, (4, 16))
    >>> params = decoder.init(config, 0)
    >>> (loss, stats), grads = of_model(config, micro_batches=2)(params, tokens, tokens)
    >>> whole = decoder.loss(params, tokens, tokens, config)[0]
    >>> abs(loss - whole).item() < 1e-5
    True
    """
    check_zero("of_model", zero)
    check_mesh("of_model", mesh)
    recipe = recipe_of("of_model", how.get("precision"))
    alone = mesh is None or mesh.size() == 1
    if keep_rounded:
        keep_rounded = keeps("of_model", recipe, zero, micro_batches, alone=alone)
    if mesh is not None and is_pipeline(mesh):
        setup = pipelined.set_up("of_model", config, mesh, micro_batches, schedule, stages, how)
        return pipelined.value_and_grad_of(setup, zero, keep_rounded)
    if (zero == 3 or alone) and not keep_rounded:

        def of_batch(params: Any, tokens: Any, targets: Any, segment_ids: Any = None, key: Any = None) -> Any:
            inputs = {"tokens": tokens, "targets": targets}
            inputs = decoder.inputs_of("of_model", config, inputs, segment_ids, key, None, mesh)

            def loss(params: Any, tokens: Any, targets: Any, *others: Any) -> Any:
                given = dict(zip([*inputs][2:], others))
                return decoder.loss(params, tokens, targets, config, mesh, key=key, **given, **how)

            return accumulate(value_and_grad(loss, has_aux=True), micro_batches)(params, *inputs.values())

        return of_batch
    stage = {k: how.pop(k) for k in decoder.OF_STAGE if k in how}
    check_mtp("of_model", config, stage.get("mtp_weight", 0.0))

    def call(params: Any, tokens: Any, targets: Any, segment_ids: Any = None, key: Any = None) -> Any:
        inputs = {"tokens": tokens, "targets": targets}
        inputs = decoder.inputs_of("of_model", config, inputs, segment_ids, key, None, mesh)

        def of_whole(params: Any, x: Any, targets: Any, *others: Any) -> Any:
            given = decoder.optional(inputs, others, key)
            return decoder.stage_loss(params, x, targets, config, **given, **stage)

        # All devices have equal shares in the value.
        value_and_grads = _of_share(of_whole, 1.0 if mesh is None else 1 / mesh.size())

        def run(params: Any, *batch: torch.Tensor) -> Any:
            keeping = keeping_rounded if keep_rounded else nullcontext
            return of_placed(value_and_grads, params, batch, micro_batches, zero, keeping)

        def out_specs(where: P, have: Any) -> Any:
            return (P(), P()), have

        computing = decoder.computing_specs(decoder.specs(config))
        have = None if mesh is None else where_placed(params, computing, mesh)
        with torch.no_grad():
            out, grads = decoder.run_on(
                "of_model", run, params, inputs, config, mesh, out_specs=out_specs, **how
            )
            if mesh is None:
                return out, optree.tree_map(lambda grad, param: grad.to(param.dtype), grads, params)
            return out, collected(params, grads, have, mesh)

    return call


def keeps(function: str, recipe: Recipe, zero: int, micro_batches: int, *, alone: bool) -> bool:
    """Whether ``keep_rounded`` keeps something. Raises ``ValueError`` where nothing could be kept."""
    error = functools.partial(argument_error, function)
    if {recipe.experts, recipe.dense}.isdisjoint(FAST):
        expected, remedy = f"False without a precision of {FAST}", "Pass one, or keep nothing."
        raise error("keep_rounded", got=True, expected=expected, remedy=remedy)
    if zero == 3 and micro_batches > 1 and not alone:
        expected = "1 or 2 with keep_rounded: 3 doesn't keep weights"
        raise error("zero", got=zero, expected=expected, remedy="Use zero=1.")
    return micro_batches > 1


def check_zero(function: str, zero: int) -> None:
    if zero not in (1, 2, 3):
        raise argument_error(function, "zero", got=repr(zero), expected="1, 2 or 3")


def of_placed(
    value_and_grad_fn: Callable[..., Any],
    params: Any,
    batch: tuple[torch.Tensor, ...],
    micro_batches: int,
    zero: int,
    keeping: Callable[[list[torch.Tensor]], AbstractContextManager[Any]] = nullcontext,
) -> Any:
    """A model's value and gradients on one device, with its placed params gathered once: ``zero`` 1 or 2.

    ``value_and_grad_fn`` is of whole params and a micro-batch. The gradients are those of the pieces.
    All micro-batches are computed while ``keeping`` of the whole params is entered.
    """

    def one(whole: Any, *part: torch.Tensor) -> Any:
        out, grads = value_and_grad_fn(whole, *part)
        return out, scattered(params, grads) if zero == 2 else grads

    of_batch = _accumulated(one, micro_batches, wide=True) if micro_batches > 1 else one
    whole = by_parts(use, params)
    with keeping(optree.tree_leaves(whole)):
        out, grads = of_batch(whole, *batch)
    del whole
    return out, grads if zero == 2 else scattered(params, grads)


def _of_share(loss: Callable[..., Any], share: float) -> Callable[..., Any]:
    """The value and gradient of ``loss`` with an auxiliary output, with a cotangent of ``share``."""

    def call(params: Any, *batch: torch.Tensor) -> Any:
        leaves, structure = optree.tree_flatten(params)
        variables = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            given = [v.view_as(v) for v in variables]
            value, stats = loss(structure.unflatten(given), *batch)
        check_captured(given, [value])
        seed = torch.full_like(value, share)
        grads = engine.grad(value, variables, seed, materialize_grads=True)
        return (value.detach(), stats), structure.unflatten(grads)

    return call


def loss_of_model(
    config: DecoderConfig,
    mesh: DeviceMesh | None = None,
    *,
    micro_batches: int = 1,
    schedule: str | Schedule = "1f1b",
    stages: Stages | None = None,
    **how: Any,
) -> Callable[..., Any]:
    """:func:`fmoe.models.decoder.loss` as a function, on any mesh: with ``pp`` through the stages.

    =============  ========================================================================
    micro_batches  with ``pp``: into how many parts a batch is cut
    how            as for :func:`of_model`, as are ``schedule`` and ``stages``
    -> function    ``(params, tokens, targets, segment_ids=None, key=None)`` -> ``(loss, LossStats)``; with
                   ``pp`` it has no derivative
    =============  ========================================================================

    Raises ``ValueError`` for what the loss refuses, and for a schedule or stages that don't fit the mesh.

    >>> config, tokens = decoder.preset("debug"), torch.randint(256, (4, 16))
    >>> loss, stats = loss_of_model(config)(decoder.init(config, 0), tokens, tokens)
    >>> stats.num_targets
    tensor(64.)
    """
    if mesh is not None and is_pipeline(mesh):
        return pipelined.loss_of(
            pipelined.set_up("loss_of_model", config, mesh, micro_batches, schedule, stages, how)
        )

    def loss(params: Any, tokens: Any, targets: Any, segment_ids: Any = None, key: Any = None) -> Any:
        return decoder.loss(params, tokens, targets, config, mesh, segment_ids=segment_ids, key=key, **how)

    return loss


def computing_in(fn: Callable[..., Any], dtype: torch.dtype, *, keep: Any = None) -> Callable[..., Any]:
    """``fn`` with its params, the first argument, converted to ``dtype``.

    ``keep`` says which leaves stay as they are: a tree prefix of bools, or a function of the params that
    gives one. ``None`` keeps the selection biases of routers
    (:func:`~fmoe.training.optim.trained_by_default`).

    Its gradients have the dtype the params are kept in: float32 master weights with bfloat16 computation,
    say. Params that are in ``dtype`` already are not converted.

    >>> half = computing_in(lambda p, x: (p["w"] @ x).sum(), torch.bfloat16)
    >>> params, x = {"w": torch.ones(2, 2)}, torch.ones(2, dtype=torch.bfloat16)
    >>> half(params, x).dtype, torch.func.grad(half)(params, x)["w"].dtype
    (torch.bfloat16, torch.float32)
    """

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = optree.tree_flatten(params)
        kept = leaf_mask("computing_in", "keep", _untrained if keep is None else keep, params)
        converted = [
            leaf if stays or leaf.dtype == dtype else _converted(leaf, dtype)
            for stays, leaf in zip(kept, leaves)
        ]
        return fn(optree.tree_unflatten(structure, converted), *args, **kwargs)

    return call


def _split(tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Parts of a batch's rows, as equal as can be. Those of a DTensor stay where they are."""
    if not is_dtensor(tensor):
        return [*tensor.tensor_split(min(parts, max(1, len(tensor))))]
    pieces = local(tensor).tensor_split(parts)  # as many on devices with fewer rows
    return [as_dtensor(piece, tensor.device_mesh, tensor.placements) for piece in pieces]


def _untrained(params: Any) -> Any:
    return optree.tree_map(operator.not_, trained_by_default(params))


def num_targets_of(value: Any) -> torch.Tensor | None:
    """How many targets a loss is the mean of, if ``value`` is ``(loss, aux)`` and ``aux`` says that."""
    return getattr(value[1], "num_targets", None) if isinstance(value, tuple) and len(value) == 2 else None


def _weight(value: Any, like: torch.Tensor) -> torch.Tensor:
    count = num_targets_of(value)
    if count is not None:
        return local(count).detach()
    return torch.full((), float(len(like)), device=like.device)  # not torch.tensor, which waits for a GPU


def _zeros(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf, dtype=accumulator(leaf.dtype))


def _add(total: list[torch.Tensor], leaves: list[torch.Tensor], weight: torch.Tensor) -> None:
    """In a function of its own, which holds no leaf when it is done."""
    for mine, leaf in zip(total, leaves):
        local(mine).addcmul_(local(leaf), weight.to(mine.dtype))


def _converted(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not dtensor_beneath(leaf):
        return leaf.to(dtype)
    inner = unwrapped(leaf)
    spec = spec_of(inner)
    convert = shard_map(lambda t: t.to(dtype), inner.device_mesh, in_specs=spec, out_specs=spec)
    return convert(leaf)


def check_finite(
    step: int, loss: float, grad_norm: float, grads: Any, mesh: DeviceMesh | None = None
) -> None:
    """Raise ``FloatingPointError`` unless the loss and the gradients' norm are finite.

    The message names the step and every tensor whose gradient has no finite norm, from the last layer to
    the first, as the backward pass reached them. ``grads`` is read in that case only, so a healthy step does
    not wait for the device. With DTensors every rank calls this and raises the same; with ``pp``, give it the
    ``mesh``.

    >>> grads = {"a": torch.tensor(1.0), "b": torch.tensor(torch.nan)}
    >>> check_finite(7, 0.5, torch.nan, grads)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FloatingPointError: step 7: the loss is 0.5 and the norm of its gradient nan. Not finite ...
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise FloatingPointError(
        f"step {step}: the loss is {loss} and the norm of its gradient {grad_norm}. Not finite are the "
        f"gradients of {_not_finite(grads, mesh)}, in the order in which the backward pass met them. {REMEDY}"
    )


def check_params(step: int, params: Any, mesh: DeviceMesh | None = None) -> None:
    """Raise ``FloatingPointError`` unless all parameters are finite, as those must be that are saved.

    It waits for the device. The message names the step and the tensors. With ``pp``, give it the ``mesh``.

    >>> check_params(7, {"a": torch.tensor(1.0), "b": torch.tensor(torch.inf)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FloatingPointError: step 7: its update left parameters that are not finite: 1 of 2 tensors: b. ...
    """
    if not global_norm(params, mesh).isfinite():
        found = _not_finite(params, mesh)
        raise FloatingPointError(
            f"step {step}: its update left parameters that are not finite: {found}. {REMEDY}"
        )


def _not_finite(tree: Any, mesh: DeviceMesh | None) -> str:
    """The tensors of a tree without a finite norm, the last first, in words."""
    leaves, paths = check_tensors("check_finite", "grads", tree), optree.tree_paths(tree)
    finite = [bool(global_norm(leaf).isfinite()) for leaf in leaves]
    listed = [*zip(paths, dotted_names(tree), finite)]
    if mesh is not None and is_pipeline(mesh):  # all ranks along pp are here
        listed = sorted({leaf for of_rank in from_all(listed, mesh.get_group("pp")) for leaf in of_rank})
    bad = [name for _, name, finite in listed[::-1] if not finite]
    return f"{len(bad)} of {len(listed)} tensors: {some(bad) or 'none'}"


def _merged(shares: torch.Tensor, *parts: Any) -> Any:
    if isinstance(parts[0], MoEStats):
        return merge_stats(parts)
    together = torch.stack([local(part) for part in parts])
    if together.is_floating_point():
        wide = together.to(accumulator(together.dtype))
        merged = torch.tensordot(shares.to(wide.dtype), wide, 1).to(together.dtype)
    else:
        merged = together.sum(0)
    return map_local(lambda _: merged, parts[0])
