"""Rules of an operator from a reference: the same function composed of other operators."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch._C import _functorch as functorch

Tensors = tuple[torch.Tensor, ...]
Dims = tuple[int | None, ...]


def inputs_alone(inputs: tuple[Any, ...], outputs: Tensors) -> tuple[Any, ...]:
    return inputs


class Rules(NamedTuple):
    """An operator's behaviour under transforms; ``ops/core/primitive.py`` says what each rule takes."""

    vjp: Any
    jvp: Any
    vmap: Any
    residuals: Callable[[tuple[Any, ...], Tensors], tuple[Any, ...]] = inputs_alone


def few(values: tuple[Any, ...]) -> Any:
    """A tuple of values, or the only one."""
    return values[0] if len(values) == 1 else values


def as_tuple(values: Any) -> tuple[Any, ...]:
    """The reverse."""
    return values if isinstance(values, tuple) else (values,)


def replaced(values: Sequence[Any], where: Iterable[int], by: Iterable[Any]) -> list[Any]:
    """A list of ``values`` with others at some places."""
    found = list(values)
    for i, value in zip(where, by):
        found[i] = value
    return found


def pull(
    fn: Callable[..., Any],
    values: Sequence[torch.Tensor],
    cotangents: Sequence[Any],
    *,
    inputs: Sequence[Any] = (),
) -> Tensors:
    """Cotangents of ``fn``'s arguments ``values``, from those of its outputs; ``None`` stands for zeros.

    ``inputs`` are what else ``fn`` depends on. Beneath a transform this is ``torch.func.vjp``. In plain
    autograd it is ``torch.autograd.grad``, because ``torch.func`` forbids saved-tensor hooks, of which
    ``save_on_cpu`` and PyTorch's checkpoint are made.

    >>> pull(torch.mul, [torch.tensor(2.0), torch.tensor(3.0)], [torch.tensor(5.0)])
    (tensor(15.), tensor(10.))
    """
    if functorch.get_interpreter_stack():
        out, back, *_ = torch.func.vjp(fn, *values)
        filled = tuple(
            torch.zeros_like(o) if c is None else c for o, c in zip_longest(as_tuple(out), cotangents)
        )
        return back(filled if isinstance(out, tuple) else filled[0])
    # Without a graph to continue, the result must not depend on the leaves made here.
    again = torch.is_grad_enabled() and any(_requires_grad(v) for v in (*values, *cotangents, *inputs))
    with torch.enable_grad():
        leaves = [v.view_as(v) if again and v.requires_grad else v.detach().requires_grad_() for v in values]
        pairs = zip(as_tuple(fn(*leaves)), cotangents)
        reached = [(o, c) for o, c in pairs if c is not None and o.requires_grad]
    if not (leaves and reached):
        return tuple(torch.zeros_like(v) for v in values)
    outs, given = zip(*reached)
    return torch.autograd.grad(outs, leaves, given, create_graph=again, materialize_grads=True)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def derive(reference: Callable[..., Any], num_inputs: int) -> Rules:
    """Rules of an operator from the same function composed of other operators."""

    def as_function_of(inputs: Sequence[Any], where: Sequence[int]) -> Callable[..., Any]:
        return lambda *values: reference(*replaced(inputs, where, values))

    def floats(inputs: Sequence[Any]) -> list[int]:
        return [i for i, a in enumerate(inputs) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def vjp(inputs: Sequence[Any], needs: Sequence[bool], *cotangents: Any) -> tuple[Any, ...]:
        where = [i for i in floats(inputs) if needs[i]]
        call, values = as_function_of(inputs, where), [inputs[i] for i in where]
        found = dict(zip(where, pull(call, values, cotangents, inputs=inputs)))
        return tuple(found.get(i) for i in range(num_inputs))

    def jvp(inputs: Sequence[Any], *tangents: Any) -> Any:
        where = [i for i in floats(inputs) if i < num_inputs and tangents[i] is not None]
        call = as_function_of(inputs[:num_inputs], where)
        return torch.func.jvp(call, tuple(inputs[i] for i in where), tuple(tangents[i] for i in where))[1]

    def vmap(size: int, dims: Dims, *inputs: Any) -> Tensors:
        out = torch.vmap(reference, in_dims=dims)(*inputs)
        # An output that no input reaches comes out expanded, and forward AD can't write a tangent to that.
        return tuple(o.contiguous() for o in as_tuple(out))

    return Rules(vjp, jvp, vmap)


def pullback(reference: Callable[..., Any]) -> Callable[..., Tensors]:
    """``(cotangent, *inputs)`` -> cotangents of the floating-point inputs of ``reference``'s first output.

    It is the reference of a fused operator's backward.

    >>> pullback(lambda x, y: x * y)(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0))
    (tensor(10.), tensor(6.))
    """

    code = reference.__code__

    def call(cotangent: torch.Tensor, *inputs: Any) -> Tensors:
        num = len(inputs) if code.co_flags & inspect.CO_VARARGS else code.co_argcount
        grads = derive(reference, num).vjp(inputs[:num], (True,) * num, cotangent)
        return tuple(g for g in grads if g is not None)

    return call
