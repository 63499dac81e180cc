"""Which published tensors make up a parameter, and any piece of it read from them."""

import dataclasses
import math
from collections import Counter

import optree
import pytest
import torch
from parity import TINY, init, small
from torch.testing import assert_close

from fmoe.models import deepseek_v3
from fmoe.models.published_tensors import published_leaves, read_leaf
from fmoe.params import is_spec
from fmoe.tree import dotted_names


@pytest.mark.parametrize("fused", [False, True])
def test_leaves_are_the_specs_and_their_parts_fill_them(fused):
    tree = deepseek_v3.specs(TINY)
    leaves = published_leaves(TINY, fused=fused)
    assert [leaf.name for leaf in leaves] == dotted_names(tree, is_leaf=is_spec)
    assert [leaf.spec for leaf in leaves] == optree.tree_leaves(tree, is_leaf=is_spec)
    for leaf in leaves:
        places = {part.at for part in leaf.parts}
        assert len(places) == len(leaf.parts)
        assert len(places) * math.prod(leaf.parts[0].shape) == math.prod(leaf.spec.shape)
    names = [part.name for leaf in leaves for part in leaf.parts]
    assert len(set(names)) == len(names)


def test_an_expert_has_its_published_names():
    leaf = next(
        x for x in published_leaves(deepseek_v3.preset("671B")) if x.name == "layers.3.mlp.experts.w_in"
    )
    at = {part.name: (part.at, part.shape) for part in leaf.parts}
    assert at["model.layers.3.mlp.experts.7.gate_proj.weight"] == ((7, 0), (2048, 7168))
    assert at["model.layers.3.mlp.experts.255.up_proj.weight"] == ((255, 1), (2048, 7168))
    assert len(at) == 512


class File:
    """An open file of tensors, which counts the elements it is asked for."""

    def __init__(self, tensors):
        self.tensors, self.asked, self.name = tensors, Counter(), None

    def get_slice(self, name):
        self.name = name
        return self

    def __getitem__(self, where):
        found = self.tensors[self.name][where]
        self.asked[self.name] += found.numel()
        return found


def random_piece(shape):
    def part(size):
        start, stop = sorted(torch.randint(size + 1, (2,)).tolist())
        return slice(start, stop) if start < stop else slice(0, size)

    return tuple(part(size) for size in shape)


def tensors_of(params, leaves):
    return {
        part.name: value[part.at].reshape(part.shape)
        for leaf, value in zip(leaves, optree.tree_leaves(params))
        for part in leaf.parts
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["query matrix, two shared experts", "odd sizes"])
def test_any_piece_is_read_and_no_more(name, fused):
    config = small(name)
    params, leaves = init(config), published_leaves(config, fused=fused)
    file = File(tensors_of(params, leaves))
    files = dict.fromkeys(file.tensors, file)
    for leaf, value in zip(leaves, optree.tree_leaves(params)):
        for piece in (random_piece(value.shape), ()):
            file.asked.clear()
            found = read_leaf(files, leaf, dtype=torch.float64, piece=piece)
            assert found.dtype == (leaf.spec.dtype or torch.float64)
            assert torch.equal(found, value[piece].to(found.dtype))
            assert file.asked.total() == found.numel()
            assert found.is_contiguous()


@pytest.mark.parametrize("fused", [False, True])
def test_any_piece_of_float8_is_read_with_the_scales_of_its_blocks(fused):
    config, block = small("odd sizes"), (4, 3)
    leaves = [leaf for leaf in published_leaves(config, fused=fused) if len(leaf.spec.shape) > 1]
    low, stands = {}, {}
    for leaf in leaves:
        for part in leaf.parts:
            *before, rows, columns = part.shape
            weight = torch.randn(part.shape).to(torch.float8_e4m3fn)
            scale = torch.rand(*before, -(-rows // 4), -(-columns // 3))
            low[part.name], low[part.name + "_scale_inv"] = weight, scale
            each = [[scale[..., i // 4, j // 3] for j in range(columns)] for i in range(rows)]
            each = torch.stack([torch.stack(row, -1) for row in each], -2)
            stands[part.name] = weight.float() * each
    file, plain = File(low), File(stands)
    for leaf in leaves:
        piece = random_piece(leaf.spec.shape)
        file.asked.clear()
        found = read_leaf(dict.fromkeys(low, file), leaf, dtype=torch.float32, block=block, piece=piece)
        wanted = read_leaf(dict.fromkeys(stands, plain), leaf, dtype=torch.float32, piece=piece)
        assert_close(found, wanted, atol=0, rtol=0)
        scales = sum(asked for name, asked in file.asked.items() if name.endswith("_scale_inv"))
        assert file.asked.total() - scales == found.numel()
        *matrices, rows, columns = piece
        per_matrix = math.prod(
            len(range(part.start // size, -(-part.stop // size)))
            for part, size in zip((rows, columns), block)
        )
        if len(matrices) < 2 or not fused:  # fused, the rows of up begin within a block
            assert scales == per_matrix * math.prod(part.stop - part.start for part in matrices)


@pytest.mark.parametrize("form", [torch.uint8, torch.float8_e8m0fnu])
def test_a_byte_of_a_scale_is_an_exponent(form):
    leaf = next(leaf for leaf in published_leaves(TINY) if leaf.name == "embedding")
    leaf = leaf._replace(spec=dataclasses.replace(leaf.spec, shape=(16, 16)))
    name, bytes_ = leaf.parts[0].name, torch.randperm(256).view(16, 16)
    tensors = {name: torch.randn(16, 16).to(torch.float8_e4m3fn)}
    tensors[name + "_scale_inv"] = bytes_.to(torch.uint8).view(form)
    files = dict.fromkeys(tensors, File(tensors))
    found = read_leaf(files, leaf, dtype=torch.float64, block=(1, 1))
    scales = torch.tensor([math.nan if b == 255 else 2.0 ** (b - 127) for b in bytes_.flatten()]).double()
    assert_close(found, (tensors[name].float() * scales.view(16, 16).float()).double(), equal_nan=True)
