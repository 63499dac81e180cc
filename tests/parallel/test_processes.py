"""Processes: what they return, fail with, and how they end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.connection import Connection

import pytest
import torch

from fmoe.parallel import Processes, RankError, processes


def fails_on_rank_one():
    if torch.distributed.get_rank() == 1:
        raise KeyError("only here")
    return "fine"


def dies_on_rank_one():
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def exits_on_rank_zero():
    if torch.distributed.get_rank() == 0:
        os._exit(7)
    time.sleep(600)


def stops_halfway():
    """It goes to sleep for good once a half of its answer is sent."""
    send = Connection._send

    def send_half(pipe, data):
        send(pipe, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGSTOP)

    Connection._send = send_half


class Unreadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self):
        return divmod, (1, 0)


def unreadable_on_rank_one():
    return Unreadable() if torch.distributed.get_rank() == 1 else "fine"


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
        with pytest.raises(RankError, match=r"rank 1: died \(exit code -9\)"):
            devices.run(dies_on_rank_one)
        with pytest.raises(RankError, match=r"^rank 0: not done in 0.1 s\nrank 1: not done in 0.1 s$"):
            devices.run(time.sleep, 600, timeout=0.1)
        assert not devices._processes
        assert time.monotonic() - began < 80


@pytest.mark.slow
def test_a_process_that_stops_within_a_message_holds_up_nothing():
    with Processes(1) as devices:
        assert devices.run(max, 2, 3, timeout=2) == [3], "the time to start isn't the function's"
        for function, *args in [(len, bytes(10**7)), (stops_halfway,)]:
            (process,) = devices._processes
            if args:
                os.kill(process.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(RankError, match=r"^rank 0: not done in 1 s$"):
                devices.run(function, *args, timeout=1)
            assert 1 <= time.monotonic() - began < 20
            assert not process.is_alive()
            assert devices.run(len, bytes(10**7), timeout=60) == [10**7]


@pytest.mark.slow
def test_one_that_dies_or_answers_what_nobody_can_read(capfd):
    with Processes(2) as devices:
        with pytest.raises(
            RankError, match=r"^rank 1: its result can't be unpickled here: Traceback(.|\n)*ZeroDivisionError"
        ):
            devices.run(unreadable_on_rank_one)
        alive = [process.pid for process in devices._processes]
        assert devices.run(os.getpid) == alive, "that costs no process"
        with pytest.raises(
            RankError, match=r"^rank 0: died \(exit code 7\)\nrank 1: not done 3 s after another rank failed$"
        ):
            devices.run(exits_on_rank_zero)
    assert capfd.readouterr().err == ""


def test_what_does_not_start_is_ended_and_what_is_interrupted(monkeypatch):
    monkeypatch.setattr(processes, "START", 0.0)
    with Processes(1) as devices:
        with pytest.raises(RankError, match=r"^rank 0: not started in 0 s$"):
            devices.run(max, 2, 3)
        monkeypatch.undo()
        assert devices.run(max, 2, 3) == [3]

        # An interrupt ends it too, and leaves no answer for the next call.
        (process,) = devices._processes
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            devices.run(time.sleep, 600)
        assert not process.is_alive()
        assert devices.run(max, 2, 4) == [4]


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

        with Processes(1) as devices:
            found = devices.run(find)
        print([isinstance(each, Found) for each in found], found[0].rank, found[0].seen)
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
    assert first == "[True] 0 [1, 2]"
    assert second.startswith(
        "Processes.run: other processes can't import 'find' from here. Install cloudpickle"
    )


@pytest.mark.slow
@pytest.mark.parametrize("main", ['if __name__ == "__main__":', "if True:"])
def test_a_script_needs_its_main_part_apart(main, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"from fmoe.parallel import Processes\n{main}\n"
        "    with Processes(1) as devices:\n        print(devices.run(max, 2, 3))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    if main.endswith("True:"):
        assert done.stderr.count("freeze_support()\n") == 1
        assert done.stderr.endswith("RankError: rank 0: died (exit code 1)\n")
    else:
        assert (done.stdout, done.stderr) == ("[3]\n", "")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Processes(0), "Processes: number: got 0, expected an integer of at least 1"),
        (
            lambda: Processes(2).run(max, 1, 2, ranks=3),
            "Processes.run: ranks: got 3, expected an integer from 1 to 2",
        ),
        (
            lambda: Processes(2).run(max, 1, 2, ranks=1.5),
            "Processes.run: ranks: got 1.5, expected an integer from 1 to 2",
        ),
    ],
)
def test_bad_numbers_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
