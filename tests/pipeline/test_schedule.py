"""Schedules against PyTorch's, by their clock, and run with sends that wait for their receives."""

import dataclasses
import itertools
import random
import re

import pytest
from helpers import fresh_seed
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from fmoe.pipeline import (
    Action,
    Costs,
    Schedule,
    bubble,
    from_computations,
    in_flight,
    make_schedule,
    timeline,
)
from fmoe.pipeline.clock import needs

KINDS = {
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
}
LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def theirs(name, pp, micro_batches, stages_per_rank):
    """PyTorch's computations of each rank, in order."""
    ranks = get_schedule_ops(KINDS[name], pp, micro_batches, stages_per_rank)
    return [
        [
            Action(a.stage_index, LETTERS[a.computation_type.name], a.microbatch_index)
            for a in rank
            if a is not None and a.computation_type.name in LETTERS
        ]
        for rank in ranks
    ]


def without_weights(actions):
    return [action for action in actions if action.kind != "W"]


def random_costs(rng, stages):
    """Of stages or for each, some of them zero, some alike."""

    def cost():
        return rng.choice([0.0, 1.0, 1.0, 2.0, rng.uniform(0.1, 3)])

    def costs():
        return tuple(cost() for _ in range(stages)) if rng.random() < 0.5 else cost()

    return Costs(forward=costs(), input=costs(), weight=rng.uniform(0.1, 3))


