"""Which tensors share memory, so that none is written to by way of another."""

from collections.abc import Sequence
from typing import Any

import torch

from .dtensors import local


def alone(leaves: Sequence[Any]) -> list[bool]:
    """Whether each leaf is contiguous and no other shares its memory, so that one may write into it.

    Of DTensors it says this of the device's own pieces. Tensors share memory if the bytes between their first
    and last element overlap, as those of two tensors of one numpy array may. So the parts of one flat tensor
    don't. A leaf that is no tensor has no memory.

    >>> row = torch.zeros(4)
    >>> alone([row, row[:2], torch.zeros(4), torch.zeros(1).expand(4)]), alone([row[:2], row[2:]])
    ([False, False, True, False], [True, True])
    """
    pieces = [local(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    spans = [_span(piece) for piece in pieces]
    shared: set[int] = set()
    order = sorted(range(len(spans)), key=spans.__getitem__)
    widest = order[0] if order else 0  # of the spans so far, the one that ends last
    for i in order[1:]:
        (device, start, end), (other, _, last) = spans[i], spans[widest]
        if device == other and start < last:
            shared |= {i, widest}
        if device != other or end > last:
            widest = i
    return [piece is not None and piece.is_contiguous() and i not in shared for i, piece in enumerate(pieces)]


def _span(piece: torch.Tensor | None) -> tuple[str, int, int]:
    """Where a tensor is, and between which bytes there."""
    if piece is None or not piece.numel():
        return "", 0, 0
    storage = piece.untyped_storage()
    start = int(piece.storage_offset()) * piece.itemsize
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(piece.shape, piece.stride()))
    end = start + (last + 1) * piece.itemsize
    if storage.device.type == "meta":  # also a fake tensor's, which has no address
        return f"meta {storage._cdata}", start, end
    return str(storage.device), storage.data_ptr() + start, storage.data_ptr() + end
