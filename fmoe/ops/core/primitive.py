"""The one way an operator is declared.

An operator is a *raw* kernel per device (``torch.library``, invisible to autograd), wrapped in
``autograd.Function`` classes that carry its rules:

``vjp``   cotangents of the outputs -> cotangents of the inputs
``jvp``   tangents of the inputs -> tangents of the outputs
``vmap``  a batched call -> one larger call (:class:`Fold`)

Rules are written in terms of other operators, so derivatives of derivatives exist. A *base*
operator states its three rules by hand; a *fused* one states a ``reference``, the same function
composed from base operators, from which every rule it doesn't state follows.

Every operator also carries its checkpoint name, by which :func:`fmoe.remat` decides what to keep.
To recompute without running a kept operator again, its outputs are handed back to it as extra
arguments (``ops/core/tape.py``): its value is then known, and only its rules are used.

PyTorch facts this file works around (seen on 2.11 and 2.13):
``torch.library.custom_op`` raises inside ``torch.func.grad`` and gives zero tangents under
``jvp``, hence raw operators. A Function that defines ``jvp`` cannot be traced by Dynamo, hence two
classes. ``jvp`` rules run with forward AD disabled, which silently drops second tangents, hence
:func:`primal`. Transforms inside ``torch.compile`` drop custom backwards silently
(pytorch#193279), hence
``ops/core/refuse.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ...errors import TransformError
from .derive import Rules, Tensors, derive, few
from .dynamo import hidden_from_dynamo
from .modes import without_autocast
from .refuse import Unsupported, refuse_transforms_inside_compile, refusing_nested_forward_mode
from .tape import current_tape, no_tape

NAMESPACE = "fmoe"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_REGISTRY: "dict[str, Operator]" = {}


class Fold(NamedTuple):
    """A ``vmap`` rule's answer: the batch as one larger call of the same operator.

    ``operator(*args)`` computes it, ``unfold`` turns its outputs into batched ones (batch first),
    ``refold`` is the inverse of ``unfold``, through which kept outputs are handed back.

    >>> from fmoe.ops.bases import gather
    >>> x, index = torch.tensor([5.0, 7.0]), torch.tensor([[0, 1], [1, 1]])
    >>> fold = gather.rules.vmap(2, (None, 0), x, index)  # the same x for two examples
    >>> gather(*fold.args), fold.unfold((gather(*fold.args),))
    (tensor([5., 7., 7., 7.]), (tensor([[5., 7.],
            [7., 7.]]),))
    """

    args: tuple[Any, ...]
    unfold: Callable[[Tensors], Tensors]
    refold: Callable[[Tensors], Tensors]


class Stated(NamedTuple):
    """What a declaration says beside its rules: what to check it by, and which rules it wrote by hand."""

    plain: Callable[..., Any]
    example: Callable[[], tuple[Any, ...]]
    dependent: Callable[..., Tensors]
    by_hand: frozenset[str]


class Operator:
    """A differentiable function with a raw kernel; made by :func:`declare`.

    >>> import fmoe
    >>> gather = operators()["gather"]
    >>> gather(torch.tensor([5.0, 7.0]), torch.tensor([1, -1]))  # -1: no row, so zero
    tensor([7., 0.])
    >>> gather, gather.checkpoint, gather.by_hand == {"vjp", "jvp", "vmap"}
    (<operator gather>, 'gather', True)
    """

    def __init__(
        self, name: str, raw: Any, checkpoint: str, residual_outputs: int, rules: Rules, stated: Stated
    ) -> None:
        self.name = name
        self.raw = raw
        self.checkpoint = checkpoint
        self.rules = rules
        self.plain, self.example, self.dependent, self.by_hand = stated
        self.num_inputs = len(raw._schema.arguments)
        self.num_outputs = len(raw._schema.returns)
        self.num_values = self.num_outputs - residual_outputs
        self.traced = raw if rules.vjp is None else _traced_function(self).apply
        self.function = _function(self)

    def __repr__(self) -> str:
        return f"<operator {self.name}>"

    def __call__(self, *args: Any) -> Any:
        return few(self.outputs(*args)[: self.num_values])

    def outputs(self, *args: Any) -> Tensors:
        """All outputs, those for the backward included."""
        if torch.compiler.is_dynamo_compiling():
            refuse_transforms_inside_compile(self.name)
            out = self.traced(*args)
        else:
            out = _eager(self, args)
        return out if isinstance(out, tuple) else (out,)


@hidden_from_dynamo  # in frames it gave up, Dynamo would look into rules and tapes
def _eager(op: Operator, args: tuple[Any, ...]) -> Any:
    tape = current_tape()
    return op.function.apply(*args) if tape is None else tape.call(op, args)


def declare(
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    checkpoint: str,
    example: Callable[[], tuple[Any, ...]],
    plain: Callable[..., Any] | None = None,
    dependent: Callable[..., Tensors] = lambda *inputs: (),
    residual_outputs: int = 0,
    residuals: Callable[[tuple[Any, ...], Tensors], tuple[Any, ...]] | None = None,
    vjp: Callable[..., tuple[Any, ...]] | Unsupported | None = None,
    jvp: Callable[..., Any] | Unsupported | None = None,
    vmap: Callable[..., Any] | Unsupported | None = None,
    reference: Callable[..., Any] | None = None,
) -> Operator:
    """Declare an operator and register it under its schema's name, which no other may have.

    ================  ========================================
    schema            ``"gather(Tensor x, Tensor index) -> Tensor"``
    impl              the kernel, on any device; never sees autograd
    fake              output shapes and dtypes from input shapes and dtypes
    checkpoint        a name declared with :func:`fmoe.ops.core.tape.checkpoint`
    example           random arguments in float64, of the same shapes each time
    plain             the same function in plain PyTorch, the oracle; not needed with a ``reference``
    dependent         the example's last arguments, where they follow from the others: what a forward
                      hands to its backward
    residual_outputs  how many trailing outputs exist for the backward only; callers don't see them
    residuals         ``(inputs, outputs)`` -> what the rules need; nothing else is kept
    vjp               ``(residuals, needs, *cotangents)``; ``needs`` says which inputs want one
    jvp               ``(residuals, *tangents)``, ``None`` where there is none
    vmap              ``(batch_size, dims, *inputs)``, ``dims`` 0 or ``None`` -> :class:`Fold`, or the
                      outputs with the batch in front
    reference         the same function of base operators; gives each rule that isn't stated
    ================  ========================================

    An operator without floating-point outputs needs no ``vjp`` and no ``jvp``. Where a rule can't
    exist, :class:`~fmoe.ops.core.refuse.Unsupported` takes its place. ``docs/operators.md`` declares two.

    Raises ``TypeError`` with neither ``plain`` nor ``reference``.

    >>> from fmoe.ops.bases import random
    >>> from fmoe.ops.core.tape import checkpoint
    >>> square = declare(
    ...     "test_square(Tensor x) -> Tensor", impl=lambda x: x * x, fake=torch.empty_like,
    ...     checkpoint=checkpoint("square", save=False), example=lambda: (random(3),),
    ...     reference=lambda x: x**2,
    ... )
    >>> torch.func.grad(torch.func.grad(square))(torch.tensor(3.0))  # its rules follow from the reference
    tensor(2.)
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, without_autocast(impl), device)
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    raw = getattr(getattr(torch.ops, NAMESPACE), name).default
    by_hand = frozenset(n for n, rule in dict(vjp=vjp, jvp=jvp, vmap=vmap).items() if rule is not None)
    if reference is not None:
        derived = derive(reference, len(raw._schema.arguments))
        residuals = residuals or derived.residuals
        vjp, jvp, vmap = vjp or derived.vjp, jvp or derived.jvp, vmap or derived.vmap
    plain = plain or reference
    if plain is None:
        raise TypeError(f"{name}: declared with neither a plain function nor a reference.")
    stated = Stated(plain, example, dependent, by_hand)
    rules = Rules(residuals or (lambda inputs, outputs: ()), vjp, jvp, vmap)
    _REGISTRY[name] = Operator(name, raw, checkpoint, residual_outputs, rules, stated)
    return _REGISTRY[name]


