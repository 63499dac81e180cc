"""The laws of experts, which compute between dispatch and combine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch

from ..errors import argument_error
from ..ops.combine import combine
from ..ops.dispatch import Plan, dispatch
from ..ops.route import Routing
from ..transforms import remat, save_nothing, value_and_grad
from .report import Found, Report, by_name, hold
from .samples import ROUTES, TOLERANCE, dot, error, largest, noise, routing_of, same_bits, short, widened

Experts = Callable[[Any, torch.Tensor, Plan], torch.Tensor]
OneExpert = Callable[[Any, torch.Tensor], torch.Tensor]
ALL = (0, 1, 2)  # params, weights, tokens


class Subject(NamedTuple):
    """Experts, a plain function of one expert, and the sizes to try them with."""

    experts: Experts
    one: OneExpert
    params: Any
    tokens: int
    dim: int
    top_k: int
    scale: float  # of outputs; the loss is a sine of them

    @property
    def like(self) -> torch.Tensor:
        leaf: torch.Tensor = optree.tree_leaves(self.params)[0]
        return leaf

    @property
    def num_experts(self) -> int:
        return self.like.shape[0]

    @property
    def allowed(self) -> float:
        return TOLERANCE[self.like.dtype]

    def rows(self, count: int | None = None) -> torch.Tensor:
        return torch.randn(self.tokens if count is None else count, self.dim).to(self.like)

    def routing(self, name: str = "any experts") -> Routing:
        return self.routed(ROUTES[name](0, self.tokens, self.num_experts, 1, self.top_k), self.num_experts)

    def routed(self, ids_TK: torch.Tensor, num_experts: int) -> Routing:
        return routing_of(ids_TK, num_experts, dtype=self.like.dtype, device=str(self.like.device))

    def args(self, routing: Routing) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Params, weights and random tokens for this routing."""
        return self.params, routing.weights_TK, self.rows(len(routing.expert_ids_TK))

    def gradient(self, layer: Callable[..., torch.Tensor], c: torch.Tensor) -> Callable[..., Any]:
        """The gradient of a scalar made of the layer's output, by params, weights and tokens."""
        return torch.func.grad(self.scalar(layer, c), ALL)

    def scalar(self, layer: Callable[..., torch.Tensor], c: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda *args: ((layer(*args).double() / self.scale).sin() * c.double()).sum()

    def compared(self, what: str, got: Any, expected: Any, allowed: float) -> Iterator[Found]:
        """Compare gradients, relative to their own size, or to a twentieth of the largest of them."""
        unit = largest(expected) / 20 or 1.0
        for part, g, e in zip(("params", "weights", "tokens"), got, expected):
            yield Found(f"{what} by {part}", error(g, e, unit), allowed)

    def layer(self, routing: Routing) -> Callable[..., torch.Tensor]:
        """A function of params, weights and tokens, with this routing."""

        def layer(params: Any, weights_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
            route = replace(routing, weights_TK=weights_TK)
            x_SD, plan = dispatch(x_TD, route)
            return combine(self.experts(params, x_SD, plan), plan)

        return layer

    def dense(self, routing: Routing) -> Callable[..., torch.Tensor]:
        """The same function, made of the function of one expert."""

        def dense(params: Any, weights_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x_TD)
            for e in range(self.num_experts):
                mine, chosen = optree.tree_map(lambda w: w[e], params), routing.expert_ids_TK == e  # noqa: B023
                weight = (weights_TK * chosen).sum(1, keepdim=True)
                if routing.score_before_experts:
                    y = y + torch.where(chosen.any(1, keepdim=True), self.one(mine, x_TD * weight), 0)
                else:
                    y = y + self.one(mine, x_TD) * weight
            return y

        return dense


def oracle(s: Subject) -> Iterator[Found]:
    """Output and gradients are those of one expert after another in float64, for any routing."""
    yield from _oracle(s, "weights before the experts", replace(s.routing(), score_before_experts=True))
    for name in ROUTES:
        yield from _oracle(s, name, s.routing(name))


def _oracle(s: Subject, name: str, routing: Routing) -> Iterator[Found]:
    args, layer, dense = s.args(routing), s.layer(routing), s.dense(routing)
    c = noise(args[2])
    y = dense(*widened(args))
    yield Found(f"{name}: the output", error(layer(*args), y, s.scale), s.allowed)
    with torch.no_grad():
        yield Found(f"{name}: the output without gradients", error(layer(*args), y, s.scale), s.allowed)
    got, expected = s.gradient(layer, c)(*args), s.gradient(dense, c)(*widened(args))
    yield from s.compared(f"{name}: the gradient", got, expected, 2 * s.allowed)


def invariance(s: Subject) -> Iterator[Found]:
    """The outputs of experts spread over two devices sum to the output of all experts."""
    routing, x, half = s.routing(), s.rows(), s.num_experts // 2
    whole = s.layer(routing)(s.params, routing.weights_TK, x)
    total = torch.zeros_like(whole)
    for lo, hi in ((0, half), (half, s.num_experts)):
        here = (routing.expert_ids_TK >= lo) & (routing.expert_ids_TK < hi)
        part = s.routed(torch.where(here, routing.expert_ids_TK - lo, -1), hi - lo)
        params = optree.tree_map(lambda w: w[lo:hi].contiguous(), s.params)  # noqa: B023
        total = total + s.layer(part)(params, routing.weights_TK, x)
    yield Found("the output", error(total, whole, s.scale), s.allowed)


def second(s: Subject) -> Iterator[Found]:
    """Second derivatives are right."""
    routing = s.routing("some pairs dropped")
    args = s.args(routing)
    c = noise(args[2])

    def of(layer: Callable[..., torch.Tensor], args: Any) -> Any:
        slope = s.gradient(layer, c)
        return torch.func.grad(lambda *a: dot(*[widened(slope(*a))] * 2), ALL)(*args)

    got, expected = of(s.layer(routing), args), of(s.dense(routing), widened(args))
    yield from s.compared("the squared gradient's gradient", got, expected, 8 * s.allowed)


def transforms(s: Subject) -> Iterator[Found]:
    """Forward mode, batches of tokens and gradients per example are right."""
    routing = s.routing()
    args, layer, dense = s.args(routing), s.layer(routing), s.dense(routing)
    c, tangents = noise(args[2]), optree.tree_map(noise, args)
    got = torch.func.jvp(layer, args, tangents)[1]
    expected = torch.func.jvp(dense, widened(args), widened(tangents))[1]
    yield Found("jvp", error(got, expected, largest(expected)), 4 * s.allowed)
    batch = torch.stack([s.rows() for _ in range(3)])
    by_batch = (None, None, 0)
    got = torch.vmap(layer, by_batch)(*args[:2], batch)
    expected = torch.vmap(dense, by_batch)(*widened((*args[:2], batch)))
    yield Found("vmap", error(got, expected, s.scale), s.allowed)
    got = torch.vmap(s.gradient(layer, c), by_batch)(*args[:2], batch)
    expected = torch.vmap(s.gradient(dense, c), by_batch)(*widened((*args[:2], batch)))
    yield from s.compared("vmap(grad)", got, expected, 2 * s.allowed)


def recomputation(s: Subject) -> Iterator[Found]:
    """remat changes no bit."""
    routing = s.routing()
    args, layer = s.args(routing), s.layer(routing)
    c = noise(args[2])
    plain = value_and_grad(s.scalar(layer, c), ALL)(*args)
    for name, wrapped in (("by default", remat(layer)), ("everything", remat(layer, save_nothing))):
        again = value_and_grad(s.scalar(wrapped, c), ALL)(*args)
        yield Found(f"recomputing {name}, the gradient", same_bits(again, plain), 0.0)


def compilation(s: Subject) -> Iterator[Found]:
    """torch.compile(fullgraph=True) gives the same, forward and backward."""
    torch._dynamo.reset()

    def run(params: Any, x_TD: torch.Tensor, *routing: Any) -> torch.Tensor:
        x_SD, plan = dispatch(x_TD, Routing(*routing))
        return combine(s.experts(params, x_SD, plan), plan)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name in ("any experts", "one expert for all"):
        routing, x = s.routing(name), s.rows()
        args = routing.expert_ids_TK, routing.weights_TK, routing.counts_E, routing.scores_TE
        c = noise(x)
        got, want = (
            value_and_grad(lambda p, x: (fn(p, x, *args) * c).sum(), (0, 1))(s.params, x)  # noqa: B023
            for fn in (compiled, run)
        )
        yield Found(f"{name}: the gradient", error(got, want), s.allowed)


LAWS = by_name(oracle, invariance, second, transforms, recomputation, compilation)


def check_experts(
    experts: Experts,
    params: Any,
    one_expert: OneExpert,
    *,
    dim: int,
    tokens: int = 12,
    top_k: int = 2,
    laws: Sequence[str] | None = None,
    seed: int | None = None,
) -> Report:
    """Check that experts of your own keep the laws, on one device.

    ===========  =================================================================================
    experts      ``(params, x_SD, plan) -> y_SD``, like :func:`fmoe.experts_grouped_mm`. It puts every row
                 through its experts held here, weighs by ``plan.weights_SK``, and sums. If the plan says
                 ``score_before_experts``, weights apply to inputs, else to outputs. ``expand`` and
                 ``reduce`` do this
    params       a tree of floating tensors, all with a first dimension of E, two experts or more
    one_expert   ``(params, x) -> y``: one expert on any rows (N, dim), in plain PyTorch. Its params lack the
                 first dimension
    dim          of a token
    tokens       how many to try
    top_k        experts per token
    laws         some of ``oracle``, ``invariance``, ``second``, ``transforms``, ``recomputation``,
                 ``compilation``; default: all
    seed         of everything random; fresh by default, and in the report
    -> Report    the findings of each law; ``print`` it
    ===========  =================================================================================

    Raises :class:`LawBroken`, which says which comparison of which law is off, by how much, and how to see it
    again. Raises ``ValueError`` for params without experts.

    >>> import fmoe
    >>> def experts(w_EDD, x_SD, plan):
    ...     x_RD = fmoe.expand(x_SD, plan)
    ...     row_R = torch.arange(x_RD.shape[0])
    ...     w_RDD = w_EDD[torch.searchsorted(plan.offsets_e, row_R, right=True).clamp_max(w_EDD.shape[0] - 1)]
    ...     return fmoe.reduce(torch.einsum("rd,rdf->rf", x_RD, w_RDD).tanh(), plan)
    >>> w_EDD = torch.randn(4, 8, 8, dtype=torch.float64) / 3
    >>> check_experts(experts, w_EDD, lambda w, x: (x @ w).tanh(), dim=8, laws=["oracle", "second"]).broken
    []
    """
    leaves = optree.tree_leaves(params)
    firsts, dtypes = {leaf.shape[:1] for leaf in leaves}, {leaf.dtype for leaf in leaves}
    if len(firsts) != 1 or next(iter(firsts)) < (2,) or not dtypes <= TOLERANCE.keys() or len(dtypes) != 1:
        got = f"shapes {[tuple(leaf.shape) for leaf in leaves]} of {sorted(map(str, dtypes))}"
        expected = "tensors of one floating dtype whose first dimension is two experts or more"
        remedy = "Stack the experts' parameters."
        raise argument_error("check_experts", "params", got=got, expected=expected, remedy=remedy)
    subject = Subject(experts, one_expert, params, tokens, dim, top_k, 1.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        routing, x = subject.routing(), subject.rows().double()
    y = subject.dense(routing)(*widened((params, routing.weights_TK)), x)
    subject = subject._replace(scale=largest(y) or 1.0)
    name = getattr(experts, "__name__", type(experts).__name__)
    title = f"{name}, {subject.num_experts} experts, {short(subject.like.dtype)}"
    return hold("check_experts", title, LAWS, subject, laws, seed)
