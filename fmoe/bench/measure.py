"""Measuring layers side by side: times, rate and memory. Gradients are checked before anything is timed."""

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import optree
import torch
from rich.console import Console
from rich.table import Column, Table

from ..errors import argument_error
from ..graphs import graphed
from ..introspect import kept_bytes
from ..models.moe import MoEParams
from ..ops.core import engine
from ..ops.experts import ExpertParams
from ..ops.kernels import grouped
from ..ops.kernels.scaled import keeping_rounded
from ..ops.precision import FAST
from ..ops.route import RouterConfig, route
from .layers import Layer, Shape, config_for, layers, plain_layer, random_params, skewed
from .peers import PEERS
from .timing import (
    check_number,
    in_turns,
    matmul_rate,
    of_host,
    on_device,
    one_line,
    or_dash,
    say,
    syncs,
    timed,
)

ROUNDING = 0.05  # a relative error below this is rounding
FP8_ROUNDING = 0.1  # the same of products in fp8


class Measured(NamedTuple):
    """One layer.

    =============  ========================================
    forward, step  ms without and with backward, medians of rounds
    spread         the middle half of the steps over their median
    device         ms of a step's kernels, by the profiler: what layers are compared by
    host           ms until the host has handed a step to an idle device
    replay         ms of a step replayed as a CUDA graph; ``None`` where none can hold it
    launches       kernels in a step
    rate           TFLOP/s of the experts' products in ``device``, on a CPU in ``step``
    share          ``rate`` over that of a large matrix product in the same run
    saved, peak    MiB beyond the arguments: between forward and backward, and at most
    syncs          how often the host waits for the device in a step
    error          largest relative error of output and gradients against float32
    =============  ========================================

    ``device``, ``host``, ``replay``, ``launches``, ``peak`` and ``syncs`` are ``None`` on a CPU, where they
    can't be known.

    >>> row = Measured("fmoe", 2.0, 6.0, 0.01, 5.5, 2.5, 5.75, 33, 450.0, 0.6, 90.0, 300.0, 0, 4e-3)
    >>> f"the device is idle for {1 - row.device / row.step:.0%} of a step, in a graph for 4%"
    'the device is idle for 8% of a step, in a graph for 4%'
    """

    layer: str
    forward: float
    step: float
    spread: float
    device: float | None
    host: float | None
    replay: float | None
    launches: float | None
    rate: float
    share: float
    saved: float
    peak: float | None
    syncs: int | None
    error: float


