"""Placements and schedules, in a terminal and a notebook, say where everything is."""

import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from devices import bare_mesh
from helpers import quick
from rich.console import Console

import fmoe
from fmoe import P
from fmoe.introspect import show_placement, show_schedule
from fmoe.models import decoder
from fmoe.parallel import distribute
from fmoe.parallel.layout import layouts_of
from fmoe.pipeline import Costs, bubble, make_schedule, timeline
from fmoe.training import plot

SPECS = {
    "dp=2,ep=2": [P(), P("dp"), P(None, "ep"), P("ep", "dp"), P(("dp", "ep")), P("dp", None, "ep")],
    "ep=2,dp=2": [P("dp"), P(("ep", "dp"), None), P(None, "ep", "dp")],
    "rows=4": [P("rows"), P(None, "rows"), P(None, None, "rows")],
}

# ---- placement -----------------------------------------------------------------------------------------


def shown_on(axes):
    """Each device holds what the layouts say that its rank does."""
    mesh, rank = bare_mesh(axes), torch.distributed.get_rank()
    x = torch.arange(8 * 4 * 8).view(8, 4, 8)
    tensors = [distribute(x, spec, mesh) for spec in SPECS[axes]]
    for tensor, layout in zip(tensors, layouts_of("show", tensors), strict=True):
        (place,) = (place for place, ranks in layout.devices.items() if rank in ranks)
        ends = [slice(i * n, (i + 1) * n) for i, n in zip(place, layout.held)]
        assert torch.equal(tensor.to_local(), x[tuple(ends)])
        assert sorted(itertools.chain(*layout.devices.values())) == [0, 1, 2, 3]
    return [repr(show_placement(tensor)) for tensor in tensors]


@pytest.mark.parametrize("axes", quick(["dp=2,ep=2"], SPECS))
def test_devices_hold_what_is_shown_and_show_the_same(pool, axes):
    first, *others = pool.run(4, shown_on, axes)
    assert all(texts == first for texts in others)
    if axes == "dp=2,ep=2":  # without devices, too
        alone = [repr(show_placement(torch.empty(8, 4, 8), axes, specs=spec)) for spec in SPECS[axes]]
        assert [re.sub(r"P\(.*\):", "", text) for text in alone] == [
            re.sub(r"P\(.*\):", "", t) for t in first
        ]


def test_large_tables_leave_out_the_middle():
    text = repr(show_placement(torch.empty(64, 64), "ep=32,tp=16", specs=P("ep", "tp")))
    lines = text.splitlines()
    assert lines[0] == "(64, 64) placed by P('ep', 'tp'): 512 pieces of (2, 4)"
    assert len(lines) == 4 + 16 + 1
    assert re.findall(r"[\w:…]+", lines[4]) == ["0:2", "0", "1", "2", "3", "4", "5", "…", "15"]
    assert re.findall(r"[\w:…]+", lines[-2]) == [
        "62:64",
        "496",
        "497",
        "498",
        "499",
        "500",
        "501",
        "…",
        "511",
    ]
    many = repr(show_placement(torch.empty(4), "dp=8,ep=2", specs=P("ep")))
    assert "0 2 … 14" in many and "1 3 … 15" in many


