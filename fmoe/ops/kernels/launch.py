"""Starting a Triton kernel without searching for the compiled one each time, which costs the host more."""

import functools
from collections.abc import Sequence
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
    device, number = active.get_current_device(), _num_values(fn)
    kinds, passed = resolved(args[:number])
    constants = args[number:]
    key = (fn, device, *kinds, *constants, *options.items())
    found = _COMPILED.get(key)
    if found is None:
        _COMPILED[key] = kernel[grid](*args, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    how = active.get_current_stream(device), found.function, found.packed_metadata, None, None, None
    found.run(x, y, z, *how, *passed, *constants)


@functools.cache
def _num_values(fn: Any) -> int:
    return fn.__code__.co_argcount - len(fn.__annotations__)  # only constants are annotated


def resolved(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What Triton compiles a kernel for, of each argument, and what its launcher takes.

    That is the address of a tensor on a GPU: for a tensor, Triton asks the driver.

    >>> resolved([32])[0] == resolved([48])[0], resolved([32])[0] == resolved([33])[0]  # by divisibility
    (True, False)
    """
    kinds: list[Any] = []
    passed: list[Any] = []
    for value in values:  # one loop, since each launch goes through it
        if type(value) is int:
            divisor = 1 if value == 1 else 2 if value % 16 else 16
            kinds.append(divisor if value.bit_length() < 32 else -divisor)
        elif isinstance(value, torch.Tensor):
            address = value.data_ptr()
            kinds.append(value.dtype if address % 16 == 0 else (value.dtype, "not aligned"))
            value = address if value.is_cuda else value
        elif isinstance(value, TensorDescriptor):
            kinds.append((value.base.dtype, *value.block_shape))
        else:
            kinds.append(type(value))
        passed.append(value)
    return kinds, passed


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
