"""The operators of the DeepEP backend: dispatch, combine, and what their derivatives are made of."""

from typing import Any, NamedTuple

import torch

from ....ops.bases import random, total
from ....ops.combine import COMBINE
from ....ops.core.batches import each, one_by_one
from ....ops.core.derive import Tensors
from ....ops.core.primitive import Operator, declare, linear
from ....ops.core.refuse import ALL_MOVE
from ....ops.core.tape import checkpoint
from ....ops.dispatch import DISPATCH, check_ids, layout_fake, layout_kernel, layout_plain, received_fake
from ..bounds import agree, laid_out
from ..payload import described
from .buffers import alone, find
from .handle import PARTS, SENT, pack, sent_example, sent_fake, unpack

JOIN = checkpoint("join", save=False)

# ---- kernels ------------------------------------------------------------------------------------------


def check_alike(held: Any, x: torch.Tensor, ids: torch.Tensor, narrow: bool, max_tokens: int) -> None:
    """Make sure that devices send alike rows, or DeepEP would write beyond the memory of some."""
    rows = f"rows of {tuple(x.shape[1:])} and {described(x.dtype, narrow)}, {ids.shape[1]} weights"
    agree(held.group, f"{rows}, at most {max_tokens} tokens" if max_tokens else rows)


def _dispatch_kernel(
    x: Any, weights: Any, ids: Any, num_experts: int, size: int, narrow: bool, buffer: str
) -> Tensors:
    check_ids(ids, num_experts)
    held = find(buffer)
    if size > 1:
        check_alike(held, x, ids, narrow, 0)
    engine = held.ready(x, ids, num_experts)
    ids = ids.to(engine.id_dtype).contiguous()
    came = engine.dispatch(x.contiguous(), weights.contiguous(), ids, num_experts, narrow=narrow)
    local_SK = came.ids_SK.to(torch.int64)
    slot_R, row_SK, offsets_e = layout_kernel(local_SK, num_experts // size, came.num_pairs)
    weights_SK = came.weights_SK.masked_fill(local_SK < 0, 0)  # ElasticBuffer sends all of them
    return came.x_SD, weights_SK, slot_R, row_SK, offsets_e, *pack(came.handle)


def _bounded_kernel(
    x: Any, weights: Any, ids: Any, num_experts: int, size: int, narrow: bool, max_tokens: int, *others: Any
) -> Tensors:
    pairs, buffer = others
    check_ids(ids, num_experts)
    held = find(buffer)
    if size > 1:
        check_alike(held, x, ids, narrow, max_tokens)
    engine = held.ready(x, ids, num_experts, max_tokens)
    ids = ids.to(engine.id_dtype).contiguous()
    came = engine.dispatch(x.contiguous(), weights.contiguous(), ids, num_experts, max_tokens, narrow=narrow)
    local_SK = came.ids_SK.to(torch.int64)
    slot_R, row_SK, offsets_e, overflow = laid_out(local_SK, num_experts // size, pairs)
    weights_SK = came.weights_SK.masked_fill(local_SK < 0, 0)
    return came.x_SD, weights_SK, slot_R, row_SK, offsets_e, *pack(came.handle), overflow


def _bounded_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *others: Any) -> Tensors:
    _, max_tokens, pairs, _ = others
    x_SD, weights_SK, ids_SK = (t.new_empty(size * max_tokens, t.shape[1]) for t in (x, weights, ids))
    sent = sent_fake(x, ids.shape[0], torch.library.get_ctx().new_dynamic_size)
    laid = layout_fake(ids_SK, num_experts // size, pairs)
    return x_SD, weights_SK, *laid, *sent, ids.new_empty((), dtype=torch.int64)


def _dispatch_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, *others: Any) -> Tensors:
    dynamic = torch.library.get_ctx().new_dynamic_size
    received = received_fake(x, weights, ids, num_experts // size)
    return *received, *sent_fake(x, ids.shape[0], dynamic)


def _send_weights_kernel(weights: Any, row_SK: torch.Tensor, buffer: str, *sent: Any) -> torch.Tensor:
    return find(buffer).engine.send_weights(weights, unpack(sent)).masked_fill(row_SK < 0, 0)


def _here(weights_SK: torch.Tensor, row_SK: torch.Tensor) -> torch.Tensor:
    return weights_SK.masked_fill(row_SK < 0, 0).contiguous()


def _combine_kernel(y: torch.Tensor, wait: bool, buffer: str, *sent: torch.Tensor) -> torch.Tensor:
    held = find(buffer)
    return held.engine.combine(y.contiguous(), unpack(sent), wait=wait or not held.overlap)[0]


def _combine_both_kernel(y: Any, weights: Any, row_SK: Any, buffer: str, *sent: Any) -> Tensors:
    return find(buffer).engine.combine(y.contiguous(), unpack(sent), _here(weights, row_SK))


def _join_kernel(y: Any, plus: Any, held: Any, buffer: str, *sent: Any) -> torch.Tensor:
    find(buffer).engine.join()
    return _join_plain(y, plus)


def _join_plain(y: torch.Tensor, plus: torch.Tensor | None, *others: Any) -> torch.Tensor:
    return y.clone() if plus is None else y + plus


# ---- linear operators ---------------------------------------------------------------------------------
# A batch goes example by example: all in one row might be a longer row than DeepEP sends.


def _row_example() -> torch.Tensor:
    return torch.where(torch.rand(4, 2) < 0.2, -1, torch.arange(8).view(4, 2))


# x (T, D) -> (S, D), by the handle of a dispatch.
deepep_send: Operator = linear(
    f"deepep_send(Tensor x, SymInt rows, str buffer, {SENT}) -> Tensor",
    impl=lambda x, rows, buffer, *sent: find(buffer).engine.send(x.contiguous(), unpack(sent)),
    fake=lambda x, rows, *others: x.new_empty(rows, x.shape[1]),
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), 4, alone(), *sent_example()),
    plain=lambda x, *others: x.clone(),
    transpose=lambda g, shape, rows, buffer, *sent: deepep_combine(g, True, buffer, *sent),
    vmap=one_by_one,
)

