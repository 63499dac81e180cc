"""Looking inside: what operators support, and what a call keeps, runs and sends."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import optree
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import ops, parallel
from .ops.core.compress import entry_bytes
from .ops.core.primitive import NAMESPACE, Operator, operators
from .ops.core.refuse import Unsupported
from .ops.core.residuals import Residual, Residuals, residuals_of
from .ops.core.tape import Policy, Tape, checkpoint_names, on_tape
from .parallel.backends.wire import Traffic, close_count, open_count
from .training.show import Shown, show_placement, show_schedule
from .transforms import save_declared

__all__ = [
    "Residual", "Residuals", "Shown", "Support", "kept_bytes", "operator_class", "operator_support",
    "raw_calls", "saved_bytes", "saved_residuals", "show_placement", "show_schedule", "wire_bytes",
]  # fmt: skip


class Support(NamedTuple):
    """The transforms that one operator supports.

    ``vjp``, ``jvp`` and ``vmap`` are one of:

    - ``"rule"``: written by hand.
    - ``"derived"``: from the operator's reference.
    - ``"constant"``: no floating-point output, so there is nothing to differentiate.
    - ``"error"``: raises, with a remedy.

    ``compiled`` says whether autograd goes through the operator under ``torch.compile``.

    >>> found = {support.operator: support for support in operator_support()}["experts_up"]
    >>> found.vjp, found.jvp, found.kept
    ('rule', 'derived', False)
    """

    operator: str
    checkpoint: str
    kept: bool
    vjp: str
    jvp: str
    vmap: str
    compiled: bool


def operator_support() -> list[Support]:
    """All operators of fmoe by name, from their declarations.

    >>> [s for s in operator_support() if s.operator == "topk"][0].kept
    True
    """
    for package in (ops, parallel):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return [_support(op) for _, op in sorted(operators().items())]


def _support(op: Operator) -> Support:
    def support(rule: str) -> str:
        match getattr(op.rules, rule):
            case Unsupported():
                return "error"
            case None:
                return "constant"
        return "rule" if rule in op.by_hand else "derived"

    vjp, jvp, vmap = map(support, ("vjp", "jvp", "vmap"))
    kept = checkpoint_names()[op.checkpoint]
    return Support(op.name, op.checkpoint, kept, vjp, jvp, vmap, compiled=vjp != "derived")


# For each class, how its operators' names begin after the namespace. The first that fits counts.
_CLASSES = {
    "attention": ("attention", "segment_attention"),
    "loss": ("cross_entropy",),
    "experts": ("experts", "grouped", "_grouped_mm", "weighted_sum"),
    "communication": ("exchange", "send", "psum", "all_", "reduce_", "gather_params", "begin_", "ppermute",
                      "wait_tensor", "combine", "join", "deepep"),
    "routing": ("product", "topk", "weigh", "layout", "gather", "scatter"),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_grouped"),
    "embedding": ("embedding",),
}  # fmt: skip


def operator_class(name: str) -> str:
    """The kind of work an operator does, by its name; ``"elementwise"`` if no other fits.

    >>> operator_class("fmoe::experts_up"), operator_class("aten::mm"), operator_class("aten::mul")
    ('experts', 'matrix products', 'elementwise')
    """
    space, _, short = name.partition("::")
    if space in ("c10d", "_c10d_functional") or "nccl" in name:
        return "communication"
    for kind, starts in _CLASSES.items():
        if short.startswith(starts) and (space == NAMESPACE or kind not in ("routing", "attention")):
            return kind
    return "elementwise"


def saved_bytes(
    fn: Callable[..., Any], *args: Any, policy: Policy | None = None, **kwargs: Any
) -> dict[str, int]:
    """Bytes that ``remat(fn, policy)`` keeps beyond its arguments, by checkpoint name. Computes nothing.

    ===========  ======================================================================
    fn           the function, not yet wrapped in ``remat``
    args         its arguments; only shapes, dtypes and devices matter
    policy       as for :func:`fmoe.remat`
    -> dict      checkpoint name -> bytes of the outputs kept under it
    ===========  ======================================================================

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16)
    >>> saved_bytes(fmoe.moe_forward, params, torch.randn(4, 8), policy=fmoe.save("topk"))
    {'topk': 64}
    """
    tape = Tape(record=policy or save_declared, serve=lambda name: False)
    with FakeTensorMode() as mode:

        def fake(leaf: Any) -> Any:
            return mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

        fake_args, fake_kwargs = optree.tree_map(fake, (args, kwargs))
        with on_tape(tape):
            fn(*fake_args, **fake_kwargs)
    total: Counter[str] = Counter()
    for entry in tape.recorded:
        total[entry.checkpoint] += entry_bytes(entry, tape.record)
    return dict(total)


def saved_residuals(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Residuals:
    """The values that live between ``fn(*args)`` and its backward, as rows and as a table. Runs ``fn`` once.

    ============  ======================================================================
    fn            any differentiable function, of fmoe or of plain PyTorch
    args          we differentiate those that require a gradient; if none does, all floating ones
    -> Residuals  a tuple of rows, one a storage; ``total("kept")`` adds up bytes
    ============  ======================================================================

    A row has these fields:

    ============  ======================================================================
    ``name``      its checkpoint name, if it has one; an argument's path
    ``shape``     of the value, on this device; ``dtype``, too
    ``bytes``     of its whole storage
    ``operator``  what made it, such as ``aten::mm`` or ``fmoe::topk``
    ``source``    the line that called it: the innermost outside PyTorch and fmoe's machinery
    ``how``       ``"kept"``, ``"kept in fp8"``, ``"offloaded"``, ``"recomputed"``, ``"captured"`` or
                  ``"argument"``
    ============  ======================================================================

    What is kept in fp8 has two rows, of its numbers and of their scales.

    A value counts as recomputed if it has a checkpoint name and ``remat`` doesn't keep it. Arguments live
    anyway, and so do leaves that ``fn`` captures, such as a module's weights. Tensors saved for a part of the
    graph that the result doesn't need don't count. A compiled function's values have no operator.

    Raises ``TransformError`` for a ``fn`` that calls ``torch.func.grad`` or ``vjp``, and beneath these. They
    forbid the hooks that see saved tensors.

    Source: ``jax.ad_checkpoint.print_saved_residuals``; torch.autograd.graph.saved_tensors_hooks.

    >>> import fmoe
    >>> def mlp(w, x):
    ...     hidden = fmoe.checkpoint_name(x @ w["up"], "hidden")
    ...     return hidden.relu() @ w["down"]
    >>> w, x = {"up": torch.randn(4, 16), "down": torch.randn(16, 4)}, torch.randn(3, 4)
    >>> for row in saved_residuals(mlp, w, x):
    ...     print(row.name, row.shape, row.bytes, row.operator, row.how)
     (3, 16) 192 aten::relu kept
    0.down (16, 4) 256  argument
    0.up (4, 16) 256  argument
    1 (3, 4) 48  argument
    >>> [row.name for row in saved_residuals(fmoe.remat(mlp, fmoe.save("hidden")), w, x) if row.how == "kept"]
    ['hidden']
    """
    return residuals_of(fn, args, kwargs)


def kept_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Measured bytes that live between ``fn(*args)`` and its backward, beyond what ``args`` hold.

    They are those of :func:`saved_residuals`. Each storage counts once, in full.

    >>> x = torch.randn(4, requires_grad=True)
    >>> kept_bytes(lambda x: (x * 2).sin().sum(), x)
    16
    """
    return saved_residuals(fn, *args).total("kept", "kept in fp8", "offloaded", "captured")


