"""Transforms of functions: gradients on pytrees, and recomputation with policies.

``torch.func``'s own ``grad``, ``vjp``, ``jvp`` and ``vmap`` apply to fmoe's functions as they are. This
module adds checkpointing that works inside them, which PyTorch lacks.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch._C import _functorch as functorch

from .errors import TransformError, argument_error, check_function
from .ops.balance import MoEStats
from .ops.core import engine
from .ops.core.derive import replaced
from .ops.core.dtensors import local
from .ops.core.inductor import inductor
from .ops.core.naming import check_names
from .ops.core.primitive import operators
from .ops.core.recompute import recomputing
from .ops.core.refuse import refuse_transforms_inside_compile
from .ops.core.tape import COMPRESS, OFFLOAD, Policy, checkpoint_names
from .ops.route import TOPK
from .tree import check_tensors, dotted_names

_LOG = logging.getLogger("fmoe")

# ---- policies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What :func:`save`, :func:`offload` and :func:`compress` give: the first that keeps a value decides."""

    policies: tuple[Policy, ...]

    def __call__(self, name: str) -> bool | str:
        return _first(self.policies, name)

    def __or__(self, other: Policy) -> "Names":
        return Names((*self.policies, *_parts(other))) if callable(other) else NotImplemented

    def __ror__(self, other: Policy) -> "Names":
        return Names((*_parts(other), *self.policies)) if callable(other) else NotImplemented


def _first(policies: tuple[Policy, ...], name: str) -> bool | str:
    for policy in policies:
        if how := policy(name):
            return how
    return False


def _parts(policy: Policy) -> tuple[Policy, ...]:
    return policy.policies if isinstance(policy, Names) else (policy,)


def _among(names: tuple[str, ...], answer: bool | str, name: str) -> bool | str:
    return answer if name in names else False


def save(*names: str) -> Names:
    """The policy that keeps what has these names, and recomputes the rest.

    They are names of operators, or those that :func:`fmoe.checkpoint_name` gives to values of your own.
    ``save("topk") | offload("attention")`` does both.

    Raises ``ValueError`` for a name that is nearly an operator's, but isn't.

    >>> save("dispatch", "topk")("topk"), save("hidden")("topk")
    (True, False)
    """
    check_names("save", "names", names)
    return Names((functools.partial(_among, names, True),))


def offload(*names: str) -> Names:
    """The policy that keeps what has these names in the host's memory, and recomputes the rest.

    On CUDA, values go to pinned memory on a stream of their own, while the next layers compute. They begin to
    come back when the backward of the next region begins. Their own region's backward waits for all of them.
    On a CPU they stay where they are. Beside ``save``, the first that names a value decides.

    Raises ``ValueError`` as :func:`save` does. On CUDA, raises ``TransformError`` under ``torch.compile`` and
    inside :func:`fmoe.graphed`.

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16), torch.randn(4, 8)
    >>> layer = fmoe.remat(fmoe.moe_forward, fmoe.save("topk") | fmoe.offload("experts_grouped_mm"))
    >>> grads = torch.func.grad(lambda p, x: layer(p, x).sum())(params, x)
    """
    check_names("offload", "names", names)
    return Names((functools.partial(_among, names, OFFLOAD),))


def compress(*names: str) -> Names:
    """The policy that keeps what has these names in fp8, and recomputes the rest.

    A row, along the last dimension, is kept as e4m3 numbers and a float32 scale, in about half the bytes of
    bfloat16. The forward is exact. Derivatives see the rounded rows, in their own dtype: each number is off
    by at most 1/16 of itself, or 2^-10 of its row's scale, its largest over 448. With experts and attention
    kept so, the gradients of a small model in bfloat16 were off by 1.4%, and those of single parameters by up
    to 4%, in place of 0.7% and 1.1% (``docs/transforms.md``).

    Only bfloat16, float16 and float32 with at least two dimensions are rounded. Other values are kept as they
    are, and so are rows so short that fp8 takes no fewer bytes. Beside ``save``, the first that names a value
    decides. Experts are never chosen again from rounded numbers: ``"topk"`` is kept, too.

    Raises ``ValueError`` as :func:`save` does, and ``TransformError`` under ``torch.compile``.

    Source: activation compressed training, as in ActNN (arXiv 2104.14129) and COAT (arXiv 2410.19313).

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16), torch.randn(4, 8)
    >>> layer = fmoe.remat(fmoe.moe_forward, fmoe.compress("experts_grouped_mm"))
    >>> grads = torch.func.grad(lambda p, x: layer(p, x).sum())(params, x)
    """
    check_names("compress", "names", names)
    return Names((functools.partial(_among, names, COMPRESS), functools.partial(_among, (TOPK,), True)))


