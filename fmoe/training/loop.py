"""Train a small DeepSeek-V3, or another model, on Python's standard library, byte by byte.

    python -m fmoe train
    torchrun --nproc-per-node 4 -m fmoe train --mesh dp=2,ep=2
    torchrun --nproc-per-node 4 -m fmoe train --mesh pp=2,ep=2 --micro-batches 8

With the defaults it takes about two minutes on two CPU cores. It leaves metrics in runs/debug, with pictures
where matplotlib is installed and checkpoints where --save-every says so. With --resume the same command goes
on from the newest: to the same bits as without a break, or on another mesh to the same within rounding.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

# Absolute imports, so that a copy of this file runs anywhere.
import fmoe
from fmoe.models import decoder, huggingface, stages
from fmoe.models.sampling import sample_text
from fmoe.training import checkpoint, data, gradients, launch, metrics, optim, options, plot, schedules
from fmoe.training.step import training_step


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`train`, those of ``fmoe.training.options`` among them.

    >>> parser = options.Parser()
    >>> add_options(parser)
    >>> parser.parse_args([]).steps
    600
    """
    add: Callable[..., Any] = parser.add_argument
    positive, natural, rate = options.at_least(1), options.at_least(0), options.at_least(0.0)
    add("--preset", help="model configuration, such as 16B or 30B-A3B (default: debug)")
    add("--layers", type=int, help="how many of the preset's layers (default: all)")
    add("--dim", type=int, help="numbers in a token's vector (default: the preset's)")
    add("--vocab-size", type=int, help="tokens the model knows (default: the preset's)")
    add("--init-from", type=Path, metavar="DIR", help="start from published weights and their config.json")
    add("--steps", type=positive, default=600, help="how many steps to train")
    add("--batch-size", type=positive, default=16, help="sequences a step")
    add("--seq-len", type=positive, default=128, help="tokens a sequence")
    add("--schedule", choices=["cosine", "stable"], default="cosine", help="stable: decay in the last fifth")
    add("--learning-rate", type=rate, default=3e-3, help="peak, after warm-up")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to this global norm; inf: never")
    add("--bias-rate", type=rate, default=0.01, help="of balancing experts; DeepSeek-V3 had 0.001")
    add("--router-noise", type=rate, default=0.0, help="deviation, on the logits that choose experts")
    add("--seed", type=int, default=0, help="of parameters, batches, noise and samples")
    options.add_text(parser)
    options.add_layout(parser)
    options.add_precision(parser)
    add("--eval-every", type=natural, default=0, help="steps between evaluations on held-out text; 0: none")
    add("--held-out", type=float, default=0.05, help="with --eval-every: share of the text not trained on")
    add("--save-every", type=natural, default=0, help="steps between checkpoints; 0: none")
    add("--keep", type=positive, default=2, help="how many checkpoints to keep")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--sample", metavar="PROMPT", help="print what the model makes of this in the end")
    add("--sample-tokens", type=positive, default=300, help="how many tokens to add to --sample")
    add("--temperature", type=rate, default=1.0, help="of --sample; 0: the likeliest token")
    add("--top-k", type=positive, default=10, help="--sample draws from so many tokens")
    add("--out", type=Path, help="output folder (default: runs/PRESET)")


