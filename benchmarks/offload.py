"""Keeping, recomputing and offloading what a model's layers need for their backward: time and memory.

    python benchmarks/offload.py --model 16B --layers 6         # one GPU, bfloat16, as a markdown table

Before anything is timed, each policy must give the first one's loss bit for bit, and its gradients up to
rounding, since attention's backward may add in any order. Policies take turns, so that a disturbance hits
all; times are medians. What is held lies on the device between forward and backward, beyond the parameters.
The peak is that of a step, parameters and gradients included. Beside both, and for the host's memory, stands
what ``fmoe.plan`` says. The rates of copies to pinned memory and back stand below.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

from fmoe.__main__ import markdown_table
from fmoe.bench.measure import ROUNDING
from fmoe.bench.timing import timed
from fmoe.models import decoder
from fmoe.ops.core import engine
from fmoe.plan import plan
from fmoe.training import launch
from fmoe.training.options import Parser, at_least
from fmoe.transforms import per_layer

POLICIES = [
    "none",
    "full",
    "default",
    "default+save:experts_grouped_mm",
    "default+offload:experts_grouped_mm",
]
HEADINGS = ["`--remat`", "forward ms", "backward ms"]
HEADINGS += ["held GiB", "planned", "peak GiB", "planned", "on the host GiB"]
DTYPE = torch.bfloat16
COPIED = 2**28  # bytes


class Step(NamedTuple):
    """Milliseconds of forward and backward, bytes on CUDA, and the loss with its gradients."""

    forward: float
    backward: float
    held: int
    peak: int
    results: tuple[torch.Tensor, ...]


def step(loss: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], on_cuda: bool) -> Step:
    def now() -> Any:
        event = torch.cuda.Event(enable_timing=True) if on_cuda else None
        return torch.cuda.current_stream().record_event(event) if on_cuda else time.perf_counter()

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), now()
    value = loss()
    held, middle = torch.cuda.memory_allocated() - before, now()
    results = value.detach(), *engine.grad(value, leaves, materialize_grads=True)
    stop = now()
    if not on_cuda:
        return Step(1e3 * (middle - start), 1e3 * (stop - middle), 0, 0, results)
    torch.cuda.synchronize()
    times = start.elapsed_time(middle), middle.elapsed_time(stop)
    return Step(*times, held, torch.cuda.max_memory_allocated(), results)


def check(words: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Exit unless the losses are equal, and the gradients but for rounding."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    error = float(torch.stack([torch.dist(a, b) / b.norm().clamp_min(1e-20) for a, b in pairs]).max())
    if not torch.equal(found[0], expected[0]) or not error < ROUNDING:  # NaN neither
        raise SystemExit(f"error: {words}: another loss, or gradients that are {error:.2g} off")


class Planned(NamedTuple):
    """Bytes of a step, without an optimizer's."""

    held: int
    peak: int
    on_host: int


def planned(words: str, config: decoder.DecoderConfig, **sizes: Any) -> Planned:
    (rank,) = plan(config, dtype=DTYPE, per_layer=per_layer(words), **sizes).ranks
    held = rank.converted + sum(rank.activations.values())
    peak = max(rank.peaks["forward"], rank.peaks["backward"]) - rank.optimizer
    return Planned(held, peak, rank.offloaded)


def copy_rates() -> tuple[float, float]:
    """GB/s from the device to the host's pinned memory, and back: the best of five measurements."""
    on_host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    here = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")

    def rate(to: torch.Tensor, of: torch.Tensor) -> float:
        ms = min(timed(lambda: to.copy_(of, non_blocking=True), on_cuda=True) for _ in range(5))
        return COPIED / ms / 1e6

    return rate(on_host, here), rate(here, on_host)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="16B", help="a preset")
    for name, number in dict(layers=6, batch_size=4, seq_len=4096, rounds=3).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), default=number)
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="REMAT", help="words of --remat")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="fresh by default")
    args = parser.parse_args()
    config, on_cuda = decoder.preset(args.model, layers=args.layers), args.device == "cuda"
    sizes = dict(batch_size=args.batch_size, seq_len=args.seq_len, device_type=args.device)
    plans = {words: planned(words, config, **sizes) for words in args.policies}
    torch.manual_seed(args.seed)
    params = decoder.init(config, args.seed, dtype=DTYPE, device=args.device)
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(params)]
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len), device=args.device)

    def take(words: str) -> Step:
        wrap = per_layer(words)
        return step(lambda: decoder.loss(params, tokens, tokens, config, per_layer=wrap)[0], leaves, on_cuda)

    first = take(args.policies[0]).results
    for words in args.policies[1:]:
        check(words, take(words).results, first)
    del first
    rounds = [
        {words: take(words)._replace(results=()) for words in args.policies} for _ in range(args.rounds)
    ]
    rows = []
    for words, of_plan in plans.items():
        steps = [each[words] for each in rounds]
        times = [statistics.median(s.forward for s in steps), statistics.median(s.backward for s in steps)]
        held, peak = (max(s.held for s in steps), max(s.peak for s in steps)) if on_cuda else (None, None)
        memory = held, of_plan.held, peak, of_plan.peak, of_plan.on_host
        gib = ["-" if n is None else f"{n / 2**30:.2f}" for n in memory]
        rows.append([f"`{words}`", *(f"{ms:.1f}" for ms in times), *gib])
    name = torch.cuda.get_device_name() if on_cuda else "CPU"
    tokens_of = f"{args.batch_size} x {args.seq_len} tokens"
    print(f"{args.layers} layers of {args.model}, {tokens_of}, {DTYPE}, {name}, torch {torch.__version__}\n")
    print(markdown_table(HEADINGS, rows))
    if on_cuda:
        there, back = copy_rates()
        print(f"\nPinned copies here: {there:.1f} GB/s to the host, {back:.1f} GB/s back.")


if __name__ == "__main__":
    launch.run(main)
