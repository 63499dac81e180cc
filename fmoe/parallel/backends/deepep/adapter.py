"""DeepEP's two generations behind one interface. Only this file imports ``deep_ep``, and only on demand.

An *engine* is a communication buffer of one group, and moves rows through it:

``dispatch(x, weights, ids, num_experts,    tokens to the devices that hold their experts ->
max_tokens, wait, narrow)``                 :class:`Arrived`. With ``max_tokens``, as many rows as would come
                                            if every device sent so many here, and no wait of the host.
                                            ``narrow`` ones travel in fp8
``send(x, handle, wait)``                   other rows the same way
``combine(y, handle, weights, wait)``       rows back, summed, and with them their weights
``send_weights``, ``combine_weights``       weights alone, either way
``join()``                                  the current stream waits for the latest combine
``destroy()``                               frees the buffer
``rows(size)``                              the multiple that a row's length must be in a group of
                                            this size, and the most it may be

Without ``wait`` the current stream goes on meanwhile, and ``latest`` is the event to wait for. ``dispatch``
and ``send`` then return a function: called after that wait, it returns their results.

A handle says how rows were sent. It has tensors, the first with a row per token, and a few numbers. With
``max_tokens``, rows that didn't come are zeros, and their ids -1. Users install DeepEP themselves, since it
is built against their CUDA. This file follows v1.2.1 and 2.1.0.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ....errors import argument_error
from ....ops.bases import gather_kernel
from ....ops.precision import Scaled
from ..payload import in_fp8, narrowed, widened

# The limits of DeepEP's kernels.
DEVICES = ("cuda",)
PAYLOADS = (torch.bfloat16,)
MOST_CHOICES = 32  # experts per token: one per lane of a warp
MOST_EXPERTS = 1024  # on one device
SCALED = 128  # numbers of a row in fp8 that share a scale
WEIGHTS_DIM = 256  # rows of weights, as bytes, are padded to this: long enough for every kernel
PEERS = 8  # devices of a node that Buffer reaches by NVLink
NCCL_NEEDED = (2, 30, 4)  # by ElasticBuffer

CLASSES = {"buffer": "Buffer", "elastic": "ElasticBuffer"}
_NO_DEEP_EP = 'Use backend="all_to_all", or install DeepEP as docs/deepep.md says.'
refuse = functools.partial(argument_error, "deepep")


class Sizes(NamedTuple):
    """The most that a buffer must hold of each."""

    tokens: int
    dim: int
    top_k: int
    num_experts: int


class Handle(NamedTuple):
    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[int, ...] = ()


class Arrived(NamedTuple):
    """Rows for the experts held here, with weights and ids. An id of -1 is an expert elsewhere.

    ``num_pairs`` are the ids of experts held here, if the host knows.
    """

    x_SD: torch.Tensor
    weights_SK: torch.Tensor
    ids_SK: torch.Tensor
    num_pairs: int | None
    handle: Handle


def version() -> str | None:
    """The version of the installed DeepEP, even if it can't be loaded."""
    for name in ("deep_ep", "deep-ep"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def version_of(module: Any) -> str:
    return getattr(module, "__version__", None) or version() or "1.x"


def load() -> Any:
    """``deep_ep``, which must be there and have what this file calls. Raises ``ValueError`` otherwise."""
    try:
        import deep_ep as module
    except ModuleNotFoundError as error:
        if error.name == "deep_ep":
            raise refuse(
                "deep_ep", got="no package deep_ep", expected="DeepEP, 1.2.1 or newer", remedy=_NO_DEEP_EP
            ) from error
        raise _not_loaded(error) from error
    except Exception as error:  # a missing or old library, or DeepEP's own assertions
        raise _not_loaded(error) from error
    lacking = [*_lacking(module)]
    if lacking:
        got = f"version {version_of(module)}, without {', '.join(lacking)}"
        remedy = "Install a version between: older and newer ones differ."
        raise refuse("deep_ep", got=got, expected="the interface of 1.2.1 to 2.1", remedy=remedy)
    return module


def _not_loaded(error: Exception) -> ValueError:
    remedy = "Build it again, against this PyTorch and CUDA."
    if "nccl" in str(error).lower():
        remedy = 'Install its NCCL: pip install --no-deps "nvidia-nccl-cu13>=2.30.4".'
    elif "nvshmem" in str(error).lower():
        remedy = "Make the NVSHMEM it was built with visible, or build it without."
    got, expected = f"{type(error).__name__}: {error}", f"a DeepEP ({version()}) that loads"
    return refuse("deep_ep", got=got, expected=expected, remedy=remedy)


_CALLED = {
    "Buffer.__init__": "num_nvl_bytes num_rdma_bytes explicitly_destroy",
    "Buffer.dispatch": "handle topk_idx topk_weights num_tokens_per_rdma_rank num_worst_tokens config "
    "async_finish",
    "Buffer.combine": "topk_weights config async_finish",
    "Buffer.get_dispatch_layout": "topk_idx num_experts",
    "Buffer.get_dispatch_config": "num_ranks",
    "ElasticBuffer.__init__": "num_max_tokens_per_rank hidden num_topk deterministic explicitly_destroy",
    "ElasticBuffer.dispatch": "topk_idx topk_weights num_experts num_max_tokens_per_rank num_sms handle "
    "do_cpu_sync async_with_compute_stream",
    "ElasticBuffer.combine": "topk_weights num_sms async_with_compute_stream",
}


def _lacking(module: Any) -> Iterator[str]:
    for path, arguments in _CALLED.items():
        owner, name = path.split(".")
        if owner == "ElasticBuffer" and not hasattr(module, owner):
            continue  # an older generation has none
        function = getattr(getattr(module, owner, None), name, None)
        have = inspect.signature(function).parameters if function else {}
        missing = [argument for argument in arguments.split() if argument not in have]
        if missing:
            yield f"{path}({', '.join(missing)})"


def choose_kind(module: Any, size: int, kind: str | None) -> str:
    """The kind of DeepEP's buffer for a group of ``size`` devices. Raises ``ValueError`` if there is none.

    Within a node it is ``Buffer``, which needs no NCCL. Across nodes it is ``ElasticBuffer``, where DeepEP
    has it, since ``Buffer`` needs NVSHMEM there.
    """
    elastic = hasattr(module, "ElasticBuffer")
    if kind == "elastic" and not elastic:
        remedy = "Leave kind out, or upgrade."
        raise refuse("kind", got="'elastic', with DeepEP 1.x", expected="DeepEP 2.x for it", remedy=remedy)
    try:
        module.Buffer.get_dispatch_config(size)
        takes = True
    except AssertionError:
        takes = False
    if not takes and (kind == "buffer" or not elastic):
        expected = "a size that DeepEP's Buffer supports, as 2, 4, 8, 16"
        raise refuse("line", got=f"a group of {size}", expected=expected, remedy=_NO_DEEP_EP)
    if kind is not None:
        return kind
    return "buffer" if takes and (size <= PEERS or not elastic) else "elastic"


def check_kind(kind: str, hosts: list[str]) -> None:
    """Raise ``ValueError`` if a buffer of this kind can't connect the group's hosts."""
    nodes = [set(hosts[i : i + PEERS]) for i in range(0, len(hosts), PEERS)]
    if kind == "buffer" and any(len(node) > 1 for node in nodes):
        expected = f"every {PEERS} in a row on one node, between which Buffer uses NVLink"
        remedy = 'Order the mesh so that "ep" lies within nodes, or pass kind="elastic".'
        raise refuse("line", got=f"{len(hosts)} devices on hosts {hosts}", expected=expected, remedy=remedy)
    nccl = nccl_version()
    if kind == "elastic" and nccl is not None and nccl < NCCL_NEEDED:
        expected = f"NCCL {'.'.join(map(str, NCCL_NEEDED))} or newer, for ElasticBuffer"
        remedy = 'Install it: pip install --no-deps "nvidia-nccl-cu13>=2.30.4"; or pass kind="buffer".'
        raise refuse("deep_ep", got=f"NCCL {'.'.join(map(str, nccl))}", expected=expected, remedy=remedy)


def nccl_version() -> tuple[int, ...] | None:
    """The version of the loaded NCCL; ``None`` for a PyTorch without CUDA."""
    return tuple(torch.cuda.nccl.version()) if torch.cuda.is_available() else None


@contextmanager
def setting_up(kind: str) -> Iterator[None]:
    """Add a remedy to DeepEP's own errors while it connects devices."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if "NVSHMEM" in text:
            remedy = 'Build DeepEP with NVSHMEM, or pass kind="elastic" (2.x).'
        elif "nccl" in text.lower():
            remedy = "Use the NCCL that DeepEP was built with, and one GPU per process."
        elif "out of memory" in text:
            remedy = "Lower max_tokens_per_rank or dim, or leave it more memory."
        else:
            remedy = (
                "Its devices must reach each other, by NVLink in a node (nvidia-smi topo -m); by RDMA "
                'between nodes (ibstat); else use backend="all_to_all".'
            )
        got, expected = f"{type(error).__name__}: {text}", f"a group that its {kind} connects"
        raise refuse("deep_ep", got=got, expected=expected, remedy=remedy) from error


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def emptied(rows: torch.Tensor, came: torch.Tensor, value: int = 0) -> torch.Tensor:
    """Rows of which the first ``came`` (a number on the device) hold anything; ``value`` in the others."""
    past = torch.arange(rows.shape[0], device=rows.device) >= came
    return rows.masked_fill_(past[:, None], value)


def as_sent(x: torch.Tensor, narrow: bool) -> torch.Tensor | Scaled:
    """Tokens as DeepEP takes them: in fp8, values and a float32 scale for each 128 of them."""
    return narrowed(x, x.shape[1] // SCALED) if in_fp8(x.dtype, narrow) else x


def as_tokens(rows: Any, dtype: torch.dtype) -> torch.Tensor:
    """Rows that came, as tokens again."""
    if isinstance(rows, torch.Tensor):
        return rows
    for t in rows:
        if t.is_cuda:  # its memory may be of another stream
            t.record_stream(torch.cuda.current_stream(t.device))
    return widened(Scaled(*rows), dtype)


def payload_dim(sizes: Sizes) -> int:
    """The length of a sent row: a token, or the weights of its choices as bytes."""
    return max(sizes.dim, round_up(2 * sizes.top_k, WEIGHTS_DIM))


class Engine:
    """The common part of both buffers."""

    id_dtype: torch.dtype
    buffer: Any
    latest: Any = None  # the event of the latest kernel that the current stream hasn't waited for

    send: Any
    combine: Any

    def send_weights(self, weights: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Send weights as rows of bytes, since with a handle DeepEP sends rows only."""
        dtype = PAYLOADS[0]
        rows = weights.contiguous().view(dtype)
        width = rows.shape[1]
        rows = torch.nn.functional.pad(rows, (0, round_up(width, WEIGHTS_DIM) - width))
        return self.send(rows, handle)[:, :width].contiguous().view(weights.dtype)

    def combine_weights(self, weights: torch.Tensor, handle: Handle) -> torch.Tensor:
        rows = weights.new_zeros(weights.shape[0], WEIGHTS_DIM, dtype=PAYLOADS[0])
        return self.combine(rows, handle, weights)[1]

    def join(self) -> None:
        # Kernels of one buffer run in turn on its own stream, so the latest ends after all others.
        if self.latest is not None:
            self.latest.current_stream_wait()

    def destroy(self) -> None:
        self.latest = None
        self.buffer.destroy()


class Alone(Engine):
    """The engine of one device, which keeps the tokens that have an expert. It needs no DeepEP.

    No token travels, so none is rounded.
    """

    id_dtype = torch.int64

    def dispatch(
        self,
        x: Any,
        weights: Any,
        ids: Any,
        num_experts: int,
        max_tokens: int = 0,
        wait: bool = True,
        narrow: bool = False,
    ) -> Any:
        stays, num_pairs = (ids >= 0).any(1), None
        if max_tokens:  # every token has the row of its place
            row = torch.where(stays, torch.arange(len(stays), device=ids.device), -1)
            token = torch.nn.functional.pad(row, (0, max_tokens - len(row)), value=-1)
        else:
            row, token = torch.where(stays, stays.cumsum(0) - 1, -1), stays.nonzero()[:, 0]
            num_pairs = int((ids >= 0).sum())
        x, weights, ids = (
            gather_kernel(x, token),
            gather_kernel(weights, token),
            gather_kernel(ids + 1, token) - 1,
        )
        came = Arrived(x, weights, ids, num_pairs, Handle((row[:, None], token)))
        return came if wait else lambda: came

    def send(self, x: torch.Tensor, handle: Handle, wait: bool = True) -> Any:
        token = handle.tensors[1]
        assert token is not None
        rows = gather_kernel(x, token)
        return rows if wait else lambda: rows

    def combine(self, y: Any, handle: Handle, weights: Any = None, wait: bool = True) -> tuple[Any, Any]:
        weights = None if weights is None else self.combine_weights(weights, handle)
        return self.combine_weights(y, handle), weights

    def send_weights(self, weights: torch.Tensor, handle: Handle) -> torch.Tensor:
        return self.send(weights, handle)

    def combine_weights(self, weights: torch.Tensor, handle: Handle) -> torch.Tensor:
        row_T1 = handle.tensors[0]
        assert row_T1 is not None
        return gather_kernel(weights, row_T1[:, 0])
