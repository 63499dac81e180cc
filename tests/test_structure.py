"""The package's shape: imports point one way, optional packages stay optional, importing is quiet."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import fmoe

ROOT = pathlib.Path(fmoe.__file__).parent
ORDER = [
    "errors",
    "tree",
    "params",
    "ops",
    "graphs",
    "transforms",
    "parallel",
    "extend",
    "models",
    "pipeline",
]
ORDER += ["training", "introspect", "plan", "bench", "testing", "doctor", "__main__"]
OPTIONAL = {
    "cloudpickle",
    "deep_ep",
    "matplotlib",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
}
MAY_IMPORT = {
    "models/huggingface.py": {"safetensors"},
    "parallel/processes.py": {"cloudpickle"},
    "training/plot.py": {"matplotlib"},
    "training/tokenizer.py": {"tokenizers"},
    "parallel/backends/deepep/adapter.py": {"deep_ep"},
} | {
    f"ops/kernels/{name}.py": {"triton"}
    for name in (
        "activation",
        "adamw",
        "columns",
        "launch",
        "logits",
        "persistent",
        "plan",
        "quantise",
        "router",
        "rows",
    )
}


def imports(path: pathlib.Path, source: str) -> list[str]:
    """Absolute names of what a file of the package imports."""
    found = []
    package = ["fmoe", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    for item in ast.walk(ast.parse(source)):
        if isinstance(item, ast.Import):
            found += [alias.name for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            base = package[: len(package) - item.level + 1] if item.level else []
            found += [".".join([*base, *filter(None, [item.module]), alias.name]) for alias in item.names]
    return found


def against_the_order(path: pathlib.Path, source: str) -> list[str]:
    """What a file imports of the package that comes after it; a public name comes where it is defined."""
    me = path.relative_to(ROOT).parts[0].removesuffix(".py")
    names = [name for name in imports(path, source) if name.startswith("fmoe.")]
    where = [inspect.getmodule(getattr(fmoe, name)).__name__ for name in fmoe.__all__]
    public = dict(zip((f"fmoe.{name}" for name in fmoe.__all__), where))
    return [name for name in names if ORDER.index(public.get(name, name).split(".")[1]) > ORDER.index(me)]


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        if path != ROOT / "__init__.py":
            assert not against_the_order(path, path.read_text()), path


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import fmoe.training.optim", ["fmoe.training.optim"]),
        ("from ..models.moe import moe_init", ["fmoe.models.moe.moe_init"]),
        ("from .. import models, tree", ["fmoe.models"]),
        ("from fmoe import training", ["fmoe.training"]),
        ("from fmoe import moe_init, P", ["fmoe.moe_init"]),
        ("def late():\n    from .. import shard_map", ["fmoe.shard_map"]),
        ("from . import kernels, route", []),
    ],
)
def test_an_import_that_points_the_other_way_is_seen(source, wrong):
    assert against_the_order(ROOT / "ops" / "experts.py", source) == wrong


def test_optional_packages_are_imported_where_they_are_the_point():
    for path in ROOT.rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path, path.read_text())}
        assert tops & OPTIONAL == MAY_IMPORT.get(str(path.relative_to(ROOT)), set()), path


def test_public_names():
    assert len(fmoe.__all__) <= 33
    for name in fmoe.__all__:
        assert getattr(fmoe, name).__doc__, name


# What takes seconds to import, or may not be installed.
HEAVY = ["torch._dynamo", "torch.distributed.tensor", "sympy", "triton", "safetensors", "matplotlib"]
CALL = "fmoe.moe_forward(fmoe.moe_init(0, dim=4, hidden_dim=4, num_experts=16), torch.ones(2, 4))"


@pytest.mark.parametrize("absent", [(), ("numpy", "matplotlib", "safetensors")])
def test_importing_is_silent_and_loads_nothing_heavy(absent):
    """Nor does a layer's first call."""
    code = f"""
import sys; sys.modules |= dict.fromkeys({absent})
import fmoe, fmoe.training.plot, fmoe.training.tokenizer, torch; {CALL}
print([name for name in {HEAVY} if sys.modules.get(name)])
if {absent}: import fmoe.models.huggingface, torch.distributed.tensor
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
