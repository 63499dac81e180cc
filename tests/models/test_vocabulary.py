"""Embedding and loss: exact values and gradients, and logits that never exist all at once."""

import dataclasses

import optree
import pytest
import torch
from devices import bare_mesh
from helpers import allocated_at_once, error, fresh_seed, quick
from laws import whole
from torch.nn.functional import cross_entropy

import fmoe
from fmoe.introspect import kept_bytes
from fmoe.models import deepseek_v3
from fmoe.models.vocabulary import summed_cross_entropy
from fmoe.ops.core.axes import group_of
from fmoe.ops.cross_entropy import block_columns, block_rows
from fmoe.parallel.placement import token_axes

VOCAB, DIM, SHAPE = 1000, 24, (3, 37)
TOKENS = SHAPE[0] * SHAPE[1]


def example(dtype):
    x, weight = torch.randn(*SHAPE, DIM).to(dtype), (torch.randn(VOCAB, DIM) * 0.5).to(dtype)
    targets = torch.randint(VOCAB, SHAPE)
    targets[torch.rand(SHAPE) < 0.2] = -100
    return x, weight, targets


def dense(x, weight, targets):
    logits = (x @ weight.mT).flatten(0, 1)
    return cross_entropy(logits, targets.flatten(), reduction="sum")


WANTED = {"both": (0, 1), "of the tokens": (0,), "of the weight": (1,)}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("columns", [64, 448, 2000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)]
)
def test_value_and_gradients_are_those_of_dense_float64_logits(dtype, tolerance, columns, wanted):
    x, weight, targets = example(dtype)

    def loss(x, weight):
        return summed_cross_entropy(x, weight, targets, logits_bytes=4 * TOKENS * columns)[0]

    want, want_grads = fmoe.value_and_grad(dense, wanted)(x.double(), weight.double(), targets)
    got, got_grads = fmoe.value_and_grad(loss, wanted)(x, weight)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(got.double() - want) < 1e-5 * want  # logits aren't rounded, whatever the dtype
    assert error(got_grads, want_grads) < tolerance
    assert summed_cross_entropy(x, weight, targets)[1] == (targets != -100).sum()


