"""shard_map: exact gradients of any order for any program, specs, captures, compile, remat."""

import re
from typing import NamedTuple

import pytest
import torch
from devices import MESHES, Example, bare_mesh
from helpers import error, quick
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.func import grad, jvp, vjp, vmap

import fmoe
from fmoe import P
from fmoe.errors import TransformError
from fmoe.introspect import raw_calls
from fmoe.parallel import all_gather, axis_index, distribute, pmean, psum, reduce_scatter, spec_of


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
    kinds = {
        "plain": (mapped, local, True),
        "dtensor": (mapped, spread, False),
        "mixed": (mapped, mixed, False),
        "mixed to local": (example.mapped_to_local, mixed, True),
    }
    found = {}

    def record(name, kind, got, expected):
        pairs = zip(got, expected, specs)
        worst = (error(whole(g), e if isinstance(g, DTensor) else example.piece(e, s)) for g, e, s in pairs)
        found[f"{name}, {kind}"] = max(worst)

    for kind, (f, (args, directions), plain) in kinds.items():
        loss = scalar(f, example.piece(c, y_spec) if plain else distribute(c, y_spec, example.mesh))
        g = grad(loss, (0, 1))
        record("grad", kind, g(*args), first)
        record("vjp(grad)", kind, vjp(g, *args)[1](tuple(directions)), second)
        for order, got in enumerate(second_by_autograd(loss, args, directions)):
            record(f"autograd, {order}", kind, got, (first, second)[order])
        y = f(*args)
        expected = example.reference(w, x)
        found[f"value, {kind}"] = error(whole(y), example.piece(expected, y_spec) if plain else expected)
        assert isinstance(y, DTensor) != plain
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
    mesh = bare_mesh(axes)
    results = []
    for _ in range(count):
        example = Example(mesh)
        found = check_example(example)
        results.append((repr(example), {k: v for k, v in found.items() if not v < 1e-9}, len(found)))
    return results


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], MESHES))
def test_gradients_of_random_programs_equal_those_of_one_process(pool, axes, slow):
    for results in pool.run(MESHES[axes], check_programs, axes, 6 if slow else 2):
        for example, wrong, count in results:
            assert not wrong, example
            assert count == 4 * 5 + 4


# ---- what goes in and comes out --------------------------------------------------------------------


class Params(NamedTuple):
    w: torch.Tensor
    rest: tuple


