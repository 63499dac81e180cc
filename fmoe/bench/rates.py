"""Measuring the rates of this device, for the time of plans (:mod:`fmoe.plan.rates`)."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from ..ops.attention import attention, attention_backward
from ..ops.bases import scaled_grouped_mm, scaled_grouped_outer
from ..ops.core.axes import axis_sizes, group_of
from ..ops.core.primitive import Operator
from ..ops.cross_entropy import LOGITS_BYTES, cross_entropy_sum, cross_entropy_terms
from ..ops.dispatch import dispatch
from ..ops.experts import experts_down, experts_down_backward, experts_up, experts_up_backward
from ..ops.experts_kernels import layout_of
from ..ops.kernels import scaled
from ..ops.precision import ROWWISE
from ..ops.route import RouterParams, route
from ..parallel.collective_ops import all_gather_op, all_to_all_op
from ..parallel.placement import token_axes
from ..plan.rates import PRODUCTS, Rates
from ..plan.work import IN_FP8, Work, Works
from ..training.metrics import PEAK_FLOPS
from ..training.optim import adamw
from .layers import SHAPES, Shape, by_engine, config_for

SECONDS = 0.05  # for which a call is repeated on CUDA, so that the device is as warm as in training
LAUNCHES = 200

Call = Callable[[], Any]
Make = Callable[[Callable[..., torch.Tensor]], Call]  # of a function that makes random tensors


class Sizes(NamedTuple):
    """What is measured.

    ==============  ==================================================================
    ``products``    rows, and of a weight the inputs and outputs
    ``experts``     shapes of layers
    ``attention``   sequences, length, heads, and the widths of keys and values
    ``losses``      tokens, dimension, entries of the vocabulary
    ``numbers``     of a copy, and of each of the optimizer's four trees
    ==============  ==================================================================
    """

    products: list[tuple[int, int, int]]
    experts: list[Shape]
    attention: list[tuple[int, int, int, int, int]]
    losses: list[tuple[int, int, int]]
    numbers: int


# The layers of DeepSeek-V3's 16B with four sequences of 4096, and of 671B with one.
LARGE = Sizes(
    [
        *[(16384, *io) for io in ((2048, 3072), (2048, 576), (512, 4096), (2048, 2048), (2048, 5632))],
        *[(16384, *io) for io in ((2816, 2048), (2048, 21888), (10944, 2048))],
        *[(4096, *io) for io in ((7168, 1536), (1536, 24576), (7168, 576), (512, 32768), (16384, 7168))],
        *[(4096, *io) for io in ((7168, 4096), (2048, 7168), (7168, 36864), (18432, 7168))],
    ],
    [SHAPES["16B"], SHAPES["671B-like"]],
    [(4, 4096, 16, 192, 128), (1, 4096, 128, 192, 128)],
    [(16384, 2048, 102400), (4096, 7168, 129280)],
    2**28,
)
SMALL = Sizes(
    [(256, 64, 128)], [Shape(128, 32, 16, 4, 2)], [(1, 64, 2, 24, 16)], [(128, 32, 1000)], 2**18
)  # fmt: skip


class Case(NamedTuple):
    """A call to measure: what it is, the rate that it is measured for, and how to make it."""

    name: str
    rate: str
    make: Make


def cases(sizes: Sizes, *, fp8: bool = True) -> Iterator[Case]:
    """Everything that is measured. The kinds of operators are those of training."""
    copied = 4 * sizes.numbers
    yield Case(f"copy {copied}", "memory", lambda new: new(copied).clone)
    yield Case(f"add {copied}", "memory", lambda new: functools.partial(torch.add, new(copied), new(copied)))
    yield Case(f"AdamW of {sizes.numbers}", "optimizer", functools.partial(_adamw, sizes.numbers))
    for m, k, n in sizes.products:
        for what in ("", "rows' gradient ", "weight's "):
            yield Case(f"{what}{m}, {k} -> {n}", "products", functools.partial(_product, what, m, k, n))
            if fp8 and not (m % 16 or k % 16 or n % 16):
                make = functools.partial(_product_in_fp8, what, m, k, n)
                yield Case(f"{what}in fp8 {m}, {k} -> {n}", IN_FP8["products"], make)
    for shape in sizes.experts:
        for at, name in enumerate(("up", "down", "up backward", "down backward")):
            yield Case(f"{name} {(*shape,)}", "experts", functools.partial(_experts, shape, at, None))
            if fp8:
                make = functools.partial(_experts, shape, at, ROWWISE)
                yield Case(f"{name} in fp8 {(*shape,)}", IN_FP8["experts"], make)
    for each in sizes.attention:
        yield Case(f"forward {each}", "attention", functools.partial(_attention, each, False))
        yield Case(f"backward {each}", "attention_backward", functools.partial(_attention, each, True))
    for loss in sizes.losses:
        yield Case(f"forward {loss}", "loss", functools.partial(_loss, cross_entropy_terms, loss))
        yield Case(f"with gradients {loss}", "loss", functools.partial(_loss, cross_entropy_sum, loss))


def _product(what: str, m: int, k: int, n: int, new: Any) -> Call:
    if what.startswith("weight"):
        return functools.partial(torch.mm, new(m, n).mT, new(m, k))
    weight = new(n, k)
    return functools.partial(torch.mm, *((new(m, n), weight) if what else (new(m, k), weight.mT)))


def _product_in_fp8(what: str, m: int, k: int, n: int, new: Any) -> Call:
    x, g, weight = new(m, k), new(m, n), new(n, k)
    ends = torch.full((1,), m, dtype=torch.int32, device=x.device)
    if what.startswith("weight"):
        return functools.partial(scaled_grouped_outer.raw, x, g, ends, ROWWISE)
    rows, matrix = (g, weight) if what else (x, weight.mT)
    return functools.partial(scaled_grouped_mm.raw, rows, matrix[None], ends, ROWWISE)


def _experts(shape: Shape, at: int, precision: str | None, new: Any) -> Call:
    x = new(shape.tokens, shape.dim)
    w_in, w_out = new(shape.experts, 2, shape.hidden, shape.dim), new(shape.experts, shape.dim, shape.hidden)
    router = RouterParams(new(shape.experts, shape.dim), torch.zeros(shape.experts, device=x.device))
    _, plan = dispatch(x, route(router, x, config_for(shape, "balanced")))
    rows = layout_of(plan, precision)
    h = new(rows.slot_R.shape[0], 2, shape.hidden)

    def up() -> Any:
        with by_engine("triton", w_in):  # as plans count passes, and as the other three run
            return experts_up.raw(x, w_in, *rows)

    return (
        up,
        functools.partial(experts_down.raw, h, w_out, *rows, None),
        functools.partial(experts_up_backward.raw, h, x, w_in, *rows),
        functools.partial(experts_down_backward.raw, x, h, w_out, *rows),
    )[at]


def _attention(sizes: tuple[int, int, int, int, int], backward: bool, new: Any) -> Call:
    batch, length, heads, width, values = sizes
    q, k, v = (new(batch, length, heads, n) for n in (width, width, values))
    inputs = q, k, v, width**-0.5
    if not backward:
        return functools.partial(attention.raw, *inputs)
    return functools.partial(attention_backward.raw, new(*v.shape), *inputs, *attention.raw(*inputs))


def _loss(operator: Operator, sizes: tuple[int, int, int], new: Any) -> Call:
    tokens, dim, vocabulary = sizes
    index = torch.arange(tokens, device=new(1).device) % vocabulary
    return functools.partial(operator.raw, new(tokens, dim), new(vocabulary, dim), index, LOGITS_BYTES)


def _adamw(numbers: int, new: Any) -> Call:
    params, grads = ([new(numbers // 8, 1) for _ in range(8)] for _ in range(2))
    optimizer, scale = adamw(), torch.ones((), device=params[0].device)
    how: Any = dict(scale=scale, donate=True)
    return functools.partial(optimizer.update, params, grads, optimizer.init(params), 1e-4, **how)


def measure_rates(
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    mesh: DeviceMesh | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Measure this device's rates, at the sizes of DeepSeek-V3's models on CUDA and at small ones elsewhere.

    =======  =================================================================
    dtype    of parameters and arithmetic
    mesh     whose links to measure, too, on all of its devices at once; ``None``: none
    -> dict  for JSON, as :func:`fmoe.plan.read_rates` takes it. ``measured`` has the time of each call, and
             the work that a plan counts for it
    =======  =================================================================

    >>> found = measure_rates(dtype=torch.float32, device="cpu", seed=0)
    >>> {*PRODUCTS} <= {*found["flops"]}, min(found["flops"].values()) > 0, found["dtype"]
    (True, True, 'float32')
    """
    seed = time.time_ns() % 2**31 if seed is None else seed
    on_cuda = torch.device(device).type == "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    measured = []
    like = torch.empty(16, 16, dtype=dtype, device=device)
    fp8 = not on_cuda or scaled.fast(ROWWISE, like, 16)
    for name, rate, make in cases(LARGE if on_cuda else SMALL, fp8=fp8):
        with torch.device("cpu"), FakeTensorMode():
            call = make(lambda *shape: torch.empty(shape, dtype=dtype))
            with Works() as counted:
                call()
        call = make(lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype))
        seconds = _seconds(call, on_cuda)
        del call
        work = counted.at(rate)._asdict()
        del work["fusible"]
        measured.append(dict(name=name, seconds=seconds, **work))
    launch, host = _launch(device, on_cuda)
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    links = measure_links(mesh, device) if mesh is not None else {}
    where = f"measured by bench rates on {name}, torch {torch.__version__}, seed {seed}"
    rates = fitted(measured)
    return dict(
        device=name, dtype=str(dtype).removeprefix("torch."), peak_flops=PEAK_FLOPS.get(name), **rates,
        launch=launch, host=host, links=links, sources={"measured": where}, measured=measured,
    )  # fmt: skip


