"""The inputs for the laws of a backend: a mesh, sizes, a random layer, all devices' tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..models.moe import COMPUTING, MoEParams, moe_layer, of_layer
from ..ops.core.axes import Group, group_of
from ..ops.reference import moe_reference
from ..ops.route import RouterConfig, route
from ..ops.transport import Transport
from ..parallel.placement import token_axes
from ..parallel.shard_map import shard_map
from ..parallel.spec import distribute, known_axes
from ..params import P
from .report import Found
from .samples import TOLERANCE, error, random_layer, router_config, widened

PARTS = ("router", "experts", "shared experts", "tokens")


class Setting(NamedTuple):
    """A backend on a mesh, and the sizes to try it with."""

    mesh: DeviceMesh
    backend: Transport | None
    dtype: torch.dtype
    tokens: int
    dim: int
    num_experts: int
    top_k: int
    any_order: bool = False
    forwards: int = 30
    score_before_experts: bool = False

    @property
    def device(self) -> str:
        return self.mesh.device_type

    @property
    def config(self) -> RouterConfig:
        config = router_config(self.num_experts, self.top_k)
        return replace(config, score_before_experts=self.score_before_experts)

    @property
    def along(self) -> Group:
        """The devices that experts lie on."""
        return group_of(self.mesh, ("ep",))

    @property
    def place(self) -> Group:
        """The devices that tokens lie on."""
        return group_of(self.mesh, token_axes(self.mesh))

    @property
    def allowed(self) -> float:
        return TOLERANCE[self.dtype]

    def found(self, what: str, off: float, allowed: float | None = None) -> Found:
        return Found(what, off, self.allowed if allowed is None else allowed, self.mesh.get_rank())

    def rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.dim).to(self.device, self.dtype)

    def random_params(self, shared: bool = True) -> MoEParams:
        sizes = dict(dim=self.dim, hidden_dim=16, num_experts=self.num_experts)
        return random_layer(**sizes, dtype=self.dtype, device=self.device, shared=shared)

    def held(self, params: MoEParams) -> MoEParams:
        """This device's piece of a whole layer's parameters, or of their gradients."""
        return optree.tree_map(
            lambda t: t.to_local(), distribute(params, of_layer(params, COMPUTING), self.mesh)
        )

    def inside(self, fn: Callable[..., Any], *params: Any) -> Callable[..., Any]:
        """``fn`` on the mesh, of params with these specs and each device's own tokens, along the backend."""
        tokens, backends = P(token_axes(self.mesh)), {} if self.backend is None else {"ep": self.backend}
        return shard_map(fn, self.mesh, in_specs=(*params, tokens), out_specs=tokens, backends=backends)

    @property
    def forward(self) -> Callable[..., torch.Tensor]:
        """The layer on the mesh, as a function of each device's own pieces."""
        config = self.config
        specs = optree.tree_map(lambda spec: known_axes(spec, self.mesh), COMPUTING._replace(shared_gate=()))
        return self.inside(lambda params, x: moe_layer(params, x, config)[0], specs)


class Case(NamedTuple):
    """A layer, all devices' tokens, and the factors of its output in the loss."""

    setting: Setting
    params: MoEParams
    counts: list[int]
    x: torch.Tensor
    c: torch.Tensor

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.split(self.counts)[self.setting.place.position]

    def mine(self) -> tuple[MoEParams, torch.Tensor]:
        return self.setting.held(self.params), self.own(self.x)

    def loss(self, layer: Any = None) -> Callable[..., torch.Tensor]:
        """This device's own loss. The derivative is of the sum over devices.

        Its cotangents move little where an output is rounded, however large that is.
        """
        c, layer = self.own(self.c).double(), layer or self.setting.forward
        return lambda p, x: (layer(p, x).double().tanh() * c).sum()

    def dense(self) -> tuple[Callable[..., torch.Tensor], MoEParams, torch.Tensor]:
        """The dense oracle and its arguments, in float64, with the choices of this dtype's router."""
        config = self.setting.config
        ids = route(self.params.router, self.x, config).expert_ids_TK
        return lambda p, x: moe_reference(p, x, config, ids), widened(self.params), self.x.double()

    def dense_loss(self) -> Callable[..., torch.Tensor]:
        dense, c = self.dense()[0], self.c.double()
        return lambda p, x: (dense(p, x).tanh() * c).sum()

    def compared(
        self, got: tuple[Any, Any], expected: tuple[Any, Any], what: str, allowed: float | None = None
    ) -> Iterator[Found]:
        """Compare this device's gradients with its part of the expected ones."""
        (g_params, g_x), (e_params, e_x) = got, expected
        parts = zip(PARTS, (*g_params, g_x), (*self.setting.held(e_params), self.own(e_x)))
        for part, g, e in parts:
            yield self.setting.found(f"{what} by {part}", error(g, e), allowed or 2 * self.setting.allowed)


def case_of(s: Setting, counts: Sequence[int] | None = None) -> Case:
    counts = list(counts or (max(1, s.tokens - 2 * (i % 3)) for i in range(s.place.size)))
    return Case(s, s.random_params(), counts, s.rows(sum(counts)), s.rows(sum(counts)))
