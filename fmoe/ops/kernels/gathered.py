"""An expert's products by quack-kernels, which load rows by index, and compute SwiGLU in passing.

So no token is copied for each of its experts. quack-kernels (``pip install fmoe[hopper]``) are written in
CuTe DSL for Hopper. They want gate and up side by side in memory: a pre-activation (R, 2, F) that lies there
as (R, F, 2). Where one does, these kernels made it, and they go on.

Without quack-kernels, for other dtypes and devices, for weights that multiply tokens before the experts, and
for products in fp8, the kernels of ``persistent.py`` and ``activation.py`` do the same.
"""

import functools
import importlib
import importlib.metadata
import os
import re
from typing import Any, NamedTuple

import torch

from ...errors import argument_error
from ..core.dtypes import accumulator
from . import fused, grouped, tuned
from .tuned import Tile

ENGINE = grouped.LAYERS
VERSIONS = "0.3.11", "0.4"  # from the first on and below the second: whose interface this file follows
LINE = 8  # numbers in 16 bytes, of which rows must be whole
PRODUCTS = "up", "down", "up inputs", "up weight", "down inputs", "down weight"
WIDE = 2048  # from so many hidden numbers on, moving rows costs little beside an expert's products
CROWDED = 1024  # rows of an expert, on average, from which on two tiles of them may share its weights


def chosen(x: torch.Tensor, w_in: torch.Tensor) -> bool:
    """Whether these kernels compute products of tokens (S, D) with experts (e, 2, F, D).

    They do if ``FMOE_GROUPED_MM`` is ``quack``, or else if ``python -m fmoe tune`` found them to be faster.
    Where neither says anything, they do for F below ``WIDE``. That depends on sizes, dtype and device only,
    so it can be asked before there are numbers. Raises ``ValueError`` where the variable asks for them, and
    they can't.
    """
    wanted = os.environ.get(grouped.OVERRIDE)
    if not able(x, w_in):
        if wanted == ENGINE and x.is_cuda:
            got = f"{x.dtype} of {w_in.shape[3]} numbers and hidden ones of {w_in.shape[2]} on {x.device}"
            package = "quack-kernels from {} to before {}".format(*VERSIONS)
            expected = f"{package}, a Hopper GPU, bfloat16 or float16, and multiples of {LINE} numbers"
            remedy = f"Install fmoe[hopper], or unset {grouped.OVERRIDE}."
            raise argument_error("experts_grouped_mm", "x_SD", got=got, expected=expected, remedy=remedy)
        return False
    if wanted is not None:
        return wanted == ENGINE
    known = tuned.choices(x.device).get(tuned.key("layer", sizes(w_in), x.dtype))
    return w_in.shape[2] < WIDE if known is None else known.engine == ENGINE


