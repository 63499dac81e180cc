"""Gradients in low precision are summed over devices in float32 and rounded once, however many there are."""

import pytest
import torch
from devices import bare_mesh
from helpers import fresh_seed, quick
from laws import ranks_of

import fmoe
from fmoe import P
from fmoe.models import decoder
from fmoe.ops.core.axes import group_of
from fmoe.parallel import distribute, gather_params
from fmoe.parallel.placement import token_axes
from fmoe.training.gradients import computing_in


def gradient(place, scales):
    """That of a sum over devices of ``scale * w``, where w is whole on each, or cut and gathered."""
    mesh = bare_mesh(f"dp={len(scales)}")
    scale = torch.tensor(scales[mesh.get_local_rank("dp")], dtype=torch.bfloat16)
    w = distribute(torch.ones(len(scales), dtype=torch.bfloat16), place, mesh)

    def loss(w):
        whole = gather_params(w, "dp") if len(place) else w
        return (scale * whole).sum()[None]

    total = fmoe.shard_map(loss, mesh, in_specs=place, out_specs=P("dp"))
    return torch.func.grad(lambda w: total(w).sum())(w).full_tensor().tolist()


@pytest.mark.parametrize("place", [P(), P("dp")], ids=repr)
def test_small_cotangents_beside_a_large_one_count(pool, place):
    found = pool.run(4, gradient, place, [256.0, 1.0, 1.0, 1.0])
    assert found == [[float(torch.tensor(259.0).bfloat16())] * 4] * 4  # one after the other they vanish


def of_router(grads):
    return grads.layers[1].mlp.router.weight_ED


def model_error(axes, seed):
    """The relative error of the router's gradient in bfloat16, beside the exact sum of the devices' own."""
    mesh, config = bare_mesh(axes), decoder.preset("debug", layers=2)
    group = group_of(mesh, token_axes(mesh))
    torch.manual_seed(seed)
    tokens = torch.randint(256, (2 * group.size, 16))
    loss = computing_in(lambda p, *b, **how: decoder.loss(p, *b, config, **how)[0], torch.bfloat16)
    alone, spread = decoder.init(config, seed), decoder.init(config, seed, mesh=mesh)
    mine = tokens.chunk(group.size)[group.position]
    got = of_router(torch.func.grad(loss)(spread, mine, mine, mesh=mesh)).full_tensor()
    each = [of_router(torch.func.grad(loss)(alone, part, part)) for part in tokens.chunk(group.size)]
    exact = torch.stack(each).double().mean(0)
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("axes", quick(["dp=4"], ["dp=2", "dp=4"]))
def test_the_error_of_a_models_gradient_is_one_rounding(pool, axes):
    for found in pool.run(ranks_of(axes), model_error, axes, fresh_seed()):
        assert found < 2**-9
