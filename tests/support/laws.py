"""The laws of ``moe_forward`` and the model on a mesh, each a function that every rank runs: for any backend.

A law builds the same random layer and tokens on every rank (the pool seeds them alike), takes this rank's
part, and returns the errors it found, by name; the test says how large they may be. What backends promise by
themselves is in ``fmoe.testing``.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from devices import bare_mesh, sizes_of
from helpers import CONFIGS, dot, error, random_layer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

import fmoe
from fmoe import P
from fmoe.bench.timing import syncs
from fmoe.introspect import raw_calls
from fmoe.models import deepseek_v3
from fmoe.models.gqa import GQA
from fmoe.models.rotary import Rotary
from fmoe.ops.core.axes import Group, group_of
from fmoe.ops.reference import moe_reference
from fmoe.parallel import Backend, distribute
from fmoe.parallel.backends import choose
from fmoe.parallel.placement import token_axes
from fmoe.testing import check_backend
from fmoe.testing.samples import same_bits
from fmoe.training import data, gradients, optim
from fmoe.transforms import per_layer

DIM = 8


@dataclass(frozen=True)
class Where:
    """What a law is to hold on."""

    axes: str
    backend: str | Backend = "all_to_all"
    device: str = "cpu"
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        name = self.backend if isinstance(self.backend, str) else self.backend.name
        return f"{self.device}-{name}-{self.axes}"

    def mesh(self) -> Any:
        torch._dynamo.reset()
        torch.set_default_device(self.device)
        return bare_mesh(self.axes, self.device)

    def layer(self, shared: int = 1) -> fmoe.MoEParams:
        params = random_layer(dim=DIM, hidden=4, shared=shared)
        return optree.tree_map(lambda t: t.to(self.dtype) if t.dtype == torch.float64 else t, params)

    def forward(self, mesh: Any, config: fmoe.RouterConfig) -> Callable[..., Any]:
        return lambda p, x: fmoe.moe_forward(p, x, mesh, router=config, backend=self.backend)


def alone(config: fmoe.RouterConfig) -> Callable[..., Any]:
    return lambda p, x: fmoe.moe_forward(p, x, router=config)


def whole(tree: Any) -> Any:
    return optree.tree_map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, tree)


def loss_of(fn: Callable[..., Any], weigh: Any) -> Callable[..., Any]:
    return lambda p, x: (fn(p, x).sin() * weigh).sum()


def own(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    return distribute(x, P(token_axes(mesh)), mesh).to_local()


def second(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the squared norm of a loss's gradient."""
    first = torch.func.grad(loss, (0, 1))
    return torch.func.grad(lambda p, x: dot(first(p, x), first(p, x)), (0, 1))


# ---- laws 1 and 2: the oracle, on any mesh ---------------------------------------------------------


def oracle(where: Where, config_name: str, order: int = 1) -> dict[str, float]:
    """Values, statistics, gradients and second ones of DTensors, against the dense oracle."""
    mesh, config, params = where.mesh(), CONFIGS[config_name], where.layer()
    if config.force_balance:  # round robin from each device's first token: the same for multiples of E
        shape, spec = (32, DIM), P(token_axes(mesh))
    else:
        shape, spec = (2, 8, DIM), P(None, token_axes(mesh))
    x, weigh = torch.randn(shape, dtype=where.dtype), torch.randn(shape, dtype=where.dtype)
    spread, dx, dw = fmoe.shard_params(params, mesh), distribute(x, spec, mesh), distribute(weigh, spec, mesh)
    ids = fmoe.route(params.router, x.view(-1, DIM), config).expert_ids_TK
    expected = lambda p, x: moe_reference(p, x, config, ids)  # noqa: E731
    fn = where.forward(mesh, config)
    y, stats = fmoe.moe_forward(spread, dx, mesh, router=config, backend=where.backend, return_stats=True)
    found = {"value": error(whole(y), expected(params, x))}
    theirs = fmoe.moe_forward(params, x, router=config, return_stats=True)[1]
    found["stats"] = error(whole(stats)[:3], theirs[:3])
    assert error(stats.router_entropy, theirs.router_entropy) < 1e-6  # float32
    g = torch.func.grad(loss_of(fn, dw), (0, 1))(spread, dx)
    assert [t.placements for t in optree.tree_leaves(g)] == [
        t.placements for t in optree.tree_leaves((spread, dx))
    ]
    reference = torch.func.grad(loss_of(expected, weigh), (0, 1))(params, x)
    found["grad"] = error(whole(g), reference)
    by_autograd = fmoe.value_and_grad(loss_of(fn, dw), (0, 1))(spread, dx)[1]
    found["autograd"] = error(whole(by_autograd), reference)
    if order == 2:
        gg = second(loss_of(fn, dw))(spread, dx)
        found["second"] = error(whole(gg), second(loss_of(expected, weigh))(params, x))
    return found


