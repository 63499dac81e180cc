"""How operators are declared: the registry, loud failures, kept outputs, transforms inside compile."""

import itertools
import re

import optree
import pytest
import torch
from helpers import (
    CONFIGS,
    ORACLE_TRANSFORMS,
    TRANSFORMS,
    OperatorExample,
    error,
    quick,
    random_layer,
    squared,
)
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

import fmoe
from fmoe.errors import TransformError
from fmoe.introspect import operator_support, raw_calls
from fmoe.ops.bases import gather, grouped_mm, scatter_add
from fmoe.ops.core.batches import one_by_one
from fmoe.ops.core.derive import replaced
from fmoe.ops.core.primitive import declare, operators
from fmoe.ops.core.refuse import Unsupported
from fmoe.ops.core.tape import Tape, checkpoint_names, on_tape, plain_operators

pytestmark = pytest.mark.usefixtures("device")

KEEP_ALL, KEEP_NONE = (lambda name: True), (lambda name: False)


def cube_kernel(x, w):
    return x**3 * w


def cube_vjp(inputs, needs, g):
    x, w = inputs
    return 3 * x**2 * w * g, x**3 * g if needs[1] else None


cube = declare(
    "test_cube(Tensor x, Tensor w) -> Tensor",
    impl=cube_kernel,
    fake=lambda x, w: torch.empty_like(x),
    checkpoint="gather",
    example=lambda: (torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)),
    plain=lambda x, w: x**3 * w,
    vjp=cube_vjp,
    jvp=Unsupported("Use reverse mode."),
    vmap=Unsupported("Batch by hand."),
)

operator_support()  # imports whatever declares one
OPERATORS = {name: op for name, op in operators().items() if op.example}  # parts compute nothing alone


def test_the_registry_lists_every_operator():
    names = set(operators())
    assert {
        "topk",
        "layout",
        "gather",
        "scatter_add",
        "grouped_mm",
        "grouped_outer",
        "experts_up",
        "experts_down",
    } <= names
    assert {op.checkpoint for op in operators().values()} <= set(checkpoint_names())
    assert all(op.raw.namespace == "fmoe" for op in operators().values())
    parts = {op.checkpoint for name, op in operators().items() if name not in OPERATORS}
    assert parts <= {"dispatch", "combine"}, "of exchanges in halves alone, whose own tests run them"


def test_a_rule_that_cannot_exist_is_a_loud_error():
    x, w = torch.randn(3), torch.randn(3)
    with pytest.raises(TransformError, match=r"test_cube: cannot run under torch.func.vmap. Batch by"):
        vmap(cube)(x[None], w[None])
    with pytest.raises(TransformError, match=r"test_cube: cannot run under torch.func.jvp. Use"):
        jvp(cube, (x, w), (x, w))
    assert error(grad(lambda x: cube(x, w).sum())(x), 3 * x**2 * w) < 1e-6


def test_a_float_output_without_a_vjp_is_refused(device):
    wrong = declare(
        f"test_no_rule_{device}(Tensor x) -> Tensor",
        impl=lambda x: x * 2,
        fake=torch.empty_like,
        checkpoint="gather",
        example=lambda: (torch.randn(3),),
        plain=lambda x: x * 2,
    )
    x = torch.randn(3, requires_grad=True)
    for call in (lambda: grad(lambda x: wrong(x).sum())(torch.randn(3)), lambda: wrong(x)):
        with pytest.raises(
            TypeError, match=f"test_no_rule_{device}: declared without a vjp, yet it has a floating-point"
        ):
            call()
    with torch.no_grad():
        assert torch.equal(wrong(x), 2 * x)


