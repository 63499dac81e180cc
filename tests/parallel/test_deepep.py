"""The DeepEP backend keeps the laws, on a stand-in for DeepEP."""

import contextlib
import functools
import itertools
import types

import deep_ep_double
import optree
import pytest
import torch
from devices import bare_mesh
from helpers import quick
from laws import ranks_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fmoe import RouterConfig, combine, dispatch, expand, reduce, route
from fmoe.models.moe import COMPUTING, moe_layer
from fmoe.ops.dispatch import layout
from fmoe.parallel import deepep
from fmoe.parallel.backends import bounds
from fmoe.parallel.backends.deepep import buffers as deepep_buffers
from fmoe.parallel.backends.deepep import elastic, operators
from fmoe.parallel.spec import known_axes
from fmoe.testing import check_backend
from fmoe.testing.backend import LAWS
from fmoe.testing.samples import error
from fmoe.testing.setting import Setting, case_of

DIM, EXPERTS, TOP_K = 256, 8, 3
SIZES = dict(dim=DIM, top_k=TOP_K, num_experts=EXPERTS)
GENERATIONS = {"buffer": 1, "elastic": 2}
MOST = [name for name in LAWS if name not in ("compilation", "no_leak")]


@contextlib.contextmanager
def opened(axes, kind, *, peers=8, tokens=8, payloads=(torch.bfloat16, torch.float32), **how):
    """A mesh, and DeepEP's stand-in along ``ep``; afterwards no buffer is left."""
    deep_ep_double.install(GENERATIONS[kind], payloads=payloads, peers=peers)
    live, mesh = deep_ep_double.Settings.live, bare_mesh(axes)
    with deepep(mesh["ep"], max_tokens_per_rank=tokens, kind=kind, **SIZES, **how) as backend:
        yield mesh, backend
    assert deep_ep_double.Settings.live == live, "a buffer wasn't freed"


def obey(axes, kind, dtype, laws, how=()):
    with opened(axes, kind, **dict(how)) as (mesh, backend):
        check_backend(backend, mesh, dtype=dtype, any_order=kind == "elastic", laws=laws, **SIZES)


@pytest.mark.parametrize(
    ("kind", "axes"),
    quick(
        [("buffer", "ep=1"), ("elastic", "ep=2")],
        itertools.product(GENERATIONS, ["ep=1", "ep=2", "ep=4"]),
    ),
)
def test_it_keeps_the_laws(pool, axes, kind):
    """In float32, which the stand-in permits."""
    pool.run(int(axes[-1]), obey, axes, kind, torch.float32, MOST)


NEVER_WAITS = {"host_sync": False}


@pytest.mark.parametrize(
    ("kind", "axes"),
    quick(
        [("buffer", "ep=2")],
        itertools.product(GENERATIONS, ["ep=1", "ep=2", "ep=4", "dp=2,ep=2"]),
    ),
)
def test_it_keeps_the_laws_where_the_host_never_waits(pool, kind, axes):
    pool.run(ranks_of(axes), obey, axes, kind, torch.float32, MOST, NEVER_WAITS)


def test_elastic_rows_that_did_not_come_reach_nothing(pool):
    pool.run(2, obey, "ep=2", "elastic", torch.float32, ["oracle", "adjoint", "unused_rows"], NEVER_WAITS)


class Silent:
    """Buffers of two devices that give tensors without values, as kernels do that are still running."""

    def get_dispatch_layout(self, ids, num_experts):
        return *torch.zeros(3, 2, dtype=torch.int32), torch.zeros(len(ids), 2, dtype=torch.bool), None

    def dispatch(self, x, topk_idx=None, topk_weights=None, handle=None, **how):
        given = x if isinstance(x, tuple) else (x,)
        rows, tokens = tuple(t.new_empty(16, t.shape[1]) for t in given), len(given[0])
        rows = rows if isinstance(x, tuple) else rows[0]
        index = functools.partial(torch.zeros, dtype=torch.int32)
        choices = [t if t is None else t.new_empty(16, t.shape[1]) for t in (topk_idx, topk_weights)]
        if "num_max_tokens_per_rank" in how or hasattr(handle, "topk_idx"):
            named = dict.fromkeys((*elastic._TENSORS, elastic._SORTED), index(2))
            named |= dict(topk_idx=topk_idx, num_experts=8, num_max_tokens_per_rank=8, num_sms=4)
            return rows, *choices, types.SimpleNamespace(**named), None
        prefixes = index(2, 2), index(2, 10), index(2, 10)
        made = *prefixes, index(16), torch.zeros(tokens, 2, dtype=torch.bool), index(tokens, 2)
        return rows, *choices, [], made, None


def silent(kind):
    engine = object.__new__(deepep_buffers.ENGINES[kind])
    vars(engine).update(buffer=Silent(), id_dtype=torch.int64, size=2, rank=1, within_node=True, num_sms=4)
    vars(engine).update(configs=(None, None), make_handle=lambda **fields: types.SimpleNamespace(**fields))
    return engine


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_no_number_on_the_device_is_read(monkeypatch, kind, narrow):
    held = types.SimpleNamespace(group=None, ready=lambda *_: silent(kind))
    monkeypatch.setattr(operators, "find", lambda name: held)
    monkeypatch.setattr(operators, "agree", lambda *_: None)
    monkeypatch.setattr(operators, "check_ids", lambda *_: None)  # looks at the CPU's tensors only
    monkeypatch.setattr(bounds, "layout_kernel", layout.raw)  # the CPU's, unlike the GPU's, sorts by values
    with FakeTensorMode():
        x, weights, ids = torch.randn(5, DIM), torch.rand(5, 2), torch.zeros(5, 2, dtype=torch.int64)
        x_SD, _, slot_R, *_, overflow = operators._bounded_kernel(x, weights, ids, 8, 2, narrow, 8, 9, "")
        assert (len(x_SD), len(slot_R), overflow.shape) == (16, 9, ())
        came = silent(kind).dispatch(x, weights, ids, 8, 8)
        assert silent(kind).send(x, came.handle).shape == x_SD.shape


