"""Grouped products by whichever engine is fastest for the operands.

``triton``  our persistent kernels: Hopper, bfloat16 and float16
``torch``   ``torch._grouped_mm``: CUDA, bfloat16
``loop``    a product per group: everything else; asks the host where groups end

The first two want rows of whole 16 bytes. The first of them that can is used, unless the environment variable
``FMOE_GROUPED_MM`` names another, or ``python -m fmoe tune`` has found one, or another tile, to be faster.
``quack`` computes whole layers instead of single products (``gathered.py``).
"""

import functools
import math
import os
from collections.abc import Sequence
from itertools import pairwise

import torch

from . import fused, tuned
from .choice import chosen
from .tuned import Choice

ENGINES = ("triton", "torch", "loop")
LAYERS = "quack"  # computes layers, not single products
OVERRIDE = "FMOE_GROUPED_MM"
BEST = {engine: Choice(engine) for engine in ENGINES}


def mm(x_RI: torch.Tensor, w_eIO: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """(R, I) in groups times (e, I, O) -> (R, O); rows of no group are undefined."""
    x_RI = x_RI.contiguous()
    out = x_RI.new_empty(x_RI.shape[0], w_eIO.shape[2])
    how = choice("mm transposed" if w_eIO.stride(1) == 1 else "mm", x_RI, w_eIO, out, w_eIO.shape)
    match how.engine:
        case "triton":
            from . import persistent

            persistent.mm(x_RI, w_eIO, offsets_e, out, how.tile)
        case "torch":
            return torch._grouped_mm(x_RI, w_eIO, offs=offsets_e).contiguous()
        case _:
            ends = groups(offsets_e)
            for expert, (a, b) in enumerate(ends):
                torch.mm(x_RI[a:b], w_eIO[expert], out=out[a:b])
            out[ends[-1][1] :] = 0
    return out


def outer(x_RI: torch.Tensor, y_RO: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """(R, I), (R, O) in groups -> (e, I, O): each group's x transposed times its y."""
    x_RI, y_RO = x_RI.contiguous(), y_RO.contiguous()
    out = x_RI.new_empty(offsets_e.shape[0], x_RI.shape[1], y_RO.shape[1])
    how = choice("outer", x_RI, y_RO, out, out.shape)
    match how.engine:
        case "triton":
            from . import persistent

            persistent.outer(x_RI, y_RO, offsets_e, out, how.tile)
        case "torch":
            return torch._grouped_mm(x_RI.mT, y_RO, offs=offsets_e).contiguous()
        case _:
            out.zero_()
            for expert, (a, b) in enumerate(groups(offsets_e)):
                if b > a:
                    torch.mm(x_RI[a:b].mT, y_RO[a:b], out=out[expert])
    return out


def groups(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """First and last row of every group, on the host."""
    return list(pairwise([0, *offsets.tolist()]))


def choice(product: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, sizes: Sequence[int]) -> Choice:
    """The engine and tile for a product of rows ``a`` with ``b``, into ``out``; ``sizes`` are (e, I, O)."""
    known = tuned.choices(a.device)
    found = known.get(tuned.key(product, sizes, a.dtype)) if known else None
    if os.environ.get(OVERRIDE, LAYERS) == LAYERS:
        if found and found.engine in engines(a, b, out):
            return found
        return BEST[next(name for name in ENGINES if _able(name, a, b, out))]
    work = f"{a.dtype} of shape {tuple(a.shape)} on {a.device}"
    engine = chosen("grouped_mm", OVERRIDE, engines(a, b, out), work)
    return found if found and found.engine == engine else BEST[engine]


def engines(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> list[str]:
    """The engines that can compute such a product, the one that is best for most first."""
    return [name for name in ENGINES if _able(name, a, b, out)]


def _able(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> bool:
    if name == "loop":
        return True
    if not a.is_cuda or not a.numel() or not b.numel() or not (_aligned(a) and _aligned(b)):
        return False
    if name == "torch":
        return a.dtype == torch.bfloat16
    return a.dtype in (torch.bfloat16, torch.float16) and fused(a) and hopper(a.device) and _aligned(out)


def _aligned(x: torch.Tensor) -> bool:
    """Whether rows start at whole 16 bytes."""
    return _whole_lines(x.stride(), x.element_size()) and x.data_ptr() % 16 == 0


@functools.lru_cache(maxsize=1024)
def _whole_lines(strides: tuple[int, ...], size: int) -> bool:
    inner, *outer = sorted(strides)
    return inner == 1 and math.gcd(*outer) * size % 16 == 0


@functools.cache
def hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
