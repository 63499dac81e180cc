"""Training steps of a model: speed, memory beside the plan, and where the time goes."""

import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..errors import argument_error
from ..models import decoder
from ..models.config import DecoderConfig
from ..ops.precision import Recipe, recipe_of
from ..plan import Rates, plan
from ..training import data as text
from ..training.documents import read_documents
from ..training.metrics import PEAK_FLOPS
from ..training.optim import Optimizer, adamw
from ..training.step import training_step
from ..transforms import per_layer, value_and_grad
from .breakdown import breakdown
from .timing import check_number, matmul_rate, of_host, or_dash, syncs

Batch = tuple[torch.Tensor, ...]
Step = Callable[[Batch], torch.Tensor]

WARM_UP = 3
BIAS_RATE, LEARNING_RATE = 1e-3, 1e-4


def bench_model(
    config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    steps: int = 20,
    remat: str = "none",
    compiled: bool = False,
    graph: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    moments_dtype: torch.dtype | None = None,
    precision: str | Recipe | None = None,
    balanced: bool = False,
    data: str | None = None,
    segments: int | None = None,
    device: str = "cuda",
    trace: str | None = None,
    seed: int | None = None,
    rates: Rates | None = None,
) -> dict[str, Any]:
    """Train for a few steps on one device and measure them.

    =========  ===============================================================
    steps      to time, after a few that aren't
    remat      words of ``transforms.per_layer``
    graph      hold the step in a CUDA graph; then its kernels' kinds aren't known
    precision  of products, as for :func:`fmoe.models.decoder.loss`
    balanced   choose experts round robin, whatever their scores
    data       a file of text, read as bytes; ``None``: random tokens
    segments   as many segments a row, about equally long; ``None``: no segment ids
    trace      where to write a profile of one step
    rates      this device's, to plan the time with; ``None``: the time isn't planned
    -> dict    for JSON: ms, bytes, FLOP/s, shares of a step's time
    =========  ===============================================================

    Raises ``RuntimeError`` if the first loss isn't that of an untrained model, or the last isn't finite.
    Raises ``ValueError`` for fewer than two steps, for what :func:`fmoe.plan.plan` refuses, and for a step on
    a CPU that needs more memory than there is.

    >>> config = decoder.preset("debug", layers=2)
    >>> how = dict(batch_size=2, seq_len=16, steps=2, dtype=torch.float32, device="cpu", seed=0)
    >>> found = bench_model(config, **how)
    >>> round(found["first_loss"] / math.log(config.vocab_size), 1), round(sum(found["shares"].values()), 3)
    (1.0, 1.0)
    """
    check_number("bench_model", "steps", steps)
    if segments is not None and not 1 <= segments <= seq_len:
        expected = f"1 to seq_len={seq_len}, or None"
        raise argument_error("bench_model", "segments", got=segments, expected=expected)
    seed = time.time_ns() % 2**31 if seed is None else seed
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, force_balance=balanced))
    recipe = recipe_of("bench_model", precision)
    compute_dtype, moments_dtype = compute_dtype or dtype, moments_dtype or dtype
    optimizer, on_cuda = adamw(moments_dtype=moments_dtype), torch.device(device).type == "cuda"
    whole = plan(
        config, batch_size=batch_size, seq_len=seq_len, dtype=dtype, compute_dtype=compute_dtype,
        per_layer=per_layer(remat), optimizer=optimizer, device_type=torch.device(device).type,
        segments=(segments or 1) > 1, rates=rates, compiled=compiled, precision=recipe,
    )  # fmt: skip
    (planned,) = whole.ranks
    if not on_cuda:
        _check_memory(planned.peak)
    wrap = per_layer(remat, compiled=compiled)
    how: dict[str, Any] = dict(config=config, dtype=compute_dtype, precision=recipe, per_layer=wrap)

    def loss(params: Any, tokens: Any, targets: Any, segment_ids: Any = None) -> Any:
        return decoder.loss(params, tokens, targets, segment_ids=segment_ids, **how)

    start = functools.partial(decoder.init, config, seed, dtype=dtype, device=device)
    step = _training(loss, start(), optimizer, graph)  # no other name for the params
    batches = _batches(config, batch_size, seq_len, data, segments, device, seed)
    found = _measured(step, batches, steps, math.log(config.vocab_size), on_cuda, trace)
    if graph:  # PyTorch doesn't count what a graph holds
        found["peak_bytes"] = None
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    settings = dict(
        layers=config.num_layers, dense_layers=config.num_dense_layers,
        num_params=decoder.num_params(config)[0], batch_size=batch_size, seq_len=seq_len, steps=steps,
        remat=remat, compiled=compiled, graph=graph, dtype=str(dtype), compute_dtype=str(compute_dtype),
        moments_dtype=str(moments_dtype), balanced=balanced, data=data or "random tokens",
        segments=segments, precision=dataclasses.asdict(recipe),
        device=name, torch=torch.__version__, seed=seed,
    )  # fmt: skip
    tokens_per_second, peak = batch_size * seq_len / found["ms"] * 1e3, found["peak_bytes"]
    rate = decoder.flops_per_token(config, seq_len) * tokens_per_second / 1e12
    matmul, vendors = matmul_rate(compute_dtype, device), PEAK_FLOPS.get(name)
    return settings | found | dict(
        tokens_per_second=tokens_per_second, tflops_per_second=rate,
        mfu=rate * 1e12 / vendors if vendors else None, matmul_tflops=matmul, mfu_of_matmul=rate / matmul,
        planned_bytes=planned.peak, planned=planned._asdict(),
        planned_over_peak=planned.peak / peak if peak else None,
        planned_ms=whole.time and whole.time.seconds * 1e3,
        planned_over_ms=whole.time and whole.time.seconds * 1e3 / found["ms"],
    )  # fmt: skip


