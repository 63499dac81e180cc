"""A diagnosis of this machine, and of what fmoe can do with it."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .models.moe import moe_init
from .ops.experts import experts_grouped_mm
from .ops.reference import swiglu_reference
from .ops.route import RouterConfig, RouterParams, Routing, route
from .parallel.backends import choose
from .parallel.backends.deepep import adapter as deepep
from .parallel.backends.deepep.transport import DeepEP
from .parallel.mesh import make_mesh, num_processes
from .parallel.together import num_ranks, this_rank
from .testing import LawBroken, Report, check_backend, check_experts, check_router
from .testing.backend import LAWS


def diagnose() -> dict[str, Any]:
    """Versions, what works here, and what ``backend="auto"`` would choose for a group within a node.

    ``None`` stands for what isn't there. It connects nothing, so only making a buffer shows whether devices
    reach each other.

    >>> diagnose()["torch"] == torch.__version__
    True
    """
    nccl, triton = deepep.nccl_version(), _version("triton")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds, problem = _deep_ep()
    if not devices:
        problem = problem or "DeepEP needs CUDA devices, and there are none."
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "triton": triton,
        "quack-kernels": _version("quack-kernels"),
        # A DeepEP that was built in place has no metadata.
        "deep_ep": deepep.version_of(deepep.load()) if kinds else deepep.version(),
        "devices": devices,
        "can": {
            "kernels": "Triton, on CUDA" if devices and triton else "plain PyTorch",
            "all_to_all": [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()],
            "deepep": kinds,
        },
        "auto": "all_to_all" if problem else "deepep",
        "why": problem or "DeepEP loads here; rows it doesn't take, as float32, go by all_to_all.",
    }


def _deep_ep() -> tuple[list[str], str]:
    """The kinds of buffers that DeepEP has for two devices here and, if none, the reason."""
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


def self_test() -> dict[str, Any]:
    """Check the laws of the experts, the router and each backend here; under ``torchrun`` on all processes.

    It checks in bfloat16 on CUDA and in float32 on a CPU. It leaves out compilation, which takes longer than
    all else. For each check it gives the ``report`` in words, and in words what is ``broken``, or ``None``.

    >>> {name: test["broken"] for name, test in self_test().items()}
    {'router': None, 'experts': None, 'local': None}
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    size = num_processes()
    mesh = make_mesh(f"ep={size}", device_type=device)
    params = moe_init(0, dim=64, hidden_dim=32, num_experts=8, dtype=dtype, device=device)
    config = RouterConfig(top_k=2, num_groups=4, top_groups=2)

    def backend(name: str) -> Callable[[], Report]:
        bound = choose("doctor", name, mesh, (dtype, 256)).get("ep")
        laws = [law for law in LAWS if law != "compilation"]
        any_order = name == "deepep"  # ElasticBuffer gives rows in any order
        return lambda: check_backend(bound, mesh, dtype=dtype, dim=256, any_order=any_order, laws=laws)

    def router(params: RouterParams, x: torch.Tensor) -> Routing:
        return route(params, x, config)

    laws = ["oracle", "invariance", "second", "transforms", "recomputation"]
    checks: dict[str, Callable[[], Report]] = {
        "router": lambda: check_router(router, params.router, dim=64),
        "experts": lambda: check_experts(
            experts_grouped_mm, params.experts, swiglu_reference, dim=64, laws=laws
        ),
        "all_to_all" if size > 1 else "local": backend("all_to_all"),
    }
    best = choose("doctor", "auto", mesh, (dtype, 256)).get("ep")
    if size > 1 and isinstance(best, DeepEP):
        checks["deepep"] = backend("deepep")
    return {name: _tried(check) for name, check in checks.items()}


def _tried(check: Callable[[], Report]) -> dict[str, Any]:
    try:
        return {"report": str(check()), "broken": None}
    except LawBroken as error:
        stuck = error.__cause__ is not None and num_ranks() > 1
        if stuck or this_rank() != 0:  # the first rank's findings are in its report
            print(f"rank {this_rank()}: {error}", file=sys.stderr)
        if stuck:
            sys.exit(1)  # other ranks may wait for this one; the launcher ends them
        return {"report": str(error.report), "broken": str(error)}


def report(found: dict[str, Any]) -> str:
    """The findings of :func:`diagnose`, one per line, as ``python -m fmoe doctor`` prints them.

    >>> print(report(diagnose()))  # doctest: +ELLIPSIS
    python ...
    """

    facts = {name: found[name] for name in found if name not in ("can", "auto", "why", "self_test")}
    facts |= {f"can: {name}": value for name, value in found["can"].items()}
    lines = [(name, (", ".join(v) if isinstance(v, list) else v) or "none") for name, v in facts.items()]
    lines += [('backend="auto"', f"{found['auto']}: {found['why']}")]
    lines += [("self-test", test["broken"] or test["report"]) for test in found.get("self_test", {}).values()]
    return "\n".join(f"{name:16} {value}" for name, value in lines)
