"""Bytes that kernels hold while they run, beyond arguments and results."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops import update
from ..ops.core.compress import COMPRESS_OP
from ..ops.core.dtypes import accumulator
from ..ops.cross_entropy import block_columns, block_rows
from ..ops.kernels import scaled
from ..ops.precision import FAST, of_weight_gradient
from .rounding import ROUNDS
from .sent import bytes_in, bytes_of_rows, exchanged_row, reduced

Workspace = Callable[..., int]  # of an operator's arguments and results

CUBLAS = 32 * 2**20  # its workspace on Hopper, for the thread that launches


class _Experts(NamedTuple):
    """Sizes of an experts' operator, and the bytes of its operands in fp8: numbers, and float32 scales.

    ``x_columns`` are of dimension D, and ``h_columns`` of F, for sums over rows, of which each expert's begin
    at a multiple. ``weights`` has the scales of both dimensions.
    """

    rows: int
    tokens: int
    dim: int
    hidden: int
    weight: int
    size: int
    score_before: bool
    fp8: bool
    x_columns: int
    h_columns: int
    weights: int


def _of_experts(weight: torch.Tensor, rows: int, num_tokens: int, others: Any, *, up: bool) -> _Experts:
    num, hidden = weight.shape[0], weight.shape[-2 if up else -1]
    dim = weight.shape[-1 if up else -2]
    padded = rows + num * (scaled.MULTIPLE - 1)
    return _Experts(
        rows, num_tokens, dim, hidden, weight.numel(), weight.element_size(),
        bool(others[4]), others[5] in FAST,
        dim * (padded + 4 * num), hidden * (padded + 4 * num), weight.numel() + 4 * num * (dim + 2 * hidden),
    )  # fmt: skip


def _up(x: Any, w_in: Any, *others: Any) -> _Experts:
    return _of_experts(w_in, others[1].shape[0], x.shape[0], others, up=True)


def _down(h: Any, w_out: Any, *others: Any) -> _Experts:
    return _of_experts(w_out, h.shape[0], others[0].shape[0], others, up=False)


def _experts(at: int, of: Callable[..., _Experts], held: Callable[[_Experts], int]) -> Workspace:
    """An operator of the experts, whose inputs begin with argument ``at``."""

    def count(args: Any, outs: Any, *, kept: bool = False) -> int:
        sizes = of(*args[at:])
        return held(sizes._replace(weights=0) if kept else sizes)

    return count


def _experts_up(e: _Experts) -> int:
    wide = e.rows * e.dim
    if e.fp8:
        return wide + 4 * e.rows + e.weights + e.score_before * e.size * wide
    return wide * e.size  # the expanded rows


def _experts_up_inputs(e: _Experts) -> int:
    """Cotangents of expanded rows, before they are summed; in fp8 beside what they are the product of."""
    wide = e.size * e.rows * e.dim
    factors = 2 * e.rows * e.hidden + 4 * e.rows + e.weights
    return max(wide, wide + factors - e.size * e.tokens * e.dim) if e.fp8 else wide


def _experts_up_weight(e: _Experts) -> int:
    return e.x_columns + 2 * e.h_columns if e.fp8 else e.size * e.rows * e.dim


def _experts_up_backward(e: _Experts) -> int:
    if not e.fp8:
        return _experts_up_weight(e)
    first = _experts_up_inputs(e) - e.size * e.weight  # whose cotangent comes later
    return max(first, _experts_up_weight(e))


def _experts_down(e: _Experts) -> int:
    """The activation beside unsummed rows, then these beside their sum."""
    activation = e.rows * (e.hidden + 4) + e.weights if e.fp8 else e.size * e.rows * e.hidden
    wide = e.size * e.rows * e.dim
    return wide + max(0, activation - e.size * e.tokens * e.dim)


def _experts_down_inputs(e: _Experts) -> int:
    """Expanded cotangents and those of the activation, then these beside those of the pre-activation."""
    wide = e.rows * (e.dim + 4) + e.weights if e.fp8 else e.size * e.rows * e.dim
    return e.size * e.rows * e.hidden + max(0, wide - 2 * e.size * e.rows * e.hidden)


def _experts_down_weight(e: _Experts) -> int:
    """The activation and expanded cotangents."""
    return e.x_columns + e.h_columns if e.fp8 else e.size * e.rows * (e.hidden + e.dim)


def _experts_down_backward(e: _Experts) -> int:
    # The weight's comes first, before the cotangents of the pre-activation exist.
    first = _experts_down_weight(e) - 2 * e.size * e.rows * e.hidden
    return max(first, _experts_down_inputs(e))


def _scaled_grouped_mm(args: Any, outs: Any, *, kept: bool = False) -> int:
    """Both operands in fp8."""
    x, w = args[:2]
    weights = 0 if kept else w.numel() + 4 * w.shape[0] * w.shape[2]
    return x.numel() + 4 * x.shape[0] + weights


def _scaled_grouped_outer(args: Any, outs: Any) -> int:
    x, y, offsets, precision = args
    if of_weight_gradient(precision) is None:
        return 0
    padded = x.shape[0] + len(offsets) * (scaled.MULTIPLE - 1)
    return (x.shape[1] + y.shape[1]) * (padded + 4 * len(offsets))


def _wide(*tensors: torch.Tensor) -> int:
    """Bytes of float32 copies."""
    return sum(4 * t.numel() for t in tensors if t.element_size() < 4)


def _scores(q: torch.Tensor) -> int:
    return 4 * q.shape[0] * q.shape[2] * q.shape[1] ** 2


def plain_attention(args: Any, outs: Any) -> int:
    return 2 * _scores(args[0]) + _wide(*args[:3])


def plain_attention_backward(args: Any, outs: Any) -> int:
    g, q, k, v, *_, y, _ = args
    return 3 * _scores(q) + _wide(g, q, k, v, y)


def _attention(args: Any, outs: Any) -> int:
    """Only float64 takes products that hold all scores, if a GPU's kernels prove right there."""
    return plain_attention(args, outs) if args[0].dtype == torch.float64 else 0


