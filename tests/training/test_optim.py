import itertools
import os
import re
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from helpers import allocated_at_once
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fmoe
from fmoe.models import deepseek_v3
from fmoe.ops import update
from fmoe.params import trained_mask
from fmoe.training.optim import (
    AdamWState,
    adamw,
    clip_by_global_norm,
    clip_factor,
    global_norm,
    trained_by_default,
)
from fmoe.tree import dotted_names


def random_tree(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "layers": [
            {
                "router": fmoe.RouterParams(draw(6, 5), draw(6, dtype=torch.float32)),
                "shared": (),
                "norm": draw(5),
            }
            for _ in range(2)
        ],
        "embed": draw(7, 3, 2),
        "scalar": draw(),
    }


def copied(tree: Any) -> Any:
    return optree.tree_map(torch.clone, tree)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for name, a, e in zip(dotted_names(actual), optree.tree_leaves(actual), optree.tree_leaves(expected)):
        tolerance = tolerance or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, e, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def torch_adamw(params: Any, learning_rate: float, **options: Any) -> tuple[Any, torch.optim.AdamW]:
    params = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
    named = dict(zip(dotted_names(params), optree.tree_leaves(params)))
    moved = [leaf for name, leaf in named.items() if not name.endswith("bias_E")]
    groups = [
        {"params": [p for p in moved if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in moved if p.ndim < 2], "weight_decay": 0.0},
    ]
    return params, torch.optim.AdamW(groups, lr=learning_rate, betas=(0.8, 0.9), eps=1e-7, **options)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("dtype", "fused"),
    [  # Unfused, torch rounds to bfloat16 after every operation; that is another result.
        (torch.float32, True),
        (torch.float32, False),
        (torch.float64, True),
        (torch.float64, False),
        (torch.bfloat16, True),
    ],
)
def test_adamw_equals_torch(dtype: torch.dtype, fused: bool, donate: bool) -> None:
    params = random_tree(0, dtype)
    theirs, reference = torch_adamw(params, 0.05, fused=fused)
    optimizer = adamw(betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    state = optimizer.init(params)
    for i in range(5):
        grads = random_tree(i + 1, dtype)
        for group in reference.param_groups:
            group["lr"] = 0.05 / (i + 1)
        for leaf, grad in zip(optree.tree_leaves(theirs), optree.tree_leaves(grads)):
            leaf.grad = grad.clone()
        reference.step()
        params, state = optimizer.update(params, grads, state, 0.05 / (i + 1), donate=donate)
    tolerance = {} if fused else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(params, optree.tree_map(torch.detach, theirs), **tolerance)
    assert state.step.item() == 5
    assert state.step.dtype == torch.float32


def test_nothing_passed_in_changes() -> None:
    params, grads = random_tree(0), random_tree(1)
    optimizer = adamw()
    _, state = optimizer.update(params, grads, optimizer.init(params), 0.1)
    before = copied((params, grads, state))
    first = optimizer.update(params, grads, state, 0.1)
    assert_same((params, grads, state), before)
    assert_same(optimizer.update(params, grads, state, 0.1), first)
    assert not torch.equal(first[0]["embed"], params["embed"])


def test_donate_reuses_the_memory_of_params_and_state() -> None:
    params, grads = random_tree(0), random_tree(1)
    optimizer = adamw()
    state = optimizer.init(params)
    kept = copied(grads)
    expected = optimizer.update(params, grads, state, 0.1)
    trees = params, state.exp_avg, state.exp_avg_sq
    pointers = [leaf.data_ptr() for leaf in optree.tree_leaves(trees)]
    new, new_state = optimizer.update(params, grads, state, 0.1, donate=True)
    assert_same((new, new_state), expected)
    written = optree.tree_leaves((new, new_state.exp_avg, new_state.exp_avg_sq))
    assert [leaf.data_ptr() for leaf in written] == pointers
    assert_same(grads, kept)


def test_the_selection_bias_is_left_alone() -> None:
    params, grads = random_tree(0), random_tree(1)
    optimizer = adamw()
    state = optimizer.init(params)
    for donate in (False, True):
        new, new_state = optimizer.update(params, grads, state, 0.1, donate=donate)
        for i in range(2):
            assert new["layers"][i]["router"].bias_E is params["layers"][i]["router"].bias_E
            assert new_state.exp_avg["layers"][i]["router"].bias_E.numel() == 0
            assert new_state.exp_avg_sq["layers"][i]["router"].bias_E.numel() == 0


def test_what_is_trained_stands_in_the_specs() -> None:
    specs = deepseek_v3.specs(deepseek_v3.preset("debug"))
    mask = trained_by_default(deepseek_v3.init(deepseek_v3.preset("debug"), 0))
    assert trained_mask(specs) == mask
    untrained = [name for name, moves in zip(dotted_names(mask), optree.tree_leaves(mask)) if not moves]
    assert untrained == [f"layers.{i}.mlp.router.bias_E" for i in (1, 2, 3)]


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("donate", [False, True])
def test_a_mask_says_what_moves(donate: bool, as_function: bool) -> None:
    params, grads = random_tree(0), random_tree(1)
    layer = {"router": fmoe.RouterParams(False, True), "shared": (), "norm": True}
    mask = {"layers": [False, layer], "embed": True, "scalar": False}
    optimizer = adamw(trained=(lambda tree: mask) if as_function else mask)
    everything = adamw(trained=True)
    expected, _ = everything.update(params, grads, everything.init(params), 0.1)
    kept = copied(params)
    state = optimizer.init(params)
    new, new_state = optimizer.update(params, grads, state, 0.1, donate=donate)
    assert_same(new["layers"][0], kept["layers"][0])
    assert_same(new["layers"][1]["router"].weight_ED, kept["layers"][1]["router"].weight_ED)
    assert_same(new["layers"][1]["router"].bias_E, expected["layers"][1]["router"].bias_E)
    assert_same((new["embed"], new["scalar"]), (expected["embed"], kept["scalar"]))
    moments = zip(optree.broadcast_prefix(mask, params), optree.tree_leaves(new_state.exp_avg))
    assert all(bool(moment.numel()) == moves for moves, moment in moments)


def test_what_is_frozen_is_neither_copied_nor_written_to() -> None:
    frozen, shared = torch.randn(2**16), torch.randn(4, 4)
    params = {"frozen": frozen, "head": shared, "embedding": shared}
    optimizer = adamw(trained={"frozen": False, "head": True, "embedding": False})
    state, kept, grads = optimizer.init(params), copied(params), copied(params)
    how = dict(scale=torch.tensor(0.5))
    for donate in (False, True):
        most, (new, _) = allocated_at_once(
            lambda donate=donate: optimizer.update(params, grads, state, 0.1, donate=donate, **how)
        )
        assert most < 4000
        assert new["frozen"] is frozen
        assert_same((params, new["embedding"]), (kept, kept["embedding"]))
        assert not torch.equal(new["head"], kept["head"])


@pytest.mark.parametrize("mask", [{"a": True}, {"a": True, "b": 1}, None, lambda params: [True]])
def test_masks_that_fit_no_params_are_refused(mask: Any) -> None:
    expected = "adamw.init: trained: got .*, expected a tree prefix of bools"
    with pytest.raises(ValueError, match=expected):
        adamw(trained=[mask]).init([{"a": torch.ones(2), "b": torch.ones(3)}])


def test_only_matrices_decay() -> None:
    params = {"matrix": torch.ones(2, 2), "vector": torch.ones(2)}
    optimizer = adamw(weight_decay=0.5)
    zero_grads = optree.tree_map(torch.zeros_like, params)
    new, _ = optimizer.update(params, zero_grads, optimizer.init(params), 0.1)
    assert_same(new, {"matrix": torch.full((2, 2), 0.95), "vector": torch.ones(2)})


@pytest.mark.parametrize("donate", [False, True])
def test_strides_do_not_matter(donate: bool) -> None:
    """The fused CPU kernel pairs numbers by their place in memory, so mixed strides are silently wrong."""
    values, slopes = torch.randn(4, 6), torch.randn(4, 6)
    optimizer = adamw()
    expected, _ = optimizer.update([values], [slopes], optimizer.init([values]), 0.1)
    strided, strided_grad = values.t().contiguous().t(), torch.randn(4, 12)[:, ::2].copy_(slopes)
    actual, _ = optimizer.update([strided], [strided_grad], optimizer.init([strided]), 0.1, donate=donate)
    assert_same(actual, expected)


def test_results_do_not_require_grad() -> None:
    params = [torch.ones(2, requires_grad=True)]
    optimizer = adamw()
    for donate in (False, True):
        new, state = optimizer.update(params, [torch.ones(2)], optimizer.init(params), 0.1, donate=donate)
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves((new, state)))


