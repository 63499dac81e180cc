"""The laws of every backend on DeepEP's own kernels, what a call costs, and losses of training over it.

``python benchmarks/deepep_h200.py`` needs a CUDA device and DeepEP (docs/deepep.md says how to install it).
It starts 2 and then 4 processes, connected by gloo and NCCL, checks every law of
``fmoe.testing.check_backend`` in bfloat16, and measures a layer's forward and backward. Where there are fewer
GPUs than processes these share them and their kernels take turns, so the times are of the host, not of
bandwidth. Then the example trains a debug model in one process, and in two over each backend; OUT/loss.svg is
the picture of their losses. A table comes last; the exit status is 1 if a law was broken or training failed.
"""

import argparse
import contextlib
import datetime
import functools
import json
import pathlib
import queue
import subprocess
import sys
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

import fmoe
from fmoe.bench.timing import syncs
from fmoe.doctor import diagnose, report
from fmoe.introspect import raw_calls
from fmoe.parallel import deepep
from fmoe.parallel.processes import prepare
from fmoe.testing import check_backend
from fmoe.testing.backend import LAWS
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


def connect(rank: int, size: int, port: int, args: argparse.Namespace) -> None:
    if args.device == "cuda":
        backend = prepare(rank, size)
    else:  # on DeepEP's stand-in, to try this script
        backend = "gloo"
        sys.path.insert(0, str(ROOT / "tests/support"))
        import deep_ep_double

        deep_ep_double.install(2 if "elastic" in args.backend else 1)
        torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=args.patience)
    )


@contextlib.contextmanager
def bound(name: str, size: int, args: argparse.Namespace, **how: Any) -> Any:
    """A mesh of all processes, and the backend of this name along it."""
    mesh = fmoe.make_mesh(f"ep={size}", device_type=args.device)
    if name == "all_to_all":
        yield mesh, None
        return
    kind, tokens = "elastic" if "elastic" in name else "buffer", max(args.tokens, 16)
    with deepep(mesh["ep"], max_tokens_per_rank=tokens, kind=kind, **SIZES, **how) as backend:
        yield mesh, backend


def obey(rank: int, size: int, port: int, args: argparse.Namespace, names: list[str], found: Any) -> None:
    connect(rank, size, port, args)
    for name in names:
        began = time.monotonic()
        law, _, apart = name.partition(", ")
        try:
            with bound(args.backend, size, args, overlap=not apart) as (mesh, backend):
                how = dict(any_order=args.backend == "deepep elastic", forwards=args.forwards, seed=args.seed)
                check_backend(backend, mesh, dtype=torch.bfloat16, laws=[law], **SIZES, **how)
            found.put((rank, name, f"holds, {time.monotonic() - began:.1f} s"))
        except Exception:
            found.put((rank, name, traceback.format_exc()))
            time.sleep(1)  # until it has been read
            return
    if rank == 0:
        found.put((rank, "done", ""))
    dist.barrier()


def measure(rank: int, size: int, port: int, args: argparse.Namespace, names: list[str], found: Any) -> None:
    connect(rank, size, port, args)
    for backend in names:
        torch.manual_seed(args.seed)
        with bound(backend, size, args) as (mesh, transport):
            setting = Setting(mesh, transport, torch.bfloat16, args.tokens, **SIZES)
            case = case_of(setting, [args.tokens] * size)
            mine, loss = case.mine(), fmoe.value_and_grad(case.loss(), (0, 1))
            for _ in range(3):
                loss(*mine)
            call = functools.partial(loss, *mine)
            host, whole = times(call, args)
            with raw_calls() as calls:
                waits = host_syncs(call, args)
        # DeepEP's own wait for what is to come isn't one that PyTorch sees.
        waits += calls.get("deepep_dispatch", 0)
        found.put((rank, backend, (host, whole, waits)))
        dist.barrier()
    found.put((rank, "done", ""))
    dist.barrier()


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


def together(work: Any, size: int, args: argparse.Namespace, names: list[str]) -> list[tuple[int, str, Any]]:
    """The reports of ``size`` processes, until they are done, or one has failed or is silent too long."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    found = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, size, store.port, args, names, found), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    came = []
    try:
        while sum(name == "done" for _, name, _ in came) < (size if work is measure else 1):
            came.append(found.get(timeout=args.patience))
            if isinstance(came[-1][2], str) and "Traceback" in came[-1][2]:
                break
    except queue.Empty:
        came.append((-1, "silent", f"Traceback: no answer in {args.patience} s"))
    for process in processes:
        process.join(5)
        process.kill()
    return [item for item in came if item[1] != "done"]


def hold_all(size: int, args: argparse.Namespace) -> dict[str, str]:
    """The outcome of every law. After a broken one the others get fresh processes."""
    told: dict[str, str] = {}
    while waiting := [name for name in args.laws if name not in told]:
        came = together(obey, size, args, waiting)
        broken = [text for *_, text in came if "Traceback" in text]
        for name in waiting:
            held = [text for _, n, text in came if n == name and "Traceback" not in text]
            if len(held) == size or (held and not broken):
                told[name] = held[0]
        if left := [name for name in waiting if name not in told]:
            why = broken[0] if broken else "no answer"
            told[left[0]] = f"BROKEN: {why.strip().splitlines()[-1]}"
            print(f"{size} ranks, {left[0]}:\n{why}", file=sys.stderr)
    return told


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
    costs: dict[str, list[str]] = {}
    for size in args.ranks:
        told = hold_all(size, args)
        backends = list(dict.fromkeys([args.backend, "all_to_all"]))
        measured = {name: value for rank, name, value in together(measure, size, args, backends) if rank == 0}
        results["ranks"][size] = {"laws": told, "measured": measured}
        for backend in backends:
            found = measured.get(backend)
            text = "{:.1f} / {:.1f} / {}".format(*found) if found else "failed"
            costs.setdefault(backend, []).append(text)
    for name in args.laws:
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
