"""A dry run on fake tensors: what is allocated when, and what is sent.

The library's own functions run, so what they keep, free and send follows from them. This file states only
what a kernel on CUDA holds while it runs.
"""

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import optree
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import update
from ..ops.core.compress import COMPRESS_OP
from ..ops.core.dtypes import accumulator
from ..ops.cross_entropy import block_columns, block_rows
from ..ops.kernels import scaled
from ..ops.precision import FAST, of_weight_gradient
from ..parallel.backends.payload import token_bytes

GRANULE = 512  # CUDA's allocator rounds sizes up to this
CUBLAS = 2 * 32 * 2**20  # its workspace on Hopper, for both threads that launch: forward, backward

GATHERS = {"fmoe::gather_params", "fmoe::begin_gather"}
COPIES = {f"aten::{name}" for name in ("clone", "_to_copy", "cat", "constant_pad_nd")}
COPIES_INTO = {"aten::copy_", "aten::_foreach_copy_"}  # their first argument


class Rows(NamedTuple):
    """Rows of one dispatch along ``ep``: those that a device sends, receives, and has for its experts."""

    sent: int
    received: int
    expanded: int


Totals = Counter[tuple[str, str]]


class Mark(NamedTuple):
    """A place of a dry run's timeline, and what was counted until then."""

    at: int
    totals: Totals


