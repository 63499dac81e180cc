"""Random numbers as values: published vectors, another Threefry, transforms, meshes, jax if it is there."""

import math
import re

import pytest
import torch
from devices import bare_mesh
from helpers import error, fresh_seed, quick, remats
from torch.func import grad, jvp, vmap

import fmoe
from fmoe import P, random

PUBLISHED = [  # key, counter and result: Random123's kat_vectors, threefry2x32 of 20 rounds
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]
DRAWS = {
    "bits": random.bits,
    "uniform": random.uniform,
    "normal": random.normal,
    "gumbel": random.gumbel,
    "bernoulli": lambda key, shape, **how: random.bernoulli(key, 0.3, shape, **how),
}


def threefry(key, counter):
    """The algorithm as its authors state it, on Python's integers."""
    words = 2**32
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    a, b = ((c + k) % words for c, k in zip(counter, key))
    for number in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[number % 8]
        a = (a + b) % words
        b = (b * 2**rotation % words + b // 2 ** (32 - rotation)) ^ a
        if number % 4 == 3:
            turn = number // 4 + 1
            a, b = (a + schedule[turn % 3]) % words, (b + schedule[(turn + 1) % 3] + turn) % words
    return a, b


def fresh_key():
    return random.key(fresh_seed() * 2**31 + fresh_seed())


def test_published_vectors():
    for key, counter, result in PUBLISHED:
        assert threefry(key, counter) == result
        found = random.threefry2x32(torch.tensor(key), *map(torch.tensor, counter))
        assert tuple(map(int, found)) == result


def test_every_draw_follows_from_the_key_and_the_place(device):
    key = fresh_key()
    words = [threefry(key.tolist(), (0, place)) for place in range(6)]
    xor = torch.tensor([a ^ b for a, b in words]).view(2, 3)
    assert torch.equal(random.bits(key, (2, 3)), xor)
    assert torch.equal(random.uniform(key, (2, 3)).double(), (xor >> 9).double() / 2**23)
    whole = torch.tensor([(a * 2**32 + b) // 2**12 for a, b in words]).view(2, 3)
    double = random.uniform(key, (2, 3), dtype=torch.float64)
    assert torch.equal(double, whole.double() / 2**52)
    below = 2 * double - 1 + 2.0**-53
    normal = random.normal(key, (2, 3), dtype=torch.float64)
    assert error(torch.erf(normal / math.sqrt(2)), below) < 1e-14
    assert error(torch.exp(-torch.exp(-random.gumbel(key, (2, 3), dtype=torch.float64))), double) < 1e-13
    assert torch.equal(random.bernoulli(key, 0.3, (2, 3)), random.uniform(key, (2, 3)) < 0.3)
    data = [0, fresh_seed(), 2**32 + 5, 2**63 - 1]
    folded = [threefry(key.tolist(), divmod(number, 2**32)) for number in data]
    assert torch.equal(random.fold_in(key, torch.tensor(data)), torch.tensor(folded))
    for number, expected in zip(data, folded):
        assert random.fold_in(key, number).tolist() == [*expected]
    assert torch.equal(random.split(key, 3), random.fold_in(key, torch.arange(3)))


def test_numbers_are_distributed_as_they_should(device):
    count, key = 40_000, fresh_key()
    exact = {
        "uniform": (0.5, 1 / 12),
        "normal": (0.0, 1.0),
        "gumbel": (0.5772156649, math.pi**2 / 6),
        "bernoulli": (0.3, 0.21),
        "bits": (2**31, 2**64 / 12),
    }
    for number, (name, (mean, variance)) in enumerate(exact.items()):
        drawn = DRAWS[name](random.fold_in(key, number), (count,)).double()
        assert abs(drawn.mean() - mean) < 6 * math.sqrt(variance / count), name
        assert abs(drawn.var() / variance - 1) < 0.1, name
    across = random.normal(random.split(key, 1000), (40,))  # one number of each of many keys
    assert abs(across[:, 0].mean()) < 6 / math.sqrt(1000) and abs(torch.corrcoef(across.T)[0, 1]) < 0.2
    logits = torch.randn(5)
    drawn = random.categorical(key, logits.expand(count, 5))
    shares, expected = torch.bincount(drawn, minlength=5) / count, logits.softmax(0)
    assert ((shares - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_under_vmap_compile_and_remat(name, device, aot_eager):
    def draw(key):
        return DRAWS[name](random.fold_in(key, 3), (2, 5))

    keys = random.split(fresh_key(), 4)
    expected = torch.stack([draw(key) for key in keys])
    assert torch.equal(vmap(draw)(keys), expected)
    assert torch.equal(draw(keys), expected)
    assert torch.equal(vmap(vmap(draw))(keys.view(2, 2, 2)).flatten(0, 1), expected)
    assert torch.equal(torch.compile(draw, fullgraph=True)(keys[0]), expected[0])
    assert torch.equal(fmoe.remat(draw)(keys[1]), expected[1])


@pytest.mark.parametrize("name", DRAWS)
def test_a_single_number_is_the_first_of_a_row(name, device):
    key = fresh_key()
    single = DRAWS[name](key, ())
    assert single.shape == () and torch.equal(single, DRAWS[name](key, (3,))[0])
    keys = random.split(key, 4)
    assert torch.equal(DRAWS[name](keys, ()), vmap(lambda key: DRAWS[name](key, (1,))[0])(keys))


@pytest.mark.slow
def test_inductor_draws_the_same_bits(device):
    key = fresh_key()
    for name in ("bits", "uniform", "bernoulli"):
        compiled = torch.compile(lambda key, name=name: DRAWS[name](key, (1000,)), fullgraph=True)
        assert torch.equal(compiled(key), DRAWS[name](key, (1000,))), name


def test_dropout_drops_the_same_wherever_it_runs_again(device):
    key, rate = fresh_key(), 0.4
    x, t = torch.randn(2, 30, 7, dtype=torch.float64)
    kept = random.bernoulli(key, 1 - rate, x.shape)
    expected = torch.where(kept, x / (1 - rate), 0)

    def loss(x):
        return fmoe.dropout(x.sin(), key, rate).pow(3).sum()

    assert torch.equal(fmoe.dropout(x, key, rate), expected)
    assert 0 < kept.sum() < kept.numel()
    slope = torch.where(kept, 3 * x.sin() ** 2 * x.cos() / (1 - rate) ** 3, 0)
    assert error(grad(loss)(x), slope) < 1e-12
    for wrapped in remats(loss).values():
        assert torch.equal(grad(wrapped)(x), grad(loss)(x))
        leaf = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(wrapped(leaf), leaf)[0], grad(loss)(x))
    assert error(jvp(loss, (x,), (t,))[1], (slope * t).sum()) < 1e-12
    assert torch.equal(fmoe.dropout(x, key, 1), torch.zeros_like(x))
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(fmoe.dropout(leaf, key, 1).sum(), leaf)[0], torch.zeros_like(x))
    assert fmoe.dropout(x, key, 0) is x
    half = fmoe.dropout(x.bfloat16(), key, rate)
    assert half.dtype == torch.bfloat16 and torch.equal(half == 0, ~kept)


def test_dropped_elements_may_be_infinite():
    key, x = fresh_key(), torch.full((100,), torch.inf)
    dropped = fmoe.dropout(x, key, 0.5)
    assert set(dropped.tolist()) == {0.0, math.inf}
    assert not torch.isnan(grad(lambda x: fmoe.dropout(x, key, 0.5).sum())(x)).any()


# ---- on meshes -----------------------------------------------------------------------------------------

SPECS = [P(), P("dp"), P(None, "ep"), P("ep", "dp"), P(("dp", "ep")), P("dp", None, "ep")]


def pieces(axes, key):
    from fmoe.parallel.spec import local_piece

    mesh = bare_mesh(axes)
    shape = (8, 4, 8)
    for spec in SPECS:
        piece = local_piece(spec, shape, mesh)
        here = torch.empty(shape)[piece].shape
        for name, draw in DRAWS.items():
            mapped = fmoe.shard_map(
                lambda key, draw=draw, spec=spec, here=here: draw(key, here, spec=spec),
                mesh,
                in_specs=P(),
                out_specs=spec,
            )
            assert torch.equal(mapped(key), draw(key, shape)[piece]), (name, spec)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        drop = fmoe.shard_map(
            lambda x, spec=spec: fmoe.dropout(x, key, 0.5, spec=spec), mesh, in_specs=spec, out_specs=spec
        )
        assert torch.equal(drop(x[piece]), fmoe.dropout(x, key, 0.5)[piece])
        slope = grad(lambda x, drop=drop: drop(x).sum())(x[piece])
        assert torch.equal(slope, grad(lambda x: fmoe.dropout(x, key, 0.5).sum())(x)[piece])


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], ["dp=2,ep=2", "dp=4,ep=1", "dp=1,ep=4"]))
def test_devices_draw_the_numbers_of_their_pieces(pool, axes):
    pool.run(4, pieces, axes, fresh_key())