def trees():
    """A pytree with statics by closure, specs as prefixes, integer leaves, empty subtrees, uneven rows."""
    mesh, rank = bare_mesh("dp=2,ep=2"), torch.distributed.get_rank()
    params = Params(torch.randn(4, 3, dtype=torch.float64), (torch.arange(4), ()))
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 0, 1, 2)]
    power = 2

    def body(params, x):
        assert type(params.w) is torch.Tensor and params.w.shape == (2, 3) and params.rest[1] == ()
        w = all_gather(params.w, "ep")
        out = {"y": (x @ w) ** power, "ids": params.rest[0] + axis_index("dp")}
        return out, pmean(w.sum(), "dp")

    f = fmoe.shard_map(
        body,
        mesh,
        in_specs=(Params(P("ep"), P()), P(("dp", "ep"))),
        out_specs=({"y": P(("dp", "ep")), "ids": P("dp")}, P()),
    )
    spread = Params(distribute(params.w, P("ep"), mesh), params.rest)
    plain = Params(params.w.chunk(2)[rank % 2], params.rest)
    (out, total) = f(plain, rows[rank])
    assert torch.equal(out["y"], (rows[rank] @ params.w) ** 2)
    assert torch.equal(out["ids"], torch.arange(4) + rank // 2)
    assert not out["ids"].requires_grad and error(total, params.w.sum()) < 1e-14
    even = distribute(torch.cat(rows + rows[:1] * 2)[:8], P(("dp", "ep")), mesh)
    out, total = f(spread, even)
    assert out["y"].placements == (Shard(0), Shard(0)) and total.placements == (Replicate(), Replicate())
    assert out["ids"].shape == (8,)

    def loss(w, x):
        return f(Params(w, params.rest), x)[0]["y"].sum()

    expected = grad(lambda w: ((torch.cat(rows) @ w) ** 2).sum())(params.w)
    assert error(grad(loss)(plain.w, rows[rank]), expected.chunk(2)[rank % 2]) < 1e-12
    got = torch.func.grad(lambda p: f(p, even)[1])(Params(spread.w, (params.rest[0].double(), ())))
    assert got.w.placements == spread.w.placements and error(whole(got.w), torch.ones(4, 3)) < 1e-12
    assert error(whole(got.rest[0]), torch.zeros(4)) == 0


def test_trees_integers_and_uneven_rows(pool):
    pool.run(4, trees)


def cotangents_anywhere():
    """A DTensor cotangent may have any placement, partial sums included."""
    mesh = fmoe.make_mesh("ep=2", device_type="cpu")
    x = torch.randn(4, 2, dtype=torch.float64)
    f = fmoe.shard_map(lambda x: x.sin(), mesh, in_specs=P("ep"), out_specs=P("ep"))
    spread = distribute(x, P("ep"), mesh)
    for placement in ([Shard(1)], [Replicate()], [Partial()]):
        where = [Replicate(), Replicate(), *placement, Replicate()]
        local = torch.randn_like(x[:, :1] if placement == [Shard(1)] else x)
        if placement == [Replicate()]:
            torch.distributed.broadcast(local, 0)
        c = DTensor.from_local(local, mesh, where)
        expected = x.cos() * whole(c)
        assert error(whole(vjp(f, spread)[1](c)[0]), expected) < 1e-14
        leaf = spread.detach().requires_grad_()
        f(leaf).backward(c)
        assert leaf.grad.placements == spread.placements and error(whole(leaf.grad), expected) < 1e-14


def test_cotangents_of_any_placement(pool):
    pool.run(2, cotangents_anywhere)


# ---- errors ----------------------------------------------------------------------------------------


def one_device():
    return fmoe.make_mesh(device_type="cpu")


def identity(*args):
    return args


def test_every_spec_the_mesh_refuses_is_listed():
    specs = (
        P(None, "q"),
        {"a": P("ep", ("dp", "ep")), "b": P(("ep", "dp")), "c": "ep", "d": P(1), "e": P("tp")},
    )
    text = """shard_map: in_specs: got 5 that don't fit, expected specs that fit the mesh \
(pp=1, dp=1, ep=1, tp=1) and the tensors. Correct these:
  in_specs.0: P(None, 'q'): 'q' isn't an axis of the mesh
  in_specs.1.a: P('ep', ('dp', 'ep')): 'ep' is used twice
  in_specs.1.b: P(('ep', 'dp')): the axes of dimension 0 aren't in the mesh's order
  in_specs.1.c: 'ep': not a P of names, tuples of names and None
  in_specs.1.d: P(1): not a P of names, tuples of names and None"""
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        fmoe.shard_map(identity, one_device(), in_specs=specs, out_specs=P())


@pytest.mark.parametrize(
    ("in_specs", "out_specs", "args", "text"),
    [
        ((P(), P()), P(), (1.0,), "shard_map: args.0: got float, expected a tensor"),
        ((P(), P()), P(), (torch.ones(2),), "shard_map: in_specs: got a tree that is no prefix of what it"),
        (
            (P(), P()),
            P(),
            (torch.ones(2),),
            "expected: 2, got: 1; tuple: (torch.Size([2]),), expected a tree",
        ),
        (P(None, None), P(), (torch.ones(2),), "args.0: P(None, None) for shape (2,): 2 entries for 1 dim"),
        (P(), (P("ep"),), (torch.ones(()),), "fn(...).0: P('ep') for shape (): 1 entries for 0 dimensions"),
        (P(), {"a": P()}, (torch.ones(2),), "shard_map: out_specs: got a tree that is no prefix"),
    ],
)
def test_what_doesnt_fit_is_named(in_specs, out_specs, args, text):
    call = fmoe.shard_map(identity, one_device(), in_specs=in_specs, out_specs=out_specs)
    with pytest.raises(ValueError, match=re.escape(text)):
        call(*args)


def test_other_misuses():
    one_device()
    bare = torch.distributed.device_mesh.DeviceMesh("cpu", [0])
    with pytest.raises(ValueError, match="shard_map: mesh: got a mesh whose axes have no names"):
        fmoe.shard_map(identity, bare, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="shard_map: mesh: got 'ep=1', expected a mesh"):
        fmoe.shard_map(identity, "ep=1", in_specs=P(), out_specs=P())
    call = fmoe.shard_map(lambda x: (x, 3), one_device(), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=re.escape("shard_map: fn(...): got NoneType, expected a tensor")):
        fmoe.shard_map(lambda x: None, one_device(), in_specs=P(), out_specs=P())(torch.ones(2))
    with pytest.raises(ValueError, match=re.escape("shard_map: fn(...).1: got int, expected a tensor")):
        call(torch.ones(2))
    text = "shard_map: backends: got 'experts', expected an axis of the mesh (pp=1, dp=1, ep=1, tp=1)."
    with pytest.raises(ValueError, match=re.escape(text)):
        fmoe.shard_map(identity, one_device(), in_specs=P(), out_specs=P(), backends={"experts": None})
    spread = distribute(torch.ones(2), P(), one_device())
    call = fmoe.shard_map(lambda x: spread, one_device(), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=re.escape("a DTensor; fn returns plain tensors")):
        call(torch.ones(2))


def failing_dtensors():
    mesh, other = (fmoe.make_mesh(axes, device_type="cpu") for axes in ("dp=2,ep=2", "ep=4"))
    w, x = torch.randn(4, 3), torch.randn(6, 4)
    tree = {
        "sharded": distribute(w, P("ep"), mesh),
        "other": distribute(w, P(), other),
        "odd": distribute(x, P(), mesh),
        "plain": x[:1],
    }
    call = fmoe.shard_map(identity, mesh, in_specs=P(("dp", "ep")), out_specs=P(("dp", "ep")))
    texts = []
    with pytest.raises(ValueError, match="don't fit") as caught:
        call(tree)
    texts.append(str(caught.value))
    with pytest.raises(ValueError, match="don't fit") as caught:
        distribute({"x": x, "w": w}, P(("dp", "ep"), None, None), mesh)
    texts.append(str(caught.value))
    with pytest.raises(ValueError, match="spec_of") as caught:
        spec_of(DTensor.from_local(w, mesh, [Replicate(), Partial()] + [Replicate()] * 2))
    texts.append(str(caught.value))
    f = fmoe.shard_map(torch.sin, mesh, in_specs=P("ep"), out_specs=P("ep"))
    with pytest.raises(TransformError) as caught:
        vmap(f)(distribute(torch.randn(3, 4), P(None, "ep"), mesh))
    texts.append(str(caught.value))
    both = fmoe.shard_map(lambda w, x: x @ w, mesh, in_specs=(P(), P("ep")), out_specs=P("ep"))
    whole_w = distribute(w, P(), mesh)
    with pytest.raises(TransformError) as caught:
        jvp(lambda x: both(whole_w, x), (x,), (x,))
    texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("dim", [0, 1])
def test_a_batch_may_lie_along_any_dimension(dim):
    def plain(x):
        return x.cumsum(0)

    def squares(f):
        return lambda x: (vmap(f, in_dims=dim)(x) ** 2).sum()

    x = torch.randn(3, 4, dtype=torch.float64)
    mapped = fmoe.shard_map(plain, one_device(), in_specs=P(), out_specs=P())
    assert torch.equal(vmap(mapped, in_dims=dim)(x), vmap(plain, in_dims=dim)(x))
    assert error(grad(squares(mapped))(x), grad(squares(plain))(x)) < 1e-12


def test_dtensors_that_dont_fit_are_all_listed_with_both_placements(pool):
    where = "shape (6, 4): dimension 0 of size 6 doesn't divide by dp*ep=4"
    lists = [
        [
            "got 4 that don't fit",
            "(pp=1, dp=2, ep=2, tp=1)",
            f"args.0.odd: P(('dp', 'ep')) for {where}",
            "args.0.sharded: P(('dp', 'ep')) for shape (4, 3): the spec means (Replicate(), Shard(dim=0), ",
            "the DTensor has (Replicate(), Replicate(), Shard(dim=0), Replicate())",
            "args.0.other: ",
            "the DTensor lies on another mesh, (pp=1, dp=1, ep=4, tp=1)",
        ],
        ["distribute: tree: got 3 that", f"tree.x: P(('dp', 'ep'), None, None) for {where}", "tree.w: "],
        ["spec_of: tensor: got placement Partial(sum) along 'dp', expected Shard or Replicate"],
        ["shard_map: cannot run under torch.func.vmap over DTensors, which PyTorch lacks. Pass each device"],
        ["shard_map: cannot run under torch.func.jvp over DTensors, which PyTorch lacks. Pass each device"],
    ]
    for texts in pool.run(4, failing_dtensors):
        for text, parts in zip(texts, lists, strict=True):
            assert all(part in text for part in parts), (text, parts)


def replicated_claims():
    mesh, rank = fmoe.make_mesh("dp=2,ep=2", device_type="cpu"), torch.distributed.get_rank()

    def body(x):  # differs along ep, for dp = 1 only
        return {"same": psum(x, "ep"), "differs": x + axis_index("ep") * axis_index("dp"), "ids": x.long()}

    def call(**how):
        specs = {"in_specs": P("dp"), "out_specs": P("dp")}
        return fmoe.shard_map(body, mesh, **specs, **how)(torch.full((2,), rank // 2 + 1.0))

    call()
    with pytest.raises(ValueError, match="other values along") as caught:
        call(check_replicated=True)
    good = fmoe.shard_map(
        lambda x: psum(x.sin(), ("dp", "ep")), mesh, in_specs=P("dp"), out_specs=P(), check_replicated=True
    )
    assert error(grad(lambda x: good(x).sum())(torch.ones(3)), 4 / 2 * torch.ones(3).cos()) < 1e-6
    return str(caught.value)


def test_check_replicated_finds_results_that_differ_on_every_device(pool):
    for text in pool.run(4, replicated_claims):
        assert "got 1 that don't fit" in text
        assert "fn(...).differs: P('dp') for shape (2,): devices have other values along ('ep',)" in text


# ---- captured tensors ------------------------------------------------------------------------------


CAPTURED = "shard_map: fn: got a function that uses a differentiable tensor from outside"


@pytest.mark.parametrize(
    "body",
    [
        lambda w: lambda x: x * w,
        lambda w: lambda x: x * (2 * w),
        lambda w: lambda x: (x, w),
        lambda w: lambda x: w,
    ],
)
def test_captured_tensors_raise(body):
    mesh, x, w = one_device(), torch.randn(3), torch.randn(3)

    def loss(w, x=x):
        out = fmoe.shard_map(body(w), mesh, in_specs=P(), out_specs=P())(x)
        return (out[1] if isinstance(out, tuple) else out).sum()

    for differentiate in (
        grad(loss),
        grad(loss, (0, 1)),
        lambda w, x: vmap(grad(loss), (0, None))(w[None], x),
    ):
        with pytest.raises(ValueError, match=re.escape(CAPTURED) + r": shape \(3,\), torch.float32"):
            differentiate(w, x)
    with pytest.raises(ValueError, match=CAPTURED):
        loss(w.clone().requires_grad_())
    assert torch.isfinite(loss(w))  # constants may be captured


def test_what_is_no_capture():
    mesh, x, w = one_device(), torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def body(w, x):  # an inner gradient, an inner shard_map, remat, in-place arithmetic on a new tensor
        inner = fmoe.shard_map(lambda w: psum(w, "dp"), mesh, in_specs=P(), out_specs=P())
        g = grad(lambda w: (inner(w) * x).sin().sum())(w)
        return fmoe.remat(lambda g, x: g * x)(g, x).add_(1) + inner(w)

    def plain(w, x):
        return (w * x).cos() * x * x + 1 + w

    f = fmoe.shard_map(body, mesh, in_specs=P(), out_specs=P())
    expected = grad(lambda *a: plain(*a).sum(), (0, 1))(w, x)
    assert error(grad(lambda *a: f(*a).sum(), (0, 1))(w, x), expected) < 1e-12
    assert error(jvp(f, (w, x), (w, x)), jvp(plain, (w, x), (w, x))) < 1e-12
    leaves = [v.clone().requires_grad_() for v in (w, x)]
    assert error(torch.autograd.grad(f(*leaves).sum(), leaves), expected) < 1e-12


# ---- remat and compile -----------------------------------------------------------------------------


def gathered(w, v, x):
    """Weights gathered, tokens summed; what FSDP and a data-parallel loss do."""
    h = torch.tanh(x @ all_gather(w, ("dp", "ep"))) * (1 + axis_index("ep"))
    return psum(reduce_scatter(h, "dp", dim=1) @ v, "dp")


def gathered_once(w, v, x):
    return fmoe.remat(gathered, fmoe.save("all_gather"))(w, v, x)


def gathered_reference(w, v, x, dp):
    h = torch.stack([torch.tanh(c @ w) * (1 + i) for i, c in enumerate(x.chunk(2))])
    return dp * (h @ v).flatten(0, 1)


SPECS = {"in_specs": (P(("dp", "ep")), P("dp"), P("ep")), "out_specs": P("ep")}


def gathered_case(mesh):
    """Whole arguments, the same as DTensors and as local pieces, and the gradients of the squared sum."""
    values = tuple(torch.randn(*s, dtype=torch.float64) for s in ((8, 6), (6, 2), (4, 8)))
    spread = [distribute(t, s, mesh) for t, s in zip(values, SPECS["in_specs"])]
    dp = mesh.size(0)
    expected = grad(squared(lambda *a: gathered_reference(*a, dp)), (0, 1, 2))(*values)
    return spread, [a.to_local() for a in spread], expected


def squared(f):
    return lambda *args: f(*args).pow(2).sum()


def gradient_error(mesh, got, expected):
    pairs = zip(got, expected, SPECS["in_specs"])
    return max(
        error(whole(g), e if isinstance(g, DTensor) else distribute(e, s, mesh).to_local())
        for g, e, s in pairs
    )


def recomputed():
    mesh = bare_mesh("dp=2,ep=2")
    spread, local, expected = gathered_case(mesh)
    mapped = {fn: fmoe.shard_map(fn, mesh, **SPECS) for fn in (gathered, gathered_once)}
    cases = {
        "plain": mapped[gathered],
        "inside": mapped[gathered_once],
        "around": fmoe.remat(mapped[gathered], fmoe.save("all_gather")),
        "around, nothing": fmoe.remat(mapped[gathered], fmoe.save_nothing),
        "around, all, inside": fmoe.remat(mapped[gathered_once], fmoe.save_everything),
    }
    counts = {}
    second = vjp(grad(squared(mapped[gathered]), (0, 1, 2)), *local)[1](tuple(local))
    for name, f in cases.items():
        for args in (spread, local):
            with raw_calls() as calls:
                got = fmoe.value_and_grad(squared(f), (0, 1, 2))(*args)[1]
            assert gradient_error(mesh, got, expected) < 1e-12, name
            counts.setdefault(name, set()).add((calls["all_gather"], calls["reduce_scatter"]))
        with raw_calls() as again:
            got = grad(squared(f), (0, 1, 2))(*local)
        assert gradient_error(mesh, got, expected) < 1e-12, name
        counts[name].add((again["all_gather"], again["reduce_scatter"]))
        assert error(vjp(grad(squared(f), (0, 1, 2)), *local)[1](tuple(local)), second) < 1e-12, name
    return counts


def test_remat_inside_and_around_resolves_axes_again_and_runs_what_it_saved_once(pool):
    for counts in pool.run(4, recomputed):
        # Either of the two runs once forward, and once as the transpose of the other.
        assert counts == {
            "plain": {(2, 2)},
            "inside": {(2, 3)},
            "around": {(2, 3)},
            "around, nothing": {(3, 3)},
            "around, all, inside": {(2, 3)},
        }


def compiled(backend, axes, calls):
    mesh = bare_mesh(axes)
    spread, local, expected = gathered_case(mesh)
    torch._dynamo.reset()
    plain = fmoe.shard_map(gathered_once, mesh, **SPECS)

    def whole_call(*args):
        return fmoe.shard_map(gathered_once, mesh, **SPECS)(*args)

    outside = torch.compile(whole_call, fullgraph=True, backend=backend)
    inside = fmoe.shard_map(torch.compile(gathered_once, fullgraph=True, backend=backend), mesh, **SPECS)
    cases = {"dtensors": (outside, spread), "plain": (outside, local), "inside": (inside, local)}
    for f, args in (cases[name] for name in calls):
        value, got = fmoe.value_and_grad(squared(f), (0, 1, 2))(*args)
        assert error(whole(value), whole(squared(plain)(*args))) < 1e-12
        assert [type(g) for g in got] == [type(a) for a in args]
        assert gradient_error(mesh, got, expected) < 1e-12


@pytest.mark.slow  # the layer's own law is in test_laws.py
@pytest.mark.parametrize("call", ["dtensors", "plain", "inside"])
def test_compile_fullgraph(pool, call):
    pool.run(4, compiled, "aot_eager", "dp=2,ep=2", [call])


@pytest.mark.slow
def test_compile_with_inductor(pool):
    pool.run(2, compiled, "inductor", "dp=1,ep=2", ["dtensors", "inside"], timeout=200.0)
