"""A state to save or load: its tensors by name, their description, and the ranks that can do it."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ...errors import argument_error, some
from ...parallel.mesh import is_pipeline
from ...parallel.together import differences, from_all, num_ranks, together
from ...tree import check_tensors, dotted_names


def check_ranks(function: str) -> None:
    """Raise ``ImportError`` where several ranks can't save or load together, for lack of numpy.

    >>> check_ranks("train")  # one rank needs none
    """
    if num_ranks() > 1 and not find_spec("numpy"):
        raise ImportError(
            f"{function}: between ranks torch.distributed.checkpoint needs numpy. "
            "Install it with: pip install numpy."
        )


def named(function: str, state: Any) -> dict[str, torch.Tensor]:
    leaves, names = check_tensors(function, "state", state), dotted_names(state)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise argument_error(function, "state", got=f"several leaves named {twice}", expected="one each")
    return {name: leaf.detach() for name, leaf in zip(names, leaves)}


def dtypes_and_shapes(leaves: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for name, leaf in leaves.items()
    }


def described_along(
    function: str, argument: str, leaves: Mapping[str, torch.Tensor], mesh: DeviceMesh | None
) -> dict[str, str]:
    """The dtypes and shapes of a state's leaves; with ``pp``, of those that any rank along it holds.

    Raises ``ValueError`` on all ranks where two describe a leaf differently.
    """
    found = dtypes_and_shapes(leaves)
    if mesh is None or not is_pipeline(mesh):
        return found
    of_ranks = from_all(found, mesh.get_group("pp"))
    with together():
        for rank, theirs in enumerate(of_ranks):
            both = {name: text for name, text in theirs.items() if name in found}
            if wrong := differences(argument, {name: found[name] for name in both}, both):
                got = f"on rank {rank} along pp, beside another: {some(wrong, '; ')}"
                raise argument_error(function, argument, got=got, expected="the same on every rank")
            found = theirs | found
    return found


def digest(described: Mapping[str, str]) -> str:
    """A few letters that differ if descriptions do."""
    text = json.dumps(sorted(described.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def reason(error: BaseException) -> str:
    """The last line of an error. PyTorch's errors show tracebacks of ranks before it."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


@contextlib.contextmanager
def one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
