"""Plans whose experts' rows begin at multiples: the same layer, whatever lies between."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from devices import bare_mesh
from helpers import error, quick

import fmoe
from fmoe.ops.bases import grouped_mm
from fmoe.ops.core.axes import group_of
from fmoe.ops.experts_kernels import swiglu
from fmoe.ops.reference import swiglu_reference
from fmoe.parallel import AllToAll
from fmoe.testing import check_backend, check_experts
from fmoe.testing.samples import ROUTES, routing_of


def dispatched(route, tokens=11, num_experts=5, top_k=2):
    ids = ROUTES[route](0, tokens, num_experts, 1, top_k)
    routing = routing_of(ids, num_experts, dtype=torch.float64, device="cpu")
    x = torch.randn(len(ids), 3, dtype=torch.float64)
    return ids, *fmoe.dispatch(x, routing)


@pytest.mark.parametrize("multiple", [2, 8, 128])
@pytest.mark.parametrize("route", ROUTES)
def test_every_expert_begins_at_a_multiple(route, multiple):
    ids, _, plan = dispatched(route)
    aligned = fmoe.align_rows(plan, multiple)
    num_rows, num_experts = plan.slot_R.shape[0], plan.offsets_e.shape[0]
    assert aligned.slot_R.shape == (num_rows + num_experts * (multiple - 1),)
    assert (aligned.slot_R.dtype, aligned.offsets_e.dtype) == (torch.int64, torch.int32)
    start, held = 0, 0
    for expert, end in enumerate(aligned.offsets_e.tolist()):
        pairs = (ids.flatten() == expert).nonzero()[:, 0]
        held += len(pairs)
        assert start % multiple == 0
        assert end - start == -(-len(pairs) // multiple) * multiple
        slots = aligned.slot_R[start:end]
        assert torch.equal(slots[: len(pairs)], pairs)
        assert (slots[len(pairs) :] == -1).all()
        assert torch.equal(aligned.row_SK.flatten()[pairs], torch.arange(start, start + len(pairs)))
        start = end
    assert (aligned.slot_R >= 0).sum() == (aligned.row_SK >= 0).sum() == held
    assert aligned.weights_SK is plan.weights_SK


def test_one_is_no_alignment_and_aligned_plans_align_again():
    _, x, plan = dispatched("some pairs dropped")
    assert fmoe.align_rows(plan, 1) is plan
    again = fmoe.align_rows(fmoe.align_rows(plan, 3), 8)
    assert (again.offsets_e % 8 == 0).all()
    assert error(fmoe.reduce(fmoe.expand(x, again), again), fmoe.reduce(fmoe.expand(x, plan), plan)) < 1e-12


@pytest.mark.parametrize("multiple", [0, -8, 2.0, "8", None])
def test_what_is_no_multiple_is_refused(multiple):
    _, _, plan = dispatched("any experts")
    text = f"align_rows: multiple: got {multiple!r}, expected a positive integer"
    with pytest.raises(ValueError, match=re.escape(text)):
        fmoe.align_rows(plan, multiple)


def fused(params, x_SD, plan):
    return fmoe.experts_grouped_mm(params, x_SD, plan)


def by_halves(params, x_SD, plan):
    """What rows of no pair hold reaches nothing, even NaN."""
    w_in, w_out = params.w_in.flatten(1, 2).mT, params.w_out.mT
    h = grouped_mm(fmoe.expand(x_SD, plan), w_in, plan.offsets_e).unflatten(1, (2, -1))
    y_RD = grouped_mm(swiglu(h), w_out, plan.offsets_e)
    return fmoe.reduce(torch.where(plan.slot_R[:, None] < 0, torch.nan, y_RD), plan)


@pytest.mark.parametrize(
    ("experts", "multiple"),
    quick([(fused, 3), (by_halves, 8)], itertools.product((fused, by_halves), (3, 8, 128))),
)
def test_experts_of_aligned_rows_keep_the_laws(experts, multiple):
    """Values and gradients of any order and under any transform, with any routing, beside float64."""
    params = fmoe.ExpertParams(torch.randn(4, 2, 5, 6).double(), torch.randn(4, 6, 5).double())

    def aligned(params, x_SD, plan):
        return experts(params, x_SD, fmoe.align_rows(plan, multiple))

    assert check_experts(aligned, params, swiglu_reference, dim=6).broken == []


class Aligned(AllToAll):
    def dispatch(self, x_TD, routing):
        x_SD, plan = super().dispatch(x_TD, routing)
        return x_SD, fmoe.align_rows(plan, 4)


def laws_with_rows_from_elsewhere(laws):
    mesh = bare_mesh("ep=2")
    return check_backend(Aligned(group_of(mesh, ("ep",))), mesh, dtype=torch.float64, laws=laws).broken


def test_received_plans_align_too(pool, slow):
    laws = ["oracle", "degenerate", *["compilation"] * slow]
    assert pool.run(2, laws_with_rows_from_elsewhere, laws, timeout=240.0) == [[], []]


def test_gradients_reach_the_weights_of_an_aligned_plan():
    _, x, plan = dispatched("some pairs dropped")

    def loss(weights, multiple):
        aligned = fmoe.align_rows(replace(plan, weights_SK=weights, score_before_experts=True), multiple)
        return fmoe.expand(x, aligned).sin().sum()

    gradients = [torch.func.grad(loss)(plan.weights_SK, multiple) for multiple in (1, 5)]
    assert error(*gradients) < 1e-12
    assert gradients[0].abs().max() > 0
