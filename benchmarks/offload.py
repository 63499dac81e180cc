"""Keeping, recomputing and offloading what MoE layers need for their backward: time and memory.

    python benchmarks/offload.py --shape 16B --layers 6         # one GPU, bfloat16, as a markdown table

The layers follow one another, each in a ``remat`` of its own. Gradients must be equal bit for bit before
anything is timed. Policies take turns, so that a disturbance hits all; times are medians, with the host's
waits. The held MiB lie on the device between forward and backward, beyond parameters and input. The offloaded
MiB are predicted from the operators' declarations.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import optree
import torch

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.bench.layers import SHAPES, config_for, random_params
from fmoe.bench.timing import in_turns
from fmoe.introspect import saved_bytes
from fmoe.transforms import per_layer

POLICIES = [
    "none",
    "full",
    "default",
    "default+save:experts_grouped_mm",
    "default+offload:experts_grouped_mm",
    "offload:topk,dispatch,experts_grouped_mm",
]


def layer(config: fmoe.RouterConfig, params: fmoe.MoEParams, x: torch.Tensor) -> torch.Tensor:
    return x + fmoe.moe_forward(params, x, router=config)


def memory(call: Callable[[], Any], between: list[int]) -> tuple[float, float]:
    """MiB held between forward and backward, and at the peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (between[-1] - before) / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=[*SHAPES], default="16B")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="words of --remat")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    shape, on_cuda, dtype = SHAPES[args.shape], args.device == "cuda", torch.bfloat16
    router = config_for(shape, "balanced")
    params = [
        random_params(shape, args.seed + i, dtype=dtype, device=args.device) for i in range(args.layers)
    ]
    params = optree.tree_map(lambda t: t.requires_grad_() if t.is_floating_point() else t, params)
    x = torch.randn(shape.tokens, shape.dim, device=args.device, dtype=dtype, requires_grad=True)
    between = [0]  # bytes after the latest forward

    def step(words: str) -> tuple[torch.Tensor, ...]:
        wrapped, y = per_layer(words)(functools.partial(layer, router)), x
        for one in params:
            y = wrapped(one, y)
        if on_cuda:
            between.append(torch.cuda.memory_allocated())
        leaves = [x, *optree.tree_leaves(params)]
        return torch.autograd.grad(y, leaves, torch.ones_like(y), materialize_grads=True)

    steps = {words: functools.partial(step, words) for words in args.policies}
    first = step("none")
    for words, call in steps.items():
        if not all(map(torch.equal, first, call())):
            raise SystemExit(f"{words}: other gradients than without remat")
    del first
    held = {words: memory(call, between) if on_cuda else (0, 0) for words, call in steps.items()}
    times = in_turns(steps, args.rounds, on_cuda)
    base = statistics.median(times[args.policies[0]])
    rows = []
    for words in args.policies:
        ms = statistics.median(times[words])
        away = 0.0
        if "offload:" in words:
            names = words.partition("offload:")[2].split("+")[0].split(",")
            kept = saved_bytes(layer, router, params[0], x, policy=fmoe.save(*names))
            away = args.layers * sum(kept.values()) / 2**20
        device = [f"{mib:,.0f}" if on_cuda else "" for mib in held[words]]
        rows.append([f"`{words}`", f"{ms:.2f}", f"{ms / base:.2f}", *device, f"{away:,.0f}"])
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    print(
        f"{args.layers} layers of {args.shape} {tuple(shape)}, {dtype}, {name}, torch {torch.__version__}\n"
    )
    header = ["`--remat`", "ms a step", f"of {args.policies[0]}", "held MiB", "peak MiB", "offloaded MiB"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
