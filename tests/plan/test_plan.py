"""What is planned is what a step then holds and sends."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter

import optree
import pytest
import torch
from devices import bare_mesh
from helpers import allocated_at_once, change, quick
from laws import ranks_of

import fmoe
from fmoe.bench.model import bench_model
from fmoe.introspect import kept_bytes, wire_bytes
from fmoe.models import decoder, deepseek_v3
from fmoe.models.decoder import preset
from fmoe.ops import attention, experts_kernels, update
from fmoe.ops.core.axes import group_of
from fmoe.ops.core.dtensors import local
from fmoe.ops.cross_entropy import cross_entropy_sum, cross_entropy_terms, cross_entropy_terms_backward
from fmoe.parallel import Backend, collective_ops
from fmoe.parallel.backends.wire import process_group
from fmoe.parallel.placement import computing, token_axes
from fmoe.params import is_spec
from fmoe.plan import copies_per_token, dry_run, plan, workspaces
from fmoe.training import gradients, optim

SMALL = dataclasses.replace(preset("debug"), num_layers=3, vocab_size=1000)
TIED = change(SMALL, tied_head=True, q_lora_rank=24)
NOTHING = fmoe.save_nothing
COMPRESSED = functools.partial(fmoe.remat, policy=fmoe.compress("attention", "experts_grouped_mm"))
FULL = functools.partial(fmoe.remat, policy=NOTHING)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def nbytes(tree):
    storages = [local(t).untyped_storage() for t in optree.tree_leaves(tree)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def loss_of(config, compute, wrap):
    how = dict(config=config, dtype=compute, per_layer=wrap, logits_bytes=2**20)
    return functools.partial(deepseek_v3.loss, **how)


def same(layer):
    return layer


@pytest.mark.parametrize(
    ("config", "dtype", "compute", "wrap"),
    [
        pytest.param(SMALL, FLOAT32, FLOAT32, same, marks=pytest.mark.slow),
        (SMALL, FLOAT32, BFLOAT16, fmoe.remat),
        (TIED, BFLOAT16, BFLOAT16, same),
        pytest.param(TIED, BFLOAT16, BFLOAT16, FULL, marks=pytest.mark.slow),
        (SMALL, BFLOAT16, BFLOAT16, COMPRESSED),
    ],
    ids=["float32", "mixed, remat", "bfloat16", "bfloat16, all recomputed", "bfloat16, kept in fp8"],
)
def test_parts_are_those_of_a_real_step(config, dtype, compute, wrap):
    shape = (4, 96)
    tokens, targets = torch.randint(config.vocab_size, (2, *shape)).unbind()
    options = dict(dtype=dtype, compute_dtype=compute, per_layer=wrap, logits_bytes=2**20)
    (stage,) = plan(config, batch_size=4, seq_len=96, device_type="cpu", **options).ranks
    params, optimizer = deepseek_v3.init(config, 0, dtype=dtype), optim.adamw()
    state, loss = optimizer.init(params), loss_of(config, compute, wrap)
    assert (stage.parameters, stage.optimizer) == (nbytes(params), nbytes(state))

    variables = optree.tree_map(lambda t: t.clone().requires_grad_(), params)
    kept = kept_bytes(lambda p: loss(p, tokens, targets)[0], variables)
    assert sum(stage.activations.values()) + stage.converted == pytest.approx(kept, rel=0.05)
    assert (stage.converted == 0) == (compute == dtype)

    def step():
        _, grads = fmoe.value_and_grad(loss, has_aux=True)(params, tokens, targets)
        assert nbytes(grads) == stage.gradients
        scale = optim.clip_factor(optim.global_norm(grads), 1.0)
        optimizer.update(params, grads, state, 1e-3, scale=scale, donate=True)

    step()
    most = allocated_at_once(step)[0] + nbytes(params) + nbytes(state)
    # The CPU's kernels hold float32 copies while they run, which a plan for it leaves out.
    assert 0.7 * most < stage.peak <= 1.01 * most


@pytest.mark.parametrize("mesh", ["", "pp=2"])
def test_what_is_offloaded_leaves_the_device(mesh):
    """Its bytes are in the host's memory between forward and backward, and come back layer by layer."""

    def ranks(policy, device_type="cuda"):
        how = dict(batch_size=8, micro_batches=2 if "pp" in mesh else 1, device_type=device_type)
        how |= dict(seq_len=1024)  # so that the backward's peak is at its begin, not with all gradients
        wrap = functools.partial(fmoe.remat, policy=policy)
        # A first stage would peak at a dense layer, after what came back is gone.
        config = dataclasses.replace(SMALL, num_layers=4, num_dense_layers=0)
        return plan(config, mesh, per_layer=wrap, **how).ranks

    names = "experts_grouped_mm", "attention"
    for kept, offloaded, none in zip(ranks(fmoe.save(*names)), ranks(fmoe.offload(*names)), ranks(NOTHING)):
        assert offloaded.offloaded > 0 == kept.offloaded
        assert sum(kept.activations.values()) - sum(offloaded.activations.values()) == offloaded.offloaded
        assert offloaded.activations == none.activations
        assert none.peaks["forward"] <= offloaded.peaks["forward"] < kept.peaks["forward"]
        assert offloaded.seconds == kept.seconds
        assert none.peak < offloaded.peak <= kept.peak  # the last two layers have all they kept
    on_cpu = [ranks(policy(*names), "cpu") for policy in (fmoe.save, fmoe.offload)]
    assert on_cpu[0] == on_cpu[1]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_is_compressed_takes_its_bytes_in_fp8(device_type):
    """Of a named kind, and with no copy in between on CUDA, where a kernel rounds."""

    def rank(policy):
        wrap, how = functools.partial(fmoe.remat, policy=policy), dict(batch_size=8, seq_len=256)
        config = dataclasses.replace(SMALL, num_layers=4)
        how |= dict(device_type=device_type, dtype=BFLOAT16)
        return plan(config, per_layer=wrap, **how).ranks[0]

    names = "experts_grouped_mm", "attention"
    none = rank(fmoe.save("topk"))
    kept, compressed = (
        {kind: n - none.activations.get(kind, 0) for kind, n in rank(policy).activations.items()}
        for policy in (fmoe.save("topk", *names), fmoe.compress(*names))
    )
    assert {kind for kind, n in kept.items() if n} == {kind for kind, n in compressed.items() if n}
    for kind in ("experts", "attention"):
        assert 0.5 < compressed[kind] / kept[kind] < 0.75
    assert none.peaks["forward"] < rank(fmoe.compress(*names)).peaks["forward"]
    assert rank(fmoe.compress(*names)).peak < rank(fmoe.save("topk", *names)).peak


