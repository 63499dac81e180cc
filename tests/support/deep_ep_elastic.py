"""``ElasticBuffer`` of the stand-in for ``deep_ep``."""

from typing import Any

import torch
from deep_ep_wire import (
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


class EPHandle:
    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor,
        token_metadata_at_forward: torch.Tensor | None,
        channel_linked_list: torch.Tensor | None,
    ) -> None:
        assert topk_idx is not None
        vars(self).update({k: v for k, v in locals().items() if k != "self"})
        self.cached_recv_src_metadata_before_sort = None


class ElasticBuffer:
    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        host_assert(num_max_tokens_per_rank > 0 and hidden > 0, "num_max_tokens_per_rank > 0 and hidden > 0")
        itemsize = max(dtype.itemsize for dtype in Settings.payloads)
        self.num_bytes = self._needed(num_max_tokens_per_rank, hidden * itemsize)
        self.num_max_tokens_per_rank, self.deterministic = num_max_tokens_per_rank, deterministic
        self.explicitly_destroy = explicitly_destroy
        self.num_ranks = group.size()
        self.chance = torch.Generator()  # its own, as ranks draw different amounts
        self.chance.seed()
        self.runtime: Wire | None = Wire(group)

    @staticmethod
    def _needed(tokens: int, row_bytes: int) -> int:
        return tokens * (row_bytes + 512)

    def destroy(self) -> None:
        assert self.explicitly_destroy
        if self.runtime is not None:
            self.runtime.destroy()
            self.runtime = None

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 4

    def _check(self, x: torch.Tensor, max_tokens: int, num_sms: int) -> Wire:
        if self.runtime is None:
            raise AttributeError("'NoneType' object has no attribute 'dispatch'")
        check_rows(x)
        host_assert(x.shape[1] % 256 == 0, "kHidden % (32 * sizeof(int4) / sizeof(nv_bfloat16)) == 0")
        needed = self._needed(max_tokens, x.shape[1] * x.element_size())
        host_assert(needed <= self.num_bytes, "get_dispatch_buffer_size(...) <= num_buffer_bytes")
        host_assert(num_sms > 0, "num_sms > 0")
        return self.runtime

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
        handle: EPHandle | None = None,
        do_cpu_sync: bool | None = None,
    ) -> tuple[Any, ...]:
        cached = handle is not None
        max_tokens = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        max_tokens = handle.num_max_tokens_per_rank if cached else max_tokens
        x, scales = unpacked(x)
        wire, given = self._check(x, max_tokens, num_sms), [x] if scales is None else [x, scales]
        host_assert(len(x) <= max_tokens, "num_tokens <= num_max_tokens_per_rank")
        if cached:
            assert topk_idx is None
            host_assert(len(handle.topk_idx) == len(x), "num_tokens == num_tokens_")
            host_assert(handle.dst_buffer_slot_idx.shape == handle.topk_idx.shape, "dst_buffer_slot_idx")
            goes = goes_to(handle.topk_idx, handle.num_experts, self.num_ranks)
            rows, received = [], _received(handle)
            for t in given:
                came = torch.cat(wire.exchange([t[g] for g in goes.T], received))
                out = torch.empty_like(came)
                out[_arrival(handle)] = came
                rows.append(with_room(out, len(handle.recv_src_metadata)))
            ids = torch.zeros(len(rows[0]), handle.topk_idx.shape[1], dtype=topk_idx_t)
            rows, event = self._given(rows, given, async_with_compute_stream)
            return rows[0] if scales is None else tuple(rows), ids, None, handle, event
        check_choices(topk_idx, topk_weights, len(x))
        host_assert(num_experts % self.num_ranks == 0, "num_experts % num_ranks == 0")
        goes = goes_to(topk_idx, num_experts, self.num_ranks)
        received = wire.counts(goes.sum(0))[:, wire.rank].tolist()

        def sent(t: torch.Tensor) -> torch.Tensor:
            return torch.cat(wire.exchange([t[g] for g in goes.T], received))

        token = torch.arange(len(x), dtype=torch.int32) + wire.rank * max_tokens
        source = sent(token[:, None])[:, 0]
        pieces = [torch.randperm(c, generator=self.chance) for c in received]
        starts = [sum(received[:r]) for r in range(len(received))]
        order = torch.cat([p + s for p, s in zip(pieces, starts)])
        if self.deterministic:
            order = torch.arange(len(source))
        recv_ids = localised(sent(topk_idx), num_experts, self.num_ranks, wire.rank)[order]
        per_expert = torch.bincount(recv_ids[recv_ids >= 0], minlength=num_experts // self.num_ranks)
        metadata = torch.zeros(len(source), topk_idx.shape[1] + 2, dtype=torch.int32)
        metadata[:, 0] = source[order]
        psum = torch.tensor(received).cumsum(0).to(torch.int32)
        made = EPHandle(
            False, num_experts, 1, max_tokens, num_sms, topk_idx.clone(), len(source), int(per_expert.sum()),
            per_expert.tolist(), psum, torch.cat([torch.zeros(1), per_expert.cumsum(0)]).int()[1:],
            per_expert.int(), metadata, torch.zeros(topk_idx.shape, dtype=torch.int32), None, None,
        )  # fmt: skip
        rows = recv_ids, sent(topk_weights)[order], *(sent(t)[order] for t in given)
        if do_cpu_sync is False:
            *rows, made.recv_src_metadata = (
                with_room(t, max_tokens * self.num_ranks) for t in (*rows, metadata)
            )
            made.num_recv_tokens, made.num_recv_tokens_per_expert_list = max_tokens * self.num_ranks, []
        if self.deterministic:
            made.cached_recv_src_metadata_before_sort = made.recv_src_metadata.clone()
        reads = [*given, topk_idx, topk_weights]
        (recv_ids, recv_weights, *rows), event = self._given([*rows], reads, async_with_compute_stream)
        recv_x = rows[0] if scales is None else tuple(rows)
        return recv_x, recv_ids, recv_weights, made, event

    def _given(self, out: list[torch.Tensor], reads: list[torch.Tensor], late: bool) -> tuple[Any, ...]:
        if not late:
            self.runtime.stream.wait(self.runtime.stream.begun)
            return out, EventOverlap()
        return [self.runtime.stream.launch(t, reads) for t in out], EventOverlap(self.runtime.stream)

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
    ) -> tuple[Any, ...]:
        wire = self._check(x, handle.num_max_tokens_per_rank, num_sms)
        host_assert(x.dtype in Settings.payloads, "x.scalar_type() == torch::kBFloat16")
        host_assert(num_sms == handle.num_sms, "num_channels == num_channels_")
        host_assert(len(handle.recv_src_metadata) == len(x), "num_reduced_tokens == num_tokens")
        home = torch.where(handle.topk_idx < 0, -1, handle.topk_idx // (handle.num_experts // self.num_ranks))
        rows = [(home == r).any(1).nonzero()[:, 0] for r in range(self.num_ranks)]
        order = _arrival(handle)

        def back(t: torch.Tensor) -> list[torch.Tensor]:
            return wire.exchange(list(t[order].split(_received(handle))), [len(r) for r in rows])

        out, weights = summed(back(x), rows, x, len(home)), None
        if topk_weights is not None:
            host_assert(topk_weights.dtype == torch.float32, "topk_weights->scalar_type() == torch::kFloat")
            host_assert(
                topk_weights.is_contiguous() and len(topk_weights) == len(x), "num_topk == num_topk__"
            )
            mine = [
                w.where(home[row] == r, 0) for r, (w, row) in enumerate(zip(back(topk_weights), rows))
            ]  # of each choice its owner's
            weights = summed(mine, rows, topk_weights, len(home))
        if async_with_compute_stream:
            weights = None if weights is None else wire.stream.launch(weights, [topk_weights])
            out = wire.stream.launch(out, [x, handle.recv_src_metadata, handle.topk_idx])
            return out, weights, EventOverlap(wire.stream)
        wire.stream.wait(wire.stream.begun)
        return out, weights, EventOverlap()


def _received(handle: EPHandle) -> list[int]:
    psum = handle.psum_num_recv_tokens_per_scaleup_rank
    return torch.diff(psum, prepend=psum.new_zeros(1)).tolist()


def _arrival(handle: EPHandle) -> torch.Tensor:
    """Which row each is that came, in the order of its source."""
    came = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
    return handle.recv_src_metadata[:came, 0].argsort()
