"""Transforms that cannot work, and the errors for them."""

from typing import Any, NamedTuple

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


# Of PyTorch's errors for combinations it doesn't have: words in them, and what ours says instead.
_IMPOSSIBLE = {
    "Nested forward mode AD": (
        "cannot run under torch.autograd.forward_ad or torch.func.linearize. Use torch.func.jvp."
    ),
    "support saved tensor hooks": (
        "got saved-tensor hooks (save_on_cpu, PyTorch's checkpoint, or those of fmoe's stack of layers) "
        "beneath a torch.func transform, expected none, as PyTorch forbids them there. Differentiate with "
        "fmoe.value_and_grad or torch.autograd, or use fmoe.remat instead of PyTorch's checkpoint."
    ),
    "escaped from inside a function being vmapped": (
        "got a tensor of a torch.vmap that has ended, expected none. PyTorch's checkpoint can't run under "
        "torch.vmap: use fmoe.remat instead of it."
    ),
}


class refusing_combinations:  # around each rule, where a generator would take longer
    """Raise ``TransformError`` for PyTorch's own errors about transforms it can't combine.

    Rules of ``jvp`` are made of ``torch.func.jvp``, which PyTorch can't nest in its own forward mode. Beneath
    a transform, those of ``vjp`` are made of ``torch.func.vjp``, which forbids saved-tensor hooks.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            for words, text in _IMPOSSIBLE.items():
                if words in str(error):
                    raise TransformError(f"{self.name}: {text}") from error
