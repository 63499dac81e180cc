"""What both generations of the stand-in for ``deep_ep`` share: rows between processes, streams, checks."""

from typing import Any

import torch
import torch.distributed as dist

topk_idx_t = torch.int64
NUM_CHANNELS = 10


class Settings:
    """What a test may ask of the double."""

    peers = 8  # devices of a node
    payloads: tuple[torch.dtype, ...] = (torch.bfloat16,)
    live: int = 0  # buffers not destroyed


def host_assert(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(f"Assertion error: {text}")


class Stream:
    """Kernels of a buffer, in order; what they write is there when somebody has waited."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = []
        self.done = self.begun = 0

    def launch(self, out: torch.Tensor, reads: list[torch.Tensor]) -> torch.Tensor:
        hidden = torch.full_like(out, torch.nan if out.is_floating_point() else 2**20)
        self.pending.append((hidden, out, [(t, t.clone()) for t in reads]))
        self.begun += 1
        return hidden

    def wait(self, until: int) -> None:
        while self.done < until:
            hidden, out, reads = self.pending.pop(0)
            for now, then in reads:
                same = torch.equal(bits(now), bits(then))
                assert same, "memory was used again while a kernel still read it"
            hidden.data.copy_(out)  # as a kernel does, unseen by PyTorch
            self.done += 1


class EventOverlap:
    def __init__(self, stream: Stream | None = None) -> None:
        self.event = stream
        self.until = stream.begun if stream else 0

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event.wait(self.until)


class Wire:
    """Rows between the processes of a group; every buffer has one."""

    def __init__(self, group: Any) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.stream, self.alive = Stream(), True
        Settings.live += 1

    def exchange(self, pieces: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """``pieces[r]`` to rank ``r``; ``counts[r]`` rows come from it."""
        host_assert(self.alive, "not destroyed")
        rows = torch.cat(pieces)
        row_bytes = rows.flatten(1).shape[1] * rows.itemsize
        flat = rows.contiguous().view(-1).view(torch.uint8)
        came = flat.new_empty(sum(counts) * row_bytes)
        dist.all_to_all_single(
            came,
            flat,
            [c * row_bytes for c in counts],
            [len(p) * row_bytes for p in pieces],
            group=self.group,
        )
        return list(came.view(rows.dtype).view(-1, *rows.shape[1:]).split(counts))

    def counts(self, sent: torch.Tensor) -> torch.Tensor:
        """(n, n): rows from ``i`` to ``j``."""
        everyone = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(everyone, sent, group=self.group)
        return torch.stack(everyone)

    def destroy(self) -> None:
        host_assert(self.alive, "not destroyed")
        dist.barrier(group=self.group)
        self.alive = False
        Settings.live -= 1


def bits(t: torch.Tensor) -> torch.Tensor:
    """Numbers in fp8, which PyTorch doesn't compare, as bytes."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def unpacked(x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows, and their scales if they are in fp8."""
    x, scales = x if isinstance(x, tuple) else (x, None)
    if scales is not None:
        host_assert(x.element_size() == 1, "x.element_size() == 1")
        host_assert(scales.dtype == torch.float32, "x_scales->scalar_type() == torch::kFloat32")
        host_assert(scales.dim() == 2 and len(scales) == len(x), "x_scales->size(0) == num_tokens")
    return x, scales


def check_rows(x: torch.Tensor) -> None:
    host_assert(x.dim() == 2 and x.is_contiguous(), "x.dim() == 2 and x.is_contiguous()")
    host_assert(x.shape[1] * x.element_size() % 16 == 0, "(x.size(1) * x.element_size()) % sizeof(int4) == 0")


def check_choices(ids: torch.Tensor, weights: torch.Tensor, num_tokens: int) -> None:
    host_assert(ids.dtype == topk_idx_t and ids.is_contiguous(), "topk_idx->is_contiguous()")
    host_assert(weights.dtype == torch.float32, "topk_weights->scalar_type() == torch::kFloat32")
    host_assert(weights.is_contiguous() and weights.shape == ids.shape, "num_topk == topk_weights->size(1)")
    host_assert(len(ids) == num_tokens, "num_tokens == topk_idx->size(0)")
    host_assert(ids.shape[1] <= 32, "num_topk <= 32")


def goes_to(ids: torch.Tensor, num_experts: int, size: int) -> torch.Tensor:
    """(T, n): whether a token goes to a rank."""
    home = torch.where(ids < 0, size, ids // (num_experts // size))
    return torch.zeros(len(ids), size + 1, dtype=torch.bool).scatter_(1, home, True)[:, :size].contiguous()


def localised(ids: torch.Tensor, num_experts: int, size: int, rank: int) -> torch.Tensor:
    held = num_experts // size
    local = ids - rank * held
    return torch.where((ids >= 0) & (local >= 0) & (local < held), local, -1)


def with_room(rows: torch.Tensor, room: int) -> torch.Tensor:
    """Rows in memory for ``room``, the rest of which holds whatever was there."""
    host_assert(len(rows) <= room, "an illegal memory access was encountered")
    garbage = torch.nan if rows.is_floating_point() else 2**20
    return torch.cat([rows, rows.new_full((room - len(rows), *rows.shape[1:]), garbage)])


def summed(
    pieces: list[torch.Tensor], rows: list[torch.Tensor], like: torch.Tensor, num: int
) -> torch.Tensor:
    """``pieces[r][i]`` added to row ``rows[r][i]`` in float32, and rounded once."""
    wide = torch.promote_types(like.dtype, torch.float32)
    out = like.new_zeros(num, like.shape[1], dtype=wide)
    for piece, row in zip(pieces, rows):
        out.index_add_(0, row, piece.to(wide))
    return out.to(like.dtype)
