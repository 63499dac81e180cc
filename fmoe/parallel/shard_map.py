"""``shard_map``: a function of each device's own tensors as a function of global values."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import optree
import torch
from torch._C import _functorch as functorch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, captured_error
from ..ops.core.axes import Binding, axis_names, bound, check_mesh, describe
from ..ops.core.dtensors import is_dtensor
from ..ops.transport import Transport
from ..params import P
from ..tree import check_tensors
from .boundary import dtensor_beneath, dtensor_error, enter, leave, unwrapped
from .replicated import check_replicated as compare
from .spec import broadcast, check_specs, placement_problems, raise_misfits, rank_problems, size_problems

Fn = Callable[..., Any]


@overload
def shard_map(
    fn: Fn,
    mesh: DeviceMesh,
    *,
    in_specs: Any,
    out_specs: Any,
    backends: Mapping[str, Transport] | None = ...,
    local_results: bool = ...,
    check_replicated: bool = ...,
) -> Fn: ...


@overload
def shard_map(
    *,
    mesh: DeviceMesh,
    in_specs: Any,
    out_specs: Any,
    backends: Mapping[str, Transport] | None = ...,
    local_results: bool = ...,
    check_replicated: bool = ...,
) -> Callable[[Fn], Fn]: ...


def shard_map(
    fn: Fn | None = None,
    mesh: DeviceMesh | None = None,
    *,
    in_specs: Any,
    out_specs: Any,
    backends: Mapping[str, Transport] | None = None,
    local_results: bool = False,
    check_replicated: bool = False,
) -> Any:
    """``fn``, which sees each device's own tensors, as a function of values spread over a mesh.

    ================  ================================================================
    fn                takes and returns pytrees of this device's plain tensors. It may use the collectives
                      of ``fmoe.parallel`` along the mesh's axes. Everything differentiable is an argument.
                      Without ``fn`` the result is a decorator
    mesh              with axes of any names
    in_specs          a tree prefix of the tuple of arguments, of :class:`P`
    out_specs         a tree prefix of the result. Not naming an axis claims that the value
                      is the same along it
    backends          carry tokens along an axis for :func:`fmoe.dispatch`: ``{"ep": backend}``.
                      Default: ``torch.distributed``'s all-to-all
    local_results     return this device's plain pieces even for DTensor arguments. They may differ in size
    check_replicated  verify what specs claim to be the same, of arguments and results. It costs two small
                      collectives and waits of the host, so turn it on in tests. In eager mode only
    -> function       takes DTensors placed by ``in_specs``, or plain tensors that are this device's own
                      pieces. If any argument is a DTensor, so are the results, in equal pieces
    ================  ================================================================

    Gradients are exact. The objective of plain losses is their sum over devices, where a value that is the
    same along an axis counts once. The function works inside and under ``torch.func``'s transforms, and under
    ``torch.compile(fullgraph=True)``. ``jvp`` and ``vmap`` need plain tensors.

    Raises ``ValueError`` listing every spec that doesn't fit the mesh or its tensor. It also raises if ``fn``
    uses a differentiable tensor that isn't an argument, which would get a wrong gradient. With
    ``check_replicated``, all devices raise for every value that differs where its spec claims it doesn't.

    Source: JAX's ``shard_map`` with ``check_vma=False``.

    >>> import fmoe
    >>> from fmoe.parallel import psum
    >>> mesh = fmoe.make_mesh("dp=1")
    >>> def loss(w, x):  # w whole, x [N/dp, 3]
    ...     return psum((x @ w).square().sum(), "dp")
    >>> loss = fmoe.shard_map(loss, mesh, in_specs=(fmoe.P(), fmoe.P("dp")), out_specs=fmoe.P())
    >>> torch.func.grad(loss)(torch.ones(3), torch.eye(3))
    tensor([2., 2., 2.])
    >>> @fmoe.shard_map(mesh=mesh, in_specs=fmoe.P("dp"), out_specs=fmoe.P())
    ... def total(x):
    ...     return psum(x.sum(0), "dp")
    >>> total(torch.eye(3))
    tensor([1., 1., 1.])
    """
    if fn is None:
        how: dict[str, Any] = dict(in_specs=in_specs, out_specs=out_specs, backends=backends)
        how |= dict(local_results=local_results, check_replicated=check_replicated)
        return functools.partial(shard_map, mesh=mesh, **how)
    if mesh is None or not callable(fn):
        name, got = ("mesh", mesh) if callable(fn) else ("fn", fn)
        expected = "a mesh" if callable(fn) else "a function, or none beside mesh=, for a decorator"
        raise argument_error("shard_map", name, got=repr(got), expected=expected)
    check_mesh("shard_map", mesh)
    check_specs("shard_map", "in_specs", in_specs, mesh)
    check_specs("shard_map", "out_specs", out_specs, mesh)
    binding = Binding(mesh, tuple((backends or {}).items()))
    for axis in backends or {}:
        if axis not in axis_names(mesh):
            expected = f"an axis of the mesh {describe(mesh)}"
            raise argument_error("shard_map", "backends", got=repr(axis), expected=expected)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        leaves = check_tensors("shard_map", "args", args)
        specs = broadcast("shard_map", "in_specs", in_specs, args)
        _check_arguments(args, leaves, specs, mesh)
        entered = enter(leaves, mesh, specs)
        eager = not torch.compiler.is_dynamo_compiling()
        if check_replicated and eager:
            compare("args", args, entered, specs, mesh)
        with bound(binding):
            out = fn(*optree.tree_unflatten(optree.tree_structure(args), entered))
        values = check_tensors("shard_map", "fn(...)", out)
        specs = broadcast("shard_map", "out_specs", out_specs, out)
        _check_results(out, values, specs, mesh)
        if eager:
            check_captured(entered, values)
            if check_replicated:
                compare("fn(...)", out, values, specs, mesh)
        dtensor = not local_results and any(dtensor_beneath(leaf) for leaf in leaves)
        left = leave(values, mesh, specs, dtensor)
        return optree.tree_unflatten(optree.tree_structure(out), left)

    return call


def _check_arguments(args: Any, leaves: Sequence[torch.Tensor], specs: Sequence[P], mesh: DeviceMesh) -> None:
    problems = []
    for leaf, spec in zip(leaves, specs):
        inner = unwrapped(leaf)
        if is_dtensor(inner) and inner.dim() != leaf.dim():
            raise dtensor_error("vmap")
        found = rank_problems(spec, leaf)
        if is_dtensor(inner) and not found:
            found = [*size_problems(spec, inner, mesh), *placement_problems(spec, inner, mesh)]
        problems.append(found)
    raise_misfits("shard_map", "args", mesh, args, specs, problems)


def _check_results(out: Any, values: Sequence[torch.Tensor], specs: Sequence[P], mesh: DeviceMesh) -> None:
    problems = []
    for value, spec in zip(values, specs):
        wrapped = ["a DTensor; fn returns plain tensors"] if dtensor_beneath(value) else []
        problems.append([*wrapped, *rank_problems(spec, value)])
    raise_misfits("shard_map", "fn(...)", mesh, out, specs, problems)


# ---- captured tensors ------------------------------------------------------------------------------


def check_captured(entered: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Follow the results' graphs back: whatever doesn't come from the arguments was captured."""
    seen = {node for tensor in entered for _, node in _levels(tensor) if node is not None}
    waiting = []
    for value in values:
        for tensor, node in _levels(value):
            if node is None and tensor.requires_grad:
                raise captured_error("shard_map", tensor)
            waiting.append(node)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            raise captured_error("shard_map", node.variable)
        waiting += [following for following, _ in node.next_functions]


def _levels(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, Any]]:
    """A tensor and its node in the graph, at every level of ``torch.func``'s transforms."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor, tensor.grad_fn
        tensor = functorch.get_unwrapped(tensor)
    yield tensor, tensor.grad_fn
