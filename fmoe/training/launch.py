"""A script that trains: the processes a launcher started, and how it ends."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

from ..ops.core.axes import axis_sizes, group_of
from ..parallel.mesh import check_device, make_mesh, num_processes
from ..parallel.placement import token_axes
from ..parallel.together import check_alike, num_ranks, this_rank

PACKAGE = Path(__file__).parents[1]


class World(NamedTuple):
    """The processes that train together, from :func:`join`.

    ========  ===========================================================================
    mesh      of all of them; ``None``: this process is the only one
    part      ``(i, n)``: this device reads part ``i`` of ``n`` of each batch; devices that
              differ only along ``pp`` and ``tp`` read the same part
    size      how many processes there are
    is_first  whether this is the one that prints and writes
    ========  ===========================================================================

    >>> world = World(None, (0, 1))
    >>> world.size, world.is_first, str(world)
    (1, True, 'one device')
    """

    mesh: DeviceMesh | None
    part: tuple[int, int]

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def pp(self) -> int:
        """The ranks along ``pp``."""
        return 1 if self.mesh is None else axis_sizes(self.mesh).get("pp", 1)

    @property
    def is_first(self) -> bool:
        return self.mesh is None or self.mesh.get_rank() == 0

    def __str__(self) -> str:
        if self.mesh is None:
            return "one device"
        axes = ",".join(f"{name}={size}" for name, size in axis_sizes(self.mesh).items() if size > 1)
        return f"{self.size} devices ({axes})"


def join(
    axes: str = "", *, device_type: str | None = None, options: Mapping[str, Any] | None = None
) -> World:
    """Join the processes that ``torchrun`` started, if any, as a mesh of these axes.

    ===========  ===========================================================================
    axes         as for :func:`fmoe.make_mesh`: ``"dp=2,ep=4"``
    device_type  ``"cuda"`` or ``"cpu"``; ``None``: ``"cuda"`` where there is a CUDA device
    options      what all processes must have in common, compared as text: ``vars(args)``
    -> World     without a launcher and axes: this process alone, without a mesh
    ===========  ===========================================================================

    Raises ``ValueError`` for options that differ, for a device type that isn't here, and for axes that
    :func:`fmoe.make_mesh` refuses.

    >>> join().part
    (0, 1)
    """
    check_device(device_type or "cpu", "join: device_type")
    if not axes and num_processes() == 1:
        return World(None, (0, 1))
    mesh = make_mesh(axes, device_type=device_type)
    check_alike("join", {"options": {name: str(value) for name, value in (options or {}).items()}})
    place = group_of(mesh, token_axes(mesh))
    return World(mesh, (place.position, place.size))


def run(main: Callable[[], Any]) -> None:
    """Call a script's ``main``; an error its user can act on becomes one line and exit status 2.

    Such an error is one that fmoe raises by itself, or a file that can't be read or written. Any other error
    keeps its traceback, and ``torchrun`` shows that of the process that failed first. A process that another
    one's error ends says so in one line, with the other's rank and error. In the end this leaves the process
    group.

    >>> run(lambda: print("trained"))
    trained
    """
    record(_without_traceback)(main)
    if dist.is_initialized():
        dist.destroy_process_group()


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _without_traceback(main: Callable[[], Any]) -> None:
    try:
        main()
    except Exception as error:
        # Notes say, for one, which stage and micro-batch of a pipeline it was.
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        text, rank = f"{error}{notes}", f"rank {this_rank()}"
        first = _first_failure(f"{rank}: {_in_short(error)}{notes}")
        if _tells_the_user(error):
            text = text if num_ranks() == 1 or text.startswith("on rank ") else f"on {rank}: {text}"
        elif isinstance(error, RuntimeError) and not first.startswith(f"{rank}: "):
            text = f"on {rank}, after that of {first} (here: {_in_short(error)})"
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def _first_failure(mine: str) -> str:
    """The failure of the rank that failed first, which may be ``mine``."""
    if num_ranks() == 1:
        return mine
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")  # one store may serve several
        return store.compare_set(f"fmoe: the first failure {attempt}", "", mine).decode()
    except RuntimeError:  # the rank that keeps the store is gone
        return mine


def _tells_the_user(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    expected = ValueError, RuntimeError, ImportError, FloatingPointError
    return isinstance(error, OSError) or (ours and isinstance(error, expected))
