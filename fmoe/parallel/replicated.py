"""Comparisons of values along the axes where specs claim that they are the same.

Devices compare fingerprints, 16 bytes a value, in one small collective. Only values whose bits differ are
gathered, to see whether they differ by more than rounding.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ops.core.axes import Group, axis_names, axis_sizes, group_of
from ..params import P
from .boundary import unwrapped
from .collective_ops import all_gather_op, psum_op
from .spec import raise_misfits, unnamed_axes

ODD = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # multipliers that mix bits: Knuth's MMIX generator


def check_replicated(
    argument: str, tree: Any, values: Sequence[torch.Tensor], specs: Sequence[P], mesh: DeviceMesh
) -> None:
    """Compare the copies of every leaf of an argument of ``shard_map``. All devices raise together."""
    everyone = group_of(mesh, axis_names(mesh))
    if everyone.size == 1 or not values:
        return
    local = [unwrapped(value).detach() for value in values]
    mine = torch.stack([fingerprint(value) for value in local]).to(mesh.device_type)
    table = all_gather_op.raw(mine[None], everyone.size, everyone.name).cpu()
    table = table.view(*axis_sizes(mesh).values(), len(values), 2)
    axes = [_axes_of_difference(table[..., i, :], spec, mesh) for i, spec in enumerate(specs)]
    shapes = [_axes_of_difference(table[..., i, 1:], spec, mesh) for i, spec in enumerate(specs)]
    # All devices have the same table, so they agree on what to look at closely.
    close = [i for i, differs in enumerate(axes) if differs and not shapes[i]]
    if close:
        apart = [_differs(local[i], group_of(mesh, unnamed_axes(specs[i], mesh))) for i in close]
        counts = psum_op.raw(torch.tensor(apart, dtype=torch.int64, device=mesh.device_type), everyone.name)
        for i, count in zip(close, counts.tolist()):
            axes[i] = axes[i] if count else ()
    problems = [
        [f"devices have other {'shapes' if bad else 'values'} along {along}"] if along else []
        for along, bad in zip(axes, shapes)
    ]
    if any(problems):
        raise_misfits("shard_map", argument, mesh, tree, specs, problems)


def fingerprint(value: torch.Tensor) -> torch.Tensor:
    """Two numbers, int64 (2,): of a tensor's bits, and of its shape and dtype. Equal tensors have equal ones.

    >>> x = torch.arange(6.0)
    >>> torch.equal(fingerprint(x), fingerprint(x + 0)), torch.equal(fingerprint(x), fingerprint(x.flip(0)))
    (True, False)
    """
    size = value.numel() * value.element_size()
    raw = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=value.device)
    raw[:size] = value.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    # A sum of one-to-one functions of each word, so that a single one that differs is always seen.
    words = torch.arange(len(raw) // 8, device=value.device).mul_(ODD[1]).bitwise_xor_(raw.view(torch.int64))
    for factor in ODD:
        words *= factor
        words ^= (words >> 32).bitwise_and_(0xFFFFFFFF)
    kind = zlib.crc32(f"{tuple(value.shape)} {value.dtype}".encode())
    return torch.stack([words.sum(), torch.full((), kind, dtype=torch.int64, device=value.device)])


def _axes_of_difference(table: torch.Tensor, spec: P, mesh: DeviceMesh) -> tuple[str, ...]:
    """Those axes that a spec doesn't name, along which fingerprints differ. ``table`` is (*mesh, numbers)."""
    return tuple(
        axis
        for axis in unnamed_axes(spec, mesh)
        if (table != table.narrow(axis_names(mesh).index(axis), 0, 1)).any()
    )


def _differs(value: torch.Tensor, group: Group) -> bool:
    """Whether the group's copies of a value differ by more than rounding."""
    if group.size == 1:
        return False
    copies = all_gather_op.raw(value[None], group.size, group.name)
    if not value.is_floating_point():
        return bool((copies != copies[:1]).any())
    rtol = torch.finfo(value.dtype).eps ** 0.5
    size = value.abs().nan_to_num(nan=0, posinf=0).sum(dtype=torch.float64).item()
    atol = rtol * size / max(1, value.numel())
    return not torch.allclose(copies, copies[:1].expand_as(copies), rtol=rtol, atol=atol, equal_nan=True)
