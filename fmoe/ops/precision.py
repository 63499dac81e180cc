"""Precisions of products: the fp8 numbers that operands are rounded to before they are multiplied.

An operand is scaled along the dimension that the product sums over, so that its largest number there is the
largest of e4m3. Sums are in float32. Derivatives are those of the product without rounding, themselves
computed in fp8: *straight-through*.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from ..errors import argument_error

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-126  # devices may take smaller numbers for zero
BLOCK = 128

ROWWISE, BLOCKWISE, ROWWISE_GW_HP = "fp8_rowwise", "fp8_block", "fp8_rowwise_with_gw_hp"
PRECISIONS = (ROWWISE, BLOCKWISE, ROWWISE_GW_HP)
FAST = (ROWWISE, ROWWISE_GW_HP)  # that kernels compute


@dataclass(frozen=True)
class Recipe:
    """The precision of matrix products by kind of layer. ``None``: they take operands as they are.

    ===========  ==========================================================
    ``experts``  products of the routed experts
    ``dense``    attention's projections, dense layers, shared experts
    ===========  ==========================================================

    ============================  ======================================================================
    precision                     one scale for
    ============================  ======================================================================
    ``"fp8_rowwise"``             what one number of the product sums over: a row, a column of a weight
    ``"fp8_rowwise_with_gw_hp"``  the same; gradients of weights take operands as they are (*high
                                  precision*), so none is rounded by columns
    ``"fp8_block"``               128 numbers of it; of a weight 128 x 128. As DeepSeek-V3 does. No kernel
                                  computes it: operands are rounded, then multiplied in float32
    ============================  ======================================================================

    All numbers are e4m3, those of gradients too. Routers, embedding, head, norms and what attention does
    between its projections keep their dtype. So do parameters, gradients and, unless a backend has a
    ``payload``, what is sent.

    Float64 is never rounded, as ``torch.autocast`` leaves it alone, so that derivatives can be checked.

    Raises ``ValueError`` for other precisions.

    Source: rows as in torchao's recipes ``rowwise`` and ``rowwise_with_gw_hp``; blocks as in DeepSeek-V3,
    arXiv 2412.19437, section 3.3.

    >>> Recipe(experts="fp8_rowwise")
    Recipe(experts='fp8_rowwise', dense=None)
    """

    experts: str | None = None
    dense: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check_precision("Recipe", field.name, getattr(self, field.name))


def check_precision(function: str, argument: str, value: Any, others: str = "or None") -> None:
    """Raise ``ValueError`` for what is no precision of a product."""
    if value is not None and value not in PRECISIONS:
        expected = f"one of {PRECISIONS}, {others}"
        raise argument_error(function, argument, got=repr(value), expected=expected)


def recipe_of(function: str, precision: str | Recipe | None) -> Recipe:
    """What a ``precision`` means, one word for all layers."""
    if isinstance(precision, Recipe):
        return precision
    check_precision(function, "precision", precision, "a Recipe, or None")
    return Recipe(precision, precision)


def parse_recipe(text: str) -> Recipe:
    """The recipe of a command's ``--precision``: one word for all products, or by kind of layer.

    Raises ``ValueError`` for other words, and for a kind of layer that comes twice.

    >>> parse_recipe("fp8_rowwise")
    Recipe(experts='fp8_rowwise', dense='fp8_rowwise')
    >>> parse_recipe("experts=fp8_rowwise")
    Recipe(experts='fp8_rowwise', dense=None)
    """
    if text in PRECISIONS:
        return Recipe(text, text)
    parts = [part.partition("=")[::2] for part in text.split(",")]
    kinds = dict(parts)
    if len(kinds) < len(parts) or not kinds.keys() <= {field.name for field in fields(Recipe)}:
        expected = f"one of {PRECISIONS}, or such as experts={ROWWISE},dense={ROWWISE}"
        raise argument_error("parse_recipe", "precision", got=repr(text), expected=expected)
    return Recipe(**kinds)


def of_weight_gradient(precision: str | None) -> str | None:
    """The precision of the product that is a weight's gradient, in one of other products.

    >>> of_weight_gradient("fp8_rowwise"), of_weight_gradient("fp8_rowwise_with_gw_hp")
    ('fp8_rowwise', None)
    """
    return None if precision == ROWWISE_GW_HP else precision


class Scaled(NamedTuple):
    """Numbers as e4m3 ``values`` (..., K) times a float32 ``scale`` (...) for each row.

    >>> values, scale = quantise(torch.tensor([[2.0, -1.0]]))
    >>> values.float() * scale[:, None]
    tensor([[ 2., -1.]])
    """

    values: torch.Tensor
    scale: torch.Tensor


def quantise(x: torch.Tensor) -> Scaled:
    """Rows as :class:`Scaled`, to the nearest even. A row of zeros has a scale of 1.

    Infinite numbers have an infinite scale. So they are infinite in a product, as NaN is NaN there.

    >>> quantise(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
    Scaled(values=tensor([[ 144., -448.],
            [   0.,    0.]], dtype=torch.float8_e4m3fn), scale=tensor([0.0067, 1.0000]))
    """
    x = x.float()
    most = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = torch.where(most == 0, 1.0, (most / LARGEST).clamp_min(SMALLEST_SCALE))
    return Scaled(torch.where(x.isinf(), x.sign(), x / scale[..., None]).to(E4M3), scale)


def restored(scaled: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (..., K) in a dtype. In a row with infinite ones the others are zeros.

    >>> restored(quantise(torch.tensor([[2.0, -1.0]])), torch.bfloat16)
    tensor([[ 2., -1.]], dtype=torch.bfloat16)
    """
    values = scaled.values.float()
    return torch.where(values == 0, values, values * scaled.scale[..., None]).to(dtype)


def rounded(x: torch.Tensor, precision: str, *, weight: bool = False) -> torch.Tensor:
    """The float32 numbers that ``x`` (..., K) is in a product that sums over K: any precision's reference.

    ``weight`` says that it is one, (..., N, K).
    """
    if precision in FAST:
        return _rounded_rows(x)
    rows, cols = x.shape[-2:]
    high = BLOCK if weight else 1
    padded = F.pad(x, (0, -cols % BLOCK, 0, -rows % high))
    blocks = rearrange(padded, "... (n a) (k b) -> ... n k (a b)", a=high, b=BLOCK)
    back = rearrange(_rounded_rows(blocks), "... n k (a b) -> ... (n a) (k b)", a=high)
    return back[..., :rows, :cols]


def _rounded_rows(x: torch.Tensor) -> torch.Tensor:
    values, scale = quantise(x)
    back = values.float() * torch.where(scale.isinf(), 0.0, scale)[..., None]
    return torch.where(x.isfinite(), back, x.float())
