"""Dispatch and combine over DeepEP in two parts, as in ``backends/in_parts.py``; each has its own event."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ....ops.combine import COMBINE
from ....ops.core.derive import Tensors
from ....ops.core.primitive import Operator
from ....ops.dispatch import DISPATCH, check_ids, layout_fake, layout_kernel
from ..bounds import laid_out
from ..in_parts import NOT_IN_HALVES, beside, catch_up, part, part_of_several, taken, ticket
from .adapter import PAYLOADS
from .buffers import find
from .handle import SENT, pack, sent_fake, unpack
from .operators import check_alike


class _Launched(NamedTuple):
    """A kernel of DeepEP's: its event, what it makes, and what it reads, which must not change before."""

    event: Any
    made: Callable[[], Any]
    reads: Tensors

    def wait(self) -> Any:
        if self.event is not None:
            self.event.current_stream_wait()
        return self.made()


def _here(tensors: Any) -> None:
    """Memory of the other stream is used on this one."""
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.is_cuda:
            t.record_stream(torch.cuda.current_stream(t.device))


def _private(t: torch.Tensor, compiled: bool) -> torch.Tensor:
    """Compiled code uses memory again that is still being sent."""
    return t.clone(memory_format=torch.contiguous_format) if compiled else t.contiguous()


def _tickets_fake(x: Any, weights: Any, *others: Any) -> Tensors:
    return x.new_empty(0, x.shape[1]), weights.new_empty(0, weights.shape[1])


# ---- rows alone: the way of a combine, and back ---------------------------------------------------------


def _begin_back_kernel(y: torch.Tensor, compiled: bool, buffer: str, *sent: torch.Tensor) -> torch.Tensor:
    y, engine = _private(y, compiled), find(buffer).engine
    rows, _ = engine.combine(y, unpack(sent), wait=False)
    return ticket(y, _Launched(engine.latest, lambda: rows, (y, *sent)))


def _begin_send_kernel(x: torch.Tensor, compiled: bool, buffer: str, *sent: torch.Tensor) -> torch.Tensor:
    x, engine = _private(x, compiled), find(buffer).engine
    made = engine.send(x, unpack(sent), wait=False)
    return ticket(x, _Launched(engine.latest, made, (x, *sent)))


def _one_fake(rows: Any, *others: Any) -> Any:
    return rows.new_empty(0, rows.shape[1])


# y (S, D) -> the ticket of these rows on their way back, and that -> each token's rows, summed (T, D).
deepep_begin_back: Operator = part(
    f"deepep_begin_back(Tensor y, bool compiled, str buffer, {SENT}) -> Tensor",
    _begin_back_kernel,
    _one_fake,
    COMBINE,
    lambda g, rows, _, buffer, *sent: deepep_end_send(g, rows, buffer, *sent),
)

deepep_end_back: Operator = part(
    f"deepep_end_back(Tensor ticket, str buffer, {SENT}) -> Tensor",
    lambda ticket, *others: taken(ticket).wait(),
    lambda ticket, buffer, *sent: ticket.new_empty(sent[0].shape[0], ticket.shape[1]),
    COMBINE,
    lambda g, _, buffer, *sent: deepep_begin_send(g, torch.compiler.is_compiling(), buffer, *sent),
)

# x (T, D) -> the ticket of these rows on the way of a dispatch, and that -> those that came (S, D).
deepep_begin_send: Operator = part(
    f"deepep_begin_send(Tensor x, bool compiled, str buffer, {SENT}) -> Tensor",
    _begin_send_kernel,
    _one_fake,
    DISPATCH,
    lambda g, rows, _, buffer, *sent: deepep_end_back(g, buffer, *sent),
)

deepep_end_send: Operator = part(
    f"deepep_end_send(Tensor ticket, SymInt rows, str buffer, {SENT}) -> Tensor",
    lambda ticket, *others: taken(ticket).wait(),
    lambda ticket, rows, *others: ticket.new_empty(rows, ticket.shape[1]),
    DISPATCH,
    lambda g, _, rows, buffer, *sent: deepep_begin_back(g, torch.compiler.is_compiling(), buffer, *sent),
)


# ---- rows with their weights: a dispatch, and back -------------------------------------------------------


def _pack_kernel(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, compiled: bool, buffer: str
) -> Tensors:
    rows = tuple(_private(t, compiled) for t in (x, weights, ids))
    for t in rows:
        catch_up(t)
    return ticket(x, rows), weights.new_empty(0, weights.shape[1])


def _post_kernel(
    packed: Any, num_experts: int, size: int, narrow: bool, max_tokens: int, buffer: str
) -> torch.Tensor:
    (x, weights, ids), held = taken(packed), find(buffer)
    check_ids(ids, num_experts)
    if size > 1:
        check_alike(held, x, ids, narrow, max_tokens)
    with beside(x):
        engine = held.ready(x, ids, num_experts, max_tokens)
        own_ids = ids.to(engine.id_dtype).contiguous()
        made = engine.dispatch(x, weights, own_ids, num_experts, max_tokens, wait=False, narrow=narrow)
    launched = _Launched(engine.latest, made, (x, weights, ids, own_ids))
    return ticket(packed.new_empty(0, dtype=torch.uint8), launched)


