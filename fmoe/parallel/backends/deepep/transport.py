"""Tokens over DeepEP's kernels: bfloat16 rows, float32 weights, NVLink within a node and RDMA between.

A token goes once to every device that holds one of its experts. The sum over these experts comes back as one
row, and combine sums the rows of all devices.

The host waits once a layer, in dispatch, for the number of rows to come. This is DeepEP's own wait. With a
:class:`~fmoe.parallel.Bound` there is none: rows of the worst case come, some of them empty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from ....ops.core.axes import Group
from ....ops.dispatch import Plan
from ....ops.route import Routing
from ....ops.transport import InFlight, check_experts_divide
from ..bounds import Bound, check_bound
from ..payload import check_payload, narrows
from .adapter import Sizes, refuse
from .buffers import opened
from .in_parts import deepep_begin_back, deepep_end_back, deepep_end_dispatch, deepep_pack, deepep_post
from .operators import deepep_combine, deepep_dispatch, deepep_dispatch_bounded, deepep_join


class DeepEP(NamedTuple):
    """The DeepEP backend, from :func:`deepep`: the devices of one group, and the name of their buffer.

    With a ``bound`` no host waits. With a ``payload`` of ``"fp8"`` tokens are rounded, with a scale for each
    128 numbers. It is an :class:`~fmoe.ops.transport.Overlapping` transport.

    >>> import fmoe
    >>> sizes = dict(max_tokens_per_rank=64, dim=256, top_k=2, num_experts=8)
    >>> with deepep(fmoe.make_mesh()["ep"], **sizes) as backend:
    ...     isinstance(backend, DeepEP)
    True
    """

    group: Group
    buffer: str
    bound: Bound | None = None
    in_halves: bool = False
    payload: str | None = None

    @property
    def narrow(self) -> bool:
        return narrows("DeepEP", self.payload)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
        num_experts, size = routing.counts_E.shape[0], self.group.size
        check_experts_divide(num_experts, size)
        weights_TK = routing.weights_TK if size == 1 else routing.weights_TK.float()
        tokens = x_TD, weights_TK, routing.expert_ids_TK
        rows: Any
        overflow: Any = ()
        if self.bound is None:
            rows = deepep_dispatch.outputs(*tokens, num_experts, size, self.narrow, self.buffer)
        else:
            self.bound.check(x_TD.shape[0])
            most, top_k = self.bound.max_tokens, routing.expert_ids_TK.shape[1]
            pairs = self.bound.room(size, top_k, num_experts // size).pairs
            *rows, overflow = deepep_dispatch_bounded.outputs(
                *tokens, num_experts, size, self.narrow, most, pairs, self.buffer
            )
        x_SD, weights_SK, slot_R, row_SK, offsets_e, *sent = rows
        before = routing.score_before_experts
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, tuple(sent), before, self, overflow)

    def combine(self, y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return deepep_combine(y_SD, True, self.buffer, *plan.sent)

    def dispatch_start(self, x_TD: torch.Tensor, routing: Routing) -> "_Coming":
        check_experts_divide(routing.counts_E.shape[0], self.group.size)
        if self.bound is not None:
            self.bound.check(x_TD.shape[0])
        tokens = x_TD, routing.weights_TK.float(), routing.expert_ids_TK
        tickets = deepep_pack(*tokens, torch.compiler.is_compiling(), self.buffer)
        coming = _Coming(tickets[0], tickets[1], routing)
        return coming if self.bound is None else self.dispatch_send(coming)

    def dispatch_send(self, coming: "_Coming") -> "_Coming":
        if coming.posted:
            return coming
        num_experts, most = coming.routing.counts_E.shape[0], self.bound.max_tokens if self.bound else 0
        posted = deepep_post(coming.rows, num_experts, self.group.size, self.narrow, most, self.buffer)
        return coming._replace(posted=(posted,))

    def dispatch_join(self, coming: "_Coming") -> tuple[torch.Tensor, Plan]:
        coming, held = self.dispatch_send(coming), coming.routing.counts_E.shape[0] // self.group.size
        rows, pairs = 0, -1
        if self.bound is not None:
            rows = self.group.size * self.bound.max_tokens
            pairs = self.bound.room(self.group.size, coming.routing.expert_ids_TK.shape[1], held).pairs
        tickets = coming.rows, coming.weights, *coming.posted
        x_SD, weights_SK, slot_R, row_SK, offsets_e, overflow, *sent = deepep_end_dispatch.outputs(
            *tickets, held, rows, pairs, torch.compiler.is_compiling(), self.buffer
        )
        plan = slot_R, row_SK, offsets_e, tuple(sent), coming.routing.score_before_experts, self
        return x_SD, Plan(weights_SK, *plan, () if self.bound is None else overflow)

    def combine_start(self, y_SD: torch.Tensor, plan: Plan) -> InFlight:
        if self.in_halves:
            return InFlight(deepep_begin_back(y_SD, torch.compiler.is_compiling(), self.buffer, *plan.sent))
        return InFlight(deepep_combine(y_SD, False, self.buffer, *plan.sent), (y_SD,))

    def join(self, coming: InFlight, plan: Plan, plus: torch.Tensor | None) -> torch.Tensor:
        if self.in_halves:
            y_TD = deepep_end_back(coming.y_TD, self.buffer, *plan.sent)
            return y_TD if plus is None else y_TD + plus
        return deepep_join(coming.y_TD, plus, *coming.held, self.buffer, *plan.sent)


class _Coming(NamedTuple):
    """A dispatch that has begun: tickets of its rows and of their weights, and of both when they are sent."""

    rows: torch.Tensor
    weights: torch.Tensor
    routing: Routing
    posted: tuple[torch.Tensor, ...] = ()


@contextmanager
def deepep(
    line: DeviceMesh,
    *,
    max_tokens_per_rank: int,
    dim: int,
    top_k: int,
    num_experts: int,
    kind: str | None = None,
    overlap: bool = True,
    host_sync: bool = True,
    capacity: float | None = None,
    payload: str | None = None,
) -> Iterator[DeepEP]:
    """The DeepEP backend for the devices of ``line``, with a buffer that is freed at the end.

    ===================  ================================================================
    line                 a mesh of one dimension, such as ``mesh["ep"]``; all its devices call this together
    max_tokens_per_rank  the most tokens that any of them dispatches at once
    dim, top_k           of the model; ``dim`` is a multiple of 256, within a node at most 7936
    num_experts          of all devices together
    kind                 ``"buffer"`` or ``"elastic"`` (DeepEP 2.x); ``None``: ``Buffer`` within a node,
                         ``ElasticBuffer`` across nodes where DeepEP has it
    overlap              leave combine in flight while shared experts compute, with the same numbers
    host_sync            false: the host never waits for the number of rows that come, as there is room for
                         ``max_tokens_per_rank`` from every device; within a node, or ``"elastic"``
    capacity             without ``host_sync``: room for this many times the pairs of rows and experts that an
                         even router sends here. What had none is in ``plan.overflow``. ``None``: for all
    payload              ``"fp8"``: tokens travel rounded, as by :class:`fmoe.parallel.Backend`
    -> backend           for ``fmoe.shard_map(..., backends={"ep": backend})``. Call the layer, and its
                         backward, inside the ``with``
    ===================  ================================================================

    With one device nothing moves, and DeepEP isn't needed. Devices free a buffer together, so after an
    exception it is freed with its process.

    Raises ``ValueError`` on all devices together for what DeepEP can't do here, with what to do instead.

    >>> import fmoe
    >>> line = fmoe.make_mesh()["ep"]
    >>> with deepep(line, max_tokens_per_rank=4096, dim=2048, top_k=6, num_experts=64) as backend:
    ...     backend.group.size
    1
    """
    sizes = Sizes(max_tokens_per_rank, dim, top_k, num_experts)
    check_bound("deepep", None, capacity)
    check_payload("deepep", payload)
    if host_sync and capacity is not None:
        got, expected = f"{capacity}, with host_sync", "a capacity for host_sync=False only"
        raise refuse("capacity", got=got, expected=expected)
    with opened(line, sizes, kind, overlap, host_sync) as (group, name):
        bound = None if host_sync else Bound(max_tokens_per_rank, capacity)
        yield DeepEP(group, name, bound, payload=payload)
