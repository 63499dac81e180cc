"""Learning rates as functions of the step; steps count from 0."""

import functools
import math
from collections.abc import Callable

from ..errors import argument_error


def warmup_cosine(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float | None = None
) -> float:
    """The learning rate of a step: a straight line up to ``peak``, then half a cosine to ``final``.

    Step ``warmup_steps - 1`` has the peak. Step ``total_steps - 1`` and all after it have ``final``, by
    default a tenth of the peak. (Loshchilov and Hutter, arXiv:1608.03983.)

    Raises ``ValueError`` unless ``0 <= warmup_steps <= total_steps``.

    >>> [round(warmup_cosine(i, peak=1.0, warmup_steps=2, total_steps=6), 3) for i in range(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if not 0 <= warmup_steps <= total_steps:
        got, expected = warmup_steps, f"0 to total_steps={total_steps}"
        remedy = "Warm up for fewer steps."
        raise argument_error("warmup_cosine", "warmup_steps", got=got, expected=expected, remedy=remedy)
    final, done = 0.1 * peak if final is None else final, step + 1
    if done <= warmup_steps:
        return peak * done / warmup_steps
    progress = min(1.0, (done - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def warmup_stable_decay(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    decay_steps: int,
    total_steps: int,
    final: float | None = None,
) -> float:
    """The learning rate of a step: a straight line up to ``peak``, ``peak``, a straight line to ``final``.

    Step ``warmup_steps - 1`` is the first with the peak, and step ``total_steps - decay_steps - 1`` the last.
    Step ``total_steps - 1`` and all after it have ``final``, by default a tenth of the peak. Until the decay
    begins nothing depends on ``total_steps``, so a run can be prolonged from a checkpoint. (Hu et al.,
    arXiv:2404.06395.)

    Raises ``ValueError`` unless ``warmup_steps`` and ``decay_steps`` fit in ``total_steps``.

    >>> options = dict(peak=1.0, warmup_steps=2, decay_steps=3, total_steps=7)
    >>> [round(warmup_stable_decay(i, **options), 3) for i in range(7)]
    [0.5, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1]
    """
    if min(warmup_steps, decay_steps) < 0 or warmup_steps + decay_steps > total_steps:
        got, names = (warmup_steps, decay_steps), "warmup_steps, decay_steps"
        expected = f"at least 0, and together at most total_steps={total_steps}"
        remedy = "Warm up or decay for fewer steps."
        raise argument_error("warmup_stable_decay", names, got=got, expected=expected, remedy=remedy)
    final, done = 0.1 * peak if final is None else final, step + 1
    if done <= warmup_steps:
        return peak * done / warmup_steps
    progress = min(1.0, max(0, done - (total_steps - decay_steps)) / max(1, decay_steps))
    return peak + (final - peak) * progress


def by_name(name: str, *, peak: float, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, by a word such as a command line has.

    ``"cosine"`` is :func:`warmup_cosine` and ``"stable"`` is :func:`warmup_stable_decay`. Both warm up over a
    twentieth of the steps, and ``"stable"`` decays over the last fifth.

    Raises ``ValueError`` for other words.

    >>> rate_of = by_name("stable", peak=1.0, total_steps=40)
    >>> [round(rate_of(i), 3) for i in (0, 1, 30, 35, 39)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    sizes = dict(warmup_steps=max(1, total_steps // 20), total_steps=total_steps)
    if name == "cosine":
        return functools.partial(warmup_cosine, peak=peak, **sizes)
    if name == "stable":
        return functools.partial(warmup_stable_decay, peak=peak, decay_steps=total_steps // 5, **sizes)
    raise argument_error(
        "by_name", "name", got=repr(name), expected="'cosine' or 'stable'", remedy="Use one of the two."
    )
