"""Checkpoints from one mesh to another: the same bits, the same continuation, and errors all ranks see."""

import fcntl
import random

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from devices import bare_mesh
from helpers import change, fresh_seed
from parity import TINY
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fmoe
from fmoe.models import deepseek_v3
from fmoe.parallel.placement import token_axes
from fmoe.parallel.spec import local_piece, spec_of
from fmoe.training import checkpoint
from fmoe.training.optim import adamw
from fmoe.tree import dotted_names

CONFIG = change(TINY, kv_lora_rank=8)
OPTIMIZER = adamw()
MESHES = ["ep=4", "dp=2,ep=2", "tp=2,ep=2"]
ROWS, LENGTH, STEPS = 4, 12, 2


def initial(seed, mesh=None):
    params = deepseek_v3.init(CONFIG, seed, dtype=torch.float64, mesh=mesh)
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def batch(step, seed, mesh):
    """This rank's rows of a step's batch, which is the same on every mesh."""
    tokens = torch.randint(
        CONFIG.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed + step)
    )
    if mesh is not None:
        tokens = tokens[local_piece(fmoe.P(token_axes(mesh)), tokens.shape, mesh)]
    return tokens[:, :-1], tokens[:, 1:]


def train(state, first, seed, mesh=None):
    params, optimizer = state["params"], state["optimizer"]
    losses = []
    for step in range(first, first + STEPS):
        (loss, stats), grads = fmoe.value_and_grad(deepseek_v3.loss, has_aux=True)(
            params, *batch(step, seed, mesh), CONFIG, mesh
        )
        params, optimizer = OPTIMIZER.update(params, grads, optimizer, 0.01)
        params = deepseek_v3.update_biases(params, stats, 0.01)
        losses.append(loss.item())
    return {"params": params, "optimizer": optimizer}, losses


def held(state):
    """What this rank has of every leaf: which part, and its values."""
    found = {}
    for name, leaf in zip(dotted_names(state), optree.tree_leaves(state)):
        if isinstance(leaf, DTensor):
            piece = local_piece(spec_of(leaf), leaf.shape, leaf.device_mesh)
            found[name] = [(part.start, part.stop) for part in piece], leaf.to_local()
        else:
            found[name] = [], leaf
    return found


def start(folder, seed):
    mesh = fmoe.make_mesh("ep=4", device_type="cpu")
    state, losses = train(initial(seed, mesh), 0, seed, mesh)
    checkpoint.save(folder, STEPS, state)
    saved = held(state)
    state, more = train(state, STEPS, seed, mesh)
    return saved, losses + more, held(state)


def resume(path, seed, axes, donate):
    """Load on this mesh, or on one of these ranks alone, and go on."""
    mesh = fmoe.make_mesh(axes, device_type="cpu")
    like = initial(seed + 1, mesh)
    state, step = checkpoint.load(path, like, donate=donate)
    assert step == STEPS
    loaded = held(state)
    state, losses = train(state, step, seed, mesh)
    return loaded, losses, held(state)


def difference(whole, ranks):
    """The largest difference between what all ranks hold and the same of a whole state."""
    whole = dict(zip(dotted_names(whole), optree.tree_leaves(whole)))
    for found in ranks:
        assert found.keys() == whole.keys()
    return max(
        (values.double() - whole[name][tuple(slice(*part) for part in piece)].double()).abs().max().item()
        for found in ranks
        for name, (piece, values) in found.items()
        if values.numel()
    )


