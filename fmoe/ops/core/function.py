"""An operator as ``autograd.Function``: one for Dynamo, and one that works everywhere else.

PyTorch facts this file works around (seen on 2.11 and 2.13):
``torch.library.custom_op`` raises inside ``torch.func.grad`` and gives zero tangents under ``jvp``, hence raw
operators inside Functions. A Function that defines ``jvp`` cannot be traced by Dynamo, nor can one whose
methods close over objects, hence two Functions. ``jvp`` rules run with forward AD disabled, which silently
drops second tangents, hence :func:`primal`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from ...errors import TransformError
from .batches import Fold, each, front, one_more
from .derive import Tensors, as_tuple, few
from .engine import runs
from .refuse import Unsupported, refusing_combinations
from .tape import reset_tape, set_tape


def traced_function(op: Any) -> Any:
    """The operator's Function for Dynamo, which traces neither ``jvp`` rules nor closures over objects."""
    n, num_values, raw = op.num_inputs, op.num_values, op.raw
    residuals_of, vjp, name, by_hand = op.rules.residuals, op.rules.vjp, op.name, "vjp" in op.by_hand

    def forward(*args: Any) -> Any:
        return raw(*args[-n:])  # Dynamo puts a context in front when nothing requires a gradient

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = as_tuple(output)
        _keep(ctx, residuals_of(inputs, outputs), outputs, num_values)

    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if not by_hand:  # a derived one is a torch.func transform
            raise TransformError(
                f"{name}: cannot be differentiated under torch.compile. Differentiate it uncompiled."
            )
        kept = _restored(ctx.kept, ctx.saved_tensors)
        return _padded(vjp(kept, ctx.needs_input_grad, *cotangents[:num_values]), n)

    return _make(op.name, forward, setup_context, backward)


