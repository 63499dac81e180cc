"""The experts: SwiGLU of every held expert, weighted and summed per row, as two operators.

``experts_up`` gives the pre-activation and ``experts_down`` the output. With two operators, the
pre-activation is freed as soon as its own cotangent is known.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from ..errors import argument_error, check_kind, is_pair
from . import kernels
from .bases import gather, gather_kernel, mm_in, random, scatter_add
from .combine import weight_gradients_kernel, weighted_sum_kernel
from .core.derive import Tensors, pullback
from .core.dtypes import accumulator, product_dtype
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .dispatch import Plan, check_rows, plan_example, rows_of_slots
from .kernels import gathered, grouped, scaled
from .precision import PRECISIONS, check_precision, of_weight_gradient

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


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of a pre-activation (..., 2, F)."""
    return F.silu(h[..., 0, :]) * h[..., 1, :]


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


class Layout(NamedTuple):
    """What operators take beside rows and a weight.

    It is the part of a :class:`Plan` that says which rows an expert has and when to weigh them, and the
    precision of products.
    """

    weights_SK: torch.Tensor
    slot_R: torch.Tensor
    row_SK: torch.Tensor
    offsets_e: torch.Tensor
    score_before: bool
    precision: str | None = None

    @property
    def of_weight(self) -> "Layout":
        """The same, in the precision of the weight's gradient."""
        return self._replace(precision=of_weight_gradient(self.precision))

    @property
    def source_R(self) -> torch.Tensor:
        """The dispatched row that each expanded row is a copy of."""
        return rows_of_slots(self.slot_R, self.weights_SK.shape[1])


def layout_of(plan: Plan, precision: str | None = None) -> Layout:
    """The layout of a plan's rows."""
    tensors = plan.weights_SK, plan.slot_R, plan.row_SK, plan.offsets_e
    return Layout(*tensors, plan.score_before_experts, precision)


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


def _weights_R1(rows: Layout) -> torch.Tensor:
    return gather_kernel(rows.weights_SK.flatten(), rows.slot_R)[:, None]


def _expand(x: torch.Tensor, rows: Layout, *, scaled: bool) -> torch.Tensor:
    """A copy of each token for each of its rows, times the pair's weight if ``scaled``."""
    weights, slot, row, offsets, *_ = rows
    if kernels.fused(x, weights):
        from .kernels import rows as fused

        return fused.expand(x, row, slot, offsets, weights if scaled else None)
    x_RD = gather_kernel(x, rows.source_R)
    return (x_RD * _weights_R1(rows)).to(x.dtype) if scaled else x_RD


def _activation(h: torch.Tensor, rows: Layout, *, scaled: bool) -> torch.Tensor:
    """SwiGLU of the pre-activation, times the pair's weight if ``scaled``."""
    if kernels.fused(h, rows.weights_SK):
        from .kernels import activation

        return activation.swiglu(h, rows.slot_R, rows.weights_SK if scaled else None, rows.offsets_e)
    act = swiglu(h)
    return (act * _weights_R1(rows)).to(h.dtype) if scaled else act


def _activation_backward(g_act: torch.Tensor, h: torch.Tensor, rows: Layout, *, scaled: bool) -> Tensors:
    """Cotangents of the pre-activation and of the weights, from that of the activation before weights."""
    weights, slot, row, offsets, *_ = rows
    if kernels.fused(h, weights):
        from .kernels import activation

        return activation.swiglu_backward(g_act, h, slot, row, weights, offsets, weighted=scaled)
    wide = accumulator(h.dtype)
    gate, up, g_act = h[:, 0].to(wide), h[:, 1].to(wide), g_act.to(wide)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    g_weights = weights.new_empty(0)
    if scaled:
        g_weights = _of_pairs((g_act * silu * up).sum(1), rows)
        g_act = g_act * _weights_R1(rows)
    g_gate = g_act * up * (sigmoid + silu * (1 - sigmoid))
    return torch.stack([g_gate, g_act * silu], 1).to(h.dtype), g_weights


def _mm(x_RI: Any, w_eIO: torch.Tensor, rows: Layout) -> torch.Tensor:
    """Rows times their expert's matrix, in the precision of products."""
    if rows.precision is None:
        return grouped.mm(x_RI, w_eIO, rows.offsets_e)
    return scaled.mm(x_RI, w_eIO, rows.offsets_e, rows.precision)


def _outer(x_RI: Any, y_RO: Any, rows: Layout) -> torch.Tensor:
    """The sum over each expert's rows, in the precision of products."""
    if rows.precision is None:
        return grouped.outer(x_RI, y_RO, rows.offsets_e)
    return scaled.outer(x_RI, y_RO, rows.offsets_e, rows.precision)


def _fast(x: torch.Tensor, weight: torch.Tensor, rows: Layout) -> bool:
    """Whether kernels write what fp8 products take, for these tokens and an expert's weight."""
    return rows.slot_R.shape[0] > 0 and scaled.fast(rows.precision, x, *weight.shape[-2:])