def test_a_tree_has_a_line_for_tensors_that_are_alike():
    config = decoder.preset("debug")
    shown = show_placement(decoder.specs(config), {"dp": 2, "ep": 4})
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in repr(shown).splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 6}
    name = "layers.{1-3}.mlp.experts.w_in"
    shape = decoder.specs(config).layers[1].mlp.experts.w_in.shape
    held = (shape[0] // 4, *shape[1:3], shape[3] // 2)
    assert rows[name] == [str(shape), "P('ep', None, 'tp', 'dp')", str(held), "8", "1"]
    assert rows["norm"] == ["(128,)", "P(None)", "(128,)", "1", "8"]
    assert rows["layers.{0-3}.mlp_norm"][-1] == "8"
    layouts = layouts_of("show", decoder.specs(config), "dp=2,ep=4")
    here = sum(math.prod(layout.held) for layout in layouts)
    total = decoder.num_params(config)[0]
    assert f"a device holds {here:,} of {total:,} numbers" in repr(shown)


def test_ranges_of_names_have_every_name_and_no_other():
    def names(*pairs):
        tree = {f"a{i}": {f"b{k}": torch.empty(2) for j, k in pairs if j == i} for i, _ in pairs}
        return str(show_placement(tree, "tp=2", specs=P("tp")))

    assert "│ a{1,3}.b{2,4} │" in names((1, 2), (1, 4), (3, 2), (3, 4))
    assert "│ a1.b2, a3.b4 │" in names((1, 2), (3, 4))
    assert "│ a{1-3}.b2 │" in names((1, 2), (2, 2), (3, 2))


def test_names_in_brackets_are_shown_as_they_are():
    shown = show_placement({"[bold]": torch.empty(2), "[/]": torch.empty(2)}, "tp=2", specs=fmoe.P("tp"))
    assert "│ [bold] │" in str(shown) and "│ [/]    │" in str(shown)


def test_a_notebook_shows_a_picture_or_without_matplotlib_colours(monkeypatch):
    shown = show_placement(torch.empty(8, 6), "ep=2,tp=3", specs=P("ep", "tp"))
    bundle = shown._repr_mimebundle_(include=None, exclude=None)
    texts = [
        "".join(e.itertext()) for e in ET.fromstring(bundle["image/svg+xml"]).iter() if e.tag.endswith("text")
    ]
    assert {"0", "1", "2", "3", "4", "5", "0:4", "2:4"} <= {*texts}
    assert bundle["text/plain"] == repr(shown)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for one in (shown, show_schedule(make_schedule("1f1b", pp=2, micro_batches=2))):
        bundle = one._repr_mimebundle_()
        assert {*bundle} == {"text/plain", "text/html"}
        assert "background-color: #a6cee3" in bundle["text/html"]
    with pytest.raises(ImportError, match="plot_placement needs matplotlib"):
        shown.figure()


def test_a_picture_has_the_tensors_that_are_cut():
    figure = show_placement(decoder.specs(decoder.preset("debug")), "ep=4").figure()
    titles = [ax.get_title().splitlines()[0] for ax in figure.axes]
    assert "layers.{1-3}.mlp.experts.w_in" in titles and "norm" not in titles
    assert figure.get_supxlabel().endswith("whole on every device")
    with pytest.raises(ValueError, match="plot_placement: layouts: got no tensor, expected at least one"):
        plot.plot_placement([])


@pytest.mark.parametrize(
    ("args", "specs", "text"),
    [
        ((torch.ones(2),), None, "show_placement: tree: got a Tensor, of which nothing says where it lies"),
        (({"a": torch.ones(2)},), P(), "show_placement: mesh: got None, expected a mesh, as tree.a is no DT"),
        (({"a": 3}, "ep=2"), P(), "show_placement: tree.a: got int, expected a tensor or a ParamSpec."),
        (({"a": torch.ones(2)}, 3), P(), "show_placement: mesh: got 3, expected a mesh, or axes and sizes"),
        (({"a": torch.ones(2)}, "q=2"), P(), "show_placement: axes: got q=2, expected each of ('pp', 'dp'"),
        (({"a": torch.ones(3)}, "ep=2"), P("ep"), "tree.a: P('ep') for shape (3,): dimension 0 of size 3"),
        (({"a": torch.ones(3)}, "ep=2"), P(None, "ep"), "tree.a: P(None, 'ep') for shape (3,): 2 entries fo"),
        (({"a": torch.ones(2)}, "ep=2"), P("q"), "tree.a: P('q') for shape (2,): 'q' isn't an axis of the m"),
        (({"a": torch.ones(3)}, "ep=2"), {"b": P()}, "show_placement: specs: got a tree that is no prefix"),
    ],
)
def test_errors(args, specs, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        show_placement(*args, specs=specs)


# ---- schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_a_schedule_is_drawn_to_scale_at_any_cost(name):
    costs = Costs(*(torch.randint(1, 9, (3,)) / 2).tolist())
    schedule = make_schedule(name, pp=3, micro_batches=4, costs=costs)
    lines = repr(show_schedule(schedule, costs)).splitlines()
    assert lines[0] == f"{name}, 3 ranks, 4 micro-batches: {bubble(schedule, costs):.1%} idle"
    assert lines[-1].startswith("in flight: ")
    for line, rank in zip(lines[1:-1], timeline(schedule, costs), strict=True):
        assert re.findall(r"\d+[FBIW]\d+", line) == [str(timed.action) for timed in rank]
    shortest = min(timed.end - timed.start for rank in timeline(schedule, costs) for timed in rank)
    for line, rank in zip(lines[1:-1], timeline(schedule, costs)):
        for label, timed in zip(re.finditer(r"\d+[FBIW]\d+", line), rank):
            assert label.start() == len("rank 0  ") + round(timed.start * 4 / shortest)
    assert repr(show_schedule(make_schedule(name, pp=3, micro_batches=4))).splitlines()[1:-1] == [
        line.rstrip() for line in str(make_schedule(name, pp=3, micro_batches=4)).splitlines()
    ]
    console = Console(width=40, force_terminal=True, color_system="truecolor")
    with console.capture() as text:
        console.print(show_schedule(schedule, costs))
    assert "48;2;166;206;227" in text.get()  # forwards are blue


def test_a_drawing_of_a_schedule_leaves_out_what_takes_no_time():
    schedule, costs = make_schedule("zbv", pp=2, micro_batches=3), Costs(weight=0.0)
    lines = repr(show_schedule(schedule, costs)).splitlines()[1:-1]
    for line, rank in zip(lines, timeline(schedule, costs), strict=True):
        shown = [str(timed.action) for timed in rank if timed.action.kind != "W"]
        assert re.findall(r"\d+[FBIW]\d+", line) == shown
