"""Names for values of one's own, and what remat does with them."""

import re
from collections import Counter

import optree
import pytest
import torch
import torch.nn.functional as F
from devices import bare_mesh
from helpers import (
    CONFIGS,
    ORACLE_TRANSFORMS,
    TRANSFORMS,
    Example,
    error,
    lossless,
    quick,
    random_layer,
    squared,
)
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe.introspect import kept_bytes, raw_calls
from fmoe.ops.bases import gather
from fmoe.parallel import distribute, psum

pytestmark = pytest.mark.usefixtures("device")

POLICIES = {
    "none": fmoe.save_nothing,
    "first": fmoe.save("up"),
    "both": fmoe.save("up", "mixed"),
    "operators, too": fmoe.save("topk", "down") | fmoe.save("mixed"),
    "everything": fmoe.save_everything,
    "offloaded": fmoe.save("up") | fmoe.offload("mixed", "dispatch"),
}


def named(params, x):
    """A layer between PyTorch's operations, with names for values of all kinds."""
    up = fmoe.checkpoint_name(F.linear(x, x[: x.shape[1] + 2, :] * 0.5), "up")
    x = fmoe.checkpoint_name({"mixed": (x + up.sin().mean(-1, keepdim=True),)}, "mixed")["mixed"][0]
    y = fmoe.checkpoint_name(fmoe.moe_forward(params, x, router=CONFIGS["sigmoid, groups"]), "down")
    return torch.softmax(fmoe.checkpoint_name(y, "again"), -1)


def wrapped(policy):
    """``remat`` of it, and of that once more, and of a part of it."""
    part = fmoe.remat(named, policy)
    return [
        part,
        fmoe.remat(part, fmoe.save("mixed")),
        fmoe.remat(fmoe.remat(named, fmoe.save_nothing), policy),
        fmoe.remat(lambda p, x: fmoe.checkpoint_name(part(p, x).exp(), "mixed").log(), policy),
    ]


