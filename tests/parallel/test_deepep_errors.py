"""What DeepEP can't do is said before it is tried, with what to do instead."""

import contextlib
import functools
import socket
import sys
import types

import deep_ep_double
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from test_deepep import DIM, EXPERTS, opened

from fmoe.errors import TransformError
from fmoe.parallel import AllToAll, Backend, Bound, deepep
from fmoe.parallel.backends import choose
from fmoe.parallel.backends.deepep import adapter
from fmoe.parallel.backends.deepep import buffers as deepep_buffers
from fmoe.testing.samples import routing_of

SIZES = dict(max_tokens_per_rank=8, dim=DIM, top_k=3, num_experts=8)


def random_routing(tokens):
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :3]
    return routing_of(ids, EXPERTS, dtype=torch.bfloat16, device="cpu")


def said(call):
    """The text of the ``ValueError`` that a call raises."""
    with pytest.raises(ValueError, match=r"\w+: .*: got .*, expected .*\.") as caught:
        call()
    return str(caught.value)


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def opens(mesh, **sizes):
    def call():
        with deepep(mesh, **{**SIZES, **sizes}):
            pass

    return call


# ---- setting up --------------------------------------------------------------------------------------------


def refusals_of_setup():
    deep_ep_double.install(2)
    whole = bare_mesh(f"ep={dist.get_world_size()}")
    line, found = whole["ep"], {}
    found["mesh"] = said(opens("ep"))
    found["tokens"] = said(opens(line, max_tokens_per_rank=0))
    found["experts"] = said(opens(line, num_experts=7))
    found["many experts"] = said(opens(line, num_experts=4096))
    found["choices"] = said(opens(line, top_k=33))
    found["kind"] = said(opens(line, kind="fast"))
    found["capacity"] = said(opens(line, host_sync=False, capacity=-1.0))
    found["capacity beside a wait"] = said(opens(line, capacity=2.0))
    with patched(adapter, "DEVICES", ("cuda",)):
        found["cpu"] = said(opens(line))
    with patched(adapter, "nccl_version", lambda: (2, 27, 3)):
        found["nccl"] = said(opens(line, kind="elastic"))

    def no_way(*args, **kwargs):
        raise RuntimeError("CUDA error: invalid resource handle")

    with patched(deep_ep_double, "Wire", no_way):
        found["no path"] = said(opens(line))
    deepep_buffers._AGREED.clear()
    kinds = ["buffer", "elastic"]
    with patched(adapter, "choose_kind", lambda *_: kinds[dist.get_rank()]):
        found["versions"] = said(opens(line))
    deepep_buffers._AGREED.clear()
    hosts = [f"host {dist.get_rank()}"]
    with patched(socket, "gethostname", lambda: hosts[0]):
        found["nodes"] = said(opens(line, kind="buffer"))
    deep_ep_double.install(1)
    found["elastic with 1.x"] = said(opens(line, kind="elastic"))
    with patched(adapter, "PEERS", 1):
        found["across nodes"] = said(opens(line, kind="buffer", host_sync=False))
        without = Backend("auto", host_sync=False, max_tokens=4)
        chosen = choose("moe_forward", without, whole, (torch.bfloat16, DIM))["ep"]
        assert chosen == AllToAll(chosen.group, Bound(4))  # as DeepEP's Buffer can't
        kept = functools.partial(choose, "moe_forward", without._replace(name="deepep"), whole)
        found["kept across nodes"] = said(kept)
    deepep_buffers._AGREED.clear()
    broken = deep_ep_double.Buffer.get_dispatch_config
    with patched(deep_ep_double.Buffer, "get_dispatch_config", staticmethod(lambda num_ranks: broken(6))):
        found["size"] = said(opens(line))
    # What only one device lacks, all hear of.
    deep_ep_double.install(1)
    if dist.get_rank() == 1:
        del sys.modules["deep_ep"]
    found["missing there"] = said(opens(line))
    return found


REFUSALS_OF_SETUP = {
    "mesh": "line: got 'ep', expected a mesh of one dimension. Pass mesh[\"ep\"].",
    "tokens": "max_tokens_per_rank: got 0, expected an integer of at least 1.",
    "experts": "num_experts: got 7 experts for 2 devices, expected a multiple of the devices",
    "many experts": "num_experts: got 4096 experts for 2 devices",
    "choices": "top_k: got 33, expected at most 32.",
    "kind": "kind: got 'fast', expected one of ('buffer', 'elastic'), or None.",
    "capacity": "capacity: got -1.0, expected a number above 0, or None for the worst case.",
    "capacity beside a wait": "capacity: got 2.0, with host_sync, expected a capacity for host_sync=False",
    "across nodes": "host_sync: got False, with a Buffer of 2, expected at most 1 devices of one node, or",
    "kept across nodes": "host_sync: got False, with a Buffer of 2, expected at most 1 devices of one node",
    "cpu": 'line: got a mesh of cpu devices, expected one of CUDA devices. Use backend="all_to_all"',
    "nccl": "got NCCL 2.27.3, expected NCCL 2.30.4 or newer, for ElasticBuffer. Install it: pip install",
    "no path": "got RuntimeError: CUDA error: invalid resource handle, expected a group that its Buffer "
    "connects. Its devices must reach each other, by NVLink in a node",
    "versions": "deep_ep: got different DeepEPs, expected one version on all hosts.",
    "nodes": "line: got 2 devices on hosts ['host 0', 'host 1'], expected every 8 in a row on one node",
    "elastic with 1.x": "kind: got 'elastic', with DeepEP 1.x, expected DeepEP 2.x for it.",
    "size": "line: got a group of 2, expected a size that DeepEP's Buffer supports, as 2, 4, 8, 16.",
    "missing there": "got no package deep_ep, expected DeepEP, 1.2.1 or newer.",
}


