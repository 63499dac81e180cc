"""The ways of rows: where each device's rows go, how many come, and how those lie by expert.

Each function is also an operator, for a dispatch in parts.
"""

import zlib
from typing import Any

import torch

from ...ops import kernels
from ...ops.core.derive import Tensors
from ...ops.core.primitive import Operator
from ...ops.dispatch import DISPATCH, check_ids, layout_fake, layout_kernel
from . import payload
from .bounds import agree, check_alike, laid_out
from .in_parts import beside, catch_up, part, taken, ticket
from .wire import arrived, begin_swap, process_group


def kind_of(x: torch.Tensor, weights: torch.Tensor, before: bool, narrow: bool) -> str:
    when = "before" if before else "after"
    weighed = f"{weights.shape[1]} weights of {weights.dtype} {when} the experts"
    return f"rows of shape {tuple(x.shape[1:])} and {payload.described(x.dtype, narrow)} with {weighed}"


def begin_sizes_kernel(ids: torch.Tensor, num_experts: int, size: int, described: str, group: str) -> Tensors:
    """Where copies go, in room for the most of them; sizes (n, 3) from this device, and those to come."""
    check_ids(ids, num_experts)
    home_TK, hit_Tn = _homes(ids, num_experts // size, size)
    every = home_TK.flatten()  # not by bincount, which waits for the device
    pairs_n = ids.new_zeros(size + 1).scatter_add_(0, every, torch.ones_like(every))[:size]
    devices_Tn = torch.where(hit_Tn, torch.arange(size, device=ids.device), -1)
    slot_Q, copy_Tn, _ = layout_kernel(devices_Tn, size, ids.shape[0] * min(size, ids.shape[1]))
    kind = zlib.crc32(described.encode())
    out_n3, each = torch.stack([hit_Tn.sum(0), pairs_n, torch.full_like(pairs_n, kind)], 1), [1] * size
    catch_up(out_n3)
    with beside(out_n3):
        in_n3 = begin_swap(out_n3, each, each, group, "sizes")
    return slot_Q, copy_Tn, out_n3, ticket(out_n3, in_n3)


def end_sizes_kernel(out_n3: torch.Tensor, ticket: torch.Tensor, described: str) -> Tensors:
    """Rows to and from each device (2, n), and how many pairs come; here the host waits."""
    with beside(out_n3):
        sizes = torch.stack([out_n3, arrived(taken(ticket))]).cpu()
    kind = zlib.crc32(described.encode())
    check_alike(sizes[1, :, 2].tolist(), kind, described)
    return sizes[:, :, 0].contiguous(), sizes[1, :, 1].sum()


def bounded_way_kernel(
    ids: torch.Tensor, num_experts: int, size: int, described: str, copies: int, group: str
) -> Tensors:
    """Where copies go, as in Sent, and how many have no room."""
    check_ids(ids, num_experts)
    if size > 1:
        agree(process_group(group), f"{described}, {copies} to each device")
    slot_Q, copy_Tn, lost_n = ways(ids, size, num_experts // size, copies)
    return slot_Q, copy_Tn, torch.full((2, size), copies, device="cpu"), lost_n


def ways(ids: torch.Tensor, size: int, held: int, copies: int) -> Tensors:
    """The pair (token, device) of each row, the row of each pair, and how many found no room, by device."""
    if kernels.installed() and ids.is_cuda:
        from ...ops.kernels import plan

        return plan.ways(ids, size, held, copies)
    hit_Tn = _homes(ids, held, size)[1]
    place_Tn = hit_Tn.cumsum(0) - 1
    fits_Tn = hit_Tn & (place_Tn < copies)
    copy_Tn = torch.where(fits_Tn, place_Tn + torch.arange(size, device=ids.device) * copies, -1)
    # The inverse. One row more than there is room for takes what isn't sent.
    slot_Q, slots = ids.new_full((size * copies + 1,), -1), torch.arange(hit_Tn.numel(), device=ids.device)
    slot_Q.scatter_(0, torch.where(fits_Tn, copy_Tn, size * copies).flatten(), slots)
    return slot_Q[:-1].clone(), copy_Tn, (hit_Tn & ~fits_Tn).sum(0)


def layout_bounded_kernel(ids_SK: Any, lost: torch.Tensor, first: int, held: int, pairs: int) -> Tensors:
    slot_R, row_SK, offsets_e, overflow = laid_out(held_here(ids_SK, first, held), held, pairs)
    return slot_R, row_SK, offsets_e, overflow + lost.sum()


def _homes(ids: torch.Tensor, held: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The device of every pair, ``size`` for none, and whether a token goes to a device (T, n)."""
    home_TK = torch.where(ids < 0, size, torch.div(ids, held, rounding_mode="floor"))
    hit_Tn = ids.new_zeros(ids.shape[0], size + 1, dtype=torch.bool).scatter_(1, home_TK, True)
    return home_TK, hit_Tn[:, :size]


def held_here(ids_SK: torch.Tensor, first: int, held: int) -> torch.Tensor:
    """Ids from ``first`` on as those of the experts held here. Others are below 0, or lie past them."""
    local_SK = ids_SK - first
    if kernels.installed() and ids_SK.is_cuda:
        return local_SK  # the kernel of the layout drops ids of no expert
    return torch.where((local_SK >= 0) & (local_SK < held), local_SK, -1)


# ---- operators: ids (T, K) -> where copies go, and sizes there and back ----------------------------------

begin_sizes: Operator = part(
    "begin_sizes(Tensor ids, SymInt num_experts, int size, str described, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    begin_sizes_kernel,
    lambda ids, num_experts, size, *others: (
        ids.new_empty(ids.shape[0] * min(size, ids.shape[1])),
        ids.new_empty(ids.shape[0], size),
        ids.new_empty(size, 3),
        ids.new_empty(0, 3),
    ),
    DISPATCH,
)

end_sizes: Operator = part(
    "end_sizes(Tensor out, Tensor ticket, str described) -> (Tensor, Tensor)",
    end_sizes_kernel,
    lambda out, *others: tuple(
        torch.empty(shape, dtype=torch.int64, device="cpu") for shape in ((2, out.shape[0]), ())
    ),
    DISPATCH,
)

layout_posted: Operator = part(
    "layout_posted(Tensor ids, Tensor pairs, SymInt first, SymInt held) -> (Tensor, Tensor, Tensor)",
    lambda ids, pairs, first, held: layout_kernel(held_here(ids, first, held), held, int(pairs)),
    lambda ids, pairs, first, held: layout_fake(ids, held, torch.library.get_ctx().new_dynamic_size()),
    DISPATCH,
)

bounded_way: Operator = part(
    "bounded_way(Tensor ids, SymInt num_experts, int size, str described, SymInt copies, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    bounded_way_kernel,
    lambda ids, num_experts, size, described, copies, group: (
        ids.new_empty(size * copies),
        ids.new_empty(ids.shape[0], size),
        torch.empty(2, size, dtype=torch.int64, device="cpu"),
        ids.new_empty(size),
    ),
    DISPATCH,
)

layout_bounded: Operator = part(
    "layout_bounded(Tensor ids, Tensor lost, SymInt first, SymInt held, SymInt pairs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    layout_bounded_kernel,
    lambda ids, lost, first, held, pairs: (*layout_fake(ids, held, pairs), ids.new_empty(())),
    DISPATCH,
)
