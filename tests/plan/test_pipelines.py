"""Plans of pipelines are what the ranks then hold, send and keep in flight."""

import dataclasses
import itertools
import re

import optree
import pytest
import torch
import torch.distributed as dist
from devices import bare_mesh
from helpers import quick
from laws import ranks_of
from test_plan import BFLOAT16, EVERYWHERE, FULL, Counting, RealRun, nbytes, same

from fmoe.introspect import wire_bytes
from fmoe.models import decoder
from fmoe.models.stages import Stages, cut
from fmoe.ops.core.axes import group_of
from fmoe.ops.core.dtensors import local
from fmoe.parallel import collective_ops
from fmoe.parallel.placement import token_axes
from fmoe.pipeline import Action, from_computations, in_flight, make_schedule
from fmoe.pipeline.orders import KINDS
from fmoe.plan import dry_run, plan
from fmoe.training import gradients, optim, pipelined

LAYERS = dataclasses.replace(EVERYWHERE, num_layers=5)
TIED = dataclasses.replace(LAYERS, tied_head=True)


def real_step(axes, config, schedule, stages, how):
    """This rank along pp; its bytes of params, moments and gradients; what it sent for what; the most
    forwards in flight, and the most bytes at once."""
    mesh, how = bare_mesh(axes if "," in axes else f"{axes},dp=1"), dict(how)
    dtype, rows = how.pop("compute_dtype"), how.pop("batch_size") // group_of(mesh, token_axes(mesh)).size
    step = gradients.of_model(config, mesh, dtype=dtype, schedule=schedule, stages=stages, **how)
    params = decoder.init(config, 0, mesh=mesh, stages=stages)
    state, tokens = optim.adamw().init(params), torch.randint(config.vocab_size, (2, rows, 64))
    in_flight, send, run = [], dist.batch_isend_irecv, pipelined.run
    counting = Counting(collective_ops._c10d)

    def sending(ops):
        counting.sent["pipeline"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return send(ops)

    def ran(*args, **kwargs):
        found = run(*args, **kwargs)
        in_flight.append(found.peak)
        return found

    with pytest.MonkeyPatch.context() as patch, wire_bytes() as tokens_sent:
        patch.setattr(collective_ops, "_c10d", counting)
        patch.setattr(dist, "batch_isend_irecv", sending)
        patch.setattr(pipelined, "run", ran)
        _, grads = step(params, *tokens)
    counting.sent["tokens"] = sum(t.sent for t in tokens_sent.values())
    held = nbytes(params), nbytes(state), nbytes(grads)
    del grads
    with pytest.MonkeyPatch.context() as patch, RealRun(on_cuda=False) as real:
        patch.setattr(dry_run, "SENT", {})
        real.numbers(optree.tree_map(local, (params, state)))
        step(params, *tokens)
    sent = {purpose: n for purpose, n in counting.sent.items() if n}
    return mesh.get_local_rank("pp"), held, sent, in_flight, real.peak(0, len(real.timeline))[0]


@pytest.mark.parametrize(
    ("axes", "config", "schedule", "zero", "wrap"),
    quick(
        [("pp=2", TIED, "zero_bubble", 3, same), ("pp=2,ep=2", TIED, "interleaved", 1, FULL)],
        itertools.product(["pp=2", "pp=2,ep=2", "pp=2,dp=2"], [TIED], KINDS, (1, 2, 3), (same, FULL)),
    ),
)
def test_each_rank_holds_and_sends_what_was_planned(pool, axes, config, schedule, zero, wrap):
    """Every token goes to every device, so that what is sent can be planned to the byte."""
    how = dict(batch_size=16, micro_batches=4, compute_dtype=BFLOAT16, per_layer=wrap, zero=zero)
    schedule = make_schedule(schedule, pp=2, micro_batches=4)
    chosen = dict(schedule=schedule, stages=cut(config, schedule.stage_to_rank))
    found = plan(config, axes, seq_len=64, device_type="cpu", max_norm=None, **chosen, **how)
    assert [rank.in_flight for rank in found.ranks] == [*in_flight(schedule).until_weight]
    ran = pool.run(ranks_of(axes), real_step, axes, config, *chosen.values(), how)
    for number, held, sent, forwards, most in ran:
        rank = found.ranks[number]
        assert held == (rank.parameters, rank.optimizer, rank.gradients)
        assert sent == rank.sent
        assert forwards == [rank.in_flight]
        step = max(rank.peaks[phase] for phase in ("forward", "backward"))
        assert 0.9 * most < step <= 1.01 * most  # a transfer's thread may let go of its tensors late


def test_a_recomputed_layer_s_gradients_are_held_between_the_halves_of_its_backward():
    """Its first half gives them all. The first stage has no first half."""
    how = dict(batch_size=8, seq_len=64, micro_batches=4, per_layer=FULL, device_type="cpu")
    (first, last), (first_in_halves, last_in_halves) = (
        plan(
            LAYERS, "pp=2", schedule=make_schedule(name, pp=2, micro_batches=4, stages_per_rank=1), **how
        ).ranks
        for name in ("1f1b", "zero_bubble")
    )
    more = last_in_halves.phases["backward"]["gradients"] - last.phases["backward"]["gradients"]
    assert more == pytest.approx(last.gradients, rel=0.01)
    assert first_in_halves.phases["backward"]["gradients"] == first.phases["backward"]["gradients"]
    assert sum(last_in_halves.activations.values()) >= sum(last.activations.values()) > 0


def test_backwards_may_be_whole_for_some_micro_batches_and_in_halves_for_others():
    def order(stage):
        kinds = "FB", "FIW", "FB", "FIW"
        return [Action(stage, kind, m) for m in range(4) for kind in kinds[m]]

    mixed = from_computations([order(0), order(1)], (0, 1))
    how = dict(batch_size=8, seq_len=64, micro_batches=4, device_type="cpu")
    found, alone = (plan(LAYERS, "pp=2", schedule=s, **how) for s in (mixed, "1f1b"))
    unlike = [
        [Action(s, kind, m) for m in range(4) for kind in kinds] for s, kinds in enumerate(("FB", "FIW") * 2)
    ]
    mixed_by_rank = from_computations(unlike, range(4))
    assert {r.in_flight for r in plan(LAYERS, "pp=4", schedule=mixed_by_rank, **how).ranks} == {1}
    for a, b in zip(found.ranks, alone.ranks):
        assert a.in_flight == 1
        assert (a.parameters, a.gradients, a.sent) == (b.parameters, b.gradients, b.sent)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "gpipe"}, "make_schedule: name: got 'gpipe', expected one of '1f1b'"),
        (
            {"schedule": make_schedule("interleaved", pp=2, micro_batches=2, stages_per_rank=3)},
            "plan: schedule: got 6 stages, expected at most 5, one for each layer. Have fewer ranks along pp",
        ),
        (
            {"schedule": make_schedule("1f1b", pp=3, micro_batches=2)},
            "plan: schedule: got one of 3 ranks and",
        ),
        ({"stages": Stages(((0, 1), (1, 3)), (0, 1))}, "plan: stages: got Stages"),
        (
            {"schedule": "zbv", "stages": cut(LAYERS, (0, 1))},
            "plan: stages.ranks: got (0, 1), expected (0, 1",
        ),
    ],
)
def test_what_does_not_fit_the_mesh_is_named(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        plan(LAYERS, "pp=2", batch_size=4, seq_len=32, micro_batches=2, **options)
