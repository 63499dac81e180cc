"""All-or-nothing steps: one rank's error is raised on all, so none hangs.

Without a process group there is one rank, and nothing is sent.
"""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import argument_error, some

T = TypeVar("T")


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_all(value: T, group: Any = None) -> list[T]:
    """The values that all ranks pass, by rank. They are pickled, and should be small.

    ``all_gather_object`` does the same but needs numpy.
    """
    number = dist.get_world_size(group) if dist.is_initialized() else 1
    if number == 1:
        return [value]
    coll: Any = dist.distributed_c10d
    device, message = coll._get_object_coll_device(group), pickle.dumps(value)
    size = torch.tensor([len(message)], device=device)
    sizes = [torch.empty_like(size) for _ in range(number)]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(each) for each in sizes)
    mine = torch.frombuffer(bytearray(message.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    found = [torch.empty_like(mine) for _ in range(number)]
    dist.all_gather(found, mine, group=group)
    return [pickle.loads(bytes(each.tolist())) for each in found]  # loads stops where the pickle ends


@contextmanager
def together() -> Iterator[None]:
    """Leave this block with all other ranks, or with an error if any rank has one.

    A rank raises its own error. The others raise one that names the rank and the error: a ``ValueError`` for
    a ``ValueError``, else a ``RuntimeError``. Inside, no rank may wait for another.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    found = from_all(None if error is None else (isinstance(error, ValueError), str(error) or repr(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(found):
        if failure is not None:
            is_value_error, text = failure
            raise (ValueError if is_value_error else RuntimeError)(f"on rank {rank}: {text}")


def check_alike(function: str, values: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` on all ranks unless all pass equal trees of JSON."""
    first, *others = from_all(values)
    for rank, other in enumerate(others, 1):
        if found := [text for name in first for text in differences(name, first[name], other[name])]:
            got = f"on rank {rank}, beside rank 0: {some(found, '; ')}"
            expected = "the same on every rank"
            remedy = "Start all ranks with the same options."
            raise argument_error(function, ", ".join(values), got=got, expected=expected, remedy=remedy)


def differences(name: str, theirs: Any, ours: Any) -> list[str]:
    """The differences of two trees of JSON, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        return [
            text
            for key in keys
            for text in differences(f"{name}.{key}", theirs.get(key, "absent"), ours.get(key, "absent"))
        ]
    return [] if theirs == ours else [f"{name} is {theirs}, here {ours}"]
