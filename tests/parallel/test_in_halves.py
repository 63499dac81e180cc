"""Layers that take halves of a device's sequences in turn: right, in the meant order, or an error."""

import dataclasses
import re
import weakref
from unittest import mock

import deep_ep_double
import laws
import optree
import pytest
import torch
from devices import bare_mesh
from helpers import error, lossless, quick
from laws import MODELS, Where, own, ranks_of, whole
from test_laws import hold
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe.errors import TransformError
from fmoe.models import decoder
from fmoe.ops.core.axes import group_of
from fmoe.parallel import Backend, deepep
from fmoe.parallel.backends import at_once, in_parts
from fmoe.parallel.backends.deepep import buffers as deep_ep_buffers
from fmoe.parallel.collectives import group_alone
from fmoe.parallel.placement import token_axes
from fmoe.plan import plan
from fmoe.training import gradients, options
from fmoe.training.launch import World
from fmoe.transforms import per_layer

LENGTH = 9
WAYS = {
    "exact": Backend("all_to_all", in_halves=True),
    "bounded": Backend("all_to_all", host_sync=False, max_tokens=2 * LENGTH, in_halves=True),
}
DEEPEP = {
    "deepep exact": Backend("deepep", in_halves=True),
    "deepep bounded": Backend("deepep", host_sync=False, max_tokens=2 * LENGTH, in_halves=True),
}
# Auxiliary losses, and experts that pad nothing away.
CONFIG = dataclasses.replace(MODELS["GQA"], balance_loss=0.1, init_std=0.3)


def setting(axes, rows=3, config=CONFIG):
    """A mesh, params on one device and spread, and tokens, targets and segment ids of ``rows`` a device."""
    mesh = bare_mesh(axes)
    number = rows * group_of(mesh, token_axes(mesh)).size
    params, spread = (decoder.init(config, 7, dtype=torch.float64, mesh=m) for m in (None, mesh))
    tokens, targets = (torch.randint(config.vocab_size, (number, LENGTH)) for _ in range(2))
    ids = torch.randint(1, 3, (number, LENGTH)).cumsum(1)
    ids[torch.rand(number) < 0.5, LENGTH - 3 :] = 0  # padding
    return mesh, params, spread, (tokens, targets, ids)


# ---- right ---------------------------------------------------------------------------------------------


def as_in_one_process(axes, way, remats):
    mesh, params, spread, batch = setting(axes)
    mine, found = [own(t, mesh) for t in batch], {}
    for kind, number in (("segments", 3), ("whole rows", 2)):
        (value, stats), want = gradients.of_model(CONFIG)(params, *batch[:number])
        for remat in remats:
            step = gradients.of_model(CONFIG, mesh, backend=WAYS[way], per_layer=per_layer(remat))
            with lossless():
                (got, counted), grads = step(spread, *mine[:number])
            name = f"{kind}, remat {remat}"
            found[f"loss, {name}"] = error(whole(got), value)
            found[f"balance, {name}"] = error(whole(counted.balance), stats.balance)
            found[f"gradients, {name}"] = error(whole(grads), want, unit=1e-2)
            assert value > 1 and 0.1 < stats.balance < value
            pairs = [*zip(map(whole, counted.layers), stats.layers)]
            assert all(torch.equal(a.tokens_per_expert, b.tokens_per_expert) for a, b in pairs)
            found[f"entropy, {name}"] = (
                error([a.router_entropy for a, _ in pairs], [b.router_entropy for _, b in pairs]) / 1e6
            )
    assert not in_parts._COMING
    return found


MESHES = ["ep=2", "ep=4", "dp=2,ep=2", "ep=2,tp=2"]
CASES = [(axes, way) for axes in MESHES for way in WAYS]


@pytest.mark.parametrize(("axes", "way"), quick([("ep=2", "exact"), ("dp=2,ep=2", "bounded")], CASES))
def test_gradients_and_statistics_are_those_of_one_process(pool, axes, way, slow):
    remats = ["none", "default", "default+offload:experts_grouped_mm"]
    remats += ["default+compress:attention,experts_grouped_mm"]
    remats += ["full", "save:attention"] if slow else []
    for found in pool.run(ranks_of(axes), as_in_one_process, axes, way, remats, timeout=240):
        assert max(found.values()) < 1e-12, found