@contextmanager
def raw_calls() -> Iterator[dict[str, int]]:
    """Counts how often each operator's raw kernel runs inside. The dict is filled when the block ends.

    >>> from fmoe.ops.bases import gather
    >>> with raw_calls() as counts:
    ...     out = gather(torch.ones(2, 1), torch.tensor([0, 1]))
    >>> counts
    {'gather': 1}
    """
    counts: dict[str, int] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        yield counts
    for event in profile.key_averages():
        space, _, name = event.key.partition("::")
        if space == NAMESPACE:
            counts[name] = event.count


@contextmanager
def wire_bytes() -> Iterator[dict[str, Traffic]]:
    """Counts the bytes that dispatch and combine send and receive inside, by the operator that sends them.

    ==================  ==================================================================
    ``sizes``           dispatch: the number and kind of the rows that will follow
    ``exchange``        dispatch: rows, weights and expert ids
    ``send_back``       combine; also dispatch's transpose if there is only one cotangent
    ``send``            combine's transpose
    ``send_both_back``  dispatch's transpose: cotangents of rows and weights
    ==================  ==================================================================

    The bytes follow from the tensors handed to ``torch.distributed`` and their split sizes. What a device
    sends itself crosses no wire, and counts apart as ``kept``. With all experts on one device nothing is
    sent.

    >>> import fmoe
    >>> from fmoe.ops.core.axes import Group
    >>> from fmoe.parallel.collectives import group_alone
    >>> router, x = fmoe.RouterParams(torch.randn(6, 8), torch.zeros(6)), torch.randn(4, 8)
    >>> routing = fmoe.route(router, x, fmoe.RouterConfig())
    >>> with wire_bytes() as counts:
    ...     x_SD, plan = fmoe.parallel.AllToAll(Group(group_alone(), 1, 0)).dispatch(x, routing)
    >>> counts["exchange"]     # 4 rows of 8 values, 2 weights and 2 ids
    Traffic(sent=0, received=0, kept=224)
    """
    count = open_count()
    try:
        yield count
    finally:
        close_count(count)
