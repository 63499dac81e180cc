"""Send tokens to where their experts are, and lay them out by expert."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, check_kind
from ..tree import node, static
from . import kernels
from .bases import gather, random
from .core.axes import Axes
from .core.derive import Dims, Tensors
from .core.primitive import Operator, declare
from .core.tape import checkpoint
from .route import Routing
from .transport import transport_along

DISPATCH = checkpoint("dispatch", save=True)


@node
class Plan:
    """The origin and destination of every dispatched row; a value, made by :func:`dispatch`.

    ==========  ========================================
    weights_SK  how much each expert counts for each row; differentiable
    slot_R      int64, the (row, choice) pair each expanded row holds, ``s * K + k``; -1 for none
    row_SK      int64, the expanded row of each (row, choice) pair; -1 for an expert held elsewhere
    offsets_e   int32, where each expert's rows end, those that :func:`align_rows` adds included
    sent        tensors that the backend which moved the rows needs to move them back; () if none moved
    transport   that backend
    overflow    int64, the rows and pairs of this device that a backend with a bound had no room for: if it
                isn't 0 on all devices, no result counts; () for a backend without a bound
    ==========  ========================================

    >>> import fmoe
    >>> router = fmoe.RouterParams(torch.eye(2), torch.zeros(2))
    >>> x = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    >>> _, plan = fmoe.dispatch(x, fmoe.route(router, x, fmoe.RouterConfig(top_k=1)))
    >>> plan.slot_R, plan.row_SK.T  # expert 0 has the second token, expert 1 the first
    (tensor([1, 0]), tensor([[1, 0]]))
    """

    weights_SK: torch.Tensor
    slot_R: torch.Tensor
    row_SK: torch.Tensor
    offsets_e: torch.Tensor
    sent: Any = ()
    score_before_experts: bool = static(default=False)
    transport: Any = static(default=None)
    overflow: Any = ()


def dispatch(
    x_TD: torch.Tensor, routing: Routing, *, axis: Axes | DeviceMesh | None = None
) -> tuple[torch.Tensor, Plan]:
    """Tokens to the devices that hold their experts, and the plan that says how.

    =========  ==========  ===================================================================
    x_TD       (T, D)      tokens, any floating dtype
    routing                from :func:`route`, or made by hand; an expert id of -1 drops the pair
    axis                   what the experts are spread over, in equal parts: the name of an axis that
                           :func:`fmoe.shard_map` bound, or a mesh of one dimension, as ``mesh["ep"]`` is;
                           ``None``: all are here
    -> x_SD    (S, D)      rows for the experts held here, a token's once; where nothing moves it is ``x_TD``
    -> plan                :class:`Plan`
    =========  ==========  ===================================================================

    Differentiable in ``x_TD`` and, through ``plan.weights_SK``, in ``routing.weights_TK``.

    Raises ``ValueError`` if ``routing`` doesn't describe the rows of ``x_TD``, or its ids aren't int64, for
    an axis that isn't bound, and for experts that can't be spread over it equally.

    >>> import fmoe, torch
    >>> router = fmoe.RouterParams(torch.eye(2), torch.zeros(2))
    >>> x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    >>> routing = fmoe.route(router, x, fmoe.RouterConfig(top_k=1))
    >>> x_SD, plan = fmoe.dispatch(x, routing)
    >>> plan.slot_R, plan.offsets_e
    (tensor([0, 2, 1]), tensor([2, 3], dtype=torch.int32))
    """
    _check("dispatch", x_TD, routing)
    return _dispatched(transport_along("dispatch", axis), x_TD, routing)


def _dispatched(transport: Any, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
    if transport is not None:
        return transport.dispatch(x_TD, routing)
    ids_TK, before = routing.expert_ids_TK, routing.score_before_experts
    slot_R, row_SK, offsets_e = layout(ids_TK, routing.counts_E.shape[0], ids_TK.numel())
    return x_TD, Plan(routing.weights_TK, slot_R, row_SK, offsets_e, (), before)


class Dispatching(NamedTuple):
    """A dispatch that :func:`dispatch_start` began; ``coming`` is what its backend knows of it."""

    transport: Any
    coming: Any


def dispatch_start(
    x_TD: torch.Tensor, routing: Routing, *, axis: Axes | DeviceMesh | None = None
) -> Dispatching:
    """Begin a :func:`fmoe.dispatch`, whose rows and plan :func:`dispatch_join` gives.

    Takes what :func:`fmoe.dispatch` takes, and raises what it raises. A backend that isn't ``in_halves``
    dispatches at once.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> coming = dispatch_start(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> x_SD, plan = dispatch_join(dispatch_send(coming))
    >>> torch.equal(x_SD, x)  # with one device nothing moves
    True
    """
    _check("dispatch_start", x_TD, routing)
    transport: Any = transport_along("dispatch_start", axis)
    if getattr(transport, "in_halves", False):
        return Dispatching(transport, transport.dispatch_start(x_TD, routing))
    return Dispatching(None, _dispatched(transport, x_TD, routing))


def dispatch_send(coming: Dispatching) -> Dispatching:
    """Go on with a dispatch for which the host has to wait. First launch what is to run meanwhile.

    :func:`dispatch_join` does it too, if nobody has.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> coming = dispatch_start(x := torch.randn(3, 4), fmoe.route(params.router, x, fmoe.RouterConfig()))
    >>> meanwhile = torch.ones(3, 4)  # what other tokens need
    >>> dispatch_join(dispatch_send(coming))[0].shape
    torch.Size([3, 4])
    """
    transport = coming.transport
    return coming._replace(coming=transport.dispatch_send(coming.coming)) if transport else coming


def dispatch_join(coming: Dispatching) -> tuple[torch.Tensor, Plan]:
    """The rows and the plan of a dispatch that was begun, as :func:`fmoe.dispatch` gives them.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16)
    >>> routing = fmoe.route(params.router, x := torch.randn(3, 4), fmoe.RouterConfig())
    >>> plans = dispatch_join(dispatch_start(x, routing))[1], fmoe.dispatch(x, routing)[1]
    >>> torch.equal(plans[0].slot_R, plans[1].slot_R)
    True
    """
    return coming.transport.dispatch_join(coming.coming) if coming.transport else coming.coming


def _check(function: str, x_TD: torch.Tensor, routing: Routing) -> None:
    check_kind(function, "x_TD", x_TD, torch.Tensor)
    check_kind(function, "routing", routing, Routing, "Pass what route gives.")
    if routing.expert_ids_TK.dtype != torch.int64:
        wrong, remedy = routing.expert_ids_TK.dtype, "Convert it with .long()."
        raise argument_error(
            function, "routing.expert_ids_TK", got=wrong, expected="torch.int64", remedy=remedy
        )
    if x_TD.dim() != 2 or routing.expert_ids_TK.shape[:1] != x_TD.shape[:1]:
        got = f"shape {tuple(x_TD.shape)}"
        expected = f"({routing.expert_ids_TK.shape[0]}, D), a row for each row of routing.expert_ids_TK"
        remedy = "Flatten x to (T, D) and route the same rows."
        raise argument_error(function, "x_TD", got=got, expected=expected, remedy=remedy)
    if routing.weights_TK.shape != routing.expert_ids_TK.shape:
        got = f"shape {tuple(routing.weights_TK.shape)}"
        expected = f"{tuple(routing.expert_ids_TK.shape)}, as routing.expert_ids_TK"
        remedy = "Give each chosen expert one weight."
        raise argument_error(function, "routing.weights_TK", got=got, expected=expected, remedy=remedy)


def expand(x_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
    """One row per (row, expert) pair held here, grouped by expert: what a custom expert runs on.

    =========  ==========  ===================================================================
    x_SD       (S, D)      rows from :func:`dispatch`
    plan                   its plan; expert ``i``'s rows end at ``plan.offsets_e[i]``
    -> x_RD    (R, D)      rows of no pair are zeros
    =========  ==========  ===================================================================

    Raises ``ValueError`` if ``x_SD`` hasn't one row per dispatched row.

    >>> import fmoe, torch
    >>> params = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=2)
    >>> config = fmoe.RouterConfig(top_k=1)
    >>> x = torch.randn(3, 4)
    >>> x_SD, plan = fmoe.dispatch(x, fmoe.route(params.router, x, config))
    >>> x_RD = fmoe.expand(x_SD, plan)
    >>> scale_R1 = torch.searchsorted(plan.offsets_e, torch.arange(3), right=True)[:, None] + 1.0
    >>> y = fmoe.combine(fmoe.reduce(x_RD * scale_R1, plan), plan)   # expert i multiplies by i + 1
    >>> y.shape
    torch.Size([3, 4])
    """
    check_rows("expand", "x_SD", x_SD, plan)
    x_RD = gather(x_SD, rows_of_slots(plan.slot_R, plan.weights_SK.shape[1]))
    if plan.score_before_experts:
        weights_R = gather(plan.weights_SK.flatten(), plan.slot_R)
        x_RD = (x_RD * weights_R[:, None]).to(x_SD.dtype)
    return x_RD


def align_rows(plan: Plan, multiple: int) -> Plan:
    """The same plan with every expert's rows beginning at a multiple of ``multiple``.

    ========  ==========  =====================================================================
    plan                  from :func:`dispatch`, of any backend
    multiple              a positive integer; 1 changes nothing
    -> plan               the rows between two experts hold no pair: ``slot_R`` is -1 there, and
                          longer by ``E * (multiple - 1)`` whatever the routing
    ========  ==========  =====================================================================

    For products that want blocks of rows of one expert. Rows of no pair are zeros in :func:`expand` and
    nothing in :func:`fmoe.reduce`, so what goes through the plan is the same.

    With quack-kernels, an expert's rows of no pair find the first token, and weigh nothing. So where that
    token or its cotangent isn't finite, nor are the gradients of all held experts' weights.

    Raises ``ValueError`` for a multiple that isn't a positive integer.

    >>> import fmoe, torch
    >>> router = fmoe.RouterParams(torch.eye(2), torch.zeros(2))
    >>> x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    >>> routing = fmoe.route(router, x, fmoe.RouterConfig(top_k=1))
    >>> x_SD, plan = fmoe.dispatch(x, routing)
    >>> plan = fmoe.align_rows(plan, 4)
    >>> plan.slot_R, plan.offsets_e
    (tensor([ 0,  2, -1, -1,  1, -1, -1, -1, -1]), tensor([4, 8], dtype=torch.int32))
    """
    check_kind("align_rows", "plan", plan, Plan, "Pass what dispatch gives.")
    if not isinstance(multiple, int) or multiple < 1:
        expected = "a positive integer"
        remedy = "Pass how many rows a block has."
        raise argument_error("align_rows", "multiple", got=repr(multiple), expected=expected, remedy=remedy)
    if multiple == 1:
        return plan
    ends_e, row_SK = plan.offsets_e.long(), plan.row_SK
    padding_e = -torch.diff(ends_e, prepend=ends_e.new_zeros(1)) % multiple
    shift_e = padding_e.cumsum(0) - padding_e
    moved_SK = row_SK + shift_e[torch.searchsorted(ends_e, row_SK.contiguous(), right=True)]
    row_SK = torch.where(row_SK < 0, -1, moved_SK)
    # The inverse; one row more than asked for takes the pairs that have none.
    num_rows = plan.slot_R.shape[0] + ends_e.shape[0] * (multiple - 1)
    row, pair = row_SK.flatten(), torch.arange(row_SK.numel(), device=row_SK.device)
    slot_R = plan.slot_R.new_full((num_rows + 1,), -1)
    slot_R = slot_R.scatter(0, torch.where(row < 0, num_rows, row), pair)[:num_rows]
    offsets_e = (ends_e + padding_e.cumsum(0)).to(torch.int32)
    return replace(plan, slot_R=slot_R, row_SK=row_SK, offsets_e=offsets_e)


def check_rows(
    function: str, argument: str, rows: torch.Tensor, plan: Plan, *, expanded: bool = False
) -> None:
    """Raise ``ValueError`` unless these are rows of a plan: dispatched, or one for each of an expert."""
    check_kind(function, argument, rows, torch.Tensor)
    check_kind(function, "plan", plan, Plan, "Pass what dispatch gives beside the rows.")
    expected = (plan.slot_R if expanded else plan.weights_SK).shape[0]
    if rows.dim() != 2 or rows.shape[0] != expected:
        got = f"shape {tuple(rows.shape)}"
        remedy = "Pass the plan these rows were made with."
        raise argument_error(
            function, argument, got=got, expected=f"({expected}, D), by its plan", remedy=remedy
        )


def rows_of_slots(slot_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """The dispatched row that each expanded row is a copy of; -1 for none."""
    return torch.div(slot_R, top_k, rounding_mode="floor")


def check_ids(ids: torch.Tensor, num_experts: int) -> None:
    """On the host, where looking costs nothing."""
    if ids.device.type != "cpu" or not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if most >= num_experts:
        got, expected = f"an expert id of {most}", f"ids below {num_experts}, the length of routing.counts_E"
        remedy = "Give counts_E one entry per expert."
        raise argument_error("dispatch", "routing.expert_ids_TK", got=got, expected=expected, remedy=remedy)
    if least < -1:
        got, expected = f"an expert id of {least}", "ids from 0 on, or -1 for a pair that is dropped"
        raise argument_error("dispatch", "routing.expert_ids_TK", got=got, expected=expected)


def layout_kernel(ids_SK: torch.Tensor, num_experts: int, num_rows: int) -> Tensors:
    if kernels.installed() and ids_SK.is_cuda:
        from .kernels import plan

        return plan.layout(ids_SK, num_experts, num_rows)
    check_ids(ids_SK, num_experts)
    ids = ids_SK.flatten()
    key = torch.where(ids < 0, num_experts, ids)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = counts.cumsum(0).to(torch.int32)
    position = torch.arange(order.shape[0], device=order.device)
    here = position < counts.sum()
    row = torch.empty_like(order).scatter_(0, order, torch.where(here, position, -1))
    return torch.where(here, order, -1)[:num_rows], row.view(ids_SK.shape), offsets


def layout_fake(ids: torch.Tensor, num_experts: int, num_rows: Any) -> Tensors:
    slot, row = (ids.new_empty(shape, dtype=torch.int64) for shape in ((num_rows,), ids.shape))
    return slot, row, ids.new_empty(num_experts, dtype=torch.int32)


def received_fake(x: Any, weights: Any, ids: Any, num_experts: int) -> Tensors:
    """The fake outputs of a dispatch that moves: rows, weights, and how these lie by expert."""
    num_received, num_rows = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    rows, weights_SK, ids_SK = (t.new_empty(num_received, t.shape[1]) for t in (x, weights, ids))
    return rows, weights_SK, *layout_fake(ids_SK, num_experts, num_rows)


def _layout_vmap(size: int, dims: Dims, ids: torch.Tensor, num_experts: int, num_rows: int) -> Tensors:
    """One sort for the whole batch; each example has its own experts and one more for dropped pairs."""
    if not is_functorch_wrapped_tensor(ids):
        check_ids(ids, num_experts)
    num_slots, buckets = ids[0].numel(), num_experts + 1
    example = torch.arange(size, device=ids.device)
    wide = torch.where(ids < 0, num_experts, ids).flatten(1) + (example * buckets)[:, None]
    slot, row, ends = layout(wide, size * buckets, size * num_slots)
    start = (example * num_slots)[:, None]
    slot, row = slot.view(size, num_slots) - start, row.view(size, num_slots) - start
    ends = ends.view(size, buckets)[:, :-1] - start
    here = torch.arange(num_slots, device=ids.device) < ends[:, -1:]
    row = torch.where(ids.flatten(1) < 0, -1, row).view(ids.shape)
    return torch.where(here, slot, -1)[:, :num_rows], row, ends.to(torch.int32)


def layout_plain(ids: torch.Tensor, num_experts: int, num_rows: int) -> Tensors:
    """A pair's row is the number of pairs that come before it: those of lower experts, then earlier ones."""
    flat = torch.where(ids < 0, num_experts, ids).flatten()
    mine, other, index = flat[:, None], flat[None, :], torch.arange(flat.shape[0], device=ids.device)
    row = ((other < mine) | ((other == mine) & (index[None, :] < index[:, None]))).sum(1)
    holds = (row == torch.arange(num_rows, device=ids.device)[:, None]) & (flat < num_experts)
    slot = torch.where(holds.any(1), (holds * index).sum(1), -1)
    ends = (flat <= torch.arange(num_experts, device=ids.device)[:, None]).sum(1)
    return slot, torch.where(flat < num_experts, row, -1).view(ids.shape), ends.to(torch.int32)


def ids_example() -> torch.Tensor:
    """Experts of four rows, two each, of three experts; some pairs are dropped."""
    ids = torch.rand(4, 3).argsort(1)[:, :2]
    return torch.where(torch.rand(4, 2) < 0.2, -1, ids)


def plan_example() -> Tensors:
    """The tensors of a :class:`Plan` for them."""
    return random(4, 2), *layout.raw(ids_example(), 3, 8)


layout: Operator = declare(
    "layout(Tensor expert_ids, SymInt num_experts, SymInt num_rows) -> (Tensor, Tensor, Tensor)",
    impl=layout_kernel,
    fake=layout_fake,
    checkpoint=DISPATCH,
    example=lambda: (ids_example(), 3, 8),
    plain=layout_plain,
    vmap=_layout_vmap,
)
