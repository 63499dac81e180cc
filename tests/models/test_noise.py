"""Noise of the router: a function of a key and of tokens' positions, wherever these lie."""

import dataclasses
import math
import re

import optree
import pytest
import torch
from helpers import change, error, fresh_seed, quick, random_layer, remats
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe import RouterConfig, random
from fmoe.models import decoder
from fmoe.models.config import without_noise
from fmoe.models.moe import begin_layer
from fmoe.models.sampling import sample
from fmoe.models.stages import cut
from fmoe.parallel import distribute
from fmoe.training import gradients, optim

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


def test_padding_has_its_places():
    layer, x, key = random_layer(), torch.randn(2, 5, 6, dtype=torch.float64), fresh_key()
    valid = torch.rand(2, 5) < 0.7
    whole = fmoe.moe_forward(layer, x, router=NOISY, key=key)
    some = fmoe.moe_forward(layer, x, router=NOISY, key=key, valid=valid)
    assert error(some[valid], whole[valid]) < 1e-14


def on_a_mesh(axes, layer, x, key, expected, compiling):
    mesh, rank = fmoe.make_mesh(axes, device_type="cpu"), torch.distributed.get_rank()
    params = fmoe.shard_params(layer, mesh)
    lies = int(math.prod(mesh.shape[1:3]))
    place = rank // (4 // lies)

    def loss(x, params=params):
        return fmoe.moe_forward(params, x, mesh, router=NOISY, key=key)

    counts = TOKENS if lies == 4 else [6, 4] if lies == 2 else [10]
    mine = x.flatten(0, 1).split(counts)[place]
    found = [error(loss(mine), expected.flatten(0, 1).split(counts)[place])]
    if compiling:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found.append(error(compiled(mine), loss(mine)))
    if lies == 4:
        spec = fmoe.P("dp", "ep") if "dp" in axes else fmoe.P(None, "ep")
        whole = torch.cat([x, x], 1)[:, :8]
        alone = fmoe.moe_forward(layer, whole, router=NOISY, key=key)
        spread = loss(distribute(whole, spec, mesh)).full_tensor()
        found.append(error(spread, alone))
    return found


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], ["dp=2,ep=2", "ep=4", "ep=2,tp=2", "tp=4"]))
def test_noise_is_the_same_on_every_mesh(pool, axes, slow):
    """Devices have different numbers of plain tokens, also none; DTensors are cut along two dimensions."""
    layer, x, key = random_layer(8, 8), torch.randn(2, 5, 8, dtype=torch.float64), fresh_key()
    expected = fmoe.moe_forward(layer, x, router=NOISY, key=key)
    for found in pool.run(4, on_a_mesh, axes, layer, x, key, expected, slow, timeout=300.0):
        assert max(found) < 1e-12


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=NOISY),
            "moe_forward: key: got None, with router.noise=0.7, expected a key, as fmoe.random.key(0). "
            "Pass one of this step, or evaluate with noise=0.0.",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=lambda *_: None, key=random.key(0)),
            "moe_forward: key: got one, beside a router function, expected None. Give the function a key of",
        ),
        (
            lambda layer, x: fmoe.moe_forward(layer, x, router=NOISY, key=3),
            "moe_forward: key: got 3, expected torch.int64 of shape (2,). Make one with fmoe.random.key",
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


# ---- the model -----------------------------------------------------------------------------------------

MODEL = change(
    decoder.preset("debug"),
    dim=16,
    num_layers=3,
    hidden_dim=16,
    moe_hidden_dim=8,
    num_experts=8,
    vocab_size=32,
    max_seq_len=16,
    init_std=0.3,
    router=RouterConfig(top_k=2, noise=0.7),
    balance_loss=0.1,
)


def batch(rows=4):
    tokens, targets = torch.randint(32, (2, rows, 8))
    return tokens, targets, (torch.rand(rows, 8) < 0.3).cumsum(-1)


def test_layers_draw_by_their_numbers_and_tokens_by_their_places(monkeypatch):
    key, params, (tokens, targets, _) = fresh_key(), fresh_model(), batch()
    drawn = []
    spy = lambda *args: drawn.append(args[-1]) or begin_layer(*args)  # noqa: E731
    monkeypatch.setattr("fmoe.models.layer.begin_layer", spy)
    decoder.loss(params, tokens, targets, MODEL, key=key)
    places = torch.arange(32).view(4, 8)
    decoder.loss(params, tokens[2:], targets[2:], MODEL, key=key, places=places[2:])
    each = [random.fold_in(random.fold_in(key, i), places) for i in (1, 2)]  # the first layer is dense
    for keys, expected in zip(drawn, [*each, *(k[2:] for k in each)], strict=True):
        assert torch.equal(keys, expected)


def fresh_model():
    return decoder.init(MODEL, fresh_seed(), dtype=torch.float64)


def step(mesh, params, tokens, targets, ids, key, **how):
    return gradients.of_model(MODEL, mesh, **how)(params, tokens, targets, ids, key)


def test_a_step_has_the_same_noise_however_it_is_computed(aot_eager, slow):
    key, params, data = fresh_key(), fresh_model(), batch()
    expected = step(None, params, *data, key)
    assert error(step(None, params, *data, fresh_key())[0][0], expected[0][0]) > 1e-6
    wraps = {"remat": fmoe.remat, "save": lambda f: fmoe.remat(f, fmoe.save("topk", "dispatch"))}
    if slow:
        wraps["compiled"] = lambda f: torch.compile(f, fullgraph=True)
    for name, wrap in wraps.items():
        assert error(step(None, params, *data, key, per_layer=wrap)[1], expected[1]) < 1e-11, name
    for parts in (2, 3):
        found = step(None, params, *data, key, micro_batches=parts)
        assert error((found[0][0], found[1]), (expected[0][0], expected[1])) < 1e-11


def steps_on(axes, params, data, key, expected):
    mesh, found = fmoe.make_mesh(axes, device_type="cpu"), {}
    pp, dp, ep, _ = mesh.shape
    held = params
    if pp > 1:
        stages = cut(MODEL, (0, 1))
        held = stages.of_rank(params, mesh.get_local_rank("pp"))
    specs = decoder.specs(MODEL)
    specs = specs if pp == 1 else stages.of_rank(specs, mesh.get_local_rank("pp"))
    here = mesh if pp == 1 else mesh["dp", "ep", "tp"]
    spread = fmoe.shard_params(held, here, specs)
    place = mesh.get_local_rank("dp") * ep + mesh.get_local_rank("ep")
    mine = [t.chunk(dp * ep)[place] for t in data]
    for zero in (1, 2, 3):
        for parts in (1, 2):
            out, grads = step(mesh, spread, *mine, key, zero=zero, micro_batches=parts)
            whole = [g.full_tensor() for g in optree.tree_leaves(grads)]
            want = expected[1] if pp == 1 else stages.of_rank(expected[1], mesh.get_local_rank("pp"))
            found[zero, parts] = max(error(out[0], expected[0][0]), error(whole, optree.tree_leaves(want)))
    loss = gradients.loss_of_model(MODEL, mesh)(spread, *mine, key)[0]
    found["loss"] = error(loss, expected[0][0])
    return found


@pytest.mark.parametrize(
    "axes", quick(["dp=2,ep=2", "pp=2,ep=2"], ["dp=2,ep=2", "pp=2,ep=2", "ep=2,tp=2", "pp=2,tp=2", "ep=4"])
)
def test_a_step_has_the_same_noise_on_every_mesh(pool, axes):
    key, params, data = fresh_key(), fresh_model(), batch(8)
    expected = step(None, params, *data, key)
    for found in pool.run(4, steps_on, axes, params, data, key, expected, timeout=300.0):
        assert max(found.values()) < 1e-11, found


def test_the_model_asks_for_a_key_and_for_places_that_fit():
    params, (tokens, targets, _), key = fresh_model(), batch(), fresh_key()
    with pytest.raises(ValueError, match=r"loss: key: got None, with router.noise=0.7, expected a key"):
        decoder.loss(params, tokens, targets, MODEL)
    with pytest.raises(ValueError, match=r"of_model: key: got None, with router.noise=0.7, expected a key"):
        step(None, params, tokens, targets, None, None)
    with pytest.raises(ValueError, match=r"forward: places: got places of shape \(4, 7\)"):
        decoder.forward(params, tokens, MODEL, key=key, places=targets[:, 1:])
    quiet = without_noise(MODEL)
    assert torch.equal(
        decoder.forward(params, tokens, quiet, key=key)[0], decoder.forward(params, tokens, quiet)[0]
    )


# ---- generators ----------------------------------------------------------------------------------------


class NoGenerator(TorchDispatchMode):
    """Refuses operators that draw from PyTorch's global generators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        generators = [v for v in (*args, *(kwargs or {}).values()) if isinstance(v, torch.Generator)]
        if torch.Tag.nondeterministic_seeded in func.tags and not generators:
            raise AssertionError(f"{func} draws from a global generator")
        return func(*args, **kwargs or {})


def test_the_refusal_of_generators_sees_them():
    for draw in (
        lambda: torch.rand(2),
        lambda: torch.ones(2).uniform_(),
        lambda: torch.ones(2).multinomial(1),
    ):
        with pytest.raises(AssertionError, match="draws from a global generator"), NoGenerator():
            draw()
    with pytest.raises(AssertionError, match="bernoulli"), NoGenerator():
        torch.nn.functional.dropout(torch.ones(4, requires_grad=True)).sum().backward()
    with NoGenerator():
        torch.rand(2, generator=torch.Generator().manual_seed(0))


def without_generators(axes, seed, data):
    """Parameters, two steps with noise and dropout, and a text, in which nothing draws from a generator."""
    mesh = axes and fmoe.make_mesh(axes, device_type="cpu")
    before, optimizer = torch.get_rng_state(), optim.adamw()
    place = torch.distributed.get_rank() if axes else 0
    tokens, targets, ids = (t.chunk(2)[place] if axes else t for t in data)

    def dropping(layer):
        def call(params, x, *rest):
            return layer(params, fmoe.dropout(x, params.key, 0.1), *rest)

        return fmoe.remat(call)

    with NoGenerator():
        params, key = decoder.init(MODEL, seed, mesh=mesh), random.key(seed)
        fmoe.moe_init(seed, dim=4, hidden_dim=4, num_experts=2, num_shared_experts=1)
        state = optimizer.init(params)
        for number in range(2):
            now = random.fold_in(key, number)
            out, grads = step(mesh, params, tokens, targets, ids, now, micro_batches=2, per_layer=dropping)
            params, state = optimizer.update(params, grads, state, 1e-3)
            params = decoder.update_biases(params, out[1], 1e-3)
        text = sample(params, data[0][:1, :3], MODEL, num_tokens=2, key=key, mesh=mesh)
    assert torch.equal(torch.get_rng_state(), before)
    return out[0].item(), text


def test_no_step_nor_init_draws_from_a_global_generator(pool):
    """And none depends on its state."""
    seed, data = fresh_seed(), batch()
    value, text = without_generators(None, seed, data)
    assert math.isfinite(value) and text.shape == (1, 5)
    torch.manual_seed(seed + 1)
    again, same = without_generators(None, seed, data)
    assert again == value and torch.equal(same, text)
    pool.run(2, without_generators, "ep=2", seed, data)
