import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from fmoe.training import schedules
from fmoe.training.schedules import warmup_cosine, warmup_stable_decay


def test_the_schedule_at_its_corners() -> None:
    def rate(step: int, **options: Any) -> float:
        return warmup_cosine(step, peak=2.0, warmup_steps=4, total_steps=12, **options)

    assert [rate(i) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(7) == pytest.approx(1.1)
    assert rate(11) == pytest.approx(0.2)
    assert rate(1000) == pytest.approx(0.2)
    assert rate(11, final=0.0) == 0.0
    assert warmup_cosine(4, peak=1.0, warmup_steps=5, total_steps=5) == 1.0
    with pytest.raises(ValueError, match="warmup_cosine: warmup_steps: got 6, expected 0 to total_steps=5"):
        warmup_cosine(0, peak=1.0, warmup_steps=6, total_steps=5)


@hypothesis.given(st.integers(0, 50), st.integers(1, 50))
def test_the_schedule_rises_then_falls(warmup: int, rest: int) -> None:
    rates = [
        warmup_cosine(i, peak=3.0, warmup_steps=warmup, total_steps=warmup + rest)
        for i in range(warmup + rest)
    ]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) <= 3.0
    assert math.isclose(rates[-1], 0.3)


def test_the_stable_schedule_at_its_corners() -> None:
    def rate(step: int, **options: Any) -> float:
        options = {"warmup_steps": 2, "decay_steps": 4, "total_steps": 10, **options}
        return warmup_stable_decay(step, peak=2.0, **options)

    assert [rate(i) for i in range(6)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert [rate(i) for i in range(6, 12)] == pytest.approx([1.55, 1.1, 0.65, 0.2, 0.2, 0.2])
    assert rate(9, final=0.0) == 0.0
    assert rate(9, decay_steps=0) == 2.0
    expected = (
        r"warmup_stable_decay: warmup_steps, decay_steps: got \(7, 4\), expected at least 0, and together at "
        "most total_steps=10. Warm up or decay for fewer steps."
    )
    with pytest.raises(ValueError, match=expected):
        rate(0, warmup_steps=7)
    with pytest.raises(ValueError, match=r"got \(2, -1\)"):
        rate(0, decay_steps=-1)


@hypothesis.given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.floats(0.0, 0.5))
def test_the_stable_schedule_rises_stays_and_falls(
    warmup: int, stable: int, decay: int, final: float
) -> None:
    def rates(stable: int) -> list[float]:
        total = warmup + stable + decay
        options = {"warmup_steps": warmup, "decay_steps": decay, "total_steps": total, "final": final}
        return [warmup_stable_decay(i, peak=3.0, **options) for i in range(total)]

    first = rates(stable)
    steps = [b - a for a, b in itertools.pairwise(first)]
    up, flat, down = (
        steps[: warmup - 1] if warmup else [],
        first[warmup : warmup + stable],
        steps[-decay + 1 :],
    )
    assert up == pytest.approx([3.0 / warmup] * len(up) if warmup else [])
    assert flat == [3.0] * stable
    assert decay == 1 or down == pytest.approx([(final - 3.0) / decay] * (decay - 1))
    assert first[-1] == pytest.approx(final)
    assert rates(stable + 7)[: warmup + stable] == first[: warmup + stable], "prolonging changes nothing"


def test_schedules_have_names() -> None:
    cosine, stable = (schedules.by_name(name, peak=2.0, total_steps=100) for name in ("cosine", "stable"))
    for step in range(100):
        how: Any = dict(peak=2.0, warmup_steps=5, total_steps=100)
        assert cosine(step) == warmup_cosine(step, **how)
        assert stable(step) == warmup_stable_decay(step, decay_steps=20, **how)
    with pytest.raises(ValueError, match=r"by_name: name: got 'flat', expected 'cosine' or 'stable'"):
        schedules.by_name("flat", peak=1.0, total_steps=3)
