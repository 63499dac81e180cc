"""Tokens dispatched in fp8: rounded on their way, with the derivatives of a dispatch that doesn't round."""

import contextlib
import dataclasses
import re

import deep_ep_double
import laws
import optree
import pytest
import torch
from devices import bare_mesh
from helpers import quick
from laws import own, whole
from test_deepep import opened

import fmoe
from fmoe.errors import TransformError
from fmoe.introspect import raw_calls, wire_bytes
from fmoe.models import decoder
from fmoe.models.moe import COMPUTING, moe_layer
from fmoe.ops.core.axes import Group, group_of
from fmoe.ops.precision import BLOCKWISE, ROWWISE, rounded
from fmoe.parallel import AllToAll, Backend, Bound
from fmoe.parallel.backends.deepep import buffers as deepep_buffers
from fmoe.parallel.collectives import group_alone
from fmoe.parallel.spec import known_axes
from fmoe.testing import check_backend
from fmoe.testing.samples import dot, error, same_bits
from fmoe.testing.setting import Setting
from fmoe.training import gradients

TOKENS = 8
# By name: the kind of backend, whether the host waits, and how long a token is.
WAYS = {
    "exact": ("all_to_all", True, 24),
    "exact, odd": ("all_to_all", True, 7),
    "bounded": ("all_to_all", False, 24),
    "buffer": ("buffer", True, 256),
    "buffer, bounded": ("buffer", False, 256),
    "elastic": ("elastic", True, 256),
    "elastic, bounded": ("elastic", False, 256),
}
SOME = ["exact", "bounded", "buffer, bounded", "elastic"]


@contextlib.contextmanager
def setting(way, dtype=torch.float32, axes="ep=2", peers=8):
    """A mesh, a backend with a payload, and the sizes to try it with."""
    kind, waits, dim = WAYS[way]
    sizes = dtype, TOKENS, dim, 8, 3
    if kind == "all_to_all":
        mesh = bare_mesh(axes)
        backend = AllToAll(group_of(mesh, ("ep",)), None if waits else Bound(TOKENS), payload="fp8")
        yield Setting(mesh, backend, *sizes)
        return
    how = dict(payloads=(torch.bfloat16, torch.float32, torch.float64), peers=peers, host_sync=waits)
    with opened(axes, kind, payload="fp8", **how) as (mesh, backend):
        yield Setting(mesh, backend, *sizes, any_order=kind == "elastic")


def as_sent(way, x):
    """The tokens that arrive, by the reference of products in fp8."""
    return rounded(x, ROWWISE if WAYS[way][0] == "all_to_all" else BLOCKWISE).to(x.dtype)


