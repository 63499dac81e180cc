"""Functional optimisation: AdamW and clipping, values in, values out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch.optim.adamw import adamw as torch_adamw

from ..errors import argument_error
from ..models.moe import moe_specs
from ..ops.core.dtensors import is_dtensor, local, map_local
from ..ops.route import RouterParams
from ..params import leaf_mask, trained_mask
from ..tree import check_tensors, dotted_names
from .clipping import clip_by_global_norm as clip_by_global_norm  # re-exported
from .clipping import clip_factor as clip_factor
from .clipping import global_norm as global_norm

Rows = Sequence[Sequence[torch.Tensor]]
PIECE = 2**25  # numbers widened at once
ROUTER_MASK = trained_mask(moe_specs(dim=1, hidden_dim=1, num_experts=1).router)


class AdamWState(NamedTuple):
    """How many updates were made (float32 scalar), and both moments as trees like the params.

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
        learning_rate: float,
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
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with PyTorch's fused kernel.

    =============  ====================================================================================
    betas, eps     as in the paper
    weight_decay   of leaves of two or more dimensions
    moments_dtype  of both moments; ``None``: each parameter's own, float32 for float16 ones
    trained        a tree prefix of bools, as ``{"head": True, "body": False}``, or a function of the params
                   that gives one; ``None``: :func:`trained_by_default`
    -> Optimizer   its ``update`` takes the learning rate, a float
    =============  ====================================================================================

    Params, grads and both moments are trees of one structure. Tensors of one leaf share shape, device and
    placements. Params and grads share the dtype, too. A leaf that isn't trained comes back as it is, and its
    moments are empty.

    Where moments have another dtype than a parameter, it is updated in the wider one, a piece at a time, and
    the narrower is rounded once. Bfloat16 moments of float32 params, as DeepSeek-V3 was trained with, halve
    the state. With ``betas[1]`` above 0.996 some second moments would stop decaying: each decrement rounds to
    nothing. Bfloat16 params lose every change below a 512th of a number. To avoid that, keep params in
    float32 and compute in bfloat16 with :func:`fmoe.training.gradients.computing_in`.

    ``update`` modifies nothing it is given and returns contiguous tensors that do not require grad. It
    multiplies gradients by ``scale`` as it reads them, a float32 scalar such as :func:`clip_factor` gives.
    With ``donate=True`` it writes into the memory of ``params`` and ``state``, and with a ``scale`` into
    that of ``grads``, as jax's ``donate_argnums``: the caller must not use them again. It still copies
    leaves that share memory and gradients that are part of a graph.

    Raises ``ValueError`` where the trees or their leaves do not match.

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
        raise argument_error(
            "adamw",
            "moments_dtype",
            got=moments_dtype,
            expected="bfloat16, float32, float64 or None",
            remedy="Leave it out; in float16 squares of small gradients would be zero.",
        )
    how = _AdamW(betas, eps, weight_decay, moments_dtype, trained_by_default if trained is None else trained)
    return Optimizer(how.init, how.update)


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
            moments = [_zeros(p, self._moments_of(p), moved) for p, moved in zip(leaves, trained)]
            return optree.tree_unflatten(structure, moments)

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
        learning_rate: float,
        *,
        scale: torch.Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Any, AdamWState]:
        structure = optree.tree_structure(params)
        moves = leaf_mask("adamw.update", "trained", self.trained, params)
        old, g, old_m, old_v = (
            _checked(params, moves, argument, tree, dtype_of)
            for argument, tree, dtype_of in [
                ("params", params, _own_dtype),
                ("grads", grads, _own_dtype),
                ("state.exp_avg", state.exp_avg, self._moments_of),
                ("state.exp_avg_sq", state.exp_avg_sq, self._moments_of),
            ]
        )
        p, m, v = (_ours(leaves, moves, donate) for leaves in (old, old_m, old_v))
        if scale is not None:
            in_a_graph = any(leaf.requires_grad for leaf in g)
            scale, g = scale.reciprocal(), _ours(g, moves, donate and not in_a_graph)

        alike: dict[Any, list[list[torch.Tensor]]] = defaultdict(list)
        for moved, *leaves in zip(moves, p, g, m, v):
            if moved:
                row = [local(leaf).contiguous() for leaf in leaves]
                alike[row[0].dtype, row[2].dtype, row[0].device, row[0].ndim >= 2].append(row)
        for (dtype, of_moments, _, decayed), rows in alike.items():
            how = state.step, scale, learning_rate, self.weight_decay if decayed else 0.0
            if dtype == of_moments:
                self._fused(rows, *how)
            else:
                self._widened(rows, torch.promote_types(dtype, of_moments), *how)
        new_params, exp_avg, exp_avg_sq = (optree.tree_unflatten(structure, leaves) for leaves in (p, m, v))
        return new_params, AdamWState(state.step + 1, exp_avg, exp_avg_sq)

    def _fused(
        self,
        rows: Rows,
        step: torch.Tensor,
        divisor: torch.Tensor | None,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """Update rows of a param, grad and two moments, contiguous, of one dtype and device, in place.

        With a divisor the kernel writes the grads divided by it, too.
        """
        p, g, m, v = map(list, zip(*rows))
        torch_adamw(
            *(p, g, m, v, []),
            # The kernel counts in place, a step per tensor, so it gets copies of the one step.
            state_steps=list(step.to(p[0].device).repeat(len(rows)).unbind()),
            fused=True,
            grad_scale=divisor,
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self.eps,
        )

    def _widened(self, rows: Rows, dtype: torch.dtype, *how: Any) -> None:
        """The same of rows of two dtypes, in ``dtype``; the kernel takes one (pytorch#146542)."""
        for row in rows:
            for piece in zip(*(t.view(-1).split(PIECE) for t in row)):
                wide = [t.to(dtype) for t in piece]
                self._fused([wide], *how)
                for i in (0, 2, 3):  # not the grad
                    if wide[i] is not piece[i]:
                        piece[i].copy_(wide[i])
                del wide  # before the next piece's


def _zeros(leaf: torch.Tensor, dtype: torch.dtype, moved: bool) -> torch.Tensor:
    if not moved:
        return torch.empty(0, dtype=dtype, device=leaf.device)
    return map_local(lambda t: torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format), leaf)


