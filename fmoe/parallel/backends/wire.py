"""The one place where rows leave this device, and the count of their bytes."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_c10d = torch.ops._c10d_functional
arrived: Any = _c10d.wait_tensor
process_group: Any = dist.distributed_c10d._resolve_process_group  # versions type the name differently


class Traffic(NamedTuple):
    """Bytes ``sent`` to other devices, ``received`` from them, and ``kept`` on this device."""

    sent: int = 0
    received: int = 0
    kept: int = 0


# The open counts of fmoe.introspect.wire_bytes, for all threads: a backward on CUDA has its own thread.
_counts: list[dict[str, Traffic]] = []


def open_count() -> dict[str, Traffic]:
    count: dict[str, Traffic] = {}
    _counts.append(count)
    return count


def close_count(count: dict[str, Traffic]) -> None:
    _counts[:] = [c for c in _counts if c is not count]  # another open count may be equal


def swap_rows(
    rows: torch.Tensor, received: list[int], sent: list[int], group: str, sender: str
) -> torch.Tensor:
    """Send ``sent[i]`` rows to device ``i`` of the group, and receive ``received[i]`` from it, in order."""
    return arrived(begin_swap(rows, received, sent, group, sender))


def begin_swap(
    rows: torch.Tensor, received: list[int], sent: list[int], group: str, sender: str
) -> torch.Tensor:
    """The same, only begun: nothing may read the result before it has :func:`arrived`."""
    rows = rows.contiguous()
    came = _c10d.all_to_all_single(rows, received, sent, group)
    if _counts:
        here = process_group(group).rank()
        kept = rows[: sent[here]].nbytes
        found = Traffic(rows.nbytes - kept, came.nbytes - kept, kept)
        for count in _counts:
            count[sender] = Traffic(*map(sum, zip(count.get(sender, Traffic()), found)))
    return came