def test_an_operator_of_integers_makes_no_node_and_keeps_nothing(monkeypatch):
    topk, scores, packed = operators()["topk"], torch.randn(6, 8, requires_grad=True), []
    monkeypatch.setattr(topk.function, "apply", lambda *args: pytest.fail("it makes a node"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        topk(scores, torch.zeros(8), 1, 1, 1, 2)
    assert not packed


def test_a_backward_makes_no_graph_unless_it_is_asked_for(monkeypatch):
    x, w, ends = torch.randn(5, 2), torch.randn(3, 2, 4), torch.tensor([1, 1, 5], dtype=torch.int32)
    for leaf in (x, w):
        leaf.requires_grad_()
    applied, apply = [], grouped_mm.function.apply
    monkeypatch.setattr(grouped_mm.function, "apply", lambda *args: applied.append(args) or apply(*args))
    y = grouped_mm(x, w, ends)
    for graph, calls in ((False, 1), (True, 2)):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=graph, retain_graph=True)
        assert len(applied) == calls and g.requires_grad == graph


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_leaves_that_nobody_asks_for_cost_nothing(wanted):
    x, w, v = leaves = [torch.randn(size, requires_grad=True) for size in ((5, 2), (3, 2, 4), (3, 4, 2))]
    ends = torch.tensor([1, 1, 5], dtype=torch.int32)
    y = grouped_mm(grouped_mm(x, w, ends), v, ends).sum()
    all_of_them = torch.autograd.grad(y, leaves, retain_graph=True)
    with raw_calls() as counts:
        found = torch.autograd.grad(y, [leaves[i] for i in wanted], retain_graph=True)
    assert counts.get("grouped_outer", 0) == len({1, 2} & {*wanted})
    assert all(map(torch.equal, found, (all_of_them[i] for i in wanted)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_derivatives_exist_without_grad_mode():
    x, t, index = torch.randn(4), torch.randn(4), torch.tensor([2, -1, 0])
    with torch.no_grad(), forward_ad.dual_level():
        y = gather(forward_ad.make_dual(x, t), index)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, gather(t, index))
    with torch.no_grad():
        assert torch.equal(grad(lambda x: gather(x, index).sum())(x), torch.tensor([1.0, 0, 1, 0]))
        assert torch.equal(vmap(gather)(x[None], index[None])[0], gather(x, index))


def test_an_operator_that_equals_nothing_is_refused():
    functions = dict(impl=torch.clone, fake=torch.empty_like, example=lambda: (torch.ones(1),))
    with pytest.raises(TypeError, match="declared with neither a plain function nor a reference"):
        declare("test_equals_nothing(Tensor x) -> Tensor", checkpoint="gather", **functions)


def test_rules_hear_which_cotangents_are_wanted(device):
    needed = []
    recorded = declare(
        f"test_needs_{device}(Tensor x, Tensor w) -> Tensor",
        impl=lambda x, w: x * w,
        fake=lambda x, w: torch.empty_like(x),
        checkpoint="gather",
        example=lambda: (torch.randn(3), torch.randn(3)),
        plain=torch.mul,
        vjp=lambda res, needs, g: needed.append(tuple(needs)) or (g * res[1], g * res[0]),
    )
    x, w = torch.randn(3), torch.randn(3)
    grad(lambda x: recorded(x, w).sum())(x)
    recorded(x, w.clone().requires_grad_()).sum().backward()
    assert needed == [(True, False), (False, True)]


def test_outputs_handed_back_are_values_with_derivatives():
    x, w = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    record = Tape(record=KEEP_ALL, serve=KEEP_NONE)
    with on_tape(record):
        cube(x, w)
    (entry,) = record.recorded
    assert entry[:2] == ("test_cube", "gather")
    doubled = entry.outputs[0] * 2  # not what the kernel gives, so we see which one is used

    def replay(x):
        tape = Tape(record=KEEP_NONE, serve=KEEP_ALL, entries=[entry._replace(outputs=(doubled,))])
        with on_tape(tape):
            return cube(x, w)

    assert error(replay(x), doubled) == 0
    assert error(grad(lambda x: replay(x).sum())(x), 3 * x**2 * w) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_fake_kernels_describe_the_real_ones(op, dtype):
    """``opcheck``'s schema and fake-tensor checks."""
    inputs = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in op.example()
    ]
    args = *inputs, *op.dependent(*inputs)
    torch.library.opcheck(op.raw, args, test_utils=("test_schema", "test_faketensor"))


# ---- every operator under every transform ------------------------------------------------------------


REMATS = {
    "plain": lambda fn: fn,
    "remat, kept": lambda fn: fmoe.remat(fn, fmoe.save_everything),
    "remat, recomputed": lambda fn: fmoe.remat(fn, fmoe.save_nothing),
    "nested remat": lambda fn: fmoe.remat(
        lambda *a: fmoe.remat(fn, fmoe.save_everything)(*a), fmoe.save_nothing
    ),
}


BASES = {"gather", "scatter_add", "grouped_mm", "grouped_outer", "product"}


def remats_of(op, transform, slow):
    """Two of a base operator, of others one, such that each operator and each transform meets all."""
    if slow:
        return list(REMATS)
    place, twice = [*OPERATORS].index(op.name) + [*TRANSFORMS].index(transform), op.name in BASES
    return [list(REMATS)[(place + more) % len(REMATS)] for more in range(1 + twice)]


def is_declared_unsupported(op, text):
    """Whether an error's text names the operator, a transform it declares it can't do, and the remedy."""
    said = re.search(r"(\w+): cannot run under torch\.func\.(\w+)\. (.+)", text)
    if said:
        return said[1] == op.name and getattr(op.rules, said[2]) == Unsupported(said[3])
    said = f"{op.name}: cannot be differentiated under torch.compile. Differentiate it uncompiled."
    in_remat = "mutate UserDefinedExceptionObjectVariable(TransformError)"  # all torch 2.11 lets through
    return (said in text or in_remat in text) and "vjp" not in op.by_hand


def check_right_or_loud(op, transform, remats):
    """Against the plain function it is declared to equal, in float64."""
    example = OperatorExample(op)
    with plain_operators():
        expected = ORACLE_TRANSFORMS[transform](example.scalar(), example)
    for name in remats:
        try:
            got = TRANSFORMS[transform](example.scalar(REMATS[name]), example)
        except (TransformError, torch._dynamo.exc.Unsupported) as loud:
            if not is_declared_unsupported(op, str(loud)):
                raise
        else:
            assert error(got, expected) < 1e-10, name


# Linear operators, such as collectives, and backwards meet only these: the rest follows from the same rules.
ONCE_OR_TWICE = ["grad", "jvp", "vmap tokens", "vmap params", "vmap all", "vmap(vmap)", "vmap(grad) both"]
ONCE_OR_TWICE += ["grad(vmap)", "grad(grad)", "jvp(grad)", "jacfwd(jacfwd)", "make_fx(grad)", "compile"]
ONCE_OR_TWICE += ["autograd twice, saving on the CPU"]
MATRIX = [*itertools.product(OPERATORS, TRANSFORMS)]


def wants_all(name):
    linear = OPERATORS[name].by_hand == {"vjp", "jvp", "vmap"}
    return name in BASES or not (linear or name.endswith("_backward"))


def is_quick(name, transform):
    """The slowest transforms meet the base operators and every third of the others."""
    if transform in ("compile", "jacfwd(jacfwd)", "make_fx(grad)") and name not in BASES:
        return ([*OPERATORS].index(name) + [*TRANSFORMS].index(transform)) % 3 == 0
    return transform in ONCE_OR_TWICE or wants_all(name)


SOME = {(name, transform) for name, transform in MATRIX if is_quick(name, transform)}


@pytest.mark.parametrize(("name", "transform"), quick(SOME, MATRIX))
def test_every_operator_under_every_transform_is_right_or_loud(name, transform, slow):
    op = OPERATORS[name]
    check_right_or_loud(op, transform, remats_of(op, transform, slow))


def shapes(values):
    return [tuple(t.shape) for t in optree.tree_leaves(values)]


def check_maps_over_none(op, wrap, args, batched):
    """Shapes of a batch of none of ``args``, and of its derivatives; gradients of the other ones are zero."""
    call = wrap(lambda *args: op(*args))
    floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    dims = tuple(0 if i in batched else None for i in range(len(args)))

    def pulled(*args):
        out, pull = vjp(lambda *few: call(*replaced(args, floats, few)), *(args[i] for i in floats))
        return pull(optree.tree_map(torch.ones_like, out))

    def pushed(*args):
        few = tuple(args[i] for i in floats)
        return jvp(lambda *few: pulled(*replaced(args, floats, few)), few, few)

    differentiable = floats and all(o.is_floating_point() for o in optree.tree_leaves(op(*args)))
    for fn in (call, pulled, pushed) if differentiable else (call,):
        one = shapes(fn(*args))
        for sizes in ((0,),) if fn is pushed else ((0,), (0, 2), (2, 0)):
            many, mapped = list(args), fn
            for i in batched:
                many[i] = args[i].expand(*sizes, *args[i].shape)
            for _ in sizes:
                mapped = vmap(mapped, dims)
            assert shapes(mapped(*many)) == [(*sizes, *shape) for shape in one], sizes
    if differentiable:
        none = replaced(args, batched, (args[i][None][:0] for i in batched))
        out, pull = vjp(
            lambda *few: vmap(call, dims)(*replaced(none, floats, few)), *(none[i] for i in floats)
        )
        grads = pull(optree.tree_map(torch.ones_like, out))
        assert shapes(grads) == shapes([none[i] for i in floats]) and not any(g.any() for g in grads)


# These move one example after another where their indices differ.
MOVING = {name for name in OPERATORS if name.startswith(("deepep_", "send", "exchange"))}


OVER_NONE = [*itertools.product(sorted(OPERATORS.keys() - MOVING - {"test_cube"}), ["plain", "remat, kept"])]


@pytest.mark.parametrize(("name", "remat"), quick(OVER_NONE[::4] + OVER_NONE[1::8], OVER_NONE))
def test_every_operator_maps_over_no_example(name, remat):
    op = OPERATORS[name]
    args = op.example()
    args = *args, *op.dependent(*args)
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for batched in (tensors, tensors[:1], tensors[1:2]):
        if batched:
            check_maps_over_none(op, REMATS[remat], args, batched)


def test_an_operator_that_runs_one_by_one_maps_over_no_example(device):
    double = declare(
        f"test_one_by_one_{device}(Tensor x) -> Tensor",
        impl=lambda x: 2 * x,
        fake=torch.empty_like,
        checkpoint="gather",
        example=lambda: (torch.randn(3, dtype=torch.float64),),
        reference=lambda x: 2 * x,
        vmap=one_by_one,
    )
    check_maps_over_none(double, REMATS["plain"], double.example(), [0])


def test_the_matrix_can_fail(device):
    """An operator with a wrong derivative, and one with a wrong value, do not pass it."""
    for name, impl, slope in (("test_bad_slope", torch.sin, 1.0), ("test_bad_value", torch.cos, 1.0)):
        bad = declare(
            f"{name}_{device}(Tensor x) -> Tensor",
            impl=impl,
            fake=torch.empty_like,
            checkpoint="gather",
            example=lambda: (torch.randn(3, dtype=torch.float64),),
            plain=torch.sin,
            vjp=lambda res, needs, g, slope=slope: (g * slope,),
        )
        with pytest.raises(AssertionError):
            check_right_or_loud(bad, "grad", REMATS)


INSIDE = {
    "grad": lambda f: grad(f),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,)),
    "vmap": lambda f: lambda x: vmap(f)(x[None]),
    "vmap(grad)": lambda f: lambda x: vmap(grad(f))(x[None]),
}
LAYER, OWN = "layer", "remat of PyTorch's own"