def test_trees_that_differ_are_refused() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    optimizer = adamw()
    state = optimizer.init(params)
    expected = (
        "adamw.update: grads: got a tree with leaves missing: ['b'], unexpected: ['c'], expected the leaves "
        "and containers of params. Differentiate, and call init on, the params you pass here."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        optimizer.update(params, {"a": torch.ones(2), "c": torch.ones(3)}, state, 0.1)
    with pytest.raises(ValueError, match=r"grads: got a tree with leaves missing: \['b'\]"):
        optimizer.update(params, {"a": torch.ones(2), "b": None}, state, 0.1)
    with pytest.raises(ValueError, match=r"state.exp_avg: got a tree with leaves missing: \['b'\]"):
        optimizer.update(params, params, optimizer.init({"a": torch.ones(2)}), 0.1)
    expected = (
        "adamw.update: grads: got a torch.float64 (2,) cpu; b torch.float32 (4,) cpu, expected "
        "a torch.float32 (2,) cpu; b torch.float32 (3,) cpu. Cast or redistribute first."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        optimizer.update(params, {"a": torch.ones(2).double(), "b": torch.ones(4)}, state, 0.1)
    with pytest.raises(ValueError, match=r"adamw.init: params.a: got float, expected a tensor"):
        optimizer.init({"a": 1.0})
    with pytest.raises(ValueError, match=r"adamw: betas: got \(0.9, 1.0\)"):
        adamw(betas=(0.9, 1.0))


@pytest.mark.parametrize(
    ("rate", "scale", "expected"),
    [
        (
            torch.ones(2),
            None,
            "learning_rate: got torch.float32 of shape (2,), expected a number or a float32",
        ),
        (torch.tensor(1), None, "learning_rate: got torch.int64 of shape (), expected a number or a"),
        ("0.1", None, "learning_rate: got '0.1', expected a number or a float32 scalar tensor."),
        (0.1, 0.5, "scale: got 0.5, expected a float32 scalar tensor."),
        (0.1, torch.tensor(0.5).double(), "scale: got torch.float64 of shape (), expected a float32 scalar"),
    ],
)
def test_what_is_no_rate_or_scale_is_refused(rate, scale, expected) -> None:
    params, optimizer = [torch.ones(2)], adamw()
    with pytest.raises(ValueError, match=re.escape("adamw.update: " + expected)):
        optimizer.update(params, params, optimizer.init(params), rate, scale=scale)


# ---- moments of another dtype ------------------------------------------------------------------------------


def one_update(params: Any, grads: Any, state: AdamWState, rate: float) -> Any:
    """A step of AdamW in float64 with betas 0.8 and 0.9, eps 1e-7 and decay 0.3: params and both moments."""
    t = state.step.item() + 1

    def updated(*row: torch.Tensor) -> Any:
        p, g, m, v = (x.double() for x in row)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-7)
        return p * (1 - rate * (0.3 if p.ndim >= 2 else 0.0)) - rate * step, m, v

    return optree.tree_transpose_map(updated, params, grads, state.exp_avg, state.exp_avg_sq)


BOTH = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("moments", [*BOTH, None])
@pytest.mark.parametrize("dtype", BOTH)
def test_every_step_is_one_of_float64_rounded_once(
    dtype: torch.dtype, moments: torch.dtype | None, donate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "PIECE", 7)  # leaves have 1 to 42 numbers
    half_a_bit = {torch.float32: 2**-22, torch.bfloat16: 1.001 * 2**-8}

    def draw() -> Any:
        return {name: torch.randn(n, dtype=dtype) for name, n in (("a", (6, 7)), ("b", (5,)), ("c", ()))}

    optimizer = adamw(betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3, moments_dtype=moments)
    params = draw()
    state = optimizer.init(params)
    for i in range(4):
        grads = draw()
        kept, expected = copied(grads), one_update(params, grads, state, 0.1 / (i + 1))
        params, state = optimizer.update(params, grads, state, 0.1 / (i + 1), donate=donate)
        assert_same(grads, kept)
        for tree, exact, kind in zip((params, *state[1:]), expected, (dtype, *[moments or dtype] * 2)):
            assert {leaf.dtype for leaf in optree.tree_leaves(tree)} == {kind}
            wide = optree.tree_map(torch.Tensor.double, tree)
            assert_same(wide, exact, rtol=half_a_bit[kind], atol=2e-7)


@pytest.mark.parametrize("dtype", BOTH)
def test_naming_the_dtype_of_the_params_changes_nothing(dtype: torch.dtype) -> None:
    params, grads = random_tree(0, dtype), random_tree(1, dtype)
    implied, named = (
        optimizer.update(params, grads, optimizer.init(params), 0.1)
        for optimizer in (adamw(), adamw(moments_dtype=dtype))
    )
    assert_same(named[0], implied[0])
    assert_same(named[1].exp_avg_sq["embed"], implied[1].exp_avg_sq["embed"])


@pytest.mark.parametrize(("dtype", "moments"), [BOTH, BOTH[::-1]])
def test_what_is_widened_is_a_piece_at_a_time(
    dtype: torch.dtype, moments: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "PIECE", 2**12)
    params, grads = (torch.randn(2**9, 2**9, dtype=dtype) for _ in range(2))
    optimizer = adamw(moments_dtype=moments)
    state = optimizer.init(params)
    expected = optimizer.update(params, grads, state, 0.1)
    pointers = [leaf.data_ptr() for leaf in (params, *state[1:])]
    most, (new, new_state) = allocated_at_once(
        lambda: optimizer.update(params, grads, state, 0.1, donate=True)
    )
    assert most < 2 * 4 * 2**12 + 1000  # two of the four are widened
    assert [leaf.data_ptr() for leaf in (new, *new_state[1:])] == pointers
    assert_same((new, new_state), expected)


def test_moments_of_a_dtype_that_is_not_the_optimisers_are_refused() -> None:
    params = {"w": torch.ones(2)}
    state = adamw().init(params)
    expected = "adamw.update: state.exp_avg: got w torch.float32 (2,) cpu, expected w torch.bfloat16 (2,) cpu"
    with pytest.raises(ValueError, match=re.escape(expected)):
        adamw(moments_dtype=torch.bfloat16).update(params, params, state, 0.1)
    for dtype in (torch.int64, torch.float8_e4m3fn):
        expected = f"adamw: moments_dtype: got {dtype}, expected bfloat16, float32, float64 or None"
        with pytest.raises(ValueError, match=re.escape(expected)):
            adamw(moments_dtype=dtype)


def test_bfloat16_moments_decay_below_the_beta_that_is_documented() -> None:
    """In a step without gradient, every number from one power of two to the next, or not every one."""
    v, zeros = 1 + torch.arange(128) / 128, torch.zeros(128)
    for beta, all_decay in ((0.95, True), (0.996, True), (0.997, False)):
        optimizer = adamw(betas=(0.9, beta), moments_dtype=torch.bfloat16)
        state = optimizer.init(zeros)._replace(exp_avg_sq=v.bfloat16())
        _, state = optimizer.update(zeros, zeros, state, 0.1)
        assert (state.exp_avg_sq < v).all() == all_decay


# ---- norms, clipping ---------------------------------------------------------------------------------------


def test_an_empty_tree() -> None:
    params, state = adamw().update((), (), adamw().init(()), 0.1)
    assert params == ()
    assert state == AdamWState(torch.tensor(1.0), (), ())
    assert global_norm(()).item() == 0.0


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_equals_torch(dtype: torch.dtype, max_norm: float) -> None:
    grads = random_tree(0, dtype)
    before = copied(grads)
    theirs = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in optree.tree_leaves(grads)]
    for parameter, leaf in zip(theirs, optree.tree_leaves(grads)):
        parameter.grad = leaf.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    torch.testing.assert_close(norm, expected.float())
    assert norm.dtype == torch.float32
    assert_same(optree.tree_leaves(clipped), [p.grad for p in theirs], rtol=1e-6, atol=1e-7)
    assert_same(grads, before)