def with_noise(way):
    config = dataclasses.replace(CONFIG, router=dataclasses.replace(CONFIG.router, noise=0.5))
    mesh, params, spread, batch = setting("ep=2", config=config)
    mine, key = [own(t, mesh) for t in batch], fmoe.random.key(3)
    (value, stats), want = gradients.of_model(config)(params, *batch, key=key)
    (got, counted), grads = gradients.of_model(config, mesh, backend=WAYS[way])(spread, *mine, key=key)
    loads = zip(map(whole, counted.layers), stats.layers)
    assert all(torch.equal(a.tokens_per_expert, b.tokens_per_expert) for a, b in loads)
    return {"loss": error(whole(got), value), "gradients": error(whole(grads), want, unit=1e-2)}


@pytest.mark.parametrize("way", quick(["exact"], WAYS))
def test_a_token_draws_its_noise_in_either_half(pool, way):
    for found in pool.run(2, with_noise, way):
        assert max(found.values()) < 1e-12, found


def on_uneven_devices(way, rows):
    mesh, params, spread, _ = setting("ep=2")
    rank, total = group_of(mesh, ("ep",)).position, sum(rows)
    tokens, targets = (torch.randint(CONFIG.vocab_size, (total, LENGTH)) for _ in range(2))
    here = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    want = gradients.of_model(CONFIG)(params, tokens, targets)[1]
    got = gradients.of_model(CONFIG, mesh, backend=WAYS[way])(spread, tokens[here], targets[here])[1]
    return {"gradients": error(whole(got), want, unit=1e-2)}


@pytest.mark.parametrize("way", quick(["exact"], WAYS))
def test_devices_may_have_different_numbers_of_sequences(pool, way):
    for rows in ([1, 4], [3, 2]):
        for found in pool.run(2, on_uneven_devices, way, rows):
            assert found["gradients"] < 1e-12


def other_ways_to_differentiate(way):
    """``torch.func.grad``, and how far the gradient of a gradient is off, or its error."""
    mesh, params, spread, batch = setting("ep=2", rows=2)
    mine = [own(t, mesh) for t in batch[:2]]

    def loss(params, *batch, mesh=None, backend="auto"):
        return decoder.loss(params, *batch, CONFIG, mesh, backend=backend)[0]

    def steep(params, *batch, **how):
        grads = torch.func.grad(loss)(params, *batch, **how)
        return sum((g.pow(2).sum() for g in optree.tree_leaves(grads)[1:4]), 0.0)

    how = {"mesh": mesh, "backend": WAYS[way]}
    first = torch.func.grad(loss)(spread, *mine, **how)
    found = {"first": error(whole(first), torch.func.grad(loss)(params, *batch[:2]), unit=1e-2)}
    try:
        second = torch.func.grad(steep)(spread, *mine, **how)
    except TransformError as refused:
        return found, str(refused)
    found["second"] = error(whole(second), torch.func.grad(steep)(params, *batch[:2]), unit=1e-2)
    return found, ""


@pytest.mark.parametrize(
    ("way", "refused"), [("exact", "cannot be differentiated a second time"), ("bounded", "")]
)
def test_gradients_by_torch_func_and_of_gradients(pool, way, refused):
    for found, error_text in pool.run(2, other_ways_to_differentiate, way):
        assert max(found.values()) < 1e-11, found
        assert refused in error_text and bool(refused) == bool(error_text)


def compiled(way):
    mesh, params, spread, batch = setting("ep=2", rows=2)
    torch._dynamo.reset()
    wrap = lambda layer: torch.compile(fmoe.remat(layer), fullgraph=True, backend="aot_eager")  # noqa: E731
    step = gradients.of_model(CONFIG, mesh, backend=WAYS[way], per_layer=wrap)
    found = []
    for _ in range(2):
        grads = step(spread, *[own(t, mesh) for t in batch[:2]])[1]
        found.append(error(whole(grads), gradients.of_model(CONFIG)(params, *batch[:2])[1], unit=1e-2))
        batch = [t.roll(1, 1) for t in batch]
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_layers_are_compiled_with_both_halves(pool, way):
    assert max(pool.run(2, compiled, way, timeout=240)) < 1e-12


WIDE = dataclasses.replace(CONFIG, dim=256)  # what DeepEP takes


def install(kind):
    """DeepEP's stand-in; two devices are two nodes where it shall use an ``ElasticBuffer``."""
    generation, peers = {"buffer": (1, 8), "elastic": (2, 1)}[kind]
    deep_ep_double.install(generation, payloads=(torch.float32, torch.float64), peers=peers)


