"""Gathering parameters and summing gradients over devices, a model's parts in turn."""

from collections.abc import Callable
from typing import Any

import optree
from torch.distributed.device_mesh import DeviceMesh

from ..models.params import ModelParams
from ..ops.core.dtensors import as_dtensor, is_dtensor, local
from ..parallel import buckets
from ..parallel.boundary import collect
from ..parallel.placement import is_placed


def scattered(placed: Any, grads: Any) -> Any:
    """Gradients of whole parameters, as they are placed, summed over devices in float32."""

    def part(placed: Any, grads: Any) -> Any:
        leaves, structure = optree.tree_flatten(placed, is_leaf=is_placed)
        cotangents = structure.flatten_up_to(grads)
        return structure.unflatten(buckets.scatter(leaves, cotangents))

    return by_parts(part, placed, grads)


def collected(params: Any, grads: Any, specs: Any, mesh: DeviceMesh) -> Any:
    """Gradients summed over the axes along which their parameters are whole, and placed like them."""
    leaves, structure = optree.tree_flatten(params)
    pieces = collect([local(g) for g in structure.flatten_up_to(grads)], mesh, optree.tree_leaves(specs))
    pieces = [piece.to(leaf.dtype) for piece, leaf in zip(pieces, leaves)]
    return structure.unflatten(
        as_dtensor(piece, mesh, leaf.placements, leaf.shape, leaf.stride()) if is_dtensor(leaf) else piece
        for piece, leaf in zip(pieces, leaves)
    )


def by_parts(fn: Callable[..., Any], params: Any, *others: Any) -> Any:
    """``fn`` of a model's parts in turn, so that no more than a layer is on its way at once."""

    number = len(params.layers)
    parts = [fn(*trees) for trees in zip(*map(parts_of, (params, *others)))]
    embedding, layers, (norm, head, *mtp) = parts[0], parts[1 : number + 1], parts[number + 1 :]
    return ModelParams(embedding, tuple(layers), norm, head, tuple(mtp))


def parts_of(tree: ModelParams) -> list[Any]:
    return [tree.embedding, *tree.layers, tree.norm, tree.head, *tree.mtp]