def _check_memory(needed: int) -> None:
    """Raise ``ValueError`` if the step needs more bytes than this machine has."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        got = f"a step that needs {needed / 2**30:.1f} GiB"
        expected = f"at most {there / 2**30:.1f} GiB, the memory of this machine"
        remedy = "Take fewer layers, a smaller batch, or a GPU."
        raise argument_error("bench_model", "config", got=got, expected=expected, remedy=remedy)


def _measured(
    step: Step, batches: Iterator[Batch], steps: int, untrained: float, on_cuda: bool, trace: str | None
) -> dict[str, Any]:
    """Measure a first step, then ``steps`` after a few that warm up, and one more for each tool.

    Raises ``RuntimeError`` if the first loss isn't near ``untrained``, or the last isn't finite.
    """
    start = time.perf_counter()
    first_loss = step(next(batches)).item()
    first_ms = (time.perf_counter() - start) * 1e3
    if not abs(first_loss - untrained) < 0.1 * untrained:
        raise RuntimeError(
            f"bench model: the first loss is {first_loss:.3f}, of an untrained model {untrained:.3f}."
        )
    for _ in range(WARM_UP - 1):
        step(next(batches))
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    ms, last_loss = _times(step, [next(batches) for _ in range(steps)], on_cuda)
    median, peak = statistics.median(ms), torch.cuda.max_memory_allocated() if on_cuda else None
    if not math.isfinite(last_loss):
        raise RuntimeError(f"bench model: the last loss is {last_loss}.")
    host_ms = _host_ms(step, [next(batches) for _ in range(3)]) if on_cuda else median
    shares, device_ms = breakdown(functools.partial(step, next(batches)), on_cuda, trace)
    waits = syncs(functools.partial(step, next(batches))) if on_cuda else None
    low, _, high = statistics.quantiles(ms, n=4)
    return dict(
        first_ms=first_ms, first_loss=first_loss, last_loss=last_loss, ms=median,
        spread=(high - low) / median, host_ms=host_ms, device_ms=device_ms, syncs=waits,
        peak_bytes=peak, shares=shares,
    )  # fmt: skip


def _training(
    loss: Callable[..., Any], params: decoder.ModelParams, optimizer: Optimizer, graph: bool
) -> Step:
    """A step like that of a training loop, which trains ``params`` in place."""
    gradient, state = value_and_grad(loss, has_aux=True), optimizer.init(params)
    train = training_step(gradient, optimizer, max_norm=1.0, bias_rate=BIAS_RATE, graph=graph)

    def step(batch: Batch) -> torch.Tensor:
        nonlocal params, state
        params, state, value, *_ = train(params, state, LEARNING_RATE, *batch)
        return value

    return step


def _batches(
    config: DecoderConfig,
    batch_size: int,
    seq_len: int,
    data: str | None,
    segments: int | None,
    device: str,
    seed: int,
) -> Iterator[Batch]:
    if data is None:
        generator = torch.Generator().manual_seed(seed)
        stream = torch.randint(config.vocab_size, (2**20,), generator=generator)
    else:
        stream = text.pack(read_documents([data]))
        text.check_vocabulary(stream, config.vocab_size)
    ids = (torch.arange(seq_len, device=device) * (segments or 1) // seq_len + 1).expand(batch_size, -1)
    for batch in text.batches(stream, batch_size=batch_size, seq_len=seq_len, seed=seed, device=device):
        yield batch if segments is None else (*batch, ids)


def _times(step: Step, batches: list[Batch], on_cuda: bool) -> tuple[list[float], float]:
    """Milliseconds of each step, and the last loss. Nothing waits between steps."""

    def now() -> Any:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    clock: Callable[[], Any] = now if on_cuda else time.perf_counter
    marks = [clock()]
    for batch in batches:
        loss = step(batch)
        marks.append(clock())
    last = loss.item()
    pairs = itertools.pairwise(marks)
    return [a.elapsed_time(b) if on_cuda else (b - a) * 1e3 for a, b in pairs], last


def _host_ms(step: Step, batches: list[Batch]) -> float:
    """Milliseconds until the host has handed a step to an idle device, for which it needn't wait."""
    return statistics.median(of_host(functools.partial(step, batch)) for batch in batches)


