"""``python -m fmoe``: what the library says about itself."""

import argparse

from rich.console import Console
from rich.table import Table

from .introspect import Support, operator_support


def operator_rows() -> list[list[str]]:
    """A line for every operator, under the names of :class:`Support`'s fields."""
    words = {True: "yes", False: "no"}
    return [[words[v] if isinstance(v, bool) else v for v in support] for support in operator_support()]


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmoe", description="What fmoe says about itself.")
    commands = parser.add_subparsers(dest="command", required=True)
    operators = commands.add_parser("operators", help="every operator and the transforms it supports")
    operators.add_argument("--markdown", action="store_true", help="as in docs/transforms.md")
    args = parser.parse_args()
    if args.markdown:
        print(markdown_table([*Support._fields], operator_rows()))
        return
    table = Table(*Support._fields)
    for row in operator_rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
