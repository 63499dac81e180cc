"""Train a model, plan or measure a run, draw pictures, and see what this machine can do."""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from .bench import pictures
from .bench.layers import ROUTINGS, SHAPES, Shape
from .bench.measure import bench_layer, report
from .bench.model import bench_model
from .bench.model import report as model_report
from .bench.rates import measure_rates
from .bench.rates import report as rates_report
from .bench.tune import report as tuning
from .bench.tune import tune
from .doctor import diagnose, self_test
from .doctor import report as diagnosis
from .introspect import Support, operator_support
from .models import decoder
from .models.families import PRESETS
from .ops.precision import PRECISIONS
from .parallel import Backend
from .parallel.backends.payload import PAYLOADS
from .parallel.mesh import AXES, check_device, make_mesh, parse_axes
from .parallel.together import this_rank
from .pipeline import Schedule, make_schedule
from .pipeline.orders import KINDS
from .plan import plan as plan_step
from .plan import read_rates
from .plan import report as planned
from .training import launch, loop, plot
from .training.optim import adamw
from .training.options import PRECISION_HELP, Help, at_least, bounds, recipe
from .transforms import per_layer

Add = Callable[..., Any]  # a parser's add_argument

DTYPES = ("bfloat16", "float32", "float64")


def console(width: int = 150) -> Console:
    """The terminal's width or, in a file, ``width``."""
    return Console(width=None if Console().is_terminal else width)


def operator_rows() -> list[list[str]]:
    """One line per operator, with the fields of :class:`Support`."""
    words = {True: "yes", False: "no"}
    return [[words[v] if isinstance(v, bool) else v for v in support] for support in operator_support()]


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_operators(args: argparse.Namespace) -> None:
    if args.markdown:
        print(markdown_table([*Support._fields], operator_rows()))
        return
    table = Table(*(Column(name, overflow="fold") for name in Support._fields))
    for row in operator_rows():
        table.add_row(*row)
    console(200).print(table)


def bench(args: argparse.Namespace) -> None:
    if args.picture:
        with tempfile.TemporaryDirectory() as folder:  # check that the package and the format are there
            plot.save_figure(plot.empty_figure("bench layer"), Path(folder, args.picture.name))
    _check_writable(args.json, args.picture)
    results = []
    for shape, routing in itertools.product(_shapes(args), args.routing):
        also = {name: getattr(args, name) for name in ("only", "align", "precision", "keep_rounded")}
        result = bench_layer(shape, routing=routing, **also, **_how(args))
        report(result, console())
        results.append(result)
    _write_json(results, args.json)
    if args.picture:
        plot.save_figure(plot.plot_layers(results), args.picture)


def tuned(args: argparse.Namespace) -> None:
    for shape in _shapes(args):
        tuning(tune(shape, **_how(args)), console())


def _shapes(args: argparse.Namespace) -> list[Shape]:
    return [Shape(*args.sizes)] if args.sizes else [SHAPES[name] for name in args.shape]


def _how(args: argparse.Namespace) -> dict[str, Any]:
    return dict(dtype=getattr(torch, args.dtype), device=args.device, rounds=args.rounds, seed=args.seed)


def _dtypes(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) or args.dtype for name in ("dtype", "compute_dtype", "moments_dtype")}
    return {name: getattr(torch, dtype) for name, dtype in given.items()}


def _check_writable(*paths: str | Path | None) -> None:
    """Raise before anything is measured, which would be lost."""
    for path in paths:
        if path:
            open(path, "a").close()


def _write_json(result: Any, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1))


def model(args: argparse.Namespace) -> None:
    _check_writable(args.json, args.trace)
    config = decoder.preset(args.model, layers=args.layers)
    result = bench_model(
        config, batch_size=args.batch_size, seq_len=_seq_len(args, config),
        steps=args.steps, remat=args.remat, compiled=args.compile, graph=args.graph,
        balanced=args.balanced, data=args.data, segments=args.segments, device=args.device,
        trace=args.trace, seed=args.seed, precision=args.precision,
        rates=args.rates and read_rates(args.rates), **_dtypes(args),
    )  # fmt: skip
    result["model"] = args.model
    model_report(result, console(), args.model)
    _write_json(result, args.json)


