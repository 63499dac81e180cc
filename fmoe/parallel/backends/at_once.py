"""Rows over all-to-all, each way by one operator: to the devices of their experts, and back.

``in_parts.py`` has the same ways cut in two, with other work between. Letters are those of ``all_to_all.py``.
"""

from typing import Any, NamedTuple

import torch

from ...ops.bases import gather_kernel, random
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.batches import wider_rows
from ...ops.core.derive import Tensors
from ...ops.core.primitive import Operator, declare, linear
from ...ops.core.refuse import ALL_MOVE
from ...ops.dispatch import DISPATCH, layout_fake, layout_kernel, layout_plain, received_fake
from ..collectives import group_alone
from .payload import arrived_as, gathered, message, parts
from .ways import (
    begin_sizes_kernel,
    bounded_way_kernel,
    end_sizes_kernel,
    held_here,
    kind_of,
    layout_bounded_kernel,
)
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