def train(args: argparse.Namespace) -> None:
    """Train a model as the options of :func:`add_options` say.

    On many devices every process calls it, and the first one prints and writes.

    Raises ``ValueError`` for options that don't fit each other, the text or the checkpoint to go on from, and
    ``FloatingPointError`` for a loss or parameters that aren't finite. :func:`fmoe.training.launch.run` makes
    one line of them.

    >>> import contextlib, io, tempfile
    >>> parser = options.Parser()
    >>> add_options(parser)
    >>> short = ["--steps", "1", "--layers", "2", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with contextlib.redirect_stdout(io.StringIO()) as said:
    ...         train(parser.parse_args([*short, "--data", __file__, "--out", folder]))
    ...     "final loss" in said.getvalue(), len(metrics.read_metrics(f"{folder}/metrics.jsonl"))
    (True, 1)
    """
    if args.init_from and (args.preset or args.layers or args.dim or args.vocab_size):
        raise ValueError(
            "--init-from has a configuration: leave out --preset, --layers, --dim and --vocab-size"
        )
    name = args.init_from.resolve().name if args.init_from else args.preset or "debug"
    out = args.out or Path("runs", name)
    precision = options.Precision.of(args)
    world = launch.join(args.mesh, device_type=precision.device.type, options=vars(args))
    console = Console(quiet=not world.is_first, soft_wrap=True, highlight=False, markup=False)
    tokenizer, unit = options.tokenizer_of(args)
    where: dict[str, Any] = dict(dtype=precision.dtype, device=precision.device, mesh=world.mesh)
    if args.sample and world.pp > 1:
        raise ValueError("--sample doesn't run on a mesh with pp: resume from a checkpoint without it")
    layout = options.Layout.of(args, world)
    stages_of = partial(stages.cut, ranks=layout.schedule.stage_to_rank, seq_len=args.seq_len)
    if args.init_from:
        config, params = huggingface.load(args.init_from, stages=stages_of, **where)
    else:
        config = decoder.preset(name, layers=args.layers, dim=args.dim, vocab_size=args.vocab_size)
        params = decoder.init(config, args.seed, stages=stages_of(config), **where)
    noisy = replace(config, router=replace(config.router, noise=args.router_noise))
    key = fmoe.random.key(args.seed, device="cpu")
    data.check_vocabulary(tokenizer, config.vocab_size)
    share = args.held_out if args.eval_every else None
    text, test = data.read_streams(args.data, tokenizer, suffix=args.suffix, field=args.field, held_out=share)
    cut: dict[str, Any] = dict(batch_size=args.batch_size, seq_len=args.seq_len, seed=args.seed)
    if args.segments:  # nor is a document's first token predicted from the one before
        cut |= dict(separator=tokenizer.separator, ignore_boundaries=True)
    batches_of: Callable[..., Any] = partial(data.batches, **cut, part=world.part, device=precision.device)
    tests = [] if test is None else [batch for _, batch in zip(range(8), batches_of(test))]
    optimizer = optim.adamw(moments_dtype=precision.moments)
    run = {"model": asdict(noisy), "data": {**cut, "fingerprint": data.fingerprint(text)}}
    state = dict(params=params, optimizer=optimizer.init(params))
    saved: dict[str, Any] = dict(run=run, mesh=world.mesh)
    state, first = checkpoint.start(out, state, resume=args.resume, saves=args.save_every > 0, **saved)
    params, state = state["params"], state["optimizer"]
    (total, active), entropy = decoder.num_params(config), data.unigram_entropy(text)
    console.print(
        f"{name} on {world}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active; {precision}; "
        f"step {first}; {len(text) / 1e6:.1f}M {unit}s of text, unigram entropy {entropy:.3f} nats a {unit}"
    )
    if idle := layout.idle(args, world):
        console.print(f"without effect on {world}: {', '.join(idle)}")

    how: dict[str, Any] = dict(dtype=precision.compute, precision=precision.recipe)
    how["stages"] = stages_of(config)
    step_of = layout.gradient(noisy, graph=args.graph, **how)
    loss_of = gradients.loss_of_model(config, **layout.how, **how)
    how = dict(max_norm=args.max_norm, bias_rate=args.bias_rate, mesh=world.mesh)
    take_step = training_step(step_of, optimizer, graph=args.graph and not layout.bounded, **how)
    rate_of = schedules.by_name(args.schedule, peak=args.learning_rate, total_steps=args.steps)
    tokens = args.batch_size * args.seq_len
    flops = tokens * decoder.flops_per_token(config, args.seq_len) / world.size
    file = metrics.MetricsFile(out / "metrics.jsonl" if world.is_first else None, first_step=first)
    with file, metrics.LiveView(args.steps, console=console) as view:
        for step, batch in zip(range(first, args.steps), batches_of(text, start_step=first)):
            began, done = time.perf_counter(), step + 1
            of_step = fmoe.random.fold_in(key, step).to(precision.device) if args.router_noise else None
            batch = *(*batch, None)[:3], of_step  # the third are segments, if there are any
            params, state, value, size, stats, grads = take_step(params, state, rate_of(step), *batch)
            gradients.check_finite(step, loss := value.item(), norm := size.item(), grads, world.mesh)
            del grads  # before the next step's are made
            counts = [layer.tokens_per_expert.tolist() for layer in stats.layers]
            seconds = time.perf_counter() - began
            speed = metrics.speed(flops / seconds, precision.device)
            now = metrics.Step(step, loss, norm, rate_of(step), tokens / seconds, counts, **speed)
            if tests and (done == args.steps or done % args.eval_every == 0):
                now = now._replace(held_out_loss=metrics.mean_loss(loss_of, params, tests))
            file.write(now)
            view.update(now)
            if args.save_every and (done == args.steps or done % args.save_every == 0):
                gradients.check_params(step, params, world.mesh)
                checkpoint.save(out, done, dict(params=params, optimizer=state), keep=args.keep, **saved)

    if file.path:
        console.print(plot.report(file.path, reference={"unigram entropy": entropy}, unit=unit))
    if args.sample:
        how = dict(temperature=args.temperature, top_k=args.top_k, window=args.seq_len, mesh=world.mesh)
        how |= dict(num_tokens=args.sample_tokens, key=key.to(precision.device))
        draw = gradients.computing_in(sample_text, precision.compute)
        console.print(draw(params, args.sample, config, tokenizer, **how))