def measure_links(mesh: DeviceMesh, device: str) -> dict[str, dict[str, float]]:
    """The links along every axis of more than one device, and along all axes that tokens lie on."""
    on_cuda = torch.device(device).type == "cuda"
    along = [(axis,) for axis, size in axis_sizes(mesh).items() if size > 1]
    tokens = tuple(axis for axis in token_axes(mesh) if (axis,) in along)
    found = {}
    for axes in [*along, *[tokens] * (len(tokens) > 1)]:
        name, size, _ = group_of(mesh, axes)
        sizes = size * (2**26 if on_cuda else 2**16), size
        large, small = (torch.zeros(n, dtype=torch.uint8, device=device) for n in sizes)
        latency, gather, swap = (
            _synchronized(call, on_cuda)
            for call in (
                functools.partial(all_to_all_op.raw, small, size, name),
                functools.partial(all_gather_op.raw, large, size, name),
                functools.partial(all_to_all_op.raw, large, size, name),
            )
        )
        found[",".join(axes)] = dict(
            bytes_per_second=(size - 1) * len(large) / max(gather - latency, 0.1 * gather),
            latency=latency,
            all_to_all=len(large) * (size - 1) / size / max(swap - latency, 0.1 * swap),
        )
    return found


def _synchronized(call: Call, on_cuda: bool) -> float:
    """The median time of a call that all devices of a group make, and wait for."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def fitted(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The rates with which a plan's time for all calls of a kind is what was measured for them together."""

    def total(rate: str, what: str) -> float:
        return float(sum(m[what] for m in measured if m["rate"] == rate))

    memory = total("memory", "moved") / total("memory", "seconds")

    def beside(rate: str) -> float:
        """Seconds without those of other passes, which can't be nearly all."""
        return max(total(rate, "seconds") - total(rate, "passed") / memory, 0.1 * total(rate, "seconds"))

    found = [*PRODUCTS, *(rate for rate in IN_FP8.values() if total(rate, "flops"))]
    flops = {rate: total(rate, "flops") / beside(rate) for rate in found}
    return dict(flops=flops, memory=memory, optimizer=total("optimizer", "moved") / beside("optimizer"))


