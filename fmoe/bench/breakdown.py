"""Shares of a step's time by kind of operator, from the profiler's trace."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..introspect import operator_class
from ..training.step import UPDATE


def breakdown(
    step: Callable[[], Any], on_cuda: bool, trace: str | None
) -> tuple[dict[str, float], float | None]:
    """The share of a step's time that each kind of operator takes, and the device's working time in ms."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities, acc_events=True) as run:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trace or f"{folder}/trace.json")
        run.export_chrome_trace(str(path))
        spent = time_by_kind(json.loads(path.read_text())["traceEvents"], on_cuda)
    total = sum(spent.values())
    shares = {kind: time / total for kind, time in spent.most_common() if time}
    return shares, total / 1e3 if on_cuda else None


# We read the trace, since the profiler's own events repeat a range's whole time under each operator in it.
def time_by_kind(events: list[dict[str, Any]], on_cuda: bool) -> Counter[str]:
    """Microseconds of each class of operator in a trace: of its kernels or, without CUDA, of the host."""
    calls = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    calls.sort(key=lambda call: (call["tid"], call["ts"], -call["dur"]))
    kinds: dict[int, str] = {}  # by the number that a call shares with its kernels
    spent: Counter[str] = Counter()
    around: list[tuple[dict[str, Any], str | None]] = []  # open calls, and the kind of all in them
    for call in calls:
        while around and (around[-1][0]["tid"] != call["tid"] or _end(around[-1][0]) <= call["ts"]):
            around.pop()
        outer = around[-1][1] if around else None
        inner = _kind_of_all_in(call["name"], outer)
        kind = kinds[call["args"]["External id"]] = inner or _kind(call["name"])
        if not on_cuda:
            spent[kind] += call["dur"]
            if around:
                spent[kinds[around[-1][0]["args"]["External id"]]] -= call["dur"]
        around.append((call, inner))
    for event in events if on_cuda else ():
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spent[kinds.get(event["args"].get("External id", -1), "other")] += event["dur"]
    return spent


def _end(call: dict[str, Any]) -> float:
    return float(call["ts"] + call["dur"])


def _kind_of_all_in(name: str, outer: str | None) -> str | None:
    """The kind that the optimizer's range, or an operator of ours, gives to all calls within it."""
    if name == UPDATE or outer == "optimizer":
        return "optimizer"
    return operator_class(name) if name.startswith("fmoe::") else outer


def _kind(name: str) -> str:
    return operator_class(name) if "::" in name or "triton" in name else "other"
