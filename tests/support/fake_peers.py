"""Peers of the benchmark, with the signatures of the real ones, in plain PyTorch."""

import pathlib

PRODUCT = '''
import torch


def grouped(x, w, counts):
    """Rows of each expert times its matrix (in, out)."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, w)])
'''

TORCHTITAN_0_2 = {
    "torchtitan/models/moe/moe.py": PRODUCT
    + """
from dataclasses import dataclass


@dataclass
class MoEArgs:
    num_experts: int = 8
    num_shared_experts: int = 1
    score_func: str = "sigmoid"
    route_norm: bool = False
    route_scale: float = 1.0
    score_before_experts: bool = True
    top_k: int = 1
    use_grouped_mm: bool = True
    load_balance_coeff: float | None = 1e-3


class GroupedExperts(torch.nn.Module):
    def __init__(self, dim, hidden_dim, num_experts, use_grouped_mm):
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = torch.nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = torch.nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(self, x, num_tokens_per_expert):
        gate, up = (grouped(x, w.mT, num_tokens_per_expert) for w in (self.w1, self.w3))
        return grouped(torch.nn.functional.silu(gate) * up, self.w2.mT, num_tokens_per_expert)


class MoE(torch.nn.Module):
    def __init__(self, moe_args, dim, hidden_dim):
        super().__init__()
        assert not moe_args.num_shared_experts and not moe_args.score_before_experts
        num_experts = moe_args.num_experts
        self.experts = GroupedExperts(dim, hidden_dim, num_experts, moe_args.use_grouped_mm)
        self.router = torch.nn.Linear(dim, num_experts)
        self.expert_bias = None if moe_args.load_balance_coeff is None else torch.zeros(num_experts)
        self.register_buffer("tokens_per_expert", torch.zeros(num_experts), persistent=False)

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        scores, ids, counts = self.router(flat, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        order = ids.view(-1).argsort(stable=True)
        rows = self.experts(flat[order // self.router.top_k], counts)
        rows = torch.zeros_like(rows).index_copy(0, order, rows).unflatten(0, (-1, self.router.top_k))
        return (rows * scores[:, :, None]).sum(1).view(x.shape)
""",
}

TORCHTITAN_0_3 = {
    "torchtitan/models/common/moe.py": PRODUCT
    + """
from dataclasses import dataclass


class GroupedExperts(torch.nn.Module):
    @dataclass(kw_only=True)
    class Config:
        dim: int
        hidden_dim: int
        num_experts: int

    def __init__(self, config):
        super().__init__()
        sizes = config.num_experts, config.hidden_dim, config.dim
        self.w1_EFD = torch.nn.Parameter(torch.empty(sizes))
        self.w2_EDF = torch.nn.Parameter(torch.empty(sizes).mT)
        self.w3_EFD = torch.nn.Parameter(torch.empty(sizes))


class RoutedExperts(torch.nn.Module):
    @dataclass(kw_only=True)
    class Config:
        inner_experts: GroupedExperts.Config
        token_dispatcher: object

    def __init__(self, config):
        super().__init__()
        self.inner_experts = GroupedExperts(config.inner_experts)
        self.top_k = config.token_dispatcher.top_k

    def forward(self, x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E):
        x, counts, w = x_BLD.flatten(0, 1), num_local_tokens_per_expert_E, self.inner_experts
        order = topk_expert_ids_BLK.view(-1).argsort(stable=True)
        token = order // self.top_k
        gate, up = (grouped(x[token], each.mT, counts) for each in (w.w1_EFD, w.w3_EFD))
        rows = grouped(torch.nn.functional.silu(gate) * up, w.w2_EDF.mT, counts)
        rows = rows * topk_scores_BLK.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, token, rows).view(x_BLD.shape)
""",
    "torchtitan/models/common/token_dispatcher.py": """
from dataclasses import dataclass


class LocalTokenDispatcher:
    @dataclass(kw_only=True)
    class Config:
        num_experts: int
        top_k: int
""",
}

SCATTERMOE = {
    "scattermoe/parallel_experts.py": PRODUCT
    + """

def flatten_sort_count(expert_idxs, num_experts):
    flat = expert_idxs.flatten()
    sorted_idxs, order = flat.sort()
    return sorted_idxs, order, flat.bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
    expert_biases=None, gates=None, grouped_in=False, grouped_out=False,
):
    counts = expert_offsets.diff(prepend=expert_offsets.new_zeros(1))
    rows = grouped(inputs if grouped_in else inputs[sorted_scattered_idxs // k], expert_weights, counts)
    if grouped_out:
        return rows
    rows = torch.zeros_like(rows).index_copy(0, sorted_scattered_idxs, rows)
    return (gates[:, None] @ rows.unflatten(0, gates.shape))[:, 0]
""",
}

SONICMOE = {
    "sonicmoe/enums.py": """
from enum import Enum


class ActivationType(Enum):
    SWIGLU = "swiglu"
""",
    "sonicmoe/functional.py": PRODUCT
    + '''

def moe_general_routing_inputs(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
    is_inference_mode_enabled=False,
):
    """Gate and up are interleaved; token_indices ascend."""
    assert activation_type.value == "swiglu" and b1 is b2 is None
    assert (token_indices.diff() >= 0).all() and token_indices.dtype == expert_indices.dtype == torch.int32
    counts, order = expert_indices.bincount(minlength=E), expert_indices.argsort()
    token = token_indices[order]
    h = grouped(x[token], w1.permute(2, 1, 0), counts)
    rows = grouped(torch.nn.functional.silu(h[:, ::2]) * h[:, 1::2], w2.permute(2, 1, 0), counts)
    return torch.zeros_like(x).index_add(0, token, rows * router_scores[order, None]), counts
''',
}


def write(folder: pathlib.Path, *peers: dict[str, str]) -> None:
    """Packages that can be imported from ``folder``."""
    for path, text in (item for peer in peers for item in peer.items()):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for parent in file.relative_to(folder).parents:
            if parent.name:
                (folder / parent / "__init__.py").touch()


def replaced(peer: dict[str, str], old: str, new: str) -> dict[str, str]:
    """The peer with another text somewhere."""
    assert any(old in text for text in peer.values())
    return {path: text.replace(old, new) for path, text in peer.items()}
