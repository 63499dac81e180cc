"""Checkpoints that survive a crash, on ``torch.distributed.checkpoint``, in one process or in many.

A checkpoint is a folder ``step-00000010`` of tensors under dotted names and ``checkpoint.json``, which says
what they are. It is written under another name and renamed when all of it is on disk, so a folder of that
name is whole, whenever the process was killed.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ...errors import argument_error
from ...ops.core.dtensors import is_dtensor
from ...parallel.together import check_alike, differences, from_all, num_ranks, this_rank, together
from ...tree import check_tensors, dotted_names
from . import folder as folders
from .reader import PlainReader


class Loaded(NamedTuple):
    """A state as it was saved, and how many steps had been made: the next step, and the next batch's.

    >>> state, start = Loaded({"params": torch.zeros(2)}, step=10)  # as from load
    >>> [*range(start, 12)]  # the steps that are left of twelve
    [10, 11]
    """

    state: Any
    step: int


def check_ranks(function: str) -> None:
    """Raise ``ImportError`` where several ranks can't save or load together, for lack of numpy.

    >>> check_ranks("train")  # one rank needs none
    """
    if num_ranks() > 1 and not find_spec("numpy"):
        raise ImportError(
            f"{function}: between ranks torch.distributed.checkpoint needs numpy. "
            "Install it with: pip install numpy."
        )


def save(
    folder: str | Path,
    step: int,
    state: Any,
    *,
    run: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Write ``folder/step-XXXXXXXX``; when this returns it is on disk, and until then it does not exist.

    =========  ===================================================================================
    step       how many steps were made; batches depend on nothing else, so it is the data position
    state      a tree of tensors, DTensors among them: ``{"params": params, "optimizer": state}``
    run        JSON: what a run that resumes must have in common, as ``{"model": {"dim": 128}}``
    keep       how many checkpoints to keep, the newest; ``None``: all
    -> path
    =========  ===================================================================================

    With a process group, every rank calls this and the folder is one that all see. Of a DTensor each rank
    writes its piece, of a plain tensor, which is the same on all, one does. What a killed save left behind is
    removed by the next; a damaged checkpoint of the same step is renamed to ``.damaged``.

    Raises ``ValueError`` where a whole checkpoint of this step is there already, and for leaves that are no
    tensors or share a name. What is raised on one rank is raised on all.

    >>> import tempfile
    >>> state = {"w": torch.arange(3.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 10, state)
    ...     latest(folder) == path, load(path, {"w": torch.zeros(3)})
    (True, Loaded(state={'w': tensor([0., 1., 2.])}, step=10))
    """
    target = Path(folder, f"step-{step:08d}")
    unfinished = target.with_suffix(".tmp")
    with together():
        check_ranks("save")
        leaves, run = _named("save", state), json.loads(json.dumps(run or {}))
        if keep is not None and keep < 1:
            raise argument_error(
                "save", "keep", got=keep, expected="at least 1", remedy="Use None to keep all."
            )
    check_alike("save", {"step": step, "run": run, "state": _digest(leaves)})
    with together():
        if this_rank() == 0:
            folders.begin(target)
    try:
        with _one_process_is_fine():
            # It syncs the files it writes.
            writer = dcp.FileSystemWriter(unfinished)
            dcp.save(leaves, storage_writer=writer, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:  # no Exception, and raised on every rank
        raise RuntimeError(f"save: could not write {unfinished}: {_reason(error)}") from error
    with together():
        mine = [*unfinished.glob(f"__{this_rank()}_*")]
        if this_rank() == 0:
            mine.append(unfinished / ".metadata")
        files = {file.name: folders.summed(file) for file in mine}
    files = {name: file for of_rank in from_all(files) for name, file in sorted(of_rank.items())}
    with together():
        if this_rank() == 0:
            description = {"torch": torch.__version__, "step": step, "run": run}
            description |= {"leaves": _described(leaves), "files": files}
            folders.finish(unfinished, target, description)
            if keep is not None:
                folders.remove_older(target, keep)
    return target


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps, or ``None``; those that lack a file or part of one don't count.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (5, 10):
    ...         path = save(folder, step, {"w": torch.zeros(3)})
    ...     latest(folder).name
    'step-00000010'
    """
    return next(reversed(folders.whole(folder)), None)


def load(
    path: str | Path, like: Any, *, run: Mapping[str, Any] | None = None, donate: bool = False
) -> Loaded:
    """What :func:`save` wrote, with the structure, devices and placements of ``like``, on any mesh.

    =========  ===================================================================================
    path       from :func:`latest`
    like       a tree as the one saved, of tensors of the same shapes and dtypes; DTensors may be placed
               otherwise than they were, and plain tensors, which are then whole, may have been DTensors
    run        compared with the ``run`` that was saved, unless ``None``
    donate     write into the tensors of ``like``, which must not be used again, instead of new ones
    -> Loaded  ``state`` and ``step``
    =========  ===================================================================================

    With a process group every rank calls this, and each reads the saved pieces that its own overlap. Nothing
    is unpickled but tensors, by PyTorch's ``weights_only``, and PyTorch's index of them, by an unpickler that
    knows that index's classes and no other.

    Raises ``ValueError`` for what is no checkpoint, or not all of one, or changed since, and where it differs
    from ``like`` or ``run``, with every difference. What is raised on one rank is raised on all.

    >>> import tempfile
    >>> params = {"w": torch.randn(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 10, params)
    ...     state, step = load(path, {"w": torch.empty(3)})
    >>> step, torch.equal(state["w"], params["w"])
    (10, True)
    """
    path, reader = Path(path), PlainReader(path)
    with together():
        check_ranks("load")
        leaves = _named("load", like)
        description = folders.described(path)
        if damage := folders.damage(path):
            raise _damaged(path, damage)
        _check_same(path, description, leaves, run)
    check_alike("load", {"path": path.name, "like": _digest(leaves)})
    with together():
        # Every file is read by one rank, and by those that hold a part of it.
        if damage := folders.changed(path, sorted(description["files"])[this_rank() :: num_ranks()]):
            raise _damaged(path, damage)
        if not donate:
            leaves = {name: _empty_like(leaf) for name, leaf in leaves.items()}
    try:
        with together():
            reader.read_metadata()  # PyTorch would try it twice and print two tracebacks
        with _one_process_is_fine():
            dcp.load(leaves, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        raise argument_error(
            "load",
            str(path),
            got=_reason(error),
            expected="readable tensors",
            remedy="Delete it and resume from the one before.",
        ) from error
    state = optree.tree_unflatten(optree.tree_structure(like), list(leaves.values()))
    return Loaded(state, description["step"])


def _named(function: str, state: Any) -> dict[str, torch.Tensor]:
    leaves, names = check_tensors(function, "state", state), dotted_names(state)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise argument_error(function, "state", got=f"several leaves named {twice}", expected="one each")
    return {name: leaf.detach() for name, leaf in zip(names, leaves)}


def _empty_like(leaf: torch.Tensor) -> torch.Tensor:
    if not is_dtensor(leaf):
        return torch.empty_like(leaf)
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(leaf.to_local())
    placed = leaf.device_mesh, leaf.placements
    return DTensor.from_local(local, *placed, run_check=False, shape=leaf.shape, stride=leaf.stride())


def _described(leaves: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for name, leaf in leaves.items()
    }


def _digest(leaves: Mapping[str, torch.Tensor]) -> str:
    """A few letters that differ if descriptions do."""
    text = json.dumps(sorted(_described(leaves).items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check_same(
    path: Path,
    description: Mapping[str, Any],
    leaves: Mapping[str, torch.Tensor],
    run: Mapping[str, Any] | None,
) -> None:
    found = differences("state", description["leaves"], _described(leaves))
    if run is not None:
        found = differences("run", description["run"], json.loads(json.dumps(run))) + found
    if found:
        raise argument_error(
            "load",
            str(path),
            got="; ".join(found),
            expected="a checkpoint of this model and data",
            remedy="Resume with the options it was saved with, or train into another folder.",
        )


def _damaged(path: Path, damage: str) -> ValueError:
    return argument_error(
        "load",
        str(path),
        got=damage,
        expected="a whole checkpoint of fmoe",
        remedy="Choose another, or delete it and resume from the one before.",
    )


def _reason(error: BaseException) -> str:
    """The last line of an error: of PyTorch's, which shows tracebacks of ranks, the error itself."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