def _expanded(x: torch.Tensor, weight: torch.Tensor, rows: Layout, *, weighted: bool) -> Any:
    """:func:`_expand` as products take it: in fp8, tokens are scaled before they are copied."""
    if weighted or not _fast(x, weight, rows):
        return _expand(x, rows, scaled=weighted)
    from .kernels import rows as fused

    values, scale = scaled.rows(x)
    where = rows.row_SK, rows.slot_R, rows.offsets_e, None
    copies = fused.expand(values.view(torch.int8), *where).view(values.dtype)
    return scaled.Scaled(copies, fused.expand(scale[:, None], *where)[:, 0])


def _expanded_columns(x: torch.Tensor, weight: torch.Tensor, rows: Layout, *, weighted: bool) -> Any:
    """:func:`_expand` as sums over rows take it."""
    if not _fast(x, weight, rows):
        return _expand(x, rows, scaled=weighted)
    from .kernels import columns

    weights, slot, row, offsets, *_ = rows
    return columns.of_tokens(x, slot, offsets, row.shape[1], weights if weighted else None)


def _activated(h: torch.Tensor, weight: torch.Tensor, rows: Layout) -> Any:
    """:func:`_activation` as products take it."""
    if not _fast(h, weight, rows):
        return _activation(h, rows, scaled=False)
    from .kernels import quantise

    return quantise.activated(h, rows.offsets_e)


def _activated_columns(h: torch.Tensor, weight: torch.Tensor, rows: Layout) -> Any:
    """:func:`_activation`, weighed if the experts' outputs are, as sums over rows take it."""
    weighted = not rows.score_before
    if not _fast(h, weight, rows):
        return _activation(h, rows, scaled=weighted)
    from .kernels import columns

    return columns.of_activations(h, rows.slot_R, rows.offsets_e, rows.weights_SK if weighted else None)


def _gathers(x: torch.Tensor, w_in: torch.Tensor, rows: Layout) -> bool:
    """Whether the products of a layer gather their rows, so that its pre-activations lie in pairs."""
    return rows.precision is None and not rows.score_before and gathered.chosen(x, w_in)


def _gathered(h: torch.Tensor, rows: Layout) -> bool:
    """Whether products that gather rows made these pre-activations, or their cotangents."""
    return not rows.score_before and gathered.paired(h)


def _found(rows: Layout, *, weighted: bool = False) -> gathered.Rows:
    """Where those products find rows."""
    weights, slot, row, offsets, *_ = rows
    return gathered.rows_of(slot, offsets, row.shape[1], weights if weighted else None)


def _up_fake(x: Any, w_in: Any, weights: Any, slot: Any, *rest: Any) -> Tensors:
    num_rows, hidden = slot.shape[0], w_in.shape[2]
    if _gathers(x, w_in, Layout(weights, slot, *rest)):
        return gathered.empty_paired(x, num_rows, hidden), x.new_empty(num_rows, hidden)
    return x.new_empty(num_rows, 2, hidden), x.new_empty(0)


def _unused(act: torch.Tensor) -> torch.Tensor:
    """In place of an activation that nobody will take: it holds no memory."""
    return act.new_empty(0) if act.dim() == 2 else act


