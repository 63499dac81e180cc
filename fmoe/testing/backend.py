"""The laws of a backend, which carries tokens to their experts and mustn't change the layer."""

import gc
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import TransformError, argument_error
from ..introspect import raw_calls
from ..models.moe import moe_forward
from ..ops.core.axes import axis_names, axis_sizes, describe
from ..ops.core.primitive import operators
from ..ops.core.tape import checkpoint_names
from ..ops.transport import Transport
from ..parallel.together import from_all, num_ranks
from ..transforms import remat, save_nothing, value_and_grad
from .moving import adjoint, plans, unused_rows
from .report import Found, Report, by_name, hold
from .samples import TOLERANCE, error, noise, same_bits, short
from .setting import Case, Setting, case_of


def _oracle(case: Case, what: str) -> Iterator[Found]:
    s, loss, (dense, params, x) = case.setting, case.dense_loss(), case.dense()
    y = case.own(dense(params, x))
    yield s.found(f"{what}: the output", error(s.forward(*case.mine()), y))
    with torch.no_grad():
        yield s.found(f"{what}: the output without gradients", error(s.forward(*case.mine()), y))
    got = torch.func.grad(case.loss(), (0, 1))(*case.mine())
    yield from case.compared(got, torch.func.grad(loss, (0, 1))(params, x), f"{what}: the gradient")


def oracle(s: Setting) -> Iterator[Found]:
    """A layer's output and gradients are those of the dense oracle in float64."""
    yield from _oracle(case_of(s), "tokens on every device")
    yield from _oracle(case_of(s._replace(score_before_experts=True)), "weights before the experts")


def degenerate(s: Setting) -> Iterator[Found]:
    """So they are where a device or expert has no tokens, where a few experts get all, and without tokens."""
    n = s.place.size
    yield from _oracle(case_of(s, [0] + [s.tokens] * (n - 1)), "a device without tokens")
    yield from _oracle(case_of(s, [0] * n), "no tokens at all")
    case = case_of(s)
    case.params.router.bias_E.copy_(torch.arange(s.num_experts) ** 2 * 10.0)
    yield from _oracle(case, "all tokens on the last experts")


def invariance(s: Setting) -> Iterator[Found]:
    """The same parameters and tokens give the same on one device and on this mesh."""
    case = case_of(s)
    alone = lambda p, x: moe_forward(p, x, router=s.config)  # noqa: E731
    yield s.found("the output", error(s.forward(*case.mine()), case.own(alone(case.params, case.x))))
    loss = lambda p, x: (alone(p, x).double().tanh() * case.c.double()).sum()  # noqa: E731
    expected = torch.func.grad(loss, (0, 1))(case.params, case.x)
    yield from case.compared(torch.func.grad(case.loss(), (0, 1))(*case.mine()), expected, "the gradient")


def second(s: Setting) -> Iterator[Found]:
    """Second derivatives are the dense oracle's."""
    case = case_of(s)
    loss, (_, params, x) = case.dense_loss(), case.dense()
    g = torch.func.grad(loss, (0, 1))(params, x)
    u = optree.tree_map(lambda t: noise(t) / max(1, t.numel()) ** 0.5, g)
    expected = torch.func.vjp(torch.func.grad(loss, (0, 1)), params, x)[1](u)
    got, pull, *_ = torch.func.vjp(torch.func.grad(case.loss(), (0, 1)), *case.mine())
    mine = optree.tree_map(lambda t, like: t.to(like.dtype), (s.held(u[0]), case.own(u[1])), got)
    yield from case.compared(pull(mine), expected, "the gradient's derivative", 4 * s.allowed)


