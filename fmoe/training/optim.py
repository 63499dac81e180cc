"""Functional optimisation: AdamW and clipping, values in, values out."""

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..models.moe import moe_specs
from ..models.params import ModelParams
from ..models.stages import counted_once
from ..ops.core.axes import axis_names, group_of
from ..ops.core.dtensors import is_dtensor, local, map_local
from ..ops.core.dtypes import accumulator
from ..ops.core.memory import alone
from ..ops.route import RouterParams
from ..ops.update import adamw as update_in_place
from ..ops.update import writes_gradient
from ..parallel.collective_ops import all_gather_op
from ..parallel.mesh import is_pipeline
from ..params import leaf_mask, trained_mask
from ..tree import check_tensors, dotted_names

ROUTER_MASK = trained_mask(moe_specs(dim=1, hidden_dim=1, num_experts=1).router)


class AdamWState(NamedTuple):
    """The number of updates so far (float32 scalar), and both moments as trees like the params.

    >>> adamw().init({"w": torch.ones(2)})
    AdamWState(step=tensor(0.), exp_avg={'w': tensor([0., 0.])}, exp_avg_sq={'w': tensor([0., 0.])})
    """

    step: torch.Tensor
    exp_avg: Any
    exp_avg_sq: Any


class Update(Protocol):
    """``update(params, grads, state, learning_rate, *, scale=None, donate=False) -> (params, state)``.

    Params and grads are trees of one structure. ``scale``, a float32 scalar, multiplies the gradients;
    ``donate`` lets it write into what it is given. :func:`adamw` says more.

    >>> optimizer, params, grads = adamw(weight_decay=0.0), [torch.ones(2)], [torch.ones(2)]
    >>> updated, state = optimizer.update(params, grads, optimizer.init(params), 0.25)
    >>> params, updated
    ([tensor([1., 1.])], [tensor([0.7500, 0.7500])])
    """

    def __call__(
        self,
        params: Any,
        grads: Any,
        state: Any,
        learning_rate: float | torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Any, Any]: ...


class Optimizer(NamedTuple):
    """Two pure functions: ``init(params) -> state`` and :class:`Update`, which :func:`adamw` makes.

    One of your own is two functions:

    >>> def update(params, grads, state, learning_rate, *, scale=None, donate=False):
    ...     rate = learning_rate * (1.0 if scale is None else scale)
    ...     return optree.tree_map(lambda p, g: p - rate * g, params, grads), state
    >>> sgd = Optimizer(lambda params: (), update)
    >>> sgd.update({"w": torch.ones(1)}, {"w": torch.ones(1)}, sgd.init(None), 0.25)
    ({'w': tensor([0.7500])}, ())
    """

    init: Callable[[Any], Any]
    update: Update


def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    moments_dtype: torch.dtype | None = None,
    trained: Any = None,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101): one pass over all numbers.

    =============  ====================================================================================
    betas, eps     as in the paper
    weight_decay   of leaves of two or more dimensions
    moments_dtype  of both moments; ``None``: each parameter's own, float32 for float16 ones
    trained        a tree prefix of bools, as ``{"head": True, "body": False}``, or a function of the params
                   that gives one; ``None``: :func:`trained_by_default`
    -> Optimizer   its ``update`` takes the learning rate, a float or a float32 scalar tensor
    =============  ====================================================================================

    Params, grads and both moments are trees of one structure. Tensors of one leaf share shape, device and
    placements. Params and grads also share the dtype. A leaf that isn't trained comes back as it is, and its
    moments are empty.

    Where moments and a parameter differ in dtype, both are updated in the wider one, a piece at a time, and
    the narrower is rounded once. Bfloat16 moments of float32 params, as in DeepSeek-V3's training, halve the
    state. With ``betas[1]`` above 0.996 some of them would stop decaying: each decrement rounds to nothing.
    Bfloat16 params lose every change below a 512th of a number. Instead, keep params in float32 and compute
    in bfloat16 with :func:`fmoe.training.gradients.computing_in`.

    ``update`` modifies nothing it is given and returns contiguous tensors that do not require grad. It
    multiplies gradients by ``scale``, such as :func:`clip_factor` gives, as it reads them. With
    ``donate=True`` it writes into the memory of ``params`` and ``state``, and with a ``scale`` into that of
    ``grads``. As with jax's ``donate_argnums``, the caller must not use them again. It still copies leaves
    that share memory, also with another tree, and gradients that are part of a graph.

    Raises ``ValueError`` where the trees or their leaves do not match, and for a learning rate or a ``scale``
    of another dtype or shape.

    >>> optimizer = adamw(weight_decay=0.0, trained={"w": True, "frozen": False})
    >>> params = {"w": torch.ones(2), "frozen": torch.ones(2)}
    >>> new, state = optimizer.update(params, params, optimizer.init(params), 0.25)
    >>> new, state.step
    ({'w': tensor([0.7500, 0.7500]), 'frozen': tensor([1., 1.])}, tensor(1.))
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise argument_error(
            "adamw", "betas", got=betas, expected="two numbers in [0, 1)", remedy="Try (0.9, 0.95)."
        )
    if moments_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        expected = "bfloat16, float32, float64 or None"
        remedy = "Leave it out; in float16 squares of small gradients would be zero."
        raise argument_error("adamw", "moments_dtype", got=moments_dtype, expected=expected, remedy=remedy)
    trained = trained_by_default if trained is None else trained
    functions = _AdamW(betas, eps, weight_decay, moments_dtype, trained)
    return Optimizer(functions.init, functions.update)


