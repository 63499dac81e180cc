"""The laws of the layer, its transforms and its errors."""

import re
from dataclasses import replace

import numpy as np
import optree
import pytest
import torch
from helpers import (
    CONFIGS,
    ORACLE_TRANSFORMS,
    TRANSFORMS,
    Example,
    error,
    fresh_seed,
    quick,
    random_layer,
    squared,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fmoe
from fmoe.introspect import kept_bytes, raw_calls
from fmoe.ops.dispatch import dispatch_start
from fmoe.ops.reference import choose, moe_reference, swiglu_reference
from fmoe.ops.route import route

pytestmark = pytest.mark.usefixtures("device")

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


def loss_and_grads(fn, params, x, cotangent):
    y, pull = torch.func.vjp(fn, params, x)
    return y, pull(cotangent)


def to(tree, dtype):
    return optree.tree_map(lambda t: t.to(dtype), tree)


def check_against_oracle(params, x, config, tolerance):
    """Values and gradients of the layer in ``x``'s dtype against the float64 oracle, same experts chosen."""
    ids = route(params.router, x.reshape(-1, x.shape[-1]), config).expert_ids_TK
    cotangent = torch.randn_like(x)
    got = loss_and_grads(lambda p, x: fmoe.moe_forward(p, x, router=config), params, x, cotangent)
    wide = to(params, torch.float64), x.double()
    expected = loss_and_grads(lambda p, x: moe_reference(p, x, config, ids), *wide, cotangent.double())
    assert error(got, expected) < tolerance


# ---- law 1: the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_equal_the_oracle(config, dtype):
    params = random_layer(dim=24, hidden=20, scale=12.0, dtype=dtype)
    check_against_oracle(params, torch.randn(2, 17, 24).to(dtype), config, DTYPES[dtype])


@settings(max_examples=60)
@given(st.data())
def test_any_sizes_equal_the_oracle(data):
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    experts = groups * data.draw(st.integers(1, 4), "experts per group")
    top_groups = data.draw(st.integers(1, groups), "top groups")
    config = fmoe.RouterConfig(
        top_k=data.draw(st.integers(1, experts // groups * top_groups), "k"),
        num_groups=groups,
        top_groups=top_groups,
        group_best=data.draw(st.integers(1, 3), "group best"),
        score_func=data.draw(st.sampled_from(["sigmoid", "softmax"])),
        normalize=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 2.5])),
        score_before_experts=data.draw(st.booleans()),
        force_balance=data.draw(st.booleans()),
    )
    dim, hidden, tokens = (data.draw(st.integers(least, 9)) for least in (1, 1, 0))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    params = random_layer(dim, hidden, experts, shared=data.draw(st.integers(0, 2)))
    check_against_oracle(params, torch.randn(tokens, dim, dtype=torch.float64), config, 1e-10)


@pytest.mark.parametrize("group_best", [1, 2, 3, 9])
def test_the_choice_is_the_oracles(group_best):
    config = fmoe.RouterConfig(top_k=4, num_groups=4, top_groups=2, group_best=group_best)
    params, x = random_layer(experts=16).router, torch.randn(50, 6, dtype=torch.float64)
    routing = route(params, x, config)
    chosen = torch.zeros(50, 16, dtype=torch.bool).scatter(1, routing.expert_ids_TK, True)
    assert torch.equal(chosen, choose(routing.scores_TE + params.bias_E, config))


def test_shape_of_x_is_kept_and_leading_dimensions_are_tokens():
    params, config = random_layer(), CONFIGS["sigmoid, groups"]
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    y = fmoe.moe_forward(params, x, router=config)
    assert y.shape == x.shape
    rows = torch.stack([fmoe.moe_forward(params, row, router=config) for row in x.reshape(-1, 6)])
    assert error(y.reshape(-1, 6), rows) < 1e-12


