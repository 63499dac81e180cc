"""The parts for operators and backends of your own.

``docs/operators.md`` writes operators with it, and ``docs/backends.md`` a backend.

>>> import fmoe, torch
>>> twice = fmoe.extend.linear(
...     "test_twice(Tensor x) -> Tensor", impl=lambda x: 2 * x, fake=torch.empty_like,
...     checkpoint=fmoe.extend.checkpoint("twice", save=False), example=lambda: (fmoe.extend.random(3),),
...     plain=lambda x: 2 * x, transpose="test_twice", vmap=fmoe.extend.elementwise,
... )
>>> torch.func.grad(lambda x: twice(x) ** 2)(torch.tensor(3.0))
tensor(24.)
"""

from .errors import argument_error
from .ops.bases import (
    gather,
    grouped_mm,
    grouped_outer,
    random,
    scaled_grouped_mm,
    scaled_grouped_outer,
    scatter_add,
)  # fmt: skip
from .ops.combine import COMBINE
from .ops.core.axes import Group, group_of
from .ops.core.batches import Fold, each, elementwise, fold_rows, front, more_rows, one_by_one, wider_rows
from .ops.core.derive import pullback
from .ops.core.primitive import Operator, declare, linear, operators
from .ops.core.refuse import ALL_MOVE, Unsupported
from .ops.core.tape import checkpoint
from .ops.dispatch import DISPATCH, Plan, check_ids, layout, received_fake
from .ops.route import Routing
from .ops.transport import InFlight, InHalves, Overlapping, Transport, check_experts_divide, set_default
from .parallel.collective_ops import all_gather_op, all_to_all_op, ppermute_op, psum_op, reduce_scatter_op

__all__ = [
    "ALL_MOVE", "COMBINE", "DISPATCH", "Fold", "Group", "InFlight", "InHalves", "Operator",
    "Overlapping", "Plan", "Routing", "Transport", "Unsupported", "all_gather_op", "all_to_all_op",
    "argument_error", "check_experts_divide", "check_ids", "checkpoint", "declare", "each",
    "elementwise", "fold_rows", "front", "gather", "group_of", "grouped_mm", "grouped_outer", "layout",
    "linear", "more_rows", "one_by_one", "operators", "ppermute_op", "psum_op", "pullback", "random",
    "received_fake", "reduce_scatter_op", "scaled_grouped_mm", "scaled_grouped_outer", "scatter_add",
    "set_default", "wider_rows",
]  # fmt: skip