def plain_tokens(where: Where, counts: list[int]) -> dict[str, float]:
    """Plain tokens, as many on each device as ``counts`` says, with params plain and spread."""
    mesh, config, params = where.mesh(), CONFIGS["sigmoid, groups"], where.layer()
    place = group_of(mesh, token_axes(mesh))
    starts = [sum(counts[:i]) for i in range(place.size + 1)]
    mine = slice(starts[place.position], starts[place.position + 1])
    x, weigh = (torch.randn(starts[-1], DIM, dtype=where.dtype) for _ in range(2))
    spread = fmoe.shard_params(params, mesh)
    computed = P("ep", None, "tp"), P(None, "tp")
    specs = fmoe.MoEParams(P(), *computed)
    local = optree.tree_map(lambda t: t.to_local(), distribute(params, specs, mesh))
    fn, found = where.forward(mesh, config), {}
    reference = torch.func.grad(loss_of(alone(config), weigh), (0, 1))(params, x)
    for kind, p in (("spread", spread), ("plain", local)):
        found[f"value, {kind}"] = error(fn(p, x[mine]), alone(config)(params, x)[mine])
        g_p, g_x = torch.func.grad(loss_of(fn, weigh[mine]), (0, 1))(p, x[mine])
        found[f"tokens, {kind}"] = error(g_x, reference[1][mine])
        want = reference[0]
        if kind == "plain":
            want = optree.tree_map(lambda t: t.to_local(), distribute(want, specs, mesh))
        found[f"params, {kind}"] = error(whole(g_p), want)
    return found


# ---- transforms, recomputation, compilation ---------------------------------------------------------


def backend(where: Where, names: list[str]) -> None:
    """What ``fmoe.testing`` says of a backend."""
    mesh = where.mesh()
    bound = choose("check_backend", where.backend, mesh).get("ep")
    check_backend(bound, mesh, dtype=where.dtype, dim=16, laws=names)


def gathering(where: Where) -> dict[str, float]:
    """Parameters gathered for a layer are gathered again in the backward under remat, and not kept."""
    mesh, config, params = where.mesh(), CONFIGS["sigmoid, groups"], where.layer()
    spread, x = fmoe.shard_params(params, mesh), torch.randn(4, DIM, dtype=where.dtype)
    fn, calls, grads = where.forward(mesh, config), [], []
    for layer in (fn, fmoe.remat(fn)):
        with raw_calls() as counted:
            grads.append(fmoe.value_and_grad(loss_of(layer, 1.0), (0, 1))(spread, x))
        calls.append(counted.get("gather_params", 0))
    assert calls[1] == 2 * calls[0] > 0
    return {"bits": same_bits(*map(whole, grads))}


def compilation(where: Where, and_remat: bool) -> dict[str, float]:
    """Whole, forward and backward, once for any routing and number of tokens."""
    mesh, config, params = where.mesh(), CONFIGS["sigmoid, groups"], where.layer()
    spread, found = fmoe.shard_params(params, mesh), {}
    torch._dynamo.utils.counters.clear()
    fn = where.forward(mesh, config)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for rows in (8, 12, 4):
        x = torch.randn(rows, DIM, dtype=where.dtype)
        want = fmoe.value_and_grad(loss_of(fn, 1.0), (0, 1))(spread, x)
        got = fmoe.value_and_grad(loss_of(compiled, 1.0), (0, 1))(spread, x)
        found[f"{rows} tokens"] = error(whole(got), whole(want))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, graphs  # one for the first size, one for all others
    if and_remat and torch.__version__ >= "2.12":  # before, Dynamo takes remat inside shard_map only
        remat = torch.compile(fmoe.remat(fn), fullgraph=True, backend="aot_eager")
        got = fmoe.value_and_grad(loss_of(remat, 1.0), (0, 1))(spread, x)
        found["remat"] = error(whole(got), whole(want))
    return found


