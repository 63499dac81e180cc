"""shard_map: exact gradients of any order for any program, specs, captures, compile, remat."""


import pytest
import torch
from devices import MESHES, Example
from helpers import error
from torch.distributed.tensor import DTensor
from torch.func import grad, jvp, vjp, vmap

import fmoe
from fmoe.parallel import distribute


def whole(value):
    """A DTensor's global value; a plain tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---- the property: any program, any specs, any order of derivative --------------------------------


def second_by_autograd(loss, args, directions):
    """First and second gradients by plain autograd with ``create_graph``."""
    leaves = [a.detach().requires_grad_() for a in args]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
    products = [(g * d).sum() for g, d in zip(first, directions) if g.requires_grad]
    second = [torch.zeros_like(a) for a in args]
    for product in products:  # one by one: a plain and a DTensor scalar have no sum
        for total, g in zip(
            second, torch.autograd.grad(product, leaves, retain_graph=True, allow_unused=True)
        ):
            if g is not None:
                total += g
    return first, second


def check_example(example):
    """Every way to differentiate an example, against the same program on one process."""
    w_spec, x_spec, y_spec = example.specs
    w, x, mapped = example.w, example.x, example.mapped
    c = torch.randn_like(example.reference(w, x))
    u, z = torch.randn_like(w), torch.randn_like(x)

    def scalar(fn, c):
        return lambda w, x: (fn(w, x).sin() * c).sum()

    reference = grad(scalar(example.reference, c), (0, 1))
    first, second = reference(w, x), jvp(reference, (w, x), (u, z))[1]
    third = jvp(lambda w, x: jvp(reference, (w, x), (u, z))[1], (w, x), (u, z))[1]

    specs = w_spec, x_spec
    local = [[example.piece(v, s) for v, s in zip(pair, specs)] for pair in ((w, x), (u, z))]
    spread = [[distribute(v, s, example.mesh) for v, s in zip(pair, specs)] for pair in ((w, x), (u, z))]
    mixed = [[a[0], b[1]] for a, b in zip(spread, local)]
    kinds = {"plain": (local, True), "dtensor": (spread, False), "mixed": (mixed, False)}
    found = {}

    def record(name, kind, got, expected):
        pairs = zip(got, expected, specs)
        worst = (error(whole(g), e if isinstance(g, DTensor) else example.piece(e, s)) for g, e, s in pairs)
        found[f"{name}, {kind}"] = max(worst)

    for kind, ((args, directions), plain) in kinds.items():
        loss = scalar(mapped, example.piece(c, y_spec) if plain else distribute(c, y_spec, example.mesh))
        g = grad(loss, (0, 1))
        record("grad", kind, g(*args), first)
        record("vjp(grad)", kind, vjp(g, *args)[1](tuple(directions)), second)
        for order, got in enumerate(second_by_autograd(loss, args, directions)):
            record(f"autograd, {order}", kind, got, (first, second)[order])
        y = whole(mapped(*args))
        expected = example.reference(w, x)
        found[f"value, {kind}"] = error(y, example.piece(expected, y_spec) if plain else expected)
        assert isinstance(mapped(*args), DTensor) != plain
        assert [isinstance(v, DTensor) for v in g(*args)] == [isinstance(a, DTensor) for a in args]

    args, directions = local
    g = grad(scalar(mapped, example.piece(c, y_spec)), (0, 1))
    along = lambda w, x: jvp(g, (w, x), tuple(directions))[1]  # noqa: E731
    record("jvp(grad)", "plain", along(*args), second)
    record("jvp(jvp(grad))", "plain", jvp(along, tuple(args), tuple(directions))[1], third)
    stacked = [torch.stack([a, d]) for a, d in zip(args, directions)]
    for i, (got, pair) in enumerate(zip(zip(*vmap(g)(*stacked)), (reference(w, x), reference(u, z)))):
        record(f"vmap(grad), {i}", "plain", got, pair)
    return found


def check_programs(axes, count):
    mesh = fmoe.make_mesh(axes, device_type="cpu")
    results = []
    for _ in range(count):
        example = Example(mesh)
        found = check_example(example)
        results.append((repr(example), {k: v for k, v in found.items() if not v < 1e-9}, len(found)))
    return results


@pytest.mark.parametrize("axes", MESHES)
def test_gradients_of_random_programs_equal_those_of_one_process(pool, axes):
    for results in pool.run(MESHES[axes], check_programs, axes, 8):
        for example, wrong, count in results:
            assert not wrong, example
            assert count == 3 * 5 + 4
