"""The operators that collectives are made of: each linear, its backward the adjoint collective.

Every operator works on blocks along dimension 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.bases import random
from ..ops.core.batches import elementwise, wider_rows
from ..ops.core.dtypes import accumulator
from ..ops.core.primitive import Operator, kernel, linear
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


def _reduce_scatter_kernel(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """In float32 or wider, rounded once: so the error doesn't grow with the number of devices."""
    wide = x.to(accumulator(x.dtype) if x.is_floating_point() else x.dtype)
    return _wait(_c10d.reduce_scatter_tensor(wide.contiguous(), "sum", size, group)).to(x.dtype)


psum_op: Operator = _collective(
    "psum(Tensor x, str group) -> Tensor",
    impl=lambda x, group: _wait(_c10d.all_reduce(x.contiguous(), "sum", group)),
    fake=lambda x, group: x.new_empty(x.shape),
    transpose="psum",
    alone=lambda: (group_alone(),),
    vmap=elementwise,
)


all_gather_op: Operator = _collective(
    "all_gather(Tensor x, int size, str group) -> Tensor",
    impl=lambda x, size, group: _wait(_c10d.all_gather_into_tensor(x.contiguous(), size, group)),
    fake=lambda x, size, group: x.new_empty(x.shape[0] * size, *x.shape[1:]),
    transpose="reduce_scatter",
)

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

# ---- parameters ------------------------------------------------------------------------------------
#
# Pieces of parameters are kept in one dtype, and travel and are computed with in another. Cotangents are
# summed in a third. Casting and moving are one operator, so that a cotangent isn't rounded before its sum.

_DTYPES = "ScalarType kept, ScalarType moved, ScalarType summed, int size, str group"


def _gather(x: Any, kept: Any, moved: Any, summed: Any, size: int, group: str) -> torch.Tensor:
    return _c10d.all_gather_into_tensor(x.to(moved).contiguous(), size, group)


def _gather_fake(x: Any, kept: Any, moved: Any, summed: Any, size: int, group: str) -> torch.Tensor:
    return x.new_empty(x.shape[0] * size, *x.shape[1:], dtype=moved)


def _reduce(g: Any, kept: Any, moved: Any, summed: Any, size: int, group: str) -> torch.Tensor:
    return _c10d.reduce_scatter_tensor(g.to(summed).contiguous(), "sum", size, group)


def _reduce_fake(g: Any, kept: Any, moved: Any, summed: Any, size: int, group: str) -> torch.Tensor:
    return g.new_empty(g.shape[0] // size, *g.shape[1:], dtype=summed)


def _of_params(name: str, **others: Any) -> Operator:
    dtypes = (torch.float64,) * 3
    return _collective(
        f"{name}(Tensor x, {_DTYPES}) -> Tensor",
        alone=lambda: (*dtypes, 1, group_alone()),
        save=False,
        **others,
    )


gather_params_op = _of_params(
    "gather_params",
    impl=lambda *args: _wait(_gather(*args)),
    fake=_gather_fake,
    transpose="reduce_params",
)

reduce_params_op = _of_params(
    "reduce_params",
    impl=lambda x, kept, *rest: _wait(_reduce(x, kept, *rest)).to(kept),
    fake=lambda x, kept, *rest: _reduce_fake(x, kept, *rest).to(kept),
    transpose="gather_params",
)

# The same, only begun: :func:`arrived` waits, and nothing may read the result before. No derivative exists.
begin_gather = kernel(f"begin_gather(Tensor x, {_DTYPES}) -> Tensor", impl=_gather, fake=_gather_fake)
begin_reduce = kernel(f"begin_reduce(Tensor g, {_DTYPES}) -> Tensor", impl=_reduce, fake=_reduce_fake)


def arrived(x: torch.Tensor) -> torch.Tensor:
    """Wait for what was begun, and return it."""
    return x if isinstance(x, FakeTensor) else _wait(x)
