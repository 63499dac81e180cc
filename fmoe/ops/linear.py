"""The product of a dense layer, in any precision."""

import math

import torch
import torch.nn.functional as F

from .bases import scaled_grouped_mm
from .core.dtypes import product_dtype


def linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    precision: str | None = None,
) -> torch.Tensor:
    """``F.linear``, whose operands are rounded to a precision of :class:`fmoe.ops.precision.Recipe`.

    =========  ===========  ==============================================
    x          (..., I)     bfloat16, float16, float32 or float64
    weight_OI  (O, I)       dtype of ``x``
    bias_O     (O,)         ``None``: none
    precision               of products, forward and backward; ``None``: those of ``F.linear``
    -> y       (..., O)     dtype of ``x``
    =========  ===========  ==============================================

    >>> x, weight = torch.randn(3, 32), torch.randn(16, 32)
    >>> y = linear(x, weight, precision="fp8_rowwise")
    >>> 0.01 < ((y - x @ weight.T).norm() / y.norm()).item() < 0.06
    True
    """
    if precision is None:
        return F.linear(x, weight_OI, bias_O)
    x, weight_OI = x.to(product_dtype(x)), weight_OI.to(product_dtype(weight_OI))
    x_RI = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    ends = torch.full((1,), x_RI.shape[0], dtype=torch.int32, device=x.device)
    y = scaled_grouped_mm(x_RI, weight_OI.mT[None], ends, precision)  # one group
    y = y.reshape(*x.shape[:-1], weight_OI.shape[0])
    return y if bias_O is None else y + bias_O.to(y.dtype)
