"""The example on many devices, as a user runs it: under torchrun."""

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import quick
from laws import ranks_of

from fmoe.models import deepseek_v3, huggingface
from fmoe.parallel import backends
from fmoe.training import checkpoint, loop
from fmoe.training.metrics import read_metrics

SCRIPT = Path(__file__).parents[2] / "examples" / "train_deepseek_v3.py"
OPTIONS = [
    "--batch-size",
    "8",
    "--seq-len",
    "16",
    "--device",
    "cpu",
    "--dtype",
    "float64",
    "--data",
    loop.__file__,
    "--eval-every",
    "3",
    "--held-out",
    "0.3",
]
TWO_LAYERS = ["--layers", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

# The example, in which something happens to rank 1 in step 3.
HURT = """
import os, runpy, signal, sys
from fmoe.training import gradients
check = gradients.check_finite
def hurt(step, *rest):
    if step == 3 and os.environ["RANK"] == "1":
        if os.environ["HARM"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("rank 1 had enough")
    check(step, *rest)
gradients.check_finite = hurt
sys.argv[0] = SCRIPT
runpy.run_path(SCRIPT, run_name="__main__")
"""


def run(command, *options, steps=6, **env):
    command = [*map(str, command), "--steps", str(steps), *OPTIONS, *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


def losses(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def run_here(*options, steps=6):
    """As ``run``, but in this process, which has imported PyTorch; what it prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(backends, "_SAID", set())  # what an earlier test was told
        patch.setattr(sys, "argv", [str(SCRIPT), "--steps", str(steps), *OPTIONS, *map(str, options)])
        runpy.run_path(str(SCRIPT))["main"]()
    return said.getvalue()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does in six steps."""
    folder = tmp_path_factory.mktemp("alone")
    run_here(*TWO_LAYERS, "--out", folder)
    return losses(folder)


@pytest.mark.parametrize("mesh", quick(["ep=2"], ["ep=2", "dp=2,ep=2"]))
def test_ranks_with_every_option_train_as_one_process_does(pool, alone, tmp_path, mesh):
    options = [*TWO_LAYERS, "--out", tmp_path, "--mesh", mesh, "--remat", "default", "--micro-batches", "2"]
    options += ["--sample", "def ", "--sample-tokens", "3"]
    said, *others = pool.run(ranks_of(mesh), run_here, *options)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)  # norms to clip by are float32
    assert "backend all_to_all along ep=2: by torch.distributed; not DeepEP, as" in said
    assert "step 6/6" in said
    assert f"debug on {ranks_of(mesh)} devices ({mesh}): 0.74M parameters" in said
    assert "loss on held-out text" in said
    assert "\ndef " in said
    assert not any(others), "the first rank speaks for all"


def test_a_capacity_changes_no_loss(pool, alone, tmp_path):
    """Steps without room for all rows are done again; those with room are the same."""
    for capacity in ("0.3", "2", "inf"):
        options = [*TWO_LAYERS, "--out", tmp_path / capacity, "--mesh", "ep=2", "--ep-capacity", capacity]
        pool.run(2, run_here, *options)
        assert losses(tmp_path / capacity) == pytest.approx(alone, rel=1e-6)


PIPELINES = {
    "pp=2": ["--pp-schedule", "interleaved", "--stages-per-rank", "2"],
    "pp=2,ep=2": ["--pp-schedule", "zbv", "--zero", "1", "--remat", "default"],
}


@pytest.mark.parametrize("mesh", quick(["pp=2"], PIPELINES))
def test_a_pipeline_trains_as_one_process_does_and_its_run_goes_on_there(pool, tmp_path, mesh):
    options = ["--layers", "4", "--dim", "32", "--micro-batches", "4", "--save-every", "3"]
    run_here(*options, "--out", tmp_path / "alone")
    pipeline = [*PIPELINES[mesh], *options, "--out", tmp_path / "run"]
    said, *others = pool.run(ranks_of(mesh), run_here, *pipeline, "--mesh", mesh)
    expected = losses(tmp_path / "alone")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)  # norms to clip by are float32
    held_out = [read_metrics(tmp_path / of / "metrics.jsonl")[2]["held_out_loss"] for of in ("alone", "run")]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-6)
    assert f"debug on {ranks_of(mesh)} devices ({mesh})" in said
    assert not any(others), "the first rank speaks for all"
    folder = shutil.copytree(tmp_path / "run", tmp_path / "on", ignore=shutil.ignore_patterns("*.lock", "*6"))
    run_here(*options, "--out", folder, "--resume")
    assert losses(folder) == pytest.approx(expected, rel=1e-6)


def sampling(folder):
    with pytest.raises(ValueError, match="sample") as caught:
        run_here("--mesh", "pp=2", "--sample", "def ", "--out", folder)
    return str(caught.value)


def test_a_pipeline_does_not_sample(pool, tmp_path):
    for text in pool.run(2, sampling, tmp_path):
        assert text.startswith("--sample doesn't run on a mesh with pp")


def test_published_weights_are_read_by_two_ranks(pool, tmp_path):
    config = deepseek_v3.preset("debug", layers=2)
    huggingface.save(tmp_path / "model", config, deepseek_v3.init(config, 5))
    options = ["--init-from", tmp_path / "model", "--out"]
    run_here(*options, tmp_path / "alone", steps=2)
    for mesh in ("ep=2", "pp=2"):
        pool.run(2, run_here, *options, tmp_path / mesh, "--mesh", mesh, "--steps", 2)
        assert losses(tmp_path / mesh) == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


@pytest.mark.parametrize("mesh", quick(["ep=2"], ["ep=2", "pp=2"]))
@pytest.mark.parametrize("harm", quick(["die"], ["die", "raise"]))
def test_a_rank_that_dies_or_raises_ends_the_launch_and_the_checkpoint_goes_on(alone, tmp_path, harm, mesh):
    script = tmp_path / "hurt.py"
    script.write_text(HURT.replace("SCRIPT", repr(str(SCRIPT))))
    options = [*TWO_LAYERS, "--out", tmp_path / "run", "--save-every", "2", "--ep-backend", "all_to_all"]
    done = run([*TORCHRUN, "2", script], *options, "--mesh", mesh, HARM=harm)
    assert done.returncode != 0
    assert time.time() - (tmp_path / "run" / "step-00000002").stat().st_mtime < 60
    assert ("RuntimeError: rank 1 had enough" if harm == "raise" else "Signal 9 (SIGKILL)") in done.stderr
    assert checkpoint.latest(tmp_path / "run").name == "step-00000002"
    if harm == "raise":
        return
    # On with one process, which has the same text and another mesh.
    run_here(*options, "--resume")
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-6)


def disagreeing(folder):
    with pytest.raises((ValueError, SystemExit)) as caught:
        run_here("--out", folder, "--mesh", "ep=2", "--seed", torch.distributed.get_rank())
    return str(caught.value)


def test_ranks_that_disagree_are_told_at_start(pool, tmp_path):
    for text in pool.run(2, disagreeing, tmp_path):
        assert "options: got on rank 1, beside rank 0: options.seed is 0, here 1" in text
    assert not (tmp_path / "metrics.jsonl").exists()
