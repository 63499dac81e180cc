"""Processes on this machine that run a function on every rank of a world, for notebooks and for tests.

Importing PyTorch takes seconds, so on Linux one process does it, and the others are forked from that. They
stay. A world of ``n`` ranks is the first ``n`` of them, and is set up again only when ``n`` changes. Nothing
can hang: processes that aren't done in time are killed, and the next call starts new ones.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch
import torch.distributed as dist

from ..errors import argument_error
from .mesh import take_gpu

START = 300.0  # seconds for all processes to start
METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # where others' libraries bear a fork
GRACE = 3.0  # seconds left to the other ranks once one has failed
IMPORTED = ["torch.distributed.tensor", __name__]  # before the fork; none of it starts a thread or uses a GPU


class RankError(RuntimeError):
    """One or more ranks failed. The text says which and how, with their tracebacks.

    >>> with Processes(1) as devices:
    ...     try:
    ...         devices.run(divmod, 1, 0)
    ...     except RankError as error:
    ...         print(error.args[0].splitlines()[0], "...", error.args[0].splitlines()[-1])
    rank 0: Traceback (most recent call last): ... ZeroDivisionError: integer division or modulo by zero
    """


class Processes:
    """A context manager of one process per device, with gloo and, where there are GPUs, NCCL.

    ===========  =====================================================================
    number       how many; they start with the first :meth:`run`, and share GPUs if there are fewer
    timeout      seconds that a call of :meth:`run` may take once the processes have started
    ===========  =====================================================================

    They end with the ``with`` statement, with :meth:`stop`, or with this process.

    Each process imports the script that starts them. So the script's work must stand below
    ``if __name__ == "__main__":``, or they die as they start. A notebook, or ``python -c``, needs no such
    line.

    >>> import fmoe
    >>> def tokens_here(seed):
    ...     mesh = fmoe.make_mesh("ep=2", device_type="cpu")
    ...     params = fmoe.moe_init(seed, dim=8, hidden_dim=16, num_experts=16, mesh=mesh)
    ...     x = torch.randn(3 + mesh.get_rank(), 8)          # each its own tokens
    ...     return tuple(fmoe.moe_forward(params, x, mesh).shape)
    >>> with fmoe.parallel.Processes(2) as devices:
    ...     devices.run(tokens_here, 0)
    [(3, 8), (4, 8)]
    """

    def __init__(self, number: int, *, timeout: float = 120.0) -> None:
        if not isinstance(number, int) or number < 1:
            raise argument_error("Processes", "number", got=repr(number), expected="an integer of at least 1")
        self.number, self.timeout = number, timeout
        self._store: dist.TCPStore | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._world = self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self, function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float | None = None
    ) -> list[Any]:
        """The results of ``function(*args)`` on each rank, in order.

        ===========  =====================================================================
        function     finds its rank by :func:`fmoe.make_mesh` or ``torch.distributed``. With
                     ``cloudpickle`` installed it may be a notebook's, and use the notebook's names
        args         the same for all ranks; they and the results are pickled
        ranks        how many; ``None``: all processes
        timeout      seconds once the processes have started; ``None``: that of :class:`Processes`
        ===========  =====================================================================

        Raises :class:`RankError` for ranks that failed, died or weren't done in time.
        """
        ranks = self.number if ranks is None else ranks
        if not isinstance(ranks, int) or not 1 <= ranks <= self.number:
            expected = f"an integer from 1 to {self.number}"
            remedy = "Correct it, or start more processes."
            raise argument_error("Processes.run", "ranks", got=repr(ranks), expected=expected, remedy=remedy)
        timeout = self.timeout if timeout is None else timeout
        job = self._job(function, args)
        # NCCL hangs in a process that was alone before.
        stale = self._size not in (0, ranks) and torch.cuda.is_available()
        if stale or not all(process.is_alive() for process in self._processes):
            self.stop(patience=0)
        try:
            if not self._processes:
                self._start()
            if ranks != self._size:
                self._world, self._size = self._world + 1, ranks
            message = pickle.dumps((self._world, ranks, timeout, job))
            return self._exchange(message, ranks, timeout, f"not done in {timeout:g} s")
        except RankError:
            self._size = 0  # collectives may be half done, so the next call sets up a new world
            raise
        except BaseException:  # an interrupt, say: late answers would pass for the next call's
            self.stop(patience=0)
            raise

    def stop(self, patience: float = 5.0) -> None:
        """End the processes, by force after ``patience`` seconds. :meth:`run` starts new ones."""
        for pipe in self._pipes if patience > 0 else ():
            pipe.close()  # a process that waits for work ends
        deadline = time.monotonic() + patience
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        # Threads that still hold pipes end with the process at the other end, and close them.
        self._processes, self._pipes, self._size = [], [], 0

    @staticmethod
    def _job(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
        if getattr(function, "__module__", None) == "__main__" and not find_spec("cloudpickle"):
            raise ImportError(
                f"Processes.run: other processes can't import {function.__qualname__!r} from here. Install "
                "cloudpickle (pip install cloudpickle), or put the function into a module."
            )
        return _pickled((function, args))

    def _start(self) -> None:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context: Any = multiprocessing.get_context(METHOD)
        context.set_forkserver_preload(IMPORTED)  # no matter to "spawn"
        resource_tracker.ensure_running()  # else the first process would start it, which unblocks signals
        # Processes inherit the mask, so only this process gets an interrupt. It then ends what is unfinished.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for rank in range(self.number):
                here, there = context.Pipe()
                args = rank, self.number, there, self._store.port, {**os.environ}
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                there.close()  # so that this process notices a death
                self._processes.append(process)
                self._pipes.append(here)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._exchange(None, self.number, START, f"not started in {START:g} s")

    def _exchange(self, message: bytes | None, ranks: int, limit: float, late: str) -> list[Any]:
        """Each rank's answer to ``message``. Ranks slower than ``limit`` seconds fail as ``late``."""
        answers: SimpleQueue[tuple[int, bytes | None]] = SimpleQueue()
        for rank, pipe in enumerate(self._pipes[:ranks]):  # a process may stop halfway through a message
            threading.Thread(target=_ask, args=(pipe, message, rank, answers), daemon=True).start()
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + limit
        while len(results) + len(failures) < ranks:
            try:
                rank, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                failures |= dict.fromkeys({*range(ranks)} - {*results} - {*failures}, late)
                self.stop(patience=0)
                break
            good, value = self._read(rank, answer)
            (results if good else failures)[rank] = value
            if failures and time.monotonic() + GRACE < deadline:
                deadline = time.monotonic() + GRACE
                late = f"not done {GRACE:g} s after another rank failed"
        if failures:
            told = "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
            raise RankError(told)
        return [results[rank] for rank in range(ranks)]

    def _read(self, rank: int, answer: bytes | None) -> tuple[bool, Any]:
        """Whether the answer is a result, and the result or the failure."""
        if answer is None:
            process = self._processes[rank]
            process.join(GRACE)
            process.kill()  # if it still lives, it has closed its pipe
            process.join()
            return False, f"died (exit code {process.exitcode})"
        try:
            return pickle.loads(answer)
        except Exception:
            return False, f"its result can't be unpickled here: {traceback.format_exc()}"


