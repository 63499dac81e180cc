"""The laws of every backend on DeepEP's own kernels, what a call costs, and losses of training over it.

``python benchmarks/deepep_h200.py`` needs a CUDA device, cloudpickle, matplotlib and DeepEP (docs/deepep.md
says how to install it). It starts 2 and then 4 processes, connected by gloo and NCCL, checks every law of
``fmoe.testing.check_backend`` in bfloat16, and measures a layer's forward and backward. Where there are fewer
GPUs than processes these share them and their kernels take turns, so the times are of the host, not of
bandwidth. With ``--no-host-sync`` the host never waits, and a CUDA graph holds the layer. Then the example
trains a debug model in one process, and in two over each backend; OUT/loss.svg is the picture of their
losses. A table comes last; the exit status is 1 if a law was broken or training failed.
"""

import argparse
import contextlib
import datetime
import functools
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import fmoe
from fmoe.bench.timing import syncs
from fmoe.doctor import diagnose, report
from fmoe.introspect import raw_calls
from fmoe.ops.core.axes import group_of
from fmoe.parallel import AllToAll, Bound, Processes, RankError, deepep
from fmoe.testing import check_backend
from fmoe.testing.backend import LAWS
from fmoe.testing.samples import error
from fmoe.testing.setting import Setting, case_of
from fmoe.training.metrics import read_metrics
from fmoe.training.plot import plot_loss, save_figure

