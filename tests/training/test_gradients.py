import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import optree
import pytest
import torch
from devices import bare_mesh
from helpers import error, fresh_seed, quick
from laws import ranks_of, whole

import fmoe
from fmoe.models import deepseek_v3
from fmoe.ops.balance import merge_stats
from fmoe.ops.core.axes import group_of
from fmoe.parallel.placement import token_axes
from fmoe.training.gradients import accumulate, check_finite, computing_in
from fmoe.training.metrics import mean_loss
from fmoe.tree import dotted_names

CONFIG = dataclasses.replace(deepseek_v3.preset("debug"), dim=16, num_layers=2, hidden_dim=8, vocab_size=32)


def model_and_batch(dtype: torch.dtype = torch.float64) -> Any:
    params = deepseek_v3.init(CONFIG, fresh_seed(), dtype=dtype)
    return params, torch.randint(32, (8, 5)), torch.randint(32, (8, 5))


def loss_and_grad(dtype: torch.dtype | None = None) -> Any:
    def loss(params: Any, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        return deepseek_v3.loss(params, tokens, targets, CONFIG)

    return fmoe.value_and_grad(computing_in(loss, dtype) if dtype else loss, has_aux=True)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_micro_batches_equal_the_batch(parts: int) -> None:
    params, *batch = model_and_batch()
    before = optree.tree_map(torch.clone, params)
    (loss, stats), grads = loss_and_grad()(params, *batch)
    (their_loss, their_stats), their_grads = accumulate(loss_and_grad(), parts)(params, *batch)
    assert error(their_loss, loss) < 1e-14
    assert error(their_grads, grads) < 1e-14
    assert type(their_grads) is type(grads)
    assert torch.equal(their_stats.num_targets, stats.num_targets)
    for mine, theirs in zip(stats.layers, their_stats.layers, strict=True):
        assert torch.equal(mine.tokens_per_expert, theirs.tokens_per_expert)
        assert mine.tokens_per_expert.sum() == 8 * 5 * CONFIG.router.top_k
        assert error(theirs, mine) < 1e-5
    assert error(params, before) == 0


def uneven(rows: int = 8, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of which the first rows count one target each, the next none, and the rest all."""
    generator = torch.Generator().manual_seed(fresh_seed() if seed is None else seed)
    tokens, targets = torch.randint(32, (2, rows, 5), generator=generator).unbind()
    targets[: rows // 2, 1:] = -100
    targets[rows // 4 : rows // 2] = -100
    return tokens, targets


@pytest.mark.parametrize("parts", [2, 3, 4, 8, 11])
def test_a_mean_is_one_sum_over_one_count(parts: int) -> None:
    """However targets are spread over micro-batches, of which some may have none, or no rows at all."""
    params, _, _ = model_and_batch()
    batch = uneven()
    (loss, stats), grads = loss_and_grad()(params, *batch)
    (their_loss, their_stats), their_grads = accumulate(loss_and_grad(), parts)(params, *batch)
    assert stats.num_targets == (batch[1] != -100).sum() == their_stats.num_targets
    assert error(their_loss, loss) < 1e-14
    assert error(their_grads, grads) < 1e-14
    batches = [*zip(*(tensor.tensor_split(parts) for tensor in batch))]
    held_out = mean_loss(lambda p, *b: deepseek_v3.loss(p, *b, CONFIG), params, batches)
    assert held_out == pytest.approx(loss.item(), rel=1e-12)


def accumulated(axes: str, seed: int) -> float:
    mesh = bare_mesh(axes)
    group = group_of(mesh, token_axes(mesh))
    batch, spread = (
        uneven(8 * group.size, seed),
        deepseek_v3.init(CONFIG, seed, dtype=torch.float64, mesh=mesh),
    )
    params = deepseek_v3.init(CONFIG, seed, dtype=torch.float64)
    (loss, stats), grads = loss_and_grad()(params, *batch)
    step = fmoe.value_and_grad(lambda p, *b: deepseek_v3.loss(p, *b, CONFIG, mesh), has_aux=True)
    mine = [tensor.chunk(group.size)[group.position] for tensor in batch]
    (their_loss, their_stats), their_grads = accumulate(step, 3)(spread, *mine)
    assert torch.equal(their_stats.num_targets, stats.num_targets)
    return max(error(their_loss, loss), error(whole(their_grads), grads))


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], ["dp=2", "ep=2", "tp=2", "dp=2,ep=2"]))
def test_a_mean_is_one_sum_over_one_count_on_a_mesh(pool: Any, axes: str) -> None:
    assert max(pool.run(ranks_of(axes), accumulated, axes, fresh_seed())) < 1e-9


@hypothesis.given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=5))
def test_merged_statistics_are_those_of_the_summed_counts(counts: list[list[int]]) -> None:
    entropies = torch.rand(len(counts))
    merged = merge_stats(
        [
            fmoe.MoEStats(
                torch.tensor(row), torch.tensor(-1.0), torch.tensor(-1), entropy, torch.tensor(row[0])
            )
            for row, entropy in zip(counts, entropies)
        ]
    )
    summed = [sum(column) for column in zip(*counts)]
    assert merged.tokens_per_expert.tolist() == summed
    assert merged.empty_experts.item() == summed.count(0)
    assert merged.overflow.item() == summed[0]
    assert merged.overload.item() == pytest.approx(4 * max(summed) / max(sum(summed), 1e-9))
    tokens = torch.tensor(counts).sum(1).double()
    expected = (entropies * tokens).sum() / tokens.sum().clamp_min(1)
    assert merged.router_entropy.item() == pytest.approx(expected.item(), abs=1e-6)


def test_low_precision_is_summed_in_float32() -> None:
    x = torch.tensor([256.0] + [1.0] * 255, dtype=torch.bfloat16)
    mean = fmoe.value_and_grad(lambda w, x: ((w * x).mean(), {"n": torch.tensor(len(x))}), has_aux=True)
    (value, aux), grad = accumulate(mean, 256)(torch.tensor(1.0, dtype=torch.bfloat16), x)
    exact = torch.tensor(511 / 256).bfloat16()
    assert torch.equal(grad, exact), "in bfloat16, 256 + 1 is 256"
    assert torch.equal(value, exact)
    assert aux["n"].item() == 256, "integers are summed"


def test_two_leaves_of_one_gradient_tensor() -> None:
    x = torch.randn(6, dtype=torch.float64)

    def same(params: Any, x: torch.Tensor) -> Any:
        shared = x.sum()
        return shared, {"a": shared, "b": shared}

    _, grads = accumulate(same, 3)({}, x)
    expected = x.sum() / 3
    torch.testing.assert_close(grads, {"a": expected, "b": expected})


def test_a_batch_of_few_rows_is_cut_into_these() -> None:
    """An empty part has no mean."""
    mean = fmoe.value_and_grad(lambda w, x: (w * x).mean())
    args = torch.tensor(2.0, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for found, expected in zip(accumulate(mean, 7)(*args), mean(*args)):
        torch.testing.assert_close(found, expected)


def test_batches_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"accumulate: batch: got tensors of \[6, 5\] rows, expected as many"
    ):
        accumulate(loss_and_grad(), 3)((), torch.zeros(6), torch.zeros(5))
    with pytest.raises(ValueError, match="accumulate: num_micro_batches: got 0, expected at least 1"):
        accumulate(loss_and_grad(), 0)


def test_master_weights_compute_low_and_get_their_gradients_high() -> None:
    params, *batch = model_and_batch(torch.float32)
    low = computing_in(lambda p: p, torch.bfloat16)(params)
    for name, leaf, old in zip(dotted_names(low), optree.tree_leaves(low), optree.tree_leaves(params)):
        if name.endswith("bias_E"):
            assert leaf is old
        else:
            assert leaf.dtype == torch.bfloat16
    (loss, _), grads = loss_and_grad(torch.bfloat16)(params, *batch)
    (same_loss, _), low_grads = loss_and_grad()(low, *batch)
    assert torch.equal(loss, same_loss)
    assert {leaf.dtype for leaf in optree.tree_leaves(grads)} == {torch.float32}
    assert error(grads, low_grads) == 0, "the bfloat16 gradient, in float32"
    whole = computing_in(lambda p: p, torch.bfloat16)(low)
    assert all(a is b for a, b in zip(optree.tree_leaves(whole), optree.tree_leaves(low)))


def test_a_mask_that_does_not_fit_is_refused_without_whole_tensors() -> None:
    params = {"a": (torch.ones(2), torch.ones(2))}
    with pytest.raises(ValueError, match=r"computing_in: keep: got tuple arity mismatch; exp") as refused:
        computing_in(lambda p: p, torch.bfloat16, keep={"a": (True, False, True)})(params)
    assert "tensor(" not in str(refused.value)


def test_a_mask_says_what_is_not_converted() -> None:
    params = {"a": torch.ones(2), "b": [torch.ones(2), torch.ones(3)]}
    for keep in ({"a": False, "b": True}, lambda tree: {"a": False, "b": [True, True]}):
        low = computing_in(lambda p: p, torch.bfloat16, keep=keep)(params)
        assert low["a"].dtype == torch.bfloat16
        assert low["b"] == params["b"]
    with pytest.raises(ValueError, match=r"computing_in: keep: got .*, expected a tree prefix of bools"):
        computing_in(lambda p: p, torch.bfloat16, keep={"a": True})(params)


def test_what_is_not_finite_is_named_with_its_step_and_layer() -> None:
    params, *batch = model_and_batch()
    params.layers[1].mlp.experts.w_out[:, 0, 0] = float("inf")
    (loss, _), grads = loss_and_grad()(params, *batch)
    with pytest.raises(FloatingPointError) as caught:
        check_finite(12, loss.item(), float("nan"), grads)
    text = str(caught.value)
    assert text.startswith("step 12: the loss is nan and the norm of its gradient nan.")
    assert "layers.1.mlp.experts.w_out" in text
    assert "more, in the order in which the backward pass met them" in text
    assert "Resume from the last checkpoint" in text

    bad = optree.tree_map(torch.zeros_like, params)
    for name, leaf in zip(dotted_names(bad), optree.tree_leaves(bad)):
        if name in ("layers.0.attention.out", "layers.1.mlp.router.weight_ED"):
            leaf[-1, -1] = float("inf")
    expected = (
        "gradients of 2 of .* tensors: layers.1.mlp.router.weight_ED, layers.0.attention.out, in the order"
    )
    with pytest.raises(FloatingPointError, match=expected):
        check_finite(3, 1.0, float("inf"), bad)
    with pytest.raises(
        FloatingPointError, match=r"norm of its gradient inf\. Not finite .* 1 of 2 tensors: huge"
    ):
        check_finite(3, 1.0, float("inf"), {"huge": torch.tensor([3e38, 3e38]), "small": torch.ones(1)})


def test_a_healthy_step_reads_no_gradient() -> None:
    check_finite(0, 1.0, 2.0, grads=None)
