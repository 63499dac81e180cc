"""What torch.compile is told about functions, without importing ``torch._dynamo``, which takes seconds."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def hidden_from_dynamo(fn: F) -> F:
    """As ``torch.compiler.disable``: ``fn`` runs as it stands, and nothing it calls is traced."""

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        return _disabled(fn)(*args) if "torch._dynamo" in sys.modules else fn(*args)

    return call  # type: ignore[return-value]


@functools.cache
def _disabled(fn: F) -> F:
    return torch.compiler.disable(fn)


def constant_to_dynamo(fn: F) -> F:
    """As ``torch.compiler.assume_constant_result``: called while tracing, and its result baked in."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
