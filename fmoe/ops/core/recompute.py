"""Recomputation as an ``autograd.Function``: what :func:`fmoe.remat` does outside ``torch.compile``.

A remat'ed call is a *region*. Its forward runs the function once, on a tape that records the outputs
of the operators its policy names; they become extra outputs of the Function. Its derivatives run the
function again, under :func:`~fmoe.ops.core.derive.pull` or ``jvp``, on a tape that hands those outputs back.
Under ``vmap`` the region becomes the region of the batched function. So every transform, in any order and
nesting, meets one Function whose rules are made of other transforms.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import Any

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ...errors import argument_error
from .batches import front
from .capture import Guard, check_captured
from .compress import compressed, restored, restored_layout
from .derive import pull, replaced
from .dynamo import hidden_from_dynamo
from .engine import runs
from .function import no_derivative, primal
from .host import away, begin, finish, leave, may_leave
from .modes import Modes, Rng
from .refuse import refusing_combinations
from .tape import COMPRESS, Entry, Layout, Place, PlainTape, Policy, Tape, current_tape, on_tape, replay_error


def _nothing(name: str) -> bool:
    return False


@hidden_from_dynamo  # Dynamo has its own way; here it would only look into the tape's functions
def recomputing(fn: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> Any:
    """``fn(*args, **kwargs)``, whose derivatives run it again with what ``policy`` kept handed back."""
    outer = current_tape()
    if isinstance(outer, PlainTape):
        return fn(*args, **kwargs)
    leaves, treedef = optree.tree_flatten((args, kwargs), none_is_leaf=True)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    given = outer.rest() if outer else ()
    if no_derivative():
        policy = _nothing  # else an evaluation would round and offload what nobody reads
    found = _Found()
    region = Region(
        fn,
        treedef,
        _statics(leaves),
        len(tensors),
        record=_asked_by(policy, outer) if outer else policy,
        serve=outer.serve if outer else _nothing,
        throughout=outer.throughout if outer else _nothing,
        handed=_layout(given),
        found=found,
        modes=Modes.now(tensors),
        place=outer.next_place() if outer else (),
    )
    with outer.inside() if outer else nullcontext():
        out = _Remat.apply(region, *tensors, *_outputs(given))
    num_outputs = len(found.differentiable)
    if outer:
        outer.absorb(found.served, _entries(out[num_outputs:], found.recorded))
    return optree.tree_unflatten(found.out_treedef, _merge(found.out_statics, out[:num_outputs]))


def _asked_by(policy: Policy, outer: Tape) -> Policy:
    """What a nested region keeps, and how. It rounds nothing that the outer tape keeps as it is.

    Else regions after it, which run again with what it gave, would choose experts from rounded numbers.
    """

    def record(name: str) -> bool | str:
        how = policy(name)
        return (how == COMPRESS and outer.record(name)) or how or outer.asks(name)

    return record


@dataclass
class _Found:
    """Facts learned from running a region."""

    out_treedef: Any = None
    out_statics: Sequence[Any] = ()
    differentiable: Sequence[bool] = ()
    recorded: Layout = ()
    homes: Sequence[torch.device | None] = ()
    served: int = 0
    rng: Rng | None = None


@dataclass(frozen=True)
class Region:
    """One call of a remat'ed function: all of it but the tensors.

    ``statics`` has a 1-tuple for every leaf of the arguments that isn't a tensor. ``batches`` has ``in_dims``
    and randomness of the vmaps around the call, innermost first. ``handed`` describes the entries it gets.
    ``throughout`` says what the regions inside keep, too, where values are rounded: else they would make
    decisions again that exact values made.
    """

    fn: Callable[..., Any]
    treedef: Any
    statics: Sequence[Any]
    num_tensors: int
    record: Policy
    serve: Policy
    throughout: Policy
    handed: Layout
    found: _Found
    modes: Modes
    place: Place
    batches: tuple[tuple[Any, str], ...] = ()

    def execute(self, tensors: Sequence[torch.Tensor], *, check: bool = False) -> tuple[torch.Tensor, ...]:
        """``(*arguments, *values to hand back)`` -> ``(*outputs, *values recorded)``.

        ``check`` looks out for captured tensors; the arguments must be detached then.
        """
        n, found = self.num_tensors, self.found

        def body(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = optree.tree_unflatten(self.treedef, _merge(self.statics, tensors[:n]))
            entries = _entries(tensors[n:], self.handed)
            look = check_captured if check else None
            tape = Tape(
                record=self.record,
                serve=self.serve,
                throughout=self.throughout,
                entries=entries,
                check=look,
                place=self.place,
            )
            with self.modes.entered(), on_tape(tape):
                with Guard(tape, check) if check or tape.hands else nullcontext():
                    out = self.fn(*args, **kwargs)
                outputs, found.out_treedef = optree.tree_flatten(out, none_is_leaf=True)
                if check:
                    check_captured(outputs, "its result")
            found.out_statics = _statics(outputs)
            found.served = tape.position
            tape.check_unchanged()
            values = [o for o in outputs if isinstance(o, torch.Tensor)]
            found.differentiable = [_differentiable(v) for v in values]
            recorded = [*map(_left, compressed(tape.recorded, self.record))]
            found.recorded, found.homes = _layout(recorded), _homes(recorded)
            return (*values, *_outputs(recorded))

        run = body
        for in_dims, randomness in self.batches:
            run = torch.vmap(run, in_dims=in_dims + (0,) * (len(tensors) - n), randomness=randomness)
        return run(*tensors)

    def replayed(self) -> "Region":
        """The same region, handed back what its forward recorded."""
        found, recorded = dataclasses.replace(self.found), self.found.recorded
        rounded = any(any(entry.dtypes) for entry, _ in recorded)
        return dataclasses.replace(
            self,
            record=_nothing,
            serve=self.record,
            throughout=(lambda name: bool(self.record(name))) if rounded else self.throughout,
            handed=restored_layout(recorded),
            found=found,
        )

    def derivative(
        self, saved: Sequence[torch.Tensor], wanted: Sequence[bool]
    ) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[int]]:
        """The differentiable outputs as a function of the arguments wanted, and which those are."""
        where = [i for i, w in enumerate(wanted) if w and _differentiable(saved[i])]
        region, rng, differentiable = self.replayed(), self.found.rng, self.found.differentiable

        def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with rng.replayed() if rng else nullcontext():
                outputs = region.execute(replaced(saved, where, values))
            if region.found.served < len(region.handed):
                raise replay_error(
                    f"no {region.handed[region.found.served][0].operator} where it was called first"
                )
            return tuple(compress(outputs, differentiable))

        return call, where


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _statics(leaves: Sequence[Any]) -> list[Any]:
    for leaf in leaves:
        hidden = [*torch_pytree.tree_leaves(leaf), *getattr(leaf, "__dict__", {}).values()]
        if not isinstance(leaf, torch.Tensor) and any(isinstance(t, torch.Tensor) for t in hidden):
            got = f"a {type(leaf).__name__} that holds tensors"
            expected = "containers that optree knows, in arguments and results"
            remedy = "Use tuples, NamedTuples and dicts, or register it with optree."
            raise argument_error("remat", "fn", got=got, expected=expected, remedy=remedy)
    return [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]


def _merge(statics: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if s is None else s[0] for s in statics]


def _layout(entries: Iterable[Entry]) -> Layout:
    return [(e._replace(outputs=None), None if e.outputs is None else len(e.outputs)) for e in entries]


def _outputs(entries: Iterable[Entry]) -> list[torch.Tensor]:
    return [t for entry in entries for t in entry.outputs or ()]


def _left(entry: Entry) -> Entry:
    """An entry to keep: detached and, if it is offloaded, on its way to the host's memory."""
    outputs = entry.outputs and tuple(t.detach() for t in entry.outputs)
    if outputs and entry.homes and not entry.left:
        return entry._replace(outputs=tuple(map(leave, outputs)), left=True)
    return entry._replace(outputs=outputs)


