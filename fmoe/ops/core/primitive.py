"""The one way an operator is declared.

An operator is a *raw* kernel per device (``torch.library``, invisible to autograd), wrapped in
``autograd.Function`` classes (``ops/core/function.py``) that carry its rules:

``vjp``   cotangents of the outputs -> cotangents of the inputs
``jvp``   tangents of the inputs -> tangents of the outputs
``vmap``  a batched call -> one larger call (:class:`~fmoe.ops.core.batches.Fold`)

Rules are written in terms of other operators, so derivatives of derivatives exist. A *linear* operator names
its transpose. Another *base* operator states its three rules by hand. A *fused* one states a ``reference``,
the same function composed from base operators, from which every rule it doesn't state follows.

Every operator also carries its checkpoint name, by which :func:`fmoe.remat` decides what to keep. When a
kept operator is recomputed, its outputs are handed back to it as extra arguments (``ops/core/tape.py``). Its
value is then known, and only its rules are used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._functorch.utils import unwrap_dead_wrappers

from .derive import Rules, Tensors, as_tuple, derive, few, inputs_alone
from .dynamo import hidden_from_dynamo
from .function import check_constant, eager_function, no_derivative, traced_function
from .modes import without_autocast
from .refuse import Unsupported, refuse_transforms_inside_compile
from .tape import current_tape

NAMESPACE = "fmoe"
GIVEN = "given"  # the checkpoint name of the operator whose second argument is one

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_REGISTRY: "dict[str, Operator]" = {}

Rule = Callable[..., Any] | Unsupported


@dataclass(eq=False, repr=False)
class Operator:
    """A differentiable function with a raw kernel; made by :func:`declare`.

    >>> import fmoe
    >>> gather = operators()["gather"]
    >>> gather(torch.tensor([5.0, 7.0]), torch.tensor([1, -1]))  # -1: no row, so zero
    tensor([7., 0.])
    >>> gather, gather.checkpoint, gather.by_hand == {"vjp", "jvp", "vmap"}
    (<operator gather>, 'gather', True)
    """

    raw: Any
    rules: Rules
    by_hand: frozenset[str]
    checkpoint: str
    example: Any
    plain: Any
    dependent: Callable[..., Tensors]
    residual_outputs: int
    by_need: bool = False
    kept: Callable[[Tensors], Tensors] = tuple

    def __post_init__(self) -> None:
        self.name = self.raw._schema.name.removeprefix(f"{NAMESPACE}::")
        self.num_inputs = len(self.raw._schema.arguments)
        self.num_outputs = len(self.raw._schema.returns)
        self.num_values = self.num_outputs - self.residual_outputs
        self.traced = self.raw if self.rules.vjp is None else traced_function(self).apply
        self.function = eager_function(self)

    def __repr__(self) -> str:
        return f"<operator {self.name}>"

    def __call__(self, *args: Any) -> Any:
        return few(self.outputs(*args)[: self.num_values])

    def checkpoint_of(self, args: tuple[Any, ...]) -> str:
        """The checkpoint name of a call: the operator's own, or what ``checkpoint_name`` was given."""
        return args[1] if self.checkpoint == GIVEN else self.checkpoint

    def outputs(self, *args: Any) -> Tensors:
        """All outputs, those without a derivative included. Arguments left out are ``None``."""
        args = (*args, *[None] * (self.num_inputs - len(args)))
        if torch.compiler.is_dynamo_compiling():
            refuse_transforms_inside_compile(self.name)
            return as_tuple(self.traced(*args))
        return as_tuple(_eager(self, args))


@hidden_from_dynamo  # in frames it gave up, Dynamo would look into rules and tapes
def _eager(op: Operator, args: tuple[Any, ...]) -> Any:
    tape = current_tape()
    if tape is not None:
        return tape.call(op, args)
    if not no_derivative(constant=op.rules.vjp is None):
        return op.function.apply(*args)
    with torch.no_grad():  # that a kernel in PyTorch records nothing
        found = op.raw(*unwrap_dead_wrappers(args))
    if torch.is_grad_enabled():
        check_constant(op, as_tuple(found))
    return found


