"""The experts: SwiGLU of every held expert, weighted and summed per row, as one operator."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..errors import argument_error
from .bases import (
    accumulator,
    gather,
    gather_kernel,
    grouped_mm,
    grouped_mm_kernel,
    grouped_outer_kernel,
    random,
    scatter_add,
)
from .combine import weighted_sum_kernel
from .derive import Tensors, pullback
from .dispatch import Plan, check_rows, plan_example, rows_of_slots
from .primitive import Operator, declare
from .tape import checkpoint

EXPERTS = checkpoint("experts_grouped_mm", save=False)


class ExpertParams(NamedTuple):
    """``w_in`` (E, 2, F, D), gate then up; ``w_out`` (E, D, F)."""

    w_in: torch.Tensor
    w_out: torch.Tensor


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of a pre-activation (..., 2, F)."""
    return F.silu(h[..., 0, :]) * h[..., 1, :]


def experts_grouped_mm(expert_params: ExpertParams, x_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Run every held expert on the rows sent to it; weigh and sum the outputs of each row.

    =============  ==========  ================================================================
    expert_params              ``w_in`` (E, 2, F, D), ``w_out`` (E, D, F), dtype of ``x_SD``
    x_SD           (S, D)      rows from :func:`dispatch`; bfloat16, float16, float32 or float64
    plan                       their plan
    -> y_SD        (S, D)      zeros where no expert of a row is held here
    =============  ==========  ================================================================

    Between forward and backward it keeps ``x_SD``, the pre-activation (R, 2, F) and the plan, never
    the gathered rows nor the unsummed outputs. Sums over experts accumulate in float32.

    Raises ``ValueError`` for shapes and dtypes that don't fit.

    Source: grouped GEMM as in MegaBlocks (arXiv 2211.15841); what is kept as in SonicMoE
    (arXiv 2512.14080).

    >>> import fmoe, torch
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=2)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(
    ...     params.router, x, fmoe.RouterConfig(top_k=1, num_groups=1, top_groups=1)))
    >>> fmoe.combine(fmoe.experts_grouped_mm(params.experts, x_SD, plan), plan).shape
    torch.Size([3, 4])
    """
    check_experts(expert_params, x_SD, plan)
    weights = plan.weights_SK, plan.slot_R, plan.row_SK, plan.offsets_e
    return experts(x_SD, *expert_params, *weights, plan.score_before_experts)


def check_experts(params: ExpertParams, x_SD: torch.Tensor, plan: Plan) -> None:
    def error(argument: str, got: Any, expected: str, remedy: str) -> ValueError:
        return argument_error("experts_grouped_mm", argument, got=got, expected=expected, remedy=remedy)

    check_rows("experts_grouped_mm", "x_SD", x_SD, plan.weights_SK.shape[0])
    num_experts, dim, hidden = plan.offsets_e.shape[0], x_SD.shape[-1], params.w_in.shape[-2]
    for name, weight, shape in (
        ("w_in", params.w_in, (num_experts, 2, hidden, dim)),
        ("w_out", params.w_out, (num_experts, dim, hidden)),
    ):
        if tuple(weight.shape) != shape:
            raise error(
                f"expert_params.{name}",
                f"shape {tuple(weight.shape)}",
                f"{shape} for x_SD {tuple(x_SD.shape)} and a plan of {num_experts} experts",
                "Pass the experts that the router was made for.",
            )
        if weight.dtype != x_SD.dtype or weight.device != x_SD.device:
            raise error(
                f"expert_params.{name}",
                f"{weight.dtype} on {weight.device}",
                f"{x_SD.dtype} on {x_SD.device}, as x_SD",
                "Convert one of the two with .to().",
            )


# ---- the operator and its backward -------------------------------------------------------------


def _reference(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    weights: torch.Tensor,
    slot: torch.Tensor,
    row: torch.Tensor,
    offsets: torch.Tensor,
    score_before: bool,
) -> Tensors:
    wide = accumulator(x.dtype)
    token = rows_of_slots(slot, weights.shape[1])
    weights_R1 = gather(weights.reshape(-1), slot)[:, None].to(wide)
    x_RD = gather(x, token)
    if score_before:
        x_RD = (x_RD * weights_R1).to(x.dtype)
    h = grouped_mm(x_RD, w_in.flatten(1, 2).mT, offsets).unflatten(1, (2, -1))
    y_RD = grouped_mm(swiglu(h), w_out.mT, offsets).to(wide)
    if not score_before:
        y_RD = y_RD * weights_R1
    return scatter_add(y_RD, token, x.shape[0]).to(x.dtype), h


def _forward_kernel(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    weights: torch.Tensor,
    slot: torch.Tensor,
    row: torch.Tensor,
    offsets: torch.Tensor,
    score_before: bool,
) -> Tensors:
    x_RD = gather_kernel(x, rows_of_slots(slot, weights.shape[1]))
    if score_before:
        x_RD *= gather_kernel(weights.reshape(-1), slot)[:, None]
    h = grouped_mm_kernel(x_RD, w_in.flatten(1, 2).mT, offsets).unflatten(1, (2, -1))
    y_RD = grouped_mm_kernel(swiglu(h), w_out.mT, offsets)
    return weighted_sum_kernel(y_RD, torch.ones_like(weights) if score_before else weights, slot, row), h


def _backward_kernel(
    g: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    weights: torch.Tensor,
    slot: torch.Tensor,
    row: torch.Tensor,
    offsets: torch.Tensor,
    score_before: bool,
    h: torch.Tensor,
) -> Tensors:
    wide = accumulator(x.dtype)
    token = rows_of_slots(slot, weights.shape[1])
    weights_R1 = gather_kernel(weights.reshape(-1), slot)[:, None]
    x_RD, g_RD = gather_kernel(x, token), gather_kernel(g, token)
    scaled_RD = (x_RD * weights_R1).to(x.dtype) if score_before else x_RD

    gate, up = h[:, 0].to(wide), h[:, 1].to(wide)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    act = silu * up
    g_act = grouped_mm_kernel(g_RD, w_out, offsets).to(wide)
    if not score_before:
        g_weights_R = (g_act * act).sum(1)
        g_act *= weights_R1
        act *= weights_R1
    g_w_out = grouped_outer_kernel(g_RD, act.to(x.dtype), offsets)
    g_h = torch.empty_like(h)
    g_h[:, 0] = g_act * up * (sigmoid + silu * (1 - sigmoid))
    g_h[:, 1] = g_act * silu
    g_h = g_h.flatten(1)
    g_w_in = grouped_outer_kernel(g_h, scaled_RD, offsets).unflatten(1, (2, -1))
    g_x_RD = grouped_mm_kernel(g_h, w_in.flatten(1, 2), offsets)
    if score_before:
        g_weights_R = (g_x_RD.to(wide) * x_RD).sum(1)
    scale = weights if score_before else torch.ones_like(weights)
    g_x = weighted_sum_kernel(g_x_RD, scale, slot, row)
    g_weights = gather_kernel(g_weights_R, row.reshape(-1)).view(weights.shape)
    return g_x, g_w_in, g_w_out, g_weights.to(weights.dtype)


def _forward_fake(x: Any, w_in: Any, w_out: Any, weights: Any, slot: Any, *rest: Any) -> Tensors:
    return torch.empty_like(x), x.new_empty(slot.shape[0], 2, w_in.shape[2])


def _example() -> tuple[Any, ...]:
    return random(4, 3), random(3, 2, 2, 3), random(3, 3, 2), *plan_example(), False


experts_backward: Operator = declare(
    "experts_backward(Tensor g, Tensor x, Tensor w_in, Tensor w_out, Tensor weights, Tensor slot, "
    "Tensor row, Tensor offsets, bool score_before, Tensor h) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_backward_kernel,
    fake=lambda g, x, w_in, w_out, weights, *rest: tuple(
        t.new_empty(t.shape) for t in (x, w_in, w_out, weights)
    ),
    checkpoint=EXPERTS,
    example=lambda: (random(4, 3), *_example()),
    dependent=lambda g, *inputs: experts.outputs(*inputs)[1:],
    reference=pullback(_reference),
)

experts: Operator = declare(
    "experts(Tensor x, Tensor w_in, Tensor w_out, Tensor weights, Tensor slot, Tensor row, "
    "Tensor offsets, bool score_before) -> (Tensor, Tensor)",
    impl=_forward_kernel,
    fake=_forward_fake,
    checkpoint=EXPERTS,
    example=_example,
    residual_outputs=1,
    residuals=lambda inputs, outputs: (*inputs, outputs[1]),
    vjp=lambda res, needs, g: (*experts_backward(g, *res), None, None, None, None),
    reference=_reference,
)
