"""The benchmark measures what it says, and refuses to time what is wrong."""

import io
import json
import re
import runpy
import sys
from pathlib import Path

import optree
import pytest
import torch
from helpers import quick
from rich.console import Console

import fmoe
from fmoe import __main__
from fmoe.bench import measure
from fmoe.bench import model as bench_of_model
from fmoe.bench.breakdown import time_by_kind
from fmoe.bench.layers import ROUTINGS, SHAPES, Shape, config_for, layers, plain_layer, random_params, skewed
from fmoe.bench.model import bench_model, report
from fmoe.models import decoder
from fmoe.ops.kernels import scaled
from fmoe.ops.reference import moe_reference
from fmoe.plan import plan
from fmoe.training.optim import adamw

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATES = BENCHMARKS / "rates" / "h200.json"
TINY = Shape(tokens=48, dim=16, hidden=8, experts=8, top_k=2)


def test_the_command_measures_every_layer_and_writes_json(command, tmp_path):
    file = tmp_path / "layer.json"
    names = "fmoe", "fmoe, rows aligned to 16", "PyTorch eager", "transformers grouped_mm"
    how = ["--device", "cpu", "--dtype", "float32", "--json", file, "--only", *names, "--align", 16]
    how += ["--picture", file.with_suffix(".svg"), "--rounds", 3]
    shown = command("bench", "layer", "--sizes", *TINY, *how)
    (result,) = json.loads(file.read_text())
    assert result["shape"] == TINY._asdict()
    assert result["torch"] == torch.__version__
    assert result["engine"] == "loop"
    assert "our grouped products by 'loop'" in shown.replace("\n", " ")
    assert [row["layer"] for row in result["layers"]] == list(names)
    for row in result["layers"]:
        assert row["layer"] in shown
        assert row["error"] < 1e-5
        assert row["rate"] == pytest.approx(3 * TINY.flops / row["step"] / 1e9)
        assert row["share"] == pytest.approx(row["rate"] / result["matmul_tflops"])
        on_cuda = "device", "host", "replay", "launches", "peak", "syncs"
        assert not any(row[name] is not None for name in on_cuda)
    assert f"{result['layers'][0]['rate']:.3g}" in file.with_suffix(".svg").read_text()
    saved = {row["layer"]: row["saved"] for row in result["layers"]}
    pairs = TINY.tokens * TINY.top_k
    assert saved["fmoe"] * 2**20 >= 4 * pairs * 2 * TINY.hidden
    assert saved["fmoe"] < saved["PyTorch eager"]


def test_what_is_known_is_said_at_once_on_stderr(monkeypatch, capfd):
    said = []

    def timed(*args):
        said.append(capfd.readouterr())
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_apart", timed)
    names = ["fmoe", "PyTorch eager"]
    with pytest.raises(KeyboardInterrupt):
        measure.bench_layer(TINY, dtype=torch.float32, device="cpu", rounds=2, only=names)
    ((out, err),) = said
    assert out == ""
    checks = [f"{name}: checked against float32 in N s, error N" for name in names]
    times = [f"{name}: forward N ms, with backward N ms" for name in names]
    assert re.sub(r"\b\d+\.\d+(e[-+]\d+)?", "N", err).splitlines() == checks + times


def test_the_cost_of_a_dispatch_is_measured(monkeypatch, capsys):
    sizes = "--tokens", "64", "--dim", "16", "--experts", "8", "--top-k", "2", "--size", "4"
    monkeypatch.setattr(sys, "argv", ["exchange.py", *sizes])
    runpy.run_path(str(BENCHMARKS / "exchange.py"), run_name="__main__")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["ways without Triton", "ways", "exchange", "exchange_bounded"]
    assert all(int(cell) > 0 for row in rows[2:] for cell in row[1:4])


def test_ways_to_take_a_step_stand_side_by_side_and_one_may_fail(monkeypatch, capsys):
    sizes = "--layers", "2", "--batch-size", "2", "--seq-len", "16", "--steps", "1", "--rounds", "1"
    ways = "--dtype bfloat16", "--dtype float32", "--mesh dp=2"
    how = *sizes, "--device", "cpu", "--rates", str(RATES), *(f"--way={way}" for way in ways)
    monkeypatch.setattr(sys, "argv", ["step_on_mesh.py", *how])
    runpy.run_path(str(BENCHMARKS / "step_on_mesh.py"), run_name="step_on_mesh")["main"]()
    lines = capsys.readouterr().out.splitlines()
    heading, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert [row[0] for row in rows] == [*ways]
    assert len(rows[0]) == len(heading) and float(rows[0][heading.index("planned ms")]) > 0
    assert "got rates of bfloat16" in rows[1][1] and "--way: got --mesh dp=2" in rows[2][1]
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(heading) + 1}


