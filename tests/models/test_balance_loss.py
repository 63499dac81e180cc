"""The sequence-wise balance loss: its value, and the same on every mesh and in any micro-batches."""

import dataclasses

import pytest
import torch
from devices import bare_mesh
from helpers import error, fresh_seed, quick
from laws import MODELS, ranks_of, whole

import fmoe
from fmoe.models import decoder
from fmoe.ops.balance import balance_loss
from fmoe.ops.core.axes import group_of
from fmoe.parallel.placement import token_axes
from fmoe.training.gradients import accumulate
from fmoe.transforms import per_layer

ROUTERS = {
    "sigmoid": fmoe.RouterConfig(top_k=3, num_groups=4, top_groups=2),
    "softmax": fmoe.RouterConfig(top_k=2, score_func="softmax"),
}
CONFIG = dataclasses.replace(MODELS["MLA"], balance_loss=0.3)


@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_the_published_formula(router):
    config, experts, length = ROUTERS[router], 8, 6
    params = fmoe.moe_init(fresh_seed(), dim=5, hidden_dim=3, num_experts=experts, dtype=torch.float64).router
    params = params._replace(weight_ED=torch.randn(experts, 5, dtype=torch.float64))
    x = torch.randn(3 * length, 5, dtype=torch.float64)

    def by_hand(weight):
        found = []
        for sequence in x.split(length):
            scores = sequence @ weight.T
            scores = scores.sigmoid() if config.score_func == "sigmoid" else scores.softmax(-1)
            ids = fmoe.route(params, sequence, config).expert_ids_TK
            times = torch.stack([(ids == i).sum() for i in range(experts)]).double()  # equation 18
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)  # equations 19 and 20
            found.append((experts / (config.top_k * length) * times * share).sum())
        return torch.stack(found)

    def ours(weight):
        return balance_loss(fmoe.route(params._replace(weight_ED=weight), x, config), num_sequences=3)

    weight = params.weight_ED
    assert error(ours(weight), by_hand(weight)) < 1e-12
    assert error(torch.func.jacrev(ours)(weight), torch.func.jacrev(by_hand)(weight)) < 1e-12


def test_even_loads_have_a_loss_of_one():
    even = fmoe.Routing(
        torch.arange(8).view(4, 2), torch.ones(4, 2), torch.ones(8, dtype=torch.int64), torch.ones(4, 8)
    )
    assert balance_loss(even) == 1
    with pytest.raises(
        ValueError, match="balance_loss: num_sequences: got 3 for 4 tokens, expected a divisor"
    ):
        balance_loss(even, 3)


def batch_of(rows, seed):
    tokens, targets = torch.randint(32, (2, rows, 9), generator=torch.Generator().manual_seed(seed)).unbind()
    targets[0, 2:] = -100
    targets[1] = -100
    return tokens, targets


@pytest.mark.parametrize("parts", [2, 3])
def test_the_models_loss_adds_it_in_any_micro_batches(parts):
    params, batch = decoder.init(CONFIG, fresh_seed(), dtype=torch.float64), batch_of(6, fresh_seed())
    step = fmoe.value_and_grad(lambda p, *b: decoder.loss(p, *b, CONFIG), has_aux=True)
    (loss, stats), grads = step(params, *batch)
    plain, _ = decoder.loss(params, *batch, MODELS["MLA"])
    assert stats.balance > 0
    assert error(loss - stats.balance, plain) < 1e-14
    (their_loss, their_stats), their_grads = accumulate(step, parts)(params, *batch)
    assert error((their_loss, their_stats.balance, their_grads), (loss, stats.balance, grads)) < 1e-12
    for remat in ("full", "default"):
        other = decoder.loss(params, *batch, CONFIG, per_layer=per_layer(remat))
        assert torch.equal(other[0], loss)


def spread(axes, seed):
    mesh = bare_mesh(axes)
    group = group_of(mesh, token_axes(mesh))
    params, there = (decoder.init(CONFIG, seed, dtype=torch.float64, mesh=m) for m in (None, mesh))
    batch = batch_of(4 * group.size, seed)
    mine = [tensor.chunk(group.size)[group.position] for tensor in batch]
    step = fmoe.value_and_grad(decoder.loss, has_aux=True)
    (loss, stats), grads = step(there, *mine, CONFIG, mesh, per_layer=per_layer("default"))
    (expected, their_stats), their_grads = step(params, *batch, CONFIG)
    return error((loss, stats.balance, whole(grads)), (expected, their_stats.balance, their_grads))


@pytest.mark.parametrize(
    "axes", quick(["ep=2", "dp=2,ep=2"], ["dp=2", "ep=2", "tp=2", "dp=2,ep=2", "tp=2,ep=2"])
)
def test_it_is_the_same_on_every_mesh(pool, axes):
    assert max(pool.run(ranks_of(axes), spread, axes, fresh_seed())) < 1e-9
