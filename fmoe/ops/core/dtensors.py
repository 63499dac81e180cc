"""This device's piece of a DTensor, without importing DTensor where there is none."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


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
    piece = fn(tensor.to_local())
    return as_dtensor(piece, tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())


def as_dtensor(
    piece: torch.Tensor,
    mesh: "DeviceMesh",
    placements: "Sequence[Placement]",
    shape: torch.Size | None = None,
    stride: tuple[int, ...] | None = None,
) -> "DTensor":
    """The DTensor that this device has a piece of, without a derivative.

    Pieces are equal, unless ``shape`` says what they make up. ``from_local`` takes ten times as long.
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    strided = not piece.is_contiguous()
    if torch.compiler.is_dynamo_compiling() or (strided and stride is None):
        return DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=stride)
    if shape is None:
        sizes = [*piece.shape]
        for axis, placement in enumerate(placements):
            if isinstance(placement, Shard):
                sizes[placement.dim] *= mesh.size(axis)
        shape = torch.Size(sizes)
    meta = TensorMeta(shape, stride if strided and stride else _contiguous(shape), piece.dtype)
    return DTensor(
        piece.detach(), DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False
    )


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
