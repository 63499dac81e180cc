"""Processes that live as long as the test session and run a function on every rank of a world.

It has gloo for the CPU and, where there is a GPU, NCCL with all ranks on that one.

Starting a process takes seconds, so one pool serves all tests. A world of ``n`` ranks is its first ``n``
processes; it is set up again only when ``n`` changes. Nothing can hang: what isn't done in time is killed,
and the next call starts a new pool.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from helpers import fresh_seed
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

GRACE = 3.0  # seconds for the other ranks, once one has failed


class Pool:
    def __init__(self, processes: int = 4) -> None:
        self.most = processes
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.world = self.size = 0

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, self.store.port), daemon=True)
            process.start()
            there.close()  # so that a death is noticed here
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self, patience: float) -> None:
        for pipe in self.pipes:
            pipe.close()  # a process that waits for work ends
        for process in self.processes:
            process.join(patience)
            process.kill()
            process.join()
        self.processes, self.pipes, self.size = [], [], 0

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """What ``function(*args)`` returns on each of ``size`` ranks, all with the same fresh seed."""
        if self.size not in (0, size) and torch.cuda.is_available():
            self.stop(patience=0)  # NCCL hangs in a process that was alone before
        if not self.processes:
            self.start()
        if size != self.size:
            self.world, self.size = self.world + 1, size
        job = pickle.dumps((self.world, size, fresh_seed(), function, args))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(job)
        results, failures = self.collect(size, time.monotonic() + timeout)
        if len(results) < size:
            self.size = 0  # collectives may be half done: the next call sets up a new world
            silent = {*range(size)} - {*results} - {*failures}
            if silent:
                self.stop(patience=0)
            failures |= dict.fromkeys(silent, "died, or no answer in time")
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        return [results[rank] for rank in range(size)]

    def collect(self, size: int, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self.pipes[:size], range(size)))
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                with suppress(EOFError):
                    good, answer = pickle.loads(pipe.recv_bytes())
                    (results if good else failures)[rank] = answer
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        return results, failures


class RankError(Exception):
    """What went wrong on which rank."""


def _serve(rank: int, pipe: Connection, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        # NCCL refuses two ranks on one GPU unless they seem to be on two hosts that only sockets connect.
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
        os.environ |= dict.fromkeys(("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"), "1")
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    world = 0
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # nothing to tidy up, and it is faster
        try:
            wanted, size, seed, function, args = pickle.loads(job)
            if wanted != world:
                if dist.is_initialized():
                    dist.destroy_process_group()
                _clear_sharding_prop_cache()  # DTensor would go on with an equal mesh of the world before
                prefixed = dist.PrefixStore(f"world {wanted}", store)
                dist.init_process_group(
                    backend, store=prefixed, rank=rank, world_size=size, timeout=timedelta(seconds=30)
                )
                world = wanted
            torch.set_default_device(None)
            torch.manual_seed(seed)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
