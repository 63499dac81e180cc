"""Tokens over ``torch.distributed``'s all-to-all: gloo on CPU, NCCL on CUDA.

A token goes once to every device that holds one of its experts, with its weights and experts in the same
message. The sum over these experts comes back as one row. Letters beyond those of ``fmoe/ops``: n devices
along the axis, Q copies this device sends, S those it receives.

The host waits once a layer, for the sizes. The plan keeps them in the host's memory for combine and both
backwards. With a :class:`~fmoe.parallel.Bound` it never waits: every device sends the same number of rows to
each, some of them empty.
"""

from typing import Any, NamedTuple

import torch

from ...ops.bases import gather_kernel, random
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.axes import Group
from ...ops.core.batches import wider_rows
from ...ops.core.derive import Tensors
from ...ops.core.primitive import Operator, declare, linear
from ...ops.core.refuse import ALL_MOVE
from ...ops.dispatch import DISPATCH, Plan, layout_fake, layout_kernel, layout_plain, received_fake
from ...ops.route import Routing
from ...ops.transport import InFlight, check_experts_divide, set_default
from ..collectives import group_alone
from .bounds import Bound
from .in_parts import back, begin_send, end_post, end_send, end_send_back, ids_of, pack, post, with_ids
from .payload import arrived_as, gathered, message, narrows, parts
from .ways import (
    begin_sizes,
    begin_sizes_kernel,
    bounded_way,
    bounded_way_kernel,
    end_sizes,
    end_sizes_kernel,
    held_here,
    kind_of,
    layout_bounded,
    layout_bounded_kernel,
    layout_posted,
)  # fmt: skip
from .wire import swap_rows


class Sent(NamedTuple):
    """The way that a dispatch sent rows, kept in its plan.

    ========  ======  ================================================================
    slot_Q            the (token, device) pair of every copy, ``t * n + d``
    copy_Tn           the copy of every such pair, or -1
    splits    (2, n)  rows sent to and received from each device, in the host's memory
    ========  ======  ================================================================

    A slot of -1 is an empty row, which only a dispatch with a bound sends.
    """

    slot_Q: torch.Tensor
    copy_Tn: torch.Tensor
    splits: torch.Tensor


