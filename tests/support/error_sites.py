"""Every text that an error of fmoe can have, read off the source.

A text is a template: what is only known when it is raised is ``…``. Functions that only make an error
(``refuse``, ``_error``) are seen through, as are names that stand for a few constants.
"""

import ast
import importlib
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import fmoe

ROOT = pathlib.Path(fmoe.__file__).parent
ERRORS = {
    "ValueError", "TypeError", "RuntimeError", "ImportError", "FloatingPointError", "TransformError",
    "UnpicklingError", "ArgumentTypeError",
}  # fmt: skip
HOLE = "…"
Env = dict[str, list[str]]


class Site(NamedTuple):
    where: str
    text: str


def sites() -> list[Site]:
    """All of them; several may have one text."""
    modules = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
    makers = {
        function.name: function
        for tree in modules.values()
        for function in tree.body
        if isinstance(function, ast.FunctionDef) and _made(function) is not None
    }
    found = []
    for path, tree in modules.items():
        name = ".".join(["fmoe", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        found += [
            Site(f"{path.relative_to(ROOT)}:{line}", re.sub(f"{HOLE}+", HOLE, text))
            for line, text in _Reader(name, makers).read(tree)
            if text.strip(HOLE)  # what was raised elsewhere is raised again
        ]
    return found


def _made(function: ast.FunctionDef) -> ast.Call | None:
    """The error that a function does nothing but make, or the maker it calls for that."""
    last = function.body[-1]
    if isinstance(last, ast.Return) and isinstance(last.value, ast.Call) and function.returns is not None:
        made = ast.unparse(function.returns)
        if made in ERRORS:
            return last.value
    return None


def called(call: ast.Call) -> str:
    if isinstance(call.func, ast.IfExp):  # one error or another
        return ast.unparse(call.func.body)
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


class _Reader:
    """One module's."""

    def __init__(self, module: str, makers: dict[str, ast.FunctionDef]) -> None:
        self.module, self.makers = module, makers
        self.globals = {} if "__main__" in module else vars(importlib.import_module(module))

    def read(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        # A module has makers within functions, too.
        own = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and _made(f) is not None]
        self.makers = self.makers | {function.name: function for function in own}
        yield from self._walk(tree, None, {})

    def _walk(self, node: ast.AST, function: ast.FunctionDef | None, env: Env) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.FunctionDef):
            if _made(node) is not None:
                return  # seen where it is called
            function, env = node, {}
        if isinstance(node, ast.For):
            rows = _rows(node)
            if rows:
                for row in rows:
                    bound = {name: self._texts(value, function, env) for name, value in row.items()}
                    for child in node.body:
                        yield from self._walk(child, function, env | bound)
                return
        if isinstance(node, ast.Call) and (texts := self._error(node, function, env)):
            yield from ((node.lineno, text) for text in texts)
            return
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, function, env)

    def _error(self, call: ast.Call, function: ast.FunctionDef | None, env: Env) -> list[str]:
        name = called(call)
        if name == "argument_error":
            where, argument = (self._texts(a, function, env) for a in call.args[:2])
            keywords = {k.arg: self._texts(k.value, function, env) for k in call.keywords}
            return [
                f"{f}: {a}: got {g}, expected {e}"
                for f in where for a in argument for g in keywords["got"] for e in keywords["expected"]
            ]  # fmt: skip
        if name in self.makers:
            maker = self.makers[name]
            parameters = [*maker.args.args, *maker.args.kwonlyargs]
            given = {p.arg: [HOLE] for p in parameters}
            defaults = maker.args.defaults
            for p, default in zip(maker.args.args[len(maker.args.args) - len(defaults) :], defaults):
                given[p.arg] = self._texts(default, None, {})
            given |= {p.arg: self._texts(a, function, env) for p, a in zip(maker.args.args, call.args)}
            given |= {k.arg: self._texts(k.value, function, env) for k in call.keywords if k.arg}
            made = _made(maker)
            assert made is not None
            outer = {} if function is None else env
            return self._error(made, maker, {**outer, **given})
        if name == "_assert_async":
            return self._texts(call.args[1], function, env)
        if name in ERRORS and call.args:
            return self._texts(call.args[0], function, env)
        return []

    def _texts(self, node: ast.AST, function: ast.FunctionDef | None, env: Env) -> list[str]:
        """What an expression may be as text."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            texts = [""]
            for part in node.values:
                inner = part.value if isinstance(part, ast.FormattedValue) else part
                plain = not (isinstance(part, ast.FormattedValue) and part.conversion == ord("r"))
                more = self._texts(inner, function, env) if plain else [HOLE]
                texts = [text + m for text in texts for m in more]
            return texts
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [
                a + b
                for a in self._texts(node.left, function, env)
                for b in self._texts(node.right, function, env)
            ]
        if isinstance(node, ast.Name):
            if node.id in env:
                return env[node.id]
            if isinstance(value := self.globals.get(node.id), str):
                return [value]
            if function is not None:
                return self._assigned(node.id, function) or [HOLE]
        return [HOLE]

    def _assigned(self, name: str, function: ast.FunctionDef) -> list[str]:
        """The constants that a function gives a name, unless it is also given something else."""
        values = [
            item.value
            for item in ast.walk(function)
            if isinstance(item, ast.Assign) and [ast.unparse(t) for t in item.targets] == [name]
        ]
        if not all(isinstance(value, ast.Constant | ast.JoinedStr) for value in values):
            return []
        return [text for value in values for text in self._texts(value, None, {})]


def _rows(loop: ast.For) -> list[dict[str, ast.AST]]:
    """The names a loop over a literal table binds, row by row."""
    if not (isinstance(loop.iter, ast.Tuple) and loop.iter.elts):
        return []
    if isinstance(loop.target, ast.Name):
        return [{loop.target.id: value} for value in loop.iter.elts]
    if not (isinstance(loop.target, ast.Tuple) and all(isinstance(row, ast.Tuple) for row in loop.iter.elts)):
        return []
    names = [getattr(name, "id", "") for name in loop.target.elts]
    return [dict(zip(names, row.elts)) for row in loop.iter.elts]  # type: ignore[attr-defined]


if __name__ == "__main__":
    for site in sites():
        print(f"{site.where:45} {site.text}")
