"""Ranks that succeed or fail together."""

import pytest
import torch
import torch.distributed as dist

from fmoe.parallel.together import check_alike, from_all, num_ranks, this_rank, together


def without_numpy():
    """What all ranks pass, of different lengths, where PyTorch can't make arrays."""
    before, torch.Tensor.numpy = torch.Tensor.numpy, None
    try:
        return from_all("x" * 10 ** dist.get_rank())
    finally:
        torch.Tensor.numpy = before


def test_values_come_from_all_without_numpy(pool):
    assert pool.run(3, without_numpy) == [["x", "x" * 10, "x" * 100]] * 3


def outcome(failing):
    """What this rank meets when those that fail raise their own errors."""
    rank = dist.get_rank()
    try:
        with together():
            if rank in failing:
                raise failing[rank]
    except Exception as error:
        found = type(error).__name__, str(error)
    else:
        found = "fine"
    assert from_all(rank) == list(range(dist.get_world_size())), "nobody is left behind"
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_all_are_fine_if_each_is(pool, size):
    assert pool.run(size, outcome, {}) == ["fine"] * size


def test_an_error_of_one_is_an_error_of_all(pool):
    found = pool.run(3, outcome, {1: KeyError("head"), 2: ValueError("save: keep: got 0")})
    assert found == [
        ("RuntimeError", "on rank 1: 'head'"),
        ("KeyError", "'head'"),
        ("ValueError", "save: keep: got 0"),
    ]
    found = pool.run(3, outcome, {0: ValueError("save: keep: got 0")})
    assert (
        found == [("ValueError", "save: keep: got 0")] + [("ValueError", "on rank 0: save: keep: got 0")] * 2
    )
    assert pool.run(2, outcome, {1: OSError()})[0] == ("RuntimeError", "on rank 1: OSError()")


def alike(values):
    try:
        check_alike("save", values[dist.get_rank()])
    except ValueError as error:
        return str(error)


def test_values_that_differ_are_shown(pool):
    values = [{"step": 7, "run": {"dim": 8, "seed": seed}} for seed in (0, 0, 5)]
    assert pool.run(2, alike, values[:2]) == [None] * 2
    text = (
        "save: step, run: got on rank 2, beside rank 0: run.seed is 0, here 5, expected the same on every "
        "rank. Start all ranks with the same options."
    )
    assert pool.run(3, alike, values) == [text] * 3


def test_one_process_without_a_group_is_the_first_of_one():
    assert (num_ranks(), this_rank(), from_all("mine")) == (1, 0, ["mine"])
    check_alike("save", {"step": 1})
    with pytest.raises(KeyError), together():
        raise KeyError