def test_rows_that_are_hard_to_sum_stay_finite():
    x = torch.tensor([[300.0], [-300.0], [0.0]], dtype=torch.float64)
    weight = torch.linspace(-3, 3, 200, dtype=torch.float64)[:, None]
    targets = torch.tensor([199, 199, 5])
    for block_bytes in (1, 2**20):
        loss = lambda x, w, b=block_bytes: summed_cross_entropy(x[None], w, targets[None], logits_bytes=b)[0]  # noqa: E731
        got = fmoe.value_and_grad(loss, (0, 1))(x, weight)
        want = fmoe.value_and_grad(dense, (0, 1))(x[None], weight, targets[None])
        assert error(got, (want[0], (want[1][0][0], want[1][1]))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_than_a_block_of_logits_exists(dtype):
    tokens, vocab, dim = 512, 8192, 16
    x, weight = torch.randn(1, tokens, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    targets = torch.randint(vocab, (1, tokens))
    for wanted, all_of in (((0, 1), vocab), ((0,), tokens)):  # blocks of tokens, and of the vocabulary
        peaks = {}
        for size in (64, 256):
            step = fmoe.value_and_grad(
                lambda x, w, n=size * all_of: summed_cross_entropy(x, w, targets, logits_bytes=4 * n)[0],
                wanted,
            )
            peaks[size] = allocated_at_once(lambda step=step: step(x, weight))[0]
        block, wide = 4 * 256 * all_of, 4 * (tokens + vocab) * dim
        assert block <= peaks[256] <= 1.05 * block + 3 * wide + 8 * 8 * tokens
        assert abs(peaks[256] - peaks[64]) <= 1.05 * (4 * 192 * (all_of + 2 * dim))
    everything = allocated_at_once(lambda: fmoe.value_and_grad(dense, (0, 1))(x, weight, targets))[0]
    assert everything > 2 * vocab * tokens * x.element_size()  # logits and their gradient: many blocks


def test_gradients_or_a_number_per_token_are_kept():
    x, weight, targets = example(torch.bfloat16)
    x, weight = x.requires_grad_(), weight.requires_grad_()

    def kept(x, weight):
        return kept_bytes(lambda x, w: summed_cross_entropy(x, w, targets)[0], x, weight)

    some = TOKENS * (2 * 4 + 8 + 3 * 1)  # two terms, the index, masks
    assert kept(x, weight) <= 4 * (x.numel() + weight.numel()) + some
    assert kept(x, weight.detach()) <= some


def test_blocks_are_at_least_one_step_and_at_most_what_was_asked_for():
    assert block_columns(16384, 2**28) == 4096
    assert block_columns(10**9, 2**28) == 64
    assert block_rows(102400, 2**30) == 2560 and block_rows(10**9, 2**30) == 64
    for tokens in (1, 7, 1000, 12345):
        assert block_columns(tokens, 2**28) * tokens * 4 <= 2**28


def test_a_target_outside_the_vocabulary_is_an_error():
    x, weight, targets = example(torch.float32)
    for wrong in (VOCAB, -1, -2):
        targets[1, 1] = wrong
        with pytest.raises(RuntimeError, match="got a target outside the vocabulary"):
            summed_cross_entropy(x, weight, targets)


def told(axes, what, wrong):
    """What each device is told if the first has a wrong id."""
    mesh, config = bare_mesh(axes), deepseek_v3.preset("debug", layers=2, vocab_size=32)
    params = deepseek_v3.init(config, 0, mesh=mesh)
    tokens, targets = torch.randint(32, (2, 2, 9)).unbind()
    if not any(mesh.get_coordinate()):
        (tokens if what == "tokens" else targets)[1, 4] = wrong
    call = deepseek_v3.forward if what == "logits" else deepseek_v3.loss
    inputs = [targets] if what == "logits" else [tokens, targets]
    for _ in range(2):  # they go on together afterwards
        with pytest.raises(RuntimeError, match="vocabulary: tokens, targets: got an id outside of it"):
            call(params, *inputs, config, mesh)
    return True


@pytest.mark.parametrize(
    ("axes", "what", "wrong"), [("dp=2", "tokens", 32), ("ep=2", "targets", -3), ("ep=2", "logits", 99)]
)
def test_an_id_of_one_device_outside_the_vocabulary_is_an_error_on_all(pool, axes, what, wrong):
    assert pool.run(2, told, axes, what, wrong) == [True, True]


def shares(axes, counts, seed):
    """The model's error against one process, where devices have these numbers of sequences."""
    mesh, config = bare_mesh(axes), deepseek_v3.preset("debug", layers=2, vocab_size=32)
    group = group_of(mesh, token_axes(mesh))
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(32, (2, sum(counts), 9), generator=generator).unbind()
    mine = [tensor.split(counts)[group.position] for tensor in batch]
    params, spread = (deepseek_v3.init(config, seed, dtype=torch.float64, mesh=m) for m in (None, mesh))
    step = fmoe.value_and_grad(deepseek_v3.loss, has_aux=True)
    (loss, stats), grads = step(spread, *mine, config, mesh)
    (expected, their_stats), their_grads = step(params, *batch, config)
    assert torch.equal(stats.num_targets, their_stats.num_targets)
    return max(error(loss, expected), error(whole(grads), their_grads))


FEW = [("dp=2", [0, 3]), ("ep=2", [2, 0])]


@pytest.mark.parametrize(("axes", "counts"), quick(FEW, [*FEW, ("dp=2", [0, 0]), ("ep=2", [0, 0])]))
def test_a_device_may_have_no_sequences(pool, axes, counts):
    assert max(pool.run(2, shares, axes, counts, fresh_seed())) < 1e-9


def test_a_model_of_no_tokens_has_no_loss():
    config = deepseek_v3.preset("debug", layers=2)
    for shape in ((0, 9), (2, 0)):
        nothing = torch.zeros(shape, dtype=torch.int64)
        step = fmoe.value_and_grad(deepseek_v3.loss, has_aux=True)
        (loss, stats), grads = step(deepseek_v3.init(config, 0), nothing, nothing, config)
        assert loss == 0
        assert stats.num_targets == 0
        assert not any(grad.any() for grad in optree.tree_leaves(grads))


def test_the_models_loss_is_its_logits_cross_entropy_tied_or_not():
    for tied in (False, True):
        config = dataclasses.replace(deepseek_v3.preset("debug"), tied_head=tied, vocab_size=300)
        params = deepseek_v3.init(config, 0, dtype=torch.float64)
        tokens, targets = torch.randint(300, (2, 2, 9)).unbind()
        targets[0, 3] = -100

        def by_logits(p):
            logits, _ = deepseek_v3.forward(p, tokens, config)  # noqa: B023
            return cross_entropy(logits.flatten(0, 1), targets.flatten())  # noqa: B023

        def loss(p):
            return deepseek_v3.loss(p, tokens, targets, config, logits_bytes=18 * 4 * 64)[0]  # noqa: B023

        assert error(fmoe.value_and_grad(loss)(params), fmoe.value_and_grad(by_logits)(params)) < 1e-12
