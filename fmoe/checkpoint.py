"""Checkpoints that survive a crash, on ``torch.distributed.checkpoint``, in one process or in many.

A checkpoint is a folder ``step-00000010`` of tensors under dotted names and ``checkpoint.json``, which says
what they are. It is written under another name and renamed when all of it is on disk, so a folder of that
name is whole, whenever the process was killed.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from .checkpoint_reader import PlainReader
from .errors import argument_error
from .tree import check_tensors, dotted_names

VERSION = 1
DESCRIPTION = "checkpoint.json"


class Loaded(NamedTuple):
    """A state as it was saved, and how many steps had been made: the next step, and the next batch's."""

    state: Any
    step: int


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

    With a process group, every rank calls this and the folder is one that all see. What a killed save left
    behind is removed by the next; a damaged checkpoint of the same step is renamed to ``.damaged``.

    Raises ``ValueError`` where a whole checkpoint of this step is there already, and for leaves that are no
    tensors or share a name.

    >>> import tempfile
    >>> state = {"w": torch.arange(3.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, 10, state)
    ...     latest(folder) == path, load(path, {"w": torch.zeros(3)})
    (True, Loaded(state={'w': tensor([0., 1., 2.])}, step=10))
    """
    leaves, target = _named("save", state), Path(folder, f"step-{step:08d}")
    run = json.loads(json.dumps(run or {}))
    if keep is not None and keep < 1:
        raise argument_error("save", "keep", got=keep, expected="at least 1", remedy="Use None to keep all.")
    if not _damage(target):
        raise argument_error(
            "save",
            "step",
            got=f"{step}, and {target} is there already",
            expected="a step without a checkpoint",
            remedy="Resume from it, delete it, or save to another folder.",
        )
    unfinished = target.with_suffix(".tmp")
    _barrier()
    if _is_first_rank():
        Path(folder).mkdir(parents=True, exist_ok=True)
        for left in Path(folder).glob("step-*.tmp"):
            if re.fullmatch(r"step-\d{8,}", left.stem):
                _remove(left)
        if target.exists():
            damaged = target.with_suffix(".damaged")
            if damaged.exists():
                _remove(damaged)
            target.rename(damaged)
        unfinished.mkdir()
    _barrier()
    with _one_process_is_fine():
        # It syncs the files it writes.
        dcp.save(leaves, storage_writer=dcp.FileSystemWriter(unfinished), no_dist=not dist.is_initialized())
    if _is_first_rank():
        description = {
            "format": "fmoe",
            "version": VERSION,
            "torch": torch.__version__,
            "step": step,
            "run": run,
            "leaves": _described(leaves),
            "files": {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())},
        }
        with (unfinished / DESCRIPTION).open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(unfinished)
        unfinished.rename(target)
        _sync(target.parent)
        _sync(target.parent.parent)
        if keep is not None:
            for old in [path for path in _whole(folder) if _step(path) <= step][:-keep]:
                # Renamed first: a half-deleted checkpoint must not look like one.
                _remove(old.rename(old.with_suffix(".tmp")))
    _barrier()
    return target


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the most steps, or ``None``; those that lack a file or part of one don't count."""
    return next(reversed(_whole(folder)), None)


def load(
    path: str | Path, like: Any, *, run: Mapping[str, Any] | None = None, donate: bool = False
) -> Loaded:
    """What :func:`save` wrote, with the structure, devices and placements of ``like``.

    =========  ===================================================================================
    path       from :func:`latest`
    like       a tree as the one saved, of tensors of the same shapes and dtypes; DTensors may be placed
               otherwise than they were
    run        compared with the ``run`` that was saved, unless ``None``
    donate     write into the tensors of ``like``, which must not be used again, instead of new ones
    -> Loaded  ``state`` and ``step``
    =========  ===================================================================================

    Nothing is unpickled but tensors, by PyTorch's ``weights_only``, and PyTorch's index of them, by
    an unpickler that knows that index's classes and no other.

    Raises ``ValueError`` for what is no checkpoint, or not all of one, and where it differs from ``like`` or
    ``run``, with every difference.
    """
    path, leaves = Path(path), _named("load", like)
    description = _description(path)
    if isinstance(description, str) or (damage := _damage(path)):
        raise argument_error(
            "load",
            str(path),
            got=description if isinstance(description, str) else damage,
            expected="a whole checkpoint of fmoe",
            remedy="Choose another, or delete it and resume from the one before.",
        )
    differences = _differences("state", description["leaves"], _described(leaves))
    if run is not None:
        differences = _differences("run", description["run"], json.loads(json.dumps(run))) + differences
    if differences:
        raise argument_error(
            "load",
            str(path),
            got="; ".join(differences),
            expected="a checkpoint of this model and data",
            remedy="Resume with the options it was saved with, or train into another folder.",
        )
    if not donate:
        leaves = {name: torch.empty_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
    reader = PlainReader(path)
    try:
        reader.read_metadata()  # PyTorch would try it twice and print two tracebacks
        with _one_process_is_fine():
            dcp.load(leaves, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        raise argument_error(
            "load",
            str(path),
            got=str(error).strip().rpartition("\n")[2] or type(error).__name__,
            expected="readable tensors",
            remedy="It was damaged after it was saved; delete it and resume from the one before.",
        ) from error
    state = optree.tree_unflatten(optree.tree_structure(like), list(leaves.values()))
    return Loaded(state, description["step"])


def _named(function: str, state: Any) -> dict[str, torch.Tensor]:
    leaves, names = check_tensors(function, "state", state), dotted_names(state)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise argument_error(
            function, "state", got=f"several leaves named {twice}", expected="one each", remedy="Rename them."
        )
    return {name: leaf.detach() for name, leaf in zip(names, leaves)}


def _described(leaves: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for name, leaf in leaves.items()
    }


def _differences(name: str, theirs: Any, ours: Any) -> list[str]:
    """Where two trees of JSON differ, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        return [
            text
            for key in keys
            for text in _differences(f"{name}.{key}", theirs.get(key, "absent"), ours.get(key, "absent"))
        ]
    return [] if theirs == ours else [f"{name} is {theirs}, here {ours}"]


def _whole(folder: str | Path) -> list[Path]:
    """The undamaged checkpoints of a folder, by step."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if not _damage(path)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str:
    """What a checkpoint lacks; empty for a whole one."""
    description = _description(path)
    if isinstance(description, str):
        return description
    sizes = {name: _size(path / name) for name in description["files"]}
    return "; ".join(
        f"{name} of {sizes[name]} bytes, which had {size}"
        for name, size in description["files"].items()
        if sizes[name] != size
    )


def _description(path: Path) -> Any:
    """The content of checkpoint.json, or in words why there is none."""
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {DESCRIPTION} ({type(error).__name__}: {error})"
    if not isinstance(description, dict) or description.get("format") != "fmoe":
        return f"a {DESCRIPTION} that isn't fmoe's"
    if description.get("version") != VERSION:
        return f"format version {description.get('version')}, where this fmoe reads {VERSION}"
    if missing := {"step", "run", "leaves", "files"} - description.keys():
        return f"a {DESCRIPTION} without {sorted(missing)}"
    return description


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