def _seconds(call: Call, on_cuda: bool) -> float:
    """The median time of a call; on CUDA among many in a row, whose launches are hidden."""
    call()
    if not on_cuda:
        return statistics.median(_clocked(call) for _ in range(3))
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    number = max(2, min(200, round(SECONDS / (time.perf_counter() - start))))

    def many() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / number

    return statistics.median(many() for _ in range(3))


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _launch(device: str, on_cuda: bool) -> tuple[float, float]:
    """Seconds of the shortest kernel, in a graph on CUDA, and for which the host needs to launch one."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    many()
    host = _clocked(many) / LAUNCHES
    if not on_cuda:
        return host, host
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return _seconds(graph.replay, on_cuda) / LAUNCHES, host


def report(found: dict[str, Any], console: Console) -> None:
    """Print the rates, and what a plan would take for each call beside what was measured."""
    rates = Rates(*(found[name] for name in Rates._fields[:7]))
    table = Table(
        "rate of", "call", "us", "planned us", "TFLOP/s or GB/s", title=f"{rates.device}, {rates.dtype}"
    )
    for m in found["measured"]:
        planned = rates.seconds(Work(m["rate"], m["flops"], m["moved"], m["passed"]))
        speed = (m["flops"] / 1e12 if m["flops"] else m["moved"] / 1e9) / m["seconds"]
        cells = f"{m['seconds'] * 1e6:,.1f}", f"{planned * 1e6:,.1f}", f"{speed:,.1f}"
        table.add_row(m["rate"], m["name"], *cells)
    console.print(table)
    shown = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in rates.flops.items())
    console.print(
        f"TFLOP/s: {shown}. Memory {rates.memory / 1e9:,.0f} GB/s, "
        f"optimizer {rates.optimizer / 1e9:,.0f} GB/s, a launch {rates.launch * 1e6:.2f} us."
    )
    for along, link in found["links"].items():
        console.print(
            f"Along {along}: {link['bytes_per_second'] / 1e9:,.1f} GB/s, to all at once "
            f"{link['all_to_all'] / 1e9:,.1f} GB/s, after {link['latency'] * 1e6:,.0f} us."
        )
