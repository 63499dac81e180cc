"""Pictures hold what they were given; ``python -m fmoe plot`` draws them from files."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import optree
import pytest
import torch
from pages import DOCS

import fmoe
from fmoe import __main__ as commands
from fmoe.bench import pictures
from fmoe.bench.layers import Shape, config_for, layer_memory
from fmoe.introspect import kept_bytes
from fmoe.pipeline import Costs, make_schedule, timeline
from fmoe.training.plot import (
    plot_layers,
    plot_load,
    plot_loss,
    plot_memory,
    plot_schedule,
    plot_table,
    save_figure,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(path: Path) -> set[str]:
    return {"".join(element.itertext()) for element in ET.parse(path).getroot().iter(f"{SVG}text")}


def random_records(steps, layers=2, experts=5):
    counts = torch.randint(0, 50, (steps, layers, experts)) + 1
    losses = torch.rand(steps) + 2
    pairs = enumerate(zip(losses.tolist(), counts.tolist()))
    return [{"step": 3 + i, "loss": loss, "tokens_per_expert": c} for i, (loss, c) in pairs], counts


# ---- losses -----------------------------------------------------------------------------------------


def test_runs_are_points_and_averages_and_references_are_lines():
    falling = [{"step": i, "loss": 6.0 - i / 50} for i in range(201)] + [{"step": 201, "loss": float("nan")}]
    noisy, _ = random_records(50)
    noisy[9] |= {"held_out_loss": 2.5}
    figure = plot_loss({"falling": falling, "noisy": noisy}, reference={"uniform": 5.545})
    points, means, others, _, held_out, line = figure.axes[0].lines
    assert [*points.get_ydata()] == [r["loss"] for r in falling[:-1]]
    assert [*points.get_xdata()] == [*means.get_xdata()] == [*range(201)]
    assert [*means.get_ydata()[:-2]] == pytest.approx([*points.get_ydata()[:-2]]), "a straight line stays one"
    assert [*others.get_xdata()] == [*range(3, 53)]
    assert (held_out.get_xydata() == [[12, 2.5]]).all()
    assert {*line.get_ydata()} == {5.545}
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["falling", "noisy", "noisy, held out", "uniform, 5.54"]


def test_averages_are_of_a_fiftieth_of_the_steps():
    losses = torch.randn(250).tolist()
    figure = plot_loss({"run": [{"step": i, "loss": loss} for i, loss in enumerate(losses)]})
    means = figure.axes[0].lines[1].get_ydata()
    assert means[100] == pytest.approx(sum(losses[98:103]) / 5)
    assert [means[0], means[1]] == pytest.approx([losses[0], sum(losses[:3]) / 3])
    assert means[-1] == pytest.approx(sum(losses[-3:]) / 3)


def test_a_long_run_stays_a_small_picture_and_equal_figures_are_equal_files(tmp_path):
    records = [{"step": i, "loss": 2.0 + i % 2} for i in range(5500)]
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        figure = plot_loss({"<long & plain>": records})
        assert len(figure.axes[0].lines[0].get_xdata()) <= 1000
        save_figure(figure, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size < 100_000
    assert {"step", "loss (nats per token)", "<long & plain>", "0", "5000"} <= texts(paths[0])


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda: plot_loss({}), "plot_loss: runs: got no run"),
        (
            lambda: plot_loss({"a": [{"step": 0, "loss": float("inf")}]}),
            r"plot_loss: runs\['a'\]: got no finite",
        ),
        (lambda: plot_load([{"step": 0, "loss": 1.0}]), "plot_load: records: got no tokens_per_expert"),
        (
            lambda: plot_load([{"step": i, "tokens_per_expert": [[1] * (2 + i)]} for i in range(2)]),
            "plot_load: records: got 2 or 3 experts a layer, expected the same number everywhere",
        ),
        (
            lambda: plot_load([{"step": 0, "tokens_per_expert": [[1], [2, 3]]}]),
            "plot_load: records: got 1 or 2 experts a layer, expected the same",
        ),
        (
            lambda: plot_load([{"step": i, "tokens_per_expert": [[1]] * (1 + i)} for i in range(2)]),
            "plot_load: records: got 1 or 2 layers a record, expected the same number everywhere",
        ),
        (
            lambda: plot_load([{"tokens_per_expert": [[1, 2]]}]),
            "plot_load: records: got a record whose step is None, expected a number",
        ),
        (
            lambda: plot_loss({"a": [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}]}),
            r"plot_loss: runs\['a'\]: got a record whose loss is None, expected a number",
        ),
        (
            lambda: plot_loss({"a": [{"loss": 1.0}]}),
            r"plot_loss: runs\['a'\]: got a record whose step is None, expected a number",
        ),
        (lambda: plot_memory({}), "plot_memory: kept: got no policy"),
        (lambda: plot_layers([]), "plot_layers: results: got no layer, expected results of bench_layer"),
        (
            lambda: plot_table({"large": {}}, unit="s"),
            "plot_table: table: got no number, expected at least one",
        ),
        (lambda: plot_layers({"layers": 3}), "plot_layers: results: got no layer"),  # of another benchmark
    ],
)
def test_what_cannot_be_drawn_is_named(draw, text):
    with pytest.raises(ValueError, match=text):
        draw()


PAGE = """
| TFLOP/s, higher is better | **ours** | theirs |
|---|---|---|
| large | **1,234.5** | 70 |
| small | 6 | |