@pytest.mark.parametrize("wrap", [same, fmoe.remat], ids=["all kept", "remat"])
def test_segments_are_planned(wrap):
    """Beside what a step keeps without them: angles, where segments begin, which tokens are padding."""
    ids = 1 + torch.arange(96).expand(4, 96) // 7
    tokens = torch.randint(SMALL.vocab_size, (4, 96))
    how = dict(batch_size=4, seq_len=96, per_layer=wrap, logits_bytes=2**20, device_type="cpu")
    without, stage = (plan(SMALL, segments=s, **how).ranks[0] for s in (False, True))
    variables = optree.tree_map(lambda t: t.requires_grad_(), deepseek_v3.init(SMALL, 0))
    loss = loss_of(SMALL, FLOAT32, wrap)
    kept = kept_bytes(lambda p: loss(p, tokens, tokens, segment_ids=ids)[0], variables)
    assert sum(stage.activations.values()) == pytest.approx(kept, rel=0.05)
    assert sum(without.activations.values()) < sum(stage.activations.values())


def test_segments_are_planned_in_every_stage():
    how = dict(batch_size=8, seq_len=64, per_layer=fmoe.remat, segments=True)
    assert len(plan(SMALL, "dp=2,ep=2,tp=2,pp=3", **how).ranks) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_segments_in_float32_take_a_mask(dtype):
    q = torch.empty(2, 64, 4, 8, dtype=dtype)
    mask = 4 * 2 * 64 * 64 * (dtype == torch.float32)
    for name, args in (("attention", (q, q, q)), ("attention_backward", (q, q, q, q, 1.0, q, q))):
        plain, segments = (
            workspaces.WORKSPACES[f"fmoe::{kind}{name}"](args, ()) for kind in ("", "segment_")
        )
        assert segments - plain == mask


def test_clipping_takes_no_memory():
    how = dict(batch_size=4, seq_len=64, dtype=BFLOAT16, device_type="cpu")
    stage = plan(SMALL, **how).ranks[0]
    held = stage.parameters + stage.gradients + stage.optimizer
    assert held <= stage.peaks["clip"] < 1.001 * held
    assert plan(SMALL, max_norm=None, **how).ranks[0].peaks["backward"] == stage.peaks["backward"]