def trained_by_default(params: Any) -> Any:
    """Every leaf but the selection biases of routers, which load balancing moves: a tree of bools.

    A layer's specs say so (:class:`fmoe.params.ParamSpec`). To freeze more, change the tree:

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4)
    >>> trained_by_default(params).router
    RouterParams(weight_ED=True, bias_E=False)
    >>> optimizer = adamw(trained=trained_by_default(params)._replace(experts=False))
    """

    def is_router(node: Any) -> bool:
        return isinstance(node, RouterParams)

    return optree.tree_map(lambda node: ROUTER_MASK if is_router(node) else True, params, is_leaf=is_router)


class _AdamW(NamedTuple):
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments_dtype: torch.dtype | None
    trained: Any

    def init(self, params: Any) -> AdamWState:
        leaves, structure = check_tensors("adamw.init", "params", params), optree.tree_structure(params)
        trained = leaf_mask("adamw.init", "trained", self.trained, params)

        def zeros() -> Any:
            return structure.unflatten(
                _zeros(leaf, self._moments_of(leaf), moved) for leaf, moved in zip(leaves, trained)
            )

        device = leaves[0].device if leaves else None
        return AdamWState(torch.zeros((), dtype=torch.float32, device=device), zeros(), zeros())

    def _moments_of(self, leaf: torch.Tensor) -> torch.dtype:
        return self.moments_dtype or (torch.float32 if leaf.dtype == torch.float16 else leaf.dtype)

    @torch.no_grad()
    def update(
        self,
        params: Any,
        grads: Any,
        state: AdamWState,
        learning_rate: float | torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Any, AdamWState]:
        leaves, structure = optree.tree_flatten(params)
        _check_number("learning_rate", learning_rate)
        if scale is not None:
            _check_number("scale", scale, tensor=True)
        moves = leaf_mask("adamw.update", "trained", self.trained, params)
        g = _checked("grads", grads, params, moves)
        m = _checked("state.exp_avg", state.exp_avg, params, moves, self._moments_of)
        v = _checked("state.exp_avg_sq", state.exp_avg_sq, params, moves, self._moments_of)
        given = [*leaves, *g, *m, *v]
        free = iter(alone(given) if donate else [False] * len(given))
        of_p, of_g, of_m, of_v = ([*itertools.islice(free, len(leaves))] for _ in range(4))
        p, m, v = _ours(leaves, moves, of_p), _ours(m, moves, of_m), _ours(v, moves, of_v)
        if scale is not None:
            in_a_graph = any(leaf.requires_grad for leaf in g)
            written = [moved and writes_gradient(local(a), local(b)) for moved, a, b in zip(moves, p, m)]
            g = _ours(g, written, [not in_a_graph and each for each in of_g])

        alike: dict[Any, list[list[torch.Tensor]]] = defaultdict(list)
        for moved, *tensors in zip(moves, p, g, m, v):
            if moved:
                row = [local(tensor).contiguous() for tensor in tensors]
                alike[row[0].dtype, row[2].dtype, row[0].device, row[0].ndim >= 2].append(row)
        rate, lr = (learning_rate, 0.0) if isinstance(learning_rate, torch.Tensor) else (None, learning_rate)
        for (*_, decayed), rows in alike.items():
            weight_decay = self.weight_decay if decayed else 0.0
            columns = [*zip(*rows)]
            update_in_place(*columns, state.step, rate, scale, lr, *self.betas, self.eps, weight_decay)
            for changed in (columns[0], *columns[2:]):  # so that a graph that needs them as they were says so
                torch.autograd.graph.increment_version(changed)
        new_params, exp_avg, exp_avg_sq = map(structure.unflatten, (p, m, v))
        return new_params, AdamWState(state.step + 1, exp_avg, exp_avg_sq)


