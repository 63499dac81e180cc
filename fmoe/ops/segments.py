"""Segments of rows: documents packed one after the other, and padding."""

import sys
from typing import NamedTuple

import torch
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import argument_error


class Segments(NamedTuple):
    """The segments of B rows of L positions, from :func:`segments_of`.

    =======  ===============  ================================================================
    first    (B, L)           int64, where in its row each position's segment begins
    offsets  (segments + 1,)  int32, where segments begin among all B * L positions, and their end;
                              empty where the host can't count them
    valid    (B, L)           bool, false for padding
    =======  ===============  ================================================================

    >>> segments_of(torch.tensor([[1, 1, 2, 0]])).offsets
    tensor([0, 2, 3, 4], dtype=torch.int32)
    """

    first: torch.Tensor
    offsets: torch.Tensor
    valid: torch.Tensor


def segments_of(segment_ids: torch.Tensor, function: str | None = None) -> Segments | tuple[()]:
    """The segments of rows: runs of equal ids. It costs one wait of the host.

    ===========  ======  ================================================================
    segment_ids  (B, L)  int64, 0 for padding
    function             refuses ids below zero in its name; ``None``: these are padding, too
    -> segments          ``()`` if every row is one segment without padding
    ===========  ======  ================================================================

    The host can't count segments beneath ``vmap``, on fake tensors and under ``torch.compile``. Attention
    then uses a mask.

    Raises ``ValueError`` for ids below zero, where the host can look.

    >>> segments_of(torch.tensor([[3, 3, 3], [4, 5, 0]])).first
    tensor([[0, 0, 0],
            [0, 1, 2]])
    >>> segments_of(torch.tensor([[3, 3, 3], [7, 7, 7]]))
    ()
    """
    rows, length = segment_ids.shape
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins, valid = begins.flatten(), segment_ids > 0
    position = torch.arange(length, device=segment_ids.device)
    first = torch.where(begins.view(rows, length), position, 0).cummax(1).values
    if not _readable(segment_ids):
        return Segments(first, torch.empty(0, dtype=torch.int32, device=first.device), valid)
    count, padding, below = torch.stack([begins.sum(), (~valid).sum(), (segment_ids < 0).sum()]).tolist()
    if below and function is not None:
        got, expected = f"{below} ids below zero", "0 for padding, else positive ids"
        raise argument_error(function, "segment_ids", got=got, expected=expected)
    if not segment_ids.numel() or (count == rows and not padding):
        return ()
    # One place more than asked for takes the positions that begin nothing.
    place = torch.where(begins, begins.cumsum(0) - 1, count + 1)
    index = torch.arange(rows * length, dtype=torch.int32, device=first.device)
    offsets = index.new_full((count + 2,), rows * length).scatter(0, place, index)[: count + 1]
    if "torch._dynamo" in sys.modules:  # a compiled layer shall not be compiled again for another number
        torch._dynamo.maybe_mark_dynamic(offsets, 0)
    return Segments(first, offsets, valid)


def halves_of(segments: Segments, rows: int) -> list[Segments]:
    """The segments of the first rows, and of the others. Offsets remain as many: some segments are empty.

    >>> first, second = halves_of(segments_of(torch.tensor([[1, 2], [3, 0]])), 1)
    >>> first.offsets, second.offsets
    (tensor([0, 1, 2, 2, 2], dtype=torch.int32), tensor([0, 0, 0, 1, 2], dtype=torch.int32))
    """
    first, offsets, valid = segments
    end = rows * first.shape[1]
    before, behind = offsets.clamp(max=end), (offsets - end).clamp(min=0)
    return [Segments(first[:rows], before, valid[:rows]), Segments(first[rows:], behind, valid[rows:])]


def _readable(t: torch.Tensor) -> bool:
    """Whether the host can look at a tensor's values."""
    key = torch._C._TorchDispatchModeKey
    if torch.compiler.is_compiling() or any(map(torch._C._get_dispatch_mode, (key.FAKE, key.PROXY))):
        return False
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return False
        t = functorch.get_unwrapped(t)
    return not isinstance(t, FakeTensor)
