"""The mixture-of-experts layer: ``moe_init`` and ``moe_forward``."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import optree
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.balance import MoEStats, moe_stats, stats_sums
from ..ops.combine import combine, combine_start, join
from ..ops.core.axes import binding, check_mesh, present
from ..ops.core.dynamo import rearrange
from ..ops.dispatch import dispatch_join, dispatch_send, dispatch_start
from ..ops.experts import ExpertParams, experts_grouped_mm
from ..ops.experts_kernels import swiglu
from ..ops.linear import linear
from ..ops.precision import Recipe, recipe_of
from ..ops.random import check_one_key, fold_in
from ..ops.route import Router, RouterConfig, RouterParams, Routing, route, without_padding
from ..ops.transport import InFlight, in_halves
from ..parallel.backends import Backend, backend_of, choose
from ..parallel.collectives import axis_size, psum
from ..parallel.placement import computing, init_on, use
from ..parallel.spec import distribute
from ..params import P, param, partition_specs
from .checks import check_drawing, check_layer, check_on_one_device, check_routing
from .on_mesh import on_mesh, token_places

FSDP = ("dp", "ep")  # the axes that a dense matrix is further cut along, and gathered where it is used


class MoEParams(NamedTuple):
    """A layer's parameters, from :func:`moe_init` or made by hand. All leaves are tensors.

    ===========  ========================================
    router       :class:`fmoe.RouterParams`, or any tree that a router of your own takes
    experts      :class:`fmoe.ExpertParams`
    shared       :class:`fmoe.ExpertParams` of one SwiGLU, without E; ``()`` where there is none
    shared_gate  (1, D), whose sigmoid of a token weighs its shared experts; ``()`` where there is none
    ===========  ========================================

    >>> import optree
    >>> params = moe_init(0, dim=8, hidden_dim=16, num_experts=4)
    >>> doubled = optree.tree_map(lambda leaf: 2 * leaf, params)
    >>> type(doubled).__name__, params.shared
    ('MoEParams', ())
    """

    router: RouterParams | Any
    experts: ExpertParams
    shared: ExpertParams | tuple[()]
    shared_gate: torch.Tensor | tuple[()] = ()


def moe_specs(
    *, dim: int, hidden_dim: int, num_experts: int, num_shared_experts: int = 0, shared_gate: bool = False
) -> MoEParams:
    """Shapes, initial values and placement of a layer's parameters: a tree of ``ParamSpec``."""
    return MoEParams(
        RouterParams(
            param((num_experts, dim), P(None, None)),
            param((num_experts,), P(None), init="zeros", dtype=torch.float32, trained=False),
        ),
        ExpertParams(
            param((num_experts, 2, hidden_dim, dim), P("ep", None, "tp", "dp")),
            param((num_experts, dim, hidden_dim), P("ep", "dp", "tp")),
        ),
        mlp_specs(dim, num_shared_experts * hidden_dim) if num_shared_experts else (),
        param((1, dim), P(None, None)) if shared_gate else (),
    )


def mlp_specs(dim: int, hidden_dim: int) -> ExpertParams:
    """The specs of a SwiGLU that every token goes through: shared experts, or a dense layer."""
    return ExpertParams(
        param((2, hidden_dim, dim), P(None, "tp", FSDP)), param((dim, hidden_dim), P(FSDP, "tp"))
    )


_SPECS = moe_specs(dim=1, hidden_dim=1, num_experts=1, num_shared_experts=1, shared_gate=True)
PLACED: MoEParams = partition_specs(_SPECS)._replace(router=P())
# The placement to compute in: a device holds whole experts along ep, and a slice of every F along tp.
COMPUTING: MoEParams = optree.tree_map(computing, PLACED)


