"""Pictures of runs, of what layers keep and of pipelines, drawn by matplotlib (extra ``plots``).

Each function takes plain values and returns a matplotlib ``Figure``, which a notebook shows and
:func:`save_figure` writes. ``python -m fmoe plot`` draws them from files.
"""

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import argument_error
from ..parallel.layout import Layout, spoken
from ..pipeline.clock import UNIT, Costs
from ..pipeline.schedule import Schedule, bubble, timeline
from .metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
MOST_MARKS, MOST_COLUMNS = 1000, 300  # on the x axis; more would look the same
MOST_PANELS, MOST_LABELS = 12, 64  # tensors, and pieces of one that are labelled
MOST_NUMBERS = 500  # of micro-batches, on the computations of a schedule; more would not be legible
COMPUTATIONS = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}
SHAPE = "{tokens} tokens of {dim}, hidden {hidden}\n{top_k} of {experts} experts, {routing}"


def plot_loss(runs: Mapping[str, Records], *, reference: Mapping[str, float] = {}) -> "Figure":
    """Loss by step of one or several runs: points, moving averages, held-out losses, reference lines.

    ``runs`` maps labels to records of :func:`~fmoe.training.metrics.read_metrics`. Losses that aren't finite
    are left out. ``reference`` maps labels to losses, such as the entropy of single bytes.

    Raises ``ValueError`` for a run without a loss or with one that is no number, and ``ImportError`` without
    matplotlib.

    >>> figure = plot_loss({"debug": [{"step": 0, "loss": 5.5}]}, reference={"uniform": 5.545})
    >>> [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    ['debug', 'uniform, 5.54']
    """
    if not runs:
        raise argument_error("plot_loss", "runs", got="no run", expected="at least one")
    figure = empty_figure("plot_loss", 8, 4.4)
    ax = figure.subplots()
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    for number, (label, records) in enumerate(runs.items()):
        steps, losses = _finite(f"runs[{label!r}]", records, "loss")
        if not steps:
            raise argument_error(
                "plot_loss", f"runs[{label!r}]", got="no finite loss", expected="at least one"
            )
        color, every = f"C{number}", math.ceil(len(steps) / MOST_MARKS)
        size = 3 if len(steps) > 100 else 6
        # Pixels, because a thousand points would take ten times the rest of an SVG file.
        marks: dict[str, Any] = dict(marker="o", linestyle="", markeredgewidth=0, rasterized=True)
        ax.plot(steps[::every], losses[::every], **marks, markersize=size, color=color, alpha=0.3)
        ax.plot(steps[::every], _moving_average(losses)[::every], color=color, label=label)
        held_out = _finite(f"runs[{label!r}]", records, "held_out_loss")
        if held_out[0]:
            ax.plot(*held_out, "D--", color=color, markersize=4, linewidth=0.8, label=f"{label}, held out")
    for label, loss in reference.items():
        ax.axhline(loss, color="0.4", linewidth=1, linestyle="--", label=f"{label}, {loss:.2f}")
    ax.legend()
    return figure


def plot_load(records: Records) -> "Figure":
    """Tokens of every expert over time, in fair shares: a panel for each MoE layer, a row for each expert.

    ``records`` are those of :func:`~fmoe.training.metrics.read_metrics`. Where they are many, neighbouring
    steps are averaged. A fair share is what every expert would get if they were loaded evenly.

    Raises ``ValueError`` for records without ``tokens_per_expert`` or whose layers and experts change, and
    ``ImportError`` without matplotlib.

    >>> figure = plot_load([{"step": i, "tokens_per_expert": [[3, 1], [2, 2]]} for i in range(4)])
    >>> [ax.get_title() for ax in figure.axes]
    ['MoE layer 0', 'MoE layer 1', '']
    """
    known = [record for record in records if record.get("tokens_per_expert")]
    if not known:
        raise argument_error(
            "plot_load", "records", got="no tokens_per_expert", expected="counts by layer and expert"
        )
    counts = [record["tokens_per_expert"] for record in known]
    sizes_of = {
        "layers a record": {len(layers) for layers in counts},
        "experts a layer": {len(layer) for layers in counts for layer in layers},
    }
    for what, sizes in sizes_of.items():
        if len(sizes) > 1:
            got = f"{' or '.join(map(str, sorted(sizes)))} {what}"
            expected, remedy = "the same number everywhere", "Draw the records of one model."
            raise argument_error("plot_load", "records", got=got, expected=expected, remedy=remedy)
    steps = [_number("plot_load", "records", record, "step") for record in known]
    share_NLE = torch.tensor(counts, dtype=torch.float64)
    share_NLE = share_NLE / share_NLE.mean(-1, keepdim=True).clamp_min(1e-20)
    each = math.ceil(len(known) / MOST_COLUMNS)
    share_NLE = torch.stack([part.mean(0) for part in share_NLE.split(each)])

    _, layers, experts = share_NLE.shape
    columns = math.ceil(math.sqrt(layers / 4))
    rows = math.ceil(layers / columns)
    figure = empty_figure("plot_load", 8, 1.0 + 1.5 * rows)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for layer, ax in enumerate(axes[:layers]):
        image = ax.imshow(
            share_NLE[:, layer].T.tolist(),
            extent=(steps[0], steps[-1] + 1, experts - 0.5, -0.5),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
        )
        ax.set_title(f"MoE layer {layer}", fontsize="medium")
        ax.yaxis.get_major_locator().set_params(integer=True)
    for ax in axes[layers:]:
        figure.delaxes(ax)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("expert", fontsize="medium")
    figure.colorbar(image, ax=list(axes[:layers]), extend="max", label="tokens, in fair shares")
    return figure


