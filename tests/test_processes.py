"""Processes: what they return, fail with, and how they end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from fmoe.parallel import Processes, RankError


def fails_on_rank_one():
    if torch.distributed.get_rank() == 1:
        raise KeyError("only here")
    return "fine"


def dies_on_rank_one():
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def ignores_interrupts():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_failures_are_reported_in_time_and_the_next_call_works():
    with Processes(2, timeout=90) as devices:
        assert devices.run(torch.distributed.get_rank) == [0, 1]
        alive = [process.pid for process in devices._processes]
        with pytest.raises(RankError, match=r"^rank 1: Traceback(.|\n)*KeyError: 'only here'"):
            devices.run(fails_on_rank_one)
        assert devices.run(torch.distributed.get_world_size, ranks=1) == [1]
        assert devices.run(ignores_interrupts) == [True, True]
        assert [process.pid for process in devices._processes] == alive, "a failure costs no process"

        began = time.monotonic()
        with pytest.raises(RankError, match="rank 1: died, or no answer in time"):
            devices.run(dies_on_rank_one)
        with pytest.raises(RankError, match=r"rank 0: died(.|\n)*rank 1: died"):
            devices.run(time.sleep, 600, timeout=0.1)
        assert not devices._processes
        assert time.monotonic() - began < 80


def test_an_interrupt_ends_them_and_leaves_no_answer_for_the_next_call():
    with Processes(1) as devices:
        devices.run(os.getpid)
        (process,) = devices._processes
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            devices.run(time.sleep, 600)
        assert not process.is_alive()
        assert devices.run(max, 2, 3) == [3]
        devices._processes[0].kill()
        devices._processes[0].join()
        assert devices.run(max, 2, 4) == [4], "one that died meanwhile is replaced"


def test_functions_and_classes_of_a_session_go_there_and_back():
    script = """
        import typing
        from fmoe.parallel import Processes, processes

        class Found(typing.NamedTuple):
            rank: int
            seen: list

        seen = [1, 2]

        def find():
            import torch
            return Found(torch.distributed.get_rank(), seen)

        with Processes(2) as devices:
            found = devices.run(find)
        print([isinstance(each, Found) for each in found], found[1].rank, found[1].seen)
        processes.find_spec = lambda name: None  # as if there were no cloudpickle
        try:
            devices.run(find)
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "[True, True] 1 [1, 2]"
    assert second.startswith(
        "Processes.run: other processes can't import 'find' from here. Install cloudpickle"
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Processes(0), "Processes: number: got 0, expected an integer of at least 1"),
        (lambda: Processes(2).run(max, 1, 2, ranks=3), "Processes.run: ranks: got 3, expected 1 to 2"),
    ],
)
def test_bad_numbers_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