class Rounded(torch.autograd.Function):
    """Tokens as they arrive, straight-through."""

    @staticmethod
    def forward(x, way):
        return as_sent(way, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g, None

    @staticmethod
    def jvp(ctx, t, _):
        return t.clone()


def layers(s, way):
    """The routed layer over the backend, and over one that sends tokens rounded first as they are."""
    specs = optree.tree_map(
        lambda spec: known_axes(spec, s.mesh), COMPUTING._replace(shared=(), shared_gate=())
    )

    def rounding(params, x):
        return moe_layer(params, x, s.config)[0]

    def rounded_first(params, x):
        return moe_layer(params, Rounded.apply(x, way), lambda p, _: fmoe.route(p, x, s.config))[0]

    plain = s._replace(backend=s.backend._replace(payload=None))
    return s.inside(rounding, specs), plain.inside(rounded_first, specs)


def inputs(s):
    """Parameters and this device's tokens, other ones and fewer on each further device."""
    params = s.held(s.random_params(shared=False)._replace(shared=(), shared_gate=()))
    x = torch.randn(s.place.size, TOKENS, s.dim)[s.place.position, s.place.position :]
    return params, x.to(s.dtype)


def scalar(layer):
    return lambda params, x: layer(params, x).sin().sum()


def apart(s, got, want):
    """How many bits differ; where rows come in any order, whether numbers differ by more than rounding."""
    return float(error(got, want) > 1e-5) if s.any_order else same_bits(got, want)


# ---- values and derivatives ----------------------------------------------------------------------------

TRANSFORMS = {
    "value": lambda layer, at, t: layer(*at),
    "grad": lambda layer, at, t: torch.func.grad(scalar(layer), (0, 1))(*at),
    "autograd": lambda layer, at, t: fmoe.value_and_grad(scalar(layer), (0, 1))(*at),
    "jvp": lambda layer, at, t: torch.func.jvp(layer, at, t),
    "grad(grad)": lambda layer, at, t: torch.func.grad(
        lambda *at: dot(torch.func.grad(scalar(layer), (0, 1))(*at), t), (0, 1)
    )(*at),
    "jvp(grad)": lambda layer, at, t: torch.func.jvp(torch.func.grad(scalar(layer), (0, 1)), at, t),
    "remat, recomputed": lambda layer, at, t: fmoe.value_and_grad(
        scalar(fmoe.remat(layer, fmoe.save_nothing)), (0, 1)
    )(*at),
}


def transformed(way):
    with setting(way) as s:
        fast, plain = layers(s, way)
        at = inputs(s)
        tangents = optree.tree_map(torch.randn_like, at)
        found = {}
        for name, fn in TRANSFORMS.items():
            got, want = (fn(layer, at, tangents) for layer in (fast, plain))
            # Terms of second derivatives are summed in another order.
            found[name] = float(error(got, want) > 1e-5) if "(grad)" in name else apart(s, got, want)
        exact = s._replace(backend=s.backend._replace(payload=None))
        assert error(fast(*at), layers(exact, way)[0](*at)) > 1e-3  # than which nothing is rounded
        with pytest.raises(TransformError, match="Tokens and routes of every example"):
            torch.vmap(lambda x: fast(at[0], x))(at[1][None])
        return found


@pytest.mark.parametrize("way", quick(SOME, WAYS))
def test_values_and_derivatives_are_those_of_rounded_tokens(pool, way):
    for found in pool.run(2, transformed, way):
        assert not any(found.values()), found


def on_four_devices(way, axes):
    with setting(way, axes=axes, peers=2) as s:  # two nodes
        at = inputs(s)
        return same_bits(*(torch.func.grad(scalar(layer), (0, 1))(*at) for layer in layers(s, way)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "axes"),
    [("exact", "ep=4"), ("exact", "dp=2,ep=2"), ("exact", "ep=2,tp=2"), ("buffer", "ep=4")],
)
def test_they_are_on_any_mesh(pool, way, axes):
    assert not any(pool.run(4, on_four_devices, way, axes))


def kept_and_recomputed(way):
    """How often tokens are sent, and what differs from keeping them, by policy."""
    with setting(way) as s:
        (layer, _), at, sends, found = layers(s, way), inputs(s), {}, {}
        want = fmoe.value_and_grad(scalar(layer), (0, 1))(*at)
        for name, policy in {"default": None, "full": fmoe.save_nothing}.items():
            remat = fmoe.remat(layer) if policy is None else fmoe.remat(layer, policy)
            with raw_calls() as calls:
                got = fmoe.value_and_grad(scalar(remat), (0, 1))(*at)
            sends[name] = sum(n for op, n in calls.items() if op.startswith(("exchange", "deepep_dispatch")))
            found[name] = apart(s, got, want)
        return sends, found


@pytest.mark.parametrize("way", quick(["exact", "buffer, bounded"], WAYS))
def test_remat_keeps_what_was_rounded(pool, way):
    for sends, found in pool.run(2, kept_and_recomputed, way):
        assert sends == {"default": 1, "full": 2} and not any(found.values()), found


def compiled(way):
    with setting(way) as s:
        torch._dynamo.reset()
        (layer, _), found = layers(s, way), []
        fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            at = inputs(s)
            got, want = (fmoe.value_and_grad(scalar(fn), (0, 1))(*at) for fn in (fast, layer))
            found.append(error(got, want))
        return max(found)


@pytest.mark.parametrize("way", quick(["bounded"], WAYS))
def test_it_compiles(pool, way):
    assert max(pool.run(2, compiled, way, timeout=240)) < 1e-5


# ---- what is rounded -----------------------------------------------------------------------------------


def arrived(way, dtype):
    """What arrives of unusual tokens that all go to the second device, beside what is expected."""
    with setting(way, dtype) as s:
        x = torch.randn(TOKENS, s.dim)
        x[1], x[2, 3], x[3] = 0, 1000, x[3] * 1e-4
        x[4, 5], x[5, 6], x[6, 1] = torch.inf, torch.nan, -torch.inf
        x = x.to(dtype).mT.contiguous().mT  # which need not lie one after another
        ids = torch.full((TOKENS, 1), 5)
        routing = fmoe.Routing(
            ids, torch.ones(TOKENS, 1), torch.bincount(ids[:, 0], minlength=8), torch.rand(TOKENS, 8)
        )
        x_SD, plan = s.backend.dispatch(x, routing)
        found = x_SD[plan.slot_R[plan.slot_R >= 0]]
        others = x_SD[(plan.row_SK < 0).all(1)]
        return found, torch.cat([as_sent(way, x)] * 2), others


def sorted_rows(x):
    """Rows in an order that depends on nothing but their numbers."""
    bits = x.contiguous().view(torch.uint8).flatten(1).tolist()
    return x[torch.tensor(sorted(range(len(x)), key=bits.__getitem__), dtype=torch.int64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", quick(SOME, WAYS))
def test_tokens_arrive_as_products_in_fp8_take_them(pool, way, dtype):
    """Zeros, infinite numbers and NaN included; a row that nobody sent is zeros."""
    (nothing, _, others), (found, want, others_there) = pool.run(2, arrived, way, dtype)
    assert len(nothing) == 0 and not others.any() and not others_there.any()
    found, want = sorted_rows(found), sorted_rows(want)
    assert torch.equal(found.isnan(), want.isnan()) and found.isnan().any() and found.isinf().any()
    assert torch.equal(found.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def untouched(way):
    """The laws in float64, and which bits differ from a dispatch that doesn't round."""
    with setting(way, torch.float64) as s:
        laws = ["oracle", "adjoint", "second", "transforms", "plans"]
        check_backend(s.backend, s.mesh, dtype=torch.float64, dim=s.dim, any_order=s.any_order, laws=laws)
        plain, at = s._replace(backend=s.backend._replace(payload=None)), inputs(s)
        return apart(s, *(layers(either, way)[0](*at) for either in (s, plain)))


@pytest.mark.parametrize("way", quick(["exact, odd", "bounded"], ["exact", "exact, odd", "bounded"]))
def test_float64_is_not_rounded(pool, way):
    assert not any(pool.run(2, untouched, way))


def test_what_is_no_payload_raises():
    backend = AllToAll(Group(group_alone(), 1, 0), payload="fp4")
    text = "AllToAll: payload: got 'fp4', expected one of ('fp8',), or None: tokens travel in their own dtype"
    router = fmoe.moe_init(0, dim=8, hidden_dim=8, num_experts=4).router
    routing = fmoe.route(router, torch.randn(3, 8), fmoe.RouterConfig())
    for start in (backend.dispatch, backend.dispatch_start):
        with pytest.raises(ValueError, match=re.escape(text)):
            start(torch.randn(3, 8), routing)


# ---- a model whose layers take halves of their sequences in turn ----------------------------------------

WIDE = dataclasses.replace(laws.MODEL, dim=256, num_layers=2)
IN_HALVES = {
    "exact": Backend("all_to_all"),
    "bounded": Backend("all_to_all", host_sync=False, max_tokens=2 * 9),
    "deepep exact": Backend("deepep"),
    "deepep bounded": Backend("deepep", host_sync=False, max_tokens=2 * 9),
}


def in_halves(way):
    """How far a model's gradients are from those of whole sequences, both with and without the payload."""
    deep_ep_double.install(1, payloads=(torch.bfloat16, torch.float32))
    mesh = bare_mesh("ep=2")
    params = decoder.init(WIDE, 7, mesh=mesh)
    batch = [own(torch.randint(WIDE.vocab_size, (4, 9)), mesh) for _ in range(2)]

    def grads(**how):
        (loss, _), found = gradients.of_model(WIDE, mesh, backend=IN_HALVES[way]._replace(**how))(
            params, *batch
        )
        return whole((loss, found))

    want = grads(payload="fp8")
    found = error(grads(payload="fp8", in_halves=True), want), error(grads(in_halves=True), want)
    deepep_buffers.free_kept()
    return found


@pytest.mark.parametrize("way", quick(["exact", "deepep bounded"], IN_HALVES))
def test_halves_are_rounded_like_whole_sequences(pool, way):
    for off, without in pool.run(2, in_halves, way, timeout=240):
        assert off < 1e-4 < 1e-3 < without


# ---- what travels, and among whom ----------------------------------------------------------------------


def sent_bytes(dim, dtype, payload, bounded):
    """The bytes of a dispatch, its rows, and the bytes of all else."""
    mesh = bare_mesh("ep=2")
    backend = AllToAll(group_of(mesh, ("ep",)), Bound(TOKENS) if bounded else None, payload=payload)
    ids = torch.tensor([[0, 7]] * TOKENS)
    routing = fmoe.Routing(ids, torch.rand(TOKENS, 2), torch.bincount(ids.flatten()), torch.rand(TOKENS, 8))
    x = torch.randn(TOKENS, dim).to(dtype).requires_grad_()
    with wire_bytes() as there:
        x_SD, plan = backend.dispatch(x, routing)
    with wire_bytes() as back:
        backend.combine(x_SD, plan).sum().backward()
    return there["exchange_bounded" if bounded else "exchange"].sent, {k: v.sent for k, v in back.items()}


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_dispatch_sends_a_byte_a_number(pool, dtype, bounded):
    dim = 64 * int(torch.randint(16, 32, ()))
    narrow, wide = (pool.run(2, sent_bytes, dim, dtype, payload, bounded) for payload in ("fp8", None))
    for (few, back), (many, back_as_ever) in zip(narrow, wide):
        assert many == TOKENS * (dim * dtype.itemsize + 2 * 4 + 2 * 8)
        assert few == TOKENS * (dim + 4 + 2 * 4 + 2 * 8)
        assert few / many == pytest.approx(1 / dtype.itemsize, rel=0.05)
        assert back == back_as_ever and sum(back.values()) >= 3 * TOKENS * dim * dtype.itemsize


def differing(way):
    """What devices say if only the first sends in fp8."""
    with setting(way) as s:
        backend = s.backend._replace(payload=None if s.mesh.get_rank() else "fp8")
        ids = torch.arange(5).expand(4, 5)  # as no other test has, or devices would have compared before
        routing = fmoe.Routing(ids, torch.ones(4, 5), torch.tensor([4] * 5 + [0] * 3), torch.rand(4, 8))
        with pytest.raises(ValueError, match="Give all devices the same") as caught:
            backend.dispatch(torch.randn(4, s.dim), routing)
        return str(caught.value)


@pytest.mark.parametrize("way", quick(["exact", "bounded", "buffer", "elastic, bounded"], WAYS))
def test_devices_that_differ_all_raise(pool, way):
    for rank, text in enumerate(pool.run(2, differing, way)):
        assert text.startswith("dispatch: x_TD, routing: got rows of ")
        assert ("torch.float32 in fp8" in text) == (rank == 0)
        assert f"and others on the devices [{1 - rank}] of the axis" in text
