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

from ...ops.core.axes import Group
from ...ops.dispatch import Plan
from ...ops.route import Routing
from ...ops.transport import InFlight, check_experts_divide, set_default
from .at_once import Sent, exchange, exchange_bounded, send_back
from .bounds import Bound
from .in_parts import back, begin_send, end_post, end_send, end_send_back, ids_of, pack, post, with_ids
from .payload import narrows
from .ways import begin_sizes, bounded_way, end_sizes, kind_of, layout_bounded, layout_posted


class AllToAll(NamedTuple):
    """The all-to-all backend on the devices of one group: a :class:`~fmoe.ops.transport.Transport`.

    :func:`fmoe.dispatch` makes one where an axis has no other backend. With a ``bound`` no host waits. With a
    ``payload`` of ``"fp8"`` tokens are rounded, with a scale for each.

    >>> from fmoe.parallel.collectives import group_alone
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


set_default(AllToAll)
