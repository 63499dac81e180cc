"""The mixture-of-experts layer: ``moe_init`` and ``moe_forward``."""

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.balance import MoEStats, moe_stats
from ..ops.combine import combine
from ..ops.dispatch import dispatch
from ..ops.experts import ExpertParams, experts_grouped_mm, swiglu
from ..ops.route import RouterConfig, RouterParams, route
from ..tree import P, check_tensors, dotted_names, init_params, param

BACKENDS = ("auto", "local")


class MoEParams(NamedTuple):
    """A layer's parameters. ``shared`` has an expert's two leaves without E, or is ``()``."""

    router: RouterParams
    experts: ExpertParams
    shared: ExpertParams | tuple[()]


def moe_specs(*, dim: int, hidden_dim: int, num_experts: int, num_shared_experts: int = 0) -> MoEParams:
    """Shapes, initial values and placement of a layer's parameters: a tree of ``ParamSpec``."""
    fsdp = ("dp", "ep")
    return MoEParams(
        RouterParams(
            param((num_experts, dim), P(None, None)),
            param((num_experts,), P(None), init="zeros", dtype=torch.float32),
        ),
        ExpertParams(
            param((num_experts, 2, hidden_dim, dim), P("ep", None, "tp", "dp")),
            param((num_experts, dim, hidden_dim), P("ep", "dp", "tp")),
        ),
        mlp_specs(dim, num_shared_experts * hidden_dim, fsdp) if num_shared_experts else (),
    )


def mlp_specs(dim: int, hidden_dim: int, fsdp: tuple[str, ...]) -> ExpertParams:
    """A SwiGLU every token goes through, as the shared experts and the dense layers are."""
    return ExpertParams(
        param((2, hidden_dim, dim), P(None, "tp", fsdp)), param((dim, hidden_dim), P(fsdp, "tp"))
    )


def moe_init(
    seed_or_generator: int | torch.Generator,
    *,
    dim: int,
    hidden_dim: int,
    num_experts: int,
    num_shared_experts: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    mesh: DeviceMesh | None = None,
) -> MoEParams:
    """Random parameters of one MoE layer.

    ==================  ===============================================================
    seed_or_generator   the same seed gives the same parameters in every dtype
    dim, hidden_dim     D and F
    num_experts         E
    num_shared_experts  experts every token goes through, as one SwiGLU of this many times F
    dtype               of all leaves but ``router.bias_E``, which is float32
    device              ``None``: PyTorch's default device
    -> MoEParams        weights drawn from a normal of deviation 0.02, biases zero
    ==================  ===============================================================

    Raises ``ValueError`` for sizes below one and dtypes that aren't floating.

    >>> params = moe_init(0, dim=8, hidden_dim=16, num_experts=4, num_shared_experts=1)
    >>> params.experts.w_in.shape, params.shared.w_out.shape
    (torch.Size([4, 2, 16, 8]), torch.Size([8, 16]))
    """
    for name, size, least in (
        ("dim", dim, 1),
        ("hidden_dim", hidden_dim, 1),
        ("num_experts", num_experts, 1),
        ("num_shared_experts", num_shared_experts, 0),
    ):
        if not isinstance(size, int) or size < least:
            raise argument_error(
                "moe_init",
                name,
                got=repr(size),
                expected=f"an integer of at least {least}",
                remedy="Correct it.",
            )
    if not dtype.is_floating_point:
        raise argument_error(
            "moe_init", "dtype", got=dtype, expected="a floating dtype", remedy="Use torch.bfloat16, say."
        )
    check_mesh("moe_init", mesh)
    specs = moe_specs(
        dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, num_shared_experts=num_shared_experts
    )
    return init_params(specs, seed_or_generator, dtype=dtype, device=device)


@overload
def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, MoEStats]: ...


def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig = RouterConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    return_stats: bool = False,
) -> Any:
    """A mixture-of-experts layer: every token through its top-k experts and the shared ones.

    ============  ===========  ===============================================================
    params                     from :func:`moe_init`, or tensors of one's own
    x             (..., D)     tokens; bfloat16, float16, float32 or float64, as the experts
    mesh                       ``None`` or a mesh of one device
    router                     how tokens choose experts
    backend                    ``"auto"`` or ``"local"``
    -> y          (..., D)     dtype of ``x``; with ``return_stats``, ``(y, MoEStats)``
    ============  ===========  ===============================================================

    Works under every ``torch.func`` transform and under ``torch.compile(fullgraph=True)``.

    Raises ``ValueError`` for inputs that don't fit together, naming what was expected.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    >>> import torch, fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16)
    >>> y, stats = fmoe.moe_forward(params, torch.randn(2, 5, 8), return_stats=True)
    >>> y.shape, stats.tokens_per_expert.sum()
    (torch.Size([2, 5, 8]), tensor(80))
    """
    check_layer(params, x, mesh, backend)
    x_TD = x.reshape(-1, x.shape[-1])
    routing = route(params.router, x_TD, router)
    x_SD, plan = dispatch(x_TD, routing)
    y_SD = experts_grouped_mm(params.experts, x_SD, plan)
    y_TD = combine(y_SD, plan)
    if params.shared:
        y_TD = y_TD + mlp_forward(params.shared, x_TD)
    y = y_TD.reshape(x.shape)
    return (y, moe_stats(routing)) if return_stats else y


def mlp_forward(params: ExpertParams, x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., D) through one SwiGLU."""
    h = F.linear(x, params.w_in.flatten(0, 1)).view(*x.shape[:-1], 2, params.w_in.shape[1])
    return F.linear(swiglu(h), params.w_out)


def check_mesh(function: str, mesh: DeviceMesh | None) -> None:
    if mesh is not None and mesh.size() != 1:
        raise argument_error(
            function,
            "mesh",
            got=f"a mesh of {mesh.size()} devices",
            expected="None or a mesh of one device",
            remedy="More than one device isn't supported yet; pass mesh=None.",
        )


def check_layer(params: MoEParams, x: torch.Tensor, mesh: DeviceMesh | None, backend: str) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`moe_forward` fit together."""

    def error(argument: str, got: Any, expected: str, remedy: str) -> ValueError:
        return argument_error("moe_forward", argument, got=got, expected=expected, remedy=remedy)

    check_mesh("moe_forward", mesh)
    if backend not in BACKENDS:
        raise error("backend", repr(backend), f"one of {BACKENDS}", "Use 'auto'.")
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
    for name, leaf in zip(dotted_names(params), leaves):
        if leaf.device != x.device:
            raise error(f"params.{name}", leaf.device, f"{x.device}, as x", "Move one of the two with .to().")
        if leaf.dtype != x.dtype and not name.startswith("router."):
            raise error(
                f"params.{name}", leaf.dtype, f"{x.dtype}, as x", "Convert one of the two with .to()."
            )
