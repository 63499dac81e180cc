"""The notebooks, each in a kernel of its own: they run, and say what is stored in them.

After a change to one, store its outputs anew: ``python tests/test_notebooks.py``.
"""

import base64
import pathlib
import re
import tempfile

import nbformat
import pytest
from helpers import quick
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.ipynb"))
LIMIT = 150  # seconds a cell, where a machine is busy; a whole notebook takes 20 on a quiet one
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


# PyTorch's own forward AD decompositions use it; from 2.14 on the warning shows by default.
IGNORED = "ignore:`torch.jit.script:FutureWarning"


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONWARNINGS", IGNORED)
            NotebookClient(notebook, timeout=LIMIT, record_timing=False, resources=where).execute()
    notebook.metadata = metadata  # without the version of Python at hand
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(notebook: nbformat.NotebookNode) -> str:
    """What its cells print, and nothing of warnings."""
    said = []
    for output in outputs(notebook):
        assert output.output_type != "error"
        if output.output_type == "stream":
            assert "Warning" not in output.text
            said += [output.text] if output.name == "stdout" else []
        else:
            said.append(output.data["text/plain"] + "\n")
    return "".join(said)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4


# The second trains eight models, for a quarter of a minute, as the fourth trains two. The third starts four
# processes, for half a minute.
@pytest.mark.parametrize("path", quick(NOTEBOOKS[:1], NOTEBOOKS), ids=lambda path: path.stem)
def test_it_runs_and_says_what_is_stored(path):
    stored, now = nbformat.read(path, as_version=4), execute(path)
    assert "True" in text(now)
    assert "False" not in text(now), "each claim is printed beside its name"
    assert NUMBER.split(text(now)) == NUMBER.split(text(stored))
    # Machines round differently, which training amplifies; what must hold is printed as True.
    numbers, expected = ([float(n.replace(",", "")) for n in NUMBER.findall(text(n))] for n in (now, stored))
    assert numbers == pytest.approx(expected, rel=0.25, abs=0.05)
    for notebook in (stored, now):
        picture = outputs(notebook)[-1].data["image/png"]
        assert 5_000 < len(base64.b64decode(picture)) < 60_000


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path), path)
