"""The operators of the DeepEP backend: dispatch, combine, and what their derivatives are made of."""

from typing import Any

import torch

from ....ops.bases import random, total
from ....ops.combine import COMBINE
from ....ops.core.derive import Dims, Tensors
from ....ops.core.primitive import Operator, declare
from ....ops.core.refuse import ALL_MOVE
from ....ops.core.tape import checkpoint
from ....ops.dispatch import DISPATCH, check_ids, layout_kernel, layout_plain, received_fake
from .buffers import alone, find
from .handle import PARTS, SENT, pack, sent_example, sent_fake, unpack

JOIN = checkpoint("join", save=False)

# ---- kernels ------------------------------------------------------------------------------------------


def _dispatch_kernel(x: Any, weights: Any, ids: Any, num_experts: int, size: int, buffer: str) -> Tensors:
    check_ids(ids, num_experts)
    engine = find(buffer).ready(x, ids, num_experts)
    came = engine.dispatch(
        x.contiguous(), weights.contiguous(), ids.to(engine.id_dtype).contiguous(), num_experts
    )
    local_SK = came.ids_SK.to(torch.int64)
    slot_R, row_SK, offsets_e = layout_kernel(local_SK, num_experts // size, came.num_pairs)
    weights_SK = came.weights_SK.masked_fill(local_SK < 0, 0)  # ElasticBuffer sends all of them
    return came.x_SD, weights_SK, slot_R, row_SK, offsets_e, *pack(came.handle)


def _dispatch_fake(x: Any, weights: Any, ids: Any, num_experts: int, size: int, buffer: str) -> Tensors:
    dynamic = torch.library.get_ctx().new_dynamic_size
    received = received_fake(x, weights, ids, num_experts // size)
    return *received, *sent_fake(x, ids.shape[0], dynamic)


def _send_kernel(x: torch.Tensor, *how: Any) -> torch.Tensor:
    *sent, _, buffer = how
    return find(buffer).engine.send(x.contiguous(), unpack(tuple(sent)))


def _send_weights_kernel(weights: torch.Tensor, row_SK: torch.Tensor, *how: Any) -> torch.Tensor:
    *sent, buffer = how
    came = find(buffer).engine.send_weights(weights, unpack(tuple(sent)))
    return came.masked_fill(row_SK < 0, 0)


def _combine_weights_kernel(weights: torch.Tensor, row_SK: torch.Tensor, *how: Any) -> torch.Tensor:
    *sent, buffer = how
    return find(buffer).engine.combine_weights(_here(weights, row_SK), unpack(tuple(sent)))


def _here(weights_SK: torch.Tensor, row_SK: torch.Tensor) -> torch.Tensor:
    return weights_SK.masked_fill(row_SK < 0, 0).contiguous()


def _combine_kernel(y: torch.Tensor, *how: Any) -> torch.Tensor:
    *sent, wait, buffer = how
    held = find(buffer)
    return held.engine.combine(y.contiguous(), unpack(tuple(sent)), wait=wait or not held.overlap)[0]


def _combine_both_kernel(y: torch.Tensor, weights: torch.Tensor, row_SK: torch.Tensor, *how: Any) -> Tensors:
    *sent, buffer = how
    return find(buffer).engine.combine(y.contiguous(), unpack(tuple(sent)), _here(weights, row_SK))


def _join_kernel(y: torch.Tensor, plus: torch.Tensor | None, *how: Any) -> torch.Tensor:
    find(how[-1]).engine.join()
    return y.clone() if plus is None else y + plus


# ---- operators ----------------------------------------------------------------------------------------


def _each(op: Any) -> Any:
    """A batch, example by example; all in one row might be a longer row than DeepEP sends."""

    def rule(size: int, dims: Dims, *inputs: Any) -> Tensors:
        found = [op().outputs(*(a if d is None else a[i] for a, d in zip(inputs, dims))) for i in range(size)]
        return tuple(map(torch.stack, zip(*found)))

    return rule


_NO_MORE = [None] * (PARTS + 1)


def _row_example() -> torch.Tensor:
    return torch.where(torch.rand(4, 2) < 0.2, -1, torch.arange(8).view(4, 2))


# x (T, D) -> (S, D), by the handle of a dispatch.
deepep_send: Operator = declare(
    f"deepep_send(Tensor x, {SENT}, SymInt rows, str buffer) -> Tensor",
    impl=_send_kernel,
    fake=lambda x, *how: x.new_empty(how[-2], x.shape[1]),
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), *sent_example(), 4, alone()),
    plain=lambda x, *how: x.clone(),
    residuals=lambda inputs, outputs: inputs[1:],
    vjp=lambda how, needs, g: (deepep_combine(g, *how[:-2], True, how[-1]), *_NO_MORE, None, None),
    jvp=lambda how, tangent, *_: deepep_send(tangent, *how),
    vmap=_each(lambda: deepep_send),
)


