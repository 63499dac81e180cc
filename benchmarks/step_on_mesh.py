"""Training steps of a model on a mesh in several ways, in one run, beside the first of them.

    torchrun --nproc-per-node 2 benchmarks/step_on_mesh.py --mesh ep=2 --preset 16B --layers 8 --compile \\
        --remat full --way=--ep-backend=all_to_all --way="--ep-backend=deepep --ep-capacity=inf --graph"

Options of ``fmoe.training.options`` that stand alone are for all ways, those in ``--way`` for one. Tokens are
random. Every way begins with the same parameters, so the losses of its first steps show whether it computes
the same. A way that fails says so, and the others go on.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.bench.timing import of_host, one_line, or_dash, syncs
from fmoe.errors import argument_error
from fmoe.models import decoder, stages
from fmoe.parallel import stack
from fmoe.parallel.backends.deepep import buffers
from fmoe.parallel.together import from_all
from fmoe.plan import plan, read_rates
from fmoe.training import launch, optim, options
from fmoe.training.metrics import PEAK_FLOPS
from fmoe.training.step import training_step

WARM_UP = 3
COLUMNS = [
    "way", "tokens/s a device", "of the first", "ms (spread)", "host ms", "waits", "MFU", "peak GiB",
    "first step s", "planned ms", "planned GiB", "planned bubble", "losses",
]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    add: Callable[..., Any] = parser.add_argument
    options.add_layout(parser)
    options.add_precision(parser)
    add("--plain-loop", action="store_true", help="nothing is gathered or summed ahead of its use")
    add("--sms", type=int, help="multiprocessors that DeepEP's kernels take (default: DeepEP's)")
    add("--profile", type=int, default=0, metavar="N", help="print the N kinds of kernels that take longest")


def steps_of(args: argparse.Namespace, way: argparse.Namespace, world: launch.World) -> Callable[[], Any]:
    """A function that takes the next training step and returns its loss."""
    config = decoder.preset(args.preset, layers=args.layers, dim=args.dim)
    config = dataclasses.replace(
        config, router=dataclasses.replace(config.router, force_balance=args.balanced)
    )
    layout, precision = options.Layout.of(way, world), options.Precision.of(way)
    stages_of = stages.cut(config, ranks=layout.schedule.stage_to_rank, seq_len=args.seq_len)
    how = dict(dtype=precision.compute, precision=precision.recipe, stages=stages_of)
    step_of = layout.gradient(config, graph=way.graph, **how)
    optimizer = optim.adamw(moments_dtype=precision.moments)
    start = dict(stages=stages_of, dtype=precision.dtype, device=precision.device, mesh=world.mesh)
    params = decoder.init(config, args.seed, **start)
    state = optimizer.init(params)
    graph = way.graph and not layout.bounded
    take = training_step(step_of, optimizer, max_norm=1.0, bias_rate=1e-3, mesh=world.mesh, graph=graph)
    generator = torch.Generator().manual_seed(args.seed + world.part[0])
    size = args.batch_size // world.part[1], args.seq_len + 1
    many = [torch.randint(config.vocab_size, size, generator=generator) for _ in range(8)]
    batches = itertools.cycle([tokens.to(precision.device) for tokens in many])

    def step() -> torch.Tensor:
        nonlocal params, state
        tokens = next(batches)
        params, state, loss, *_ = take(params, state, 1e-4, tokens[:, :-1], tokens[:, 1:])
        return loss.clone()

    return step


def measure(args: argparse.Namespace, way: argparse.Namespace, world: launch.World) -> dict[str, Any]:
    if way.mesh != args.mesh:
        got, expected, remedy = f"--mesh {way.mesh}", f"{args.mesh}, as all ways", "Run it for each mesh."
        raise argument_error("step_on_mesh", "--way", got=got, expected=expected, remedy=remedy)
    config = decoder.preset(args.preset, layers=args.layers, dim=args.dim)
    of_plan = planned(args, way, config, world.pp)  # before the step, which would be lost if this failed
    torch._dynamo.reset()
    gc.collect()
    if way.sms:
        import deep_ep

        buffers.free_kept()  # those were made for another number
        deep_ep.Buffer.set_num_sms(way.sms)
    on_cuda = torch.device(way.device).type == "cuda"
    wait: Callable[[], Any] = torch.cuda.synchronize if on_cuda else lambda: None
    loop = mock.patch.object(stack, "_plain_autograd", return_value=False)
    with loop if way.plain_loop else contextlib.nullcontext():
        step = steps_of(args, way, world)
        start = time.perf_counter()
        losses = [step().item()]
        first = time.perf_counter() - start
        losses += [step().item() for _ in range(WARM_UP)]
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        ms = []
        for _ in range(args.rounds):
            wait()
            start = time.perf_counter()
            for _ in range(args.steps):
                loss = step()
            wait()
            ms.append((time.perf_counter() - start) / args.steps * 1e3)
        losses.append(loss.item())
        peak = max(from_all(torch.cuda.max_memory_allocated())) / 2**30 if on_cuda else None
        host = statistics.median(of_host(step) for _ in range(3)) if on_cuda else None
        waits = syncs(step) if on_cuda else None
        if way.profile:
            kernels(step, way.profile, world)
    median = statistics.median(ms)
    tokens = args.batch_size * args.seq_len / world.size / median * 1e3
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    flops, most = tokens * decoder.flops_per_token(config, args.seq_len), PEAK_FLOPS.get(name)
    return dict(
        tokens_per_second=tokens, ms=median, spread=(max(ms) - min(ms)) / median, host_ms=host, waits=waits,
        mfu=most and flops / most, gib=None if way.graph else peak, first_s=first, losses=losses, **of_plan,
    )  # fmt: skip


def kernels(step: Callable[[], Any], number: int, world: launch.World) -> None:
    """Print where the time of a step goes on the device."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    on_cuda = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows = [e for e in on_cuda if not e.is_user_annotation]  # which spans kernels that count already
    rows.sort(key=lambda e: -e.self_device_time_total)
    if world.is_first:
        total = sum(e.self_device_time_total for e in rows) / 1e3
        print(f"kernels {total:.1f} ms, {sum(e.count for e in rows)} launches")
        for e in rows[:number]:
            print(f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:5d} x {e.key[:90]}")


