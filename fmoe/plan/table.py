"""A plan as a table."""

from itertools import groupby

from rich.console import Console
from rich.table import Table

from .planning import Plan
from .stage import PARTS, StagePlan


def report(plan: Plan, console: Console, title: str = "") -> None:
    """Print what each device holds and sends, in MiB or GiB. Stages of equal sizes share a column.

    >>> from fmoe.models.deepseek_v3 import preset
    >>> from fmoe.plan import plan
    >>> console = Console(width=60)
    >>> with console.capture() as shown:
    ...     report(plan(preset("debug", layers=2), batch_size=2, seq_len=16, device_type="cpu"), console)
    >>> print(shown.get().splitlines()[3])
    │ parameters          │       2.84 │
    """
    columns = [[*group] for _, group in groupby(plan.stages, key=lambda s: s._replace(layers=(0, 0)))]
    pp, kinds = plan.mesh["pp"], list(dict.fromkeys(k for s in plan.stages for k in s.activations))
    notes = [f"{plan.tokens_per_device:,} tokens a device and step"]
    if plan.rows:
        notes.append(
            f"a token goes to {plan.copies_per_token:.2f} of {plan.mesh['ep']} devices along ep; the busiest "
            f"one gets {plan.rows.received:,} rows a dispatch, {plan.rows.expanded:,} for its experts"
        )
    if pp > 1:
        notes.append(f"layers divided over pp={pp}, micro-batches in flight as in 1F1B; not trained yet")
    unit, size = ("GiB", 2**30) if plan.peak >= 2**30 else ("MiB", 2**20)

    def shown(nbytes: int) -> str:
        return f"{nbytes / size:,.2f}"

    table = Table(f"{unit} a device", title=title or None, caption=". ".join(notes))
    table.columns[0].no_wrap = True
    for group in columns:
        table.add_column(_layers(group), justify="right")

    def row(name: str, *values: str, end: bool = False) -> None:
        table.add_row(name, *values, end_section=end)

    stages = [group[0] for group in columns]
    for part in ("parameters", "converted", "gradients", "optimizer"):
        if any(getattr(s, part) for s in stages):
            row(_NAMES.get(part, part), *(shown(getattr(s, part)) for s in stages))
    row("saved activations", *(shown(sum(s.activations.values())) for s in stages))
    for kind in kinds:
        row(f"  {kind}", *(shown(s.activations.get(kind, 0)) for s in stages))
    if pp > 1:
        row("micro-batches in flight", *(str(s.in_flight) for s in stages))
    row("", *[""] * len(stages), end=True)
    for phase in stages[0].peaks:
        row(f"most in {phase}", *(shown(s.peaks[phase]) for s in stages))
    row("peak", *(f"[bold]{shown(s.peak)}[/bold]" for s in stages))
    for part in PARTS:
        if any(s.at_peak[part] for s in stages):
            row(f"  {_NAMES.get(part, part)}", *(shown(s.at_peak[part]) for s in stages))
    for kind in dict.fromkeys(k for s in stages for k in _workspace(s)):
        row(f"    {kind}", *(shown(_workspace(s).get(kind, 0)) for s in stages))
    for purpose in ("tokens", "parameters", "sums"):
        if any(s.sent.get(purpose) for s in stages):
            row(f"sent a step: {purpose}", *(shown(s.sent.get(purpose, 0)) for s in stages))
    console.print(table)


def _workspace(stage: StagePlan) -> dict[str, int]:
    """The workspace at the peak by kind of operator, without kinds below a hundredth of the peak."""
    found = stage.workspaces[max(stage.peaks, key=stage.peaks.__getitem__)]
    return {kind: n for kind, n in found.items() if n > stage.peak / 100}


_NAMES = {"converted": "params to compute with", "activations": "saved activations"}


def _layers(stages: list[StagePlan]) -> str:
    first, last = stages[0].layers[0], stages[-1].layers[1] - 1
    return f"layers {first}-{last}" + (f", {len(stages)} stages" if len(stages) > 1 else "")
