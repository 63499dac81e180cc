"""Exchanges in two parts: one begins, the other waits, and something else computes in between.

Rows on their way are a *ticket*: a tensor (0, D) without elements, which stands for rows (N, D) until
somebody waits. So a ticket has the shape of its cotangent, which is the ticket of the rows that go the other
way. The derivative of waiting is to begin that exchange, and the derivative of beginning is to wait for it.
Autograd runs backward what ran forward. So what computes between the two parts does so in the backward, too.

A ticket goes from one operator to one other. A copy of it, or a sum of two, stands for nothing and raises.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import TransformError
from ...ops.combine import COMBINE, weighted_sum_kernel
from ...ops.core.primitive import Operator, declare
from ...ops.core.refuse import Unsupported
from ...ops.dispatch import DISPATCH
from ...ops.precision import E4M3
from .payload import arrived_as, gathered, message, parts
from .wire import arrived, begin_swap

NOT_IN_HALVES = Unsupported("Its exchanges can't be in flight there: leave in_halves out of the backend.")

# What tickets stand for, by their storage, until somebody waits.
_COMING: dict[StorageWeakRef, Any] = {}


def ticket(like: torch.Tensor, coming: Any) -> torch.Tensor:
    """The ticket of ``coming``, which are rows like those of ``like``."""
    for lost in [storage for storage in _COMING if storage.expired()]:  # by an error between two parts
        del _COMING[lost]
    made = like.new_empty(0, *like.shape[1:])
    _COMING[StorageWeakRef(made.untyped_storage())] = coming
    return made


def taken(ticket: torch.Tensor) -> Any:
    """What a ticket stands for, once."""
    try:
        return _COMING.pop(StorageWeakRef(ticket.untyped_storage()))
    except KeyError:
        raise RuntimeError(
            "exchange in parts: got a ticket of no rows, expected one that was begun and not yet waited for. "
            "Don't read, copy or add what dispatch_start and combine_start give."
        ) from None


def part(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    checkpoint: str,
    vjp: Callable[..., Any] | None = None,
) -> Operator:
    """Declare a part of an exchange: linear in its first argument, or without a derivative.

    ``vjp`` is a function of the cotangent, the number of rows of the first argument, and the others.
    """
    if vjp is None:
        return part_of_several(schema, impl, fake, checkpoint, jvp=None)
    return part_of_several(
        schema,
        impl,
        fake,
        checkpoint,
        residuals=lambda inputs, outputs: (inputs[0].shape[0], *inputs[1:]),
        vjp=lambda kept, needs, g: vjp(g, *kept),
    )


def part_of_several(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    checkpoint: str,
    *,
    residuals: Callable[..., Any] = lambda inputs, outputs: (),
    **rules: Any,
) -> Operator:
    """Declare a part of an exchange of several tensors, by the rules of :func:`declare`.

    The operator has one more argument, ``after``: any tensor of the part before, for a compiler that must
    leave the two in order.
    """
    arguments, _, outputs = schema.partition(") ->")
    number = arguments.count(",") + 1
    return declare(
        f"{arguments}, Tensor? after=None) ->{outputs}",
        impl=lambda *args, after=None: impl(*args[:number]),
        fake=lambda *args, after=None: fake(*args[:number]),
        checkpoint=checkpoint,
        example=None,
        residuals=lambda inputs, outputs: residuals(inputs[:-1], outputs),
        **{"jvp": NOT_IN_HALVES, "vmap": NOT_IN_HALVES} | rules,
    )


# ---- the stream of what the host waits for -------------------------------------------------------------


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def catch_up(x: torch.Tensor) -> None:
    """Make that stream wait for what the current one has so far, which made ``x``."""
    if x.is_cuda:
        _stream(x.device).wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(_stream(x.device))


def beside(x: torch.Tensor) -> AbstractContextManager[Any]:
    """On CUDA, launches go to that stream: they wait for nothing that came after :func:`catch_up`."""
    return torch.cuda.stream(_stream(x.device)) if x.is_cuda else nullcontext()


def received(ticket: torch.Tensor) -> torch.Tensor:
    """Wait for the rows of a ticket; on CUDA the current stream does, not the host."""
    rows: torch.Tensor = arrived(taken(ticket))
    if rows.is_cuda:  # its memory may be of the other stream
        rows.record_stream(torch.cuda.current_stream(rows.device))
    return rows


# ---- rows there and back: slot, copy and splits are a plan's ``sent`` ------------------------------------

_SENT = "Tensor slot, Tensor copy, Tensor splits, str group"


def _copies(x: torch.Tensor, slot_Q: torch.Tensor, copy_Tn: torch.Tensor, narrow: bool) -> torch.Tensor:
    """Rows to send: those of ``x``, or their bytes if they travel in fp8."""
    rows = gathered(x, torch.div(slot_Q, copy_Tn.shape[1], rounding_mode="floor"), narrow)
    return rows[0] if len(rows) == 1 else message(rows)


def _received_as(like: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    """Wait for rows, and make them like those of the ticket ``like``."""
    rows = received(ticket)
    if rows.dtype == like.dtype:
        return rows
    scale = like.new_empty(0, 1, dtype=torch.float32)
    return arrived_as(parts(rows, (like.new_empty(like.shape, dtype=E4M3), scale)), like.dtype)


def _begin_send_kernel(
    x: Any, slot_Q: Any, copy_Tn: Any, splits: torch.Tensor, group: str, narrow: bool
) -> torch.Tensor:
    sent, came = splits.tolist()
    rows = _copies(x, slot_Q[: sum(sent)], copy_Tn, narrow)
    return ticket(x, begin_swap(rows, came, sent, group, "begin_send"))


def _begin_send_back_kernel(
    y: Any, slot_Q: Any, copy_Tn: Any, splits: torch.Tensor, group: str, compiled: bool
) -> torch.Tensor:
    sent, came = splits.tolist()
    rows = y.clone() if compiled else y  # compiled code uses memory again that is still being sent
    return ticket(y, begin_swap(rows, sent, came, group, "begin_send_back"))


def back(y: torch.Tensor, sent: Any, group: str) -> torch.Tensor:
    return begin_send_back(y, *sent, group, torch.compiler.is_compiling())


def _end_send_back_kernel(ticket: Any, slot_Q: Any, copy_Tn: Any, splits: Any, group: str) -> torch.Tensor:
    rows = received(ticket)
    return weighted_sum_kernel(rows, None, slot_Q[: rows.shape[0]], copy_Tn)


def _rows_fake(ticket: Any, *others: Any) -> Any:
    rows = torch.library.get_ctx().new_dynamic_size() if others[-1] is None else others[-1]
    return ticket.new_empty(rows, *ticket.shape[1:])


def _ticket_fake(rows: Any, *others: Any) -> Any:
    return rows.new_empty(0, *rows.shape[1:])


def _end_send_back_vjp(
    g: torch.Tensor, none: int, slot: Any, copy: Any, splits: Any, group: str
) -> torch.Tensor:
    if splits is None:
        raise TransformError(f"end_send_back: cannot be differentiated a second time. {NOT_IN_HALVES.remedy}")
    return begin_send(g, slot, copy, splits, group, False)


# x (T, D) -> the ticket of a row for each device that holds one of the token's experts; ``narrow`` ones
# travel in fp8.
begin_send: Operator = part(
    f"begin_send(Tensor x, {_SENT}, bool narrow) -> Tensor",
    _begin_send_kernel,
    _ticket_fake,
    DISPATCH,
    lambda g, _, *sent: end_send_back(g, *sent[:-1]),
)

# That ticket -> the rows that came from all devices (S, D).
end_send: Operator = part(
    f"end_send(Tensor ticket, {_SENT}, SymInt rows) -> Tensor",
    lambda ticket, *others: _received_as(ticket, ticket),
    _rows_fake,
    DISPATCH,
    lambda g, _, *others: back(g, others[:3], others[3]),
)

# y (S, D) -> the ticket of these rows on their way back.
begin_send_back: Operator = part(
    f"begin_send_back(Tensor y, {_SENT}, bool compiled) -> Tensor",
    _begin_send_back_kernel,
    _ticket_fake,
    COMBINE,
    lambda g, rows, slot, copy, splits, group, _: end_send(g, slot, copy, splits, group, rows),
)

# That ticket -> each token's rows, summed (T, D).
end_send_back: Operator = part(
    "end_send_back(Tensor ticket, Tensor slot, Tensor copy, Tensor? splits, str group) -> Tensor",
    _end_send_back_kernel,
    lambda ticket, slot, copy, *others: ticket.new_empty(copy.shape[0], *ticket.shape[1:]),
    COMBINE,
    _end_send_back_vjp,
)

# ---- the same where the host must hear first how many rows go -------------------------------------------
#
# Whatever doesn't depend on the number is launched before: a ticket of rows that haven't left, ``pack``. Its
# derivative has that place in the order of the backward. ``post`` sends them.


def _pack_kernel(
    x: torch.Tensor, slot_Q: torch.Tensor, copy_Tn: torch.Tensor, group: str, narrow: bool
) -> torch.Tensor:
    rows = _copies(x, slot_Q, copy_Tn, narrow)
    catch_up(rows)
    return ticket(x, rows)


def _post_kernel(packed: torch.Tensor, splits: torch.Tensor, group: str) -> torch.Tensor:
    sent, came = splits.tolist()
    rows = taken(packed)[: sum(sent)]
    with beside(rows):
        posted = begin_swap(rows, came, sent, group, "post")
    return ticket(packed.new_empty(0, dtype=torch.uint8), posted)


pack: Operator = part(
    "pack(Tensor x, Tensor slot, Tensor copy, str group, bool narrow) -> Tensor",
    _pack_kernel,
    _ticket_fake,
    DISPATCH,
    lambda g, _, slot, copy, group, narrow: end_send_back(g, slot, copy, None, group),
)

post: Operator = part(
    "post(Tensor packed, Tensor splits, str group) -> Tensor",
    _post_kernel,
    lambda packed, *others: packed.new_empty(0, dtype=torch.uint8),
    DISPATCH,
)

# The ticket of rows that were packed, and that of the same rows posted -> those that came (S, D). ``rows`` is
# their number, where it is known.
end_post: Operator = part(
    f"end_post(Tensor packed, Tensor posted, {_SENT}, SymInt? rows) -> Tensor",
    lambda packed, posted, *others: _received_as(packed, posted),
    _rows_fake,
    DISPATCH,
    lambda g, _, posted, *others: back(g, others[:3], others[3]),
)


def with_ids(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weights (T, K) and, behind them, the bits of expert ids: what travels beside the tokens.

    They are those of the ids plus one, so that an empty row, which is zeros, has none.
    """
    whole = torch.int64 if weights.dtype == torch.float64 else torch.int32
    return torch.cat([weights, (ids + 1).to(whole).view(weights.dtype)], 1)


def ids_of(beside: torch.Tensor, top_k: int) -> torch.Tensor:
    """Those ids, plus one."""
    whole = torch.int64 if beside.dtype == torch.float64 else torch.int32
    return beside[:, top_k:].contiguous().view(whole).long()
