"""The sizes and hyper-parameters of a DeepSeek model, and those that were published."""

import dataclasses

from ..errors import argument_error
from ..ops.route import RouterConfig


@dataclasses.dataclass(frozen=True)
class DeepSeekV3Config:
    """Sizes of a model; names follow the published configuration.

    ``q_lora_rank`` 0 means queries without a bottleneck. ``hidden_dim`` is that of the dense layers,
    ``moe_hidden_dim`` that of one expert. Raises ``ValueError`` for sizes that don't fit together.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_dense_layers: int
    hidden_dim: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_hidden_dim: int
    num_experts: int
    num_shared_experts: int
    router: RouterConfig
    max_seq_len: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    bias_update_rate: float = 0.001

    def __post_init__(self) -> None:
        def error(name: str, expected: str, remedy: str) -> ValueError:
            return argument_error(
                "DeepSeekV3Config", name, got=getattr(self, name), expected=expected, remedy=remedy
            )

        for field in dataclasses.fields(self):
            least = 0 if field.name in ("num_dense_layers", "q_lora_rank", "num_shared_experts") else 1
            if field.type is int and getattr(self, field.name) < least:
                raise error(field.name, f"at least {least}", "Correct it.")
        if self.num_dense_layers > self.num_layers:
            raise error("num_dense_layers", f"at most num_layers={self.num_layers}", "Lower it.")
        if self.qk_rope_head_dim % 2:
            raise error("qk_rope_head_dim", "an even number", "Rotary positions turn pairs.")
        if self.num_dense_layers < self.num_layers:
            self.router.check(self.num_experts, "DeepSeekV3Config")


PRESETS = {
    "debug": DeepSeekV3Config(
        vocab_size=256,
        dim=128,
        num_layers=4,
        num_dense_layers=1,
        hidden_dim=384,
        num_heads=4,
        q_lora_rank=0,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        moe_hidden_dim=64,
        num_experts=16,
        num_shared_experts=1,
        router=RouterConfig(top_k=4, num_groups=4, top_groups=2),
        max_seq_len=1024,
    ),
}


def preset(name: str) -> DeepSeekV3Config:
    """A configuration by name.

    >>> preset("debug").num_experts
    16
    """
    if name not in PRESETS:
        raise argument_error(
            "preset",
            "name",
            got=repr(name),
            expected=f"one of {sorted(PRESETS)}",
            remedy="Choose one of them.",
        )
    return PRESETS[name]
