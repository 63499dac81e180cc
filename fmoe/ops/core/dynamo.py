"""Marks on functions for torch.compile, without importing ``torch._dynamo``, which takes seconds."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import einops
import torch

F = TypeVar("F", bound=Callable[..., Any])


def hidden_from_dynamo(fn: F) -> F:
    """As ``torch.compiler.disable``: ``fn`` runs as it stands, and nothing it calls is traced."""

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        traces = torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
        return _disabled(fn)(*args) if traces else fn(*args)

    return call  # type: ignore[return-value]


@functools.cache
def _disabled(fn: F) -> F:
    return torch.compiler.disable(fn)


def remembered(fn: F) -> F:
    """``fn``, whose results for hashable arguments are kept. Dynamo warns of caches, and traces it anew."""
    kept = functools.lru_cache(4096)(fn)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return fn(*args)
        try:
            return kept(*args)
        except TypeError:  # not hashable, or its own error
            return fn(*args)

    return call  # type: ignore[return-value]


def constant_to_dynamo(fn: F) -> F:
    """As ``torch.compiler.assume_constant_result``: called while tracing, and its result baked in."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def one_step_to_dynamo(fn: F) -> F:
    """As ``torch.compiler.allow_in_graph``: a call of ``fn`` is one step of the graph, not traced further."""

    @constant_to_dynamo
    def register() -> None:
        torch.compiler.allow_in_graph(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            register()
        return fn(*args, **kwargs)

    return call  # type: ignore[return-value]


# Tracing einops' parser takes Dynamo a quarter of a second for each pattern.
rearrange, repeat = one_step_to_dynamo(einops.rearrange), one_step_to_dynamo(einops.repeat)