# The model of the laws has sizes that DeepEP takes.
SIZES = dict(dim=256, top_k=3, num_experts=8)
NAMES = [*LAWS, "oracle, no overlap", "plans, no overlap"]
ROOT = pathlib.Path(__file__).parents[1]
# Training: the debug model, with rows as wide as DeepEP takes them.
SHAPE = ["--dim", "256", "--batch-size", "8", "--seq-len", "128", "--compute-dtype", "bfloat16"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@contextlib.contextmanager
def bound(name: str, args: argparse.Namespace, **how: Any) -> Any:
    """A mesh of all processes, and the backend of this name along it."""
    if args.device == "cpu" and "deep_ep" not in sys.modules:  # to try this script
        sys.path.insert(0, str(ROOT / "tests/support"))
        import deep_ep_double

        deep_ep_double.install(2 if "elastic" in args.backend else 1)
    mesh = fmoe.make_mesh(f"ep={dist.get_world_size()}", device_type=args.device)
    tokens = max(args.tokens, 16)
    if name == "all_to_all":
        yield mesh, AllToAll(group_of(mesh, ("ep",)), Bound(tokens)) if args.no_host_sync else None
        return
    kind, how["host_sync"] = "elastic" if "elastic" in name else "buffer", not args.no_host_sync
    with deepep(mesh["ep"], max_tokens_per_rank=tokens, kind=kind, **SIZES, **how) as backend:
        yield mesh, backend


def obey(args: argparse.Namespace, name: str) -> str:
    """Check one law on all ranks."""
    began = time.monotonic()
    law, _, apart = name.partition(", ")
    with bound(args.backend, args, overlap=not apart) as (mesh, backend):
        how = dict(any_order=args.backend == "deepep elastic", forwards=args.forwards, seed=args.seed)
        check_backend(backend, mesh, dtype=torch.bfloat16, laws=[law], **SIZES, **how)
    return f"holds, {time.monotonic() - began:.1f} s"


@contextlib.contextmanager
def stepping(args: argparse.Namespace, backend: str) -> Any:
    """A layer's forward and backward, and what it takes."""
    torch.manual_seed(args.seed)
    with bound(backend, args) as (mesh, transport):
        setting = Setting(mesh, transport, torch.bfloat16, args.tokens, **SIZES)
        case = case_of(setting, [args.tokens] * dist.get_world_size())
        yield fmoe.value_and_grad(case.loss(), (0, 1)), *case.mine()


def capture(args: argparse.Namespace, backend: str) -> str:
    """Hold the layer's forward and backward in a CUDA graph, and compare its replays on other tokens."""
    worst = 0.0
    with stepping(args, backend) as (step, params, x):
        graph = fmoe.graphed(step)
        for _ in range(4):
            x = torch.randn_like(x)
            worst = max(worst, error(graph(params, x), step(params, x)))
    return f"BROKEN: off by {worst:.1e}" if not worst < 2e-2 else f"holds, off by {worst:.1e}"


def measure(args: argparse.Namespace, backend: str) -> tuple[float, float, int]:
    """A layer's forward and backward: host ms, ms until all is done, and waits of the host."""
    with stepping(args, backend) as (step, params, x):
        call = functools.partial(step, params, x)
        for _ in range(3):
            call()
        host, whole = times(call, args)
        with raw_calls() as calls:
            waits = host_syncs(call, args)
    # PyTorch doesn't see that DeepEP itself waits for the number of rows.
    return host, whole, waits + calls.get("deepep_dispatch", 0)


def times(call: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Median milliseconds until a call returns, and until its work is done."""
    each = []
    for _ in range(args.calls):
        dist.barrier()
        began = time.perf_counter()
        call()
        returned = time.perf_counter()
        if args.device == "cuda":
            torch.cuda.synchronize()
        each.append((1e3 * (returned - began), 1e3 * (time.perf_counter() - began)))
    host, whole = torch.tensor(each).median(0).values.tolist()
    return host, whole


def host_syncs(call: Any, args: argparse.Namespace) -> int:
    if args.device == "cuda":
        return syncs(call)
    call()
    return 0


def outcome(devices: Processes, work: Callable[..., Any], args: argparse.Namespace, name: str) -> Any:
    """The first rank's result, or a text. After a failure the next call gets fresh processes."""
    try:
        return devices.run(work, args, name)[0]
    except RankError as error:
        print(f"{devices.number} ranks, {name}:\n{error}", file=sys.stderr)
        devices.stop(patience=0)
        first, *_ = re.split(r"\nrank \d+: ", str(error))
        return f"BROKEN: {first.strip().splitlines()[-1]}"


def train(args: argparse.Namespace) -> dict[str, list[float]]:
    """The example's losses in one process and in two over each backend, from the same parameters and data."""
    runs = {}
    for name in ["one process", "all_to_all", "deepep"]:
        alone = name == "one process"
        launcher, along = [] if alone else TWO, [] if alone else ["--mesh", "ep=2", "--ep-backend", name]
        what = [str(ROOT / "examples/train_deepseek_v3.py"), *SHAPE, *along, "--learning-rate", "1e-3"]
        how = ["--steps", str(args.steps), "--device", args.device, "--out", str(args.out / name)]
        command = [sys.executable, *launcher, *what, *how]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=10 * args.patience, check=False)
        if done.returncode == 0:
            runs[name] = read_metrics(args.out / name / "metrics.jsonl")
    if runs:
        save_figure(plot_loss(runs), args.out / "loss.svg")
    return {name: [record["loss"] for record in records] for name, records in runs.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: on the tests' stand-in for DeepEP")
    parser.add_argument("--backend", default="deepep", choices=["deepep", "deepep elastic", "all_to_all"])
    parser.add_argument("--no-host-sync", action="store_true", help="with room for the worst case instead")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--laws", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--forwards", type=int, default=1000, help="in the law that nothing is left behind")
    parser.add_argument("--tokens", type=int, default=512, help="per rank, in what is measured")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--patience", type=float, default=150, help="seconds for a law")
    parser.add_argument("--steps", type=int, default=50, help="of training, without the stand-in; 0: none")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/deepep"), help="of training")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    parser.add_argument("--json", metavar="FILE", help="write all of it")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    here = diagnose()
    print(f"{datetime.date.today()}, seed {args.seed}\n{report(here)}\n")
    results: dict[str, Any] = dict(date=str(datetime.date.today()), seed=args.seed, here=here, ranks={})
    table = Table("", *(f"{size} ranks" for size in args.ranks))
    costs: dict[str, list[str]] = {args.backend: [], "all_to_all": []}
    for size in args.ranks:
        with Processes(size, timeout=args.patience) as devices:
            laws = {name: outcome(devices, obey, args, name) for name in args.laws}
            devices.stop(patience=5)  # what is timed starts afresh
            measured = {name: outcome(devices, measure, args, name) for name in costs}
            if args.no_host_sync and args.device == "cuda":
                laws |= {f"a CUDA graph, {name}": outcome(devices, capture, args, name) for name in costs}
        results["ranks"][size] = {"laws": laws, "measured": measured}
        for name, found in measured.items():
            failed = isinstance(found, str)
            costs[name].append("failed" if failed else "{:.1f} / {:.1f} / {}".format(*found))
    for name in results["ranks"][args.ranks[0]]["laws"]:
        table.add_row(name, *(results["ranks"][size]["laws"][name] for size in args.ranks))
    for backend, texts in costs.items():
        table.add_row(f"{backend}: host ms / all ms / host syncs", *texts)
    results["training"] = losses = train(args) if args.steps else {}
    for name, each in losses.items():
        apart = max(abs(a - b) for a, b in zip(each, next(iter(losses.values()))))
        mean = sum(each[-20:]) / len(each[-20:])
        table.add_row(f"losses, {name}: mean of the last 20; most off the first", f"{mean:.4f}; {apart:.4f}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=2))
    Console(width=150).print(table)
    broken = any("BROKEN" in text for size in args.ranks for text in results["ranks"][size]["laws"].values())
    sys.exit(broken or (args.steps > 0 and len(losses) < 3))


if __name__ == "__main__":
    main()
