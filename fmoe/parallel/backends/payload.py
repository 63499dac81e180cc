"""Rows as they travel: several tensors as one message, and tokens in fp8.

Only tokens on their way to experts are rounded, with a float32 scale for each row or for parts of one. Sums
come back, and cotangents travel, as they are. So derivatives are those of an exchange that doesn't round.
"""

import functools
from typing import Any

import torch

from ...errors import argument_error
from ...ops import kernels
from ...ops.bases import gather_kernel
from ...ops.core.derive import Tensors
from ...ops.precision import E4M3, Scaled, quantise, restored

PAYLOADS = ("fp8",)


def check_payload(function: str, payload: Any) -> None:
    """Raise ``ValueError`` for what tokens can't travel as."""
    if payload is not None and payload not in PAYLOADS:
        expected = f"one of {PAYLOADS}, or None: tokens travel in their own dtype"
        raise argument_error(function, "payload", got=repr(payload), expected=expected)


def narrows(function: str, payload: Any) -> bool:
    """Whether tokens travel in fp8."""
    check_payload(function, payload)
    return payload is not None


# ---- several tensors as one message --------------------------------------------------------------------


def message(tensors: Tensors) -> torch.Tensor:
    """The bytes (R, N) of rows of several tensors."""
    messages = [_as_bytes(t) for t in tensors]
    return messages[0] if len(messages) == 1 else torch.cat(messages, 1)


def parts(message: torch.Tensor, like: Tensors) -> Tensors:
    """The tensors that a message was made of."""
    found = message.split([t.shape[1:].numel() * t.itemsize for t in like], 1)
    if len(like) > 1:
        found = [_aligned(part, t.itemsize) for part, t in zip(found, like)]
    return tuple(part.view(t.dtype).view(-1, *t.shape[1:]) for part, t in zip(found, like))


def _aligned(part: torch.Tensor, itemsize: int) -> torch.Tensor:
    """A copy, as a view into a message may lie where numbers of several bytes can't."""
    return part if itemsize == 1 else part.clone(memory_format=torch.contiguous_format)


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    rows = t.contiguous().flatten(1)
    # Without elements, or one wide, an expanded cotangent counts as contiguous whatever its strides.
    return rows.as_strided(rows.shape, (rows.shape[1], 1)).view(torch.uint8)


# ---- tokens in fp8 -------------------------------------------------------------------------------------


def in_fp8(dtype: torch.dtype, narrow: bool) -> bool:
    """Whether tokens of a dtype travel in fp8: float64 is never rounded."""
    return narrow and dtype != torch.float64


def described(dtype: torch.dtype, narrow: bool) -> str:
    """A dtype and, if tokens of it travel in fp8, that they do: for comparing devices."""
    return f"{dtype} in fp8" if in_fp8(dtype, narrow) else f"{dtype}"


def token_bytes(x_TD: torch.Tensor, narrow: bool) -> int:
    """The bytes of one token on its way, its scale included."""
    return x_TD.shape[1] + 4 if in_fp8(x_TD.dtype, narrow) else x_TD.shape[1] * x_TD.itemsize


def gathered(x_TD: torch.Tensor, index_R: torch.Tensor, narrow: bool) -> Tensors:
    """Rows of tokens by index, as they travel: alone, or as e4m3 numbers and their scales."""
    if not in_fp8(x_TD.dtype, narrow):
        return (gather_kernel(x_TD, index_R),)
    values, scale = narrowed(x_TD)
    # A kernel takes pairs of numbers for bfloat16.
    bits = torch.uint8 if values.shape[1] % 2 else torch.bfloat16
    return gather_kernel(values.view(bits), index_R).view(E4M3), gather_kernel(scale, index_R)


def arrived_as(tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """What :func:`gathered` gave, as tokens again."""
    return tensors[0] if len(tensors) == 1 else widened(Scaled(*tensors), dtype)


def narrowed(x_RD: torch.Tensor, num_scales: int = 1) -> Scaled:
    """Rows as values (R, D) and scales (R, ``num_scales``), each for an equal part of a row."""
    x = x_RD.unflatten(1, (num_scales, -1))
    if _by_kernel(x_RD, x_RD.dtype):
        from ...ops.kernels import quantise as kernel

        values, scale = kernel.rows(x)
    else:
        values, scale = quantise(x)
    return Scaled(values.flatten(1).contiguous(), scale)


def widened(scaled: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Those rows (R, D) in a dtype. A row of zeros with a scale of zero, which is an empty one, is zeros."""
    values = scaled.values.unflatten(1, (scaled.scale.shape[1], -1))
    if _by_kernel(values, dtype):
        from ...ops.kernels import quantise as kernel

        return kernel.restored(values, scaled.scale, dtype).flatten(1)
    return restored(Scaled(values, scaled.scale), dtype).flatten(1)


def _by_kernel(on: torch.Tensor, dtype: torch.dtype) -> bool:
    return on.is_cuda and dtype in kernels.DTYPES and kernels.installed() and _has_e4m3(on.device)


@functools.cache
def _has_e4m3(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)
