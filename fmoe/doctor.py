"""What this machine has, and what fmoe can do with it."""

import importlib.metadata
import platform
from typing import Any

import torch
import torch.distributed as dist

from .parallel.backends import deepep

_BY_FACT = ("python", "torch", "cuda", "nccl", "triton", "deep_ep", "devices")


def diagnose() -> dict[str, Any]:
    """Versions, what can be done here, and what ``backend="auto"`` would choose, for a group within a node.

    ``None`` stands for what isn't there. It connects nothing: whether devices reach each other shows when a
    buffer is made.

    >>> diagnose()["torch"] == torch.__version__
    True
    """
    nccl = deepep.nccl_version()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "triton": _version("triton"),
        "deep_ep": deepep.version(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    kinds, problem = _deep_ep()
    found["can"] = {
        "kernels": "Triton, on CUDA" if found["devices"] and found["triton"] else "plain PyTorch",
        "all_to_all": [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()],
        "deepep": kinds,
    }
    if not found["devices"]:
        problem = problem or "DeepEP needs CUDA devices, and there are none."
    found["auto"] = "all_to_all" if problem else "deepep"
    found["why"] = problem or "DeepEP loads here; rows it doesn't take, as float32, go by all_to_all."
    return found


def _deep_ep() -> tuple[list[str], str]:
    """The kinds of buffers that DeepEP has for two devices here, and what is in the way of any."""
    kinds, problem = [], ""
    for kind in deepep.CLASSES:
        try:
            deepep.choose_kind(deepep.load(), 2, kind)
            deepep.check_kind(kind, ["here"] * 2)
            kinds.append(kind)
        except ValueError as error:
            problem = problem or str(error)
    return kinds, "" if kinds else problem


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(found: dict[str, Any]) -> str:
    """What :func:`diagnose` found, a fact a line: what ``python -m fmoe doctor`` prints.

    >>> print(report(diagnose()))  # doctest: +ELLIPSIS
    python ...
    """

    def said(value: Any) -> str:
        return (", ".join(value) if isinstance(value, list) else value) or "none"

    lines = [(name, said(found[name])) for name in _BY_FACT]
    lines += [(f"can: {name}", said(value)) for name, value in found["can"].items()]
    lines += [('backend="auto"', f"{found['auto']}: {found['why']}")]
    return "\n".join(f"{name:16} {value}" for name, value in lines)
