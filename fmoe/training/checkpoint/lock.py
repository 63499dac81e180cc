"""One run at a time in a folder: a lock that the process holds until it ends, however it ends."""

import os
import socket
from pathlib import Path

from ...errors import argument_error

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
_HELD: dict[Path, tuple[int, int]] = {}  # the process, as a fork copies this, and the open file's descriptor


def hold(folder: str | Path) -> None:
    """Lock a folder for this process. The system unlocks it when the process is gone, whatever ended it.

    A process that has the lock may ask again. Where the file system can't lock, or the folder can't be
    written to, nothing happens. Raises ``ValueError`` where another process has the lock.
    """
    path = Path(folder).resolve() / LOCK
    if fcntl is None or _is_held(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 1000).decode(errors="replace") or "another process"
        os.close(file)
        if not isinstance(error, BlockingIOError):
            return
        got, expected = f"{folder}, in which {holder} trains", "a folder without a run"
        remedy = "Wait for it, end it, or choose another folder."
        raise argument_error("start", "folder", got=got, expected=expected, remedy=remedy) from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    if path in _HELD:
        os.close(_HELD[path][1])
    _HELD[path] = os.getpid(), file


def _is_held(path: Path) -> bool:
    """Whether this process has locked this file, and not one that was deleted since."""
    process, file = _HELD.get(path, (0, 0))
    return process == os.getpid() and path.exists() and os.path.samestat(os.fstat(file), path.stat())
