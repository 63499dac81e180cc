"""How a script that trains joins others, and how it ends."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch.distributed as dist

import fmoe
from fmoe.parallel.together import together
from fmoe.training import launch, options
from fmoe.training.launch import World, join
from fmoe.training.options import at_least


def raising(error):
    def main():
        raise error

    return main


def on_another_rank():
    with together():
        if dist.get_rank() == 1:
            raise FileNotFoundError("nothing there")


def noted():
    try:
        fmoe.make_mesh("ep=two")
    except ValueError as error:
        error.add_note("pipeline: rank 1 along pp, stage 3, micro-batch 2, at 3F2")
        raise


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (lambda: fmoe.make_mesh("ep=two"), "make_mesh: axes: got 'ep=two'"),
        (
            noted,
            "make_mesh: axes: got 'ep=two', expected axes and sizes like \"dp=2,ep=4\". (pipeline: rank",
        ),
        (
            lambda: Path("/nowhere/at/all").read_text(),
            "[Errno 2] No such file or directory: '/nowhere/at/all'",
        ),
    ],
)
def test_an_error_for_the_user_is_one_line(capfd, main, text):
    with pytest.raises(SystemExit) as ended:
        launch.run(main)
    assert ended.value.code == 2
    told = capfd.readouterr().err
    assert told.startswith(f"error: {text}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), KeyError("mine")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="mine"):
        launch.run(raising(error))


def exit_status():
    with pytest.raises(SystemExit) as ended:
        launch.run(on_another_rank)
    return ended.value.code


def test_an_error_of_one_rank_ends_all_without_traceback(pool):
    assert pool.run(2, exit_status) == [2, 2]


def told_after(error):
    """What a rank prints whose connection breaks after the second rank raised ``error``."""
    rank, said = dist.get_rank(), io.StringIO()
    dist.distributed_c10d._get_default_store().delete_key("fmoe: the first failure")
    dist.barrier()

    def main():
        if rank == 1:
            raise error
        dist.barrier()
        raise RuntimeError("Connection closed by peer\nas it were")

    with contextlib.redirect_stderr(said), pytest.raises((SystemExit, type(error))) as ended:
        launch.run(main)
    if rank == 1:
        dist.barrier()
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    return getattr(ended.value, "code", None), lines


def test_a_rank_that_another_ones_error_ends_names_it_in_one_line(pool):
    here = "RuntimeError: Connection closed by peer"
    text = f"error: on rank 0, after that of rank 1: KeyError: 'mine' (here: {here})"
    first, second, third = pool.run(3, told_after, KeyError("mine"))
    assert (first, third) == ((2, [text]), (2, [text.replace("rank 0", "rank 2")]))
    assert second == (None, [])  # its traceback is the interpreter's to print
    _, (status, said) = pool.run(2, told_after, OSError("nothing there"))
    assert (status, said) == (2, ["error: on rank 1: nothing there"])


def test_the_process_group_is_left():
    launch.run(lambda: fmoe.make_mesh(device_type="cpu"))
    assert not dist.is_initialized()


def joined(axes):
    world = join(axes, device_type="cpu", options={"seed": 3})
    return world.part, world.size, world.is_first


def disagreeing():
    with pytest.raises(
        ValueError, match=r"join: options: got on rank 1.*options.seed is 0, here 1, expected the same"
    ):
        join("ep=2", device_type="cpu", options={"seed": dist.get_rank()})


def test_ranks_join(pool):
    assert pool.run(2, joined, "ep=2") == [((0, 2), 2, True), ((1, 2), 2, False)]
    assert pool.run(2, joined, "tp=2") == [((0, 1), 2, True), ((0, 1), 2, False)]
    pool.run(2, disagreeing)


def test_alone_there_is_no_mesh_unless_one_is_asked_for():
    assert join() == World(None, (0, 1))
    assert join("dp=1", device_type="cpu").mesh.size() == 1
    assert "RANK" not in os.environ


@pytest.mark.parametrize(("least", "text"), [(1, "0"), (0.0, "-1"), (0.0, "nan"), (1, "many")])
def test_numbers_below_the_least_are_refused(least, text):
    parser = options.Parser()
    parser.add_argument("--n", type=at_least(least))
    with pytest.raises(ValueError, match=r"^argument --n: (got|invalid number value)"):
        parser.parse_args([f"--n={text}"])
