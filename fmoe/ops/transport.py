"""The interface of backends, which carry tokens to the devices that hold their experts."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from .core.axes import Axes, Group, axis_names, binding, group_of, names_of, resolve


class InFlight(NamedTuple):
    """Rows on their way back, from :func:`~fmoe.ops.combine.combine_start`.

    Until joined nothing may read ``y_TD`` (T, D), or write to what is ``held`` for it.

    >>> InFlight(torch.ones(2, 3)).held  # what has arrived holds nothing
    ()
    """

    y_TD: torch.Tensor
    held: tuple[torch.Tensor, ...] = ()


class Transport(Protocol):
    """A backend bound to the devices along one axis: two functions.

    It is an immutable value that compares by what it stands for, as a ``NamedTuple`` does: it is part of a
    plan's structure, and a constant to ``torch.compile``. Its functions keep the promises of
    :func:`fmoe.dispatch` and :func:`fmoe.combine`: they are linear in the rows, each other's transpose, and
    built of declared operators. ``docs/backends.md`` writes one. :class:`Overlapping` has two more.

    >>> import fmoe
    >>> from fmoe.parallel.collectives import group_alone
    >>> backend: Transport = fmoe.parallel.AllToAll(Group(group_alone(), 1, 0))
    >>> params, x_TD = fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=16), torch.randn(3, 4)
    >>> x_SD, plan = backend.dispatch(x_TD, fmoe.route(params.router, x_TD, fmoe.RouterConfig()))
    >>> torch.equal(backend.combine(x_SD, plan), x_TD), plan.transport == backend
    (True, True)
    """

    def dispatch(self, x_TD: torch.Tensor, routing: Any) -> tuple[torch.Tensor, Any]:
        """Tokens (T, D) -> rows for the experts held here (S, D), and the :class:`fmoe.Plan` of them.

        Device ``i`` of ``n`` holds experts ``i * E/n`` up to ``(i+1) * E/n``. A token comes once to every
        device that holds one of its experts. The plan carries this transport.
        """

    def combine(self, y_SD: torch.Tensor, plan: Any) -> torch.Tensor:
        """Rows (S, D) back to where their tokens came from, summed there: (T, D)."""


class Overlapping(Transport, Protocol):
    """A backend whose combine may be in flight while something else computes.

    Of another backend, :func:`fmoe.ops.combine.combine_start` combines at once.

    >>> import fmoe
    >>> hasattr(fmoe.parallel.DeepEP, "combine_start")
    True
    """

    def combine_start(self, y_SD: torch.Tensor, plan: Any) -> InFlight:
        """Begin ``combine``."""

    def join(self, coming: InFlight, plan: Any, plus: torch.Tensor | None) -> torch.Tensor:
        """Wait for what ``combine_start`` began, and add ``plus`` (T, D) to it, if there is any."""


class InHalves(Overlapping, Protocol):
    """A backend whose exchanges may all be in flight: a layer then takes halves of a device's tokens in turn.

    Autograd runs derivatives in reverse order. So the derivative of a function that waits begins an exchange,
    and the derivative of a function that begins one waits for it.

    >>> import fmoe
    >>> fmoe.parallel.AllToAll(Group("", 1, 0)).in_halves
    False
    """

    in_halves: bool

    def dispatch_start(self, x_TD: torch.Tensor, routing: Any) -> Any:
        """Begin ``dispatch``."""

    def dispatch_send(self, coming: Any) -> Any:
        """Go on with what the host has to wait for, if anything. What was launched since runs meanwhile."""

    def dispatch_join(self, coming: Any) -> tuple[torch.Tensor, Any]:
        """Wait for the rows of ``dispatch``, and their plan."""


def in_halves(axis: Axes) -> bool:
    """Whether the backend that is bound to ``axis`` wants a layer to take halves of its tokens in turn.

    >>> in_halves("ep")  # no backend is bound here
    False
    """
    return getattr(_bound_to(axis), "in_halves", False)


def _bound_to(axis: Axes) -> Transport | None:
    for name, backend in binding().backends:
        if (name,) == names_of(axis):
            return backend
    return None


# How to carry tokens along a group that nothing was bound to; fmoe.parallel sets it.
_default: Callable[[Group], Transport] | None = None


def set_default(make: Callable[[Group], Transport]) -> None:
    """Make ``make(group)`` what carries tokens along an axis that no backend is bound to.

    >>> from fmoe.ops.core.axes import Binding, MeshOfSizes, bound
    >>> from fmoe.parallel import AllToAll
    >>> set_default(AllToAll)  # as it is from the start
    >>> with bound(Binding(MeshOfSizes({"ep": 2}))):
    ...     transport_along("dispatch", "ep")
    AllToAll(group=Group(name='ep=2', size=2, position=0), bound=None, in_halves=False, payload=None)
    """
    global _default
    _default = make


def transport_along(function: str, axis: Axes | DeviceMesh | None) -> Transport | None:
    """The backend that carries tokens along ``axis``; ``None`` for one device, where nothing moves."""
    if axis is None:
        return None
    if isinstance(axis, DeviceMesh):
        if axis.ndim != 1 or not axis_names(axis):
            got = f"a mesh of {axis.ndim} dimensions, named {axis_names(axis)}"
            expected = "the name of a bound axis, or a mesh of one dimension that has a name"
            raise argument_error(function, "axis", got=got, expected=expected, remedy='Pass mesh["ep"].')
        group = group_of(axis, axis_names(axis))
    else:
        group = resolve(function, axis)
        backend = _bound_to(axis)
        if backend is not None:
            return backend
    if group.size == 1:
        return None
    assert _default is not None
    return _default(group)


def check_experts_divide(num_experts: int, size: int) -> None:
    if num_experts % size:
        got = f"{num_experts} experts for {size} devices"
        expected = "a multiple of the devices along the axis"
        remedy = "Choose a number of experts, or an axis, that divides."
        raise argument_error("dispatch", "routing.counts_E", got=got, expected=expected, remedy=remedy)
