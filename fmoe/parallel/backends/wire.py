"""The one place where rows leave this device for others, and the count of their bytes."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_c10d = torch.ops._c10d_functional
process_group: Any = dist.distributed_c10d._resolve_process_group  # versions differ in how they type the name


class Traffic(NamedTuple):
    """Bytes ``sent`` to other devices, ``received`` from them, and ``kept``: from this device to itself."""

    sent: int = 0
    received: int = 0
    kept: int = 0


# What fmoe.introspect.wire_bytes has open: for all threads, as a backward on CUDA has one of its own.
_counts: list[dict[str, Traffic]] = []


def open_count() -> dict[str, Traffic]:
    count: dict[str, Traffic] = {}
    _counts.append(count)
    return count


def close_count(count: dict[str, Traffic]) -> None:
    _counts[:] = [c for c in _counts if c is not count]  # equal ones may be open


def swap_rows(
    rows: torch.Tensor, received: list[int], sent: list[int], group: str, sender: str
) -> torch.Tensor:
    """Send ``sent[i]`` rows to device ``i`` of the group, receive ``received[i]`` from it, in their order."""
    rows = rows.contiguous()
    came = _c10d.wait_tensor(_c10d.all_to_all_single(rows, received, sent, group))
    if _counts:
        here = process_group(group).rank()
        kept = rows[: sent[here]].nbytes
        found = Traffic(rows.nbytes - kept, came.nbytes - kept, kept)
        for count in _counts:
            count[sender] = Traffic(*map(sum, zip(count.get(sender, Traffic()), found)))
    return came
