"""Per-example gradients of a small MoE language model: ``vmap(grad)`` against a loop of backward passes.

    python benchmarks/per_example_grads.py      # 32 examples of 32 tokens, float32, two threads

Gradients are compared before anything is timed. The two take turns, so that a disturbance hits both; the
ratio is of medians.
"""

import argparse
import dataclasses
import statistics
import time

import optree
import torch
from rich.console import Console
from rich.table import Table
from torch.func import grad, vmap

import fmoe
from fmoe.bench.timing import in_turns
from fmoe.models import decoder


def config(dim: int) -> decoder.DecoderConfig:
    """The debug model at another width: one dense layer, one MoE layer of 8 experts."""
    whole = decoder.preset("debug", layers=2)
    rope = dataclasses.replace(whole.attention.rope, dim=dim // 8)
    sizes = dict(kv_lora_rank=dim // 2, qk_nope_head_dim=dim // 8, v_head_dim=dim // 4)
    return dataclasses.replace(
        whole, dim=dim, hidden_dim=2 * dim, moe_hidden_dim=dim // 2, num_experts=8,
        attention=dataclasses.replace(whole.attention, rope=rope, **sizes), router=fmoe.RouterConfig(top_k=2),
    )  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128])
    for name, default in dict(examples=32, seq_len=32, threads=2, rounds=7).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    table = Table(title=f"{args.examples} per-example gradients, {args.seq_len} tokens each, float32")
    for column in ("D", "parameters", "loop ms", "vmap(grad) ms", "loop / vmap(grad)"):
        table.add_column(column, justify="right")
    for dim in args.dims:
        c = config(dim)
        params = decoder.init(c, args.seed)
        text = torch.randint(c.vocab_size, (args.examples, args.seq_len + 1))

        def loss(params: decoder.ModelParams, text: torch.Tensor, c=c) -> torch.Tensor:
            return decoder.loss(params, text[None, :-1], text[None, 1:], c)[0]

        def loop(params=params, text=text, loss=loss):
            one = fmoe.value_and_grad(loss)
            grads = [one(params, example)[1] for example in text]
            return optree.tree_map(lambda *g: torch.stack(g), *grads)

        def batched(params=params, text=text, loss=loss):
            return vmap(grad(loss), in_dims=(None, 0))(params, text)

        for a, b in zip(optree.tree_leaves(loop()), optree.tree_leaves(batched())):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-9)
        times = in_turns({"loop": loop, "vmap": batched}, args.rounds, on_cuda=False)
        slow, fast = map(statistics.median, times.values())
        count = decoder.num_params(c)[0]
        table.add_row(str(dim), f"{count:,}", f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.2f}")
    console = Console()
    console.print(table)
    how = f"{args.threads} threads, {args.rounds} rounds, seed {args.seed}"
    console.print(f"torch {torch.__version__}, {how}")


if __name__ == "__main__":
    main()
