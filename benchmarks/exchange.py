"""Costs of a dispatch over all_to_all to the host and the device, in one process.

    python benchmarks/exchange.py                      # on a GPU, if there is one
    python benchmarks/exchange.py --tokens 4096 --size 8

``ways`` says where rows go, on ``--size`` devices. The dispatches are those of a group of this process alone.
Launches are kernels on CUDA, and calls of PyTorch's operators elsewhere.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmoe.__main__ import markdown_table
from fmoe.bench.timing import of_host, on_device, syncs, timed
from fmoe.ops import kernels
from fmoe.parallel.backends import at_once, ways
from fmoe.parallel.collectives import group_alone

ROUNDS = 20


class _Calls(TorchDispatchMode):
    """Counts calls of operators."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def cost(call: Callable[[], Any], on_cuda: bool) -> list[str]:
    for _ in range(3):
        call()
    whole = statistics.median(timed(call, on_cuda) for _ in range(ROUNDS))
    host = statistics.median(of_host(call) for _ in range(ROUNDS)) if on_cuda else whole
    with _Calls() as calls:
        call()
    number = on_device(call)[1] if on_cuda else calls.number
    return [f"{number:.0f}", f"{1e3 * host:.0f}", f"{1e3 * whole:.0f}", f"{syncs(call) if on_cuda else 0}"]


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, default in dict(tokens=16384, dim=2048, experts=64, top_k=6, size=8, seed=0).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    on_cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_cuda else ("cpu", torch.float32)
    tokens, top_k, experts, group = args.tokens, args.top_k, args.experts, group_alone()
    with torch.device(device):
        ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
        rows = torch.randn(tokens, args.dim, dtype=dtype), torch.rand(tokens, top_k), ids
    held, statics = experts // args.size, (experts, 1, 0, False, False)
    found = {
        "ways": lambda: ways.ways(ids, args.size, held, tokens),
        "exchange": lambda: at_once._exchange_kernel(*rows, *statics, group),
        "exchange_bounded": lambda: at_once._bounded_kernel(*rows, *statics, tokens, tokens * top_k, group),
    }
    table = [[name, *cost(call, on_cuda)] for name, call in found.items()]
    with mock.patch.object(kernels, "installed", return_value=False):
        table.insert(0, ["ways without Triton", *cost(found["ways"], on_cuda)])
    print(markdown_table(["", "launches", "host us", "us", "host syncs"], table))
