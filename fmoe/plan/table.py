"""A plan as a table."""

import functools
from collections.abc import Callable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from .planning import Plan
from .rank import PARTS, RankPlan
from .time import Time


def report(plan: Plan, console: Console, title: str = "") -> None:
    """Print what each device holds and sends, and the time. Neighbouring ranks that are alike share a column.

    >>> from fmoe.models.decoder import preset
    >>> from fmoe.plan import plan
    >>> console = Console(width=60)
    >>> with console.capture() as shown:
    ...     report(plan(preset("debug", layers=2), batch_size=2, seq_len=16, device_type="cpu"), console)
    >>> print(shown.get().splitlines()[3])
    │ parameters          │       2.84 │
    """
    columns = [[*group] for _, group in groupby(plan.ranks, key=lambda r: r._replace(layers=()))]
    ranks = [group[0] for group in columns]
    notes = [f"{plan.tokens_per_device:,} tokens a device and step"]
    if plan.rows:
        notes.append(
            f"a token goes to {plan.copies_per_token:.2f} of {plan.mesh['ep']} devices along ep; the busiest "
            f"one gets {plan.rows.received:,} rows a dispatch, {plan.rows.expanded:,} for its experts"
        )
    if plan.schedule:
        stages = len(plan.schedule.stage_to_rank)
        notes.append(
            f"{stages} stages, schedule {plan.schedule.name}, {plan.schedule.micro_batches} micro-batches"
        )
    if plan.time:
        notes.append(_spoken(plan.time))
    unit, size = ("GiB", 2**30) if plan.peak >= 2**30 else ("MiB", 2**20)
    table = Table(f"{unit} a device", title=title or None, caption=". ".join(notes))
    table.columns[0].no_wrap = True
    for group in columns:
        table.add_column(_layers(group), justify="right")

    def row(name: str, of: Callable[[RankPlan], float], form: str = "{:,.2f}", unit: float = size) -> None:
        """A row, unless every rank has zero."""
        if any(map(of, ranks)):
            table.add_row(name, *(form.format(of(s) / unit) for s in ranks))

    def rows(indent: str, parts: Callable[[RankPlan], dict[str, int]]) -> None:
        for name in dict.fromkeys(name for s in ranks for name in parts(s)):
            row(indent + _NAMES.get(name, name), lambda s: parts(s).get(name, 0))  # noqa: B023

    rows("", lambda s: {part: getattr(s, part) for part in PARTS[:4]})
    row("saved activations", lambda s: sum(s.activations.values()))
    rows("  ", lambda s: s.activations)
    row("offloaded to the host", lambda s: s.offloaded)
    if plan.schedule:
        table.add_row("micro-batches in flight", *(str(s.in_flight) for s in ranks))
    table.add_row(end_section=True)
    rows("most in ", lambda s: s.peaks)
    row("peak", lambda s: s.peak, "[bold]{:,.2f}[/bold]")
    rows("  ", lambda s: {part: s.at_peak[part] for part in PARTS})
    rows("    ", _workspace)
    for purpose in ("tokens", "parameters", "sums", "pipeline"):
        row(f"sent a step: {purpose}", lambda s: s.sent.get(purpose, 0))  # noqa: B023
    if time := plan.time:
        table.add_row(end_section=True)
        ms = functools.partial(row, form="{:,.1f}", unit=1e-3)
        for kind in dict.fromkeys(kind for r in ranks for kind in r.seconds):
            ms(f"ms a step: {kind}", lambda r: r.seconds.get(kind, 0))  # noqa: B023
        for purpose in dict.fromkeys(purpose for r in ranks for purpose in r.exposed):
            ms(f"ms exposed: {purpose}", lambda r: r.exposed.get(purpose, 0))  # noqa: B023
        ms("ms idle", lambda r: time.seconds - r.busy)
    console.print(table)


def _spoken(time: Time) -> str:
    exposed = " + ".join(
        f"{seconds / time.seconds:.1%} {purpose}" for purpose, seconds in time.exposed.items()
    )
    return (
        f"{time.seconds * 1e3:,.1f} ms a step: {time.tokens_per_second:,.0f} tokens/s a device"
        + ("" if time.mfu is None else f", MFU {time.mfu:.2%}")
        + f", bubble {time.bubble:.1%}, exposed communication {exposed or 'none'}"
    )


def _workspace(rank: RankPlan) -> dict[str, int]:
    """The workspace at the peak by kind of operator, without kinds below a hundredth of the peak."""
    found = rank.workspaces[max(rank.peaks, key=rank.peaks.__getitem__)]
    return {kind: n for kind, n in found.items() if n > rank.peak / 100}


_NAMES = {"converted": "params to compute with", "activations": "saved activations"}


def _layers(ranks: list[RankPlan]) -> str:
    ends = zip(*(rank.layers for rank in ranks))  # of the first stages of all ranks, of the second ...
    listed = ", ".join(f"{min(a for a, _ in each)}-{max(b for _, b in each) - 1}" for each in ends)
    return f"layers {listed}" + (f"; {len(ranks)} ranks" if len(ranks) > 1 else "")
