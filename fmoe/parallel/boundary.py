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

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.distributed.device_mesh import DeviceMesh

from ..errors import TransformError
from ..ops.core.axes import group_of
from ..ops.core.derive import Tensors, replaced
from ..ops.core.dtensors import as_dtensor, is_dtensor
from ..ops.core.dtypes import accumulator
from ..ops.core.function import zeros
from ..params import P
from .collective_ops import psum_op
from .spec import Placements, placements, unnamed_axes


def unwrapped(tensor: torch.Tensor) -> Any:
    """The tensor beneath the wrappers of ``torch.func``'s transforms."""
    if not torch.compiler.is_dynamo_compiling():
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
    return tensor


def dtensor_beneath(tensor: torch.Tensor) -> bool:
    return is_dtensor(unwrapped(tensor))


def enter(tensors: Sequence[torch.Tensor], mesh: DeviceMesh, specs: Sequence[P]) -> Tensors:
    """This device's parts of global values."""
    inner = [unwrapped(tensor) for tensor in tensors]
    where = [x.placements if is_dtensor(x) else placements(spec, mesh) for x, spec in zip(inner, specs)]
    return _cross(_Enter, tensors, mesh, specs, where, [is_dtensor(x) for x in inner])


def leave(tensors: Sequence[torch.Tensor], mesh: DeviceMesh, specs: Sequence[P], dtensor: bool) -> Tensors:
    """The global values that the devices' parts are."""
    where = [placements(spec, mesh) for spec in specs]
    return _cross(_Leave, tensors, mesh, specs, where, [dtensor] * len(specs))


Way = tuple[Placements, str, int, bool]


def _cross(
    cls: Any,
    tensors: Sequence[torch.Tensor],
    mesh: DeviceMesh,
    specs: Sequence[P],
    where: Sequence[Placements],
    dtensor: Sequence[bool],
) -> Tensors:
    groups = [group_of(mesh, unnamed_axes(spec, mesh)) for spec in specs]
    ways = tuple((at, g.name, g.size, wrapped) for at, g, wrapped in zip(where, groups, dtensor))
    found = [*tensors]
    # Apart: jvp and vmap refuse DTensors, and all outputs of a Function require a gradient if one does.
    kinds = [(wrapped, _requires_grad(x)) for x, wrapped in zip(tensors, dtensor)]
    for kind in dict.fromkeys(kinds):
        some = [i for i, k in enumerate(kinds) if k == kind]
        crossed = _apply(cls, mesh, tuple(ways[i] for i in some), *(tensors[i] for i in some))
        found = replaced(found, some, crossed)
    return tuple(found)


def _requires_grad(x: torch.Tensor) -> bool:
    """Whether a tensor is differentiated at any level of ``torch.func``'s transforms."""
    if not torch.compiler.is_dynamo_compiling():
        while functorch.is_functorch_wrapped_tensor(x):
            if x.requires_grad:
                return True
            x = functorch.get_unwrapped(x)
    return x.requires_grad


# Dynamo needs module-level Functions without a jvp. Their arguments are the mesh, the way of each tensor, and
# the tensors. A way is the placements, the group's name and size along the unnamed axes, and whether the
# global side is a DTensor. Where nothing requires a gradient, Dynamo puts a context in front.


