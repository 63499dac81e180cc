"""Collectives along named axes: values, adjoints, every transform, dtypes and dimensions."""

import re

import pytest
import torch
from devices import MESHES, Real, Simulated, sizes_of
from helpers import dot, error
from torch.func import grad, jvp, vjp, vmap

import fmoe
from fmoe.ops.core.primitive import operators
from fmoe.parallel import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pmean,
    ppermute,
    psum,
    psum_scatter,
    reduce_scatter,
)

COLLECTIVES = ["psum", "gather", "scatter", "exchange", "shift"]


def on_mesh(axes, local, *args):
    """``local(*args)`` inside ``shard_map``; each device keeps its own result."""
    found = []

    def body(*args):
        found.append(local(*args))
        return ()

    mesh = fmoe.make_mesh(axes, device_type="cpu")
    fmoe.shard_map(body, mesh, in_specs=fmoe.P(), out_specs=())(*args)
    return found[0]


def mine(stacked, sizes):
    """This device's part of a stacked value."""
    return stacked.flatten(0, len(sizes) - 1)[torch.distributed.get_rank()]


def transforms(call, x, t, batch):
    """Everything a collective must survive, as one tree; ``t`` is a tangent and a cotangent."""
    cube = lambda x: call(x.sin()).pow(3)  # noqa: E731
    pull = lambda x: vjp(cube, x)[1](cube(x))[0]  # noqa: E731
    return {
        "value": call(x),
        "vjp": pull(x),
        "vjp(vjp)": vjp(pull, x)[1](t)[0],
        "jvp": jvp(cube, (x,), (t,))[1],
        "jvp(jvp)": jvp(lambda x: jvp(cube, (x,), (t,))[1], (x,), (t,))[1],
        "jvp(vjp)": jvp(pull, (x,), (t,))[1],
        "vmap": vmap(call)(batch),
        "vmap(vjp)": vmap(pull)(batch),
        "vjp(vmap)": vjp(vmap(cube), batch)[1](vmap(cube)(batch))[0],
    }


def compare_with_simulated(axes):
    sizes, worst = sizes_of(axes), {}
    shape = *sizes.values(), 4, 3
    x, t = torch.randn(2, *shape, dtype=torch.float64)
    batch = torch.randn(2, *shape, dtype=torch.float64)
    for name in COLLECTIVES:
        for axis in sizes:
            simulated, real = (getattr(net(sizes), name) for net in (Simulated, Real))
            expected = transforms(lambda v: simulated(v, axis), x, t, batch)  # noqa: B023
            local = mine(x, sizes), mine(t, sizes), torch.stack([mine(b, sizes) for b in batch])
            got = on_mesh(axes, lambda *a: transforms(lambda v: real(v, axis), *a), *local)  # noqa: B023
            for key, value in expected.items():
                batched = "vmap" in key
                want = torch.stack([mine(v, sizes) for v in value]) if batched else mine(value, sizes)
                worst[name, axis, key] = error(got[key], want)
    return worst


@pytest.mark.parametrize("axes", ["dp=2,ep=2", "ep=4"])
def test_every_transform_equals_one_process_that_simulates_all_devices(pool, axes):
    for found in pool.run(MESHES[axes], compare_with_simulated, axes):
        assert max(found.values()) < 1e-12, {k: v for k, v in found.items() if v >= 1e-12}
        assert len(found) == len(COLLECTIVES) * len(sizes_of(axes)) * 9


def inner_products(axes, over):
    """``<A x, y>`` and ``<x, A^T y>`` summed over all devices, for every collective."""
    pairs = [(0, 1), (1, 3), (3, 2)]
    calls = {
        "psum": lambda x: psum(x, over),
        "pmean": lambda x: pmean(x, over),
        "all_gather": lambda x: all_gather(x, over, dim=-1),
        "reduce_scatter": lambda x: reduce_scatter(x, over, dim=1),
        "all_to_all": lambda x: all_to_all(x, over, split_dim=1, concat_dim=0),
        "ppermute": lambda x: ppermute(x, over, pairs if axis_size(over) == 4 else [(1, 0)]),
    }
    torch.manual_seed(torch.initial_seed() + torch.distributed.get_rank())
    x = torch.randn(3, 4, dtype=torch.float64)

    def local(x):
        found = {}
        for name, call in calls.items():
            out, pull = vjp(call, x)
            y = torch.randn_like(out)
            both = torch.stack([dot(out, y), dot(x, pull(y)[0])])
            found[name] = psum(both, ("dp", "ep")).tolist()
        return found

    return on_mesh(axes, local, x)


@pytest.mark.parametrize(("axes", "over"), [("dp=2,ep=2", ("dp", "ep")), ("dp=2,ep=2", "dp"), ("ep=4", "ep")])
def test_each_backward_is_the_adjoint(pool, axes, over):
    for found in pool.run(4, inner_products, axes, over):
        for name, (left, right) in found.items():
            assert abs(left - right) < 1e-12 * (1 + abs(left)), name
            assert abs(left) > 1e-6, name


