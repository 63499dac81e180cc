"""Plans of steps that keep weights in fp8 over their micro-batches."""

import argparse
import dataclasses
import json
import re
import runpy
from pathlib import Path

import optree
import pytest
import torch
from helpers import fresh_seed, quick
from test_plan import BFLOAT16, FULL, SMALL, same
from test_time import EXPERTS, rates_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fmoe.models import decoder
from fmoe.ops import experts_kernels
from fmoe.ops.bases import scaled_grouped_mm
from fmoe.ops.kernels import grouped, scaled
from fmoe.ops.precision import FAST, Recipe, quantise, restored
from fmoe.pipeline.orders import KINDS
from fmoe.plan import plan
from fmoe.plan.dry_run import GRANULE, DryRun
from fmoe.training import gradients, options

MODEL = dataclasses.replace(SMALL, num_layers=4)
BOTH, DENSE = Recipe(FAST[0], FAST[0]), Recipe(dense=FAST[0])
MEMORY = 1e6  # bytes a second: passes take nearly all of a step
STEP = dict(batch_size=16, micro_batches=8, seq_len=64, dtype=BFLOAT16)


def rates():
    found = rates_of("bfloat16", memory=MEMORY)
    return found._replace(flops={**found.flops, "experts_fp8": 1e12, "products_fp8": 1e12})


def both_plans(mesh="", **how):
    """A step's plan without and with weights that are kept."""
    how = STEP | dict(precision=BOTH, rates=rates()) | how
    return (plan(MODEL, mesh, keep_rounded=keep, **how) for keep in (False, True))


def of_products(rank):
    """The seconds of products that round."""
    return rank.seconds["experts"] + rank.seconds["matrix products"]


