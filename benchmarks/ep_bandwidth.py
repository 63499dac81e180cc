"""How fast rows go to experts and back, by size, over both backends.

    torchrun --nproc-per-node 2 benchmarks/ep_bandwidth.py --tokens 1024 4096 16384 --dim 7168

Times are of the kernels that send, by the profiler, and of the whole dispatch and combine, from one event to
another, with what they launch around it. Bytes are those of the rows that a device has then, or sends back,
its own among them, as DeepEP's own test counts them.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.bench.timing import IN_A_ROW, timed
from fmoe.ops.core.axes import group_of
from fmoe.parallel import AllToAll, deepep
from fmoe.parallel.mesh import num_processes
from fmoe.training import launch, options

COLUMNS = ["tokens", "dim", "backend", "MB", "dispatch GB/s", "of which sent at", "combine GB/s", "sent at"]
SENDS = "deep_ep::intranode::dispatch", "deep_ep::intranode::combine", "SendRecv"


def sending(call: Callable[[], Any]) -> float:
    """Seconds in a call's kernels that send; those of the slowest device count."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(IN_A_ROW):
            call()
        torch.cuda.synchronize()
    rows = [r for r in profile.key_averages() if any(name in r.key for name in SENDS)]
    return sum(r.self_device_time_total for r in rows) / IN_A_ROW / 1e6


@contextlib.contextmanager
def backend_of(name: str, mesh: Any, tokens: int, args: argparse.Namespace) -> Any:
    if name == "all_to_all":
        yield AllToAll(group_of(mesh, ("ep",)))
        return
    sizes = dict(dim=args.dim, top_k=args.top_k, num_experts=args.experts)
    with deepep(mesh["ep"], max_tokens_per_rank=tokens, **sizes) as backend:
        yield backend


def measure(mesh: Any, name: str, tokens: int, args: argparse.Namespace) -> list[str]:
    on_cuda = args.device == "cuda"
    torch.manual_seed(dist.get_rank())
    x = torch.randn(tokens, args.dim, device=args.device).to(torch.bfloat16)
    router = fmoe.RouterParams(
        torch.randn(args.experts, args.dim).to(x), torch.zeros(args.experts, device=x.device)
    )
    routing = fmoe.route(router, x, fmoe.RouterConfig(top_k=args.top_k))
    with backend_of(name, mesh, tokens, args) as backend:
        x_SD, plan = backend.dispatch(x, routing)
        moved = x_SD.numel() * x_SD.element_size()
        found = [f"{moved / 1e6:,.0f}"]
        for call in (partial(backend.dispatch, x, routing), partial(fmoe.combine, x_SD, plan)):
            whole = statistics.median(timed(call, on_cuda) for _ in range(args.rounds)) / 1e3
            sent = sending(call) if on_cuda else 0.0
            slowest = torch.tensor([whole, sent], dtype=torch.float64, device=args.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            found.extend(f"{moved / s / 1e9:,.0f}" if s else "-" for s in slowest.tolist())
    return [f"{tokens:,}", str(args.dim), name, *found]


def main() -> None:
    parser = options.Parser(description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="of each device")
    add("--dim", type=int, default=7168)
    add("--experts", type=int, default=256)
    add("--top-k", type=int, default=8)
    add("--backends", nargs="+", default=["all_to_all", "deepep"])
    add("--rounds", type=int, default=9)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    mesh = fmoe.make_mesh(f"ep={num_processes()}", device_type=args.device)
    rows = [measure(mesh, backend, n, args) for n in args.tokens for backend in args.backends]
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        print(f"{mesh.size()} of {name}, {args.experts} experts, top {args.top_k}")
        print(markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    launch.run(main)
