"""The example on many devices, as a user runs it: under torchrun."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fmoe.models import deepseek_v3, huggingface
from fmoe.training import checkpoint
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
    str(SCRIPT),
]
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does in ten steps."""
    folder = tmp_path_factory.mktemp("alone")
    done = run([sys.executable, SCRIPT], "--out", folder, steps=10)
    assert done.returncode == 0, done.stderr
    return losses(folder)


def test_two_ranks_train_as_one_process_does(alone, tmp_path):
    done = run([*TORCHRUN, "2", SCRIPT], "--out", tmp_path, "--mesh", "ep=2", steps=10)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)  # norms to clip by are float32
    assert done.stdout.count("backend all_to_all along ep=2: by torch.distributed; not DeepEP, as") == 1
    assert done.stdout.count("step 10/10") == 1
    assert "debug on 2 devices (ep=2): 1.70M parameters" in done.stdout


def on_a_rank(*options):
    """The example in this process, which belongs to a group already."""
    spec = importlib.util.spec_from_file_location("train_deepseek_v3", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sys.argv = [str(SCRIPT), *OPTIONS, *map(str, options)]
    example.main()


def test_published_weights_are_read_by_two_ranks(pool, tmp_path):
    config = deepseek_v3.preset("debug", layers=2)
    huggingface.save(tmp_path / "model", config, deepseek_v3.init(config, 5))
    options = ["--init-from", tmp_path / "model", "--steps", 2, "--out"]
    on_a_rank(*options, tmp_path / "alone")
    pool.run(2, on_a_rank, *options, tmp_path / "two", "--mesh", "ep=2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


def test_four_ranks_with_every_option(tmp_path):
    options = ["--out", tmp_path, "--mesh", "dp=2,ep=2", "--remat", "default", "--micro-batches", "2"]
    options += ["--sample", "def ", "--sample-tokens", "3", "--eval-every", "2", "--held-out", "0.3"]
    options += ["--ep-backend", "all_to_all", "--compute-dtype", "float32"]
    done = run([*TORCHRUN, "4", SCRIPT], *options, steps=2)
    assert done.returncode == 0, done.stderr
    assert "loss on held-out text" in done.stdout
    assert "\ndef " in done.stdout
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["die", "raise"])
def test_a_rank_that_dies_or_raises_ends_the_launch_and_the_checkpoint_goes_on(alone, tmp_path, harm):
    script = tmp_path / "hurt.py"
    script.write_text(HURT.replace("SCRIPT", repr(str(SCRIPT))))
    options = ["--out", tmp_path / "run", "--save-every", "2"]
    done = run([*TORCHRUN, "2", script], *options, "--mesh", "ep=2", steps=10, HARM=harm)
    assert done.returncode != 0
    assert time.time() - (tmp_path / "run" / "step-00000002").stat().st_mtime < 60
    assert ("RuntimeError: rank 1 had enough" if harm == "raise" else "Signal 9 (SIGKILL)") in done.stderr
    assert checkpoint.latest(tmp_path / "run").name == "step-00000002"
    if harm == "raise":
        return
    # On with one process, which has the same text and another mesh.
    done = run([sys.executable, SCRIPT], *options, "--resume", steps=10)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-6)


def test_ranks_that_disagree_are_told_at_start(tmp_path):
    shell = f'exec {sys.executable} {SCRIPT} --mesh ep=2 --seed $RANK "$@"'
    done = run([*TORCHRUN, "2", "--no-python", "sh", "-c", shell, "sh"], "--out", tmp_path)
    assert done.returncode != 0
    assert "options: got on rank 1, beside rank 0: options.seed is 0, here 1" in done.stderr
    assert 'train_deepseek_v3.py", line' not in done.stderr  # one line, and no traceback of the script
    assert not (tmp_path / "metrics.jsonl").exists()
