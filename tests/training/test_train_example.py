"""The example, as a user runs it."""

import ast
import fcntl
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree

import optree
import pytest
import tokenizers
import torch

from fmoe.models import decoder, deepseek_v3, huggingface
from fmoe.training import checkpoint, data, gradients, launch, loop, options
from fmoe.training.metrics import read_metrics
from fmoe.training.optim import adamw

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "train_deepseek_v3.py"
TEXT = pathlib.Path(loop.__file__)
TWO_LAYERS = ["--layers", "2"]
# It wants a stderr with a file number.
WITHOUT_FAULT_HANDLER = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
SMALL = ["--steps", "3", "--batch-size", "2", "--seq-len", "32", "--device", "cpu", "--data", str(TEXT)]


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("train_deepseek_v3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(module, monkeypatch, tmp_path):
    """Run the script in this process; returns the losses it recorded."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--out", str(tmp_path), *options])
        module.main()
        out = pathlib.Path(options[options.index("--out") + 1]) if "--out" in options else tmp_path
        return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]

    return run


def test_it_says_what_it_does_and_draws_pictures(train, capsys, tmp_path):
    train()
    said = capsys.readouterr().out
    assert "final loss" in said
    assert "unigram entropy" in said
    assert "\x1b" not in said
    for picture in ("loss.svg", "load.svg"):
        assert str(tmp_path / picture) in said
        xml.etree.ElementTree.parse(tmp_path / picture)


def test_it_says_which_options_have_no_effect(train, capsys):
    train("--steps", "1", *TWO_LAYERS, "--ep-capacity", "2", "--ep-payload", "fp8")
    assert "without effect on one device: --ep-capacity, --ep-payload" in capsys.readouterr().out


def test_a_second_run_in_one_folder_is_refused(train, tmp_path):
    with (tmp_path / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"start: folder: got .*, in which another process trains"):
            train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_without_matplotlib_it_says_how_to_get_pictures(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert len(train()) == 3
    remedy = f"for pictures: pip install matplotlib && python -m fmoe plot {tmp_path / 'metrics.jsonl'}\n"
    assert remedy in capsys.readouterr().out
    assert not [*tmp_path.glob("*.svg")]


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("--device cpu", "float32 float32 float32"),
        ("--device cuda", "float32 bfloat16 float32"),
        ("--device cuda:1 --dtype bfloat16", "bfloat16 bfloat16 bfloat16"),
        ("--device cuda --dtype float64", "float64 float64 float64"),
        ("--device cuda --compute-dtype float32 --moments-dtype bfloat16", "float32 float32 bfloat16"),
    ],
)
def test_on_a_gpu_float32_parameters_compute_in_bfloat16(module, monkeypatch, words, kinds):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split()])
    precision = options.Precision.of(module.parse())
    assert [precision.dtype, precision.compute, precision.moments] == [
        getattr(torch, kind) for kind in kinds.split()
    ]


def test_products_may_be_in_fp8(train, capsys):
    plain = train(*TWO_LAYERS)
    for word in ("fp8_rowwise", "experts=fp8_block"):
        rounding = train(*TWO_LAYERS, "--precision", word)
        assert 0 < max(abs(a - b) for a, b in zip(plain, rounding, strict=True)) < 0.1
    assert "products by Recipe(experts='fp8_block', dense=None)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"argument --precision: .* got 'fp8', expected one of"):
        train("--precision", "fp8")


@WITHOUT_FAULT_HANDLER
def test_the_command_runs_the_same_loop(train, command, tmp_path):
    losses = train(*TWO_LAYERS)
    said = command("train", *SMALL, *TWO_LAYERS, "--out", tmp_path / "command")
    assert "final loss" in said
    assert [record["loss"] for record in read_metrics(tmp_path / "command" / "metrics.jsonl")] == losses


@WITHOUT_FAULT_HANDLER
def test_the_command_says_in_a_line_what_is_wrong(command, capsys):
    with pytest.raises(SystemExit):
        command("train", "--data", "/nowhere")
    assert capsys.readouterr().err.startswith("error: read_documents: paths: got [Errno 2] No such file")
    with pytest.raises(SystemExit):
        command("train", "--top-k", "0")
    usage, told = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m fmoe train [options]"
    assert told == "python -m fmoe train: error: argument --top-k: got 0, expected at least 1"


@pytest.mark.usefixtures("aot_eager")
def test_it_learns_repeatably_and_recomputation_changes_nothing(train):
    first = train(*TWO_LAYERS)
    assert len(first) == 3
    assert first[0] > first[2]
    assert train(*TWO_LAYERS) == first
    assert train(*TWO_LAYERS, "--seed", "1") != first
    for remat in ("full", "default", "save:topk,dispatch"):
        assert train(*TWO_LAYERS, "--remat", remat) == first, remat
    assert train(*TWO_LAYERS, "--compile", "--remat", "default") == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--preset", "17B"], "preset: name: got '17B', expected one of ['16B', '235B-A22B', "),
        (
            ["--remat", "some"],
            "per_layer: remat_policy: got 'some', expected none, full, default, save:NAME,NAME,",
        ),
        (["--remat", "save:nope"], "save: names: got 'nope', expected names of"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--top-k", "0"], "--top-k: got 0, expected at least 1"),
        (["--save-every", "-1"], "--save-every: got -1, expected at least 0"),
        (["--temperature", "-1"], "--temperature: got -1, expected at least 0.0"),
        (["--max-norm", "0"], "clip_factor: max_norm: got 0.0, expected a positive number"),
        (["--eval-every", "9", "--held-out", "0"], "held_out: got 0.0, expected a share between 0 and 1"),
        (
            ["--segments"],
            "--segments needs --tokenizer: among bytes, a separator is a newline like any other",
        ),
        (["--init-from", "model", "--dim", "64"], "leave out --preset, --layers, --dim and --vocab-size"),
        (["--ep-backend", "pigeons"], "backend: got 'pigeons', expected one of"),
        (["--ep-capacity", "0"], "backend: capacity: got 0.0, expected a number above 0"),
        (["--seq-len", "20000"], "seq_len"),
        (["--vocab-size", "200"], "check_vocabulary: ids: got token ids from 0 to 255, expected 0 to 199"),
        (["--eval-every", "9", "--held-out", "0.00001"], "hold_out: documents"),
        (["--eval-every", "9", "--held-out", "0.004", "--seq-len", "64"], "seq_len: got 64, expected 1 to "),
        (["--seq-len", "2000"], "expected at most max_seq_len=1024"),
    ],
)
def test_bad_options_are_named(train, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        train(*options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--top-k", "0"], "argument --top-k: got 0, expected at least 1"),
        (["--data", "/nowhere"], "read_documents: paths: got [Errno 2] No such file"),
        (["--out", "/dev/null"], "[Errno 17] File exists: '/dev/null'"),
        (["--device", "gpu"], "--device: got 'gpu', expected cpu, cuda"),
    ],
)
def test_errors_are_one_line(module, monkeypatch, capfd, options, text):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *options])
    with pytest.raises(SystemExit) as ended:
        launch.run(module.main)
    told = capfd.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"error: {text}")
    assert told.count("\n") == 1


def test_it_imports_public_names_only():
    nodes = ast.walk(ast.parse(TEXT.read_text()))
    ours = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and "fmoe" in node.module}
    assert all(name.startswith(("fmoe.models", "fmoe.pipeline", "fmoe.training")) for name in ours)


def test_help_shows_defaults(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit):
        module.main()
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("debug", "600", "0.003", "cosine", "none", "float32", "runs/PRESET", "a token is a byte"):
        assert f"(default: {default})" in shown, default
    assert "(default: )" not in shown
    assert "None)" not in shown


def test_it_starts_from_published_weights(train, tmp_path):
    config = deepseek_v3.preset("debug", layers=2)
    params = deepseek_v3.init(config, 5, dtype=torch.float64)
    huggingface.save(tmp_path / "model", config, params)
    how = ["--init-from", str(tmp_path / "model"), "--dtype", "float64", "--save-every", "1"]
    losses = train(*how, "--out", str(tmp_path / "run"))
    text = data.pack([TEXT.read_bytes()])
    batches = [data.batch_at(step, text, batch_size=2, seq_len=32, seed=0) for step in (0, 3)]
    first, fourth = (deepseek_v3.loss(params, *batch, config)[0].item() for batch in batches)
    assert losses[0] == pytest.approx(first, rel=1e-12)
    path = checkpoint.latest(tmp_path / "run")
    assert json.loads((path / "checkpoint.json").read_text())["run"]["model"]["num_layers"] == 2

    # A checkpoint wins over them.
    again = train(*how, "--out", str(tmp_path / "run"), "--resume", "--steps", "4")
    assert again[:3] == losses
    assert again[3] < fourth - 0.1, "the loss of trained weights"


NOISY = [*TWO_LAYERS, "--router-noise", "0.3"]
EIGHT = [*NOISY, "--steps", "8", "--batch-size", "2", "--seq-len", "16", "--save-every", "4"]
KILLED_IN_STEP_5 = """
import os, runpy, signal, sys
from fmoe.training.metrics import MetricsFile
write = MetricsFile.write
def write_or_die(self, step):
    write(self, step)
    if step.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = write_or_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def saved(folder, step, layers=4):
    params = deepseek_v3.init(deepseek_v3.preset("debug", layers=layers), 1)
    path = folder / f"step-{step:08d}"
    return path, checkpoint.load(path, {"params": params, "optimizer": adamw().init(params)})


def without_speed(path):
    return [{k: v for k, v in r.items() if "per_second" not in k} for r in read_metrics(path)]


def test_a_killed_run_resumes_to_the_same_bits(train, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*EIGHT, "--out", str(whole))
    command = [sys.executable, "-c", KILLED_IN_STEP_5, str(SCRIPT), *SMALL, *EIGHT, "--out", str(cut)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert checkpoint.latest(cut).name == "step-00000004"
    assert read_metrics(cut / "metrics.jsonl")[-1]["step"] == 5
    train(*EIGHT, "--out", str(cut), "--resume")

    (path, expected), (resumed_path, resumed) = saved(whole, 8, layers=2), saved(cut, 8, layers=2)
    assert resumed.step == expected.step == 8
    for mine, theirs in zip(
        optree.tree_leaves(resumed.state), optree.tree_leaves(expected.state), strict=True
    ):
        assert torch.equal(mine, theirs)
    descriptions = [json.loads((p / "checkpoint.json").read_text()) for p in (path, resumed_path)]
    assert descriptions[0]["run"] == descriptions[1]["run"]
    assert without_speed(cut / "metrics.jsonl") == without_speed(whole / "metrics.jsonl")
    assert not torch.equal(saved(cut, 4, layers=2)[1].state["params"].head, resumed.state["params"].head)


def test_a_run_with_bfloat16_moments_resumes_to_the_same_bits(train, tmp_path, capsys):
    how = ["--moments-dtype", "bfloat16", "--steps", "4", "--save-every", "2"]
    train(*how)
    assert "kept in float32, moments in bfloat16, computing in float32; step 0" in capsys.readouterr().out
    last = tmp_path / "step-00000004"
    expected = last.rename(tmp_path / "whole")
    train(*how, "--resume")
    params = deepseek_v3.init(deepseek_v3.preset("debug"), 1)
    state = adamw(moments_dtype=torch.bfloat16).init(params)
    found, wanted = (
        checkpoint.load(path, {"params": params, "optimizer": state}).state for path in (last, expected)
    )
    assert found["optimizer"].exp_avg_sq.head.dtype == torch.bfloat16
    assert found["optimizer"].exp_avg_sq.head.count_nonzero()
    for mine, theirs in zip(optree.tree_leaves(found), optree.tree_leaves(wanted), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"state\.optimizer\.exp_avg\.head is bfloat16 .*here float32"):
        train("--resume", "--steps", "5")


def test_what_does_not_belong_to_a_run_is_refused(train, tmp_path):
    train("--save-every", "3")
    with pytest.raises(ValueError, match=r"got .*step-00000003 of an earlier run.* Resume, delete it"):
        train("--save-every", "3")
    others = ["--vocab-size", "300", "--seed", "5", "--dtype", "bfloat16"]
    with pytest.raises(ValueError, match=r"load: .*step-00000003") as error:
        train("--resume", *others)
    for text in (
        "run.model.vocab_size is 256, here 300",
        "run.data.seed is 0, here 5",
        "state.params.head is float32 [256, 128], here bfloat16 [300, 128]",
    ):
        assert text in str(error.value)
    with pytest.raises(
        ValueError, match=r"run.data.fingerprint is \w{16}, here \w{16}, expected a checkpoint"
    ):
        train("--resume", "--data", gradients.__file__)
    assert len(train("--resume", "--steps", "4")) == 4


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is .*Not finite are .*layers\.3\.mlp"):
        train("--learning-rate", "1e14", "--save-every", "1")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    _, loaded = saved(tmp_path, 1)
    assert loaded.state["optimizer"].step == 1
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_parameters_that_are_not_finite_are_not_saved(train, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"step 0: its update left parameters .* not finite: \d+ of 51"
    ):
        train("--learning-rate", "1e39", "--save-every", "1")
    assert checkpoint.latest(tmp_path) is None


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(train, tmp_path, caplog):
    train("--save-every", "1", "--keep", "2")
    newest = checkpoint.latest(tmp_path)
    (newest / "checkpoint.json").write_text("{}")
    assert len(train("--save-every", "3", "--resume")) == 3
    assert f"{newest} is damaged; going on from {tmp_path / 'step-00000002'}" in caplog.text
    for path in tmp_path.glob("step-*"):
        (path / "checkpoint.json").write_text("{}")
    before = read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="expected a whole checkpoint of fmoe"):
        train("--save-every", "1", "--resume")
    assert read_metrics(tmp_path / "metrics.jsonl") == before


def test_held_out_text_is_evaluated_and_a_sample_written(train, capsys, tmp_path):
    options = ["--eval-every", "2", "--held-out", "0.2", "--sample", "def ", "--sample-tokens", "5"]
    train(*options, "--temperature", "0")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert ["held_out_loss" in record for record in records] == [False, True, True]
    assert 3 < records[1]["held_out_loss"] < 6
    assert all(record["tflops_per_second"] > 0 for record in records)
    out = capsys.readouterr().out
    assert f"step 2: loss on held-out text {records[1]['held_out_loss']:.3f}" in out
    assert "\ndef " in out


def test_micro_batches_dtypes_and_schedules(train):
    exact = [*TWO_LAYERS, "--dtype", "float64"]
    losses = train(*exact)
    assert train(*exact, "--micro-batches", "2") == pytest.approx(losses, rel=1e-9)
    for words in (["--compute-dtype", "bfloat16"], ["--dtype", "bfloat16"]):
        assert train(*TWO_LAYERS, *words) == pytest.approx(losses, rel=0.02)
    assert train(*exact, "--schedule", "stable")[:1] == losses[:1]


def test_jsonl_through_a_tokenizer(train, tmp_path, capsys, monkeypatch):
    lines = [json.dumps({"body": text}) for text in TEXT.read_text().split("\n\n")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([TEXT.read_text()], trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    options = ["--data", str(tmp_path / "data.jsonl"), "--field", "body", "--sample", "def main"]
    options += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--sample-tokens", "3"]
    with pytest.raises(ValueError, match="got token ids from 0 to 399, expected 0 to 255"):
        train(*options)
    assert len(train(*options, "--vocab-size", "400")) == 3
    out = capsys.readouterr().out
    assert "nats a token" in out
    assert "def main" in out
    seen, loss = [], decoder.loss
    spy = lambda *args, **how: seen.append((args, how["segment_ids"])) or loss(*args, **how)  # noqa: E731
    monkeypatch.setattr(decoder, "loss", spy)
    packed = [*options, "--vocab-size", "400", "--segments", "--micro-batches", "2", "--eval-every", "3"]
    assert len(train(*packed, "--out", str(tmp_path / "packed"))) == 3
    assert len(seen) > 6
    for (_, tokens, targets, *_), ids in seen:
        assert torch.equal(ids, data.segment_ids(tokens, 0))
        assert torch.equal(targets == -100, tokens == 0)
    assert any(ids.max() > 1 for _, ids in seen)
