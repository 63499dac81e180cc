"""Tuning keeps what is fastest, and products use what is kept."""

import json
from unittest import mock

import pytest
import torch

import fmoe
from fmoe.bench import tune as tuning
from fmoe.bench.layers import Shape
from fmoe.bench.tune import products, tune
from fmoe.ops.kernels import grouped, tuned
from fmoe.ops.kernels.tuned import Choice, Tile

TINY = Shape(tokens=48, dim=16, hidden=8, experts=4, top_k=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("FMOE_TUNED", str(tmp_path / "cache" / "tuned.json"))
    tuned.forget()
    yield tmp_path / "cache" / "tuned.json"
    tuned.forget()


@pytest.fixture
def two_engines(monkeypatch):
    """Of the engines on CUDA this one runs on CPUs too."""
    monkeypatch.setattr(grouped, "_able", lambda name, *_: name != "triton")


def product(how="mm"):
    x, w = torch.randn(6, 16), torch.randn(4, 16, 8)
    return grouped.choice(how, x, w, x.new_empty(6, 8), w.shape)


@pytest.mark.usefixtures("two_engines")
@pytest.mark.parametrize("slow", ["torch", "loop"])
def test_the_fastest_choice_is_kept_and_used(file, monkeypatch, slow):
    real, clock = grouped.choice, {"ms": 0.0}

    def choice(*args):
        how = real(*args)
        clock["ms"] += 10.0 if how.engine == slow else 1.0
        return how

    def timed(call, on_cuda):
        clock["ms"] = 0.0
        call()
        return clock["ms"]

    monkeypatch.setattr(grouped, "choice", choice)
    monkeypatch.setattr(tuning, "timed", timed)
    found = tune(TINY, dtype=torch.float32, device="cpu", rounds=2)
    (fast,) = {"torch", "loop"} - {slow}
    assert [each.product for each in found] == products(TINY, torch.float32)
    assert all(each.best == Choice(fast) for each in found)
    assert json.loads(file.read_text())["cpu"] == {each.product: [fast, None] for each in found}
    assert not [path for path in file.parent.iterdir() if path != file]
    assert product() == Choice(fast)
    monkeypatch.setenv("FMOE_GROUPED_MM", slow)
    assert product() == Choice(slow)


@pytest.mark.usefixtures("two_engines")
def test_a_small_gain_changes_nothing_and_is_said_on_stderr(monkeypatch, capsys):
    times = iter([1.0, 0.995] * 100)
    monkeypatch.setattr(tuning, "timed", lambda call, on_cuda: next(times))
    found = tune(TINY, dtype=torch.float32, device="cpu", rounds=2)
    said = [f"tune: {product}: torch, 1.000 ms a step" for product in products(TINY, torch.float32)]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in said))
    assert all(each.best == each.choices[0] == Choice("torch") for each in found)


def test_a_steps_products_are_those_that_are_tuned(monkeypatch):
    asked = []
    real = tuned.key
    monkeypatch.setattr(tuned, "key", lambda *args: asked.append(real(*args)) or real(*args))
    params = fmoe.moe_init(0, dim=16, hidden_dim=8, num_experts=4)
    router = fmoe.RouterConfig(top_k=2)
    loss = lambda params, x: fmoe.moe_forward(params, x, router=router).square().sum()  # noqa: E731
    with tuned.using(CPU, {"a product of another layer": Choice("loop")}):  # without any, nothing is asked
        fmoe.value_and_grad(loss, (0, 1))(params, torch.randn(48, 16))
    assert set(asked) == set(products(TINY, torch.float32))


