"""The operators that collectives are made of: each linear, its backward the adjoint collective.

Every operator works on blocks along dimension 0.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..ops.bases import random
from ..ops.core.batches import elementwise, wider_rows
from ..ops.core.dtypes import accumulator
from ..ops.core.primitive import Operator, linear
from ..ops.core.tape import checkpoint
from .mesh import make_mesh

_c10d = torch.ops._c10d_functional
_wait = _c10d.wait_tensor


def _collective(
    schema: str,
    *,
    alone: Callable[[], tuple[Any, ...]] = lambda: (1, group_alone()),
    vmap: Any = wider_rows,
    save: bool = True,
    **others: Any,
) -> Operator:
    """An operator linear in its first argument; the others are static.

    Its example is that of a device alone, on which nothing moves, with static arguments from ``alone``. Tests
    of many devices compare with devices simulated in one tensor.
    """
    return linear(
        schema,
        checkpoint=checkpoint(schema.partition("(")[0], save=save),
        example=lambda: (random(4, 3), *alone()),
        plain=lambda x, *statics: x.clone(),
        vmap=vmap,
        **others,
    )


def group_alone() -> str:
    """The name of a group of this process alone."""
    return make_mesh().get_group("dp").group_name


def _all_to_all_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    splits = [x.shape[0] // size] * size
    return _wait(_c10d.all_to_all_single(x.contiguous(), splits, splits, group))


def _ppermute_kernel(x: torch.Tensor, source: int, destination: int, size: int, group: str) -> torch.Tensor:
    flat = x.contiguous().view(-1)
    sent, received = ([flat.numel() if i == r else 0 for r in range(size)] for i in (destination, source))
    out = _wait(_c10d.all_to_all_single(flat if destination >= 0 else flat[:0], received, sent, group))
    return out.view(x.shape) if source >= 0 else torch.zeros_like(x)


def in_float32(reduce: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A sum over devices in float32 or wider, rounded once. Its error doesn't grow with their number."""
    wide = accumulator(x.dtype) if x.is_floating_point() else x.dtype
    return reduce(x.to(wide)).to(x.dtype)


def _reduce_scatter_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    return in_float32(
        lambda wide: _wait(_c10d.reduce_scatter_tensor(wide.contiguous(), "sum", size, group)), x
    )


psum_op: Operator = _collective(
    "psum(Tensor x, str group) -> Tensor",
    impl=lambda x, group: _wait(_c10d.all_reduce(x.contiguous(), "sum", group)),
    fake=lambda x, group: x.new_empty(x.shape),
    transpose="psum",
    alone=lambda: (group_alone(),),
    vmap=elementwise,
)


def _all_gather(name: str, *, save: bool) -> Operator:
    return _collective(
        f"{name}(Tensor x, int size, str group) -> Tensor",
        impl=lambda x, size, group: _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, group)),
        fake=lambda x, size, group: x.new_empty(x.shape[0] * size, *x.shape[1:]),
        transpose="reduce_scatter",
        save=save,
    )


all_gather_op = _all_gather("all_gather", save=True)
gather_params_op = _all_gather("gather_params", save=False)

reduce_scatter_op: Operator = _collective(
    "reduce_scatter(Tensor x, int size, str group) -> Tensor",
    impl=_reduce_scatter_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape[0] // size, *x.shape[1:]),
    transpose="all_gather",
)

all_to_all_op: Operator = _collective(
    "all_to_all(Tensor x, int size, str group) -> Tensor",
    impl=_all_to_all_kernel,
    fake=lambda x, size, group: x.new_empty(x.shape),
    transpose="all_to_all",
)

# source and destination are places in the group, or -1 for nobody.
ppermute_op: Operator = _collective(
    "ppermute(Tensor x, int source, int destination, int size, str group) -> Tensor",
    impl=_ppermute_kernel,
    fake=lambda x, source, destination, size, group: x.new_empty(x.shape),
    transpose=lambda g, shape, source, destination, *group: ppermute_op(g, destination, source, *group),
    alone=lambda: (0, 0, 1, group_alone()),
    vmap=elementwise,
)