def over_deepep(kind, way, remats):
    install(kind)
    mesh, params, spread, batch = setting("ep=2", config=WIDE)
    mine, found = [own(t, mesh) for t in batch], {}
    (value, stats), want = gradients.of_model(WIDE)(params, *batch)
    for remat in remats:
        step = gradients.of_model(WIDE, mesh, backend=DEEPEP[way], per_layer=per_layer(remat))
        (got, counted), grads = step(spread, *mine)
        found[f"loss, remat {remat}"] = error(whole(got), value)
        found[f"gradients, remat {remat}"] = error(whole(grads), want, unit=1e-2)
        loads = zip(map(whole, counted.layers), stats.layers)
        assert all(torch.equal(a.tokens_per_expert, b.tokens_per_expert) for a, b in loads)
    assert not in_parts._COMING
    assert [deep_ep_buffers.find(name).kind for name in deep_ep_buffers.names()] == [kind]
    return found


@pytest.mark.parametrize("way", DEEPEP)
@pytest.mark.parametrize("kind", ["buffer", "elastic"])
def test_rows_travel_over_deepep_too(pool, kind, way, slow):
    for found in pool.run(2, over_deepep, kind, way, ["none", "full", "default"] if slow else ["none"]):
        assert max(found.values()) < 1e-5, found  # weights travel in float32


def whose_memory_is_used_again():
    install("buffer")
    sizes = dict(dim=256, top_k=2, num_experts=4)
    ids = torch.rand(64, 4).argsort(1)[:, :2].contiguous()
    x, weights = torch.randn(64, 256), torch.rand(64, 2)
    with deepep(bare_mesh("ep=2")["ep"], max_tokens_per_rank=64, **sizes) as whole:
        routing = fmoe.Routing(ids, weights, torch.bincount(ids.flatten(), minlength=4), torch.rand(64, 4))
        want = whole.dispatch(x.clone(), routing)[0]
        backend = whole._replace(in_halves=True)
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            coming = backend.dispatch_start(x, routing)
            for t in (x, ids, weights):
                t.zero_()
            return error(backend.dispatch_join(backend.dispatch_send(coming))[0], want)


def test_compiled_code_may_write_at_once_to_what_a_dispatch_was_given(pool):
    assert pool.run(2, whose_memory_is_used_again) == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("law", [laws.model, laws.compiled_layers])
@pytest.mark.parametrize("way", WAYS)
def test_the_models_laws_hold_on_gpus(pool, way, law):
    hold(pool, law, Where("ep=2", WAYS[way], "cuda"), "GQA", timeout=240)


def compiled_by_inductor(way, remat, device):
    where = Where("ep=2", way, device)
    mesh, rows = where.mesh(), 2
    params = decoder.init(CONFIG, 7, dtype=where.dtype, mesh=mesh)
    batch = [own(torch.randint(CONFIG.vocab_size, (2 * rows, LENGTH)), mesh) for _ in range(2)]
    how = {"mesh": mesh, "backend": way}
    want = gradients.of_model(CONFIG, **how)(params, *batch)[1]
    layers = per_layer(remat, compiled=True)
    got = gradients.of_model(CONFIG, **how, per_layer=layers)(params, *batch)[1]
    return error(whole(got), whole(want), unit=1e-2)


COMPILED = {"exact": Backend("all_to_all"), **{f"{name} in halves": way for name, way in WAYS.items()}}


@pytest.mark.parametrize("remat", ["full", "default"])
@pytest.mark.parametrize("way", quick(COMPILED if torch.cuda.is_available() else [], COMPILED))
def test_layers_that_inductor_compiles_give_the_same_gradients(pool, way, remat):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for found in pool.run(2, compiled_by_inductor, COMPILED[way], remat, device, timeout=240):
        assert found < 1e-10


# ---- in the order that was meant ------------------------------------------------------------------------

