"""Values that are kept in fp8: how far gradients are off, what is rounded and how often, and what isn't.

``test_offload.py`` has the laws of transforms, with numbers that are scaled and not rounded.
"""

import re

import pytest
import torch
from helpers import CONFIGS, Example, error, random_layer
from torch.func import grad, hessian, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef

import fmoe
from fmoe.introspect import kept_bytes, raw_calls, saved_residuals
from fmoe.ops.attention import attention
from fmoe.ops.core.compress import compress, restore
from fmoe.ops.kernels import scaled
from fmoe.ops.precision import Scaled
from fmoe.testing.samples import same_bits
from fmoe.transforms import per_layer

pytestmark = pytest.mark.usefixtures("device")

ROUNDED = [torch.bfloat16, torch.float16, torch.float32]
HIDDEN = fmoe.compress("hidden")


def own(x):
    """A function whose gradient is the value that is kept."""
    kept = fmoe.checkpoint_name(x * 1, "hidden")
    return (kept * kept.detach()).float()


def rows_of(dtype, *shape):
    """Rows of very different sizes, with a large number in some."""
    x = torch.randn(*shape) * 10.0 ** torch.randint(-4, 1, (*shape[:-1], 1))
    x[..., ::3, 0] *= 1000
    return x.to(dtype)


def rounded(x):
    return restore(*compress(x), x.dtype)


# ---- how far it is off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_gradient_is_off_by_no_more_than_rounding_explains(dtype):
    """A sixteenth of each number, or 2^-10 of the scale that makes its row's largest 448; then its dtype."""
    x = rows_of(dtype, 3, 40, 33)
    scale = x.abs().amax(-1, keepdim=True).double() / 448
    most = torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * scale)
    most += torch.finfo(dtype).eps * (x.double().abs() + torch.finfo(dtype).smallest_normal)
    loss = lambda policy: lambda x: fmoe.remat(own, policy)(x).sum()  # noqa: E731
    for differentiate in (fmoe.value_and_grad, torch.func.grad_and_value):
        value, g = sorted(differentiate(loss(HIDDEN))(x), key=torch.Tensor.dim)
        assert torch.equal(value, own(x).sum())
        off = (g.double() - x.double()).abs()
        assert (off <= most).all()
        assert (off > 2.0**-5 * x.abs()).float().mean() > 0.1  # so it was rounded
        assert torch.equal(g, rounded(x))


def straight_through(x):
    """The value that the backward gets, with the derivative of the exact one."""
    return x + (rounded(x) - x).detach()


FIRST_AND_SECOND = {
    "grad": lambda f, e: grad(f, (0, 1))(e.p, e.x),
    "autograd": lambda f, e: fmoe.value_and_grad(f, (0, 1))(e.p, e.x)[1],
    "vmap(grad)": lambda f, e: vmap(grad(f, (0, 1)), (None, 0))(e.p, e.X),
    "grad(vmap)": lambda f, e: grad(lambda p: vmap(f, (None, 0))(p, e.X).sum())(e.p),
    "grad(grad)": lambda f, e: grad(lambda p: sum(g.sin().sum() for g in grad(f, (0, 1))(p, e.x)))(e.p),
    "jvp": lambda f, e: jvp(f, (e.p, e.x), (e.tp, e.tx))[1],
    "hessian": lambda f, e: hessian(f, 1)(e.p, e.x),
}


@pytest.mark.parametrize("transform", FIRST_AND_SECOND)
def test_derivatives_are_those_at_the_rounded_value(transform):
    example = Example(torch.randn(4, 16), torch.randn(5, 4))
    weights = torch.randn(5, 16)

    def fn(name):
        return lambda w, x: name((x @ w).sin()).exp().cos() * name((2 * x) @ w)

    kept = fn(lambda x: fmoe.checkpoint_name(x, "hidden"))
    expected = FIRST_AND_SECOND[transform](lambda w, x: (fn(straight_through)(w, x) * weights).sum(), example)
    nested = fmoe.remat(fmoe.remat(kept, HIDDEN), HIDDEN)
    for call in (fmoe.remat(kept, HIDDEN), nested, fmoe.remat(kept, HIDDEN | fmoe.offload("hidden"))):
        found = FIRST_AND_SECOND[transform](lambda w, x, f=call: (f(w, x) * weights).sum(), example)
        assert error(found, expected) < 1e-5
    exact = FIRST_AND_SECOND[transform](lambda w, x: (kept(w, x) * weights).sum(), example)
    assert error(expected, exact) > 1e-3


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_rounding_again_changes_nothing(dtype):
    kept = compress(torch.randn(500, 33).to(dtype))
    again = compress(restore(*kept, dtype))
    assert torch.equal(kept.values.float(), again.values.float()) and torch.equal(kept.scale, again.scale)