# ---- law 3: dispatch and combine, expand and reduce ------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_dispatch_and_combine_are_adjoint(tokens, experts, top_k, dropped, seed):
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    routing = random_routing(tokens, experts, top_k, dropped)
    x = torch.randn(tokens, 3, dtype=torch.float64)
    x_SD, plan = fmoe.dispatch(x, routing)
    y = torch.randn_like(x_SD)
    assert error((fmoe.combine(y, plan) * x).sum(), (y * x_SD).sum()) < 1e-12
    # With weights of one, reduce is the transpose of expand.
    ones = replace(plan, weights_SK=torch.ones_like(plan.weights_SK))
    y_RD = torch.randn(plan.slot_R.shape[0], 3, dtype=torch.float64)
    assert error((fmoe.reduce(y_RD, ones) * x).sum(), (y_RD * fmoe.expand(x, ones)).sum()) < 1e-12


def random_routing(tokens, experts, top_k, dropped=False):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    if dropped:
        ids = torch.where(torch.rand(ids.shape) < 0.4, -1, ids)
    weights = torch.rand(tokens, top_k, dtype=torch.float64)
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    return fmoe.Routing(ids, weights, counts, torch.rand(tokens, experts))


def by_hand(params, x, routing):
    """Token by token, choice by choice."""
    rows = []
    for t, row in enumerate(x):
        total = torch.zeros_like(row)
        for k, e in enumerate(routing.expert_ids_TK[t].tolist()):
            if e >= 0:
                gate, up = params.w_in[e] @ row
                total = total + routing.weights_TK[t, k] * (
                    params.w_out[e] @ (torch.nn.functional.silu(gate) * up)
                )
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def through_halves(params, x, routing):
    """The same with an expert of one's own between ``expand`` and ``reduce``."""
    x_SD, plan = fmoe.dispatch(x, routing)
    x_RD = fmoe.expand(x_SD, plan)
    start, rows = 0, []
    for e, end in enumerate(plan.offsets_e.tolist()):
        gate, up = (x_RD[start:end] @ w.T for w in params.w_in[e])
        rows.append((torch.nn.functional.silu(gate) * up) @ params.w_out[e].T)
        start = end
    rows.append(torch.full_like(x_RD[start:], torch.nan))
    return fmoe.combine(fmoe.reduce(torch.cat(rows), plan), plan)


def fused(params, x, routing):
    x_SD, plan = fmoe.dispatch(x, routing)
    return fmoe.combine(fmoe.experts_grouped_mm(params, x_SD, plan), plan)


# ---- law 5: degenerate routing -------------------------------------------------------------------


ROUTINGS = {
    "all on one expert": lambda: torch.full((7, 1), 2),
    "some experts empty": lambda: torch.tensor([[0, 3], [3, 0], [0, 3]]),
    "a token nowhere": lambda: torch.tensor([[0, 1], [-1, -1], [2, -1]]),
    "every token nowhere": lambda: torch.full((5, 2), -1),
    "no token": lambda: torch.empty(0, 2, dtype=torch.int64),
    "one token": lambda: torch.tensor([[3]]),
}


@pytest.mark.parametrize("path", [fused, through_halves])
@pytest.mark.parametrize("ids", ROUTINGS.values(), ids=ROUTINGS)
def test_degenerate_routing(ids, path):
    ids, params = ids(), random_layer(experts=4).experts
    x = torch.randn(ids.shape[0], 6, dtype=torch.float64)
    weights = torch.rand(ids.shape, dtype=torch.float64)
    counts = torch.bincount(ids[ids >= 0], minlength=4)

    def run(fn):
        def call(p, x, w):
            return fn(p, x, fmoe.Routing(ids, w, counts, torch.rand(ids.shape[0], 4)))

        y, pull = torch.func.vjp(call, params, x, weights)
        return y, pull(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))

    assert error(run(path), run(by_hand)) < 1e-12


def test_rows_of_dropped_pairs_reach_nothing_even_as_nan():
    routing = random_routing(6, 4, 2, dropped=True)
    routing.expert_ids_TK[0, 0] = -1  # one at least
    plan = fmoe.dispatch(torch.randn(6, 3, dtype=torch.float64), routing)[1]
    valid = int(plan.offsets_e[-1])
    y_RD = torch.randn(12, 3, dtype=torch.float64)
    poisoned = torch.cat([y_RD[:valid], torch.full_like(y_RD[valid:], torch.nan)])

    def both(y):
        def call(y, w):
            return fmoe.reduce(y, replace(plan, weights_SK=w))

        out, pull = torch.func.vjp(call, y, plan.weights_SK)
        g_y, g_w = pull(torch.ones_like(out))
        return out, g_y[:valid], g_w

    assert valid < 12
    assert error(both(poisoned), both(y_RD)) == 0