@pytest.mark.usefixtures("two_engines")
def test_a_choice_that_is_wrong_is_refused_and_one_that_cannot_run_is_left_out(monkeypatch, capsys):
    real = torch._grouped_mm
    monkeypatch.setattr(grouped, "ENGINES", ("loop", "torch"))
    monkeypatch.setattr(torch, "_grouped_mm", lambda *args, **how: real(*args, **how) * 1.1)
    with pytest.raises(RuntimeError, match=r"tune: Choice\(engine='torch', .* gives other results, by"):
        tune(TINY, dtype=torch.float32, device="cpu", rounds=2)
    assert tuned.choices(CPU) == {}

    def nan_for_weights(a, b, **how):
        return real(a, b, **how) * (1.0 if b.dim() == 3 else torch.nan)

    monkeypatch.setattr(torch, "_grouped_mm", nan_for_weights)
    with pytest.raises(RuntimeError, match="gives other results, by nan"):
        tune(TINY, dtype=torch.float32, device="cpu", rounds=2)
    assert tuned.choices(CPU) == {}

    for error, reason in {
        RuntimeError("out of\nshared memory"): "RuntimeError: out of shared memory",
        AssertionError(): "AssertionError",  # Triton raises it without a word
    }.items():
        monkeypatch.setattr(torch, "_grouped_mm", mock.Mock(side_effect=error))
        found = tune(TINY, dtype=torch.float32, device="cpu", rounds=2)
        assert all(each.best == Choice("loop") and each.ms[1] is None for each in found)
        assert f"tune: torch can't run here: {reason}\n" in capsys.readouterr().err


def test_a_tile_is_read_from_the_file_unless_its_engine_cannot(file, monkeypatch):
    tile = Tile(128, 128, 64, 4, 4)
    tuned.write(CPU, {tuned.key("mm", (4, 16, 8), torch.float32): Choice("triton", tile)})
    assert product() == Choice("loop")
    monkeypatch.setattr(grouped, "_able", lambda *_: True)
    assert product() == Choice("triton", tile)
    assert product("outer") == Choice("triton")
    monkeypatch.setenv("FMOE_GROUPED_MM", "torch")
    assert product() == Choice("torch")
    other = {tuned.key("outer", (4, 16, 8), torch.float32): Choice("loop")}
    assert tuned.write(CPU, other) == file
    assert len(json.loads(file.read_text())["cpu"]) == 2


@pytest.mark.usefixtures("two_engines")
def test_choices_are_in_force_while_a_block_runs_and_cannot_be_changed_otherwise():
    mm, outer = (tuned.key(how, (4, 16, 8), torch.float32) for how in ("mm", "outer"))
    tuned.write(CPU, {outer: Choice("loop")})
    before = tuned.choices(CPU)
    with tuned.using(CPU, {mm: Choice("loop")}):
        assert product() == product("outer") == Choice("loop")
        with tuned.using(CPU, {outer: Choice("torch")}):
            assert (product(), product("outer")) == (Choice("loop"), Choice("torch"))
        assert product() == product("outer") == Choice("loop")
    with pytest.raises(ZeroDivisionError), tuned.using(CPU, {mm: Choice("loop")}):
        divmod(1, 0)
    assert tuned.choices(CPU) is before
    assert (product(), product("outer")) == (Choice("torch"), Choice("loop"))
    with pytest.raises(TypeError, match="does not support item assignment"):
        before[mm] = Choice("loop")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"cpu": []}', '{"cpu": {"mm": "loop"}}', '{"cpu": {"mm": ["triton", [1, 2]]}}']
)
def test_a_file_that_is_something_else_is_named(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"grouped_mm: FMOE_TUNED: got .*tuned\.json, which can't be read: "):
        product()


def test_a_cache_that_cannot_be_read_is_none_but_a_file_that_was_named_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("FMOE_TUNED", str(tmp_path))
    with pytest.raises(ValueError, match=r"grouped_mm: FMOE_TUNED: got .*, which can't be read: \[Errno"):
        product()
    monkeypatch.delenv("FMOE_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert product() == Choice("loop")


def test_the_command_prints_a_table_of_choices_and_products(command, file):
    how = ["--rounds", 2, "--device", "cpu", "--dtype", "float32"]
    shown = command("tune", "--sizes", *TINY, *how)
    assert "loop" in shown and "outer" in shown
    assert set(json.loads(file.read_text())["cpu"]) == set(products(TINY, torch.float32))