def _end_dispatch_kernel(
    packed: Any, beside: Any, posted: Any, held: int, rows: int, pairs: int, compiled: bool, buffer: str
) -> Tensors:
    came = taken(posted).wait()
    _here((came.x_SD, came.weights_SK, came.ids_SK, *came.handle.tensors))
    local_SK = came.ids_SK.to(torch.int64)
    if pairs < 0:
        laid = *layout_kernel(local_SK, held, came.num_pairs), local_SK.new_zeros(())
    else:
        laid = laid_out(local_SK, held, pairs)
    weights_SK = came.weights_SK.masked_fill(local_SK < 0, 0)  # ElasticBuffer sends all of them
    return came.x_SD, weights_SK, *laid, *pack(came.handle)


def _end_dispatch_fake(
    packed: Any, beside: Any, posted: Any, held: int, rows: Any, pairs: Any, compiled: bool, buffer: str
) -> Tensors:
    dynamic = torch.library.get_ctx().new_dynamic_size
    rows, pairs = (rows, pairs) if isinstance(rows, int) and rows > 0 else (dynamic(), dynamic())
    x_SD, weights_SK = packed.new_empty(rows, packed.shape[1]), beside.new_empty(rows, beside.shape[1])
    ids_SK = weights_SK.new_empty(weights_SK.shape, dtype=torch.int64)
    laid = *layout_fake(ids_SK, held, pairs), ids_SK.new_empty(())
    return x_SD, weights_SK, *laid, *sent_fake(packed, dynamic(), dynamic)


class _Way(NamedTuple):
    """The residuals of a dispatch."""

    row_SK: torch.Tensor
    dim: int
    compiled: bool
    buffer: str
    sent: Tensors


def _end_dispatch_vjp(way: _Way, needs: Any, g_x: Any, g_weights: Any, *_: Any) -> Any:
    like = g_x if g_weights is None else g_weights
    if g_weights is None:
        g_weights = like.new_zeros(way.row_SK.shape, dtype=torch.float32)
    if g_x is None:
        g_x = like.new_zeros(way.row_SK.shape[0], way.dim, dtype=PAYLOADS[0])
    return deepep_begin_both_back(g_x, g_weights, way.row_SK, way.compiled, way.buffer, *way.sent)


def _begin_both_back_kernel(
    y: torch.Tensor, weights: torch.Tensor, row_SK: torch.Tensor, compiled: bool, buffer: str, *sent: Any
) -> Tensors:
    y, engine = _private(y, compiled), find(buffer).engine
    here = weights.masked_fill(row_SK < 0, 0).contiguous()
    both = engine.combine(y, unpack(sent), here, wait=False)
    launched = _Launched(engine.latest, lambda: both, (y, here, *sent))
    return ticket(y, launched), weights.new_empty(0, weights.shape[1])


# x (T, D), weights (T, K) and ids (T, K) -> tickets of the first two, which haven't left.
deepep_pack: Operator = part_of_several(
    "deepep_pack(Tensor x, Tensor weights, Tensor ids, bool compiled, str buffer) -> (Tensor, Tensor)",
    _pack_kernel,
    _tickets_fake,
    DISPATCH,
    residuals=lambda inputs, outputs: (inputs[0].shape[0],),
    vjp=lambda kept, needs, g_x, g_weights: deepep_end_both_back(g_x, g_weights, *kept),
)

# The first of them -> the ticket of the same rows when they have left.
deepep_post: Operator = part(
    "deepep_post(Tensor packed, SymInt num_experts, int size, bool narrow, SymInt max_tokens, str buffer) "
    "-> Tensor",
    _post_kernel,
    lambda packed, *others: packed.new_empty(0, dtype=torch.uint8),
    DISPATCH,
)

# All three -> what deepep_dispatch gives, with how many pairs had no room before the handle. With a bound,
# ``rows`` and ``pairs`` are what there is room for; else 0 and -1.
deepep_end_dispatch: Operator = part_of_several(
    "deepep_end_dispatch(Tensor packed, Tensor beside, Tensor posted, SymInt held, SymInt rows, "
    f"SymInt pairs, bool compiled, str buffer) -> ({', '.join(['Tensor'] * (7 + SENT.count(',')))})",
    _end_dispatch_kernel,
    _end_dispatch_fake,
    DISPATCH,
    residuals=lambda inputs, outputs: _Way(
        outputs[3], outputs[0].shape[1], inputs[-2], inputs[-1], tuple(outputs[6:])
    ),
    vjp=_end_dispatch_vjp,
)

# Their cotangents (S, D), (S, K) -> tickets, and these -> (T, D), (T, K).
deepep_begin_both_back: Operator = part_of_several(
    f"deepep_begin_both_back(Tensor y, Tensor weights, Tensor row, bool compiled, str buffer, {SENT}) "
    "-> (Tensor, Tensor)",
    _begin_both_back_kernel,
    _tickets_fake,
    COMBINE,
    vjp=NOT_IN_HALVES,
)

deepep_end_both_back: Operator = part_of_several(
    "deepep_end_both_back(Tensor ticket, Tensor beside, SymInt tokens) -> (Tensor, Tensor)",
    lambda ticket, beside, tokens: taken(ticket).wait(),
    lambda ticket, beside, tokens: tuple(t.new_empty(tokens, t.shape[1]) for t in (ticket, beside)),
    COMBINE,
    vjp=NOT_IN_HALVES,
)
