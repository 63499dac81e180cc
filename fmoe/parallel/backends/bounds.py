"""Room for what a dispatch receives, fixed before anyone knows how much that is, so that no host waits.

What doesn't fit isn't sent, and is counted on the device. A step that counted any is thrown away as a whole:
see :func:`fmoe.exact_on_overflow`.
"""

import math
import weakref
from typing import Any, NamedTuple

import torch

from ...errors import argument_error
from ...ops.core.derive import Tensors
from ...ops.dispatch import layout_kernel
from ..together import from_all


class Room(NamedTuple):
    """The rows that each device may send to each, and the pairs of rows and experts that each may hold."""

    copies: int
    pairs: int


class Bound(NamedTuple):
    """The bound of a dispatch that never asks the host.

    ==========  =========================================================================
    max_tokens  the most tokens that any device of the group dispatches at once
    capacity    room as a multiple of what an even router needs; ``None``: for the worst case, which fits
                always
    ==========  =========================================================================

    >>> Bound(max_tokens=1000).room(size=8, top_k=2, held=4)  # all tokens to one device's experts
    Room(copies=1000, pairs=16000)
    >>> Bound(max_tokens=1000, capacity=1.5).room(size=8, top_k=2, held=4)
    Room(copies=375, pairs=3000)
    """

    max_tokens: int
    capacity: float | None = None

    def room(self, size: int, top_k: int, held: int) -> Room:
        """The room on ``size`` devices of ``held`` experts each."""
        copies, pairs = self.max_tokens, self.max_tokens * top_k
        if self.capacity is None:
            return Room(copies, size * copies * min(top_k, held))
        copies = min(copies, math.ceil(self.capacity * pairs / size))
        return Room(copies, min(size * copies * min(top_k, held), math.ceil(self.capacity * pairs)))

    def check(self, tokens: int) -> None:
        """Raise ``ValueError`` for more tokens than the bound was made for."""
        if tokens > self.max_tokens:
            expected = f"at most max_tokens={self.max_tokens}"
            remedy = "Raise max_tokens, on all devices alike."
            raise argument_error("dispatch", "x_TD", got=f"{tokens} tokens", expected=expected, remedy=remedy)


def check_bound(function: str, max_tokens: Any, capacity: Any) -> None:
    """Raise ``ValueError`` for what no bound can be made of."""
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        expected = "an integer of at least 1"
        raise argument_error(function, "max_tokens", got=repr(max_tokens), expected=expected)
    number = isinstance(capacity, int | float) and not isinstance(capacity, bool)
    if capacity is not None and not (number and 0 < capacity < math.inf):
        expected = "a number above 0, or None for the worst case"
        remedy = "2.0 has room for twice what an even router needs."
        raise argument_error(function, "capacity", got=repr(capacity), expected=expected, remedy=remedy)


def laid_out(ids_SK: torch.Tensor, num_experts: int, pairs: int) -> Tensors:
    """Pairs by expert, as :func:`~fmoe.ops.dispatch.layout_kernel` gives them, and how many had no room."""
    slot_R, row_SK, offsets_e = layout_kernel(ids_SK, num_experts, pairs)
    if pairs >= ids_SK.shape[0] * min(ids_SK.shape[1], num_experts):
        return slot_R, row_SK, offsets_e, offsets_e.new_zeros((), dtype=torch.int64)
    row_SK = torch.where(row_SK < pairs, row_SK, -1)
    return slot_R, row_SK, offsets_e.clamp(max=pairs), (offsets_e[-1].long() - pairs).clamp(min=0)


# What the devices of each process group agreed on.
_AGREED: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def agree(group: Any, described: str) -> None:
    """Make sure that all devices of a group send alike rows: the host waits at the first of each kind.

    Raises ``ValueError`` on all devices if they differ.
    """
    known = _AGREED.setdefault(group, set())
    if described not in known:
        check_alike(from_all(described, group), described, described)
        known.add(described)


def check_alike(kinds: list[Any], kind: Any, described: str) -> None:
    """Raise ``ValueError`` on every device, since each has heard from all, unless all send alike rows."""
    if others := [device for device, theirs in enumerate(kinds) if theirs != kind]:
        got = f"{described}, and others on the devices {others} of the axis"
        remedy = "Give all devices the same router, dimension, dtypes, payload and bounds."
        raise argument_error("dispatch", "x_TD, routing", got=got, expected="alike on all", remedy=remedy)