# y (S, D) -> (T, D), each token's rows summed. Without ``wait`` nothing may read it before a join, so
# derivatives and batches wait.
deepep_combine: Operator = linear(
    f"deepep_combine(Tensor y, bool wait, str buffer, {SENT}) -> Tensor",
    impl=_combine_kernel,
    fake=lambda y, wait, buffer, *sent: y.new_empty(sent[0].shape[0], y.shape[1]),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), True, alone(), *sent_example()),
    plain=lambda y, *others: y.clone(),
    transpose=lambda g, shape, wait, buffer, *sent: deepep_send(g, shape[0], buffer, *sent),
    jvp=lambda tangent, wait, *others: deepep_combine(tangent, True, *others),
    vmap=lambda size, dims, y, wait, *others: each(deepep_combine.outputs, size, dims, y, True, *others),
)

# weights (T, K) -> (S, K), zeros for experts elsewhere.
deepep_send_weights: Operator = linear(
    f"deepep_send_weights(Tensor weights, Tensor row, str buffer, {SENT}) -> Tensor",
    impl=_send_weights_kernel,
    fake=lambda weights, row, *others: weights.new_empty(row.shape),
    checkpoint=DISPATCH,
    example=lambda: (random(4, 2), _row_example(), alone(), *sent_example()),
    plain=lambda weights, row, *others: torch.where(row < 0, 0, weights),
    transpose="deepep_combine_weights",
    vmap=one_by_one,
)

# weights (S, K) -> (T, K), of the experts held here.
deepep_combine_weights: Operator = linear(
    f"deepep_combine_weights(Tensor weights, Tensor row, str buffer, {SENT}) -> Tensor",
    impl=lambda weights, row, buffer, *sent: find(buffer).engine.combine_weights(
        _here(weights, row), unpack(sent)
    ),
    fake=lambda weights, row, buffer, *sent: weights.new_empty(sent[0].shape[0], weights.shape[1]),
    checkpoint=COMBINE,
    example=lambda: (random(4, 2), _row_example(), alone(), *sent_example()),
    plain=lambda weights, row, *others: torch.where(row < 0, 0, weights),
    transpose="deepep_send_weights",
    vmap=one_by_one,
)


# ---- several at once ----------------------------------------------------------------------------------


class _Way(NamedTuple):
    """The residuals of a dispatch: how its rows went, and how many came."""

    row_SK: torch.Tensor
    sent: Tensors
    rows: int
    buffer: str

    def there(self, x: Any, weights: Any) -> tuple[Any, Any]:
        """Rows and weights, or their tangents, to the experts."""
        return (
            None if x is None else deepep_send(x, self.rows, self.buffer, *self.sent),
            None if weights is None else deepep_send_weights(weights, self.row_SK, self.buffer, *self.sent),
        )

    def back(self, y: Any, weights: Any) -> tuple[Any, Any]:
        if weights is None:
            return deepep_combine(y, True, self.buffer, *self.sent), None
        if y is None:
            return None, deepep_combine_weights(weights, self.row_SK, self.buffer, *self.sent)
        return deepep_combine_both(y, weights, self.row_SK, self.buffer, *self.sent)


