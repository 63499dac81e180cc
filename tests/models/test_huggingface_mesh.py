"""Published weights onto meshes and back: each rank reads what it holds, the first writes the same files."""

import dataclasses
import itertools
import json
from collections import Counter
from functools import partial
from typing import ClassVar

import optree
import pytest
import torch
import torch.distributed as dist
from helpers import allocated_at_once, change, quick
from parity import TINY, V2, init, their_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import distribute_tensor

import fmoe
from fmoe.models import deepseek_v3, huggingface
from fmoe.models.gqa import GQA
from fmoe.models.published import export_config
from fmoe.models.rotary import Rotary
from fmoe.parallel.spec import local_piece, spec_of
from fmoe.params import is_spec

CONFIG = change(TINY, kv_lora_rank=8, q_lora_rank=8)
QWEN2 = dataclasses.replace(
    CONFIG,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=4, bias="qkv", rope=Rotary(4)),
    shared_gate=True,
    router=fmoe.RouterConfig(top_k=2, score_func="softmax"),
)
MESHES = {"ep=4": 4, "dp=2,ep=2": 4, "tp=2,ep=2": 4, "dp=2": 2}
BLOCK = (8, 5)


class Counted:
    """An open file that counts the bytes it is asked for, by tensor."""

    asked: ClassVar[Counter[str]] = Counter()

    def __init__(self, *args, **options):
        self.opened = safe_open(*args, **options)

    def __enter__(self):
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountedSlice(name, self.file.get_slice(name))


class CountedSlice:
    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor
        self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

    def __getitem__(self, where):
        found = self.tensor[where]
        Counted.asked[self.name] += found.nbytes
        return found


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def loaded(path, axes, dtype):
    """What this rank holds of every parameter, and the bytes it asked the files for."""
    mesh = fmoe.make_mesh(axes, device_type="cpu")
    Counted.asked.clear()
    huggingface.safe_open = Counted
    try:
        config, params = huggingface.load(path, mesh=mesh, dtype=dtype)
    finally:
        huggingface.safe_open = safe_open
    specs = optree.tree_leaves(deepseek_v3.specs(config), is_leaf=is_spec)
    for leaf, spec in zip(optree.tree_leaves(params), specs):
        assert leaf.shape == spec.shape
        assert leaf.placements == fmoe.parallel.placements(spec.partition, mesh)
    return [
        (local_piece(spec_of(leaf), leaf.shape, mesh), leaf.to_local()) for leaf in optree.tree_leaves(params)
    ], dict(Counted.asked)


