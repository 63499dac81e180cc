"""Forward and backward of the experts on a CPU, against the implementations in transformers.

    python benchmarks/experts_cpu.py            # float32, T=2048 D=512 F=256 E=16 K=4, two threads

All have the same weights, tokens and routing. Values and gradients are compared before anything is timed.
Implementations take turns, so that a disturbance hits all of them; the ratio is of medians. Kept bytes, those
between forward and backward, come on top of the tokens, the routing's weights and the parameters.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

import fmoe
from fmoe.bench.timing import in_turns
from fmoe.introspect import kept_bytes

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(params: fmoe.ExpertParams, routing: fmoe.Routing) -> Layer:
    def run(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = fmoe.Routing(routing.expert_ids_TK, weights, routing.counts_E, routing.scores_TE)
        x_SD, plan = fmoe.dispatch(x, chosen)
        return fmoe.combine(fmoe.experts_grouped_mm(params, x_SD, plan), plan)

    return run


def theirs(params: fmoe.ExpertParams, routing: fmoe.Routing, implementation: str) -> Layer:
    num_experts, _, hidden, dim = params.w_in.shape
    config = DeepseekV3Config(hidden_size=dim, moe_intermediate_size=hidden, n_routed_experts=num_experts)
    config._experts_implementation = implementation
    experts = DeepseekV3Experts(config)
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = params.w_in.flatten(1, 2)  # their (E, 2F, D) is a view of (E, 2, F, D)
    experts.down_proj = params.w_out
    return lambda x, weights: experts(x, routing.expert_ids_TK, weights)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    sizes = dict(tokens=2048, dim=512, hidden=256, experts=16, top_k=4)
    for name, default in {**sizes, "threads": 2, "rounds": 15}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    parser.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    params = fmoe.moe_init(args.seed, dim=args.dim, hidden_dim=args.hidden, num_experts=args.experts)
    x = torch.randn(args.tokens, args.dim)
    routing = fmoe.route(params.router, x, fmoe.RouterConfig(top_k=args.top_k))
    experts, weights = params.experts, routing.weights_TK.detach()
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *experts)]
    cotangent = torch.randn_like(x)

    layers = {"fmoe": ours(experts, routing)}
    layers |= {f"transformers {name}": theirs(experts, routing, name) for name in args.peers}

    def step(layer: Layer) -> tuple[torch.Tensor, ...]:
        y = layer(x, weights)
        return (y, *torch.autograd.grad(y, leaves, cotangent))

    expected = step(layers["fmoe"])
    for name, layer in layers.items():
        for a, b in zip(step(layer), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()), msg=name)

    calls = {name: functools.partial(step, layer) for name, layer in layers.items()}
    times = in_turns(calls, args.rounds, on_cuda=False)
    medians = {name: statistics.median(ts) for name, ts in times.items()}
    own = medians["fmoe"]
    pairs = args.tokens * args.top_k
    floor = 4 * pairs * 2 * args.hidden + (8 + 8) * pairs + 4 * args.experts
    shape = f"T={args.tokens} D={args.dim} F={args.hidden} E={args.experts} K={args.top_k}"
    table = Table(title=f"forward + backward, float32, {shape}")
    for column in ("implementation", "median ms", "min ms", "time / fmoe", "kept MiB"):
        table.add_column(column, justify="right" if column != "implementation" else "left")
    for name, median in medians.items():
        kept = kept_bytes(lambda x, w, _, name=name: layers[name](x, w), x, weights, experts)
        figures = f"{median:.1f}", f"{min(times[name]):.1f}", f"{median / own:.2f}", f"{kept / 2**20:.2f}"
        table.add_row(name, *figures)
    console = Console()
    console.print(table)
    how = f"{args.threads} threads, {args.rounds} rounds, seed {args.seed}"
    console.print(f"torch {torch.__version__}, {how}")
    console.print(f"pre-activation + plan: {floor / 2**20:.2f} MiB")
    best = min(median for name, median in medians.items() if name != "fmoe")
    console.print(f"fastest of transformers / fmoe: {best / own:.2f}")


if __name__ == "__main__":
    main()
