"""Meshes of devices with the axes ``pp``, ``dp``, ``ep``, ``tp``."""

import itertools
import math
import os
import re
import socket
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import argument_error, check_kind
from ..ops.core.axes import axis_names, axis_sizes, describe
from .together import check_alike

AXES = ("pp", "dp", "ep", "tp")


def make_mesh(
    axes: str = "", *, names: Sequence[str] = AXES, device_type: str | None = None, **sizes: int
) -> DeviceMesh:
    """A mesh of all processes, from ``"dp=2,ep=4"`` or from ``dp=2, ep=4``.

    ===========  =====================================================================
    axes, sizes  the devices along ``dp`` (data), ``ep`` (experts), ``tp`` (tensors) and ``pp``
                 (pipeline); an axis that isn't named has one
    names        axes of your own for :func:`fmoe.shard_map`, in order, instead of these four
    device_type  ``"cuda"`` or ``"cpu"``; ``None``: ``"cuda"`` where there is a CUDA device
    -> mesh      always with all axes, by default pp, dp, ep, tp in this order
    ===========  =====================================================================

    Under ``torchrun`` it joins the processes that were started. Without a launcher this process is the only
    one. It uses a process group that exists already. If there are fewer GPUs than processes, these share
    them, with a warning.

    Raises ``ValueError`` for axes it doesn't know, and for sizes whose product isn't the number of processes.
    It also raises if the processes want different meshes.

    >>> make_mesh("ep=1").mesh_dim_names
    ('pp', 'dp', 'ep', 'tp')
    >>> make_mesh("rows=1,columns=1", names=("rows", "columns")).shape
    (1, 1)
    """
    names = tuple(names)
    if not names or len({*names}) < len(names) or not all(str(name).isidentifier() for name in names):
        expected = "different names, each a word of letters, digits and _"
        raise argument_error("make_mesh", "names", got=names, expected=expected)
    check_kind("make_mesh", "axes", axes, str, 'Pass "dp=2,ep=4", say.')
    shape = parse_axes("make_mesh", axes, sizes, names)
    if device_type and device_type not in ("cpu", "cuda", "meta"):
        got, expected = repr(device_type), "'cpu' or 'cuda'"
        raise argument_error("make_mesh", "device_type", got=got, expected=expected)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    world = num_processes()
    if math.prod(shape) != world:
        got = ", ".join(f"{name}={size}" for name, size in zip(names, shape))
        expected = f"a product of {world}, the number of processes"
        remedy = f"Start one process per device, as with torchrun --nproc-per-node {math.prod(shape)}."
        raise argument_error("make_mesh", "axes", got=got, expected=expected, remedy=remedy)
    if not dist.is_initialized():
        if device_type == "cuda":
            check_device(device_type, "make_mesh: device_type")
            rank, here = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
            if take_gpu(rank, here) and rank == 0:
                gpus = torch.cuda.device_count()
                warnings.warn(
                    f"make_mesh: {here} processes share {gpus} GPU(s) and talk over sockets, which is for "
                    "trying things. Start one process per GPU.",
                    stacklevel=2,
                )
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        alone: dict[str, Any] = {} if launched() else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, **alone)
    check_alike("make_mesh", {"axes": dict(zip(names, shape))})
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    _flatten(mesh)
    return mesh


def stage_mesh(function: str, mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of this device's stage of a pipeline: without ``pp``, unless that has one rank.

    All processes call it, since it makes process groups. Raises ``ValueError`` for a mesh of ``pp`` alone.
    """
    if not is_pipeline(mesh):
        return mesh
    rest = tuple(axis for axis in axis_names(mesh) if axis != "pp")
    if not rest:
        remedy = "Use fmoe.make_mesh, whose meshes have all axes."
        raise argument_error(function, "mesh", got=describe(mesh), expected="another axis", remedy=remedy)
    _flatten(mesh)
    return mesh[rest]


def is_pipeline(mesh: DeviceMesh | None) -> bool:
    """Whether a mesh has several ranks along ``pp``."""
    return mesh is not None and axis_sizes(mesh).get("pp", 1) > 1


def _flatten(mesh: DeviceMesh) -> None:
    """Make the process groups of several axes."""
    many = tuple(name for name, size in axis_sizes(mesh).items() if size > 1)
    for count in range(2, len(many) + 1):
        for several in itertools.combinations(many, count):
            mesh[several]._flatten()  # DTensor uses it too: one collective for several axes


def take_gpu(rank: int, number: int) -> bool:
    """Choose the GPU of this process, one of ``number`` on this host. Tells whether it must share the GPU."""
    devices = torch.cuda.device_count()
    torch.cuda.set_device(rank % devices)
    if number <= devices:
        return False
    # NCCL refuses two ranks on one GPU unless they seem to be on two hosts that only sockets connect.
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()} {rank}"
    os.environ |= dict.fromkeys(("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"), "1")
    return True


def named_device(device: Any, argument: str = "--device") -> torch.device:
    """The device that a text or a number names. Raises ``ValueError`` if it names none that fmoe computes on.

    >>> named_device("cuda:1").index
    1
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument}: got {device!r}, expected cpu, cuda or, say, cuda:1.")
    return found


def check_device(device: Any, argument: str = "--device") -> None:
    """Raise ``ValueError`` for a device that isn't here.

    >>> check_device("cpu")
    """
    wanted, found = named_device(device, argument), torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        expected = f"a device that PyTorch finds; of CUDA it finds {found} here"
        remedy = "Count from cuda:0." if found else "Use the CPU, or see python -m fmoe doctor."
        raise ValueError(f"{argument}: got {device!r}, expected {expected}. {remedy}")


def launched() -> bool:
    """Whether ``torchrun``, or a launcher like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_processes() -> int:
    """The size of the process group, or of the one that :func:`make_mesh` would join."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def parse_axes(
    function: str, axes: str, sizes: Mapping[str, int] = MappingProxyType({}), known: Sequence[str] = AXES
) -> tuple[int, ...]:
    """The size of each of the ``known`` axes. Raises ``ValueError`` for others, and for sizes below one."""
    found: list[tuple[str, int]] = list(sizes.items())
    for item in filter(None, axes.replace(" ", "").split(",")):
        if not re.fullmatch(r"\w+=\d+", item):
            raise argument_error(function, "axes", got=repr(axes), expected='axes and sizes like "dp=2,ep=4"')
        name, _, size = item.partition("=")
        found.append((name, int(size)))
    names = [name for name, _ in found]
    bad = [
        f"{n}={s}" for n, s in found if n not in known or type(s) is not int or s < 1 or names.count(n) > 1
    ]
    if bad:
        expected = f"each of {tuple(known)} at most once, of size at least 1"
        other = function == "make_mesh" and not set(names) <= set(known)
        remedy = f"For axes of your own pass names={tuple(dict.fromkeys(names))}." if other else None
        raise argument_error(function, "axes", got=", ".join(bad), expected=expected, remedy=remedy)
    return tuple(dict(found).get(name, 1) for name in known)