def eager_function(op: Any) -> Any:
    """The operator's Function everywhere else; outputs kept earlier may follow its inputs."""
    n, rules = op.num_inputs, op.rules

    def forward(*args: Any) -> Any:
        kept = args[n:]
        return few(tuple(k.detach() for k in kept)) if kept else op.raw(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = as_tuple(output)
        check_constant(op, outputs)
        ctx.num_kept = len(inputs) - n
        ctx.where = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.outputs = [(o.shape, o.dtype, o.device) for o in outputs[: op.num_values]]
        ctx.save_for_forward(*_keep(ctx, rules.residuals(inputs[:n], outputs), outputs, op.num_values))

    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        cotangents = unwrap_dead_wrappers(cotangents)[: op.num_values]
        found: Any = ()
        if rules.vjp is not None and any(c is not None for c in cotangents):
            kept = _restored(ctx.kept, unwrap_dead_wrappers(ctx.saved_tensors))
            with _rule(op, "grad", rules.vjp):
                needs = _asked_for(ctx) if op.by_need else ctx.needs_input_grad
                found = rules.vjp(kept, needs[:n], *cotangents)
        return _padded(found, n + ctx.num_kept)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        found: Any = ()
        if rules.jvp is not None:
            with _rule(op, "jvp", rules.jvp), forward_ad._set_fwd_grad_enabled(True):
                kept = _restored(ctx.kept, [primal(t) for t in ctx.saved_tensors])
                found = as_tuple(rules.jvp(kept, *tangents[:n]))[: op.num_values]
                found = [zeros(*like) if t is None else t for t, like in zip(found, ctx.outputs)]
        return few(_padded(tuple(found), op.num_outputs))

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, inputs, dims = info.batch_size, args[:n], in_dims[:n]
        kept = tuple(front(k, d, size) for k, d in zip(args[n:], in_dims[n:]))
        with _rule(op, "vmap", rules.vmap):
            if all(d is None for d in dims):  # only kept outputs are batched, with equal examples
                again = (k[0] for k in kept) if size else ()
                return op.function.apply(*inputs, *again), few((None,) * op.num_outputs)
            if kept and rules.vjp is None:  # nothing to differentiate: the values are the answer
                return few(tuple(k.clone() for k in kept)), few((0,) * op.num_outputs)
            moved = [a if d is None else a.movedim(d, 0) for a, d in zip(inputs, dims)]
            dims = tuple(None if d is None else 0 for d in dims)
            if size == 0:  # rules needn't know of it: they get one example, of zeros
                moved, kept = [a if d is None else one_more(a) for a, d in zip(moved, dims)], ()
            out = rules.vmap(size or 1, dims, *moved)
            if out is None:
                out = each(op.outputs, size or 1, dims, *moved)
            elif isinstance(out, Fold):
                folded = op.function.apply(*out.args, *(out.refold(kept) if kept else ()))
                out = out.unfold(as_tuple(folded))
            if size == 0:
                out = tuple(o[:0] for o in out)
            return few(out), few((0,) * op.num_outputs)

    function = _make(op.name, forward, setup_context, backward, base=_Unbound, jvp=jvp, vmap=vmap)
    function.by_need = op.by_need
    return function


class _Unbound(torch.autograd.Function):
    """A Function whose arguments aren't bound to the signature of ``forward`` anew at each call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        plainly: Any = super(torch.autograd.Function, cls)
        return plainly.apply(*unwrap_dead_wrappers(args))


def check_constant(op: Any, outputs: Tensors) -> None:
    """Raise ``TypeError`` for an operator without a ``vjp`` that would need one."""
    if op.rules.vjp is None and any(o.is_floating_point() for o in outputs):
        raise TypeError(f"{op.name}: declared without a vjp, yet it has a floating-point output.")


def no_derivative(*, constant: bool = False) -> bool:
    """Whether nothing is differentiated or mapped now, as in a backward that makes no graph.

    Nor is what an operator gives that is ``constant``, unless ``torch.func`` or forward AD is at work.
    """
    some = torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and not constant)
    return not some and forward_ad._current_level < 0


def _make(
    name: str,
    forward: Any,
    setup_context: Any,
    backward: Any,
    base: type[torch.autograd.Function] = torch.autograd.Function,
    **more: Any,
) -> Any:
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, **more}
    title = "".join(word.capitalize() for word in name.split("_"))
    return type(title, (base,), {k: staticmethod(f) for k, f in methods.items()})


def _asked_for(ctx: Any) -> list[bool]:
    """Which inputs want a cotangent in this run of the engine: not all that require a gradient need one."""
    needs = [*ctx.needs_input_grad]
    following = ctx.next_functions
    if sum(needs) > 1 and len(following) == len(ctx.where):  # one for each tensor
        for i, (node, _) in zip(ctx.where, following):
            needs[i] = needs[i] and (node is None or runs(node))
    return needs


class _rule(refusing_combinations):
    """Around every rule: operators called by a rule belong to no tape; a missing rule is an error."""

    def __init__(self, op: Any, transform: str, rule: Any) -> None:
        if rule is None or isinstance(rule, Unsupported):
            remedy = rule.remedy if rule else "Call it outside the transform."
            raise TransformError(f"{op.name}: cannot run under torch.func.{transform}. {remedy}")
        super().__init__(op.name)

    def __enter__(self) -> None:
        self.token = set_tape(None)

    def __exit__(self, *error: Any) -> None:
        reset_tape(self.token)
        super().__exit__(*error)


def _padded(found: Any, number: int) -> tuple[Any, ...]:
    """The values that a rule found, and ``None`` for the rest."""
    found = as_tuple(found)
    return *found, *[None] * (number - len(found))


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The tangent of an output that no tangent reaches: PyTorch takes ``None`` for integers only."""
    return torch.zeros(shape, dtype=dtype, device=device) if dtype.is_floating_point else None


# ---- residuals: nested tuples of tensors and statics -----------------------------------------------


def _keep(ctx: Any, residuals: Any, outputs: Tensors, num_values: int) -> list[torch.Tensor]:
    """Save an operator's residuals; say which of its outputs have no derivative."""
    tensors: list[torch.Tensor] = []
    ctx.kept = _apart(residuals, tensors)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    constant = [o for i, o in enumerate(outputs) if i >= num_values or not o.is_floating_point()]
    if constant:
        ctx.mark_non_differentiable(*constant)
    return tensors


def _apart(values: tuple[Any, ...], tensors: list[torch.Tensor]) -> Any:
    """Nested tuples, named or not, without their tensors, which go to a list: their class stands there."""
    kept: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            value = torch.Tensor
        kept.append(_apart(value, tensors) if isinstance(value, tuple) else value)
    return _like(values, kept)


def _restored(kept: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The reverse."""
    return _together(kept, iter(tensors))


def _together(kept: tuple[Any, ...], rest: Iterator[torch.Tensor]) -> Any:
    values = [
        next(rest) if item is torch.Tensor else _together(item, rest) if isinstance(item, tuple) else item
        for item in kept
    ]
    return _like(kept, values)


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def primal(x: torch.Tensor) -> torch.Tensor:
    """A saved tensor without its own tangent, also beneath a batch dimension."""
    if not x.is_floating_point():
        return x
    if functorch.is_batchedtensor(x):
        level, dim = functorch.maybe_get_level(x), functorch.maybe_get_bdim(x)
        return functorch._add_batch_dim(primal(functorch.get_unwrapped(x)), dim, level)
    return torch._VF._unpack_dual(x, level=0)[0]
