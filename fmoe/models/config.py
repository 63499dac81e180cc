"""The sizes and hyper-parameters of a decoder with mixture-of-experts layers."""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol

import torch

from ..errors import argument_error
from ..ops.route import RouterConfig
from ..ops.segments import Segments
from .checks import check_sizes
from .rotary import Angles, Rotary


class Attention(Protocol):
    """What a decoder asks of its attention: :class:`~fmoe.models.mla.MLA` or :class:`~fmoe.models.gqa.GQA`.

    It is a frozen dataclass. ``widths`` are the dimensions of a head's query and key, and of its value.

    >>> from fmoe.models.decoder import preset
    >>> attention: Attention = preset("30B-A3B").attention
    >>> attention.num_heads, attention.num_kv_heads, attention.widths
    (32, 4, (128, 128))
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # for dataclasses.replace

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def rope(self) -> Rotary: ...
    @property
    def widths(self) -> tuple[int, int]: ...
    def specs(self, dim: int) -> Any: ...
    def forward(
        self,
        params: Any,
        x: torch.Tensor,
        table: Angles,
        norm_eps: float,
        segments: Segments | tuple[()] = (),
        precision: str | None = None,
    ) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and hyper-parameters of a model: attention and experts, layer after layer.

    The first ``num_dense_layers`` have no experts but one SwiGLU of ``hidden_dim``. ``moe_hidden_dim``
    belongs to one expert. With ``shared_gate``, a sigmoid of the token weighs the shared experts. With
    ``tied_head`` the embedding is also the head. A ``balance_loss`` above 0 weighs
    :func:`fmoe.ops.balance.balance_loss`, which the loss adds for every MoE layer. ``mtp_layers`` modules of
    multi-token prediction, each with an MoE layer, predict tokens after the next: an option of the loss.

    Raises ``ValueError`` for sizes that don't fit together.

    >>> from fmoe.models.decoder import preset
    >>> wider = dataclasses.replace(preset("debug"), dim=256)
    >>> wider.dim, wider.num_layers, wider.attention.num_heads
    (256, 4, 4)
    """

    vocab_size: int
    dim: int
    num_layers: int
    attention: Attention
    moe_hidden_dim: int
    num_experts: int
    router: RouterConfig
    max_seq_len: int
    num_dense_layers: int = 0
    hidden_dim: int = 0
    num_shared_experts: int = 0
    shared_gate: bool = False
    tied_head: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    balance_loss: float = 0.0
    mtp_layers: int = 0

    def __post_init__(self) -> None:
        error = functools.partial(argument_error, "DecoderConfig")
        check_sizes(self, least=dict(num_dense_layers=0, hidden_dim=0, num_shared_experts=0, mtp_layers=0))
        if self.num_dense_layers > self.num_layers:
            expected = f"at most num_layers={self.num_layers}"
            raise error("num_dense_layers", got=self.num_dense_layers, expected=expected)
        if self.num_dense_layers and not self.hidden_dim:
            raise error("hidden_dim", got=0, expected="that of the dense layers, at least 1")
        if self.shared_gate and not self.num_shared_experts:
            expected = "False without shared experts"
            raise error("shared_gate", got=True, expected=expected)
        if self.num_dense_layers < self.num_layers or self.mtp_layers:
            self.router.check(self.num_experts, "DecoderConfig")


def without_noise(config: DecoderConfig) -> DecoderConfig:
    """The same configuration, whose router has no noise: to evaluate a model or publish it, without a key.

    >>> from fmoe.models.decoder import preset
    >>> noisy = dataclasses.replace(preset("debug"), router=RouterConfig(noise=0.1))
    >>> noisy.router.noise, without_noise(noisy).router.noise
    (0.1, 0.0)
    """
    return dataclasses.replace(config, router=dataclasses.replace(config.router, noise=0.0))
