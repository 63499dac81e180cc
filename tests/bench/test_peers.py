"""What else is installed is measured beside ours, or said why not; it never ends the benchmark."""

import json
import sys

import fake_peers
import pytest
import torch
from fake_peers import SCATTERMOE, SONICMOE, TORCHTITAN_0_2, TORCHTITAN_0_3, replaced
from helpers import quick

from fmoe.bench.layers import Shape
from fmoe.bench.measure import bench_layer
from fmoe.bench.peers import PEERS

TINY = Shape(tokens=48, dim=16, hidden=8, experts=8, top_k=2)
FAKED = "torchtitan", "torchtitan compiled", "ScatterMoE", "SonicMoE"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install these packages."""
    monkeypatch.syspath_prepend(tmp_path)
    packages = {peer.package for peer in PEERS.values()} - {"transformers"}
    yield lambda *peers: fake_peers.write(tmp_path, *peers)
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture
def measured(install, aot_eager):
    """Measure with these packages installed."""

    def measure(*peers, only=FAKED, **how):
        install(*peers)
        return bench_layer(TINY, dtype=torch.float32, device="cpu", rounds=2, only=["fmoe", *only], **how)

    return measure


def rows_of(result):
    return {row["layer"]: row for row in result["layers"]}


@pytest.mark.parametrize("routing", quick(["random"], ["random", "balanced", "hot"]))
@pytest.mark.parametrize(
    ("torchtitan", "names"), [(TORCHTITAN_0_2, FAKED[:1]), (TORCHTITAN_0_3, FAKED)], ids=["0.2", "0.3"]
)
def test_outputs_and_gradients_of_peers_are_ours(measured, torchtitan, names, routing, slow):
    names = FAKED if slow else names
    result = measured(torchtitan, SCATTERMOE, SONICMOE, only=names, routing=routing)
    assert result["not_measured"] == result["wrong"] == {}
    assert [*rows_of(result)] == ["fmoe", *names]
    for row in result["layers"]:
        assert row["error"] < 1e-5
        assert row["step"] > 0
        assert row["saved"] > 0


def test_what_is_not_installed_is_not_mentioned(measured):
    result = measured(SCATTERMOE)
    assert [*rows_of(result)] == ["fmoe", "ScatterMoE"]
    assert result["not_measured"] == result["wrong"] == {}


UNFIT = {
    "another signature": (
        replaced(SONICMOE, "stream_id, activation_type,", "stream_id, *, activation,"),
        "SonicMoE",
        "TypeError: moe_general_routing_inputs() got an unexpected keyword argument 'activation_type'",
    ),
    "another name": (
        replaced(TORCHTITAN_0_3, "class RoutedExperts", "class Experts"),
        "torchtitan",
        "AttributeError: module 'torchtitan.models.common.moe' has no attribute 'RoutedExperts'",
    ),
    "another module": (
        {"torchtitan/models/deepseek_v3.py": ""},
        "torchtitan",
        "ModuleNotFoundError: No module named 'torchtitan.models.common'",
    ),
    "a package that doesn't load": (
        {"scattermoe/parallel_experts.py": 'raise ImportError("no CUDA\\n  here [at all]")'},
        "ScatterMoE",
        "ImportError: no CUDA here [at all]",
    ),
    "its own check": (
        replaced(
            SONICMOE, "assert activation_type", 'assert x.shape[1] % 64 == 0, "rows of 64"; activation_type'
        ),
        "SonicMoE",
        "AssertionError: rows of 64",
    ),
    "a backward that fails": (
        replaced(SCATTERMOE, "return rows\n", "return rows.detach()\n"),
        "ScatterMoE",
        "RuntimeError: ",
    ),
}


@pytest.mark.parametrize(("peer", "name", "reason"), UNFIT.values(), ids=UNFIT)
def test_a_peer_that_does_not_fit_is_said_to_be_not_measured(measured, peer, name, reason):
    other = SCATTERMOE if name != "ScatterMoE" else SONICMOE
    result = measured(peer, other, only=["ScatterMoE", "SonicMoE", "torchtitan"])
    assert [*result["not_measured"]] == [name]
    assert result["not_measured"][name].startswith(reason)
    assert len(result["layers"]) == 2
    assert result["wrong"] == {}


def test_a_wrong_peer_is_shown_and_not_timed(measured):
    result = measured(
        replaced(SCATTERMOE, "(gates[:, None]", "1.1 * (gates[:, None]"),
        replaced(TORCHTITAN_0_3, "order = ", "w.w3_EFD.register_hook(lambda g: g * float('nan')); order = "),
        only=["ScatterMoE", "torchtitan"],
    )
    assert [*rows_of(result)] == ["fmoe"]
    assert result["wrong"]["ScatterMoE"] == pytest.approx(0.1, rel=1e-3)
    assert result["wrong"]["torchtitan"] != result["wrong"]["torchtitan"]  # NaN, in one gradient of five


def test_the_command_goes_on_and_says_so(install, command, tmp_path):
    wrong = replaced(TORCHTITAN_0_3, "topk_scores_BLK.view(-1)", "1.2 * topk_scores_BLK.view(-1)")
    install(SCATTERMOE, UNFIT["its own check"][0], wrong)
    file = tmp_path / "layer.json"
    how = ["--device", "cpu", "--dtype", "float32", "--json", file, "--rounds", 2]
    shown = command("bench", "layer", "--sizes", *TINY, *how, "--only", "fmoe", *FAKED[::2], "SonicMoE")
    (result,) = json.loads(file.read_text())
    assert [*rows_of(result)] == ["fmoe", "ScatterMoE"]
    assert result["not_measured"] == {"SonicMoE": "AssertionError: rows of 64"}
    assert result["wrong"] == {"torchtitan": pytest.approx(0.2, rel=1e-3)}
    assert "\nSonicMoE: not measured: AssertionError: rows of 64\n" in shown
    assert "2.0e-01, wrong" in shown.replace("\n", " ")
