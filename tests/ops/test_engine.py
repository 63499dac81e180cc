"""Backwards in the caller's thread, and what operators know of the run that they are part of."""

import optree
import pytest
import torch
from helpers import error, random_layer

import fmoe
from fmoe.introspect import raw_calls
from fmoe.ops.core import engine


@pytest.fixture
def layer():
    """Params as leaves, tokens, and a cotangent."""
    leaves, structure = optree.tree_flatten(random_layer())
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    x, g = (torch.randn(10, 6, dtype=torch.float64) for _ in range(2))
    return leaves, structure, x.requires_grad_(), g


def forward(leaves, structure, x):
    return fmoe.moe_forward(structure.unflatten(leaves), x)


def test_the_engine_is_not_asked_about_leaves_whose_gradients_are_wanted(monkeypatch, layer):
    leaves, structure, x, g = layer
    wanted = [x, *leaves]
    want = torch.autograd.grad(forward(leaves, structure, x), wanted, g, allow_unused=True)
    ask, asked = torch._C._will_engine_execute_node, []
    monkeypatch.setattr(
        torch._C, "_will_engine_execute_node", lambda node: asked.append(type(node).__name__) or ask(node)
    )
    found = engine.grad(forward(leaves, structure, x), wanted, g, allow_unused=True)
    assert asked and "AccumulateGrad" not in asked
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_nothing_but_what_is_wanted_is_computed(layer):
    leaves, structure, x, g = layer
    y = forward(leaves, structure, x)
    with raw_calls() as counted:
        (found,) = engine.grad(y, [x], g)
    for half in ("experts_up_backward", "experts_down_backward"):
        assert [counted.get(half + part, 0) for part in ("", "_inputs", "_weight")] == [0, 1, 0]
    assert error(found, *torch.autograd.grad(forward(leaves, structure, x), x, g)) < 1e-13


def test_a_run_inside_another_finds_its_own_gradients(layer):
    """As one of a function that differentiates in its backward, with the same leaves."""
    leaves, structure, x, g = layer

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *leaves):
            ctx.save_for_backward(x, *leaves)
            return forward(leaves, structure, x)

        @staticmethod
        def backward(ctx, g):
            x, *leaves = ctx.saved_tensors
            with torch.enable_grad():
                inner = [x.detach().requires_grad_(), *leaves]
                y = forward(inner[1:], structure, inner[0])
            return torch.autograd.grad(y, inner, g, allow_unused=True)

    wanted = [x, *leaves]
    found = engine.grad(Again.apply(x, *leaves), wanted, g, allow_unused=True)
    want = torch.autograd.grad(forward(leaves, structure, x), wanted, g, allow_unused=True)
    for mine, theirs in zip(found, want, strict=True):
        assert error(mine, theirs) < 1e-13 if theirs is not None else mine is None or not mine.any()
