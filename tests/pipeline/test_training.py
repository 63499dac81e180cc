"""Pipelines that train: the same losses, gradients and parameters as one process, for every schedule."""

import dataclasses
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh, sizes_of
from helpers import change, error, fresh_seed, quick
from laws import whole
from parity import TINY

import fmoe
from fmoe.models import decoder
from fmoe.models.stages import Stages, cut
from fmoe.ops.core.axes import group_of
from fmoe.parallel.placement import token_axes
from fmoe.pipeline import in_flight, make_schedule
from fmoe.pipeline.orders import KINDS
from fmoe.training import checkpoint, gradients, optim, pipelined
from fmoe.transforms import per_layer
from fmoe.tree import dotted_names

CONFIG = change(TINY, num_layers=9, vocab_size=32, q_lora_rank=6, kv_lora_rank=8)
TIED = dataclasses.replace(CONFIG, tied_head=True)
ROWS, LENGTH = 16, 6

# Of the model, and of the step.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zero 3": (CONFIG, {}),
    "zero 1, tied": (TIED, dict(zero=1)),
    "zero 2, a balance loss": (dataclasses.replace(CONFIG, balance_loss=0.3), dict(zero=2)),
    "remat, tied": (TIED, dict(per_layer=per_layer("full"))),
    "micro-batches of unequal rows, zero 1": (CONFIG, dict(micro_batches=5, zero=1)),
    "a micro-batch of no rows": (CONFIG, dict(micro_batches=9)),
    "uneven layers, default remat": (CONFIG, dict(uneven=True, per_layer=per_layer("default"))),
    "segments and padding": (CONFIG, dict(segments=True)),
}


def ranks_of(axes: str) -> int:
    found = 1
    for size in sizes_of(axes).values():
        found *= size
    return found


def mesh_of(axes: str) -> Any:
    return bare_mesh(axes if "," in axes else f"{axes},dp=1")