def _weights_operator(name: str, kernel: Any, fake: Any, checkpoint: str, transpose: Any) -> Operator:
    """One of the two that carry weights, each the other's transpose; experts elsewhere are left out."""
    op: Operator = declare(
        f"{name}(Tensor weights, Tensor row, {SENT}, str buffer) -> Tensor",
        impl=kernel,
        fake=fake,
        checkpoint=checkpoint,
        example=lambda: (random(4, 2), _row_example(), *sent_example(), alone()),
        plain=lambda weights, row, *how: torch.where(row < 0, 0, weights),
        residuals=lambda inputs, outputs: inputs[1:],
        vjp=lambda how, needs, g: (transpose()(g, *how), None, *_NO_MORE, None),
        jvp=lambda how, tangent, *_: op(tangent, *how),
        vmap=_each(lambda: op),
    )
    return op


# weights (T, K) -> (S, K), zeros for experts elsewhere.
deepep_send_weights: Operator = _weights_operator(
    "deepep_send_weights",
    _send_weights_kernel,
    lambda weights, row, *how: weights.new_empty(row.shape),
    DISPATCH,
    lambda: deepep_combine_weights,
)

# weights (S, K) -> (T, K): its transpose.
deepep_combine_weights: Operator = _weights_operator(
    "deepep_combine_weights",
    _combine_weights_kernel,
    lambda weights, row, *how: weights.new_empty(how[0].shape[0], weights.shape[1]),
    COMBINE,
    lambda: deepep_send_weights,
)

# y (S, D) -> (T, D), each token's rows summed. Without ``wait`` nothing may read it before a join.
deepep_combine: Operator = declare(
    f"deepep_combine(Tensor y, {SENT}, bool wait, str buffer) -> Tensor",
    impl=_combine_kernel,
    fake=lambda y, *how: y.new_empty(how[0].shape[0], y.shape[1]),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), *sent_example(), True, alone()),
    plain=lambda y, *how: y.clone(),
    residuals=lambda inputs, outputs: (*inputs[1 : PARTS + 2], inputs[0].shape[0], inputs[-1]),
    vjp=lambda how, needs, g: (deepep_send(g, *how), *_NO_MORE, None, None),
    jvp=lambda how, tangent, *_: deepep_combine(tangent, *how[:-2], True, how[-1]),
    vmap=_each(lambda: deepep_combine),
)

# Rows and the weights' cotangents in one message.
deepep_combine_both: Operator = declare(
    f"deepep_combine_both(Tensor y, Tensor weights, Tensor row, {SENT}, str buffer) -> (Tensor, Tensor)",
    impl=_combine_both_kernel,
    fake=lambda y, weights, row, *how: tuple(t.new_empty(how[0].shape[0], t.shape[1]) for t in (y, weights)),
    checkpoint=COMBINE,
    example=lambda: (random(4, 3), random(4, 2), _row_example(), *sent_example(), alone()),
    reference=lambda y, weights, row, *how: (
        deepep_combine(y, *how[:-1], True, how[-1]),
        deepep_combine_weights(weights, row, *how),
    ),
    vjp=lambda inputs, needs, g_y, g_weights: (
        None if g_y is None else deepep_send(g_y, *inputs[3:-1], inputs[0].shape[0], inputs[-1]),
        None if g_weights is None else deepep_send_weights(g_weights, *inputs[2:]),
        None,
        *_NO_MORE,
        None,
    ),
    vmap=_each(lambda: deepep_combine_both),
)

