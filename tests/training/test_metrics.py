import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fmoe.training import metrics
from fmoe.training.metrics import LiveView, MetricsFile, Step, load_row, read_metrics

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


def test_a_resumed_run_goes_on_where_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, first_step=0) as file:
        for i in range(5):
            file.write(step(i))
    with path.open("a") as cut:
        cut.write('{"step": 5, "lo')
    with MetricsFile(path, first_step=3) as file:
        file.write(step(3, loss=1.5))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(0, 2.5), (1, 2.5), (2, 2.5), (3, 1.5)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    path.write_text("nonsense")
    with MetricsFile(path, first_step=0) as file:
        assert path.read_text() == "nonsense"  # a run that fails before its first step loses nothing
        file.write(step(0))
    assert [r["step"] for r in read_metrics(path)] == [0]
    assert (tmp_path / "metrics-1.jsonl").read_text() == "nonsense"
    path.write_text("nonsense\n" + json.dumps(step(0).record()) + "\n")
    with (
        pytest.raises(ValueError, match=r"metrics.jsonl, line 1: got 'nonsense'"),
        MetricsFile(path, first_step=1) as file,
    ):
        file.write(step(1))


def test_an_earlier_run_is_kept_and_the_log_says_where(tmp_path: Path) -> None:
    path, shown = tmp_path / "metrics.jsonl", io.StringIO()
    for i in range(3):
        with MetricsFile(path, first_step=0) as file, LiveView(2, console=Console(file=shown, width=20)):
            file.write(step(0, loss=float(i)))
    for name, loss in (("metrics", 2.0), ("metrics-1", 0.0), ("metrics-2", 1.0)):
        assert [r["loss"] for r in read_metrics(tmp_path / f"{name}.jsonl")] == [loss]
    assert shown.getvalue() == "".join(
        f"the metrics of an earlier run are {tmp_path / f'metrics-{i}.jsonl'} now\n" for i in (1, 2)
    )


def test_other_ranks_write_nothing() -> None:
    with MetricsFile(None, first_step=3) as file:
        file.write(step(3))


def test_speed_is_shown_and_recorded_where_it_is_known(clock: list[float]) -> None:
    known = step(0)._replace(tflops_per_second=404.2, mfu=0.40869, held_out_loss=2.25)
    assert known.record()["mfu"] == 0.40869
    assert known.record()["held_out_loss"] == 2.25
    assert not {"mfu", "tflops_per_second", "held_out_loss"} & set(step(0).record())
    file = io.StringIO()
    with LiveView(2, console=Console(file=file)) as view:
        view.update(known)
        view.update(step(1)._replace(tflops_per_second=0.0123))
    held_out, first, second = file.getvalue().splitlines()
    assert held_out == "step 1: loss on held-out text 2.250"
    assert "12,346 tokens/s  404 TFLOP/s  MFU 40.9%  overload" in first
    assert "tokens/s  0.0123 TFLOP/s  overload" in second


def test_only_known_devices_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics.speed(1e9, torch.device("cpu")) == {"tflops_per_second": 0.001}
    for name, mfu in [("NVIDIA H200", 0.5), ("NVIDIA H100 80GB HBM3", 0.5), ("Some GPU", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        expected = {"tflops_per_second": 494.5} | ({"mfu": mfu} if mfu else {})
        assert metrics.speed(494.5e12, torch.device("cuda")) == expected
