"""The work of operators on a GPU: floating-point operations, and bytes read and written."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.cross_entropy import block_rows
from ..ops.precision import FAST, of_weight_gradient
from .dry_run import COPIES_INTO


class Work(NamedTuple):
    """The work of an operator.

    ===========  ======================================================================
    ``rate``     that of its products, or ``"memory"`` or ``"optimizer"`` for one without any
    ``flops``    of its products
    ``moved``    bytes that these read and write, or all that it does
    ``passed``   bytes that its other kernels read and write, before and after the products
    ``fusible``  whether a compiler runs it together with its neighbours
    ===========  ======================================================================

    >>> Work("products", flops=2e9, moved=3e6).passed
    0
    """

    rate: str
    flops: float
    moved: float
    passed: float = 0
    fusible: bool = False


ADAMW = "fmoe::adamw_"
IN_FP8 = {"products": "products_fp8", "experts": "experts_fp8"}  # the rates of products in fp8
NONE = Work("memory", 0, 0)

# Nothing is read or written by these, though PyTorch gives them memory of their own.
_EMPTY = {
    f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
}
_READS_ROWS = {"aten::embedding", "fmoe::gather", "aten::gather", "aten::index_select"}


def work(name: str, func: Any, args: Any, kwargs: Any, outputs: Sequence[torch.Tensor]) -> Work:
    """What an operator does, by its name, schema, arguments and tensors that it gave."""
    given = [t for t in optree.tree_leaves(args) if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage()._cdata for t in given}
    mutates = func._schema.is_mutable
    made = [t for t in outputs if t.untyped_storage()._cdata not in storages]
    if name in _EMPTY or (not made and not mutates):
        return NONE
    written = sum(map(touched, made))
    if name in _READS_ROWS:
        return Work("memory", 0, 2 * written)
    read = sum(map(touched, given))
    if name in COPIES_INTO:
        return Work("memory", 0, read)
    if mutates:
        changed = [a for a, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]
        if name == ADAMW:
            del changed[1]  # gradients, which only small leaves' updates write
        written += sum(touched(t) for t in optree.tree_leaves(changed) if isinstance(t, torch.Tensor))
    if name in PRODUCTS:
        rate, flops, passed = PRODUCTS[name](args, outputs)
        return Work(rate, flops, read + written, passed)
    rate = "optimizer" if name == ADAMW else "memory"
    return Work(rate, 0, read + written, fusible=not mutates and name.startswith("aten::"))


def touched(t: torch.Tensor) -> int:
    """Bytes of a tensor that a kernel touches: expanded ones are smaller than they look."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


# ---- products: their rate, their FLOPs, and the bytes that kernels before and after them read and write ----

Product = tuple[str, float, float]


def _mm(a: int) -> Callable[[Any, Any], Product]:
    """A product whose first matrix is argument ``a``."""
    return lambda args, outs: ("products", 2.0 * outs[0].numel() * args[a].shape[-1], 0)


def _router(args: Any, outs: Any) -> Product:
    a, b, _ = args
    # On CUDA, a float32 number beside bfloat16 ones is three of these.
    times = 3 if a.dtype != b.dtype else 1
    return "products", 2.0 * times * outs[0].numel() * a.shape[-1], 0


def _router_backward(args: Any, outs: Any) -> Product:
    g, a, b = args
    of_a, of_b = _router((g, b.mT, None), outs), _router((a.mT, g, None), outs[1:])
    return "products", of_a[1] + of_b[1], 0


def _grouped(args: Any, outs: Any) -> Product:
    x, w = args[:2]
    return "experts", 2.0 * x.shape[0] * x.shape[1] * w.shape[-1], 0


def _scaled_grouped(args: Any, outs: Any) -> Product:
    """Dense products in fp8: both operands are read, and written in fp8."""
    x, other = args[:2]
    flops = 2.0 * x.shape[0] * x.shape[1] * other.shape[-1]
    return IN_FP8["products"], flops, sum(t.numel() * (t.element_size() + 1) for t in (x, other))


def _scaled_outer(args: Any, outs: Any) -> Product:
    rate, flops, passed = _scaled_grouped(args, outs)
    return ("products", flops, 0) if of_weight_gradient(args[-1]) is None else (rate, flops, passed)


class _Rows(NamedTuple):
    """The FLOPs of one product of the experts, and the numbers of rows (R, D), (R, F) and (S, D).

    And those of their weight, the bytes of a number, and whether products are in fp8.
    """

    flops: float
    wide: int
    hidden: int
    tokens: int
    weight: int
    size: int
    fp8: bool


def _up(x: Any, w_in: Any, weights: Any, slot: Any, *others: Any) -> _Rows:
    rows, (_, two, hidden, dim) = slot.shape[0], w_in.shape
    flops = 2.0 * rows * dim * two * hidden
    numbers = rows * dim, rows * hidden, x.numel(), w_in.numel()
    return _Rows(flops, *numbers, x.element_size(), others[-1] in FAST)


def _down(h: Any, w_out: Any, weights: Any, *others: Any) -> _Rows:
    (rows, _, hidden), dim = h.shape, w_out.shape[1]
    numbers = rows * dim, rows * hidden, weights.shape[0] * dim, w_out.numel()
    return _Rows(2.0 * rows * dim * hidden, *numbers, h.element_size(), others[4] in FAST)


def _experts(at: int, of: Callable[..., _Rows], products: int, passed: Callable[[_Rows], float]) -> Any:
    """An operator of the experts, whose inputs begin with argument ``at``."""

    def count(args: Any, outs: Any) -> Product:
        rows = of(*args[at:])
        return IN_FP8["experts"] if rows.fp8 else "experts", products * rows.flops, passed(rows)

    return count


