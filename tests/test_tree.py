"""Nodes, parameter descriptions, names."""

import copy
import pickle
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree

from fmoe.params import P, ParamSpec, init_params, is_spec, num_params, partition_specs
from fmoe.tree import check_tensors, dotted_names, node, static


@node
class Scaled:
    x: torch.Tensor
    y: Any
    by: int = static(default=2)


class Pair(NamedTuple):
    left: Any
    right: Any


def test_a_node_is_one_to_both_pytrees():
    value = Scaled(torch.tensor(1), (torch.tensor(2),), by=5)
    for flatten, unflatten in (
        (optree.tree_flatten, lambda leaves, spec: optree.tree_unflatten(spec, leaves)),
        (torch_pytree.tree_flatten, torch_pytree.tree_unflatten),
    ):
        leaves, spec = flatten(value)
        assert [int(leaf) for leaf in leaves] == [1, 2]
        again = unflatten([leaf * 10 for leaf in leaves], spec)
        assert (int(again.x), int(again.y[0]), again.by) == (10, 20, 5)
    assert optree.tree_structure(value) != optree.tree_structure(Scaled(value.x, value.y, by=6))
    with pytest.raises(AttributeError):
        value.by = 3


def test_dotted_names():
    tree = Pair([Scaled(1, {"k": 2})], Pair(3, ()))
    assert dotted_names(tree) == ["left.0.x", "left.0.y.k", "right.left"]


def test_specs_give_shapes_values_and_placement():
    specs = Pair(
        ParamSpec((3, 4), P("dp", None)),
        {"n": ParamSpec((4,), P(None), init="ones"), "b": ParamSpec((2,), P(("dp", "ep")), init="zeros")},
    )
    params = init_params(specs, 0, dtype=torch.float64, device="cpu")
    assert optree.tree_structure(params) == optree.tree_structure(specs, is_leaf=is_spec)
    assert [tuple(t.shape) for t in optree.tree_leaves(params)] == [(3, 4), (2,), (4,)]
    assert params.right["n"].tolist() == [1] * 4
    assert params.left.abs().max() <= 0.06
    assert partition_specs(specs).left == P("dp", None)
    assert num_params(specs) == 18


def test_partition_specs_are_leaves():
    assert optree.tree_leaves([P("dp"), P()]) == [P("dp"), P()]
    assert torch_pytree.tree_leaves([P("dp"), P()]) == [P("dp"), P()]
    for again in (copy.deepcopy(P("ep", None)), pickle.loads(pickle.dumps(P(("dp", "ep"), None)))):
        assert again in (P("ep", None), P(("dp", "ep"), None))
    assert repr(P("ep", None, ("dp", "tp"))) == "P('ep', None, ('dp', 'tp'))"


def test_leaves_must_be_tensors():
    with pytest.raises(ValueError, match=r"f: params.right: got int, expected a tensor. Leaves are tensors"):
        check_tensors("f", "params", Pair(torch.ones(1), 3))
