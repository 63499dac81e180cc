"""``python -m fmoe doctor``: what is here, what ``auto`` would choose, and whether the laws hold."""

import json
import subprocess
import sys

import deep_ep_double
import pytest
import torch

import fmoe
from fmoe import __main__, doctor

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*args, launcher=()):
    command = [sys.executable, *launcher, "-m", "fmoe", "doctor", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_it_says_what_is_here_and_what_auto_would_choose():
    found = json.loads(run("--json", "--no-test"))
    assert found["torch"] == torch.__version__
    assert found["can"]["all_to_all"][0] == "gloo"
    assert found["auto"] in ("deepep", "all_to_all") and found["why"]
    assert "self_test" not in found
    text = doctor.report(found)
    assert f'backend="auto"   {found["auto"]}: {found["why"]}' in text
    assert torch.__version__ in text


def test_it_says_which_deep_ep_loads():
    deep_ep_double.install(1)
    try:
        assert doctor.diagnose()["deep_ep"] == "1.x"
    finally:
        deep_ep_double.remove()


def test_it_tests_itself_on_all_processes_under_a_launcher():
    found = json.loads(run("--json", launcher=TORCHRUN))
    assert {"router", "experts", "all_to_all"} <= found["self_test"].keys()
    for test in found["self_test"].values():
        assert test["broken"] is None
        assert all(" holds " in line for line in test["report"].splitlines()[1:])
    assert "ep=2" in found["self_test"]["all_to_all"]["report"]


def test_a_world_size_without_a_rank_is_no_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert json.loads(run("--json"))["self_test"].keys() == {"router", "experts", "local"}


BROKEN_ON_RANK_1 = """
import os, sys
from fmoe import __main__
from fmoe.parallel import AllToAll
def dispatch(*_):
    raise OSError("the driver is broken")
if os.environ["RANK"] == "1":
    AllToAll.dispatch = dispatch
sys.argv = ["fmoe", "doctor"]
__main__.main()
"""


def test_what_only_another_rank_finds_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BROKEN_ON_RANK_1)
    done = subprocess.run([sys.executable, *TORCHRUN, script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "rank 1: check_backend: AllToAll on " in done.stderr
    assert "met OSError: the driver is broken" in done.stderr


def counts_none(params, x, config):
    r = fmoe.route(params, x, config)
    return fmoe.Routing(r.expert_ids_TK, r.weights_TK, 0 * r.counts_E, r.scores_TE)


def test_what_is_broken_is_told_and_is_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "route", counts_none)
    monkeypatch.setattr(sys, "argv", ["fmoe", "doctor"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "check_router: router, float32: 1 of 5 laws are broken." in said
    assert "form: Each token has K distinct experts" in said and "experts counted wrongly" in said
