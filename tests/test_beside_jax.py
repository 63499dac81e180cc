"""The program beside JAX: every row agrees, where jax is installed."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "examples/beside_jax.py")]


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs jax")
def test_every_call_agrees_with_its_counterpart():
    done = subprocess.run(PROGRAM, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^│ (.+?) *│ (.+?) *│ ([\d.e-]+) *│$", done.stdout, re.M)
    assert len(rows) == done.stdout.count("\n│") >= 26
    assert all(float(difference) < 1e-4 for _, _, difference in rows)


def test_without_jax_it_says_so():
    code = (
        f"import sys, runpy; sys.modules['jax'] = None; runpy.run_path({PROGRAM[1]!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "beside_jax: needs jax: pip install jax\n")