@pytest.mark.parametrize(
    ("kept", "moments"), quick([(FLOAT32, BFLOAT16)], [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)])
)
def test_moments_of_another_dtype_are_planned_as_they_are(monkeypatch, kept, moments):
    monkeypatch.setattr(update, "PIECE", 2**12)
    optimizer = optim.adamw(moments_dtype=moments)
    how = dict(batch_size=4, seq_len=64, dtype=kept, device_type="cpu")
    stage, same = (plan(SMALL, optimizer=o, **how).ranks[0] for o in (optimizer, None))
    assert stage.optimizer == nbytes(optimizer.init(deepseek_v3.init(SMALL, 0, dtype=kept)))
    assert stage.phases["update"]["optimizer"] == stage.optimizer
    widened = stage.phases["update"]["workspace"] - same.phases["update"]["workspace"]
    assert widened == pytest.approx(2 * 4 * 2**12, abs=1000)  # a piece of two of four tensors


def test_micro_batches_hold_one_parts_activations_and_the_sum_of_gradients():
    one, four = (
        plan(SMALL, batch_size=n, seq_len=64, micro_batches=n, dtype=BFLOAT16, device_type="cpu").ranks[0]
        for n in (1, 4)
    )
    assert sum(four.activations.values()) == pytest.approx(sum(one.activations.values()), rel=0.001)
    grads = one.gradients
    assert grads <= four.peaks["backward"] - one.peaks["backward"] <= 2.1 * grads  # kept in float32


@pytest.mark.parametrize(
    ("kept", "compute"),
    quick([(FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16)], itertools.product((BFLOAT16, FLOAT32), repeat=2)),
)
def test_sums_of_gradients_are_gradients_and_not_params_to_compute_with(kept, compute):
    how = dict(seq_len=64, dtype=kept, compute_dtype=compute, device_type="cpu")
    one, two, four = (plan(SMALL, batch_size=n, micro_batches=n, **how).ranks[0] for n in (1, 2, 4))
    assert one.converted == two.converted == four.converted
    assert (one.converted == 0) == (kept == compute)
    assert two.phases == four.phases, "the third is as the second"
    summed = nbytes(deepseek_v3.init(SMALL, 0))
    for phase in ("forward", "backward"):
        before, after = one.phases[phase], two.phases[phase]
        for part in ("parameters", "optimizer"):
            assert after[part] == before[part]
        assert after["converted"] <= one.converted
        assert summed <= after["gradients"] <= summed + one.gradients
    assert two.phases["forward"]["gradients"] == summed


# ---- on meshes -----------------------------------------------------------------------------------


