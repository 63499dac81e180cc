"""Whether what a layer is given fits together."""

from typing import Any

import torch

from ..errors import argument_error
from ..parallel.boundary import is_dtensor
from ..parallel.spec import named_axes
from ..tree import P, check_tensors, dotted_names


def check_token_spec(function: str, argument: str, x: torch.Tensor, spec: P, *, whole_dims: int = 1) -> None:
    """Raise ``ValueError`` unless tokens, whose last dimensions are whole, lie along the axes for tokens."""
    if named_axes(spec) - {"dp", "ep"} or (is_dtensor(x) and any(spec[x.dim() - whole_dims :])):
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