def _ask(
    pipe: Connection, message: bytes | None, rank: int, answers: SimpleQueue[tuple[int, bytes | None]]
) -> None:
    """Put the answer of the process of ``rank``, or ``None`` if it dies."""
    try:
        if message is not None:
            pipe.send_bytes(message)
        answers.put((rank, pipe.recv_bytes()))
    except (EOFError, OSError):
        answers.put((rank, None))


def _pickled(value: Any) -> bytes:
    """Pickled by ``cloudpickle`` if it is there, since it takes what a notebook defines."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value)
    return cloudpickle.dumps(value)


# ---- in the processes --------------------------------------------------------------------------


def _serve(rank: int, number: int, pipe: Connection, port: int, environment: dict[str, str]) -> None:
    """Do jobs until this process's parent is gone."""
    os.environ.clear()  # that of the first start
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    torch.set_num_threads(1)
    backend = prepare(rank, number)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    _forget_meshes()  # this imports DTensor, which would cost the first job a second
    world, answer = 0, pickle.dumps((True, None))  # the first answer: it has started
    while True:
        try:
            pipe.send_bytes(answer)
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # faster, and there is nothing to tidy up
        try:
            wanted, ranks, timeout, job = pickle.loads(message)
            if wanted != world:
                if dist.is_initialized():
                    dist.destroy_process_group()
                _forget_meshes()
                prefixed, limit = dist.PrefixStore(f"world {wanted}", store), timedelta(seconds=timeout)
                dist.init_process_group(backend, store=prefixed, rank=rank, world_size=ranks, timeout=limit)
                world = wanted
            function, args = pickle.loads(job)
            answer = _pickled((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))


def prepare(rank: int, number: int) -> str:
    """Prepare this process for a process group of this host. Gives the group's backend."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if not torch.cuda.is_available():
        return "gloo"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    take_gpu(rank, number)
    return "cpu:gloo,cuda:nccl"


def _forget_meshes() -> None:
    """Clear caches, from which DTensor would take an equal mesh of the last world.

    PyTorch's own function for this needs numpy.
    """
    from torch.distributed.tensor import DTensor

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()
