"""Saves that are killed, in a process of their own: ``python killed_saves.py FOLDER``; prints JSON.

Every child is forked from a process that has imported PyTorch, so that a hundred of them take seconds.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fmoe.training import checkpoint

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
DIED = -signal.SIGKILL


def state_at(step: int) -> Any:
    """A state that tells its step."""
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(3000, generator=generator), "n": torch.tensor(step), "none": torch.empty(0)}


def is_right(path: Path | None) -> bool:
    assert path, "no checkpoint"
    state, step = checkpoint.load(path, state_at(0))
    return all(torch.equal(state[name], leaf) for name, leaf in state_at(step).items())


def forked(work: Callable[[], None]) -> int:
    """Start a child that does the work; its pid."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_until(operation: int, folder: Path, step: int, told: int) -> None:
    """Save, and die before the file system operation of this number, having told which it is."""
    left = operation

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in CHANGES and (event != "open" or str(folder) in str(arguments[0])):
            if not left:
                os.write(told, event.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
    checkpoint.save(folder, step, state_at(step), keep=1)


def at_every_operation(folder: Path) -> dict[str, Any]:
    """Kill a save before each thing it does to the file system, until one gets through."""
    kills: list[str] = []
    new: list[bool] = []
    checkpoint.save(folder, 1, state_at(1))
    for step in range(2, 100):
        reader, writer = os.pipe()
        code = exit_code(forked(functools.partial(save_until, len(kills), folder, step, writer)))
        os.close(writer)
        with open(reader) as pipe:
            event = pipe.read()
        latest = checkpoint.latest(folder)
        assert is_right(latest), latest
        new.append(int(latest.name[5:]) == step)
        if code == 0:
            return {"kills": kills, "new": new, "left": sorted(path.name for path in folder.iterdir())}
        assert code == DIED, code
        kills.append(event)
    raise AssertionError(f"a save that doesn't end, or does more and more: {kills}")


def at_random_moments(folder: Path) -> dict[str, Any]:
    """Kill a process that does nothing but save, again and again, after a random time."""
    reached = [1]
    checkpoint.save(folder, 1, state_at(1))
    for _ in range(15):

        def work() -> None:
            for step in range(reached[-1] + 1, 10**6):
                checkpoint.save(folder, step, state_at(step), keep=2)

        pid = forked(work)
        time.sleep(random.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == DIED
        latest = checkpoint.latest(folder)
        assert is_right(latest), latest
        reached.append(int(latest.name[5:]))
    return {"reached": reached}


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Save sharded over two ranks; load in one process, and sharded in another way over two."""
    whole = {"w": torch.arange(24.0).reshape(4, 6), "plain": torch.arange(3)}

    def sharded(mesh: Any, dim: int, scale: float) -> Any:
        return {"w": distribute_tensor(whole["w"] * scale, mesh, [Shard(dim)]), "plain": whole["plain"]}

    def work(rank: int) -> None:
        dist.init_process_group(
            "gloo", rank=rank, world_size=2, store=dist.FileStore(str(folder / "store"), 2)
        )
        mesh = init_device_mesh("cpu", (2,))
        path = checkpoint.save(folder, 5, sharded(mesh, 0, 1.0), keep=1)
        state, step = checkpoint.load(path, sharded(mesh, 1, 0.0))
        assert step == 5
        assert state["w"].placements == (Shard(1),)
        assert torch.equal(state["w"].full_tensor(), whole["w"])
        dist.destroy_process_group()

    folder.mkdir()
    codes = [exit_code(pid) for pid in [forked(lambda rank=rank: work(rank)) for rank in range(2)]]
    path = checkpoint.latest(folder)
    state, _ = checkpoint.load(path, {name: torch.zeros_like(leaf) for name, leaf in whole.items()})
    return {"codes": codes, "equal": all(torch.equal(state[name], leaf) for name, leaf in whole.items())}


if __name__ == "__main__":
    scenarios = (at_every_operation, at_random_moments, on_two_ranks)
    print(json.dumps({run.__name__: run(Path(sys.argv[1], run.__name__)) for run in scenarios}))
