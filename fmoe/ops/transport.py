"""What carries tokens to the devices that hold their experts: the interface that backends implement."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from .axes import Axes, Group, axis_names, binding, group_of, names_of, resolve


class InFlight(NamedTuple):
    """Rows on their way back, from :func:`~fmoe.ops.combine.combine_start`.

    Until joined nothing may read ``y_TD``, or write to what is ``held`` for it.
    """

    y_TD: torch.Tensor
    held: tuple[torch.Tensor, ...] = ()


class Transport(Protocol):
    """A backend bound to the devices along one axis.

    It is an immutable value that compares by what it stands for, as it is part of a plan's structure.
    Its functions keep the promises of :func:`fmoe.dispatch` and :func:`fmoe.combine`: they are linear in the
    rows, each other's transpose, and built of declared operators. ``docs/backends.md`` writes one.
    """

    def dispatch(self, x_TD: torch.Tensor, routing: Any) -> tuple[torch.Tensor, Any]:
        """Tokens (T, D) -> rows for the experts held here (S, D), and the :class:`fmoe.Plan` of them.

        Device ``i`` of ``n`` holds experts ``i * E/n`` up to ``(i+1) * E/n``; a token comes once to each one
        that holds an expert of its. The plan carries this transport.
        """

    def combine(self, y_SD: torch.Tensor, plan: Any) -> torch.Tensor:
        """Rows (S, D) back to where their tokens came from, summed there: (T, D)."""

    def combine_start(self, y_SD: torch.Tensor, plan: Any) -> InFlight:
        """Begin :meth:`combine`; a backend that can't wait later does all of it here."""

    def join(self, coming: InFlight, plan: Any, plus: torch.Tensor | None) -> torch.Tensor:
        """Wait for what :meth:`combine_start` began, and add ``plus`` (T, D) to it, if there is any."""


# How to carry tokens along a group that nothing was bound to; fmoe.parallel sets it.
_default: Callable[[Group], Transport] | None = None


def set_default(make: Callable[[Group], Transport]) -> None:
    """Make ``make(group)`` what carries tokens along an axis that no backend is bound to."""
    global _default
    _default = make


def transport_along(function: str, axis: Axes | DeviceMesh | None) -> Transport | None:
    """What carries tokens along ``axis``; ``None`` where there is one device, so that nothing moves."""
    if axis is None:
        return None
    if isinstance(axis, DeviceMesh):
        group = _group_of_line(function, axis)
    else:
        group = resolve(function, axis)
        for name, backend in binding().backends:
            if (name,) == names_of(axis):
                return backend
    if group.size == 1:
        return None
    assert _default is not None
    return _default(group)


def _group_of_line(function: str, mesh: DeviceMesh) -> Group:
    if mesh.ndim != 1 or not axis_names(mesh):
        raise argument_error(
            function,
            "axis",
            got=f"a mesh of {mesh.ndim} dimensions, named {axis_names(mesh)}",
            expected="the name of a bound axis, or a mesh of one dimension that has a name",
            remedy='Pass mesh["ep"].',
        )
    return group_of(mesh, axis_names(mesh))


def check_experts_divide(num_experts: int, size: int) -> None:
    if num_experts % size:
        raise argument_error(
            "dispatch",
            "routing.counts_E",
            got=f"{num_experts} experts for {size} devices",
            expected="a multiple of the devices along the axis",
            remedy="Choose a number of experts, or an axis, that divides.",
        )
