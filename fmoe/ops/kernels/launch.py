"""Starting a Triton kernel without searching for the compiled one each time, which costs the host more."""

from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# By what Triton compiles anew for; as its own cache, which it looks into at every launch.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: int) -> None:
    """``kernel[grid](*args, **options)``; the last ``args`` are the constants of ``kernel``."""
    if not isinstance(kernel, JITFunction):  # as in Triton's interpreter
        kernel[grid](*args, **options)
        return
    num_values = kernel.fn.__code__.co_argcount - len(kernel.fn.__annotations__)  # only constants have some
    kinds = [kind(value) for value in args[:num_values]]
    constants = args[num_values:]
    key = (kernel.fn, torch.cuda.current_device(), *kinds, *constants, *options.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*args, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*args)


def kind(value: Any) -> Any:
    """The part of an argument that Triton compiles a kernel for.

    >>> kind(32) == kind(48), kind(32) == kind(33), kind(1) == kind(33)  # a size by its divisibility
    (True, False, False)
    """
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value.bit_length() > 31
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return type(value)
