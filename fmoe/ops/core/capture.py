"""Differentiable tensors that a function uses without having them as arguments."""

from typing import Any

import optree
import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import _functorch as functorch
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.overrides import TorchFunctionMode

from ...errors import captured_error
from .naming import observed
from .tape import Tape

_T: Any = torch.Tensor
# Questions about a tensor, which no gradient flows through. A region asks more of them than it computes.
_QUESTIONS = {
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(_T, name).__get__ for name in ("is_cuda", "is_meta", "is_leaf", "itemsize", "nbytes")),
    *(_T.dim, _T.size, _T.stride, _T.numel, _T.is_contiguous, _T.is_floating_point, _T.is_complex),
    *(_T.data_ptr, _T.storage_offset, _T.element_size, _T.__len__),
}


class Guard(TorchFunctionMode):
    """Tells a region's tape of the calls of PyTorch's functions and, with ``check``, finds captured tensors.

    Inside the first run of a region nothing requires a gradient and no transform from outside is active. So
    whatever does, or belongs to such a transform, was captured. Detaching it isn't a use, nor is asking for
    its shape.
    """

    def __init__(self, tape: Tape, check: bool) -> None:
        super().__init__()
        self.tape, self.check = tape, check

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS or func is observed:  # the last is no call of PyTorch's
            return func(*args, **(kwargs or {}))
        if self.check and func is not torch.Tensor.detach:
            with torch._C.DisableTorchFunction():
                check_captured((args, kwargs), getattr(func, "__name__", str(func)))
        return self.tape.torch_call(func, args, kwargs or {})


def check_captured(values: Any, operation: str) -> None:
    for leaf in optree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and _is_captured(leaf):
            raise captured_error("remat", leaf, f" in {operation}")


def _is_captured(tensor: torch.Tensor) -> bool:
    if forward_ad._current_level >= 0 and not functorch.is_functorch_wrapped_tensor(tensor):
        with _set_fwd_grad_enabled(True):
            if forward_ad.unpack_dual(tensor).tangent is not None:
                return True
    level = functorch.maybe_current_level() or 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.maybe_get_level(tensor) > level:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad and torch.is_grad_enabled()
