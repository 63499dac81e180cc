"""Tokens over ``torch.distributed``'s all-to-all: gloo on CPU, NCCL on CUDA.

A token goes once to every device that holds one of its experts, with its weights and experts in the same
message. The sum over these experts comes back as one row. Letters beyond those of ``fmoe/ops``: n devices
along the axis, Q copies this device sends, S those it receives.

The host waits once a layer, for the sizes. The plan keeps them in the host's memory for combine and both
backwards. With a :class:`~fmoe.parallel.Bound` it never waits: every device sends the same number of rows to
each, some of them empty.
"""

import zlib
from typing import Any, NamedTuple

import torch

from ...ops import kernels
from ...ops.bases import gather_kernel, random
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.axes import Group
from ...ops.core.batches import wider_rows
from ...ops.core.derive import Tensors
from ...ops.core.primitive import Operator, declare, linear
from ...ops.core.refuse import ALL_MOVE
from ...ops.dispatch import DISPATCH, Plan, check_ids, layout_fake, layout_kernel, layout_plain, received_fake
from ...ops.route import Routing
from ...ops.transport import InFlight, check_experts_divide, set_default
from ..collectives import group_alone
from .bounds import Bound, agree, check_alike, laid_out
from .in_parts import (
    back,
    begin_send,
    beside,
    catch_up,
    end_post,
    end_send,
    end_send_back,
    ids_of,
    pack,
    part,
    post,
    taken,
    ticket,
    with_ids,
)
from .wire import arrived, begin_swap, process_group, swap_rows


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

    :func:`fmoe.dispatch` makes one where an axis has no other backend. With a ``bound`` no host waits.

    >>> backend = AllToAll(Group(group_alone(), 1, 0))  # for fmoe.shard_map(..., backends={"ep": backend})
    >>> backend.group.size, backend.bound is None
    (1, True)
    """

    group: Group
    bound: Bound | None = None
    in_halves: bool = False

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
        num_experts, (name, size, position) = routing.counts_E.shape[0], self.group
        check_experts_divide(num_experts, size)
        tokens = x_TD, routing.weights_TK, routing.expert_ids_TK
        before = routing.score_before_experts
        if self.bound is None:
            rows = exchange.outputs(*tokens, num_experts, size, position, before, name)
        else:
            self.bound.check(x_TD.shape[0])
            room = self.bound.room(size, routing.expert_ids_TK.shape[1], num_experts // size)
            rows = exchange_bounded.outputs(*tokens, num_experts, size, position, before, *room, name)
        x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits, *overflow = rows
        sent = Sent(slot_Q, copy_Tn, splits)
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, sent, before, self, *overflow)

    def combine(self, y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return send_back(y_SD, *plan.sent, self.group.name)

    def dispatch_start(self, x_TD: torch.Tensor, routing: Routing) -> "_Coming":
        num_experts, (name, size, _) = routing.counts_E.shape[0], self.group
        check_experts_divide(num_experts, size)
        ids_TK, before = routing.expert_ids_TK, routing.score_before_experts
        described, top_k = _described(x_TD, routing.weights_TK, before), ids_TK.shape[1]
        tokens = x_TD, with_ids(routing.weights_TK, ids_TK)
        if self.bound is None:
            slot_Q, copy_Tn, *sizes = begin_sizes(ids_TK, num_experts, size, described, name)
            begun = tuple(pack(t, slot_Q, copy_Tn, name) for t in tokens)
            more = (*sizes, described)
            return _Coming(begun, (slot_Q, copy_Tn), top_k, num_experts, before, more)
        self.bound.check(x_TD.shape[0])
        copies, _ = self.bound.room(size, top_k, num_experts // size)
        slot_Q, copy_Tn, splits, lost = bounded_way(ids_TK, num_experts, size, described, copies, name)
        sent = Sent(slot_Q, copy_Tn, splits)
        begun = tuple(begin_send(t, *sent, name) for t in tokens)
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
    return _parts(swap_rows(_message(tensors), received, sent, group, sender), tensors)


def _message(tensors: Tensors) -> torch.Tensor:
    messages = [_as_bytes(t) for t in tensors]
    return messages[0] if len(messages) == 1 else torch.cat(messages, 1)


def _parts(message: torch.Tensor, like: Tensors) -> Tensors:
    """The tensors that a message was made of."""
    parts = message.split([t.shape[1:].numel() * t.itemsize for t in like], 1)
    if len(like) > 1:  # cloned, as a view into the message may lie where its dtype can't
        parts = tuple(p.clone(memory_format=torch.contiguous_format) for p in parts)
    return tuple(part.view(t.dtype).view(-1, *t.shape[1:]) for part, t in zip(parts, like))


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    rows = t.contiguous().flatten(1)
    # Without elements, or one wide, an expanded cotangent counts as contiguous whatever its strides.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


def _described(x: torch.Tensor, weights: torch.Tensor, before: bool) -> str:
    when = "before" if before else "after"
    weighed = f"{weights.shape[1]} weights of {weights.dtype} {when} the experts"
    return f"rows of shape {tuple(x.shape[1:])} and {x.dtype} with {weighed}"


def _begin_sizes_kernel(
    ids: torch.Tensor, num_experts: int, size: int, described: str, group: str
) -> Tensors:
    """Where copies go, in room for the most of them; sizes (n, 3) from this device, and those to come."""
    check_ids(ids, num_experts)
    home_TK, hit_Tn = _homes(ids, num_experts // size, size)
    every = home_TK.flatten()  # not by bincount, which waits for the device
    pairs_n = ids.new_zeros(size + 1).scatter_add_(0, every, torch.ones_like(every))[:size]
    devices_Tn = torch.where(hit_Tn, torch.arange(size, device=ids.device), -1)
    slot_Q, copy_Tn, _ = layout_kernel(devices_Tn, size, ids.shape[0] * min(size, ids.shape[1]))
    kind = zlib.crc32(described.encode())
    out_n3, each = torch.stack([hit_Tn.sum(0), pairs_n, torch.full_like(pairs_n, kind)], 1), [1] * size
    catch_up(out_n3)
    with beside(out_n3):
        in_n3 = begin_swap(out_n3, each, each, group, "sizes")
    return slot_Q, copy_Tn, out_n3, ticket(out_n3, in_n3)


def _end_sizes_kernel(out_n3: torch.Tensor, ticket: torch.Tensor, described: str) -> Tensors:
    """Rows to and from each device (2, n), and how many pairs come; here the host waits."""
    with beside(out_n3):
        sizes = torch.stack([out_n3, arrived(taken(ticket))]).cpu()
    kind = zlib.crc32(described.encode())
    check_alike(sizes[1, :, 2].tolist(), kind, described)
    return sizes[:, :, 0].contiguous(), sizes[1, :, 1].sum()


def _exchange_kernel(
    x: Any,
    weights: Any,
    ids: torch.Tensor,
    num_experts: int,
    size: int,
    position: int,
    before: bool,
    group: str,
) -> Tensors:
    described = _described(x, weights, before)
    slot_Q, copy_Tn, out_n3, ticket = _begin_sizes_kernel(ids, num_experts, size, described, group)
    # What doesn't depend on the sizes is launched before the host waits for them.
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows = tuple(gather_kernel(t, token_Q) for t in (x, weights, ids))
    message = _message(rows)
    splits, pairs = _end_sizes_kernel(out_n3, ticket, described)
    sent, received = splits.tolist()
    came = swap_rows(message[: sum(sent)], received, sent, group, "exchange")
    x_SD, weights_SK, ids_SK = _parts(came, rows)
    held = num_experts // size
    slot_R, row_SK, offsets_e = layout_kernel(_held_here(ids_SK, position * held, held), held, int(pairs))
    return x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q[: sum(sent)].clone(), copy_Tn, splits


def _bounded_kernel(
    x: Any,
    weights: Any,
    ids: torch.Tensor,
    num_experts: int,
    size: int,
    position: int,
    before: bool,
    copies: int,
    pairs: int,
    group: str,
) -> Tensors:
    described, held = _described(x, weights, before), num_experts // size
    slot_Q, copy_Tn, splits, lost = _bounded_way_kernel(ids, num_experts, size, described, copies, group)
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows = tuple(gather_kernel(t, token_Q) for t in (x, weights, ids + 1))  # ids of 0 in empty rows
    each = [copies] * size
    x_SD, weights_SK, ids_SK = _exchange_rows(rows, each, each, group, "exchange_bounded")
    laid = _layout_bounded_kernel(ids_SK, lost, position * held + 1, held, pairs)
    return x_SD, weights_SK, *laid[:3], slot_Q, copy_Tn, splits, laid[3]


def _bounded_way_kernel(
    ids: torch.Tensor, num_experts: int, size: int, described: str, copies: int, group: str
) -> Tensors:
    """Where copies go, as in Sent, and how many have no room."""
    check_ids(ids, num_experts)
    if size > 1:
        agree(process_group(group), f"{described}, {copies} to each device")
    slot_Q, copy_Tn, lost_n = ways(ids, size, num_experts // size, copies)
    return slot_Q, copy_Tn, torch.full((2, size), copies, device="cpu"), lost_n


def ways(ids: torch.Tensor, size: int, held: int, copies: int) -> Tensors:
    """The pair (token, device) of each row, the row of each pair, and how many found no room, by device."""
    if kernels.installed() and ids.is_cuda:
        from ...ops.kernels import plan

        return plan.ways(ids, size, held, copies)
    hit_Tn = _homes(ids, held, size)[1]
    place_Tn = hit_Tn.cumsum(0) - 1
    fits_Tn = hit_Tn & (place_Tn < copies)
    copy_Tn = torch.where(fits_Tn, place_Tn + torch.arange(size, device=ids.device) * copies, -1)
    # The inverse. One row more than there is room for takes what isn't sent.
    slot_Q, slots = ids.new_full((size * copies + 1,), -1), torch.arange(hit_Tn.numel(), device=ids.device)
    slot_Q.scatter_(0, torch.where(fits_Tn, copy_Tn, size * copies).flatten(), slots)
    return slot_Q[:-1].clone(), copy_Tn, (hit_Tn & ~fits_Tn).sum(0)


def _layout_bounded_kernel(ids_SK: Any, lost: torch.Tensor, first: int, held: int, pairs: int) -> Tensors:
    slot_R, row_SK, offsets_e, overflow = laid_out(_held_here(ids_SK, first, held), held, pairs)
    return slot_R, row_SK, offsets_e, overflow + lost.sum()


def _homes(ids: torch.Tensor, held: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The device of every pair, ``size`` for none, and whether a token goes to a device (T, n)."""
    home_TK = torch.where(ids < 0, size, torch.div(ids, held, rounding_mode="floor"))
    hit_Tn = ids.new_zeros(ids.shape[0], size + 1, dtype=torch.bool).scatter_(1, home_TK, True)
    return home_TK, hit_Tn[:, :size]


