"""Train a small DeepSeek-V3 on the source code of the Python standard library, byte by byte.

    python examples/train_deepseek_v3.py

    torchrun --nproc-per-node 4 examples/train_deepseek_v3.py --mesh dp=2,ep=2

With the defaults it takes about two minutes on two CPU cores, and leaves metrics (JSONL) and, where
matplotlib is installed, pictures of the loss and of the experts' load (SVG) in ``runs/debug``. With
``--save-every 100`` it also leaves checkpoints there, and the same command with ``--resume`` goes on from the
newest, to the same bits as if nothing had happened; on another mesh, to the same numbers within rounding.
"""

import argparse
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

import fmoe
from fmoe.models import deepseek_v3
from fmoe.models.sampling import sample
from fmoe.ops.core.axes import group_of
from fmoe.parallel import backends
from fmoe.parallel.placement import token_axes
from fmoe.parallel.together import check_alike
from fmoe.training import checkpoint, data, documents, gradients, metrics, optim, plot, schedules
from fmoe.training.tokenizer import BYTES, Tokenizer, load_tokenizer
from fmoe.transforms import per_layer

DTYPES = ["float32", "bfloat16", "float64"]
HELD_OUT_BATCHES = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="debug", help="model configuration")
    add("--layers", type=int, default=None, help="only so many, one of them dense")
    add("--dim", type=int, default=None, help="of a token, instead of the preset's")
    add("--vocab-size", type=int, default=None, help="instead of the preset's")
    add("--data", type=Path, nargs="+", default=[documents.python_stdlib()], help="files and folders")
    add("--suffix", default=".py", help="of the files in folders; a .jsonl file has a document a line")
    add("--field", default="text", help="of a JSONL line")
    add("--tokenizer", type=Path, default=None, help="a tokenizer.json; default: bytes")
    add("--steps", type=int, default=600)
    add("--batch-size", type=int, default=16, help="sequences a step")
    add("--micro-batches", type=int, default=1, help="parts a step's batch is computed in")
    add("--seq-len", type=int, default=128, help="tokens a sequence")
    add(
        "--schedule", choices=["cosine", "stable"], default="cosine", help="stable: decay over the last fifth"
    )
    add("--learning-rate", type=float, default=3e-3, help="peak, after warm-up")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to this global norm")
    add("--bias-rate", type=float, default=0.01, help="of balancing experts, a step; DeepSeek-V3 had 0.001")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mesh", default="", help='axes and sizes under torchrun, as "dp=2,ep=4"; experts lie along ep')
    add("--ep-backend", choices=backends.NAMES, default="auto", help="what carries tokens along ep")
    add("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients")
    add(
        "--compute-dtype", choices=DTYPES, default=None,
        help="of the model's arithmetic; default: bfloat16 on CUDA with float32 parameters, else --dtype",
    )  # fmt: skip
    add("--moments-dtype", choices=DTYPES, default=None, help="of the optimiser's moments; default: --dtype")
    add("--remat", default="none", help="none, full, default, or save:NAME,NAME: what layers recompute")
    add("--compile", action="store_true", help="compile each layer with torch.compile")
    add("--eval-every", type=int, default=0, help="steps between evaluations on held-out text; 0: none")
    add("--held-out", type=float, default=0.05, help="with --eval-every: share of the text not trained on")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0: none")
    add("--keep", type=int, default=2, help="how many checkpoints to keep")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--sample", default=None, metavar="PROMPT", help="print what the model makes of this in the end")
    add("--sample-tokens", type=int, default=300)
    add("--temperature", type=float, default=1.0, help="of --sample; 0: the likeliest token")
    add("--top-k", type=int, default=10, help="of --sample: only the likeliest so many tokens are drawn")
    add("--out", type=Path, default=None, help="folder of all that is left; default: runs/PRESET")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "seq_len", "micro_batches", "keep", "sample_tokens", "top_k"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if args.sample == "" or args.temperature < 0 or not args.max_norm > 0:
        raise SystemExit(
            "--sample needs a text, --temperature at least 0, --max-norm more than 0 (inf for none)"
        )
    if args.eval_every and not 0 < args.held_out < 1:
        raise SystemExit(
            f"--held-out: got {args.held_out}, expected a share between 0 and 1 with --eval-every"
        )
    args.out = args.out or Path("runs", args.preset)
    mixed = torch.device(args.device).type == "cuda" and args.dtype == "float32"
    args.compute_dtype = args.compute_dtype or ("bfloat16" if mixed else args.dtype)
    args.moments_dtype = args.moments_dtype or args.dtype
    return args