def batch(seed: int, segments: bool = False) -> list[torch.Tensor]:
    """Of which the first rows count nearly all targets, and the last nearly none."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, ROWS, LENGTH), generator=g)
    drop = torch.rand(ROWS, LENGTH, generator=g) < torch.linspace(0, 0.95, ROWS)[:, None]
    ids = torch.randint(3, (ROWS, LENGTH), generator=g)
    return [tokens, targets.masked_fill(drop, -100), *[ids] * segments]


def own(data: list[torch.Tensor], mesh: Any) -> list[torch.Tensor]:
    part = group_of(mesh, token_axes(mesh))
    return [tensor.chunk(part.size)[part.position] for tensor in data]


def one_process(config: Any, params: Any, data: list[torch.Tensor]) -> Any:
    def loss(params: Any, tokens: Any, targets: Any, *ids: Any) -> Any:
        return decoder.loss(params, tokens, targets, config, segment_ids=ids[0] if ids else None)

    return fmoe.value_and_grad(loss, has_aux=True)(params, *data)


def by_name(tree: Any) -> dict[str, torch.Tensor]:
    return dict(zip(dotted_names(tree), optree.tree_leaves(whole(tree))))


def gathered(tree: Any, mesh: Any) -> dict[str, torch.Tensor]:
    """Whole tensors by name, of what all ranks along ``pp`` hold; copies must have the same bits."""
    found: list[Any] = [None] * mesh["pp"].size()
    dist.all_gather_object(found, by_name(tree), group=mesh.get_group("pp"))
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in (item for of_rank in found for item in of_rank.items()):
        assert name not in merged or torch.equal(merged[name], tensor), name
        merged[name] = tensor
    return merged


def stages_for(mesh: Any, schedule: str, config: Any, micro_batches: int, uneven: bool = False) -> Stages:
    made = make_schedule(schedule, pp=mesh["pp"].size(), micro_batches=micro_batches)
    costs = torch.rand(config.num_layers + 2, generator=torch.Generator().manual_seed(1)).tolist()
    return cut(config, made.stage_to_rank, costs=costs if uneven else None)


def compared(axes: str, schedule: str, names: list[str]) -> dict[str, float]:
    """The largest errors of losses and gradients against one process, by variant."""
    mesh, found = mesh_of(axes), {}
    for name in names:
        config, how = VARIANTS[name]
        how = {"micro_batches": 4, **how}
        segments, uneven = how.pop("segments", False), how.pop("uneven", False)
        stages = stages_for(mesh, schedule, config, how["micro_batches"], uneven)
        seed = fresh_seed()
        data = batch(seed, segments)
        step_of = gradients.of_model(config, mesh, schedule=schedule, stages=stages, **how)
        params = decoder.init(config, seed, dtype=torch.float64, mesh=mesh, stages=stages)
        (loss, stats), grads = step_of(params, *own(data, mesh))
        alone = decoder.init(config, seed, dtype=torch.float64)
        (want, want_stats), want_grads = one_process(config, alone, data)
        mine, theirs = gathered(grads, mesh), by_name(want_grads)
        assert mine.keys() == theirs.keys()
        assert torch.equal(stats.num_targets, want_stats.num_targets)
        for here, there in zip(stats.layers, want_stats.layers, strict=True):
            assert torch.equal(here.tokens_per_expert, there.tokens_per_expert)
            assert error(here, there) < 1e-5  # float32
        norm = optim.global_norm(grads, mesh)
        assert error(norm, optim.global_norm(want_grads)) < 1e-6
        errors = [error(mine[leaf], theirs[leaf]) for leaf in theirs]
        found[name] = max(error(loss, want), error(stats.balance, want_stats.balance), *errors)
        evaluate = gradients.loss_of_model(
            config, mesh, micro_batches=how["micro_batches"], schedule=schedule, stages=stages
        )
        held_out, its_stats = evaluate(params, *own(data, mesh))
        assert torch.equal(its_stats.num_targets, stats.num_targets)
        found[f"{name}, evaluated"] = error(held_out, want)
    return found


QUICK = [("pp=2", "1f1b"), ("pp=2", "interleaved"), ("pp=2,ep=2", "1f1b"), ("pp=2,ep=2", "interleaved")]
MESHES = ["pp=2", "pp=4", "pp=2,ep=2", "pp=2,dp=2", "pp=2,tp=2"]


@pytest.mark.parametrize(
    ("axes", "schedule"), quick(QUICK, [(axes, schedule) for axes in MESHES for schedule in KINDS])
)
def test_losses_and_gradients_equal_those_of_one_process(
    pool: Any, axes: str, schedule: str, slow: bool
) -> None:
    names = [*VARIANTS] if slow else [*VARIANTS][:: 1 if axes == "pp=2" else 2]
    for found in pool.run(ranks_of(axes), compared, axes, schedule, names):
        assert max(found.values()) < 1e-9, found


def trained(axes: str, schedule: str, steps: int) -> float:
    """Ten steps with everything a training loop does."""
    mesh, seed, config = mesh_of(axes), fresh_seed(), TIED
    stages = stages_for(mesh, schedule, config, 4)
    step_of = gradients.of_model(config, mesh, micro_batches=4, schedule=schedule, stages=stages)
    optimizer = optim.adamw()
    params = decoder.init(config, seed, dtype=torch.float64, mesh=mesh, stages=stages)
    alone = decoder.init(config, seed, dtype=torch.float64)
    states = optimizer.init(params), optimizer.init(alone)
    worst = 0.0
    for step in range(steps):
        data = batch(seed + step)
        (loss, stats), grads = step_of(params, *own(data, mesh))
        (want, want_stats), want_grads = one_process(config, alone, data)
        worst = max(worst, error(loss, want))
        scale = optim.clip_factor(optim.global_norm(want_grads), 1.0)  # of float32: the same for both
        assert error(optim.clip_factor(optim.global_norm(grads, mesh), 1.0), scale) < 1e-6
        params, state = optimizer.update(params, grads, states[0], 1e-2, scale=scale, donate=True)
        alone, their_state = optimizer.update(alone, want_grads, states[1], 1e-2, scale=scale)
        states = state, their_state
        params = decoder.update_biases(params, stats, 0.01)
        alone = decoder.update_biases(alone, want_stats, 0.01)
    mine, theirs = gathered(params, mesh), by_name(alone)
    return max(worst, *(error(mine[name], theirs[name]) for name in theirs))


@pytest.mark.parametrize("schedule", quick(["zbv"], KINDS))
@pytest.mark.parametrize("axes", quick(["pp=2"], ["pp=2", "pp=2,ep=2"]))
def test_ten_steps_equal_those_of_one_process(pool: Any, axes: str, schedule: str) -> None:
    assert max(pool.run(ranks_of(axes), trained, axes, schedule, 10)) < 1e-8


def peaks(pp: int, schedule: str) -> int:
    mesh, found = mesh_of(f"pp={pp}"), []
    made = make_schedule(schedule, pp=pp, micro_batches=8)
    stages = cut(CONFIG, made.stage_to_rank)
    with pytest.MonkeyPatch.context() as patch:
        run = pipelined.run
        patch.setattr(pipelined, "run", lambda *a, **k: found.append(run(*a, **k)) or found[-1])
        step_of = gradients.of_model(CONFIG, mesh, micro_batches=8, schedule=made)
        step_of(decoder.init(CONFIG, 0, mesh=mesh, stages=stages), *batch(0))
    return found[0].peak


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("pp", quick([2], [2, 4]))
def test_residuals_are_held_for_as_many_forwards_as_the_schedule_says(
    pool: Any, pp: int, schedule: str
) -> None:
    expected = in_flight(make_schedule(schedule, pp=pp, micro_batches=8)).until_weight
    assert tuple(pool.run(pp, peaks, pp, schedule)) == expected


OPTIMIZER = optim.adamw()


def state_on(axes: str, schedule: str, seed: int) -> tuple[Any, Stages, Any]:
    mesh = mesh_of(axes)
    stages = stages_for(mesh, schedule, TIED, 4)
    params = decoder.init(TIED, seed, dtype=torch.float64, mesh=mesh, stages=stages)
    return mesh, stages, {"params": params, "optimizer": OPTIMIZER.init(params)}


def alone_state(seed: int) -> Any:
    params = decoder.init(TIED, seed, dtype=torch.float64)
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def three_steps(axes: str, schedule: str, seed: int, first: int, folder: Path) -> list[float]:
    """On a mesh, from a checkpoint if there is one, with one in the end."""
    mesh, stages, state = state_on(axes, schedule, seed if first == 0 else seed + 1)
    if first:
        state, step = checkpoint.load(checkpoint.latest(folder), state, mesh=mesh, donate=True)
        assert step == first
    step_of = gradients.of_model(TIED, mesh, micro_batches=4, schedule=schedule, stages=stages)
    params, optimizer, losses = state["params"], state["optimizer"], []
    for step in range(first, first + 3):
        (loss, stats), grads = step_of(params, *own(batch(seed + step), mesh))
        params, optimizer = OPTIMIZER.update(params, grads, optimizer, 1e-2)
        params = decoder.update_biases(params, stats, 0.01)
        losses.append(loss.item())
    checkpoint.save(folder, first + 3, {"params": params, "optimizer": optimizer}, mesh=mesh)
    return losses


def three_steps_alone(state: Any, seed: int, first: int) -> tuple[Any, list[float]]:
    params, optimizer, losses = state["params"], state["optimizer"], []
    for step in range(first, first + 3):
        (loss, stats), grads = one_process(TIED, params, batch(seed + step))
        params, optimizer = OPTIMIZER.update(params, grads, optimizer, 1e-2)
        params = decoder.update_biases(params, stats, 0.01)
        losses.append(loss.item())
    return {"params": params, "optimizer": optimizer}, losses


TO = [("pp=2", "interleaved"), ("pp=4", "zbv"), ("pp=2,ep=2", "1f1b")]


@pytest.mark.parametrize(("axes", "schedule"), quick(TO[:1], TO))
def test_a_run_goes_on_from_a_pipeline_to_one_process_and_back(
    pool: Any, tmp_path: Path, axes: str, schedule: str
) -> None:
    """Three steps on two ranks, three on one, three on a mesh again: as nine on one."""
    seed, ranks = fresh_seed(), ranks_of(axes)
    expected = []
    state = alone_state(seed)
    for first in (0, 3, 6):
        state, losses = three_steps_alone(state, seed, first)
        expected += losses
    found = pool.run(2, three_steps, "pp=2", "1f1b", seed, 0, tmp_path)
    loaded = checkpoint.load(checkpoint.latest(tmp_path), alone_state(seed + 1))
    assert loaded.step == 3
    went_on, middle = three_steps_alone(loaded.state, seed, 3)
    checkpoint.save(tmp_path, 6, went_on)
    back = pool.run(ranks, three_steps, axes, schedule, seed, 6, tmp_path)
    for of_rank in back:
        assert found[0] + middle + of_rank == pytest.approx(expected, abs=1e-9, rel=0)
    final = checkpoint.load(checkpoint.latest(tmp_path), alone_state(seed + 1)).state
    assert error(final["params"], state["params"]) < 1e-8


def saved_without_its_mesh(folder: Path) -> str:
    _, _, state = state_on("pp=2", "1f1b", 0)
    with pytest.raises(ValueError, match="save: ") as caught:
        checkpoint.save(folder, 1, state)
    return str(caught.value)


def test_a_part_of_a_model_is_no_checkpoint(pool: Any, tmp_path: Path) -> None:
    for text in pool.run(2, saved_without_its_mesh, tmp_path):
        assert "save: step, run, state: got on rank 1, beside rank 0: state is" in text
    assert not [*tmp_path.iterdir()]