def rounded_weights(layers=(None, None), recipe=BOTH, ep=1):
    """The weights (e, O, I) that products round, of some layers."""
    for layer in decoder.init(MODEL, 0).layers[slice(*layers)]:
        routed = hasattr(layer.mlp, "experts")
        if recipe.dense:
            w_in, w_out = layer.mlp.shared if routed else layer.mlp
            yield from (w[None] for w in optree.tree_leaves(layer.attention) if w.dim() == 2)
            yield from (w_in.flatten(0, 1)[None], w_out[None])
        if recipe.experts and routed:
            w_in, w_out = (w[: len(w) // ep] for w in layer.mlp.experts)
            yield from (w_in.flatten(1, 2), w_out)


def in_fp8(weights, granule=1):
    """Bytes of weights by rows and by columns."""
    sizes = [w.numel() + 4 * w.numel() // w.shape[dim] for w in weights for dim in (1, 2)]
    return sum(-(-size // granule) * granule for size in sizes)


def passed(weights):
    """Bytes that are read in bfloat16 and written in fp8 to round them once each way."""
    return sum(2 * 3 * w.numel() for w in weights)


# ---- as a step does ------------------------------------------------------------------------------------


def roundings(patch):
    """What a step rounds of weights, with PyTorch in place of kernels."""
    found = []

    def weights(w_eIO):
        found.append(quantise(w_eIO.mT))
        return found[-1]

    def wide(x):
        return restored(x, torch.float32)

    def columns(x_RC, ends):
        return scaled.Columns(quantise(x_RC.mT), ends, x_RC.dtype)

    def outer(x, y):
        return grouped.outer(wide(x.scaled).mT, wide(y.scaled).mT, x.ends).to(x.dtype)

    patch.setattr(scaled, "fast", lambda precision, *how: precision in FAST)
    patch.setattr(experts_kernels, "_fast", lambda *how: False)
    patch.setattr(scaled, "_rounded_weights", weights)
    patch.setattr(scaled, "multiply", lambda x, w, ends, to: grouped.mm(wide(x), wide(w).mT, ends).to(to))
    patch.setattr(scaled, "columns", columns)
    patch.setattr(scaled, "multiply_columns", outer)
    return found


@pytest.mark.parametrize(
    ("precision", "wrap"), quick([(FAST[0], FULL)], [(p, w) for p in FAST for w in (same, FULL)])
)
def test_a_step_keeps_and_spares_what_was_planned(precision, wrap, monkeypatch):
    """With everything recomputed, weights are rounded by rows twice in each micro-batch, unless kept."""
    params, tokens = decoder.init(MODEL, fresh_seed(), dtype=BFLOAT16), torch.randint(1000, (8, 16))
    found, how, bytes_read_and_written = roundings(monkeypatch), dict(precision=precision, per_layer=wrap), []
    for keep in (False, True):
        found.clear()
        gradients.of_model(MODEL, micro_batches=8, keep_rounded=keep, **how)(params, tokens, tokens)
        bytes_read_and_written.append(sum(3 * w.values.numel() for w in found))
    without, kept = (p.ranks[0] for p in both_plans(**how))
    weights = [*rounded_weights()]
    assert sum(w.values.nbytes + w.scale.nbytes for w in found) == in_fp8(weights)
    assert kept.converted == in_fp8(weights, GRANULE) and without.converted == 0
    spared = (bytes_read_and_written[0] - bytes_read_and_written[1]) / MEMORY
    assert of_products(without) - of_products(kept) == pytest.approx(spared, rel=1e-4)
    each = 3 if wrap is FULL else 2
    assert spared * MEMORY == (8 * each - 2) * passed(weights) / 2


# ---- devices and phases --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "zero", "recipe"),
    [("", 3, DENSE), ("", 1, EXPERTS), ("dp=2", 1, BOTH), ("dp=2", 2, BOTH), ("ep=2", 1, EXPERTS)],
    ids=str,
)
def test_each_device_holds_its_weights_twice_in_fp8_until_the_last_backward(mesh, zero, recipe):
    weights = [*rounded_weights(recipe=recipe, ep=2 if "ep" in mesh else 1)]
    without, kept = (p.ranks[0] for p in both_plans(mesh, zero=zero, precision=recipe))
    more = in_fp8(weights, GRANULE)
    assert kept.converted - without.converted == more
    for phase in ("forward", "backward"):
        assert kept.phases[phase]["converted"] - without.phases[phase]["converted"] == more
    assert (kept.gradients, kept.activations, kept.sent) == (
        without.gradients, without.activations, without.sent,
    )  # fmt: skip
    assert of_products(without) - of_products(kept) == pytest.approx(7 * passed(weights) / MEMORY, rel=1e-4)
    for phase in ("clip", "update"):
        assert kept.phases[phase] == without.phases[phase]


def test_one_device_casts_once_and_sums_in_float32():
    """Where it keeps nothing, it casts parameters for each micro-batch."""
    how = STEP | dict(dtype=torch.float32, compute_dtype=BFLOAT16, precision=BOTH)
    kept, zero_1 = (plan(MODEL, mesh, zero=1, **how, keep_rounded=True).ranks[0] for mesh in ("", "dp=2"))
    params = optree.tree_leaves(decoder.init(MODEL, 0))
    cast = kept.converted - in_fp8(rounded_weights(), GRANULE)
    assert cast == pytest.approx(2 * sum(t.numel() for t in params), rel=0.01)
    assert kept.converted == pytest.approx(zero_1.converted, rel=0.01)
    for phase in ("forward", "backward"):
        assert kept.phases[phase]["gradients"] == pytest.approx(zero_1.phases[phase]["gradients"], rel=0.01)


def test_products_hold_no_weights_that_are_kept():
    """Where few tokens come, they are most of what a product holds."""
    config = dataclasses.replace(MODEL, vocab_size=16)
    how = STEP | dict(batch_size=2, micro_batches=2, seq_len=16, precision=BOTH, per_layer=FULL, zero=1)
    without, kept = (plan(config, keep_rounded=keep, **how).ranks[0] for keep in (False, True))
    largest = max(w.numel() for w in rounded_weights())
    more = kept.phases["forward"]["workspace"] - without.phases["forward"]["workspace"]
    assert more <= -largest
    assert kept.peaks["forward"] - without.peaks["forward"] == in_fp8(rounded_weights(), GRANULE) + more


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("wrap", [same, FULL], ids=["nothing recomputed", "all recomputed"])
def test_a_stage_holds_its_weights_once_for_all_micro_batches(schedule, wrap):
    how = dict(schedule=schedule, zero=1, per_layer=wrap, seq_len=4)  # so that weights are the most
    without, kept = both_plans("pp=2", **how)
    for a, b in zip(without.ranks, kept.ranks):
        weights = [w for layers in a.layers for w in rounded_weights(layers)]
        more, each = in_fp8(weights, GRANULE), 3 if wrap is FULL else 2
        assert b.converted - a.converted == more
        assert b.phases["backward"]["converted"] - a.phases["backward"]["converted"] == more
        assert 0 < b.phases["forward"]["converted"] - a.phases["forward"]["converted"] <= more
        assert (b.in_flight, b.activations, b.sent) == (a.in_flight, a.activations, a.sent)
        for phase in ("clip", "update"):
            assert b.phases[phase] == a.phases[phase]
        spared = (8 * each - 2) * passed(weights) / 2
        assert of_products(a) - of_products(b) == pytest.approx(spared / MEMORY, rel=1e-4)


def test_a_pipeline_is_shorter_by_no_more_than_its_ranks_are_spared():
    """Its ranks wait while the first micro-batch's weights are rounded."""
    without, kept = both_plans("pp=2", micro_batches=2, zero=1)
    spared = [of_products(a) - of_products(b) for a, b in zip(without.ranks, kept.ranks)]
    assert max(spared) < without.time.seconds - kept.time.seconds < sum(spared)


def test_only_weights_that_are_given_are_kept_and_until_the_block_ends():
    """Those that share a storage are told apart, and so are the layouts of one."""
    with torch.device("cpu"), FakeTensorMode(), DryRun() as run:
        given, other = torch.empty(2, 1, 64, 32, dtype=BFLOAT16), torch.empty(1, 64, 32, dtype=BFLOAT16)
        x, ends = torch.empty(16, 64, dtype=BFLOAT16), torch.empty(1, dtype=torch.int32)

        def products(precision=FAST[0]):
            for w in (*given, other):
                scaled_grouped_mm(x, w, ends, precision)
                scaled_grouped_mm(x[:, :32], w.mT, ends, precision)

        with run.keeping_rounded([*given, other[:0]]):
            products("fp8_block")
            assert not run.kept
            products()
            products()
            assert run.kept < run.alive(len(run.timeline))
            assert run.size(run.kept) == in_fp8([*given], GRANULE)
            scaled_grouped_mm(x[:, :32], given[0][:, :32], ends, FAST[0])
        assert not run.kept & run.alive(len(run.timeline))
        products()
        assert len(run.kept) == 5


def test_what_is_kept_is_each_direction_of_each_weight(monkeypatch):
    """In the order in which a step rounds them."""
    params, tokens = decoder.init(MODEL, fresh_seed(), dtype=BFLOAT16), torch.randint(1000, (2, 16))
    found = roundings(monkeypatch)
    with DryRun() as run, run.keeping_rounded(optree.tree_leaves(params)):
        how = dict(micro_batches=2, precision=BOTH, keep_rounded=True)
        gradients.of_model(MODEL, **how)(params, tokens, tokens)
    sizes = [w.values.nbytes + w.scale.nbytes for w in found]
    assert [run.bytes_of[number] for number in sorted(run.kept)] == [
        -(-size // GRANULE) * GRANULE for size in sizes
    ]


# ---- what is asked for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [dict(micro_batches=1), dict(micro_batches=1, mesh="dp=2", zero=3), dict(device_type="cpu")],
    ids=str,
)
def test_nothing_is_kept_of_one_micro_batch_or_on_a_cpu(how):
    without, kept = both_plans(**how)
    assert kept.ranks[0].converted == without.ranks[0].converted
    assert of_products(kept.ranks[0]) == of_products(without.ranks[0])


@pytest.mark.parametrize("recipe", [None, Recipe(experts="fp8_block")], ids=str)
def test_what_a_step_refuses_is_not_planned(recipe):
    how = dict(precision=recipe, micro_batches=2, keep_rounded=True)
    with pytest.raises(ValueError, match="of_model: keep_rounded") as refused:
        gradients.of_model(MODEL, **how)
    text = str(refused.value).replace("of_model", "plan")
    with pytest.raises(ValueError, match=re.escape(text)):
        plan(MODEL, batch_size=2, seq_len=32, device_type="cpu", **how)
    for mesh in ("dp=2", "pp=2"):
        with pytest.raises(ValueError, match="plan: zero: got 3, expected 1 or 2 with keep_rounded"):
            plan(MODEL, mesh, batch_size=4, seq_len=32, **how | dict(precision=BOTH))


def test_the_command_keeps_rounded_weights(command):
    words = "plan --model debug --layers 2 --batch-size 4 --micro-batches 2 --seq-len 64 --json"
    config, how = decoder.preset("debug", layers=2), STEP | dict(batch_size=4, micro_batches=2)
    peaks = []
    for keep, option in ((False, []), (True, ["--keep-rounded"])):
        found = json.loads(command(*words.split(), "--precision", "fp8_rowwise", *option))
        peaks.append(found["peak"])
        assert found["peak"] == plan(config, precision=BOTH, keep_rounded=keep, **how).peak
    assert peaks[0] < peaks[1]


def test_a_benchmark_of_steps_plans_what_its_ways_keep():
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    script = runpy.run_path(str(benchmarks / "step_on_mesh.py"), run_name="step_on_mesh")
    parser = options.Parser()
    script["add_options"](parser)
    args = argparse.Namespace(rates=benchmarks / "rates" / "h200.json", batch_size=4, seq_len=64)
    words = ["--micro-batches", "2", "--dtype", "bfloat16", "--precision", "fp8_rowwise"]
    without, kept = (
        script["planned"](args, parser.parse_args(words + more), MODEL, 1)
        for more in ([], ["--keep-rounded"])
    )
    assert without["planned_gib"] < kept["planned_gib"]
