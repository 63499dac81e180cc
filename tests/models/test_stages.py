"""Which layers a stage has: cut as well as can be, and every part of a model once."""

import dataclasses
import itertools

import pytest
import torch

from fmoe.models import decoder
from fmoe.models.counts import flops_of_parts
from fmoe.models.stages import Stages, counted_once, cut
from fmoe.pipeline import make_schedule
from fmoe.tree import dotted_names


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
def test_no_other_cut_has_a_cheaper_worst_stage(stages: int) -> None:
    config = dataclasses.replace(decoder.preset("debug"), num_layers=7)
    costs = torch.rand(9, dtype=torch.float64).tolist()
    found = cut(config, range(stages), costs=costs).layers
    each = [costs[0] + costs[1], *costs[2:-2], costs[-2] + costs[-1]]

    def worst(ends: tuple[int, ...]) -> float:
        return max(sum(each[a:b]) for a, b in itertools.pairwise((0, *ends, 7)))

    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])]
    assert all(a < b for a, b in found)
    best = min(worst(ends) for ends in itertools.combinations(range(1, 7), stages - 1))
    assert worst(tuple(b for _, b in found[:-1])) == pytest.approx(best)


def test_by_default_a_layer_costs_its_operations() -> None:
    config = decoder.preset("671B")
    parts = flops_of_parts(config, 4096)
    assert sum(parts) == pytest.approx(decoder.flops_per_token(config, 4096))
    assert parts[0] == 0
    assert parts[1] == pytest.approx(parts[-2], rel=0.01), "a dense layer and a sparse one"
    assert 1.3 < parts[-1] / parts[-2] < 1.4, "the head"
    ends = cut(config, range(8), seq_len=4096).layers
    sums = [sum(parts[1 + a : 1 + b]) + (b == 61) * parts[-1] for a, b in ends]
    even = [sum(parts[1 + a : 1 + b]) + (b == 61) * parts[-1] for a, b in _evenly(61, 8)]
    assert max(sums) < max(even)


def _evenly(layers: int, parts: int) -> list[tuple[int, int]]:
    return [*itertools.pairwise(round(i * layers / parts) for i in range(parts + 1))]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_ranks_hold_every_parameter_once_and_a_tied_embedding_at_both_ends(name: str, tied: bool) -> None:
    config = dataclasses.replace(decoder.preset("debug"), num_layers=8, tied_head=tied)
    params = decoder.init(config, 0)
    schedule = make_schedule(name, pp=3, micro_batches=3)
    stages = cut(config, schedule.stage_to_rank)
    parts = [stages.of_rank(params, rank) for rank in range(3)]
    held = [held for part in parts for held in dotted_names(part)]
    ends = 2 if tied and name != "zbv" else 1  # there the first rank also has the last stage
    assert held.count("embedding") == ends
    assert sorted({*held}) == sorted(dotted_names(params))
    assert len(held) == len({*held}) + ends - 1
    counted = [held for part in parts for held in dotted_names(counted_once(part))]
    assert sorted(counted) == sorted(dotted_names(params))
    for rank, part in enumerate(parts):
        of_stages = [dotted_names(stages.of_stage(params, stage)) for stage in schedule.stages(rank)]
        assert {*itertools.chain(*of_stages)} == {*dotted_names(part)}


def test_biases_move_where_their_layer_is() -> None:
    config = decoder.preset("debug")
    params = decoder.init(config, 0)
    _, stats = decoder.forward(params, torch.randint(256, (2, 16)), config)
    whole = decoder.update_biases(params, stats, 0.01)
    stages = Stages(((0, 2), (2, 4)), (0, 1))
    for rank in (0, 1):
        part = decoder.update_biases(stages.of_rank(params, rank), stats, 0.01)
        for mine, theirs in zip(part.layers, whole.layers):
            if mine and hasattr(mine.mlp, "router"):
                assert torch.equal(mine.mlp.router.bias_E, theirs.mlp.router.bias_E)