def _zeros(leaf: torch.Tensor, dtype: torch.dtype, moved: bool) -> torch.Tensor:
    if not moved:
        return torch.empty(0, dtype=dtype, device=leaf.device)
    return map_local(lambda t: torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format), leaf)


def _ours(leaves: list[torch.Tensor], moves: list[bool], free: list[bool]) -> list[torch.Tensor]:
    """Leaves to write to, where they move: those that are free to be, and copies of others.

    All are contiguous, because the fused kernel reads memory front to back whatever the strides.
    """

    def writable(leaf: torch.Tensor, free: bool) -> torch.Tensor:
        return leaf.detach() if free else map_local(_contiguous_copy, leaf)

    return [writable(leaf, each) if moved else leaf for leaf, moved, each in zip(leaves, moves, free)]


def _contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


DtypeOf = Callable[[Any], torch.dtype]
OWN: DtypeOf = operator.attrgetter("dtype")


def _checked(
    argument: str, tree: Any, params: Any, moves: list[bool], dtype_of: DtypeOf = OWN
) -> list[torch.Tensor]:
    """The leaves of a tree that has the structure of params and, where they move, layouts like theirs."""
    (likes, structure), (leaves, theirs) = optree.tree_flatten(params), optree.tree_flatten(tree)
    if theirs != structure:
        ours, others = set(dotted_names(params)), set(dotted_names(tree))
        got = f"a tree with leaves missing: {sorted(ours - others)}, unexpected: {sorted(others - ours)}"
        wanted = "the leaves and containers of params"
        remedy = "Differentiate, and call init on, the params you pass here."
        raise argument_error("adamw.update", argument, got=got, expected=wanted, remedy=remedy)
    layouts = [(_layout(leaf, OWN), _layout(like, dtype_of)) for leaf, like in zip(leaves, likes)]
    if wrong := [i for i, (mine, theirs) in enumerate(layouts) if moves[i] and mine != theirs]:
        names = dotted_names(params)
        got, wanted = (
            "; ".join(f"{names[i]} {' '.join(map(str, layouts[i][side]))}" for i in wrong) for side in (0, 1)
        )
        remedy = "Cast or redistribute first."
        raise argument_error("adamw.update", argument, got=got, expected=wanted, remedy=remedy)
    return leaves


def _check_number(argument: str, value: Any, *, tensor: bool = False) -> None:
    """Raise ``ValueError`` for what is neither a float32 scalar tensor nor, unless ``tensor``, a number."""
    expected = f"{'' if tensor else 'a number or '}a float32 scalar tensor"
    if isinstance(value, torch.Tensor):
        if (value.dtype, value.ndim) != (torch.float32, 0):
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise argument_error("adamw.update", argument, got=got, expected=expected)
    elif tensor or not isinstance(value, int | float):
        raise argument_error("adamw.update", argument, got=repr(value), expected=expected)


def _layout(leaf: Any, dtype_of: DtypeOf) -> tuple[Any, ...]:
    if not isinstance(leaf, torch.Tensor):
        return (type(leaf).__name__,)
    plain = dtype_of(leaf), tuple(leaf.shape), leaf.device
    return (*plain, leaf.placements, leaf.device_mesh) if is_dtensor(leaf) else plain


