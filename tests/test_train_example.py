"""The example, as a user runs it."""

import importlib.util
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from fmoe.metrics import read_metrics

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "train_deepseek_v3.py"
SMALL = ["--steps", "3", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--data", str(SCRIPT)]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run the script in this process; returns the losses it recorded."""
    spec = importlib.util.spec_from_file_location("train_deepseek_v3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--out", str(tmp_path), *options])
        module.main()
        return [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]

    return run


def test_it_runs_as_a_command(tmp_path):
    command = [sys.executable, str(SCRIPT), *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "final loss" in done.stdout
    assert "unigram entropy" in done.stdout
    assert "\x1b" not in done.stdout
    xml.etree.ElementTree.parse(tmp_path / "loss.svg")


def test_it_learns_repeatably_and_recomputation_changes_nothing(train):
    first = train()
    assert len(first) == 3
    assert first[0] > first[2]
    assert train() == first
    assert train("--seed", "1") != first
    for remat in ("full", "default", "save:topk,dispatch"):
        assert train("--remat", remat) == first, remat
    assert train("--compile", "--remat", "default") == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--preset", "17B"], "preset: name: got '17B', expected one of ['16B', '236B', '671B', 'debug']"),
        (["--remat", "some"], "--remat: got 'some', expected none, full, default or save:NAME,NAME"),
        (["--remat", "save:nope"], "save: names: got 'nope', expected names of"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--seq-len", "20000"], "seq_len"),
        (["--seq-len", "2000"], "expected at most max_seq_len=1024"),
    ],
)
def test_bad_options_are_named(train, options, text):
    with pytest.raises((ValueError, SystemExit)) as error:
        train(*options)
    assert text in str(error.value)