def test_rows_that_are_not_finite_stay_so_and_keep_to_themselves():
    x = torch.ones(6, 8)
    x[1, 3], x[2, 4], x[3], x[4, 5] = torch.nan, torch.inf, 0, torch.finfo(x.dtype).max
    g = grad(lambda x: fmoe.remat(own, HIDDEN)(x).sum())(x)
    assert g[1].isnan().all() and g[2, 4] == torch.inf and not g[2].isfinite().any()
    assert torch.equal(g[3], x[3]) and g[4, 5] == x[4, 5]
    assert torch.equal(g[[0, 5]], x[[0, 5]])
    used = grad(lambda x: fmoe.remat(lambda x: own(x)[[0, 3, 5]].sum(), HIDDEN)(x))(x)
    assert used[[0, 3, 5]].isfinite().all()  # beside rows that nobody defined


# ---- what is rounded ---------------------------------------------------------------------------------------


def kept_as(fn, *args, policy=HIDDEN):
    return [
        (row.how, row.dtype, row.bytes)
        for row in saved_residuals(fmoe.remat(fn, policy), *args)
        if row.how.startswith("kept")
    ]


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24).view(2, 12),
        torch.randn(2, 12, dtype=torch.float64),
        torch.randn(2, 12, dtype=torch.complex64),
        torch.randn(24),
        torch.randn(()),
        torch.randn(6, 4).bfloat16(),  # no fewer bytes in fp8
        torch.randn(6, 1),
        torch.randn(0, 12),
        torch.randn(12, 0),
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_other_values_are_kept_as_they_are(x):
    def fn(w, x):
        return (fmoe.checkpoint_name(x * w.to(x.dtype), "hidden") * w.to(x.dtype)).sum().abs().double()

    w, found = torch.randn((), dtype=torch.float64), []
    x = x.to(w.device)
    for policy in (HIDDEN, fmoe.save("hidden")):
        found.append((grad(fmoe.remat(fn, policy))(w, x), kept_as(fn, w, x, policy=policy)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert {how for how, *_ in found[0][1]} == {"kept"}


def test_a_rounded_value_leaves_the_exact_one_to_be_freed():
    left = []

    def fn(w, x):
        up = fmoe.checkpoint_name(x @ w, "hidden")
        left.append(StorageWeakRef(up.untyped_storage()))
        return up.sin().cos()

    w, x = torch.randn(4, 16, requires_grad=True), torch.randn(3, 4)
    y = fmoe.remat(fn, HIDDEN)(w, x)
    assert left[0].expired() and kept_bytes(fmoe.remat(fn, HIDDEN), w, x) == 3 * 16 + 4 * 3
    first, second = (torch.autograd.grad(y.sum(), w, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_value_of_two_names_is_rounded_once_and_not_if_one_of_them_saves_it():
    def fn(x):
        return fmoe.checkpoint_name(fmoe.checkpoint_name(x.sin(), "a"), "b").square().sum()

    x = torch.randn(3, 16)
    both, exact = fmoe.compress("a", "b"), grad(fn)(x)
    assert [how for how, *_ in kept_as(fn, x, policy=both)] == ["kept in fp8"] * 2  # numbers and scales
    with raw_calls() as counts:
        found = grad(fmoe.remat(fn, both))(x)
    assert counts["compress"] == 1 and torch.equal(found, 2 * rounded(x.sin()) * x.cos())
    for policy in (fmoe.save("a") | fmoe.compress("b"), fmoe.compress("a") | fmoe.save("b")):
        assert [how for how, *_ in kept_as(fn, x, policy=policy)] == ["kept"]
        assert torch.equal(grad(fmoe.remat(fn, policy))(x), exact)


def test_nothing_is_rounded_where_nothing_is_differentiated():
    x = torch.randn(3, 16, requires_grad=True)
    for mode, times in ((torch.no_grad, 0), (torch.inference_mode, 0), (torch.enable_grad, 1)):
        with mode(), raw_calls() as counts:
            y = fmoe.remat(fmoe.remat(own, HIDDEN), HIDDEN)(x)
        assert counts.get("compress", 0) == times and torch.equal(y, own(x))


def test_views_and_values_that_share_memory(monkeypatch):
    """They come back with their strides, which later operations may need."""
    rows = scaled.rows
    like_the_kernel = lambda x: Scaled(*(t.contiguous() for t in rows(x)))  # noqa: E731
    monkeypatch.setattr(scaled, "rows", like_the_kernel)

    def fn(x):
        y = fmoe.checkpoint_name((x * 1).mT, "hidden")  # two views of one product
        z = fmoe.checkpoint_name(y[:, :8], "hidden")
        flat = y.mT.view(-1)
        return (flat.square().sum() + (z * z.detach()).sum()) / 2

    x = torch.randn(16, 8)
    found = grad(fmoe.remat(fn, HIDDEN))(x)
    first, second = rounded(x.mT), rounded(x.mT[:, :8])
    expected = first.clone()
    expected[:, :8] += second / 2
    assert error(found, expected.mT) < 1e-6


def test_what_attention_gives_for_its_backward_alone_is_exact():
    """The logarithms of its sums: it takes their exponentials."""
    q, k, v = (torch.randn(2, 32, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    fn, policy = lambda q, k, v: attention(q, k, v, 0.5), fmoe.compress("attention")
    kept = kept_as(fn, q, k, v, policy=policy)
    assert set(kept) == {
        ("kept", torch.float32, 4 * 2 * 4 * 32),
        ("kept in fp8", torch.float32, 4 * 2 * 4 * 32),
        ("kept in fp8", torch.float8_e4m3fn, 2 * 4 * 32 * 16),
    }
    g_v = lambda fn: grad(lambda v: (fn(q, k, v) * q).float().sum())(v)  # noqa: E731
    assert torch.equal(g_v(fmoe.remat(fn, policy)), g_v(fn))  # the transpose of what these exponentials are


def test_experts_are_not_chosen_again_from_rounded_numbers():
    """Else some tokens' gradients would be those of other experts."""
    params, x = random_layer(dtype=torch.float32), torch.randn(2000, 6)

    def experts(params, x):
        return fmoe.moe_forward(params, x, router=CONFIGS["sigmoid, groups"])

    def layer(params, x, experts=experts):
        x = fmoe.checkpoint_name(x.sin(), "hidden")
        return x + experts(params, x)

    def chosen(x):
        return fmoe.route(params.router, x, CONFIGS["sigmoid, groups"]).expert_ids_TK.sort().values

    hidden = x.sin()
    assert not torch.equal(chosen(hidden), chosen(rounded(hidden)))
    loss = lambda fn: lambda p, x: fn(p, x).square().sum()  # noqa: E731
    part = fmoe.remat(fmoe.remat(experts, fmoe.save_nothing), fmoe.save_nothing)
    for fn in (layer, lambda params, x: layer(params, x, part)):
        with raw_calls() as counts:
            found = grad(loss(fmoe.remat(fn, HIDDEN)), (0, 1))(params, x)
        assert counts["topk"] == 1
        assert error(found, grad(loss(layer), (0, 1))(params, x)) < 0.15


@pytest.mark.parametrize("keep", [fmoe.save, fmoe.offload], ids=lambda keep: keep.__name__)
def test_what_a_region_around_keeps_is_exact_there(keep):
    """Or the next layer inside would run again with other tokens, and choose other experts."""
    first, second = (random_layer(dtype=torch.float32) for _ in range(2))
    x, policy = torch.randn(200, 6), fmoe.compress("experts_grouped_mm")
    layer = fmoe.remat(lambda p, x: fmoe.moe_forward(p, x, router=CONFIGS["sigmoid, groups"]), policy)

    def layers(first, second, x):
        x = x + layer(first, x)
        return x + layer(second, x)

    outer = fmoe.remat(layers, keep("experts_grouped_mm"))
    found, expected = (
        grad(lambda *at, f=f: f(*at).square().sum(), (0, 1, 2))(first, second, x) for f in (outer, layers)
    )
    assert same_bits(found, expected) == 0
    assert "kept in fp8" not in {row.how for row in saved_residuals(outer, first, second, x)}


def test_the_policy_as_a_word_of_commands():
    x = torch.randn(6, 12)

    def fn(x):
        return fmoe.checkpoint_name(x.sin(), "gather").square()

    for words, how in (("compress:gather", "kept in fp8"), ("save:gather+compress:gather", "kept")):
        residuals = saved_residuals(per_layer(words)(fn), x)
        assert {row.how for row in residuals if row.how.startswith("kept")} == {how}
    with pytest.raises(ValueError, match="compress: names: got 'hidden', expected names of"):
        per_layer("compress:hidden")


def test_under_torch_compile_it_raises(aot_eager):
    text = "remat: policy: got one that compresses, expected none under torch.compile. Use fmoe.save"
    named = lambda x: fmoe.checkpoint_name(x.sin(), "gather").cos()  # noqa: E731
    for fn in (fmoe.remat(own, HIDDEN), per_layer("default+compress:gather")(named)):
        step = fmoe.value_and_grad(lambda x, f=fn: torch.compile(f)(x).sum())
        with pytest.raises(Exception, match=text):
            step(torch.randn(4, 16))


def test_commands_refuse_it_with_compile_before_they_begin(command, capsys):
    words = "default+compress:gather"
    text = (
        f"per_layer: remat_policy: got {words!r}, compiled, expected none that compresses in compiled layers."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        per_layer(words, compiled=True)
    how = "--model debug --batch-size 1 --seq-len 8 --compile --remat"
    with pytest.raises(SystemExit):
        command("plan", *how.split(), words)
    assert text in " ".join(capsys.readouterr().err.split())


def test_writing_into_a_value_that_is_kept_raises():
    def fn(x):
        y = fmoe.checkpoint_name(x.sin(), "hidden")
        return y.cos() + y.add_(1)

    with pytest.raises(ValueError, match="writes into what the policy keeps as 'hidden'"):
        fmoe.remat(fn, HIDDEN)(torch.ones(3, 16))
