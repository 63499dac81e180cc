"""Measuring layers side by side: time, rate, memory; gradients are checked before anything is timed."""

import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from rich.console import Console
from rich.table import Table

from ..errors import argument_error
from ..introspect import kept_bytes
from ..models.moe import MoEParams
from ..ops.kernels import grouped
from ..ops.route import route
from .layers import Layer, Shape, config_for, layers, plain_layer, random_params, skewed


class Measured(NamedTuple):
    """One layer.

    =============  ========================================
    forward, step  ms without and with backward, medians of rounds
    spread         the middle half of the steps over their median
    rate           TFLOP/s of the experts' products in a step
    share          of the rate of a large matrix product in the same run
    saved, peak    MiB beyond the arguments: between forward and backward, and at most
    launches       kernels started in a step; ``None`` where that can't be known, as ``peak``
    syncs          times the host waits for the device in a step
    error          largest relative error of output and gradients against float32
    =============  ========================================
    """

    layer: str
    forward: float
    step: float
    spread: float
    rate: float
    share: float
    saved: float
    peak: float | None
    launches: int | None
    syncs: int | None
    error: float


class Run(NamedTuple):
    """One forward and backward of every layer on the same arguments."""

    params: MoEParams
    x: torch.Tensor
    cotangent: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.params.router.weight_ED, *self.params.experts]

    def step(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        y = layer(self.params, self.x)
        return (y.detach(), *torch.autograd.grad(y, self.leaves(), self.cotangent))


def bench_layer(
    shape: Shape,
    *,
    routing: str = "random",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    rounds: int = 20,
    only: list[str] | None = None,
    align: Sequence[int] = (),
    seed: int | None = None,
) -> dict[str, Any]:
    """Measure every layer that can run here, on the same random weights and tokens.

    =========  ===============================================================
    shape      tokens, dimensions, experts
    routing    how tokens spread over experts, one of ``ROUTINGS``
    rounds     of a few steps of each layer in turn
    only       names of layers; ``None``: all
    align      multiples for :func:`fmoe.align_rows`: a layer more for each
    -> dict    what JSON can hold; ``layers`` has the fields of :class:`Measured`
    =========  ===============================================================

    Raises ``RuntimeError`` if a layer's output or gradient is wrong, and ``ValueError`` for fewer than two
    rounds.
    """
    check_number("bench_layer", "rounds", rounds)
    seed = time.time_ns() % 2**31 if seed is None else seed
    torch.manual_seed(seed)
    config = config_for(shape, routing)
    params = random_params(shape, seed, dtype=dtype, device=device)
    x = torch.randn(shape.tokens, shape.dim, device=device).to(dtype)
    params = skewed(params, x, config, routing)
    counts = route(params.router, x, config).counts_E
    run = Run(params, x, torch.randn_like(x))
    for leaf in run.leaves():
        leaf.requires_grad_()
    candidates = {n: f for n, f in layers(shape, config, align).items() if only is None or n in only}
    errors = _errors(run, candidates, shape, config)
    costs = {name: _costs(run, layer) for name, layer in candidates.items()}
    forward, step = _times(run, candidates, rounds)
    peak_rate = matmul_rate(dtype, device)
    rows = []
    for name in candidates:
        median = statistics.median(step[name])
        low, _, high = statistics.quantiles(step[name], n=4)
        rate = 3 * shape.flops / median / 1e9
        rows.append(
            Measured(
                name,
                statistics.median(forward[name]),
                median,
                (high - low) / median,
                rate,
                rate / peak_rate,
                *costs[name],
                errors[name],
            )._asdict()
        )
    w_in = params.experts.w_in.flatten(1, 2)
    how = x[:1], w_in.mT, x.new_empty(1, w_in.shape[1])
    engine = grouped.choice("mm transposed", *how, w_in.mT.shape).engine
    where = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    return dict(
        shape=shape._asdict(), routing=routing, dtype=str(dtype), device=where, torch=torch.__version__,
        seed=seed, rounds=rounds, matmul_tflops=peak_rate, engine=engine,
        overload=float(counts.max() / counts.float().mean()),
        layers=rows,
    )  # fmt: skip


def _errors(run: Run, candidates: dict[str, Layer], shape: Shape, config: Any) -> dict[str, float]:
    """The largest relative error (Frobenius) of output and gradients; raises if it is no rounding error."""
    ids = route(run.params.router, run.x, config).expert_ids_TK
    wide = Run(*optree.tree_map(lambda t: t.detach().float().requires_grad_(), tuple(run)))
    expected = wide.step(lambda params, x: plain_layer(params, x, shape.top_k, ids))
    errors = {}
    for name, layer in candidates.items():
        pairs = zip(run.step(layer), expected)
        errors[name] = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
        if not errors[name] < 0.05:
            raise RuntimeError(f"bench layer: {name}: relative error {errors[name]:.2g} against float32.")
    return errors


def _costs(run: Run, layer: Layer) -> tuple[float, float | None, int | None, int | None]:
    """MiB saved between forward and backward, MiB at the peak, kernel launches, host syncs."""
    if not run.x.is_cuda:
        return kept_bytes(layer, run.params, run.x) / 2**20, None, None, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(run.params, run.x)
    edge = torch.autograd.graph.get_gradient_edge(y)
    del y
    saved = torch.cuda.memory_allocated() - before
    grads = torch.autograd.grad(edge, run.leaves(), run.cotangent)
    peak = torch.cuda.max_memory_allocated() - before
    del edge, grads
    return saved / 2**20, peak / 2**20, launches(lambda: run.step(layer)), syncs(lambda: run.step(layer))


def syncs(call: Callable[[], Any]) -> int:
    """How often the host waits for the CUDA device in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) and "prototype" not in str(w.message) for w in caught)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels a call starts on the CUDA device."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _times(
    run: Run, candidates: dict[str, Layer], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Forward and step times; layers take turns, so that a disturbance hits all of them."""
    forward: dict[str, list[float]] = {name: [] for name in candidates}
    step: dict[str, list[float]] = {name: [] for name in candidates}

    def without_grad(layer: Layer) -> Any:
        with torch.no_grad():
            return layer(run.params, run.x)

    for times, call in ((forward, without_grad), (step, run.step)):
        for layer in candidates.values():
            call(layer)
        for _ in range(rounds):
            for name, layer in candidates.items():
                times[name].append(timed(functools.partial(call, layer), run.x.is_cuda))
    return forward, step


def timed(call: Callable[[], Any], on_cuda: bool, repeats: int = 3) -> float:
    """Milliseconds a call takes, of a few in a row: enough to hide the launch of the first."""
    if not on_cuda:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / repeats


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square matrix product on random data: 8192 on CUDA, 512 elsewhere."""
    on_cuda = torch.device(device).type == "cuda"
    size = 8192 if on_cuda else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, on_cuda) for _ in range(9)) / 1e9


def report(result: dict[str, Any], console: Console) -> None:
    """A table of one result."""
    shape = " ".join(f"{k}={v}" for k, v in result["shape"].items())
    console.print(
        f"{shape}, {result['routing']} routing (most loaded expert {result['overload']:.2f} times the mean), "
        f"{result['dtype']}, {result['device']}, torch {result['torch']}, "
        f"matrix product {result['matmul_tflops']:.1f} TFLOP/s, "
        f"our grouped products by {result['engine']!r}, seed {result['seed']}"
    )
    table = Table("layer", *("forward ms", "fwd+bwd ms", "spread", "TFLOP/s", "of matmul"),
                  *("saved MiB", "peak MiB", "launches", "syncs", "error"))  # fmt: skip
    for row in result["layers"]:
        m = Measured(**row)
        table.add_row(
            m.layer, f"{m.forward:.2f}", f"{m.step:.2f}", f"{m.spread:.1%}", f"{m.rate:.3g}",
            f"{m.share:.1%}", f"{m.saved:.1f}",
            *("-" if v is None else f"{v:.0f}" for v in (m.peak, m.launches, m.syncs)),
            f"{m.error:.1e}",
        )  # fmt: skip
    console.print(table)


def check_number(function: str, argument: str, number: int) -> None:
    """A spread is of at least two times."""
    if not isinstance(number, int) or number < 2:
        raise argument_error(
            function, argument, got=number, expected="an integer of at least 2", remedy="Measure more often."
        )


def write_json(result: Any, path: str) -> None:
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
