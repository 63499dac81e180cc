"""What users call on a backend, experts or a router of theirs passes what is right and says what is wrong."""

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from devices import bare_mesh

import fmoe
from fmoe.extend import Group, group_of, layout
from fmoe.ops.reference import swiglu_reference
from fmoe.parallel import AllToAll, all_gather, reduce_scatter
from fmoe.parallel.collectives import group_alone
from fmoe.testing import LawBroken, check_backend, check_experts, check_router
from fmoe.testing.backend import LAWS
from fmoe.testing.report import Report

MOST = [name for name in LAWS if name != "compilation"]


def broken_by(check):
    """The laws that a check names, and what it says."""
    with pytest.raises(LawBroken) as caught:
        check()
    first, rest = str(caught.value).split("\n", 1)
    return set(re.findall(r"^(\w+): ", rest, re.M)) or {*re.findall(r"(\w+) met \w+: ", first)}, str(
        caught.value
    )


# ---- backends ----------------------------------------------------------------------------------------


class ForgetsWeights(AllToAll):
    """Sends them without a way back for their gradient."""

    def dispatch(self, x_TD, routing):
        x_SD, plan = super().dispatch(x_TD, routing)
        return x_SD, replace(plan, weights_SK=plan.weights_SK.detach())


class Louder(AllToAll):
    """Right forward and backward, each by a thousandth too much."""

    def combine(self, y_SD, plan):
        return super().combine(y_SD, plan) * 1.001


class Joins(AllToAll):
    """Forgets what join adds."""

    def join(self, coming, plan, plus):
        return coming.y_TD


class Remembers(AllToAll):
    """One plan for all dispatches: the last."""

    last = []  # noqa: RUF012

    def dispatch(self, x_TD, routing):
        x_SD, plan = super().dispatch(x_TD, routing)
        self.last[:] = [plan]
        return x_SD, plan

    def combine(self, y_SD, plan):
        return super().combine(y_SD, self.last[0])


class Keeps(AllToAll):
    """A reference to all that it ever sent."""

    kept = []  # noqa: RUF012

    def dispatch(self, x_TD, routing):
        self.kept.append(x_TD.clone())
        return super().dispatch(x_TD, routing)


class Wild(AllToAll):
    """What has no expert here is multiplied by zero on the way back, which NaN survives."""

    def combine(self, y_SD, plan):
        return super().combine(y_SD, plan) + 0 * y_SD.new_tensor(torch.nan)


class ForgetsWhatTheRouterSays(AllToAll):
    """Weighs outputs, also where inputs were to be weighed."""

    def dispatch(self, x_TD, routing):
        x_SD, plan = super().dispatch(x_TD, routing)
        return x_SD, replace(plan, score_before_experts=False)


class LooksAtGradMode(AllToAll):
    def combine(self, y_SD, plan):
        return super().combine(y_SD, plan) * (1 if torch.is_grad_enabled() else 2)


class KeepsSteps(AllToAll):
    """What it sends while gradients are wanted."""

    kept = []  # noqa: RUF012

    def dispatch(self, x_TD, routing):
        if torch.is_grad_enabled():
            self.kept.append(x_TD.clone())
        return super().dispatch(x_TD, routing)


class Raises(AllToAll):
    def combine(self, y_SD, plan):
        raise KeyError("no such token")


MUTANTS = {
    ForgetsWeights: {"oracle", "degenerate", "invariance", "adjoint", "second", "transforms"},
    Louder: {"oracle", "degenerate", "invariance", "adjoint", "second"},
    Joins: {"oracle", "plans"},
    Remembers: {"plans"},
    Keeps: {"no_leak"},
    KeepsSteps: {"no_leak"},
    ForgetsWhatTheRouterSays: {"oracle"},
    LooksAtGradMode: {"oracle"},
    Wild: {"oracle", "adjoint", "unused_rows"},
}


