"""What a newcomer passes by mistake: each gets an error that names function, argument, got and expected."""

import re
from fractions import Fraction

import pytest
import torch

import fmoe
from fmoe.models import decoder

PARAMS = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=4)
X, CONFIG = torch.randn(5, 8), fmoe.RouterConfig()
ROUTING = fmoe.route(PARAMS.router, X, CONFIG)
ROWS, PLAN = fmoe.dispatch(X, ROUTING)
STATS = fmoe.moe_forward(PARAMS, X, return_stats=True)[1]
MODEL = decoder.preset("debug", layers=2)
SIZES = dict(dim=8, hidden_dim=16, num_experts=4)
FLOAT_IDS = ROUTING.expert_ids_TK.float(), ROUTING.weights_TK, ROUTING.counts_E, ROUTING.scores_TE

MISTAKES = {
    "moe_init: dtype": lambda: fmoe.moe_init(0, **SIZES, dtype="float32"),
    "moe_init: device": lambda: fmoe.moe_init(0, **SIZES, device="gpu"),
    "init: config": lambda: decoder.init(0, MODEL),
    "init: dtype": lambda: decoder.init(MODEL, 0, dtype=torch.int32),
    "make_mesh: axes": lambda: fmoe.make_mesh({"ep": 1}),
    "make_mesh: device_type": lambda: fmoe.make_mesh(device_type="gpu"),
    "route: router_params": lambda: fmoe.route(PARAMS, X, CONFIG),
    "route: x_TD": lambda: fmoe.route(PARAMS.router, X.tolist(), CONFIG),
    "route: x_TD of integers": lambda: fmoe.route(PARAMS.router, X.long(), CONFIG),
    "route: config": lambda: fmoe.route(PARAMS.router, X, None),
    "route: router.scale": lambda: fmoe.moe_forward(PARAMS, X, router=fmoe.RouterConfig(scale=float("nan"))),
    "route: router.noise": lambda: fmoe.moe_forward(PARAMS, X, router=fmoe.RouterConfig(noise="little")),
    "dispatch: x_TD": lambda: fmoe.dispatch(X.tolist(), ROUTING),
    "dispatch: routing": lambda: fmoe.dispatch(X, None),
    "dispatch: routing.expert_ids_TK": lambda: fmoe.dispatch(X, fmoe.Routing(*FLOAT_IDS)),
    "expand: plan": lambda: fmoe.expand(ROWS, None),
    "experts_grouped_mm: expert_params": lambda: fmoe.experts_grouped_mm(PARAMS, ROWS, PLAN),
    "experts_grouped_mm: x_SD": lambda: fmoe.experts_grouped_mm(PARAMS.experts, ROWS.tolist(), PLAN),
    "experts_grouped_mm: plan": lambda: fmoe.experts_grouped_mm(PARAMS.experts, ROWS, ROUTING),
    "combine: y_SD": lambda: fmoe.combine(None, PLAN),
    "combine: plan": lambda: fmoe.combine(ROWS, None),
    "reduce: plan": lambda: fmoe.reduce(ROWS, None),
    "align_rows: plan": lambda: fmoe.align_rows(None, 8),
    "update_expert_bias: params": lambda: fmoe.update_expert_bias(X, STATS.tokens_per_expert, 0.001),
    "update_expert_bias: counts_E": lambda: fmoe.update_expert_bias(PARAMS, STATS, 0.001),
    "remat: fn": lambda: fmoe.remat(None),
    "value_and_grad: fn": lambda: fmoe.value_and_grad("loss"),
    "graphed: fn": lambda: fmoe.graphed(None),
    "exact_on_overflow: exact": lambda: fmoe.exact_on_overflow(len, None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    with pytest.raises(ValueError, match=re.escape(mistake.removesuffix(" of integers"))) as caught:
        MISTAKES[mistake]()
    assert re.fullmatch(r"[\w.]+: [\w.]+: got .+, expected .+\..*", str(caught.value)), caught.value


def test_what_fits_by_its_nature_is_taken():
    halves = fmoe.RouterConfig(scale=Fraction(1, 2), noise=0)
    half, whole = (fmoe.moe_forward(PARAMS, X, router=config) for config in (halves, CONFIG))
    assert torch.allclose(2 * half, whole)
    assert torch.equal(fmoe.route(tuple(PARAMS.router), X, CONFIG).weights_TK, ROUTING.weights_TK)
    rows = fmoe.experts_grouped_mm(tuple(PARAMS.experts), ROWS, PLAN)
    assert torch.equal(rows, fmoe.experts_grouped_mm(PARAMS.experts, ROWS, PLAN))
    for device in ("meta", "meta:0", torch.device("meta"), torch.device("cpu"), "cpu"):
        assert fmoe.moe_init(0, **SIZES, device=device).experts.w_in.device.type == str(device)[:4].strip(":")
    assert fmoe.make_mesh(device_type="").size() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no mistake with a GPU")
def test_a_gpu_that_is_missing_is_named():
    with pytest.raises(
        ValueError, match="moe_init: device: got 'cuda', expected a device that PyTorch finds"
    ):
        fmoe.moe_init(0, **SIZES, device="cuda")
