"""A plan as a table."""

from collections.abc import Callable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from .planning import Plan
from .stage import PARTS, StagePlan


def report(plan: Plan, console: Console, title: str = "") -> None:
    """Print what each device holds and sends, in MiB or GiB. Stages of equal sizes share a column.

    >>> from fmoe.models.decoder import preset
    >>> from fmoe.plan import plan
    >>> console = Console(width=60)
    >>> with console.capture() as shown:
    ...     report(plan(preset("debug", layers=2), batch_size=2, seq_len=16, device_type="cpu"), console)
    >>> print(shown.get().splitlines()[3])
    │ parameters          │       2.84 │
    """
    columns = [[*group] for _, group in groupby(plan.stages, key=lambda s: s._replace(layers=(0, 0)))]
    stages, pp = [group[0] for group in columns], plan.mesh["pp"]
    notes = [f"{plan.tokens_per_device:,} tokens a device and step"]
    if plan.rows:
        notes.append(
            f"a token goes to {plan.copies_per_token:.2f} of {plan.mesh['ep']} devices along ep; the busiest "
            f"one gets {plan.rows.received:,} rows a dispatch, {plan.rows.expanded:,} for its experts"
        )
    if pp > 1:
        notes.append(f"layers divided over pp={pp}, micro-batches in flight as in 1F1B; not trained yet")
    unit, size = ("GiB", 2**30) if plan.peak >= 2**30 else ("MiB", 2**20)
    table = Table(f"{unit} a device", title=title or None, caption=". ".join(notes))
    table.columns[0].no_wrap = True
    for group in columns:
        table.add_column(_layers(group), justify="right")

    def row(name: str, nbytes: Callable[[StagePlan], int], form: str = "{:,.2f}") -> None:
        """A row, unless every stage has zero bytes."""
        if any(map(nbytes, stages)):
            table.add_row(name, *(form.format(nbytes(s) / size) for s in stages))

    def rows(indent: str, parts: Callable[[StagePlan], dict[str, int]]) -> None:
        for name in dict.fromkeys(name for s in stages for name in parts(s)):
            row(indent + _NAMES.get(name, name), lambda s: parts(s).get(name, 0))  # noqa: B023

    rows("", lambda s: {part: getattr(s, part) for part in PARTS[:4]})
    row("saved activations", lambda s: sum(s.activations.values()))
    rows("  ", lambda s: s.activations)
    if pp > 1:
        table.add_row("micro-batches in flight", *(str(s.in_flight) for s in stages))
    table.add_row(end_section=True)
    rows("most in ", lambda s: s.peaks)
    row("peak", lambda s: s.peak, "[bold]{:,.2f}[/bold]")
    rows("  ", lambda s: {part: s.at_peak[part] for part in PARTS})
    rows("    ", _workspace)
    for purpose in ("tokens", "parameters", "sums"):
        row(f"sent a step: {purpose}", lambda s: s.sent.get(purpose, 0))  # noqa: B023
    console.print(table)


def _workspace(stage: StagePlan) -> dict[str, int]:
    """The workspace at the peak by kind of operator, without kinds below a hundredth of the peak."""
    found = stage.workspaces[max(stage.peaks, key=stage.peaks.__getitem__)]
    return {kind: n for kind, n in found.items() if n > stage.peak / 100}


_NAMES = {"converted": "params to compute with", "activations": "saved activations"}


def _layers(stages: list[StagePlan]) -> str:
    first, last = stages[0].layers[0], stages[-1].layers[1] - 1
    return f"layers {first}-{last}" + (f", {len(stages)} stages" if len(stages) > 1 else "")