# y (T, D) that is on its way, and what to add to it -> (T, D). What combine still reads is an argument,
# so that nobody uses its memory again before.
deepep_join: Operator = declare(
    f"deepep_join(Tensor y, Tensor? plus, Tensor held, {SENT}, str buffer) -> Tensor",
    impl=_join_kernel,
    fake=lambda y, plus, *how: y.new_empty(y.shape),
    checkpoint=JOIN,
    example=lambda: (random(4, 3), random(4, 3), random(4, 3), *sent_example(), alone()),
    plain=lambda y, plus, *how: y.clone() if plus is None else y + plus,
    vjp=lambda how, needs, g: (g, g if needs[1] else None, None, *_NO_MORE, None),
    jvp=lambda how, t_y, t_plus, *_: total(t_y, t_plus).clone(),
    vmap=_each(lambda: deepep_join),
)


def _dispatch_plain(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *statics: Any) -> Tensors:
    """In a group of one device where every token has an expert."""
    slot, row, offsets = layout_plain(ids, statics[0], ids.numel())
    return x, torch.where(ids < 0, 0, weights), slot, row, offsets, *sent_example(x.shape[0])


def _dispatch_vjp(how: tuple[Any, ...], needs: Any, g_x: Any, g_weights: Any, *_: Any) -> tuple[Any, ...]:
    row, *sent, _, _, buffer = how
    if g_weights is None:
        found = deepep_combine(g_x, *sent, True, buffer), None
    elif g_x is None:
        found = None, deepep_combine_weights(g_weights, row, *sent, buffer)
    else:
        found = deepep_combine_both(g_x, g_weights, row, *sent, buffer)
    return *found, *[None] * 4


def _dispatch_jvp(how: tuple[Any, ...], t_x: Any, t_weights: Any, *_: Any) -> tuple[Any, ...]:
    row, *sent, (x_dtype, weights_dtype, dim), rows, buffer = how
    # PyTorch wants a tangent for each floating-point output, or for none.
    x = row.new_zeros(rows, dim, dtype=x_dtype) if t_x is None else deepep_send(t_x, *sent, rows, buffer)
    if t_weights is None:
        weights = row.new_zeros(row.shape, dtype=weights_dtype)
    else:
        weights = deepep_send_weights(t_weights, row, *sent, buffer)
    return x, weights, *[None] * (PARTS + 4)


def _dispatch_residuals(inputs: tuple[Any, ...], outputs: Tensors) -> tuple[Any, ...]:
    x, weights = outputs[:2]
    like = x.dtype, weights.dtype, x.shape[1]
    return *outputs[3:4], *outputs[5:], like, x.shape[0], inputs[-1]


# x (T, D), weights (T, K), ids (T, K) -> their rows for the experts held here (S, D), (S, K), how these lie
# by expert, as in Plan, and the handle.
deepep_dispatch: Operator = declare(
    "deepep_dispatch(Tensor x, Tensor weights, Tensor ids, SymInt num_experts, int size, str buffer) -> "
    f"({', '.join(['Tensor'] * (PARTS + 6))})",
    impl=_dispatch_kernel,
    fake=_dispatch_fake,
    checkpoint=DISPATCH,
    example=lambda: (random(4, 3), random(4, 2), torch.rand(4, 3).argsort(1)[:, :2], 3, 1, alone()),
    plain=_dispatch_plain,
    residuals=_dispatch_residuals,
    vjp=_dispatch_vjp,
    jvp=_dispatch_jvp,
    vmap=ALL_MOVE,
)
