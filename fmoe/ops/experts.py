"""The experts: SwiGLU of every held expert, weighted and summed per row, as two operators.

``experts_up`` gives the pre-activation and ``experts_down`` the output. With two operators, the
pre-activation is freed as soon as its own cotangent is known.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange

from ..errors import argument_error, check_kind, is_pair
from . import experts_kernels as raw
from .bases import gather, mm_in, random, scatter_add
from .core.derive import Tensors, pullback
from .core.dtypes import accumulator, product_dtype
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .dispatch import Plan, check_rows, plan_example
from .experts_kernels import Layout, layout_of, swiglu
from .precision import PRECISIONS, check_precision

EXPERTS = checkpoint("experts_grouped_mm", save=False)


class ExpertParams(NamedTuple):
    """The weights of experts, or without E of one SwiGLU that every token goes through.

    =====  ============  ========================================
    w_in   (E, 2, F, D)  gate, then up; any floating dtype
    w_out  (E, D, F)     the same dtype
    =====  ============  ========================================

    >>> import fmoe
    >>> experts = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4).experts
    >>> experts.w_in.shape, experts.w_out.shape
    (torch.Size([4, 2, 16, 8]), torch.Size([4, 8, 16]))
    """

    w_in: torch.Tensor
    w_out: torch.Tensor


def experts_grouped_mm(
    expert_params: ExpertParams, x_SD: torch.Tensor, plan: Plan, *, precision: str | None = None
) -> torch.Tensor:
    """Run every held expert on the rows sent to it; weigh and sum the outputs of each row.

    =============  ==========  ================================================================
    expert_params              ``w_in`` (E, 2, F, D), ``w_out`` (E, D, F), dtype of ``x_SD``
    x_SD           (S, D)      rows from :func:`dispatch`; bfloat16, float16, float32 or float64
    plan                       their plan
    precision                  of products, forward and backward, as in :class:`fmoe.ops.precision.Recipe`
    -> y_SD        (S, D)      zeros where no expert of a row is held here; dtype of ``x_SD``
    =============  ==========  ================================================================

    Between forward and backward it keeps ``x_SD``, the pre-activation (R, 2, F) and the plan, never
    the gathered rows nor the unsummed outputs. Sums over experts accumulate in float32. Under
    ``torch.autocast`` it takes rows and weights in autocast's dtype, as ``F.linear`` does.

    Raises ``ValueError`` for shapes and dtypes that don't fit, and for an unknown precision.

    Source: grouped GEMM as in MegaBlocks (arXiv 2211.15841); what is kept as in SonicMoE
    (arXiv 2512.14080).

    >>> import fmoe, torch
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=2)
    >>> x_SD, plan = fmoe.dispatch(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> fmoe.combine(fmoe.experts_grouped_mm(params.experts, x_SD, plan), plan).shape
    torch.Size([3, 4])
    """
    check_precision("experts_grouped_mm", "precision", precision)
    check_rows("experts_grouped_mm", "x_SD", x_SD, plan)
    if not is_pair(expert_params):
        check_kind("experts_grouped_mm", "expert_params", expert_params, ExpertParams, "Pass params.experts.")
    expert_params = ExpertParams(*(weight.to(product_dtype(weight)) for weight in expert_params))
    dtype, x_SD = x_SD.dtype, x_SD.to(product_dtype(x_SD))
    check_experts(expert_params, x_SD, plan)
    rows = layout_of(plan, precision)
    h, act = experts_up.outputs(x_SD, expert_params.w_in, *rows)
    return experts_down(h, expert_params.w_out, *rows, act).to(dtype)


def check_experts(params: ExpertParams, x_SD: torch.Tensor, plan: Plan) -> None:
    num_experts, dim, hidden = plan.offsets_e.shape[0], x_SD.shape[-1], params.w_in.shape[-2]
    shapes = (num_experts, 2, hidden, dim), (num_experts, dim, hidden)
    for name, weight, shape in zip(params._fields, params, shapes):
        argument = f"expert_params.{name}"
        if tuple(weight.shape) != shape:
            got = f"shape {tuple(weight.shape)}"
            expected = f"{shape} for x_SD {tuple(x_SD.shape)} and a plan of {num_experts} experts"
            remedy = "Pass the experts that the router was made for. On a mesh, use fmoe.shard_params."
            raise argument_error("experts_grouped_mm", argument, got=got, expected=expected, remedy=remedy)
        if weight.dtype != x_SD.dtype or weight.device != x_SD.device:
            got = f"{weight.dtype} on {weight.device}"
            expected = f"{x_SD.dtype} on {x_SD.device}, as x_SD"
            remedy = "Convert one of the two with .to()."
            raise argument_error("experts_grouped_mm", argument, got=got, expected=expected, remedy=remedy)


# ---- the operators: what follows the weight is a Layout ------------------------------------------------


def _up_reference(x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    x_RD = gather(x, rows.source_R)
    if rows.score_before:
        weights_R = gather(rows.weights_SK.flatten(), rows.slot_R)
        x_RD = (x_RD * weights_R[:, None].to(accumulator(x.dtype))).to(x.dtype)
    h = mm_in(rows.precision)(x_RD, rearrange(w_in, "e two f d -> e d (two f)"), rows.offsets_e)
    h = rearrange(h, "r (two f) -> r two f", two=2)
    return h, h.new_empty(0)


def _down_reference(h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> torch.Tensor:
    rows, wide = Layout(*fields[: len(Layout._fields)]), accumulator(h.dtype)
    y_RD = mm_in(rows.precision)(swiglu(h), w_out.mT, rows.offsets_e).to(wide)
    if not rows.score_before:
        y_RD = y_RD * gather(rows.weights_SK.flatten(), rows.slot_R)[:, None].to(wide)
    return scatter_add(y_RD, rows.source_R, rows.weights_SK.shape[0]).to(h.dtype)


def _backward_reference(reference: Any, scaled_before: bool) -> Any:
    def call(*args: Any) -> Tensors:
        g_rows, g_weight, g_weights = pullback(reference)(*args)
        multiplied = Layout(*args[3:]).score_before == scaled_before
        return g_rows, g_weight, g_weights if multiplied else g_weights.new_empty(0)

    return call


def _layout_example() -> tuple[Any, ...]:
    precisions = None, *PRECISIONS
    chosen = precisions[int(torch.randint(len(precisions), ()))]
    return *plan_example(), bool(torch.rand(()) < 0.5), chosen


_LAYOUT = "Tensor weights, Tensor slot, Tensor row, Tensor offsets, bool score_before, str? precision"

experts_up_backward: Operator = declare(
    f"experts_up_backward(Tensor g, Tensor x, Tensor w_in, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    impl=raw.up_backward,
    fake=raw.backward_fake(True),
    checkpoint=EXPERTS,
    example=lambda: (random(8, 2, 2), random(4, 3), random(3, 2, 2, 3), *_layout_example()),
    reference=_backward_reference(_up_reference, True),
)

# x (S, D), w_in (e, 2, F, D) -> (R, 2, F): the pre-activation of each row; undefined past the last offset.
# Where a kernel activates in passing, the activation (R, F) comes beside it, else a tensor without elements.
experts_up: Operator = declare(
    f"experts_up(Tensor x, Tensor w_in, {_LAYOUT}) -> (Tensor, Tensor)",
    impl=raw.up,
    fake=raw.up_fake,
    checkpoint=EXPERTS,
    example=lambda: (random(4, 3), random(3, 2, 2, 3), *_layout_example()),
    vjp=lambda inputs, needs, g: _by_need(_UP, inputs, needs, g),
    residual_outputs=1,
    kept=lambda outs: (outs[0], raw.unused(outs[1])),  # experts_down bears the same name, so it is kept too
    by_need=True,
    reference=_up_reference,
)

experts_down_backward: Operator = declare(
    f"experts_down_backward(Tensor g, Tensor h, Tensor w_out, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    impl=raw.down_backward,
    fake=raw.backward_fake(False),
    checkpoint=EXPERTS,
    example=lambda: (random(4, 3), random(8, 2, 2), random(3, 3, 2), *_layout_example()),
    reference=_backward_reference(_down_reference, False),
)

# h (R, 2, F), w_out (e, D, F) -> (S, D): activated, multiplied, weighted and summed per row. What experts_up
# gave beside h may follow. It is used, but isn't differentiated by, nor kept.
experts_down: Operator = declare(
    f"experts_down(Tensor h, Tensor w_out, {_LAYOUT}, Tensor? act) -> Tensor",
    impl=raw.down,
    fake=lambda h, w_out, weights, *rest: h.new_empty(weights.shape[0], w_out.shape[1]),
    checkpoint=EXPERTS,
    example=lambda: (random(8, 2, 2), random(3, 3, 2), *_layout_example()),
    dependent=lambda h, *rest: (swiglu(h),),
    residuals=lambda inputs, outputs: inputs[:-1],
    vjp=lambda inputs, needs, g: _by_need(_DOWN, inputs, needs, g),
    by_need=True,
    reference=_down_reference,
)


class _Backwards(NamedTuple):
    """A backward, and its halves: all but the weight's cotangent, and that alone."""

    whole: Operator
    of_inputs: Operator
    of_weight: Operator
    scaled_before: bool


def _in_halves(whole: Operator, inputs: Any, weight: Any, reference: Any, scaled_before: bool) -> _Backwards:
    takes = str(whole.raw._schema).partition("(")[2].partition(")")[0]
    fake, both = raw.backward_fake(scaled_before), _backward_reference(reference, scaled_before)
    how: Any = dict(checkpoint=EXPERTS, example=whole.example)
    of_inputs = declare(
        f"{whole.name}_inputs({takes}) -> (Tensor, Tensor)",
        impl=inputs,
        fake=lambda *args: fake(*args)[::2],
        reference=lambda *args: both(*args)[::2],
        **how,
    )
    of_weight = declare(
        f"{whole.name}_weight({takes}) -> Tensor",
        impl=weight,
        fake=lambda *args: fake(*args)[1],
        reference=lambda *args: both(*args)[1],
        **how,
    )
    return _Backwards(whole, of_inputs, of_weight, scaled_before)


_UP: _Backwards = _in_halves(experts_up_backward, raw.up_inputs, raw.up_weight, _up_reference, True)
_DOWN: _Backwards = _in_halves(
    experts_down_backward, raw.down_inputs, raw.down_weight, _down_reference, False
)


def _by_need(backwards: _Backwards, inputs: Any, needs: Any, g: torch.Tensor) -> tuple[Any, ...]:
    """The cotangents of the first three inputs, or of those that need one."""
    rows = Layout(*inputs[2:])
    multiplied = rows.score_before == backwards.scaled_before
    others = needs[0] or (needs[2] and multiplied)
    if needs[1] and others and rows.of_weight.precision == rows.precision:
        g_rows, g_weight, g_weights = backwards.whole(g, *inputs)
        return g_rows, g_weight, g_weights if multiplied else None
    g_rows = g_weight = g_weights = None
    early = backwards is _DOWN  # before the cotangent of the pre-activation exists, which is large
    if needs[1] and early:
        g_weight = backwards.of_weight(g, *inputs[:2], *rows.of_weight)
    if others:
        g_rows, g_weights = backwards.of_inputs(g, *inputs)
    if needs[1] and not early:
        g_weight = backwards.of_weight(g, *inputs[:2], *rows.of_weight)
    return g_rows, g_weight, g_weights if multiplied else None
