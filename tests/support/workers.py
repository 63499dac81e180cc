"""The processes that all tests share, and run with fresh seeds."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from helpers import fresh_seed

from fmoe.parallel.processes import Processes, RankError

__all__ = ["Pool", "RankError"]


class Pool(Processes):
    def __init__(self, processes: int = 4) -> None:
        super().__init__(processes)

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """What ``function(*args)`` returns on each of ``size`` ranks, all with the same fresh seed."""
        return super().run(_seeded, fresh_seed(), function, args, ranks=size, timeout=timeout)


def _seeded(seed: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_default_device(None)
    torch.manual_seed(seed)
    try:
        return function(*args)
    finally:
        if double := sys.modules.get("deep_ep_double"):
            double.remove()  # else the next test would find DeepEP