@pytest.mark.parametrize("script", [*sorted(BENCHMARKS.glob("*.py"))], ids=lambda script: script.stem)
def test_a_benchmark_finds_what_it_imports(script):
    runpy.run_path(str(script), run_name=script.stem)


def test_layers_in_fp8_are_measured_beside_others():
    shape = TINY._replace(tokens=512, dim=64, hidden=48)
    how = dict(dtype=torch.float32, device="cpu", rounds=2, precision=["fp8_rowwise", "fp8_block"])
    only = ["fmoe", "fmoe, fp8_rowwise", "fmoe, fp8_block"]
    found = measure.bench_layer(shape, only=only, **how)["layers"]
    assert [row["layer"] for row in found] == only
    assert found[0]["error"] < 1e-5 and all(0.03 < row["error"] < 0.1 for row in found[1:])


def test_weights_are_kept_while_layers_are_measured(monkeypatch):
    """And not after."""
    kept, timed = [], measure._times

    def noted(entries, *how):
        (entry,) = entries.values()
        kept.append([w.data_ptr() in scaled._kept for w in entry.run.params.experts])
        return timed(entries, *how)

    monkeypatch.setattr(measure, "_times", noted)
    shape, name = TINY._replace(tokens=512, dim=64, hidden=48), "fp8_rowwise"
    how = dict(dtype=torch.float32, device="cpu", rounds=2, precision=[name], only=[f"fmoe, {name}"])
    for keep in (True, False):
        assert not measure.bench_layer(shape, **how, keep_rounded=keep)["kept"]  # a CPU has no kernels for it
        assert kept == [[keep, keep]] * 2 and not scaled._kept
        kept.clear()
    for precision in ([], ["fp8_block"]):
        with pytest.raises(ValueError, match="keep_rounded: got True, expected False without a precision of"):
            measure.bench_layer(TINY, keep_rounded=True, precision=precision)


def test_device_time_decides():
    apart = measure.Apart(device=2.0, host=3.0, replay=2.5, launches=30)
    entry = measure.Entry(None, None, 1e-3, (9.0, 10.0, 0))
    row = measure._measured("ours", entry, [1.0], [4.0, 5.0, 6.0], apart, 10**12, 1000.0)
    assert (row.step, row.rate, row.share) == (5.0, 500.0, 0.5)
    shown = Console(width=200, file=io.StringIO(), record=True)
    how = dict(routing="random", overload=1.0, dtype="torch.bfloat16", device="A GPU", torch="2.11")
    how |= dict(matmul_tflops=1000.0, engine="triton", kept=True, seed=0, wrong={}, not_measured={})
    measure.report(how | {"shape": TINY._asdict(), "layers": [row._asdict()]}, shown)
    text = shown.export_text()
    assert "weights in fp8 rounded before" in text
    lines = [re.split("[┃│]", line) for line in text.splitlines()]
    titles, cells = ([cell.strip() for cell in line] for line in lines if len(line) > 1)
    found = dict(zip(titles, cells))
    assert (found["device ms"], found["host ms"], found["replay ms"]) == ("2.00", "3.00", "2.50")
    assert (found["launches"], found["TFLOP/s"], found["of matmul"]) == ("30", "500", "50.0%")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(512, 128, 64, 16, 4), (2048, 256, 128, 300, 10)])
def test_a_step_is_taken_apart_on_a_gpu(shape):
    found = measure.bench_layer(Shape(*shape), rounds=3, only=["fmoe", "PyTorch eager"])["layers"]
    for row in found:
        assert 0 < row["device"] < row["step"]
        assert row["rate"] == pytest.approx(3 * Shape(*shape).flops / row["device"] / 1e9)
        assert row["host"] > 0
    ours, _ = found
    assert ours["syncs"] == 0
    assert ours["launches"] <= 40
    assert 0.5 * ours["device"] < ours["replay"] < ours["step"]


@pytest.mark.parametrize(("name", "wrong"), [("wrong", 0.1), ("fp8 in name only", 0.07)])
def test_a_wrong_layer_is_not_timed(name, wrong, monkeypatch):
    ours = layers(TINY, config_for(TINY, "random"))["fmoe"]
    monkeypatch.setattr(measure, "layers", lambda *args: {name: lambda p, x: ours(p, x) * (1 + wrong)})
    with pytest.raises(RuntimeError, match=rf"bench layer: {name}: relative error {wrong} against float32"):
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


def test_one_expert_a_token_is_no_error():
    shape = Shape(64, 16, 8, 4, 1)
    (layer,) = measure.bench_layer(shape, device="cpu", rounds=2, only=["fmoe"])["layers"]
    assert layer["error"] < 0.02


