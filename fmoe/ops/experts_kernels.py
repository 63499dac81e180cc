"""The raw kernels of the experts' operators, and the shapes of their results.

Each computes in one of three ways: in PyTorch everywhere; on CUDA by Triton's kernels, which expand rows,
activate and multiply, in fp8 if the precision says so; or by products of quack-kernels, which gather rows
themselves (``kernels/gathered.py``). Where those made a pre-activation, its strides tell.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import kernels
from .bases import gather_kernel
from .combine import weight_gradients_kernel, weighted_sum_kernel
from .core.derive import Tensors
from .core.dtypes import accumulator
from .dispatch import Plan, rows_of_slots
from .kernels import gathered, grouped, scaled
from .precision import of_weight_gradient


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of a pre-activation (..., 2, F)."""
    return F.silu(h[..., 0, :]) * h[..., 1, :]


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
        g_weights = _of_pairs(g_act * silu * up, rows)
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


def _found_for(h: torch.Tensor, rows: Layout) -> gathered.Rows | None:
    """The same if those products made ``h``, else ``None``."""
    return _found(rows) if _gathered(h, rows) else None


def up_fake(x: Any, w_in: Any, weights: Any, slot: Any, *rest: Any) -> Tensors:
    num_rows, hidden = slot.shape[0], w_in.shape[2]
    if _gathers(x, w_in, Layout(weights, slot, *rest)):
        return gathered.empty_paired(x, num_rows, hidden), x.new_empty(num_rows, hidden)
    return x.new_empty(num_rows, 2, hidden), x.new_empty(0)


def unused(act: torch.Tensor) -> torch.Tensor:
    """What stands for an activation that nobody will read. It has no elements."""
    return act.new_empty(0) if act.dim() == 2 else act


def up(x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathers(x, w_in, rows):
        return gathered.up(x, w_in, _found(rows))
    x_RD = _expanded(x, w_in, rows, weighted=rows.score_before)
    return _mm(x_RD, w_in.flatten(1, 2).mT, rows).unflatten(1, (2, -1)), x.new_empty(0)


def up_backward(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    found = _found_for(g_h, rows)
    g_x, g_weights = _up_inputs(g_h, x, w_in, rows, found)  # its large tensors go before the next ones
    return g_x, _up_weight(g_h, x, w_in, rows, found), g_weights


def up_inputs(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    return _up_inputs(g_h, x, w_in, rows, _found_for(g_h, rows))


def up_weight(g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, *fields: Any) -> torch.Tensor:
    rows = Layout(*fields)
    return _up_weight(g_h, x, w_in, rows, _found_for(g_h, rows))


def _up_inputs(
    g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, rows: Layout, found: gathered.Rows | None
) -> Tensors:
    weights, slot, row, *_ = rows
    of_all = w_in.flatten(1, 2)
    g_x_RD = gathered.up_inputs(g_h, w_in, found) if found else _mm(g_h.flatten(1), of_all, rows)
    if rows.score_before:
        g_weights = weight_gradients_kernel(x, g_x_RD, weights, slot, row)
        return weighted_sum_kernel(g_x_RD, weights, slot, row), g_weights
    return weighted_sum_kernel(g_x_RD, None, slot, row), weights.new_empty(0)


def _up_weight(
    g_h: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, rows: Layout, found: gathered.Rows | None
) -> torch.Tensor:
    if found:
        return gathered.up_weight(g_h, x, found)
    rows = rows.of_weight
    g_RF = g_h.flatten(1)
    x_RD = _expanded_columns(x, w_in, rows, weighted=rows.score_before)
    g: Any = scaled.columns(g_RF, rows.offsets_e) if isinstance(x_RD, scaled.Columns) else g_RF
    return _outer(g, x_RD, rows).unflatten(1, (2, -1))


def down(h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> torch.Tensor:
    *layout, act = fields
    rows = Layout(*layout)
    if act is not None and act.dim() == 2:
        y_RD = gathered.down(act, w_out, _found(rows)) if _gathered(h, rows) else _mm(act, w_out.mT, rows)
    else:
        y_RD = _mm(_activated(h, w_out, rows), w_out.mT, rows)
    return weighted_sum_kernel(y_RD, None if rows.score_before else rows.weights_SK, rows.slot_R, rows.row_SK)


def down_backward(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathered(h, rows):
        found = _found(rows, weighted=True)
        g_h, sums_RN, act = gathered.down_inputs(g, h, w_out, found)
        g_weights = _of_pairs(sums_RN, rows)
        del sums_RN
        return g_h, gathered.down_weight(g, act, found), g_weights
    if _fast(g, w_out, rows):
        g_w_out = down_weight(g, h, w_out, *fields)
        g_h, g_weights = down_inputs(g, h, w_out, *fields)
        return g_h, g_w_out, g_weights
    g_RD = _expand(g, rows, scaled=False)
    g_w_out = _outer(g_RD, _activated_columns(h, w_out, rows), rows.of_weight)
    g_act = _mm(g_RD, w_out, rows)
    del g_RD
    g_h, g_weights = _activation_backward(g_act, h, rows, scaled=not rows.score_before)
    return g_h, g_w_out, g_weights


def down_inputs(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> Tensors:
    rows = Layout(*fields)
    if _gathered(h, rows):
        g_h, sums_RN, _ = gathered.down_inputs(g, h, w_out, _found(rows, weighted=True))
        return g_h, _of_pairs(sums_RN, rows)
    g_act = _mm(_expanded(g, w_out, rows, weighted=False), w_out, rows)
    return _activation_backward(g_act, h, rows, scaled=not rows.score_before)


def down_weight(g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, *fields: Any) -> torch.Tensor:
    rows = Layout(*fields).of_weight
    # The activation is computed again for g_h: cheaper than to hold it beside that.
    if _gathered(h, rows):
        return gathered.down_weight(g, _activation(h, rows, scaled=True), _found(rows))
    act = _activated_columns(h, w_out, rows)
    return _outer(_expanded_columns(g, w_out, rows, weighted=False), act, rows)


def _of_pairs(values_RN: torch.Tensor, rows: Layout) -> torch.Tensor:
    """The sums of rows (R, N) as values of pairs (S, K), zero for a pair without a row."""
    if kernels.fused(values_RN):
        from .kernels import rows as fused

        sums_SK = fused.sums(values_RN, rows.row_SK)
    else:
        sums_SK = gather_kernel(values_RN.sum(1), rows.row_SK.flatten()).view(rows.row_SK.shape)
    return sums_SK.to(rows.weights_SK.dtype)


# Weights that don't multiply these rows have no cotangent here: a tensor without elements stands for it.
def backward_fake(scaled_before: bool) -> Any:
    def fake(g: Any, rows: Any, weight: Any, weights: Any, *rest: Any) -> Tensors:
        shape = weights.shape if Layout(weights, *rest).score_before == scaled_before else (0,)
        pairs = rows.dim() == 3 and _gathered(rows, Layout(weights, *rest))
        g_rows = gathered.empty_paired(rows, *rows.shape[::2]) if pairs else rows.new_empty(rows.shape)
        return g_rows, weight.new_empty(weight.shape), weights.new_empty(shape)

    return fake
