"""Train a small DeepSeek-V3 on the source code of the Python standard library, byte by byte.

    python examples/train_deepseek_v3.py

With the defaults it takes about two minutes on two CPU cores, and leaves metrics (JSONL) and a picture
of the loss curve (SVG) in ``runs/debug``.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fmoe
from fmoe import data, documents, metrics, optim, schedules
from fmoe.models import deepseek_v3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="debug", help="model configuration")
    add("--data", type=Path, default=None, help="file or folder of .py files; default: the standard library")
    add("--steps", type=int, default=260)
    add("--batch-size", type=int, default=16, help="sequences a step")
    add("--seq-len", type=int, default=256, help="bytes a sequence")
    add("--learning-rate", type=float, default=3e-3, help="peak, after warm-up")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to this global norm")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    add("--remat", default="none", help="none, full, default, or save:NAME,NAME: what layers recompute")
    add("--compile", action="store_true", help="compile each layer with torch.compile")
    add("--out", type=Path, default=None, help="folder of metrics and picture; default: runs/PRESET")
    args = parser.parse_args()
    args.out = args.out or Path("runs", args.preset)
    return args


def per_layer(args: argparse.Namespace) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How the function of one layer is wrapped, by ``--remat`` and ``--compile``."""
    wrappers: list[Callable[..., Any]] = []
    kind, _, names = args.remat.partition(":")
    policies = {"full": fmoe.save_nothing, "default": None}
    if kind == "save":
        policies["save"] = fmoe.save(*names.split(","))
    if kind in policies:
        wrappers.append(functools.partial(fmoe.remat, policy=policies[kind]))
    elif kind != "none":
        raise SystemExit(f"--remat: got {args.remat!r}, expected none, full, default or save:NAME,NAME")
    if args.compile:
        wrappers.append(functools.partial(torch.compile, fullgraph=True))
    return lambda layer: functools.reduce(lambda f, wrap: wrap(f), wrappers, layer)


def main() -> None:
    args, console = parse(), Console()
    config = deepseek_v3.preset(args.preset)
    device = torch.device(args.device)
    text = data.pack(documents.read_documents(args.data or documents.python_stdlib()))
    entropy = data.unigram_entropy(text)
    batches = data.batches(text, batch_size=args.batch_size, seq_len=args.seq_len, seed=args.seed)

    params = deepseek_v3.init(config, args.seed, dtype=getattr(torch, args.dtype), device=device)
    optimizer = optim.adamw()
    state = optimizer.init(params)
    total, active = deepseek_v3.num_params(config)
    console.print(
        f"{args.preset}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active; "
        f"{text.numel() / 1e6:.1f} MB of text, unigram entropy {entropy:.3f} nats a byte"
    )

    wrap = per_layer(args)
    loss_and_grad = fmoe.value_and_grad(
        lambda p, x, y: deepseek_v3.loss(p, x, y, config, per_layer=wrap), has_aux=True
    )
    schedule = functools.partial(
        schedules.warmup_cosine,
        peak=args.learning_rate,
        warmup_steps=max(1, args.steps // 20),
        total_steps=args.steps,
    )

    losses: list[float] = []
    path = args.out / "metrics.jsonl"
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    with metrics.MetricsFile(path) as file, metrics.LiveView(args.steps, console=console) as view:
        for step, batch in zip(range(args.steps), batches):
            began = time.perf_counter()
            tokens, targets = (t.to(device) for t in batch)
            (loss, stats), grads = loss_and_grad(params, tokens, targets)
            grads, norm = optim.clip_by_global_norm(grads, args.max_norm)
            params, state = optimizer.update(params, grads, state, schedule(step), donate=True)
            params = deepseek_v3.update_biases(params, stats, config.bias_update_rate)

            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"step {step}: the loss is {losses[-1]}. Lower --learning-rate.")
            now = metrics.Step(
                step=step,
                loss=losses[-1],
                grad_norm=norm.item(),
                learning_rate=schedule(step),
                tokens_per_second=tokens.numel() / (time.perf_counter() - began),
                tokens_per_expert=[s.tokens_per_expert.tolist() for s in stats],
            )
            file.write(now)
            view.update(now)

    seconds = time.perf_counter() - start
    last = losses[-20:]
    metrics.plot_loss(
        metrics.read_metrics(path), args.out / "loss.svg", reference={"unigram entropy": entropy}
    )
    console.print(
        f"final loss {sum(last) / len(last):.3f} nats a byte (mean of the last {len(last)} steps), "
        f"unigram entropy {entropy:.3f}"
    )
    rate = args.steps * args.batch_size * args.seq_len / seconds
    console.print(
        f"{seconds:.0f} s, {rate:,.0f} tokens/s on {device}; see {path} and {args.out / 'loss.svg'}"
    )


if __name__ == "__main__":
    main()
