"""Bytes a token costs per MoE layer between devices that share its experts, against a copy per expert.

    python benchmarks/wire_volume.py        # as a markdown table

For 2, 4 and 8 devices, which are gloo processes here, a layer runs forward and backward, and ``wire_bytes``
counts. For 32 and 64 devices one process routes the tokens of all, and bytes follow from the rows that each
would send. Where both are known, every count of every device must be equal.

``devices`` and ``nodes`` are those a token goes to, its own included: mean (most). Bytes are those sent per
token, as a mean over devices; what a device sends itself isn't among them. K copies are rows without weights
and ids, one for each expert on another device.
"""

import argparse
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

import fmoe
from fmoe.introspect import wire_bytes
from fmoe.parallel import Processes
from fmoe.parallel.backends.all_to_all import rows_sent

EXPERTS, TOP_K, HIDDEN = 256, 8, 8  # the hidden dimension doesn't travel
NODE = 8  # devices per node
# (num_groups, top_groups): no groups, DeepSeek-V3's, and groups that are a node each at EP 32.
GROUPS = ((1, 1), (8, 4), (4, 2))
LIMIT = 180  # seconds for all processes of one size

Traffic = dict[str, list[int]]  # operator -> bytes sent, received, kept


class Routes(NamedTuple):
    """Rows and pairs from device to device, and on how many devices and nodes each token has an expert."""

    rows_nn: torch.Tensor
    pairs_nn: torch.Tensor
    devices_T: torch.Tensor
    nodes_T: torch.Tensor


def router_config(groups: tuple[int, int]) -> fmoe.RouterConfig:
    return fmoe.RouterConfig(top_k=TOP_K, num_groups=groups[0], top_groups=groups[1])


def router(args: argparse.Namespace) -> fmoe.RouterParams:
    generator = torch.Generator().manual_seed(args.seed)
    weight_ED = torch.randn(EXPERTS, args.dim, generator=generator) / args.dim**0.5
    return fmoe.RouterParams(weight_ED.bfloat16(), torch.zeros(EXPERTS))


