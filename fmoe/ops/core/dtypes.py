"""The dtype to compute in, given that of the tensors."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are held in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
