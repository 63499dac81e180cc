"""Tokens over DeepEP's kernels: bfloat16 rows, float32 weights, NVLink within a node and RDMA between.

A token goes once to every device that holds one of its experts. The sum over these experts comes back as one
row, and combine sums the rows of all devices.

The host waits once a layer, in dispatch, for the number of rows to come. This is DeepEP's own wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from ....ops.core.axes import Group
from ....ops.dispatch import Plan
from ....ops.route import Routing
from ....ops.transport import InFlight, check_experts_divide
from .adapter import Sizes
from .buffers import opened
from .operators import deepep_combine, deepep_dispatch, deepep_join


class DeepEP(NamedTuple):
    """The DeepEP backend, from :func:`deepep`: the devices of one group, and the name of their buffer.

    It is an :class:`~fmoe.ops.transport.Overlapping` transport.

    >>> import fmoe
    >>> sizes = dict(max_tokens_per_rank=64, dim=256, top_k=2, num_experts=8)
    >>> with deepep(fmoe.make_mesh()["ep"], **sizes) as backend:
    ...     isinstance(backend, DeepEP)
    True
    """

    group: Group
    buffer: str

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Plan]:
        num_experts, size = routing.counts_E.shape[0], self.group.size
        check_experts_divide(num_experts, size)
        weights_TK = routing.weights_TK if size == 1 else routing.weights_TK.float()
        x_SD, weights_SK, slot_R, row_SK, offsets_e, *sent = deepep_dispatch.outputs(
            x_TD, weights_TK, routing.expert_ids_TK, num_experts, size, self.buffer
        )
        score_before = routing.score_before_experts
        return x_SD, Plan(weights_SK, slot_R, row_SK, offsets_e, tuple(sent), score_before, self)

    def combine(self, y_SD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return deepep_combine(y_SD, True, self.buffer, *plan.sent)

    def combine_start(self, y_SD: torch.Tensor, plan: Plan) -> InFlight:
        return InFlight(deepep_combine(y_SD, False, self.buffer, *plan.sent), (y_SD,))

    def join(self, coming: InFlight, plan: Plan, plus: torch.Tensor | None) -> torch.Tensor:
        return deepep_join(coming.y_TD, plus, *coming.held, self.buffer, *plan.sent)


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
    with opened(line, sizes, kind, overlap) as (group, name):
        yield DeepEP(group, name)