def report(result: dict[str, Any], console: Console, title: str = "a model") -> None:
    """Print tables of one result."""
    r = result
    console.print(
        f"{title}: {r['layers']} layers ({r['dense_layers']} dense), {r['num_params'] / 1e9:.3g}B "
        f"parameters {r['dtype']}, moments {r['moments_dtype']}, computing in {r['compute_dtype']}; "
        f"batch {r['batch_size']} x {r['seq_len']} of {r['data']}"
        f"{'' if r['segments'] is None else ', segments a row: ' + str(r['segments'])}"
        f"{', experts balanced' if r['balanced'] else ''}; remat {r['remat']}"
        f"{_recipe(r['precision'])}{', compiled' if r['compiled'] else ''}"
        f"{', graphed' if r['graph'] else ''}; "
        f"{r['device']}, torch {r['torch']}, seed {r['seed']}"
    )
    rows = {
        "tokens/s": f"{r['tokens_per_second']:,.0f}",
        "ms a step (spread)": f"{r['ms']:.2f} ({r['spread']:.1%})",
        "host ms, device at work ms": f"{r['host_ms']:.2f}, {or_dash(r['device_ms'], '.2f')}",
        "first step ms": f"{r['first_ms']:,.0f}",
        "host waits a step": or_dash(r["syncs"], "d"),
        "model TFLOP/s": f"{r['tflops_per_second']:.3g}",
        "of the vendor's peak (MFU)": or_dash(r["mfu"], ".1%"),
        "of a matrix product here": f"{r['mfu_of_matmul']:.1%} of {r['matmul_tflops']:.1f} TFLOP/s",
        "peak memory GiB": or_dash(r["peak_bytes"] and r["peak_bytes"] / 2**30, ".2f"),
        "planned GiB (planned / peak)": f"{r['planned_bytes'] / 2**30:.2f} "
        f"({or_dash(r['planned_over_peak'], '.3f')})",
        "planned ms (planned / measured)": f"{or_dash(r['planned_ms'], '.2f')} "
        f"({or_dash(r['planned_over_ms'], '.3f')})",
        "loss, first and last": f"{r['first_loss']:.3f}, {r['last_loss']:.3f}",
    }
    planned = r["planned"]["seconds"]
    table, times = Table("a training step", ""), Table("of its time", "", *["planned ms"] * bool(planned))
    for row in rows.items():
        table.add_row(*row)
    for kind, share in r["shares"].items():
        ms = planned.get(kind, 0.0) * 1e3
        times.add_row(kind, f"{share:.1%}", *[f"{ms:.2f}"] * bool(planned))
    console.print(table)
    console.print(times)


def _recipe(precision: dict[str, str | None]) -> str:
    of = [f"{kind} in {name}" for kind, name in precision.items() if name]
    return f", products of {', of '.join(of)}" if of else ""
