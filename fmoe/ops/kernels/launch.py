"""Starting a Triton kernel without searching for the compiled one each time, which costs the host more."""

import functools
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# By what Triton compiles a kernel anew for, as in its own cache.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: int) -> None:
    """``kernel[grid](*args, **options)``; the last ``args`` are the constants of ``kernel``.

    Only the first launch of a kind calls Triton's launch hooks.
    """
    if not isinstance(kernel, JITFunction):  # as in Triton's interpreter
        kernel[grid](*args, **options)
        return
    fn, active = kernel.fn, driver.active
    device = active.get_current_device()
    num_values = fn.__code__.co_argcount - len(fn.__annotations__)  # only constants are annotated
    key = (fn, device, *map(kind, args[:num_values]), *args[num_values:], *options.items())
    found = _COMPILED.get(key)
    if found is None:
        _COMPILED[key] = kernel[grid](*args, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *args)


def cdiv(number: int, by: int) -> int:
    """``triton.cdiv``, but faster on the host.

    >>> cdiv(32, 16), cdiv(33, 16)
    (2, 3)
    """
    return -(-number // by)


def power_of_2(number: int) -> int:
    """``triton.next_power_of_2``, but faster on the host.

    >>> power_of_2(1), power_of_2(33), power_of_2(64)
    (1, 64, 64)
    """
    return 1 << (number - 1).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere a few."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def kind(value: Any) -> Any:
    """The part of an argument that Triton compiles a kernel for.

    >>> kind(32) == kind(48), kind(32) == kind(33), kind(1) == kind(33)  # a size by its divisibility
    (True, False, False)
    """
    if type(value) is int:
        divisor = 1 if value == 1 else 2 if value % 16 else 16
        return divisor if value.bit_length() < 32 else -divisor
    if isinstance(value, torch.Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "not aligned")
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return type(value)
