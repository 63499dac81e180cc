"""Gradients are summed over devices in float32, however low the precision they were computed in."""

import pytest
import torch
from devices import bare_mesh
from helpers import fresh_seed, quick
from laws import ranks_of

import fmoe
from fmoe import P
from fmoe.models import decoder
from fmoe.ops.core.axes import group_of
from fmoe.parallel import distribute, gather_params, psum
from fmoe.parallel.placement import moves, placed, token_axes, use
from fmoe.training.gradients import computing_in, of_model


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


def kept(place, summed, scales):
    """The gradient of a float32 parameter that is computed with in bfloat16."""
    mesh = bare_mesh(f"dp={len(scales)}")
    scale = torch.tensor(scales[mesh.get_local_rank("dp")], dtype=torch.bfloat16)
    w = distribute(torch.ones(len(scales)), place, mesh)
    how = moves("test", "w", w, place, P(), mesh)

    def loss(w):
        whole = use(placed(w, how, [torch.bfloat16], summed))
        return (scale * whole).sum().float()[None]

    total = fmoe.shard_map(loss, mesh, in_specs=place, out_specs=P("dp"))
    grad = torch.func.grad(lambda w: total(w).sum())(w).full_tensor()
    assert grad.dtype == torch.float32
    return grad.tolist()


@pytest.mark.parametrize("place", [P(), P("dp")], ids=repr)
def test_gradients_of_float32_parameters_arrive_unrounded(pool, place):
    assert pool.run(4, kept, place, None, [256.0, 1.0, 1.0, 1.0]) == [[259.0] * 4] * 4


def test_gradients_are_summed_in_another_dtype_on_request(pool):
    for found in pool.run(4, kept, P("dp"), torch.bfloat16, [256.0, 1.0, 1.0, 1.0]):
        assert 259.0 not in found


def twice_gathered(scales, summed):
    mesh = bare_mesh("dp=2,ep=2")
    rank = mesh.get_local_rank("dp") * 2 + mesh.get_local_rank("ep")
    w = distribute(torch.ones(2, 2), P("dp", "ep"), mesh)
    how = moves("test", "w", w, P("dp", "ep"), P(), mesh)

    def loss(w):
        return (scales[rank] * use(placed(w, how, [torch.bfloat16], summed)).sum()).float()[None]

    total = fmoe.shard_map(loss, mesh, in_specs=P("dp", "ep"), out_specs=P(("dp", "ep")))
    return torch.func.grad(lambda w: total(w).sum())(w).full_tensor().flatten().tolist()


def test_a_parameter_cut_twice_gets_an_unrounded_gradient(pool):
    assert pool.run(4, twice_gathered, [256.0, 1.0, 1.0, 1.0], None) == [[259.0] * 4] * 4


def data_beside_parameters():
    """Only what was asked for is differentiated: data, frozen leaves and statistics are not."""
    mesh, seen = bare_mesh("dp=2"), []

    def loss(w, frozen, x):
        seen.append([t.requires_grad for t in (w, frozen, x)])
        return psum((w * frozen * x).sum(), "dp"), w.detach().sum()

    fn = fmoe.shard_map(loss, mesh, in_specs=(P(), P(), P("dp")), out_specs=P())
    w = torch.ones(3, requires_grad=True)
    value, statistic = fn(w, torch.ones(3), torch.ones(3))
    return seen[0], value.requires_grad, statistic.requires_grad


def test_what_needs_no_gradient_gets_none(pool):
    assert pool.run(2, data_beside_parameters) == [([True, False, False], True, False)] * 2


def of_router(grads):
    return grads.layers[1].mlp.router.weight_ED


def model_error(axes, seed):
    """The relative error of the router's gradient in bfloat16, beside the exact sum of the devices' own."""
    mesh, config = bare_mesh(axes), decoder.preset("debug", layers=2)
    group = group_of(mesh, token_axes(mesh))
    torch.manual_seed(seed)
    tokens = torch.randint(256, (2 * group.size, 16))
    loss = lambda p, *b, **how: decoder.loss(p, *b, config, dtype=torch.bfloat16, **how)[0]  # noqa: E731
    alone, spread = decoder.init(config, seed), decoder.init(config, seed, mesh=mesh)
    mine = tokens.chunk(group.size)[group.position]
    each = [of_router(torch.func.grad(loss)(alone, part, part)) for part in tokens.chunk(group.size)]
    exact = torch.stack(each).double().mean(0)
    found = [of_router(torch.func.grad(loss)(spread, mine, mine, mesh=mesh))]
    for zero in (1, 2, 3):
        found.append(
            of_router(of_model(config, mesh, zero=zero, dtype=torch.bfloat16)(spread, mine, mine)[1])
        )
    outside = computing_in(lambda p, *b, **how: decoder.loss(p, *b, config, **how)[0], torch.bfloat16)
    found.append(of_router(torch.func.grad(outside)(spread, mine, mine, mesh=mesh)))
    return [((got.full_tensor() - exact).norm() / exact.norm()).item() for got in found]


@pytest.mark.parametrize("axes", quick(["dp=4"], ["dp=2", "dp=4"]))
def test_the_error_of_a_models_gradient_does_not_grow_with_devices(pool, axes):
    for *found, outside in pool.run(ranks_of(axes), model_error, axes, fresh_seed()):
        assert max(found) < 1e-6, found
        assert outside < 2**-9  # one rounding