def model_arguments(add: Add) -> None:
    step_arguments(add)
    add("--steps", type=int, default=20, help="timed, after three that aren't")
    add("--compile", action="store_true", help="each layer with torch.compile")
    add("--graph", action="store_true", help="the step as one CUDA graph")
    add("--balanced", action="store_true", help="experts round robin, whatever the scores")
    add("--data", metavar="FILE", help="text, as bytes; default: random tokens")
    add("--segments", type=int, metavar="N", help="as many segments a row; default: no segment ids")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, help="fresh by default")
    add("--trace", metavar="FILE", help="a profile of one step, for a browser")
    add("--json", metavar="FILE", help="write what was measured")
    add("--rates", metavar="FILE", help="as bench rates writes it: show the planned time, too")


def rates(args: argparse.Namespace) -> None:
    _check_writable(args.out)
    mesh = make_mesh(args.mesh, device_type=torch.device(args.device).type) if args.mesh else None
    found = measure_rates(dtype=getattr(torch, args.dtype), device=args.device, mesh=mesh, seed=args.seed)
    if this_rank() == 0:
        rates_report(found, console())
        _write_json(found, args.out)


def doctor(args: argparse.Namespace) -> None:
    found = diagnose()
    if not args.no_test:
        found["self_test"] = self_test()
    if this_rank() == 0:
        print(json.dumps(found, indent=2) if args.json else diagnosis(found))
    sys.exit(int(any(test["broken"] for test in found.get("self_test", {}).values())))


def plan(args: argparse.Namespace) -> None:
    config = decoder.preset(args.model, layers=args.layers)
    dtypes = _dtypes(args)
    optimizer = adamw(moments_dtype=dtypes.pop("moments_dtype"))
    per_layer(args.remat, compiled=args.compile)  # raises for what no step could do
    backend = Backend(**bounds(args.ep_capacity), payload=args.ep_payload)
    found = plan_step(
        config, args.mesh, batch_size=args.batch_size, seq_len=_seq_len(args, config),
        micro_batches=args.micro_batches, zero=args.zero, per_layer=per_layer(args.remat),
        imbalance=args.imbalance, optimizer=optimizer, schedule=_schedule(args), compiled=args.compile,
        rates=args.rates and read_rates(args.rates), precision=args.precision, backend=backend,
        keep_rounded=args.keep_rounded, **dtypes,
    )  # fmt: skip
    if args.json:
        ranks = [{**rank._asdict(), "peak": rank.peak} for rank in found.ranks]
        schedule = found.schedule and found.schedule.name
        time = found.time and found.time._asdict()
        others = dict(ranks=ranks, schedule=schedule, time=time, peak=found.peak)
        print(json.dumps(found._asdict() | others, indent=1))
        return
    title = f"{args.model}, {config.num_layers} layers, {args.mesh or 'one device'}, remat {args.remat}"
    planned(found, console(), title)


def _schedule(args: argparse.Namespace) -> str | Schedule:
    """As the example makes it: by the name alone it would have the usual number of stages."""
    pp = parse_axes("plan", args.mesh, {})[AXES.index("pp")]
    if pp == 1:
        return args.pp_schedule
    sizes = dict(micro_batches=args.micro_batches, stages_per_rank=args.stages_per_rank)
    return make_schedule(args.pp_schedule, pp=pp, **sizes)


def train(args: argparse.Namespace) -> None:
    launch.run(functools.partial(loop.train, args))


def _seq_len(args: argparse.Namespace, config: decoder.DecoderConfig) -> int:
    return min(4096, config.max_seq_len) if args.seq_len is None else args.seq_len


def step_arguments(add: Add) -> None:
    """Add the options that a plan and a benchmark of a model share."""
    add("--model", default="16B", choices=PRESETS)
    add("--layers", type=int, help="only so many, one of them dense")
    add("--batch-size", type=int, default=8, help="sequences a step, over all devices")
    add("--seq-len", type=int, help="default: 4096, or the most that the model takes")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of parameters and gradients")
    add("--compute-dtype", choices=DTYPES, help="default: --dtype")
    add("--moments-dtype", choices=DTYPES, help="default: --dtype")
    add("--precision", type=recipe, metavar="RECIPE", help=PRECISION_HELP)
    add(
        "--remat",
        default="none",
        help="none, full, default, save:NAMES, offload:NAMES, compress:NAMES, or several joined by +",
    )