def random_schedule(rng, pp=None):
    """One of the four kinds or, for half of them, stages anywhere and any order that can be."""
    pp, micro_batches = pp or rng.randint(1, 5), rng.randint(1, 7)
    if rng.random() < 0.5:
        name = rng.choice([*KINDS])
        most = {"1f1b": [1], "interleaved": [2, 3], "zero_bubble": [1, 2, 3], "zbv": [2]}
        stages_per_rank = rng.choice(most[name])
        costs = random_costs(rng, pp * stages_per_rank)
        sizes = dict(pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
        return make_schedule(name, **sizes, costs=costs)
    stage_to_rank = [*range(pp), *(rng.randrange(pp) for _ in range(rng.randint(0, 5)))]
    rng.shuffle(stage_to_rank)
    stages = range(len(stage_to_rank))
    back = {stage: rng.choice("BI") for stage in stages}
    there_and_back = [*((s, "F") for s in stages), *((s, back[s]) for s in reversed(stages))]
    queues = [[Action(*each, m) for each in there_and_back] for m in range(micro_batches)]
    orders = [[] for _ in range(pp)]
    while queues:
        queue = rng.choice(queues)
        action = queue.pop(0)
        orders[stage_to_rank[action.stage]].append(action)
        queues += [[action._replace(kind="W")]] * (action.kind == "I")
        queues = [queue for queue in queues if queue]
    return from_computations(orders, stage_to_rank, costs=random_costs(rng, len(stages)))


# ---- the order of computations -------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_ranks_compute_in_the_order_of_pytorch(name):
    """But for gradients of weights; and PyTorch's 1F1B begins with micro-batch 1 on the last rank."""
    for pp, micro_batches in itertools.product((2, 3, 4), (4, 5, 8, 9)):
        for per_rank in {"1f1b": [1], "zbv": [2]}.get(name, [2, 3]):
            try:
                expected = theirs(name, pp, micro_batches, per_rank)
            except ValueError:  # rounds of unequal sizes, which PyTorch refuses
                continue
            ours = make_schedule(name, pp=pp, micro_batches=micro_batches, stages_per_rank=per_rank)
            for rank in range(pp - (name == "1f1b")):
                found = ours.computations(rank)
                assert without_weights(found) == without_weights(expected[rank]), (pp, micro_batches, rank)
                assert sorted(found) == sorted(expected[rank])


def test_the_last_rank_of_1f1b_takes_turns():
    schedule = make_schedule("1f1b", pp=3, micro_batches=4)
    assert " ".join(map(str, schedule.computations(2))) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"
    assert " ".join(map(str, schedule.computations(0))) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"


def test_stages_go_round_or_down_and_up():
    assert make_schedule("interleaved", pp=3, micro_batches=3).stage_to_rank == (0, 1, 2, 0, 1, 2)
    schedule = make_schedule("zbv", pp=3, micro_batches=3)
    assert schedule.stage_to_rank == (0, 1, 2, 2, 1, 0)
    assert [schedule.stages(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


# ---- the clock ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"), [("1f1b", 0.304), ("interleaved", 0.180), ("zero_bubble", 0.068), ("zbv", 0.068)]
)
def test_published_bubbles(name, share):
    assert bubble(make_schedule(name, pp=8, micro_batches=16)) == pytest.approx(share, abs=1e-3)


def test_results_take_their_time_to_another_rank():
    """Each computation begins when the last of what it needs has come: by the longest path."""
    rng = random.Random(fresh_seed())
    for _ in range(40):
        schedule = random_schedule(rng)
        ranks = schedule.stage_to_rank
        costs = dataclasses.replace(random_costs(rng, len(ranks)), transfer=rng.choice([0.0, rng.random()]))
        found = {timed.action[:3]: timed for rank in timeline(schedule, costs) for timed in rank}
        for rank in range(len(schedule.actions)):
            free = 0.0
            for action in schedule.computations(rank):
                begins = [free]
                for stage, kind, m in needs(action, len(ranks) - 1):
                    other = found.get((stage, kind, m)) or found[stage, "B", m]
                    begins.append(other.end + costs.transfer * (ranks[stage] != rank))
                timed = found[action[:3]]
                assert timed.start == pytest.approx(max(begins)), (schedule, costs, action)
                free = timed.end


def test_bubbles_by_formula():
    """Idle times of Narayanan et al. and of Qi et al., with costs of all kinds."""
    rng = random.Random(fresh_seed())
    for pp, rounds, per_rank in itertools.product((1, 2, 4, 5), (1, 2, 3), (1, 2, 3)):
        micro_batches = pp * rounds
        f, i, w = (rng.uniform(0.5, 2) for _ in range(3))
        even = Costs(1, 1, 1)
        for name, costs, idle in (
            ("1f1b" if per_rank == 1 else "interleaved", Costs(f, i, w), (pp - 1) * (f + i + w)),
            ("zero_bubble", even, pp - 1),
            *([("zbv", even, pp - 1)] if per_rank == 2 else []),
        ):
            sizes = dict(pp=pp, micro_batches=micro_batches, stages_per_rank=per_rank)
            work = micro_batches * per_rank * sum((costs.forward, costs.input, costs.weight))
            found = bubble(make_schedule(name, **sizes, costs=costs), costs)
            assert found == pytest.approx(idle / (idle + work)), (name, sizes, costs)


def test_costs_of_stages():
    schedule = make_schedule("zero_bubble", pp=2, micro_batches=1, stages_per_rank=1)
    costs = Costs(forward=(1, 2), input=(0, 3), weight=(4, 5))
    first, last = timeline(schedule, costs)
    assert [(str(action), start, end) for action, _, start, end in first] == [
        ("0F0", 0, 1), ("0I0", 6, 6), ("0W0", 6, 10)
    ]  # fmt: skip
    assert [(str(action), start, end) for action, _, start, end in last] == [
        ("1F0", 1, 3), ("1I0", 3, 6), ("1W0", 6, 11)
    ]  # fmt: skip
    assert bubble(schedule, costs) == pytest.approx(1 - 15 / 22)


def test_gradients_of_weights_leave_ranks_no_more_idle_than_pytorch_s():
    better = 0
    for name, pp in itertools.product(("zero_bubble", "zbv"), (3, 4)):
        expected = theirs(name, pp, 2 * pp, 2)
        for costs in (Costs(1, 1.2, 0.8), Costs(1, 0.8, 1.2), Costs(1, 2, 2), Costs(1, 0.7, 1.6)):
            ours = make_schedule(name, pp=pp, micro_batches=2 * pp, costs=costs)
            reference = from_computations(expected, ours.stage_to_rank)
            assert bubble(ours, costs) <= bubble(reference, costs) + 1e-9, (name, pp, costs)
            assert max(in_flight(ours).until_weight) <= max(in_flight(reference).until_weight)
            better += bubble(ours, costs) < bubble(reference, costs) - 1e-9
    assert better


def test_a_picture_in_text_is_to_scale():
    schedule = make_schedule("zero_bubble", pp=2, micro_batches=2, stages_per_rank=1)
    assert str(schedule) == "rank 0  0F0 0F1     0I0 0W0 0I1 0W1\nrank 1      1F0 1I0 1F1 1I1 1W0 1W1"


# ---- residuals ---------------------------------------------------------------------------------------------


def test_residuals_held():
    for pp, m in itertools.product((1, 2, 4), (1, 3, 8)):
        by_hand = tuple(min(pp - rank, m) for rank in range(pp))
        assert in_flight(make_schedule("1f1b", pp=pp, micro_batches=m)) == (by_hand, by_hand)
    gpipe = [[Action(r, kind, m) for kind in "FB" for m in range(5)] for r in range(2)]
    assert in_flight(from_computations(gpipe, (0, 1))).until_weight == (5, 5)
    halves = in_flight(make_schedule("zero_bubble", pp=4, micro_batches=8, stages_per_rank=1))
    assert halves == ((4, 3, 2, 1), (4, 4, 4, 4))
    # (stages_per_rank - 1) * pp + 2 * (pp - 1 - rank) forwards come first, and then one more.
    assert in_flight(make_schedule("interleaved", pp=4, micro_batches=8)).until_weight == (11, 9, 7, 5)
    assert in_flight(make_schedule("zbv", pp=4, micro_batches=12)) == ((8, 8, 8, 8), (8, 8, 8, 8))


# ---- sends and receives --------------------------------------------------------------------------------


def is_transfer(action):
    return action.peer is not None


def one_by_one(actions):
    return [[action] for action in actions if is_transfer(action)]


def by_batch(actions):
    return [[*group] for batch, group in itertools.groupby(actions, lambda a: a.batch) if batch is not None]


def by_neighbours(actions):
    return [[*group] for found, group in itertools.groupby(actions, is_transfer) if found]


def stuck(actions, grouped):
    """The groups at which ranks wait for ever; one ends when each of its transfers has met its other end."""
    groups = [grouped(each) for each in actions]
    opened = [[] for _ in groups]
    while True:
        moved = False
        for rank, mine in enumerate(opened):
            if not mine and groups[rank]:
                opened[rank], moved = groups[rank].pop(0), True
        for rank, mine in enumerate(opened):
            for action in [*mine]:
                if (other := other_end(action, rank)) in opened[action.peer]:
                    mine.remove(action)
                    opened[action.peer].remove(other)
                    moved = True
        if not moved:
            return {rank: mine for rank, mine in enumerate(opened) if mine}


def other_end(action, rank):
    stage, kind, m, _, batch = action
    return Action(
        stage + {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}[kind],
        kind.replace("SEND", "recv").replace("RECV", "SEND").replace("recv", "RECV"),
        m,
        rank,
        batch,
    )


def check_data(schedule: Schedule):
    """Whatever is computed or sent is there before, on the rank itself; every computation happens once."""
    last = len(schedule.stage_to_rank) - 1
    done = []
    for actions in schedule.actions:
        here = set()
        for stage, kind, m, peer, _ in actions:
            before, after = (here & {(s, k, m) for k in "FBI"} for s in (stage - 1, stage + 1))
            forward, backward = (stage, "F", m) in here, {(stage, "B", m), (stage, "I", m)} & here
            assert (stage, kind, m) not in here
            if kind == "F":
                assert not stage or (stage - 1, "F", m) in before or (stage, "RECV_F", m) in here
            elif kind in ("B", "I"):
                arrived = (stage, "RECV_B", m) in here or {(stage + 1, "B", m), (stage + 1, "I", m)} & after
                assert forward and (stage == last or arrived)
            elif kind == "W":
                assert (stage, "I", m) in here
            elif kind.startswith("SEND"):
                assert forward if kind == "SEND_F" else backward
            if peer is not None:
                to = stage + (1 if kind in ("SEND_F", "RECV_B") else -1)
                assert schedule.stage_to_rank[to] == peer
            here.add((stage, kind, m))
        done += [each for each in here if len(each[1]) == 1]
    halves = {(stage, m) for stage, kind, m in done if kind == "W"}
    assert sorted(done) == sorted(
        (stage, kind, m)
        for stage in range(last + 1)
        for m in range(schedule.micro_batches)
        for kind in ("FIW" if (stage, m) in halves else "FB")
    )


def check_pairs(schedule: Schedule):
    """Between two ranks and in one direction, what is received is what was sent, in the same order."""
    ranks = range(len(schedule.actions))
    for source, target in itertools.product(ranks, ranks):
        sent = [a for a in schedule.actions[source] if a.kind.startswith("SEND") and a.peer == target]
        received = [a for a in schedule.actions[target] if a.kind.startswith("RECV") and a.peer == source]
        assert [other_end(action, source) for action in sent] == received
        assert source != target or not sent


def check_batches(schedule: Schedule):
    """Their numbers go up, and computations come between two or none."""
    for actions in schedule.actions:
        numbers = [action.batch for action in actions if is_transfer(action)]
        assert numbers == sorted(numbers)
        assert len(by_batch(actions)) == len({*numbers})


def check_timeline(schedule: Schedule, costs: Costs):
    """Each computation begins when the rank and its inputs are ready, neither before nor after."""
    last, ends = len(schedule.stage_to_rank) - 1, {}
    ranks = timeline(schedule, costs)
    assert [[timed.action for timed in rank] for rank in ranks] == [
        [*schedule.computations(rank)] for rank in range(len(ranks))
    ]
    for (stage, kind, m, *_), _, _, end in itertools.chain(*ranks):
        ends[stage, "I" if kind == "B" else kind, m] = end
    for rank in ranks:
        free = 0.0
        for action, _, start, end in rank:
            stage, kind, m = action[:3]
            backward = [ends[stage, "F", m], ends[stage + 1, "I", m] if stage < last else 0.0]
            inputs = {"F": [ends[stage - 1, "F", m] if stage else 0.0], "W": [ends.get((stage, "I", m))]}
            assert start == max(free, *inputs.get(kind, backward))
            assert end == start + costs.of(action)
            free = end


def test_five_hundred_random_schedules():
    """None blocks, with sends that wait for their receives: one by one, by batch, all neighbours at once."""
    rng = random.Random(fresh_seed())
    for _ in range(500):
        schedule = random_schedule(rng)
        check_data(schedule)
        check_pairs(schedule)
        check_batches(schedule)
        check_timeline(schedule, random_costs(rng, len(schedule.stage_to_rank)))
        for grouped in (one_by_one, by_batch, by_neighbours):
            assert not stuck(schedule.actions, grouped), (schedule, grouped)


def test_large_schedules():
    for name in KINDS:
        schedule = make_schedule(name, pp=16, micro_batches=32)
        check_data(schedule)
        check_pairs(schedule)
        assert not stuck(schedule.actions, one_by_one)


def received_late(actions):
    """Receives moved to where they are needed."""
    held, order = {}, []
    for action in actions:
        if action.kind.startswith("RECV"):
            held[action.stage, action.kind[-1], action.micro_batch] = action
            continue
        stage, kind, m, *_ = action
        needed = None if is_transfer(action) else held.pop((stage, kind.replace("I", "B"), m), None)
        order += [action] if needed is None else [needed, action]
    assert not held
    return order


def test_a_schedule_that_blocks_is_seen():
    for name in KINDS:
        schedule = make_schedule(name, pp=4, micro_batches=8)
        assert stuck([received_late(actions) for actions in schedule.actions], one_by_one)
    sends = [Action(0, "SEND_F", 1, 1, 0), Action(1, "SEND_B", 0, 0, 1)]
    ranks = [[sends[0], other_end(sends[1], 1)], [sends[1], other_end(sends[0], 0)]]
    assert stuck(ranks, one_by_one) and not stuck(ranks, by_neighbours)


# ---- errors ---------------------------------------------------------------------------------------------


def gpipe(pp=2, micro_batches=2):
    return [[Action(r, kind, m) for kind in "FB" for m in range(micro_batches)] for r in range(pp)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: make_schedule("gpipe", pp=2, micro_batches=2),
            "make_schedule: name: got 'gpipe', expected one of '1f1b', 'interleaved', 'zero_bubble', 'zbv'.",
        ),
        (
            lambda: make_schedule("1f1b", pp=0, micro_batches=2),
            "make_schedule: pp: got 0, expected an integer of at least 1.",
        ),
        (
            lambda: make_schedule("zbv", pp=2, micro_batches=-1),
            "make_schedule: micro_batches: got -1, expected an integer of at least 1.",
        ),
        (
            lambda: make_schedule("zbv", pp=2, micro_batches=2.0),
            "make_schedule: micro_batches: got 2.0, expected an integer of at least 1.",
        ),
        (
            lambda: make_schedule("zero_bubble", pp=2, micro_batches=2, stages_per_rank=0),
            "make_schedule: stages_per_rank: got 0, expected an integer of at least 1.",
        ),
        (
            lambda: make_schedule("1f1b", pp=2, micro_batches=2, stages_per_rank=2),
            "make_schedule: stages_per_rank: got 2, expected 1 with name='1f1b'. Leave it out; 'interleaved' "
            "has more.",
        ),
        (
            lambda: make_schedule("interleaved", pp=2, micro_batches=2, stages_per_rank=1),
            "make_schedule: stages_per_rank: got 1, expected at least 2 with name='interleaved'. Leave it "
            "out; '1f1b' has 1.",
        ),
        (
            lambda: make_schedule("zbv", pp=2, micro_batches=2, stages_per_rank=3),
            "make_schedule: stages_per_rank: got 3, expected 2 with name='zbv'. Leave it out; 'zero_bubble' "
            "has any number.",
        ),
        (
            lambda: make_schedule("1f1b", pp=2, micro_batches=2, costs=Costs(forward=(1, 2, 3))),
            "make_schedule: costs.forward: got 3 times, expected one for each of 2 stages.",
        ),
        (
            lambda: bubble(make_schedule("1f1b", pp=2, micro_batches=2), Costs(weight=float("nan"))),
            "bubble: costs.weight: got nan, expected a finite time of at least 0, or a tuple of one for each "
            "stage.",
        ),
        (
            lambda: timeline(make_schedule("1f1b", pp=2, micro_batches=2), Costs(input=(1, -1))),
            "timeline: costs.input: got (1, -1), expected a finite time of at least 0, or a tuple of one for "
            "each stage.",
        ),
        (
            lambda: timeline(make_schedule("1f1b", pp=2, micro_batches=2), Costs(transfer=-1.0)),
            "timeline: costs.transfer: got -1.0, expected a finite time of at least 0.",
        ),
        (
            lambda: bubble(make_schedule("1f1b", pp=2, micro_batches=2), Costs(0, 0, 0)),
            "bubble: costs: got only zeros, expected a time above 0.",
        ),
        (
            lambda: from_computations(gpipe(), (0, 2)),
            "from_computations: stage_to_rank: got (0, 2), expected for each stage its rank, of all 2 ranks "
            "that have orders.",
        ),
        (
            lambda: from_computations([[], []], (0, 1)),
            "from_computations: orders: got no 0F0 on rank 0, no 0B0 on rank 0, no 1F0 on rank 1, no 1B0 on "
            "rank 1, expected F and B, or F, I and W, of each stage and micro-batch once, on the stage's "
            "rank.",
        ),
        (
            lambda: from_computations(gpipe()[::-1], (0, 1)),
            "from_computations: orders: got no 0F0 on rank 0, no 0B0 on rank 0, no 0F1 on rank 0, no 0B1 on "
            "rank 0, no 1F0 on rank 1, no 1B0 on rank 1, no 1F1 on rank 1, no 1B1 on rank 1 and 8 more, "
            "expected",
        ),
        (
            lambda: from_computations([gpipe()[0], [*gpipe()[1], Action(1, "I", 1)]], (0, 1)),
            "from_computations: orders: got no 1W1 on rank 1, a surplus 1B1 on rank 1, expected",
        ),
        (
            lambda: from_computations([gpipe()[0], gpipe()[1][::-1]], (0, 1)),
            "from_computations: orders: got ranks that wait for each other: rank 0 before 0B0, rank 1 before "
            "1B1, expected an order in which one can always go on.",
        ),
        (
            lambda: bubble(Schedule("mine", 1, (0,), ((Action(0, "B", 0), Action(0, "F", 0)),))),
            "bubble: schedule: got ranks that wait for each other: rank 0 before 0B0, expected an order in",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_a_schedule_is_a_value():
    one, other = (make_schedule("zbv", pp=2, micro_batches=3) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != make_schedule("zbv", pp=2, micro_batches=4)