def mutant(cls, axes):
    mesh = bare_mesh(axes)
    group = group_of(mesh, ("ep",)) if mesh.size() > 1 else Group(group_alone(), 1, 0)
    laws = [name for name in LAWS if name in MUTANTS.get(cls, {"oracle"})]
    return broken_by(lambda: check_backend(cls(group), mesh, dtype=torch.float64, dim=8, laws=laws, seed=5))


@pytest.mark.parametrize("cls", MUTANTS, ids=lambda cls: cls.__name__)
def test_a_wrong_backend_is_told_which_law_it_breaks(pool, cls):
    found = pool.run(2, mutant, cls, "ep=2")
    for broken, text in found:
        assert broken >= MUTANTS[cls], text
        assert "seed=5." in text and f"{cls.__name__} on (ep=2), cpu, float64" in text
    assert found[0] == found[1] or " met " in found[0][1]  # every rank says the same


def test_an_exception_names_the_law_and_what_was_raised(pool):
    for broken, text in pool.run(1, mutant, Raises, "ep=1"):
        assert broken == {"oracle"}
        assert "Raises on (ep=1), cpu, float64: oracle met KeyError: 'no such token'" in text
        assert "the dense oracle" in text and "Again: laws=['oracle'], seed=5." in text


class Gathering(NamedTuple):
    """All rows to all devices: an expensive backend, and a right one, of collectives alone."""

    group: Group
    most: int = 8

    def dispatch(self, x_TD, routing):
        held, more = routing.counts_E.shape[0] // self.group.size, self.most - len(x_TD)
        padded = [
            torch.nn.functional.pad(t, (0, 0, 0, more), value=fill)
            for t, fill in ((x_TD, 0), (routing.weights_TK, 0), (routing.expert_ids_TK, -1))
        ]
        x_SD, weights_SK, ids_SK = (all_gather(t, "ep") for t in padded)
        ids_SK = ids_SK - self.group.position * held
        ids_SK = torch.where((ids_SK >= 0) & (ids_SK < held), ids_SK, -1)
        index = layout(ids_SK, held, ids_SK.numel())
        before = routing.score_before_experts
        return x_SD, fmoe.Plan(weights_SK, *index, (routing.expert_ids_TK,), before, self)

    def combine(self, y_SD, plan):
        return reduce_scatter(y_SD, "ep")[: len(plan.sent[0])]


def gathering(axes):
    mesh = bare_mesh(axes)
    backend = Gathering(group_of(mesh, ("ep",)))
    return check_backend(backend, mesh, dtype=torch.float64, dim=8, laws=MOST).broken


@pytest.mark.slow  # tests of docs/backends.md check one
@pytest.mark.parametrize("axes", ["ep=2", "dp=2,ep=2"])
def test_another_right_backend_keeps_the_laws(pool, axes):
    assert not any(pool.run(2 if axes == "ep=2" else 4, gathering, axes))


def mesh_of_one():
    return fmoe.make_mesh("ep=1", device_type="cpu")


def test_the_report_has_a_line_for_each_law():
    report = check_backend(
        None, fmoe.make_mesh("ep=1", device_type="cpu"), laws=["oracle", "adjoint"], seed=3
    )
    assert isinstance(report, Report) and not report.broken and report.seed == 3
    title, oracle, adjoint = str(report).splitlines()
    assert title.endswith("cpu, float32, seed 3")
    assert re.fullmatch(
        r"  oracle +holds +\d+\.\d s  at worst, .* is off by \S+, allowed 3.0e-05", oracle
    ) or (re.fullmatch(r"  oracle +holds +\d+\.\d s  at worst, .* is off by \S+, allowed 6.0e-05", oracle))
    assert re.fullmatch(r"  adjoint +holds +\d+\.\d s  exactly", adjoint)


def test_checking_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    check_backend(None, mesh_of_one(), laws=["plans"])
    assert torch.equal(torch.randn(3), expected)


# ---- experts -----------------------------------------------------------------------------------------


def one_tanh(w_DD, x):
    return (x @ w_DD).tanh()


