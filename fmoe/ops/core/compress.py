"""Kept values in fp8: rows of e4m3 numbers, each with a float32 scale. The backward gets them rounded."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..kernels import DTYPES, scaled
from ..precision import E4M3, Scaled
from .dtensors import as_dtensor, is_dtensor, local
from .primitive import NAMESPACE, kernel, operators
from .tape import COMPRESS, Entry, Layout, Policy

COMPRESS_OP = f"{NAMESPACE}::compress"


def _impl(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = scaled.rows(x)
    like = torch.empty_like(x, dtype=values.dtype)  # restored rows lie in memory as these did
    return values if values.stride() == like.stride() else like.copy_(values), scale


def _fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _vmap(info: Any, in_dims: tuple[int], x: torch.Tensor) -> Any:
    return _kernel(x.movedim(in_dims[0], 0)), (0, 0)


_kernel = kernel("compress(Tensor x) -> (Tensor, Tensor)", impl=_impl, fake=_fake, vmap=_vmap)


def compress(x: torch.Tensor) -> Scaled:
    """Rows (..., K) as e4m3 numbers (..., K) and scales (...); those of this device, for a DTensor."""
    values, scale = _kernel(local(x))
    if is_dtensor(x):
        values = as_dtensor(values, x.device_mesh, x.placements, x.shape, x.stride())
    return Scaled(values, scale)


def restore(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows again. One with an infinite scale has infinite numbers and NaN."""
    x = local(values).to(dtype, copy=True).mul_(scale.unsqueeze(-1))
    if is_dtensor(values):
        return as_dtensor(x, values.device_mesh, values.placements, values.shape, values.stride())
    return x


def compressed(entries: Sequence[Entry], policy: Policy) -> list[Entry]:
    """Entries of a tape, those in fp8 that the policy says.

    A value of several entries is rounded once, and not at all if one of them keeps it as it is.
    """
    wanted = [policy(e.checkpoint) == COMPRESS and not (e.dtypes or e.left) for e in entries]
    as_they_are = [e for e, chosen in zip(entries, wanted) if not (chosen or e.homes)]
    exact = {id(t) for e in as_they_are for t in e.outputs or ()}
    rounded: dict[int, Scaled] = {}

    def one(entry: Entry) -> Entry:
        outputs, dtypes = list[torch.Tensor](), list[torch.dtype | None]()
        for t, in_fp8 in zip(entry.outputs or (), _in_fp8(entry)):
            if in_fp8 and id(t) not in exact:
                rounded[id(t)] = rounded.get(id(t)) or compress(t.detach())
                outputs += rounded[id(t)]
                dtypes.append(t.dtype)
            else:
                outputs.append(t)
                dtypes.append(None)
        return entry._replace(outputs=tuple(outputs), dtypes=tuple(dtypes))

    return [one(e) if chosen and e.outputs else e for e, chosen in zip(entries, wanted)]


def _in_fp8(entry: Entry) -> list[bool]:
    """Which outputs of a compressed entry are rounded.

    What an operator gives for its backward alone isn't: attention's may be the logarithms of large sums.
    """
    num_values = operators()[entry.operator].num_values
    return [
        i < num_values and t.dtype in DTYPES and t.dim() > 1 and _rounded_bytes(t) < _exact_bytes(t)
        for i, t in enumerate(entry.outputs or ())
    ]


def entry_bytes(entry: Entry, policy: Policy) -> int:
    """The bytes that an entry keeps."""
    rounded = _in_fp8(entry) if policy(entry.checkpoint) == COMPRESS else itertools.repeat(False)
    return sum(_rounded_bytes(t) if r else _exact_bytes(t) for t, r in zip(entry.outputs or (), rounded))


def _exact_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _rounded_bytes(x: torch.Tensor) -> int:
    return x.numel() + 4 * math.prod(x.shape[:-1])


def restored(kept: Iterable[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    """What entries keep, in its own dtypes."""
    rest = iter(kept)
    return [
        next(rest) if dtype is None else restore(next(rest), next(rest), dtype)
        for entry, n in layout
        for dtype in entry.dtypes or [None] * (n or 0)
    ]


def restored_layout(layout: Layout) -> Layout:
    """That of the same entries, with what they keep in its own dtypes."""
    return [(entry._replace(dtypes=()), len(entry.dtypes) if entry.dtypes else n) for entry, n in layout]