def operators() -> dict[str, Operator]:
    """Every operator declared so far, by name.

    >>> import fmoe
    >>> operators()["gather"].checkpoint
    'gather'
    """
    return dict(_REGISTRY)


# ---- the autograd.Functions ------------------------------------------------------------------


def _traced_function(op: Operator) -> Any:
    """The operator's Function for Dynamo, which traces neither ``jvp`` rules nor closures over objects."""
    n, num_values, raw = op.num_inputs, op.num_values, op.raw
    residuals_of, vjp, name, by_hand = op.rules.residuals, op.rules.vjp, op.name, "vjp" in op.by_hand

    def forward(*args: Any) -> Any:
        return raw(*args[-n:])  # Dynamo puts a context in front when nothing requires a gradient

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        _keep(ctx, residuals_of(inputs, outputs), outputs, num_values)

    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if not by_hand:  # a derived one is a torch.func transform
            raise TransformError(
                f"{name}: cannot be differentiated under torch.compile. Differentiate it uncompiled."
            )
        return vjp(_residuals(ctx, ctx.saved_tensors), ctx.needs_input_grad, *cotangents[:num_values])

    return _make(op.name, forward, setup_context, backward)


def _function(op: Operator) -> Any:
    """The operator's Function everywhere else; outputs kept earlier may follow its inputs."""
    n, rules = op.num_inputs, op.rules

    def forward(*args: Any) -> Any:
        kept = args[n:]
        return few(tuple(k.detach() for k in kept)) if kept else op.raw(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if rules.vjp is None and any(o.is_floating_point() for o in outputs):
            raise TypeError(f"{op.name}: declared without a vjp, yet it has a floating-point output.")
        ctx.num_kept = len(inputs) - n
        ctx.save_for_forward(*_keep(ctx, rules.residuals(inputs[:n], outputs), outputs, op.num_values))

    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        cotangents = unwrap_dead_wrappers(cotangents)[: op.num_values]
        if rules.vjp is None or all(c is None for c in cotangents):
            return (None,) * (n + ctx.num_kept)
        residuals = _residuals(ctx, unwrap_dead_wrappers(ctx.saved_tensors))
        with _rule(op, "grad", rules.vjp):
            return *rules.vjp(residuals, ctx.needs_input_grad[:n], *cotangents), *[None] * ctx.num_kept

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if rules.jvp is None:
            return few((None,) * op.num_outputs)
        with _rule(op, "jvp", rules.jvp), _set_fwd_grad_enabled(True):
            residuals = _residuals(ctx, [primal(t) for t in ctx.saved_tensors])
            out = rules.jvp(residuals, *tangents[:n])
            out = out[: op.num_values] if isinstance(out, tuple) else (out,)
            return few((*out, *[None] * (op.num_outputs - len(out))))

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, inputs, dims = info.batch_size, args[:n], in_dims[:n]
        kept = tuple(front(k, d, size) for k, d in zip(args[n:], in_dims[n:]))
        with _rule(op, "vmap", rules.vmap):
            if all(d is None for d in dims):  # only kept outputs are batched, with equal examples
                return op.function.apply(*inputs, *(k[0] for k in kept)), few((None,) * op.num_outputs)
            if kept and rules.vjp is None:  # nothing to differentiate: the values are the answer
                return few(tuple(k.clone() for k in kept)), few((0,) * op.num_outputs)
            moved = (a if d is None else a.movedim(d, 0) for a, d in zip(inputs, dims))
            out = rules.vmap(size, tuple(None if d is None else 0 for d in dims), *moved)
            if isinstance(out, Fold):
                folded = op.function.apply(*out.args, *(out.refold(kept) if kept else ()))
                out = out.unfold(folded if isinstance(folded, tuple) else (folded,))
            return few(out), few((0,) * op.num_outputs)

    return _make(op.name, forward, setup_context, backward, jvp=jvp, vmap=vmap)


def _make(name: str, forward: Any, setup_context: Any, backward: Any, **more: Any) -> Any:
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, **more}
    title = "".join(word.capitalize() for word in name.split("_"))
    return type(title, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})


