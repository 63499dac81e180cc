"""``training_step``: the same as its parts, one after another, and nothing is left of the steps before."""

import optree
import pytest
import torch
from helpers import error

from fmoe.models import decoder
from fmoe.training import gradients, optim
from fmoe.training.step import training_step

CONFIG = decoder.preset("debug", layers=2)
MOST, RATE = 0.5, 0.01


def by_parts(step_of, optimizer, params, state, *batch):
    (loss, stats), grads = step_of(params, *batch)
    clipped, norm = optim.clip_by_global_norm(grads, MOST)
    params, state = optimizer.update(params, clipped, state, 1e-2)
    return decoder.update_biases(params, stats, RATE), state, loss, norm


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_step_is_its_parts_and_keeps_no_graph(requires_grad):
    step_of, optimizer = gradients.of_model(CONFIG), optim.adamw()
    step = training_step(step_of, optimizer, max_norm=MOST, bias_rate=RATE)
    mine, theirs = (decoder.init(CONFIG, 0, dtype=torch.float64) for _ in range(2))
    mine = optree.tree_map(lambda leaf: leaf.requires_grad_(requires_grad), mine)
    state, their_state = optimizer.init(mine), optimizer.init(theirs)
    for _ in range(3):
        batch = torch.randint(CONFIG.vocab_size, (2, 3, 9)).unbind()
        mine, state, loss, norm, *_ = step(mine, state, 1e-2, *batch)
        theirs, their_state, *expected = by_parts(step_of, optimizer, theirs, their_state, *batch)
        assert error((loss, norm), tuple(expected)) < 1e-6
        assert error(optree.tree_leaves(mine), optree.tree_leaves(theirs)) < 1e-6
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves((mine, state, loss)))
    assert mine.layers[1].mlp.router.bias_E.abs().min() > 0


def test_a_step_that_raises_leaves_its_arguments():
    params, optimizer = decoder.init(CONFIG, 0), optim.adamw()
    step = training_step(gradients.of_model(CONFIG), optimizer, max_norm=MOST, bias_rate=RATE)
    before, tokens = optree.tree_map(torch.clone, params), torch.randint(CONFIG.vocab_size, (3, 9))
    outside = tokens + CONFIG.vocab_size
    for targets, rate, text in (
        (outside, 1e-2, "outside the vocabulary"),
        (tokens, "fast", "learning_rate: got 'fast'"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=text):
            step(params, optimizer.init(params), rate, tokens, targets)
        assert all(map(torch.equal, optree.tree_leaves(params), optree.tree_leaves(before)))
