"""``python -m fmoe``: what the library says about itself, and what it costs here."""

import argparse
import json
import sys

import torch
from rich.console import Console
from rich.table import Table

from .bench.layers import ROUTINGS, SHAPES, Shape
from .bench.measure import bench_layer, report, write_json
from .doctor import diagnose, self_test
from .doctor import report as diagnosis
from .introspect import Support, operator_support
from .parallel.together import this_rank


def operator_rows() -> list[list[str]]:
    """A line for every operator, under the names of :class:`Support`'s fields."""
    words = {True: "yes", False: "no"}
    return [[words[v] if isinstance(v, bool) else v for v in support] for support in operator_support()]


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_operators(args: argparse.Namespace) -> None:
    if args.markdown:
        print(markdown_table([*Support._fields], operator_rows()))
        return
    table = Table(*Support._fields)
    for row in operator_rows():
        table.add_row(*row)
    Console().print(table)


def bench(args: argparse.Namespace) -> None:
    shapes = [Shape(*args.sizes)] if args.sizes else [SHAPES[name] for name in args.shape]
    results = []
    for shape in shapes:
        for routing in args.routing:
            result = bench_layer(
                shape, routing=routing, dtype=getattr(torch, args.dtype), device=args.device,
                rounds=args.rounds, only=args.only, seed=args.seed,
            )  # fmt: skip
            report(result, Console(width=None if Console().is_terminal else 150))
            results.append(result)
    if args.json:
        write_json(results, args.json)


def doctor(args: argparse.Namespace) -> None:
    found = diagnose()
    if not args.no_test:
        found["self_test"] = self_test()
    if this_rank() == 0:
        print(json.dumps(found, indent=2) if args.json else diagnosis(found))
    sys.exit(int(any(test["broken"] for test in found.get("self_test", {}).values())))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fmoe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    operators = commands.add_parser("operators", help="every operator and the transforms it supports")
    operators.add_argument("--markdown", action="store_true", help="as in docs/transforms.md")
    operators.set_defaults(run=show_operators)
    checks = commands.add_parser(
        "doctor", help="versions, what this machine can do, backend 'auto', and whether the laws hold here"
    )
    checks.add_argument("--json", action="store_true")
    checks.add_argument("--no-test", action="store_true", help="don't check the laws, which takes 10 s")
    checks.set_defaults(run=doctor)
    layer = (
        commands.add_parser("bench", help="measure here")
        .add_subparsers(dest="what", required=True)
        .add_parser("layer", help="one MoE layer, beside plain PyTorch and installed peers")
    )
    on_cuda = torch.cuda.is_available()
    layer.add_argument("--shape", nargs="+", choices=SHAPES, default=["16B" if on_cuda else "small"])
    layer.add_argument("--sizes", nargs=5, type=int, metavar=tuple("TDFEK"), help="instead of a named shape")
    layer.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["random"])
    layer.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_cuda else "float32"
    )
    layer.add_argument("--device", default="cuda" if on_cuda else "cpu")
    layer.add_argument("--rounds", type=int, default=20)
    layer.add_argument("--only", nargs="+", metavar="LAYER", help="names of layers, as in the table")
    layer.add_argument("--seed", type=int, default=None, help="fresh by default")
    layer.add_argument("--json", metavar="FILE", help="write what was measured")
    layer.set_defaults(run=bench)
    return parser


def main() -> None:
    args = arguments().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
