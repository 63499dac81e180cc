"""What the library says of itself is what the docs say."""

import importlib.util
import pathlib
import subprocess
import sys

from fmoe.__main__ import markdown_table, operator_rows
from fmoe.introspect import Support, operator_support

ROOT = pathlib.Path(__file__).parent.parent
DOC = (ROOT / "docs" / "transforms.md").read_text()


def declared():
    return [row for row in operator_rows() if not row[0].startswith("test_")]


def test_the_docs_have_every_operator_as_it_is_declared():
    assert markdown_table([*Support._fields], declared()) in DOC


def test_the_docs_have_what_each_policy_costs():
    spec = importlib.util.spec_from_file_location("remat_policies", ROOT / "benchmarks" / "remat_policies.py")
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    assert policies.table() in DOC


def test_support_follows_from_the_declarations():
    found = {s.operator: s for s in operator_support()}
    assert found["topk"][1:] == ("topk", True, "constant", "constant", "rule", True)
    assert found["experts_up"][1:] == ("experts_grouped_mm", False, "rule", "derived", "derived", True)
    assert found["experts_up_backward"].compiled is False


def test_the_command_prints_the_table(command):
    words = [sys.executable, "-m", "fmoe", "operators", "--markdown"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == markdown_table([*Support._fields], declared())
    assert "--markdown" in command("operators", "--help")
