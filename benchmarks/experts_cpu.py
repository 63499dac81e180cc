"""Forward and backward of the experts on a CPU, against the implementations in transformers.

    python benchmarks/experts_cpu.py            # float32, T=2048 D=512 F=256 E=16 K=4, two threads

Same weights, same tokens, same routing. Values and gradients are compared before anything is
timed. Rounds alternate between the implementations, so that a disturbance hits all of them; the
ratio is of medians. What is kept between forward and backward is counted beyond what is given: tokens,
weights of the routing, parameters.
"""

import argparse
import statistics
import time
import types
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

import fmoe
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        tokens=2048, dim=512, hidden=256, experts=16, top_k=4, threads=2, rounds=15
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=None, help="fresh by default")
    parser.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seed = args.seed if args.seed is not None else time.time_ns() % 2**31
    torch.manual_seed(seed)

    params = fmoe.moe_init(seed, dim=args.dim, hidden_dim=args.hidden, num_experts=args.experts)
    config = fmoe.RouterConfig(top_k=args.top_k)
    x = torch.randn(args.tokens, args.dim)
    routing = fmoe.route(params.router, x, config)
    experts = fmoe.ExpertParams(*(w.requires_grad_() for w in params.experts))
    inputs = types.SimpleNamespace(x=x.requires_grad_(), weights=routing.weights_TK.detach().requires_grad_())
    leaves = [inputs.x, inputs.weights, *experts]
    cotangent = torch.randn_like(x)

    layers = {"fmoe": ours(experts, routing)}
    layers |= {f"transformers {name}": theirs(experts, routing, name) for name in args.peers}

    def step(layer: Layer) -> tuple[torch.Tensor, ...]:
        y = layer(inputs.x, inputs.weights)
        return (y, *torch.autograd.grad(y, leaves, cotangent))

    expected = step(layers["fmoe"])
    for name, layer in layers.items():
        for a, b in zip(step(layer), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()), msg=name)

    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(args.rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            step(layer)
            times[name].append(time.perf_counter() - start)

    best = min(statistics.median(ts) for name, ts in times.items() if name != "fmoe")
    pairs = args.tokens * args.top_k
    floor = 4 * pairs * 2 * args.hidden + (8 + 8) * pairs + 4 * args.experts
    shape = f"T={args.tokens} D={args.dim} F={args.hidden} E={args.experts} K={args.top_k}"
    table = Table(title=f"forward + backward, float32, {shape}")
    for column in ("implementation", "median ms", "min ms", "time / fmoe", "kept MiB"):
        table.add_column(column, justify="right" if column != "implementation" else "left")
    ours_median = statistics.median(times["fmoe"])
    for name, ts in times.items():
        kept = kept_bytes(lambda x, w, _, name=name: layers[name](x, w), inputs.x, inputs.weights, experts)
        median = statistics.median(ts)
        table.add_row(
            name,
            f"{median * 1e3:.1f}",
            f"{min(ts) * 1e3:.1f}",
            f"{median / ours_median:.2f}",
            f"{kept / 2**20:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, seed {seed}")
    console.print(f"pre-activation + plan: {floor / 2**20:.2f} MiB")
    console.print(f"fastest of transformers / fmoe: {best / ours_median:.2f}")


if __name__ == "__main__":
    main()