class Run(NamedTuple):
    """The arguments of a forward and backward, the same for every layer."""

    params: MoEParams
    x: torch.Tensor
    cotangent: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.params.router.weight_ED, *self.params.experts]

    def forward(self, layer: Layer) -> torch.Tensor:
        with torch.no_grad():
            return layer(self.params, self.x)

    def step(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        y = layer(self.params, self.x)
        return (y.detach(), *engine.grad(y, self.leaves(), self.cotangent))

    def arranged(self, layout: Callable[[ExpertParams], Any]) -> "Run":
        """The same arguments, with the experts' weights as a peer keeps them."""
        weights: Any = tuple(w.detach().requires_grad_() for w in layout(self.params.experts))
        return self._replace(params=self.params._replace(experts=weights))


class Apart(NamedTuple):
    """The parts of a step on CUDA; ``Measured`` says what they are."""

    device: float | None = None
    host: float | None = None
    replay: float | None = None
    launches: float | None = None


class Entry(NamedTuple):
    """A layer with its arguments, and what was found before anything is timed."""

    layer: Layer
    run: Run
    error: float
    costs: tuple[float, float | None, int | None]


def bench_layer(
    shape: Shape,
    *,
    routing: str = "random",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    rounds: int = 20,
    only: list[str] | None = None,
    align: Sequence[int] = (),
    precision: Sequence[str] = (),
    keep_rounded: bool = False,
    seed: int | None = None,
) -> dict[str, Any]:
    """Measure every layer that can run here, on the same random weights and tokens.

    ============  ===============================================================
    shape         tokens, dimensions, experts
    routing       how tokens spread over experts, one of ``ROUTINGS``
    rounds        of a few steps of each layer in turn
    only          names of layers; ``None``: all
    align         multiples for :func:`fmoe.align_rows`, each of which adds a layer
    precision     of the experts' products, as ``"fp8_rowwise"``, each of which adds a layer
    keep_rounded  whether these find weights that are rounded already, as in the later
                  micro-batches of a step
    -> dict       for JSON. ``layers`` has the fields of :class:`Measured`, ``not_measured``
                  the reasons of peers that didn't run, ``wrong`` the errors of wrong ones
    ============  ===============================================================

    It says on stderr how each layer was checked, and its times once they are known.

    Raises ``RuntimeError`` if a layer that is no peer has a wrong output or gradient. Raises ``ValueError``
    for fewer than two rounds, for names that no layer has, and for ``keep_rounded`` where no kernel rounds.

    >>> shape = Shape(tokens=64, dim=16, hidden=8, experts=4, top_k=2)
    >>> found = bench_layer(shape, dtype=torch.float32, device="cpu", rounds=2, only=["fmoe"], seed=0)
    >>> layer = Measured(**found["layers"][0])
    >>> layer.layer, layer.error < 1e-5, layer.peak  # on a CPU that isn't known
    ('fmoe', True, None)
    """
    check_number("bench_layer", "rounds", rounds)
    if keep_rounded and {*precision}.isdisjoint(FAST):
        fits, remedy = f"False without a precision of {FAST}", "Pass one, whose weights can be kept."
        raise argument_error("bench_layer", "keep_rounded", got=True, expected=fits, remedy=remedy)
    seed = time.time_ns() % 2**31 if seed is None else seed
    config = config_for(shape, routing)
    run = random_run(shape, config, routing, dtype, device, seed)
    expected = _reference(run, shape, config)
    found = layers(shape, config, align, precision)
    known = [*found, *PEERS]
    wanted = known if only is None else only
    if unknown := sorted({*wanted}.difference(known)):
        remedy = "Correct it, or pass the align or the precision that makes such a layer."
        raise argument_error(
            "bench_layer", "only", got=unknown, expected=f"names among {known}", remedy=remedy
        )
    with keeping_rounded(run.params.experts if keep_rounded else ()) as kept:
        in_fp8 = {f"fmoe, {name}" for name in precision}
        entries = {
            name: _entered(name, layer, run, expected, FP8_ROUNDING if name in in_fp8 else ROUNDING)
            for name, layer in found.items()
            if name in wanted
        }
        peers, not_measured, wrong = _peers(run, expected, shape, config, wanted)
        entries |= peers
        forward, step = (_times(entries, rounds, call) for call in (Run.forward, Run.step))
        for name in entries:
            alone, both = statistics.median(forward[name]), statistics.median(step[name])
            say(f"{name}: forward {alone:.2f} ms, with backward {both:.2f} ms")
        times = {name: (forward[name], step[name], apart) for name, apart in _apart(entries, rounds).items()}
    peak_rate = matmul_rate(dtype, device)
    w_in, counts = run.params.experts.w_in.flatten(1, 2).mT, route(run.params.router, run.x, config).counts_E
    product = run.x[:1], w_in, run.x.new_empty(1, w_in.shape[2])
    return dict(
        shape=shape._asdict(), routing=routing, dtype=str(dtype), torch=torch.__version__,
        device=torch.cuda.get_device_name() if run.x.is_cuda else "CPU", seed=seed, rounds=rounds,
        kept=any(weight.found for weight in kept),
        matmul_tflops=peak_rate, engine=grouped.choice("mm transposed", *product, w_in.shape).engine,
        overload=float(counts.max() / counts.float().mean()),
        layers=[
            _measured(name, entry, *times[name], 3 * shape.flops, peak_rate)._asdict()
            for name, entry in entries.items()
        ],
        not_measured=not_measured, wrong=wrong,
    )  # fmt: skip


def random_run(
    shape: Shape, config: RouterConfig, routing: str, dtype: torch.dtype, device: str, seed: int
) -> Run:
    """A layer's weights, tokens that spread as ``routing`` says, and a cotangent."""
    torch.manual_seed(seed)
    params = random_params(shape, seed, dtype=dtype, device=device)
    x = torch.randn(shape.tokens, shape.dim, device=device).to(dtype)
    run = Run(skewed(params, x, config, routing), x, torch.randn_like(x))
    for leaf in run.leaves():
        leaf.requires_grad_()
    return run


def _reference(run: Run, shape: Shape, config: RouterConfig) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float32, with the experts chosen in the run's dtype."""
    ids = route(run.params.router, run.x, config).expert_ids_TK
    wide = Run(*optree.tree_map(lambda t: t.detach().float().requires_grad_(), tuple(run)))
    return wide.step(lambda params, x: plain_layer(params, x, shape.top_k, ids))


def _entered(name: str, layer: Layer, run: Run, expected: tuple[torch.Tensor, ...], rounding: float) -> Entry:
    entry = _tried(name, layer, run, expected)
    if not entry.error < rounding:
        raise RuntimeError(f"bench layer: {name}: relative error {entry.error:.2g} against float32.")
    return entry


def _tried(name: str, layer: Layer, run: Run, expected: tuple[torch.Tensor, ...]) -> Entry:
    """Run every call that will be timed once. The error is the largest relative one, by Frobenius norms."""
    start = time.perf_counter()
    # With one expert per token, the router's gradient is rounding only.
    least = max(float(b.norm()) for b in expected) * 1e-5
    errors = [(a.float() - b).norm() / b.norm().clamp(min=least) for a, b in zip(run.step(layer), expected)]
    run.forward(layer)
    entry = Entry(layer, run, float(torch.stack(errors).max()), _costs(run, layer))  # max() misses NaN
    seconds = time.perf_counter() - start
    say(f"{name}: checked against float32 in {seconds:.1f} s, error {entry.error:.1e}")
    return entry


def _peers(
    run: Run, expected: tuple[torch.Tensor, ...], shape: Shape, config: RouterConfig, wanted: Collection[str]
) -> tuple[dict[str, Entry], dict[str, str], dict[str, float]]:
    """The installed peers that are right, the reasons why some didn't run, and the errors of wrong ones."""
    y, g_x, g_router, *g_experts = expected
    right, not_measured, wrong = {}, {}, {}
    for name, peer in PEERS.items():
        if name not in wanted or not importlib.util.find_spec(peer.package):
            continue
        try:
            layer = peer.make(shape, config)
            gradients = y, g_x, g_router, *peer.layout(ExpertParams(*g_experts))
            entry = _tried(name, layer, run.arranged(peer.layout), gradients)
        except Exception as error:  # any kind: another version, or an unfit shape or device
            not_measured[name] = one_line(error)
            say(f"{name}: not measured: {not_measured[name]}")
            continue
        if entry.error < ROUNDING:
            right[name] = entry
        else:
            wrong[name] = entry.error
    return right, not_measured, wrong


def _measured(
    name: str,
    entry: Entry,
    forward: list[float],
    step: list[float],
    apart: Apart,
    flops: int,
    peak_rate: float,
) -> Measured:
    median = statistics.median(step)
    low, _, high = statistics.quantiles(step, n=4)
    rate = flops / (median if apart.device is None else apart.device) / 1e9
    return Measured(
        name, statistics.median(forward), median, (high - low) / median, *apart, rate, rate / peak_rate,
        *entry.costs, entry.error,
    )  # fmt: skip


def _costs(run: Run, layer: Layer) -> tuple[float, float | None, int | None]:
    """MiB saved between forward and backward, MiB at the peak, host syncs."""
    if not run.x.is_cuda:
        return kept_bytes(layer, run.params, run.x) / 2**20, None, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(run.params, run.x)
    edge = torch.autograd.graph.get_gradient_edge(y)
    del y
    saved = torch.cuda.memory_allocated() - before
    grads = engine.grad(edge, run.leaves(), run.cotangent)
    peak = torch.cuda.max_memory_allocated() - before
    del edge, grads
    return saved / 2**20, peak / 2**20, syncs(functools.partial(run.step, layer))


def _apart(entries: dict[str, Entry], rounds: int) -> dict[str, Apart]:
    """The parts of each layer's step, which take turns as whole steps do; medians of rounds."""
    steps = {
        name: functools.partial(entry.run.step, entry.layer)
        for name, entry in entries.items()
        if entry.run.x.is_cuda
    }
    # Before profiles, which could slow it.
    hosts = [{name: of_host(call) for name, call in steps.items()} for _ in range(rounds)]
    turns = [{name: on_device(call) for name, call in steps.items()} for _ in range(rounds)]
    found = {name: Apart() for name in entries}
    for name, call in steps.items():
        device, launches = map(statistics.median, zip(*(turn[name] for turn in turns)))
        host = statistics.median(turn[name] for turn in hosts)
        say(f"{name}: device {device:.2f} ms, host {host:.2f} ms, {launches:.0f} launches")
        found[name] = Apart(device, host, _replay(call, rounds), launches)
    return found


def _replay(step: Callable[[], Any], rounds: int) -> float | None:
    """Milliseconds of a step as a CUDA graph, or ``None`` where a graph can't hold it."""
    replay = graphed(step)
    try:
        replay()
    except Exception:  # any kind, of a peer
        return None
    return statistics.median(timed(replay, on_cuda=True) for _ in range(rounds))


def _times(
    entries: dict[str, Entry], rounds: int, call: Callable[[Run, Layer], Any]
) -> dict[str, list[float]]:
    """Milliseconds of a call of each layer, after one that isn't timed."""
    calls = {name: functools.partial(call, entry.run, entry.layer) for name, entry in entries.items()}
    for once in calls.values():
        once()
    return in_turns(calls, rounds, any(entry.run.x.is_cuda for entry in entries.values()))


def report(result: dict[str, Any], console: Console) -> None:
    """Print a table of one result."""
    shape = " ".join(f"{k}={v}" for k, v in result["shape"].items())
    console.print(
        f"{shape}, {result['routing']} routing (most loaded expert {result['overload']:.2f} times the mean), "
        f"{result['dtype']}, {result['device']}, torch {result['torch']}, "
        f"matrix product {result['matmul_tflops']:.1f} TFLOP/s, "
        f"our grouped products by {result['engine']!r}, "
        f"{'weights in fp8 rounded before, ' if result['kept'] else ''}seed {result['seed']}"
    )
    times = "forward ms", "fwd+bwd ms", "spread", "device ms", "TFLOP/s", "of matmul", "host ms", "launches"
    costs = "replay ms", "saved MiB", "peak MiB", "syncs"
    layer, error = (Column(name, no_wrap=True) for name in ("layer", "error"))
    table = Table(layer, *times, *costs, error)
    for row in result["layers"]:
        m = Measured(**row)
        table.add_row(
            m.layer, f"{m.forward:.2f}", f"{m.step:.2f}", f"{m.spread:.1%}", or_dash(m.device, ".2f"),
            f"{m.rate:.3g}", f"{m.share:.1%}", or_dash(m.host, ".2f"), or_dash(m.launches, ".0f"),
            or_dash(m.replay, ".2f"), f"{m.saved:.1f}", or_dash(m.peak, ".0f"), or_dash(m.syncs, ".0f"),
            f"{m.error:.1e}",
        )  # fmt: skip
    for name, error in result["wrong"].items():
        table.add_row(name, *["-"] * 12, f"{error:.1e}, wrong")
    console.print(table)
    for name, reason in result["not_measured"].items():
        console.print(f"{name}: not measured: {reason}", markup=False, highlight=False, soft_wrap=True)
