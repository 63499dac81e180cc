"""Transforms that cannot work, and the errors for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ...errors import TransformError


class Unsupported(NamedTuple):
    """Stands where a rule would, and says what to do instead.

    >>> import fmoe
    >>> from fmoe.ops.core.primitive import operators
    >>> operators()["exchange"].rules.vmap.remedy  # doctest: +ELLIPSIS
    'Tokens and routes of every example would have to move together: loop over the examples, ...'
    """

    remedy: str


# Of a backend's dispatch under vmap.
ALL_MOVE = Unsupported(
    "Tokens and routes of every example would have to move together: loop over the examples, or batch before "
    "routing."
)


def refuse_transforms_inside_compile(name: str) -> None:
    """Raise ``TransformError`` where Dynamo traces a ``torch.func`` transform: it would be wrong silently."""
    if torch._C._are_functorch_transforms_active():
        raise TransformError(
            f"{name}: a torch.func transform inside torch.compile drops custom derivatives (pytorch#193279). "
            "Use fmoe.value_and_grad(torch.compile(f)), or don't compile around the transform."
        )


@contextmanager
def refusing_nested_forward_mode(name: str) -> Iterator[None]:
    """Rules of ``jvp`` are made of ``torch.func.jvp``, which PyTorch can't nest in its own forward mode."""
    try:
        yield
    except RuntimeError as error:
        if "Nested forward mode AD" not in str(error):
            raise
        raise TransformError(
            f"{name}: cannot run under torch.autograd.forward_ad or torch.func.linearize. Use torch.func.jvp."
        ) from error