def _way_back(inputs: tuple[Any, ...], outputs: Tensors) -> _Way:
    y, _, row_SK, buffer, *sent = inputs
    return _Way(row_SK, tuple(sent), y.shape[0], buffer)


# Rows and the weights' cotangents in one message.
deepep_combine_both: Operator = declare(
    f"deepep_combine_both(Tensor y, Tensor weights, Tensor row, str buffer, {SENT}) -> (Tensor, Tensor)",
    impl=_combine_both_kernel,
    fake=lambda y, weights, row, buffer, *sent: tuple(
        t.new_empty(sent[0].shape[0], t.shape[1]) for t in (y, weights)
    ),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), random(4, 2), _row_example(), alone(), *sent_example()),
    reference=lambda y, weights, row, buffer, *sent: (
        deepep_combine(y, True, buffer, *sent),
        deepep_combine_weights(weights, row, buffer, *sent),
    ),
    residuals=_way_back,
    vjp=lambda way, needs, g_y, g_weights: way.there(g_y, g_weights),
    jvp=lambda way, t_y, t_weights, *_: way.back(t_y, t_weights),
    vmap=one_by_one,
)

# y (T, D) that is on its way, and what to add to it -> (T, D). What combine still reads is an argument,
# so that nobody uses its memory again before.
deepep_join: Operator = declare(
    f"deepep_join(Tensor y, Tensor? plus, Tensor held, str buffer, {SENT}) -> Tensor",
    impl=_join_kernel,
    fake=lambda y, *others: y.new_empty(y.shape),
    checkpoint=JOIN,
    example=lambda: (random(4, 3), random(4, 3), random(4, 3), alone(), *sent_example()),
    plain=_join_plain,
    residuals=lambda inputs, outputs: (),
    vjp=lambda _, needs, g: (g, g if needs[1] else None),
    jvp=lambda _, t_y, t_plus, *others: total(t_y, t_plus).clone(),
    vmap=one_by_one,
)


def _dispatch_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """In a group of one device where every token has an expert."""
    slot, row, offsets = layout_plain(ids, statics[0], ids.numel())
    return x, torch.where(ids < 0, 0, weights), slot, row, offsets, *sent_example(x.shape[0])


def _dispatch_way(inputs: tuple[Any, ...], outputs: Tensors) -> _Way:
    x_SD, _, _, row_SK, _, *sent = outputs[: 5 + PARTS + 1]
    return _Way(row_SK, tuple(sent), x_SD.shape[0], inputs[-1])


# x (T, D), weights (T, K), ids (T, K) -> their rows for the experts held here (S, D), (S, K). Then come how
# these lie by expert, as in Plan, and the handle. ``narrow`` tokens travel in fp8.
deepep_dispatch: Operator = declare(
    "deepep_dispatch(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, bool narrow, "
    f"str buffer) -> ({', '.join(['Tensor'] * (PARTS + 6))})",
    impl=_dispatch_kernel,
    fake=_dispatch_fake,
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), random(4, 2), torch.rand(4, 3).argsort(1)[:, :2], 3, 1, True, alone()),
    plain=_dispatch_plain,
    residuals=_dispatch_way,
    vjp=lambda way, needs, g_x, g_weights, *_: way.back(g_x, g_weights),
    jvp=lambda way, t_x, t_weights, *_: way.there(t_x, t_weights),
    vmap=ALL_MOVE,
)


def _bounded_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """As above, where there is room for a token more."""
    pairs = statics[4]
    padded = (torch.nn.functional.pad(t, (0, 0, 0, 1), value=v) for t, v in ((x, 0), (weights, 0), (ids, -1)))
    x, weights, ids = padded
    slot, row, offsets = layout_plain(ids, statics[0], pairs)
    return x, torch.where(ids < 0, 0, weights), slot, row, offsets, *sent_example(4, 5), ids.new_zeros(())


# The same with room for ``max_tokens`` rows from each device, and for ``pairs`` rows by expert. Last comes
# how many pairs had no room here.
deepep_dispatch_bounded: Operator = declare(
    "deepep_dispatch_bounded(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, "
    f"bool narrow, SymInt max_tokens, SymInt pairs, str buffer) -> ({', '.join(['Tensor'] * (PARTS + 7))})",
    impl=_bounded_kernel,
    fake=_bounded_fake,
    checkpoint=DISPATCH,
    example=lambda: (*deepep_dispatch.example()[:-1], 5, 10, alone()),
    plain=_bounded_plain,
    residuals=_dispatch_way,
    vjp=lambda way, needs, g_x, g_weights, *_: way.back(g_x, g_weights),
    jvp=lambda way, t_x, t_weights, *_: way.there(t_x, t_weights),
    vmap=ALL_MOVE,
)
