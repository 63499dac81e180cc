"""Tokens over ``torch.distributed``'s all-to-all: gloo on CPU, NCCL on CUDA.

A token goes once to every device that holds an expert of its, with its weights and experts in the same
message; what these experts make of it is summed there and comes back as one row. Letters beyond those of
``fmoe/ops``: n devices along the axis, Q copies this device sends, S those it receives.

The sizes are the only thing the host waits for, once a layer: they come back with the plan, in the host's
memory, for combine and both backwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...ops.bases import gather_kernel, random
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.axes import Group
from ...ops.core.derive import Dims, Tensors
from ...ops.core.primitive import Fold, Operator, declare
from ...ops.core.refuse import ALL_MOVE
from ...ops.dispatch import DISPATCH, Plan, check_ids, layout_kernel, layout_plain, received_fake
from ...ops.route import Routing
from ...ops.transport import InFlight, check_experts_divide, set_default
from ..collectives import group_alone
from .wire import swap_rows


class AllToAll(NamedTuple):
    """The all-to-all backend on the devices of one group: a :class:`~fmoe.ops.transport.Transport`.

    :func:`fmoe.dispatch` makes one where an axis has no other backend.

    >>> backend = AllToAll(Group(group_alone(), 1, 0))  # for fmoe.shard_map(..., backends={"ep": backend})
    >>> backend.group.size
    1
    """

    group: Group

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
        num_experts, (name, size, position) = routing.counts_E.shape[0], self.group
        check_experts_divide(num_experts, size)
        x_SD, weights_SK, slot_R, row_SK, offsets_e, *sent = exchange.outputs(
            x_TD, routing.weights_TK, routing.expert_ids_TK, num_experts, size, position, name
        )
        score_before = routing.score_before_experts
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, tuple(sent), score_before, self)

    def combine(self, y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return send_back(y_SD, *plan.sent, self.group.name)

    def combine_start(self, y_SD: torch.Tensor, plan: Plan) -> InFlight:
        return InFlight(self.combine(y_SD, plan))

    def join(self, coming: InFlight, plan: Plan, plus: torch.Tensor | None) -> torch.Tensor:
        return coming.y_TD if plus is None else coming.y_TD + plus


def rows_sent(plan: Plan) -> torch.Tensor:
    """How many rows this device sent to each device of the axis, itself included: int64 (n,), on the host."""
    return plan.sent[-1][0]


# ---- kernels -----------------------------------------------------------------------------------


def _exchange_rows(
    tensors: Tensors, received: list[int], sent: list[int], group: str, sender: str
) -> Tensors:
    """Rows of several tensors as one message: row ``i`` of each goes where ``sent`` says."""
    messages = [_as_bytes(t) for t in tensors]
    widths = [m.shape[1] for m in messages]
    whole = messages[0] if len(messages) == 1 else torch.cat(messages, 1)
    came = swap_rows(whole, received, sent, group, sender)
    # Cloned, as a view into the message may lie where its dtype can't.
    parts = (
        [p.clone(memory_format=torch.contiguous_format) for p in came.split(widths, 1)]
        if messages[1:]
        else [came]
    )
    return tuple(part.view(t.dtype).view(-1, *t.shape[1:]) for part, t in zip(parts, tensors))


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    rows = t.contiguous().flatten(1)
    # Without elements, or one wide, an expanded cotangent counts as contiguous whatever its strides.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


def _exchange_kernel(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    num_experts: int,
    size: int,
    position: int,
    group: str,
) -> Tensors:
    check_ids(ids, num_experts)
    held, (num_tokens, top_k) = num_experts // size, ids.shape
    home_TK = torch.where(ids < 0, size, torch.div(ids, held, rounding_mode="floor"))
    every = home_TK.reshape(-1)  # not by bincount, which waits for the device
    pairs_n = ids.new_zeros(size + 1).scatter_add_(0, every, torch.ones_like(every))[:size]
    hit_Tn = ids.new_zeros(num_tokens, size + 1, dtype=torch.bool).scatter_(1, home_TK, True)[:, :size]
    devices_Tn = torch.where(hit_Tn, torch.arange(size, device=ids.device), -1)
    slot_Q, copy_Tn, _ = layout_kernel(devices_Tn, size, num_tokens * min(size, top_k))

    out_n2 = torch.stack([hit_Tn.sum(0), pairs_n], 1)
    each = [1] * size
    in_n2 = swap_rows(out_n2, each, each, group, "sizes")
    sizes = torch.stack([out_n2, in_n2]).cpu()  # here the host waits
    splits = sizes[:, :, 0].contiguous()
    sent, received = splits.tolist()
    slot_Q = slot_Q[: sum(sent)].clone()
    token_Q = torch.div(slot_Q, size, rounding_mode="floor")
    rows = tuple(gather_kernel(t, token_Q) for t in (x, weights, ids))
    x_SD, weights_SK, ids_SK = _exchange_rows(rows, received, sent, group, "exchange")
    local_SK = ids_SK - position * held
    local_SK = torch.where((local_SK >= 0) & (local_SK < held) & (ids_SK >= 0), local_SK, -1)
    slot_R, row_SK, offsets_e = layout_kernel(local_SK, held, int(sizes[1, :, 1].sum()))
    return x_SD, weights_SK, slot_R, row_SK, offsets_e, slot_Q, copy_Tn, splits


def _exchange_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *group: Any) -> Tensors:
    return (
        *received_fake(x, weights, ids, num_experts // size),
        ids.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
        ids.new_empty(ids.shape[0], size, dtype=torch.int64),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
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


# ---- operators: the tensors after the rows are a plan's ``sent`` -----------------------------------


def _batched(op: Callable[[], Operator]) -> Callable[..., Any]:
    """The vmap rule: rows that go one way are wider rows; examples that go different ways go one by one."""

    def swap(outs: Tensors) -> Tensors:
        return tuple(o.movedim(0, 1) for o in outs)

    def rule(size: int, dims: Dims, *args: Any) -> Any:
        if all(d is None for d in dims[1:]):
            return Fold((args[0].movedim(0, 1), *args[1:]), swap, swap)
        each = ([a if d is None else a[i] for a, d in zip(args, dims)] for i in range(size))
        return (torch.stack([op()(*example) for example in each]),)

    return rule


def _sent_example() -> tuple[Any, ...]:
    """A plan's ``sent`` in a group of one device, where every token goes to it."""
    order = torch.arange(4)
    return order, order[:, None], torch.tensor([[4], [4]], device="cpu")


