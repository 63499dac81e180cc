"""Errors of products and of a layer in each precision, against float64.

    python benchmarks/fp8_errors.py                                         # as a markdown table
    python benchmarks/fp8_errors.py --device cuda --sizes 8192 2048 1408 16 6

An error is relative, by Frobenius norms. The predicted one is that of a product whose operands are rounded
to fp8 and whose result to bfloat16, if all mantissas are equally likely. The bias of a seed is the mean error
of a product, over its root mean square error. The last column has the mean bias of all seeds, over its
standard error.

``--formats`` compares e4m3 and e5m2 as numbers of a cotangent, which may spread over more octaves than tokens
do: their magnitudes are log-normal, with a deviation of so many octaves. Errors are of the cotangent's rows
times a weight, both with a scale for each row.
"""

import argparse
import functools
import math
from typing import Any

import torch

import fmoe
from fmoe.__main__ import markdown_table
from fmoe.bench.layers import Shape, config_for, random_params
from fmoe.ops.bases import grouped_mm, grouped_outer, scaled_grouped_mm, scaled_grouped_outer
from fmoe.ops.precision import PRECISIONS, ROWWISE, rounded

COLUMNS = ["products take", "rows x weight", "sum over rows", "predicted", "layer", "g of rows", "g of w_in"]
COLUMNS += ["g of w_out", "bias / standard error"]
# Root mean square of rounding, in halves of the last bit of a 1, over that of numbers from 1 to 2.
OPERAND = 3**-0.5 / (3 / (2 * math.log(2))) ** 0.5


def errors(shape: Shape, precision: str | None, seed: int, device: str) -> list[float]:
    """Of the columns but the first and the predicted; the last one is the bias."""
    torch.manual_seed(seed)
    params = random_params(shape, seed, dtype=torch.bfloat16, device=device)
    x = torch.randn(shape.tokens, shape.dim, device=device).bfloat16()
    g = torch.randn_like(x)
    _, plan = fmoe.dispatch(x, fmoe.route(params.router, x, config_for(shape, "random")))
    g_RD, w, ends = fmoe.expand(g, plan), params.experts.w_out.mT, plan.offsets_e
    h = torch.randn(len(g_RD), shape.hidden, device=device).bfloat16()

    def all_of(precision: str | None, h: Any, w: Any, x: Any, g: Any, g_RD: Any, *weights: Any) -> list[Any]:
        if precision is None:
            made = [grouped_mm(h, w, ends), grouped_outer(h, g_RD, ends)]
        else:
            made = [scaled_grouped_mm(h, w, ends, precision), scaled_grouped_outer(h, g_RD, ends, precision)]
        experts = functools.partial(fmoe.experts_grouped_mm, plan=plan, precision=precision)
        y, pull = torch.func.vjp(experts, fmoe.ExpertParams(*weights), x)
        g_experts, g_x = pull(g)
        return [*made, y, g_x, *g_experts]

    inputs = h, w, x, g, g_RD, *params.experts
    exact, found = all_of(None, *(t.double() for t in inputs)), all_of(precision, *inputs)
    wrong = [a.double() - b for a, b in zip(found, exact)]
    relative = [(e.norm() / b.norm()).item() for e, b in zip(wrong, exact)]
    return [*relative, (wrong[0].mean() / wrong[0].square().mean().sqrt()).item()]


def row(shape: Shape, precision: str | None, seeds: range, device: str) -> list[str]:
    of_seeds = torch.tensor([errors(shape, precision, seed, device) for seed in seeds])
    means, bias = of_seeds[:, :-1].mean(0).tolist(), of_seeds[:, -1]
    operand = 0.0 if precision is None else OPERAND * 2.0**-4  # bfloat16 operands are exact
    cells = [*means[:2], math.hypot(operand, operand, OPERAND * 2.0**-8), *means[2:]]
    significance = (bias.mean() / (bias.std() / len(bias) ** 0.5)).item()
    return [precision or "bfloat16", *(f"{cell:.1e}" for cell in cells), f"{significance:+.1f}"]


def of_formats(octaves: float, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        g, w = torch.randn(512, 256).sign() * (octaves * torch.randn(512, 256)).exp2(), torch.randn(256, 192)
        exact, of_weight = g.double() @ w.double(), rounded(w.T, ROWWISE).T
        errors = []
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = g.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
            narrow = (g / scale).to(dtype).float()
            error = (narrow * scale @ of_weight - exact).norm() / exact.norm()
            errors += [error.item(), (narrow == 0).float().mean().item()]
        found.append(errors)
    e4m3, lost, e5m2, lost_too = torch.tensor(found).mean(0).tolist()
    return [f"{octaves:g}", f"{e4m3:.1e}", f"{lost:.1%}", f"{e5m2:.1e}", f"{lost_too:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs=5, type=int, default=[512, 256, 192, 8, 2], metavar=tuple("TDFEK"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--formats", action="store_true")
    args = parser.parse_args()
    if args.formats:
        columns = ["octaves", "error in e4m3", "become zero", "error in e5m2", "become zero"]
        rows = [of_formats(octaves, range(args.seeds)) for octaves in (1, 2, 3, 4, 6)]
        print(markdown_table(columns, rows))
        return
    shape, seeds = Shape(*args.sizes), range(args.seeds)
    print(markdown_table(COLUMNS, [row(shape, p, seeds, args.device) for p in (None, *PRECISIONS)]))


if __name__ == "__main__":
    main()
