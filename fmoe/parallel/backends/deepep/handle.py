"""DeepEP's handles as tensors, which plans and operators can hold.

They are the bytes of the handle's own tensors, and one tensor on the host that describes these.
"""

from typing import Any

import torch

from ....ops.core.derive import Tensors
from .adapter import Handle

PARTS = 10  # the most tensors of a handle; the first has a row per token
_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64)
SENT = ", ".join(f"Tensor h{i}" for i in range(PARTS + 1))


def pack(handle: Handle) -> Tensors:
    parts: list[torch.Tensor] = []
    about = []  # each one's dtype (-1 for None) and shape, then the numbers
    for part in handle.tensors:
        if part is None:
            about.append([-1] * 6)
        else:
            about.append([_DTYPES.index(part.dtype), part.dim(), *part.shape, *[0] * (4 - part.dim())])
            flat = part.flatten(1) if not parts else part.reshape(-1)
            parts.append(flat.contiguous().view(torch.uint8))
    parts += [parts[0].new_empty(0) for _ in range(PARTS - len(parts))]
    about += [[-2] * 6 for _ in range(PARTS - len(about))]
    about.append([*handle.numbers, *[-1] * (6 - len(handle.numbers))])
    return *parts, torch.tensor(about, device="cpu")


def unpack(sent: Tensors) -> Handle:
    *parts, about = sent
    rest = iter(parts)
    rows = about.tolist()
    tensors = tuple(
        None if dtype < 0 else next(rest).view(_DTYPES[dtype]).view(shape[:dim])
        for dtype, dim, *shape in rows[:-1]
        if dtype > -2
    )
    return Handle(tensors, tuple(n for n in rows[-1] if n >= 0))


def sent_fake(like: torch.Tensor, num_tokens: Any, dynamic: Any) -> Tensors:
    return (
        like.new_empty(num_tokens, dynamic(), dtype=torch.uint8),
        *(like.new_empty(dynamic(), dtype=torch.uint8) for _ in range(PARTS - 1)),
        torch.empty(PARTS + 1, 6, dtype=torch.int64, device="cpu"),
    )


def sent_example(num_tokens: int = 4, room: int = 0) -> Tensors:
    """A plan's ``sent`` in a group of one device, where every token stays; ``room`` for more rows."""
    row = torch.arange(num_tokens)
    token = torch.nn.functional.pad(row, (0, max(0, room - num_tokens)), value=-1)
    return pack(Handle((row[:, None], token)))