@pytest.mark.parametrize(
    ("what", "name"),
    quick(
        [(LAYER, "grad"), (LAYER, "vmap"), (OWN, "jvp"), (OWN, "vmap(grad)")],
        itertools.product([LAYER, OWN], INSIDE),
    ),
)
def test_transforms_inside_compile_raise_under_fullgraph_and_are_right_otherwise(what, name):
    transform = INSIDE[name]
    params, x = random_layer(dtype=torch.float32), torch.randn(5, 6)

    def loss(x):
        if what == LAYER:
            return fmoe.moe_forward(params, x, router=CONFIGS["sigmoid, groups"]).pow(2).sum()
        return fmoe.remat(lambda x: x.sin().exp())(x).sum()

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"inside torch.compile drops custom derivatives \(pytorch#193279\)"):
        torch.compile(transform(loss), fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    got = torch.compile(transform(loss), backend="aot_eager")(x)
    assert error(got, transform(loss)(x)) < 1e-5


class Tripled(torch.autograd.Function):
    """The identity, with a derivative of three."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def test_pytorch_still_drops_custom_derivatives_in_transforms_inside_compile():
    """The reason for the error above (pytorch#193279). The day this fails, the check can go."""
    torch._dynamo.reset()
    x = torch.randn(3)
    slope = grad(lambda x: Tripled.apply(x).sum())
    assert slope(x).tolist() == [3.0] * 3
    assert torch.compile(slope, backend="aot_eager")(x).tolist() == [1.0] * 3


def test_vmap_is_one_larger_call_of_each_kernel():
    """Batched tokens are more tokens; per-example weight gradients are groups of one product."""
    params = random_layer()
    config = CONFIGS["sigmoid, groups"]

    def counts_of(batch):
        X = torch.randn(batch, 5, 6, dtype=torch.float64)
        loss = squared(lambda p, x: fmoe.moe_forward(p, x, router=config))
        with raw_calls() as counts:
            vmap(grad(loss), (None, 0))(params, X)
        return counts

    assert counts_of(2) == counts_of(7) != {}


def test_absent_rows():
    x = torch.randn(3, 2, dtype=torch.float64)
    index = torch.tensor([2, -1, 0, 2])
    assert error(gather(x, index), torch.stack([x[2], 0 * x[0], x[0], x[2]])) == 0
    y = torch.randn(4, 2, dtype=torch.float64)
    y[1] = torch.nan
    assert error(scatter_add(y, index, 3), torch.stack([y[2], 0 * x[0], y[0] + y[3]])) < 1e-14
    assert gather(torch.empty(0, 2), torch.tensor([-1])).tolist() == [[0, 0]]
    half = torch.full((2048, 1), 1.0, dtype=torch.bfloat16)  # 1 + 1 + ... stops at 256 in bfloat16
    assert scatter_add(half, torch.zeros(2048, dtype=torch.int64), 1).item() == 2048


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_mm_takes_any_dtype_and_width(dtype):
    x, w = torch.randn(7, 5).to(dtype), torch.randn(3, 5, 3).to(dtype)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    out = grouped_mm(x, w, offsets)[:6].double()
    expected = torch.cat([x[:2].double() @ w[0].double(), x[2:6].double() @ w[2].double()])
    assert error(out, expected) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-2)
