"""Checks that a layer's inputs fit together."""

import dataclasses
import functools
import math
from numbers import Real
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, some
from ..ops.core.axes import axis_sizes, describe
from ..ops.core.dtypes import product_dtype
from ..ops.route import RouterConfig, Routing
from ..parallel.boundary import dtensor_beneath, unwrapped
from ..parallel.spec import axes_by_dim, named_axes
from ..params import P, is_spec
from ..tree import check_tensors, dotted_names


def check_token_spec(function: str, argument: str, x: torch.Tensor, spec: P) -> None:
    """Raise ``ValueError`` unless tokens lie along the axes for tokens, with a whole last dimension."""
    if named_axes(spec) - {"dp", "ep"} or (dtensor_beneath(x) and any(spec[x.dim() - 1 :])):
        got = f"a DTensor of shape {tuple(x.shape)} placed by {spec!r}"
        expected, remedy = "whole tokens, cut along dp and ep", 'Place it by P(("dp", "ep")).'
        raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)


def check_drawing(function: str, router: Any, key: torch.Tensor | None) -> None:
    """Raise ``ValueError`` for a router with noise that has no key, and for a function beside a key."""
    if not isinstance(router, RouterConfig) and key is not None:
        remedy = "Give the function a key of its own, as by functools.partial."
        raise argument_error(
            function, "key", got="one, beside a router function", expected="None", remedy=remedy
        )
    noise = router.noise if isinstance(router, RouterConfig) else 0
    if isinstance(noise, Real) and noise > 0 and key is None:  # the router refuses what is no number
        got, expected = f"None, with router.noise={noise}", "a key, as fmoe.random.key(0)"
        remedy = "Pass one of this step, or evaluate with noise=0.0."
        raise argument_error(function, "key", got=got, expected=expected, remedy=remedy)


