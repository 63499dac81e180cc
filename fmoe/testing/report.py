"""The findings of laws, and their report."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import argument_error

T = TypeVar("T")


class Found(NamedTuple):
    """One comparison that a law made: its error, and the error allowed. NaN is never allowed.

    >>> found = Found("the gradient", error=2e-3, allowed=1e-5)
    >>> print(found)
    the gradient is off by 2.0e-03, allowed 1.0e-05
    >>> found.holds
    False
    """

    what: str
    error: float
    allowed: float
    rank: int = 0

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """The error over the allowed one, for comparing findings. Infinite if the error is NaN."""
        if self.error != self.error:
            return float("inf")
        return self.error / self.allowed if self.allowed else float("inf") if self.error else 0.0

    def __str__(self) -> str:
        if self.allowed == 0 and float(self.error).is_integer():
            return f"{self.what}: {self.error:.0f}, where 0 is right"
        return f"{self.what} is off by {self.error:.1e}, allowed {self.allowed:.1e}"


# A law states what must hold in the first line of its docstring, and compares as it goes.
Law = Callable[[T], Iterator[Found]]


class Report(NamedTuple):
    """The outcome of every law: the worst that each comparison found on any rank.

    Its ``str()`` is a table with a line for each law.

    >>> found = [Found("the output", 2e-7, 6e-5), Found("the gradient", 3e-6, 6e-5)]
    >>> print(Report("AllToAll", 0, {"oracle": found}, {"oracle": 0.1}))
    AllToAll, seed 0
      oracle         holds    0.1 s  at worst, the gradient is off by 3.0e-06, allowed 6.0e-05
    """

    title: str
    seed: int
    laws: dict[str, list[Found]]
    seconds: dict[str, float]

    @property
    def broken(self) -> list[str]:
        return [name for name, found in self.laws.items() if not all(f.holds for f in found)]

    def __str__(self) -> str:
        lines = [f"{self.title}, seed {self.seed}"]
        for name, found in self.laws.items():
            worst = max(found, key=lambda f: f.share, default=None)
            verdict = "BROKEN" if name in self.broken else "holds"
            exactly = "exactly" if worst else "nothing compared"
            how = f"at worst, {worst}" if worst and worst.error else exactly
            lines.append(f"  {name:14} {verdict:6} {self.seconds[name]:5.1f} s  {how}")
        return "\n".join(lines)


class LawBroken(AssertionError):
    """Something breaks a promise of fmoe. The text says which, and how to see it again.

    ``report`` has the findings, up to the exception if there was one.

    >>> import fmoe
    >>> from fmoe.ops.reference import swiglu_reference
    >>> def doubled(params, x_SD, plan):
    ...     return 2 * fmoe.experts_grouped_mm(params, x_SD, plan)
    >>> experts = fmoe.moe_init(0, dim=8, hidden_dim=4, num_experts=4).experts
    >>> fmoe.testing.check_experts(doubled, experts, swiglu_reference, dim=8, laws=["oracle"])
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fmoe.testing.report.LawBroken: check_experts: doubled, 4 experts, float32: 1 of 1 laws are broken.
    oracle: ...
    """

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


def by_name(*laws: Law[T]) -> dict[str, Law[T]]:
    return {law.__name__: law for law in laws}


def hold(
    function: str,
    title: str,
    laws: Mapping[str, Law[T]],
    subject: T,
    names: Sequence[str] | None,
    seed: int | None,
    together: Callable[[Any], list[Any]] = lambda value: [value],
) -> Report:
    """Check that ``subject`` keeps the laws of these names.

    ``together`` gives the values of all ranks that do the same. Every law begins with the same random numbers
    on every rank, which don't disturb the caller's. If any law is broken, all ranks raise :class:`LawBroken`
    after the last law. An exception raises it at once, on the rank that met it.
    """
    unknown = [name for name in names or () if name not in laws]
    if unknown:
        raise argument_error(function, "laws", got=f"{unknown}", expected=f"some of {list(laws)}")
    seed = together(int.from_bytes(os.urandom(4)) if seed is None else seed)[0]
    report = Report(title, seed, {}, {})
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        for name in laws if names is None else names:
            torch.manual_seed(seed)
            began = time.monotonic()
            try:
                found = list(laws[name](subject))
            except Exception as error:
                met = f"{function}: {title}: {name} met {type(error).__name__}: {error}"
                text = "\n  ".join([met, _stated(laws[name]), _again(name, seed)])
                if report.broken:
                    text += "\n" + _told(function, report, laws)
                raise LawBroken(text, report) from error
            everyone = zip(*together(found), strict=True)
            report.laws[name] = [max(same, key=lambda f: f.share) for same in everyone]
            report.seconds[name] = time.monotonic() - began
    if report.broken:
        raise LawBroken(_told(function, report, laws), report)
    return report


def _told(function: str, report: Report, laws: Mapping[str, Any]) -> str:
    lines = [f"{function}: {report.title}: {len(report.broken)} of {len(report.laws)} laws are broken."]
    for name in report.broken:
        wrong = sorted((f for f in report.laws[name] if not f.holds), key=lambda f: -f.share)
        lines.append(f"{name}: {_stated(laws[name])}")
        lines += [f"  {found}, on rank {found.rank}" for found in wrong[:5]]
        lines += [f"  and {len(wrong) - 5} more"] * (len(wrong) > 5)
        lines.append(f"  {_again(name, report.seed)}")
    return "\n".join(lines)


def _stated(law: Any) -> str:
    return (law.__doc__ or "").strip().splitlines()[0]


def _again(name: str, seed: int) -> str:
    return f"Again: laws=[{name!r}], seed={seed}."
