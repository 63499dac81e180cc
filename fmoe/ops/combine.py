"""Sum expert outputs per row, and send rows back to where their tokens came from."""

from typing import Any

import torch

from . import kernels
from .bases import gather, gather_kernel, random, scatter_add, scatter_add_kernel
from .core.derive import Tensors, pullback
from .core.dtypes import accumulator
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .dispatch import Plan, check_rows, plan_example, rows_of_slots
from .transport import InFlight

COMBINE = checkpoint("combine", save=True)
REDUCE = checkpoint("reduce", save=False)


def combine(y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Rows back to the devices their tokens came from, summed: the transpose of :func:`dispatch`.

    =========  ==========  ===================================================================
    y_SD       (S, D)      one output per dispatched row
    plan                   the plan of that dispatch
    -> y_TD    (T, D)      where nothing moved it is ``y_SD``
    =========  ==========  ===================================================================

    Raises ``ValueError`` if ``y_SD`` hasn't one row per dispatched row.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> torch.equal(fmoe.combine(x_SD, plan), x)  # with one device nothing moves
    True
    """
    check_rows("combine", "y_SD", y_SD, plan)
    return y_SD if plan.transport is None else plan.transport.combine(y_SD, plan)


def combine_start(y_SD: torch.Tensor, plan: Plan) -> InFlight:
    """Begin to :func:`fmoe.combine`, and go on with what doesn't need the result; :func:`join` gets it.

    Takes what :func:`fmoe.combine` takes, and raises what it raises.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> coming = combine_start(x_SD, plan)
    >>> meanwhile = torch.ones(3, 4)  # the shared experts, say
    >>> torch.equal(join(coming, plan, meanwhile), x + 1)
    True
    """
    check_rows("combine_start", "y_SD", y_SD, plan)
    overlapping = getattr(plan.transport, "combine_start", None)
    return InFlight(combine(y_SD, plan)) if overlapping is None else overlapping(y_SD, plan)


def join(coming: InFlight, plan: Plan, plus: torch.Tensor | None = None) -> torch.Tensor:
    """Wait for what :func:`combine_start` began, and add ``plus`` (T, D) to it, as shared experts' outputs.

    ``join(combine_start(y_SD, plan), plan)`` is ``combine(y_SD, plan)``; the result is (T, D) in its dtype.

    Raises ``RuntimeError`` where ``plus`` has a shape that can't be added.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> torch.equal(join(combine_start(x_SD, plan), plan), fmoe.combine(x_SD, plan))
    True
    """
    overlapping = getattr(plan.transport, "join", None)
    if overlapping is not None:  # PyTorch 2.11 can't compile the truth of a method
        return overlapping(coming, plan, plus)
    return coming.y_TD if plus is None else coming.y_TD + plus


def reduce(y_RD: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Weigh expert outputs and sum those of each row: the other half of :func:`expand`.

    =========  ==========  ===================================================================
    y_RD       (R, D)      one output per expanded row, grouped by expert
    plan                   the plan the rows were expanded by
    -> y_SD    (S, D)      zeros where no expert of a row is held here
    =========  ==========  ===================================================================

    Sums are held in float32. Rows past the last offset may hold anything, NaN included.

    Raises ``ValueError`` if ``y_RD`` hasn't one row per expanded row.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> torch.allclose(fmoe.reduce(fmoe.expand(x_SD, plan), plan), x, rtol=1e-4)  # weights sum to one
    True
    """
    check_rows("reduce", "y_RD", y_RD, plan, expanded=True)
    weights = torch.ones_like(plan.weights_SK) if plan.score_before_experts else plan.weights_SK
    return weighted_sum(y_RD, weights, plan.slot_R, plan.row_SK)


# ---- the operator and its backward -------------------------------------------------------------


def _reference(y: torch.Tensor, weights: torch.Tensor, slot: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    wide = accumulator(y.dtype)
    weights_R1 = gather(weights.flatten(), slot)[:, None].to(wide)
    token = rows_of_slots(slot, weights.shape[1])
    return scatter_add(y.to(wide) * weights_R1, token, weights.shape[0]).to(y.dtype)


def weighted_sum_kernel(
    y_RD: torch.Tensor, weights_SK: torch.Tensor | None, slot_R: torch.Tensor, row_SK: torch.Tensor
) -> torch.Tensor:
    """``None`` for weights of one."""
    if kernels.fused(y_RD, y_RD if weights_SK is None else weights_SK):
        from .kernels import rows

        return rows.weighted_sum(y_RD, row_SK, weights_SK)
    wide = accumulator(y_RD.dtype)
    if not y_RD.is_cuda:
        scaled = y_RD.to(wide)
        if weights_SK is not None:
            scaled = scaled * gather_kernel(weights_SK.flatten(), slot_R)[:, None]
        token = rows_of_slots(slot_R, row_SK.shape[1])
        return scatter_add_kernel(scaled, token, row_SK.shape[0]).to(y_RD.dtype)
    # Gathering K times is deterministic; adding rows in place on CUDA is not.
    out = y_RD.new_zeros(row_SK.shape[0], y_RD.shape[1], dtype=wide)
    for k in range(row_SK.shape[1]):
        found = gather_kernel(y_RD, row_SK[:, k]).to(wide)
        out += found if weights_SK is None else found * weights_SK[:, k, None]
    return out.to(y_RD.dtype)


def weight_gradients_kernel(g: Any, y: Any, weights: Any, slot: Any, row: Any) -> torch.Tensor:
    """The cotangent of the weights of :data:`weighted_sum`."""
    if kernels.fused(y, weights):
        from .kernels import rows

        return rows.weight_gradients(g, y, slot, weights)
    g_RD = gather_kernel(g, rows_of_slots(slot, weights.shape[1])).to(accumulator(y.dtype))
    g_weights_R = (g_RD * y).sum(1)
    return gather_kernel(g_weights_R, row.flatten()).view(weights.shape).to(weights.dtype)


def _backward_kernel(g: Any, y: Any, weights: Any, slot: Any, row: Any) -> Tensors:
    if kernels.fused(y, weights):
        from .kernels import rows

        return rows.spread(g, y, slot, weights)
    g_RD = gather_kernel(g, rows_of_slots(slot, weights.shape[1])).to(accumulator(y.dtype))
    g_y = (g_RD * gather_kernel(weights.flatten(), slot)[:, None]).to(y.dtype)
    return g_y, weight_gradients_kernel(g, y, weights, slot, row)


weighted_sum_backward: Operator = declare(
    "weighted_sum_backward(Tensor g, Tensor y, Tensor weights, Tensor slot, Tensor row) -> (Tensor, Tensor)",
    impl=_backward_kernel,
    fake=lambda g, y, weights, slot, row: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
    checkpoint=REDUCE,
    example=lambda: (random(4, 3), random(8, 3), *plan_example()[:3]),
    reference=pullback(_reference),
)

# y (R, D), weights (S, K) -> (S, D): each row's outputs, weighted and summed.
weighted_sum: Operator = declare(
    "weighted_sum(Tensor y, Tensor weights, Tensor slot, Tensor row) -> Tensor",
    impl=weighted_sum_kernel,
    fake=lambda y, weights, slot, row: y.new_empty(weights.shape[0], y.shape[1]),
    checkpoint=REDUCE,
    example=lambda: (random(8, 3), *plan_example()[:3]),
    vjp=lambda inputs, needs, g: weighted_sum_backward(g, *inputs),
    reference=_reference,
)
