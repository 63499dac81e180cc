"""A backward in two halves: the gradient of a stage's input now, and those of its weights later.

The first half runs the nodes between outputs and input. On the way it notes what flows into nodes that
weights flow into, too. The second half runs those nodes again, for their weights only. This costs nothing
twice if a node computes only what is asked for, as PyTorch's own do, and operators declared ``by_need``. Any
other node, such as that of a recomputed or compiled layer, gives its weights' gradients in the first half.
So does whatever would make such a node run again, or what lies between two uses of one weight.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..ops.core import engine

Gradients = list[torch.Tensor | None]
NODES_LIVE_ALONE = torch.__version__ >= "2.13"  # before, one written in Python dies with the graph it is in


class Group(NamedTuple):
    """Nodes that the same weights flow into, and what has flowed into each in the first half."""

    nodes: list[Any]
    given: list[Sequence[torch.Tensor | None]]
    leaves: list[int]


class Rest(NamedTuple):
    """The second half: gradients that are known already, the groups that aren't, and what holds the graph."""

    found: Gradients
    groups: list[Group]
    holds: Sequence[GradientEdge]


def input_gradient(
    outputs: Sequence[GradientEdge],
    cotangents: Sequence[torch.Tensor],
    x: torch.Tensor,
    leaves: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, Rest]:
    """The gradient of ``x``, and what is left to do for the leaves. The graph's memory goes with that.

    >>> x, w = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    >>> g, rest = input_gradient([get_gradient_edge(x * w)], [torch.tensor(1.0)], x, [w])
    >>> g, weight_gradients(rest, [w])
    (tensor(5.), [tensor(3.)])
    """
    users = _users(outputs)
    on_the_way, _ = _above([get_gradient_edge(x).node], users, ())
    roots = {edge.node for edge in outputs}
    now, groups = _grouped([get_gradient_edge(leaf).node for leaf in leaves], users, on_the_way, roots)
    hooks = [
        node.register_prehook(_keeper(group.given, i))
        for group in groups
        for i, node in enumerate(group.nodes)
    ]
    try:
        wanted = [x, *(leaves[i] for i in now)]
        with _donating():
            g, *some = engine.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    found: Gradients = [None] * len(leaves)
    for i, gradient in zip(now, some):
        found[i] = gradient
    return g, Rest(found, groups, () if NODES_LIVE_ALONE else outputs)


def weight_gradients(rest: Rest, leaves: Sequence[torch.Tensor]) -> Gradients:
    """The gradients of the leaves, in the order that :func:`input_gradient` got them in."""
    found = [*rest.found]
    for nodes, given, which in rest.groups:
        edges = [
            (GradientEdge(node, i), g)
            for node, several in zip(nodes, given)
            for i, g in enumerate(several)
            if g is not None
        ]
        if not edges:
            continue
        with _donating():
            grads = engine.grad(
                [edge for edge, _ in edges],
                [leaves[i] for i in which],
                [g for _, g in edges],
                retain_graph=True,
                allow_unused=True,
            )
        for i, gradient in zip(which, grads):
            found[i] = gradient
    return found


def _donating() -> AbstractContextManager[None]:
    """Compiled nodes may write into what they kept, for each runs once, though the graph is retained."""
    config: Any = sys.modules.get("torch._functorch.config")  # where something is compiled
    return config.patch(donated_buffer=False) if config else nullcontext()


def _users(outputs: Sequence[GradientEdge]) -> Mapping[Any, list[Any]]:
    """For each node of the graph, the nodes that lie directly above it."""
    users: dict[Any, list[Any]] = defaultdict(list)
    waiting = [*dict.fromkeys(edge.node for edge in outputs)]  # in one order on all devices
    seen = {*waiting}
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None:
                users[following].append(node)
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return users


def _above(
    start: Sequence[Any], users: Mapping[Any, list[Any]], stop: Collection[Any]
) -> tuple[set[Any], dict[Any, None]]:
    """The nodes from ``start`` upwards, up to those in ``stop``, and which of these were met."""
    found, met, waiting = {*start}, dict[Any, None](), [*start]
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user in stop:
                met[user] = None
            elif user not in found:
                found.add(user)
                waiting.append(user)
    return found, met


def _grouped(
    leaves: Sequence[Any], users: Mapping[Any, list[Any]], on_the_way: set[Any], roots: set[Any]
) -> tuple[list[int], list[Group]]:
    """Which leaves get their gradients now, and groups of the others: each node is in one.

    In the second half, a group's nodes run, and those between them and its leaves.
    """
    now: list[int] = []
    owners: dict[Any, tuple[dict[Any, None], list[int]]] = {}
    whole: list[set[Any]] = []  # what runs for a leaf alone, and computes everything
    for i, leaf in enumerate(leaves):
        below, met = _above([leaf], users, on_the_way)
        whole.append({node for node in below if not _by_need(node)})
        if below & roots or not all(map(_by_need, met)):  # an output that x isn't part of is in no group
            now.append(i)
            continue
        joined = met, [i]
        for nodes, several in {id(owners[node]): owners[node] for node in met if node in owners}.values():
            joined[0].update(nodes)
            joined[1].extend(several)
        owners |= dict.fromkeys(joined[0], joined)
    each = [*{id(owner): owner for owner in owners.values()}.values()]
    while True:
        ran = set[Any]().union(*(whole[i] for i in now))
        twice = [
            several
            for nodes, several in each
            if _stacked(nodes, users) or any(whole[i] & ran for i in several)
        ]
        if not twice:
            break
        now += [i for several in twice for i in several]
        each = [owner for owner in each if owner[1] not in twice]
    return sorted(now), [Group([*nodes], [()] * len(nodes), sorted(several)) for nodes, several in each]


def _stacked(nodes: Collection[Any], users: Mapping[Any, list[Any]]) -> bool:
    """Whether one of some nodes lies above another."""
    above, _ = _above([user for node in nodes for user in users.get(node, ())], users, ())
    return len(nodes) > 1 and not above.isdisjoint(nodes)


def _by_need(node: Any) -> bool:
    """Whether a node's backward computes nothing but what is asked for."""
    written_here: Any = node
    return not isinstance(node, BackwardCFunction) or getattr(written_here._forward_cls, "by_need", False)


def _keeper(given: list[Any], i: int) -> Callable[[Any], None]:
    def keep(grads: Any) -> None:
        given[i] = grads

    return keep