def _homes(entries: Iterable[Entry]) -> list[torch.device | None]:
    """For each output where it comes back to, if it is offloaded."""
    return [home for e in entries for home in e.homes or (None,) * len(e.outputs or ())]


def _entries(outputs: Sequence[torch.Tensor], layout: Layout) -> list[Entry]:
    rest = iter(outputs)
    return [
        entry if n is None else entry._replace(outputs=tuple(next(rest) for _ in range(n)))
        for entry, n in layout
    ]


class _Remat(torch.autograd.Function):
    """``Region.execute`` with the derivatives that recompute; ``(region, *tensors)``."""

    @staticmethod
    def forward(region: Region, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = region.num_tensors
        rng = Rng.now(tensors)
        with refusing_combinations("remat"):
            inputs = [t.detach() for t in tensors[:n]]
            outputs = region.execute((*inputs, *tensors[n:]), check=True)
        region.found.rng = rng if rng.moved() else None
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        region, *tensors = inputs
        recorded = output[len(region.found.differentiable) :]
        ctx.region, ctx.num_tensors, ctx.coming = region, len(tensors), None
        ctx.away = None if functorch.get_interpreter_stack() else away(recorded, region.found.homes)
        ctx.save_for_backward(*tensors[: region.num_tensors], *recorded)
        ctx.save_for_forward(*tensors[: region.num_tensors], *recorded)
        constant = [o for o, smooth in zip(output, region.found.differentiable) if not smooth]
        ctx.mark_non_differentiable(*recorded, *constant)
        # Else autograd makes zeros as large as all that was recorded, on the host for what left.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        region = ctx.region
        saved, n, homes = [*unwrap_dead_wrappers(ctx.saved_tensors)], region.num_tensors, region.found.homes
        coming, ctx.coming = ctx.coming or begin(saved[n:], homes), None
        for i, tensor in enumerate(finish(coming), n):
            saved[i] = saved[i] if tensor is None else tensor  # on a CPU nothing went away
        saved[n:] = restored(saved[n:], region.found.recorded)
        if may_leave(saved):
            begin_offloaded((earlier for earlier, _ in ctx.next_functions), runs)
        call, where = region.derivative(saved, ctx.needs_input_grad[1 : 1 + region.num_tensors])
        given = tuple(compress(unwrap_dead_wrappers(cotangents), region.found.differentiable))
        with refusing_combinations("remat"):
            pulled = dict(zip(where, pull(call, [saved[i] for i in where], given, inputs=saved)))
        return None, *(pulled.get(i) for i in range(ctx.num_tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
        region = ctx.region
        if not any(region.found.differentiable):
            return (None,) * (len(region.found.differentiable) + len(ctx.saved_tensors) - region.num_tensors)
        with _set_fwd_grad_enabled(True), refusing_combinations("remat"):
            saved = [primal(t) for t in ctx.saved_tensors]
            kept: list[Any] = finish(begin(saved[region.num_tensors :], region.found.homes))
            saved = [*saved[: region.num_tensors], *restored(kept, region.found.recorded)]
            call, where = region.derivative(saved, [t is not None for t in tangents[: region.num_tensors]])
            moving = tuple(saved[i] for i in where), tuple(tangents[i] for i in where)
            moved = iter(torch.func.jvp(call, *moving)[1])
        return *(next(moved) if f else None for f in region.found.differentiable), *[None] * len(kept)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], region: Region, *tensors: torch.Tensor) -> Any:
        n, dims = region.num_tensors, in_dims[1:]
        handed = [front(t, d, info.batch_size) for t, d in zip(tensors[n:], dims[n:])]
        batch = dims[:n], info.randomness
        outputs = _Remat.apply(
            dataclasses.replace(region, batches=(*region.batches, batch)), *tensors[:n], *handed
        )
        return outputs, (0,) * len(outputs)


MOST_NODES = 256  # to look at for regions: they may be far, or none at all


def begin_offloaded(nodes: Iterable[Any], wanted: Callable[[Any], bool] = lambda node: True) -> None:
    """Begin to bring back what the nearest regions, at some nodes of a graph or before them, offloaded."""
    coming, seen = [*nodes], set[Any]()
    while coming and len(seen) < MOST_NODES:
        node = coming.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if not isinstance(region := getattr(node, "region", None), Region):
            coming += [earlier for earlier, _ in node.next_functions]
        elif any(region.found.homes) and node.coming is None and wanted(node):
            kept = node.away
            if kept is None:
                kept = unwrap_dead_wrappers(node.saved_tensors[region.num_tensors :])
            node.coming = begin(kept, region.found.homes)
