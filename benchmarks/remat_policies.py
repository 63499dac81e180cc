"""The cost of each remat policy for one MoE layer: kernels run in a step, and bytes kept for the backward.

    python benchmarks/remat_policies.py         # as a markdown table

Bytes are those beyond the layer's arguments: predicted from the operators' declarations, and measured.
"""

import optree
import torch

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.introspect import kept_bytes, raw_calls, saved_bytes
from fmoe.models.deepseek_v3 import preset
from fmoe.ops.core.tape import Policy

TOKENS, DIM, HIDDEN, EXPERTS = 512, 128, 64, 16
POLICIES: dict[str, Policy | None] = {
    "`save_nothing`": fmoe.save_nothing,
    "`None` (each operator's default)": None,
    '`save("topk")`': fmoe.save("topk"),
    '`save("experts_grouped_mm")`': fmoe.save("experts_grouped_mm"),
    "`save_everything`": fmoe.save_everything,
}
KERNELS = ["product", "topk", "layout", "experts_up", "experts_down"]
KERNELS += ["experts_up_backward", "experts_down_backward"]


def layer(params: fmoe.MoEParams, x: torch.Tensor) -> torch.Tensor:
    return fmoe.moe_forward(params, x, router=preset("debug").router)


def rows() -> list[list[str]]:
    params = fmoe.moe_init(0, dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS)
    args = optree.tree_map(lambda t: t.requires_grad_(), params), torch.randn(TOKENS, DIM)
    found = []
    for name, policy in (("no `remat`", None), *POLICIES.items()):
        wrapped = layer if name == "no `remat`" else fmoe.remat(layer, policy)
        with raw_calls() as counts:
            fmoe.value_and_grad(lambda p, x, f=wrapped: f(p, x).sum(), (0, 1))(*args)
        predicted = "" if wrapped is layer else f"{sum(saved_bytes(layer, *args, policy=policy).values()):,}"
        calls = [str(counts.get(kernel, 0)) for kernel in KERNELS]
        found.append([name, *calls, predicted, f"{kept_bytes(wrapped, *args):,}"])
    return found


def table() -> str:
    return markdown_table(["policy", *KERNELS, "bytes predicted", "bytes kept"], rows())


if __name__ == "__main__":
    print(f"T={TOKENS} D={DIM} F={HIDDEN} E={EXPERTS} K={preset('debug').router.top_k}, float32\n")
    print(table())