def save_nothing(name: str) -> bool:
    """The policy that recomputes everything from the function's inputs.

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16), torch.randn(4, 8)
    >>> loss = lambda layer: lambda params: layer(params, x).sum()
    >>> lean = torch.func.grad(loss(fmoe.remat(fmoe.moe_forward, fmoe.save_nothing)))(params)
    >>> torch.equal(lean.experts.w_in, torch.func.grad(loss(fmoe.moe_forward))(params).experts.w_in)
    True
    """
    return False


def save_everything(name: str) -> bool:
    """The policy that keeps the outputs of every fmoe operator, and recomputes PyTorch's own operations.

    >>> import fmoe
    >>> from fmoe.introspect import raw_calls
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16), torch.randn(4, 8)
    >>> layer = fmoe.remat(fmoe.moe_forward, fmoe.save_everything)
    >>> with raw_calls() as counts:
    ...     grads = torch.func.grad(lambda params: layer(params, x).sum())(params)
    >>> counts["experts_up"]  # once, as without remat
    1
    """
    return True


def save_declared(name: str) -> bool:
    """The default policy: each operator's own declaration. It keeps communication and top-k.

    >>> save_declared("topk"), save_declared("experts_grouped_mm")
    (True, False)
    """
    return checkpoint_names().get(name, False)


# ---- remat -------------------------------------------------------------------------------------


def remat(fn: Callable[..., Any], policy: Policy | None = None) -> Callable[..., Any]:
    """``fn``, which keeps for the backward only its inputs and what ``policy`` names.

    ===========  ======================================================================
    fn           a function of pytrees of tensors; everything differentiable must be an argument
    policy       :func:`save`, :func:`offload`, :func:`compress`, :func:`save_nothing`,
                 :func:`save_everything`, or any function of a checkpoint name; ``None``: each operator's
                 own declaration
    -> function  gives the same values and, unless something is compressed, gradients, bit for bit
    ===========  ======================================================================

    It works in plain autograd, under and around every ``torch.func`` transform, and nested. ``torch.compile``
    goes outside: ``torch.compile(remat(fn))``. What ``policy`` keeps doesn't run again. Random numbers are
    drawn again as they were, and modes (autocast, ``no_grad``) are entered again. In plain autograd,
    saved-tensor hooks and PyTorch's checkpoint may go inside and outside.

    Raises ``TransformError`` for such hooks beneath a ``torch.func`` transform. Raises ``ValueError`` if
    ``fn`` uses a differentiable tensor that isn't an argument, which would get no gradient.

    >>> import fmoe, torch
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16)
    >>> layer = fmoe.remat(fmoe.moe_forward, fmoe.save("topk"))
    >>> grads = torch.func.grad(lambda p, x: layer(p, x).sum())(params, torch.randn(4, 8))
    """
    check_function("remat", "fn", fn)
    policy = save_declared if policy is None else policy
    policies = _parts(policy)
    makers = save, offload, compress
    unnamed = next((f"{each.__name__} itself" for each in makers if each in policies), None)
    if unnamed or not callable(policy):
        got = unnamed or repr(policy)
        expected = "a function of an operator's checkpoint name, or None"
        remedy = 'Use fmoe.save("topk"), say.'
        raise argument_error("remat", "policy", got=got, expected=expected, remedy=remedy)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            refuse_transforms_inside_compile("remat")
            contexts = functools.partial(_selective_contexts, policies)  # Dynamo wants a module's function
            # checkpoint has keywords of its own
            whole = functools.partial(fn, **kwargs) if kwargs else fn
            return torch_checkpoint.checkpoint(whole, *args, use_reentrant=False, context_fn=contexts)
        return recomputing(fn, policy, args, kwargs)

    return call


