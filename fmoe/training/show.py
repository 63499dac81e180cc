"""Placements and schedules to look at: text in a terminal, a picture in a notebook."""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SQUARE
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text
from torch.distributed.device_mesh import DeviceMesh

from ..ops.core.axes import MeshOfSizes
from ..parallel.layout import Layout, Side, layouts_of, spoken
from ..pipeline.clock import UNIT, Costs
from ..pipeline.schedule import Schedule, bubble, drawn, in_flight
from . import plot

# Readable on light and on dark: black on a pale colour. Devices take them in turn.
COLORS = "#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99", "#8dd3c7", "#fccde5"
OF_KINDS = {"F": COLORS[0], "B": COLORS[1], "I": COLORS[2], "W": COLORS[3]}
MOST_ROWS, MOST_COLUMNS = 16, 8  # of a tensor's pieces in a terminal


@dataclasses.dataclass(frozen=True, repr=False)
class Shown:
    """What :func:`show_placement` and :func:`show_schedule` give: text for a terminal, and a picture.

    A prompt shows its text, ``rich.print`` the same in colours, and a notebook its picture or, without
    matplotlib, the text in colours. ``figure()`` is the picture, for
    :func:`fmoe.training.plot.save_figure`.

    >>> from fmoe.pipeline import make_schedule
    >>> show_schedule(make_schedule("1f1b", pp=2, micro_batches=2))
    1f1b, 2 ranks, 2 micro-batches: 33.3% idle
    rank 0  0F0 0F1         0B0----     0B1----
    rank 1      1F0 1B0---- 1F1 1B1----
    in flight: 2, 1 forwards
    """

    renderable: RenderableType
    figure: Callable[[], Any]

    def __rich__(self) -> RenderableType:
        return self.renderable

    def __repr__(self) -> str:
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        width = Measurement.get(console, console.options, self.renderable).maximum
        console = Console(file=io.StringIO(), width=max(width, 20), color_system=None)
        with console.capture() as text:
            console.print(self.renderable)
        return "\n".join(line.rstrip() for line in text.get().splitlines())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        try:
            picture = plot.svg(self.figure())
        except ImportError:
            console = Console(file=io.StringIO(), width=10_000, record=True)
            console.print(self.renderable)
            html = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
            return {"text/plain": repr(self), "text/html": html}
        return {"text/plain": repr(self), "image/svg+xml": picture}


def show_placement(
    tree: Any,
    mesh: DeviceMesh | MeshOfSizes | str | Mapping[str, int] | None = None,
    *,
    specs: Any = None,
) -> Shown:
    """Which device holds which piece of a tensor, or of each tensor of a tree.

    =========  =====================================================================
    tree       one leaf or a tree of DTensors; of ``ParamSpec``, as ``decoder.specs(config)`` gives them; or,
               with ``specs``, of whole tensors
    mesh       for leaves that aren't DTensors: a mesh, or axes and sizes, as ``"dp=2,ep=4"``, for which no
               devices are needed
    specs      a tree prefix of :class:`fmoe.P`
    -> Shown   of one tensor its pieces, with the ranks that hold them; of a tree a line for each tensor, with
               layers that are alike in one
    =========  =====================================================================

    Raises ``ValueError`` for leaves without a placement, and for specs that don't fit, of which it lists all.

    Source: ``jax.debug.visualize_array_sharding``.

    >>> import fmoe, torch
    >>> show_placement(torch.empty(8, 6), "ep=2,tp=3", specs=fmoe.P("ep", "tp"))
    (8, 6) placed by P('ep', 'tp'): 6 pieces of (4, 2)
    ┌─────┬─────┬─────┬─────┐
    │     │ 0:2 │ 2:4 │ 4:6 │
    ├─────┼─────┼─────┼─────┤
    │ 0:4 │  0  │  1  │  2  │
    │ 4:8 │  3  │  4  │  5  │
    └─────┴─────┴─────┴─────┘
    """
    layouts = layouts_of("show_placement", tree, mesh, specs)
    merged = _merged(layouts)
    text = _pieces(layouts[0]) if len(layouts) == 1 else _table(layouts, merged)
    return Shown(text, lambda: plot.plot_placement(merged))