def join(args: argparse.Namespace) -> tuple[DeviceMesh | None, tuple[int, int]]:
    """The mesh, if there is a launcher or ``--mesh``, and which part of every batch is this device's."""
    if not (args.mesh or dist.is_torchelastic_launched()):
        return None, (0, 1)
    mesh = fmoe.make_mesh(args.mesh, device_type=torch.device(args.device).type)
    check_alike("train_deepseek_v3", {"options": {name: str(value) for name, value in vars(args).items()}})
    place = group_of(mesh, token_axes(mesh))
    return mesh, (place.position, place.size)


def read_data(args: argparse.Namespace, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """The stream to train on and, with ``--eval-every``, the one held out."""
    exclude = documents.EXCLUDED_FOLDERS if args.data == [documents.python_stdlib()] else ()
    texts = documents.read_documents(args.data, suffix=args.suffix, field=args.field, exclude=exclude)
    sides = documents.hold_out(texts, args.held_out if args.eval_every else 0.0)
    return [data.pack(side, tokenizer) for side in sides if side]


def schedule(args: argparse.Namespace) -> Callable[[int], float]:
    options = dict(peak=args.learning_rate, warmup_steps=max(1, args.steps // 20), total_steps=args.steps)
    if args.schedule == "cosine":
        return functools.partial(schedules.warmup_cosine, **options)
    return functools.partial(schedules.warmup_stable_decay, decay_steps=args.steps // 5, **options)


def start(args: argparse.Namespace, state: Any, run: Any) -> checkpoint.Loaded:
    """The state to begin with: with ``--resume`` that of the newest checkpoint."""
    if args.save_every:
        checkpoint.check_ranks("--save-every")  # now, not at the first checkpoint
    newest = checkpoint.latest(args.out)
    named = max(args.out.glob("step-" + "[0-9]" * 8), default=None)
    check_alike(
        "train_deepseek_v3", {"run": run, "checkpoints": [str(newest), str(named)]}
    )  # --out is shared
    if args.resume and named:
        if newest and newest != named:
            print(f"{named} is damaged; going on from {newest}")
        return checkpoint.load(newest or named, state, run=run, donate=True)
    if newest:
        raise SystemExit(f"{newest} is of an earlier run. Pass --resume, delete it, or choose another --out.")
    return checkpoint.Loaded(state, 0)


def say_what_moves_tokens(console: Console) -> None:
    """What the library logs, on the console."""
    handler = logging.Handler()
    handler.emit = lambda record: console.print(record.getMessage(), soft_wrap=True)  # type: ignore[method-assign]
    logger = logging.getLogger("fmoe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def draw(out: Path, records: list[dict[str, Any]], reference: dict[str, float]) -> str:
    """Pictures of the run, and where they are in words."""
    try:
        plot.save_figure(plot.plot_loss({out.name: records}, reference=reference), out / "loss.svg")
        plot.save_figure(plot.plot_load(records), out / "load.svg")
    except ImportError:
        return f"\nfor pictures: pip install -e '.[plots]' && python -m fmoe plot {out / 'metrics.jsonl'}"
    return f", {out / 'loss.svg'} and {out / 'load.svg'}"


@torch.no_grad()
def mean_loss(loss_of: Callable[..., Any], params: Any, batches: list[data.Batch]) -> float:
    losses = [loss_of(params, *(t.to(params.embedding.device) for t in batch))[0].item() for batch in batches]
    return sum(losses) / len(losses)


def main() -> None:
    args = parse()
    mesh, part = join(args)
    first_rank, devices = (mesh is None or mesh.get_rank() == 0), (1 if mesh is None else mesh.size())
    console = Console(quiet=not first_rank)
    say_what_moves_tokens(console)
    config, device = deepseek_v3.preset(args.preset, layers=args.layers), torch.device(args.device)
    config = dataclasses.replace(
        config, dim=args.dim or config.dim, vocab_size=args.vocab_size or config.vocab_size
    )
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else BYTES
    data.check_vocabulary(tokenizer, config.vocab_size)
    text, *held_out = read_data(args, tokenizer)
    entropy, unit = data.unigram_entropy(text), "token" if args.tokenizer else "byte"
    cut = dict(batch_size=args.batch_size, seq_len=args.seq_len, seed=args.seed)
    batches_of = functools.partial(data.batches, **cut, part=part)
    tests = [b for side in held_out for b in itertools.islice(batches_of(side), HELD_OUT_BATCHES)]
    run = {"model": dataclasses.asdict(config), "data": {**cut, "fingerprint": data.fingerprint(text)}}

    params = deepseek_v3.init(config, args.seed, dtype=getattr(torch, args.dtype), device=device, mesh=mesh)
    optimizer = optim.adamw(moments_dtype=getattr(torch, args.moments_dtype))
    state, first = start(args, {"params": params, "optimizer": optimizer.init(params)}, run)
    params, state = state["params"], state["optimizer"]
    total, active = deepseek_v3.num_params(config)
    console.print(
        f"{args.preset}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active; kept in {args.dtype}, "
        f"moments in {args.moments_dtype}, computing in {args.compute_dtype}; step {first}; "
        f"{len(text) / 1e6:.1f}M {unit}s of text, unigram entropy {entropy:.3f} nats a {unit}",
        soft_wrap=True,
    )

    low = functools.partial(gradients.computing_in, dtype=getattr(torch, args.compute_dtype))
    options = dict(
        config=config,
        mesh=mesh,
        backend=args.ep_backend,
        per_layer=per_layer(args.remat, compiled=args.compile),
    )
    loss_of = low(functools.partial(deepseek_v3.loss, **options))
    step_of = gradients.accumulate(fmoe.value_and_grad(loss_of, has_aux=True), args.micro_batches)
    rate, flops = schedule(args), deepseek_v3.flops_per_token(config, args.seq_len)
    path, start_time = args.out / "metrics.jsonl", time.perf_counter()
    if first_rank and not first and path.exists():
        others = (path.with_stem(f"metrics-{n}") for n in itertools.count(1))
        earlier = path.rename(next(other for other in others if not other.exists()))
        console.print(f"the metrics of an earlier run are {earlier} now", soft_wrap=True)
    # The first rank writes what all ranks know.
    file = metrics.MetricsFile(path, first_step=first) if first_rank else metrics.MetricsFile(os.devnull)
    with file, metrics.LiveView(args.steps, console=console) as view:
        for step, batch in zip(range(first, args.steps), batches_of(text, start_step=first)):
            began, last = time.perf_counter(), step + 1 == args.steps
            tokens, targets = (t.to(device) for t in batch)
            (loss, stats), grads = step_of(params, tokens, targets)
            norm = optim.global_norm(grads)
            scale = optim.clip_factor(norm, args.max_norm)
            params, state = optimizer.update(params, grads, state, rate(step), scale=scale, donate=True)
            params = deepseek_v3.update_biases(params, stats, args.bias_rate)

            loss, norm = loss.item(), norm.item()
            gradients.check_finite(step, loss, norm, grads)
            del grads  # before the next step's are made
            speed = args.batch_size * args.seq_len / (time.perf_counter() - began)
            counts = [s.tokens_per_expert.tolist() for s in stats]
            now = metrics.Step(
                step, loss, norm, rate(step), speed, counts, **metrics.speed(flops * speed / devices, device)
            )
            if tests and (last or (step + 1) % args.eval_every == 0):
                now = now._replace(held_out_loss=mean_loss(loss_of, params, tests))
                console.print(f"step {step + 1}: loss on held-out text {now.held_out_loss:.3f}")
            file.write(now)
            view.update(now)
            if args.save_every and (last or (step + 1) % args.save_every == 0):
                gradients.check_params(step, params)
                saved = {"params": params, "optimizer": state}
                checkpoint.save(args.out, step + 1, saved, run=run, keep=args.keep)

    seconds = time.perf_counter() - start_time
    if first_rank:
        records = metrics.read_metrics(path)
        pictures = draw(args.out, records, {"unigram entropy": entropy})
        ends = [record["loss"] for record in records[-20:]]
        where = f"{device}" if mesh is None else f"{devices} devices ({args.mesh})"
        console.print(
            f"final loss {sum(ends) / len(ends):.3f} nats a {unit} (mean of the last {len(ends)} steps), "
            f"unigram entropy {entropy:.3f}\n{seconds:.0f} s, "
            f"{(args.steps - first) * args.batch_size * args.seq_len / seconds:,.0f} tokens/s on {where}; "
            f"see {path}{pictures}",
            soft_wrap=True,
            markup=False,
        )
    if args.sample is not None:
        prompt = torch.tensor([[*tokenizer.encode(args.sample.encode())]], device=device)
        choice = dict(temperature=args.temperature, top_k=args.top_k, window=args.seq_len)
        written = low(functools.partial(sample, mesh=mesh))(
            params, prompt, config, num_tokens=args.sample_tokens, seed_or_generator=args.seed, **choice
        )
        console.print(tokenizer.decode(written[0].tolist()), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    record(main)()
    if dist.is_initialized():
        dist.destroy_process_group()