def _held_here(ids_SK: torch.Tensor, first: int, held: int) -> torch.Tensor:
    """Ids from ``first`` on as those of the experts held here. Others are below 0, or lie past them."""
    local_SK = ids_SK - first
    if kernels.installed() and ids_SK.is_cuda:
        return local_SK  # the kernel of the layout drops ids of no expert
    return torch.where((local_SK >= 0) & (local_SK < held), local_SK, -1)


def _exchange_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *group: Any) -> Tensors:
    return (
        *received_fake(x, weights, ids, num_experts // size),
        ids.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
        ids.new_empty(ids.shape[0], size, dtype=torch.int64),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
    )


def _bounded_fake(
    x: Any, weights: Any, ids: Any, num_experts: int, size: int, position: int, before: bool, *room: Any
) -> Tensors:
    copies, pairs, _ = room
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
    token_Q = torch.div(slot_Q, copy_Tn.shape[1], rounding_mode="floor")
    return _exchange_rows((gather_kernel(x, token_Q),), received, sent, group, "send")[0]


def _send_back_kernel(
    y: torch.Tensor, slot_Q: torch.Tensor, copy_Tn: torch.Tensor, splits: torch.Tensor, group: str
) -> torch.Tensor:
    sent, received = splits.tolist()
    (came,) = _exchange_rows((y,), sent, received, group, "send_back")
    summed = weighted_sum_kernel(came.flatten(1), None, slot_Q, copy_Tn)
    return summed.view(copy_Tn.shape[0], *y.shape[1:])


def _send_both_back_kernel(
    y: torch.Tensor, weights: torch.Tensor, slot_Q: Any, copy_Tn: Any, splits: torch.Tensor, group: str
) -> Tensors:
    sent, received = splits.tolist()
    came = _exchange_rows((y, weights), sent, received, group, "send_both_back")
    return tuple(weighted_sum_kernel(c, None, slot_Q, copy_Tn) for c in came)


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
# these lie by expert, as in Plan, and how they were sent, as in Sent.
exchange: Operator = declare(
    "exchange(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, int position, bool before, "
    "str group) "
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
    num_experts, pairs = statics[0], statics[5]
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
    "bool before, SymInt copies, SymInt pairs, str group) "
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

# ---- the same in parts: ids (T, K) -> where copies go, and sizes there and back ---------------------------

begin_sizes: Operator = part(
    "begin_sizes(Tensor ids, SymInt num_experts, int size, str described, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _begin_sizes_kernel,
    lambda ids, num_experts, size, *others: (
        ids.new_empty(ids.shape[0] * min(size, ids.shape[1])),
        ids.new_empty(ids.shape[0], size),
        ids.new_empty(size, 3),
        ids.new_empty(0, 3),
    ),
    DISPATCH,
)

end_sizes: Operator = part(
    "end_sizes(Tensor out, Tensor ticket, str described) -> (Tensor, Tensor)",
    _end_sizes_kernel,
    lambda out, *others: tuple(
        torch.empty(shape, dtype=torch.int64, device="cpu") for shape in ((2, out.shape[0]), ())
    ),
    DISPATCH,
)

layout_posted: Operator = part(
    "layout_posted(Tensor ids, Tensor pairs, SymInt first, SymInt held) -> (Tensor, Tensor, Tensor)",
    lambda ids, pairs, first, held: layout_kernel(_held_here(ids, first, held), held, int(pairs)),
    lambda ids, pairs, first, held: layout_fake(ids, held, torch.library.get_ctx().new_dynamic_size()),
    DISPATCH,
)

bounded_way: Operator = part(
    "bounded_way(Tensor ids, SymInt num_experts, int size, str described, SymInt copies, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bounded_way_kernel,
    lambda ids, num_experts, size, described, copies, group: (
        ids.new_empty(size * copies),
        ids.new_empty(ids.shape[0], size),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
        ids.new_empty(size),
    ),
    DISPATCH,
)

layout_bounded: Operator = part(
    "layout_bounded(Tensor ids, Tensor lost, SymInt first, SymInt held, SymInt pairs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _layout_bounded_kernel,
    lambda ids, lost, first, held, pairs: (*layout_fake(ids, held, pairs), ids.new_empty(())),
    DISPATCH,
)

set_default(AllToAll)