def write(path, config, tensors, **more):
    """A directory of these tensors in two files."""
    path.mkdir()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map = {}
    for i, half in enumerate(halves):
        save_file(half, path / f"{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, f"{i}.safetensors")
    (path / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(export_config(config) | more))


def low(tensors, scale_of=torch.rand):
    """Matrices of attention and experts in float8 with scales of random blocks."""
    found = {}
    for name, tensor in tensors.items():
        if "norm" in name or "layers" not in name or "mlp.gate." in name:
            found[name] = tensor
            continue
        *experts, rows, columns = tensor.shape
        found[name] = tensor.to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = scale_of(*experts, -(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    return found


def powers(*shape):
    return torch.randint(110, 130, shape, dtype=torch.uint8)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    params, v2 = init(CONFIG), dataclasses.replace(CONFIG, router=V2)
    # The file must come through the mesh with every bit it has.
    params.embedding[0, :2] = torch.tensor([-0.0, torch.nan])
    huggingface.save(folder / "apart", CONFIG, params, max_shard_bytes=10000)
    tied = dataclasses.replace(CONFIG, tied_head=True)
    huggingface.save(folder / "tied", tied, params._replace(head=()))
    head = {"lm_head.weight": params.embedding}
    files = [load_file(file) for file in (folder / "tied").glob("*.safetensors")]
    stored = {name: tensor for file in files for name, tensor in file.items()} | head
    write(folder / "tied, with head", tied, stored)
    head = params.embedding.clone()
    head[-1, -1] += 1  # which one rank holds
    write(folder / "another head", tied, stored | {"lm_head.weight": head})
    huggingface.save(folder / "V2", v2, init(v2))
    huggingface.save(folder / "Qwen2", QWEN2, init(QWEN2))
    huggingface.save(folder / "indivisible", TINY, init(TINY))
    fused, quantised = their_tensors(params, CONFIG), {"weight_block_size": list(BLOCK)}
    write(folder / "fused", CONFIG, fused)
    write(folder / "low, fused", CONFIG, low(fused), quantization_config=quantised)
    files = [load_file(file) for file in (folder / "apart").glob("*.safetensors")]
    apart = {name: tensor for file in files for name, tensor in file.items()}
    write(folder / "low, apart", CONFIG, low(apart), quantization_config=quantised)
    write(
        folder / "bytes", CONFIG, low(apart, powers), quantization_config=quantised | {"scale_fmt": "ue8m0"}
    )
    return folder


KINDS = ["apart", "fused", "low, apart", "low, fused", "bytes", "tied", "tied, with head", "V2", "Qwen2"]
SOME = [("ep=4", "apart"), ("tp=2,ep=2", "fused"), ("dp=2,ep=2", "low, apart"), ("tp=2,ep=2", "low, fused")]
SOME += [("ep=4", "V2"), ("dp=2", "tied, with head"), ("tp=2,ep=2", "Qwen2"), ("tp=2,ep=2", "bytes")]


@pytest.mark.parametrize(("axes", "kind"), quick(SOME, itertools.product(MESHES, KINDS)))
def test_every_rank_reads_what_it_holds_and_nothing_else(pool, directories, axes, kind):
    path = directories / kind
    dtype = torch.bfloat16 if kind == "fused" else None
    _, whole = huggingface.load(path, dtype=dtype)
    files = [load_file(file) for file in path.glob("*.safetensors")]
    sizes = {name: tensor.element_size() for file in files for name, tensor in file.items()}
    elements = Counter()
    for pieces, asked in pool.run(MESHES[axes], loaded, path, axes, dtype):
        for (piece, values), leaf in zip(pieces, optree.tree_leaves(whole), strict=True):
            assert values.dtype == leaf.dtype
            assert torch.equal(bits(values), bits(leaf[piece]))
        weights = {name: count // sizes[name] for name, count in asked.items() if "scale_inv" not in name}
        held = sum(values.numel() for _, values in pieces)
        if kind == "tied, with head":
            held += weights["model.embed_tokens.weight"]
        made_of_nothing = sum(layer.mlp.router.bias_E.numel() for layer in whole.layers[1:])
        assert sum(weights.values()) == held - (made_of_nothing if kind in ("V2", "Qwen2") else 0)
        elements.update(weights)
    assert elements.keys() == {name for name in sizes if "scale_inv" not in name}


def saved(path, folder):
    """The most memory this rank needed to write a model from its mesh, beside the model.

    The least of a few: gloo's threads let go of memory when they get to it.
    """
    config, params = huggingface.load(path, mesh=fmoe.make_mesh("dp=2,ep=2", device_type="cpu"))

    folders = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(5))]
    saves = [partial(huggingface.save, each, config, params, max_shard_bytes=10000) for each in folders]
    return min(allocated_at_once(save)[0] for save in saves)


@pytest.mark.parametrize("kind", ["apart", "V2"])
def test_a_mesh_writes_the_files_of_one_process(pool, directories, tmp_path, kind):
    config, params = huggingface.load(directories / kind)
    huggingface.save(tmp_path / "one", config, params, max_shard_bytes=10000)
    _, *others = pool.run(4, saved, directories / kind, tmp_path / "many")
    one, many = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "many")
    )
    assert len(one) > 5
    assert one == many
    largest = max(
        tensor.nbytes
        for file in (tmp_path / "one").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    # One tensor and the one before; gloo adds half of what it sums.
    assert max(others) < 3 * largest < sum(leaf.nbytes for leaf in optree.tree_leaves(params)) / 5, others


def failed(action, path, folder):
    """The error this rank meets, after which all ranks still meet each other."""
    mesh = fmoe.make_mesh("ep=4", device_type="cpu")
    try:
        config, params = huggingface.load(path, mesh=mesh)
        if action == "params" and dist.get_rank() == 2:
            params = params._replace(norm=torch.ones(3))
        if action == "uneven":
            config = dataclasses.replace(config, vocab_size=42)
            where = fmoe.parallel.placements(fmoe.P("ep"), mesh)
            rows = distribute_tensor(torch.zeros(42, 24), mesh, where, src_data_rank=None)
            params = params._replace(embedding=rows, head=rows)
        if action == "write":
            huggingface.save_file = None  # only the first rank calls it
        huggingface.save(folder, config, params)
        text = None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    finally:
        huggingface.save_file = save_file
    dist.barrier()
    return text


def test_what_fails_on_one_rank_fails_on_all(pool, directories, tmp_path):
    run = lambda action, kind, folder: pool.run(4, failed, action, directories / kind, folder)  # noqa: E731
    assert all("norm (3,) torch.float32, not (24,)" in text for text in run("params", "apart", tmp_path))
    assert all("which holds safetensors" in text for text in run("", "apart", directories / "tied"))
    assert run("write", "apart", tmp_path)[1] == "RuntimeError: on rank 0: 'NoneType' object is not callable"
    text = "got embedding, whose dimension 0 of size 42 doesn't divide by ep=4; head, whose dimension 0"
    assert all(text in found for found in run("uneven", "apart", tmp_path))
    text = "whose lm_head.weight differs from its model.embed_tokens.weight"
    assert all(text in found for found in run("", "another head", tmp_path))
    for found in run("indivisible", "indivisible", tmp_path):
        assert found.startswith("ValueError: huggingface.load: params: got ")
        assert "params.layers.0.attention.kv_up: " in found
        assert "dimension 1 of size 10 doesn't divide by dp*ep=4" in found
    assert run("", "apart", tmp_path) == [None] * 4
