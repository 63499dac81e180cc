"""Recomputation as an ``autograd.Function``: what :func:`fmoe.remat` does outside ``torch.compile``.

A remat'ed call is a *region*. Its forward runs the function once, on a tape that records the outputs
of the operators its policy names; they become extra outputs of the Function. Its derivatives run the
function again, under ``torch.func.vjp`` or ``jvp``, on a tape that hands those outputs back. Under
``vmap`` the region becomes the region of the batched function. So every transform, in any order and
nesting, meets one Function whose rules are made of other transforms.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import Any

import optree
import torch
from torch._C import _functorch as functorch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from .errors import captured_error
from .ops.axes import bound, bound_mesh
from .ops.primitive import front, primal
from .ops.tape import Entry, PlainTape, Policy, Tape, current_tape


def _nothing(name: str) -> bool:
    return False


@torch.compiler.disable  # Dynamo has its own way; here it would only look into the tape's functions
def recomputing(fn: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> Any:
    """``fn(*args, **kwargs)``, whose derivatives run it again with what ``policy`` kept handed back."""
    outer = current_tape()
    if isinstance(outer, PlainTape):
        return fn(*args, **kwargs)
    leaves, treedef = optree.tree_flatten((args, kwargs), none_is_leaf=True)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    given = outer.rest() if outer else ()
    found = _Found()
    region = _Region(
        fn,
        treedef,
        _statics(leaves),
        len(tensors),
        record=(lambda name: policy(name) or outer.record(name)) if outer else policy,
        serve=outer.serve if outer else _nothing,
        entry_sizes=_sizes(given),
        found=found,
        mesh=bound_mesh(),
    )
    out = _Remat.apply(region, *tensors, *[t for entry in given for t in entry or ()])
    num_outputs = len(found.is_float)
    if outer:
        outer.absorb(found.served, zip(found.names, _entries(out[num_outputs:], found.entry_sizes)))
    return optree.tree_unflatten(found.out_treedef, _merge(found.out_statics, out[:num_outputs]))


@dataclass
class _Found:
    """What running a region told about it."""

    out_treedef: Any = None
    out_statics: Sequence[Any] = ()
    is_float: Sequence[bool] = ()
    names: Sequence[str] = ()
    entry_sizes: Sequence[int | None] = ()
    served: int = 0
    rng: "_Rng | None" = None


@dataclass(frozen=True)
class _Region:
    """One call of a remat'ed function: all of it but the tensors.

    ``statics`` has a 1-tuple for every leaf of the arguments that isn't a tensor. ``batches`` has the
    ``in_dims`` of the vmaps around the call, innermost first. ``mesh`` is the one bound where it was called.
    """

    fn: Callable[..., Any]
    treedef: Any
    statics: Sequence[Any]
    num_tensors: int
    record: Policy
    serve: Policy
    entry_sizes: Sequence[int | None]
    found: _Found
    mesh: DeviceMesh | None
    batches: tuple[tuple[Any, str], ...] = ()

    def execute(self, tensors: Sequence[torch.Tensor], *, check: bool = False) -> tuple[torch.Tensor, ...]:
        """``(*arguments, *values to hand back)`` -> ``(*outputs, *values recorded)``.

        ``check`` looks out for captured tensors; the arguments must be detached then.
        """
        n, found = self.num_tensors, self.found

        def body(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = optree.tree_unflatten(self.treedef, _merge(self.statics, tensors[:n]))
            entries = _entries(tensors[n:], self.entry_sizes)
            look = check_captured if check else None
            tape = Tape(record=self.record, serve=self.serve, entries=entries, check=look)
            with bound(self.mesh), tape.run(), _Guard() if check else nullcontext():
                outputs, found.out_treedef = optree.tree_flatten(self.fn(*args, **kwargs), none_is_leaf=True)
            found.out_statics = _statics(outputs)
            found.served = tape.position
            found.names = [name for name, _ in tape.recorded]
            found.entry_sizes = _sizes(entry for _, entry in tape.recorded)
            values = [o for o in outputs if isinstance(o, torch.Tensor)]
            found.is_float = [v.is_floating_point() for v in values]
            return (*values, *[t.detach() for _, entry in tape.recorded for t in entry or ()])

        run = body
        for in_dims, randomness in self.batches:
            run = torch.vmap(run, in_dims=in_dims + (0,) * (len(tensors) - n), randomness=randomness)
        return run(*tensors)

    def replayed(self) -> "_Region":
        """The same region, handed back what its forward recorded."""
        found = dataclasses.replace(self.found)
        return dataclasses.replace(
            self, record=_nothing, serve=self.record, entry_sizes=found.entry_sizes, found=found
        )

    def derivative(
        self, saved: Sequence[torch.Tensor], wanted: Sequence[bool]
    ) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[int]]:
        """The floating outputs as a function of the arguments wanted, and which those are."""
        where = [i for i, w in enumerate(wanted) if w and saved[i].is_floating_point()]
        region, rng, is_float = self.replayed(), self.found.rng, self.found.is_float

        def call(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tensors = list(saved)
            for i, value in zip(where, values):
                tensors[i] = value
            with rng.replayed() if rng else nullcontext():
                return tuple(compress(region.execute(tensors), is_float))

        return call, where


def _statics(leaves: Sequence[Any]) -> list[Any]:
    return [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]


def _merge(statics: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if s is None else s[0] for s in statics]


def _sizes(entries: Iterable[Entry]) -> list[int | None]:
    return [None if entry is None else len(entry) for entry in entries]


def _entries(tensors: Sequence[torch.Tensor], sizes: Sequence[int | None]) -> list[Entry]:
    rest = iter(tensors)
    return [None if n is None else tuple(next(rest) for _ in range(n)) for n in sizes]


class _Remat(torch.autograd.Function):
    """``_Region.execute`` with the derivatives that recompute; ``(region, *tensors)``."""

    @staticmethod
    def forward(region: _Region, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = region.num_tensors
        rng = _Rng.now(tensors)
        inputs = [t.detach() for t in tensors[:n]]
        outputs = region.execute((*inputs, *tensors[n:]), check=True)
        region.found.rng = rng if rng.moved() else None
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        region, *tensors = inputs
        recorded = output[len(region.found.is_float) :]
        ctx.region, ctx.num_tensors = region, len(tensors)
        ctx.save_for_backward(*tensors[: region.num_tensors], *recorded)
        ctx.save_for_forward(*tensors[: region.num_tensors], *recorded)
        constant = [o for o, is_float in zip(output, region.found.is_float) if not is_float]
        ctx.mark_non_differentiable(*recorded, *constant)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        region = ctx.region
        saved = unwrap_dead_wrappers(ctx.saved_tensors)
        call, where = region.derivative(saved, ctx.needs_input_grad[1 : 1 + region.num_tensors])
        pull = torch.func.vjp(call, *(saved[i] for i in where))[1]
        grads = pull(tuple(compress(unwrap_dead_wrappers(cotangents), region.found.is_float)))
        found = dict(zip(where, grads))
        return None, *(found.get(i) for i in range(ctx.num_tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
        region = ctx.region
        if not any(region.found.is_float):
            return (None,) * (len(region.found.is_float) + len(ctx.saved_tensors) - region.num_tensors)
        with _set_fwd_grad_enabled(True):
            saved = [primal(t) for t in ctx.saved_tensors]
            call, where = region.derivative(saved, [t is not None for t in tangents[: region.num_tensors]])
            moving = tuple(saved[i] for i in where), tuple(tangents[i] for i in where)
            moved = iter(torch.func.jvp(call, *moving)[1])
        num_recorded = len(saved) - region.num_tensors
        return *(next(moved) if f else None for f in region.found.is_float), *[None] * num_recorded

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], region: _Region, *tensors: torch.Tensor) -> Any:
        n, dims = region.num_tensors, in_dims[1:]
        handed = [front(t, d, info.batch_size) for t, d in zip(tensors[n:], dims[n:])]
        batch = dims[:n], info.randomness
        outputs = _Remat.apply(
            dataclasses.replace(region, batches=(*region.batches, batch)), *tensors[:n], *handed
        )
        return outputs, (0,) * len(outputs)


# ---- tensors that come in by the back door -------------------------------------------------------


class _Guard(TorchFunctionMode):
    """Finds differentiable tensors that a region uses without having them as arguments.

    Inside the region nothing requires a gradient and no transform from outside is active, so whatever
    does, or belongs to such a transform, was captured.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            check_captured((args, kwargs), getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def check_captured(values: Any, operation: str) -> None:
    for leaf in optree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and _is_captured(leaf):
            raise captured_error("remat", leaf, f" in {operation}")


def _is_captured(tensor: torch.Tensor) -> bool:
    level = functorch.maybe_current_level() or 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.maybe_get_level(tensor) > level:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


# ---- random numbers -------------------------------------------------------------------------------


class _Rng:
    """The state of the random generators a region may draw from."""

    def __init__(self, devices: Sequence[int]) -> None:
        self.devices = devices
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in devices]

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> "_Rng":
        return cls(sorted({t.device.index for t in tensors if t.is_cuda}))

    def moved(self) -> bool:
        after = _Rng(self.devices)
        return not all(map(torch.equal, (self.cpu, *self.cuda), (after.cpu, *after.cuda)))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield
