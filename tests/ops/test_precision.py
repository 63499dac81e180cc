"""Products in fp8: rounding, errors beside what rounding predicts, and straight-through derivatives."""

import itertools
import re

import pytest
import torch
from helpers import error

from fmoe.errors import TransformError
from fmoe.ops.bases import grouped_mm, grouped_outer, scaled_grouped_mm, scaled_grouped_outer
from fmoe.ops.linear import linear
from fmoe.ops.precision import (
    BLOCK,
    PRECISIONS,
    Recipe,
    of_weight_gradient,
    parse_recipe,
    quantise,
    recipe_of,
    rounded,
)

pytestmark = pytest.mark.usefixtures("device")

NUMBERS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # by their bits: 0 to 448


def to_nearest_even(x):
    """e4m3 numbers, found among all of them."""
    distance = (x.abs()[..., None].double() - NUMBERS.to(x.device)).abs()
    least = distance.amin(-1, keepdim=True)
    bits = torch.arange(127, device=x.device)
    odd = torch.where(distance == least, bits % 2 * 1000 + bits, 10000).argmin(-1)  # the even one of two
    return NUMBERS.to(x.device)[odd] * x.sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_to_the_nearest_even_with_a_scale_for_each_row(dtype):
    x = (torch.randn(40, 70) * torch.randn(40, 1).exp()).to(dtype)
    x[3], x[4, 5] = 0, 500
    x[5, :40] = torch.arange(-20, 20) * 0.5 + 0.25  # among them numbers between two others
    x[5, 40:], x[5, 41] = 0, 448
    values, scale = quantise(x)
    largest = x.float().abs().amax(1)
    assert torch.equal(scale, torch.where(largest == 0, 1, largest / 448))
    assert torch.equal(values.double(), to_nearest_even(x.float() / scale[:, None]))
    assert values.float().abs().amax(1).tolist() == [448.0 if i != 3 else 0.0 for i in range(40)]


def test_what_is_not_finite_comes_out_as_such():
    x, w = torch.randn(6, 32), torch.randn(1, 32, 16)
    x[0, 3], x[1, 4], x[2, 5], x[2, 6] = torch.inf, -torch.inf, torch.nan, 1e38
    ends = torch.tensor([6], dtype=torch.int32)
    for precision in PRECISIONS:
        y = scaled_grouped_mm(x, w, ends, precision)
        signs = w[0, [3, 4]].sign() * torch.tensor([[1.0], [-1.0]])
        assert torch.equal(y[:2], signs * torch.inf)
        assert y[2].isnan().all() and y[3:].isfinite().all()
        g = scaled_grouped_outer(x, torch.randn(6, 16), ends, precision)[0]
        assert not g[3:6].isfinite().any() and g[[0, 1, 2, *range(7, 32)]].isfinite().all()
        tiny = scaled_grouped_mm(x * 1e-44, w, ends, precision)  # scales that would be zero
        assert tiny[3:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_blocks_are_scaled_alone(rows):
    x = torch.randn(rows, 200)
    x[:, 0] = 1e4  # spoils small numbers of its block only
    tiles = torch.cat([rounded(part, "fp8_rowwise") for part in x.split(BLOCK, 1)], 1)
    assert torch.equal(rounded(x, "fp8_block"), tiles)
    for a, b in itertools.product(range(0, rows, BLOCK), range(0, 200, BLOCK)):
        block = x[a : a + BLOCK, b : b + BLOCK]
        want = rounded(block.flatten()[None], "fp8_rowwise").view(block.shape)
        assert torch.equal(rounded(x, "fp8_block", weight=True)[a : a + BLOCK, b : b + BLOCK], want)


def groups(rows=600):
    """Ends of groups of which one has no rows, and a few rows of none."""
    return torch.tensor([0, rows // 3, rows // 3, rows - 7], dtype=torch.int32)


def variance(x, precision, weight=False):
    """The expected square of the error that rounding makes of numbers, by their size."""
    x = x.double()
    if precision != "fp8_block":
        scale = x.abs().amax(-1, keepdim=True) / 448
    else:
        high, (rows, cols) = BLOCK if weight else 1, x.shape[-2:]
        blocks = torch.nn.functional.pad(x.abs(), (0, -cols % BLOCK, 0, -rows % high))
        blocks = blocks.unflatten(-2, (-1, high)).unflatten(-1, (-1, BLOCK)).amax((-3, -1)) / 448
        scale = blocks.repeat_interleave(high, -2).repeat_interleave(BLOCK, -1)[..., :rows, :cols]
    exponent = (x.abs() / scale).clamp_min(2.0**-6).log2().floor()
    largest = (x.abs() / scale - 448).abs() < 1e-9  # is exact
    return torch.where(largest, 0, (2 ** (exponent - 3) * scale) ** 2 / 12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_are_those_that_rounding_predicts(precision):
    """Against float64, for each kind of product. Bfloat16 rounds 16 times as finely, but its result, too."""
    ends, inside = groups(), slice(0, 593)
    x, w = torch.randn(600, 192), torch.randn(4, 192, 160)
    x[:, 7] *= 20
    got = scaled_grouped_mm(x, w, ends, precision).double()
    exact = grouped_mm(x.double(), w.double(), ends)
    of_x, of_w = variance(x, precision), variance(w.mT, precision, weight=True).mT
    predicted = grouped_mm(of_x, w.double() ** 2, ends) + grouped_mm(x.double() ** 2, of_w, ends)
    predicted = (predicted + grouped_mm(of_x, of_w, ends))[inside].mean().sqrt()
    measured = (got - exact)[inside].square().mean().sqrt()
    assert 0.88 < (measured / predicted).item() < 1.12  # within 0.07 for each of 60 seeds
    narrow = grouped_mm(x.bfloat16(), w.bfloat16(), ends).double()
    assert 7 < (measured / (narrow - exact)[inside].square().mean().sqrt()).item() < 30


@pytest.mark.parametrize("precision", ["fp8_rowwise", "fp8_block"])  # which round all operands
def test_errors_have_no_bias(precision):
    """The mean error of products of numbers above zero, where bias would add up."""
    x, w, ends = torch.rand(512, 512) + 0.1, torch.rand(1, 512, 256) + 0.1, torch.tensor([512]).int()
    for op, rounding, y in ((grouped_mm, scaled_grouped_mm, w), (grouped_outer, scaled_grouped_outer, w[0])):
        got, exact = rounding(x, y, ends, precision), op(x.double(), y.double(), ends)
        relative = (got.double() - exact) / exact
        # Outputs of a row share its rounding, as those of a column do: the variances of both means add up.
        means = relative.mean(-1).flatten(), relative.mean(-2).flatten()
        deviation = sum(of_one.var() / len(of_one) for of_one in means) ** 0.5
        assert relative.mean().abs() < 4 * deviation  # within 3.1 for 40 seeds, 0.98 by root mean square
        assert relative.mean().abs() < 5e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outliers_cost_no_more_than_rounding_may(precision):
    """Each output is within the bound of its own numbers, where one is 1,000 times the rest."""
    ends, inside = groups(), slice(0, 593)
    x, w = torch.randn(600, 192), torch.randn(4, 192, 160)
    x[::2, 5] *= 1000
    x[9] = 0
    w[1, 3] *= 1000
    got = scaled_grouped_mm(x, w, ends, precision).double()
    exact = grouped_mm(x.double(), w.double(), ends)

    def at_most(t):
        scale = t.double().abs().amax(-1, keepdim=True) / 448
        return torch.maximum(t.double().abs() * 2.0**-4, scale * 2.0**-10)

    of_x, of_w = at_most(x), at_most(w.mT).mT
    if precision == "fp8_block":  # a block of a weight has its largest number of all
        of_w = torch.maximum(of_w, w.double().abs().amax((1, 2), keepdim=True) / 448 * 2.0**-10)
    bound = grouped_mm(of_x, w.double().abs() + of_w, ends) + grouped_mm(x.double().abs(), of_w, ends)
    assert ((got - exact).abs() <= bound * 1.001)[inside].all()
    assert not got[9].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_derivatives_are_products_in_fp8(precision):
    """Straight-through: cotangents are rounded along what is summed over, as any operand is.

    With gradients of weights in high precision, nothing is rounded for these.
    """
    ends = groups(60)
    x, w, g = torch.randn(60, 32), torch.randn(4, 32, 48), torch.randn(60, 48)
    g[53:] = 0
    _, pull = torch.func.vjp(lambda x, w: scaled_grouped_mm(x, w, ends, precision), x, w)
    g_x, g_w = pull(g)
    for e, (a, b) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        want = rounded(g[a:b], precision) @ rounded(w[e], precision, weight=True).T
        assert error(g_x[a:b], want) < 1e-6
        of_weight = x[a:b].T, g[a:b].T
        if rounding := of_weight_gradient(precision):
            of_weight = (rounded(t, rounding) for t in of_weight) if b > a else of_weight
        left, right = of_weight
        assert error(g_w[e], left @ right.T) < 1e-6
    if not rounding:
        assert torch.equal(g_w, grouped_outer(x, g, ends))
    _, tangent = torch.func.jvp(lambda x: scaled_grouped_mm(x, w, ends, precision), (x,), (x,))
    assert torch.equal(tangent[:53], scaled_grouped_mm(x, w, ends, precision)[:53])
    again = pull(g)
    assert torch.equal(again[0], g_x) and torch.equal(again[1], g_w)


def test_a_dense_product_is_one_group(device):
    x, weight, bias = torch.randn(2, 5, 32), torch.randn(48, 32), torch.randn(48)
    y = linear(x, weight, bias, "fp8_rowwise")
    want = rounded(x, "fp8_rowwise") @ rounded(weight, "fp8_rowwise").T + bias
    assert error(y, want) < 1e-6
    assert linear(x[:, :0], weight, bias, "fp8_rowwise").shape == (2, 0, 48)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    with torch.autocast(device, torch.bfloat16):
        assert linear(x, weight, bias, "fp8_rowwise").dtype == torch.bfloat16
    wide = linear(x.double(), weight.double(), None, "fp8_rowwise")  # isn't rounded
    assert error(wide, x.double() @ weight.double().T) < 1e-14
    each = torch.func.vmap(lambda x: linear(x, weight, None, "fp8_rowwise"))(x)
    assert torch.equal(each, linear(x, weight, None, "fp8_rowwise"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Recipe(experts="fp4"), "Recipe: experts: got 'fp4', expected one of ('fp8_rowwise', 'fp8_b"),
        (lambda: recipe_of("loss", "bf16"), "loss: precision: got 'bf16', expected one of ('fp8_rowwise', "),
        (lambda: recipe_of("loss", {}), "), a Recipe, or None"),
        (lambda: parse_recipe("head=fp8_rowwise"), "parse_recipe: precision: got 'head=fp8_rowwise', expect"),
        (lambda: recipe_of("loss", "gw_hp"), "'fp8_block', 'fp8_rowwise_with_gw_hp'), a Recipe, or None"),
        (lambda: parse_recipe("dense=fp4"), "Recipe: dense: got 'fp4', expected"),
        (
            lambda: parse_recipe("experts=fp8_rowwise,experts=fp8_block"),
            "parse_recipe: precision: got 'experts=fp8_rowwise,experts=fp8_block', expected one of",
        ),
    ],
)
def test_other_precisions_are_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_they_raise_under_transforms_inside_compile():
    x, w, ends = torch.randn(4, 16), torch.randn(1, 16, 16), torch.tensor([4]).int()
    torch._dynamo.reset()
    slope = torch.func.grad(lambda x: scaled_grouped_mm(x, w, ends, "fp8_rowwise").sum())
    with pytest.raises((TransformError, torch._dynamo.exc.Unsupported), match="pytorch#193279"):
        torch.compile(slope, fullgraph=True, backend="aot_eager")(x)
