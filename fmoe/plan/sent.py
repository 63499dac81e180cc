"""Bytes that operators send, and what for: rings for collectives; tokens go evenly to all other devices."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..ops.core.dtypes import accumulator
from ..parallel.backends.payload import token_bytes

GATHERS = {"fmoe::gather_params", "fmoe::begin_gather"}
PURPOSE = dict.fromkeys((f"fmoe::{n}" for n in ("exchange", "send", "send_back", "send_both_back")), "tokens")
PURPOSE |= dict.fromkeys((*GATHERS, "fmoe::reduce_params", "fmoe::begin_reduce"), "parameters")
PURPOSE["fmoe::swap"] = "pipeline"


def _others(size: int, nbytes: int) -> int:
    return nbytes * (size - 1) // size


def _along(group: str) -> int:
    """The size of a group that :class:`MeshOfSizes` named."""
    return math.prod(int(axis.partition("=")[2]) for axis in group.split(","))


def axes_along(args: Any) -> str:
    """The axes that a collective's group is along, as ``"dp,ep"``."""
    group = next(a for a in args if isinstance(a, str) and "=" in a)
    return ",".join(axis.partition("=")[0] for axis in group.split(","))


def _sent_rows(args: Any, rows: int, size: int, tensors: int) -> int:
    return _others(size, sum(bytes_of_rows(t, rows) for t in args[:tensors]))


def _gathered(args: Any, outs: Any) -> int:
    """Bytes of pieces in the dtype that they are moved in."""
    return (args[4] - 1) * bytes_in(args[2], args[0])


def bytes_of_rows(t: torch.Tensor, rows: int) -> int:
    return rows * t.shape[1:].numel() * t.element_size()


def exchanged_row(args: Any) -> int:
    """Bytes of a token, its weights and its experts in one message."""
    x, weights, ids, *_, narrow, _ = args
    return token_bytes(x, narrow) + bytes_of_rows(weights, 1) + bytes_of_rows(ids, 1)


def reduced(args: Any) -> int:
    """Bytes of what is summed over devices, in float32 or wider."""
    x: torch.Tensor = args[0]
    return x.numel() * accumulator(x.dtype).itemsize


def bytes_in(dtype: torch.dtype, x: torch.Tensor) -> int:
    """Bytes of a tensor in another dtype."""
    return x.numel() * dtype.itemsize


def _exchange_sent(args: Any, outs: Any) -> int:
    size, sizes_and_kind = args[4], 24
    return _others(size, outs[5].shape[0] * exchanged_row(args)) + sizes_and_kind * (size - 1)


SENT: dict[str, Callable[[Any, Any], int]] = {
    "fmoe::psum": lambda args, outs: 2 * _others(_along(args[1]), args[0].nbytes),
    "fmoe::all_gather": lambda args, outs: (args[1] - 1) * args[0].nbytes,
    "fmoe::gather_params": _gathered,
    "fmoe::begin_gather": _gathered,
    "fmoe::reduce_params": lambda args, outs: _others(args[4], bytes_in(args[3], args[0])),
    "fmoe::begin_reduce": lambda args, outs: _others(args[4], bytes_in(args[3], args[0])),
    "fmoe::reduce_scatter": lambda args, outs: _others(args[1], reduced(args)),
    "fmoe::exchange": _exchange_sent,
    "fmoe::send": lambda args, outs: _sent_rows(args, args[1].shape[0], _along(args[5]), 1),
    "fmoe::send_back": lambda args, outs: _sent_rows(args, args[0].shape[0], _along(args[4]), 1),
    "fmoe::send_both_back": lambda args, outs: _sent_rows(args, args[0].shape[0], _along(args[5]), 2),
    "fmoe::swap": lambda args, outs: args[0].nbytes,
}
