"""Packed documents and padding: each document as if it were alone, on one device and on any mesh."""

import dataclasses
import re

import optree
import pytest
import torch
from helpers import ORACLE_TRANSFORMS, TRANSFORMS, Example, error, fresh_seed, quick
from laws import MODELS, Where, own, ranks_of, whole
from parity import TINY
from test_deepseek_v3 import GROUPED, SMALL, with_biases
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.func import grad, vmap

import fmoe
from fmoe import P
from fmoe.introspect import raw_calls, wire_bytes
from fmoe.models import decoder
from fmoe.models.params import ModelParams
from fmoe.ops.core.axes import group_of
from fmoe.ops.core.tape import plain_operators
from fmoe.ops.segments import segments_of
from fmoe.parallel import distribute
from fmoe.parallel.placement import token_axes
from fmoe.training.gradients import accumulate
from fmoe.transforms import per_layer

CONFIGS = {"MLA": TINY, "GQA": GROUPED}
CONFIGS = {name: dataclasses.replace(c, max_seq_len=128) for name, c in CONFIGS.items()}
BALANCED = dataclasses.replace(CONFIGS["MLA"], balance_loss=0.3)
step = fmoe.value_and_grad(decoder.loss, has_aux=True)


def a_model(config):
    return with_biases(decoder.init(config, fresh_seed(), dtype=torch.float64))


def numbers(config, *shape):
    return torch.randint(config.vocab_size, shape)


# Lengths of the segments of each row; the last is padding where it is below zero.
PACKED = [[5, 1, 9, 4], [19], [2, 17], [3, 6, -10]]


def ids_of(rows):
    """Ids that aren't in order, as only where they change matters."""
    found = []
    for row in rows:
        ids = torch.randperm(len(row)) + 1
        found.append(torch.cat([(i * (n > 0)).expand(abs(n)) for i, n in zip(ids, row)]))
    return torch.stack(found)


def documents(rows, *tensors):
    """The documents of each row, alone, as batches of one."""
    for r, row in enumerate(rows):
        start = 0
        for n in row:
            if n > 0:
                yield tuple(t[r : r + 1, start : start + n] for t in tensors)
            start += abs(n)


def mean_of_documents(params, rows, tokens, targets, config):
    """The loss as a mean over every target of documents that are computed one by one."""
    sums, counts = 0.0, 0
    for alone in documents(rows, tokens, targets):
        value, stats = decoder.loss(params, *alone, config)
        sums, counts = sums + value * stats.num_targets, counts + stats.num_targets
    return sums / counts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_document_is_what_it_is_alone(name):
    config, ids = CONFIGS[name], ids_of(PACKED)
    params, (tokens, targets) = a_model(config), numbers(config, 2, *ids.shape)
    logits, stats = decoder.forward(params, tokens, config, segment_ids=ids)
    counts = [0] * len(stats)
    for one, mine in documents(PACKED, tokens, logits):
        expected, of_one = decoder.forward(params, one, config)
        assert error(mine, expected) < 1e-9
        counts = [n + s.tokens_per_expert for n, s in zip(counts, of_one)]
    assert all(torch.equal(n, s.tokens_per_expert) for n, s in zip(counts, stats))
    (value, found), grads = step(params, tokens, targets, config, segment_ids=ids)
    assert found.num_targets == sum(n for row in PACKED for n in row if n > 0)
    expected = fmoe.value_and_grad(mean_of_documents)(params, PACKED, tokens, targets, config)
    assert error((value, grads), expected) < 1e-9


def padded(config, real=16, length=128):
    tokens, targets = numbers(config, 2, 1, length)
    return tokens, targets, (torch.arange(length) < real).long()[None]


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_padding_is_as_if_it_were_absent(score_func):
    """16 tokens and 112 of padding: loss, gradients, statistics and biases of the 16 alone."""
    router = dataclasses.replace(BALANCED.router, score_func=score_func)
    config = dataclasses.replace(BALANCED, router=router)
    params, (tokens, targets, ids) = a_model(config), padded(config)
    (value, stats), grads = step(params, tokens, targets, config, segment_ids=ids)
    (expected, their_stats), their_grads = step(params, tokens[:, :16], targets[:, :16], config)
    assert stats.balance > 0
    assert error((value, grads), (expected, their_grads)) < 1e-9
    assert error((stats.num_targets, stats.balance), (their_stats.num_targets, their_stats.balance)) < 1e-9
    for mine, other in zip(stats.layers, their_stats.layers):
        assert torch.equal(mine.tokens_per_expert, other.tokens_per_expert)
        assert error(mine.router_entropy, other.router_entropy) < 1e-6  # float32
    moved, wanted = (decoder.update_biases(params, s, 0.01) for s in (stats, their_stats))
    assert error(moved, wanted) == 0
    other = torch.where(ids == 0, numbers(config, *ids.shape), tokens)
    assert error(step(params, other, targets, config, segment_ids=ids)[1], grads) < 1e-9


