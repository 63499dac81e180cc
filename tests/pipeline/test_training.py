"""Pipelines that train: the same losses, gradients and parameters as one process, for every schedule."""

import dataclasses
import gc
import time
import weakref
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from helpers import change, error, fresh_seed, quick
from laws import ranks_of, whole
from parity import TINY
from workers import Pool, RankError

import fmoe
from fmoe import random
from fmoe.models import decoder, huggingface
from fmoe.models.sampling import sample
from fmoe.models.stages import Stages, cut
from fmoe.ops.core.axes import group_of
from fmoe.parallel.placement import token_axes
from fmoe.pipeline import in_flight, make_schedule
from fmoe.pipeline.orders import KINDS
from fmoe.training import checkpoint, gradients, optim, pipelined
from fmoe.transforms import per_layer
from fmoe.tree import dotted_names

CONFIG = change(TINY, num_layers=9, vocab_size=32, q_lora_rank=8, kv_lora_rank=8)
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


def mesh_of(axes: str, device: str = "cpu") -> Any:
    """Also makes new tensors lie on its device."""
    torch.set_default_device(device)
    return bare_mesh(axes if "," in axes else f"{axes},dp=1", device)


def fitting(config: Any, mesh: Any) -> Any:
    """As many layers as there can be stages on the mesh, and one more."""
    return dataclasses.replace(config, num_layers=2 * mesh["pp"].size() + 1)