| TFLOP/s | others |
|---|---|
| any | fast |
"""


def test_a_table_of_a_page_is_drawn(command, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert command("plot", page, "--what", "table", "--table", "TFLOP/s, h") == f"{tmp_path / 'page.svg'}\n"
    other = page.with_name("other.md")
    other.write_text(page.read_text().replace("1,234.5", "4,321"))
    drawn = [tmp_path / "page.svg", tmp_path / "other.svg"]
    found = command("plot", page, other, "--what", "table", "--table", "TFLOP/s, h").split()
    assert found == [*map(str, drawn)]
    assert ["1,234.5" in texts(drawn[0]), "4,321" in texts(drawn[1])] == [True, True]
    expected = {"TFLOP/s, higher is better", "ours", "theirs", "large", "small", "1,234.5", "70"}
    assert expected <= texts(tmp_path / "page.svg")
    ours, theirs = (
        plot_table({"large": {"ours": 1234.5, "theirs": 70.0}, "small": {"ours": 6.0}}, unit="")
        .axes[0]
        .containers
    )
    assert [bar.get_height() for bar in ours] == [1234.5, 6.0]
    assert [bar.get_height() for bar in theirs] == [70.0]


@pytest.mark.parametrize(
    ("begins", "text"),
    [
        ("GFLOP/s", "plot: --table: got 'GFLOP/s', expected how the first heading of a table in "),
        (
            "TFLOP/s |",
            "plot: --table: got 'fast' in row 'any', column 'others', expected a number, in the table",
        ),
    ],
)
def test_a_page_without_such_a_table_is_named(command, tmp_path, capsys, begins, text):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit):
        command("plot", page, "--what", "table", "--table", begins)
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.parametrize(
    ("picture", "begins"), [("beside-layer", "TFLOP/s |"), ("beside-step", "tokens/s |")]
)
def test_pictures_of_performance_are_of_rows_of_its_tables(picture, begins):
    """A figure that changes changes in all three places."""
    page = DOCS / "performance.md"
    _, table = pictures._table(page, begins)
    numbers = {f"{number:,.10g}" for row in table.values() for number in row.values()}
    assert numbers | {*table} <= texts(DOCS / f"{picture}.svg")
    below = page.read_text().partition("\n## ")[2]
    cells = {cell.strip(" *").removesuffix(" tokens/s") for cell in re.split(r"[|\n]", below)}
    assert numbers <= cells


# ---- load and memory ------------------------------------------------------------------------------------


def test_load_is_in_fair_shares():
    records, counts = random_records(40, layers=3)
    *panels, bar = plot_load(records).axes
    assert bar.get_ylabel() == "tokens, in fair shares"
    for layer, ax in enumerate(panels):
        shares = torch.tensor(ax.images[0].get_array().tolist(), dtype=torch.float64)
        expected = counts[:, layer].T / counts[:, layer].double().mean(1)
        assert torch.allclose(shares, expected)
        assert ax.images[0].get_extent() == [3, 43, 4.5, -0.5]


def test_many_steps_are_averaged_and_steps_without_counts_left_out():
    records, counts = random_records(2500, layers=1)
    (ax, _) = plot_load([{"step": 0, "loss": 1.0}, *records]).axes
    shares = torch.tensor(ax.images[0].get_array().tolist(), dtype=torch.float64)
    fair = counts[:, 0].double() / counts[:, 0].double().mean(1, keepdim=True)
    assert shares.shape[1] <= 300
    assert torch.allclose(shares[:, 7], fair[63:72].mean(0))


def test_memory_has_a_bar_for_each_policy_and_a_part_for_each_operator(tmp_path):
    kept = {"none": {}, "some": {"topk": 2**20}, "more": {"dispatch": 2**19, "topk": 2**21}}
    figure = plot_memory(kept)
    topk, dispatch = figure.axes[0].containers
    assert [topk.get_label(), dispatch.get_label()] == ["topk", "dispatch"]
    assert [bar.get_width() for bar in topk] == [0, 1, 2]
    assert [(bar.get_x(), bar.get_width()) for bar in dispatch] == [(0, 0), (1, 0), (2, 0.5)]
    save_figure(figure, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_memory_predicted_without_computing_is_what_a_layer_keeps():
    shape = Shape(tokens=48, dim=16, hidden=8, experts=6, top_k=2)
    params = fmoe.moe_init(0, dim=16, hidden_dim=8, num_experts=6, dtype=torch.bfloat16)
    args = optree.tree_map(lambda t: t.requires_grad_(), (params, torch.randn(48, 16).bfloat16()))

    def layer(params, x):
        return fmoe.moe_forward(params, x, router=config_for(shape, "random"))

    predicted = {name: sum(parts.values()) for name, parts in layer_memory(shape).items()}
    assert predicted["no remat"] == kept_bytes(layer, *args)
    policies = {"default": None, 'save("topk")': fmoe.save("topk"), "save_nothing": fmoe.save_nothing}
    for name, policy in policies.items():
        assert predicted[name] == kept_bytes(fmoe.remat(layer, policy), *args), name


# ---- layers -----------------------------------------------------------------------------------------------


def measured(rates, matmul, routing="random"):
    """What a benchmark's JSON holds of a run, as far as it is drawn."""
    layers = [{"layer": name, "rate": rate, "step": 1.0} for name, rate in rates.items()]
    how = dict(
        device="A GPU", dtype="torch.bfloat16", routing=routing, shape=Shape(64, 16, 8, 4, 2)._asdict()
    )
    return how | {"layers": layers, "matmul_tflops": matmul, "not_measured": {"a peer": "why"}, "wrong": {}}


