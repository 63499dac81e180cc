"""Names for values of a user's own, which remat's policies see beside those of operators."""

import difflib
import functools
from typing import Any, TypeVar

import optree
import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from ...errors import argument_error
from .batches import elementwise
from .dynamo import constant_to_dynamo
from .primitive import GIVEN, linear
from .tape import Tape, checkpoint, checkpoint_names, current_tape

T = TypeVar("T")


def _example() -> tuple[Any, ...]:
    return torch.randn(3, dtype=torch.float64), "hidden"


named_op = linear(
    "checkpoint_name(Tensor x, str name) -> Tensor",
    impl=lambda x, name: x.clone(),  # Dynamo's operators may not return their arguments
    fake=lambda x, name: torch.empty_like(x),
    checkpoint=checkpoint(GIVEN, save=False),
    example=_example,
    plain=lambda x, name: x.clone(),
    transpose=lambda g, shape, name: g,
    jvp=lambda t, name: t,
    vmap=elementwise,
)


def checkpoint_name(x: T, name: str) -> T:
    """``x``, which the policies of :func:`fmoe.remat` know as ``name``.

    ======  ==========================================================================
    x       a tensor, or a tree of tensors, of any shape and dtype
    name    any word: an operator's own, or one that isn't nearly an operator's
    -> T    ``x`` itself; in a compiled function a copy
    ======  ==========================================================================

    Outside ``remat`` it does nothing. Inside, ``save(name)`` keeps the value, ``offload(name)`` keeps it in
    the host's memory, and ``compress(name)`` in fp8. The default policy doesn't keep it. The operation that
    gave ``x`` doesn't run again if the policy keeps it, apart from PyTorch's own beneath ``vmap`` and
    ``jvp``, and those with several results. Whatever came before does, as its values may be needed.

    Raises ``ValueError`` for a name that could be meant for an operator's, and for what isn't a tensor.

    Source: ``jax.ad_checkpoint.checkpoint_name``.

    >>> import fmoe
    >>> def mlp(w, x):
    ...     hidden = fmoe.checkpoint_name(x @ w["up"], "hidden")
    ...     return hidden.relu() @ w["down"]
    >>> w, x = {"up": torch.randn(4, 16), "down": torch.randn(16, 4)}, torch.randn(3, 4)
    >>> loss = lambda mlp: lambda w: mlp(w, x).sum()
    >>> lean = torch.func.grad(loss(fmoe.remat(mlp, fmoe.save("hidden"))))(w)  # one product runs again
    >>> torch.equal(lean["up"], torch.func.grad(loss(mlp))(w)["up"])
    True
    """
    check_names("checkpoint_name", "name", (name,))
    return optree.tree_map(lambda leaf: _named(leaf, name), x)


@constant_to_dynamo
def check_names(function: str, argument: str, names: tuple[Any, ...], *, own: bool = True) -> None:
    """Raise ``ValueError`` for what is no name, or nearly an operator's; without ``own``, for any other."""
    known = frozenset(checkpoint_names()) - {GIVEN}
    for name in names:
        if isinstance(name, str) and name in known:
            continue
        expected = f"names of {sorted(known)}" + (", or of your own for checkpoint_name" if own else "")
        remedy = None if own else "Declare others with fmoe.extend.checkpoint."
        valid = isinstance(name, str) and name != ""
        if near := _nearest(name, known) if valid else []:
            remedy = f"Write {near[0]!r}, or choose a name that is less like it."
        if near or not (valid and own):
            got = "a tensor" if isinstance(name, torch.Tensor) else repr(name)
            if isinstance(name, list | tuple):
                remedy = "Give each name as an argument of its own."
            raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)


@functools.lru_cache
def _nearest(name: str, known: frozenset[str]) -> list[str]:
    return difflib.get_close_matches(name, known, 1, 0.8)


def _named(x: Any, name: str) -> Any:
    if not isinstance(x, torch.Tensor):
        expected = "tensors, or trees of them"
        raise argument_error("checkpoint_name", "x", got=f"a {type(x).__name__}", expected=expected)
    if torch.compiler.is_dynamo_compiling():
        return named_op(x, name)
    return observed(x, name)


def observed(x: torch.Tensor, name: str) -> torch.Tensor:
    """The value of a call outside ``torch.compile``, which modes of PyTorch's functions see."""
    if has_torch_function_unary(x):
        return handle_torch_function(observed, (x,), x, name)
    tape = current_tape()
    return tape.name(named_op, x, name) if isinstance(tape, Tape) else x
