"""How many collectives a training step of a small model takes, those for tokens excluded.

    torchrun --nproc-per-node 2 benchmarks/collectives.py ep=2 dp=2 tp=2
    torchrun --nproc-per-node 4 benchmarks/collectives.py dp=2,ep=2

A step is the gradient, its norm, the update and that of the selection biases. PyTorch's profiler counts.
"""

import sys

import torch
import torch.distributed as dist

import fmoe
from fmoe.models import decoder
from fmoe.training import gradients, optim


def count(axes: str, remat: str) -> int:
    mesh, config = fmoe.make_mesh(axes, device_type="cpu"), decoder.preset("debug", layers=3)
    params, optimizer = decoder.init(config, 0, mesh=mesh), optim.adamw()
    state, tokens = optimizer.init(params), torch.randint(config.vocab_size, (2, 16))
    step_of = gradients.of_model(config, mesh, per_layer=fmoe.transforms.per_layer(remat))

    def step() -> None:
        (_, stats), grads = step_of(params, tokens, tokens)
        scale = optim.clip_factor(optim.global_norm(grads), 1.0)
        new, _ = optimizer.update(params, grads, state, 1e-3, scale=scale)
        decoder.update_biases(new, stats, 1e-3)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = [event.name for event in profile.events()]
    return sum(name.startswith("c10d::") and "alltoall" not in name for name in names)


if __name__ == "__main__":
    kinds = ("none", "default", "full")
    rows = [(axes, *(count(axes, remat) for remat in kinds)) for axes in sys.argv[1:]]
    if dist.get_rank() == 0:
        print("| mesh |", " | ".join(f"remat {kind}" for kind in kinds), "|\n|---|---|---|---|")
        for axes, *found in rows:
            print(f"| `{axes}` | " + " | ".join(map(str, found)) + " |")
    dist.destroy_process_group()
