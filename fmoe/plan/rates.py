"""Rates of a device and its links, measured or assumed: what turns a plan's work into time."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import argument_error
from ..parallel.mesh import AXES
from .work import IN_FP8, Work

PRODUCTS = ("products", "experts", "attention", "attention_backward", "loss")


class Link(NamedTuple):
    """A device's link to others along some axes.

    ====================  ================================================================
    ``bytes_per_second``  that a device sends, in a ring or to one other
    ``latency``           seconds until they begin
    ``all_to_all``        bytes a second of tokens, which go to all others at once; ``None``: the same
    ====================  ================================================================

    A ring crosses a node's border in one of its devices, so it can be much faster than an all-to-all.

    >>> Link(2e11, all_to_all=5e10).of("tokens")
    50000000000.0
    """

    bytes_per_second: float
    latency: float = 0.0
    all_to_all: float | None = None

    def of(self, purpose: str) -> float:
        return (purpose == "tokens" and self.all_to_all) or self.bytes_per_second


class Rates(NamedTuple):
    """The rates of one device, in one dtype, and of its links.

    ===============  =====================================================================
    ``device``       its name
    ``dtype``        of the arithmetic, as ``"bfloat16"``
    ``peak_flops``   a second, by its vendor; MFU is a share of them. ``None``: unknown
    ``flops``        a second, of ``products``, ``experts``, ``attention``, ``attention_backward``, ``loss``;
                     where there are products in fp8, of ``products_fp8`` and ``experts_fp8``
    ``memory``       bytes a second that are read or written
    ``optimizer``    the same in a fused AdamW
    ``launch``       seconds that the shortest kernel takes
    ``links``        along each axis of the mesh that has more than one device, or along several, as
                     ``"dp,ep"``; by default these are as slow as the slowest
    ``sources``      where rates are from, in words
    ===============  =====================================================================

    ``python -m fmoe bench rates`` measures all but the links.

    >>> flops = dict.fromkeys(PRODUCTS, 1e12)
    >>> rates = Rates("a CPU", "float32", None, flops, memory=1e10, optimizer=1e10, launch=1e-6)
    >>> rates.seconds(Work("products", flops=3e12, moved=1e10, passed=2e10))
    5.0
    """

    device: str
    dtype: str
    peak_flops: float | None
    flops: Mapping[str, float]
    memory: float
    optimizer: float
    launch: float
    links: Mapping[str, Link] = {}
    sources: Mapping[str, str] = {}

    def seconds(self, work: Work) -> float:
        """The time of an operator's products or of what they move, whichever is longer, and of its passes."""
        moved = work.moved / (self.optimizer if work.rate == "optimizer" else self.memory)
        products = work.flops / self.flops[work.rate] if work.flops else 0.0
        return max(self.launch, max(products, moved) + work.passed / self.memory)

    def sending(self, nbytes: float, along: str, purpose: str) -> float:
        """The time in which each device sends so many bytes along one axis or several, as ``"dp,ep"``."""
        found = [self.links[a] for a in ([along] if along in self.links else along.split(","))]
        return max(link.latency + nbytes / link.of(purpose) for link in found)


def read_rates(path: str | Path) -> Rates:
    """The rates of a JSON file, as ``python -m fmoe bench rates`` writes it. Other entries are ignored.

    Raises ``ValueError`` for a file without one of the rates, and for rates that aren't above 0.

    >>> import tempfile
    >>> rates = dict(device="mine", dtype="float32", memory=1e10, optimizer=1e10, launch=1e-6)
    >>> rates |= dict(flops=dict.fromkeys(PRODUCTS, 1e12), links={"ep": {"bytes_per_second": 5e10}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "mine.json")
    ...     size = path.write_text(json.dumps(rates))
    ...     read_rates(path).links["ep"]
    Link(bytes_per_second=50000000000.0, latency=0.0, all_to_all=None)
    """

    def error(where: str, got: Any, expected: str) -> ValueError:
        remedy = "Measure a file with python -m fmoe bench rates."
        return argument_error("read_rates", where, got=got, expected=expected, remedy=remedy)

    def number(where: str, value: Any, least: float = math.ulp(0.0)) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
            raise error(f"{path}: {where}", repr(value), "a finite number above 0")
        return float(value)

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise error("path", cause, "a readable JSON file") from cause
    if not isinstance(found, dict):
        raise error(str(path), type(found).__name__, "an object")
    flops, links, others = found.get("flops"), found.get("links", {}), ("memory", "optimizer", "launch")
    if not isinstance(flops, dict) or missing(flops):
        raise error(f"{path}: flops", repr(flops), f"rates of {', '.join(PRODUCTS)}")
    wrong = not isinstance(links, dict) or not all(isinstance(link, dict) for link in links.values())
    if wrong or {axis for along in links for axis in along.split(",")} - {*AXES}:
        raise error(f"{path}: links", repr(links), f"an object for each of some of the axes {AXES}")
    peak = found.get("peak_flops")
    return Rates(
        device=str(found.get("device")),
        dtype=str(found.get("dtype")),
        peak_flops=None if peak is None else number("peak_flops", peak),
        flops={
            name: number(f"flops.{name}", flops[name])
            for name in (*PRODUCTS, *IN_FP8.values())
            if name in flops
        },
        links={
            along: Link(
                number(f"links.{along}.bytes_per_second", link.get("bytes_per_second")),
                number(f"links.{along}.latency", link.get("latency", 0.0), least=0.0),
                number(f"links.{along}.all_to_all", link["all_to_all"]) if "all_to_all" in link else None,
            )
            for along, link in links.items()
        },
        sources={str(k): str(v) for k, v in dict(found.get("sources") or {}).items()},
        **{name: number(name, found.get(name)) for name in others},
    )


def missing(flops: Mapping[str, Any]) -> set[str]:
    return {*PRODUCTS} - {*flops}