class AllToAll(NamedTuple):
    """The all-to-all backend on the devices of one group: a :class:`~fmoe.ops.transport.Transport`.

    :func:`fmoe.dispatch` makes one where an axis has no other backend. With a ``bound`` no host waits. With a
    ``payload`` of ``"fp8"`` tokens are rounded, with a scale for each.

    >>> backend = AllToAll(Group(group_alone(), 1, 0))  # for fmoe.shard_map(..., backends={"ep": backend})
    >>> backend.group.size, backend.bound is None
    (1, True)
    """

    group: Group
    bound: Bound | None = None
    in_halves: bool = False
    payload: str | None = None

    @property
    def narrow(self) -> bool:
        return narrows("AllToAll", self.payload)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
        num_experts, (name, size, position) = routing.counts_E.shape[0], self.group
        check_experts_divide(num_experts, size)
        tokens = x_TD, routing.weights_TK, routing.expert_ids_TK
        before = routing.score_before_experts
        how = before, self.narrow
        if self.bound is None:
            rows = exchange.outputs(*tokens, num_experts, size, position, *how, name)
        else:
            self.bound.check(x_TD.shape[0])
            room = self.bound.room(size, routing.expert_ids_TK.shape[1], num_experts // size)
            rows = exchange_bounded.outputs(*tokens, num_experts, size, position, *how, *room, name)
        x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits, *overflow = rows
        sent = Sent(slot_Q, copy_Tn, splits)
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, sent, before, self, *overflow)

    def combine(self, y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return send_back(y_SD, *plan.sent, self.group.name)

    def dispatch_start(self, x_TD: torch.Tensor, routing: Routing) -> "_Coming":
        num_experts, (name, size, _) = routing.counts_E.shape[0], self.group
        check_experts_divide(num_experts, size)
        ids_TK, before = routing.expert_ids_TK, routing.score_before_experts
        described, top_k = kind_of(x_TD, routing.weights_TK, before, self.narrow), ids_TK.shape[1]
        tokens = (x_TD, self.narrow), (with_ids(routing.weights_TK, ids_TK), False)
        if self.bound is None:
            slot_Q, copy_Tn, *sizes = begin_sizes(ids_TK, num_experts, size, described, name)
            begun = tuple(pack(t, slot_Q, copy_Tn, name, narrow) for t, narrow in tokens)
            more = (*sizes, described)
            return _Coming(begun, (slot_Q, copy_Tn), top_k, num_experts, before, more)
        self.bound.check(x_TD.shape[0])
        copies, _ = self.bound.room(size, top_k, num_experts // size)
        slot_Q, copy_Tn, splits, lost = bounded_way(ids_TK, num_experts, size, described, copies, name)
        sent = Sent(slot_Q, copy_Tn, splits)
        begun = tuple(begin_send(t, *sent, name, narrow) for t, narrow in tokens)
        return _Coming(begun, sent, top_k, num_experts, before, (lost,))

    def dispatch_send(self, coming: "_Coming") -> "_Coming":
        if self.bound is not None or coming.posted:
            return coming
        (slot_Q, copy_Tn), (splits, pairs) = coming.sent, end_sizes(*coming.more)
        posted = tuple(post(ticket, splits, self.group.name) for ticket in coming.begun)
        return coming._replace(sent=Sent(slot_Q, copy_Tn, splits), more=(pairs,), posted=posted)

    def dispatch_join(self, coming: "_Coming") -> tuple[torch.Tensor, Plan]:
        coming, (name, size, position) = self.dispatch_send(coming), self.group
        held, top_k, way = coming.num_experts // size, coming.top_k, (*coming.sent, name)
        if self.bound is None:
            tokens, others = zip(coming.begun, coming.posted)
            x_SD = end_post(*tokens, *way, None)
            beside = end_post(*others, *way, x_SD.shape[0])
            slot_R, row_SK, offsets_e = layout_posted(
                ids_of(beside, top_k), *coming.more, position * held + 1, held
            )
            overflow: tuple[torch.Tensor, ...] = ()
        else:
            copies, pairs = self.bound.room(size, top_k, held)
            x_SD, beside = (end_send(begun, *way, size * copies) for begun in coming.begun)
            arrived = ids_of(beside, top_k), *coming.more, position * held + 1, held, pairs
            slot_R, row_SK, offsets_e, *overflow = layout_bounded(*arrived)
        weights_SK = beside[:, :top_k].contiguous()
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, coming.sent, coming.before, self, *overflow)

    def combine_start(self, y_SD: torch.Tensor, plan: Plan) -> InFlight:
        if not self.in_halves:
            return InFlight(self.combine(y_SD, plan))
        return InFlight(back(y_SD, plan.sent, self.group.name))

    def join(self, coming: InFlight, plan: Plan, plus: torch.Tensor | None) -> torch.Tensor:
        y_TD = end_send_back(coming.y_TD, *plan.sent, self.group.name) if self.in_halves else coming.y_TD
        return y_TD if plus is None else y_TD + plus


class _Coming(NamedTuple):
    """A dispatch that has begun: tickets of tokens and of weights with ids, and what is known of their way.

    ``more`` are the sizes that come, then the number of pairs; with a bound, how many rows had no room.
    """

    begun: tuple[torch.Tensor, ...]
    sent: Any
    top_k: int
    num_experts: int
    before: bool
    more: tuple[Any, ...]
    posted: tuple[torch.Tensor, ...] = ()


def rows_sent(plan: Plan) -> torch.Tensor:
    """The number of rows sent from here to each device of the axis, this one too: int64 (n,), on the host."""
    return plan.sent.splits[0]


# ---- kernels -----------------------------------------------------------------------------------


def _exchange_rows(
    tensors: Tensors, received: list[int], sent: list[int], group: str, sender: str
) -> Tensors:
    """Rows of several tensors as one message: row ``i`` of each goes where ``sent`` says."""
    return parts(swap_rows(message(tensors), received, sent, group, sender), tensors)


def _exchange_kernel(
    x: Any,
    weights: Any,
    ids: torch.Tensor,
    num_experts: int,
    size: int,
    position: int,
    before: bool,
    narrow: bool,
    group: str,
) -> Tensors:
    described = kind_of(x, weights, before, narrow)
    slot_Q, copy_Tn, out_n3, ticket = begin_sizes_kernel(ids, num_experts, size, described, group)
    # What doesn't depend on the sizes is launched before the host waits for them.
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows = _rows(x, weights, ids, token_Q, narrow)
    packed = message(rows)
    splits, pairs = end_sizes_kernel(out_n3, ticket, described)
    sent, received = splits.tolist()
    came = swap_rows(packed[: sum(sent)], received, sent, group, "exchange")
    *tokens, weights_SK, ids_SK = parts(came, rows)
    held = num_experts // size
    slot_R, row_SK, offsets_e = layout_kernel(held_here(ids_SK, position * held, held), held, int(pairs))
    x_SD = arrived_as(tuple(tokens), x.dtype)
    return x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits


def _rows(x: Any, weights: Any, ids: torch.Tensor, token_Q: torch.Tensor, narrow: bool) -> Tensors:
    return *gathered(x, token_Q, narrow), *(gather_kernel(t, token_Q) for t in (weights, ids))


def _bounded_kernel(
    x: Any,
    weights: Any,
    ids: torch.Tensor,
    num_experts: int,
    size: int,
    position: int,
    before: bool,
    narrow: bool,
    copies: int,
    pairs: int,
    group: str,
) -> Tensors:
    described, held = kind_of(x, weights, before, narrow), num_experts // size
    slot_Q, copy_Tn, splits, lost = bounded_way_kernel(ids, num_experts, size, described, copies, group)
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows, each = _rows(x, weights, ids + 1, token_Q, narrow), [copies] * size  # ids of 0 in empty rows
    *tokens, weights_SK, ids_SK = _exchange_rows(rows, each, each, group, "exchange_bounded")
    laid = layout_bounded_kernel(ids_SK, lost, position * held + 1, held, pairs)
    x_SD = arrived_as(tuple(tokens), x.dtype)
    return x_SD, weights_SK, *laid[:3], slot_Q, copy_Tn, splits, laid[3]


def _exchange_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *group: Any) -> Tensors:
    return (
        *received_fake(x, weights, ids, num_experts // size),
        ids.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
        ids.new_empty(ids.shape[0], size, dtype=torch.int64),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
    )


def _bounded_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *others: Any) -> Tensors:
    *_, copies, pairs, _ = others
    x_SD, weights_SK, ids_SK = (t.new_empty(size * copies, t.shape[1]) for t in (x, weights, ids))
    return (
        x_SD,
        weights_SK,
        *layout_fake(ids_SK, num_experts // size, pairs),
        ids.new_empty(size * copies),
        ids.new_empty(ids.shape[0], size),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
        ids.new_empty(()),
    )


def _send_kernel(
    x: torch.Tensor, slot_Q: torch.Tensor, copy_Tn: torch.Tensor, splits: torch.Tensor, rows: int, group: str
) -> torch.Tensor:
    sent, received = splits.tolist()
    token_Q = torch.div(slot_Q[: sum(sent)], copy_Tn.shape[1], rounding_mode="floor")
    return _exchange_rows((gather_kernel(x, token_Q),), received, sent, group, "send")[0]


def _send_back_kernel(
    y: torch.Tensor, slot_Q: torch.Tensor, copy_Tn: torch.Tensor, splits: torch.Tensor, group: str
) -> torch.Tensor:
    sent, received = splits.tolist()
    (came,) = _exchange_rows((y,), sent, received, group, "send_back")
    summed = weighted_sum_kernel(came.flatten(1), None, slot_Q[: sum(sent)], copy_Tn)
    return summed.view(copy_Tn.shape[0], *y.shape[1:])


def _send_both_back_kernel(
    y: torch.Tensor, weights: torch.Tensor, slot_Q: Any, copy_Tn: Any, splits: torch.Tensor, group: str
) -> Tensors:
    sent, received = splits.tolist()
    came = _exchange_rows((y, weights), sent, received, group, "send_both_back")
    return tuple(weighted_sum_kernel(c, None, slot_Q[: sum(sent)], copy_Tn) for c in came)


# ---- operators: slot, copy and splits are a plan's ``sent`` --------------------------------------------


def _sent_example() -> Sent:
    """In a group of one device every token goes to it."""
    order = torch.arange(4)
    return Sent(order, order[:, None], torch.tensor([[4], [4]], device="cpu"))


send: Operator = linear(
    "send(Tensor x, Tensor slot, Tensor copy, Tensor splits, SymInt rows, str group) -> Tensor",
    impl=_send_kernel,
    fake=lambda x, slot, copy, splits, rows, group: x.new_empty(rows, *x.shape[1:]),
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), *_sent_example(), 4, group_alone()),
    plain=lambda x, *others: x.clone(),
    transpose=lambda g, shape, slot, copy, splits, rows, group: send_back(g, slot, copy, splits, group),
    vmap=wider_rows,
)

