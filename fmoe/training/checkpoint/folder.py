"""A checkpoint as a folder of files: its beginning and end, its description, and whether it is whole."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import argument_error, some

VERSION = 2
DESCRIPTION = "checkpoint.json"
_FIELDS = {"step": int, "run": dict, "leaves": dict, "files": dict}
_CHUNK = 1 << 20


def begin(target: Path) -> Path:
    """Make the folder that :func:`finish` will name ``target``, after moving aside what is in the way."""
    if not damage(target):
        got = f"{step_of(target)}, and {target} is there already"
        remedy = "Resume from it, delete it, or save to another folder."
        raise argument_error("save", "step", got=got, expected="a step without a checkpoint", remedy=remedy)
    unfinished = target.with_suffix(".tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob("step-*.tmp"):
        if re.fullmatch(r"step-\d{8,}", left.stem):
            remove(left)
    if target.exists():
        damaged = target.with_suffix(".damaged")
        if damaged.exists():
            remove(damaged)
        target.rename(damaged)
    unfinished.mkdir()
    return unfinished


def finish(unfinished: Path, target: Path, description: dict[str, Any]) -> None:
    """Add the description to files that are on disk, and give them the name of a whole checkpoint."""
    with (unfinished / DESCRIPTION).open("w", encoding="utf-8") as file:
        json.dump({"format": "fmoe", "version": VERSION, **description}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(unfinished)
    unfinished.rename(target)
    _sync(target.parent)
    _sync(target.parent.parent)


def remove_older(newest: Path, keep: int) -> None:
    """Remove all checkpoints up to ``newest`` but the last ``keep``."""
    for old in [path for path in whole(newest.parent) if step_of(path) <= step_of(newest)][:-keep]:
        # Renamed first: a half-deleted checkpoint must not look like one.
        remove(old.rename(old.with_suffix(".tmp")))


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, damaged ones too, by step."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def whole(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder whose files are all there, by step."""
    return [path for path in checkpoints(folder) if not damage(path)]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str:
    """The files of a checkpoint that are missing or of another size, in words; empty if none is."""
    description = described(path)
    if isinstance(description, str):
        return description
    sizes = ((name, _size(path / name), file["bytes"]) for name, file in description["files"].items())
    wrong = [f"{name} of {size} bytes, which had {had}" for name, size, had in sizes if size != had]
    return some(wrong, "; ")


def changed(path: Path, names: Iterable[str]) -> str:
    """Those of these files of a checkpoint whose content changed, in words; empty if none did."""
    files = described(path)["files"]
    return "; ".join(f"{name} whose content changed" for name in names if summed(path / name) != files[name])


def summed(file: Path) -> dict[str, int]:
    """A file's size and its CRC-32, which takes less time than reading from a disk."""
    total, chunk = 0, bytearray(_CHUNK)
    with file.open("rb", buffering=0) as content:
        while length := content.readinto(chunk):
            total = zlib.crc32(memoryview(chunk)[:length], total)
    return {"bytes": _size(file), "crc32": total}


def described(path: Path) -> Any:
    """The content of checkpoint.json, or, in words, the reason that there is none."""
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {DESCRIPTION} ({type(error).__name__}: {error})"
    if not isinstance(description, dict) or description.get("format") != "fmoe":
        return f"a {DESCRIPTION} that isn't fmoe's"
    if description.get("version") != VERSION:
        return f"format version {description.get('version')}, where this fmoe reads {VERSION}"
    if wrong := sorted(name for name, kind in _FIELDS.items() if not isinstance(description.get(name), kind)):
        return f"a {DESCRIPTION} without {wrong}"
    return description


def remove(path: Path) -> None:
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
