"""The sizes and hyper-parameters of a DeepSeek model, and those that were published."""

import dataclasses
import functools
import math
from typing import Any

from ..errors import argument_error
from ..ops.route import RouterConfig


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary positions stretched to a context longer than the one trained on (YaRN, arXiv 2309.00071).

    ====================  ========================================
    factor                how many times longer the context becomes
    original_max_seq_len  positions of the original context
    beta_fast             pairs that turn at least this often there keep their frequency
    beta_slow             pairs that turn at most this often there are slowed by ``factor``
    mscale                multiplies cosines and sines by ``magnitude(mscale)``
                          over ``magnitude(mscale_all_dim)``
    mscale_all_dim        multiplies the softmax's scale by ``magnitude(mscale_all_dim)`` squared
    ====================  ========================================

    Raises ``ValueError`` for numbers out of range. With ``mscale_all_dim`` 0, ``mscale`` must be 1, since the
    two published implementations disagree about other values.

    >>> round(Yarn(factor=40, original_max_seq_len=4096).magnitude(0.707), 4)
    1.2608
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("factor", self.factor >= 1, "at least 1"),
            ("original_max_seq_len", self.original_max_seq_len >= 1, "at least 1"),
            ("beta_slow", 0 < self.beta_slow <= self.beta_fast, f"above 0, to beta_fast={self.beta_fast}"),
            ("mscale", self.mscale > 0, "above 0"),
            ("mscale_all_dim", self.mscale_all_dim > 0 or self.mscale == 1, "above 0, or 0 with mscale=1"),
        ):
            if not ok:
                raise argument_error("Yarn", name, got=getattr(self, name), expected=expected)

    def magnitude(self, mscale: float) -> float:
        """The growth of attention's logits with the length of the context."""
        return 0.1 * mscale * math.log(self.factor) + 1


@dataclasses.dataclass(frozen=True)
class DeepSeekV3Config:
    """Sizes and hyper-parameters of a DeepSeek-V3, or of a DeepSeek-V2, which has softmax scores.

    A ``q_lora_rank`` of 0 means queries without a bottleneck. ``hidden_dim`` belongs to the dense layers,
    ``moe_hidden_dim`` to one expert. With ``tied_head`` the embedding is also the head.

    Raises ``ValueError`` for sizes that don't fit together.

    >>> wider = dataclasses.replace(preset("debug"), dim=256)
    >>> wider.dim, wider.num_layers
    (256, 4)
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
    yarn: Yarn | None = None
    tied_head: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        error = functools.partial(argument_error, "DeepSeekV3Config")
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("num_dense_layers", "q_lora_rank", "num_shared_experts") else 1
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < least):
                raise error(field.name, got=value, expected=f"an integer of at least {least}")
        if self.num_dense_layers > self.num_layers:
            expected = f"at most num_layers={self.num_layers}"
            raise error("num_dense_layers", got=self.num_dense_layers, expected=expected)
        if (odd := self.qk_rope_head_dim) % 2:
            remedy = "Rotary positions turn pairs."
            raise error("qk_rope_head_dim", got=odd, expected="an even number", remedy=remedy)
        if self.num_dense_layers < self.num_layers:
            self.router.check(self.num_experts, "DeepSeekV3Config")


# DeepSeek-V3 routes each token to the best 8 of 256 experts, in the best 4 of 8 groups.
ROUTER = RouterConfig(top_k=8, num_groups=8, top_groups=4, group_best=2, scale=2.5)

# Source: the published configurations; for the initialisation, arXiv 2405.04434 and 2412.19437.
_V2 = DeepSeekV3Config(
    vocab_size=102400,
    dim=5120,
    num_layers=60,
    num_dense_layers=1,
    hidden_dim=12288,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_hidden_dim=1536,
    num_experts=160,
    num_shared_experts=2,
    router=RouterConfig(
        top_k=6, score_func="softmax", num_groups=8, top_groups=3, group_best=1, normalize=False, scale=16.0
    ),
    max_seq_len=163840,
    yarn=Yarn(factor=40, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707),
    init_std=0.006,
)

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
        router=dataclasses.replace(ROUTER, top_k=4, num_groups=4, top_groups=2),
        max_seq_len=1024,
    ),
    "16B": dataclasses.replace(
        _V2,
        dim=2048,
        num_layers=27,
        hidden_dim=10944,
        num_heads=16,
        q_lora_rank=0,
        moe_hidden_dim=1408,
        num_experts=64,
        router=dataclasses.replace(_V2.router, num_groups=1, top_groups=1, scale=1.0),
    ),
    "236B": _V2,
    "671B": dataclasses.replace(
        _V2,
        vocab_size=129280,
        dim=7168,
        num_layers=61,
        num_dense_layers=3,
        hidden_dim=18432,
        moe_hidden_dim=2048,
        num_experts=256,
        num_shared_experts=1,
        router=ROUTER,
        yarn=Yarn(factor=40, original_max_seq_len=4096),
    ),
}


def preset(name: str, *, layers: int | None = None, **sizes: int | None) -> DeepSeekV3Config:
    """A configuration by name: ``debug``, ``16B`` (DeepSeek-V2-Lite), ``236B`` (V2) or ``671B`` (V3).

    With ``layers`` it has only so many, one of them dense. ``sizes`` are other fields to replace, unless they
    are ``None``.

    Raises ``ValueError`` for any other name, and for more layers than the model has.

    >>> preset("debug").num_experts, preset("671B", layers=4).num_dense_layers
    (16, 1)
    >>> preset("debug", dim=64, vocab_size=None).dim
    64
    """
    if name not in PRESETS:
        raise argument_error("preset", "name", got=repr(name), expected=f"one of {sorted(PRESETS)}")
    whole = PRESETS[name]
    given: dict[str, Any] = {field: size for field, size in sizes.items() if size is not None}
    if layers is not None:
        if not 1 <= layers <= whole.num_layers:
            expected, remedy = f"1 to {whole.num_layers}, as {name} has", "Leave it out for all of them."
            raise argument_error("preset", "layers", got=layers, expected=expected, remedy=remedy)
        given |= dict(num_layers=layers, num_dense_layers=min(1, whole.num_dense_layers))
    return dataclasses.replace(whole, **given)