def tanh_experts(w_EDD, x_SD, plan, wrong=""):
    x_RD = fmoe.expand(x_SD, plan)
    row_R, side = torch.arange(len(x_RD)), wrong != "one expert too low"
    of_R = torch.searchsorted(plan.offsets_e, row_R, right=side).clamp_max(len(w_EDD) - 1)
    w_RDD = w_EDD[of_R]
    if wrong == "no gradient of params":
        w_RDD = w_RDD.detach()
    y_RD = torch.einsum("rd,rdf->rf", x_RD, w_RDD).tanh()
    if wrong == "looks at rows that are empty":
        y_RD = y_RD + y_RD.sum(0) * 0 + len(plan.slot_R) * 1e-3
    if wrong == "unweighed":
        plan = replace(plan, weights_SK=torch.ones_like(plan.weights_SK))
    if wrong == "other numbers each time":
        y_RD = y_RD * (1 + 1e-6 * torch.rand((), dtype=torch.float64))
    if wrong == "in float32":
        y_RD = y_RD.float().double()
    return fmoe.reduce(y_RD, plan)


EXPERT_LAWS = ["oracle", "invariance", "second", "transforms", "recomputation"]
WRONG_EXPERTS = {
    "one expert too low": {"oracle"},
    "no gradient of params": {"oracle", "second"},
    "looks at rows that are empty": {"oracle"},
    "unweighed": {"oracle", "second"},
    "other numbers each time": {"recomputation"},
    "in float32": {"oracle"},
}


@pytest.mark.parametrize("wrong", WRONG_EXPERTS)
def test_wrong_experts_are_told_which_law_they_break(wrong):
    w = torch.randn(4, 8, 8, dtype=torch.float64) / 3
    experts = lambda *args: tanh_experts(*args, wrong=wrong)  # noqa: E731
    laws = [name for name in EXPERT_LAWS if name != "transforms"]
    broken, text = broken_by(lambda: check_experts(experts, w, one_tanh, dim=8, laws=laws))
    assert broken >= WRONG_EXPERTS[wrong], text