def planned(args: argparse.Namespace, way: argparse.Namespace, config: Any, pp: int) -> dict[str, Any]:
    if not args.rates or way.ep_overlap:  # which no plan knows yet
        return dict(planned_ms=None, planned_gib=None, bubble=None)
    precision = options.Precision.of(way)
    how: dict[str, Any] = dict(
        micro_batches=way.micro_batches, dtype=precision.dtype, compute_dtype=precision.compute,
        zero=way.zero, per_layer=fmoe.transforms.per_layer(way.remat), compiled=way.compile,
        optimizer=optim.adamw(moments_dtype=precision.moments), rates=read_rates(args.rates),
        backend=fmoe.parallel.Backend(**options.bounds(way.ep_capacity), payload=way.ep_payload),
        precision=precision.recipe, keep_rounded=way.keep_rounded,
    )  # fmt: skip
    if pp > 1:
        sizes = dict(pp=pp, micro_batches=way.micro_batches, stages_per_rank=way.stages_per_rank)
        how["schedule"] = fmoe.pipeline.make_schedule(way.pp_schedule, **sizes)
    found = plan(config, way.mesh, batch_size=args.batch_size, seq_len=args.seq_len, **how)
    bubble = found.time.bubble if pp > 1 else None
    return dict(planned_ms=found.time.seconds * 1e3, planned_gib=found.peak / 2**30, bubble=bubble)


def row(name: str, found: dict[str, Any], first: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [name, found["error"], *[""] * (len(COLUMNS) - 2)]
    speed, least = found["tokens_per_second"], first.get("tokens_per_second")
    return [
        name or "(as above)",
        f"{speed:,.0f}",
        or_dash(least and speed / least, ".3f"),
        f"{found['ms']:.1f} ({found['spread']:.1%})",
        or_dash(found["host_ms"], ".1f"),
        or_dash(found["waits"], "d"),
        or_dash(found["mfu"], ".1%"),
        or_dash(found["gib"], ".2f"),
        f"{found['first_s']:.1f}",
        or_dash(found["planned_ms"], ".1f"),
        or_dash(found["planned_gib"], ".2f"),
        or_dash(found["bubble"], ".1%"),
        " ".join(f"{loss:.4f}" for loss in found["losses"]),
    ]  # fmt: skip


def main() -> None:
    parser = options.Parser(description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add_options(parser)
    add("--preset", default="debug")
    add("--layers", type=options.at_least(1))
    add("--dim", type=int)
    add("--batch-size", type=options.at_least(1), default=8, help="sequences a step, over all devices")
    add("--seq-len", type=options.at_least(1), default=128)
    add("--balanced", action="store_true", help="choose experts round robin, whatever their scores")
    add("--steps", type=options.at_least(1), default=5, help="in a row, in each round")
    add("--rounds", type=options.at_least(1), default=3)
    add("--seed", type=int, default=0)
    add("--way", action="append", default=[], type=shlex.split, help="more options, of one way")
    add("--rates", type=Path, help="of bench rates, to plan each way with")
    add("--json", type=Path, help="keep the figures")
    args = parser.parse_args()
    both = options.Parser()
    add_options(both)
    world = launch.join(args.mesh, device_type=torch.device(args.device).type, options=vars(args))
    if args.batch_size % world.part[1]:
        got, expected = args.batch_size, f"a multiple of {world.part[1]}, the parts of a batch"
        raise argument_error("step_on_mesh", "--batch-size", got=got, expected=expected)
    found: dict[str, dict[str, Any]] = {}
    for words in args.way or [[]]:
        way, name = both.parse_args(words, argparse.Namespace(**vars(args))), " ".join(words)
        try:
            found[name] = measure(args, way, world)
        except Exception as error:
            found[name] = dict(error=one_line(error))
        if world.is_first:
            print(json.dumps({name: found[name]}), flush=True)
    if world.is_first:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
        first = next(iter(found.values()))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        Console(soft_wrap=True).print(
            f"{args.preset}, {args.layers or 'all'} layers on {world} of {device}, torch {torch.__version__}"
        )
        print(markdown_table(COLUMNS, [row(name, each, first) for name, each in found.items()]))


if __name__ == "__main__":
    launch.run(main)