def show_schedule(schedule: Schedule, costs: Costs = UNIT) -> Shown:
    """The computations of a pipeline on its clock: a line for each rank.

    The text is that of ``str(schedule)``, in colours, with the idle share and the residuals in flight. The
    picture is that of :func:`fmoe.training.plot.plot_schedule`.

    Raises ``ValueError`` as :func:`fmoe.pipeline.timeline` does.

    >>> from fmoe.pipeline import make_schedule
    >>> print(str(show_schedule(make_schedule("zbv", pp=2, micro_batches=4))).splitlines()[0])
    zbv, 2 ranks, 4 micro-batches: 4.0% idle
    """
    ranks = len(schedule.actions)
    title = f"{schedule.name}, {ranks} ranks, {schedule.micro_batches} micro-batches: "
    lines = [Text(f"{title}{bubble(schedule, costs):.1%} idle")]
    for line in drawn(schedule, costs).splitlines():
        colored = Text(line, no_wrap=True, overflow="ellipsis")
        for found in re.finditer(r"\b\d+([FBIW])\d+-*", line):
            colored.stylize(f"black on {OF_KINDS[found[1]]}", *found.span())
        lines.append(colored)
    held = ", ".join(map(str, in_flight(schedule).until_weight))
    lines.append(Text(f"in flight: {held} forwards"))
    return Shown(Group(*lines), lambda: plot.plot_schedule(schedule, costs))


def _pieces(layout: Layout) -> RenderableType:
    """One tensor: its pieces, with the ranks that hold them."""
    rows, columns = layout.sides()
    name, count = f"{layout.name} " if layout.name else "", len(layout.devices)
    pieces = f"{count} pieces of {layout.held}" if count > 1 else "one piece"
    title = f"{name}{layout.shape} placed by {layout.spec!r}: {pieces}"
    across = _some(columns, MOST_COLUMNS)
    table = Table("", *(Column(label, justify="center") for label, _ in across), box=SQUARE)
    for label, row in _some(rows, MOST_ROWS):
        cells = [
            Text("…") if row is None or column is None else _holders(layout.holders(row, column))
            for _, column in across
        ]
        table.add_row(label, *cells)
    return Group(Text(title), table)


def _holders(ranks: tuple[int, ...]) -> Text:
    return Text(spoken(ranks), style=f"black on {COLORS[ranks[0] % len(COLORS)]}")


def _some(sides: Sequence[Side], most: int) -> list[tuple[str, dict[int, int] | None]]:
    if len(sides) <= most:
        return [*sides]
    return [*sides[: most - 2], ("…", None), sides[-1]]


def _table(layouts: Sequence[Layout], merged: Sequence[Layout]) -> RenderableType:
    """A tree: a line for each tensor, or for several that are alike."""
    held = sum(math.prod(x.held) for x in layouts)
    whole = sum(math.prod(x.shape) for x in layouts)
    caption = f"a device holds {held:,} of {whole:,} numbers"
    table = Table("tensor", "shape", "placed by", "a device holds", box=SQUARE, caption=caption)
    for title in ("pieces", "devices each"):
        table.add_column(title, justify="right")
    for x in merged:
        copies = len(next(iter(x.devices.values())))
        table.add_row(Text(x.name), str(x.shape), repr(x.spec), str(x.held), str(len(x.devices)), str(copies))
    return table


def _merged(layouts: Sequence[Layout]) -> list[Layout]:
    """Layouts that are alike and whose names differ in numbers only, as those of layers do, in one."""
    alike: dict[Any, list[Layout]] = {}
    for x in layouts:
        key = re.sub(r"\d+", "#", x.name), x.shape, x.spec, x.cuts, *x.devices.values()
        alike.setdefault(key, []).append(x)
    return [some[0]._replace(name=_joined([x.name for x in some])) for some in alike.values()]


def _joined(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one: ``layers.{1-3}.norm``."""
    parts = [*zip(*(re.split(r"(\d+)", name) for name in names))]
    if math.prod(len({*part}) for part in parts) != len(names):  # ranges would say more than there is
        return ", ".join(names)
    return "".join(part[0] if len({*part}) == 1 else _range([int(n) for n in part]) for part in parts)


def _range(numbers: Sequence[int]) -> str:
    found = sorted({*numbers})
    runs = itertools.groupby(enumerate(found), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0], run[-1]) for run in ([n for _, n in pairs] for _, pairs in runs)]
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends) + "}"
