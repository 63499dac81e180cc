"""Whether what a layer is given fits together."""

import math
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.axes import axis_sizes, describe
from ..parallel.boundary import dtensor_beneath, unwrapped
from ..parallel.spec import axes_by_dim, named_axes
from ..tree import P, check_tensors, dotted_names, is_spec


def check_token_spec(function: str, argument: str, x: torch.Tensor, spec: P, *, whole_dims: int = 1) -> None:
    """Raise ``ValueError`` unless tokens, whose last dimensions are whole, lie along the axes for tokens."""
    if named_axes(spec) - {"dp", "ep"} or (dtensor_beneath(x) and any(spec[x.dim() - whole_dims :])):
        raise argument_error(
            function,
            argument,
            got=f"a DTensor of shape {tuple(x.shape)} placed by {spec!r}",
            expected="whole tokens, cut along dp and ep",
            remedy='Place it by P(("dp", "ep")).',
        )


def check_layer(params: Any, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`moe_forward` fit together."""

    def error(argument: str, got: Any, expected: str, remedy: str) -> ValueError:
        return argument_error("moe_forward", argument, got=got, expected=expected, remedy=remedy)

    leaves = check_tensors("moe_forward", "params", params)
    dim = params.router.weight_ED.shape[-1]
    if not x.is_floating_point():
        raise error(
            "x", f"dtype {x.dtype}", "a floating dtype", "Embed tokens before the layer, or use x.float()."
        )
    if x.dim() == 0 or x.shape[-1] != dim:
        raise error(
            "x",
            f"shape {tuple(x.shape)}",
            f"(..., {dim}), as params.router.weight_ED is {tuple(params.router.weight_ED.shape)}",
            "Pass the dimension the layer was initialised with.",
        )
    if params.shared and params.shared.w_in.shape[-1] != dim:
        raise error(
            "params.shared.w_in",
            f"shape {tuple(params.shared.w_in.shape)}",
            f"(2, F, {dim})",
            "Plain params on a mesh are whole but for experts along ep and hidden dimensions along tp.",
        )
    for name, leaf in zip(dotted_names(params), leaves):
        if leaf.device != x.device:
            raise error(f"params.{name}", leaf.device, f"{x.device}, as x", "Move one of the two with .to().")
        if leaf.dtype != x.dtype and not name.startswith("router."):
            raise error(
                f"params.{name}", leaf.dtype, f"{x.dtype}, as x", "Convert one of the two with .to()."
            )


def check_params(params: Any, specs: Any, wanted: Any, mesh: DeviceMesh) -> None:
    """Raise ``ValueError`` unless DTensors have the specs' shapes, and plain params this device's part."""
    sizes, wrong = axis_sizes(mesh), []
    described = optree.tree_leaves(specs, is_leaf=is_spec)
    leaves = check_tensors("forward", "params", params)
    for name, leaf, spec, place in zip(dotted_names(params), leaves, described, optree.tree_leaves(wanted)):
        parts = [math.prod([sizes.get(a, 1) for a in axes]) for axes in axes_by_dim(place)]
        parts += [1] * (len(spec.shape) - len(parts))
        plain = not dtensor_beneath(leaf)
        expected = tuple(n // part if plain else n for n, part in zip(spec.shape, parts))
        found = tuple(leaf.shape if plain else unwrapped(leaf).shape)
        if found != expected:
            wrong.append(f"{name} {'a plain tensor' if plain else 'a DTensor'} of {found}, not {expected}")
    if wrong or len(leaves) != len(described):
        raise argument_error(
            "forward",
            "params",
            got="; ".join(wrong) or f"{len(leaves)} tensors",
            expected=f"{len(described)} tensors of config, on {describe(mesh)}",
            remedy="Place them with fmoe.shard_params(params, mesh, deepseek_v3.specs(config)).",
        )
