"""Values that cross between the global view and what each device holds.

A global value placed by a spec is the same on the devices along the axes the spec doesn't name. Three
linear maps cross, and they are closed under transposition, so derivatives of any order are exact:

- *enter* takes this device's part of a global value. Its transpose is *collect*.
- *collect* sums what the devices along the unnamed axes hold; the sum is a global value. Its transpose is
  *enter*.
- *leave* claims that what each device holds is the same along the unnamed axes, and so is a global value.
  Each of the ``n`` devices has an equal share in it, so its transpose is *enter* divided by ``n``.

Plain tensors and DTensors cross in the same way. Only their wrapping differs.
"""

from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.distributed.device_mesh import DeviceMesh

from ..errors import TransformError
from ..ops.core.axes import group_of
from ..ops.core.dtensors import is_dtensor
from ..params import P
from .collective_ops import in_float32, psum_op
from .spec import Placements, placements, unnamed_axes

_NUM_ARGS = 6


def unwrapped(tensor: torch.Tensor) -> Any:
    """The tensor beneath the wrappers of ``torch.func``'s transforms."""
    if not torch.compiler.is_dynamo_compiling():
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
    return tensor


def dtensor_beneath(tensor: torch.Tensor) -> bool:
    return is_dtensor(unwrapped(tensor))


def enter(tensor: torch.Tensor, mesh: DeviceMesh, spec: P) -> torch.Tensor:
    """This device's part of a global value."""
    inner = unwrapped(tensor)
    where = inner.placements if is_dtensor(inner) else placements(spec, mesh)
    return _cross(_Enter, tensor, mesh, spec, where, is_dtensor(inner))


def leave(tensor: torch.Tensor, mesh: DeviceMesh, spec: P, dtensor: bool) -> torch.Tensor:
    """The global value that the devices' parts are."""
    return _cross(_Leave, tensor, mesh, spec, placements(spec, mesh), dtensor)


def _cross(
    cls: Any, tensor: torch.Tensor, mesh: DeviceMesh, spec: P, where: Placements, dtensor: bool
) -> torch.Tensor:
    group = group_of(mesh, unnamed_axes(spec, mesh))
    return _apply(cls, tensor, mesh, where, group.name, group.size, dtensor)


# Dynamo needs module-level Functions without a jvp. Their arguments are (tensor, mesh, placements, group
# name, group size, whether the global side is a DTensor). Where nothing requires a gradient, Dynamo puts a
# context in front.


class _Map(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.statics = inputs[1:]
        ctx.set_materialize_grads(False)
        if not output.is_floating_point():
            ctx.mark_non_differentiable(output)


class _Enter(_Map):
    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        x, _, where, *_ = args[-_NUM_ARGS:]
        if is_dtensor(x):
            if x.placements != where:  # arguments lie where their specs say, cotangents anywhere
                x = x.redistribute(placements=where)
            x = x.to_local()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[Any, ...]:
        return _pull(_Collect, ctx, g), *[None] * (_NUM_ARGS - 1)


class _Collect(_Map):
    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        x, mesh, where, group, size, dtensor = args[-_NUM_ARGS:]
        if size > 1:
            x = in_float32(lambda wide: psum_op.raw(wide, group), x)
        return _as_global(x, mesh, where, dtensor)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[Any, ...]:
        return _pull(_Enter, ctx, g), *[None] * (_NUM_ARGS - 1)


class _Leave(_Map):
    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        x, mesh, where, *_, dtensor = args[-_NUM_ARGS:]
        return _as_global(x, mesh, where, dtensor)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> tuple[Any, ...]:
        pulled = _pull(_Enter, ctx, g)
        size = ctx.statics[3]
        return pulled if pulled is None or size == 1 else pulled / size, *[None] * (_NUM_ARGS - 1)


def _as_global(x: torch.Tensor, mesh: DeviceMesh, where: Placements, dtensor: bool) -> torch.Tensor:
    if not dtensor:
        return x.view_as(x)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(x, mesh, where, run_check=False)


def _apply(cls: Any, *args: Any) -> torch.Tensor:
    return (cls if torch.compiler.is_dynamo_compiling() else _WITH_RULES[cls]).apply(*args)


def _pull(cls: Any, ctx: Any, g: torch.Tensor | None) -> torch.Tensor | None:
    if g is None:
        return None
    if not torch.compiler.is_dynamo_compiling():
        (g,) = unwrap_dead_wrappers((g,))
    return _apply(cls, g, *ctx.statics)


def _with_rules(cls: Any) -> Any:
    """The same map under ``jvp`` and ``vmap``: it is linear and treats every element alike."""

    def check_plain(transform: str, dtensor: bool) -> None:
        if dtensor:
            raise dtensor_error(transform)

    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        check_plain("jvp", ctx.statics[-1])
        with _set_fwd_grad_enabled(True):  # otherwise a second tangent is silently lost
            return _apply(cls, tangent, *ctx.statics)

    def vmap(info: Any, dims: tuple[Any, ...], tensor: torch.Tensor, *statics: Any) -> tuple[Any, ...]:
        check_plain("vmap", statics[-1])
        return _apply(cls, tensor, *statics), dims[0]

    methods = {"jvp": staticmethod(jvp), "vmap": staticmethod(vmap)}
    return type(cls.__name__ + "WithRules", (cls,), methods)


_WITH_RULES = {cls: _with_rules(cls) for cls in (_Enter, _Collect, _Leave)}


def dtensor_error(transform: str) -> TransformError:
    return TransformError(
        f"shard_map: cannot run under torch.func.{transform} over DTensors, which PyTorch lacks. "
        "Pass each device's plain local tensors instead, as x.to_local() gives them."
    )