# A is the first half, of two sequences, and B the second, of one.
FORWARD = {
    "exact": [
        "attention A", "pack", "pack", "attention B", "post", "post", "pack", "pack",
        "end_post", "end_post", "experts_up", "post", "post", "begin_send_back",
        "end_post", "end_post", "experts_up", "begin_send_back", "end_send_back", "end_send_back",
    ],
    "bounded": [
        "attention A", "begin_send", "begin_send", "attention B", "begin_send", "begin_send",
        "end_send", "end_send", "experts_up", "begin_send_back",
        "end_send", "end_send", "experts_up", "begin_send_back", "end_send_back", "end_send_back",
    ],
    "deepep exact": [
        "attention A", "deepep_pack", "attention B", "deepep_post", "deepep_pack",
        "deepep_end_dispatch", "experts_up", "deepep_post", "deepep_begin_back",
        "deepep_end_dispatch", "experts_up", "deepep_begin_back", "deepep_end_back", "deepep_end_back",
    ],
    "deepep bounded": [
        "attention A", "deepep_pack", "deepep_post", "attention B", "deepep_pack", "deepep_post",
        "deepep_end_dispatch", "experts_up", "deepep_begin_back",
        "deepep_end_dispatch", "experts_up", "deepep_begin_back", "deepep_end_back", "deepep_end_back",
    ],
}  # fmt: skip
BACKWARD = [
    "begin_send", "begin_send", "end_send", "experts_up_backward", "begin_send_back", "begin_send_back",
    "end_send", "experts_up_backward", "begin_send_back", "begin_send_back",
    "end_send_back", "end_send_back", "attention_backward B",
    "end_send_back", "end_send_back", "attention_backward A",
]  # fmt: skip
DEEPEP_BACKWARD = [
    "deepep_begin_send", "deepep_begin_send",
    "deepep_end_send", "experts_up_backward", "deepep_begin_both_back",
    "deepep_end_send", "experts_up_backward", "deepep_begin_both_back",
    "deepep_end_both_back", "attention_backward B", "deepep_end_both_back", "attention_backward A",
]  # fmt: skip
NAMES = {name.partition(" ")[0] for some in (*FORWARD.values(), BACKWARD, DEEPEP_BACKWARD) for name in some}


