"""The command ``plot``: which pictures, of which files, and where they go."""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import argument_error
from ..models import decoder
from ..models.families import PRESETS
from ..pipeline import Costs, make_schedule
from ..pipeline.orders import KINDS
from ..training import plot
from ..training.metrics import read_metrics
from ..training.show import show_placement
from .layers import SHAPES, Shape, layer_memory

WITHOUT_FILES = ("memory", "placement", "schedule")


def arguments(add: Callable[..., Any]) -> None:
    add("metrics", nargs="*", type=Path, help="metrics.jsonl of a run, or of several to compare")
    add(
        "--what", choices=["loss", "load", "layers", "table", *WITHOUT_FILES],
        help="loss: curves, of all runs in one picture; load: of experts over time, a picture for each run; "
        "layers: of files that bench layer --json wrote; table: of numbers on a Markdown page; "
        "memory: what a layer keeps under remat's policies; placement: of a model's parameters on a mesh; "
        "schedule: of a pipeline. Default: loss and, where it is known, load",
    )  # fmt: skip
    add("--out", type=Path, help="file of the one picture; default: WHAT.svg beside the metrics")
    line = "a line among the losses"
    add("--reference", action="append", type=_labelled, default=[], metavar="LABEL=LOSS", help=line)
    add(
        "--sizes", nargs=5, type=int, metavar=tuple("TDFEK"), default=SHAPES["small"],
        help="with memory: tokens, dimension, hidden dimension, experts, top-k of a bfloat16 layer",
    )  # fmt: skip
    add("--table", default="", metavar="TEXT", help="with table: how its first heading begins")
    add("--model", default="16B", choices=PRESETS, help="with --what placement, as the next one")
    add("--mesh", default="", help='as "dp=2,ep=8"')
    add("--schedule", choices=KINDS, default="1f1b", help="with --what schedule, as the next four")
    add("--pp", type=int, default=4, help="ranks")
    add("--micro-batches", type=int, default=8)
    add("--stages-per-rank", type=int, help="default: 1 for 1f1b, else 2")
    costs = "times of a stage's forward, gradients of inputs and of weights"
    add("--costs", nargs=3, type=float, default=(1, 1, 1), metavar=tuple("FIW"), help=costs)


def draw(args: argparse.Namespace) -> None:
    if (args.what in WITHOUT_FILES) == bool(args.metrics):
        raise ValueError(
            f"plot: name the metrics.jsonl of a run, or --what one of {', '.join(WITHOUT_FILES)}"
        )
    pictures = [*_pictures(args)]
    if args.out and len(pictures) > 1:
        raise ValueError(f"--out: got one file for {len(pictures)} pictures. Choose one with --what.")
    for path, picture in pictures:
        plot.save_figure(picture(), args.out or path)
        print(args.out or path)


def _pictures(args: argparse.Namespace) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """The file of each picture, and what draws it."""
    if args.what == "memory":
        yield Path("memory.svg"), lambda: plot.plot_memory(layer_memory(Shape(*args.sizes)))
        return
    if args.what == "placement":
        shown = show_placement(decoder.specs(decoder.preset(args.model)), args.mesh)
        yield Path("placement.svg"), shown.figure
        return
    if args.what == "schedule":
        sizes = dict(pp=args.pp, micro_batches=args.micro_batches, stages_per_rank=args.stages_per_rank)
        costs = Costs(*args.costs)
        schedule = make_schedule(args.schedule, **sizes, costs=costs)
        yield Path("schedule.svg"), lambda: plot.plot_schedule(schedule, costs)
        return
    if args.what == "layers":
        results = [result for path in args.metrics for result in _layers(path)]
        yield args.metrics[0].with_suffix(".svg"), lambda: plot.plot_layers(results)
        return
    if args.what == "table":
        for path in args.metrics:
            unit, table = _table(path, args.table)
            yield path.with_suffix(".svg"), functools.partial(plot.plot_table, table, unit=unit)
        return
    runs = {path: read_metrics(path) for path in args.metrics}
    if args.what != "load":
        losses = dict(zip(_labels([*runs]), runs.values()))
        draw_loss = functools.partial(plot.plot_loss, losses, reference=dict(args.reference))
        yield args.metrics[0].with_name("loss.svg"), draw_loss
    for path, records in runs.items() if args.what != "loss" else ():
        if args.what or any(record.get("tokens_per_expert") for record in records):
            yield _load_picture(path, [*runs]), functools.partial(plot.plot_load, records)
        else:
            print(f"{path} has no tokens_per_expert, so there is no picture of its load", file=sys.stderr)


def _layers(path: Path) -> list[dict[str, Any]]:
    """The results that ``bench layer --json`` wrote."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        expected = "a file of bench layer --json, for --what layers"
        raise argument_error("plot", "metrics", got=f"{path}: {error}", expected=expected) from error
    return found


def _table(path: Path, begins: str) -> tuple[str, dict[str, dict[str, float]]]:
    """The first table of a page whose first heading begins so: the heading, numbers by row and column."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" *") for cell in line.strip().strip("|").split("|")] for line in lines]
    start = next((i for i, line in enumerate(lines) if line.startswith(f"| {begins}")), None)
    if start is None:
        got, expected = repr(begins), f"how the first heading of a table in {path} begins"
        raise argument_error("plot", "--table", got=got, expected=expected)
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    unit, *columns = rows[start]
    table = {name: dict(zip(columns, cells)) for name, *cells in rows[start + 2 : end]}
    return unit, {
        name: {column: _cell(path, name, column, text) for column, text in row.items() if text}
        for name, row in table.items()
    }


def _cell(path: Path, row: str, column: str, text: str) -> float:
    """A number as pages have it: 74,483."""
    if not re.fullmatch(r"\d[\d,]*(\.\d+)?", text):
        got, expected = f"{text!r} in row {row!r}, column {column!r}", f"a number, in the table of {path}"
        raise argument_error("plot", "--table", got=got, expected=expected)
    return float(text.replace(",", ""))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of runs: that of the folder or, where several share it, the whole path."""
    names = [path.resolve().parent.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for path, name in zip(paths, names)]


def _load_picture(path: Path, paths: Sequence[Path]) -> Path:
    """Where the picture goes: beside the metrics, and named after them if the folder has several runs."""
    beside = [p.stem for p in paths if p.resolve().parent == path.resolve().parent]
    if len(beside) == 1:
        return path.with_name("load.svg")
    return path.with_name(f"{path.stem if beside.count(path.stem) == 1 else path.name}-load.svg")


def _labelled(text: str) -> tuple[str, float]:
    label, _, loss = text.rpartition("=")
    try:
        return label, float(loss if label else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected LABEL=LOSS, as uniform=5.545") from None