@pytest.mark.parametrize("scale", [0.02, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_of_params_decides_nothing(scale, dtype):
    """Right experts aren't accused for large ones, and nothing isn't right for small ones."""
    params = fmoe.ExpertParams(torch.randn(6, 2, 8, 16) * scale, torch.randn(6, 16, 8) * scale)
    params = fmoe.ExpertParams(*(w.to(dtype) for w in params))
    assert not check_experts(
        fmoe.experts_grouped_mm, params, swiglu_reference, dim=16, laws=EXPERT_LAWS
    ).broken
    nothing = lambda params, x_SD, plan: x_SD * 0  # noqa: E731
    broken, text = broken_by(
        lambda: check_experts(nothing, params, swiglu_reference, dim=16, laws=["oracle", "second"])
    )
    assert broken == {"oracle", "second"}, text


def test_an_exception_does_not_hide_what_was_found_before():
    def experts(params, x_SD, plan):
        if torch._C._functorch.is_batchedtensor(x_SD):
            raise KeyError("no vmap")
        return 2 * tanh_experts(params, x_SD, plan)

    w = torch.randn(4, 8, 8) / 3
    with pytest.raises(LawBroken) as caught:
        check_experts(experts, w, one_tanh, dim=8, laws=["oracle", "second", "transforms"])
    text = str(caught.value)
    assert "transforms met KeyError: 'no vmap'" in text and "2 of 2 laws are broken" in text
    assert caught.value.report.broken == ["oracle", "second"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_librarys_experts_and_ones_own_keep_the_laws(dtype):
    params = fmoe.ExpertParams(torch.randn(6, 2, 8, 16) / 4, torch.randn(6, 16, 8) / 3)
    params = fmoe.ExpertParams(*(w.to(dtype) for w in params))
    laws = [*EXPERT_LAWS, *["compilation"] * (dtype == torch.bfloat16)]  # no other dtype compiles otherwise
    assert not check_experts(fmoe.experts_grouped_mm, params, swiglu_reference, dim=16, laws=laws).broken
    w = (torch.randn(4, 8, 8) / 3).to(dtype)
    assert not check_experts(tanh_experts, w, one_tanh, dim=8, laws=laws).broken


# ---- routers -----------------------------------------------------------------------------------------

CONFIG = fmoe.RouterConfig(top_k=2, num_groups=4, top_groups=2)


def wrong_router(wrong):
    def route(params, x_TD):
        if wrong == "looks at the tokens beside":
            x_TD = x_TD - x_TD.mean(0)
        r = fmoe.route(params, x_TD, CONFIG)
        ids, weights, counts = r.expert_ids_TK, r.weights_TK, r.counts_E
        if wrong == "counts none":
            counts = torch.zeros_like(counts)
        if wrong == "an expert twice":
            ids = ids[:, :1].expand_as(ids)
        if wrong == "no gradient":
            weights = weights.detach() + 0 * weights
        if wrong == "other numbers each time":
            weights = weights * (1 + 0.1 * torch.rand(()))
        if wrong == "narrow":
            weights = weights.half()
        if wrong == "NaN for zeros":
            weights = weights * (x_TD.norm(dim=1, keepdim=True) / x_TD.norm(dim=1, keepdim=True))
        return fmoe.Routing(ids, weights, counts, r.scores_TE)

    return route


WRONG_ROUTERS = {
    "looks at the tokens beside": {"invariance"},
    "counts none": {"form"},
    "an expert twice": {"form"},
    "no gradient": {"oracle"},
    "other numbers each time": {"recomputation"},
    "narrow": {"form"},
    "NaN for zeros": {"form"},
}


@pytest.mark.parametrize("wrong", WRONG_ROUTERS)
def test_a_wrong_router_is_told_which_law_it_breaks(wrong):
    params = fmoe.RouterParams(torch.randn(8, 16) / 4, torch.randn(8) / 10)
    laws = ["form", "invariance", "oracle", "recomputation"]
    broken, text = broken_by(lambda: check_router(wrong_router(wrong), params, dim=16, laws=laws))
    assert broken >= WRONG_ROUTERS[wrong], text


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_the_librarys_router_keeps_the_laws(score_func):
    params = fmoe.RouterParams(torch.randn(8, 16) / 4, torch.randn(8) / 10)
    config = fmoe.RouterConfig(top_k=2, num_groups=4, top_groups=2, score_func=score_func)
    assert not check_router(lambda p, x: fmoe.route(p, x, config), params, dim=16).broken


def test_a_router_in_float32_is_not_accused():
    def route(params, x_TD):
        r = fmoe.route(params, x_TD.float(), CONFIG)
        return fmoe.Routing(r.expert_ids_TK, r.weights_TK.float(), r.counts_E, r.scores_TE.float())

    params = fmoe.RouterParams(torch.randn(8, 16) / 4, torch.randn(8) / 10)
    assert not check_router(route, params, dim=16).broken


# ---- errors ------------------------------------------------------------------------------------------


ERRORS = {
    "check_backend: laws: got ['orakel'], expected some of ['oracle', 'degenerate'": (
        lambda: check_backend(None, mesh_of_one(), laws=["orakel"])
    ),
    "check_backend: mesh: got (dp=1) among 1 ranks, expected a mesh of all ranks with an axis ep": (
        lambda: check_backend(None, fmoe.make_mesh(device_type="cpu")["dp"])
    ),
    "check_backend: num_experts: got 2 on 1 devices, with top_k=3": (
        lambda: check_backend(None, mesh_of_one(), num_experts=2)
    ),
    "check_backend: dtype: got torch.int64, expected one of": (
        lambda: check_backend(None, mesh_of_one(), dtype=torch.int64)
    ),
    "check_experts: params: got shapes [(1, 2), (2, 2)] of ['torch.float32']": (
        lambda: check_experts(tanh_experts, (torch.ones(1, 2), torch.ones(2, 2)), one_tanh, dim=2)
    ),
    "check_router: params: got no tensor, expected a tree of floating tensors": (
        lambda: check_router(lambda p, x: None, (), dim=2)
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_cannot_be_checked_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ERRORS[text]()