def layer_arguments(add: Add) -> None:
    """Add the options that measuring a layer needs."""
    on_cuda = torch.cuda.is_available()
    add("--shape", nargs="+", choices=SHAPES, default=["16B" if on_cuda else "small"])
    add(
        "--sizes",
        nargs=5,
        type=at_least(1),
        metavar=tuple("TDFEK"),
        help="tokens, dimension, hidden dimension, experts, experts of a token: instead of --shape",
    )
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32")
    add("--device", default="cuda" if on_cuda else "cpu")
    add("--rounds", type=int, default=20)
    add("--seed", type=int, help="fresh by default")


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str) -> Add:
    """Add a command. The result adds its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary)
    parser.set_defaults(run=run)
    return parser.add_argument


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fmoe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = command(commands, "operators", show_operators, "every operator and the transforms it supports")
    add("--markdown", action="store_true", help="as in docs/transforms.md")
    can = "versions, what this machine can do, backend 'auto', and whether the laws hold here"
    add = command(commands, "doctor", doctor, can)
    add("--json", action="store_true")
    add("--no-test", action="store_true", help="don't check the laws, which takes 10 s")
    kinds = "pictures of runs, of what a layer keeps in memory, and of pipelines"
    pictures.arguments(command(commands, "plot", pictures.draw, kinds))
    add = command(commands, "plan", plan, "a step's memory and traffic on each device, before it runs")
    step_arguments(add)
    add("--mesh", default="", help='as "dp=2,ep=32,pp=8"')
    add("--micro-batches", type=int, default=1)
    how_often = "parameters are gathered and gradients summed: 3 each micro-batch, 1 once a step, 2 between"
    add("--zero", type=int, default=3, choices=(1, 2, 3), help=how_often)
    add("--keep-rounded", action="store_true", help="weights are rounded to fp8 once a step, and kept")
    add("--pp-schedule", choices=KINDS, default="1f1b", help="of a mesh with pp")
    add("--stages-per-rank", type=int, help="default: 1 for 1f1b, else 2")
    add("--imbalance", type=float, default=1.0, help="the busiest device's rows over the mean")
    add("--ep-capacity", type=float, help="room for rows over the mean, asking nobody for theirs; inf: all")
    add("--ep-payload", choices=PAYLOADS, help="what tokens travel to experts as (default: their dtype)")
    add(
        "--rates",
        metavar="FILE",
        help="of devices and links, as bench rates writes it: for the time",
    )
    add("--compile", action="store_true", help="the time where each layer is compiled")
    add("--json", action="store_true")
    benches = commands.add_parser("bench", help="measure here").add_subparsers(dest="what", required=True)
    model_arguments(command(benches, "model", model, "training steps of a model"))
    add = command(benches, "rates", rates, "this device's rates, for the time of plans")
    on_cuda = torch.cuda.is_available()
    add("--out", metavar="FILE", help="write them, for plan --rates")
    add("--mesh", help="under torchrun: axes and sizes, whose links to measure, too")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32")
    add("--device", default="cuda" if on_cuda else "cpu")
    add("--seed", type=int, help="fresh by default")
    add = command(benches, "layer", bench, "one MoE layer, beside plain PyTorch and installed peers")
    layer_arguments(add)
    add("--routing", nargs="+", choices=ROUTINGS, default=["random"])
    add("--only", nargs="+", metavar="LAYER", help="names of layers, as in the table")
    add("--align", nargs="+", type=int, default=[], metavar="N", help="also with rows aligned to N")
    add("--precision", nargs="+", choices=PRECISIONS, default=[], help="also with such products")
    add("--keep-rounded", action="store_true", help="with --precision: round weights before timing")
    add("--json", metavar="FILE", help="write what was measured")
    add("--picture", type=Path, metavar="FILE", help="draw it, as .svg or .png")
    training = commands.add_parser(
        "train", help="train a small model, or another, on text", usage="python -m fmoe train [options]",
        description=loop.__doc__, formatter_class=Help,
    )  # fmt: skip
    training.set_defaults(run=train)
    loop.add_options(training)
    fastest = "find and keep the fastest grouped products for a layer, here"
    layer_arguments(command(commands, "tune", tuned, fastest))
    return parser


def main() -> None:
    args = arguments().parse_args()
    run = vars(args).pop("run")  # it is no option, which ranks compare
    try:
        if "device" in args:
            check_device(args.device)
        run(args)
    except (ValueError, ImportError, OSError) as error:  # the user's error, whose text says what to do
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
