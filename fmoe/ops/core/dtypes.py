"""The dtype to compute in, given that of the tensors."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product takes a floating tensor: that of ``torch.autocast``, if it is on.

    Like PyTorch's own products, float64 stays as it is.
    """
    device = tensor.device.type
    casts = tensor.dtype != torch.float64 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else tensor.dtype