def pairs_without_room(kind):
    """The layer with room for too few pairs, and with enough: what had none, and how far it is off."""
    found = []
    for capacity in (0.5, 1.0):
        with opened("ep=2", kind, host_sync=False, capacity=capacity) as (mesh, backend):
            s = Setting(mesh, backend, torch.float32, 8, DIM, EXPERTS, TOP_K)
            params, x = s.random_params(shared=False), s.rows(8)

            def body(x, params=params):
                routing = route(params.router, x, RouterConfig(top_k=TOP_K, force_balance=True))
                x_SD, plan = dispatch(x, routing, axis="ep")
                assert (plan.row_SK < len(plan.slot_R)).all() and plan.offsets_e[-1] <= len(plan.slot_R)
                weights = routing.weights_TK.sum(1, keepdim=True)
                return combine(reduce(expand(x_SD, plan), plan), plan), x * weights, plan.overflow[None]

            y, want, overflow = s.inside(body)(x)
            found.append((overflow.sum().item(), error(y, want)))
    return found


@pytest.mark.parametrize("kind", GENERATIONS)
def test_pairs_without_room_are_counted(pool, kind):
    for few, enough in pool.run(2, pairs_without_room, kind):
        assert few[0] > 0 and few[1] > 1e-3
        assert enough[0] == 0 and enough[1] < 1e-5


@pytest.mark.parametrize("kind", quick(["buffer"], GENERATIONS))
def test_it_keeps_the_laws_in_bfloat16(pool, kind):
    pool.run(2, obey, "ep=2", kind, torch.bfloat16, MOST)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, NEVER_WAITS])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_it_compiles(pool, kind, how):
    pool.run(2, obey, "ep=2", kind, torch.float32, ["compilation"], how)


def test_it_keeps_the_laws_across_nodes(pool):
    """Of two devices each, by Buffer's kernels for that."""
    laws = ["oracle", "degenerate", "second", "adjoint", "plans"]
    pool.run(4, obey, "ep=4", "buffer", torch.float32, laws, {"peers": 2})


def test_it_keeps_the_laws_beside_data_parallelism(pool):
    pool.run(4, obey, "dp=2,ep=2", "buffer", torch.float32, ["oracle", "adjoint", "recomputation"])


def with_and_without_overlap(kind):
    """The layer's output and gradients."""
    case, found = None, []
    for overlap in (True, False):
        with opened("ep=2", kind, overlap=overlap) as (mesh, backend):
            s = Setting(mesh, backend, torch.bfloat16, 8, DIM, EXPERTS, TOP_K)
            case = (case or case_of(s))._replace(setting=s)
            found.append((s.forward(*case.mine()), torch.func.grad(case.loss(), (0, 1))(*case.mine())))
    return error(*found)


def with_padding(kind):
    """How far the layer's output is from that without the padding, and what the padding gets."""
    with opened("ep=2", kind) as (mesh, backend):
        s = Setting(mesh, backend, torch.float32, 8, DIM, EXPERTS, TOP_K)
        params, x = case_of(s).mine()
        valid = torch.arange(len(x)) % 3 == 0
        specs = optree.tree_map(lambda spec: known_axes(spec, mesh), COMPUTING._replace(shared_gate=()))
        params, specs = (tree._replace(shared=()) for tree in (params, specs))

        def layer(x, *valid):
            return s.inside(lambda p, x: moe_layer(p, x, s.config, *valid)[0], specs)(params, x)

        y, alone = layer(x, valid), layer(x[valid])
        return error(y[valid], alone), y[~valid].abs().max().item()


@pytest.mark.parametrize("kind", GENERATIONS)
def test_padding_goes_to_no_expert(pool, kind):
    for off, padding in pool.run(2, with_padding, kind):
        assert off < 1e-5 and padding == 0


@pytest.mark.parametrize("kind", GENERATIONS)
def test_overlap_changes_nothing(pool, kind):
    """Not a bit where rows come in the same order."""
    assert max(pool.run(2, with_and_without_overlap, kind)) <= (0 if kind == "buffer" else 1e-2)


def test_it_keeps_the_laws_without_overlap(pool):
    pool.run(2, obey, "ep=2", "buffer", torch.float32, ["oracle", "plans"], {"overlap": False})


def many_forwards(kind, number, **how):
    with opened("ep=2", kind, **how) as (mesh, backend):
        check_backend(backend, mesh, dtype=torch.bfloat16, forwards=number, laws=["no_leak"], **SIZES)


@pytest.mark.parametrize(
    ("kind", "number"),
    quick([("buffer", 90), ("elastic", 30)], [("buffer", 90), ("elastic", 30), ("buffer", 1000)]),
)
def test_many_forwards_leave_nothing_behind(pool, kind, number):
    pool.run(2, many_forwards, kind, number)


@pytest.mark.parametrize("number", quick([30], [30, 1000]))
def test_many_forwards_without_a_wait_leave_nothing_behind(pool, number):
    pool.run(2, functools.partial(many_forwards, host_sync=False), "buffer", number)