# Bytes that kernels read and write. What products in fp8 take is written in one byte a number.


def _expanded(r: _Rows) -> float:
    return (r.size + (1 if r.fp8 else r.size)) * r.wide


def _summed(r: _Rows) -> float:
    return r.size * (r.wide + r.tokens)


def _activated(r: _Rows) -> float:
    return (2 * r.size + (1 if r.fp8 else r.size)) * r.hidden


def _pulled_back(r: _Rows) -> float:
    return 5 * r.size * r.hidden


def _quantised(r: _Rows, weights: int = 0, hidden: int = 0) -> float:
    """Weights and rows (R, F) that only products in fp8 read and write once more."""
    return r.fp8 * (r.size + 1) * (weights * r.weight + hidden * r.hidden)


def _up_passed(r: _Rows) -> float:
    return _expanded(r) + _quantised(r, weights=1)


def _up_inputs_passed(r: _Rows) -> float:
    return _summed(r) + _quantised(r, weights=1, hidden=2)


def _up_weight_passed(r: _Rows) -> float:
    return _expanded(r) + _quantised(r, hidden=2)


def _down_passed(r: _Rows) -> float:
    return _activated(r) + _summed(r) + _quantised(r, weights=1)


def _down_inputs_passed(r: _Rows) -> float:
    return _expanded(r) + _pulled_back(r) + _quantised(r, weights=1)


def _down_weight_passed(r: _Rows) -> float:
    return _expanded(r) + _activated(r)


def _down_backward_passed(r: _Rows) -> float:
    """In fp8 the expanded cotangents are written twice: by rows and by columns."""
    again = 0 if r.fp8 else _expanded(r)
    return _down_inputs_passed(r) + _down_weight_passed(r) - again


def _attention(at: int, of_keys: int, of_values: int, rate: str) -> Callable[[Any, Any], Product]:
    """Causal attention by so many products of the width of the keys, and of the values."""

    def count(args: Any, outs: Any) -> Product:
        q, _, v = args[at : at + 3]
        batch, length, heads, width = q.shape
        pairs = batch * heads * length * (length + 1) / 2
        return rate, 2.0 * pairs * (of_keys * width + of_values * v.shape[3]), 0

    return count


def _loss(at: int, products: int) -> Callable[[Any, Any], Product]:
    """Logits are read in float32. In the backward their cotangents are written, too."""

    def count(args: Any, outs: Any) -> Product:
        x, weight = args[at : at + 2]
        logits = x.shape[0] * weight.shape[0]
        passed = logits * (4 + x.element_size() * (products > 1))
        return "loss", 2.0 * products * logits * x.shape[1], passed

    return count


def _loss_sum(args: Any, outs: Any) -> Product:
    """Each block also adds to the weight's gradient, which is read and written in float32."""
    x, weight, _, block_bytes = args
    kind, flops, passed = _loss(0, 3)(args, outs)
    blocks = -(-x.shape[0] // block_rows(weight.shape[0], block_bytes))
    return kind, flops, passed + 2 * 4 * blocks * weight.numel()


PRODUCTS: dict[str, Callable[[Any, Any], Product]] = {
    "aten::mm": _mm(0),
    "aten::bmm": _mm(0),
    "aten::addmm": _mm(1),
    "aten::baddbmm": _mm(1),
    "fmoe::product": _router,
    "fmoe::product_backward": _router_backward,
    "fmoe::grouped_mm": _grouped,
    "fmoe::grouped_outer": _grouped,
    "fmoe::scaled_grouped_mm": _scaled_grouped,
    "fmoe::scaled_grouped_outer": _scaled_outer,
    "fmoe::experts_up": _experts(0, _up, 1, _up_passed),
    "fmoe::experts_up_backward": _experts(1, _up, 2, lambda r: _up_inputs_passed(r) + _up_weight_passed(r)),
    "fmoe::experts_up_backward_inputs": _experts(1, _up, 1, _up_inputs_passed),
    "fmoe::experts_up_backward_weight": _experts(1, _up, 1, _up_weight_passed),
    "fmoe::experts_down": _experts(0, _down, 1, _down_passed),
    "fmoe::experts_down_backward": _experts(1, _down, 2, _down_backward_passed),
    "fmoe::experts_down_backward_inputs": _experts(1, _down, 1, _down_inputs_passed),
    "fmoe::experts_down_backward_weight": _experts(1, _down, 1, _down_weight_passed),
    "fmoe::attention": _attention(0, 1, 1, "attention"),
    "fmoe::attention_backward": _attention(1, 3, 2, "attention_backward"),
    "fmoe::segment_attention": _attention(0, 1, 1, "attention"),
    "fmoe::segment_attention_backward": _attention(1, 3, 2, "attention_backward"),
    "fmoe::cross_entropy_sum": _loss_sum,
    "fmoe::cross_entropy_terms": _loss(0, 1),
    "fmoe::cross_entropy_terms_backward": _loss(1, 3),
}


class Works(TorchDispatchMode):
    """Notes the work of all operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in optree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.noted.append(work(func.name().partition(".")[0], func, args, kwargs or {}, outputs))
        return out

    def at(self, rate: str) -> Work:
        """All work as one operator's, for which only what is done at ``rate`` is no pass beside it."""
        mine, others = ([w for w in self.noted if (w.rate == rate) == wanted] for wanted in (True, False))
        passed = sum(w.passed for w in self.noted) + sum(w.moved for w in others)
        return Work(rate, sum(w.flops for w in mine), sum(w.moved for w in mine), passed)
