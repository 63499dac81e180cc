"""Noise of the router: a function of a key and of tokens' positions, wherever these lie."""

import dataclasses
import math
import re

import pytest
import torch
from helpers import error, fresh_seed, quick, random_layer, remats
from torch.func import grad, vmap

import fmoe
from fmoe import RouterConfig
from fmoe.ops import random
from fmoe.parallel import distribute

NOISY = RouterConfig(top_k=2, noise=0.7)
TOKENS = [3, 0, 5, 2]


def fresh_key():
    return random.key(fresh_seed())


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_noise_is_added_to_logits(score, device):
    layer, x, key = random_layer().router, torch.randn(7, 6, dtype=torch.float64), fresh_key()
    config = dataclasses.replace(NOISY, score_func=score, normalize=False)
    keys = random.fold_in(key, torch.arange(10, 17))
    routing = fmoe.route(layer, x, config, keys)
    noise = torch.stack([random.normal(random.fold_in(key, i), (8,)) for i in range(10, 17)])
    logits = x @ layer.weight_ED.T + 0.7 * noise.double()
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    ids = (scores + layer.bias_E).topk(2).indices
    assert torch.equal(routing.expert_ids_TK, ids)
    assert error(routing.scores_TE, scores) < 1e-14
    assert error(routing.weights_TK, scores.gather(1, ids)) < 1e-14


def test_without_noise_a_key_changes_no_bit():
    layer, x = random_layer(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(fmoe.moe_forward(layer, x, key=fresh_key()), fmoe.moe_forward(layer, x))


def test_noise_is_the_same_under_transforms_and_remat(device, aot_eager):
    layer, x, key = random_layer(), torch.randn(2, 5, 6, dtype=torch.float64), fresh_key()

    def loss(p, x, key=key):
        return fmoe.moe_forward(p, x, router=NOISY, key=key).pow(2).sum()

    other = loss(layer, x, fresh_key())
    assert loss(layer, x) == loss(layer, x) != other
    expected = grad(loss, (0, 1))(layer, x)
    for name, wrapped in remats(loss).items():
        assert error(grad(wrapped, (0, 1))(layer, x), expected) < 1e-12, name
    compiled = fmoe.value_and_grad(torch.compile(loss, fullgraph=True), (0, 1))(layer, x)
    assert error(compiled, (loss(layer, x), expected)) < 1e-12
    keys = random.split(key, 3)
    each = torch.stack([loss(layer, x, k) for k in keys])
    assert error(vmap(loss, (None, None, 0))(layer, x, keys), each) < 1e-12
    # Alone, an example has the positions of a batch of its own.
    assert error(vmap(loss, (None, 0))(layer, x), torch.stack([loss(layer, row) for row in x])) < 1e-12


def on_a_mesh(axes, layer, x, key, expected):
    mesh, rank = fmoe.make_mesh(axes, device_type="cpu"), torch.distributed.get_rank()
    params = fmoe.shard_params(layer, mesh)
    lies = int(math.prod(mesh.shape[1:3]))
    place = rank // (4 // lies)

    def loss(x, params=params):
        return fmoe.moe_forward(params, x, mesh, router=NOISY, key=key)

    counts = TOKENS if lies == 4 else [6, 4] if lies == 2 else [10]
    mine = x.flatten(0, 1).split(counts)[place]
    found = [error(loss(mine), expected.flatten(0, 1).split(counts)[place])]
    if lies == 4:
        spec = fmoe.P("dp", "ep") if "dp" in axes else fmoe.P(None, "ep")
        whole = torch.cat([x, x], 1)[:, :8]
        alone = fmoe.moe_forward(layer, whole, router=NOISY, key=key)
        spread = loss(distribute(whole, spec, mesh)).full_tensor()
        found.append(error(spread, alone))
    return found


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], ["dp=2,ep=2", "ep=4", "ep=2,tp=2", "tp=4"]))
def test_noise_is_the_same_on_every_mesh(pool, axes):
    """Devices have different numbers of plain tokens, also none; DTensors are cut along two dimensions."""
    layer, x, key = random_layer(8, 8), torch.randn(2, 5, 8, dtype=torch.float64), fresh_key()
    expected = fmoe.moe_forward(layer, x, router=NOISY, key=key)
    for found in pool.run(4, on_a_mesh, axes, layer, x, key, expected):
        assert max(found) < 1e-12


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=NOISY),
            "moe_forward: key: got None, with router.noise=0.7, expected a key, as fmoe.ops.random.key(0). "
            "Pass one of this step, or evaluate with noise=0.0.",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=lambda *_: None, key=random.key(0)),
            "moe_forward: key: got one, beside a router function, expected None. Give the function a key of",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=NOISY, key=3),
            "moe_forward: key: got 3, expected torch.int64 of shape (2,). Make one with fmoe.ops.random.key",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=NOISY, key=random.split(random.key(0))),
            "moe_forward: key: got shape (2, 2), expected one key, (2,).",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=RouterConfig(noise=-1.0)),
            "route: router.noise: got -1.0, expected a standard deviation, from 0 on. Leave it out",
        ),
        (
            lambda layer, x: fmoe.route(layer.router, x, NOISY),
            "route: keys_T2: got none, with router.noise, expected a key for each token. Pass one, or",
        ),
        (
            lambda layer, x: fmoe.route(layer.router, x, NOISY, random.split(random.key(0), 3)),
            "route: keys_T2: got shape (3, 2), expected (4, 2), a key for each token.",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(random_layer(), torch.randn(4, 6, dtype=torch.float64))
