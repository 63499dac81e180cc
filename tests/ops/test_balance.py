"""Statistics of a routing."""

import math

import pytest
import torch
from helpers import error

import fmoe
from fmoe.ops.balance import moe_stats

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("size", [-600, -80, -60, 0, 60])
def test_the_entropy_is_that_of_normalised_scores_however_small_they_are(size):
    ids, counts = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([3, 0, 0, 0])
    scores = (size + torch.randn(3, 4)).sigmoid() if size > -600 else torch.zeros(3, 4)
    share = (scores.double() if scores.any() else torch.ones(3, 4)).clone()
    share /= share.sum(-1, keepdim=True)
    expected = -(share * share.log()).sum(-1).mean()
    stats = moe_stats(fmoe.Routing(ids, torch.ones(3, 1), counts, scores))
    assert error(stats.router_entropy, expected) < 1e-6
    nothing = moe_stats(fmoe.Routing(ids, torch.ones(3, 1), counts, scores * math.nan))
    assert stats.router_entropy.dtype == torch.float32 and nothing.router_entropy.isnan()
