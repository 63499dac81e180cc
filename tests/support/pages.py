"""Pages of the documentation as programs: their blocks, and how those run."""

import doctest
import pathlib
import re
import sys
import types
from typing import Any

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language, in order, and of those that don't run why not."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(
        rf"^(?:<!-- not run: (.*?) -->\n)?```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return [(block, why_not) for why_not, block in found]


def run_page(page: str, *, sessions: bool = True) -> dict[str, Any]:
    """Run a page's Python, plain blocks and sessions, as one program; its names.

    Raises ``AssertionError`` where a session shows something else than what comes.
    """
    module = types.ModuleType(f"page_{page.removesuffix('.md')}")
    sys.modules[module.__name__] = module  # where Dynamo looks for a function's globals
    names = vars(module)
    runner = doctest.DocTestRunner(verbose=False)
    for i, (block, why_not) in enumerate(blocks(page, "python")):
        if why_not:
            continue
        if not block.startswith(">>>"):
            exec(compile(block, f"{page}, block {i}", "exec"), names)
        elif sessions:
            session = doctest.DocTestParser().get_doctest(block, names, f"{page}, block {i}", page, 0)
            said: list[str] = []
            failed = runner.run(session, clear_globs=False, out=said.append).failed
            assert not failed, "".join(said)
            names.update(session.globs)
    return names


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_page(name)
