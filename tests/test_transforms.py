"""remat and its policies, value_and_grad."""

import dataclasses
import functools
import re
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import optree
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import (
    CONFIGS,
    ORACLE_TRANSFORMS,
    TRANSFORMS,
    Example,
    error,
    fresh_seed,
    random_layer,
    remats,
    squared,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import MODELS
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import grad, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef

import fmoe
from fmoe.errors import TransformError
from fmoe.introspect import kept_bytes, raw_calls, saved_bytes
from fmoe.models import decoder
from fmoe.ops.bases import gather, scatter_add
from fmoe.ops.core.tape import checkpoint_names
from fmoe.ops.reference import moe_reference
from fmoe.transforms import save_declared

pytestmark = pytest.mark.usefixtures("device")

CONFIG = CONFIGS["sigmoid, groups"]


def layer(p, x):
    return fmoe.moe_forward(p, x, router=CONFIG)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_remat_under_every_transform_equals_the_oracle(transform, slow):
    """One remat or, with ``--slow``, all; each meets several transforms."""
    example = Example(random_layer(), torch.randn(7, 6, dtype=torch.float64))
    expected = ORACLE_TRANSFORMS[transform](squared(lambda p, x: moe_reference(p, x, CONFIG)), example)
    cases, place = [*remats(layer).items()], [*TRANSFORMS].index(transform)
    for name, fn in cases if slow else [cases[place % len(cases)]]:
        got = TRANSFORMS[transform](squared(fn), example)
        assert error(got, expected) < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("differentiate", [fmoe.value_and_grad, torch.func.grad_and_value])
def test_remat_changes_no_bit(dtype, differentiate):
    params = random_layer(dim=16, hidden=8, scale=12.0, dtype=dtype)
    x = torch.randn(33, 16).to(dtype)

    def run(fn):
        return differentiate(lambda p, x: fn(p, x).float().pow(2).sum(), (0, 1))(params, x)

    plain = run(layer)
    for name, fn in remats(layer).items():
        assert all(map(torch.equal, optree.tree_leaves(run(fn)), optree.tree_leaves(plain))), name


# How often topk and layout run again: once for each remat around them that doesn't keep them.
NESTED_RERUNS = {"nested, outer keeps": [1, 1], "nested, inner keeps": [2, 1], "nested thrice": [1, 2]}


@pytest.mark.parametrize(
    ("differentiate", "compiled"),
    [(fmoe.value_and_grad, False), (torch.func.grad_and_value, False), (fmoe.value_and_grad, True)],
)
def test_what_a_policy_keeps_runs_once(differentiate, compiled, slow):
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    kernels = {
        "topk": "topk",
        "layout": "dispatch",
        "experts_up": "experts_grouped_mm",  # experts_down isn't replayed when compiled: nobody needs it
        "product": "router",
    }

    cases = remats(layer)
    if compiled and not slow:
        cases = {name: cases[name] for name in ("declared", "names")}
    for name, fn in cases.items():
        if compiled:
            torch._dynamo.reset()
            fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
        step = differentiate(lambda p, x, fn=fn: fn(p, x).sum(), (0, 1))
        step(params, x)
        with raw_calls() as plain:
            differentiate(lambda p, x: layer(p, x).sum(), (0, 1))(params, x)
        with raw_calls() as counts:
            step(params, x)
        kept = {
            "declared": {"topk", "dispatch"},
            "nothing": set(),
            "everything": set(checkpoint_names()),
            "names": {"topk", "experts_grouped_mm"},
            "callable": {"topk"},
        }.get(name)
        if name.startswith("nested") and not compiled:
            assert [counts[k] - plain[k] for k in ("topk", "layout")] == NESTED_RERUNS[name], name
        if kept is not None:
            again = {k for k, label in kernels.items() if counts[k] > plain[k]}
            expected = {k for k, label in kernels.items() if label not in kept}
            assert again == expected, name


def test_a_policy_keeps_the_bytes_its_declarations_predict():
    params, x = random_layer(dtype=torch.float32), torch.randn(7, 6)
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    pairs, experts = 7 * 3, 8
    topk, dispatch, hidden = 8 * pairs, (8 + 8) * pairs + 4 * experts, 4 * pairs * 2 * 5
    by_hand = {
        fmoe.save_nothing: 0,
        fmoe.save("topk"): topk,
        None: topk + dispatch,
        fmoe.save("experts_grouped_mm"): hidden + 4 * 7 * 6,
    }
    for policy, size in by_hand.items():
        assert kept_bytes(fmoe.remat(layer, policy), params, x) == size
        assert sum(saved_bytes(layer, params, x, policy=policy).values()) == size
    for policy in (fmoe.save_everything, fmoe.save("router", "dispatch"), lambda name: "o" in name):
        predicted = sum(saved_bytes(layer, params, x, policy=policy).values())
        assert kept_bytes(fmoe.remat(layer, policy), params, x) == predicted > 0


# ---- what may go in and come out -----------------------------------------------------------------


class Pair(NamedTuple):
    a: torch.Tensor
    b: tuple


def test_pytrees_statics_and_unused_arguments():
    def fn(tree, unused, power, *, label, ids):
        assert label == "here"
        return {"out": Pair(tree["w"] ** power, ()), "ids": ids + 1, "n": 3, "none": None}

    tree, ids = {"w": torch.randn(3, dtype=torch.float64)}, torch.arange(3)

    def loss(fn):
        def call(tree, unused):
            out = fn(tree, unused, 2, label="here", ids=ids)
            assert out["n"] == 3 and out["none"] is None and out["out"].b == ()
            return (out["out"].a * out["ids"]).sum()

        return call

    args = tree, torch.ones(2, dtype=torch.float64)
    assert error(grad(loss(fmoe.remat(fn)), (0, 1))(*args), grad(loss(fn), (0, 1))(*args)) == 0
    assert error(*(fmoe.value_and_grad(loss(f), (0, 1))(*args) for f in (fmoe.remat(fn), fn))) == 0


def test_an_argument_returned_as_it_came():
    fn = fmoe.remat(lambda x, y: (x, y.sin(), x))
    x, y = (torch.randn(3, dtype=torch.float64) for _ in range(2))

    def loss(fn):
        def call(x, y):
            a, b, c = fn(x, y)
            return (a * b * c).sum()

        return call

    expected = grad(loss(lambda x, y: (x, y.sin(), x)), (0, 1))(x, y)
    assert error(grad(loss(fn), (0, 1))(x, y), expected) < 1e-14
    assert error(fmoe.value_and_grad(loss(fn), (0, 1))(x, y)[1], expected) < 1e-14


def test_random_numbers_are_drawn_again_as_they_were():
    def noisy(x):
        return torch.nn.functional.dropout(x, 0.5) * torch.rand_like(x)

    x = torch.randn(64, dtype=torch.float64)
    for differentiate in (fmoe.value_and_grad, torch.func.grad_and_value):
        results = []
        for fn in (noisy, fmoe.remat(noisy)):
            torch.manual_seed(7)
            first = differentiate(lambda x, fn=fn: (fn(x) * fn(x)).sum())(x)
            results.append((first, torch.rand(3)))  # and the generator goes on where it would
        assert error(*results) == 0


def test_vmap_draws_random_numbers_as_it_is_told():
    noisy = fmoe.remat(lambda x: x * torch.rand_like(x))
    same, each = (vmap(noisy, randomness=r)(torch.ones(3, 5)) for r in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(each[0], each[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(noisy)(torch.ones(3, 5))


def test_words_of_a_command_line_name_policies():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    kept = {}
    for words, policy in {"default": None, "full": fmoe.save_nothing, "save:topk": fmoe.save("topk")}.items():
        kept[words] = []
        for wrapped in (fmoe.transforms.per_layer(words)(layer), fmoe.remat(layer, policy)):
            with raw_calls() as counts:
                fmoe.value_and_grad(lambda p, fn=wrapped: fn(p, x).sum())(params)
            kept[words].append(counts)
        assert kept[words][0] == kept[words][1]
    assert kept["default"][0]["topk"] == 1
    assert kept["full"][0]["topk"] == 2


@pytest.mark.parametrize("words", ["save:topk,dispatch", "default+save:gather", "offload:dispatch"])
def test_words_of_a_command_line_in_compiled_layers(words, aot_eager):
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    compiled = torch.compile(fmoe.transforms.per_layer(words)(layer), fullgraph=True)
    found, expected = (fmoe.value_and_grad(lambda p, f=f: f(p, x).sum())(params) for f in (compiled, layer))
    assert error(found, expected) < 1e-10


def test_create_graph_and_retain_graph():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    results = []
    for fn in (layer, fmoe.remat(layer)):
        leaf = x.clone().requires_grad_()
        y = fn(params, leaf).pow(2).sum()
        first = torch.autograd.grad(y, leaf, retain_graph=True, create_graph=True)[0]
        again = torch.autograd.grad(y, leaf, retain_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), leaf)[0]
        results.append((first, again, second))
    assert error(*results) < 1e-12


def test_transforms_inside_the_region():
    example = Example(random_layer(), torch.randn(7, 6, dtype=torch.float64))

    def inner(p, x):
        g = grad(lambda x: layer(p, x).pow(2).sum())(x)
        t = jvp(lambda x: layer(p, x), (x,), (x,))[1]
        return g + t + vmap(lambda s: layer(p, s * x))(torch.ones(2, dtype=x.dtype)).sum(0)

    for name in ("grad", "vmap(grad) tokens", "jvp(grad)", "grad(grad)"):
        got, expected = (TRANSFORMS[name](squared(fn), example) for fn in (fmoe.remat(inner), inner))
        assert error(got, expected) < 1e-10, name


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_nesting_of_policies_equals_plain(data):
    """Random programs of two layers with remat at random places and policies."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    names = sorted(checkpoint_names())

    def maybe_remat(fn):
        for _ in range(data.draw(st.integers(0, 2))):
            fn = fmoe.remat(fn, fmoe.save(*data.draw(st.sets(st.sampled_from(names)))))
        return fn

    first, second = maybe_remat(layer), maybe_remat(layer)
    whole = maybe_remat(lambda p, x: second(p, torch.tanh(first(p, x))))
    plain = lambda p, x: layer(p, torch.tanh(layer(p, x)))  # noqa: E731
    example = Example(random_layer(), torch.randn(5, 6, dtype=torch.float64))
    transform = TRANSFORMS[data.draw(st.sampled_from(["grad", "vmap(grad) both", "grad(grad)", "jvp(grad)"]))]
    got, expected = (transform(squared(fn), example) for fn in (whole, plain))
    assert error(got, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modes_of_the_forward_hold_when_it_runs_again(dtype):
    """Gradients are taken outside autocast, as PyTorch advises."""
    params = random_layer(dim=16, hidden=8, scale=12.0, dtype=torch.float32)
    x, w = torch.randn(33, 16), torch.randn(16, 16)
    device = x.device.type

    def run(wrap):
        def loss(p, x, w):
            with torch.autocast(device, dtype):
                y = wrap(layer)(p, x) + wrap(lambda x, w: torch.nn.functional.linear(x, w).sin())(x, w)
            return y.float().pow(2).sum()

        return fmoe.value_and_grad(loss, (0, 1, 2))(params, x, w)

    assert error(run(lambda f: fmoe.remat(f, fmoe.save_nothing)), run(lambda f: f)) == 0
    devices = []

    def placed(x):
        devices.append(torch.get_default_device())
        return x.sin()

    with torch.device("meta:0"):
        y = fmoe.remat(placed)(x.requires_grad_())
    torch.autograd.grad(y.sum(), x.requires_grad_())
    assert devices == [torch.device("meta:0")] * 2
    x = x.detach()
    enabled = fmoe.remat(lambda x: x.sin() if torch.is_grad_enabled() else x.cos())
    assert error(enabled(x), x.sin()) == 0
    with torch.no_grad():
        assert error(enabled(x), x.cos()) == 0


def test_router_arithmetic_is_float32_under_autocast():
    params, x = random_layer(dim=64, dtype=torch.float32), torch.randn(40, 64)
    with torch.autocast(x.device.type, torch.bfloat16):
        under = fmoe.route(params.router, x, CONFIG)
    assert torch.equal(under.scores_TE, fmoe.route(params.router, x, CONFIG).scores_TE)


def test_complex_values_pass_through_the_region():
    x = torch.randn(4, dtype=torch.float64)

    def loss(fft):
        return lambda x: (fft(x).abs().pow(2) * torch.arange(4)).sum()

    for transform in (grad, lambda f: lambda x: jvp(f, (x,), (x,))[1]):
        assert error(transform(loss(fmoe.remat(torch.fft.fft)))(x), transform(loss(torch.fft.fft))(x)) < 1e-12


@dataclasses.dataclass
class Opaque:
    y: torch.Tensor


def test_containers_that_hide_tensors_are_refused():
    x = torch.randn(3, requires_grad=True)
    text = "remat: fn: got a Opaque that holds tensors, expected containers that optree knows"
    with pytest.raises(ValueError, match=text):
        fmoe.remat(lambda x: Opaque(x.sin()))(x)
    with pytest.raises(ValueError, match=text):
        fmoe.remat(lambda o: o.y.sin())(Opaque(x))


def test_a_function_that_calls_other_operators_the_second_time_is_refused():
    x, i, calls = torch.randn(3, 2), torch.tensor([1, 0]), []

    def fickle(x):
        calls.append(1)
        if len(calls) == 2:
            x = scatter_add(x, torch.tensor([0, 1, 2]), 3)
        return gather(x, i).pow(2).sum()

    text = "calls scatter_add where gather was called first, expected the same operators in the same order"
    with pytest.raises(ValueError, match=text):
        grad(fmoe.remat(fickle, fmoe.save_everything))(x)
    calls.clear()

    def forgetful(x):
        calls.append(1)
        return gather(x, i).pow(2).sum() if len(calls) == 1 else x.sum()

    with pytest.raises(ValueError, match="calls no gather where it was called first"):
        grad(fmoe.remat(forgetful, fmoe.save_everything))(x)


def test_keywords_that_checkpointing_has_too_reach_the_function():
    def fn(x, *, early_stop=None, use_reentrant=0):
        return x * (2 if early_stop is None else 3) + use_reentrant

    x = torch.ones(2)
    compiled = torch.compile(fmoe.remat(fn), fullgraph=True, backend="aot_eager")
    for call in (fmoe.remat(fn), compiled):
        assert call(x, early_stop=False, use_reentrant=1).tolist() == [4.0, 4.0]


@pytest.mark.parametrize("fn", [layer, lambda p, x: fmoe.remat(torch.sin)(x)], ids=["operator", "remat"])
def test_forward_mode_without_torch_func_is_refused(fn):
    params, x = random_layer(), torch.randn(5, 6, dtype=torch.float64)
    text = r": cannot run under torch.autograd.forward_ad or torch.func.linearize. Use torch.func.jvp."
    with forward_ad.dual_level(), pytest.raises(TransformError, match=text):
        fn(params, forward_ad.make_dual(x, x))


def test_a_pullback_called_later_depends_on_what_it_should():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    results = []
    for fn in (layer, fmoe.remat(layer)):
        assert not torch.func.vjp(lambda x, fn=fn: fn(params, x), x)[1](x)[0].requires_grad
        leaves, treedef = optree.tree_flatten(params)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        inside = optree.tree_unflatten(treedef, leaves)
        pulled = torch.func.vjp(lambda x, fn=fn, p=inside: fn(p, x), x)[1](x)[0]
        results.append(torch.autograd.grad(pulled.pow(2).sum(), leaves, materialize_grads=True))
    assert error(*results) < 1e-10


# ---- saved-tensor hooks --------------------------------------------------------------------------


def torch_checkpoint(fn):
    return lambda *args: torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False)


BESIDE_HOOKS = {
    "plain": layer,
    "declared": fmoe.remat(layer),
    "nested": fmoe.remat(fmoe.remat(layer, fmoe.save_nothing), fmoe.save("topk")),
    "checkpoint inside": fmoe.remat(torch_checkpoint(layer)),
    "checkpoint outside": torch_checkpoint(fmoe.remat(layer)),
    "checkpoint between": fmoe.remat(torch_checkpoint(fmoe.remat(layer)), fmoe.save("topk")),
}


def two_hooks():
    stack = ExitStack()
    stack.enter_context(save_on_cpu())
    stack.enter_context(saved_tensors_hooks(torch.clone, torch.clone))
    return stack


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (nullcontext, save_on_cpu),
        (save_on_cpu, nullcontext),
        (save_on_cpu, save_on_cpu),
        (two_hooks, two_hooks),
    ],
    ids=["around the backward", "around the forward", "around both", "nested"],
)
def test_remat_beside_saved_tensor_hooks(forward, backward):
    """Gradients and gradients of gradients, with random numbers, and batched by ``vmap``."""
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    leaves, treedef = optree.tree_flatten((params, x))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    args, seed = optree.tree_unflatten(treedef, leaves), torch.randint(2**31, ()).item()

    def gradients(around, again):
        torch.manual_seed(seed)
        with again():
            y = around(*args).pow(2).sum()
        with backward():
            first = torch.autograd.grad(y, leaves, create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, materialize_grads=True)
        return y.detach(), first, second

    noisy = lambda p, x: torch.nn.functional.dropout(layer(p, x), 0.5)  # noqa: E731
    expected, drawn = gradients(layer, nullcontext), gradients(noisy, nullcontext)
    for name, fn in BESIDE_HOOKS.items():
        assert error(gradients(fn, forward), expected) < 1e-10, name
    assert error(gradients(fmoe.remat(torch_checkpoint(noisy)), forward), drawn) < 1e-10
    batched = gradients(lambda p, x: vmap(lambda s: layer(p, s * x))(x[0]), nullcontext)
    assert (
        error(gradients(lambda p, x: vmap(lambda s: fmoe.remat(layer)(p, s * x))(x[0]), forward), batched)
        < 1e-10
    )


@pytest.mark.parametrize("policy", [None, fmoe.save_nothing, fmoe.save_everything])
def test_hooks_see_what_the_policy_keeps_and_free_it(policy):
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves((params, x))]
    fn, own = fmoe.remat(layer, policy), {leaf.untyped_storage().data_ptr() for leaf in leaves}
    packed = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            packed.append((StorageWeakRef(t.untyped_storage()), t.nbytes))
        return t.clone()

    with saved_tensors_hooks(pack, torch.clone):
        y = fn(params, x)
    assert sum(size for _, size in packed) == sum(saved_bytes(layer, params, x, policy=policy).values())
    assert all(storage.expired() for storage, _ in packed)
    counts = []
    for hooks in (nullcontext, save_on_cpu):
        with hooks(), raw_calls() as count:
            torch.autograd.grad(y.sum(), leaves, retain_graph=True, allow_unused=True)
        counts.append(count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_value_and_grad_within_a_transform_is_refused(transform):
    with pytest.raises(TransformError, match=r"value_and_grad: got .* Use torch\.func\.grad_and_value"):
        transform(lambda x: fmoe.value_and_grad(torch.sum)(x)[0])(torch.ones(3))


def test_hooks_beneath_torch_func_are_refused():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    fn = fmoe.remat(torch_checkpoint(layer))
    text = "remat: got saved-tensor hooks .* beneath a torch.func transform, expected none, .* Differentiate"
    with pytest.raises(TransformError, match=text):
        grad(lambda x: fn(params, x).sum())(x)
    y = vmap(lambda x: fn(params, x))(x.requires_grad_()[None])
    text = "remat: got a tensor of a torch.vmap that has ended, expected none.* use fmoe.remat instead of it"
    with pytest.raises(TransformError, match=text):
        torch.autograd.grad(y.sum(), x)


# ---- captured tensors ----------------------------------------------------------------------------


CAPTURED = "remat: fn: got a function that uses a differentiable tensor from outside"


def use_natively(w, x):
    return (x * w.sum()).sum()


def use_in_an_operator(w, x):
    return fmoe.experts_grouped_mm(*w, *x).sum()


def test_captured_tensors_raise():
    w, x = torch.randn(3), torch.randn(3)

    def loss(w):
        return fmoe.remat(lambda x: x * w)(x).sum()

    with pytest.raises(ValueError, match=CAPTURED):
        grad(loss)(w)
    with pytest.raises(ValueError, match=CAPTURED):
        vmap(grad(loss))(torch.randn(2, 3))
    with pytest.raises(ValueError, match=CAPTURED):
        jvp(loss, (w,), (w,))
    with pytest.raises(ValueError, match=CAPTURED):
        loss(w.requires_grad_())
    with pytest.raises(ValueError, match=CAPTURED):
        loss(w * 2)  # not a leaf
    assert loss(w.detach()).shape == ()  # constants may be captured
    with torch.no_grad():
        assert loss(w).shape == ()
    assert fmoe.remat(lambda x: x * w.detach())(x).shape == (3,)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match=CAPTURED):
            fmoe.remat(lambda x: x * dual)(x)


def test_captured_tensors_that_are_only_returned_raise():
    w, x = torch.randn(3, requires_grad=True), torch.randn(3)
    fn = fmoe.remat(lambda x: (x.sin(), w))
    with pytest.raises(ValueError, match=CAPTURED + " in its result"):
        fn(x)
    assert w.is_leaf
    with pytest.raises(ValueError, match=CAPTURED):
        grad(lambda w: fmoe.remat(lambda x: (x, w))(x)[1].sum())(w.detach())


def test_captured_tensors_used_only_by_operators_raise():
    params, x = random_layer(), torch.randn(5, 6, dtype=torch.float64)
    x_SD, plan = fmoe.dispatch(x, fmoe.route(params.router, x, CONFIG))

    def loss(experts):
        return fmoe.remat(lambda x: fmoe.experts_grouped_mm(experts, x, plan))(x_SD).sum()

    with pytest.raises(ValueError, match=CAPTURED):
        grad(loss)(params.experts)


# ---- policies --------------------------------------------------------------------------------------


def test_declared_names_and_defaults():
    names = checkpoint_names()
    assert names["topk"] and names["dispatch"] and names["combine"]
    assert not (names["experts_grouped_mm"] or names["gather"] or names["grouped_mm"])


@pytest.mark.parametrize(
    ("policy", "got"),
    [
        ("topk", "'topk'"),
        (["topk"], "['topk']"),
        (fmoe.save, "save itself"),
        (fmoe.save("topk") | fmoe.offload, "offload itself"),
        ((), "()"),
    ],
)
def test_what_is_no_policy_raises(policy, got):
    text = f"remat: policy: got {got}, expected a function of an operator's checkpoint name, or None."
    with pytest.raises(ValueError, match=re.escape(text)):
        fmoe.remat(layer, policy)


def test_unknown_names_raise():
    with pytest.raises(
        ValueError, match=re.escape("save: names: got 'dispach', expected names of ['all_gather',")
    ):
        fmoe.save("dispach")
    with pytest.raises(ValueError, match=re.escape("save: names: got ['topk'], expected names of ['all_ga")):
        fmoe.save(["topk"])


def test_policies_join_policies_alone():
    assert (fmoe.save("a") | save_declared)("topk") and (save_declared | fmoe.save("a"))("topk")
    for join in (lambda: fmoe.save("a") | "b", lambda: None | fmoe.offload("a")):
        with pytest.raises(TypeError, match="unsupported operand type"):
            join()


# ---- value_and_grad --------------------------------------------------------------------------------


def test_value_and_grad_mirrors_its_arguments():
    tree = {"a": torch.tensor([1.0, 2.0]), "b": (torch.tensor(3.0), ())}
    x = torch.tensor([4.0, 5.0])

    def fn(t, x, *, k):
        return (t["a"] * x).sum() * k, {"aux": t["a"] * 2, "n": 1}

    (value, aux), (g_t, g_x) = fmoe.value_and_grad(fn, (0, 1), has_aux=True)(tree, x, k=2.0)
    assert value == 28
    assert aux["n"] == 1 and torch.equal(aux["aux"], torch.tensor([2.0, 4.0]))
    assert not (value.requires_grad or aux["aux"].requires_grad)
    assert error((g_t, g_x), ({"a": x * 2, "b": (torch.tensor(0.0), ())}, torch.tensor([2.0, 4.0]))) == 0
    constant = fmoe.value_and_grad(lambda x: torch.tensor(3.0))(x)
    assert error(constant, (torch.tensor(3.0), torch.zeros(2))) == 0
    with torch.no_grad():
        assert error(fmoe.value_and_grad(fn, 1, has_aux=True)(tree, x, k=1.0)[1], tree["a"]) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: fmoe.value_and_grad(lambda x: x)(torch.ones(2)),
            "fn: got a value of shape (2,), expected a scalar",
        ),
        (
            lambda: fmoe.value_and_grad(lambda x: 3.0)(torch.ones(2)),
            "fn: got <class 'float'>, expected a scalar",
        ),
        (
            lambda: fmoe.value_and_grad(lambda x: x.sum(), has_aux=True)(torch.ones(2)),
            "fn: got <class 'torch.Tensor'>, expected (a scalar tensor, aux)",
        ),
        (
            lambda: fmoe.value_and_grad(lambda x: x.sum(), 1)(torch.ones(2)),
            "argnums: got 1, expected positions among the 1 positional arguments.",
        ),
        (lambda: fmoe.value_and_grad(sum)([1.0]), "args.0.0: got float, expected a tensor"),
        (
            lambda: fmoe.value_and_grad(lambda x: x["i"].sum())({"i": torch.ones(2, dtype=torch.int64)}),
            "args.0.i: got torch.int64, expected a floating dtype. Leave it out of argnums.",
        ),
    ],
)
def test_value_and_grad_errors(call, text):
    with pytest.raises(ValueError, match=re.escape("value_and_grad: " + text)):
        call()


# ---- compiled layers -----------------------------------------------------------------------------------


def _sine(x, w):
    return (x @ w).sin()


def _model():
    """A function of a model's parameters, of which two layers are alike, and an example of them."""
    config, seed = MODELS["GQA"], fresh_seed()
    params = decoder.init(config, seed, dtype=torch.float64)
    tokens = torch.randint(config.vocab_size, (2, 6))

    def loss(wrap):
        return lambda *leaves: decoder.loss(
            optree.tree_unflatten(optree.tree_structure(params), leaves),
            tokens,
            tokens,
            config,
            per_layer=wrap,
        )[0]

    return loss, optree.tree_leaves(params)


@pytest.mark.parametrize("words", ["save:experts_grouped_mm", "default+save:attention"])
def test_compiled_layers_keep_values_by_the_words_of_a_command_line(words):
    function, leaves = _model()
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    wrappers = fmoe.transforms.per_layer(words, compiled=True), lambda layer: layer
    made = [function(wrap)(*leaves) for wrap in wrappers]
    got, want = (torch.autograd.grad(out.square().sum(), leaves, allow_unused=True) for out in made)
    assert error(got, want, unit=1e-2) < 1e-10


def test_inductors_key_says_what_a_compiled_backward_may_write_into(monkeypatch):
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx  # which takes seconds
    from torch._inductor.utils import get_donated_idxs

    keys = []

    def compile_nothing(graph, inputs, *, is_backward=False, **options):
        if is_backward:
            keys.append((torch.compiler.config.cache_key_tag, get_donated_idxs()))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_nothing)
    leaves = [leaf.requires_grad_() for leaf in torch.randn(2, 3, 3, dtype=torch.float64).unbind()]
    expected = torch.autograd.grad(_sine(*leaves).sum(), leaves)
    with torch._functorch.config.patch(enable_autograd_cache=False):  # it may hold all of this
        for retained in (False, True):
            torch.compiler.reset()
            for _ in range(2):  # a wrapper made anew compiles nothing anew
                compiled = fmoe.transforms.per_layer(compiled=True)(_sine)
                got = torch.autograd.grad(compiled(*leaves).sum(), leaves, retain_graph=retained)
                assert error(got, expected) < 1e-12
    (once, donated), (again, none) = keys
    assert donated and not none
    assert once != again
    assert torch.compiler.config.cache_key_tag not in (once, again)


@pytest.mark.slow
@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize("what", ["product", "model"])
def test_a_second_backward_of_what_is_compiled_is_right_whatever_the_cache_holds(
    what, donated, tmp_path, monkeypatch
):
    """The cache holds the same backward for one run, which may write into what the forward kept."""
    if what == "model":
        function, leaves = _model()
    else:
        function, leaves = (lambda wrap: wrap(_sine)), torch.randn(2, 32, 32, dtype=torch.float64).unbind()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = function(fmoe.transforms.per_layer(compiled=True))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    like = function(lambda layer: layer)(*leaves)
    cotangent = torch.randn_like(like)
    backward = functools.partial(
        torch.autograd.grad, inputs=leaves, grad_outputs=cotangent, allow_unused=True
    )
    expected = backward(like)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compiler.reset()
        assert error(backward(compiled(*leaves)), expected) < 1e-12
        torch.compiler.reset()
        with torch._functorch.config.patch(donated_buffer=donated):
            out = compiled(*leaves)
            for _ in range(2):
                assert error(backward(out, retain_graph=True), expected) < 1e-12


def test_a_backward_of_value_and_grad_stays_in_its_thread():
    seen = []

    def loss(x):
        y = x * x
        y.register_hook(lambda g: seen.append(torch._C._is_multithreading_enabled()))
        return y.sum()

    fmoe.value_and_grad(loss)(torch.randn(3))
    assert seen == [False] and torch._C._is_multithreading_enabled()