def of_layer(params: MoEParams, tree: MoEParams) -> MoEParams:
    """A tree for all of a layer's parts, without those that this layer lacks."""
    has_gate = isinstance(params.shared_gate, torch.Tensor)
    tree = tree if params.shared else tree._replace(shared=())
    return tree if has_gate else tree._replace(shared_gate=())


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
    num_shared_experts  experts that every token goes through: one SwiGLU of this many times F
    dtype               of all leaves but ``router.bias_E``, which is float32
    device              ``None``: the mesh's, or PyTorch's default device
    mesh                place them on it, as :func:`shard_params` does; a device draws only its own
    -> MoEParams        normal weights of deviation 0.02, zero biases
    ==================  ===============================================================

    Raises ``ValueError`` for sizes below one, sizes that the mesh doesn't divide, other dtypes, and devices
    that aren't here.

    >>> params = moe_init(0, dim=8, hidden_dim=16, num_experts=4, num_shared_experts=1)
    >>> params.experts.w_in.shape, params.shared.w_out.shape
    (torch.Size([4, 2, 16, 8]), torch.Size([8, 16]))
    """
    sizes: dict[str, Any] = dict(
        dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, num_shared_experts=num_shared_experts
    )
    for name, size in sizes.items():
        least = 0 if name == "num_shared_experts" else 1
        if not isinstance(size, int) or size < least:
            raise argument_error("moe_init", name, got=repr(size), expected=f"an integer of at least {least}")
    return init_on("moe_init", mesh, moe_specs(**sizes), seed_or_generator, dtype=dtype, device=device)


@overload
def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig | Router = ...,
    valid: torch.Tensor | None = ...,
    key: torch.Tensor | None = ...,
    backend: str | Backend = ...,
    precision: str | Recipe | None = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig | Router = ...,
    valid: torch.Tensor | None = ...,
    key: torch.Tensor | None = ...,
    backend: str | Backend = ...,
    precision: str | Recipe | None = ...,
    return_stats: Literal[True],
) -> tuple[torch.Tensor, MoEStats]: ...


def moe_forward(
    params: MoEParams,
    x: torch.Tensor,
    mesh: DeviceMesh | None = None,
    *,
    router: RouterConfig | Router = RouterConfig(),  # noqa: B008  (frozen)
    valid: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    backend: str | Backend = "auto",
    precision: str | Recipe | None = None,
    return_stats: bool = False,
) -> Any:
    """A mixture-of-experts layer. Every token goes through its top-k experts and the shared ones.

    ============  ===========  ===============================================================
    params                     from :func:`moe_init`, or tensors of your own
    x             (..., D)     tokens; bfloat16, float16, float32 or float64, like the experts
    mesh                       ``None``: this device alone. Else experts lie along its axis ``ep``, slices of
                               their hidden dimension along ``tp``, and tokens along ``dp`` and ``ep``
    router                     how tokens choose experts: by a config, or by a function from
                               ``(params.router, x_TD)`` to a :class:`fmoe.Routing`
    valid         (...)        bool, false for padding: tokens that go to no routed expert and aren't counted,
                               but must be finite; placed as ``x`` is
    key           (2,)         int64, from :mod:`fmoe.ops.random`, the same on every device: for
                               ``RouterConfig(noise=)``, which it needs
    backend                    carries tokens along ``ep``: ``"auto"``, ``"local"``, ``"all_to_all"`` or
                               ``"deepep"``; or a :class:`fmoe.parallel.Backend`, whose host needn't wait.
                               With a ``capacity``, ``return_stats`` has to say whether it was enough
    precision                  of products, as :class:`fmoe.ops.precision.Recipe` says: ``"fp8_rowwise"`` for
                               routed and shared experts. ``None``: they take operands as they are
    -> y          (..., D)     dtype of ``x``; with ``return_stats``, ``(y, MoEStats)``, over all tokens
    ============  ===========  ===============================================================

    On a mesh, a DTensor ``x`` gives a DTensor of equal placement. A plain ``x`` is any number of this
    device's own tokens, and so is its result. A loss of plain ``y`` is this device's own; the derivative is
    of the sum over the devices that tokens lie on.

    Params on a mesh are DTensors, in any placement; the layer gathers what is cut further than it computes
    with. Or they are plain tensors, which are then this device's own piece: E / ep experts, with F / tp of
    each. Whole experts would be summed ``tp`` times.

    A router function is called with the tokens of this device, as rows ``x_TD``. On a mesh ``params.router``
    is whole on every device. ``fmoe.testing.check_router`` checks such a function.

    A token's noise depends on ``key`` and on its position among all devices' tokens. Fold the step, and the
    number of the layer, into the key.

    Under ``torch.autocast`` the experts, shared ones included, compute in autocast's dtype. Params and ``x``
    may then have different dtypes. The router computes in float32, and ``y`` has the dtype of ``x``.

    It works under every ``torch.func`` transform and under ``torch.compile(fullgraph=True)``. On a mesh,
    ``jvp`` needs plain tensors, and ``vmap`` over tokens raises.

    Raises ``ValueError`` for inputs that don't fit together, and for a router function whose result is no
    routing of these tokens and experts. The text says what was expected.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    >>> import torch, fmoe
    >>> params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=12), torch.randn(2, 5, 8)
    >>> y, stats = fmoe.moe_forward(params, x, return_stats=True)
    >>> y.shape, stats.tokens_per_expert.sum()  # two experts for each of ten tokens
    (torch.Size([2, 5, 8]), tensor(20))
    >>> def greedy(router, x_TD):
    ...     scores_TE = (x_TD @ router.weight_ED.T).softmax(-1)
    ...     weights_TK, ids_TK = scores_TE.max(-1, keepdim=True)
    ...     counts_E = (ids_TK == torch.arange(12)).sum(0)
    ...     return fmoe.Routing(ids_TK, weights_TK, counts_E, scores_TE)
    >>> fmoe.moe_forward(params, x, router=greedy, return_stats=True)[1].tokens_per_expert.sum()
    tensor(10)
    """
    check_mesh("moe_forward", mesh)
    check_layer(params, x, router, valid)
    recipe = recipe_of("moe_forward", precision)
    check_drawing("moe_forward", router, key)
    if key is not None:
        check_one_key("moe_forward", key, x)
    wish = backend_of("moe_forward", backend)
    if wish.in_halves:
        got, expected = "in_halves", "a backend without it: only a model's layers take halves of tokens"
        raise argument_error("moe_forward", "backend", got=got, expected=expected)
    if wish.capacity is not None and not return_stats:
        got, expected = "False, with a capacity", "True: the stats say whether it was enough"
        remedy = "Read stats.overflow, or leave capacity out."
        raise argument_error("moe_forward", "return_stats", got=got, expected=expected, remedy=remedy)

    def layer(params: MoEParams, x: torch.Tensor, *others: torch.Tensor) -> Any:
        given = dict(zip([*inputs][1:], others))
        keys = fold_in(key, given["places"]) if key is not None and noisy else ()
        y, routing, overflow = moe_layer(use(params), x, router, given.get("valid", ()), keys, recipe)
        if not return_stats:
            return y
        sums = stats_sums(routing, overflow)
        return y, moe_stats(psum(sums, binding().tokens))  # of all tokens, wherever they lie

    inputs = {"x": x} if valid is None else {"x": x, "valid": valid[..., None]}  # of as many dimensions
    noisy = isinstance(router, RouterConfig) and router.noise
    if noisy:
        inputs["places"] = token_places("moe_forward", x, mesh)[..., None]
    if mesh is None:
        check_on_one_device("moe_forward", params.experts.w_in)
        choose("moe_forward", backend, None)
        return layer(params, *inputs.values())
    return on_mesh(
        "moe_forward",
        layer,
        params,
        inputs,
        mesh,
        wanted=of_layer(params, COMPUTING),
        out_specs=lambda where, _: (where, P()) if return_stats else where,
        backend=backend,
        rows=(x.dtype, x.shape[-1]),
    )


def moe_layer(
    params: MoEParams,
    x: torch.Tensor,
    router: RouterConfig | Router,
    valid: torch.Tensor | tuple[()] = (),
    keys: torch.Tensor | tuple[()] = (),
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
) -> tuple[torch.Tensor, Routing, torch.Tensor | tuple[()]]:
    """The layer on this device's pieces, along ``ep`` and ``tp`` if bound. Also the routing and overflow."""
    (begun,) = experts_of(params, [begin_layer(params, x, router, valid, keys)], 0, recipe)
    return end_layer(params, begun, recipe)