# The fused kernel reads memory front to back whatever the strides, so it gets contiguous tensors only.
def _copy(leaf: torch.Tensor) -> torch.Tensor:
    return map_local(lambda t: t.clone(memory_format=torch.contiguous_format), leaf)


def _ours(leaves: list[torch.Tensor], moves: list[bool], donate: bool) -> list[torch.Tensor]:
    """What may be written to, where it moves: donated leaves that share no memory, and copies of others."""
    holders = Counter(local(leaf).untyped_storage()._cdata for leaf in leaves)

    def alone(piece: torch.Tensor) -> bool:
        return piece.is_contiguous() and holders[piece.untyped_storage()._cdata] == 1

    def writable(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.detach() if donate and alone(local(leaf)) else _copy(leaf)

    return [writable(leaf) if moved else leaf for leaf, moved in zip(leaves, moves)]


def _own_dtype(leaf: torch.Tensor) -> torch.dtype:
    return leaf.dtype


def _layout(leaf: Any, dtype_of: Callable[[torch.Tensor], torch.dtype] = _own_dtype) -> tuple[Any, ...]:
    if not isinstance(leaf, torch.Tensor):
        return (type(leaf).__name__,)
    plain = dtype_of(leaf), tuple(leaf.shape), leaf.device
    return (*plain, leaf.placements, leaf.device_mesh) if is_dtensor(leaf) else plain


def _checked(
    params: Any, moves: list[bool], argument: str, tree: Any, dtype_of: Callable[[torch.Tensor], torch.dtype]
) -> list[torch.Tensor]:
    """The leaves of a tree that has the structure of params and, where they move, layouts like theirs."""
    (expected, structure), (leaves, theirs) = optree.tree_flatten(params), optree.tree_flatten(tree)
    if theirs != structure:
        ours, others = set(dotted_names(params)), set(dotted_names(tree))
        raise argument_error(
            "adamw.update",
            argument,
            got=f"a tree with leaves missing: {sorted(ours - others)}, unexpected: {sorted(others - ours)}",
            expected="the leaves and containers of params",
            remedy="Differentiate, and call init on, the params you pass here.",
        )
    layouts = [(_layout(leaf), _layout(like, dtype_of)) for leaf, like in zip(leaves, expected)]
    if wrong := [i for i, (mine, theirs) in enumerate(layouts) if moves[i] and mine != theirs]:
        names = dotted_names(params)
        got, wanted = (
            "; ".join(f"{names[i]} {' '.join(map(str, layouts[i][side]))}" for i in wrong) for side in (0, 1)
        )
        raise argument_error(
            "adamw.update", argument, got=got, expected=wanted, remedy="Cast or redistribute first."
        )
    return leaves
