"""Params wherever they lie: moved to where they are used, or refused; never silently cut short."""

import dataclasses
import re

import optree
import pytest
import torch
from devices import bare_mesh
from helpers import CONFIGS, change, error, random_layer
from laws import MODEL, alone, loss_of, whole
from torch.distributed.device_mesh import init_device_mesh

import fmoe
from fmoe import P
from fmoe.models import deepseek_v3
from fmoe.parallel import distribute
from fmoe.parallel.placement import token_axes

ROUTER = CONFIGS["sigmoid, groups"]
ROUTER_OF_ALL = fmoe.RouterConfig(top_k=1, num_groups=1, top_groups=1)


def refused(text, call, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(*args, **kwargs)


def elsewhere(axes, specs):
    """Values and gradients of a layer whose params are placed by ``specs``."""
    mesh, params, found = bare_mesh(axes), random_layer(dim=8, hidden=4), {}
    x = torch.randn(8, 8, dtype=torch.float64)
    dx = distribute(x, P(token_axes(mesh)), mesh)
    layer = lambda p, x: fmoe.moe_forward(p, x, mesh, router=ROUTER)  # noqa: E731
    for name, spec in specs.items():
        spread = distribute(params, spec, mesh)
        found[f"value, {name}"] = error(whole(layer(spread, dx)), alone(ROUTER)(params, x))
        got = torch.func.grad(loss_of(layer, 1.0))(spread, dx)
        assert [g.placements for g in optree.tree_leaves(got)] == [
            p.placements for p in optree.tree_leaves(spread)
        ]
        found[f"gradient, {name}"] = error(
            whole(got), torch.func.grad(loss_of(alone(ROUTER), 1.0))(params, x)
        )
    return found


@pytest.mark.parametrize("axes", ["ep=2", "dp=2,ep=2", "ep=2,tp=2"])
def test_params_may_lie_anywhere_that_can_be_gathered_or_cut(pool, axes):
    last = [axis for axis in axes.replace("=2", "").split(",") if axis != "tp"]
    specs = {
        "whole": P(),
        "cut further": fmoe.MoEParams(
            P(),
            fmoe.ExpertParams(P("ep", None, None, *last[:-1]), P("ep", *last[:-1])),
            fmoe.ExpertParams(P(None, None, last[-1]), P(None, last[-1])),
        ),
        "the router too": fmoe.MoEParams(fmoe.RouterParams(P(last[0]), P(last[0])), P("ep"), P()),
    }
    for found in pool.run({"ep=2": 2}.get(axes, 4), elsewhere, axes, specs):
        assert len(found) == 6
        assert max(found.values()) < 1e-12, found


def misplaced():
    two = bare_mesh("tp=2")
    layer = distribute(random_layer(dim=8, hidden=5), P(), two)
    x = torch.randn(3, 8, dtype=torch.float64)
    refused("dimension 2 of size 5 doesn't divide by tp=2", fmoe.moe_forward, layer, x, two, router=ROUTER)

    tokens = torch.randint(MODEL.vocab_size, (2, 9))
    plain, odd = deepseek_v3.init(MODEL, 0), change(MODEL, num_heads=3)
    text = "embedding a plain tensor of (32, 16), not (16, 16); layers.0.attention.query.up a plain tensor"
    refused(text, deepseek_v3.loss, plain, tokens, tokens, MODEL, two)
    spread = deepseek_v3.init(MODEL, 0, mesh=two)
    other = dataclasses.replace(MODEL, dim=24)
    refused(
        "embedding a DTensor of (32, 16), not (32, 24)", deepseek_v3.loss, spread, tokens, tokens, other, two
    )
    refused(
        "targets of shape (1, 9), expected (2, 9), as tokens",
        deepseek_v3.loss,
        spread,
        tokens,
        tokens[:1],
        MODEL,
    )
    refused(
        "got tp=2 for 3 heads of keys",
        deepseek_v3.loss,
        deepseek_v3.init(odd, 0, mesh=two),
        tokens,
        tokens,
        odd,
        two,
    )
    ep = bare_mesh("ep=2")
    spread = deepseek_v3.init(MODEL, 0, mesh=ep)
    pair = distribute(tokens, P("ep"), ep), distribute(tokens, P(), ep)
    refused(
        "targets placed by P(None, None), expected P('ep', None), as tokens",
        deepseek_v3.loss,
        spread,
        *pair,
        MODEL,
        ep,
    )
    refused(
        "a mesh of 1 dimensions, named ()", fmoe.dispatch, x,
        fmoe.route(random_layer(dim=8).router, x, ROUTER), axis=init_device_mesh("cpu", (2,)),
    )  # fmt: skip
    layer, wide = random_layer(dim=8, hidden=4), torch.randn(4, 8, dtype=torch.float64)
    refused("backend: got 'local' with ep=2, expected", fmoe.moe_forward, layer, wide, ep, backend="local")
    odd = random_layer(dim=8, experts=3)._replace(shared=())
    refused(
        "dispatch: routing.counts_E: got 3 experts for 2 devices, expected a multiple of the devices along",
        fmoe.moe_forward, odd, wide, ep, router=ROUTER_OF_ALL,
    )  # fmt: skip
    across = distribute(layer, fmoe.MoEParams(P(), P(None, "ep"), P()), ep)
    refused(
        "params.experts.w_in: got a DTensor placed by P(None, 'ep', None, None), expected P(('ep',), ",
        fmoe.moe_forward, across, wide, ep, router=ROUTER,
    )  # fmt: skip
    cut = distribute(wide, P(None, "ep"), ep)
    refused("expected whole tokens, cut along dp and ep", fmoe.moe_forward, layer, cut, ep, router=ROUTER)
    router = distribute(fmoe.RouterParams(torch.ones(4, 2), torch.zeros(4)), P("ep"), ep)
    refused("update_expert_bias: params.bias_E", fmoe.update_expert_bias, router, torch.arange(4), 0.1)
    return True


def test_what_cannot_be_right_is_refused(pool):
    assert pool.run(2, misplaced) == [True] * 2


def values_of_their_own():
    mesh, found = bare_mesh("ep=2"), {}
    params = random_layer(dim=8, hidden=4)
    for leaf, spread in zip(*map(optree.tree_leaves, (params, fmoe.shard_params(params, mesh)))):
        piece = spread.to_local()
        assert piece.untyped_storage().nbytes() == piece.nbytes
        assert piece.data_ptr() != leaf.data_ptr()

    spread = deepseek_v3.init(MODEL, 0, mesh=mesh)
    tokens = torch.randint(MODEL.vocab_size, (2, 9))
    pair = [distribute(tokens, P("ep"), mesh)] * 2
    _, of_dtensors = deepseek_v3.loss(spread, *pair, MODEL, mesh)
    _, of_plain = deepseek_v3.loss(spread, *(t.to_local() for t in pair), MODEL, mesh)
    moved = [deepseek_v3.update_biases(spread, stats, 0.1) for stats in (of_dtensors, of_plain)]
    found["biases"] = error(*map(whole, moved))
    nothing = torch.full_like(tokens, -100)
    value, grads = fmoe.value_and_grad(lambda p: deepseek_v3.loss(p, tokens, nothing, MODEL, mesh)[0])(spread)
    found["nothing counted"] = abs(value.item()) + max(
        g.to_local().abs().max().item() for g in optree.tree_leaves(grads)
    )
    return found


def test_pieces_are_copies_and_statistics_of_either_kind_move_biases(pool):
    for found in pool.run(2, values_of_their_own):
        assert found == {"biases": 0, "nothing counted": 0}