class Begun(NamedTuple):
    """A layer under way: its tokens, how they are routed, and what is coming: a dispatch, then a combine."""

    x_TD: torch.Tensor
    shape: tuple[int, ...]
    routing: Routing
    coming: Any
    plan: Any = None


def begin_layer(
    params: MoEParams,
    x: torch.Tensor,
    router: RouterConfig | Router,
    valid: torch.Tensor | tuple[()] = (),
    keys: torch.Tensor | tuple[()] = (),
) -> Begun:
    """Route, and begin to dispatch."""
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # vmap over no example can't infer a size
    if isinstance(router, RouterConfig):
        keys_T2 = keys.reshape(x_TD.shape[0], 2) if isinstance(keys, torch.Tensor) else ()
        routing = route(params.router, x_TD, router, keys_T2)
    else:
        routing = router(params.router, x_TD)
        num_experts = params.experts.w_in.shape[0] * axis_size(present("ep"))
        check_routing(routing, x_TD.shape[0], num_experts)
    if isinstance(valid, torch.Tensor):
        routing = without_padding(routing, valid.reshape(x_TD.shape[0]))
    return Begun(x_TD, x.shape, routing, dispatch_start(x_TD, routing, axis="ep" if present("ep") else None))


def send_layer(begun: Begun) -> Begun:
    """Go on with the dispatch, for which the host may have to wait."""
    return begun._replace(coming=dispatch_send(begun.coming))