def transforms(s: Setting) -> Iterator[Found]:
    """Forward mode is right, also of gradients. vmap over tokens is right or raises TransformError."""
    case = case_of(s)
    params, x = case.mine()
    t = s.rows(len(case.x))
    dense, wide, x_wide = case.dense()
    expected = torch.func.jvp(lambda x: dense(wide, x), (x_wide,), (t.double(),))[1]
    got = torch.func.jvp(lambda x: s.forward(params, x), (x,), (case.own(t),))[1]
    yield s.found("jvp of the output", error(got, case.own(expected)), 4 * s.allowed)
    slope = torch.func.grad(case.dense_loss(), 1)
    expected = torch.func.jvp(lambda x: slope(wide, x), (x_wide,), (t.double(),))[1]
    mine = torch.func.grad(case.loss(), 1)
    got = torch.func.jvp(lambda x: mine(params, x), (x,), (case.own(t),))[1]
    yield s.found("jvp of the gradient", error(got, case.own(expected)), 8 * s.allowed)
    try:
        each = torch.vmap(lambda x: s.forward(params, x))(x[None])[0]
    except TransformError:
        return
    yield s.found("vmap", error(each, s.forward(params, x)))


def recomputation(s: Setting) -> Iterator[Found]:
    """remat changes no bit, and by default moves no token twice."""
    case = case_of(s)
    kept = {name for name, op in operators().items() if checkpoint_names()[op.checkpoint]}
    layers = {"none": s.forward, "default": remat(s.forward), "all": remat(s.forward, save_nothing)}
    calls: dict[str, dict[str, int]] = {}
    grads = {}
    for name, layer in layers.items():
        with raw_calls() as counted:
            grads[name] = value_and_grad(case.loss(layer), (0, 1))(*case.mine())
        calls[name] = {op: count for op, count in counted.items() if op in kept}
    compare, allowed = (error, s.allowed) if s.any_order else (same_bits, 0.0)
    yield s.found("recomputing by default, the gradient", compare(grads["default"], grads["none"]), allowed)
    yield s.found("recomputing everything, the gradient", compare(grads["all"], grads["none"]), allowed)
    more = {op: n - calls["none"].get(op, 0) for op, n in calls["default"].items()}
    yield s.found(f"calls of {', '.join(sorted(more))}", float(max(more.values(), default=0)), 0.0)
    fewer = sum(calls["all"].values()) <= sum(calls["none"].values())
    yield s.found("calls when everything is recomputed, which should be more,", float(fewer), 0.0)


