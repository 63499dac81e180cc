"""Kept values in the host's memory: they go on a stream of their own, and come back before they are used."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import TransformError
from .dtensors import map_local


class Host(Protocol):
    """Stands for the host's memory where a plan runs on fake tensors."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def give(self, tensor: torch.Tensor) -> torch.Tensor: ...


class Coming(NamedTuple):
    """Tensors on their way back, and when each is there."""

    tensors: list[torch.Tensor | None]
    there: list[torch.cuda.Event | None]


_HOST: ContextVar[Host | None] = ContextVar("fmoe_host", default=None)


@contextmanager
def on_host(host: Host | None) -> Iterator[None]:
    """Inside, this stands for the host's memory; ``None``: the real one."""
    token = _HOST.set(host)
    try:
        yield
    finally:
        _HOST.reset(token)


def may_leave(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether such tensors are anywhere but in the host's memory."""
    return _HOST.get() is not None or any(t.is_cuda for t in tensors)


def leave(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the host's memory, to which it may be on its way; on a CPU itself."""
    if host := _HOST.get():
        return host.take(tensor)
    if not tensor.is_cuda or isinstance(_beneath(tensor), FakeTensor):
        return tensor
    return map_local(_leave, tensor)


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise TransformError(
            "offload: got a stream that a CUDA graph captures, expected none. Use fmoe.save inside graphed."
        )
    side = _stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        found = tensor.to("cpu", non_blocking=True)  # which PyTorch pins
    _beneath(tensor).record_stream(side)
    return found


def away(tensors: Sequence[torch.Tensor], homes: Sequence[torch.device | None]) -> list[torch.Tensor | None]:
    """Those of the tensors that left their devices."""
    pretended = _HOST.get() is not None
    return [
        t if home is not None and (pretended or t.device != home) else None for t, home in zip(tensors, homes)
    ]


def begin(tensors: Sequence[torch.Tensor | None], homes: Sequence[torch.device | None]) -> Coming:
    """Begin to bring tensors back to their devices; those without one stay."""
    host, found, there = _HOST.get(), list[torch.Tensor | None](), list[torch.cuda.Event | None]()
    for tensor, home in zip(tensors, homes):
        event = None
        if tensor is None or home is None:
            pass
        elif host:
            tensor = host.give(tensor)
        elif home != tensor.device:
            with torch.cuda.stream(side := _stream(home)):
                tensor = map_local(functools.partial(torch.Tensor.to, device=home, non_blocking=True), tensor)
                event = side.record_event()
        found.append(tensor)
        there.append(event)
    return Coming(found, there)


def finish(coming: Coming) -> list[torch.Tensor | None]:
    """These tensors, for which the current stream waits; the host doesn't."""
    for tensor, event in zip(*coming):
        if tensor is not None and event is not None:
            here = torch.cuda.current_stream(tensor.device)
            here.wait_event(event)
            map_local(functools.partial(_used_on, here), tensor)
    return coming.tensors


def _used_on(stream: torch.cuda.Stream, tensor: torch.Tensor) -> torch.Tensor:
    _beneath(tensor).record_stream(stream)  # its memory is of the other stream
    return tensor


def _beneath(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor beneath the wrappers of ``torch.func``."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
