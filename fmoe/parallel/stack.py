"""Layers one after another, whose parameters are gathered ahead of their use, forward and backward."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress
from typing import Any, NamedTuple

import optree
import torch
from torch._C import _functorch as functorch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..errors import argument_error
from ..ops.core.derive import Tensors, pull, replaced
from ..ops.core.modes import Modes, Rng
from ..ops.core.recompute import begin_offloaded
from ..ops.core.refuse import refusing_combinations
from ..ops.core.tape import current_tape
from . import buckets
from .buckets import Bucket, Placed
from .collective_ops import arrived
from .placement import is_placed
from .shard_map import check_captured

Layer = Callable[..., tuple[Any, ...]]


def stack(
    layer: Layer, params: Sequence[Any], x: torch.Tensor, *extra: Any
) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """``x`` through all layers, and what else each of them gives.

    ==========  =========================================================================
    layer       ``(params, x, *extra)`` -> ``(x, *more)``; it computes with ``use(params)``
    params      those of each layer, whose leaves may be ``Placed``
    extra       pytrees, the same for all layers
    -> x, more  the last ``x``, and of each layer the tuple ``more``, pytrees of tensors
    ==========  =========================================================================

    While a layer computes, the parameters of the next are gathered; in the backward, those of the one before.
    They are freed after use, so at most two layers' exist at once. Copies that a layer makes of them, such as
    casts under autocast, are its own. A layer's gradients are summed over
    devices while the next one's are computed. A layer decides itself what it keeps for its backward, as with
    :func:`fmoe.remat`. Gathered parameters aren't kept, but gathered again.

    Beneath transforms and saved-tensor hooks, inside ``remat`` and under ``torch.compile`` it is the plain
    loop, and a layer gathers what it uses. So are derivatives of its gradient.

    Raises ``ValueError`` for a layer that captures a differentiable tensor, or writes into one that its
    backward needs. Raises ``TransformError`` for one that calls ``torch.func.vjp`` or ``grad`` itself.

    Source: FSDP, arXiv 2304.11277, section 3.3, as a function of layers.

    >>> from fmoe.parallel.placement import use
    >>> layer = lambda weight, x: (x @ use(weight), x.sum())
    >>> x, more = stack(layer, [torch.eye(2), 2 * torch.eye(2)], torch.ones(1, 2))
    >>> x, more
    (tensor([[2., 2.]]), [(tensor(2.),), (tensor(2.),)])
    """
    leaves = optree.tree_leaves([*params], is_leaf=is_placed)
    if not _plain_autograd() or not any(leaf.moves for leaf in leaves if is_placed(leaf)):
        return _loop(layer, params, x, extra)
    call = _Call(layer, params, extra)
    inputs, call.tensors = (x, *call.tensors), []
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out = _Stack.apply(call, *inputs)
    else:
        out, _ = _forward(call, inputs, [])
    return call.result(out)


def _loop(
    layer: Layer, params: Sequence[Any], x: torch.Tensor, extra: Sequence[Any]
) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """The plain loop: each layer gathers what it uses."""
    found = []
    for tree in params:
        x, *more = layer(tree, x, *extra)
        found.append(tuple(more))
    return x, found


def _plain_autograd() -> bool:
    """Whether nothing differentiates but the engine, nothing records, and no hook sees saved tensors."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or functorch.get_interpreter_stack()
        or current_tape()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(False)
    )


