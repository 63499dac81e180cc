"""``moe_forward`` with a function as its router, also one with parameters of its own."""

import re
import time
from dataclasses import replace
from typing import NamedTuple

import optree
import pytest
import torch
from devices import bare_mesh
from helpers import CONFIGS, ORACLE_TRANSFORMS, TRANSFORMS, Example, dot, error, random_layer, squared
from torch.distributed.tensor import DTensor
from workers import RankError

import fmoe
from fmoe.ops.reference import among_best, swiglu_reference

EXPERTS, CAPACITY = 6, 3


class TwoLayers(NamedTuple):
    """A router of two matrices: (H, D) and (E, H)."""

    down: torch.Tensor
    up: torch.Tensor


def scores(router, x_TD):
    return (torch.tanh(x_TD @ router.down.T) @ router.up.T).softmax(-1)


def top_1(router, x_TD):
    scores_TE = scores(router, x_TD)
    weights_TK, ids_TK = scores_TE.max(-1, keepdim=True)
    counts_E = (ids_TK == torch.arange(EXPERTS)).sum(0)
    return fmoe.Routing(ids_TK, weights_TK, counts_E, scores_TE)


def expert_choice(router, x_TD):
    """Every expert takes its ``CAPACITY`` best tokens, so a token has up to E experts."""
    scores_TE = scores(router, x_TD)
    best_CE = scores_TE.topk(CAPACITY, dim=0).indices
    chosen_TE = torch.zeros_like(scores_TE).scatter(0, best_CE, 1.0).bool()
    ids_TE = torch.where(chosen_TE, torch.arange(EXPERTS), -1)
    return fmoe.Routing(ids_TE, scores_TE * chosen_TE, chosen_TE.sum(0), scores_TE)


# Each with what it counts every expert for in a dense layer, (T, E).
ROUTERS = {
    "top 1": (top_1, lambda s: s * among_best(s.detach(), 1)),
    "expert choice": (expert_choice, lambda s: s * among_best(s.detach().T, CAPACITY).T),
}
every_router = pytest.mark.parametrize(("router", "weigh"), ROUTERS.values(), ids=ROUTERS)


def two_layers(dtype=torch.float64):
    params = random_layer(experts=EXPERTS, dtype=dtype)
    return params._replace(
        router=TwoLayers(torch.randn(4, 6, dtype=dtype), torch.randn(EXPERTS, 4, dtype=dtype))
    )


def dense(weigh):
    """The layer as a sum over all experts."""

    def layer(params, x_TD):
        weights_TE = weigh(scores(params.router, x_TD))
        each = [
            swiglu_reference(fmoe.ExpertParams(*weights), x_TD) * weights_TE[:, e, None]
            for e, weights in enumerate(zip(*params.experts))
        ]
        return sum(each) + swiglu_reference(params.shared, x_TD)

    return layer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_route_as_a_function_gives_the_bits_of_its_config(config):
    params, x = random_layer(dtype=torch.float32), torch.randn(2, 9, 6)

    def run(router):
        def loss(params, x):
            y, stats = fmoe.moe_forward(params, x, router=router, return_stats=True)
            return y.square().sum(), (y, stats)

        return fmoe.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    got, want = run(lambda p, x: fmoe.route(p, x, config)), run(config)
    assert all(map(torch.equal, optree.tree_leaves(got), optree.tree_leaves(want)))


@every_router
@pytest.mark.parametrize("transform", ["grad", "vmap(grad) both", "grad(grad)", "jvp(vmap(grad))"])
def test_transforms_of_a_layer_with_its_own_router_equal_the_dense_layer(router, weigh, transform):
    example = Example(two_layers(), torch.randn(7, 6, dtype=torch.float64))
    layer = lambda p, x: fmoe.moe_forward(p, x, router=router)  # noqa: E731
    expected = ORACLE_TRANSFORMS[transform](squared(dense(weigh)), example)
    assert dot(expected, expected) > 0
    for fn in (layer, fmoe.remat(layer)):
        assert error(TRANSFORMS[transform](squared(fn), example), expected) < 1e-10


def test_a_layer_with_its_own_router_compiles_whole():
    example = Example(two_layers(), torch.randn(7, 6, dtype=torch.float64))
    loss = squared(lambda p, x: fmoe.moe_forward(p, x, router=expert_choice))
    assert error(TRANSFORMS["compile"](loss, example), ORACLE_TRANSFORMS["compile"](loss, example)) < 1e-10


def on_a_mesh(axes):
    """Values, statistics and gradients of each device's own tokens, beside those of one device."""
    mesh, params = bare_mesh(axes), two_layers()
    xs = torch.randn(mesh.size(), 5, 6, dtype=torch.float64)
    spread, mine = fmoe.shard_params(params, mesh), xs[mesh.get_rank()]

    def loss(params, x, mesh=None):
        y, stats = fmoe.moe_forward(params, x, mesh, router=top_1, return_stats=True)
        return y.sin().sum(), (y, stats)

    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    got = torch.func.grad(loss, (0, 1), has_aux=True)(spread, mine, mesh)
    (grads, g_x), (y, stats) = optree.tree_map(whole, got)
    (e_grads, e_x), (e_y, e_stats) = torch.func.grad(loss, (0, 1), has_aux=True)(params, xs.flatten(0, 1))
    rows = slice(5 * mesh.get_rank(), 5 * mesh.get_rank() + 5)
    return error((grads, g_x, y, stats[0]), (e_grads, e_x[rows], e_y[rows], e_stats[0]))