def values_by_hand(dtype):
    rank = torch.distributed.get_rank()
    x = (torch.arange(8).view(2, 4) + 10 * rank).to(dtype)

    def local(x):
        return {
            "psum": psum(x, ("dp", "ep")),
            "pmean": pmean(x, "ep"),
            "all_gather": all_gather(x[:1, :1], ("dp", "ep"), dim=1),
            "reduce_scatter": psum_scatter(x, ("dp", "ep"), dim=1),
            "all_to_all": all_to_all(x, ("dp", "ep"), split_dim=1, concat_dim=0),
            "ppermute": ppermute(x, ("dp", "ep"), [(0, 3), (2, 0)]),
            "place": (axis_index("dp"), axis_index("ep"), axis_index(("dp", "ep")), axis_size(("dp", "ep"))),
            "one": (psum(x, "tp"), ppermute(x, "tp", []), all_gather(x, ("pp", "tp")), axis_size("tp")),
        }

    return on_mesh("dp=2,ep=2", local, x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_values_of_any_dtype_also_over_several_axes(pool, dtype):
    base = torch.arange(8).view(2, 4).to(dtype)
    came = [base + 20, None, None, base]
    for rank, found in enumerate(pool.run(4, values_by_hand, dtype)):
        total = 4 * base + 60
        assert torch.equal(found["psum"], total)
        assert torch.equal(found["pmean"], base + (5 if rank < 2 else 25))
        assert found["all_gather"].tolist() == [[0, 10, 20, 30]]
        assert torch.equal(found["reduce_scatter"], total[:, rank : rank + 1])
        assert torch.equal(found["all_to_all"].view(4, 2), base[:, rank] + 10 * torch.arange(4)[:, None])
        assert torch.equal(found["ppermute"], torch.zeros_like(base) if came[rank] is None else came[rank])
        assert found["place"] == (rank // 2, rank % 2, rank, 4)
        mine = base + 10 * rank
        assert torch.equal(found["one"][0], mine) and torch.equal(found["one"][2], mine)
        assert not found["one"][1].any() and found["one"][3] == 1
        assert all(v.dtype == dtype for k, v in found.items() if k not in ("place", "one", "pmean"))


def fake_kernels():
    x = torch.randn(4, 3)

    def group():
        return fmoe.ops.core.axes.resolve("test", "ep").name

    name = on_mesh("ep=2", group)
    cases = {
        "psum": (x.mT, name),
        "all_gather": (x.mT, 2, name),
        "reduce_scatter": (x, 2, name),
        "all_to_all": (x, 2, name),
        "ppermute": (x, 1, -1, 2, name),
    }
    for op, args in cases.items():
        if torch.distributed.get_rank() == 1 and op == "ppermute":
            args = (x, -1, 0, 2, name)
        torch.library.opcheck(operators()[op].raw, args, test_utils=("test_schema", "test_faketensor"))
    empty = torch.empty(0, 3)
    return [list(operators()[op].raw(empty, *args[1:]).shape) for op, args in cases.items()]


def test_fake_kernels_describe_the_real_ones_and_no_rows_are_fine(pool):
    assert pool.run(2, fake_kernels) == [[[0, 3]] * 5] * 2


def failing_calls():
    x, found = torch.randn(3, 4), []
    calls = [
        lambda: psum(x, "tokens"),
        lambda: psum(x, ("ep", "dp")),
        lambda: all_gather(x, "ep", dim=2),
        lambda: reduce_scatter(x, "ep"),
        lambda: all_to_all(x, "ep", split_dim=0, concat_dim=1),
        lambda: ppermute(x, "ep", [(0, 1), (0, 0)]),
        lambda: ppermute(x, "ep", [(0, 2)]),
    ]

    def local():
        for call in calls:
            with pytest.raises(ValueError, match=":") as caught:
                call()
            found.append(str(caught.value))

    on_mesh("ep=2", local)
    return found


def test_errors_say_which_axis_dimension_or_pair(pool):
    mesh = "(pp=1, dp=1, ep=2, tp=1)"
    pairs = "expected places from 0 to 1, each at most once a source and a destination"
    expected = [
        f"psum: axis: got 'tokens', expected axes of the mesh {mesh} that shard_map bound. Correct the name",
        "psum: axis: got ('ep', 'dp'), expected each axis once, in the mesh's order ('pp', 'dp'",
        "all_gather: dim: got 2, expected a dimension of x, whose shape is (3, 4). Correct it",
        "reduce_scatter: dim: got dimension 0 of x, whose shape is (3, 4), expected one that divides by 2",
        "all_to_all: split_dim: got dimension 0 of x, whose shape is (3, 4), expected one that divides by 2",
        f"ppermute: pairs: got [(0, 1), (0, 0)], {pairs}",
        f"ppermute: pairs: got [(0, 2)], {pairs}",
    ]
    for found in pool.run(2, failing_calls):
        for text, start in zip(found, expected, strict=True):
            assert text.startswith(start)


@pytest.mark.parametrize("call", [psum, pmean, all_gather, reduce_scatter, all_to_all])
def test_outside_shard_map_they_name_the_axis_and_the_remedy(call):
    name = call.__name__.replace("pmean", "psum")
    text = f"{name}: axis: got 'ep', expected a mesh axis that is bound; none is bound here. Call it inside"
    with pytest.raises(ValueError, match=re.escape(text) + " a function given to fmoe.shard_map"):
        call(torch.ones(2), "ep")


def test_a_derivative_taken_after_shard_map_returned_needs_no_binding():
    mesh = fmoe.make_mesh("dp=1", device_type="cpu")
    f = fmoe.shard_map(lambda x: psum(x.sin(), "dp"), mesh, in_specs=fmoe.P(), out_specs=fmoe.P())
    x = torch.randn(3, dtype=torch.float64)
    assert error(grad(lambda x: f(x).sum())(x), x.cos()) < 1e-14
