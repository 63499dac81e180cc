"""Triton kernels of the operators' hot paths; each has a twin in PyTorch beside its operator.

The kernels run where tensors are on a CUDA device and Triton is installed, the twins everywhere else.
Operators call the kernels from their raw implementations only, so autograd never sees them.
"""

import functools
import importlib.util

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def fused(*rows: torch.Tensor) -> bool:
    """Whether the Triton kernels take these tensors of rows."""
    return installed() and all(t.is_cuda and t.dtype in DTYPES for t in rows)
