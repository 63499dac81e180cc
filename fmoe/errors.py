"""Errors: each says which function, which argument, what it got, what it expected, and what to do."""

from collections.abc import Sequence
from typing import Any


class TransformError(RuntimeError):
    """An operator was called under a transform that it can't support. The text says what to do instead.

    >>> import fmoe, torch
    >>> from torch.autograd import forward_ad
    >>> with forward_ad.dual_level():
    ...     fmoe.remat(torch.sin)(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fmoe.errors.TransformError: remat: cannot run under torch.autograd.forward_ad ... Use torch.func.jvp.
    """


def argument_error(
    function: str, argument: str, *, got: Any, expected: str, remedy: str | None = None
) -> ValueError:
    """The ``ValueError`` that every public function raises for a bad argument.

    ``remedy`` says what to do where ``expected`` doesn't say it already.

    >>> print(argument_error("route", "top_k", got=9, expected="at most 8", remedy="Lower top_k."))
    route: top_k: got 9, expected at most 8. Lower top_k.
    """
    text = f"{function}: {argument}: got {got}, expected {expected}."
    return ValueError(f"{text} {remedy}" if remedy else text)


def some(texts: Sequence[str], separator: str = ", ", most: int = 8) -> str:
    """The first of several texts, and how many more there are.

    >>> some(["a", "b", "c", "d"], most=2)
    'a, b and 2 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def check_kind(function: str, argument: str, value: Any, kind: type, remedy: str | None = None) -> None:
    """Raise :func:`argument_error` unless ``value`` is of a class.

    >>> check_kind("combine", "plan", None, dict, "Pass what dispatch gives.")
    Traceback (most recent call last):
    ValueError: combine: plan: got None, expected a dict. Pass what dispatch gives.
    """
    if not isinstance(value, kind):
        got = "None" if value is None else type(value).__name__
        article = "an" if kind.__name__[0] in "AEIOUaeiou" else "a"
        raise argument_error(
            function, argument, got=got, expected=f"{article} {kind.__name__}", remedy=remedy
        )


def is_pair(value: Any) -> bool:
    """Whether a value is a tuple of two, named or not.

    >>> is_pair((1, 2)), is_pair([1, 2])
    (True, False)
    """
    return isinstance(value, tuple) and len(value) == 2


def check_function(function: str, argument: str, value: Any) -> None:
    """Raise :func:`argument_error` unless ``value`` can be called.

    >>> check_function("remat", "fn", None)
    Traceback (most recent call last):
    ValueError: remat: fn: got None, expected a function.
    """
    if not callable(value):
        raise argument_error(function, argument, got=repr(value), expected="a function")


def captured_error(function: str, tensor: Any, use: str = "") -> ValueError:
    """The ``ValueError`` for a function whose gradient would be wrong, because it closes over ``tensor``.

    ``use`` says what it uses the tensor for.

    >>> import torch
    >>> print(captured_error("remat", torch.ones(2)))  # doctest: +ELLIPSIS
    remat: fn: got a function that uses a differentiable tensor from outside: shape (2,), torch.float32, ...
    """
    tensor = f"shape {tuple(tensor.shape)}, {tensor.dtype}"
    got = f"a function that uses a differentiable tensor from outside{use}: {tensor}"
    expected = "every differentiable tensor as an argument"
    remedy = "Pass it as an argument; captured, its gradient would be wrong."
    return argument_error(function, "fn", got=got, expected=expected, remedy=remedy)