def experts_of(params: MoEParams, parts: Sequence[Begun], i: int, recipe: Recipe) -> list[Begun]:
    """The experts of part ``i``, and begin to combine. The next one's dispatch goes on between the two."""
    found = [*parts]
    x_SD, plan = dispatch_join(parts[i].coming)
    y_SD = experts_grouped_mm(params.experts, x_SD, plan, precision=recipe.experts)
    if i + 1 < len(parts):
        found[i + 1] = send_layer(parts[i + 1])
    coming = combine_start(y_SD, plan) if params.shared or in_halves("ep") else combine(y_SD, plan)
    found[i] = parts[i]._replace(coming=coming, plan=plan)
    return found


def end_layer(
    params: MoEParams, begun: Begun, recipe: Recipe
) -> tuple[torch.Tensor, Routing, torch.Tensor | tuple[()]]:
    """The shared experts, while rows may be on their way back, and the sum."""
    plan = begun.plan
    shared = _shared_experts(params, begun.x_TD, recipe.dense) if params.shared else None
    y_TD = join(begun.coming, plan, shared) if isinstance(begun.coming, InFlight) else begun.coming
    overflow = plan.overflow
    if isinstance(overflow, torch.Tensor) and "ep" not in binding().tokens:
        overflow = psum(overflow, present("ep"))  # all have the same tokens, but each its own experts
    return psum(y_TD, present("tp")).reshape(begun.shape), begun.routing, overflow


def _shared_experts(params: Any, x_TD: torch.Tensor, precision: str | None) -> torch.Tensor:
    y_TD = mlp_forward(params.shared, x_TD, precision)
    if isinstance(params.shared_gate, torch.Tensor):
        y_TD = F.linear(x_TD, params.shared_gate).sigmoid() * y_TD
    return y_TD.to(x_TD.dtype)  # autocast gives another


def mlp_forward(params: ExpertParams, x: torch.Tensor, precision: str | None = None) -> torch.Tensor:
    """``x`` (..., D) through one SwiGLU."""
    h = linear(x, rearrange(params.w_in, "two F D -> (two F) D"), precision=precision)
    h = rearrange(h, "... (two F) -> ... two F", two=2)
    return linear(swiglu(h), params.w_out, precision=precision)


def shard_params(params: Any, mesh: DeviceMesh, specs: Any = None) -> Any:
    """Params that are equal on every device, as DTensors placed by the specs beside their shapes.

    ========  ======================================================================
    params    a layer's, from :func:`moe_init`, or any tree of tensors
    specs     a tree prefix of it, such as ``decoder.specs(config)`` for a model's; ``None``: the
              layer's. Axes the mesh lacks are ignored
    -> tree   DTensors; every device keeps its own piece, and nothing is sent
    ========  ======================================================================

    Experts lie along ``ep``, and slices of hidden dimensions and heads along ``tp``. The other dimension of
    every matrix is cut along ``dp``, or ``dp`` and ``ep``, and gathered where it is used.

    Raises ``ValueError`` listing every spec that doesn't fit its tensor.

    >>> import fmoe
    >>> params = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=16)
    >>> fmoe.shard_params(params, fmoe.make_mesh()).experts.w_in.placements
    (Replicate(), Shard(dim=3), Shard(dim=0), Shard(dim=2))
    """
    if specs is None:
        if not isinstance(params, MoEParams):
            got, expected = f"None, for a {type(params).__name__}", "specs, unless params are MoEParams"
            remedy = "Pass decoder.specs(config) for a model's params."
            raise argument_error("shard_params", "specs", got=got, expected=expected, remedy=remedy)
        specs = of_layer(params, PLACED)
    return distribute(params, specs, mesh)