def declare(
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    checkpoint: str,
    example: Callable[[], tuple[Any, ...]] | None,
    plain: Callable[..., Any] | None = None,
    dependent: Callable[..., Tensors] = lambda *inputs: (),
    residual_outputs: int = 0,
    by_need: bool = False,
    kept: Callable[[Tensors], Tensors] = tuple,
    residuals: Callable[[tuple[Any, ...], Tensors], tuple[Any, ...]] | None = None,
    vjp: Rule | None = None,
    jvp: Rule | None = None,
    vmap: Rule | None = None,
    reference: Callable[..., Any] | None = None,
) -> Operator:
    """Declare an operator and register it under its schema's name, which no other may have.

    ================  ========================================
    schema            ``"gather(Tensor x, Tensor index) -> Tensor"``
    impl              the kernel, on any device; never sees autograd
    fake              output shapes and dtypes from input shapes and dtypes
    checkpoint        a name declared with :func:`fmoe.extend.checkpoint`
    example           random arguments in float64, of the same shapes each time; ``None`` for a part of an
                      operator, which computes nothing alone, and equals nothing
    plain             the same function in plain PyTorch, the oracle; not needed with a ``reference``
    dependent         the example's last arguments where they follow from the others, as in a backward
    residual_outputs  how many trailing outputs have no derivative, and are seen by the backward and by
                      callers of :meth:`Operator.outputs` only
    by_need           whether ``vjp`` computes nothing but what ``needs`` says: then the two halves of a
                      pipeline's backward compute nothing twice
    kept              what a policy keeps of the outputs: all, or less where the rest needn't be handed back
    residuals         ``(inputs, outputs)`` -> what the rules need, a tuple or ``NamedTuple`` of tensors,
                      statics and further tuples; nothing else is kept; default: the inputs
    vjp               ``(residuals, needs, *cotangents)`` -> cotangents of the inputs, or of the first of
                      them; ``needs`` says which inputs want one
    jvp               ``(residuals, *tangents)`` -> tangents of the outputs; ``None`` where there is none
    vmap              ``(batch_size, dims, *inputs)``, ``dims`` 0 or ``None`` ->
                      :class:`~fmoe.ops.core.batches.Fold`, the outputs with the batch in front, or
                      ``None``: the operator then runs for one example after another
    reference         the same function of base operators; gives each rule that isn't stated
    ================  ========================================

    An operator without floating-point outputs needs no ``vjp`` and no ``jvp``. Where a rule can't
    exist, :class:`~fmoe.ops.core.refuse.Unsupported` takes its place. ``docs/operators.md`` declares some.

    Raises ``TypeError`` for an ``example`` with neither ``plain`` nor ``reference``.

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
    raw = kernel(schema, impl=impl, fake=fake)
    name = schema.partition("(")[0]
    by_hand = frozenset(n for n, rule in dict(vjp=vjp, jvp=jvp, vmap=vmap).items() if rule is not None)
    if reference is not None:
        derived = derive(reference, len(raw._schema.arguments))
        vjp, jvp, vmap = vjp or derived.vjp, jvp or derived.jvp, vmap or derived.vmap
    plain = plain or reference
    if plain is None and example is not None:
        raise TypeError(f"{name}: declared with neither a plain function nor a reference.")
    rules = Rules(vjp, jvp, vmap, residuals or (inputs_alone if vjp else _nothing))
    op = Operator(raw, rules, by_hand, checkpoint, example, plain, dependent, residual_outputs, by_need, kept)
    _REGISTRY[name] = op
    return op


def kernel(
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """The raw kernel alone, without rules: PyTorch's dispatcher knows it, and autograd doesn't see it.

    ``vmap`` is what ``torch.library.register_vmap`` takes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, without_autocast(impl), device)
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if vmap:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class _Others(NamedTuple):
    """The residuals of a linear operator: its first argument's shape, and the other arguments."""

    shape: tuple[int, ...]
    others: tuple[Any, ...]


def linear(
    schema: str,
    *,
    transpose: str | Callable[..., torch.Tensor],
    jvp: Callable[..., torch.Tensor] | None = None,
    **others: Any,
) -> Operator:
    """Declare an operator that is linear in its first argument and isn't differentiated by the others.

    =========  ========================================
    transpose  the name of an operator of the same other arguments, or a function of ``(cotangent, shape,
               *others)``, ``shape`` being the first argument's; either may be declared later
    jvp        ``(tangent, *others)`` -> tangent; default: the operator itself
    others     ``impl``, ``fake``, ``checkpoint``, ``example``, ``plain`` and ``vmap``, as for :func:`declare`
    =========  ========================================

    >>> from fmoe.ops.bases import random
    >>> from fmoe.ops.core.batches import elementwise
    >>> from fmoe.ops.core.tape import checkpoint
    >>> times = linear(
    ...     "test_times(Tensor x, float factor) -> Tensor",
    ...     impl=torch.mul, fake=lambda x, factor: x.new_empty(x.shape),
    ...     checkpoint=checkpoint("times", save=False), example=lambda: (random(3), 2.0), plain=torch.mul,
    ...     transpose="test_times", vmap=elementwise,
    ... )
    >>> torch.func.grad(times)(torch.tensor(3.0), 5.0)
    tensor(5.)
    """
    name = schema.partition("(")[0]
    transposed = _named(transpose) if isinstance(transpose, str) else transpose
    moved = jvp or (lambda tangent, *others: _REGISTRY[name](tangent, *others))
    return declare(
        schema,
        by_need=True,
        residuals=lambda inputs, outputs: _Others(inputs[0].shape, inputs[1:]),
        vjp=lambda kept, needs, g: transposed(g, kept.shape, *kept.others),
        jvp=lambda kept, tangent, *_: moved(tangent, *kept.others),
        **others,
    )


def _named(name: str) -> Callable[..., Any]:
    return lambda cotangent, shape, *others: _REGISTRY[name](cotangent, *others)


def _nothing(inputs: tuple[Any, ...], outputs: Tensors) -> tuple[Any, ...]:
    return ()


def operators() -> dict[str, Operator]:
    """Every operator declared so far, by name.

    >>> import fmoe
    >>> operators()["gather"].checkpoint
    'gather'
    """
    return dict(_REGISTRY)
