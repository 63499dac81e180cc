"""The cost of a call: time, launches and waits of the host. Also the device's best rate."""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import argument_error

IN_A_ROW = 3  # calls timed together


def syncs(call: Callable[[], Any]) -> int:
    """Count how often the host waits for the CUDA device in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) and "prototype" not in str(w.message) for w in caught)


def on_device(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a call's kernels on the CUDA device, and their number, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(IN_A_ROW):
            call()
        torch.cuda.synchronize()
    rows = [r for r in profile.key_averages() if r.device_type == torch.autograd.DeviceType.CUDA]
    spent, number = sum(r.self_device_time_total for r in rows), sum(r.count for r in rows)
    return spent / IN_A_ROW / 1e3, number / IN_A_ROW


def of_host(call: Callable[[], Any]) -> float:
    """Milliseconds until the host has handed a call to an idle device, for which it needn't wait."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def timed(call: Callable[[], Any], on_cuda: bool) -> float:
    """Milliseconds per call. On CUDA it times a few in a row, which hides the launch of the first."""
    if not on_cuda:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start_event.record()
    for _ in range(IN_A_ROW):
        call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / IN_A_ROW


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, on_cuda: bool) -> dict[str, list[float]]:
    """Milliseconds of each call in each round. Calls take turns, so that a disturbance hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, on_cuda))
    return times


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square matrix product on random data: 8192 on CUDA, 512 elsewhere."""
    on_cuda = torch.device(device).type == "cuda"
    size = 8192 if on_cuda else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, on_cuda) for _ in range(9)) / 1e9


def check_number(function: str, argument: str, number: int) -> None:
    """Raise ``ValueError`` for fewer than two measurements, which have no spread."""
    if not isinstance(number, int) or number < 2:
        expected = "an integer of at least 2"
        raise argument_error(function, argument, got=number, expected=expected, remedy="Measure more often.")


def say(text: str) -> None:
    """Print on stderr what is known so far, which a run that is ended early would lose."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    r"""An error's kind and text in one line, at most 200 characters.

    >>> one_line(RuntimeError("out of\n shared memory")), one_line(AssertionError())
    ('RuntimeError: out of shared memory', 'AssertionError')
    """
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:200]


def or_dash(value: float | None, form: str) -> str:
    """The number in a table, or a dash where it can't be known."""
    return "-" if value is None else format(value, form)