def _keep(ctx: Any, residuals: tuple[Any, ...], outputs: Tensors, num_values: int) -> list[torch.Tensor]:
    """Save an operator's residuals; say which of its outputs have no derivative."""
    tensors = [r for r in residuals if isinstance(r, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.statics = [None if isinstance(r, torch.Tensor) else (r,) for r in residuals]
    ctx.set_materialize_grads(False)
    constant = [o for i, o in enumerate(outputs) if i >= num_values or not o.is_floating_point()]
    if constant:
        ctx.mark_non_differentiable(*constant)
    return tensors


@contextmanager
def _rule(op: Operator, transform: str, rule: Any) -> Iterator[None]:
    """Around every rule: operators called by a rule belong to no tape; a missing rule is an error."""
    if rule is None or isinstance(rule, Unsupported):
        remedy = rule.remedy if rule else "Call it outside the transform."
        raise TransformError(f"{op.name}: cannot run under torch.func.{transform}. {remedy}")
    with no_tape(), refusing_nested_forward_mode(op.name):
        yield


def _residuals(ctx: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    rest = iter(tensors)
    return tuple(next(rest) if s is None else s[0] for s in ctx.statics)


def front(value: Any, dim: int | None, size: int) -> Any:
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def primal(x: torch.Tensor) -> torch.Tensor:
    """A saved tensor without its own tangent, also beneath a batch dimension."""
    if not x.is_floating_point():
        return x
    if functorch.is_batchedtensor(x):
        level, dim = functorch.maybe_get_level(x), functorch.maybe_get_bdim(x)
        return functorch._add_batch_dim(primal(functorch.get_unwrapped(x)), dim, level)
    return torch._VF._unpack_dual(x, level=0)[0]