def test_training_goes_on_the_same_on_every_mesh(pool, tmp_path, slow):
    seed = fresh_seed()
    saved, losses, ended = zip(*pool.run(4, start, tmp_path, seed))
    path = checkpoint.latest(tmp_path)
    assert saved[1]["params.layers.1.mlp.experts.w_in"][0][0] == (2, 4), "two of eight experts"

    alone = checkpoint.load(path, initial(seed + 1)).state
    assert difference(alone, saved) == 0
    final, continued = train(alone, STEPS, seed)
    from_scratch = train(initial(seed), 0, seed)[1]
    assert losses[0] == pytest.approx(from_scratch + continued, abs=1e-9, rel=0)
    assert all(of_rank == losses[0] for of_rank in losses)
    assert len(set(losses[0])) == 2 * STEPS
    assert difference(final, ended) < 1e-9
    assert difference(initial(seed), ended) > 1e-4

    for axes in MESHES if slow else MESHES[2:]:
        loaded, found, ended = zip(*pool.run(4, resume, path, seed, axes, axes == "tp=2,ep=2"))
        assert difference(alone, loaded) == 0, axes
        assert found[0] == pytest.approx(continued, abs=1e-9, rel=0), axes
        assert difference(final, ended) < 1e-9, axes

    path = checkpoint.save(tmp_path / "alone", STEPS, alone)
    assert difference(alone, [loaded for loaded, *_ in pool.run(4, resume, path, seed, "ep=4", False)]) == 0


# ---- any tensors, any placements -----------------------------------------------------------------------


def globally(seed):
    """Tensors of odd sizes and dtypes, which don't divide by anything."""
    make = torch.Generator().manual_seed(seed)
    shapes = torch.randint(0, 8, (6, 3), generator=make).tolist()
    dtypes = [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.float32]
    return {
        str(i): torch.randn(shape[i % 4 :], generator=make).mul(3).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes))
    }


def somewhere(whole, mesh, rng):
    """Each tensor plain, or placed anyhow."""

    def place(tensor):
        if rng.random() < 0.2:
            return tensor.clone()
        choices = [Replicate(), *map(Shard, range(tensor.dim()))]
        return distribute_tensor(tensor, mesh, rng.choices(choices, k=mesh.ndim), src_data_rank=None)

    return {name: place(tensor) for name, tensor in whole.items()}


def moved_about(folder, seed):
    whole = globally(seed)
    rng = random.Random(seed)
    meshes = [bare_mesh(axes) for axes in ("dp=2,ep=2", "ep=4", "dp=2,tp=2")]
    for step in range(8):
        path = checkpoint.save(folder, step, somewhere(whole, rng.choice(meshes), rng), keep=1)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        like = somewhere(zeros, rng.choice(meshes), rng)
        state = checkpoint.load(path, like, donate=rng.random() < 0.5).state
        for name, leaf in state.items():
            assert type(leaf) is type(like[name])
            if isinstance(leaf, DTensor):
                assert (leaf.placements, leaf.device_mesh) == (like[name].placements, like[name].device_mesh)
                expected = distribute_tensor(
                    whole[name], leaf.device_mesh, leaf.placements, src_data_rank=None
                )
                assert leaf.shape == whole[name].shape
                assert torch.equal(leaf.to_local(), expected.to_local()), (seed, step, name)
            else:
                assert torch.equal(leaf, whole[name]), (seed, step, name)
    return path


def shared_on_a_mesh(path):
    """A state loaded into one DTensor that is two leaves, and whether another leaf is written into."""
    mesh = fmoe.make_mesh("ep=2", device_type="cpu")
    one, other = fmoe.parallel.distribute([torch.zeros(4, 3)] * 2, fmoe.P("ep"), mesh)
    state = checkpoint.load(path, {"m": one, "v": one, "other": other}, donate=True).state
    written = state["other"].to_local().data_ptr() == other.to_local().data_ptr()
    return {name: leaf.to_local() for name, leaf in state.items()}, written


def test_donated_dtensors_that_share_memory_are_loaded_apart(pool, tmp_path):
    state = {name: torch.randn(4, 3) for name in ("m", "v", "other")}
    found = pool.run(2, shared_on_a_mesh, checkpoint.save(tmp_path, 1, state))
    for rank, (pieces, written) in enumerate(found):
        assert written
        for name, piece in pieces.items():
            assert torch.equal(piece, state[name][2 * rank : 2 * rank + 2]), name


def test_any_placement_is_read_into_any_other(pool, tmp_path):
    seed = fresh_seed()
    path = pool.run(4, moved_about, tmp_path, seed)[0]
    whole = globally(seed)
    state = checkpoint.load(path, optree.tree_map(torch.zeros_like, whole)).state
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
    assert sorted(pool.run(2, pieces_of_two, path, seed)) == [0, 1]


