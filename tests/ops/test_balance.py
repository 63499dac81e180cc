"""Statistics of a routing."""

import math

import pytest
import torch
from helpers import error

import fmoe
from fmoe.ops.balance import moe_stats, stats_sums

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("size", [-600, -80, -60, 0, 60])
def test_the_entropy_is_that_of_normalised_scores_however_small_they_are(size):
    ids, counts = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([3, 0, 0, 0])
    scores = (size + torch.randn(3, 4)).sigmoid() if size > -600 else torch.zeros(3, 4)
    share = (scores.double() if scores.any() else torch.ones(3, 4)).clone()
    share /= share.sum(-1, keepdim=True)
    expected = -(share * share.log()).sum(-1).mean()
    stats = moe_stats(stats_sums(fmoe.Routing(ids, torch.ones(3, 1), counts, scores)))
    assert error(stats.router_entropy, expected) < 1e-6
    nothing = moe_stats(stats_sums(fmoe.Routing(ids, torch.ones(3, 1), counts, scores * math.nan)))
    assert stats.router_entropy.dtype == torch.float32 and nothing.router_entropy.isnan()


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_a_bias_moves_by_a_finite_rate(rate):
    router = fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=3).router
    with pytest.raises(ValueError, match=r"update_expert_bias: rate: got .*, expected a finite number"):
        fmoe.update_expert_bias(router, torch.tensor([5, 1, 3]), rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_never_stops_moving(dtype):
    params = fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=3, dtype=torch.bfloat16)
    params = params._replace(router=params.router._replace(bias_E=torch.zeros(3, dtype=dtype)))
    for _ in range(2000):
        params = fmoe.update_expert_bias(params, torch.tensor([5, 1, 3]), 0.001)
    assert params.router.bias_E.dtype == dtype
    assert error(params.router.bias_E, torch.tensor([-2.0, 2.0, 0.0])) < 1e-4
