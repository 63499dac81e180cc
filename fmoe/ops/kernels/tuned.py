"""The engine and tile of grouped products on a device, as ``python -m fmoe tune`` measured them.

Products only read the file, once a process. Processes that share a file compute the same bits.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from ...errors import argument_error

OVERRIDE = "FMOE_TUNED"


class Tile(NamedTuple):
    """The part of a product that one program computes at a time, and its share of the processor.

    ``cluster`` programs, of quack-kernels only, share what they load.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    cluster: int = 1


class Choice(NamedTuple):
    """An engine of ``grouped``, and for ``"triton"`` its tile; ``None``: the one that is best for most."""

    engine: str
    tile: Tile | None = None


def key(product: str, sizes: Sequence[int], dtype: torch.dtype) -> str:
    """The name in a file of a product of sizes (e, I, O). The number of rows isn't part of it.

    >>> key("mm", (64, 2048, 1408), torch.bfloat16)
    'mm 64 x 2048 x 1408 bfloat16'
    """
    return f"{product} {' x '.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}"


def file() -> Path:
    """Named by the environment variable ``FMOE_TUNED``, or in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(OVERRIDE) or Path(cache, "fmoe", "tuned.json"))


# One for all threads: a backward on CUDA has one of its own.
_in_force: dict[torch.device, Mapping[str, Choice]] = {}


def choices(device: torch.device) -> Mapping[str, Choice]:
    """The choices for products on a device, by :func:`key`: the file's, except inside :func:`using`."""
    if device not in _in_force:
        found = _read().get(device_name(device), {})
        try:
            kept = {k: Choice(engine, tile and Tile(*tile)) for k, (engine, tile) in found.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise _unreadable(error) from error
        _in_force[device] = MappingProxyType(kept)
    return _in_force[device]


@contextmanager
def using(device: torch.device, some: Mapping[str, Choice]) -> Iterator[None]:
    """While the block runs, some products on a device take these choices; the others' stay."""
    before = choices(device)
    _in_force[device] = MappingProxyType({**before, **some})
    try:
        yield
    finally:
        _in_force[device] = before


def forget() -> None:
    """The next product reads the file again."""
    _in_force.clear()


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write(device: torch.device, found: dict[str, Choice]) -> Path:
    """Add what was found for a device to the file, whole or not at all."""
    table, path = _read(), file()
    table[device_name(device)] = table.get(device_name(device), {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(table, indent=1))
    forget()
    return beside.replace(path)


def _read() -> dict[str, dict[str, Choice]]:
    try:
        table = json.loads(file().read_text())
    except OSError as error:
        if OVERRIDE in os.environ and not isinstance(error, FileNotFoundError):
            raise _unreadable(error) from error
        return {}  # nobody asked for a file in a cache that can't be read
    except ValueError as error:
        raise _unreadable(error) from error
    if not isinstance(table, dict):
        raise _unreadable(type(table).__name__)
    return table


def _unreadable(why: object) -> ValueError:
    got, expected = f"{file()}, which can't be read: {why}", "what python -m fmoe tune writes"
    remedy = "Delete the file, and measure again."
    return argument_error("grouped_mm", OVERRIDE, got=got, expected=expected, remedy=remedy)