def test_what_cannot_be_set_up_is_refused_on_all_devices(pool):
    for found in pool.run(2, refusals_of_setup):
        assert found.keys() == REFUSALS_OF_SETUP.keys()
        for name, text in REFUSALS_OF_SETUP.items():
            assert text in found[name], name


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (
            AssertionError("Invalid NCCL versions: a v.s. b"),
            "Install its NCCL: pip install",
        ),
        (ImportError("libnvshmem_host.so.3: cannot open"), "Make the NVSHMEM it was built with visible"),
        (ImportError("undefined symbol: _ZN3c10"), "Build it again, against this PyTorch and CUDA."),
        (ModuleNotFoundError("No module named 'deep_ep_cpp'", name="deep_ep_cpp"), "Build it again"),
        (
            ModuleNotFoundError("No module named 'deep_ep'", name="deep_ep"),
            "got no package deep_ep, expected",
        ),
    ],
)
def test_a_deep_ep_that_does_not_load_is_told_apart(monkeypatch, raised, text):
    class Broken:
        def find_spec(self, name, *_):
            if name == "deep_ep":
                raise raised

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    assert text in said(adapter.load)


def test_other_versions_are_refused_by_what_they_lack(monkeypatch):
    made = deep_ep_double.module(1)
    monkeypatch.setitem(sys.modules, "deep_ep", made)
    assert adapter.load() is made

    class Old(deep_ep_double.Buffer):
        def dispatch(self, x, handle=None, topk_idx=None, config=None): ...

    made.Buffer = Old
    text = said(adapter.load)
    lacking = "topk_weights, num_tokens_per_rdma_rank, num_worst_tokens, async_finish"
    assert f"without Buffer.dispatch({lacking}), expected the interface of" in text
    monkeypatch.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    assert "Install a version between" in said(adapter.load)


@pytest.mark.parametrize(
    ("size", "kind", "generation", "chosen"),
    [
        (2, None, 1, "buffer"), (2, None, 2, "buffer"), (2, "elastic", 2, "elastic"),
        (6, None, 2, "elastic"), (16, "buffer", 1, None), (6, None, 1, None),
    ],
)  # fmt: skip
def test_the_kind_of_buffer(size, kind, generation, chosen):
    module = deep_ep_double.module(generation)
    if chosen:
        assert adapter.choose_kind(module, size, kind) == chosen
    else:
        assert f"got a group of {size}" in said(lambda: adapter.choose_kind(module, size, kind))


def test_rows_on_another_gpu_than_the_buffer_are_refused():
    x = types.SimpleNamespace(device=torch.device("cuda:1"), is_cuda=True)
    sizes = adapter.Sizes(4, DIM, 2, 4)
    held = deepep_buffers.Held(types.SimpleNamespace(size=lambda: 2), "buffer")
    held.engine, held.sizes, held.device = deepep_buffers.Legacy, sizes, torch.device("cuda:0")
    text = "x_TD: got a tensor on cuda:1, expected one on cuda:0, where the buffer was made. Call torch.cuda"
    assert text in said(lambda: held._check(x, sizes))


# ---- dispatching -------------------------------------------------------------------------------------------


def refusals_of_dispatch(generation):
    found = {}
    with opened("ep=2", "buffer" if generation == 1 else "elastic", payloads=(torch.bfloat16,)) as (
        _,
        transport,
    ):
        x = torch.randn(4, DIM, dtype=torch.bfloat16)
        send = lambda x: transport.dispatch(x, random_routing(len(x)))  # noqa: E731
        found["tokens"] = said(lambda: send(torch.randn(9, DIM, dtype=torch.bfloat16)))
        found["dtype"] = said(lambda: send(x.float()))
        found["dim"] = said(lambda: send(torch.randn(4, 24, dtype=torch.bfloat16)))
        found["larger dim"] = said(lambda: send(torch.randn(4, 2 * DIM, dtype=torch.bfloat16)))
        with patched(adapter, "DEVICES", ("cuda",)):
            found["cpu"] = said(lambda: send(x))
        routing = random_routing(4)
        with pytest.raises(TransformError) as caught:
            torch.vmap(lambda x: transport.dispatch(x, routing)[0])(x[None])
        found["vmap"] = str(caught.value)
        x_SD, plan = send(x)
    found["closed, dispatch"] = said(lambda: send(x))
    found["closed, combine"] = said(lambda: transport.combine(x_SD, plan))
    return found


@pytest.mark.parametrize("generation", [1, 2])
def test_what_cannot_be_sent_is_refused(pool, generation):
    name = "Buffer" if generation == 1 else "ElasticBuffer"
    expected = {
        "tokens": "sizes: got 9 tokens where it was sized for 8, expected at most what",
        "dtype": "x_TD: got torch.float32, expected bfloat16, in which DeepEP sends and sums rows. Convert",
        "dim": "x_TD: got dim 24, expected a multiple of 256",
        "larger dim": f"sizes: got {2 * DIM} dim where it was sized for {DIM}",
        "cpu": 'x_TD: got a tensor on cpu, expected one on cuda. Use backend="all_to_all"',
        "vmap": "deepep_dispatch: cannot run under torch.func.vmap. Tokens and routes of every example",
        "closed, dispatch": "which was closed, expected a buffer that is open. Call the layer, and its",
        "closed, combine": "which was closed, expected a buffer that is open.",
    }
    for found in pool.run(2, refusals_of_dispatch, generation):
        for key, text in expected.items():
            assert text in found[key], key
        assert f"for DeepEP's {name}" in found["dim"]