class _Map(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.mesh, ctx.ways = inputs[:2]
        ctx.outputs = [(t.shape, t.dtype, t.device) for t in output]
        ctx.set_materialize_grads(False)
        constant = [t for t in output if not t.is_floating_point()]
        if constant:
            ctx.mark_non_differentiable(*constant)


class _Enter(_Map):
    @staticmethod
    def forward(*args: Any) -> Tensors:
        _, ways, tensors = _arguments(args)
        return tuple(_local(x, way) for x, way in zip(tensors, ways))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        return None, None, *_pull(_Collect, ctx, cotangents)


class _Collect(_Map):
    @staticmethod
    def forward(*args: Any) -> Tensors:
        mesh, ways, tensors = _arguments(args)
        sums = _summed(tensors, [way[1:3] for way in ways])
        return tuple(_as_global(x, mesh, way) for x, way in zip(sums, ways))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        return None, None, *_pull(_Enter, ctx, cotangents)


class _Leave(_Map):
    @staticmethod
    def forward(*args: Any) -> Tensors:
        mesh, ways, tensors = _arguments(args)
        return tuple(_as_global(x, mesh, way) for x, way in zip(tensors, ways))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        pulled = _pull(_Enter, ctx, cotangents)
        sizes = [size for _, _, size, _ in ctx.ways]
        return None, None, *(g if g is None or n == 1 else g / n for g, n in zip(pulled, sizes))


def _arguments(args: tuple[Any, ...]) -> tuple[DeviceMesh, tuple[Way, ...], Tensors]:
    at = 0 if isinstance(args[1], tuple) else 1
    return args[at], args[at + 1], args[at + 2 :]


def _local(x: torch.Tensor, way: Way) -> torch.Tensor:
    if is_dtensor(x):
        if x.placements != way[0]:  # arguments lie where their specs say, cotangents anywhere
            x = x.redistribute(placements=way[0])
        x = x.to_local()
    return x.view_as(x)


def _as_global(x: torch.Tensor, mesh: DeviceMesh, way: Way) -> torch.Tensor:
    where, _, _, dtensor = way
    return as_dtensor(x, mesh, where) if dtensor else x.view_as(x)


def collect(tensors: Sequence[torch.Tensor], mesh: DeviceMesh, specs: Sequence[P]) -> list[torch.Tensor]:
    """The sums of what devices hold along the axes that the specs don't name. It has no derivative."""
    return _summed(tensors, [group_of(mesh, unnamed_axes(spec, mesh))[:2] for spec in specs])


def _summed(tensors: Sequence[torch.Tensor], groups: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
    """Sums over the devices of each tensor's group, in float32 or wider: those of one group in one."""
    found = [*tensors]
    together: dict[Any, list[int]] = {}
    for i, (x, (group, size)) in enumerate(zip(tensors, groups)):
        if size > 1:
            wide = accumulator(x.dtype) if x.is_floating_point() else x.dtype
            together.setdefault((group, wide), []).append(i)
    for (group, wide), where in together.items():
        flat = torch.cat([tensors[i].to(wide).reshape(-1) for i in where])
        parts = psum_op.raw(flat, group).split([tensors[i].numel() for i in where])
        for i, part in zip(where, parts):
            found[i] = part.view(tensors[i].shape).to(tensors[i].dtype)
    return found


def _apply(cls: Any, *args: Any) -> Tensors:
    return (cls if torch.compiler.is_dynamo_compiling() else _WITH_RULES[cls]).apply(*args)


def _pull(cls: Any, ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Another map, applied to those cotangents or tangents that aren't ``None``."""
    if not torch.compiler.is_dynamo_compiling():
        cotangents = unwrap_dead_wrappers(tuple(cotangents))
    where = [i for i, g in enumerate(cotangents) if g is not None]
    if not where:
        return [*cotangents]
    ways = tuple(ctx.ways[i] for i in where)
    found = _apply(cls, ctx.mesh, ways, *(cotangents[i] for i in where))
    return replaced(cotangents, where, found)


def _with_rules(cls: Any) -> Any:
    """The same map under ``jvp`` and ``vmap``: it is linear and treats every element alike."""

    def check_plain(transform: str, ways: Sequence[Way]) -> None:
        if any(dtensor for *_, dtensor in ways):
            raise dtensor_error(transform)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        check_plain("jvp", ctx.ways)
        with _set_fwd_grad_enabled(True):  # otherwise a second tangent is silently lost
            moved = _pull(cls, ctx, tangents[2:])
            return tuple(zeros(*like) if t is None else t for t, like in zip(moved, ctx.outputs))

    def vmap(info: Any, dims: tuple[Any, ...], mesh: Any, ways: Any, *tensors: torch.Tensor) -> Any:
        check_plain("vmap", ways)
        return _apply(cls, mesh, ways, *tensors), dims[2:]

    methods = {"jvp": staticmethod(jvp), "vmap": staticmethod(vmap)}
    return type(cls.__name__ + "WithRules", (cls,), methods)


_WITH_RULES = {cls: _with_rules(cls) for cls in (_Enter, _Collect, _Leave)}


def dtensor_error(transform: str) -> TransformError:
    return TransformError(
        f"shard_map: cannot run under torch.func.{transform} over DTensors, which PyTorch lacks. "
        "Pass each device's plain local tensors instead, as x.to_local() gives them."
    )
