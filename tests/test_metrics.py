import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from fmoe import metrics
from fmoe.metrics import LiveView, MetricsFile, Step, load_row, plot_loss, read_metrics

ESCAPE = "\x1b"


def step(i: int, loss: float = 2.5) -> Step:
    return Step(i, loss, 0.75, 3e-4, 12345.6, [[4, 8, 0, 4], [1, 1, 1, 1]])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_overload_is_that_of_the_worst_layer() -> None:
    assert step(0).overload == 2.0
    assert step(0)._replace(tokens_per_expert=[[0, 0], [3, 1]]).overload == 1.5
    assert step(0)._replace(tokens_per_expert=[]).overload == 1.0


def test_jsonl_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for i in range(2):
        with MetricsFile(path) as file:
            file.write(step(i))
            assert len(path.read_text().splitlines()) == i + 1, "a line is on disk as soon as it is written"
    records = read_metrics(path)
    assert records == [json.loads(json.dumps(step(i).record())) for i in range(2)]
    assert records[1]["step"] == 1
    assert records[1]["tokens_per_expert"] == [[4, 8, 0, 4], [1, 1, 1, 1]]
    assert records[1]["overload"] == 2.0


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"step": 1, "lo', "[1]", ""):
        path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 2}}\n')
        expected = (
            f"read_metrics: {path}, line 2: got {bad!r}, expected one JSON object. "
            "Remove the line if a crash cut it short."
        )
        with pytest.raises(ValueError, match=re.escape(expected)):
            read_metrics(path)
    with pytest.raises(ValueError, match=r"read_metrics: path: got .*No such file.*readable JSONL file"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(RuntimeError, match="Use it in a with statement"):
        MetricsFile(path).write(step(0))


def test_live_view_in_a_terminal(clock: list[float]) -> None:
    file = io.StringIO()
    with LiveView(101, console=Console(force_terminal=True, file=file, width=100, height=30)) as view:
        view.update(step(0, loss=5.5))
        clock[0] += 90  # 90 s for 10 steps leave 90 * 9 s for 90 of them.
        view.update(step(10, loss=3.14159))
    assert ESCAPE in file.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    for expected in (
        "11/101",
        "0:13:30 left",
        "loss 3.142",
        "gradient norm 0.75",
        "12,346 tokens/s",
        "lr 3.0e-04",
    ):
        assert expected in shown
    assert re.search(r"layer 0 +▄█·▄ +2\.00", shown)
    assert re.search(r"layer 1 +▄▄▄▄ +1\.00", shown)


def test_live_view_elsewhere_prints_few_plain_lines(clock: list[float]) -> None:
    file = io.StringIO()
    with LiveView(1000, console=Console(file=file, width=40)) as view:
        for i in range(1000):
            view.update(step(i))
            clock[0] += 2
    assert ESCAPE not in file.getvalue()
    assert "\r" not in file.getvalue()
    lines = file.getvalue().splitlines()
    assert 19 <= len(lines) <= 22
    assert lines[0].startswith("step 1/1000  -:--:-- left  loss 2.500")
    assert lines[-1].startswith("step 1000/1000  0:00:00 left  loss 2.500")
    assert lines[10].startswith("step 500/1000  0:16:40 left")


def test_a_run_of_few_steps_shows_each_and_a_resumed_one_starts_anywhere(clock: list[float]) -> None:
    file = io.StringIO()
    with LiveView(9, console=Console(file=file)) as view:
        for i in range(6, 9):
            view.update(step(i))
            clock[0] += 1
    assert [line[:22] for line in file.getvalue().splitlines()] == [
        "step 7/9  -:--:-- left",
        "step 8/9  0:00:01 left",
        "step 9/9  0:00:00 left",
    ]


def test_the_view_is_closed_when_the_run_fails() -> None:
    file = io.StringIO()
    with pytest.raises(KeyError), LiveView(3, console=Console(force_terminal=True, file=file)):
        raise KeyError
    assert file.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_load_row_fits_its_width_and_keeps_the_busiest() -> None:
    counts = [10] * 256
    counts[100] = 40
    row = load_row(counts, width=80)
    assert len(row.plain) <= 80
    assert row.plain.count("█") == 1
    assert {str(span.style) for span in row.spans} == {"green", "red"}
    assert load_row([0, 0], width=80).plain == "··"


SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path) -> tuple[ET.Element, list[str]]:
    root = ET.parse(path).getroot()
    return root, [element.text or "" for element in root.iter(f"{SVG}text")]


def test_the_picture_holds_points_axes_and_references(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    records = [{"step": i, "loss": 6.0 - i / 50} for i in range(201)] + [{"step": 201, "loss": float("nan")}]
    plot_loss(records, path, reference={"uniform": 5.545, "bytes < 256 & more": 3.2})
    root, texts = drawn(path)
    assert root.find(f"{SVG}rect").get("fill") == "white"
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 201
    xs, ys = [float(c.get("cx")) for c in circles], [float(c.get("cy")) for c in circles]
    assert xs == sorted(xs)
    assert ys == sorted(ys), "a falling loss falls in the picture"
    curve = [float(number) for number in re.split("[ ,]", root.find(f"{SVG}polyline").get("points"))]
    assert curve[0::2] == xs
    assert curve[1::2] == pytest.approx(ys, abs=0.11), "averages of a straight line are on it"
    assert {"step", "loss (nats per token)", "0", "100", "200", "2", "4", "6"} <= set(texts)
    assert {"uniform, 5.54", "bytes < 256 & more, 3.20"} <= set(texts)
    dashed = [p for p in root.iter(f"{SVG}path") if p.get("stroke-dasharray")]
    assert len(dashed) == 2


def test_a_long_run_stays_a_small_picture(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    plot_loss([{"step": i, "loss": 2.0 + i % 2} for i in range(5500)], path)
    root, _ = drawn(path)
    assert len(list(root.iter(f"{SVG}circle"))) <= 1000
    assert path.stat().st_size < 100_000


def test_one_step_is_a_picture_and_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    plot_loss([{"step": 3, "loss": 2.0}], path)
    assert "2" in drawn(path)[1]
    with pytest.raises(ValueError, match="plot_loss: records: got no finite loss"):
        plot_loss([{"step": 0, "loss": float("inf")}], path)
