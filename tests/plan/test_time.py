"""Planned times add up from work, rates and links, and the work is that of the operators."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from devices import bare_mesh
from helpers import change, fresh_seed
from test_plan import BFLOAT16, EVERYWHERE, FULL, SMALL, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fmoe
from fmoe.bench.rates import SMALL as SIZES
from fmoe.bench.rates import cases, fitted, measure_links, measure_rates
from fmoe.models import decoder
from fmoe.models.counts import flops_per_token
from fmoe.ops.precision import Recipe
from fmoe.pipeline import bubble, make_schedule
from fmoe.plan import Link, Rates, plan, read_rates, time
from fmoe.plan.dry_run import DryRun
from fmoe.plan.rates import PRODUCTS
from fmoe.plan.stopwatch import Stopwatch
from fmoe.plan.work import Work, Works
from fmoe.training import optim

EXPERTS = Recipe(experts="fp8_rowwise")
LINKS = {axis: Link(1e9) for axis in ("pp", "dp", "ep", "tp")}


def rates_of(dtype="float32", flops=1e12, memory=1e10, links=LINKS, **others):
    how = dict(peak_flops=None, memory=memory, optimizer=memory, launch=1e-12, links=links) | others
    return Rates("a device", dtype, flops=dict.fromkeys(PRODUCTS, flops), **how)


# ---- work ----------------------------------------------------------------------------------------


def test_products_have_the_flops_that_pytorch_counts():
    a, b, c = torch.randn(7, 5), torch.randn(5, 3), torch.randn(2, 7, 5)
    for call in (lambda: a @ b, lambda: torch.addmm(a[:, :3], a, b), lambda: c @ b, lambda: c.bmm(c.mT)):
        with FlopCounterMode(display=False) as theirs, Works() as ours:
            call()
        assert ours.at("products").flops == theirs.get_total_flops() > 0


@pytest.mark.parametrize("config", [SMALL, change(SMALL, q_lora_rank=24, tied_head=True)], ids=["", "q_lora"])
def test_a_step_has_the_flops_of_the_model(config):
    """And what training recomputes: attention its scores, and the loss its logits."""
    params, tokens = decoder.init(config, 0), torch.randint(config.vocab_size, (4, 96))
    loss = functools.partial(decoder.loss, config=config)
    with torch.no_grad(), Works() as forward:
        loss(params, tokens, tokens)
    third = flops_per_token(config, 96) * tokens.numel() / 3
    assert sum(forward.at(rate).flops for rate in PRODUCTS) == pytest.approx(third, rel=1e-9)
    with Works() as step:
        fmoe.value_and_grad(loss, has_aux=True)(params, tokens, tokens)
    for rate in ("products", "experts"):
        assert step.at(rate).flops == 3 * forward.at(rate).flops > 0
    keys, values = config.attention.widths
    assert step.at("attention").flops == forward.at("attention").flops > 0
    backward = step.at("attention_backward").flops / forward.at("attention").flops
    assert backward == pytest.approx((3 * keys + 2 * values) / (keys + values))
    assert step.at("loss").flops == 3 * forward.at("loss").flops > 0


@pytest.mark.parametrize("scale", [None, torch.ones(())], ids=["", "scaled"])
def test_the_optimizer_reads_four_trees_and_writes_three(scale):
    params, grads = [torch.randn(4096, 2)], [torch.randn(4096, 2)]
    state = optim.adamw().init(params)
    with Works() as works:
        optim.adamw().update(params, grads, state, 1e-3, scale=scale, donate=True)
    assert works.at("optimizer").moved == pytest.approx(7 * grads[0].nbytes, rel=1e-3)


def test_halves_of_the_experts_backward_do_its_products_once():
    shape, new = SIZES.experts[0], torch.randn
    up, down = (case for case in cases(SIZES) if " backward" in case.name and case.rate == "experts")
    for case, halves in ((up, "experts_up_backward"), (down, "experts_down_backward")):
        call = case.make(lambda *shape: new(shape))
        whole, parts = Works(), Works()
        with whole:
            call()
        with parts:
            for half in ("inputs", "weight"):
                getattr(torch.ops.fmoe, f"{halves}_{half}")(*call.args)
        assert parts.at("experts").flops == whole.at("experts").flops > 0
        assert parts.at("experts").passed >= whole.at("experts").passed > 0
    assert whole.at("experts").flops == 4 * shape.tokens * shape.top_k * shape.dim * shape.hidden


# ---- the stopwatch -------------------------------------------------------------------------------


def elapsed(call, rates, compiled=False):
    """Seconds of a device at work, on tensors of 4 kB."""
    with torch.device("cpu"), FakeTensorMode(), DryRun(on_cuda=False) as run:
        x = torch.empty(1000)
        run.watch = watch = Stopwatch(rates, run.number)
        watch.compiled = compiled
        out = call(x)
        watch.compiled = False
        torch.add(out, 1, out=torch.empty(1000))  # somebody reads it: twice 4 kB
    watch.count(run.totals)
    return round(sum(n for (what, _), n in run.totals.items() if what == "seconds") * 1e-9 - 8, 6)


def test_neighbouring_operators_run_as_one_where_compiled():
    rates = rates_of(memory=1e3)  # a second for a kB
    chain = lambda x: x.sin().cos() * x  # noqa: E731
    assert elapsed(chain, rates) == 8 + 8 + 12
    assert elapsed(chain, rates, compiled=True) == 4 + 4
    assert elapsed(lambda x: x.clone()[:500].sum() + x, rates) == pytest.approx(8 + 2 + 8, abs=0.01)
    assert elapsed(lambda x: x.view(10, 100).expand(10, 100).flatten() + 1, rates) == 8


def test_a_product_ends_what_runs_as_one():
    rates = rates_of(memory=1e3, flops=1e30)

    def call(x):
        y = x.sin().cos().view(100, 10)
        return (y @ y.mT.sin()).flatten()[:1000].exp()

    one, product, another = 4 + 8, 4 + 4 + 40, 4 + 4
    assert elapsed(call, rates, compiled=True) == one + product + another


def test_what_nobody_reads_does_not_run_where_compiled():
    rates = rates_of(memory=1e3)

    def call(x):
        x.exp().log()
        return x.sin()

    assert elapsed(call, rates) == 24
    assert elapsed(call, rates, compiled=True) == 8


def test_products_or_what_they_move_and_then_passes():
    rates = rates_of(flops=10.0, memory=2.0, optimizer=1.0, launch=0.5)
    assert rates.seconds(Work("products", 100, 4)) == 10
    assert rates.seconds(Work("products", 10, 40)) == 20
    assert rates.seconds(Work("experts", 100, 4, 6)) == 13
    assert rates.seconds(Work("optimizer", 0, 4)) == 4
    assert rates.seconds(Work("memory", 0, 0.1)) == 0.5


# ---- what is exposed -----------------------------------------------------------------------------

HOW = dict(batch_size=8, seq_len=64, device_type="cpu", per_layer=same)


def test_a_device_waits_for_tokens_and_sums_in_full():
    latency = {axis: Link(1e9, 1e-3) for axis in LINKS}
    how = HOW | dict(zero=1)  # so that no parameters are on their way meanwhile
    rank, later = (
        plan(EVERYWHERE, "ep=2", rates=rates_of(links=links), **how).ranks[0] for links in (LINKS, latency)
    )
    for purpose in ("tokens", "sums"):
        assert rank.exposed[purpose] == pytest.approx(rank.sent[purpose] / 1e9, rel=1e-3)
    collectives = 4 * (EVERYWHERE.num_layers - EVERYWHERE.num_dense_layers)
    assert later.exposed["tokens"] - rank.exposed["tokens"] == pytest.approx(1e-3 * collectives)


def test_parameters_are_exposed_where_computing_is_shorter():
    instant, slow = (
        plan(SMALL, "dp=2", rates=rates_of(flops=speed, memory=speed), **HOW).ranks[0]
        for speed in (1e30, 1e6)
    )
    assert instant.exposed["parameters"] == pytest.approx(instant.sent["parameters"] / 1e9, rel=1e-3)
    # The embedding and the head are waited for at once, there and back, and so are the first layer and
    # the last sum.
    assert 0 < slow.exposed["parameters"] < 0.9 * instant.exposed["parameters"]
    layers = SMALL.num_layers
    more = dataclasses.replace(SMALL, num_layers=2 * layers)
    twice = plan(more, "dp=2", rates=rates_of(flops=1e6, memory=1e6), **HOW).ranks[0]
    assert twice.exposed["parameters"] == pytest.approx(slow.exposed["parameters"], rel=0.01)


def test_a_collective_along_two_axes_is_as_slow_as_the_slower():
    links = {"dp": Link(1e9), "ep": Link(1e6)}
    found = plan(SMALL, "dp=2,ep=2", rates=rates_of(flops=1e30, memory=1e30, links=links), **HOW).ranks[0]
    assert found.exposed["tokens"] == pytest.approx(found.sent["tokens"] / 1e6, rel=1e-3)
    assert found.exposed["parameters"] > 0.5 * found.sent["parameters"] / 1e6


def test_a_link_may_be_along_two_axes_and_slower_for_tokens():
    links = {"dp": Link(2e3), "ep": Link(1e3, 0.5, all_to_all=1e2), "dp,ep": Link(4e3)}
    rates = rates_of(links=links)
    assert rates.sending(1e3, "ep", "parameters") == 1 + 0.5
    assert rates.sending(1e3, "ep", "tokens") == 10 + 0.5
    assert rates.sending(1e3, "dp,ep", "parameters") == 0.25
    del links["dp,ep"]
    assert rates.sending(1e3, "dp,ep", "parameters") == 1 + 0.5


# ---- whole steps ---------------------------------------------------------------------------------


def test_micro_batches_add_up():
    how = dict(seq_len=64, rates=rates_of(), per_layer=FULL)
    two, three, seven = (plan(SMALL, batch_size=n, micro_batches=n, **how).time.seconds for n in (2, 3, 7))
    assert seven - three == pytest.approx(4 * (three - two))
    assert 0.2 * two < three - two < 0.5 * two


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_pipeline_takes_as_long_as_its_clock_says(schedule):
    config = dataclasses.replace(SMALL, num_layers=8)
    how = dict(batch_size=8, micro_batches=4, seq_len=64, schedule=schedule, device_type="cpu")
    free = {axis: Link(1e30) for axis in LINKS}
    found = plan(config, "pp=2", rates=rates_of(links=free), **how)
    busy = max(rank.busy for rank in found.ranks)
    assert busy < found.time.seconds < 2 * busy
    mean = sum(rank.busy for rank in found.ranks) / 2
    assert found.time.bubble == pytest.approx(1 - mean / found.time.seconds)
    assert found.time.exposed["pipeline"] == pytest.approx(0, abs=1e-12)
    assert found.time.tokens_per_second == pytest.approx(8 * 64 / 2 / found.time.seconds)
    late = plan(config, "pp=2", rates=rates_of(links={**free, "pp": Link(1e30, latency=busy)}), **how).time
    waits = sum(late.exposed.values())  # also of sums over all ranks
    assert waits == pytest.approx(late.seconds - found.time.seconds)
    assert late.exposed["pipeline"] > busy


def test_stages_that_take_equal_times_have_the_bubble_of_the_schedule():
    made = make_schedule("interleaved", pp=4, micro_batches=8)
    computed = [action for rank in range(4) for action in made.computations(rank)]
    times = {action: 1.0 + (action.kind == "B") for action in computed}
    seconds, waits = time.of_pipeline(made, times, [0.0] * 4, 0.0)
    assert 1 - 8 * 6 / seconds == pytest.approx(bubble(made))
    assert waits == 0
    assert time.of_pipeline(made, times, [0.0, 2.0, 1.0, 0.0], 0.0)[0] == seconds + 2


def test_mfu_is_a_share_of_the_peak():
    found = plan(SMALL, batch_size=2, seq_len=64, rates=rates_of(peak_flops=1e12)).time
    assert found.mfu == pytest.approx(flops_per_token(SMALL, 64) * found.tokens_per_second / 1e12)
    assert plan(SMALL, batch_size=2, seq_len=64, rates=rates_of()).time.mfu is None
    assert plan(SMALL, batch_size=2, seq_len=64).time is None


# ---- rates ---------------------------------------------------------------------------------------


def test_fitted_rates_give_the_measured_time_of_all_calls_together():
    measured = measure_rates(dtype=torch.float32, device="cpu", seed=fresh_seed())["measured"]
    rates = rates_of()._replace(**fitted(measured))
    assert {*rates.flops} == {*PRODUCTS, "experts_fp8", "products_fp8"}
    for rate in (*rates.flops, "memory", "optimizer"):
        calls = [m for m in measured if m["rate"] == rate]
        passed = sum(m["passed"] for m in calls) / rates.memory
        speed = rates.flops[rate] if rate in rates.flops else getattr(rates, rate)
        work = sum(m["flops" if rate in rates.flops else "moved"] for m in calls)
        assert work / speed + passed >= 0.99 * sum(m["seconds"] for m in calls)


def test_the_commands_measure_rates_and_plan_with_them(command, tmp_path):
    file = tmp_path / "rates.json"
    shown = command("bench", "rates", "--device", "cpu", "--dtype", "float32", "--out", file)
    assert "optimizer" in shown
    rates = read_rates(file)
    assert (rates.device, rates.dtype, rates.peak_flops) == ("CPU", "float32", None)
    words = [
        "plan",
        "--model",
        "debug",
        "--batch-size",
        4,
        "--seq-len",
        32,
        "--dtype",
        "float32",
        "--rates",
        file,
    ]
    found = json.loads(command(*words, "--json"))
    assert found["time"]["seconds"] == pytest.approx(sum(found["ranks"][0]["seconds"].values()))
    assert f"{found['time']['tokens_per_second']:,.0f} tokens/s a device" in " ".join(command(*words).split())


RATES = Path(__file__).parents[2] / "benchmarks" / "rates"


WIDE = dict(dtype=torch.float32, compute_dtype=BFLOAT16, optimizer=optim.adamw(moments_dtype=BFLOAT16))


@pytest.mark.parametrize(("how", "ms"), [(dict(dtype=BFLOAT16), 199.2), (WIDE, 220.8)])
def test_steps_of_an_h200_take_as_long_as_planned(how, ms):
    """Within a tenth of docs/planning.md. Whoever changes what is counted plans these again."""
    how = dict(batch_size=4, seq_len=4096, compiled=True, **how)
    found = plan(decoder.preset("16B", layers=8), rates=read_rates(RATES / "h200.json"), **how)
    assert found.time.seconds * 1e3 == pytest.approx(ms, rel=0.1)
    assert 0.35 < found.time.mfu < 0.5


def test_rates_of_many_devices_are_assumed_for_every_axis():
    rates = read_rates(RATES / "h100-512.json")
    assert {*rates.links} == {"dp", "ep", "pp", "dp,ep", "pp,dp,ep"}
    assert {"flops", "memory", "links.ep.all_to_all"} <= {
        k for keys in rates.sources for k in keys.split(", ")
    }


def measured_links():
    return measure_links(bare_mesh("dp=2,ep=2"), "cpu")


def test_links_are_measured_along_each_axis_and_along_those_of_tokens(pool):
    for links in pool.run(4, measured_links):
        assert [*links] == ["dp", "ep", "dp,ep"]
        for link in links.values():
            assert 0 < link["latency"] < 1
            assert link["bytes_per_second"] > 2**16 and link["all_to_all"] > 2**16


GOOD = dict(
    device="d", dtype="float32", memory=1.0, optimizer=1.0, launch=1.0, flops=dict.fromkeys(PRODUCTS, 1.0)
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(flops={"products": 1.0}), "flops: got {'products': 1.0}, expected rates of products, experts"),
        (dict(memory=0), "memory: got 0, expected a finite number above 0"),
        (dict(launch=None), "launch: got None, expected a finite number above 0"),
        (dict(peak_flops="fast"), "peak_flops: got 'fast', expected a finite number above 0"),
        (dict(links={"xp": {}}), "links: got {'xp': {}}, expected an object for each of some of the axes"),
        (
            dict(links={"dp,ep": {"bytes_per_second": 1, "all_to_all": -1}}),
            "links.dp,ep.all_to_all: got -1, ",
        ),
        (dict(links={"ep": {"latency": 1}}), "links.ep.bytes_per_second: got None, expected a finite"),
        ([], "got list, expected an object"),
    ],
)
def test_a_file_that_lacks_a_rate_is_an_error(tmp_path, change, text):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(GOOD | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=re.escape(text)):
        read_rates(file)


def test_products_in_fp8_have_rates_of_their_own():
    """All the experts' and dense products' time, and nothing else's, is at these rates."""
    how = dict(batch_size=2, seq_len=64)
    slow, fast = rates_of(), rates_of()
    fast = fast._replace(flops={**fast.flops, "experts_fp8": 1e6, "products_fp8": 1e6})
    plain = plan(SMALL, rates=slow, **how)
    by_kind = [plan(SMALL, rates=fast, precision=p, **how).ranks[0].seconds for p in (EXPERTS, "fp8_rowwise")]
    third = flops_per_token(SMALL, 64) * 128 / 3
    params, tokens = decoder.init(SMALL, 0), torch.zeros(2, 64, dtype=torch.int64)
    with torch.no_grad(), Works() as works:
        decoder.loss(params, tokens, tokens, SMALL, precision="fp8_rowwise")
    counted = {rate: works.at(rate).flops for rate in (*PRODUCTS, "experts_fp8", "products_fp8")}
    assert sum(counted.values()) == pytest.approx(third, rel=1e-9)
    assert counted["experts"] == 0 < counted["experts_fp8"] and counted["products_fp8"] > 0
    expected = 3 * counted["experts_fp8"] / 1e6
    assert by_kind[0]["experts"] == pytest.approx(expected, rel=0.02)
    assert by_kind[1]["matrix products"] == pytest.approx(3 * counted["products_fp8"] / 1e6, rel=0.02)
    high = plan(SMALL, rates=fast, precision="fp8_rowwise_with_gw_hp", **how).ranks[0].seconds
    for kind, rate in (("experts", "experts_fp8"), ("matrix products", "products_fp8")):  # two of three
        assert high[kind] == pytest.approx(2 * counted[rate] / 1e6, rel=0.02)
    same = plain.ranks[0].seconds
    assert by_kind[0]["matrix products"] == pytest.approx(same["matrix products"])
    assert plan(SMALL, precision="fp8_rowwise", **how).ranks[0].parameters == plain.ranks[0].parameters


def test_rates_must_fit_the_plan(tmp_path):
    def error(text):
        return pytest.raises(ValueError, match=re.escape(text))

    how = dict(batch_size=2, seq_len=32)
    with error("plan: rates: got rates of bfloat16, expected those of torch.float32"):
        plan(SMALL, rates=rates_of("bfloat16"), **how)
    with error("plan: rates.links: got no link along pp, dp, expected one for each axis of the mesh"):
        plan(SMALL, "dp=2,pp=2", rates=rates_of(links={}), **how)
    with error("plan: rates.flops: got no experts_fp8 and no products_fp8, expected those of products in"):
        plan(SMALL, rates=rates_of(), precision="fp8_rowwise", **how)
    fast = "('fp8_rowwise', 'fp8_rowwise_with_gw_hp'), or None, which kernels compute"
    with error(f"plan: precision: got 'fp8_block', expected one of {fast}"):
        plan(SMALL, precision="fp8_block", **how)
    with error("No such file"):
        read_rates(tmp_path / "nothing.json")