def test_layers_have_bars_and_runs_their_matrix_product(tmp_path):
    results = [measured({"ours": 5.0, "theirs": 3.0}, 9.0), measured({"theirs": 2.5}, 7.0, "hot")]
    ax = plot_layers(results).axes[0]
    ours, theirs = ax.containers
    assert [ours.get_label(), theirs.get_label()] == ["ours", "theirs"]
    assert [bar.get_height() for bar in ours] == [5.0]
    assert [bar.get_height() for bar in theirs] == [3.0, 2.5]
    (one, two), (line, other) = theirs, ax.lines
    for bar, group, best in ((ours[0], line, 9.0), (one, line, 9.0), (two, other, 7.0)):
        assert {*group.get_ydata()} == {best}
        left, right = group.get_xdata()
        assert left <= bar.get_x() < bar.get_x() + bar.get_width() <= right + 1e-9
    assert ours[0].get_x() + ours[0].get_width() <= one.get_x() + 1e-9
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == ["a large matrix product", "ours", "theirs"]
    assert ax.get_ylabel() == "TFLOP/s, forward and backward"
    results[0]["layers"][0]["device"] = 0.5
    assert plot_layers(results).axes[0].get_ylabel() == "TFLOP/s of device time, forward and backward"
    save_figure(plot_layers(results), tmp_path / "layers.svg")
    assert {"A GPU, bfloat16", "2 of 4 experts, hot", "5", "2.5"} <= texts(tmp_path / "layers.svg")


# ---- schedules --------------------------------------------------------------------------------------------


def test_a_schedule_has_a_bar_for_each_computation(tmp_path):
    costs = Costs(1, 0.5, tuple(torch.rand(6).tolist()))
    schedule = make_schedule("zbv", pp=3, micro_batches=4, costs=costs)
    ax = plot_schedule(schedule, costs).axes[0]
    bars = [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in ax.patches]
    timed = [one for rank in timeline(schedule, costs) for one in rank]
    assert [(rank, left) for rank, left, _ in bars] == [(one.rank, one.start) for one in timed]
    assert [width for *_, width in bars] == pytest.approx([one.end - one.start for one in timed])
    assert [text.get_text() for text in ax.texts] == [str(one.action.micro_batch) for one in timed]
    colors = {(one.action.kind, bar.get_facecolor()[:3]) for one, bar in zip(timed, ax.patches)}
    assert len(colors) == 3
    later = {one.action.stage >= 3: bar.get_alpha() for one, bar in zip(timed, ax.patches)}
    assert later[True] < later[False] == 1
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["forward", "gradients of inputs", "gradients of weights"]


# ---- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def plot(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fmoe", "plot", *map(str, arguments)])
        commands.main()
        run.said = capsys.readouterr()
        return [Path(line) for line in run.said.out.splitlines()]

    return run


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name / "metrics.jsonl" for name in ("one", "other")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("".join(json.dumps(record) + "\n" for record in random_records(4)[0]))
    return paths


