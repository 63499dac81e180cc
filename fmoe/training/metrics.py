"""A training run on screen and on disk: a step's numbers, a JSONL file, a live view."""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..errors import argument_error

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_LINES = 20
_LOG = logging.getLogger("fmoe")

# Dense bfloat16 FLOP/s of the vendor's data sheets, by the names that devices report.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def speed(flops_per_second: float, device: torch.device) -> dict[str, float]:
    """``tflops_per_second`` and, on a device of ``PEAK_FLOPS``, ``mfu``: as :class:`Step` takes them.

    >>> speed(5e12, torch.device("cpu"))
    {'tflops_per_second': 5.0}
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    mfu = {"mfu": flops_per_second / PEAK_FLOPS[name]} if name in PEAK_FLOPS else {}
    return {"tflops_per_second": flops_per_second / 1e12, **mfu}


class Step(NamedTuple):
    """One step's numbers: loss in nats per token, and how many tokens each expert of each layer got.

    ``tflops_per_second`` doesn't count recomputation, and ``mfu`` is its share of the device's peak. ``None``
    means unknown, and is not recorded.

    >>> Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]).overload  # the busier of two experts has 1.5 times its share
    1.5
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    tokens_per_expert: Sequence[Sequence[int]]
    tflops_per_second: float | None = None
    mfu: float | None = None
    held_out_loss: float | None = None

    @property
    def overload(self) -> float:
        """How many times its fair share the busiest expert got, in the worst layer; 1 is perfect balance."""
        return max((_overload(layer) for layer in self.tokens_per_expert), default=1.0)

    def record(self) -> dict[str, Any]:
        """The known fields and ``overload``, as JSON takes them."""
        known = {name: value for name, value in self._asdict().items() if value is not None}
        return {**known, "overload": self.overload}


@torch.no_grad()
def mean_loss(loss_fn: Callable[..., Any], params: Any, batches: Sequence[Sequence[torch.Tensor]]) -> float:
    """The mean of ``loss_fn(params, *batch)`` over batches. It returns ``(loss, aux)``; no gradients.

    A batch weighs as much as ``aux.num_targets`` says, as :func:`~fmoe.training.gradients.accumulate` has it.

    >>> batches = [(torch.ones(3),), (torch.zeros(3),)]
    >>> mean_loss(lambda w, x: ((w * x).mean(), None), torch.tensor(2.0), batches)
    1.0
    """
    total = weights = 0.0
    for batch in batches:
        loss, aux = loss_fn(params, *batch)
        weight = aux.num_targets.item() if hasattr(aux, "num_targets") else 1.0
        total, weights = total + weight * loss.item(), weights + weight
    return total / (weights or 1.0)


class MetricsFile:
    """A context manager that writes every step to a JSONL file at once, so that a crash loses nothing.

    ==========  ===================================================================================
    path        ``None`` writes nothing, as all ranks but the first should
    first_step  the step this run begins with; ``None`` keeps whatever the file holds
    ==========  ===================================================================================

    With ``first_step``, the first write removes that step and later ones from the file, and a line that a
    crash cut short. A run from step 0 renames an earlier run's file to ``metrics-1.jsonl``, and logs that.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "metrics.jsonl")
    ...     with MetricsFile(path) as metrics:
    ...         metrics.write(Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]))
    ...     read_metrics(path)[0]["overload"]
    1.5
    """

    def __init__(self, path: str | Path | None, *, first_step: int | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.first_step = first_step
        self._entered = False
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        if self._file:
            self._file.close()

    def write(self, step: Step) -> None:
        if not self._entered:
            raise RuntimeError("MetricsFile.write: the file is not open. Use it in a with statement.")
        if not self.path:
            return
        if not self._file:  # not before: a run that fails in its first step leaves the file as it was
            if self.first_step is not None and self.path.exists():
                _make_room(self.path, self.first_step)
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps(step.record()) + "\n")


def _make_room(path: Path, step: int) -> None:
    """Leave the records before this step in a file; before step 0, give it another name."""
    if step == 0:
        others = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
        earlier = path.rename(next(other for other in others if not other.exists()))
        _LOG.warning(f"the metrics of an earlier run are {earlier} now")
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    kept = [record for record in _records(path, whole) if record["step"] < step]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    beside.replace(path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, in order. Raises ``ValueError``, with the line, for anything else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "metrics.jsonl")
    ...     size = path.write_text('{"step": 0, "loss": 5.5}')
    ...     read_metrics(path)
    [{'step': 0, 'loss': 5.5}]
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argument_error("read_metrics", "path", got=error, expected="a readable JSONL file") from error
    return _records(path, text)


def _records(path: str | Path, text: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            where, remedy = f"{path}, line {number}", "Remove the line if a crash cut it short."
            got, expected = repr(line[:60]), "one JSON object"
            raise argument_error("read_metrics", where, got=got, expected=expected, remedy=remedy)
        records.append(record)
    return records


class LiveView:
    """A context manager that shows a run as it goes: time left, loss, and the load of every expert.

    In a terminal each MoE layer has a row of blocks (:func:`load_row`), which ends with the layer's overload.
    Elsewhere it prints about twenty plain lines over the run. Each loss on held-out text has a line in both.
    While it is open, the console also shows what the library logs.

    >>> import sys
    >>> with LiveView(total_steps=1, console=Console(file=sys.stdout)) as view:
    ...     view.update(Step(0, 5.5, 1.0, 1e-3, 2e4, [[3, 1]]))
    step 1/1  0:00:00 left  loss 5.500  gradient norm 1.00  lr 1.0e-03  20,000 tokens/s  overload 1.50
    """

    def __init__(self, total_steps: int, *, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self.console = console or Console()
        self._step: Step | None = None
        self._first = (0, 0.0)  # the first step that it was shown, and when
        self._left = "-:--:--"
        self._printed = -1
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
        self._log = _ConsoleHandler(self.console)

    def __enter__(self) -> Self:
        self._level = _LOG.level
        _LOG.addHandler(self._log)
        _LOG.setLevel(logging.INFO)
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        _LOG.removeHandler(self._log)
        _LOG.setLevel(self._level)

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
        if step.held_out_loss is not None:
            self._say(f"step {step.step + 1}: loss on held-out text {step.held_out_loss:.3f}")
        part = (step.step + 1) * PLAIN_LINES // max(1, self.total_steps)
        if not self.console.is_terminal and part != self._printed:
            self._printed = part
            self._say(f"step {step.step + 1}/{self.total_steps}  {self._left} left  {_numbers(step)}")

    def _say(self, line: str) -> None:
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
            row = load_row(counts, width=max(1, self.console.width - 24))
            load.add_row(f"layer {i}", row, f"{_overload(counts):.2f}")
        return Group(progress, Text(_numbers(step)), load)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), soft_wrap=True)


def load_row(counts: Sequence[int], width: int) -> Text:
    """A block for each expert, or for neighbours where the width is small, that shows the largest load.

    Half height is a fair share, red is twice that, and ``·`` is an expert without tokens.

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


def _numbers(step: Step) -> str:
    flops = "" if step.tflops_per_second is None else f"{step.tflops_per_second:,.3g} TFLOP/s  "
    mfu = "" if step.mfu is None else f"MFU {step.mfu:.1%}  "
    return (
        f"loss {step.loss:.3f}  gradient norm {step.grad_norm:.2f}  lr {step.learning_rate:.1e}  "
        f"{step.tokens_per_second:,.0f} tokens/s  {flops}{mfu}overload {step.overload:.2f}"
    )