def per_layer(remat_policy: str = "none", *, compiled: bool = False) -> Callable[..., Any]:
    """The wrapper of a model's layer that a command line's words ask for.

    ``remat_policy`` is ``"none"``, ``"full"`` (recompute everything), ``"default"`` (each operator's own
    declaration), ``"save:NAME,NAME"``, ``"offload:NAME,NAME"``, ``"compress:NAME,NAME"``, or several of these
    with ``+`` between them. ``compiled`` compiles each layer whole, by Inductor. A second backward
    (``retain_graph``) is right or an error.

    Raises ``ValueError`` for other words, for names that nobody declared, and for ``compress`` with
    ``compiled``.

    >>> per_layer("save:topk+offload:dispatch")(lambda x: x.sin())(torch.zeros(2))
    tensor([0., 0.])
    """
    policy = None if remat_policy == "none" else _spoken(remat_policy)
    if compiled and policy and COMPRESS in map(policy, checkpoint_names()):
        got, expected = f"{remat_policy!r}, compiled", "none that compresses in compiled layers"
        remedy = "Use save, or compile nothing."
        raise argument_error("per_layer", "remat_policy", got=got, expected=expected, remedy=remedy)

    def wrap(layer: Callable[..., Any]) -> Callable[..., Any]:
        layer = layer if policy is None else remat(layer, policy)
        return torch.compile(layer, fullgraph=True, backend=inductor) if compiled else layer

    return wrap


def _spoken(words: str) -> Policy:
    found: list[Policy] = []
    alone: dict[str, Policy] = {"full": save_nothing, "default": save_declared}
    named = {"save": save, "offload": offload, "compress": compress}
    for word in words.split("+"):
        kind, colon, names = word.partition(":")
        if colon and kind in named:
            check_names(kind, "names", tuple(names.split(",")), own=False)
            found.append(named[kind](*names.split(",")))
        elif word in alone:
            found.append(alone[word])
        else:
            kinds = ", ".join(f"{kind}:NAME,NAME" for kind in named)
            expected = f"none, full, default, {kinds}, or several joined by +"
            raise argument_error("per_layer", "remat_policy", got=repr(words), expected=expected)
    # Dynamo takes no policy inside another.
    return Names(tuple(part for policy in found for part in _parts(policy)))


def _selective_contexts(policies: tuple[Policy, ...]) -> Any:
    decide = functools.partial(_selective_policy, policies)
    return torch_checkpoint.create_selective_checkpoint_contexts(decide)


def _selective_policy(policies: tuple[Policy, ...], ctx: Any, raw: Any, *args: Any, **kwargs: Any) -> Any:
    names = [op.checkpoint_of(args) for op in operators().values() if op.raw is raw]
    kept = [how for name in names if (how := _first(policies, name))]
    if COMPRESS in kept:
        raise TransformError(
            "remat: policy: got one that compresses, expected none under torch.compile. Use fmoe.save or "
            "compile nothing."
        )
    if OFFLOAD in kept and any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
        raise TransformError(
            "remat: policy: got one that offloads, on CUDA, expected none under torch.compile. Use fmoe.save "
            "or compile nothing."
        )
    choices = torch_checkpoint.CheckpointPolicy
    return choices.MUST_SAVE if kept else choices.PREFER_RECOMPUTE


# ---- gradients for training loops ------------------------------------------------------------------


def value_and_grad(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """``fn``'s value and its gradient on pytrees by ``torch.autograd``, for training loops.

    ===========  ======================================================================
    fn           returns a scalar tensor, or ``(scalar, aux)`` with ``has_aux``
    argnums      which positional arguments to differentiate
    -> function  ``(value, grads)`` or ``((value, aux), grads)``. ``grads`` mirrors the argument,
                 or is a tuple for a tuple of argnums; a leaf that isn't used gets zeros
    ===========  ======================================================================

    Unlike ``torch.func.grad_and_value`` it takes compiled functions and DTensors, and runs the engine's
    ordinary backward. The arguments are detached first, so no gradient flows to anything outside.

    Raises ``ValueError`` for leaves that aren't floating-point tensors, and for values that aren't scalars,
    and ``TransformError`` inside transforms of ``torch.func``.

    >>> value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
    (tensor(5.), {'w': tensor([2., 4.])})
    """
    check_function("value_and_grad", "fn", fn)
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not all(-len(args) <= i < len(args) for i in positions):
            expected = f"positions among the {len(args)} positional arguments"
            remedy = "Pass what is differentiated by position."
            raise argument_error("value_and_grad", "argnums", got=argnums, expected=expected, remedy=remedy)
        chosen = tuple(args[i] for i in positions)
        if not torch.compiler.is_dynamo_compiling() and functorch.get_interpreter_stack():
            raise TransformError(
                "value_and_grad: got a call inside a transform of torch.func, expected none around it, as it "
                "runs torch.autograd. Use torch.func.grad_and_value, which nests."
            )
        leaves = check_tensors("value_and_grad", "args", chosen)
        for i, leaf in enumerate(leaves):
            if not leaf.is_floating_point():
                name, expected = f"args.{dotted_names(chosen)[i]}", "a floating dtype"
                remedy = "Leave it out of argnums."
                raise argument_error("value_and_grad", name, got=leaf.dtype, expected=expected, remedy=remedy)
        treedef = optree.tree_structure(chosen)
        variables = [leaf.detach().requires_grad_() for leaf in leaves]
        trees = optree.tree_unflatten(treedef, variables)
        with torch.enable_grad():
            out = fn(*replaced(args, positions, trees), **kwargs)
            value = _scalar(out, has_aux)
            if value.requires_grad:
                grads = engine.grad(value, variables, materialize_grads=True)
            else:
                grads = tuple(torch.zeros_like(v) for v in variables)
        detached = optree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, out)
        trees = optree.tree_unflatten(treedef, grads)
        return detached, trees[0] if isinstance(argnums, int) else trees

    return call


