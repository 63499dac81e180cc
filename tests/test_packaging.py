"""The package as others get it: built, installed without a checkout, and used."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fmoe
from fmoe.training.metrics import read_metrics

ROOT = Path(fmoe.__file__).parents[1]
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
)
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "_build", "build", "dist", "runs"
)


def called(*command, cwd, **env):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The archive of the source, and the wheel that is built from what the archive holds."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    called(sys.executable, "-c", BUILD, "sdist", folder, cwd=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **safely)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    called(sys.executable, "-c", BUILD, "wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return unpacked, wheel


def source_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_the_wheel_has_the_package_and_nothing_else(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (
            archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA")
        )
    assert names == {f"fmoe/{name}" for name in source_files(ROOT / "fmoe")} | {"fmoe/py.typed"}
    assert f"\nVersion: {fmoe.__version__}\n" in metadata
    needed = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", metadata, re.M)
    assert sorted(needed) == ["einops", "optree", "rich", "torch"]


def test_the_source_archive_has_what_the_checkout_has(built):
    unpacked, _ = built
    for folder in ("fmoe", "tests", "examples", "benchmarks"):
        assert source_files(unpacked / folder) == source_files(ROOT / folder)
    for pattern in ("*.md", "docs/**/*.md", "docs/*.svg", "examples/*.ipynb"):
        mine, theirs = ({path.relative_to(tree) for path in tree.glob(pattern)} for tree in (ROOT, unpacked))
        assert mine <= theirs, pattern


@pytest.mark.slow
def test_an_installed_wheel_trains_without_a_checkout(built, tmp_path):
    _, wheel = built
    site = tmp_path / "site"
    how = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site]
    called(sys.executable, "-m", "pip", "install", *how, wheel, cwd=tmp_path)
    env = dict(PYTHONPATH=str(site), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    where = called(sys.executable, "-c", "import fmoe; print(fmoe.__file__)", cwd=tmp_path, **env)
    assert Path(where.strip()) == site / "fmoe" / "__init__.py"
    said = called(sys.executable, "-m", "fmoe", "train", "--steps", "2", cwd=tmp_path, **env)
    assert "final loss" in said
    assert len(read_metrics(tmp_path / "runs" / "debug" / "metrics.jsonl")) == 2


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert project["version"] == newest == fmoe.__version__


def test_contributing_has_what_ci_runs():
    """Each of its commands; CI's are quieter, in the background or write elsewhere."""
    ci = (ROOT / ".ci" / "run").read_text().replace("nice ", "")
    told = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    checks = re.findall(r"^ *((?:pytest|sphinx-build|ruff|mypy|python examples)[^&>\n]*)", ci, re.M)
    assert len(checks) == 7
    for check in checks:
        words = re.sub(r' "?\$\S+', "", check).strip()  # without CI's own folders and numbers
        parts = re.split(r" (?=-)", words)
        assert any(all(part in line for part in parts) for line in told), check