# ---- law 6: no hidden state ------------------------------------------------------------------------


def test_a_plan_is_a_value():
    params, x = random_layer(), torch.randn(5, 6, dtype=torch.float64)
    a, b = (random_routing(5, 8, 3) for _ in range(2))
    (x_a, plan_a), (x_b, plan_b) = fmoe.dispatch(x, a), fmoe.dispatch(x, b)
    assert all(isinstance(leaf, torch.Tensor) for leaf in optree.tree_leaves(plan_a))
    before = [leaf.clone() for leaf in optree.tree_leaves(plan_a)]
    y_b = fmoe.combine(fmoe.experts_grouped_mm(params.experts, x_b, plan_b), plan_b)
    y_a = fmoe.combine(fmoe.experts_grouped_mm(params.experts, x_a, plan_a), plan_a)
    again = fmoe.combine(fmoe.experts_grouped_mm(params.experts, x_a, plan_a), plan_a)
    assert torch.equal(y_a, again)
    assert error(y_a, by_hand(params.experts, x, a)) < 1e-12
    assert error(y_b, by_hand(params.experts, x, b)) < 1e-12
    assert all(map(torch.equal, before, optree.tree_leaves(plan_a)))


def test_evaluation_changes_nothing():
    params, x = random_layer(), torch.randn(5, 6, dtype=torch.float64)
    copies = [leaf.clone() for leaf in optree.tree_leaves(params)]
    first = fmoe.moe_forward(params, x, return_stats=True, router=CONFIGS["sigmoid, groups"])
    with torch.no_grad():
        second = fmoe.moe_forward(params, x, return_stats=True, router=CONFIGS["sigmoid, groups"])
    assert error(first, second) == 0
    assert all(map(torch.equal, copies, optree.tree_leaves(params)))


def test_statistics_of_no_tokens_are_zeros():
    params = random_layer()
    x = torch.zeros(0, 6, dtype=torch.float64)
    stats = fmoe.moe_forward(params, x, return_stats=True, router=CONFIGS["sigmoid, groups"])[1]
    none, zero = torch.zeros(8, dtype=torch.int64), torch.tensor(0.0)
    assert error(stats, fmoe.MoEStats(none, zero, torch.tensor(8), zero, none[0])) == 0


def test_selection_bias_gets_a_gradient_of_exactly_zero_and_no_weight():
    params, x = random_layer(), torch.randn(9, 6, dtype=torch.float64)
    config = CONFIGS["sigmoid, groups"]
    grads = torch.func.grad(lambda p: fmoe.moe_forward(p, x, router=config).pow(2).sum())(params)
    assert torch.equal(grads.router.bias_E, torch.zeros_like(grads.router.bias_E))
    uniform = params._replace(router=params.router._replace(bias_E=params.router.bias_E + 3))
    assert error(*(fmoe.moe_forward(p, x, router=config) for p in (params, uniform))) < 1e-12


# ---- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("config", [CONFIGS["sigmoid, groups"], CONFIGS["softmax, before"]], ids=["v3", "v2"])
def test_transforms_equal_the_oracle(transform, config):
    example = Example(random_layer(), torch.randn(7, 6, dtype=torch.float64))
    got = TRANSFORMS[transform](squared(lambda p, x: fmoe.moe_forward(p, x, router=config)), example)
    expected = ORACLE_TRANSFORMS[transform](squared(lambda p, x: moe_reference(p, x, config)), example)
    assert error(got, expected) < 1e-10


