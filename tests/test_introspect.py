"""What the library says of itself is what the docs say."""

import importlib.util
import pathlib
import subprocess
import sys

import optree
import pytest
import torch
from helpers import CONFIGS, random_layer
from rich.console import Console
from torch.nn import GELU, LayerNorm, Linear, Sequential

import fmoe
from fmoe.__main__ import markdown_table, operator_rows
from fmoe.errors import TransformError
from fmoe.introspect import Support, kept_bytes, operator_support, saved_bytes, saved_residuals

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


# ---- saved residuals -------------------------------------------------------------------------------------


def line(word):
    """The line of this file on which a word stands, as residuals name it."""
    lines = pathlib.Path(__file__).read_text().splitlines()
    return f"test_introspect.py:{1 + next(i for i, text in enumerate(lines) if word in text)} (mlp)"


def mlp(w, x):
    hidden = fmoe.checkpoint_name(x @ w["up"], "hidden")  # made here
    return fmoe.checkpoint_name(hidden.relu(), "active") @ w["down"]  # and here


def arguments():
    return {"up": torch.randn(4, 16), "down": torch.randn(16, 4)}, torch.randn(3, 4)


def rows(fn, *args, how=("kept", "kept in fp8", "offloaded", "recomputed", "captured")):
    return [row for row in saved_residuals(fn, *args) if row.how in how]


def test_residuals_of_plain_operations():
    (active,) = rows(mlp, *arguments())
    assert active[:5] == ("active", (3, 16), torch.float32, 4 * 3 * 16, "aten::relu")
    assert active.source.endswith(line("# and here")) and active.how == "kept"
    given = {row.name: row.shape for row in rows(mlp, *arguments(), how=["argument"])}
    assert given == {"0.down": (16, 4), "0.up": (4, 16), "1": (3, 4)}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (fmoe.save_nothing, {"hidden": "recomputed", "active": "recomputed"}),
        (fmoe.save("hidden"), {"hidden": "kept", "active": "recomputed"}),
        (fmoe.save("hidden") | fmoe.offload("active"), {"hidden": "kept", "active": "offloaded"}),
        (fmoe.compress("hidden") | fmoe.offload("active"), {"hidden": "kept in fp8", "active": "offloaded"}),
    ],
)
def test_residuals_say_what_a_policy_does(policy, expected):
    found = rows(fmoe.remat(mlp, policy), *arguments())
    assert {row.name: row.how for row in found} == expected
    assert {row.operator for row in found} == {"aten::mm", "aten::relu"}
    assert next(row.source for row in found if row.name == "hidden").endswith(line("# made here"))
    nested = rows(fmoe.remat(fmoe.remat(mlp, fmoe.save_nothing), policy), *arguments())
    assert {row.name: row.how for row in nested} == expected


def test_residuals_say_how_values_are_kept_in_fp8():
    """Numbers and scales, in place of the value."""
    found = rows(fmoe.remat(mlp, fmoe.compress("hidden")), *arguments(), how=("kept in fp8",))
    expected = {("hidden", (3,), torch.float32, 4 * 3), ("hidden", (3, 16), torch.float8_e4m3fn, 3 * 16)}
    assert {row[:4] for row in found} == expected


@pytest.mark.parametrize(
    "policy",
    [
        None,
        fmoe.save_everything,
        fmoe.save("topk") | fmoe.offload("dispatch"),
        fmoe.compress("dispatch", "experts_grouped_mm"),
    ],
)
def test_residuals_of_a_layer_add_up_to_what_is_predicted(policy):
    params, x = random_layer(dtype=torch.float32), torch.randn(7, 6)
    layer = lambda p, x: fmoe.moe_forward(p, x, router=CONFIGS["sigmoid, groups"])  # noqa: E731
    found = saved_residuals(fmoe.remat(layer, policy), params, x)
    predicted = saved_bytes(layer, params, x, policy=policy)
    by_name = dict.fromkeys(predicted, 0)
    for row in found:
        if row.how in ("kept", "kept in fp8", "offloaded"):
            by_name[row.name] += row.bytes
            assert row.operator.startswith("fmoe::") and row.source.partition(":")[0].endswith(".py")
    assert by_name == predicted
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    assert kept_bytes(fmoe.remat(layer, policy), params, x) == sum(predicted.values())


def test_residuals_of_a_module_are_marked_as_captured():
    model, x = Sequential(Linear(8, 8), GELU(), LayerNorm(8)), torch.randn(4, 8)
    found = {(row.how, row.shape, row.operator) for row in saved_residuals(model, x)}
    assert ("captured", (8, 8), "") in found and ("argument", (4, 8), "") in found
    assert ("kept", (4, 8), "aten::addmm") in found
    (gelu,) = (row for row in saved_residuals(model, x) if row.operator == "aten::gelu")
    assert "activation.py" in gelu.source and gelu.source.endswith("(GELU.forward)")


def test_only_what_requires_a_gradient_is_differentiated_if_anything_does():
    w, x = arguments()
    w["up"].requires_grad_()
    assert {row.name for row in saved_residuals(mlp, w, x)} == {"1", "active", "0.down"}
    with torch.no_grad():
        assert rows(mlp, *arguments())


def test_residuals_are_a_table_and_display_themselves():
    found = saved_residuals(fmoe.remat(mlp, fmoe.save("hidden")), *arguments())
    console = Console(width=200)
    with console.capture() as shown:
        console.print(found)
    text = shown.get()
    assert "bytes: kept 192, recomputed 192, argument 560" in text
    assert all(word in text for row in found for word in (row.name, row.how, row.operator, f"{row.bytes:,}"))
    assert "hidden" in str(found) and "<pre" in found._repr_mimebundle_([], [])["text/html"]


def test_values_have_their_names_beneath_vmap():
    def fn(x):
        return fmoe.checkpoint_name(x.exp(), "h").sin()

    (row,) = saved_residuals(torch.vmap(fn), torch.randn(3, 4))
    assert (row.name, row.shape, row.operator) == ("h", (3, 4), "aten::exp")


def test_residuals_beneath_torch_func_are_refused():
    with pytest.raises(TransformError, match=r"saved_residuals: got saved-tensor hooks .* expected none"):
        saved_residuals(torch.func.grad(lambda x: x.sin().sum()), torch.ones(3))
    with pytest.raises(TransformError, match=r"saved_residuals: got saved-tensor hooks .* expected none"):
        torch.func.grad(lambda x: (saved_residuals(torch.sin, x), x.sum())[1])(torch.ones(3))


def test_names_in_brackets_are_shown_as_they_are():
    params = {"[bold]": torch.randn(3), "[/]": torch.randn(3)}
    shown = str(saved_residuals(lambda params: params["[bold]"] * params["[/]"], params))
    assert "│ 0.[bold] │" in shown and "│ 0.[/]    │" in shown
