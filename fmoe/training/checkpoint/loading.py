"""Loading the newest checkpoint or a named one, on any mesh."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error
from ...ops.core.dtensors import map_local
from ...ops.core.memory import alone
from ...parallel.together import check_alike, differences, num_ranks, this_rank, together
from . import folder as folders
from .lock import hold
from .reader import PlainReader
from .state import check_ranks, described_along, digest, named, one_process_is_fine, reason

_LOG = logging.getLogger("fmoe")


class Loaded(NamedTuple):
    """A state as it was saved, and the number of steps it had made, which is that of the next step and batch.

    >>> state, start = Loaded({"params": torch.zeros(2)}, step=10)  # as from load
    >>> [*range(start, 12)]  # the steps that are left of twelve
    [10, 11]
    """

    state: Any
    step: int


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps, or ``None``. One without all of its files doesn't count.

    >>> import tempfile
    >>> from fmoe.training.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (5, 10):
    ...         path = save(folder, step, {"w": torch.zeros(3)})
    ...     latest(folder).name
    'step-00000010'
    """
    return next(reversed(folders.whole(folder)), None)


def load(
    path: str | Path,
    like: Any,
    *,
    run: Mapping[str, Any] | None = None,
    donate: bool = False,
    mesh: DeviceMesh | None = None,
) -> Loaded:
    """Read a state that :func:`save` wrote, with the structure, devices and placements of ``like``.

    =========  ===================================================================================
    path       from :func:`latest`
    like       a tree as the one saved, of tensors of the same shapes and dtypes. DTensors may have other
               placements. Plain tensors get whole values, also of what were DTensors
    run        compared with the ``run`` that was saved, unless ``None``
    donate     write into the tensors of ``like``, which must not be used again, instead of new ones. Leaves
               that share memory get new ones all the same
    -> Loaded  ``state`` and ``step``
    =========  ===================================================================================

    With a process group every rank calls this, and each reads the saved pieces that overlap its own. Tensors
    are unpickled by PyTorch's ``weights_only``, and PyTorch's index by an unpickler of that index's classes.

    Raises ``ValueError`` for a folder that is no whole checkpoint or changed since it was saved. It also
    lists every difference from ``like`` or ``run``. An error of one rank is raised on all.

    >>> import tempfile
    >>> from fmoe.training.checkpoint import save
    >>> params = {"w": torch.randn(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 10, params)
    ...     state, step = load(path, {"w": torch.empty(3)})
    >>> step, torch.equal(state["w"], params["w"])
    (10, True)
    """
    with together():
        if path is None:
            remedy = "Begin without one, or correct the folder that latest looked in."
            raise argument_error("load", "path", got="None", expected="a checkpoint", remedy=remedy)
        path, reader = Path(path), PlainReader(path)
        check_ranks("load")
        leaves = named("load", like)
        description = folders.described(path)
        if damage := folders.damage(path):
            raise _damaged(path, damage)
    described = described_along("load", "like", leaves, mesh)
    with together():
        _check_same(path, description, described, run)
    check_alike("load", {"path": path.name, "like": digest(described)})
    with together():
        # Every file is read by one rank, and by those that hold a part of it.
        if damage := folders.changed(path, sorted(description["files"])[this_rank() :: num_ranks()]):
            raise _damaged(path, damage)
        written = alone([*leaves.values()]) if donate else [False] * len(leaves)
        leaves = {
            name: leaf if kept else map_local(torch.empty_like, leaf)
            for (name, leaf), kept in zip(leaves.items(), written)
        }
    try:
        with together():
            reader.read_metadata()  # PyTorch would try it twice and print two tracebacks
        with one_process_is_fine():
            dcp.load(leaves, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        got, expected = reason(error), "readable tensors"
        remedy = "Delete it and resume from the one before."
        raise argument_error("load", str(path), got=got, expected=expected, remedy=remedy) from error
    state = optree.tree_unflatten(optree.tree_structure(like), list(leaves.values()))
    return Loaded(state, description["step"])


def start(
    folder: str | Path,
    state: Any,
    *,
    resume: bool,
    saves: bool = True,
    run: Mapping[str, Any] | None = None,
    mesh: DeviceMesh | None = None,
) -> Loaded:
    """The state a run begins with: ``state``, or with ``resume`` that of the newest checkpoint, if any.

    =========  ===================================================================================
    folder     where the run saves
    state      its initial state; a checkpoint is loaded into its tensors, so don't use them again
    resume     whether to go on from a checkpoint of the folder
    saves      whether the run will save: what that lacks is an error now, not at the first checkpoint
    run        compared with the ``run`` that was saved, unless ``None``
    mesh       of a pipeline, as for :func:`load`
    -> Loaded  ``state`` and the number of steps made
    =========  ===================================================================================

    The folder is locked for this process until it ends, so that no second run writes there. With a process
    group every rank calls this. If the newest checkpoint is damaged and an older one is whole, it goes on
    from that one, and logs it.

    Raises ``ValueError`` where another process trains in the folder, and without ``resume`` where the folder
    has a checkpoint. Raises ``ImportError`` as :func:`check_ranks` does, and what :func:`load` raises.

    >>> import tempfile
    >>> from fmoe.training.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(start(folder, {"w": torch.zeros(2)}, resume=True))
    ...     path = save(folder, 10, {"w": torch.ones(2)})
    ...     print(start(folder, {"w": torch.zeros(2)}, resume=True))
    Loaded(state={'w': tensor([0., 0.])}, step=0)
    Loaded(state={'w': tensor([1., 1.])}, step=10)
    """
    with together():
        if saves:
            check_ranks("start")
        if this_rank() == 0:
            hold(folder)
        newest, named = latest(folder), next(reversed(folders.checkpoints(folder)), None)
    check_alike("start", {"run": run, "checkpoints": [str(newest), str(named)]})
    if resume and named:
        if newest and newest != named and this_rank() == 0:
            _LOG.warning(f"{named} is damaged; going on from {newest}")
        return load(newest or named, state, run=run, donate=True, mesh=mesh)
    if newest:
        got = f"{newest} of an earlier run"
        remedy = "Resume, delete it, or choose another folder."
        raise argument_error("start", "folder", got=got, expected="none, or resume", remedy=remedy)
    return Loaded(state, 0)


def _check_same(
    path: Path,
    description: Mapping[str, Any],
    described: Mapping[str, str],
    run: Mapping[str, Any] | None,
) -> None:
    found = differences("state", description["leaves"], described)
    if run is not None:
        theirs = description["run"]
        found = differences("run", theirs, _known(theirs, json.loads(json.dumps(run)))) + found
    if found:
        expected = "a checkpoint of this model and data"
        remedy = "Resume with the options it was saved with, or train into another folder."
        raise argument_error("load", str(path), got="; ".join(found), expected=expected, remedy=remedy)


def _known(theirs: Any, ours: Any) -> Any:
    """A run's description without options that an older one doesn't know, where they are off."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        return ours
    return {key: _known(theirs.get(key), value) for key, value in ours.items() if key in theirs or value}


def _damaged(path: Path, damage: str) -> ValueError:
    expected = "a whole checkpoint of fmoe"
    remedy = "Choose another, or delete it and resume from the one before."
    if folders.checkpoints(path):
        damage, remedy = "a folder of checkpoints", "Pass one of them: latest(folder) is the newest."
    elif not path.exists():
        damage, remedy = "no such folder", "Correct the path."
    return argument_error("load", str(path), got=damage, expected=expected, remedy=remedy)
