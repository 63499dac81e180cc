"""The layer under ``torch.autocast``: experts, shared or not, compute as ``F.linear`` does."""

import re

import optree
import pytest
import torch
from helpers import CONFIGS, error, quick, random_layer
from torch.func import grad, jvp, vmap

import fmoe
from fmoe.models.moe import mlp_forward

pytestmark = pytest.mark.usefixtures("device")

CONFIG = CONFIGS["sigmoid, groups"]
LOW = [torch.bfloat16, torch.float16]


def autocast(fn, x, dtype=torch.bfloat16):
    def call(*args):
        with torch.autocast(x.device.type, dtype):
            return fn(*args)

    return call


def layer(p, x, config=CONFIG):
    return fmoe.moe_forward(p, x, router=config)


def cast_by_hand(params, x, config, dtype):
    """The layer with its products in ``dtype``: each cast is written out."""
    low = lambda tree: optree.tree_map(lambda t: t.to(dtype), tree)  # noqa: E731
    x_SD, plan = fmoe.dispatch(low(x), fmoe.route(params.router, x, config))
    y = fmoe.combine(fmoe.experts_grouped_mm(low(params.experts), x_SD, plan), plan).float()
    return y + mlp_forward(low(params.shared), low(x)).float() if params.shared else y


def sample(shared, dtype=torch.float32):
    params = random_layer(dim=24, hidden=16, shared=shared, dtype=dtype, scale=12.0)
    return params, torch.randn(33, 24, dtype=dtype)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("config", [CONFIG, CONFIGS["softmax, before"]], ids=["v3", "v2"])
def test_experts_compute_in_the_dtype_of_autocast(config, dtype, shared):
    params, x = sample(shared)
    loss = lambda fn: lambda p, x: (fn(p, x, config).sin().sum(), fn(p, x, config))  # noqa: E731
    got = grad(autocast(loss(layer), x, dtype), (0, 1), has_aux=True)(params, x)
    by_hand = loss(lambda p, x, c: cast_by_hand(p, x, c, dtype))
    assert error(got, grad(by_hand, (0, 1), has_aux=True)(params, x)) < 1e-6  # in another order
    exact = grad(loss(layer), (0, 1), has_aux=True)(params, x)
    assert {t.dtype for t in optree.tree_leaves(got)} == {torch.float32}
    eps = torch.finfo(dtype).eps
    assert eps / 100 < error(got[1], exact[1]) < 16 * eps
    assert error(got[0], exact[0]) < 64 * eps


def test_a_routed_expert_computes_what_a_shared_one_does():
    params, x = sample(1)
    alone = optree.tree_map(lambda t: t[None], params.shared)
    router = fmoe.RouterParams(params.router.weight_ED[:1], torch.zeros(1))
    routed = fmoe.MoEParams(router, alone, ())
    one = fmoe.RouterConfig(top_k=1)
    got = autocast(layer, x)(routed, x, one)
    expected = autocast(mlp_forward, x)(params.shared, x).float()
    exact = layer(routed, x, one)
    assert error(got, expected) < error(exact, expected) * 1.5 < 0.05
    assert error(got, exact) > 1e-4


WRAPS = {
    "remat, recomputed": lambda fn: fmoe.remat(fn, fmoe.save_nothing),
    "remat, kept": lambda fn: fmoe.remat(fn, fmoe.save_everything),
    "compile": lambda fn: torch.compile(fn, fullgraph=True, backend="aot_eager"),
    "compile(remat)": lambda fn: torch.compile(fmoe.remat(fn), fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("wrap", quick(["remat, recomputed", "compile"], WRAPS))
def test_autocast_holds_in_remat_and_compile(wrap, shared):
    """Gradients are taken outside autocast, as PyTorch advises."""
    params, x = sample(shared)
    torch._dynamo.reset()

    def run(fn, cast=autocast):
        return fmoe.value_and_grad(lambda p, x: cast(fn, x)(p, x).sin().sum(), (0, 1))(params, x)

    got, expected = run(WRAPS[wrap](layer)), run(layer)
    assert error(got, expected) < 1e-6 < error(expected, run(layer, lambda fn, x: fn))


def test_transforms_hold_under_autocast():
    params, x = sample(0)
    X, low = torch.randn(3, 9, 24), autocast(layer, x)
    assert error(vmap(low, (None, 0))(params, X), torch.stack([low(params, x) for x in X])) < 1e-2
    tangents = optree.tree_map(torch.randn_like, (params, x))
    y, t_y = jvp(low, (params, x), tangents)
    assert y.dtype == t_y.dtype == torch.float32
    assert error(y, low(params, x)) == 0
    assert 1e-4 < error(t_y, jvp(layer, (params, x), tangents)[1]) < 5e-2


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_tokens_and_params_may_differ_under_autocast(dtype, shared):
    params, x = sample(shared)
    low = x.to(dtype)
    y = autocast(layer, x)(params, low)
    assert y.dtype == dtype
    assert error(y, autocast(layer, x)(params, low.float())) < 0.05
    with pytest.raises(ValueError, match=re.escape(f"got torch.float32, expected {dtype}, as x.")):
        layer(params, low)


def test_float64_is_not_cast():
    params, x = sample(1, torch.float64)
    assert error(autocast(layer, x)(params, x), layer(params, x)) == 0
    with pytest.raises(ValueError, match=r"got torch.float64, expected torch.float32, as x"):
        autocast(layer, x)(params, x.float())


def test_a_shared_gate_follows_autocast():
    params, x = sample(1)
    params = params._replace(shared_gate=torch.randn(1, 24))
    y = autocast(layer, x)(params, x)
    assert y.dtype == torch.float32 and 1e-4 < error(y, layer(params, x)) < 0.05
