"""The laws of dispatch and combine alone: exact adjoints, unused rows, and plans as values."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..ops.combine import combine, combine_start, join, reduce
from ..ops.dispatch import Plan, dispatch, expand
from ..ops.route import Routing, route
from ..parallel.collectives import psum
from ..parallel.placement import token_axes
from ..params import P
from .report import Found
from .samples import ROUTES, error, noise, routing_of, same_bits, whole_numbers
from .setting import Setting


def adjoint(s: Setting) -> Iterator[Found]:
    """Dispatch and combine are linear and each other's transpose, exactly, for any routing."""
    n, experts = s.along.size, s.num_experts // s.along.size
    torch.manual_seed(torch.initial_seed() + s.mesh.get_rank())
    for name, draw in ROUTES.items():
        ids = draw(s.along.position, s.tokens, experts, n, s.top_k)
        routing = routing_of(ids, s.num_experts, dtype=s.dtype, device=s.device)
        home = torch.where(ids < 0, n, ids // experts)
        copies = torch.stack([(home == d).any(1) for d in range(n)], 1).sum(1)
        left, right, w_left, w_right, off, pairs = _inner_products(s, routing, copies)
        yield s.found(f"{name}: <combine(y), x> - <y, dispatch(x)>", abs(left - right), 0.0)
        yield s.found(f"{name}: the same for the weights", abs(w_left - w_right), 0.0)
        yield s.found(f"{name}: every row sent, summed where it came from,", off, 0.0)
        yield s.found(f"{name}: the number of pairs in the plan", pairs, 0.0)


def _inner_products(s: Setting, routing: Routing, copies: torch.Tensor) -> list[float]:
    """Inner products of random whole numbers, summed over devices, and this device's errors."""
    ids = routing.expert_ids_TK
    numbers = functools.partial(whole_numbers, device=s.device)
    w = numbers(ids.shape, routing.weights_TK.dtype)

    def sent(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, Plan]:
        return dispatch(x, replace(routing, weights_TK=w), axis="ep")

    def body(x: torch.Tensor) -> torch.Tensor:
        x_SD, plan = sent(x, w)
        y_SD = numbers(x_SD.shape, s.dtype)
        rows = [(combine(y_SD, plan) * x).double().sum(), (y_SD * x_SD).double().sum()]
        w_SK, pull, *_ = torch.func.vjp(lambda w: sent(x, w)[1].weights_SK, w)
        g = numbers(w_SK.shape, w_SK.dtype)
        weights = [(pull(g)[0] * w).double().sum(), (g * w_SK).double().sum()]
        used = (plan.row_SK >= 0).any(1, keepdim=True)  # a backend may send rows that nobody wants
        off = (combine(x_SD * used, plan) - x * copies.to(x)[:, None]).double().abs().sum()
        pairs = (plan.offsets_e[-1] - (plan.row_SK >= 0).sum()).double().abs()
        over_devices = psum(torch.stack([*rows, *weights]), token_axes(s.mesh))
        return torch.cat([over_devices, torch.stack([off, pairs])])

    found: list[float] = s.inside(body)(numbers((len(ids), s.dim), s.dtype)).tolist()
    return found


def unused_rows(s: Setting) -> Iterator[Found]:
    """Rows past the last one that an expert has may hold NaN, and reach nothing."""
    params, x = s.random_params(shared=False), s.rows(s.tokens * s.place.size)
    mine = slice(s.tokens * s.place.position, s.tokens * (s.place.position + 1))

    def body(x: torch.Tensor) -> torch.Tensor:
        x_SD, plan = dispatch(x, route(params.router, x, s.config), axis="ep")
        y_RD = expand(x_SD, plan) * 2
        past = torch.arange(len(y_RD), device=x.device) >= plan.offsets_e[-1]
        return combine(reduce(y_RD.masked_fill(past[:, None], torch.nan), plan), plan)

    weights = route(params.router, x, s.config).weights_TK.sum(1, keepdim=True)
    yield s.found("the output", error(s.inside(body)(x[mine]), (2 * x.double() * weights)[mine]))


def plans(s: Setting) -> Iterator[Found]:
    """Plans are values: two may be in flight, join in any order and combine again. Joining is combining."""
    params, a, b = s.random_params(shared=False), s.rows(s.tokens), s.rows(max(1, s.tokens - 1))
    plus = torch.ones_like(b)

    def sent(x: torch.Tensor) -> Any:
        return dispatch(x, route(params.router, x, s.config), axis="ep")

    def both(x: torch.Tensor, b: torch.Tensor) -> Any:
        (x_SD, plan), (b_SD, other) = sent(x), sent(b)
        first, second = combine_start(x_SD, plan), combine_start(b_SD, other)
        late = join(second, other, plus)
        with torch.no_grad():
            combine(*sent(b))
        return join(first, plan), late - 1, combine(x_SD, plan)

    here = P(token_axes(s.mesh))
    first, late, again = s.inside(both, here)(a, b)
    one, other = (s.inside(lambda x: combine(*sent(x)))(x) for x in (a, b))
    compare, allowed = (error, s.allowed) if s.any_order else (same_bits, 0.0)
    yield s.found("the first", compare(first, one), allowed)
    yield s.found("combined again, it", compare(again, one), allowed)
    yield s.found("the second, less what join added,", error(late, other))

    def overlapped(x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
        x_SD, plan = sent(x)
        return join(combine_start(x_SD, plan), plan, plus)

    def apart(x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
        return combine(*sent(x)) + plus

    def gradient(fn: Callable[..., torch.Tensor]) -> Any:
        return torch.func.grad(lambda x, plus: (s.inside(fn, here)(x, plus) * c).sum(), (0, 1))(b, plus)

    c, what = noise(b), "the gradient of combine_start and join, beside combine's,"
    yield s.found(what, error(gradient(overlapped), gradient(apart)))
