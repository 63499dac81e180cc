"""A call of PyTorch's whose result is known: its derivative is recorded, and its last kernel doesn't run.

PyTorch has no way to say so above autograd. Beneath it, and beneath ``torch.func``, a dispatch mode answers
for the kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch._C import _functorch as functorch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# These share memory with their argument, although their schemas don't say so.
_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default}
_TRANSFORMS = (functorch.TransformType.Vmap, functorch.TransformType.Jvp)


def handed(func: Callable[..., Any], args: Any, kwargs: Any, value: torch.Tensor) -> tuple[Any, bool]:
    """``func``'s result, which is ``value`` without its last kernel if it can be, and whether it is.

    It can't beneath ``vmap`` and ``jvp``, nor for kernels with several results, such as those of attention.

    >>> x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    >>> value = torch.nn.functional.linear(x, w).detach()
    >>> out, done = handed(torch.nn.functional.linear, (x, w), {}, value)
    >>> done, out.data_ptr() == value.data_ptr(), out.grad_fn is not None
    (True, True, True)
    """
    stack = functorch.get_interpreter_stack() or ()
    base = base_of(value)
    if base is not None and _dense(base) and not any(level.key() in _TRANSFORMS for level in stack):
        for number in range(4):  # of kernels before the last whose results look like the value
            mode = _Handing(base, number)
            try:
                with mode, _no_cached_casts():
                    out = func(*args, **kwargs)
            except _NotTheLast:
                continue
            except _NeverHanded:
                break
            if not mode.done:
                return out, False
            found = base_of(out) if isinstance(out, torch.Tensor) else None
            if found is not None and _place(found) == _place(base):
                return out, True
            break
    return func(*args, **kwargs), False


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor beneath ``torch.func``'s wrappers; ``None`` for a batch, and for subclasses."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None


def _place(t: torch.Tensor) -> Any:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Autocast would remember what was handed to a cast in vain."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _NotTheLast(Exception):
    """Another kernel follows the one whose result was handed."""


class _NeverHanded(Exception):
    """The call draws random numbers or writes into a tensor."""


class _Handing(TorchDispatchMode):
    """Hands ``value`` to the kernel after ``number`` others whose results look like it."""

    def __init__(self, value: torch.Tensor, number: int) -> None:
        super().__init__()
        self.value, self.left, self.done = value, number, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in _VIEWS:
            return func(*args, **kwargs)
        if self.done:
            raise _NotTheLast
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise _NeverHanded
        if self._looks_alike(func, args, kwargs):
            if not self.left:
                self.done = True
                return self.value.as_strided(self.like.shape, self.like.stride())
            self.left -= 1
        return func(*args, **kwargs)

    def _looks_alike(self, func: Any, args: Any, kwargs: Any) -> bool:
        returns = func._schema.returns
        if len(returns) != 1 or str(returns[0].type) != "Tensor":
            return False
        with _disable_current_modes():
            given, hows = torch_pytree.tree_map_only(torch.Tensor, _meta, (args, kwargs))
            hows = {k: torch.device("meta") if k == "device" else v for k, v in hows.items()}
            try:
                self.like = func(*given, **hows)
            except (NotImplementedError, RuntimeError):  # its shape follows from values
                return False
        alike = self.like.numel() == self.value.numel() and self.like.dtype == self.value.dtype
        return alike and _dense(self.like)


def _dense(t: torch.Tensor) -> bool:
    """Whether its numbers fill its memory: PyTorch keeps the strides of such tensors only."""
    return torch.empty_like(t, device="meta").stride() == t.stride()


def _meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