def synced(where: Where) -> int:
    """How often the host waits for the device in forward and backward of a layer (CUDA)."""
    mesh, config, params = where.mesh(), CONFIGS["sigmoid, groups"], where.layer()
    spread, x = fmoe.shard_params(params, mesh), torch.randn(64, DIM, dtype=where.dtype)
    step = fmoe.value_and_grad(loss_of(where.forward(mesh, config), 1.0), (0, 1))
    step(spread, x)
    return syncs(lambda: step(spread, x))


def ranks_of(axes: str) -> int:
    n = 1
    for size in sizes_of(axes).values():
        n *= size
    return n


# ---- training --------------------------------------------------------------------------------------

MODEL = deepseek_v3.DeepSeekV3Config(
    vocab_size=32,
    dim=16,
    num_layers=3,
    num_dense_layers=1,
    hidden_dim=16,
    num_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    moe_hidden_dim=8,
    num_experts=8,
    num_shared_experts=1,
    router=CONFIGS["sigmoid, groups"],
    max_seq_len=16,
)
_GROUPED = GQA(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head", bias="all", rope=Rotary(2))
MODELS = {
    "MLA": MODEL,
    "GQA": dataclasses.replace(MODEL, attention=_GROUPED, shared_gate=True, tied_head=True),
    "GQA, norm over all heads": dataclasses.replace(
        MODEL, attention=dataclasses.replace(_GROUPED, qk_norm="all", bias="none")
    ),
}


def model(where: Where, name: str = "MLA") -> dict[str, float]:
    """The model's logits, loss and gradients, with DTensors and with this device's own tokens."""
    mesh, found, config = where.mesh(), {}, MODELS[name]
    place = group_of(mesh, token_axes(mesh))
    params = deepseek_v3.init(config, 7, dtype=where.dtype)
    spread = deepseek_v3.init(config, 7, dtype=where.dtype, mesh=mesh)
    found["initial values"] = error(whole(spread), params)
    batch = [torch.randint(config.vocab_size, (2 * place.size, 9)) for _ in range(2)]
    batch[1][0, 3] = -100  # a target that doesn't count
    spec = P(token_axes(mesh))
    logits = deepseek_v3.forward(spread, distribute(batch[0], spec, mesh), config, mesh)[0]
    found["logits"] = error(whole(logits), deepseek_v3.forward(params, batch[0], config)[0])
    loss = lambda p, *batch, **how: deepseek_v3.loss(p, *batch, config, **how)[0]  # noqa: E731
    expected = torch.func.grad(loss)(params, *batch)
    how = {"mesh": mesh, "backend": where.backend}
    for kind, cut in (("DTensors", lambda t: distribute(t, spec, mesh)), ("plain", lambda t: own(t, mesh))):
        mine = [cut(t) for t in batch]
        value = loss(spread, *mine, **how)
        assert isinstance(value, DTensor) == (kind == "DTensors")
        found[f"loss of {kind}"] = error(whole(value), loss(params, *batch))
        got = torch.func.grad(loss)(spread, *mine, **how)
        same_places = [g.placements == p.placements for g, p in zip(*map(optree.tree_leaves, (got, spread)))]
        assert all(same_places)
        found[f"gradient of {kind}"] = error(whole(got), expected)
    for remat in ("full", "default", "save:attention"):
        how["per_layer"] = per_layer(remat)
        got = fmoe.value_and_grad(loss)(spread, *mine, **how)[1]
        found[f"gradient with remat {remat}"] = error(whole(got), expected)
    return found


def how_often(where: Where, name: str = "MLA") -> dict[str, float]:
    """Gradients of micro-batches, however often parameters travel, beside those of one process."""
    mesh, found, config = where.mesh(), {}, MODELS[name]
    place = group_of(mesh, token_axes(mesh))
    params = deepseek_v3.init(config, 7, dtype=where.dtype)
    spread = deepseek_v3.init(config, 7, dtype=where.dtype, mesh=mesh)
    tokens, targets = (torch.randint(config.vocab_size, (3 * place.size, 9)) for _ in range(2))
    targets[0], targets[1, 4:], targets[-1, :7] = -100, -100, -100
    ids = torch.tensor([[1] * 9, [1] * 4 + [2] * 5, [7] * 6 + [0] * 3]).repeat(place.size, 1)
    alone = gradients.of_model(config, micro_batches=2)
    (value, stats), want = alone(params, tokens, targets, segment_ids=ids)
    calls = [(1, 1, own), (1, 2, own), (2, 2, own), (3, 2, own), (1, 2, spread_over), (3, 2, spread_over)]
    for zero, parts, cut in calls:
        step = gradients.of_model(config, mesh, micro_batches=parts, zero=zero, backend=where.backend)
        rows = {"segment_ids": cut(ids, mesh)}
        (got, counted), grads = step(spread, cut(tokens, mesh), cut(targets, mesh), **rows)
        same = zip(*map(optree.tree_leaves, (grads, spread)))
        assert all(g.placements == p.placements and g.dtype == p.dtype for g, p in same)
        kind = f"zero {zero} of {parts} parts"
        found[f"value, {kind}"] = error(whole((got, counted.num_targets)), (value, stats.num_targets))
        loads = [tuple(layer.tokens_per_expert for layer in s.layers) for s in (counted, stats)]
        found[f"loads, {kind}"] = error(*map(whole, loads))
        found[f"gradient, {kind}"] = error(whole(grads), want)
    return found


def spread_over(tensor: Any, mesh: Any) -> Any:
    return distribute(tensor, P(token_axes(mesh)), mesh)


def compiled_layers(where: Where, name: str = "MLA") -> dict[str, float]:
    """The model's gradients with layers that are compiled and recomputed, and how many were compiled."""
    mesh, config = where.mesh(), MODELS[name]
    params = deepseek_v3.init(config, 7, dtype=where.dtype)
    spread = deepseek_v3.init(config, 7, dtype=where.dtype, mesh=mesh)
    rows = 2 * group_of(mesh, token_axes(mesh)).size
    batch = [torch.randint(config.vocab_size, (rows, 9)) for _ in range(2)]
    loss = lambda p, *batch, **how: deepseek_v3.loss(p, *batch, config, **how)[0]  # noqa: E731
    counter = CompileCounterWithBackend("aot_eager")
    compiled = lambda layer: torch.compile(fmoe.remat(layer), fullgraph=True, backend=counter)  # noqa: E731
    how = {"mesh": mesh, "backend": where.backend, "per_layer": compiled}
    for _ in range(2):  # routing changes from step to step
        got = fmoe.value_and_grad(loss)(spread, *(own(t, mesh) for t in batch), **how)[1]
        error_of_step = error(whole(got), torch.func.grad(loss)(params, *batch))
        batch = [torch.randint(config.vocab_size, (rows, 9)) for _ in range(2)]
    kinds = 2  # a dense layer and one with experts
    return {"gradient": error_of_step, "compilations too many": counter.frame_count - kinds}


def train(where: Where | None, steps: int = 10, name: str = "MLA") -> tuple[list[float], float]:
    """The losses of a small model's first steps, here or on a mesh, and its parameters' norm (float32)."""
    mesh, config = where.mesh() if where else None, MODELS[name]
    how = {"mesh": mesh, "backend": where.backend} if where else {}
    place = group_of(mesh, token_axes(mesh)) if mesh is not None else Group("", 1, 0)
    seeded = torch.Generator().manual_seed(3)
    text = torch.randint(config.vocab_size, (500,), generator=seeded, device="cpu")
    params = deepseek_v3.init(config, 7, dtype=torch.float64, mesh=mesh)
    optimizer = optim.adamw()
    state, losses = optimizer.init(params), []
    step_of = fmoe.value_and_grad(deepseek_v3.loss, has_aux=True)
    for step in range(steps):
        batch = data.batch_at(step, text, batch_size=8, seq_len=9, seed=1, part=(place.position, place.size))
        batch = [t.to(params.embedding.device) for t in batch]
        (loss, stats), grads = step_of(params, *batch, config, **how)
        params, state = optimizer.update(params, grads, state, 1e-2, donate=True)
        params = deepseek_v3.update_biases(params, stats, 0.01)
        losses.append(loss.item())
    return losses, optim.global_norm(params).item()
