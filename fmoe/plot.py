"""The loss of a run as an SVG picture."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from .errors import argument_error


def plot_loss(
    records: Sequence[Mapping[str, Any]], path: str | Path, *, reference: Mapping[str, float] = {}
) -> None:
    """Write the loss of each step as an SVG picture: points, a moving average, dashed reference lines.

    ``records`` are those of :func:`fmoe.metrics.read_metrics`; losses that are not finite are left out.
    ``reference`` maps labels to losses, such as the entropy of single bytes. Raises ``ValueError`` without
    a loss.

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
