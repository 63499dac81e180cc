"""A stand-in for ``deep_ep``'s Python interface, both generations, over a gloo group.

It raises where DeepEP 1.2.1 and 2.1.0 do, by their own assertions, and takes CPU tensors, which they don't.
Rows of an ``ElasticBuffer`` come in any order, its weights unmasked; results of asynchronous calls are NaN
until their event was waited for, and what they read must not have changed by then.
"""

import sys
import types
from typing import Any

import deep_ep_elastic
import torch
from deep_ep_wire import (
    NUM_CHANNELS,
    EventOverlap,
    Settings,
    Wire,
    check_choices,
    check_rows,
    goes_to,
    host_assert,
    localised,
    summed,
    topk_idx_t,
    unpacked,
    with_room,
)

from fmoe.parallel.backends.deepep import adapter
from fmoe.parallel.backends.deepep import buffers as deepep_buffers


class Config:
    def __init__(self, num_sms: int, *chunks: int) -> None:
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms * min(num_ranks, Settings.peers) * (hidden_bytes + 2048)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        host_assert(num_ranks > Settings.peers, "NVSHMEM is disable during compilation")
        return self.num_sms * num_ranks * (hidden_bytes + 2048)


class Buffer:
    num_sms = 2 * NUM_CHANNELS

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group_size = group.size()
        host_assert(self.group_size in (2, 4, 8), "Unsupported ranks")
        host_assert(num_rdma_bytes == 0 or self.group_size > Settings.peers, "num_ranks > NUM_MAX_NVL_PEERS")
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.explicitly_destroy = explicitly_destroy
        self.runtime: Wire | None = Wire(group)
        self.between_nodes = self.group_size > Settings.peers

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        self.runtime.destroy()
        self.runtime = None

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False
    ) -> tuple[Any, ...]:
        host_assert(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx.is_contiguous()")
        goes = goes_to(topk_idx, num_experts, self.group_size)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).to(torch.int32)
        per_rank = goes.sum(0).to(torch.int32)
        per_node = None
        if self.between_nodes:
            per_node = goes.unflatten(1, (-1, Settings.peers)).any(2).sum(0).to(torch.int32)
        return per_rank, per_node, per_expert, goes, EventOverlap()

    def _check_buffer(self, x: torch.Tensor) -> None:
        self._check_alive()
        check_rows(x)
        needed = 2 * NUM_CHANNELS * min(self.group_size, Settings.peers) * x.shape[1] * x.element_size()
        host_assert(needed <= self.num_nvl_bytes, "Data buffer <= num_nvl_bytes")
        hidden_int4 = x.shape[1] * x.element_size() // 16
        if self.between_nodes:
            host_assert(self.num_rdma_bytes > 0, "(...) * sizeof(int) <= num_rdma_bytes")
        else:
            host_assert(hidden_int4 % 2 == 0, "hidden_int4 % 2 == 0")

    def _check_alive(self) -> None:
        if self.runtime is None:
            raise AttributeError("'NoneType' object has no attribute 'get_num_rdma_ranks'")

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        x, scales = unpacked(x)
        self._check_buffer(x)
        wire, given = self.runtime, [x] if scales is None else [x, scales]
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            goes, prefix, source = self._unpacked(handle)
            host_assert(len(goes) == len(x), "is_token_in_rank.size(0) == x.size(0)")
            received = self._from_prefix(prefix)
            came = [torch.cat(wire.exchange([t[g] for g in goes.T], received)) for t in given]
            rows = [with_room(t, len(source)) for t in came]
            out, event = self._given(rows, [*given, *handle], async_finish)
            return out[0] if scales is None else tuple(out), *[None] * 4, event
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        assert self.between_nodes == (num_tokens_per_rdma_rank is not None)
        assert not (self.between_nodes and num_worst_tokens), "Internode dispatch does not support it"
        goes, num_experts = is_token_in_rank, len(num_tokens_per_expert)
        host_assert(goes.dtype == torch.bool and len(goes) == len(x), "is_token_in_rank.size(0) == x.size(0)")
        check_choices(topk_idx, topk_weights, len(x))
        matrix = wire.counts(num_tokens_per_rank)
        received = matrix[:, wire.rank].tolist()

        def sent(t: torch.Tensor) -> torch.Tensor:
            return torch.cat(wire.exchange([t[g] for g in goes.T], received))

        rows, recv_ids, recv_weights = [*map(sent, given)], sent(topk_idx), sent(topk_weights)
        recv_ids = localised(recv_ids, num_experts, self.group_size, wire.rank)
        recv_weights = recv_weights.masked_fill(recv_ids < 0, 0)
        source = sent(torch.arange(len(x), dtype=torch.int32)[:, None])[:, 0]
        held = num_experts // self.group_size
        per_expert = torch.bincount(recv_ids[recv_ids >= 0], minlength=held).tolist()
        if room := num_worst_tokens:
            *rows, recv_weights, source = (with_room(t, room) for t in (*rows, recv_weights, source))
            recv_ids, per_expert = with_room(recv_ids, room).masked_fill_(_past(recv_ids, room), -1), []
        made = self._packed(goes, matrix, source)
        out, reads = [recv_ids, recv_weights, *rows], [*given, topk_idx, topk_weights]
        (recv_ids, recv_weights, *rows), event = self._given(out, reads, async_finish)
        recv_x = rows[0] if scales is None else tuple(rows)
        return recv_x, recv_ids, recv_weights, per_expert, made, event

    def _given(self, out: list[torch.Tensor], reads: list[torch.Tensor], late: bool) -> tuple[Any, ...]:
        if not late:
            self.runtime.stream.wait(self.runtime.stream.begun)
            return out, EventOverlap()
        return [self.runtime.stream.launch(t, reads) for t in out], EventOverlap(self.runtime.stream)

    def _packed(self, goes: torch.Tensor, matrix: torch.Tensor, source: torch.Tensor) -> tuple[Any, ...]:
        n, int32 = self.group_size, torch.int32
        head = torch.where(goes, goes.cumsum(0) - 1, -1).to(int32)
        channels = torch.zeros(n, NUM_CHANNELS, dtype=int32)
        if not self.between_nodes:
            return matrix.cumsum(0).to(int32), channels, channels.clone(), source, goes, head
        nodes = n // Settings.peers
        prefix = matrix[:, self.runtime.rank].cumsum(0).to(int32)
        meta = torch.cat([source[:, None], torch.zeros_like(source)[:, None]], 1).view(torch.uint8)
        few = torch.zeros(nodes, NUM_CHANNELS, dtype=int32)
        return (
            goes, few, channels, few.clone(), torch.zeros(nodes, dtype=int32), channels.clone(), prefix, meta,
            torch.zeros(len(goes), nodes, dtype=int32), torch.zeros(len(source), 8, dtype=int32),
        )  # fmt: skip

    def _unpacked(self, handle: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Who goes where, how many rows came by now from each rank, and which of its rows each is."""
        if not self.between_nodes:
            prefix, first, second, source, goes, head = handle
            host_assert(head.dtype == prefix.dtype == first.dtype == torch.int32, "torch::kInt32")
            host_assert(prefix.shape == (self.group_size,) * 2, "rank_prefix_matrix.size(0) == num_ranks")
            host_assert(second.shape == (self.group_size, NUM_CHANNELS), "size(1) == num_channels")
            host_assert(head.shape == goes.shape, "send_head.size(1) == num_ranks")
            return goes, prefix[:, self.runtime.rank], source
        goes, *_, prefix, meta, near, far = handle
        host_assert(meta.dtype == torch.uint8 and meta.shape[1] == 8, "src_meta.size(1) == meta bytes")
        host_assert(near.shape == (len(goes), self.group_size // Settings.peers), "combined_rdma_head")
        host_assert(far.shape[1] == 8, "combined_nvl_head.size(1) == NUM_MAX_NVL_PEERS")
        return goes, prefix, meta.view(torch.int32)[:, 0]

    def _from_prefix(self, prefix: torch.Tensor) -> list[int]:
        return torch.diff(prefix, prepend=prefix.new_zeros(1)).tolist()

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        self._check_buffer(x)
        host_assert(x.dtype in Settings.payloads, "Unsupported type")
        if self.between_nodes:
            host_assert(x.shape[1] * x.element_size() // 16 % 32 == 0, "hidden_int4 % 32 == 0")
        goes, prefix, source = self._unpacked(handle)
        host_assert(len(source) == len(x), "src_idx.size(0) == num_tokens")
        wire, came = self.runtime, self._from_prefix(prefix)
        rows = [g.nonzero()[:, 0] for g in goes.T]

        def back(t: torch.Tensor) -> torch.Tensor:
            pieces = wire.exchange(list(t[: sum(came)].split(came)), [len(r) for r in rows])
            return summed(pieces, rows, t, len(goes))

        out, weights = back(x), None
        if x.shape[1] * x.element_size() // 16 % 32:
            out.fill_(torch.nan)  # lanes of a warp that have no piece of the row run ahead of the others
        if topk_weights is not None:
            host_assert(topk_weights.dtype == torch.float32, "topk_weights->scalar_type() == torch::kFloat32")
            host_assert(topk_weights.is_contiguous() and len(topk_weights) == len(x), "num_tokens")
            weights = back(topk_weights).contiguous()
        if not self.between_nodes:
            handle[5].data.masked_fill_(handle[5] < 0, -1 - 2**25)  # as the kernel does, unseen
        if async_finish:
            weights = None if weights is None else wire.stream.launch(weights, [topk_weights])
            out = wire.stream.launch(out, [x, *handle])
            return out, weights, EventOverlap(wire.stream)
        wire.stream.wait(wire.stream.begun)
        return out, weights, EventOverlap()


def _past(rows: torch.Tensor, room: int) -> torch.Tensor:
    return torch.arange(room)[:, None] >= len(rows)


def module(generation: int) -> types.ModuleType:
    """``deep_ep`` of one generation."""
    made = types.ModuleType("deep_ep")
    vars(made).update(Buffer=Buffer, Config=Config, EventOverlap=EventOverlap)
    if generation == 2:
        vars(made).update(
            ElasticBuffer=deep_ep_elastic.ElasticBuffer,
            EPHandle=deep_ep_elastic.EPHandle,
            topk_idx_t=topk_idx_t,
            __version__="2.1.0",
        )
    return made


def install(
    generation: int = 1, *, payloads: tuple[torch.dtype, ...] = (torch.bfloat16,), peers: int = 8
) -> None:
    """Put it where this process imports ``deep_ep`` from, and let the adapter give it CPU tensors.

    ``payloads`` beyond bfloat16 are for comparisons that are tighter than it allows; ``peers`` is how many
    devices a node has.
    """
    deepep_buffers.free_kept()
    deepep_buffers._AGREED.clear()
    sys.modules["deep_ep"] = module(generation)
    Settings.peers = adapter.PEERS = peers
    Settings.payloads = adapter.PAYLOADS = payloads
    adapter.DEVICES = ("cuda", "cpu")


def remove() -> None:
    """As if it had never been there."""
    deepep_buffers.free_kept()
    deepep_buffers._AGREED.clear()
    sys.modules.pop("deep_ep", None)
    adapter.DEVICES, adapter.PAYLOADS, adapter.PEERS = ("cuda",), (torch.bfloat16,), 8