send: Operator = declare(
    "send(Tensor x, Tensor slot, Tensor copy, Tensor splits, SymInt rows, str group) -> Tensor",
    impl=_send_kernel,
    fake=lambda x, slot, copy, splits, rows, group: x.new_empty(rows, *x.shape[1:]),
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), *_sent_example(), 4, group_alone()),
    plain=lambda x, *how: x.clone(),
    residuals=lambda inputs, outputs: inputs[1:],
    vjp=lambda how, needs, g: (send_back(g, *how[:3], how[4]), *[None] * 5),
    jvp=lambda how, tangent, *_: send(tangent, *how),
    vmap=_batched(lambda: send),
)

send_back: Operator = declare(
    "send_back(Tensor y, Tensor slot, Tensor copy, Tensor splits, str group) -> Tensor",
    impl=_send_back_kernel,
    fake=lambda y, slot, copy, splits, group: y.new_empty(copy.shape[0], *y.shape[1:]),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), *_sent_example(), group_alone()),
    plain=lambda y, *how: y.clone(),
    residuals=lambda inputs, outputs: (*inputs[1:4], inputs[0].shape[0], inputs[4]),
    vjp=lambda how, needs, g: (send(g, *how), *[None] * 4),
    jvp=lambda how, tangent, *_: send_back(tangent, *how[:3], how[4]),
    vmap=_batched(lambda: send_back),
)


def _templates(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """Shapes and dtypes, as statics."""
    return tuple((tuple(t.shape), t.dtype) for t in tensors)


def _tangent(moved: torch.Tensor | None, template: Any, slot: torch.Tensor) -> torch.Tensor:
    """Zeros where there is none: PyTorch takes ``None`` for integers only."""
    shape, dtype = template
    return torch.zeros(shape, dtype=dtype, device=slot.device) if moved is None else moved


def _both_jvp(how: tuple[Any, ...], *tangents: Any) -> Tensors:
    *sent, _, group, templates = how
    moved = (None if t is None else send_back(t, *sent, group) for t in tangents[:2])
    return tuple(_tangent(t, template, sent[0]) for t, template in zip(moved, templates))


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
    reference=lambda y, weights, *how: (send_back(y, *how), send_back(weights, *how)),
    residuals=lambda inputs, outputs: (*inputs[2:5], inputs[0].shape[0], inputs[5], _templates(*outputs)),
    vjp=lambda how, needs, *gs: (*(None if g is None else send(g, *how[:5]) for g in gs), *[None] * 4),
    jvp=_both_jvp,
)


def _exchange_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """In a group of one device every token goes to it, if it has an expert, as those of the example have."""
    num_experts = statics[0]
    slot, row, offsets = layout_plain(ids, num_experts, ids.numel())
    return x, weights, slot, row, offsets, *_sent_example()


def _exchange_vjp(how: tuple[Any, ...], needs: Any, g_x: Any, g_weights: Any, *_: Any) -> tuple[Any, ...]:
    *sent, _, group, _ = how
    if g_weights is None or g_x is None:
        found = (None if g is None else send_back(g, *sent, group) for g in (g_x, g_weights))
    else:
        found = send_both_back(g_x, g_weights, *sent, group)
    return *found, *[None] * 5


def _exchange_jvp(how: tuple[Any, ...], *tangents: Any) -> tuple[Any, ...]:
    moved = (None if t is None else send(t, *how[:5]) for t in tangents[:2])
    return *(_tangent(t, template, how[0]) for t, template in zip(moved, how[5])), *[None] * 6


# x (T, D), weights (T, K), ids (T, K) -> their rows for the experts held here (S, D), (S, K), how these lie
# by expert, as in Plan, and how they were sent: the (token, device) pair ``t * n + d`` of every copy (Q,),
# the copy of every such pair (T, n) or -1, and rows sent to and received from each device (2, n) on the host.
exchange: Operator = declare(
    "exchange(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, int position, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_exchange_kernel,
    fake=_exchange_fake,
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), random(4, 2), torch.rand(4, 3).argsort(1)[:, :2], 3, 1, 0, group_alone()),
    plain=_exchange_plain,
    residuals=lambda inputs, outputs: (
        *outputs[5:8],
        outputs[0].shape[0],
        inputs[6],
        _templates(*outputs[:2]),
    ),
    vjp=_exchange_vjp,
    jvp=_exchange_jvp,
    vmap=ALL_MOVE,
)

set_default(AllToAll)
