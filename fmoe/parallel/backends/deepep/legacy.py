"""``deep_ep.Buffer``, which is all of DeepEP 1.x and still in 2.x, as an :class:`Engine`."""

from typing import Any

import torch

from . import adapter
from .adapter import Arrived, Engine, Handle, Sizes, as_sent, as_tokens, emptied, payload_dim


class Legacy(Engine):
    """``deep_ep.Buffer``: 1.x, and 2.x too."""

    @staticmethod
    def rows(size: int) -> tuple[int, int | None]:
        # Within a node half a row at a time goes through shared memory. Each of the warp's 32 lanes needs a
        # 16-byte piece, since they meet at barriers. Otherwise DeepEP silently returns wrong rows.
        return 256, 7936 if size <= adapter.PEERS else None

    def __init__(self, module: Any, group: Any, sizes: Sizes) -> None:
        self.size, self.rank = group.size(), group.rank()
        self.within_node = self.size <= adapter.PEERS
        self.id_dtype = getattr(module, "topk_idx_t", torch.int64)
        makers = module.Buffer.get_dispatch_config, module.Buffer.get_combine_config
        self.configs = [make(group.size()) for make in makers]
        row = payload_dim(sizes) * max(dtype.itemsize for dtype in adapter.PAYLOADS)
        near = max(c.get_nvl_buffer_size_hint(row, group.size()) for c in self.configs)
        # Without NVSHMEM, DeepEP refuses to say how much it would need.
        across = () if self.within_node else self.configs
        far = max((c.get_rdma_buffer_size_hint(row, group.size()) for c in across), default=0)
        self.buffer = module.Buffer(group, near, far, explicitly_destroy=True)

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
        to_rank, to_node, to_expert, goes, _ = self.buffer.get_dispatch_layout(ids, num_experts)
        rows, ids, weights, counts, handle, event = self.buffer.dispatch(
            as_sent(x, narrow),
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            num_tokens_per_expert=to_expert,
            is_token_in_rank=goes,
            num_worst_tokens=self.size * max_tokens,
            config=self.configs[0],
            async_finish=not wait,
        )
        self.latest = self.latest if wait else event
        first = 4 if self.within_node else 0  # the place of is_token_in_rank
        tensors = (handle[first], *handle[:first], *handle[first + 1 :])
        made = Handle(tensors, (max_tokens,) if max_tokens else ())

        def arrived() -> Arrived:
            x_SD = self._emptied(as_tokens(rows, x.dtype), made)
            return Arrived(x_SD, weights, ids, None if max_tokens else sum(counts), made)

        return arrived() if wait else arrived

    def _emptied(self, rows: torch.Tensor, handle: Handle) -> torch.Tensor:
        return emptied(rows, self._came(handle)) if handle.numbers else rows

    def _came(self, handle: Handle) -> torch.Tensor:
        """How many rows came, on the device."""
        prefix = handle.tensors[1]  # rows from the first i devices to each
        assert prefix is not None
        return prefix[-1, self.rank]

    def _handle(self, handle: Handle) -> tuple[Any, ...]:
        goes, *rest = handle.tensors
        return (*rest[:4], goes, *rest[4:]) if self.within_node else (goes, *rest)

    def send(self, x: torch.Tensor, handle: Handle, wait: bool = True) -> Any:
        rows, *_, event = self.buffer.dispatch(
            x, handle=self._handle(handle), config=self.configs[0], async_finish=not wait
        )
        self.latest = self.latest if wait else event
        return self._emptied(rows, handle) if wait else lambda: self._emptied(rows, handle)

    def combine(self, y: Any, handle: Handle, weights: Any = None, wait: bool = True) -> tuple[Any, Any]:
        y, weights, event = self.buffer.combine(
            y, self._handle(handle), topk_weights=weights, config=self.configs[1], async_finish=not wait
        )
        self.latest = self.latest if wait else event
        return y, weights
