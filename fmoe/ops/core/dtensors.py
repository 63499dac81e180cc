"""This device's piece of a DTensor, without importing DTensor where there is none."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. It doesn't import PyTorch's module, which would take half a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This device's piece of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def map_local(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """``fn``, which treats every element alike, of a tensor, or of every device's piece of a DTensor.

    On a mesh of many axes DTensor itself takes a second for every new operation and shape.
    """
    if not is_dtensor(tensor):
        return fn(tensor)
    from torch.distributed.tensor import DTensor

    piece = fn(tensor.to_local())
    whole = torch.empty(tensor.shape, device="meta")
    stride = whole.stride() if piece.is_contiguous() else tensor.stride()
    return DTensor.from_local(
        piece, tensor.device_mesh, tensor.placements, run_check=False, shape=whole.shape, stride=stride
    )