def batch(seed: int, segments: bool = False) -> list[torch.Tensor]:
    """Of which the first rows count nearly all targets, and the last nearly none."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
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
    drawn = torch.Generator("cpu").manual_seed(1)
    costs = torch.rand(config.num_layers + 2, generator=drawn, device="cpu").tolist()
    return cut(config, made.stage_to_rank, costs=costs if uneven else None)


def compared(axes: str, schedule: str, names: list[str], device: str = "cpu") -> dict[str, float]:
    """The largest errors of losses and gradients against one process, by variant."""
    mesh, found = mesh_of(axes, device), {}
    for name in names:
        config, how = VARIANTS[name]
        config = fitting(config, mesh)
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


QUICK = [("pp=2", "zero_bubble"), ("pp=2,ep=2", "interleaved")]
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


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("schedule", KINDS)
def test_pipelines_of_eight_processes_equal_one(schedule: str) -> None:
    eight = Pool(8)
    try:
        names = ["zero 3", "zero 1, tied", "uneven layers, default remat"]
        for found in eight.run(8, compared, "pp=2,dp=2,ep=2", schedule, names, timeout=300):
            assert max(found.values()) < 1e-9, found
    finally:
        eight.stop(5)


def trained(
    axes: str, schedule: str, steps: int, config: Any = None, device: str = "cpu", rate: float = 1e-2
) -> float:
    """Steps with everything a training loop does."""
    mesh, seed = mesh_of(axes, device), fresh_seed()
    config = config or fitting(TIED, mesh)
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
        params, state = optimizer.update(params, grads, states[0], rate, scale=scale, donate=True)
        alone, their_state = optimizer.update(alone, want_grads, states[1], rate, scale=scale)
        states = state, their_state
        params = decoder.update_biases(params, stats, 0.01)
        alone = decoder.update_biases(alone, want_stats, 0.01)
    mine, theirs = gathered(params, mesh), by_name(alone)
    return max(worst, *(error(mine[name], theirs[name]) for name in theirs))


@pytest.mark.parametrize("schedule", quick(["zbv"], KINDS))
@pytest.mark.parametrize("axes", quick(["pp=2"], ["pp=2", "pp=2,ep=2"]))
def test_ten_steps_equal_those_of_one_process(pool: Any, axes: str, schedule: str) -> None:
    assert max(pool.run(ranks_of(axes), trained, axes, schedule, 10)) < 1e-8


ON_GPUS = [("pp=2", "zero_bubble"), ("pp=2", "zbv"), ("pp=4", "1f1b"), ("pp=2,ep=2", "interleaved")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="ranks that send over NCCL")
@pytest.mark.parametrize(("axes", "schedule"), ON_GPUS)
def test_on_gpus_fifty_steps_equal_those_of_one_process(pool: Any, axes: str, schedule: str) -> None:
    ranks, debug, names = ranks_of(axes), decoder.preset("debug"), ["zero 3", "zero 1, tied", "remat, tied"]
    for found in pool.run(ranks, compared, axes, schedule, names, "cuda", timeout=240):
        assert max(found.values()) < 1e-9, found
    # At ten times this rate roundings grow from 1e-13 to 1e-6, on a CPU too.
    assert max(pool.run(ranks, trained, axes, schedule, 50, debug, "cuda", 1e-3, timeout=240)) < 1e-9


def poisoned(device: str) -> tuple[int, float]:
    """Whatever memory of a sent tensor is given back is filled with NaN at once."""
    filled = []

    def poison(shape: torch.Size, dtype: torch.dtype) -> None:
        filled.append(torch.full(shape, float("nan"), dtype=dtype, device=device))

    def begin(operations: list[dist.P2POp]) -> Any:
        works = send(operations)
        for operation in operations:
            if operation.op is dist.isend:
                tensor = operation.tensor
                weakref.finalize(tensor, poison, tensor.shape, tensor.dtype)
        if device == "cuda":
            torch.cuda._sleep(1_000_000)  # the next receive begins late
        return works

    send = dist.batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", begin)
        worst = max(compared("pp=2", "1f1b", ["zero 3"], device).values())
        gc.collect()
    return len(filled), worst


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_memory_is_not_used_again_while_it_is_sent(pool: Any, device: str) -> None:
    for number, worst in pool.run(2, poisoned, device):
        assert number and worst < 1e-9


def peaks(pp: int, schedule: str) -> int:
    mesh, found = mesh_of(f"pp={pp}"), []
    made = make_schedule(schedule, pp=pp, micro_batches=8)
    config = fitting(CONFIG, mesh)
    stages = cut(config, made.stage_to_rank)
    with pytest.MonkeyPatch.context() as patch:
        run = pipelined.run
        patch.setattr(pipelined, "run", lambda *a, **k: found.append(run(*a, **k)) or found[-1])
        step_of = gradients.of_model(config, mesh, micro_batches=8, schedule=made)
        step_of(decoder.init(config, 0, mesh=mesh, stages=stages), *batch(0))
    return found[0].peak


@pytest.mark.parametrize("schedule", quick(["1f1b"], KINDS))
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


def failing(kind: str) -> str:
    """What each rank is told when a layer of one raises in a forward, or in a backward."""
    mesh = mesh_of("pp=2")
    calls = 0

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            raise OverflowError("a failing backward")

    def wrap(layer: Any) -> Any:
        def call(params: Any, x: torch.Tensor, *rest: Any) -> Any:
            nonlocal calls
            calls += 1
            if mesh.get_local_rank("pp") == 1 and calls == 6:  # the stage's second layer, third micro-batch
                if kind == "forward":
                    raise OverflowError("a failing layer")
                x = Fails.apply(x)
            return layer(params, x, *rest)

        return call

    config = dataclasses.replace(CONFIG, num_layers=4)
    step_of = gradients.of_model(config, mesh, micro_batches=4, per_layer=wrap)
    params = decoder.init(config, 0, mesh=mesh)
    try:
        step_of(params, *batch(0))
    except OverflowError as error:
        note = "; ".join(error.__notes__)
        raise RuntimeError(f"{error} ({note})") from error
    return "ended"


@pytest.mark.parametrize("kind", quick(["backward"], ["forward", "backward"]))
def test_an_error_of_one_rank_ends_the_others_and_names_stage_and_micro_batch(pool: Any, kind: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(2, failing, kind)
    assert time.monotonic() - began < 30
    action = {"forward": "1F2", "backward": "1B2"}[kind]
    assert f"rank 1 along pp, stage 1, micro-batch 2, at {action}" in str(caught.value)


def captured() -> str:
    mesh = mesh_of("pp=2")
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def wrap(layer: Any) -> Any:
        return lambda params, x, *rest: layer(params, x * factor, *rest)

    config = fitting(CONFIG, mesh)
    step_of = gradients.of_model(config, mesh, micro_batches=4, per_layer=wrap)
    params = decoder.init(config, 0, dtype=torch.float64, mesh=mesh)
    if mesh.get_local_rank("pp") == 0:  # the other would wait
        with pytest.raises(ValueError, match="shard_map: ") as caught:
            step_of(params, *batch(0))
        return str(caught.value)
    return ""


def test_a_captured_tensor_would_get_no_gradient(pool: Any) -> None:
    assert "shard_map" in pool.run(2, captured)[0]


def refused() -> list[str]:
    mesh, found = mesh_of("pp=2"), []
    params = decoder.init(CONFIG, 0, mesh=mesh)
    tokens, targets = batch(0)
    two = Stages(((0, 4), (4, 9)), (0, 1))
    many = make_schedule("interleaved", pp=2, micro_batches=4)
    four = make_schedule("1f1b", pp=4, micro_batches=4)
    spread = fmoe.parallel.distribute(tokens, fmoe.P(), mesh["dp",])
    other = decoder.init(CONFIG, 0, mesh=mesh, stages=Stages(((0, 2), (2, 9)), (0, 1)))
    step_of = gradients.of_model(CONFIG, mesh, micro_batches=4)
    cases: list[Any] = [
        lambda: decoder.loss(params, tokens, targets, CONFIG, mesh),
        lambda: decoder.forward(params, tokens, CONFIG, mesh),
        lambda: sample(params, tokens, CONFIG, num_tokens=1, key=random.key(0), mesh=mesh),
        lambda: huggingface.save("nowhere", CONFIG, params),
        lambda: gradients.of_model(CONFIG, mesh, micro_batches=3, schedule=many),
        lambda: gradients.of_model(CONFIG, mesh, micro_batches=4, schedule=four),
        lambda: gradients.of_model(CONFIG, mesh, micro_batches=4, schedule=many, stages=two),
        lambda: gradients.of_model(CONFIG, mesh, micro_batches=4, stages=Stages(((0, 4), (5, 9)), (0, 1))),
        lambda: gradients.of_model(CONFIG, mesh, micro_batches=4, schedule="2f2b"),
        lambda: step_of(other, tokens, targets),
        lambda: step_of(params, spread, targets),
        lambda: step_of(params, tokens[:, :3], targets),
        lambda: decoder.init(CONFIG, 0, mesh=mesh, stages=Stages(((0, 9),), (0,))),
        lambda: decoder.init(CONFIG, 0, mesh=bare_mesh("pp=2")),
        lambda: cut(CONFIG, range(10)),
        lambda: cut(CONFIG, range(2), costs=[1.0]),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=": got ") as caught:
            case()
        found.append(str(caught.value))
    try:
        step_of(params, tokens + CONFIG.vocab_size, targets)
    except RuntimeError as error:
        found.append(str(error))
    return found


REFUSED = [
    "loss: mesh: got (pp=2, dp=1), expected pp=1. Use fmoe.training.gradients.of_model, or loss_of_model",
    "forward: mesh: got (pp=2, dp=1), expected pp=1.",
    "sample: mesh: got (pp=2, dp=1), expected pp=1. Load a checkpoint of it on a mesh without pp",
    "huggingface.save: params: got a part of a model, as a rank along pp holds, expected a whole one. Load a",
    "of_model: schedule: got one of 2 ranks and 4 micro-batches, expected 2 ranks, as (pp=2, dp=1) has, and",
    "of_model: schedule: got one of 4 ranks and 4 micro-batches, expected 2 ranks",
    "of_model: stages.ranks: got (0, 1), expected (0, 1, 0, 1), as the schedule has. Cut the model for it.",
    "of_model: stages: got Stages(layers=((0, 4), (5, 9)), ranks=(0, 1)), expected each of 9 layers once",
    "make_schedule: name: got '2f2b', expected one of",
    "of_model: params: got a tree that has ",
    "of_model: tokens: got a DTensor, expected a plain tensor, this device's own sequences",
    "of_model: targets: got targets of shape (16, 6), expected (16, 3), as tokens",
    "init: stages.ranks: got (0,), expected stages on each of 2 ranks along pp, as (pp=2, dp=1) has",
    "init: mesh: got (pp=2), expected another axis. Use fmoe.make_mesh, whose meshes have all axes.",
    "cut: ranks: got 10 stages, expected 1 to 9, the number of layers",
    "cut: costs: got [1.0], expected 11 of at least 0: of the embedding, 9 layers, and the head",
    "vocabulary: tokens, targets: got an id outside of it, on this device or another",
]


def test_what_does_not_fit_is_refused_on_every_rank(pool: Any) -> None:
    for found in pool.run(2, refused):
        for text, expected in zip(found, REFUSED, strict=True):
            assert text.startswith(expected)


def norms_and_names() -> tuple[float, list[str]]:
    mesh = mesh_of("pp=2")
    params = decoder.init(TIED, 0, mesh=mesh)
    bad = optree.tree_map(torch.clone, params)
    for name, leaf in zip(dotted_names(bad), optree.tree_leaves(bad)):
        if name in ("layers.1.mlp.router.weight_ED", "layers.8.attention.out"):
            leaf.to_local()[-1, -1] = float("nan")
    found = []
    for check in (
        lambda: gradients.check_params(3, bad, mesh),
        lambda: gradients.check_finite(3, 1.0, float("nan"), bad, mesh),
    ):
        with pytest.raises(FloatingPointError) as caught:
            check()
        found.append(str(caught.value))
    gradients.check_params(3, params, mesh)
    return optim.global_norm({"a": params}, mesh).item(), found


def test_norms_and_numbers_that_are_not_finite_are_those_of_all_ranks(pool: Any) -> None:
    whole_norm = optim.global_norm(decoder.init(TIED, 0)).item()
    number = len(optree.tree_leaves(decoder.init(TIED, 0)))
    found = pool.run(2, norms_and_names)
    assert len({norm for norm, _ in found}) == 1, "the same bits"
    for norm, texts in found:
        assert norm == pytest.approx(whole_norm, rel=1e-6)
        for text in texts:
            assert f"2 of {number} tensors: layers.8.attention.out, layers.1.mlp.router.weight_ED" in text
