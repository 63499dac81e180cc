"""The cost of each remat policy for one MoE layer: kernels run in a step, and bytes kept for the backward.

    python benchmarks/remat_policies.py           # as a markdown table
    python benchmarks/remat_policies.py --errors  # those of a model's gradients, where values are kept in fp8

Bytes are those beyond the layer's arguments: predicted from the operators' declarations, and measured. Errors
are relative, by Frobenius norms, of the debug model in bfloat16 against float64. Experts are chosen round
robin, so that both dtypes choose the same.
"""

import argparse
import dataclasses
from typing import Any

import optree
import torch

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.introspect import kept_bytes, raw_calls, saved_bytes
from fmoe.models import decoder
from fmoe.models.deepseek_v3 import preset
from fmoe.models.params import ModelParams
from fmoe.ops.core.tape import Policy
from fmoe.transforms import per_layer
from fmoe.tree import dotted_names

TOKENS, DIM, HIDDEN, EXPERTS = 512, 128, 64, 16
POLICIES: dict[str, Policy | None] = {
    "`save_nothing`": fmoe.save_nothing,
    "`None` (each operator's default)": None,
    '`save("topk")`': fmoe.save("topk"),
    '`save("experts_grouped_mm")`': fmoe.save("experts_grouped_mm"),
    '`compress("experts_grouped_mm")`': fmoe.compress("experts_grouped_mm"),
    "`save_everything`": fmoe.save_everything,
}
KERNELS = ["product", "topk", "layout", "experts_up", "experts_down"]
KERNELS += ["experts_up_backward", "experts_down_backward"]

BATCH = 4, 128
WORDS = [
    "none",
    "default",
    "default+save:attention,experts_grouped_mm",
    "default+compress:attention",
    "default+compress:experts_grouped_mm",
    "default+compress:attention,experts_grouped_mm",
]
PARAMS = ["embedding", "query", "router", "experts.w_in", "experts.w_out"]


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


def error_rows() -> list[list[str]]:
    config = decoder.preset("debug")
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, force_balance=True))
    params = decoder.init(config, 0, dtype=torch.bfloat16)
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    torch.manual_seed(0)
    tokens, targets = torch.randint(config.vocab_size, (2, *BATCH)).unbind()

    def loss_of(words: str) -> Any:
        return lambda p: decoder.loss(p, tokens, targets, config, per_layer=per_layer(words))[0]

    def gradient(params: ModelParams, words: str) -> list[torch.Tensor]:
        return optree.tree_leaves(fmoe.value_and_grad(loss_of(words))(params)[1])

    names, found = dotted_names(params), []
    exact = gradient(optree.tree_map(torch.Tensor.double, params), "none")
    for words in WORDS:
        wrong = [a - b for a, b in zip(gradient(params, words), exact)]
        cells = []
        for kind in ["", *PARAMS]:
            chosen = [i for i, name in enumerate(names) if kind in name]
            off, of = (torch.cat([g[i].flatten() for i in chosen]).norm() for g in (wrong, exact))
            cells.append(f"{off / of:.1e}")
        found.append([f"`{words}`", f"{kept_bytes(loss_of(words), params):,}", *cells])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", action="store_true", help="of gradients, by policy")
    if parser.parse_args().errors:
        print(markdown_table(["`--remat`", "bytes kept", "gradients of all", *PARAMS], error_rows()))
    else:
        print(f"T={TOKENS} D={DIM} F={HIDDEN} E={EXPERTS} K={preset('debug').router.top_k}, float32\n")
        print(table())