def tokens(args: argparse.Namespace, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(args.seed + 1 + rank)
    return torch.randn(args.tokens, args.dim, generator=generator).bfloat16()


# ---- measured ----------------------------------------------------------------------------------


def layer(args: argparse.Namespace, ep: int, rank: int, groups: tuple[int, int]) -> tuple[list[int], Traffic]:
    """One layer forward and backward: rows sent to each device, and what was counted."""
    x_TD = tokens(args, rank).requires_grad_()
    shape = EXPERTS // ep, 2, HIDDEN, args.dim
    w_in, w_out = torch.randn(shape), torch.randn(shape[0], args.dim, HIDDEN)
    experts = fmoe.ExpertParams(*(w.div_(args.dim**0.5).bfloat16().requires_grad_() for w in (w_in, w_out)))
    with wire_bytes() as counts:
        routing = fmoe.route(router(args), x_TD, router_config(groups))
        x_SD, plan = fmoe.dispatch(x_TD, routing, axis=fmoe.make_mesh(ep=ep, device_type="cpu")["ep"])
        y_TD = fmoe.combine(fmoe.experts_grouped_mm(experts, x_SD, plan), plan)
        y_TD.backward(torch.randn_like(y_TD))
    return rows_sent(plan).tolist(), {operator: list(traffic) for operator, traffic in counts.items()}


def layers(args: argparse.Namespace, ep: int) -> list[tuple[list[int], Traffic]]:
    return [layer(args, ep, dist.get_rank(), groups) for groups in GROUPS]


def measure(args: argparse.Namespace, ep: int) -> list[list[tuple[list[int], Traffic]]]:
    """The results of :func:`layer` on every device, for each of ``GROUPS``."""
    with Processes(ep, timeout=LIMIT) as devices:
        return [list(each) for each in zip(*devices.run(layers, args, ep))]


# ---- simulated ---------------------------------------------------------------------------------


def simulate(args: argparse.Namespace, ep: int, groups: tuple[int, int]) -> Routes:
    """Route every device's tokens here."""
    rows, pairs, devices, nodes = [], [], [], []
    params, config, node_of = router(args), router_config(groups), torch.arange(ep) // NODE
    for rank in range(ep):
        home_TK = fmoe.route(params, tokens(args, rank), config).expert_ids_TK // (EXPERTS // ep)
        reached_Tn = torch.zeros(args.tokens, ep, dtype=torch.bool).scatter_(1, home_TK, True)
        rows.append(reached_Tn.sum(0))
        pairs.append(torch.bincount(home_TK.flatten(), minlength=ep))
        devices.append(reached_Tn.sum(1))
        nodes.append(torch.stack([reached_Tn[:, node_of == i].any(1) for i in node_of.unique()]).sum(0))
    return Routes(torch.stack(rows), torch.stack(pairs), torch.cat(devices), torch.cat(nodes))


def implied(args: argparse.Namespace, rows_nn: torch.Tensor, rank: int) -> Traffic:
    """The bytes that one device would count, given the rows all send."""
    kept = int(rows_nn[rank, rank])
    there, back = int(rows_nn[rank].sum()) - kept, int(rows_nn[:, rank].sum()) - kept
    row, weights, ids, peers = 2 * args.dim, 4 * TOP_K, 8 * TOP_K, len(rows_nn) - 1
    return {
        "sizes": [16 * peers, 16 * peers, 16],
        "exchange": [n * (row + weights + ids) for n in (there, back, kept)],
        "send_back": [n * row for n in (back, there, kept)],
        "send": [n * row for n in (there, back, kept)],
        "send_both_back": [n * (row + weights) for n in (back, there, kept)],
    }


def check(routes: Routes, traffic: list[Traffic], found: list[tuple[list[int], Traffic]]) -> None:
    for rank, each in enumerate(found):
        assert each == (routes.rows_nn[rank].tolist(), traffic[rank]), (rank, each)


def table_row(
    args: argparse.Namespace, groups: tuple[int, int], routes: Routes, all_traffic: list[Traffic]
) -> list[str]:
    ep = len(all_traffic)
    total = ep * args.tokens

    def sent(*operators: str) -> float:
        return sum(traffic[operator][0] for traffic in all_traffic for operator in operators) / total

    forward = sent("sizes", "exchange", "send_back")
    both = forward + sent("send", "send_both_back")
    pairs = int(routes.pairs_nn.sum() - routes.pairs_nn.trace()) / total  # K copies less those that stay
    copies = 4 * pairs * 2 * args.dim  # there and back, forward and backward

    def mean_and_most(count_T: torch.Tensor) -> str:
        return f"{count_T.double().mean():.2f} ({count_T.max()})"

    named = "none" if groups[0] == 1 else f"{groups[1]} of {groups[0]}"
    nodes = mean_and_most(routes.nodes_T) if ep > NODE else "1"
    figures = f"{forward:,.0f}", f"{both:,.0f}", f"{copies:,.0f}", f"{both / copies:.1%}"
    return [str(ep), named, mean_and_most(routes.devices_T), nodes, *figures]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=128, help="on each device")
    parser.add_argument("--dim", type=int, default=7168)
    parser.add_argument("--measure", type=int, nargs="*", default=[2, 4, 8], help="sizes, run as processes")
    parser.add_argument("--simulate", type=int, nargs="*", default=[32, 64], help="sizes, routed here")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the processes, whose routing must be the same to the bit

    columns = "EP", "groups", "devices", "nodes", "forward", "with backward", "K copies", "of K copies", "how"
    table = Table(*columns, box=box.MARKDOWN)
    for ep in (*args.measure, *args.simulate):
        found = measure(args, ep) if ep in args.measure else None
        for i, groups in enumerate(GROUPS):
            routes = simulate(args, ep, groups)
            traffic = [implied(args, routes.rows_nn, rank) for rank in range(ep)]
            if found:
                check(routes, traffic, found[i])
            table.add_row(*table_row(args, groups, routes, traffic), "measured" if found else "simulated")
    sizes = f"K={TOP_K} E={EXPERTS} D={args.dim} bfloat16, {args.tokens} tokens a device"
    console = Console(width=120)
    console.print(f"{sizes}, {NODE} devices a node, seed {args.seed}")
    console.print(table)


if __name__ == "__main__":
    main()