def _up_kernel(x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathers(x, w_in, rows):
        return gathered.up(x, w_in, _found(rows))
    x_RD = _expanded(x, w_in, rows, weighted=rows.score_before)
    return _mm(x_RD, w_in.flatten(1, 2).mT, rows).unflatten(1, (2, -1)), x.new_empty(0)


def _up_backward_kernel(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    g_x, g_weights = _up_inputs_kernel(g_h, x, w_in, *fields)  # its large tensors go before the next ones
    return g_x, _up_weight_kernel(g_h, x, w_in, *fields), g_weights


def _up_inputs_kernel(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    weights, slot, row, *_ = rows
    if _gathered(g_h, rows):
        g_x_RD = gathered.up_inputs(g_h, w_in, _found(rows))
    else:
        g_x_RD = _mm(g_h.flatten(1), w_in.flatten(1, 2), rows)
    if rows.score_before:
        g_weights = weight_gradients_kernel(x, g_x_RD, weights, slot, row)
        return weighted_sum_kernel(g_x_RD, weights, slot, row), g_weights
    return weighted_sum_kernel(g_x_RD, None, slot, row), weights.new_empty(0)


def _up_weight_kernel(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> torch.Tensor:
    rows = Layout(*fields).of_weight
    if _gathered(g_h, rows):
        return gathered.up_weight(g_h, x, _found(rows))
    g_RF = g_h.flatten(1)
    x_RD = _expanded_columns(x, w_in, rows, weighted=rows.score_before)
    g: Any = scaled.columns(g_RF, rows.offsets_e) if isinstance(x_RD, scaled.Columns) else g_RF
    return _outer(g, x_RD, rows).unflatten(1, (2, -1))


def _down_kernel(h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> torch.Tensor:
    *layout, act = fields
    rows = Layout(*layout)
    if act is not None and act.dim() == 2:
        y_RD = gathered.down(act, w_out, _found(rows)) if _gathered(h, rows) else _mm(act, w_out.mT, rows)
    else:
        y_RD = _mm(_activated(h, w_out, rows), w_out.mT, rows)
    return weighted_sum_kernel(y_RD, None if rows.score_before else rows.weights_SK, rows.slot_R, rows.row_SK)


def _down_backward_kernel(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathered(h, rows):
        found = _found(rows, weighted=True)
        g_h, g_weights_R, act = gathered.down_inputs(g, h, w_out, found)
        return g_h, gathered.down_weight(g, act, found), _of_pairs(g_weights_R, rows)
    if _fast(g, w_out, rows):
        g_w_out = _down_weight_kernel(g, h, w_out, *fields)
        g_h, g_weights = _down_inputs_kernel(g, h, w_out, *fields)
        return g_h, g_w_out, g_weights
    g_RD = _expand(g, rows, scaled=False)
    g_w_out = _outer(g_RD, _activated_columns(h, w_out, rows), rows.of_weight)
    g_act = _mm(g_RD, w_out, rows)
    del g_RD
    g_h, g_weights = _activation_backward(g_act, h, rows, scaled=not rows.score_before)
    return g_h, g_w_out, g_weights


def _down_inputs_kernel(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathered(h, rows):
        g_h, g_weights_R, _ = gathered.down_inputs(g, h, w_out, _found(rows, weighted=True))
        return g_h, _of_pairs(g_weights_R, rows)
    g_act = _mm(_expanded(g, w_out, rows, weighted=False), w_out, rows)
    return _activation_backward(g_act, h, rows, scaled=not rows.score_before)


def _down_weight_kernel(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> torch.Tensor:
    rows = Layout(*fields).of_weight
    # The activation is computed again for g_h: cheaper than to hold it beside that.
    if _gathered(h, rows):
        return gathered.down_weight(g, _activation(h, rows, scaled=True), _found(rows))
    act = _activated_columns(h, w_out, rows)
    return _outer(_expanded_columns(g, w_out, rows, weighted=False), act, rows)


def _of_pairs(values_R: torch.Tensor, rows: Layout) -> torch.Tensor:
    """Values of rows (R,) as those of pairs (S, K), zero for a pair without a row."""
    weights = rows.weights_SK
    return gather_kernel(values_R[:, None], rows.row_SK.flatten()).view(weights.shape).to(weights.dtype)


# Weights that don't multiply these rows have no cotangent here: a tensor without elements stands for it.
def _backward_fake(scaled_before: bool) -> Any:
    def fake(g: Any, rows: Any, weight: Any, weights: Any, *rest: Any) -> Tensors:
        shape = weights.shape if Layout(weights, *rest).score_before == scaled_before else (0,)
        pairs = rows.dim() == 3 and _gathered(rows, Layout(weights, *rest))
        g_rows = gathered.empty_paired(rows, *rows.shape[::2]) if pairs else rows.new_empty(rows.shape)
        return g_rows, weight.new_empty(weight.shape), weights.new_empty(shape)

    return fake


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
    impl=_up_backward_kernel,
    fake=_backward_fake(True),
    checkpoint=EXPERTS,
    example=lambda: (random(8, 2, 2), random(4, 3), random(3, 2, 2, 3), *_layout_example()),
    reference=_backward_reference(_up_reference, True),
)

# x (S, D), w_in (e, 2, F, D) -> (R, 2, F): the pre-activation of each row; undefined past the last offset.
# Where a kernel activates in passing, the activation (R, F) comes beside it, else a tensor without elements.
experts_up: Operator = declare(
    f"experts_up(Tensor x, Tensor w_in, {_LAYOUT}) -> (Tensor, Tensor)",
    impl=_up_kernel,
    fake=_up_fake,
    checkpoint=EXPERTS,
    example=lambda: (random(4, 3), random(3, 2, 2, 3), *_layout_example()),
    vjp=lambda inputs, needs, g: _by_need(_UP, inputs, needs, g),
    residual_outputs=1,
    kept=lambda outs: (outs[0], _unused(outs[1])),  # experts_down bears the same name, so it is kept too
    by_need=True,
    reference=_up_reference,
)

experts_down_backward: Operator = declare(
    f"experts_down_backward(Tensor g, Tensor h, Tensor w_out, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    impl=_down_backward_kernel,
    fake=_backward_fake(False),
    checkpoint=EXPERTS,
    example=lambda: (random(4, 3), random(8, 2, 2), random(3, 3, 2), *_layout_example()),
    reference=_backward_reference(_down_reference, False),
)

# h (R, 2, F), w_out (e, D, F) -> (S, D): activated, multiplied, weighted and summed per row. What experts_up
# gave beside h may follow. It is used, but isn't differentiated by, nor kept.
experts_down: Operator = declare(
    f"experts_down(Tensor h, Tensor w_out, {_LAYOUT}, Tensor? act) -> Tensor",
    impl=_down_kernel,
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
    fake, both = _backward_fake(scaled_before), _backward_reference(reference, scaled_before)
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


_UP: _Backwards = _in_halves(experts_up_backward, _up_inputs_kernel, _up_weight_kernel, _up_reference, True)
_DOWN: _Backwards = _in_halves(
    experts_down_backward, _down_inputs_kernel, _down_weight_kernel, _down_reference, False
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