def compilation(s: Setting) -> Iterator[Found]:
    """torch.compile(fullgraph=True) gives the same, with one graph for any number of tokens but the first."""
    n, most = s.place.size, s.tokens
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, compiled = s.forward, None
    for count in (most, max(2, most - 3), max(2, most // 2)):
        case = case_of(s, [count] * n)
        compiled = compiled or torch.compile(layer, fullgraph=True, backend="aot_eager")
        want = value_and_grad(case.loss(), (0, 1))(*case.mine())
        got = value_and_grad(case.loss(compiled), (0, 1))(*case.mine())
        yield s.found(f"{count} tokens on each device", error(got, want))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield s.found("the number of graphs beyond two", float(max(0, graphs - 2)), 0.0)
    if torch.__version__ >= "2.12":  # before 2.12, Dynamo takes remat only inside shard_map
        around = torch.compile(remat(layer), fullgraph=True, backend="aot_eager")
        yield s.found("around remat", error(value_and_grad(case.loss(around), (0, 1))(*case.mine()), want))


def no_leak(s: Setting) -> Iterator[Found]:
    """Neither forwards without gradients nor steps with them keep a tensor alive."""
    case = case_of(s)
    params, x = case.mine()
    step, steps = torch.func.grad(case.loss(), (0, 1)), 3
    counts: list[int] = []
    gc.freeze()  # leave out objects that were there before
    try:
        for _ in range(4):
            for _ in range(steps):
                step(params, x)
            with torch.no_grad():
                for _ in range(max(steps, s.forwards // 3)):
                    s.forward(params, x)
            counts.append(_tensors(at_most=counts[-1] if counts else 0))
    finally:
        gc.unfreeze()
    # The median of three, as caches may fill.
    more = sorted(late - early for early, late in pairwise(counts))[1]
    yield s.found("the number of tensors that each round leaves", max(0.0, float(more)), 0.0)


def _tensors(at_most: int) -> int:
    """How many there are. More than ``at_most`` are counted again: gloo's threads may still hold one."""
    for _ in range(20):
        gc.collect()
        count = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        if count <= at_most:
            break
        time.sleep(0.01)
    return count


LAWS = by_name(
    oracle, degenerate, invariance, adjoint, unused_rows, plans, second, transforms, recomputation,
    compilation, no_leak,
)  # fmt: skip


def check_backend(
    backend: Transport | None,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: int = 8,
    dim: int = 64,
    num_experts: int | None = None,
    top_k: int = 3,
    any_order: bool = False,
    forwards: int = 30,
    laws: Sequence[str] | None = None,
    seed: int | None = None,
) -> Report:
    """Check that a backend keeps the laws. All ranks of the mesh call this with the same arguments.

    ===========  =================================================================================
    backend      carries tokens along the mesh's axis ``ep``, as :func:`fmoe.shard_map` takes it.
                 ``None``: its default
    mesh         of all ranks, with an axis ``ep``
    dtype        of rows and weights; the allowed errors follow from it
    tokens       the most that a device sends
    dim          of a token
    num_experts  a multiple of the devices along ``ep``; default: four on each, and at least eight
    top_k        experts per token
    any_order    rows arrive in another order each time, so sums are equal only within rounding
    forwards     how many forwards ``no_leak`` runs
    laws         some of ``oracle``, ``degenerate``, ``invariance``, ``adjoint``, ``unused_rows``, ``plans``,
                 ``second``, ``transforms``, ``recomputation``, ``compilation``, ``no_leak``; default: all
    seed         of everything random; fresh by default, and in the report
    -> Report    the findings of each law; ``print`` it
    ===========  =================================================================================

    Raises :class:`LawBroken` on every rank. It says which comparison of which law is off, by how much, on
    which rank, and how to see it again. After an exception, only the rank that met it raises, at once, and
    the others may wait for it. Raises ``ValueError`` for sizes that don't fit the mesh.

    >>> import fmoe
    >>> mesh = fmoe.make_mesh("ep=1", device_type="cpu")
    >>> check_backend(None, mesh, laws=["adjoint", "plans"]).broken
    []
    """
    if "ep" not in axis_names(mesh) or mesh.size() != num_ranks():
        got, expected = f"{describe(mesh)} among {num_ranks()} ranks", "a mesh of all ranks with an axis ep"
        remedy = 'Make it with fmoe.make_mesh("ep=2"), say.'
        raise argument_error("check_backend", "mesh", got=got, expected=expected, remedy=remedy)
    devices = axis_sizes(mesh)["ep"]
    num_experts = max(8, 4 * devices) if num_experts is None else num_experts
    if num_experts % devices or not 1 <= top_k <= num_experts:
        got = f"{num_experts} on {devices} devices, with top_k={top_k}"
        expected, remedy = "as many on each device, and no fewer than top_k", "Raise num_experts."
        raise argument_error("check_backend", "num_experts", got=got, expected=expected, remedy=remedy)
    if dtype not in TOLERANCE:
        raise argument_error("check_backend", "dtype", got=dtype, expected=f"one of {list(TOLERANCE)}")
    setting = Setting(mesh, backend, dtype, tokens, dim, num_experts, top_k, any_order, forwards)
    default = "torch.distributed's all-to-all" if devices > 1 else "no backend"
    name = default if backend is None else type(backend).__name__
    title = f"{name} on {describe(mesh)}, {mesh.device_type}, {short(dtype)}"
    return hold("check_backend", title, LAWS, setting, laws, seed, together=from_all)
