"""The weights of the chosen experts, at logits of any size."""

from dataclasses import replace

import pytest
import torch
from helpers import CONFIGS, ORACLE_TRANSFORMS, TRANSFORMS, Example, error, quick, random_layer, squared

import fmoe
from fmoe.ops.reference import moe_reference, route_reference

pytestmark = pytest.mark.usefixtures("device")

SCORES = ["sigmoid", "softmax"]
ROUTERS = [
    pytest.param(replace(config, score_func=score, normalize=True), id=f"{score}, {name}")
    for score in SCORES
    for name, config in CONFIGS.items()
]


def router_of(logits):
    """A router, and tokens whose logits these are; its bias prefers some experts whatever the logits."""
    num_experts = logits.shape[1]
    bias = torch.randperm(num_experts).float()
    return fmoe.RouterParams(torch.eye(num_experts, dtype=logits.dtype), bias), logits


def normalised(logits_TK, score):
    """Chosen scores over their sum, in float64, each by its ratios to the others."""
    logs = logits_TK.double()
    logs = -torch.log1p((-logs).exp()) if score == "sigmoid" else logs
    return 1 / (logs[:, None, :] - logs[:, :, None]).exp().sum(-1)


@pytest.mark.parametrize("config", ROUTERS)
@pytest.mark.parametrize("size", [-600, -100, -50, -44, 0, 44, 100, 600])
def test_weights_sum_to_one_at_logits_of_any_size(size, config):
    router, x = router_of(size + 3 * torch.randn(20, 8))
    routing = fmoe.route(router, x, config)
    expected = config.scale * normalised(x.gather(1, routing.expert_ids_TK), config.score_func)
    assert error(routing.weights_TK.sum(-1), torch.full((20,), config.scale)) < 1e-6
    assert error(routing.weights_TK, expected) < 1e-6
    dense = route_reference(router, x, config, routing.expert_ids_TK)
    assert error(dense.gather(1, routing.expert_ids_TK), expected) < 1e-6


def test_weights_sum_to_one_where_a_bias_chose_experts_with_tiny_scores():
    router, x = router_of(torch.randn(20, 8) - torch.tensor([200.0] * 7 + [0.0]))
    router = router._replace(bias_E=torch.tensor([2.0, 3.0] + [0.0] * 6))
    weights_TK = fmoe.route(router, x, fmoe.RouterConfig(score_func="softmax")).weights_TK
    assert error(weights_TK, normalised(x[:, [1, 0]], "softmax")) < 1e-6


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [-100, 0, 100])
def test_gradients_of_weights_are_right_at_logits_of_any_size(size, score):
    router, x = router_of(size + torch.randn(3, 6, dtype=torch.float64))
    config = fmoe.RouterConfig(top_k=3, score_func=score, scale=2.5)

    def weights(weight_ED, x):
        return fmoe.route(router._replace(weight_ED=weight_ED), x, config).weights_TK

    args = router.weight_ED.clone().requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(weights, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(weights, args)
    slopes = torch.func.jacrev(weights, 1)(*args)
    moves = size < 100 or score == "softmax"  # the sigmoid of 100 is one
    assert (slopes.abs().max() > 1e-3) == moves


OFTEN = ["grad", "jvp", "vmap both", "grad(vmap)", "grad(grad)", "jvp(vmap(grad))", "hessian", "compile"]


@pytest.mark.parametrize("transform", quick(OFTEN, TRANSFORMS))
@pytest.mark.parametrize("config", [CONFIGS["sigmoid, groups"], CONFIGS["balanced"]], ids=["v3", "balanced"])
def test_transforms_at_large_logits_equal_the_oracle(transform, config):
    params = random_layer()
    params.router.weight_ED[:, 0] = 100  # logits of about 100 times a token's first number
    example = Example(params, torch.randn(7, 6, dtype=torch.float64))
    got = TRANSFORMS[transform](squared(lambda p, x: fmoe.moe_forward(p, x, router=config)), example)
    expected = ORACLE_TRANSFORMS[transform](squared(lambda p, x: moe_reference(p, x, config)), example)
    assert error(got, expected) < 1e-10