OVER_NONE = {
    "vmap": lambda f: torch.vmap(f)(torch.zeros(0, 4, 6)),
    "vmap of one token": lambda f: torch.vmap(f)(torch.zeros(0, 6)),
    "vmap of no token": lambda f: torch.vmap(f)(torch.zeros(0, 0, 6)),
    "vmap(vmap)": lambda f: torch.vmap(torch.vmap(f))(torch.zeros(2, 0, 4, 6)),
    "vmap of none(vmap)": lambda f: torch.vmap(torch.vmap(f))(torch.zeros(0, 2, 4, 6)),
    "vmap(grad)": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(torch.zeros(0, 4, 6)),
    "jacfwd": lambda f: torch.func.jacfwd(f)(torch.zeros(0, 6)),
    "jacrev": lambda f: torch.func.jacrev(f)(torch.zeros(0, 6)),
    "hessian": lambda f: torch.func.hessian(f)(torch.zeros(0, 6)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("transform", OVER_NONE)
def test_transforms_over_nothing_give_the_shapes_of_a_dense_layer(transform, config):
    params = random_layer(dtype=torch.float32)
    for fn in (fmoe.moe_forward, fmoe.remat(fmoe.moe_forward)):
        got = OVER_NONE[transform](lambda x, fn=fn: fn(params, x, router=config))
        assert got.shape == OVER_NONE[transform](lambda x: swiglu_reference(params.shared, x)).shape


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_derivatives_of_params_over_nothing(config):
    params, batch = random_layer(), torch.zeros(0, 4, 6, dtype=torch.float64)
    loss = lambda p, x: fmoe.moe_forward(p, x, router=config).sin().sum((-2, -1))  # noqa: E731
    total = torch.func.grad(lambda p: torch.vmap(loss, (None, 0))(p, batch).sum())(params)
    assert error(total, optree.tree_map(torch.zeros_like, params)) == 0
    each = torch.vmap(torch.func.grad(loss), (None, 0))(params, batch)
    for fn in (torch.func.jacrev, torch.func.jacfwd):
        slopes = fn(lambda p: fmoe.moe_forward(p, batch[:, 0], router=config))(params)
        for leaf, one, slope in zip(*map(optree.tree_leaves, (params, each, slopes))):
            assert one.shape == (0, *leaf.shape) and slope.shape == (0, 6, *leaf.shape)


def test_a_config_may_change_under_compile():
    """Dynamo then takes its numbers for symbols."""
    params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4), torch.randn(5, 8)
    compiled = torch.compile(fmoe.moe_forward, fullgraph=True, backend="eager")
    for scale in (1.0, 2.5, 3.5):
        config = fmoe.RouterConfig(scale=scale)
        assert error(compiled(params, x, router=config), fmoe.moe_forward(params, x, router=config)) < 1e-6


@pytest.mark.parametrize("backend", quick(["aot_eager"], ["aot_eager", "inductor"]))
def test_compiles_fullgraph_once_though_routing_changes(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    params, config = random_layer(dtype=torch.float32), CONFIGS["sigmoid, groups"]
    counter = CompileCounterWithBackend(backend)

    def loss(p, x):
        return fmoe.moe_forward(p, x, router=config).pow(2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    choices = set()
    for _ in range(4):
        x = torch.randn(7, 6)
        choices.add(str(route(params.router, x, config).expert_ids_TK))
        got = fmoe.value_and_grad(compiled, (0, 1))(params, x)
        assert error(got, fmoe.value_and_grad(loss, (0, 1))(params, x)) < 1e-5
    assert len(choices) > 1
    assert counter.frame_count == 1


def test_each_kernel_runs_once_a_step():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    with raw_calls() as counts:
        loss = lambda p, x: fmoe.moe_forward(p, x, router=CONFIGS["sigmoid, groups"]).sum()  # noqa: E731
        fmoe.value_and_grad(loss, (0, 1))(params, x)
    names = "topk", "layout", *(f"experts_{half}" for half in ("up", "down", "up_backward", "down_backward"))
    assert {n: counts[n] for n in names} == dict.fromkeys(names, 1)


def test_the_layer_keeps_no_score_of_every_expert():
    """Of the router only logits' indices, the chosen scores, and what autograd needs to normalise them."""
    tokens, experts, top_k = 128, 512, 2
    params = fmoe.moe_init(fresh_seed(), dim=4, hidden_dim=2, num_experts=experts)
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    config = fmoe.RouterConfig(top_k=top_k)
    kept = kept_bytes(lambda p, x: fmoe.moe_forward(p, x, router=config), params, torch.randn(tokens, 4))
    assert kept < 4 * tokens * experts


def test_keeps_input_preactivation_and_plan_only():
    tokens, top_k, dim, hidden, experts = 64, 3, 32, 16, 8
    params = fmoe.moe_init(fresh_seed(), dim=dim, hidden_dim=hidden, num_experts=experts)
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    x = torch.randn(tokens, dim, requires_grad=True)
    routing = route(params.router, x, CONFIGS["sigmoid, groups"])
    pairs = tokens * top_k
    plan = (8 + 8) * pairs + 4 * experts  # slot and row int64, offsets int32; weights are given
    given = params.experts, routing.weights_TK
    kept = kept_bytes(lambda p, w, x: fused(p, x, replace(routing, weights_TK=w)), *given, x)
    assert kept == 4 * pairs * 2 * hidden + plan


# ---- parity with transformers ------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_parity_with_transformers(implementation):
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    theirs_config = DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
    )
    theirs_config._experts_implementation = implementation
    layer = DeepseekV3MoE(theirs_config)
    params = random_layer(dim=32, hidden=16, experts=16, shared=2, dtype=torch.float32, scale=5.0)
    # Bounded away from ties: the bias orders the experts, the scores only weigh them.
    bias = torch.randperm(16).float()
    params = params._replace(router=params.router._replace(bias_E=bias))
    with torch.no_grad():
        layer.gate.weight.copy_(params.router.weight_ED)
        layer.gate.e_score_correction_bias.copy_(bias)
        layer.experts.gate_up_proj.copy_(params.experts.w_in.flatten(1, 2))
        layer.experts.down_proj.copy_(params.experts.w_out)
        layer.shared_experts.gate_proj.weight.copy_(params.shared.w_in[0])
        layer.shared_experts.up_proj.weight.copy_(params.shared.w_in[1])
        layer.shared_experts.down_proj.weight.copy_(params.shared.w_out)
    x = torch.randn(2, 21, 32, requires_grad=True)
    config = fmoe.RouterConfig(top_k=4, num_groups=4, top_groups=2, scale=2.5)
    cotangent = torch.randn(2, 21, 32)
    y, pull = torch.func.vjp(lambda p, x: fmoe.moe_forward(p, x, router=config), params, x.detach())
    grads, g_x = pull(cotangent)
    expected = layer(x)
    expected.backward(cotangent)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, want in (
        (g_x, x.grad),
        (grads.router.weight_ED, layer.gate.weight.grad),
        (grads.experts.w_in.flatten(1, 2), layer.experts.gate_up_proj.grad),
        (grads.experts.w_out, layer.experts.down_proj.grad),
        (grads.shared.w_in[0], layer.shared_experts.gate_proj.weight.grad),
        (grads.shared.w_in[1], layer.shared_experts.up_proj.weight.grad),
        (grads.shared.w_out, layer.shared_experts.down_proj.weight.grad),
    ):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


# ---- initialisation --------------------------------------------------------------------------------


def test_init_is_a_function_of_its_seed():
    sizes = dict(dim=64, hidden_dim=32, num_experts=8)
    a, b, c = (fmoe.moe_init(s, **sizes) for s in (3, 3, 4))
    assert error(a, b) == 0
    assert error(a, c) > 0
    with_shared = fmoe.moe_init(3, num_shared_experts=1, **sizes)
    assert error(a.experts, with_shared.experts) == 0  # a new parameter changes no other
    assert abs(a.experts.w_in.std() - 0.02) < 1e-3
    half = fmoe.moe_init(3, dtype=torch.bfloat16, **sizes)
    assert half.router.bias_E.dtype == torch.float32
    assert torch.equal(half.experts.w_in, a.experts.w_in.bfloat16())
    generator = torch.Generator().manual_seed(5)
    first, second = (fmoe.moe_init(generator, **sizes) for _ in range(2))
    assert error(first, second) > 0
    assert error(first, fmoe.moe_init(torch.Generator().manual_seed(5), **sizes)) == 0


# ---- errors ------------------------------------------------------------------------------------------


def layer_with(dtype=torch.float32, **changes):
    params = fmoe.moe_init(0, dim=8, hidden_dim=4, num_experts=16, num_shared_experts=1, dtype=dtype)
    return params._replace(**changes)


def dispatched(experts=16):
    return fmoe.dispatch(torch.randn(3, 8), random_routing(3, experts, 2))


def routed(**config):
    return fmoe.moe_forward(layer_with(), torch.randn(3, 8), router=fmoe.RouterConfig(**config))


BALANCED = CONFIGS["balanced"]
ROUTING = fmoe.Routing(
    torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), torch.tensor([2, 2]), torch.ones(2, 2)
)
META = fmoe.ExpertParams(torch.empty(16, 2, 4, 8, device="meta"), torch.empty(16, 8, 4, device="meta"))
WIDE_BIAS = (
    "expected torch.float32 or torch.float64, which hold its small steps. "
    "Convert every parameter but the selection biases, as moe_init(dtype=) does."
)

ERRORS = {
    "wrong last dimension": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 5)),
        "moe_forward: x: got shape (3, 5), expected (..., 8), as params.experts.w_in is (16, 2, 4, 8). "
        "Pass the dimension the layer was initialised with.",
    ),
    "a scalar": (lambda: fmoe.moe_forward(layer_with(), torch.tensor(1.0)), "moe_forward: x: got shape ()"),
    "integer x": (
        lambda: fmoe.moe_forward(layer_with(), torch.ones(3, 8, dtype=torch.int64)),
        "moe_forward: x: got dtype torch.int64, expected a floating dtype. "
        "Embed tokens before the layer, or use x.float().",
    ),
    "shared experts of another dimension": (
        lambda: fmoe.moe_forward(
            layer_with(shared=fmoe.ExpertParams(torch.ones(2, 4, 5), torch.ones(8, 4))), torch.randn(3, 8)
        ),
        "moe_forward: params.shared.w_in: got shape (2, 4, 5), expected (2, F, 8).",
    ),
    "mixed dtypes": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 8).bfloat16()),
        "moe_forward: params.experts.w_in: got torch.float32, expected torch.bfloat16, as x. "
        "Convert one of the two with .to().",
    ),
    "mixed devices": (
        lambda: fmoe.moe_forward(layer_with(experts=META), torch.randn(3, 8)),
        "moe_forward: params.experts.w_in: got meta, expected c",
    ),
    "a leaf that is no tensor": (
        lambda: fmoe.moe_forward(layer_with(shared=None), torch.randn(3, 8)),
        "moe_forward: params.shared: got NoneType, expected a tensor. "
        "Leaves are tensors only; write an absent subtree as ().",
    ),
    "top_k above E": (
        lambda: routed(top_k=17),
        "route: router.top_k: got 17, expected between 1 and the number of experts, 16. "
        "Lower it, as in RouterConfig(top_k=1).",
    ),
    "one expert, by the default of two": (
        lambda: fmoe.moe_forward(fmoe.moe_init(0, dim=8, hidden_dim=4, num_experts=1), torch.randn(3, 8)),
        "route: router.top_k: got 2, expected between 1 and the number of experts, 1. "
        "Lower it, as in RouterConfig(top_k=1).",
    ),
    "top_k above the groups": (
        lambda: routed(top_k=9, num_groups=8, top_groups=4),
        "route: router.top_k: got 9, expected at most 8, the experts that the chosen groups hold "
        "(top_groups=4 of num_groups=8, 16 experts). Raise top_groups, or leave num_groups and top_groups "
        "out.",
    ),
    "groups that don't divide": (
        lambda: routed(num_groups=3),
        "route: router.num_groups: got 3, expected a divisor of the number of experts, 16. "
        "Leave num_groups and top_groups out to choose among all experts.",
    ),
    "more top groups than groups": (
        lambda: routed(num_groups=2, top_groups=3),
        "route: router.top_groups: got 3, expected between 1 and num_groups=2.",
    ),
    "group score of no expert": (
        lambda: routed(group_best=0),
        "route: router.group_best: got 0, expected at least 1. DeepSeek-V3 has 2, DeepSeek-V2 1.",
    ),
    "score function": (
        lambda: routed(score_func="relu"),
        "route: router.score_func: got 'relu', expected 'sigmoid' or 'softmax'. Choose one of the two.",
    ),
    "rows of another dimension": (
        lambda: fmoe.route(layer_with().router, torch.randn(3, 5), BALANCED),
        "route: x_TD: got shape (3, 5), expected (T, 8), as weight_ED is (16, 8). Flatten x to (T, D).",
    ),
    "a bias for other experts": (
        lambda: fmoe.route(fmoe.RouterParams(torch.ones(4, 8), torch.ones(1)), torch.randn(3, 8), BALANCED),
        "route: router_params: got weight_ED (4, 8) and bias_E (1,), expected (E, D) and (E,).",
    ),
    "a layer cast whole to bfloat16": (
        lambda: fmoe.moe_forward(to(layer_with(), torch.bfloat16), torch.randn(3, 8).bfloat16()),
        f"route: router_params.bias_E: got torch.bfloat16, {WIDE_BIAS}",
    ),
    "an integer bias": (
        lambda: fmoe.route(to(layer_with().router, torch.int64), torch.randn(3, 8), BALANCED),
        f"route: router_params.bias_E: got torch.int64, {WIDE_BIAS}",
    ),
    "a bias that would stall": (
        lambda: fmoe.update_expert_bias(to(layer_with(), torch.bfloat16), torch.ones(16), 0.001),
        f"update_expert_bias: params.bias_E: got torch.bfloat16, {WIDE_BIAS}",
    ),
    "a float16 bias that would stall": (
        lambda: fmoe.update_expert_bias(to(layer_with().router, torch.float16), torch.ones(16), 0.001),
        f"update_expert_bias: params.bias_E: got torch.float16, {WIDE_BIAS}",
    ),
    "top_k that is no integer": (
        lambda: routed(top_k=2.0),
        "route: router.top_k: got 2.0, expected an integer. Convert it with int().",
    ),
    "routing of other rows": (
        lambda: fmoe.dispatch(torch.randn(5, 8), random_routing(3, 4, 2)),
        "dispatch: x_TD: got shape (5, 8), expected (3, D), a row for each row of routing.expert_ids_TK.",
    ),
    "routing of other rows, begun": (
        lambda: dispatch_start(torch.randn(5, 8), random_routing(3, 4, 2)),
        "dispatch_start: x_TD: got shape (5, 8), expected (3, D), a row for each row of routing.expert_ids",
    ),
    "weights for other choices": (
        lambda: fmoe.dispatch(
            torch.randn(3, 8), replace(random_routing(3, 4, 2), weights_TK=torch.ones(3, 1))
        ),
        "dispatch: routing.weights_TK: got shape (3, 1), expected (3, 2), as routing.expert_ids_TK.",
    ),
    "expert ids out of range, batched": (
        lambda: torch.vmap(lambda x, ids: fmoe.dispatch(x, replace(ROUTING, expert_ids_TK=ids)))(
            torch.randn(2, 2, 8), torch.tensor([[[0, 1], [0, 2]], [[0, 1], [1, 0]]], device="cpu")
        ),
        "dispatch: routing.expert_ids_TK: got an expert id of 2, expected ids below 2",
    ),
    "expert ids below -1": (
        lambda: fmoe.dispatch(
            torch.randn(2, 8), replace(ROUTING, expert_ids_TK=torch.tensor([[0, -2], [1, -1]], device="cpu"))
        ),
        "dispatch: routing.expert_ids_TK: got an expert id of -2, expected ids from 0 on, or -1 for a pair",
    ),
    "rows of another plan": (
        lambda: fmoe.expand(torch.randn(5, 8), fmoe.dispatch(torch.randn(3, 8), random_routing(3, 4, 2))[1]),
        "expand: x_SD: got shape (5, 8), expected (3, D), by its plan.",
    ),
    "experts on rows of another plan": (
        lambda: fmoe.experts_grouped_mm(
            layer_with().experts,
            torch.randn(5, 8),
            fmoe.dispatch(torch.randn(3, 8), random_routing(3, 16, 2))[1],
        ),
        "experts_grouped_mm: x_SD: got shape (5, 8), expected (3, D), by its plan.",
    ),
    "experts of another router": (
        lambda: fmoe.experts_grouped_mm(layer_with().experts, *dispatched(experts=4)),
        "experts_grouped_mm: expert_params.w_in: got shape (16, 2, 4, 8), expected (4, 2, 4, 8) for x_SD",
    ),
    "outputs of another dimension": (
        lambda: fmoe.experts_grouped_mm(
            layer_with().experts._replace(w_out=torch.ones(16, 8)), *dispatched()
        ),
        "experts_grouped_mm: expert_params.w_out: got shape (16, 8), expected (16, 8, 4) for x_SD",
    ),
    "experts of another dtype": (
        lambda: fmoe.experts_grouped_mm(layer_with(torch.bfloat16).experts, *dispatched()),
        "experts_grouped_mm: expert_params.w_in: got torch.bfloat16 on ",
    ),
    "counts of other experts": (
        lambda: fmoe.update_expert_bias(layer_with(), torch.ones(3), 0.1),
        "update_expert_bias: counts_E: got shape (3,), expected (16,), one count per expert.",
    ),
    "params of unknown specs": (
        lambda: fmoe.shard_params({"w": torch.ones(2)}, fmoe.make_mesh(device_type="cpu")),
        "shard_params: specs: got None, for a dict, expected specs, unless params are MoEParams.",
    ),
    "backend": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 8), backend="nccl"),
        "moe_forward: backend: got 'nccl', expected one of ('auto', 'local', 'all_to_all', 'deepep').",
    ),
    "size": (
        lambda: fmoe.moe_init(0, dim=0, hidden_dim=4, num_experts=2),
        "moe_init: dim: got 0, expected an integer of at least 1.",
    ),
    "size that is no integer": (
        lambda: fmoe.moe_init(0, dim=4, hidden_dim=4.0, num_experts=2),
        "moe_init: hidden_dim: got 4.0, expected an integer of at least 1.",
    ),
    "size below zero": (
        lambda: fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=2, num_shared_experts=-1),
        "moe_init: num_shared_experts: got -1, expected an integer of at least 0.",
    ),
    "dtype": (
        lambda: fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=2, dtype=torch.int32),
        "moe_init: dtype: got torch.int32, expected a floating dtype.",
    ),
    "a key for a seed": (
        lambda: fmoe.moe_init(fmoe.random.key(0), dim=4, hidden_dim=4, num_experts=2),
        "moe_init: seed: got a tensor, expected an integer or a torch.Generator, and no key of fmoe.random.",
    ),
    "a seed that is no integer": (
        lambda: fmoe.moe_init(0.5, dim=4, hidden_dim=4, num_experts=2),
        "moe_init: seed: got 0.5, expected an integer or a torch.Generator",
    ),
    "a dict of params": (
        lambda: fmoe.moe_forward(layer_with()._asdict(), torch.randn(3, 8)),
        "moe_forward: params: got dict, expected fmoe.MoEParams. Pass what moe_init gives, or",
    ),
    "tokens of NumPy": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 8, device="cpu").numpy()),
        "moe_forward: x: got ndarray, expected a tensor. Convert it with torch.as_tensor.",
    ),
    "a router in the mesh's place": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 8), fmoe.RouterConfig()),
        "expected a mesh. Make one with fmoe.make_mesh, and pass other options by name.",
    ),
    "a text for a mesh": (
        lambda: fmoe.moe_forward(layer_with(), torch.randn(3, 8), "ep=2"),
        "moe_forward: mesh: got 'ep=2', expected a mesh. Make one with fmoe.make_mesh(\"ep=2\").",
    ),
    "a text for a mesh to begin on": (
        lambda: fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=2, mesh="ep=2"),
        "moe_init: mesh: got 'ep=2', expected a mesh.",
    ),
    "a text for a mesh to lie on": (
        lambda: fmoe.shard_params(layer_with(), "ep=2"),
        "distribute: mesh: got 'ep=2', expected a mesh.",
    ),
    "no mesh to lie on": (
        lambda: fmoe.shard_params(layer_with(), None),
        "distribute: mesh: got None, expected a mesh.",
    ),
}


def test_a_seed_of_numpy_is_the_same_seed():
    params = [fmoe.moe_init(seed, dim=4, hidden_dim=4, num_experts=2) for seed in (3, np.int64(3))]
    assert all(map(torch.equal, *(optree.tree_leaves(each) for each in params)))


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_a_mesh_of_one_device_is_the_same_call(device):
    params, x = layer_with(), torch.randn(3, 8)
    mesh = fmoe.make_mesh("ep=1", device_type=device)
    expected = fmoe.moe_forward(params, x)
    assert torch.equal(fmoe.moe_forward(params, x, mesh), expected)
    for backend in ("local", "all_to_all"):
        assert torch.equal(fmoe.moe_forward(params, x, mesh, backend=backend), expected)
    spread = fmoe.shard_params(params, mesh)
    assert torch.equal(fmoe.moe_forward(spread, x, mesh), expected)