class DryRun(TorchDispatchMode):
    """Follows every storage from its first tensor to its last, and counts the bytes that each operator sends.

    ``timeline`` has the number of each storage that came or went, and which of the two it did. ``totals``
    has, by purpose, the bytes ``"sent"``, and what ``watch`` counts. ``marks`` are places, by name, in order.
    ``copies`` are storages of nothing but ``params``, gathered, cast or laid out anew. ``host``
    has the bytes of those in the host's memory, which take none of the device's. Enter it inside a
    ``FakeTensorMode``.
    """

    def __init__(self, *, rows: Rows | None = None, on_cuda: bool = True) -> None:
        super().__init__()
        self.rows, self.on_cuda = rows, on_cuda
        self.bytes_of: list[int] = []
        self.maker: list[str] = []
        self.timeline: list[tuple[int, bool]] = []
        self.totals: Totals = Counter()
        self.marks: defaultdict[str, list[Mark]] = defaultdict(list)
        self.params: set[int] = set()
        self.copies: set[int] = set()
        self.host: dict[int, int] = {}
        self.watch: Any = None  # a Stopwatch
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == "aten::equal":  # remat asks whether random numbers were drawn; none were
            return True
        if name == "fmoe::exchange" and self.rows is not None:
            out = exchanged(self.rows, *args)
        else:
            out = func(*args, **(kwargs or {}))
        outputs = [t for t in optree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        # A copy in another layout or in fp8 counts as what it copies, such as a gathered parameter.
        maker = self.maker[self.number(args[0])] if name in ("aten::clone", COMPRESS_OP) else name
        for tensor in outputs:
            self.number(tensor, name if maker == "given" else maker)
        into, source = (args[0], args[1]) if name in COPIES_INTO else (outputs, args)
        if name in GATHERS or (name in COPIES | COPIES_INTO and self._are_params(source)):
            self.copies |= self.numbers(into)
        workspaces = WORKSPACES if self.on_cuda else ON_CPU
        held = workspaces[name](args, outputs) if name in workspaces else 0
        if held > 0:
            self.timeline.append((self._new(held, name), False))
        if self.watch:
            self.watch.ran(name, func, args, kwargs or {}, outputs, held)
        if name in SENT:
            self.totals["sent", PURPOSE.get(name, "sums")] += SENT[name](args, outputs)
        return out

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the host's memory."""
        taken = self.give(tensor)
        number = self.number(taken)
        self.host[number], self.bytes_of[number] = taken.nbytes, 0
        return taken

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host's in the device's memory. Copies between them take no kernel's time."""
        watch, self.watch = self.watch, None
        try:
            return tensor.clone()
        finally:
            self.watch = watch

    def mark(self, name: str) -> Mark:
        self.marks[name].append(mark := Mark(len(self.timeline), self.totals.copy()))
        if self.watch:
            self.watch.mark(mark)
        return mark

    def number(self, tensor: torch.Tensor, maker: str = "given") -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        where = storage._cdata
        if where not in self._numbers:
            self._numbers[where] = self._new(storage.nbytes(), maker)
            weakref.finalize(storage, self._gone, where).atexit = False
        return self._numbers[where]

    def numbers(self, tree: Any) -> set[int]:
        return {self.number(t) for t in optree.tree_leaves(tree) if isinstance(t, torch.Tensor)}

    def _are_params(self, tree: Any) -> bool:
        """Whether a tree has tensors, and none but parameters and copies of them."""
        found = self.numbers(tree)
        return bool(found) and found <= self.params | self.copies

    def since(self, start: Mark, stop: Mark) -> Totals:
        """What was counted between two places."""
        return stop.totals - start.totals

    def alive(self, at: int) -> set[int]:
        """The storages that exist at a place of the timeline."""
        found: set[int] = set()
        for number, came in self.timeline[:at]:
            (found.add if came else found.discard)(number)
        return found

    def size(self, numbers: Iterable[int]) -> int:
        return sum(self.bytes_of[n] for n in numbers)

    def peak(self, start: int, stop: int) -> tuple[int, int]:
        """The most bytes between two places of the timeline, and where that is."""
        live = self.size(self.alive(start))
        most, where = live, start
        for at, (number, came) in enumerate(self.timeline[start:stop], start):
            live += self.bytes_of[number] if came else -self.bytes_of[number]
            if live > most:
                most, where = live, at + 1
        return most, where

    def _new(self, nbytes: int, maker: str) -> int:
        number = len(self.maker)
        self.bytes_of.append(-(-nbytes // GRANULE) * GRANULE if self.on_cuda else nbytes)
        self.maker.append(maker)
        self.timeline.append((number, True))
        return number

    def _gone(self, where: int) -> None:
        self.timeline.append((self._numbers.pop(where), False))


def exchanged(rows: Rows, x: Any, weights: Any, ids: Any, num_experts: int, size: int, *_: Any) -> Any:
    """The outputs of the operator ``exchange`` for these rows."""
    index = ids.new_empty
    return (
        x.new_empty(rows.received, x.shape[1]),
        weights.new_empty(rows.received, weights.shape[1]),
        index(rows.expanded),
        index(rows.received, ids.shape[1]),
        index(num_experts // size, dtype=torch.int32),
        index(rows.sent),
        index(ids.shape[0], size),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
    )


# ---- bytes that kernels on CUDA hold beyond arguments and results ------------------------------------------


class _Experts(NamedTuple):
    """Sizes of an experts' operator, and the bytes of its operands in fp8: numbers, and float32 scales.

    ``w_rows`` are weights scaled by their last dimension, ``w_columns`` by the other. ``x_columns`` are of
    dimension D, and ``h_columns`` of F, for sums over rows, of which each expert's begin at a multiple.
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


def _up_of(x: Any, w_in: Any, *others: Any) -> _Experts:
    return _of_experts(w_in, others[1].shape[0], x.shape[0], others, up=True)


def _down_of(h: Any, w_out: Any, *others: Any) -> _Experts:
    return _of_experts(w_out, h.shape[0], others[0].shape[0], others, up=False)


def _experts_up(args: Any, outs: Any) -> int:
    e = _up_of(*args)
    wide = e.rows * e.dim
    if e.fp8:
        return wide + 4 * e.rows + e.weights + e.score_before * e.size * wide
    return wide * e.size  # the expanded rows


def _experts_up_backward_inputs(args: Any, outs: Any) -> int:
    """Cotangents of expanded rows, before they are summed; in fp8 beside what they are the product of."""
    e = _up_of(*args[1:])
    wide = e.size * e.rows * e.dim
    factors = 2 * e.rows * e.hidden + 4 * e.rows + e.weights
    return max(wide, wide + factors - e.size * e.tokens * e.dim) if e.fp8 else wide


def _experts_up_backward_weight(args: Any, outs: Any) -> int:
    e = _up_of(*args[1:])
    return e.x_columns + 2 * e.h_columns if e.fp8 else e.size * e.rows * e.dim


def _experts_up_backward(args: Any, outs: Any) -> int:
    e = _up_of(*args[1:])
    if not e.fp8:
        return _experts_up_backward_weight(args, outs)
    first = _experts_up_backward_inputs(args, outs) - e.size * e.weight  # whose cotangent comes later
    return max(first, _experts_up_backward_weight(args, outs))


def _experts_down(args: Any, outs: Any) -> int:
    """The activation beside unsummed rows, then these beside their sum."""
    e = _down_of(*args)
    activation = e.rows * (e.hidden + 4) + e.weights if e.fp8 else e.size * e.rows * e.hidden
    wide = e.size * e.rows * e.dim
    return wide + max(0, activation - e.size * e.tokens * e.dim)


def _experts_down_backward_inputs(args: Any, outs: Any) -> int:
    """Expanded cotangents and those of the activation, then these beside those of the pre-activation."""
    e = _down_of(*args[1:])
    wide = e.rows * (e.dim + 4) + e.weights if e.fp8 else e.size * e.rows * e.dim
    return e.size * e.rows * e.hidden + max(0, wide - 2 * e.size * e.rows * e.hidden)


def _experts_down_backward_weight(args: Any, outs: Any) -> int:
    """The activation and expanded cotangents."""
    e = _down_of(*args[1:])
    return e.x_columns + e.h_columns if e.fp8 else e.size * e.rows * (e.hidden + e.dim)


def _experts_down_backward(args: Any, outs: Any) -> int:
    e = _down_of(*args[1:])
    # The weight's comes first, before the cotangents of the pre-activation exist.
    first = _experts_down_backward_weight(args, outs) - 2 * e.size * e.rows * e.hidden
    return max(first, _experts_down_backward_inputs(args, outs))


def _scaled_grouped_mm(args: Any, outs: Any) -> int:
    """Both operands in fp8."""
    x, w = args[:2]
    return x.numel() + 4 * x.shape[0] + w.numel() + 4 * w.shape[0] * w.shape[2]


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


def _rows(t: torch.Tensor, rows: int) -> int:
    return rows * t.shape[1:].numel() * t.element_size()


def _exchanged_row(args: Any) -> int:
    """Bytes of a token, its weights and its experts in one message."""
    x, weights, ids, *_, narrow, _ = args
    return token_bytes(x, narrow) + _rows(weights, 1) + _rows(ids, 1)


def _exchange(args: Any, outs: Any) -> int:
    sent, received = outs[5].shape[0], outs[0].shape[0]
    return (2 * sent + received) * _exchanged_row(args)


def _exchange_sent(args: Any, outs: Any) -> int:
    size, sizes_and_kind = args[4], 24
    return _others(size, outs[5].shape[0] * _exchanged_row(args)) + sizes_and_kind * (size - 1)


def _reduced(args: Any) -> int:
    """Bytes of what is summed over devices, in float32 or wider."""
    x: torch.Tensor = args[0]
    return x.numel() * accumulator(x.dtype).itemsize


def _reduce_scatter(args: Any, outs: Any) -> int:
    low = accumulator(args[0].dtype) != args[0].dtype
    return (_reduced(args) + _reduced(args) // args[1]) * low


def _as(dtype: torch.dtype, x: torch.Tensor) -> int:
    """Bytes of a tensor in another dtype."""
    return x.numel() * dtype.itemsize


def _gather_params(args: Any, outs: Any) -> int:
    x, kept, moved = args[:3]
    return _as(moved, x) * (kept != moved)


def _reduce_params(args: Any, outs: Any) -> int:
    x, kept, _, summed, size, _ = args
    return _as(summed, x) * (x.dtype != summed) + _as(summed, x) // size * (kept != summed)


def _widened(args: Any, most: int) -> int:
    """Where moments have another dtype: two of the four are widened, a piece at a time."""
    p, _, m = args[:3]
    alike = p[0].dtype == m[0].dtype
    return 0 if alike else 2 * 4 * max(min(t.numel(), most) for t in p)


WORKSPACES: dict[str, Callable[[Any, Any], int]] = {
    "fmoe::adamw_": lambda args, outs: _widened(args, update.LARGE),
    "fmoe::experts_up": _experts_up,
    "fmoe::experts_up_backward": _experts_up_backward,
    "fmoe::experts_up_backward_inputs": _experts_up_backward_inputs,
    "fmoe::experts_up_backward_weight": _experts_up_backward_weight,
    "fmoe::experts_down": _experts_down,
    "fmoe::experts_down_backward": _experts_down_backward,
    "fmoe::experts_down_backward_inputs": _experts_down_backward_inputs,
    "fmoe::experts_down_backward_weight": _experts_down_backward_weight,
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
    "fmoe::send": lambda args, outs: _rows(args[0], args[1].shape[0]),
    "fmoe::send_back": lambda args, outs: _rows(args[0], args[1].shape[0]),
    "fmoe::send_both_back": lambda args, outs: args[0].nbytes + 2 * _rows(args[0], args[2].shape[0]),
}
ON_CPU: dict[str, Callable[[Any, Any], int]] = {
    "fmoe::adamw_": lambda args, outs: _widened(args, update.PIECE)
}


# ---- bytes that a device sends: rings for collectives; tokens go evenly to all other devices --------------


PURPOSE = dict.fromkeys((f"fmoe::{n}" for n in ("exchange", "send", "send_back", "send_both_back")), "tokens")
PURPOSE |= dict.fromkeys((*GATHERS, "fmoe::reduce_params", "fmoe::begin_reduce"), "parameters")
PURPOSE["fmoe::swap"] = "pipeline"


def _others(size: int, nbytes: int) -> int:
    return nbytes * (size - 1) // size


def _along(group: str) -> int:
    """The size of a group that :class:`MeshOfSizes` named."""
    return math.prod(int(axis.partition("=")[2]) for axis in group.split(","))


def axes_along(args: Any) -> str:
    """The axes that a collective's group is along, as ``"dp,ep"``."""
    group = next(a for a in args if isinstance(a, str) and "=" in a)
    return ",".join(axis.partition("=")[0] for axis in group.split(","))


def _sent_rows(args: Any, rows: int, size: int, tensors: int) -> int:
    return _others(size, sum(_rows(t, rows) for t in args[:tensors]))


def _gathered(args: Any, outs: Any) -> int:
    """Bytes of pieces in the dtype that they are moved in."""
    return (args[4] - 1) * _as(args[2], args[0])


SENT: dict[str, Callable[[Any, Any], int]] = {
    "fmoe::psum": lambda args, outs: 2 * _others(_along(args[1]), args[0].nbytes),
    "fmoe::all_gather": lambda args, outs: (args[1] - 1) * args[0].nbytes,
    "fmoe::gather_params": _gathered,
    "fmoe::begin_gather": _gathered,
    "fmoe::reduce_params": lambda args, outs: _others(args[4], _as(args[3], args[0])),
    "fmoe::begin_reduce": lambda args, outs: _others(args[4], _as(args[3], args[0])),
    "fmoe::reduce_scatter": lambda args, outs: _others(args[1], _reduced(args)),
    "fmoe::exchange": _exchange_sent,
    "fmoe::send": lambda args, outs: _sent_rows(args, args[1].shape[0], _along(args[5]), 1),
    "fmoe::send_back": lambda args, outs: _sent_rows(args, args[0].shape[0], _along(args[4]), 1),
    "fmoe::send_both_back": lambda args, outs: _sent_rows(args, args[0].shape[0], _along(args[5]), 2),
    "fmoe::swap": lambda args, outs: args[0].nbytes,
}
