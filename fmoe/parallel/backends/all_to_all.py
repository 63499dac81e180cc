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

from ...ops.bases import gather_kernel, random
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.axes import Group
from ...ops.core.batches import wider_rows
from ...ops.core.derive import Tensors
from ...ops.core.primitive import Operator, declare, linear
from ...ops.core.refuse import ALL_MOVE
from ...ops.dispatch import DISPATCH, Plan, check_ids, layout_fake, layout_kernel, layout_plain, received_fake
from ...ops.route import Routing
from ...ops.transport import check_experts_divide, set_default
from ..collectives import group_alone
from .bounds import Bound, agree, check_alike, laid_out
from .wire import process_group, swap_rows


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


def rows_sent(plan: Plan) -> torch.Tensor:
    """The number of rows sent from here to each device of the axis, this one too: int64 (n,), on the host."""
    return plan.sent.splits[0]


# ---- kernels -----------------------------------------------------------------------------------


def _exchange_rows(
    tensors: Tensors, received: list[int], sent: list[int], group: str, sender: str
) -> Tensors:
    """Rows of several tensors as one message: row ``i`` of each goes where ``sent`` says."""
    messages = [_as_bytes(t) for t in tensors]
    whole = messages[0] if len(messages) == 1 else torch.cat(messages, 1)
    came = swap_rows(whole, received, sent, group, sender)
    parts = came.split([m.shape[1] for m in messages], 1)
    if len(messages) > 1:  # cloned, as a view into the message may lie where its dtype can't
        parts = tuple(p.clone(memory_format=torch.contiguous_format) for p in parts)
    return tuple(part.view(t.dtype).view(-1, *t.shape[1:]) for part, t in zip(parts, tensors))


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    rows = t.contiguous().flatten(1)
    # Without elements, or one wide, an expanded cotangent counts as contiguous whatever its strides.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


def _described(x: torch.Tensor, weights: torch.Tensor, before: bool) -> str:
    when = "before" if before else "after"
    weighed = f"{weights.shape[1]} weights of {weights.dtype} {when} the experts"
    return f"rows of shape {tuple(x.shape[1:])} and {x.dtype} with {weighed}"


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
    check_ids(ids, num_experts)
    held, (num_tokens, top_k) = num_experts // size, ids.shape
    home_TK, hit_Tn = _homes(ids, held, size)
    every = home_TK.flatten()  # not by bincount, which waits for the device
    pairs_n = ids.new_zeros(size + 1).scatter_add_(0, every, torch.ones_like(every))[:size]
    devices_Tn = torch.where(hit_Tn, torch.arange(size, device=ids.device), -1)
    slot_Q, copy_Tn, _ = layout_kernel(devices_Tn, size, num_tokens * min(size, top_k))

    kind = zlib.crc32((described := _described(x, weights, before)).encode())
    out_n3 = torch.stack([hit_Tn.sum(0), pairs_n, torch.full_like(pairs_n, kind)], 1)
    each = [1] * size
    in_n3 = swap_rows(out_n3, each, each, group, "sizes")
    sizes = torch.stack([out_n3, in_n3]).cpu()  # here the host waits
    check_alike(sizes[1, :, 2].tolist(), kind, described)
    splits = sizes[:, :, 0].contiguous()
    sent, received = splits.tolist()
    slot_Q = slot_Q[: sum(sent)].clone()
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows = tuple(gather_kernel(t, token_Q) for t in (x, weights, ids))
    x_SD, weights_SK, ids_SK = _exchange_rows(rows, received, sent, group, "exchange")
    local_SK = _held_here(ids_SK, position, held)
    slot_R, row_SK, offsets_e = layout_kernel(local_SK, held, int(sizes[1, :, 1].sum()))
    return x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits


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
    check_ids(ids, num_experts)
    if size > 1:
        agree(process_group(group), f"{_described(x, weights, before)}, {copies} to each device")
    held, num_slots = num_experts // size, ids.shape[0] * size
    _, hit_Tn = _homes(ids, held, size)
    place_Tn, enough = hit_Tn.cumsum(0) - 1, ids.shape[0] <= copies
    fits_Tn = hit_Tn if enough else hit_Tn & (place_Tn < copies)
    copy_Tn = torch.where(fits_Tn, place_Tn + torch.arange(size, device=ids.device) * copies, -1)
    # The inverse. One row more than there is room for takes what isn't sent.
    slot_Q, slots = ids.new_full((size * copies + 1,), -1), torch.arange(num_slots, device=ids.device)
    slot_Q.scatter_(0, torch.where(fits_Tn, copy_Tn, size * copies).flatten(), slots)
    slot_Q = slot_Q[:-1].clone()
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    ids_Q = gather_kernel(ids + 1, token_Q) - 1  # -1 in empty rows
    rows = gather_kernel(x, token_Q), gather_kernel(weights, token_Q), ids_Q
    each = [copies] * size
    x_SD, weights_SK, ids_SK = _exchange_rows(rows, each, each, group, "exchange_bounded")
    slot_R, row_SK, offsets_e, overflow = laid_out(_held_here(ids_SK, position, held), held, pairs)
    if not enough:
        overflow = overflow + (hit_Tn & ~fits_Tn).sum()
    splits = torch.full((2, size), copies, device="cpu")
    return x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits, overflow


def _homes(ids: torch.Tensor, held: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The device of every pair, ``size`` for none, and whether a token goes to a device (T, n)."""
    home_TK = torch.where(ids < 0, size, torch.div(ids, held, rounding_mode="floor"))
    hit_Tn = ids.new_zeros(ids.shape[0], size + 1, dtype=torch.bool).scatter_(1, home_TK, True)
    return home_TK, hit_Tn[:, :size]


def _held_here(ids_SK: torch.Tensor, position: int, held: int) -> torch.Tensor:
    """Ids among the experts held here, or -1."""
    local_SK = ids_SK - position * held
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

set_default(AllToAll)
