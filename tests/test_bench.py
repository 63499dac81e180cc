"""The benchmark measures what it says, and refuses to time what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

import fmoe
from fmoe.bench import measure
from fmoe.bench.layers import ROUTINGS, SHAPES, Shape, config_for, layers, plain_layer, random_params, skewed
from fmoe.ops.reference import moe_reference

TINY = Shape(tokens=48, dim=16, hidden=8, experts=8, top_k=2)


def test_the_command_measures_every_layer_and_writes_json(tmp_path):
    file = tmp_path / "layer.json"
    command = [sys.executable, "-m", "fmoe", "bench", "layer", "--sizes", *map(str, TINY), "--rounds", "3"]
    names = "fmoe", "PyTorch eager", "transformers grouped_mm"
    how = ["--device", "cpu", "--dtype", "float32", "--json", str(file), "--only", *names]
    done = subprocess.run([*command, *how], capture_output=True, text=True, check=True)
    (result,) = json.loads(file.read_text())
    assert result["shape"] == TINY._asdict()
    assert result["torch"] == torch.__version__
    assert result["engine"] == "loop"
    assert "our grouped products by 'loop'" in done.stdout.replace("\n", " ")
    assert [row["layer"] for row in result["layers"]] == list(names)
    for row in result["layers"]:
        assert row["layer"] in done.stdout
        assert row["error"] < 1e-5
        assert row["rate"] == pytest.approx(3 * TINY.flops / row["step"] / 1e9)
        assert row["share"] == pytest.approx(row["rate"] / result["matmul_tflops"])
        assert row["peak"] is row["launches"] is row["syncs"] is None
    saved = {row["layer"]: row["saved"] for row in result["layers"]}
    pairs = TINY.tokens * TINY.top_k
    assert saved["fmoe"] * 2**20 >= 4 * pairs * 2 * TINY.hidden
    assert saved["fmoe"] < saved["PyTorch eager"]


def test_a_wrong_layer_is_not_timed(monkeypatch):
    found = layers(TINY, config_for(TINY, "random"))
    monkeypatch.setattr(measure, "layers", lambda *args: {"wrong": lambda p, x: found["fmoe"](p, x) * 1.1})
    with pytest.raises(RuntimeError, match=r"bench layer: wrong: relative error 0\.1 against float32"):
        measure.bench_layer(TINY, dtype=torch.float32, device="cpu", rounds=2)


def test_plain_pytorch_is_the_reference():
    config = config_for(TINY, "random")
    params = random_params(TINY, 0, dtype=torch.float32, device="cpu")
    x = torch.randn(TINY.tokens, TINY.dim)
    ids = fmoe.route(params.router, x, config).expert_ids_TK
    got = plain_layer(params, x, TINY.top_k, ids)
    torch.testing.assert_close(got, moe_reference(params, x, config, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_spread_tokens_as_they_say(routing):
    shape = SHAPES["small"]
    config = config_for(shape, routing)
    params = random_params(shape, 0, dtype=torch.float32, device="cpu")
    x = torch.randn(shape.tokens, shape.dim)
    counts = fmoe.route(skewed(params, x, config, routing).router, x, config).counts_E
    assert counts.sum() == shape.tokens * shape.top_k
    if routing == "balanced":
        assert counts.max() == counts.min()
    if routing == "hot":
        assert counts[0] == shape.tokens
        assert counts[-4:].sum() == 0
    if routing == "zipf":
        assert (
            counts[0] > 0.9 * shape.tokens
        )  # 1 / i of 4 choices: more than one for the first, so all tokens
        assert 1.5 < counts[3] / counts[7] < 2.7
