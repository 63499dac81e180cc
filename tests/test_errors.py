"""Errors: each text of the source has an entry in the documentation, and there is no other."""

import ast
import re

from error_sites import ROOT, sites
from pages import DOCS


def documented() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`(.*?)`(?:<br>|$)", row)]


def test_troubleshooting_has_every_text_and_no_other():
    found = documented()
    assert len(found) == len(set(found))
    where = {site.text: site.where for site in sites()}
    assert {where[text]: text for text in where.keys() - found} == {}, "no entry in docs/troubleshooting.md"
    assert set(found) - where.keys() == set(), "entries of docs/troubleshooting.md that no error has"


# What raises an error that was made elsewhere, or none that a user meets.
OTHER_RAISES = {
    "raise",
    "raise error",
    "raise NotImplementedError",
    "raise ValueError(known[kind])",
    "raise ValueError(next(filter(None, problems)))",
    # Tracebacks of ranks, and laws: not texts of one argument.
    "raise RankError(told)",
    "raise LawBroken(_told(function, report, laws), report)",
    "raise LawBroken(text, report) from error",
}


def test_every_raise_is_seen():
    """What can't be read off the source would need no entry."""
    known, others = {site.where for site in sites()}, set()
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise):
                continue
            if (text := ast.unparse(node)) in OTHER_RAISES:
                others.add(text)
                continue
            lines = range(node.lineno, node.end_lineno + 1)
            place = path.relative_to(ROOT)
            assert {f"{place}:{line}" for line in lines} & known, f"{place}:{node.lineno}"
    assert others == OTHER_RAISES