def check_layer(params: Any, x: torch.Tensor, router: Any, valid: torch.Tensor | None = None) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`moe_forward` fit together."""

    def error(argument: str, got: Any, expected: str, remedy: str) -> ValueError:
        return argument_error("moe_forward", argument, got=got, expected=expected, remedy=remedy)

    if not hasattr(params, "experts"):
        remedy = "Pass what moe_init gives, or fmoe.MoEParams(router, experts, shared=())."
        raise error("params", type(params).__name__, "fmoe.MoEParams", remedy)
    if not isinstance(x, torch.Tensor):
        raise error("x", type(x).__name__, "a tensor", "Convert it with torch.as_tensor.")
    leaves = check_tensors("moe_forward", "params", params)
    dim = params.experts.w_in.shape[-1]
    if not isinstance(router, RouterConfig) and not callable(router):
        expected = "a RouterConfig or a function of (params.router, x_TD)"
        raise error("router", repr(router), expected, "Pass fmoe.RouterConfig(), say.")
    if not x.is_floating_point():
        remedy = "Embed tokens before the layer, or use x.float()."
        raise error("x", f"dtype {x.dtype}", "a floating dtype", remedy)
    if x.dim() == 0 or x.shape[-1] != dim:
        expected = f"(..., {dim}), as params.experts.w_in is {tuple(params.experts.w_in.shape)}"
        remedy = "Pass the dimension the layer was initialised with."
        raise error("x", f"shape {tuple(x.shape)}", expected, remedy)
    if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:-1]):
        got, expected = f"{valid.dtype} of shape {tuple(valid.shape)}", f"torch.bool of {tuple(x.shape[:-1])}"
        raise error("valid", got, expected, "Give every token one.")
    if params.shared and params.shared.w_in.shape[-1] != dim:
        got = f"shape {tuple(params.shared.w_in.shape)}"
        remedy = "Plain params on a mesh are whole but for experts along ep and hidden dimensions along tp."
        raise error("params.shared.w_in", got, f"(2, F, {dim})", remedy)
    num_router = len(optree.tree_leaves(params.router))  # the first leaves, of any dtype
    device, dtype = x.device, product_dtype(x)
    for i, leaf in enumerate(leaves):
        if leaf.device != device:
            name, remedy = f"params.{dotted_names(params)[i]}", "Move one of the two with .to()."
            raise error(name, leaf.device, f"{device}, as x", remedy)
        if i >= num_router and leaf.dtype != x.dtype and product_dtype(leaf) != dtype:
            name, remedy = f"params.{dotted_names(params)[i]}", "Convert one of the two with .to()."
            raise error(name, leaf.dtype, f"{x.dtype}, as x", remedy)


def check_routing(routing: Any, num_tokens: int, num_experts: int) -> None:
    """Raise ``ValueError`` unless a router function returned a routing of these tokens and experts."""

    def error(got: str, expected: str, remedy: str) -> ValueError:
        got = f"a function that returns {got}"
        return argument_error("moe_forward", "router", got=got, expected=expected, remedy=remedy)

    if not isinstance(routing, Routing):
        raise error(type(routing).__name__, "one that returns fmoe.Routing", "fmoe.route returns one.")
    ids_TK = routing.expert_ids_TK
    pairs = num_tokens, ids_TK.shape[1] if isinstance(ids_TK, torch.Tensor) and ids_TK.dim() == 2 else 1
    wide = torch.float32, torch.float64
    for name, shape, dtypes in (
        ("expert_ids_TK", pairs, (torch.int64,)),
        ("weights_TK", pairs, wide),
        ("counts_E", (num_experts,), (torch.int64,)),
        ("scores_TE", (num_tokens, num_experts), (*wide, torch.bfloat16, torch.float16)),
    ):
        value = getattr(routing, name)
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or tuple(value.shape) != shape or value.dtype not in dtypes:
            shown = f"of shape {tuple(value.shape)}, {value.dtype}" if is_tensor else f"= {value!r}"
            raise error(
                f"{name} {shown}",
                f"{shape}, {' or '.join(map(str, dtypes))}",
                f"Route all {num_tokens} rows of x_TD to {num_experts} experts.",
            )


def check_on_one_device(function: str, param: torch.Tensor) -> None:
    """Raise ``ValueError`` for a DTensor among the params of a call that has no mesh."""
    if dtensor_beneath(param):
        got, expected = "None, for params that are DTensors", "the mesh they lie on"
        raise argument_error(function, "mesh", got=got, expected=expected)


def check_params(function: str, params: Any, specs: Any, wanted: Any, mesh: DeviceMesh) -> None:
    """Raise ``ValueError`` unless DTensors have the specs' shapes, and plain params this device's part."""
    sizes, wrong = axis_sizes(mesh), []
    described = optree.tree_leaves(specs, is_leaf=is_spec)
    leaves = check_tensors(function, "params", params)
    for name, leaf, spec, place in zip(dotted_names(params), leaves, described, optree.tree_leaves(wanted)):
        parts = [math.prod([sizes.get(a, 1) for a in axes]) for axes in axes_by_dim(place)]
        parts += [1] * (len(spec.shape) - len(parts))
        plain = not dtensor_beneath(leaf)
        expected = tuple(n // part if plain else n for n, part in zip(spec.shape, parts))
        found = tuple(leaf.shape if plain else unwrapped(leaf).shape)
        if found != expected:
            wrong.append(f"{name} {'a plain tensor' if plain else 'a DTensor'} of {found}, not {expected}")
    if wrong or len(leaves) != len(described):
        got = some(wrong, "; ") or f"{len(leaves)} tensors"
        all_of_them = f"{len(described)} tensors of config, on {describe(mesh)}"
        remedy = "Place them with fmoe.shard_params(params, mesh, decoder.specs(config))."
        raise argument_error(function, "params", got=got, expected=all_of_them, remedy=remedy)


def check_tokens(function: str, argument: str, tokens: torch.Tensor, max_seq_len: int) -> None:
    """Raise ``ValueError`` unless ``tokens`` are int64 (B, L) of at most ``max_seq_len`` positions."""
    error = functools.partial(argument_error, function, argument)
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        remedy = "Convert with .long(), and give one sequence a batch dimension."
        raise error(got=got, expected="torch.int64 of shape (B, L)", remedy=remedy)
    if tokens.shape[1] > max_seq_len:
        got, expected = f"{tokens.shape[1]} positions", f"at most max_seq_len={max_seq_len}"
        raise error(got=got, expected=expected, remedy="Cut the sequences, or raise max_seq_len.")


def check_same(function: str, what: str, argument: str, found: Any, of_tokens: Any) -> None:
    """Raise ``ValueError`` unless ``what`` is the same for an argument as for the tokens."""
    if found != of_tokens:
        got, expected = f"{argument} {what} {found}", f"{of_tokens}, as tokens"
        remedy = "Give every token one, in the same place."
        raise argument_error(function, argument, got=got, expected=expected, remedy=remedy)


def check_mtp(function: str, config: Any, weight: float) -> None:
    """Raise ``ValueError`` unless ``weight`` is a number that the model has modules for."""
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        expected = "a finite number of at least 0"
        raise argument_error(function, "mtp_weight", got=repr(weight), expected=expected)
    if weight and not config.mtp_layers:
        got, expected = f"{weight} for a model of mtp_layers=0", "0"
        remedy = "Give the config mtp_layers, or load a published model with mtp=True."
        raise argument_error(function, "mtp_weight", got=got, expected=expected, remedy=remedy)


def check_heads(function: str, num_heads: int, mesh: DeviceMesh) -> None:
    """Raise ``ValueError`` unless ``tp`` divides the heads of keys, and so those of queries."""
    tp = axis_sizes(mesh).get("tp", 1)
    if num_heads % tp:
        got, expected = f"tp={tp} for {num_heads} heads of keys", "a tp that divides them"
        raise argument_error(function, "mesh", got=got, expected=expected)


def check_sizes(sizes: Any, least: dict[str, int]) -> None:
    """Raise ``ValueError`` for an integer field of a dataclass below ``least``, by default 1."""
    for field in dataclasses.fields(sizes):
        value, at_least = getattr(sizes, field.name), least.get(field.name, 1)
        if field.type is int and (type(value) is not int or value < at_least):
            expected = f"an integer of at least {at_least}"
            raise argument_error(type(sizes).__name__, field.name, got=value, expected=expected)
