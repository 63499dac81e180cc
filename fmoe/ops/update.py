"""AdamW's update of many leaves as one raw operator, in place.

On CUDA a large leaf is one launch of a kernel of ours. All others share PyTorch's fused kernel, which takes
leaves of one dtype (pytorch#146542) and writes gradients that it scales.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from . import kernels
from .core.primitive import kernel

LARGE = 2**22  # numbers, for which a launch costs the host less than the device
PIECE = 2**25  # numbers widened at once

Leaves = Sequence[torch.Tensor]


def writes_gradient(p: torch.Tensor, m: torch.Tensor) -> bool:
    """Whether the update of a leaf with this moment writes to a gradient that it scales."""
    return not (p.numel() >= LARGE and kernels.fused(p, m))


def _update(
    p: Leaves,
    g: Leaves,
    m: Leaves,
    v: Leaves,
    step: torch.Tensor,
    rate: torch.Tensor | None,
    scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    device = p[0].device
    step = step.to(device)
    rate, scale = (None if t is None else t.to(device) for t in (rate, scale))
    rest = []
    for row in zip(p, g, m, v):
        if writes_gradient(row[0], row[2]):
            rest.append(row)
            continue
        from .kernels import adamw

        adamw.adamw(*row, step, lr, rate, scale, (beta1, beta2), eps, weight_decay)
    if not rest:
        return
    fused = functools.partial(
        torch_adamw, fused=True, foreach=False, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
        lr=lr if rate is None else rate, weight_decay=weight_decay, eps=eps,
        grad_scale=None if scale is None else scale.reciprocal(),
    )  # fmt: skip
    if p[0].dtype == m[0].dtype:
        _fused(fused, rest, step)
    else:
        _widened(fused, rest, step, torch.promote_types(p[0].dtype, m[0].dtype))


def _fused(fused: Callable[..., None], rows: Sequence[Leaves], step: torch.Tensor) -> None:
    p, g, m, v = map(list, zip(*rows))
    # The kernel counts in place, a step per tensor, so it gets copies of the one step.
    fused(p, g, m, v, [], list(step.repeat(len(rows)).unbind()))


def _widened(
    fused: Callable[..., None], rows: Sequence[Leaves], step: torch.Tensor, dtype: torch.dtype
) -> None:
    """The same for rows of two dtypes, in the wider one, a piece at a time."""
    for row in rows:
        for piece in zip(*(t.view(-1).split(PIECE) for t in row)):
            wide = [t.to(dtype) for t in piece]
            _fused(fused, [wide], step)
            for i in (0, 2, 3):  # not the gradient
                if wide[i] is not piece[i]:
                    piece[i].copy_(wide[i])
            del wide  # before the next piece's


# Contiguous leaves of one device. Params and gradients share a dtype, and so do both moments. ``step`` counts
# the updates so far. ``rate`` goes before ``lr``.
adamw: Any = kernel(
    "adamw_(Tensor(a!)[] p, Tensor(d!)[] g, Tensor(b!)[] m, Tensor(c!)[] v, Tensor step, Tensor? rate, "
    "Tensor? scale, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    impl=_update,
    fake=lambda *args: None,
)
