"""Saving: written under another name, synced, and renamed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from ...parallel.together import check_alike, from_all, this_rank, together
from . import folder as folders
from .state import check_ranks, described_along, digest, named, one_process_is_fine, reason


def save(
    folder: str | Path,
    step: int,
    state: Any,
    *,
    run: Mapping[str, Any] | None = None,
    keep: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Path:
    """Write ``folder/step-XXXXXXXX``. It exists only when all of it is on disk, which it is on return.

    =========  ===================================================================================
    step       the number of steps made, which is also the position in the data
    state      a tree of tensors, DTensors among them: ``{"params": params, "optimizer": state}``
    run        JSON that a run that resumes must have in common, as ``{"model": {"dim": 128}}``
    keep       the number of newest checkpoints to keep; ``None``: all
    mesh       of a pipeline, whose ranks along ``pp`` hold different leaves
    -> path    of the checkpoint
    =========  ===================================================================================

    With a process group, every rank calls this, and all see the folder. Each rank writes its piece of a
    DTensor. One rank writes plain tensors, which are the same on all. The next save removes what a killed
    one left behind, and renames a damaged checkpoint of the same step to ``.damaged``.

    Raises ``ValueError`` where a whole checkpoint of this step is there already, and for leaves that are no
    tensors or share a name. An error of one rank is raised on all.

    >>> import tempfile
    >>> from fmoe.training import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = checkpoint.save(folder, 10, {"w": torch.arange(3.0)})
    ...     checkpoint.latest(folder) == path, checkpoint.load(path, {"w": torch.zeros(3)})
    (True, Loaded(state={'w': tensor([0., 1., 2.])}, step=10))
    """
    target = Path(folder, f"step-{step:08d}")
    unfinished = target.with_suffix(".tmp")
    with together():
        check_ranks("save")
        leaves, run = named("save", state), json.loads(json.dumps(run or {}))
        if keep is not None and keep < 1:
            raise argument_error(
                "save", "keep", got=keep, expected="at least 1", remedy="Use None to keep all."
            )
    described = described_along("save", "state", leaves, mesh)
    check_alike("save", {"step": step, "run": run, "state": digest(described)})
    with together():
        if this_rank() == 0:
            folders.begin(target)
    try:
        with one_process_is_fine():
            # It syncs the files it writes.
            writer = dcp.FileSystemWriter(unfinished)
            dcp.save(leaves, storage_writer=writer, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:  # no Exception, and raised on every rank
        raise RuntimeError(f"save: could not write {unfinished}: {reason(error)}") from error
    with together():
        mine = [*unfinished.glob(f"__{this_rank()}_*")]
        if this_rank() == 0:
            mine.append(unfinished / ".metadata")
        files = {file.name: folders.summed(file) for file in mine}
    files = {name: file for of_rank in from_all(files) for name, file in sorted(of_rank.items())}
    with together():
        if this_rank() == 0:
            description = {"torch": torch.__version__, "step": step, "run": run}
            description |= {"leaves": described, "files": files}
            folders.finish(unfinished, target, description)
            if keep is not None:
                folders.remove_older(target, keep)
    return target
