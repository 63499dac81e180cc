"""The surroundings of a call, in which it can be repeated: modes and random generators."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from .axes import Binding, binding, bound

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


class Modes(NamedTuple):
    """The modes a region was called in. It runs again in the same, whatever modes its backward runs in."""

    binding: Binding
    device: torch.device
    grad_enabled: bool
    autocast: Sequence[tuple[str, torch.dtype, bool, bool]]  # the arguments of torch.autocast

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> "Modes":
        autocast = [
            (d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), torch.is_autocast_cache_enabled())
            for d in sorted({t.device.type for t in tensors} & {"cpu", "cuda"})
        ]
        return cls(binding(), torch.get_default_device(), torch.is_grad_enabled(), autocast)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(bound(self.binding))
            if torch.get_default_device() != self.device:  # autograd's threads for CUDA have their own
                stack.enter_context(self.device)
            stack.enter_context(torch.set_grad_enabled(self.grad_enabled))
            for options in self.autocast:
                stack.enter_context(torch.autocast(*options))
            yield


class Rng:
    """The state of the random generators a region may draw from."""

    def __init__(self, devices: Sequence[int]) -> None:
        self.devices = devices
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in devices]

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> "Rng":
        return cls(sorted({t.device.index for t in tensors if t.is_cuda}))

    def moved(self) -> bool:
        after = Rng(self.devices)
        return not all(map(torch.equal, (self.cpu, *self.cuda), (after.cpu, *after.cuda)))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield


def without_autocast(impl: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel chooses its precisions itself."""

    @functools.wraps(impl)
    def call(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return impl(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return impl(*args)

    return call
