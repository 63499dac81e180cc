"""The laws of routers, which choose experts for tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optree
import torch

from ..errors import argument_error
from ..ops.route import Router
from ..transforms import remat, save_nothing, value_and_grad
from .report import Found, Report, by_name, hold
from .samples import dot, error, same_bits, short, widened


class Subject(NamedTuple):
    """A router with its params, and the sizes to try it with."""

    router: Router
    params: Any
    tokens: int
    dim: int

    def rows(self, count: int | None = None) -> torch.Tensor:
        leaf = optree.tree_leaves(self.params)[0]
        return torch.randn(self.tokens if count is None else count, self.dim).to(leaf)

    def wide(self) -> tuple[Any, torch.Tensor]:
        return widened((self.params, self.rows()))

    def weights(self, params: Any, x: torch.Tensor) -> torch.Tensor:
        return self.router(params, x).weights_TK


def form(s: Subject) -> Iterator[Found]:
    """Each token has K distinct experts or -1, has finite weights, and is counted, also without tokens."""
    for what, x in (("tokens", s.rows()), ("tokens all zero", 0 * s.rows()), ("no token", s.rows(0))):
        r = s.router(s.params, x)
        ids, (t, num_experts) = r.expert_ids_TK, r.scores_TE.shape
        fit = r.weights_TK.shape == ids.shape and t == len(ids) == len(x) and len(r.counts_E) == num_experts
        wide = r.weights_TK.dtype in (torch.float32, torch.float64)
        typed = ids.dtype == r.counts_E.dtype == torch.int64 and wide
        pairs = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
        counts = torch.bincount(ids[ids >= 0].reshape(-1), minlength=num_experts)
        for problem, number in (
            ("the number of shapes that don't fit", not fit),
            ("the number of dtypes but int64 and float32 or wider", not typed),
            ("ids outside [-1, E)", ((ids < -1) | (ids >= num_experts)).sum()),
            ("experts chosen twice by a token", (pairs.sum(2) > 1).sum()),
            ("weights that aren't finite", (~r.weights_TK.isfinite()).sum()),
            ("experts counted wrongly", (counts != r.counts_E).sum()),
        ):
            yield Found(f"{what}: {problem}", float(number), 0.0)


def invariance(s: Subject) -> Iterator[Found]:
    """A token's experts and weights don't depend on other tokens, since these may be elsewhere."""
    x = s.rows()
    together = s.router(s.params, x)
    parts = [s.router(s.params, part) for part in x.split((s.tokens + 1) // 2)]
    ids = torch.cat([part.expert_ids_TK for part in parts])
    yield Found("experts chosen otherwise", float((ids != together.expert_ids_TK).sum()), 0.0)
    weights = torch.cat([part.weights_TK for part in parts])
    yield Found("the weights", error(weights, together.weights_TK), 1e-5)
    yield Found("the counts", error(sum(part.counts_E for part in parts), together.counts_E), 0.0)


def oracle(s: Subject) -> Iterator[Found]:
    """Gradients of the weights and scores agree with finite differences."""
    params, x = s.wide()
    r = s.router(params, x)
    step, allowed = (1e-6, 1e-6) if r.weights_TK.dtype == torch.float64 else (3e-3, 3e-2)
    c_weights, c_scores = torch.randn_like(r.weights_TK), torch.randn_like(r.scores_TE)

    def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
        r = s.router(params, x)
        return (r.weights_TK * c_weights).double().sum() + (r.scores_TE * c_scores).double().sum()

    slope = torch.func.grad(loss, (0, 1))(params, x)
    for part, along in (("params", 0), ("tokens", 1)):
        for _ in range(20):  # until no choice changes on the way, where no derivative exists
            tangent = [optree.tree_map(torch.zeros_like, t) for t in (params, x)]
            tangent[along] = optree.tree_map(torch.randn_like, (params, x)[along])
            shift = optree.tree_map(lambda d: step * d, tuple(tangent))
            ends = [optree.tree_map(op, (params, x), shift) for op in (torch.sub, torch.add)]
            if all(torch.equal(s.router(*end).expert_ids_TK, r.expert_ids_TK) for end in ends):
                by_difference = (loss(*ends[1]) - loss(*ends[0])) / (2 * step)
                found = dot(slope, tuple(tangent))
                yield Found(f"the slope along random {part}", error(found, by_difference), allowed)
                break


def transforms(s: Subject) -> Iterator[Found]:
    """Forward mode agrees with reverse mode. A batch of tokens is routed like one after another."""
    params, x = s.wide()
    tangents = optree.tree_map(torch.randn_like, (params, x))
    allowed = 1e-9 if s.weights(params, x).dtype == torch.float64 else 1e-4
    weights, moved, *_ = torch.func.jvp(s.weights, (params, x), tangents)
    c = torch.randn_like(weights)
    slope = torch.func.grad(lambda p, x: (s.weights(p, x) * c).sum(), (0, 1))(params, x)
    yield Found("jvp against vjp", error((moved * c).sum(), dot(slope, tangents)), allowed)
    batch = torch.stack([x, x.flip(0), 2 * x])
    got = torch.vmap(s.weights, (None, 0))(params, batch)
    yield Found("vmap", error(got, torch.stack([s.weights(params, x) for x in batch])), allowed)
    one = torch.func.grad(lambda p, x: s.weights(p, x).square().sum())
    stacked = optree.tree_map(lambda *g: torch.stack(g), *(one(params, x) for x in batch))
    yield Found("vmap(grad)", error(torch.vmap(one, (None, 0))(params, batch), stacked), allowed)


def recomputation(s: Subject) -> Iterator[Found]:
    """The same tokens are routed in the same way again, and remat changes no bit."""
    x = s.rows()

    def gradient(weights: Callable[..., torch.Tensor]) -> Any:
        return value_and_grad(lambda p, x: weights(p, x).square().sum(), (0, 1))(s.params, x)

    plain = gradient(s.weights)
    for name, weights in (("once more", s.weights), ("under remat", remat(s.weights, save_nothing))):
        yield Found(f"{name}, the gradient", same_bits(gradient(weights), plain), 0.0)


LAWS = by_name(form, invariance, oracle, transforms, recomputation)


def check_router(
    router: Router,
    params: Any,
    *,
    dim: int,
    tokens: int = 12,
    laws: Sequence[str] | None = None,
    seed: int | None = None,
) -> Report:
    """Check that a router of your own keeps the laws, on one device.

    ==========  ==================================================================================
    router      ``(params, x_TD) -> Routing``, such as ``lambda p, x: fmoe.route(p, x, config)``. It must
                take float64, too. If its weights are float32 even then, finite differences are
                compared loosely
    params      a tree of floating tensors
    dim         of a token
    tokens      how many to try
    laws        some of ``form``, ``invariance``, ``oracle``, ``transforms``, ``recomputation``; default: all.
                A router that looks at all tokens, such as expert choice, breaks ``invariance``
    seed        of everything random; fresh by default, and in the report
    -> Report   the findings of each law; ``print`` it
    ==========  ==================================================================================

    Raises :class:`LawBroken`, which says which comparison of which law is off, by how much, and how to see it
    again. Raises ``ValueError`` for params without tensors.

    >>> import fmoe
    >>> config = fmoe.RouterConfig(top_k=2)
    >>> params = fmoe.RouterParams(torch.randn(8, 16), torch.randn(8) / 10)
    >>> check_router(lambda p, x: fmoe.route(p, x, config), params, dim=16).broken
    []
    """
    leaves = [leaf for leaf in optree.tree_leaves(params) if isinstance(leaf, torch.Tensor)]
    if not leaves:
        expected, remedy = "a tree of floating tensors", "Pass the router's."
        raise argument_error("check_router", "params", got="no tensor", expected=expected, remedy=remedy)
    name = getattr(router, "__name__", type(router).__name__)
    title = f"{name}, {short(leaves[0].dtype)}"
    return hold("check_router", title, LAWS, Subject(router, params, tokens, dim), laws, seed)