def global_norm(grads: Any, mesh: DeviceMesh | None = None) -> torch.Tensor:
    """The Euclidean norm of all leaves as one vector: a float32 scalar, summed in float32 or wider.

    Leaves may be DTensors, those of a mesh share one collective, and the result is a plain tensor with the
    same bits on every rank. Nothing waits for the device. No leaf is copied, except that the CPU's kernel
    copies dtypes narrower than float32, one leaf at a time.

    With ``pp``, give it the ``mesh``: then what the other ranks hold counts, too. A tied embedding, which two
    ranks may hold, counts once.

    Raises ``ValueError`` for leaves that aren't tensors.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    if mesh is None or not is_pipeline(mesh):
        return _squared_norm(grads).sqrt()
    mine = _squared_norm(optree.tree_map(_counted_once, grads, is_leaf=_is_model))
    line = group_of(mesh, ("pp",))
    return all_gather_op.raw(mine[None], line.size, line.name).sum().sqrt()  # in one order on every rank


def _is_model(tree: Any) -> bool:
    return isinstance(tree, ModelParams)


def _counted_once(tree: Any) -> Any:
    return counted_once(tree) if _is_model(tree) else tree


def _squared_norm(grads: Any) -> torch.Tensor:
    leaves = check_tensors("global_norm", "grads", grads)
    device = leaves[0].device if leaves else None
    # The norms of leaves that are cut along the same axes of a mesh.
    norms: dict[Any, dict[tuple[int, ...], list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for leaf in leaves:
        piece, mesh, cut = _piece(leaf)
        # Not torch._foreach_norm, which has neither vmap nor jvp.
        norm = torch.linalg.vector_norm(piece, dtype=accumulator(piece.dtype))
        norms[mesh][cut].append(norm.to(device, torch.float32))
    total = torch.zeros((), device=device)
    for mesh, kinds in norms.items():
        sums = torch.stack([torch.stack(parts).square().sum() for parts in kinds.values()])
        if mesh is None or not any(kinds):
            total = total + sums.sum()
            continue
        # Gather, then sum in one order, so that the norm has the same bits on every rank.
        everyone = all_gather_op.raw(sums[None], mesh.size(), _group(mesh)).view(*mesh.shape, len(kinds))
        for kind, cut in enumerate(kinds):  # of those that have the same, the first counts
            total = (
                total + everyone[(*(slice(None) if i in cut else 0 for i in range(mesh.ndim)), kind)].sum()
            )
    return total


def _group(mesh: DeviceMesh) -> str:
    """The name of the process group of all its devices."""
    if not mesh.mesh_dim_names and mesh.ndim > 1:
        expected = "a mesh with names, as init_device_mesh(..., mesh_dim_names=) gives them"
        raise argument_error("global_norm", "grads", got=f"DTensors on {mesh}", expected=expected)
    return group_of(mesh, axis_names(mesh)).name if mesh.mesh_dim_names else mesh.get_group().group_name


def _piece(leaf: torch.Tensor) -> tuple[torch.Tensor, DeviceMesh | None, tuple[int, ...]]:
    """This device's piece of a leaf, its mesh, and the mesh's dimensions over which the rest of it lies."""
    if not is_dtensor(leaf):
        return leaf, None, ()
    from torch.distributed.tensor import Replicate

    summed = [Replicate() if p.is_partial() else p for p in leaf.placements]
    if summed != list(leaf.placements):
        leaf = leaf.redistribute(placements=summed)
    mesh = leaf.device_mesh
    cut = tuple(i for i, p in enumerate(summed) if not p.is_replicate() and mesh.size(i) > 1)
    return local(leaf), mesh, cut


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The factor that brings gradients of this norm to at most ``max_norm``: a float32 scalar.

    It is ``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_`` (Pascanu et al.,
    arXiv:1211.5063). Where the norm isn't finite it is 1, so that one can see which gradient is at fault.
    An optimizer's ``update`` takes it as ``scale``.

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> grads = [torch.tensor([3.0, 4.0])]
    >>> clip_factor(global_norm(grads), 1.0)
    tensor(0.2000)
    """
    if not max_norm > 0:
        expected, remedy = "a positive number", "Pass math.inf for no clipping."
        raise argument_error("clip_factor", "max_norm", got=max_norm, expected=expected, remedy=remedy)
    return torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)


def clip_by_global_norm(
    grads: Any, max_norm: float, mesh: DeviceMesh | None = None
) -> tuple[Any, torch.Tensor]:
    """Gradients times :func:`clip_factor`, in their dtype, and their :func:`global_norm` before that.

    If they go to an optimizer next, pass it the factor as ``scale``: that needs no copy and no time.

    Raises ``ValueError`` unless ``max_norm`` is positive.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 1.0)
    ([tensor([0.6000, 0.8000])], tensor(5.))
    """
    norm = global_norm(grads, mesh)
    factor = clip_factor(norm, max_norm)

    def scaled(piece: torch.Tensor) -> torch.Tensor:
        return (piece * factor.to(piece.device)).to(piece.dtype)  # a product of two scalars has the wider

    return optree.tree_map(lambda leaf: map_local(scaled, leaf), grads), norm