def test_pictures_lie_beside_the_metrics(plot, files):
    one, other = files
    assert plot(one) == [one.parent / "loss.svg", one.parent / "load.svg"]
    made = plot("--reference", "uniform=5.545", "--reference", "a = b=3", one, other)
    assert made == [one.parent / "loss.svg", one.parent / "load.svg", other.parent / "load.svg"]
    assert {"one", "other", "uniform, 5.54", "a = b, 3.00"} <= texts(made[0])
    assert {"MoE layer 0", "MoE layer 1", "expert"} <= texts(made[1])


def test_one_picture_has_the_name_it_is_given(plot, files, tmp_path):
    out = tmp_path / "memory.svg"
    assert plot("--what", "memory", "--out", out, "--sizes", 16384, 7168, 2048, 256, 8) == [out]
    assert {"no remat", "default", "topk", "experts_grouped_mm"} <= texts(out)
    assert plot("--what", "load", files[0]) == [files[0].with_name("load.svg")]
    where = "--model", "debug", "--mesh", "ep=2"
    assert plot("--what", "placement", *where, "--out", out) == [out]
    assert {"0", "1", "layers.{1-3}.mlp.experts.w_in"} <= texts(out)
    schedule = "--schedule", "interleaved", "--pp", 2, "--micro-batches", 4, "--costs", 1, 1, 2
    assert plot("--what", "schedule", *schedule, "--out", out) == [out]
    assert {"interleaved, 2 ranks, 4 micro-batches: 11.1% idle", "forward", "backward"} <= texts(out)


def test_metrics_files_of_one_folder_have_pictures_of_their_own(plot, tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "b.txt")]
    for layers, path in enumerate(paths, 1):
        path.write_text("".join(json.dumps(r) + "\n" for r in random_records(4, layers=layers)[0]))
    made = plot(*paths, "--what", "load")
    assert [path.name for path in made] == ["a-load.svg", "b.jsonl-load.svg", "b.txt-load.svg"]
    drawn = [sum(text.startswith("MoE layer") for text in texts(path)) for path in made]
    assert drawn == [1, 2, 3]


def test_layers_of_files_are_one_picture(plot, tmp_path):
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for number, file in enumerate(files):
        file.write_text(json.dumps([measured({f"layer {number}": 1.0}, 2.0)]))
    assert plot("--what", "layers", *files) == [tmp_path / "a.svg"]
    assert {"layer 0", "layer 1", "a large matrix product"} <= texts(tmp_path / "a.svg")


def test_a_run_without_counts_has_losses_only(plot, files, tmp_path):
    dense = tmp_path / "metrics.jsonl"
    dense.write_text('{"step": 0, "loss": 2.5}\n')
    assert plot(files[0], dense) == [files[0].with_name("loss.svg"), files[0].with_name("load.svg")]
    assert plot.said.err == f"{dense} has no tokens_per_expert, so there is no picture of its load\n"
    assert plot(dense, "--out", tmp_path / "one.svg") == [tmp_path / "one.svg"]


def test_errors_are_texts_and_a_status(plot, files, tmp_path, capsys):
    (tmp_path / "null.jsonl").write_text('{"step": 0, "loss": null}')
    for arguments, text in (
        (("--what", "loss"), "plot: name the metrics.jsonl of a run, or --what one of memory"),
        (
            ("--what", "schedule", files[0]),
            "plot: name the metrics.jsonl of a run, or --what one of memory, placement",
        ),
        (("--what", "schedule", "--pp", 0), "make_schedule: pp: got 0, expected an integer of at least 1."),
        ((files[0], "--out", "x.svg"), "--out: got one file for 2 pictures. Choose one with --what."),
        (("--what", "layers", files[0]), f"plot: metrics: got {files[0]}: "),
        ((tmp_path / "none.jsonl",), "read_metrics: path: got [Errno 2]"),
        ((tmp_path / "null.jsonl", "--what", "loss"), "plot_loss: runs["),
        ((files[0], "--what", "loss", "--out", tmp_path / "no" / "x.svg"), "[Errno 2] No such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            plot(*arguments)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert shown.startswith(text)
        assert shown.count("\n") == 1
    for reference in ("foo", "=3", "a=b"):
        with pytest.raises(SystemExit):
            plot(files[0], "--reference", reference)
        assert (
            f"--reference: got {reference}, expected LABEL=LOSS, as uniform=5.545" in capsys.readouterr().err
        )


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot_loss needs matplotlib: pip install matplotlib"):
        plot_loss({"run": [{"step": 0, "loss": 1.0}]})


def test_the_command_says_so_too(plot, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        plot(files[0])
    assert capsys.readouterr().err == "plot_loss needs matplotlib: pip install matplotlib\n"