send_back: Operator = linear(
    "send_back(Tensor y, Tensor slot, Tensor copy, Tensor splits, str group) -> Tensor",
    impl=_send_back_kernel,
    fake=lambda y, slot, copy, splits, group: y.new_empty(copy.shape[0], *y.shape[1:]),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), *_sent_example(), group_alone()),
    plain=lambda y, *others: y.clone(),
    transpose=lambda g, shape, slot, copy, splits, group: send(g, slot, copy, splits, shape[0], group),
    vmap=wider_rows,
)


class _Way(NamedTuple):
    """The residuals of a dispatch: how and among whom rows went, and how many came."""

    sent: Sent
    rows: int
    group: str

    def there(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else send(x, *self.sent, self.rows, self.group)

    def back(self, y: torch.Tensor | None) -> torch.Tensor | None:
        return None if y is None else send_back(y, *self.sent, self.group)


def _way_back(inputs: tuple[Any, ...], outputs: Tensors) -> _Way:
    y, _, slot, copy, splits, group = inputs
    return _Way(Sent(slot, copy, splits), y.shape[0], group)


# Both cotangents of exchange in one message.
send_both_back: Operator = declare(
    "send_both_back(Tensor y, Tensor weights, Tensor slot, Tensor copy, Tensor splits, str group) "
    "-> (Tensor, Tensor)",
    impl=_send_both_back_kernel,
    fake=lambda y, weights, slot, copy, splits, group: tuple(
        t.new_empty(copy.shape[0], *t.shape[1:]) for t in (y, weights)
    ),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), random(4, 2), *_sent_example(), group_alone()),
    reference=lambda y, weights, *way: (send_back(y, *way), send_back(weights, *way)),
    residuals=_way_back,
    vjp=lambda way, needs, g_y, g_weights: (way.there(g_y), way.there(g_weights)),
    jvp=lambda way, t_y, t_weights, *_: (way.back(t_y), way.back(t_weights)),
)


