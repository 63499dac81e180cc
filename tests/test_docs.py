"""The documentation: its programs run, its links lead somewhere, and it has every public name."""

import doctest
import functools
import importlib
import inspect
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from pages import DOCS, blocks, run_page

import fmoe
import fmoe.pipeline
import fmoe.plan
import fmoe.testing
from fmoe.__main__ import arguments
from fmoe.ops.core.axes import group_of
from fmoe.testing import check_backend
from fmoe.testing.backend import LAWS

ROOT = DOCS.parent
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # as in CI, also where there is a GPU
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

# ---- programs ------------------------------------------------------------------------------------------


def test_the_pages_run():
    """In a process of their own, as what is declared stays declared, and what is compiled stays compiled."""
    pages = (
        "index.md",
        "tutorial.md",
        "operators.md",
        "backends.md",
        "families.md",
        "many-devices.md",
        "pipelines.md",
        "planning.md",
        "transforms.md",
        "fp8.md",
    )
    program = [sys.executable, str(ROOT / "tests/support/pages.py"), *pages]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=os.environ | ON_CPU)
    assert done.returncode == 0, done.stderr


def command_lines():
    """The page of every command, whether it is the example or ``fmoe``, and the words after that."""
    for page in PAGES:
        for block in re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(train_deepseek_v3\.py|python -m fmoe)( [^|>&]*|$)", line)
                if found and "$" not in found[2] and "..." not in found[2]:
                    yield page.name, found[1], shlex.split(found[2], comments=True)


def test_options_of_commands_exist(monkeypatch):
    """Also of those that need a GPU. Those of the tutorial run too, with ``--slow``."""
    example = runpy.run_path(str(ROOT / "examples/train_deepseek_v3.py"))
    programs = {"train_deepseek_v3.py": example["parse"], "python -m fmoe": arguments().parse_args}
    commands = [*command_lines()]
    assert len(commands) > 12
    assert {program for _, program, _ in commands} == {*programs}
    for page, program, words in commands:
        monkeypatch.setattr(sys, "argv", [program, *words])
        try:
            programs[program]()
        except SystemExit as error:
            pytest.fail(f"{page}: {program} {words}: {error}")


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(tmp_path):
    """In order, with a tenth of the steps, in a folder like a checkout; those that aren't run say why."""
    for name in ("README.md", "docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    runnable = [command for command, why_not in blocks("tutorial.md", "bash") if not why_not]
    assert len(runnable) == 3
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in runnable:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", re.sub(r"(--steps|-every) (\d+)0\b", r"\1 \2", command)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | ON_CPU | {"PATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, command + done.stdout + done.stderr


@functools.cache
def backend_of_page():
    return run_page("backends.md", sessions=False)["GatherAll"]


def laws_of_page(laws):
    mesh = fmoe.make_mesh("ep=2", device_type="cpu")
    backend = backend_of_page()(group_of(mesh, ("ep",)), 8)
    return check_backend(backend, mesh, laws=laws).broken


def test_the_backend_of_the_page_keeps_the_laws(pool, slow):
    laws = [name for name in LAWS if slow or name != "compilation"]
    assert pool.run(2, laws_of_page, laws, timeout=240.0) == [[], []]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_fits_on_a_page(page):
    """Beside the sidebar at 1,300 pixels, by ``docs/_static/fmoe.css``; docstrings are as wide at most."""
    code = re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert [line for block in code for line in block.splitlines() if len(line) > 110] == []


# ---- names ---------------------------------------------------------------------------------------------

PUBLIC = [
    f"{module.__name__}.{name}"
    for module in (fmoe, fmoe.parallel, fmoe.pipeline, fmoe.plan, fmoe.testing)
    for name in module.__all__
]
# Names of functions that have another one, by which they are documented.
ALIASES = {
    "fmoe.random": "fmoe.ops.random",
    "fmoe.parallel.make_mesh": "fmoe.make_mesh",
    "fmoe.parallel.shard_map": "fmoe.shard_map",
    "fmoe.parallel.psum_scatter": "fmoe.parallel.reduce_scatter",
}
DOCUMENTED = re.findall(
    r"^\.\. auto\w+:: (\S+)", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE
)


def named(path):
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[i:], found)
    raise AssertionError(path)


@pytest.mark.parametrize("name", dict.fromkeys(PUBLIC + DOCUMENTED))
def test_every_public_name_is_in_the_reference_with_an_example(name):
    """A docstring whose example doctest finds, so that the run of docstrings has it."""
    assert ALIASES.get(name, name) in DOCUMENTED
    value = named(name)
    assert value is named(ALIASES.get(name, name))
    home = inspect.getmodule(value)
    found = doctest.DocTestFinder(recurse=False).find(value, value.__name__, module=home)
    assert [test for test in found if test.examples], f"{name} has no example"


def test_the_reference_names_each_thing_once_and_it_is_documented():
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert [name for name in DOCUMENTED if not (named(name).__doc__ or "").strip()] == []


# ---- links ---------------------------------------------------------------------------------------------


def anchors(text):
    """The names that GitHub, and Sphinx here, give a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_two_clicks_from_the_readme():
    """To train on one's own text, to load DeepSeek's weights, to write a backend."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    for page, words in (
        ("docs/tutorial.md", "--data"),
        ("docs/tutorial.md", "huggingface.load"),
        ("docs/backends.md", "class GatherAll"),
    ):
        assert any(link.partition("#")[0] == page for link in links), page
        assert words in (ROOT / page).read_text(encoding="utf-8")