class Kernels(TorchDispatchMode):
    """Counts PyTorch's kernels."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("differentiate", [fmoe.value_and_grad, torch.func.grad_and_value])
def test_names_change_no_bit(dtype, differentiate):
    params, x = random_layer(dtype=dtype), torch.randn(9, 6, dtype=dtype)

    def run(fn):
        return optree.tree_leaves(
            differentiate(lambda p, x: fn(p, x).float().pow(2).sum(), (0, 1))(params, x)
        )

    plain = run(named)
    for name, policy in POLICIES.items():
        for fn in wrapped(policy)[:3]:
            assert all(map(torch.equal, run(fn), plain)), name


QUICK = {"grad", "jvp", "vmap(grad) both", "grad(grad)", "jvp(grad)", "make_fx(grad)", "compile"}


@pytest.mark.parametrize("transform", quick(QUICK | {"autograd twice, saving on the CPU"}, TRANSFORMS))
def test_names_under_every_transform(transform, slow):
    example = Example(random_layer(), torch.randn(9, 6, dtype=torch.float64))
    expected = ORACLE_TRANSFORMS[transform](squared(named), example)
    cases = [(name, fn) for name, policy in POLICIES.items() for fn in wrapped(policy)]
    place = [*TRANSFORMS].index(transform)
    for name, fn in [("plain", named), *cases] if slow else [cases[place % len(cases)]]:
        assert error(TRANSFORMS[transform](squared(fn), example), expected) < 1e-9, name


# A function of x and w, the kernel that gives the named value, and how often it runs in its own backward.
MADE = {
    "mm": (lambda x, w: x @ w, "mm", 2),
    "linear of 3D": (lambda x, w: F.linear(x.view(2, 2, 4), w), "mm", 2),
    "linear with a bias": (lambda x, w: F.linear(x, w, w[0]), "addmm", 0),
    "pointwise": (lambda x, w: (x * w).exp(), "exp", 0),
    "softmax": (lambda x, w: torch.softmax(x * w, 0), "_softmax", 0),
    "of autocast": (lambda x, w: torch.autocast("cpu", torch.bfloat16)(torch.matmul)(x, w), "mm", 2),
}


@pytest.mark.parametrize("case", MADE)
def test_what_gave_a_kept_value_runs_once(case):
    make, kernel, backward = MADE[case]
    x, w = torch.randn(2, 4, 4, device="cpu").unbind()

    def fn(x, w):
        return fmoe.checkpoint_name(make(x, w), "made").cos().sum()

    for differentiate in (fmoe.value_and_grad, torch.func.grad_and_value):
        for policy, times in ((fmoe.save_nothing, 2), (fmoe.save("made"), 1)):
            with Kernels() as kernels:
                found = differentiate(fmoe.remat(fn, policy), (0, 1))(x, w)
            assert kernels.counts[kernel] == times + backward, (differentiate, policy)
            assert all(map(torch.equal, *map(optree.tree_leaves, (found, differentiate(fn, (0, 1))(x, w)))))
            differentiated_again = grad(lambda x, p=policy: grad(fmoe.remat(fn, p))(x, w).pow(2).sum())(x)
            expected = grad(lambda x: grad(fn)(x, w).pow(2).sum())(x)
            assert error(differentiated_again, expected) < (0.1 if case == "of autocast" else 1e-4)


def test_an_operator_of_ours_that_gave_a_kept_value_runs_once():
    params, x = random_layer(), torch.randn(9, 6, dtype=torch.float64)
    x_SD, plan = fmoe.dispatch(x, fmoe.route(params.router, x, CONFIGS["sigmoid, groups"]))
    index = torch.tensor([3, -1, 0])

    def experts(x, w):
        return fmoe.checkpoint_name(fmoe.experts_grouped_mm(w, x, plan), "y").sin().sum()

    def rows(x, _):
        return fmoe.checkpoint_name(gather(x, index), "y").sin().sum()

    batch = torch.stack([x_SD, 2 * x_SD])
    for fn, operator, run in (
        (experts, "experts_down", lambda fn: fmoe.value_and_grad(fn, (0, 1))(x_SD, params.experts)),
        (rows, "gather", lambda fn: grad(fn)(x_SD, None)),
        (rows, "gather", lambda fn: torch.vmap(grad(fn), (0, None))(batch, None)),
    ):
        for policy, times in ((fmoe.save_nothing, 2), (fmoe.save("y"), 1)):
            with raw_calls() as counts:
                found = run(fmoe.remat(fn, policy))
            assert counts[operator] == times
            assert error(found, run(fn)) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda x: F.dropout(x, 0.5),
        torch.rand_like,
        lambda x: x.sin().add_(1),
        lambda x: x.sin().to(x.dtype).add_(1).contiguous(),
        lambda x: x.expand(2, 3, 8),
    ],
)
def test_what_cannot_be_handed_runs_again_with_the_same_bits(make):
    """Random numbers, which later ones follow, and operations in place."""

    def fn(x):
        return (fmoe.checkpoint_name(make(x), "made").cos() * torch.rand_like(x) * x).sum()

    x, results = torch.randn(3, 8), []
    for call in (fn, fmoe.remat(fn, fmoe.save("made"))):
        torch.manual_seed(7)
        results.append([*fmoe.value_and_grad(call)(x), torch.rand(3)])
    assert all(map(torch.equal, *results))


def test_what_is_kept_is_the_named_value():
    w, x = torch.randn(4, 16, requires_grad=True), torch.randn(3, 4)
    fn = lambda w, x: fmoe.checkpoint_name(x @ w, "up").sin()  # noqa: E731
    for policy, size in (
        (None, 0),
        (fmoe.save("topk"), 0),
        (fmoe.save("up"), 4 * 3 * 16),
        (lambda name: name == "up", 4 * 3 * 16),
    ):
        assert kept_bytes(fmoe.remat(fn, policy), w, x) == size
    assert fmoe.checkpoint_name(x, "up") is x


@pytest.mark.parametrize("policy", [fmoe.save("a", "b"), fmoe.save("a") | fmoe.offload("b"), fmoe.save("b")])
def test_a_value_may_have_two_names(policy):
    def fn(w, x):
        return fmoe.checkpoint_name(fmoe.checkpoint_name(x @ w, "a"), "b").sin().sum()

    w, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for twice in (lambda f: grad(f)(w, x), lambda f: grad(lambda w: grad(f)(w, x).sin().sum())(w)):
        assert torch.equal(twice(fmoe.remat(fn, policy)), twice(fn))
    leaf = w.clone().requires_grad_()
    with Kernels() as kernels:
        out = fmoe.remat(fn, policy)(leaf, x)
        (found,) = torch.autograd.grad(out, leaf)
    assert torch.equal(found, grad(fn)(w, x)) and kernels.counts["mm"] == 2  # and the one of its derivative


def on_a_mesh(axes):
    mesh, x = bare_mesh(axes), torch.randn(8, 6, dtype=torch.float64)
    w = torch.randn(6, 6, dtype=torch.float64)
    dx, dw = distribute(x, fmoe.P("dp"), mesh), distribute(w, fmoe.P(), mesh)

    def fn(x, w):
        return fmoe.checkpoint_name(x @ w, "product").sin().sum()

    found = []
    policies = fmoe.save("product"), fmoe.offload("product"), fmoe.compress("product"), fmoe.save_nothing
    for policy in policies:
        call = fmoe.remat(fn, policy)
        summed = lambda x, w, f=call: psum(f(x, w), "dp")  # noqa: E731
        inside = fmoe.shard_map(summed, mesh, in_specs=(fmoe.P("dp"), fmoe.P()), out_specs=fmoe.P())
        with lossless():
            grads = fmoe.value_and_grad(call, (0, 1))(dx, dw)[1]
            more = grad(lambda x, w, f=inside: f(x, w).sum(), (0, 1))(dx, dw)
        found += [[g.full_tensor() for g in grads], [g.full_tensor() for g in more]]
    expected = grad(fn, (0, 1))(x, w)
    return [error(grads, expected) for grads in found]


def test_names_of_dtensors_and_inside_shard_map(pool):
    for found in pool.run(2, on_a_mesh, "dp=2"):
        assert max(found) < 1e-12


def test_names_in_a_compiled_region(aot_eager):
    def fn(w, x):
        return fmoe.checkpoint_name(x @ w, "up").sin()

    w, x = torch.randn(4, 16), torch.randn(3, 4)
    for policy, times in ((fmoe.save_nothing, 2), (fmoe.save("up") | fmoe.offload("topk"), 1)):
        compiled = torch.compile(fmoe.remat(fn, policy))
        step = fmoe.value_and_grad(lambda w, x, f=compiled: f(w, x).sum())
        found = step(w, x)
        with raw_calls() as counts:
            step(w, x)
        assert counts["checkpoint_name"] == times
        assert error(found, fmoe.value_and_grad(lambda w, x: fn(w, x).sum())(w, x)) < 1e-6


# ---- what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((torch.ones(1), "top_k"), "name: got 'top_k', expected names of ['all_gather',"),
        ((torch.ones(1), "dispach"), "Write 'dispatch', or choose a name that is less like it."),
        ((torch.ones(1), ""), "name: got '', expected names of"),
        ((torch.ones(1), 3), "name: got 3, expected names of"),
        ((torch.ones(1), ["up"]), "name: got ['up'], expected names of"),
        ((torch.ones(1), ["up"]), "Give each name as an argument of its own."),
        (("up", torch.ones(1)), "name: got a tensor, expected names of"),
        (([1.0], "up"), "x: got a float, expected tensors, or trees of them."),
    ],
)
def test_errors(args, text):
    with pytest.raises(ValueError, match=r"^checkpoint_name: .*" + re.escape(text)):
        fmoe.checkpoint_name(*args)


def test_a_named_value_that_is_written_into_raises():
    def fn(x):
        y = fmoe.checkpoint_name(x.sin(), "y")
        return y.cos() + y.add_(1)

    text = "remat: fn: got a function that writes into what the policy keeps as 'y', expected"
    with pytest.raises(ValueError, match=re.escape(text)):
        fmoe.remat(fn, fmoe.save("y"))(torch.ones(3))
    assert fmoe.remat(fn, fmoe.save("x"))(torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_names_that_change_from_run_to_run_raise(names):
    left = [*names]

    def fn(x):
        return fmoe.checkpoint_name(x.sin(), left.pop()).cos().sum()

    text = f"calls checkpoint_name of {names[0]!r} where checkpoint_name of {names[1]!r} was called first"
    with pytest.raises(ValueError, match=re.escape(text)):
        fmoe.value_and_grad(fmoe.remat(fn, fmoe.save("a", "b")))(torch.ones(3))