def key(product: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> str:
    """The name in a file of one of ``PRODUCTS`` of a layer."""
    return tuned.key(f"gathered {product}", sizes, dtype)


def usual(product: str, hidden: int, rows_each: int) -> Tile:
    """The tile of one of ``PRODUCTS`` that no file names, for experts of so many hidden numbers.

    Four warps compute a tile while four others store theirs, or eight compute one together. These were the
    fastest on average over layers of eight sizes, of eleven tiles with and without clusters. ``rows_each``
    are an expert's rows, or room for them, on average.
    """
    return _usual(product, hidden, rows_each >= CROWDED)


@functools.cache
def _usual(product: str, hidden: int, crowded: bool) -> Tile:
    wide = Tile(128, 256, 64, warps=8, stages=0)
    match product:
        case "up":
            return wide._replace(cluster=2 if crowded else 1)
        case "down" | "up inputs":
            return Tile(192, 128, 64, warps=4, stages=0)
        case "down inputs":
            narrow = Tile(128, 128, 64, warps=4, stages=0)
            return (narrow if hidden % wide.cols else wide)._replace(cluster=2)
    return wide


def sizes(w_in: torch.Tensor) -> tuple[int, int, int]:
    """Of a layer, as a file of choices names it: experts, their inputs, their hidden numbers."""
    experts, _, hidden, dim = w_in.shape
    return experts, dim, hidden


def able(x: torch.Tensor, w_in: torch.Tensor) -> bool:
    """Whether these kernels can compute such products."""
    return not any(size % LINE for size in w_in.shape[2:]) and w_in.dtype == x.dtype and serve(x)


def serve(t: torch.Tensor) -> bool:
    """Whether these kernels run where a tensor is, for its dtype."""
    narrow = t.dtype in (torch.bfloat16, torch.float16)
    return narrow and fused(t) and installed() and grouped.hopper(t.device)


@functools.cache
def installed() -> bool:
    """Whether quack-kernels are installed, of ``VERSIONS``."""
    try:
        version = importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    first, beyond = (tuple(map(int, text.split("."))) for text in VERSIONS)
    return first <= tuple(map(int, re.findall(r"\d+", version)[:3])) < beyond


def empty_paired(like: torch.Tensor, rows: Any, hidden: Any) -> torch.Tensor:
    """A pre-activation (rows, 2, hidden) whose gate and up lie side by side."""
    return like.new_empty(rows, hidden, 2).transpose(1, 2)


def paired(h: torch.Tensor) -> bool:
    """Whether gate and up of a pre-activation lie side by side, as only these kernels leave them."""
    return (
        serve(h)
        and h.shape[2] > 1
        and h.stride(1) == 1
        and h.stride(2) == 2
        and h.stride(0) == 2 * h.shape[2]
    )


class Rows(NamedTuple):
    """Where products find rows: ``source`` (R,) of the token, ``starts`` (e + 1,) of experts, both int32.

    ``weights`` (R,) float32 are those of rows, where they were asked for.
    """

    source: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor | None


def rows_of(
    slot_R: torch.Tensor, offsets_e: torch.Tensor, top_k: int, weights_SK: torch.Tensor | None = None
) -> Rows:
    """Those of a layout. A row of no pair finds the first token, and weighs nothing.

    ``align_rows`` puts such rows among an expert's. So if the first token or its cotangent isn't finite, the
    gradients of all these experts' weights are NaN, not only of those that the token goes to.
    """
    if slot_R.is_cuda:
        from . import plan

        return Rows(*plan.rows(slot_R, offsets_e, top_k, weights_SK))
    pair_R = slot_R.clamp(min=0)
    pair_R[offsets_e[-1] :] = 0
    weights = None if weights_SK is None else weights_SK.flatten()[pair_R] * (slot_R >= 0)
    return Rows((pair_R // top_k).int(), torch.nn.functional.pad(offsets_e, (1, 0)), weights)


# ---- the products of a layer -----------------------------------------------------------------------------


def up(x: torch.Tensor, w_in: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (S, D) by experts (e, 2, F, D) -> (R, 2, F), and its activation (R, F)."""
    num_rows, hidden = rows.source.shape[0], w_in.shape[2]
    h, act = empty_paired(x, num_rows, hidden), x.new_empty(num_rows, hidden)
    if not x.numel() or not num_rows:
        return h.zero_(), act.zero_()
    tile = _tile("up", sizes(w_in), x, rows)
    _quack("gemm_act").gemm_gated(
        _lines(x), _lines(w_in).flatten(1, 2), _pairs(h), None, act, None, "swiglu", *_shape(tile),
        concat_layout=("B",), cu_seqlens_m=rows.starts, A_idx=rows.source,
    )  # fmt: skip
    return h, act


def down(act: torch.Tensor, w_out: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Activations (R, F) by experts (e, D, F) -> (R, D)."""
    experts, dim, hidden = w_out.shape
    y = act.new_empty(act.shape[0], dim)
    _gemm("down", (experts, dim, hidden), act, _lines(w_out), y, rows)
    return y


def up_inputs(g_h: torch.Tensor, w_in: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Cotangents (R, 2, F) -> those of each row's token (R, D)."""
    g_x = g_h.new_empty(g_h.shape[0], w_in.shape[3])
    _gemm("up inputs", sizes(w_in), _pairs(g_h), _lines(w_in).flatten(1, 2).mT, g_x, rows, concat="B")
    return g_x


def up_weight(g_h: torch.Tensor, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Cotangents (R, 2, F) and tokens (S, D) -> (e, 2, F, D)."""
    g_w = x.new_empty(rows.starts.shape[0] - 1, 2, g_h.shape[2], x.shape[1])
    operands = _lines(x).T, _pairs(g_h).T, g_w.flatten(1, 2).mT
    _gemm("up weight", sizes(g_w), *operands, rows, gather=True, summed=True, concat="out")
    return g_w


def down_inputs(
    g: torch.Tensor, h: torch.Tensor, w_out: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cotangents (S, D) -> those of ``h`` (R, 2, F) and of rows' weights, and the weighed activation.

    Those of weights are sums over the columns of (R, N). The last (R, F) is what :func:`down_weight` takes.
    """
    num_rows, _, hidden = h.shape
    g_h, act = empty_paired(h, num_rows, hidden), h.new_empty(num_rows, hidden)
    if not g.numel() or not num_rows:
        return g_h.zero_(), h.new_zeros(num_rows, 1, dtype=accumulator(h.dtype)), act.zero_()
    experts, dim, _ = w_out.shape
    tile = _tile("down inputs", (experts, dim, hidden), g, rows)
    tiles = -(-hidden // tile.cols)  # of a row, each of which has a sum
    sums = h.new_empty(num_rows, tiles, dtype=accumulator(h.dtype))
    _quack("gemm_dact").gemm_dgated(
        _lines(g), _lines(w_out).mT, _pairs(g_h), _pairs(h), act, None, "swiglu", *_shape(tile),
        colvec_scale=rows.weights, colvec_reduce=sums, cu_seqlens_m=rows.starts, A_idx=rows.source,
    )  # fmt: skip
    return g_h, sums, act


def down_weight(g: torch.Tensor, act: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Cotangents (S, D) and weighed activations (R, F) -> (e, D, F)."""
    g_w = g.new_empty(rows.starts.shape[0] - 1, g.shape[1], act.shape[1])
    experts, dim, hidden = g_w.shape
    _gemm("down weight", (experts, dim, hidden), _lines(g).T, act.T, g_w, rows, gather=True, summed=True)
    return g_w


def _gemm(
    product: str,
    size: tuple[int, int, int],
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    rows: Rows,
    *,
    gather: bool = False,
    summed: bool = False,
    concat: str | None = None,
) -> None:
    """Rows of ``a`` in groups by transposed matrices ``b``; or ``summed``, the product of each group's rows.

    ``gather``: rows of ``a`` are found by index. ``concat``: the operand whose gates all come before its ups.
    """
    if not a.numel() or not rows.source.numel():
        out.zero_()
        return
    _quack("gemm").gemm(
        a, b, out, None, None, *_shape(_tile(product, size, a, rows)),
        cu_seqlens_m=None if summed else rows.starts, cu_seqlens_k=rows.starts if summed else None,
        A_idx=rows.source if gather else None, concat_layout=concat and (concat,),
    )  # fmt: skip


@functools.cache
def _quack(module: str) -> Any:
    return importlib.import_module(f"quack.{module}")


def _tile(product: str, size: tuple[int, int, int], x: torch.Tensor, rows: Rows) -> Tile:
    """The tile of a product, which a file may name."""
    known = tuned.choices(x.device)
    found = known.get(key(product, size, x.dtype)) if known else None
    return (found and found.tile) or usual(product, size[2], rows.source.shape[0] // size[0])


def _shape(tile: Tile) -> tuple[int, int, int, int, bool]:
    """A tile as products take it: its rows and columns, those of a cluster, and whether warps take turns."""
    return tile.rows, tile.cols, tile.cluster, 1, tile.warps == 4


def _pairs(h: torch.Tensor) -> torch.Tensor:
    """A paired pre-activation as (R, 2 F)."""
    return h.transpose(1, 2).flatten(1)


def _lines(t: torch.Tensor) -> torch.Tensor:
    """The same with rows of whole 16 bytes in memory."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