@pytest.mark.parametrize("axes", ["ep=2", "dp=2"])
def test_a_router_function_on_a_mesh_equals_one_device(pool, axes):
    assert max(pool.run(2, on_a_mesh, axes)) < 1e-10


# ---- errors ------------------------------------------------------------------------------------------


def changed(**fields):
    return lambda router, x: replace(top_1(router, x), **{name: to(x) for name, to in fields.items()})


ERRORS = {
    "got 'top 1', expected a RouterConfig or a function of (params.router, x_TD). ": "top 1",
    "got a function that returns tuple, expected one that returns fmoe.Routing. ": lambda router, x: (x, x),
    "got a function that returns expert_ids_TK of shape (7,), torch.int64, expected (7, 1), torch.int64. "
    "Route all 7 rows of x_TD to 6 experts.": changed(
        expert_ids_TK=lambda x: torch.zeros(7, dtype=torch.int64)
    ),
    "returns expert_ids_TK of shape (7, 1), torch.int32, expected (7, 1), torch.int64": changed(
        expert_ids_TK=lambda x: torch.zeros(7, 1, dtype=torch.int32)
    ),
    "returns weights_TK of shape (7, 2), torch.float32, expected (7, 1)": changed(
        weights_TK=lambda x: torch.ones(7, 2)
    ),
    "returns weights_TK of shape (7, 1), torch.float16, expected (7, 1), torch.float32 or": changed(
        weights_TK=lambda x: torch.ones(7, 1).half()
    ),
    "returns counts_E of shape (5,), torch.int64, expected (6,)": changed(
        counts_E=lambda x: torch.zeros(5, dtype=torch.int64)
    ),
    "returns scores_TE = None, expected (7, 6)": changed(scores_TE=lambda x: None),
    "returns expert_ids_TK = 3, expected (7, 1)": changed(expert_ids_TK=lambda x: 3),
    "returns scores_TE of shape (6, 7)": changed(scores_TE=lambda x: torch.ones(6, 7)),
}


@pytest.mark.parametrize(("text", "router"), ERRORS.items(), ids=range(len(ERRORS)))
def test_what_is_no_router_is_named(text, router):
    with pytest.raises(ValueError, match=re.escape("moe_forward: router: ") + ".*" + re.escape(text)):
        fmoe.moe_forward(two_layers(torch.float32), torch.randn(7, 6), router=router)


# The second device's router, where the first's is ``top_1``, and what the second is told.
UNLIKE = {
    "got rows of shape (6,) and torch.float64 with 2 weights of torch.float64 after the experts": changed(
        expert_ids_TK=lambda x: torch.zeros(5, 2, dtype=torch.int64),
        weights_TK=lambda x: torch.ones(5, 2).double(),
    ),
    "with 1 weights of torch.float32 after the experts": changed(weights_TK=lambda x: torch.ones(5, 1)),
    "with 1 weights of torch.float64 before the experts": changed(score_before_experts=lambda x: True),
}


def told_of_others(text):
    """What this device is told if devices send rows that differ."""
    mesh, x = bare_mesh("ep=2"), torch.randn(5, 6, dtype=torch.float64)
    params, router = fmoe.shard_params(two_layers(), mesh), [top_1, UNLIKE[text]][mesh.get_rank()]
    for _ in range(2):  # they go on together afterwards
        with pytest.raises(ValueError, match="dispatch: x_TD, routing: got") as caught:
            fmoe.moe_forward(params, x, mesh, router=router)
    return str(caught.value)


@pytest.mark.parametrize("text", UNLIKE)
def test_rows_of_one_device_that_differ_are_an_error_on_all(pool, text):
    first, second = pool.run(2, told_of_others, text)
    assert "1 weights of torch.float64 after the experts, and others on the devices [1] of the axis" in first
    assert f"{text}, and others on the devices [0] of the axis, expected alike on all." in second


def broken_on_one():
    """The second device's router raises, and the first waits for its tokens."""
    mesh = bare_mesh("ep=2")
    params, x = fmoe.shard_params(two_layers(), mesh), torch.randn(5, 6, dtype=torch.float64)
    wrong = changed(scores_TE=lambda x: torch.ones(6, 7))
    fmoe.moe_forward(params, x, mesh, router=wrong if mesh.get_rank() else top_1)


@pytest.mark.slow
def test_an_error_of_one_devices_router_ends_the_others_within_seconds(pool):
    pool.run(2, torch.distributed.get_rank)  # by now the processes have started
    began = time.monotonic()
    with pytest.raises(
        RankError, match=r"^rank 1: Traceback(.|\n)*ValueError: moe_forward: router: got"
    ) as told:
        pool.run(2, broken_on_one)
    assert time.monotonic() - began < 15
    assert "\nrank 0: " in str(told.value)