def test_a_row_of_padding_alone_changes_nothing():
    params, (tokens, targets) = a_model(BALANCED), numbers(BALANCED, 2, 3, 8)
    ids = torch.ones(3, 8, dtype=torch.int64)
    ids[1] = 0
    (value, stats), grads = step(params, tokens, targets, BALANCED, segment_ids=ids)
    (expected, theirs), their_grads = step(params, tokens[::2], targets[::2], BALANCED)
    assert error((value, grads, stats.balance), (expected, their_grads, theirs.balance)) < 1e-9
    (value, stats), grads = step(params, tokens, targets, BALANCED, segment_ids=0 * ids)
    assert value == stats.num_targets == 0
    assert not any(leaf.any() for leaf in optree.tree_leaves(grads))


def test_rows_of_one_segment_cost_nothing():
    params, (tokens, targets) = a_model(TINY), numbers(TINY, 2, 2, 9)
    ids = torch.tensor([[3], [7]]).expand(2, 9)
    with raw_calls() as calls:
        expected = step(params, tokens, targets, TINY)
    with raw_calls() as with_ids:
        found = step(params, tokens, targets, TINY, segment_ids=ids)
    assert calls == with_ids and "segment_attention" not in calls
    assert all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(expected)))


def test_experts_compute_no_padding():
    params, x = fmoe.moe_init(fresh_seed(), dim=8, hidden_dim=4, num_experts=4), torch.randn(3, 5, 8)
    valid = torch.rand(3, 5) < 0.5
    y, stats = fmoe.moe_forward(params, x, valid=valid, return_stats=True)
    assert stats.tokens_per_expert.sum() == 2 * valid.sum()
    assert not y[~valid].any()
    assert error(y[valid], fmoe.moe_forward(params, x[valid])) < 1e-6
    greedy = lambda router, x: fmoe.route(router, x, fmoe.RouterConfig(top_k=1))  # noqa: E731
    y, stats = fmoe.moe_forward(params, x, router=greedy, valid=valid, return_stats=True)
    assert stats.tokens_per_expert.sum() == valid.sum() and not y[~valid].any()
    for wrong in (valid.long(), valid[0]):
        with pytest.raises(ValueError, match=r"moe_forward: valid: got .*, expected torch.bool of \(3, 5\)"):
            fmoe.moe_forward(params, x, valid=wrong)


def test_stages_and_micro_batches_take_segments():
    config, ids = BALANCED, ids_of(PACKED)
    params, (tokens, targets) = a_model(config), numbers(config, 2, *ids.shape)
    whole_step = step(params, tokens, targets, config, segment_ids=ids)
    first = ModelParams(params.embedding, params.layers[:2], (), ())
    last = params._replace(embedding=(), layers=params.layers[2:])
    x, early = decoder.stage_loss(first, tokens, targets, config, segment_ids=ids)
    value, late = decoder.stage_loss(last, x, targets, config, segment_ids=ids)
    assert error(value + early.balance / late.num_targets, whole_step[0][0]) < 1e-9
    split = lambda p, t, u, i: decoder.loss(p, t, u, config, segment_ids=i)  # noqa: E731
    found = accumulate(fmoe.value_and_grad(split, has_aux=True), 3)(params, tokens, targets, ids)
    assert error((found[0][0], found[1]), (whole_step[0][0], whole_step[1])) < 1e-9


# ---- transforms and wrappers -----------------------------------------------------------------------


def test_segment_ids_under_vmap_and_per_example_gradients():
    """Every example has its own segments, which nobody can count, or all have the same."""
    config, ids = CONFIGS["GQA"], ids_of(PACKED)
    params, (tokens, targets) = a_model(config), numbers(config, 2, *ids.shape)

    def loss(p, *row):
        x, y, i = (t[None] for t in row)
        return decoder.loss(p, x, y, config, segment_ids=i)[0]

    got = vmap(grad(loss), (None, 0, 0, 0))(params, tokens, targets, ids)
    loop = [grad(loss)(params, *row) for row in zip(tokens, targets, ids)]
    assert error(got, optree.tree_map(lambda *g: torch.stack(g), *loop)) < 1e-12
    got = vmap(grad(loss), (None, 0, 0, None))(params, tokens, targets, ids[3])
    loop = [grad(loss)(params, *row, ids[3]) for row in zip(tokens, targets)]
    assert error(got, optree.tree_map(lambda *g: torch.stack(g), *loop)) < 1e-12


