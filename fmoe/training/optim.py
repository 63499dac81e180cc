"""Functional optimisation: AdamW and clipping, values in, values out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch.optim.adamw import adamw as torch_adamw

from ..errors import argument_error
from ..ops.core.dtensors import is_dtensor, local, map_local
from ..tree import check_tensors, dotted_names
from .clipping import clip_by_global_norm as clip_by_global_norm  # re-exported
from .clipping import clip_factor as clip_factor
from .clipping import global_norm as global_norm

Rows = Sequence[Sequence[torch.Tensor]]
PIECE = 2**25  # numbers widened at once


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
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with PyTorch's fused kernel.

    Params, grads and both moments are trees of one structure; each leaf's tensors share shape,
    device, for DTensors placements, and, but for the moments, dtype. The learning rate is a float given to
    each update. Weight decay is for leaves of two or more dimensions. Leaves named ``bias_E``, which load
    balancing moves, come back as they are, and their moments are empty.

    Moments are of ``moments_dtype``, or for ``None`` of each parameter's own, for float16 float32. Where the
    two differ, a leaf is updated in the wider one, a piece at a time, and what is narrower rounded once.
    Bfloat16 moments of float32 params, as DeepSeek-V3 was trained with, halve the state; with ``betas[1]``
    above 0.996 some would cease to decay, a step's part being less than half of the last bit. Float32 moments
    of bfloat16 params aren't rounded, but the params still are: what changes one by less than a 512th is
    lost. Against that keep params in float32 and compute in bfloat16, by
    :func:`fmoe.training.gradients.computing_in`.

    ``update`` modifies nothing it is given and returns contiguous tensors that do not require grad. Gradients
    are multiplied by ``scale`` as they are read, a float32 scalar such as :func:`clip_factor` gives.
    With ``donate=True`` it writes into the memory of ``params`` and ``state``, and with a ``scale`` of
    ``grads``, as jax's ``donate_argnums``: no copy of them is made, and the caller must not use them again.
    Leaves that share memory, as gradients that autograd returns may, and gradients that are part of a graph
    are copied all the same.

    Raises ``ValueError`` where the trees or their leaves do not match.

    >>> optimizer = adamw(weight_decay=0.0)
    >>> params = {"w": torch.ones(2, 2), "bias_E": torch.zeros(2)}
    >>> grads = {"w": torch.ones(2, 2), "bias_E": torch.zeros(2)}
    >>> params, state = optimizer.update(params, grads, optimizer.init(params), 0.25)
    >>> params["w"], state.step
    (tensor([[0.7500, 0.7500],
            [0.7500, 0.7500]]), tensor(1.))
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
    how = _AdamW(betas, eps, weight_decay, moments_dtype)
    return Optimizer(how.init, how.update)


class _AdamW(NamedTuple):
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments_dtype: torch.dtype | None

    def init(self, params: Any) -> AdamWState:
        leaves, names = check_tensors("adamw.init", "params", params), dotted_names(params)
        structure = optree.tree_structure(params)

        def zeros() -> Any:
            moments = [_zeros(p, self._moments_of(p), is_trained(name)) for name, p in zip(names, leaves)]
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
        names, structure = dotted_names(params), optree.tree_structure(params)
        old, g, old_m, old_v = (
            _checked(params, names, argument, tree, dtype_of)
            for argument, tree, dtype_of in [
                ("params", params, _own_dtype),
                ("grads", grads, _own_dtype),
                ("state.exp_avg", state.exp_avg, self._moments_of),
                ("state.exp_avg_sq", state.exp_avg_sq, self._moments_of),
            ]
        )
        moves = [is_trained(name) for name in names]
        p, m, v = (
            [x if moved else like for x, like, moved in zip(_ours(xs, donate), xs, moves)]
            for xs in (old, old_m, old_v)
        )
        if scale is not None:
            in_a_graph = any(leaf.requires_grad for leaf in g)
            scale, g = scale.reciprocal(), _ours(g, donate and not in_a_graph)

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


def is_trained(name: str) -> bool:
    """Whether a leaf of this dotted name is the optimiser's to move; load balancing moves ``bias_E``.

    >>> is_trained("layers.1.mlp.router.weight_ED"), is_trained("layers.1.mlp.router.bias_E")
    (True, False)
    """
    return name.split(".")[-1] != "bias_E"


def _zeros(leaf: torch.Tensor, dtype: torch.dtype, moved: bool) -> torch.Tensor:
    if not moved:
        return torch.empty(0, dtype=dtype, device=leaf.device)
    return map_local(lambda t: torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format), leaf)


# The fused kernel reads memory front to back whatever the strides, so it gets contiguous tensors only.
def _copy(leaf: torch.Tensor) -> torch.Tensor:
    return map_local(lambda t: t.clone(memory_format=torch.contiguous_format), leaf)


def _ours(leaves: list[torch.Tensor], donate: bool) -> list[torch.Tensor]:
    """What may be written to: leaves that were given away and share no memory, of others copies."""
    holders = Counter(local(leaf).untyped_storage()._cdata for leaf in leaves)

    def alone(piece: torch.Tensor) -> bool:
        return piece.is_contiguous() and holders[piece.untyped_storage()._cdata] == 1

    return [leaf.detach() if donate and alone(local(leaf)) else _copy(leaf) for leaf in leaves]


def _own_dtype(leaf: torch.Tensor) -> torch.dtype:
    return leaf.dtype


def _layout(leaf: Any, dtype_of: Callable[[torch.Tensor], torch.dtype] = _own_dtype) -> tuple[Any, ...]:
    if not isinstance(leaf, torch.Tensor):
        return (type(leaf).__name__,)
    plain = dtype_of(leaf), tuple(leaf.shape), leaf.device
    return (*plain, leaf.placements, leaf.device_mesh) if is_dtensor(leaf) else plain


def _checked(
    params: Any, names: list[str], argument: str, tree: Any, dtype_of: Callable[[torch.Tensor], torch.dtype]
) -> list[torch.Tensor]:
    """The leaves of a tree that has the structure of params and, where they move, layouts like theirs."""
    (expected, structure), (leaves, theirs) = optree.tree_flatten(params), optree.tree_flatten(tree)
    if theirs != structure:
        missing, extra = set(names).difference(dotted_names(tree)), set(dotted_names(tree)).difference(names)
        raise argument_error(
            "adamw.update",
            argument,
            got=f"a tree with leaves missing: {sorted(missing)}, unexpected: {sorted(extra)}",
            expected="the leaves and containers of params",
            remedy="Differentiate, and call init on, the params you pass here.",
        )
    layouts = zip(names, map(_layout, leaves), (_layout(leaf, dtype_of) for leaf in expected))
    wrong = [
        [f"{name} {' '.join(map(str, layout))}" for layout in pair]
        for name, *pair in layouts
        if is_trained(name) and pair[0] != pair[1]
    ]
    if wrong:
        got, wanted = ("; ".join(column) for column in zip(*wrong))
        raise argument_error(
            "adamw.update",
            argument,
            got=got,
            expected=wanted,
            remedy="Cast or redistribute first.",
        )
    return leaves
