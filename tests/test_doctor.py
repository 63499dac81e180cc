"""``python -m fmoe doctor``: what is here, what ``auto`` would choose, and whether the laws hold."""

import contextlib
import io
import json
import sys

import deep_ep_double
import pytest
import torch
import torch.distributed as dist

import fmoe
from fmoe import __main__, doctor
from fmoe.ops.core.axes import group_of
from fmoe.parallel import AllToAll
from fmoe.parallel.together import from_all
from fmoe.testing import check_backend


def test_it_says_what_is_here_and_what_auto_would_choose(command):
    found = json.loads(command("doctor", "--json", "--no-test"))
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


def test_it_tests_itself_on_all_processes(pool):
    for found in pool.run(2, doctor.self_test):
        assert {"router", "experts", "all_to_all"} <= found.keys()
        for test in found.values():
            assert test["broken"] is None
            assert all(" holds " in line for line in test["report"].splitlines()[1:])
        assert "ep=2" in found["all_to_all"]["report"]


def test_a_world_size_without_a_rank_is_no_launch(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert json.loads(command("doctor", "--json"))["self_test"].keys() == {"router", "experts", "local"}


class Broken(AllToAll):
    def dispatch(self, x_TD, routing):
        raise OSError("the driver is broken")


def broken_on_rank_1():
    """What the second of two ranks says and exits with."""
    mesh, said = fmoe.make_mesh("ep=2", device_type="cpu"), io.StringIO()
    if dist.get_rank() == 0:
        from_all(0)  # it agrees on a seed, and would then wait for the other
        return None
    backend = Broken(group_of(mesh, ("ep",)))
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        doctor._tried(lambda: check_backend(backend, mesh, laws=["oracle"]))
    return said.getvalue(), ended.value.code


def test_what_only_another_rank_finds_is_told(pool):
    (said, code) = pool.run(2, broken_on_rank_1)[1]
    assert code == 1
    assert said.startswith("rank 1: check_backend: Broken on ")
    assert "met OSError: the driver is broken" in said


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