@pytest.mark.parametrize("transform", ["grad(grad)", "jvp(grad)", "hessian"])
def test_a_model_with_segments_under_transforms(transform):
    """Against its documents one by one, made of plain PyTorch functions; ``x`` scales the embedding."""
    params, rows = decoder.init(SMALL, fresh_seed(), dtype=torch.float64), [[2, 3], [4, -1]]
    example = Example(params, torch.rand(SMALL.dim, dtype=torch.float64) + 0.5, batch=2)
    tokens, targets, ids = *numbers(SMALL, 2, 2, 5), ids_of(rows)

    def scaled(loss):
        return lambda p, x, ints=(): loss(p._replace(embedding=p.embedding * x))

    packed = scaled(lambda p: decoder.loss(p, tokens, targets, SMALL, segment_ids=ids)[0])
    alone = scaled(lambda p: mean_of_documents(p, rows, tokens, targets, SMALL))
    with plain_operators():
        expected = ORACLE_TRANSFORMS[transform](alone, example)
    assert error(TRANSFORMS[transform](packed, example), expected) < 1e-9


@pytest.mark.parametrize("remat", ["full", "default", "save:attention"])
def test_remat_of_layers_with_segments_changes_no_bit(remat):
    ids, config = ids_of(PACKED), CONFIGS["MLA"]
    params, (tokens, targets) = a_model(config), numbers(config, 2, *ids.shape)
    expected = step(params, tokens, targets, config, segment_ids=ids)
    found = step(params, tokens, targets, config, segment_ids=ids, per_layer=per_layer(remat))
    assert all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(expected)))