class Order(TorchDispatchMode):
    """What runs, in order; where it is attention, for which half."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        if name in NAMES and func.namespace == "fmoe":
            half = (" A" if len(out[0]) == 2 else " B") if name.startswith("attention") else ""
            self.ran.append(name + half)
        return out


def order_of(way, remat, by_torch_func):
    config = dataclasses.replace(CONFIG, num_layers=1, num_dense_layers=0)
    if way in DEEPEP:
        install("buffer")
        config = dataclasses.replace(config, dim=256)
    mesh, _, spread, batch = setting("ep=2", config=config)
    mine, how = (
        [own(t, mesh) for t in batch[:2]],
        {"backend": (WAYS | DEEPEP)[way], "per_layer": per_layer(remat)},
    )
    with Order() as order:
        if by_torch_func:
            torch.func.grad(lambda p: decoder.loss(p, *mine, config, mesh, **how)[0])(spread)
        else:
            gradients.of_model(config, mesh, **how)(spread, *mine)
    return order.ran


@pytest.mark.parametrize("by_torch_func", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_one_half_computes_while_rows_of_the_other_travel(pool, way, by_torch_func):
    for ran in pool.run(2, order_of, way, "none", by_torch_func):
        assert ran == FORWARD[way] + BACKWARD


@pytest.mark.parametrize("way", DEEPEP)
def test_the_order_over_deepep_is_the_same(pool, way):
    for ran in pool.run(2, order_of, way, "none", False):
        assert ran == FORWARD[way] + DEEPEP_BACKWARD


@pytest.mark.parametrize("way", WAYS)
def test_what_is_recomputed_is_so_in_the_same_order(pool, way):
    for ran in pool.run(2, order_of, way, "full", False):
        assert ran == FORWARD[way] * 2 + BACKWARD
    kept = [name for name in FORWARD[way] if name.startswith(("attention", "experts"))]
    for ran in pool.run(2, order_of, way, "default", False):  # nothing travels twice
        assert [name for name in ran if name not in kept] == [
            name for name in FORWARD[way] + BACKWARD if name not in kept
        ]


def begun_and_ended(way, compiled):
    """Which exchanges begin and end in a step of one layer, in order; and how far gradients are off."""
    found, begin, end = [], in_parts.begin_swap, in_parts.arrived

    def begin_noted(*args):
        found.append(f"begin {args[-1]}")
        return begin(*args)

    def end_noted(rows):
        found.append("end")
        return end(rows)

    torch._dynamo.reset()
    config = dataclasses.replace(CONFIG, num_layers=1, num_dense_layers=0)
    mesh, params, spread, batch = setting("ep=2", config=config)
    mine, wrap = [own(t, mesh) for t in batch[:2]], per_layer("none", compiled=compiled)
    step = gradients.of_model(config, mesh, backend=WAYS[way], per_layer=wrap)
    in_parts.begin_swap, in_parts.arrived = begin_noted, end_noted
    try:
        grads = step(spread, *mine)[1]
    finally:
        in_parts.begin_swap, in_parts.arrived = begin, end
    return found, error(whole(grads), gradients.of_model(config)(params, *batch[:2])[1], unit=1e-2)


@pytest.mark.slow  # it takes Inductor
@pytest.mark.parametrize("way", WAYS)
def test_compiled_layers_have_the_same_order(pool, way):
    plain, compiled = (pool.run(2, begun_and_ended, way, kind, timeout=300) for kind in (False, True))
    for (order, _), (again, off) in zip(plain, compiled):
        assert again == order and "end" in order and off < 1e-12


# ---- or an error ----------------------------------------------------------------------------------------


def test_what_has_not_begun_cannot_arrive():
    like = torch.randn(3, 2)
    rows = in_parts.ticket(like, "rows")
    assert rows.shape == (0, 2) and in_parts.taken(rows.detach()) == "rows"
    for lost in (rows, rows.clone(), in_parts.ticket(like, "rows") + 0):
        with pytest.raises(
            RuntimeError, match="got a ticket of no rows, expected one that was begun and not"
        ):
            in_parts.taken(lost)
    in_parts._COMING.clear()


def test_rows_whose_ticket_is_lost_are_not_kept():
    like, lost = torch.randn(3, 2), [torch.randn(5, 2) for _ in range(4)]
    alive = [*map(weakref.ref, lost)]
    tickets = [in_parts.ticket(like, rows) for rows in lost]
    del tickets, lost  # as where an error comes before they are waited for
    rows = in_parts.ticket(like, "rows")
    assert not any(rows() is not None for rows in alive)
    assert in_parts.taken(rows) == "rows" and not in_parts._COMING


def test_other_transforms_are_refused():
    x, sent, group = torch.randn(4, 3), at_once._sent_example(), group_alone()
    parts = {
        "begin_send": lambda t: in_parts.begin_send(t, *sent, group, False),
        "begin_send_back": lambda t: in_parts.begin_send_back(t, *sent, group, False),
        "pack": lambda t: in_parts.pack(t, *sent[:2], group, False),
    }
    for name, begin in parts.items():
        refused = "cannot run under torch.func.{}. Its exchanges can't be in flight there"
        with pytest.raises(TransformError, match=re.escape(f"{name}: {refused.format('jvp')}")):
            torch.func.jvp(begin, (x,), (x,))
        with pytest.raises(TransformError, match=re.escape(f"{name}: {refused.format('vmap')}")):
            torch.vmap(begin)(x[None])
        while in_parts._COMING:
            in_parts.arrived(in_parts._COMING.popitem()[1])


def test_a_layer_alone_and_a_plan_are_refused():
    params, x = fmoe.moe_init(0, dim=8, hidden_dim=16, num_experts=12), torch.randn(5, 8)
    with pytest.raises(
        ValueError, match="moe_forward: backend: got in_halves, expected a backend without it"
    ):
        fmoe.moe_forward(params, x, backend=WAYS["exact"])
    with pytest.raises(
        ValueError, match="plan: backend: got in_halves, expected a backend without in_halves"
    ):
        plan(CONFIG, "ep=2", batch_size=4, seq_len=8, backend=WAYS["exact"])


def test_on_one_device_there_is_nothing_to_halve():
    params = decoder.init(CONFIG, 0)
    tokens = torch.randint(CONFIG.vocab_size, (3, LENGTH))
    halves, whole = (
        decoder.loss(params, tokens, tokens, CONFIG, backend=b)[0] for b in (WAYS["exact"], "auto")
    )
    assert torch.equal(halves, whole)


def test_the_option_asks_for_halves_and_room_for_one():
    options.add_layout(parser := options.Parser())
    words = ["--ep-overlap", "--ep-capacity", "2", "--ep-backend", "all_to_all", "--ep-payload", "fp8"]
    args = parser.parse_args(words)
    args.batch_size, args.seq_len = 5, 8
    layout = options.Layout.of(args, World(None, (0, 1)))
    assert layout.how["backend"] == Backend("all_to_all", in_halves=True, payload="fp8")
    assert layout.bounded == Backend("all_to_all", False, 2.0, max_tokens=24, in_halves=True, payload="fp8")