# ---- errors --------------------------------------------------------------------------------------------

KEY = "got {}, expected torch.int64 of shape (2,). Make one with fmoe.random.key(seed)."


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda k: random.key(-1), "key: seed: got -1, expected an integer from 0 to 2**64 - 1."),
        (lambda k: random.key(1.5), "key: seed: got 1.5, expected an integer"),
        (lambda k: random.split(7), "split: key: " + KEY.format(7)),
        (lambda k: random.split(k, 0), "split: num: got 0, expected at least 1."),
        (lambda k: random.fold_in(k.int(), 0), "fold_in: key: " + KEY.format("torch.int32 of shape (2,)")),
        (lambda k: random.fold_in(k, 0.5), "fold_in: data: got 0.5, expected an integer, or a tensor of"),
        (lambda k: random.fold_in(k, -1), "fold_in: data: got -1, expected an integer from 0 to 2**63 - 1."),
        (lambda k: random.fold_in(k, 2**63), f"fold_in: data: got {2**63}, expected an integer from 0"),
        (
            lambda k: random.bernoulli(k, torch.ones(3, 4), (4,)),
            "bernoulli: p: got shape (3, 4), expected one that broadcasts to the result's, (4,).",
        ),
        (
            lambda k: fmoe.dropout(torch.arange(3), k, 0.5),
            "dropout: x: got torch.int64, expected a floating dtype.",
        ),
        (lambda k: random.fold_in(k, k > 0), "fold_in: data: got torch.bool, expected an integer"),
        (lambda k: random.bits(k[:1], (2,)), "bits: key: " + KEY.format("torch.int64 of shape (1,)")),
        (
            lambda k: random.uniform(k, (2,), dtype=torch.bfloat16),
            "uniform: dtype: got torch.bfloat16, expected torch.float32 or torch.float64. Round what",
        ),
        (
            lambda k: random.normal(k, (2,), spec=P("dp")),
            "normal: axis: got ('dp',), expected a mesh axis that is bound; none is bound here.",
        ),
        (
            lambda k: random.gumbel(k, (2,), spec=P(None, "dp")),
            "gumbel: spec: got P(None, 'dp'), expected at most 1 entries, as shape is (2,).",
        ),
        (lambda k: fmoe.dropout(torch.ones(2), k, 1.5), "dropout: rate: got 1.5, expected from 0 to 1."),
        (lambda k: fmoe.dropout(torch.ones(2), 3, 0.5), "dropout: key: " + KEY.format(3)),
        (
            lambda k: fmoe.dropout(torch.ones(2, device="meta"), k, 0.5),
            "dropout: key: got one on cpu, expected one on meta, where the numbers are used. Move it",
        ),
        (
            lambda k: fmoe.dropout(torch.ones(2), random.split(k), 0.5),
            "dropout: key: got shape (2, 2), expected one key, (2,). Use torch.vmap for several.",
        ),
        (
            lambda k: random.categorical(random.split(k, 3), torch.ones(2, 4)),
            "categorical: key: got shape (3, 2), expected (2,) or (2, 2), a key for each row.",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(fresh_key())


# ---- beside jax ----------------------------------------------------------------------------------------


def test_numbers_are_those_of_jax():
    jax = pytest.importorskip("jax")
    seed, shape = fresh_seed(), (3, 50)
    mine, theirs = random.key(seed), jax.random.PRNGKey(seed)

    def tensor(array):
        return torch.tensor(jax.device_get(array).tolist())

    assert torch.equal(random.split(mine, 5), tensor(jax.random.split(theirs, 5)))
    assert torch.equal(random.fold_in(mine, 99), tensor(jax.random.fold_in(theirs, 99)))
    assert torch.equal(random.bits(mine, shape), tensor(jax.random.bits(theirs, shape)))
    assert torch.equal(random.uniform(mine, shape), tensor(jax.random.uniform(theirs, shape)))
    assert torch.equal(random.bernoulli(mine, 0.3, shape), tensor(jax.random.bernoulli(theirs, 0.3, shape)))
    assert error(random.normal(mine, shape), tensor(jax.random.normal(theirs, shape))) < 1e-5
    assert error(random.gumbel(mine, shape), tensor(jax.random.gumbel(theirs, shape))) < 1e-5
    logits = random.normal(random.fold_in(mine, 1), shape)
    drawn = jax.random.categorical(theirs, jax.numpy.asarray(logits.tolist()))
    assert torch.equal(random.categorical(mine, logits), tensor(drawn))