def test_a_layer_is_compiled_once_for_any_number_of_segments():
    torch._dynamo.reset()
    config = dataclasses.replace(CONFIGS["MLA"], num_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = lambda layer: torch.compile(fmoe.remat(layer), fullgraph=True, backend=counter)  # noqa: E731
    params = a_model(config)
    for rows in (PACKED, [[1] * 19] * 4):
        ids = ids_of(rows)
        tokens, targets = numbers(config, 2, *ids.shape)
        how = dict(segment_ids=ids, per_layer=compiled)
        found = step(params, tokens, targets, config, **how)
        assert error(found, step(params, tokens, targets, config, segment_ids=ids)) < 1e-9
    assert counter.frame_count == 2  # a dense layer and one with experts


@pytest.mark.slow
def test_a_whole_model_compiles_with_segments():
    torch._dynamo.reset()
    config, ids = dataclasses.replace(CONFIGS["GQA"], num_layers=2), ids_of(PACKED)
    params, tokens = a_model(config), numbers(config, *ids.shape)
    logits = lambda t, i: decoder.forward(params, t, config, segment_ids=i)[0]  # noqa: E731
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    assert error(compiled(tokens, ids), logits(tokens, ids)) < 1e-9


# ---- what segments are -----------------------------------------------------------------------------


def test_segments_by_hand():
    ids = torch.tensor([[4, 4, 0, 0, 4], [2, 2, 2, 2, 2]])
    first, offsets, valid = segments_of(ids)
    assert first.tolist() == [[0, 0, 2, 2, 4], [0] * 5]
    assert offsets.tolist() == [0, 2, 4, 5, 10] and offsets.dtype == torch.int32
    assert valid.tolist() == [[True, True, False, False, True], [True] * 5]
    assert segments_of(ids[1:]) == () == segments_of(ids[:0]) == segments_of(ids[:, :0])
    assert vmap(lambda i: segments_of(i).first)(ids[:, None])[0].tolist() == [[0, 0, 2, 2, 4]]


LONG = torch.ones(2, 5, dtype=torch.int64)
ERRORS = {
    "segment_ids: got torch.int32 of shape (2, 5), expected torch.int64 of shape (B, L).": LONG.int(),
    "segment_ids: got torch.int64 of shape (5,), expected torch.int64 of shape (B, L).": LONG[0],
    "segment_ids: got segment_ids of shape (1, 5), expected (2, 5), as tokens. Give every": LONG[:1],
    "segment_ids: got 10 ids below zero, expected 0 for padding, else positive ids.": -LONG,
}


@pytest.mark.parametrize("text", ERRORS)
def test_bad_segment_ids_are_named(text):
    params, wrong = decoder.init(TINY, 0), ERRORS[text]
    for name, call in (
        ("forward", lambda: decoder.forward(params, LONG, TINY, segment_ids=wrong)),
        ("loss", lambda: decoder.loss(params, LONG, LONG, TINY, segment_ids=wrong)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: {text}")):
            call()


def test_segment_ids_are_not_taken_for_a_config():
    text = "loss: config: got Tensor, expected a DecoderConfig. Pass segment ids by name, as segment_ids=."
    with pytest.raises(ValueError, match=re.escape(text)):
        decoder.loss(decoder.init(TINY, 0), LONG, LONG, LONG, TINY)


def test_ids_below_zero_are_refused_where_the_host_cannot_look():
    params = decoder.init(TINY, 0)
    loss = lambda ids: decoder.loss(params, LONG, LONG, TINY, segment_ids=ids)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match="decoder: segment_ids: got an id below zero"):
        vmap(loss)(torch.stack([LONG, -LONG]))


# ---- meshes ----------------------------------------------------------------------------------------


def spread(where, name):
    """The model's loss, logits, statistics and gradients, of DTensors and of this device's own tokens."""
    mesh, found = where.mesh(), {}
    config = dataclasses.replace(MODELS[name], balance_loss=0.3)
    params = decoder.init(config, 7, dtype=where.dtype)
    there = decoder.init(config, 7, dtype=where.dtype, mesh=mesh)
    rows = [[4, 2, 3], [9], [-9], [5, -4]] * 2
    ids = ids_of(rows[: 2 * group_of(mesh, token_axes(mesh)).size])
    tokens, targets = numbers(config, 2, *ids.shape)
    (value, stats), grads = step(params, tokens, targets, config, segment_ids=ids)
    logits = decoder.forward(params, tokens, config, segment_ids=ids)[0]
    for kind, cut in (
        ("DTensors", lambda t: distribute(t, P(token_axes(mesh)), mesh)),
        ("plain", lambda t: own(t, mesh)),
    ):
        mine = [cut(t) for t in (tokens, targets, ids)]
        how = dict(segment_ids=mine[2], per_layer=per_layer("default"))
        (got, found_stats), got_grads = step(there, *mine[:2], config, mesh, **how)
        found[f"loss of {kind}"] = error(whole((got, found_stats.balance)), (value, stats.balance))
        counts = [[layer.tokens_per_expert for layer in s.layers] for s in (whole(found_stats), stats)]
        found[f"counts of {kind}"] = error(*counts)
        found[f"gradient of {kind}"] = error(whole(got_grads), grads)
    spec = P(token_axes(mesh))
    mine = [distribute(t, spec, mesh) for t in (tokens, ids)]
    there_logits = decoder.forward(there, mine[0], config, mesh, segment_ids=mine[1])[0]
    found["logits"] = error(whole(there_logits)[ids > 0], logits[ids > 0])
    assert isinstance(there_logits, DTensor)
    return found


@pytest.mark.parametrize("axes", quick(["ep=2,tp=2"], ["dp=2", "ep=2", "tp=2", "dp=2,ep=2", "ep=2,tp=2"]))
@pytest.mark.parametrize("name", quick(["MLA"], ["MLA", "GQA"]))
def test_segments_are_the_same_on_every_mesh(pool, axes, name):
    for found in pool.run(ranks_of(axes), spread, Where(axes), name):
        assert max(found.values()) < 1e-9, found


def sent(dtensors):
    """Bytes that the layer sends with padding and for its other tokens alone, and how far these differ."""
    mesh = Where("ep=2").mesh()
    params = fmoe.moe_init(3, dim=8, hidden_dim=4, num_experts=4, mesh=mesh, dtype=torch.float64)
    x, valid = torch.randn(20, 8, dtype=torch.float64), torch.rand(20) < 0.4
    rows, mask = (distribute(t, P("ep"), mesh) for t in (x, valid)) if dtensors else (x, valid)
    found = []
    for tokens, padding in ((rows, mask), (whole(rows)[valid], None)):
        with wire_bytes() as counted:
            y, stats = fmoe.moe_forward(params, tokens, mesh, valid=padding, return_stats=True)
        found.append((y, whole(stats), counted))
    if not dtensors:
        assert found[0][2] == found[1][2]
    assert torch.equal(found[0][1].tokens_per_expert, found[1][1].tokens_per_expert // (1 + dtensors))
    return error(whole(found[0][0])[valid], found[1][0])


@pytest.mark.parametrize("dtensors", [False, True])
def test_padding_is_sent_nowhere(pool, dtensors):
    assert max(pool.run(2, sent, dtensors)) < 1e-12


def below_zero(rank_with):
    mesh = Where("ep=2").mesh()
    params = decoder.init(MODELS["MLA"], 7, mesh=mesh)
    ids = torch.full((2, 5), -1 if torch.distributed.get_rank() == rank_with else 1)
    with pytest.raises(RuntimeError, match="decoder: segment_ids: got an id below zero, on this device or"):
        decoder.loss(params, LONG, LONG, MODELS["MLA"], mesh, segment_ids=ids)
    with pytest.raises(RuntimeError, match="decoder: segment_ids: got an id below zero, on this device or"):
        decoder.forward(params, LONG, MODELS["MLA"], mesh, segment_ids=ids)


def test_ids_below_zero_on_one_device_are_raised_on_all(pool):
    pool.run(2, below_zero, 1)
