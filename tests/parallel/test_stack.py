"""Layers in order: gathered ahead, summed behind, and otherwise the plain loop."""

import functools
import itertools
import weakref

import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from helpers import error, fresh_seed, quick

import fmoe
from fmoe import P
from fmoe.errors import TransformError
from fmoe.models import decoder
from fmoe.ops.core.host import on_host
from fmoe.parallel import buckets, distribute, psum
from fmoe.parallel.placement import Placed, computing, moves, placed, use
from fmoe.parallel.stack import stack
from fmoe.plan import plan
from fmoe.training.gradients import of_model
from fmoe.transforms import per_layer

DIM, LAYERS = 6, 4
SPECS = {"a": P(None, "dp"), "b": P("dp", None), "n": P()}


def plain_loop(layer, params, x, *extra):
    found = []
    for tree in params:
        x, *more = layer(tree, x, *extra)
        found.append(tuple(more))
    return x, found


def layer(params, x, factor, name):
    p = use(params)
    y = torch.tanh(x @ p["a"]) * p["n"] + torch.sin(x * factor) @ p["b"].T
    return y, {name: (y.detach().sum(),)}, (y**2).mean()


def program(run, mesh, wrap=lambda f: f):
    """A loss of three trees whose layers run one after another."""

    def inner(params, x, factor):
        trees = [placed(p, _moves(p, mesh)) for p in params]
        y, more = run(wrap(layer), trees, x, factor, "counted")
        assert all(set(found) == {"counted"} for found, _ in more)
        return psum((y**2).sum() + sum(part for _, part in more), "dp")

    in_specs = ([SPECS] * LAYERS, P("dp"), P())
    return fmoe.shard_map(inner, mesh, in_specs=in_specs, out_specs=P())


def _moves(params, mesh):
    wanted = {name: computing(spec) for name, spec in SPECS.items()}
    return moves("test", "params", params, SPECS, wanted, mesh)


def arguments(mesh):
    shapes = {"a": (DIM, DIM), "b": (DIM, DIM), "n": (DIM,)}
    weights = [{n: torch.randn(s, dtype=torch.float64) / 2 for n, s in shapes.items()} for _ in range(LAYERS)]
    x, factor = torch.randn(8, DIM, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)
    return (
        distribute(weights, [SPECS] * LAYERS, mesh),
        distribute(x, P("dp"), mesh),
        distribute(factor, P(), mesh),
    )


def whole(tree):
    return optree.tree_map(lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t, tree)


WRAPS = {
    "nothing": lambda f: f,
    "remat": fmoe.remat,
    "compiled": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
    "compiled remat": lambda f: torch.compile(fmoe.remat(f), backend="aot_eager", fullgraph=True),
}


def as_the_loop(name, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    mesh, wrap, found = bare_mesh("dp=2"), WRAPS[name], {}
    args = arguments(mesh)
    loop = fmoe.value_and_grad(program(plain_loop, mesh), (0, 1, 2))(*args)
    ahead = program(stack, mesh, wrap)
    found["gradient"] = error(whole(fmoe.value_and_grad(ahead, (0, 1, 2))(*args)), whole(loop))
    with torch.no_grad():
        found["without a gradient"] = error(whole(ahead(*args)), whole(loop[0]))
    leaves, structure = optree.tree_flatten(args)
    variables = [leaf.detach().requires_grad_() for leaf in leaves]
    value = ahead(*structure.unflatten(variables))
    if name == "compiled":  # its backward writes into what it kept, and says so
        with pytest.raises(RuntimeError, match="donated buffers"):
            torch.autograd.grad(value, variables, retain_graph=True)
    if "compiled" not in name:
        for kind, keep in (("first", True), ("second", False)):
            got = torch.autograd.grad(value, variables, retain_graph=keep)
            found[f"{kind} backward"] = error(whole(structure.unflatten(got)), whole(loop[1]))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, variables)
        found["torch.func"] = error(whole(torch.func.grad(ahead, (0, 1, 2))(*args)), whole(loop[1]))
        twice = [second_order(program(run, mesh, wrap), args) for run in (stack, plain_loop)]
        found["second order"] = error(*map(whole, twice)) / 100  # sums of large numbers
    return found


