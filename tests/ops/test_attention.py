"""Latent attention against transformers', rotary positions, norms."""

import dataclasses
import math
from types import SimpleNamespace

import optree
import pytest
import torch
from helpers import change, error
from parity import their_config
from torch._subclasses.fake_tensor import FakeTensorMode

from fmoe.introspect import kept_bytes
from fmoe.models.decoder import preset
from fmoe.models.families import FAMILIES
from fmoe.models.norm import rms_norm
from fmoe.models.rotary import Yarn
from fmoe.ops.attention import causal_attention
from fmoe.ops.core.tape import plain_operators
from fmoe.ops.kernels import attention as kernels
from fmoe.ops.segments import segments_of
from fmoe.params import init_params, is_spec
from fmoe.tree import dotted_names

SIZES = {
    "query matrix": dict(q_lora_rank=0),
    "query bottleneck": dict(q_lora_rank=12),
    "unequal heads, odd sizes": dict(
        dim=30,
        num_heads=3,
        q_lora_rank=7,
        kv_lora_rank=9,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=11,
    ),
    "YaRN": dict(qk_rope_head_dim=32, yarn=Yarn(32.0, 32, mscale=1.2, mscale_all_dim=0.6)),
}


@pytest.fixture(scope="module")
def modeling():
    """transformers' layers, whose import takes seconds."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    return modeling_deepseek_v3


def theirs(modeling, config, params):
    hf, _ = their_config(config)
    hf._attn_implementation = "eager"
    layer = modeling.DeepseekV3Attention(hf, 0)
    table = FAMILIES["deepseek_v3"].names
    names = [table[f"attention.{name}"][0].removeprefix("self_attn.") for name in dotted_names(params)]
    layer.load_state_dict(dict(zip(names, optree.tree_leaves(params))))
    return hf, layer


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_parity_with_transformers(modeling, sizes):
    config = change(preset("debug"), **sizes)
    wide = optree.tree_map(
        lambda s: dataclasses.replace(s, scale=0.3), config.attention.specs(config.dim), is_leaf=is_spec
    )
    params = init_params(wide, 0, dtype=torch.float32, device="cpu")
    hf, layer = theirs(modeling, config, params)
    x = torch.randn(2, 13, config.dim)
    positions = torch.arange(13)[None].expand(2, -1)
    embedding = modeling.DeepseekV3RotaryEmbedding(hf)(x, positions)
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    expected = layer(x, embedding, mask)[0]
    got = config.attention.forward(params, x, config.attention.rope.table(13), 1e-6)
    assert error(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["16B", "671B"])
def test_published_positions(modeling, name):
    config = preset(name)
    hf, _ = their_config(config)
    embedding = modeling.DeepseekV3RotaryEmbedding(hf)
    ours, plain = (c.attention.rope.frequencies() for c in (config, change(config, yarn=None)))
    torch.testing.assert_close(ours, embedding.inv_freq, rtol=1e-6, atol=0)
    # Pairs that turn 32 times in 4096 positions keep their frequency, those that turn once or less take 40
    # times as long.
    turns = 4096 * plain / (2 * math.pi)
    assert torch.equal(ours[turns > 40], plain[turns > 40])
    torch.testing.assert_close(ours[turns < 0.7] * 40, plain[turns < 0.7])
    table = config.attention.rope.table(5)
    assert error(table.cos[3], torch.cos(3 * ours)) < 1e-6  # the two magnitudes are equal
    mscale = config.attention.rope.yarn.mscale_all_dim
    assert math.isclose(config.attention.scale, 192**-0.5 * (0.1 * mscale * math.log(40) + 1) ** 2)


DTYPES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
WIDTHS = {
    "equal": (8, 8),
    "wider queries": (24, 16),
    "wider values": (8, 24),
    "odd": (5, 3),
    "V3": (192, 128),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("length", [1, 37])
def test_attention_equals_softmax_attention(dtype, widths, length):
    """Values and gradients, on the kernel chosen for each dtype, width and device, against float64."""
    q, k, v = (torch.randn(2, length, 3, n).to(dtype) for n in (widths[0], *widths))
    g, scale = torch.randn(2, length, 3, widths[1]), widths[0] ** -0.5
    y, pull = torch.func.vjp(lambda *qkv: causal_attention(*qkv, scale), q, k, v)
    with plain_operators():
        expected, expected_pull = torch.func.vjp(
            lambda *qkv: causal_attention(*qkv, scale), *(t.double() for t in (q, k, v))
        )
    assert y.dtype == dtype
    assert error((y, pull(g.to(dtype))), (expected, expected_pull(g.double()))) < DTYPES[dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(6, 3), (4, 1), (3, 3)], ids=str)
def test_heads_of_queries_share_those_of_keys(dtype, heads):
    """As if keys and values were repeated, which isn't kept for the backward."""
    q, g = (torch.randn(2, 37, heads[0], n) for n in (16, 8))
    k, v = (torch.randn(2, 37, heads[1], n) for n in (16, 8))

    def repeated(q, k, v):
        return causal_attention(q, *(t.repeat_interleave(heads[0] // heads[1], 2) for t in (k, v)), 0.3)

    q, k, v = (t.to(dtype) for t in (q, k, v))
    y, pull = torch.func.vjp(lambda *qkv: causal_attention(*qkv, 0.3), q, k, v)
    with plain_operators():
        expected, expected_pull = torch.func.vjp(repeated, *(t.double() for t in (q, k, v)))
    assert error((y, pull(g.to(dtype))), (expected, expected_pull(g.double()))) < DTYPES[dtype]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    of_outputs = y.nbytes + y[..., 0].numel() * max(4, y.element_size())
    assert kept_bytes(lambda *qkv: causal_attention(*qkv, 0.3), q, k, v) == of_outputs


# ---- segments --------------------------------------------------------------------------------------


def some_segments(rows, length):
    """Segments of random lengths, one of one position among them, and a row that is one."""
    ids = (torch.rand(rows, length) < 0.1).long().cumsum(1) + 1
    ids[0], ids[-1, -1] = 1, 99
    return segments_of(ids)


def one_by_one(q, k, v, segments, scale):
    """Each segment alone."""
    found, ends = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), [*segments.offsets[1:].tolist()]
    q, k, v, rows = (t.flatten(0, 1) for t in (q, k, v, found))
    for start, end in zip([0, *ends], ends):
        alone = (t[None, start:end] for t in (q, k, v))
        rows[start:end] = causal_attention(*alone, scale)[0]
    return found


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(6, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("counted", [True, False])
def test_segments_see_themselves_alone(dtype, heads, counted):
    """Values and gradients on the kernel chosen for each dtype and device, against float64."""
    (h, g), segments = heads, some_segments(3, 37)
    q, k, v = (torch.randn(3, 37, n, w).to(dtype) for n, w in ((h, 24), (g, 24), (g, 16)))
    cotangent, mine = torch.randn(3, 37, h, 16), segments
    if not counted:
        mine = segments._replace(offsets=segments.offsets[:0])
    y, pull = torch.func.vjp(lambda *qkv: causal_attention(*qkv, 0.3, mine), q, k, v)
    with plain_operators():
        expected, expected_pull = torch.func.vjp(
            lambda *qkv: one_by_one(*qkv, segments, 0.3), *(t.double() for t in (q, k, v))
        )
    assert (
        error((y, pull(cotangent.to(dtype))), (expected, expected_pull(cotangent.double()))) < DTYPES[dtype]
    )


def test_every_example_of_a_batch_has_the_same_segments_or_its_own():
    """The same ones stay counted."""
    segments, counted = some_segments(2, 9), []
    q = torch.randn(4, 2, 9, 3, 8, dtype=torch.float64)
    expected = torch.stack([causal_attention(t, t, t, 1.0, segments) for t in q])
    kernel = kernels.engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "engine", lambda *args: counted.append(args[-1]) or kernel(*args))
        same = torch.vmap(lambda t: causal_attention(t, t, t, 1.0, segments))(q)
        many = type(segments)(*(t.expand(4, *t.shape) for t in segments))
        own = torch.vmap(lambda t, s: causal_attention(t, t, t, 1.0, s))(q, many)
    assert error((same, own), (expected, expected)) < 1e-12
    starts = [18 * i + t for i in range(4) for t in segments.offsets[:-1].tolist()]
    assert [t.tolist() for t in counted] == [[*starts, 72], []]


# ---- engines ---------------------------------------------------------------------------------------

CPU = kernels.CPU["cpu"]


def raises(*args):
    raise RuntimeError("no engine for this card\nat line 7")


WRONG = {
    "another scale": CPU._replace(forward=lambda q, k, v, scale: CPU.forward(q, k, v, 1.3 * scale)),
    "another lse": CPU._replace(forward=lambda *args: (CPU.forward(*args)[0], CPU.forward(*args)[1] / 2)),
    "no backward": CPU._replace(backward=lambda *args: tuple(0 * g for g in CPU.backward(*args))),
    "NaN": CPU._replace(
        backward=lambda *args: (*CPU.backward(*args)[:2], CPU.backward(*args)[2] * torch.nan)
    ),
    "raises": CPU._replace(backward=raises),
}


@pytest.fixture
def as_cudnn(monkeypatch):
    """A stand-in for an engine of a GPU, proven on the CPU."""
    kernels.proven.cache_clear()
    yield lambda engine: monkeypatch.setitem(kernels.CUDA, "cudnn", engine)
    kernels.proven.cache_clear()


@pytest.mark.parametrize("wrong", WRONG)
def test_an_engine_that_is_wrong_here_is_not_used_and_that_is_said(wrong, as_cudnn, caplog):
    as_cudnn(WRONG[wrong])
    assert not kernels.proven("cudnn", torch.device("cpu"), torch.bfloat16, 192, 128)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("attention by cudnn on cpu, torch.bfloat16 heads of 192 and 128: not used, as it ")
    assert ("raises no engine for this card" if wrong == "raises" else "is off by ") in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_engine_that_is_right_is_used(dtype, as_cudnn, caplog):
    as_cudnn(CPU)
    assert kernels.proven("cudnn", torch.device("cpu"), dtype, 192, 128)
    assert not caplog.records
    assert not kernels.proven("cudnn", torch.device("cpu"), torch.float64, 192, 128)


def test_an_engine_can_be_asked_for(monkeypatch):
    q = torch.randn(1, 4, 2, 8)
    monkeypatch.setenv("FMOE_ATTENTION", "plain")
    assert kernels.engine(q, q, q) is kernels.PLAIN
    monkeypatch.setenv("FMOE_ATTENTION", "cudnn")
    text = r"causal_attention: FMOE_ATTENTION: got 'cudnn', expected one of \['cpu', 'plain'\], which can do"
    with pytest.raises(ValueError, match=text):
        causal_attention(q, q, q, 1.0)


def test_engines_after_the_first_that_is_able_are_not_proven(monkeypatch):
    """A proof takes cuDNN a second or so, and a first step waits for it."""
    asked = []
    monkeypatch.setattr(kernels, "proven", lambda name, *kind: asked.append(name) or name != "cudnn")
    kind = dict(dtype=torch.bfloat16, device=torch.device("cuda"), is_cuda=True)
    q = SimpleNamespace(shape=(1, 4, 2, 8), numel=lambda: 64, **kind)
    assert kernels.engine(q, q, q) is kernels.CUDA["flash"]
    assert asked == ["cudnn", "flash"]


@pytest.mark.parametrize("wrong", [None, "no segments"])
def test_an_engine_must_prove_itself_with_segments(wrong, monkeypatch, caplog):
    kernels.proven.cache_clear()
    engine = CPU
    if wrong:
        engine = CPU._replace(forward=lambda *args: CPU.forward(*args[:4]))
    monkeypatch.setitem(kernels.CUDA_SEGMENTS, "varlen", engine)
    kind = "varlen", torch.device("cpu"), torch.bfloat16, 192, 128
    assert kernels.proven(*kind, segmented=True) == (wrong is None)
    if wrong:
        assert "attention within segments by varlen on cpu" in caplog.records[0].getMessage()
    kernels.proven.cache_clear()


def test_rows_for_varlen_and_back():
    """The kernel itself needs a GPU; its arguments and results are those of one long sequence."""
    seen = {}

    def forward(q, k, v, *how, scale):
        seen["offsets"] = [t.tolist() for t in how[:2]]
        assert how[2:] == (9, 9, 0.0, True, False)
        shaped = (t.unflatten(0, (2, 9)).transpose(1, 2) for t in (q, k, v))
        y, lse = kernels.forward(*shaped, scale, *where, by=kernels.PLAIN)
        return y.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1), None, None, None

    def backward(g, q, k, v, y, lse, *how, scale):
        assert how[2:6] == (9, 9, 0.0, True)
        shaped = (t.unflatten(0, (2, 9)).transpose(1, 2) for t in (g, q, k, v, y))
        g, q, k, v, y = shaped
        lse = lse.unflatten(1, (2, 9)).transpose(0, 1)
        grads = kernels.backward(g, q, k, v, scale, y, lse, *where, by=kernels.PLAIN)
        return tuple(t.transpose(1, 2).flatten(0, 1) for t in grads)

    segments = some_segments(2, 9)
    fake = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    q, k, v, g = (torch.randn(2, n, 9, w) for n, w in ((6, 8), (3, 8), (3, 5), (6, 5)))
    where = segments.first, segments.offsets
    y, lse = kernels.forward(q, k, v, 0.4, *where, by=kernels.PLAIN)
    expected = y, lse, *kernels.backward(g, q, k, v, 0.4, y, lse, *where, by=kernels.PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "aten", fake)
        varlen = kernels.CUDA_SEGMENTS["varlen"]
        y, lse = kernels.forward(q, k, v, 0.4, *where, by=varlen)
        found = y, lse, *kernels.backward(g, q, k, v, 0.4, y, lse, *where, by=varlen)
    assert error(found, expected) < 1e-5
    assert seen["offsets"] == [segments.offsets.tolist()] * 2


def test_the_signatures_that_varlen_calls():
    """Without a GPU, at least fake tensors go through PyTorch's own operators."""
    segments = some_segments(2, 9)
    with FakeTensorMode():
        q, k, v, g = (
            torch.empty(2, n, 9, w, dtype=torch.bfloat16) for n, w in ((6, 8), (3, 8), (3, 5), (6, 5))
        )
        where = torch.empty(2, 9, dtype=torch.int64), torch.empty(segments.offsets.shape, dtype=torch.int32)
        y, lse = kernels.forward(q, k, v, 0.4, *where, by=kernels.CUDA_SEGMENTS["varlen"])
        grads = kernels.backward(g, q, k, v, 0.4, y, lse, *where, by=kernels.CUDA_SEGMENTS["varlen"])
    assert [t.shape for t in (y, lse, *grads)] == [g.shape, g.shape[:3], q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["varlen", "efficient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(192, 128, 1), (128, 128, 2), (64, 64, 1)], ids=str)
def test_every_engine_of_a_gpu_knows_segments(name, dtype, heads, monkeypatch):
    (wide, narrow, times), device = heads, torch.ones(1, device="cuda").device
    if not kernels.proven(name, device, dtype, wide, narrow, times > 1, True):
        pytest.skip(f"{name} isn't used for {dtype} here")
    monkeypatch.setenv("FMOE_ATTENTION", name)
    with device:
        segments = some_segments(3, 700)
        q, k, v = (torch.randn(3, 700, n, w) for n, w in ((2 * times, wide), (2, wide), (2, narrow)))
        g = torch.randn(3, 700, 2 * times, narrow)
        y, pull = torch.func.vjp(
            lambda *qkv: causal_attention(*qkv, 0.1, segments), *(t.to(dtype) for t in (q, k, v))
        )
        with plain_operators():
            expected, expected_pull = torch.func.vjp(
                lambda *qkv: causal_attention(*qkv, 0.1, segments), *(t.to(dtype).double() for t in (q, k, v))
            )
    assert error((y, pull(g.to(dtype))), (expected, expected_pull(g.double()))) < 2 * DTYPES[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 37, 128, 1000])
def test_every_engine_of_a_gpu_equals_softmax_attention(name, dtype, length, monkeypatch):
    device = torch.ones(1, device="cuda").device
    if not kernels.proven(name, device, dtype, 192, 128):
        pytest.skip(f"{name} isn't used for {dtype} here")
    monkeypatch.setenv("FMOE_ATTENTION", name)
    q, k, v = (torch.randn(2, length, 3, n, device=device).to(dtype) for n in (192, 192, 128))
    g, scale = torch.randn(2, length, 3, 128, device=device), 192**-0.5
    y, pull = torch.func.vjp(lambda *qkv: causal_attention(*qkv, scale), q, k, v)
    with plain_operators():
        expected, expected_pull = torch.func.vjp(
            lambda *qkv: causal_attention(*qkv, scale), *(t.double() for t in (q, k, v))
        )
    assert error((y, pull(g.to(dtype))), (expected, expected_pull(g.double()))) < 2 * DTYPES[dtype]


def test_one_position_needs_no_engine(monkeypatch):
    q = torch.randn(2, 3, 1, 8)
    monkeypatch.setenv("FMOE_ATTENTION", "cpu")
    assert kernels.engine(q, q, q) is kernels.PLAIN
    assert kernels.engine(*[torch.randn(2, 3, 2, 8)] * 3) is kernels.CPU["cpu"]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 0, 3, 8)])
