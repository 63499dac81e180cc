"""``deep_ep.ElasticBuffer``, which is new in DeepEP 2.x, as an :class:`Engine`."""

from typing import Any

import torch

from .adapter import Arrived, Engine, Handle, Sizes, as_sent, as_tokens, emptied, payload_dim

# The tensors of an EPHandle. The first has a row per token.
_TENSORS = (
    "topk_idx",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
)
_SORTED = "cached_recv_src_metadata_before_sort"  # kept by deterministic buffers, set after construction


class Elastic(Engine):
    @staticmethod
    def rows(size: int) -> tuple[int, int | None]:
        return 256, None

    def __init__(self, module: Any, group: Any, sizes: Sizes) -> None:
        self.make_handle = module.EPHandle
        self.id_dtype = module.topk_idx_t
        self.buffer = module.ElasticBuffer(
            group,
            num_max_tokens_per_rank=sizes.tokens,
            hidden=payload_dim(sizes),
            num_topk=sizes.top_k,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            explicitly_destroy=True,
        )
        # Combine must use as many SMs as the dispatch did.
        self.num_sms = self.buffer.get_theoretical_num_sms(sizes.num_experts, sizes.top_k)

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
        bound = dict(num_max_tokens_per_rank=max_tokens, do_cpu_sync=False) if max_tokens else {}
        rows, ids, weights, handle, event = self.buffer.dispatch(
            as_sent(x, narrow),
            topk_idx=ids,
            topk_weights=weights,
            num_experts=num_experts,
            num_sms=self.num_sms,
            async_with_compute_stream=not wait,
            **bound,
        )
        self.latest = self.latest if wait else event

        def arrived() -> Arrived:  # a deterministic buffer sorts its handle when the event was waited for
            x_SD = as_tokens(rows, x.dtype)
            tensors = (*(getattr(handle, name) for name in _TENSORS), getattr(handle, _SORTED))
            numbers = handle.num_experts, handle.num_max_tokens_per_rank, handle.num_sms
            if not max_tokens:
                pairs = sum(handle.num_recv_tokens_per_expert_list)
                return Arrived(x_SD, weights, ids, pairs, Handle(tensors, numbers))
            made = Handle(tensors, (*numbers, max_tokens))
            came = self._came(made)
            return Arrived(emptied(x_SD, came), weights, emptied(ids, came, -1), None, made)

        return arrived() if wait else arrived

    def _came(self, handle: Handle) -> torch.Tensor:
        """How many rows came, on the device."""
        ends = handle.tensors[1]
        assert ends is not None
        return ends[-1]

    def _handle(self, handle: Handle) -> Any:
        named: dict[str, Any] = dict(zip(_TENSORS, handle.tensors))
        num_experts, max_tokens, num_sms = handle.numbers[:3]
        made = self.make_handle(
            do_expand=False,
            num_experts=num_experts,
            expert_alignment=1,
            num_max_tokens_per_rank=max_tokens,
            num_sms=num_sms,
            num_recv_tokens=named["recv_src_metadata"].shape[0],
            num_expanded_tokens=0,  # the layout that isn't used
            num_recv_tokens_per_expert_list=[],
            **named,
        )
        setattr(made, _SORTED, handle.tensors[len(_TENSORS)])
        return made

    def send(self, x: torch.Tensor, handle: Handle, wait: bool = True) -> Any:
        rows, *_, event = self.buffer.dispatch(
            x, handle=self._handle(handle), num_sms=handle.numbers[2], async_with_compute_stream=not wait
        )
        self.latest = self.latest if wait else event

        def arrived() -> torch.Tensor:
            return emptied(rows, self._came(handle)) if len(handle.numbers) > 3 else rows

        return arrived() if wait else arrived

    def combine(self, y: Any, handle: Handle, weights: Any = None, wait: bool = True) -> tuple[Any, Any]:
        made, num_sms = self._handle(handle), handle.numbers[2]
        y, weights, event = self.buffer.combine(
            y, made, topk_weights=weights, num_sms=num_sms, async_with_compute_stream=not wait
        )
        self.latest = self.latest if wait else event
        return y, weights