class _Call:
    """One call of :func:`stack`: all but its tensors, which are those of ``extra``, then layers' pieces."""

    def __init__(self, layer: Layer, params: Sequence[Any], extra: Any) -> None:
        leaves, structure = optree.tree_flatten(extra, none_is_leaf=True)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.layer, self.tensors = layer, [leaves[i] for i in where]
        self.extra = structure, replaced(leaves, where, [None] * len(where)), where
        self.ends = [len(self.tensors)]
        self.structures: list[Any] = []
        self.moves: list[list[Any]] = []  # how a leaf is made of its piece
        self.buckets: list[list[Bucket]] = []
        for tree in params:
            leaves, structure = optree.tree_flatten(tree, is_leaf=is_placed)
            self.tensors += [leaf.piece if is_placed(leaf) else leaf for leaf in leaves]
            self.ends.append(len(self.tensors))
            self.structures.append(structure)
            how = [(leaf.moves, leaf.dtype, leaf.summed) if is_placed(leaf) else None for leaf in leaves]
            self.moves.append(how)
            self.buckets.append(buckets.buckets_of(leaves))
        self.gathered = [{j for bucket in mine for j in bucket.where} for mine in self.buckets]
        self.results: list[Any] = [None] * len(params)
        self.modes = Modes.now(self.tensors)

    def of_layer(self, i: int, tensors: Sequence[Any]) -> list[Any]:
        return [*tensors[self.ends[i] : self.ends[i + 1]]]

    def run(
        self, i: int, x: Any, extra: Sequence[Any], leaves: Sequence[Any], gathered: set[int]
    ) -> list[Any]:
        """Layer ``i``: its ``x``, and the tensors among what else it gives. Some leaves are gathered."""
        placed = [
            leaf if how is None or j in gathered else Placed(leaf, *how)
            for j, (leaf, how) in enumerate(zip(leaves, self.moves[i]))
        ]
        structure, others, where = self.extra
        args = structure.unflatten(replaced(others, where, extra))
        x, *more = self.layer(self.structures[i].unflatten(placed), x, *args)
        found, self.results[i] = optree.tree_flatten(tuple(more))
        return [x, *found]

    def result(self, out: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
        x, *rest = out
        values = iter(rest)
        return x, [s.unflatten([next(values) for _ in range(s.num_leaves)]) for s in self.results]

    def loop(self, x: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        """The plain loop, in which each layer gathers what it uses."""
        found: list[torch.Tensor] = []
        for i in range(len(self.structures)):
            x, *more = self.run(i, x, tensors[: self.ends[0]], self.of_layer(i, tensors), set())
            found += more
        return x, *found

    def begin(self, i: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to gather the parameters of layer ``i``, if there is one."""
        if not 0 <= i < len(self.structures):
            return []
        pieces = self.of_layer(i, tensors)
        return [buckets.begin([pieces[j] for j in bucket.where], bucket) for bucket in self.buckets[i]]

    def finish(self, i: int, coming: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Those parameters, by their places. ``coming`` is emptied, so that its memory is free."""
        whole: dict[int, torch.Tensor] = {}
        for bucket in self.buckets[i]:
            whole |= zip(bucket.where, buckets.finish(coming.pop(0), bucket))
        return whole


class _Again:
    """Takes gathered parameters out of what a graph keeps, and puts them back when they come again."""

    def __init__(self, whole: dict[int, torch.Tensor]) -> None:
        self.whole = whole
        self.places = {t.untyped_storage()._cdata: j for j, t in whole.items()}

    def pack(self, tensor: torch.Tensor) -> Any:
        j = self.places.get(tensor.untyped_storage()._cdata)
        if j is None or tensor.dtype != self.whole[j].dtype:
            # Undetached, an output would hold its own graph, which none would free. PyTorch looks at no
            # version where there are hooks.
            return tensor.detach(), tensor._version
        return j, tensor.shape, tensor.stride(), tensor.storage_offset() - self.whole[j].storage_offset()

    def unpack(self, kept: Any) -> torch.Tensor:
        if len(kept) == 2:
            tensor, version = kept
            if tensor._version != version:
                got = f"a layer that writes into a tensor of shape {tuple(tensor.shape)}"
                expected = "none that its backward needs"
                remedy = "Use the operation that isn't in place."
                raise argument_error("stack", "layer", got=got, expected=expected, remedy=remedy)
            return tensor
        j, shape, stride, offset = kept
        return self.whole[j].as_strided(shape, stride, self.whole[j].storage_offset() + offset)


class _Graph(NamedTuple):
    """A layer's graph, from what it was given to what it gave. It holds no gathered parameter."""

    given: list[GradientEdge | None]
    gave: list[GradientEdge | None]
    again: _Again | None  # the last layer keeps its parameters, as its backward comes first


class _Given(torch.autograd.Function):
    """Tensors as the beginning of a graph which, unlike leaves, it doesn't hold."""

    @staticmethod
    def forward(ctx: Any, wanted: Sequence[bool], token: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        out = tuple(t.view_as(t) for t in tensors)
        ctx.mark_non_differentiable(*(t for t, w in zip(out, wanted) if not w))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise AssertionError("stack: nothing lies before a layer")


def _forward(
    call: _Call, inputs: Sequence[torch.Tensor], needs: Sequence[bool]
) -> tuple[list[torch.Tensor], list[_Graph]]:
    """All layers in order, and with ``needs`` their graphs."""
    x, *tensors = inputs
    extra, number = tensors[: call.ends[0]], len(call.structures)
    found: list[torch.Tensor] = []
    graphs: list[_Graph] = []
    coming = call.begin(0, tensors)
    try:
        for i in range(number):
            whole = call.finish(i, coming)
            coming = call.begin(i + 1, tensors)
            leaves = replaced(call.of_layer(i, tensors), whole, whole.values())
            if needs:
                wanted = [needs[0] if i == 0 else x.requires_grad]
                wanted += [*needs[1 : 1 + len(extra)], *call.of_layer(i, needs[1:])]
                again = _Again(whole) if i + 1 < number else None
                x, *more = _recorded(call, i, [x, *extra, *leaves], wanted, again, graphs)
            else:
                x, *more = call.run(i, x, extra, leaves, call.gathered[i])
            found += more
            del leaves, whole
    except BaseException:
        _wait(coming)
        raise
    return [x, *found], graphs


def _recorded(
    call: _Call, i: int, given: list[Any], wanted: list[bool], again: _Again | None, graphs: list[_Graph]
) -> list[torch.Tensor]:
    start = 1 + call.ends[0]
    with torch.enable_grad(), saved_tensors_hooks(again.pack, again.unpack) if again else nullcontext():
        token = torch.empty(0, requires_grad=True)
        values = _Given.apply(wanted, token, *(t.detach() for t in given))
        with refusing_combinations("stack: layer"):
            out = call.run(i, values[0], values[1:start], values[start:], call.gathered[i])
        check_captured(values, out)
    graphs.append(_Graph(_edges(values), _edges(out), again))
    if again:
        again.whole, again.places = {}, {}
    return out


def _edges(tensors: Sequence[torch.Tensor]) -> list[GradientEdge | None]:
    return [get_gradient_edge(t) if t.requires_grad else None for t in tensors]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: torch.Tensor) -> Tensors:
        ctx.call, rng = call, Rng.now(inputs)
        out, ctx.graphs = _forward(call, inputs, ctx.needs_input_grad[1:])
        ctx.rng = rng if rng.moved() else None
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.smooth = [t.requires_grad for t in out]
        detached = tuple(t.detach() for t in out)
        ctx.mark_non_differentiable(*(t for t, smooth in zip(detached, ctx.smooth) if not smooth))
        return detached

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # somebody differentiates this
            return None, *_plainly(ctx, inputs, needs, cotangents)
        return None, *_backward(ctx.call, ctx.graphs, inputs, cotangents)


def _plainly(ctx: Any, inputs: Tensors, needs: Sequence[bool], cotangents: Sequence[Any]) -> list[Any]:
    """The cotangents by the plain loop, run again, which has derivatives of every order."""
    where = [i for i, needed in enumerate(needs) if needed]

    def loop(*values: torch.Tensor) -> Tensors:
        with ctx.rng.replayed() if ctx.rng else nullcontext(), ctx.call.modes.entered():
            return tuple(compress(ctx.call.loop(*replaced(inputs, where, values)), ctx.smooth))

    found = pull(loop, [inputs[i] for i in where], [*compress(cotangents, ctx.smooth)], inputs=inputs)
    return replaced([None] * len(inputs), where, found)


def _backward(
    call: _Call, graphs: list[Any], inputs: Tensors, cotangents: Sequence[Any]
) -> list[torch.Tensor | None]:
    """All layers in reverse. Sums over devices are waited for a layer later."""
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    if None in graphs:
        raise RuntimeError("stack: differentiated a second time, expected retain_graph=True the first time.")
    tensors, number, start = inputs[1:], len(graphs), 1 + call.ends[0]
    found: list[Any] = [None] * len(inputs)
    g_x, *rest = cotangents
    coming = call.begin(number - 2, tensors)
    summing: list[Any] = []
    sums_of = number
    try:
        for i in reversed(range(number)):
            graph = graphs[i]
            if graph.again:
                graph.again.whole = call.finish(i, coming)
                coming = call.begin(i - 1, tensors)
            # What remat offloaded comes a layer ahead, too.
            for one in reversed(graphs[max(0, i - 1) : i + 1]):
                begin_offloaded(edge.node for edge in one.gave if edge)
            rest, mine = rest[: len(rest) - len(graph.gave) + 1], rest[len(rest) - len(graph.gave) + 1 :]
            grads = _grads(graph, [g_x, *mine], keep)
            if graph.again:
                graph.again.whole = {}
            if not keep:
                graphs[i] = None
            del graph
            g_x = grads[0]
            for j in range(1, start):
                found[j] = _sum(found[j], grads[j])
            at = 1 + call.ends[i]
            found[at : at + len(grads) - start] = grads[start:]
            del grads
            _land(call, sums_of, summing, found)
            summing, sums_of = [], i
            for bucket in call.buckets[i]:
                mine = [found[at + j] for j in bucket.where]
                summing.append(buckets.begin_sum(mine, bucket, inputs[at].device))
                for j in bucket.where:
                    found[at + j] = None
                del mine
        _land(call, sums_of, summing, found)
    except BaseException:
        _wait([*coming, *summing])
        raise
    found[0] = g_x
    return found


def _land(call: _Call, i: int, summing: list[Any], found: list[Any]) -> None:
    """Wait for the sums of layer ``i``'s cotangents."""
    while summing:
        bucket = call.buckets[i][-len(summing)]
        for j, g in zip(bucket.where, buckets.finish_sum(summing.pop(0), bucket)):
            found[1 + call.ends[i] + j] = g


def _grads(graph: _Graph, cotangents: Sequence[Any], keep: bool) -> list[Any]:
    """The cotangents of what a layer was given."""
    gave = [(edge, g) for edge, g in zip(graph.gave, cotangents) if edge is not None and g is not None]
    wanted = {i: edge for i, edge in enumerate(graph.given) if edge is not None}
    found: list[Any] = [None] * len(graph.given)
    if not gave or not wanted:
        return found
    outputs, given = zip(*gave)
    grads = torch.autograd.grad(outputs, [*wanted.values()], given, keep, allow_unused=True)
    return replaced(found, wanted, grads)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _wait(coming: Sequence[torch.Tensor]) -> None:
    """Nothing may be on its way when its tensor goes."""
    for x in coming:
        arrived(x)