def test_the_norm_of_bfloat16_is_summed_in_float32() -> None:
    grads = [torch.full((1000,), 0.1, dtype=torch.bfloat16) for _ in range(10)]
    exact = torch.cat(grads).double().norm().float()
    torch.testing.assert_close(global_norm(grads), exact, rtol=1e-6, atol=0)
    assert clip_by_global_norm(grads, 1.0)[0][0].dtype == torch.bfloat16


def test_gradients_of_each_example_are_clipped_under_vmap() -> None:
    grads = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 5)}
    clipped, norms = torch.vmap(lambda g: clip_by_global_norm(g, 1.0))(grads)
    for i in range(3):
        expected = clip_by_global_norm(optree.tree_map(lambda g, i=i: g[i], grads), 1.0)
        found = optree.tree_map(lambda g, i=i: g[i], clipped), norms[i]
        assert_same(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moments", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_an_update_scales_gradients_as_it_reads_them(donate, dtype, moments) -> None:
    params, grads = random_tree(0, dtype), random_tree(1, dtype)
    grads["embed"] = grads["embed"].mT.contiguous().mT
    optimizer = adamw(moments_dtype=moments)
    clipped, norm = clip_by_global_norm(grads, 0.5)
    expected = optimizer.update(params, clipped, optimizer.init(params), 0.1)
    before, scale = copied((params, grads)), clip_factor(norm, 0.5)
    found = optimizer.update(params, grads, optimizer.init(params), 0.1, scale=scale, donate=donate)
    assert_same(found, expected, rtol=1e-6 if moments is None else 5e-3, atol=1e-6)
    if not donate:
        assert_same((params, grads), before)


def test_gradients_in_bfloat16_are_scaled_in_float32() -> None:
    """The kernel rounds moments and params; before that neither the factor nor its product is rounded."""
    params, grads = [torch.zeros(4096).bfloat16()], [torch.randn(4096).bfloat16()]
    optimizer, scale = adamw(betas=(0.0, 0.0), eps=1.0, weight_decay=0.0), torch.tensor(1 / 3)
    found, _ = optimizer.update(params, grads, optimizer.init(params), 1.0, scale=scale)

    def off(scaled: torch.Tensor) -> float:
        expected = -scaled.double() / (scaled.double().abs() + 1)
        return ((found[0].double() - expected).abs() / expected.abs()).max().item()

    allowed = 2**-8 * 1.001
    assert off(grads[0].double() / 3) < allowed
    assert off(grads[0] / 3) > allowed < off(grads[0].double() * scale.bfloat16())


@pytest.mark.parametrize("of_one", [False, True])
def test_donated_gradients_are_not_copied(of_one: bool) -> None:
    """Nor are the parts of one flat tensor, as those are that travelled together."""
    optimizer, scale = adamw(), torch.tensor(0.5)
    params = [torch.randn(2**16), torch.randn(2**8, 2**8)]
    grads, state = copied(params), optimizer.init(params)
    if of_one:
        parts = torch.cat([g.flatten() for g in grads]).split(2**16)
        grads = [part.view(p.shape) for part, p in zip(parts, params)]

    def bytes_of(donate: bool) -> int:
        return allocated_at_once(
            lambda: optimizer.update(params, grads, state, 0.1, scale=scale, donate=donate)
        )[0]

    assert bytes_of(False) >= 2 * 4 * 4 * 2**16
    assert bytes_of(True) < 4000


def test_gradients_that_share_memory_are_copied() -> None:
    whole, one = torch.randn(6, 4), torch.randn(5)
    shared = {
        "expanded": torch.randn(3).expand(4, 3),
        "sliding": torch.randn(10).as_strided((4, 4), (2, 1)),
        "part": whole[:4],
        "overlapping": whole[2:],
        "once": one,
        "again": one,
    }
    check_scaled(shared)


def test_what_autograd_gives_for_a_sum_is_scaled_right() -> None:
    """One gradient for two leaves, and in it one number many times."""
    params = {"a": torch.randn(3, 2), "b": torch.randn(3, 2)}
    _, grads = fmoe.value_and_grad(lambda p: (p["a"] + p["b"]).sum())(params)
    assert grads["a"].untyped_storage().data_ptr() == grads["b"].untyped_storage().data_ptr()
    check_scaled(grads)


def test_donated_gradients_that_are_part_of_a_graph_are_copied() -> None:
    x = torch.randn(4).requires_grad_()
    y = x * 2
    check_scaled([y])
    assert torch.equal(torch.autograd.grad((y**2).sum(), x)[0], 8 * x.detach())


def test_a_param_that_stands_under_two_names_is_updated_once() -> None:
    whole, tied = torch.randn(6, 4), torch.randn(5)
    params = {"head": tied, "embedding": tied, "part": whole[:4], "overlapping": whole[2:]}
    grads, optimizer = optree.tree_map(torch.randn_like, params), adamw()
    expected = optimizer.update(params, grads, optimizer.init(params), 0.1)
    assert_same(optimizer.update(params, grads, optimizer.init(params), 0.1, donate=True), expected)


def test_float16_has_float32_moments() -> None:
    params, grads = [torch.ones(3, dtype=torch.float16)], [torch.full((3,), 1e-4, dtype=torch.float16)]
    optimizer = adamw(weight_decay=0.0)
    state = optimizer.init(params)
    assert state.exp_avg_sq[0].dtype == torch.float32
    params, state = optimizer.update(params, grads, state, 0.25)
    torch.testing.assert_close(params[0], torch.full((3,), 0.75, dtype=torch.float16))
    assert state.exp_avg_sq[0].min() > 0
    with pytest.raises(ValueError, match=r"moments_dtype: got torch\.float16, expected bfloat16, float32"):
        adamw(moments_dtype=torch.float16)


def check_scaled(grads: Any) -> None:
    """They are scaled, and as they were after that."""
    before = copied(optree.tree_map(torch.Tensor.detach, grads))
    params = optree.tree_map(torch.ones_like, before)
    optimizer, scale = adamw(eps=1.0), torch.tensor(0.25)
    expected = optimizer.update(params, optree.tree_map(lambda g: g / 4, before), optimizer.init(params), 0.1)
    found = optimizer.update(params, grads, optimizer.init(params), 0.1, scale=scale, donate=True)
    assert_same(found, expected, rtol=1e-6, atol=1e-7)
    assert_same(optree.tree_map(torch.Tensor.detach, grads), before)


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    torch.distributed.destroy_process_group()


def test_dtensors_of_several_meshes_beside_plain_tensors(mesh: Any) -> None:
    """One rank: the same numbers in DTensors, with their placements kept."""
    params, grads = random_tree(0), random_tree(1)
    places = [(mesh, [Shard(0), Shard(1)]), (mesh["ep"], [Shard(0)]), (mesh, [Replicate(), Shard(0)])]

    def placed(tree: Any) -> Any:
        new = {**tree, "embed": distribute_tensor(tree["embed"], *places[0])}
        for layer, place in zip(tree["layers"], places[1:]):
            new["layers"] = [*new["layers"][1:], {**layer, "norm": distribute_tensor(layer["norm"], *place)}]
        return new

    def full(tree: Any) -> Any:
        return optree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)

    for dtype, donate in itertools.product((None, torch.bfloat16), (False, True)):
        optimizer = adamw(moments_dtype=dtype)
        expected = optimizer.update(params, grads, optimizer.init(params), 0.1)
        inputs = placed(copied(params))
        actual = optimizer.update(inputs, placed(grads), optimizer.init(inputs), 0.1, donate=donate)
        assert_same(full(actual), expected)
        for leaf in (actual[0]["embed"], actual[1].exp_avg["embed"]):
            assert leaf.placements == inputs["embed"].placements
    clipped, norm = clip_by_global_norm(placed(grads), 0.5)
    assert not isinstance(norm, DTensor)
    clipped_plain, expected_norm = clip_by_global_norm(grads, 0.5)
    torch.testing.assert_close(norm, expected_norm)
    assert_same(full(clipped), clipped_plain, rtol=1e-6, atol=1e-7)
    how = dict(scale=clip_factor(norm, 0.5), donate=True)
    found = optimizer.update(placed(copied(params)), placed(grads), optimizer.init(inputs), 0.1, **how)
    expected = optimizer.update(params, clipped_plain, optimizer.init(params), 0.1)
    assert_same(full(found), expected, rtol=5e-3, atol=1e-6)