def _attention_backward(args: Any, outs: Any) -> int:
    q = args[1]
    # The cotangent of q is summed in float32.
    return plain_attention_backward(args, outs) if q.dtype == torch.float64 else _wide(q)


def _mask(q: torch.Tensor) -> int:
    """Segments in float32 take the memory-efficient kernel, which wants a mask."""
    return 4 * q.shape[0] * q.shape[1] ** 2 if q.dtype == torch.float32 else 0


def _block(x: torch.Tensor, weight: torch.Tensor, block_bytes: int) -> int:
    return x.shape[0] * min(block_columns(x.shape[0], block_bytes), weight.shape[0])


def _cross_entropy(args: Any, outs: Any) -> int:
    x, weight, _, block_bytes = args
    return 4 * _block(x, weight, block_bytes)


def _cross_entropy_backward(args: Any, outs: Any) -> int:
    _, x, weight, _, block_bytes, _ = args
    narrow = x.element_size() if x.element_size() < 4 else 0
    # First a block's logits while they become cotangents, then its product beside the sum so far.
    block = _block(x, weight, block_bytes)
    return 4 * x.numel() + max((4 + narrow) * block, (narrow or 4) * block + 4 * x.numel())


def _cross_entropy_sum(args: Any, outs: Any) -> int:
    x, weight, _, block_bytes = args
    narrow = x.element_size() if x.element_size() < 4 else 0
    rows = min(x.shape[0], block_rows(weight.shape[0], block_bytes))
    # A block's logits while they become cotangents, then its product with the weight.
    return rows * max((4 + narrow) * weight.shape[0], (narrow or 4) * weight.shape[0] + 4 * x.shape[1])


def _exchange(args: Any, outs: Any) -> int:
    sent, received = outs[5].shape[0], outs[0].shape[0]
    return (2 * sent + received) * exchanged_row(args)


def _reduce_scatter(args: Any, outs: Any) -> int:
    low = accumulator(args[0].dtype) != args[0].dtype
    return (reduced(args) + reduced(args) // args[1]) * low


def _gather_params(args: Any, outs: Any) -> int:
    x, kept, moved = args[:3]
    return bytes_in(moved, x) * (kept != moved)


def _reduce_params(args: Any, outs: Any) -> int:
    x, kept, _, summed, size, _ = args
    return bytes_in(summed, x) * (x.dtype != summed) + bytes_in(summed, x) // size * (kept != summed)


def _widened(args: Any, most: int) -> int:
    """Where moments have another dtype: two of the four are widened, a piece at a time."""
    p, _, m = args[:3]
    alike = p[0].dtype == m[0].dtype
    return 0 if alike else 2 * 4 * max(min(t.numel(), most) for t in p)


WORKSPACES: dict[str, Workspace] = {
    "fmoe::adamw_": lambda args, outs: _widened(args, update.LARGE),
    "fmoe::experts_up": _experts(0, _up, _experts_up),
    "fmoe::experts_up_backward": _experts(1, _up, _experts_up_backward),
    "fmoe::experts_up_backward_inputs": _experts(1, _up, _experts_up_inputs),
    "fmoe::experts_up_backward_weight": _experts(1, _up, _experts_up_weight),
    "fmoe::experts_down": _experts(0, _down, _experts_down),
    "fmoe::experts_down_backward": _experts(1, _down, _experts_down_backward),
    "fmoe::experts_down_backward_inputs": _experts(1, _down, _experts_down_inputs),
    "fmoe::experts_down_backward_weight": _experts(1, _down, _experts_down_weight),
    "fmoe::scaled_grouped_mm": _scaled_grouped_mm,
    "fmoe::scaled_grouped_outer": _scaled_grouped_outer,
    "fmoe::attention": _attention,
    "fmoe::attention_backward": _attention_backward,
    "fmoe::segment_attention": lambda args, outs: _attention(args, outs) + _mask(args[0]),
    "fmoe::segment_attention_backward": lambda args, outs: _attention_backward(args, outs) + _mask(args[1]),
    "fmoe::cross_entropy_sum": _cross_entropy_sum,
    "fmoe::cross_entropy_terms": _cross_entropy,
    "fmoe::cross_entropy_terms_backward": _cross_entropy_backward,
    "fmoe::exchange": _exchange,
    COMPRESS_OP: lambda args, outs: 0 if args[0].is_contiguous() else args[0].nbytes + outs[0].nbytes,
    "fmoe::gather_params": _gather_params,
    "fmoe::reduce_params": _reduce_params,
    "fmoe::reduce_scatter": _reduce_scatter,
    "fmoe::send": lambda args, outs: bytes_of_rows(args[0], args[1].shape[0]),
    "fmoe::send_back": lambda args, outs: bytes_of_rows(args[0], args[1].shape[0]),
    "fmoe::send_both_back": lambda args, outs: args[0].nbytes + 2 * bytes_of_rows(args[0], args[2].shape[0]),
}
# Where a weight is kept rounded, which is none of the workspace.
KEPT: dict[str, Workspace] = {name: functools.partial(WORKSPACES[name], kept=True) for name in ROUNDS}
ON_CPU: dict[str, Workspace] = {"fmoe::adamw_": lambda args, outs: _widened(args, update.PIECE)}