def second_order(fn, args):
    leaves, structure = optree.tree_flatten(args)
    variables = [leaf.detach().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(fn(*structure.unflatten(variables)), variables, create_graph=True)
    return torch.autograd.grad(sum((g * g).sum() for g in grads).full_tensor(), variables)


@pytest.mark.parametrize("name", quick(["remat", "compiled remat"], WRAPS))
def test_it_is_the_plain_loop(pool, name):
    for found in pool.run(2, as_the_loop, name, fresh_seed()):
        assert max(found.values()) < 1e-12, found


def on_the_way(remat, seed):
    """What happens in which order, and how many layers' gathered parameters there are while a layer runs."""
    torch.manual_seed(seed)
    mesh, events, alive, most = bare_mesh("dp=2"), [], {}, []

    def watched(layer_of, what, fn):
        @functools.wraps(fn)
        def call(*args):
            number = layer_of[args[1].where, args[1].shapes]
            events.append((what, number))
            out = fn(*args)
            if what == "begin":  # not its storage, which gloo's thread may hold for longer
                alive["on its way"] = number
            if what == "finish":
                alive.pop("on its way")
                for whole in out:
                    storage = whole.untyped_storage()
                    alive[storage._cdata] = number
                    weakref.finalize(storage, alive.pop, storage._cdata, None)
            return out

        return call

    widths = [DIM, DIM + 2, DIM + 4, DIM + 6, DIM + 8]  # so that a bucket's shapes tell its layer
    params = [{"w": torch.randn(a, b) / a} for a, b in itertools.pairwise(widths)]
    names = {((0,), ((a, b // 2),)): i for i, (a, b) in enumerate(itertools.pairwise(widths))}

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            events.append(("backward", ctx.number))
            most.append(len(set(alive.values())))
            return g, None

    def one(p, x):
        number = widths.index(x.shape[1])
        events.append(("forward", number))
        y = torch.tanh(Marked.apply(x @ use(p)["w"], number))
        most.append(len(set(alive.values())))
        return (y,)

    def loss(params, x):
        trees = [placed(p, [(("gather", 1, ("dp",)),)]) for p in params]
        return psum(stack(per_layer(remat)(one), trees, x)[0].sum(), "dp")

    kept = {name: getattr(buckets, name) for name in ("begin", "finish", "begin_sum", "finish_sum")}
    for name, fn in kept.items():
        setattr(buckets, name, watched(names, name, fn))
    try:
        spread = distribute(params, P(None, "dp"), mesh)
        x = distribute(torch.randn(4, DIM), P("dp"), mesh)
        fn = fmoe.shard_map(loss, mesh, in_specs=(P(None, "dp"), P("dp")), out_specs=P())
        fmoe.value_and_grad(fn, (0, 1))(spread, x)
    finally:
        for name, fn in kept.items():
            setattr(buckets, name, fn)
    return events, max(most)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gathers_are_begun_a_layer_ahead_and_sums_waited_for_a_layer_later(pool, remat):
    for events, most in pool.run(2, on_the_way, remat, fresh_seed()):
        first = {event: i for i, event in reversed([*enumerate(events)])}
        last = {event: i for i, event in enumerate(events)}
        for i in range(LAYERS - 1):
            assert first["begin", i + 1] < first["forward", i]  # while layer i computes
            assert first["finish", i + 1] > first["forward", i]
            assert last["begin", i] < last["backward", i + 1] < last["finish", i]
            assert last["backward", i + 1] < first["begin_sum", i + 1] < first["finish_sum", i + 1]
            assert last["backward", i] < first["finish_sum", i + 1]
        assert events.count(("begin", LAYERS - 1)) == 1  # the last layer's are still there
        assert all(events.count(("begin", i)) == 2 for i in range(LAYERS - 1))
        assert most == 2


def captured(seed):
    mesh = bare_mesh("dp=2")
    torch.manual_seed(seed)
    args, outside = arguments(mesh), torch.ones((), dtype=torch.float64, requires_grad=True)

    def wrap(fn):
        return lambda params, x, *extra: fn(params, x * outside, *extra)

    with pytest.raises(ValueError, match="uses a differentiable tensor from outside"):
        fmoe.value_and_grad(program(stack, mesh, wrap))(*args)

    def broken(fn):
        def call(params, x, *extra):
            raise KeyError("of the layer")

        return call

    with pytest.raises(KeyError, match="of the layer"):
        program(stack, mesh, broken)(*args)
    return fmoe.value_and_grad(program(stack, mesh))(*args)[0].full_tensor().item()


def test_a_captured_tensor_raises_and_an_error_leaves_nothing_behind(pool):
    one, two = pool.run(2, captured, fresh_seed())
    assert one == two


def odd_layers(seed):
    """Layers that no hook may spoil: what they print is what they do on one device."""
    torch.manual_seed(seed)
    mesh, found = bare_mesh("dp=2"), {}
    args = arguments(mesh)

    def in_place(fn):
        first = iter([True])  # PyTorch itself sees what the last layer does

        def call(params, x, *extra):
            y, *more = fn(params, x, *extra)
            y = torch.tanh(y)
            return y.mul_(2) if next(first, False) else y, *more

        return call

    with pytest.raises(ValueError, match="stack: layer: got a layer that writes into a tensor"):
        fmoe.value_and_grad(program(stack, mesh, in_place))(*args)

    def differentiates(fn):
        def call(params, x, *extra):
            torch.func.vjp(torch.sin, x.detach())
            return fn(params, x, *extra)

        return call

    with pytest.raises(TransformError, match="stack: layer: got saved-tensor hooks"):
        fmoe.value_and_grad(program(stack, mesh, differentiates))(*args)
    assert torch._C._distributed_c10d._get_work_registry_size() == 0

    def bits(fn):
        def call(params, x, *extra):
            y, *more = fn(params, x, *extra)
            return y + _Bits.apply(use(params)["b"]), *more

        return call

    def random(fn):
        def call(params, x, *extra):
            y, *more = fn(params, x, *extra)
            return torch.nn.functional.dropout(y, 0.3), *more

        return call

    for name, wrap in {"a view as another dtype": bits, "dropout": random}.items():
        twice = []
        for run in (stack, plain_loop):
            torch.manual_seed(seed + dist.get_rank())
            twice.append(second_order(program(run, mesh, wrap), args))
        found[name] = error(*map(whole, twice)) / 100
    hooked = []
    pack = lambda t: hooked.append(t.nbytes) or t  # noqa: E731
    for run in (stack, plain_loop):
        hooked.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            program(run, mesh)(*optree.tree_map(lambda t: t.detach().requires_grad_(), args))
    half = hooked[1:].index(0) + 1
    found["bytes that an outer hook sees"] = abs(sum(hooked[:half]) - sum(hooked[half:]))
    return found


class _Bits(torch.autograd.Function):
    """The sum of a matrix, which is kept as integers."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w.view(torch.int64))
        return w.sum()

    @staticmethod
    def backward(ctx, g):
        (bits,) = ctx.saved_tensors
        assert bits.dtype == torch.int64
        return g * torch.ones_like(bits.view(torch.float64)) + 0 * bits.view(torch.float64)


def test_hooks_spoil_nothing(pool):
    for found in pool.run(2, odd_layers, fresh_seed()):
        assert max(found.values()) < 1e-12, found


# ---- buckets ---------------------------------------------------------------------------------------

SHAPES = {"odd": (3, 4), "vector": (6,), "cube": (2, 4, 5), "none": (0, 4), "single": (1, 2)}
CUT = {name: P("dp") if name == "vector" else P(None, "dp") for name in SHAPES}


def one_bucket(dtype, seed):
    torch.manual_seed(seed)
    mesh = bare_mesh("dp=2")
    tree = {n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()}
    weigh = {n: torch.randn(s, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    spread, whole_specs = distribute(tree, CUT, mesh), {n: P() for n in CUT}
    how = moves("test", "tree", spread, CUT, whole_specs, mesh)
    counted = {}

    def inner(tree):
        pieces = placed(tree, how, [dtype] * len(CUT))
        leaves, structure = optree.tree_flatten(pieces, is_leaf=lambda t: isinstance(t, Placed))
        counted["buckets"] = len(buckets.buckets_of(leaves))
        scattered = buckets.scatter(leaves, structure.flatten_up_to(weigh))
        return use(pieces), structure.unflatten(scattered)

    run = fmoe.shard_map(inner, mesh, in_specs=(CUT,), out_specs=(whole_specs, CUT))
    used, scattered = run(spread)
    want = optree.tree_map(lambda t: 2 * t.double(), weigh)  # two devices' equal cotangents
    pulled = torch.func.vjp(lambda t: run(t)[0], spread)[1](distribute(weigh, whole_specs, mesh))[0]
    return {
        "buckets too many": counted["buckets"] - 1,
        "whole": error(whole(used), optree.tree_map(lambda t: t.to(dtype), tree)),
        "scattered": error(whole(scattered), want),
        "pulled": error(whole(pulled), optree.tree_map(torch.Tensor.double, weigh)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_bucket_holds_any_shapes(pool, dtype):
    for found in pool.run(2, one_bucket, dtype, fresh_seed()):
        assert not any(found.values()), found


# ---- the model -------------------------------------------------------------------------------------


def collectives(axes, remat):
    """Of the gradient of a model of three layers, by what they carry."""
    mesh, config = bare_mesh(axes), decoder.preset("debug", layers=3)
    params, tokens = decoder.init(config, 0, mesh=mesh), torch.randint(256, (2, 16))
    step = of_model(config, mesh, per_layer=per_layer(remat))
    step(params, tokens, tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(params, tokens, tokens)
    names = [e.name for e in profile.events() if e.name.startswith("c10d::")]
    return [name for name in names if "alltoall" not in name]


@pytest.mark.parametrize(
    ("axes", "remat"),
    quick([("ep=2", "full")], itertools.product(["ep=2", "dp=2"], ["none", "default", "full"])),
)
def test_a_step_has_few_collectives(pool, axes, remat):
    for names in pool.run(2, collectives, axes, remat):
        assert len(names) <= 16, names  # and one for the gradient's norm


def test_a_step_leaves_nothing_of_its_layers_in_memory():
    """Also of what has no cotangent, such as scores that only statistics read."""
    config = decoder.preset("debug", layers=3)
    stage = plan(config, "dp=2", batch_size=2, seq_len=64, device_type="cpu").ranks[0]
    scores = 4 * 64 * config.num_experts
    assert stage.phases["clip"]["activations"] < scores < stage.phases["forward"]["activations"]


# ---- what remat offloads ---------------------------------------------------------------------------------


class Logged:
    """Stands for the host's memory, and notes what goes there and comes back."""

    def __init__(self, log):
        self.log = log

    def take(self, tensor):
        self.log.append("take")
        return -tensor

    def give(self, tensor):
        self.log.append("give")
        return -tensor


def offloaded(axes):
    """The order of copies and layers, and whether gradients are those of the loop."""
    mesh, log = bare_mesh(axes), []

    def named(params, x, factor, name):
        log.append("run")
        y, *more = layer(params, fmoe.checkpoint_name(x.cos(), "cosine"), factor, name)
        return y, *more

    args = arguments(mesh)
    expected = fmoe.value_and_grad(program(lambda f, *rest: plain_loop(named, *rest), mesh), (0, 1, 2))(*args)
    log.clear()
    remat = fmoe.remat(named, fmoe.offload("cosine"))
    with on_host(Logged(log)):
        found = fmoe.value_and_grad(program(lambda f, *rest: stack(remat, *rest), mesh), (0, 1, 2))(*args)
    return error(whole(found), whole(expected)), log


def test_what_a_layer_offloaded_comes_back_while_the_layer_after_it_runs_backward(pool):
    for wrong, log in pool.run(2, offloaded, "dp=2"):
        assert wrong < 1e-12
        ahead = ["give", "run"] * (LAYERS - 1)
        assert log == ["run", "take"] * LAYERS + ["give", *ahead, "run"]