def _exchange_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """In a group of one device every token goes to it, if it has an expert, as those of the example have."""
    num_experts = statics[0]
    slot, row, offsets = layout_plain(ids, num_experts, ids.numel())
    return x, weights, slot, row, offsets, *_sent_example()


def _exchange_way(inputs: tuple[Any, ...], outputs: Tensors) -> _Way:
    return _Way(Sent(*outputs[5:8]), outputs[0].shape[0], inputs[-1])


def _exchange_vjp(way: _Way, needs: Any, g_x: Any, g_weights: Any, *_: Any) -> tuple[Any, ...]:
    if g_x is None or g_weights is None:
        return way.back(g_x), way.back(g_weights)
    return send_both_back(g_x, g_weights, *way.sent, way.group)


# x (T, D), weights (T, K), ids (T, K) -> their rows for the experts held here (S, D), (S, K). Then come how
# these lie by expert, as in Plan, and how they were sent, as in Sent. ``narrow`` tokens travel in fp8.
exchange: Operator = declare(
    "exchange(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, int position, bool before, "
    "bool narrow, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_exchange_kernel,
    fake=_exchange_fake,
    checkpoint=DISPATCH,
    example=lambda: (
        random(4, 3),
        random(4, 2),
        torch.rand(4, 3).argsort(1)[:, :2],
        3,
        1,
        0,
        False,
        bool(torch.randint(2, ())),
        group_alone(),
    ),
    plain=_exchange_plain,
    residuals=_exchange_way,
    vjp=_exchange_vjp,
    jvp=lambda way, t_x, t_weights, *_: (way.there(t_x), way.there(t_weights)),
    vmap=ALL_MOVE,
)


def _bounded_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """As above, where there is room for a row more."""
    num_experts, pairs = statics[0], statics[6]
    x, weights, ids = (
        torch.nn.functional.pad(t, (0, 0, 0, 1), value=v) for t, v in zip((x, weights, ids), (0, 0, -1))
    )
    slot, row, offsets = layout_plain(ids, num_experts, pairs)
    order = torch.arange(5)
    splits = torch.tensor([[5], [5]], device="cpu")
    return (
        x,
        weights,
        slot,
        row,
        offsets,
        torch.where(order < 4, order, -1),
        order[:4, None],
        splits,
        ids.new_zeros(()),
    )


# The same with room for ``copies`` rows from each device to each, and for ``pairs`` rows by expert. Last
# comes how many of both had no room here.
exchange_bounded: Operator = declare(
    "exchange_bounded(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, int position, "
    "bool before, bool narrow, SymInt copies, SymInt pairs, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_bounded_kernel,
    fake=_bounded_fake,
    checkpoint=DISPATCH,
    example=lambda: (*exchange.example()[:-1], 5, 10, group_alone()),
    plain=_bounded_plain,
    residuals=_exchange_way,
    vjp=_exchange_vjp,
    jvp=lambda way, t_x, t_weights, *_: (way.there(t_x), way.there(t_weights)),
    vmap=ALL_MOVE,
)

set_default(AllToAll)
