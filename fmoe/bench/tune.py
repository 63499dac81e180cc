"""Choosing the engine and tile of each of a layer's grouped products by measuring whole steps.

Measuring single products misleads: at its power limit, a card pays in clocks for a choice that draws more.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..models.moe import moe_forward
from ..ops.kernels import gathered, grouped, tuned
from ..ops.kernels.tuned import Choice, Tile
from .layers import Shape, config_for
from .measure import Run, random_run
from .timing import check_number, one_line, or_dash, say, timed

TILES = [
    Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 128, 8, 2), Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 3),
]  # fmt: skip
QUACK_TILES = [  # of four warps, which take turns, or of eight together
    Tile(rows, cols, 64, warps, 0, cluster)
    for cluster in (1, 2)
    for rows, cols, warps in [
        (128, 128, 4), (128, 192, 4), (192, 128, 4), (128, 224, 8), (256, 128, 8), (256, 192, 8),
        (128, 256, 8),
    ]
]  # fmt: skip
GAIN = 0.01  # the share of a step's time that another choice must save
ROUNDING = 0.02  # the most that another choice's results may differ


class Tuned(NamedTuple):
    """One product: its choices, ms of a step with each (``None`` if it can't run), and the best."""

    product: str
    choices: list[Choice]
    ms: list[float | None]
    best: Choice


def tune(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    rounds: int = 9,
    seed: int | None = None,
) -> list[Tuned]:
    """Find the fastest choice for each product of a layer's step in turn, and keep all in a file.

    =======  ===============================================================
    shape    tokens, dimensions, experts
    rounds   of a few steps with each choice in turn
    -> list  a :class:`Tuned` for each product
    =======  ===============================================================

    The first choice stays unless another makes the median step faster by a hundredth. Each choice is said on
    stderr at once.

    Raises ``RuntimeError`` if one gives other gradients, and ``ValueError`` for fewer than two rounds.
    """
    check_number("tune", "rounds", rounds)
    seed = time.time_ns() % 2**31 if seed is None else seed
    config = config_for(shape, "random")
    run = random_run(shape, config, "random", dtype, device, seed)
    step = functools.partial(run.step, functools.partial(moe_forward, router=config))
    tuned.write(run.x.device, {})  # before measuring, which would be lost if writing failed
    best: dict[str, Choice] = {}
    found = []
    for product, choices, meanwhile in _comparisons(run, shape, dtype):
        with tuned.using(run.x.device, best | meanwhile):
            ms = _compare(product, choices, step, rounds, run.x.device)
        first, fastest = ms[0], min(time for time in ms if time is not None)
        assert first is not None
        best[product] = choices[0] if fastest > first * (1 - GAIN) else choices[ms.index(fastest)]
        found.append(Tuned(product, choices, ms, best[product]))
        say(f"tune: {product}: {_words(best[product])}, {ms[choices.index(best[product])]:.3f} ms a step")
    tuned.write(run.x.device, best)
    return found


def products(shape: Shape, dtype: torch.dtype) -> list[str]:
    """The grouped products of a step: forward, and for the gradients of the rows and the weights."""
    up, down = (shape.dim, 2 * shape.hidden), (shape.hidden, shape.dim)
    kinds = [("mm transposed", up), ("mm transposed", down)]
    kinds += [(kind, sizes[::-1]) for kind in ("mm", "outer") for sizes in (down, up)]
    return [tuned.key(kind, (shape.experts, *sizes), dtype) for kind, sizes in kinds]


def candidates(run: Run) -> list[Choice]:
    """The choices that can compute the products here. The first is used without tuning."""
    w_in = run.params.experts.w_in.flatten(1, 2)
    engines = grouped.engines(run.x[:1], w_in.mT, run.x.new_empty(1, w_in.shape[1]))
    found = [Choice(engine) for engine in engines]
    return found + [Choice("triton", tile) for tile in TILES] if "triton" in engines else found


def _comparisons(
    run: Run, shape: Shape, dtype: torch.dtype
) -> list[tuple[str, list[Choice], dict[str, Choice]]]:
    """What to compare, in order: a product, its choices, and those of others meanwhile.

    Where quack-kernels can run, their products come first, then the others, and whole layers of both last.
    """
    able, w_in = candidates(run), run.params.experts.w_in
    if not gathered.able(run.x, w_in):
        return [(product, able, {}) for product in products(shape, dtype)]
    sizes, (apart, together) = gathered.sizes(w_in), (Choice(able[0].engine), Choice(gathered.ENGINE))
    layer, rows_each = tuned.key("layer", sizes, dtype), shape.tokens * shape.top_k // shape.experts
    return [
        *(
            (
                gathered.key(product, sizes, dtype),
                _tiles(gathered.usual(product, shape.hidden, rows_each)),
                {layer: together},
            )
            for product in gathered.PRODUCTS
        ),
        *((product, able, {layer: apart}) for product in products(shape, dtype)),
        (layer, [apart, together], {}),
    ]


def _tiles(first: Tile) -> list[Choice]:
    """Choices of quack-kernels, that without tuning in front."""
    return [Choice(gathered.ENGINE, tile) for tile in dict.fromkeys([first, *QUACK_TILES])]


def _compare(
    product: str, able: list[Choice], step: Callable[[], Any], rounds: int, device: torch.device
) -> list[float | None]:
    """The median ms of a step with each choice, taking turns; ``None`` for one that the device can't run."""
    with tuned.using(device, {product: able[0]}):
        expected = step()
    times: dict[Choice, list[float]] = {able[0]: []}
    for choice in able[1:]:
        try:
            with tuned.using(device, {product: choice}):
                got = step()
        except Exception as error:  # Triton raises several kinds for a tile that needs too much
            say(f"tune: {_words(choice)} can't run here: {one_line(error)}")
            continue
        times[choice] = []
        errors = [(a - b).float().norm() / b.float().norm() for a, b in zip(got, expected)]
        worst = float(torch.stack(errors).max())  # NaN if any is
        if not worst < ROUNDING:
            raise RuntimeError(f"tune: {choice} gives other results, by {worst:.2g} of their norm.")
    for _ in range(rounds):
        for choice, each in times.items():
            with tuned.using(device, {product: choice}):
                each.append(timed(step, device.type == "cuda"))
    return [statistics.median(times[choice]) if choice in times else None for choice in able]


def _words(choice: Choice) -> str:
    return f"{choice.engine} {'x'.join(map(str, choice.tile or ()))}".rstrip()


def report(found: list[Tuned], console: Console) -> None:
    """Print a column for each product: ms of a step with each choice."""
    table = Table("ms of a step with", *(each.product for each in found))
    for choice in dict.fromkeys(choice for each in found for choice in each.choices):
        times = [dict(zip(each.choices, each.ms)).get(choice) for each in found]
        cells = [or_dash(ms, ".3f") for ms in times]
        best = [f"[bold]{c}[/bold]" if each.best == choice else c for c, each in zip(cells, found)]
        table.add_row(_words(choice), *best)
    console.print(table)