def test_attention_over_nothing(shape):
    q = torch.randn(shape)
    y, pull = torch.func.vjp(lambda q: causal_attention(q, q, q, 1.0), q)
    assert y.shape == shape == pull(y)[0].shape


def test_attention_refuses_what_does_not_fit():
    q, few = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"causal_attention: q, k, v: got \(2, 5, 4, 8\) .*\(2, 5, 3, 8\)"):
        causal_attention(q, few, few, 1.0)
    with pytest.raises(ValueError, match=r"one dtype on one device, where G divides H"):
        causal_attention(q, q, q.double(), 1.0)


def test_no_position_sees_a_later_one():
    config = preset("debug")
    params = init_params(config.attention.specs(config.dim), 1, dtype=torch.float64, device="cpu")
    x = torch.randn(1, 9, config.dim, dtype=torch.float64)
    changed = torch.cat([x[:, :5], torch.randn_like(x[:, 5:])], 1)
    table = config.attention.rope.table(9)
    a, b = (config.attention.forward(params, v, table, 1e-6) for v in (x, changed))
    assert error(a[:, :5], b[:, :5]) < 1e-14
    assert error(a[:, 5:], b[:, 5:]) > 1e-3


def test_attention_depends_on_distances_only():
    config = preset("debug")
    params = init_params(config.attention.specs(config.dim), 1, dtype=torch.float64, device="cpu")
    x = torch.randn(1, 6, config.dim, dtype=torch.float64)
    table = config.attention.rope.table(40)
    late = type(table)(table.cos[30:36], table.sin[30:36])
    early = type(table)(table.cos[:6], table.sin[:6])
    assert error(*(config.attention.forward(params, x, angles, 1e-6) for angles in (early, late))) < 1e-6


def test_rms_norm_in_low_precision_takes_the_mean_in_float32():
    x = torch.full((4096,), 100.0, dtype=torch.float16)  # the sum of squares overflows float16
    assert error(rms_norm(x, torch.ones(4096, dtype=torch.float16), 0.0), torch.ones(4096)) < 1e-3