class Counting:
    """PyTorch's collectives, and the bytes that a ring sends for each."""

    def __init__(self, collectives):
        self.collectives, self.sent = collectives, Counter()

    def __getattr__(self, name):
        return getattr(self.collectives, name)

    def all_gather_into_tensor(self, x, size, group):
        self.sent["parameters"] += (size - 1) * x.nbytes
        return self.collectives.all_gather_into_tensor(x, size, group)

    def reduce_scatter_tensor(self, x, op, size, group):
        self.sent["parameters"] += (size - 1) * x.nbytes // size
        return self.collectives.reduce_scatter_tensor(x, op, size, group)

    def all_reduce(self, x, op, group):
        size = process_group(group).size()
        self.sent["sums"] += 2 * ((size - 1) * x.nbytes // size)
        return self.collectives.all_reduce(x, op, group)


class RealRun(dry_run.DryRun):
    """Watches real tensors: a device's own, not what wraps them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, torch.distributed.tensor.DTensor) for t in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def real_step(axes, config, how):
    """This rank's bytes of params, moments and gradients, the most at once, and what it sent for what."""
    mesh, how = bare_mesh(axes), dict(how)
    dtype, rows = how.pop("compute_dtype"), how.pop("batch_size") // group_of(mesh, token_axes(mesh)).size
    step = gradients.of_model(config, mesh, dtype=dtype, **how)
    params = decoder.init(config, 0, mesh=mesh)
    state, tokens = optim.adamw().init(params), torch.randint(config.vocab_size, (rows, 64))
    with pytest.MonkeyPatch.context() as patch, wire_bytes() as tokens_sent:
        patch.setattr(collective_ops, "_c10d", counting := Counting(collective_ops._c10d))
        _, grads = step(params, tokens, tokens)
    if "ep" in axes:
        counting.sent["tokens"] = sum(t.sent for t in tokens_sent.values())
    held = nbytes(params), nbytes(state), nbytes(grads)
    del grads
    with pytest.MonkeyPatch.context() as patch, RealRun(on_cuda=False) as run:
        patch.setattr(dry_run, "SENT", {})
        run.numbers(optree.tree_map(local, (params, state)))
        step(params, tokens, tokens)
    return held, run.peak(0, len(run.timeline))[0], dict(counting.sent)


EVERYWHERE = dataclasses.replace(SMALL, num_experts=4, router=fmoe.RouterConfig(top_k=4))
MESHES = ["dp=2", "ep=2", "dp=2,ep=2", "ep=2,tp=2"]


@pytest.mark.parametrize(
    ("axes", "zero", "wrap"),
    quick(
        [("dp=2", 1, same), ("ep=2,tp=2", 2, fmoe.remat), ("dp=2,ep=2", 3, fmoe.remat)],
        itertools.product(MESHES, (1, 2, 3), (same, fmoe.remat)),
    ),
)
def test_each_device_of_a_mesh_holds_and_sends_what_was_planned(pool, axes, zero, wrap):
    """Every token goes to every device, so that what it sends can be planned to the byte."""
    how = dict(batch_size=8, micro_batches=2, zero=zero, compute_dtype=BFLOAT16, per_layer=wrap)
    found = pool.run(ranks_of(axes), real_step, axes, EVERYWHERE, how)
    planned = plan(EVERYWHERE, axes, seq_len=64, max_norm=None, device_type="cpu", **how).ranks[0]
    for held, most, sent in found:
        assert held == (planned.parameters, planned.optimizer, planned.gradients)
        assert sum(sent.values()) == sum(planned.sent.values())
        if "tp" not in axes:  # along which the loss gathers, too, as parameters are
            assert sent == planned.sent
        step = max(planned.peaks[phase] for phase in ("forward", "backward"))
        assert 0.9 * most < step <= 1.001 * most  # the thread of a collective may let go of its tensors late


def test_tokens_in_fp8_are_planned_to_the_byte(pool):
    backend = Backend("all_to_all", payload="fp8")
    how = dict(batch_size=4, compute_dtype=BFLOAT16, per_layer=fmoe.remat, backend=backend)
    found = pool.run(2, real_step, "ep=2", EVERYWHERE, how)
    sizes = dict(seq_len=64, max_norm=None, device_type="cpu")
    both = (plan(EVERYWHERE, "ep=2", **sizes, **how | {"backend": b}) for b in (backend, "all_to_all"))
    planned, wide = (found.ranks[0] for found in both)
    for _, most, sent in found:
        assert sent == planned.sent
        step = max(planned.peaks[phase] for phase in ("forward", "backward"))
        assert 0.9 * most < step <= 1.001 * most
    experts = EVERYWHERE.num_layers - EVERYWHERE.num_dense_layers
    fewer = EVERYWHERE.dim - 4  # bytes of a token in fp8 than in bfloat16, with its scale
    assert wide.sent["tokens"] - planned.sent["tokens"] == experts * 2 * 64 * fewer


@pytest.mark.parametrize("wrap", [same, FULL], ids=["nothing recomputed", "all recomputed"])
def test_at_most_two_layers_gathered_parameters_exist_at_once(monkeypatch, wrap):
    runs = []

    class Watched(dry_run.DryRun):
        def __init__(self, **how):
            super().__init__(**how)
            runs.append(self)

    monkeypatch.setattr("fmoe.plan.rank.DryRun", Watched)
    config = dataclasses.replace(SMALL, num_layers=6, num_dense_layers=0)
    how = dict(batch_size=4, seq_len=32, per_layer=wrap, compute_dtype=BFLOAT16, device_type="cpu")
    (kept,) = plan(config, "dp=2", **how).ranks
    first = optree.tree_leaves(decoder.specs(config).layers[0], is_leaf=is_spec)
    layer = sum(2 * math.prod(s.shape) for s in first if computing(s.partition) != s.partition)

    live, most, gathered = 0, 0, 0
    for number, came in runs[0].timeline:
        if runs[0].maker[number] == "fmoe::begin_gather":
            live += runs[0].bytes_of[number] * (1 if came else -1)
            gathered += runs[0].bytes_of[number] * came
            most = max(most, live)
    assert live == 0
    assert 1.5 * layer < most < 2.01 * layer
    assert gathered == 2 * 11 * layer  # forward and, but for the last, backward; buckets, then parameters
    assert kept.converted < 2 * layer


def test_gradients_summed_in_two_bytes_are_sent_so():
    how = dict(batch_size=4, seq_len=32, compute_dtype=BFLOAT16, zero=1, device_type="cpu")
    wide, low = (plan(SMALL, "dp=2", reduce_dtype=d, **how).ranks[0].sent for d in (None, BFLOAT16))
    assert 2 * wide["parameters"] == pytest.approx(
        3 * low["parameters"], rel=0.01
    )  # two bytes there, four back
    assert wide["sums"] == low["sums"]


def test_traffic_per_token_is_what_was_simulated_and_measured():
    """Against docs/performance.md, "What travels"."""
    config = change(
        preset("671B"), num_layers=1, num_dense_layers=0, num_heads=1, vocab_size=64, kv_lora_rank=32,
        q_lora_rank=0, num_shared_experts=0, moe_hidden_dim=8,
    )  # fmt: skip
    for ep, both in ((8, 198_907), (32, 381_792)):
        found = plan(config, f"ep={ep}", batch_size=ep, seq_len=256, dtype=BFLOAT16)
        assert found.ranks[0].sent["tokens"] / 256 == pytest.approx(both, rel=0.02)
    assert copies_per_token(config, 32) == pytest.approx(6.86, abs=0.03)


def test_the_default_device_is_no_matter_nor_how_the_mesh_is_written():
    how = dict(batch_size=2, seq_len=32)
    with torch.device("meta"):
        elsewhere = plan(SMALL, {"ep": 2}, **how)
    assert elsewhere == plan(SMALL, "ep=2", **how)


def test_an_uneven_router_is_planned_for_its_busiest_device():
    even, busy = (
        plan(SMALL, "ep=4", batch_size=4, seq_len=64, dtype=BFLOAT16, imbalance=i) for i in (1.0, 2.0)
    )
    assert busy.rows.expanded == 2 * even.rows.expanded == 2 * 64 * SMALL.router.top_k
    more = busy.ranks[0].activations["experts"] - even.ranks[0].activations["experts"]
    moe_layers, hidden = SMALL.num_layers - SMALL.num_dense_layers, SMALL.moe_hidden_dim
    pairs = even.rows.expanded
    assert more >= moe_layers * pairs * 2 * hidden * 2  # twice the pre-activations


def test_rows_of_a_backend_that_never_waits_are_those_there_is_room_for():
    how = dict(batch_size=4, seq_len=64, dtype=BFLOAT16)
    pairs, held = 64 * SMALL.router.top_k, SMALL.num_experts // 4
    for capacity, most in ((1.5, 3 * pairs // 2), (None, 4 * 64 * min(SMALL.router.top_k, held))):
        never_waits = Backend(host_sync=False, capacity=capacity)
        found = plan(SMALL, "ep=4", backend=never_waits, **how)
        copies = min(64, math.ceil(capacity * pairs / 4)) if capacity else 64
        assert found.rows == (4 * copies, 4 * copies, most)
    even = plan(SMALL, "ep=4", **how)
    more = found.ranks[0].activations["experts"] - even.ranks[0].activations["experts"]
    moe_layers = SMALL.num_layers - SMALL.num_dense_layers
    assert more >= moe_layers * (found.rows.expanded - even.rows.expanded) * 2 * SMALL.moe_hidden_dim * 2


def test_stages_of_a_pipeline_share_the_layers():
    config = dataclasses.replace(preset("debug"), num_layers=7)
    found = plan(config, "pp=3,dp=2,ep=2", batch_size=16, seq_len=32, micro_batches=4, device_type="cpu")
    assert [s.layers for s in found.ranks] == [((0, 2),), ((2, 5),), ((5, 7),)]
    assert [s.in_flight for s in found.ranks] == [3, 2, 1]
    whole = plan(config, "dp=2,ep=2", batch_size=16, seq_len=32, micro_batches=4, device_type="cpu")
    assert sum(s.parameters for s in found.ranks) == whole.ranks[0].parameters
    assert "loss" in found.ranks[2].activations and "loss" not in found.ranks[0].activations
    one = plan(config, "pp=3,dp=2,ep=2", batch_size=4, seq_len=32, device_type="cpu").ranks[1]
    assert sum(found.ranks[1].activations.values()) == 2 * sum(one.activations.values())
    assert found.ranks[1].converted == 2 * one.converted > 0  # each holds those of its last layer


def test_micro_batches_in_flight_share_parameters_that_are_gathered_once():
    how = dict(seq_len=16, zero=1, compute_dtype=BFLOAT16, device_type="cpu")
    four, one = (plan(SMALL, "pp=3,dp=2", batch_size=2 * n, micro_batches=n, **how).ranks for n in (4, 1))
    assert [s.in_flight for s in four] == [3, 2, 1]
    assert [s.converted for s in four] == [s.converted for s in one]


# ---- what kernels hold: the code that runs on CUDA, on CPU tensors ---------------------------------


def beyond_results(fn):
    most, results = allocated_at_once(fn)
    return most - nbytes(results if isinstance(results, tuple) else (results,))


def test_what_plain_attention_holds(monkeypatch):
    monkeypatch.setenv(attention.kernels.OVERRIDE, "plain")
    q, k, v = (torch.randn(2, 160, 3, n).bfloat16() for n in (24, 24, 16))
    stated = workspaces.plain_attention((q, k, v, 0.3), ())
    assert stated == pytest.approx(beyond_results(lambda: attention._forward_kernel(q, k, v, 0.3)), rel=0.1)
    y, lse = attention._forward_kernel(q, k, v, 0.3)
    how = torch.randn_like(y), q, k, v, 0.3, y, lse
    got = beyond_results(lambda: attention._backward_kernel(*how))
    assert workspaces.plain_attention_backward(how, ()) == pytest.approx(got, rel=0.1)


def check_held_by_experts(rows, tokens, dim, hidden, num, precision, rel, kept=False):
    """What plans state of each raw kernel is what it holds beyond its results."""
    new, raw = functools.partial(torch.empty, dtype=BFLOAT16), experts_kernels
    x, h, g = new(tokens, dim), new(rows, 2, hidden), new(tokens, dim)
    w_in, w_out, weights = new(num, 2, hidden, dim), new(num, dim, hidden), torch.empty(tokens, 2)
    layout = weights, torch.zeros(rows), torch.empty(tokens, 2), torch.empty(num), False, precision
    stated = workspaces.WORKSPACES | (workspaces.KEPT if kept else {})
    for name, kernel, args in (
        ("up", raw.up, (x, w_in, *layout)),
        ("up_backward", raw.up_backward, (h, x, w_in, *layout)),
        ("up_backward_inputs", raw.up_inputs, (h, x, w_in, *layout)),
        ("up_backward_weight", raw.up_weight, (h, x, w_in, *layout)),
        ("down", raw.down, (h, w_out, *layout, None)),  # without an activation
        ("down_backward", raw.down_backward, (g, h, w_out, *layout)),
        ("down_backward_inputs", raw.down_inputs, (g, h, w_out, *layout)),
        ("down_backward_weight", raw.down_weight, (g, h, w_out, *layout)),
    ):
        got = beyond_results(lambda kernel=kernel, args=args: kernel(*args))
        assert stated[f"fmoe::experts_{name}"](args, ()) == pytest.approx(got, rel=rel), name


def test_what_the_experts_hold(monkeypatch):
    """Triton's kernels give one tensor each and hold nothing; with such in their place, what is left."""
    rows, tokens, dim, hidden, num = 256, 128, 48, 40, 4
    new = functools.partial(torch.empty, dtype=BFLOAT16)
    monkeypatch.setattr(experts_kernels, "_expand", lambda x, *how, scaled: new(rows, x.shape[1]))
    monkeypatch.setattr(experts_kernels, "_activation", lambda h, *how, scaled: new(rows, hidden))
    backward = lambda g, h, rows, scaled: (torch.empty_like(h), torch.empty_like(rows.weights_SK))  # noqa: E731
    monkeypatch.setattr(experts_kernels, "_activation_backward", backward)
    monkeypatch.setattr(experts_kernels, "weighted_sum_kernel", lambda y, *how: new(tokens, y.shape[1]))
    monkeypatch.setattr(experts_kernels.grouped, "mm", lambda x, w, offsets: new(x.shape[0], w.shape[2]))
    outer = lambda x, y, offsets: new(num, x.shape[1], y.shape[1])  # noqa: E731
    monkeypatch.setattr(experts_kernels.grouped, "outer", outer)
    check_held_by_experts(rows, tokens, dim, hidden, num, None, rel=0.02)


@pytest.mark.parametrize("kept", [False, True], ids=["", "weights kept"])
def test_what_the_experts_hold_in_fp8(kept, monkeypatch):
    """The same, with tensors of one byte in place of what is quantised."""
    quantise = pytest.importorskip("fmoe.ops.kernels.quantise", exc_type=ImportError)
    kernel = pytest.importorskip("fmoe.ops.kernels.columns", exc_type=ImportError)
    from fmoe.ops.kernels import rows as fused
    from fmoe.ops.kernels import scaled

    rows, tokens, dim, hidden, num = 256, 128, 48, 40, 4
    new = functools.partial(torch.empty, dtype=BFLOAT16)
    byte = functools.partial(torch.empty, dtype=torch.float8_e4m3fn)
    padded = rows + num * 127

    def scaled_rows(*shape):
        return scaled.Scaled(byte(*shape), torch.empty(shape[:-1]))

    def columns(width):
        return scaled.Columns(
            scaled.Scaled(byte(width, padded), torch.empty(num, width)), torch.empty(num), BFLOAT16
        )

    monkeypatch.setattr(scaled, "fast", lambda precision, x, *dims: precision is not None)
    monkeypatch.setattr(scaled, "rows", lambda x: scaled_rows(*x.shape))
    monkeypatch.setattr(fused, "expand", lambda x, *how: x.new_empty(rows, x.shape[1]))
    made = [scaled_rows(num, 2 * hidden, dim), scaled_rows(num, dim, 2 * hidden)]
    made += [scaled_rows(num, dim, hidden), scaled_rows(num, hidden, dim)]
    there = {each.values.shape: each for each in made if kept}

    def of_weights(w):
        shape = w.mT.shape
        return there.get(shape) or scaled_rows(*shape)

    monkeypatch.setattr(scaled, "_weights", of_weights)
    monkeypatch.setattr(scaled, "columns", lambda x, ends: columns(x.shape[1]))
    monkeypatch.setattr(kernel, "of_tokens", lambda x, *how: columns(x.shape[1]))
    monkeypatch.setattr(quantise, "activated", lambda h, ends: scaled_rows(rows, hidden))
    monkeypatch.setattr(kernel, "of_activations", lambda h, *how: columns(hidden))
    monkeypatch.setattr(scaled, "multiply", lambda x, w, *how: new(rows, w.values.shape[1]))
    outer = lambda x, y: new(num, x.scaled.values.shape[0], y.scaled.values.shape[0])  # noqa: E731
    monkeypatch.setattr(scaled, "multiply_columns", outer)
    backward = lambda g, h, rows, scaled: (torch.empty_like(h), torch.empty_like(rows.weights_SK))  # noqa: E731
    monkeypatch.setattr(experts_kernels, "_activation_backward", backward)
    monkeypatch.setattr(experts_kernels, "weighted_sum_kernel", lambda y, *how: new(tokens, y.shape[1]))
    check_held_by_experts(rows, tokens, dim, hidden, num, "fp8_rowwise", 0.05, kept)


def test_what_the_loss_holds():
    x, weight, index = torch.randn(512, 16), torch.randn(8192, 16), torch.randint(8192, (512,))
    how = x, weight, index, 4 * 512 * 1024
    got = beyond_results(lambda: cross_entropy_terms.raw(*how))
    assert workspaces._cross_entropy(how, ()) == pytest.approx(got, rel=0.05)
    out = cross_entropy_terms.raw(*how)
    how = torch.randn_like(out), *how, out
    got = beyond_results(lambda: cross_entropy_terms_backward.raw(*how))
    assert workspaces._cross_entropy_backward(how, ()) == pytest.approx(got, rel=0.1)
    how = x, weight, index, 4 * 8192 * 128
    got = beyond_results(lambda: cross_entropy_sum.raw(*how))
    assert workspaces._cross_entropy_sum(how, ()) == pytest.approx(got, rel=0.1)


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(command):
    sizes = "--layers 3 --mesh dp=2,ep=2,pp=2 --batch-size 8 --seq-len 32"
    words = ["plan", "--model", "debug", *sizes.split()]
    found = json.loads(command(*words, "--json"))
    assert found["mesh"] == {"pp": 2, "dp": 2, "ep": 2, "tp": 1}
    assert found["peak"] == max(stage["peak"] for stage in found["ranks"])
    for stage in found["ranks"]:
        assert stage["peak"] == max(sum(parts.values()) for parts in stage["phases"].values())
        for phase, parts in stage["phases"].items():
            assert parts["workspace"] == sum(stage["workspaces"][phase].values())
    shown = command(*words)
    parts = "parameters", "gradients", "optimizer", "saved activations", "attention", "experts", "peak"
    assert all(part in shown for part in parts)
    low = json.loads(command(*words, "--json", "--dtype", "float32", "--moments-dtype", "bfloat16"))
    for a, b in zip(found["ranks"], low["ranks"]):
        assert b["optimizer"] == a["optimizer"] == pytest.approx(b["parameters"], rel=0.01)
    once = json.loads(command(*words, "--json", "--micro-batches", "2", "--zero", "1"))
    often = json.loads(command(*words, "--json", "--micro-batches", "2"))
    for a, b, c in zip(found["ranks"], once["ranks"], often["ranks"]):
        assert 0 < b["sent"]["parameters"] <= a["sent"]["parameters"] == c["sent"]["parameters"] / 2
    peaks = [f"{stage['peak'] / 2**20:.2f}" for stage in found["ranks"]]
    assert re.search(rf"peak +│ +{peaks[0]} │ +{peaks[1]}", shown)
    assert "2 stages, schedule 1f1b, 1 micro-batches" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("mesh", "options", "text"),
    [
        ("dp=3", {}, "plan: batch_size: got 4, expected a multiple of dp * ep * micro_batches=3"),
        ("ep=4", {"num_experts": 18, "router": fmoe.RouterConfig()}, "of ep=4"),
        ("tp=8", {}, "plan: config.attention.num_kv_heads: got 4, expected a multiple of tp=8"),
        ("pp=9", {}, "plan: mesh: got pp=9, expected at most num_layers=3"),
        ("xp=2", {}, "plan: axes: got xp=2, expected each of"),
    ],
)
def test_what_cannot_be_planned_is_named(mesh, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        plan(dataclasses.replace(SMALL, **options), mesh, batch_size=4, seq_len=32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "plan: batch_size: got 0, expected an integer of at least 1"),
        ({"seq_len": 0}, "plan: seq_len: got 0, expected an integer of at least 1"),
        (
            {"seq_len": SMALL.max_seq_len + 1},
            f"plan: seq_len: got {SMALL.max_seq_len + 1}, expected at most max_seq_len={SMALL.max_seq_len}.",
        ),
        ({"seq_len": 2.0}, "plan: seq_len: got 2.0, expected an integer of at least 1"),
        ({"micro_batches": 0}, "plan: micro_batches: got 0, expected an integer of at least 1"),
        ({"zero": 0}, "plan: zero: got 0, expected 1, 2 or 3"),
        ({"zero": "3"}, "plan: zero: got '3', expected 1, 2 or 3"),
        ({"backend": "pigeons"}, "plan: backend: got 'pigeons', expected one of"),
        (
            {"backend": Backend(capacity=2.0)},
            "plan: backend: got Backend(name='auto', host_sync=True, capacity=2",
        ),
        ({"imbalance": 0}, "plan: imbalance: got 0, expected a number of at least 1"),
        ({"imbalance": -1}, "plan: imbalance: got -1, expected a number of at least 1"),
        ({"imbalance": float("nan")}, "plan: imbalance: got nan, expected a number of at least 1"),
        ({"mesh": None}, "plan: mesh: got None, expected axes and sizes, as a text or a dict"),
        (
            {"device_type": "mps"},
            "plan: device_type: got 'mps', expected cuda or cpu, whose allocations are known",
        ),
    ],
)
def test_what_is_no_size_or_device_is_named(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        plan(SMALL, **{"batch_size": 4, "seq_len": 32, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's allocator is what is planned")
@pytest.mark.parametrize(
    "how",
    [
        dict(batch_size=4, seq_len=2048),
        dict(batch_size=8, seq_len=2048, remat="default"),
        dict(batch_size=8, seq_len=1024, remat="full", dtype=FLOAT32, compute_dtype=BFLOAT16),
        dict(batch_size=2, seq_len=4096, remat="save:topk,experts_grouped_mm", balanced=True),
        dict(batch_size=4, seq_len=4096, remat="default+offload:attention,experts_grouped_mm"),
    ],
    ids=[
        "nothing recomputed",
        "defaults",
        "float32 weights, all recomputed",
        "experts kept",
        "most offloaded",
    ],
)
def test_the_peak_is_within_a_twentieth_of_what_the_allocator_says(how):
    result = bench_model(preset("16B", layers=3), steps=2, **how)
    assert result["planned_over_peak"] == pytest.approx(1, abs=0.05), result["planned"]


def test_a_command_plans_room_for_the_worst_case(command):
    words = ["plan", "--model", "debug", "--mesh", "ep=2", "--batch-size", 4, "--seq-len", 32, "--json"]
    found = json.loads(command(*words, "--ep-capacity", "inf", "--dtype", "float32"))
    worst = Backend(host_sync=False)
    want = plan(decoder.preset("debug"), "ep=2", batch_size=4, seq_len=32, backend=worst)
    assert found["peak"] == want.peak > plan(decoder.preset("debug"), "ep=2", batch_size=4, seq_len=32).peak