def _scalar(out: Any, has_aux: bool) -> torch.Tensor:
    """The part of a function's result that is differentiated."""
    paired = isinstance(out, tuple) and len(out) == 2
    value = out if not has_aux else out[0] if paired else None
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value
    got: Any = type(out if has_aux else value)
    if isinstance(value, torch.Tensor):
        got = f"a value of shape {tuple(value.shape)}"
    expected = "(a scalar tensor, aux)" if has_aux else "a scalar tensor"
    remedy = "Sum or average it; return anything else as aux with has_aux=True."
    raise argument_error("value_and_grad", "fn", got=got, expected=expected, remedy=remedy)


# ---- steps that are thrown away ------------------------------------------------------------------


def exact_on_overflow(fast: Callable[..., Any], exact: Callable[..., Any]) -> Callable[..., Any]:
    """``fast``, whose result is thrown away for that of ``exact`` where a bounded backend had no room.

    ===========  ==========================================================================
    fast         a function whose result has :class:`fmoe.MoEStats` somewhere in it, such as a step's value
                 and gradient with a :class:`fmoe.parallel.Backend` that has a ``capacity``
    exact        the same function with a backend that has room for everything
    -> function  the same of the same arguments: never wrong, and rarely slower than ``fast``
    ===========  ==========================================================================

    No token is dropped. Either all had room, and the result is exact. Or some hadn't, and nobody sees the
    result. The host waits once, for one number. It is a sum over all devices, so that all go the same way.
    The logger ``fmoe`` says when a step is repeated. Neither function may write into its arguments.

    Raises ``ValueError`` for a result without :class:`fmoe.MoEStats`.

    >>> import fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=12), torch.randn(5, 8)
    >>> mesh, some = fmoe.make_mesh("ep=1"), fmoe.parallel.Backend(host_sync=False, capacity=1.5)
    >>> layer = functools.partial(fmoe.moe_forward, params, mesh=mesh, return_stats=True)
    >>> fast, exact = (functools.partial(layer, backend=backend) for backend in (some, "all_to_all"))
    >>> y, stats = exact_on_overflow(fast, exact)(x)
    >>> y.shape, stats.overflow
    (torch.Size([5, 8]), tensor(0))
    """
    check_function("exact_on_overflow", "fast", fast)
    check_function("exact_on_overflow", "exact", exact)

    @functools.wraps(fast)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = fast(*args, **kwargs)
        leaves = optree.tree_leaves(out, is_leaf=lambda node: isinstance(node, MoEStats))
        found = [local(leaf.overflow) for leaf in leaves if isinstance(leaf, MoEStats)]
        if not found:
            got, expected = f"one that returns {type(out).__name__}", "a result that has MoEStats"
            remedy = "Return the stats of moe_forward(return_stats=True), or of the model's loss."
            raise argument_error("exact_on_overflow", "fast", got=got, expected=expected, remedy=remedy)
        missing = int(torch.stack(found).sum())
        if not missing:
            return out
        _LOG.info("no room for %d rows and pairs of rows and experts: the step is done again", missing)
        del out, leaves  # before those of the exact function are made
        return exact(*args, **kwargs)

    return call
