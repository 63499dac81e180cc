import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))

from workers import Pool

from fmoe import __main__

# A busy machine is no reason to fail.
hypothesis.settings.register_profile(
    "fmoe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fmoe")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for every test, reported when one fails; ``--seed`` repeats it."""
    value = request.config.getoption("--seed")
    value = time.time_ns() % 2**31 if value is None else value
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> bool:
    """Whether to run the full cross product."""
    return request.config.getoption("--slow")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device there is, as the default one."""
    if request.param == "cpu":
        yield request.param
        return
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` without Inductor, which takes a minute and has a test of its own."""
    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **how: compiled(*args, **how | {"backend": "aot_eager"})
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``python -m fmoe`` in this process, where PyTorch is imported already, and returns its output."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fmoe", *map(str, words)])
        try:
            __main__.main()
        except SystemExit as ended:
            if ended.code:
                raise
        return capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """A process group that an earlier test or docstring set up is no business of the next."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes to run functions on many ranks with; they start with the first call."""
    workers = Pool()
    yield workers
    workers.stop(patience=5)


# Tests that start more processes than there are cores.
STARTS_PROCESSES = ("test_processes.py", "test_train_many.py", "test_beside_jax.py", "03_expert_parallelism")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``ranks``: what keeps all cores busy by itself, and is ten times slower beside another of its kind."""
    for item in items:
        starts = any(name in item.nodeid for name in STARTS_PROCESSES)
        if starts or "pool" in getattr(item, "fixturenames", ()):
            item.add_marker("ranks")
    if not config.getoption("--slow"):
        slow = {item for item in items if item.get_closest_marker("slow")}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="the seed of every test; fresh by default")
    parser.addoption("--slow", action="store_true", help="also the full cross products, marked slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", str(dict(item.user_properties).get("seed"))))