def call(name, number, ts, dur, tid=1, cat="cpu_op"):
    return {"cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur, "args": {"External id": number}}


def test_time_goes_to_the_kind_of_the_operator_around():
    spans = [
        call("fmoe::experts_up", 1, 0, 10),
        call("aten::mm", 2, 1, 4),
        call("aten::mm", 3, 12, 5),
        call("aten::add", 4, 13, 1, tid=2),  # of another thread, and so in nothing
        call("fmoe::optimizer", 5, 20, 9, cat="user_annotation"),
        call("aten::_fused_adamw_", 6, 21, 6),
        call("Torch-Compiled Region", 7, 40, 8),
        call("triton_poi_fused_add", 8, 41, 2),
    ]
    spans += [call("a kernel", number, 100, 10**number, cat="kernel") for number in range(1, 9)]
    spans += [call("the optimizer's kernels", 5, 100, 10**9, cat="gpu_user_annotation")]
    spans += [call("a copy", 99, 100, 7, cat="gpu_memcpy")]
    kinds = {"experts": (10, 110), "matrix products": (5, 10**3), "optimizer": (9, 11 * 10**5)}
    kinds |= {"elementwise": (3, 10**4 + 10**8), "other": (6, 10**7 + 7)}
    assert time_by_kind(spans, on_cuda=False) == {kind: times[0] for kind, times in kinds.items()}
    assert time_by_kind(spans, on_cuda=True) == {kind: times[1] for kind, times in kinds.items()}


@pytest.fixture
def model_command(command, tmp_path):
    """What ``bench model`` with these words writes and prints."""

    def run(*words):
        file = tmp_path / "model.json"
        sizes = "--model debug --layers 2 --batch-size 2 --seq-len 32 --steps 4 --device cpu --dtype float32"
        shown = command("bench", "model", *sizes.split(), "--json", file, *words)
        return json.loads(file.read_text()), shown

    return run


def test_the_model_command_measures_training_steps(model_command, tmp_path):
    trace = tmp_path / "trace.json"
    result, shown = model_command("--remat", "full", "--trace", trace)
    assert (result["layers"], result["dense_layers"]) == (2, 1)
    assert 0.9 * 5.545 < result["first_loss"] < 1.1 * 5.545  # log(256)
    config = decoder.preset("debug", layers=2)
    rate = decoder.flops_per_token(config, 32) * result["tokens_per_second"] / 1e12
    assert result["tflops_per_second"] == pytest.approx(rate)
    assert result["tokens_per_second"] == pytest.approx(2 * 32 / result["ms"] * 1e3)
    assert result["mfu_of_matmul"] == pytest.approx(rate / result["matmul_tflops"])
    assert result["mfu"] is result["peak_bytes"] is result["syncs"] is result["planned_over_peak"] is None
    assert result["planned_ms"] is None
    assert sum(result["shares"].values()) == pytest.approx(1)
    kinds = {"attention", "experts", "loss", "matrix products", "optimizer", "elementwise", "routing"}
    assert kinds <= result["shares"].keys()
    options = dict(batch_size=2, seq_len=32, per_layer=fmoe.transforms.per_layer("full"), device_type="cpu")
    assert result["planned_bytes"] == plan(config, **options).peak
    assert {"fmoe::experts_up", "fmoe::optimizer"} <= {
        e["name"] for e in json.loads(trace.read_text())["traceEvents"]
    }
    for text in ("tokens/s", "of the vendor's peak (MFU)", "planned GiB", *kinds):
        assert text in shown


@pytest.mark.usefixtures("aot_eager")
def test_the_model_command_trains_on_text_with_balanced_experts_compiled(model_command, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("the same words again and again, " * 200)
    how = ["--data", text, "--balanced", "--compile", "--compute-dtype", "bfloat16", "--steps", "6"]
    how += ["--moments-dtype", "bfloat16", "--rates", RATES]
    torch._dynamo.utils.counters.clear()
    result, shown = model_command(*how)
    assert result["last_loss"] < result["first_loss"]
    assert result["balanced"] and result["compiled"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert result["planned_over_ms"] == pytest.approx(result["planned_ms"] / result["ms"])
    assert result["planned_ms"] == pytest.approx(sum(result["planned"]["seconds"].values()) * 1e3)
    for words in ("experts balanced", "moments torch.bfloat16", "planned ms"):
        assert words in " ".join(shown.split())
    params = decoder.init(decoder.preset("debug", layers=2), 0)
    state = adamw(moments_dtype=torch.bfloat16).init(params)
    assert result["planned"]["optimizer"] == sum(t.nbytes for t in optree.tree_leaves(state))


@pytest.mark.parametrize("segments", quick([5], [1, 5]))
def test_the_model_command_measures_segments(model_command, segments, monkeypatch):
    seen, loss = [], decoder.loss
    spy = lambda *args, **how: seen.append(how["segment_ids"]) or loss(*args, **how)  # noqa: E731
    monkeypatch.setattr(decoder, "loss", spy)
    result, shown = model_command("--segments", segments)
    assert result["segments"] == segments and f"segments a row: {segments}" in " ".join(shown.split())
    assert "attention" in result["shares"]
    lengths = seen[0].unique(return_counts=True)[1] / 2  # of two rows
    assert len(lengths) == segments and lengths.max() - lengths.min() <= 1
    options = dict(batch_size=2, seq_len=32, device_type="cpu", segments=segments > 1)
    assert result["planned_bytes"] == plan(decoder.preset("debug", layers=2), **options).peak


def test_the_model_command_takes_a_precision_of_products(model_command):
    result, shown = model_command("--precision", "experts=fp8_rowwise")
    assert result["precision"] == {"experts": "fp8_rowwise", "dense": None}
    assert "remat none, products of experts in fp8_rowwise; CPU" in " ".join(shown.split())


def test_a_model_whose_loss_is_wrong_is_not_timed(monkeypatch):
    loss = decoder.loss
    monkeypatch.setattr(
        decoder, "loss", lambda *args, **how: (2 * (found := loss(*args, **how))[0], found[1])
    )
    with pytest.raises(RuntimeError, match=r"the first loss is 1[01]\.\d+, of an untrained model 5\.545"):
        bench_model(
            decoder.preset("debug", layers=2), batch_size=2, seq_len=16, device="cpu", dtype=torch.float32
        )


def test_a_model_that_does_not_train_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_of_model, "_times", lambda *_: ([1.0, 1.0], float("nan")))
    with pytest.raises(RuntimeError, match="bench model: the last loss is nan"):
        bench_model(
            decoder.preset("debug", layers=2), batch_size=2, seq_len=16, device="cpu", dtype=torch.float32
        )


def test_a_model_that_memory_does_not_hold_is_not_measured(monkeypatch):
    monkeypatch.setattr(bench_of_model.os, "sysconf", lambda _: 1)
    with pytest.raises(ValueError, match=r"got a step that needs .* GiB, expected at most 0\.0 GiB"):
        bench_model(decoder.preset("debug", layers=1), batch_size=1, seq_len=16, device="cpu")


def test_names_of_no_layer_are_refused():
    with pytest.raises(ValueError, match=r"bench_layer: only: got \['fmoe aligned'\], expected names among"):
        measure.bench_layer(TINY, dtype=torch.float32, device="cpu", only=["fmoe", "fmoe aligned"])


def test_a_result_has_a_report_without_a_name(capsys):
    config = decoder.preset("debug", layers=1)
    result = bench_model(config, batch_size=1, seq_len=16, steps=2, device="cpu", dtype=torch.float32)
    report(result, Console(width=150))
    assert "a model: 1 layers (1 dense)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "model --model debug --device cpu --steps 1",
            "bench_model: steps: got 1, expected an integer of at least 2",
        ),
        (
            "model --model debug --device cpu --seq-len 16 --segments 17",
            "bench_model: segments: got 17, expected 1 to seq_len=16, or None",
        ),
        ("layer --shape small --rounds 1", "bench_layer: rounds: got 1, expected an integer of at least 2"),
        (
            "model --model debug --device cpu --json no/m.json",
            "[Errno 2] No such file or directory: 'no/m.json'",
        ),
        (
            "model --model debug --device cpu --trace no/m.json",
            "[Errno 2] No such file or directory: 'no/m.json'",
        ),
        ("layer --shape small --json no/m.json", "[Errno 2] No such file or directory: 'no/m.json'"),
        ("layer --shape small --picture no/m.svg", "[Errno 2] No such file or directory: 'no/m.svg'"),
        ("layer --shape small --picture m.bar", "Format 'bar' is not supported"),
    ],
)
def test_what_would_be_lost_is_not_measured(monkeypatch, capsys, tmp_path, words, text):
    def measured(*args, **how):
        raise AssertionError("it began")

    monkeypatch.chdir(tmp_path)
    for module, name in ((bench_of_model, "_training"), (measure, "random_params")):
        monkeypatch.setattr(module, name, measured)
    monkeypatch.setattr(sys, "argv", ["fmoe", "bench", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert capsys.readouterr().err.startswith(text)


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(measure, "random_params", None)
    picture = tmp_path / "layer.svg"
    monkeypatch.setattr(sys, "argv", ["fmoe", "bench", "layer", "--picture", str(picture)])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert capsys.readouterr().err == "bench layer needs matplotlib: pip install matplotlib\n"
    assert not picture.exists()