def test_a_strided_shard_is_updated(mesh: Any) -> None:
    """A DTensor may look contiguous where its local part is not."""
    values, slopes = torch.randn(4, 6), torch.randn(4, 6)
    strided = torch.empty(6, 4).t().copy_(values)
    params, grads = (
        [DTensor.from_local(local, mesh["ep"], [Shard(0)], shape=local.shape, stride=(6, 1))]
        for local in (strided, slopes)
    )
    optimizer = adamw()
    expected, _ = optimizer.update([values], [slopes], optimizer.init([values]), 0.1)
    for donate in (False, True):
        actual, _ = optimizer.update(params, grads, optimizer.init(params), 0.1, donate=donate)
        assert_same([actual[0].to_local()], expected)


def test_partial_gradients_are_refused_by_name(mesh: Any) -> None:
    whole = distribute_tensor(torch.ones(3), mesh["ep"], [Replicate()])
    partial = DTensor.from_local(torch.ones(3), mesh["ep"], [Partial()])
    optimizer = adamw()
    with pytest.raises(
        ValueError, match=r"grads: got w .*Partial.*, expected w .*Replicate.*redistribute first"
    ):
        optimizer.update({"w": whole}, {"w": partial}, optimizer.init({"w": whole}), 0.1)
    torch.testing.assert_close(global_norm([partial]), torch.tensor(3.0).sqrt())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_no_gradient(bad: float) -> None:
    grads = {"good": torch.tensor([3.0, 4.0]), "bad": torch.tensor([1.0, bad])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert not norm.isfinite()
    torch.testing.assert_close(clipped, grads, rtol=0, atol=0, equal_nan=True)


def test_clipping_to_nothing_is_refused() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"clip_factor: max_norm: got .*expected a positive number"):
            clip_by_global_norm([torch.ones(2)], bad)
    assert clip_by_global_norm([torch.ones(2)], float("inf"))[0][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("moments", [None, torch.float64])
@pytest.mark.parametrize("trees", ["p g", "p m", "p v", "g m", "g v", "m v", "p g m v"])
def test_donated_trees_that_share_memory_are_copied(trees: str, moments: Any, scale: float | None) -> None:
    optimizer = adamw(moments_dtype=moments)
    own = {name: torch.rand(3, 4).double() for name in "pgmv"}
    of_one = dict.fromkeys(trees.split(), own[trees[0]])

    def update(given: dict[str, torch.Tensor], donate: bool) -> Any:
        p, g, m, v = ({"w": (own | given)[name]} for name in "pgmv")
        how = dict(scale=scale and torch.tensor(scale), donate=donate)
        return optimizer.update(p, g, AdamWState(torch.tensor(2.0), m, v), 0.1, **how)

    expected = update(of_one, donate=False)
    assert_same(update({name: own[trees[0]].view(3, 4) for name in trees.split()}, donate=True), expected)


def test_a_donated_leaf_that_overlaps_a_frozen_one_is_copied() -> None:
    buffer = torch.randn(6)
    params = {"frozen": buffer[:4], "moved": buffer[2:]}
    optimizer, kept = adamw(trained={"frozen": False, "moved": True}), buffer.clone()
    new, _ = optimizer.update(params, copied(params), optimizer.init(params), 0.1, donate=True)
    assert_same([new["frozen"], buffer], [kept[:4], kept])
