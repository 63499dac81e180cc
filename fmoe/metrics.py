"""What a training loop shows and records: a step's numbers, a JSONL file, a live view, a picture."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO
from xml.sax.saxutils import escape

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .errors import argument_error

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_LINES = 20


class Step(NamedTuple):
    """One step's numbers: loss in nats per token, and how many tokens each expert of each layer got."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    tokens_per_expert: Sequence[Sequence[int]]

    @property
    def overload(self) -> float:
        """How many times its fair share the busiest expert got, in the worst layer; 1 is perfect balance."""
        return max((_overload(layer) for layer in self.tokens_per_expert), default=1.0)

    def record(self) -> dict[str, Any]:
        """The fields and ``overload``, as JSON takes them."""
        return {**self._asdict(), "overload": self.overload}


class MetricsFile:
    """A context manager that appends a step a line to a JSONL file, at once, so that a crash loses nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "metrics.jsonl")
    ...     with MetricsFile(path) as metrics:
    ...         metrics.write(Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]))
    ...     read_metrics(path)[0]["overload"]
    1.5
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, step: Step) -> None:
        if not self._file:
            raise RuntimeError("MetricsFile.write: the file is not open. Use it in a with statement.")
        self._file.write(json.dumps(step.record()) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, in order. Raises ``ValueError``, with the line, for anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argument_error(
            "read_metrics", "path", got=error, expected="a readable JSONL file", remedy="Check the path."
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise argument_error(
                "read_metrics",
                f"{path}, line {number}",
                got=repr(line[:60]),
                expected="one JSON object",
                remedy="Remove the line if a crash cut it short.",
            )
        records.append(record)
    return records


class LiveView:
    """A context manager that shows a run as it goes: time left, loss, and the load of every expert.

    In a terminal each MoE layer has a row of blocks, an expert a block (neighbours share one where the
    terminal is narrow): half height is a fair share, red is twice that, ``·`` is an expert without
    tokens; the row ends with the layer's overload. Elsewhere it prints about twenty plain lines over
    the run.

    >>> import sys
    >>> with LiveView(total_steps=1, console=Console(file=sys.stdout)) as view:
    ...     view.update(Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]))
    step 1/1  0:00:00 left  loss 5.500  gradient norm 1.00  lr 1.0e-03  20,000 tokens/s  overload 1.50
    """

    def __init__(self, total_steps: int, *, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self.console = console or Console()
        self._step: Step | None = None
        self._first = (0, 0.0)
        self._left = "-:--:--"
        self._printed = -1
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, step: Step) -> None:
        """Show a step; steps count from 0."""
        # The first step is left out of the estimate: it compiles and warms up.
        if self._step is None:
            self._first = (step.step, time.monotonic())
        elif step.step > self._first[0]:
            rate = (time.monotonic() - self._first[1]) / (step.step - self._first[0])
            self._left = str(timedelta(seconds=round(rate * (self.total_steps - step.step - 1))))
        if step.step + 1 >= self.total_steps:
            self._left = "0:00:00"
        self._step = step
        if not self.console.is_terminal:
            self._print_line(step)

    def _print_line(self, step: Step) -> None:
        part = (step.step + 1) * PLAIN_LINES // max(1, self.total_steps)
        if part != self._printed:
            self._printed = part
            line = "  ".join(
                [f"step {step.step + 1}/{self.total_steps}", f"{self._left} left", *_numbers(step)]
            )
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group | Text:
        step = self._step
        if step is None:
            return Text("waiting for the first step")
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(ratio=1)
        progress.add_row(
            ProgressBar(total=self.total_steps, completed=step.step + 1),
            f"{step.step + 1}/{self.total_steps}",
            f"{self._left} left",
        )
        load = Table.grid(padding=(0, 2))
        for i, counts in enumerate(step.tokens_per_expert):
            width = max(1, self.console.width - 24)
            load.add_row(f"layer {i}", load_row(counts, width), f"{_overload(counts):.2f}")
        return Group(progress, Text("  ".join(_numbers(step))), load)


def load_row(counts: Sequence[int], width: int) -> Text:
    """An expert a block, its height and colour its load: half height, green, is a fair share.

    >>> load_row([4, 8, 0, 4], width=4).plain
    '▄█·▄'
    """
    share = sum(counts) / max(1, len(counts))
    each = math.ceil(len(counts) / width)
    text = Text()
    for start in range(0, len(counts), each):
        busiest = max(counts[start : start + each])
        load = busiest / share if share else 0.0
        block = BLOCKS[min(7, max(0, round(4 * load) - 1))] if busiest else "·"
        text.append(block, style="red" if load >= 2 else "yellow" if load >= 1.5 else "green")
    return text


def _overload(counts: Sequence[int]) -> float:
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0


def _numbers(step: Step) -> list[str]:
    return [
        f"loss {step.loss:.3f}",
        f"gradient norm {step.grad_norm:.2f}",
        f"lr {step.learning_rate:.1e}",
        f"{step.tokens_per_second:,.0f} tokens/s",
        f"overload {step.overload:.2f}",
    ]


def plot_loss(
    records: Sequence[Mapping[str, Any]], path: str | Path, *, reference: Mapping[str, float] = {}
) -> None:
    """Write the loss of each step as an SVG picture: points, a moving average, dashed reference lines.

    ``records`` are those of :func:`read_metrics`; losses that are not finite are left out. ``reference``
    maps labels to losses, such as the entropy of single bytes. Raises ``ValueError`` without a loss.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_loss([{"step": 0, "loss": 5.5}], Path(folder, "loss.svg"), reference={"uniform": 5.545})
    """
    points = [(r["step"], r["loss"]) for r in records if math.isfinite(r["loss"])]
    if not points:
        raise argument_error(
            "plot_loss", "records", got="no finite loss", expected="at least one", remedy="Train for a step."
        )
    # A thousand marks show all there is to see; more would only slow the browser down.
    every = math.ceil(len(points) / 1000)
    points, means = points[::every], _moving_average(points)[::every]
    losses = [loss for _, loss in points] + list(reference.values())
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    margin = 0.05 * (max(losses) - min(losses)) or 0.5
    low, high = min(losses) - margin, max(losses) + margin
    x_ticks, y_ticks = [t for t in _ticks(first, last) if t.is_integer()], _ticks(low, high)
    left, right, top, bottom = 64, 776, 16, 384  # the plotting area, in a picture of 800 x 440
    radius = 1.8 if len(points) > 100 else 3

    def x(step: float) -> str:
        return f"{left + (step - first) / (last - first) * (right - left):.1f}"

    def y(loss: float) -> str:
        return f"{bottom - (loss - low) / (high - low) * (bottom - top):.1f}"

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 440">',
        '<rect width="800" height="440" fill="white"/>',
        '<g font-family="sans-serif" font-size="13" fill="#555">',
        *(f'<path d="M{left} {y(t)}H{right}" stroke="#e6e6e6"/>' for t in y_ticks),
        *(f'<text x="{left - 8}" y="{y(t)}" dy="4" text-anchor="end">{t:g}</text>' for t in y_ticks),
        *(f'<path d="M{x(t)} {bottom}v5" stroke="#888"/>' for t in x_ticks),
        *(f'<text x="{x(t)}" y="{bottom + 20}" text-anchor="middle">{t:,g}</text>' for t in x_ticks),
        f'<path d="M{left} {bottom}H{right}" stroke="#888"/>',
        '<text x="420" y="428" text-anchor="middle">step</text>',
        '<text transform="translate(18 200) rotate(-90)" text-anchor="middle">loss (nats per token)</text>',
        "</g>",
        '<g fill="#1f6fb4" fill-opacity="0.3">',
        *(f'<circle cx="{x(step)}" cy="{y(loss)}" r="{radius}"/>' for step, loss in points),
        "</g>",
        f'<polyline points="{" ".join(f"{x(step)},{y(loss)}" for step, loss in means)}"',
        ' fill="none" stroke="#1f6fb4" stroke-width="2" stroke-linejoin="round"/>',
    ]
    lines += [
        '<g font-family="sans-serif" font-size="13" text-anchor="end" fill="#c2410c"',
        ' style="paint-order: stroke" stroke="white" stroke-width="4">',
    ]
    for label, loss in reference.items():
        lines += [
            f'<path d="M{left} {y(loss)}H{right}" stroke="#c2410c" stroke-width="1" stroke-dasharray="6 4"/>',
            f'<text x="{right - 4}" y="{y(loss)}" dy="-6">{escape(label)}, {loss:.2f}</text>',
        ]
    Path(path).write_text("\n".join([*lines, "</g>", "</svg>", ""]), encoding="utf-8")


def _moving_average(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over a fiftieth of the points, centred, narrower at both ends."""
    reach, total = len(points) // 100, [0.0, *accumulate(loss for _, loss in points)]
    spans = [min(reach, i, len(points) - 1 - i) for i in range(len(points))]
    sums = [total[i + span + 1] - total[i - span] for i, span in enumerate(spans)]
    return [(step, sum_ / (2 * span + 1)) for (step, _), sum_, span in zip(points, sums, spans)]


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers between two.

    >>> _ticks(1.3, 5.5)
    [2.0, 3.0, 4.0, 5.0]
    """
    least = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(least))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    return [round(i * gap, 12) for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]