def pieces_of_two(path, seed):
    """A checkpoint of four ranks on two."""
    whole, mesh = globally(seed), bare_mesh("dp=2")
    like = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(0) if t.dim() else Replicate()])
        for name, t in whole.items()
    }
    state = checkpoint.load(path, like).state
    assert all(torch.equal(state[name].full_tensor(), tensor) for name, tensor in whole.items())
    return dist.get_rank()


# ---- errors --------------------------------------------------------------------------------------------


def failed(action, *args):
    """The error this rank meets, after which all ranks still meet each other."""
    try:
        ACTIONS[action](dist.get_rank(), *args)
        text = None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    dist.barrier()
    return text


def save_with_no_disk_left(rank, folder):
    def write(*_):
        raise OSError("no space left")

    original = dcp.FileSystemWriter.write_data
    dcp.FileSystemWriter.write_data = write if rank == 2 else original
    try:
        checkpoint.save(folder, 1, {"w": torch.zeros(2)})
    finally:
        dcp.FileSystemWriter.write_data = original


ACTIONS = {
    "step": lambda rank, folder: checkpoint.save(folder, rank // 2, {"w": torch.zeros(2)}),
    "state": lambda rank, folder: checkpoint.save(folder, 1, {"w": torch.zeros(2 + rank // 2)}),
    "no tensor": lambda rank, folder: checkpoint.save(folder, 1, {"w": 3 if rank == 2 else torch.zeros(2)}),
    "folder": lambda rank, folder: checkpoint.save(folder / "a file", 1, {"w": torch.zeros(2)}),
    "write": save_with_no_disk_left,
    "other path": lambda rank, folder: checkpoint.load(
        folder / f"step-0000000{8 + rank // 2}", {"w": torch.zeros(2)}
    ),
    "other like": lambda rank, folder: checkpoint.load(
        folder / "step-00000008", {"w": torch.zeros(2 + rank // 2)}
    ),
    "no path": lambda rank, folder: checkpoint.load(
        folder / ("nothing" if rank == 2 else "step-00000008"), {"w": torch.zeros(2)}
    ),
    "start": lambda rank, folder: checkpoint.start(folder / "run", {"w": torch.zeros(2)}, resume=True),
    "load": lambda rank, folder: checkpoint.load(folder / "step-00000008", {"w": torch.zeros(2)}),
}
BESIDE = "got on rank 2, beside rank 0: "
ERRORS = {
    "step": f"ValueError: save: step, run, state: {BESIDE}step is 0, here 1, expected the same on every rank",
    "state": f"ValueError: save: step, run, state: {BESIDE}state is ",
    "no tensor": "save: state.w: got int, expected a tensor",
    "folder": "File exists",
    "write": ".tmp: OSError: no space left",
    "other path": f"ValueError: load: path, like: {BESIDE}path is step-00000008, here step-00000009",
    "other like": "state.w is float32 [2], here float32 [3], expected a checkpoint of this model",
    "no path": "nothing: got no such folder, expected a whole checkpoint of fmoe.",
}


def test_what_fails_on_one_rank_fails_on_all(pool, tmp_path):
    (tmp_path / "a file").write_text("in the way")
    path = checkpoint.save(tmp_path, 8, {"w": torch.zeros(2)})
    checkpoint.save(tmp_path, 9, {"w": torch.zeros(2)})
    for action, text in ERRORS.items():
        found = pool.run(3, failed, action, tmp_path)
        assert all(error and text in error for error in found), (action, found)
    assert pool.run(3, failed, "load", tmp_path) == [None] * 3
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = pool.run(3, failed, "start", tmp_path)
        text = f"start: folder: got {tmp_path / 'run'}, in which another process trains, expected a folder"
        assert all(text in error for error in found), found
    assert pool.run(3, failed, "start", tmp_path) == [None] * 3
    for name in ("__0_0.distcp", ".metadata"):  # which are summed by different ranks
        content = (path / name).read_bytes()
        (path / name).write_bytes(bytes(len(content)))
        found = pool.run(3, failed, "load", tmp_path)
        assert all(f"got {name} whose content changed" in error for error in found), found
        (path / name).write_bytes(content)