def plot_memory(kept: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Bytes kept between forward and backward: a bar for each policy, a part for each operator.

    ``kept`` maps names of policies to bytes by checkpoint name, as :func:`fmoe.introspect.saved_bytes` gives
    them, and :func:`fmoe.bench.layers.layer_memory` for one layer. Raises ``ValueError`` if it is empty, and
    ``ImportError`` without matplotlib.

    >>> figure = plot_memory({"save_nothing": {}, "default": {"topk": 2**20, "dispatch": 2**21}})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.00 MiB', '3.00 MiB']
    """
    if not kept:
        raise argument_error("plot_memory", "kept", got="no policy", expected="at least one")
    figure = empty_figure("plot_memory", 8, 1.2 + 0.45 * len(kept))
    ax = figure.subplots()
    left = [0.0] * len(kept)
    for name in dict.fromkeys(name for parts in kept.values() for name in parts):
        part = [parts.get(name, 0) / 2**20 for parts in kept.values()]
        bars = ax.barh([*kept], part, left=left, label=name)
        left = [a + b for a, b in zip(left, part)]
    if not any(kept.values()):
        bars = ax.barh([*kept], left)
    ax.bar_label(bars, [f"{total:.2f} MiB" for total in left], padding=4)
    ax.set(xlabel="MiB kept between forward and backward")
    ax.margins(x=0.2)
    ax.invert_yaxis()
    if any(kept.values()):
        ax.legend()
    return figure


def plot_layers(results: Sequence[Mapping[str, Any]]) -> "Figure":
    """TFLOP/s of layers: a group of bars for each result, with a line for a matrix product of the same run.

    On a GPU only the time counts in which the device works.

    ``results`` are those of :func:`fmoe.bench.measure.bench_layer`, as ``python -m fmoe bench layer --json``
    writes them. Raises ``ValueError`` if they have no layer, and ``ImportError`` without matplotlib.

    >>> shape = {"tokens": 64, "dim": 8, "hidden": 4, "experts": 4, "top_k": 2}
    >>> result = {"shape": shape, "routing": "random", "device": "CPU", "dtype": "torch.float32",
    ...           "matmul_tflops": 0.1, "layers": [{"layer": "fmoe", "rate": 0.07}]}
    >>> [text.get_text() for text in plot_layers([result]).axes[0].texts]
    ['0.07']
    """
    rows = [result["layers"] if isinstance(result, Mapping) else [] for result in results]
    rates = [{row["layer"]: row["rate"] for row in each} for each in rows]
    names = [*dict.fromkeys(name for each in rates for name in each)]
    if not names:
        raise argument_error("plot_layers", "results", got="no layer", expected="results of bench_layer")
    figure = empty_figure("plot_layers", max(8, 3 + 0.5 * len(names) * len(results)), 4.4)
    ax = figure.subplots()
    _draw_groups(ax, names, rates, "%.3g")
    for group, result in enumerate(results):
        label = "a large matrix product" if group == 0 else None
        ax.plot([group - 0.4, group + 0.4], [result["matmul_tflops"]] * 2, "--", color="0.4", label=label)
    shapes = [SHAPE.format(**each["shape"], routing=each["routing"]) for each in results]
    ax.set_xticks(range(len(results)), shapes)
    where = dict.fromkeys(f"{each['device']}, {each['dtype'].removeprefix('torch.')}" for each in results)
    on_device = any(row.get("device") is not None for each in rows for row in each)
    label = f"TFLOP/s{' of device time' * on_device}, forward and backward"
    ax.set(ylabel=label, title="; ".join(where))
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_table(table: Mapping[str, Mapping[str, float]], *, unit: str) -> "Figure":
    """Numbers of a table as bars: a group for each row, a colour for each column.

    ``table`` maps names of rows to numbers by column; a row may lack some. ``unit`` says what they are.
    ``python -m fmoe plot --what table`` reads them from a page.

    Raises ``ValueError`` for a table without a number, and ``ImportError`` without matplotlib.

    >>> figure = plot_table({"4 sequences": {"ours": 74483, "theirs": 60444}}, unit="tokens/s")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['74,483', '60,444']
    """
    names = [*dict.fromkeys(name for row in table.values() for name in row)]
    if not names:
        raise argument_error("plot_table", "table", got="no number", expected="at least one")
    figure = empty_figure("plot_table", 8, 3.2)
    ax = figure.subplots()
    _draw_groups(ax, names, [*table.values()], "{:,.10g}")
    ax.set_xticks(range(len(table)), [*table])
    ax.set(ylabel=unit)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize="small", frameon=False, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def plot_schedule(schedule: Schedule, costs: Costs = UNIT) -> "Figure":
    """The computations of a pipeline on its clock: a row for each rank, a bar for each computation.

    Bars have the numbers of their micro-batches, unless they are many. A rank's later stages are paler.

    Raises ``ValueError`` as :func:`~fmoe.pipeline.timeline` does, and ``ImportError`` without matplotlib.

    >>> from fmoe.pipeline import make_schedule
    >>> figure = plot_schedule(make_schedule("zbv", pp=2, micro_batches=4))
    >>> figure.axes[0].get_title()
    'zbv, 2 ranks, 4 micro-batches: 4.0% idle'
    """
    ranks, idle = timeline(schedule, costs), bubble(schedule, costs)
    figure = empty_figure("plot_schedule", 12, 1.2 + 0.35 * len(ranks))
    ax = figure.subplots()
    count = sum(map(len, ranks))
    labels = dict(COMPUTATIONS)
    for rank, computations in enumerate(ranks):
        places = {stage: place for place, stage in enumerate(schedule.stages(rank))}
        for (stage, kind, micro_batch, *_), _, start, end in computations:
            ax.barh(
                rank, end - start, left=start, height=0.9, color=f"C{[*COMPUTATIONS].index(kind)}",
                alpha=1 - 0.6 * places[stage] / len(places), edgecolor="white", linewidth=0.5,
                label=None if places[stage] else labels.pop(kind, None), rasterized=count > MOST_NUMBERS,
            )  # fmt: skip
            if count <= MOST_NUMBERS:
                middle = (start + end) / 2
                ax.text(middle, rank, str(micro_batch), ha="center", va="center", fontsize="xx-small")
    sizes = f"{len(ranks)} ranks, {schedule.micro_batches} micro-batches"
    ax.set(xlabel="time", ylabel="rank", title=f"{schedule.name}, {sizes}: {idle:.1%} idle")
    ax.set_yticks(range(len(ranks)))
    ax.margins(x=0)
    ax.invert_yaxis()
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_placement(layouts: Sequence[Layout]) -> "Figure":
    """Tensors cut into pieces, each with the ranks that hold it: a panel for each tensor.

    ``layouts`` are those of :func:`fmoe.introspect.show_placement`, which draws them. Of many it draws
    the first 12 that are cut.

    Raises ``ValueError`` if there are none, and ``ImportError`` without matplotlib.

    >>> from fmoe import P
    >>> from fmoe.parallel.layout import layouts_of
    >>> figure = plot_placement(layouts_of("show", torch.empty(4, 6), "ep=2,tp=2", P("ep")))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0 1', '2 3']
    """
    if not layouts:
        raise argument_error("plot_placement", "layouts", got="no tensor", expected="at least one")
    cut = [layout for layout in layouts if len(layout.devices) > 1] or layouts[:1]
    some = cut[:MOST_PANELS]
    columns = min(len(some), 3)
    rows = math.ceil(len(some) / columns)
    figure = empty_figure("plot_placement", 4 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for layout, ax in zip(some, axes):
        down, across = layout.sides()
        count = len(down) * len(across)
        how: dict[str, Any] = dict(height=1, alpha=0.5, edgecolor="white", rasterized=count > MOST_NUMBERS)
        for (i, (_, row)), (j, (_, column)) in itertools.product(enumerate(down), enumerate(across)):
            ranks = layout.holders(row, column)
            ax.barh(i, 1, left=j - 0.5, color=f"C{ranks[0] % 10}", **how)
            if count <= MOST_LABELS:
                ax.text(j, i, spoken(ranks), ha="center", va="center", fontsize="small")
        for labels, ticks, most in ((down, ax.set_yticks, 8), (across, ax.set_xticks, 4)):
            every = math.ceil(len(labels) / most)
            words = [label.replace(", ", "\n") for label, _ in labels[::every]]
            ticks(range(0, len(labels), every), words, fontsize="x-small")
        ax.set_title(f"{layout.name}\n{layout.shape}, {layout.spec!r}".strip(), fontsize="small")
        ax.margins(0)
        ax.invert_yaxis()
    for ax in axes[len(some) :]:
        figure.delaxes(ax)
    if len(layouts) > len(some):
        whole, rest = len(layouts) - len(cut), len(cut) - len(some)
        words = [f"{rest} more" if rest else "", f"{whole} whole on every device" if whole else ""]
        figure.supxlabel("and " + ", ".join(filter(None, words)), fontsize="small")
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as ``.svg`` or ``.png``, by the path's ending. Equal figures give equal files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_figure(plot_memory({"default": {"topk": 2**20}}), Path(folder, "memory.png"))
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fmoe", "svg.fonttype": "none"}):
        undated = {"Date": None} if Path(path).suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=undated)


def report(path: str | Path, *, reference: Mapping[str, float] = {}, unit: str = "token") -> str:
    """A run in words, and its pictures ``loss.svg`` and ``load.svg`` beside its metrics.

    =========  ===================================================================================
    path       a file of :class:`~fmoe.training.metrics.MetricsFile`
    reference  losses to draw a line at, as for :func:`plot_loss`
    unit       what a token stands for, as ``"byte"``
    -> text    the mean loss of the last 20 steps, the speed over all of them, where the files are;
               without matplotlib, how to get pictures
    =========  ===================================================================================

    Raises ``ValueError`` for a file that :func:`~fmoe.training.metrics.read_metrics` can't read, or that
    has nothing to draw.

    >>> import tempfile
    >>> from fmoe.training.metrics import MetricsFile, Step
    >>> with tempfile.TemporaryDirectory() as folder, MetricsFile(Path(folder, "metrics.jsonl")) as file:
    ...     file.write(Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]))
    ...     text = report(file.path)
    >>> text.split(", see")[0]
    'final loss 5.500 nats a token (mean of the last 1 steps), 20,000 tokens/s'
    """
    path, records = Path(path), read_metrics(path)
    ends = [record["loss"] for record in records[-20:]]
    seconds_a_token = sum(1 / record["tokens_per_second"] for record in records) / len(records)
    text = (
        f"final loss {sum(ends) / len(ends):.3f} nats a {unit} (mean of the last {len(ends)} steps), "
        f"{1 / seconds_a_token:,.0f} tokens/s, see {path}"
    )
    loss, load = path.with_name("loss.svg"), path.with_name("load.svg")
    try:
        save_figure(plot_loss({path.parent.name: records}, reference=reference), loss)
        save_figure(plot_load(records), load)
    except ImportError:
        return f"{text}\nfor pictures: pip install matplotlib && python -m fmoe plot {path}"
    return f"{text}, {loss} and {load}"


def svg(figure: "Figure") -> str:
    """A figure as the text of an SVG file."""
    with tempfile.TemporaryDirectory() as folder:
        save_figure(figure, Path(folder, "figure.svg"))
        return Path(folder, "figure.svg").read_text(encoding="utf-8")


def empty_figure(function: str, width: float = 1, height: float = 1) -> "Figure":
    """An empty one. Pyplot would keep it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{function} needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_groups(ax: Any, names: Sequence[str], groups: Sequence[Mapping[str, float]], fmt: str) -> None:
    """Bars side by side, a group at each whole number; what a group doesn't have is left out."""
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        known = [place for place, group in enumerate(groups) if name in group]
        left = [place - 0.4 + number * width for place in known]
        bars = ax.bar(left, [groups[place][name] for place in known], width, align="edge", label=name)
        ax.bar_label(bars, fmt=fmt, fontsize="small")


def _finite(argument: str, records: Records, name: str) -> tuple[list[float], list[float]]:
    known = [record for record in records if name in record]
    steps, values = ([_number("plot_loss", argument, r, key) for r in known] for key in ("step", name))
    finite = [math.isfinite(value) for value in values]
    return [*compress(steps, finite)], [*compress(values, finite)]


def _number(function: str, argument: str, record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    if isinstance(value, int | float):
        return value
    got = f"a record whose {name} is {value!r}"
    remedy = "Remove such records, or write the number."
    raise argument_error(function, argument, got=got, expected="a number", remedy=remedy)


def _moving_average(losses: Sequence[float]) -> list[float]:
    """Means over a fiftieth of the losses, centred: narrower at the start, cut off at the end."""
    total = [0.0, *accumulate(losses)]
    spans = [min(len(losses) // 100, i) for i in range(len(losses))]
    ends = [min(i + span + 1, len(losses)) for i, span in enumerate(spans)]
    return [
        (total[end] - total[i - span]) / (end - i + span) for i, (span, end) in enumerate(zip(spans, ends))
    ]
