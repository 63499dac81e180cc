import dataclasses
import errno
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy
import optree
import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata

from fmoe.models import deepseek_v3
from fmoe.training import checkpoint
from fmoe.training.checkpoint import lock, saving
from fmoe.training.checkpoint.folder import summed
from fmoe.training.checkpoint.reader import IndexUnpickler
from fmoe.training.optim import adamw

KILLED_SAVES = Path(__file__).parents[1] / "support" / "killed_saves.py"
CONFIG = dataclasses.replace(deepseek_v3.preset("debug"), dim=8, num_layers=2, hidden_dim=8, vocab_size=32)


def training_state(config: Any = CONFIG, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    params = deepseek_v3.init(config, seed, dtype=dtype)
    grads = optree.tree_map(torch.randn_like, params)
    params, state = adamw().update(params, grads, adamw().init(params), 0.1)
    return {"params": params, "optimizer": state}


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for a, e in zip(optree.tree_leaves(actual), optree.tree_leaves(expected)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert torch.equal(a, e)


def test_a_training_state_survives_bit_for_bit(tmp_path: Path) -> None:
    state = training_state()
    path = checkpoint.save(tmp_path / "new" / "folder", 7, state, run={"betas": (0.9, 0.95)})
    assert path == tmp_path / "new" / "folder" / "step-00000007"
    like = training_state(seed=1)
    before = optree.tree_map(torch.clone, like)
    loaded = checkpoint.load(path, like, run={"betas": (0.9, 0.95)})
    assert loaded.step == 7
    assert_same_bits(loaded.state, state)
    assert_same_bits(like, before)
    donated = checkpoint.load(path, like, donate=True).state
    assert_same_bits(donated, state)
    assert donated["params"].embedding.data_ptr() == like["params"].embedding.data_ptr()


def test_donated_leaves_that_share_memory_are_loaded_apart(tmp_path: Path) -> None:
    numbers = numpy.zeros(6)
    one, buffer, whole = torch.zeros(6), torch.zeros(8), torch.zeros(6)
    like = {
        "same": [one, one],
        "overlapping": [buffer[:6], buffer[2:]],
        "of one array": [torch.from_numpy(numbers), torch.from_numpy(numbers)],
        "transposed": [buffer.view(2, 4), buffer.view(2, 4).t()],
        "expanded": torch.zeros(1).expand(6),
        "alone": whole,
    }
    state = optree.tree_map(lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype), like)
    path = checkpoint.save(tmp_path, 1, state)
    loaded = checkpoint.load(path, like, donate=True).state
    assert_same_bits(loaded, state)
    assert loaded["alone"].data_ptr() == whole.data_ptr()
    assert_same_bits(checkpoint.start(tmp_path, like, resume=True).state, state)


def test_what_is_not_a_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "step-by-step.tmp").mkdir()
    (tmp_path / "step-notes.tmp").write_text("mine")
    elsewhere = checkpoint.save(tmp_path / "elsewhere", 1, training_state())
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    checkpoint.save(tmp_path, 2, training_state(), keep=1)
    assert checkpoint.latest(tmp_path).name == "step-00000002"
    assert (tmp_path / "step-by-step.tmp").is_dir()
    assert (tmp_path / "step-notes.tmp").read_text() == "mine"
    assert checkpoint.latest(elsewhere.parent) == elsewhere  # the link goes, what it points to stays
    for _ in range(2):
        (tmp_path / "step-00000002" / "checkpoint.json").write_text("{}")
        checkpoint.save(tmp_path, 2, training_state())
    assert (tmp_path / "step-00000002.damaged").is_dir()


def test_the_description_says_what_is_inside(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, training_state(), run={"model": dataclasses.asdict(CONFIG)})
    description = json.loads((path / "checkpoint.json").read_text())
    assert (description["format"], description["version"], description["step"]) == ("fmoe", 2, 3)
    assert description["run"]["model"]["router"]["top_k"] == CONFIG.router.top_k
    assert description["leaves"]["params.layers.1.mlp.experts.w_in"] == "bfloat16 [16, 2, 64, 8]"
    assert description["leaves"]["params.layers.1.mlp.router.bias_E"] == "float32 [16]"
    assert description["leaves"]["optimizer.step"] == "float32 []"
    assert description["files"] == {
        name: {"bytes": len(content), "crc32": zlib.crc32(content)}
        for name in (".metadata", "__0_0.distcp")
        for content in [(path / name).read_bytes()]
    }


def test_the_newest_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2)}
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (1, 2, 99_999_999, 100_000_000):
        path = checkpoint.save(tmp_path, step, state, keep=2)
        assert checkpoint.latest(tmp_path) == path, "by number, not by name"
    assert {p.name for p in tmp_path.iterdir()} == {"step-99999999", "step-100000000"}
    checkpoint.save(tmp_path, 5, state, keep=1)
    assert len(list(tmp_path.iterdir())) == 3, "later ones are not the older ones"
    expected = (
        f"save: step: got 5, and {tmp_path / 'step-00000005'} is there already, expected a step without a "
        "checkpoint. Resume from it, delete it, or save to another folder."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        checkpoint.save(tmp_path, 5, state)
    with pytest.raises(ValueError, match="save: keep: got 0, expected at least 1"):
        checkpoint.save(tmp_path, 6, state, keep=0)
    with pytest.raises(ValueError, match=r"save: state: got several leaves named \['a.b'\]"):
        checkpoint.save(tmp_path, 6, {"a.b": state["w"], "a": {"b": state["w"]}})
    with pytest.raises(ValueError, match=r"save: state.step: got int, expected a tensor"):
        checkpoint.save(tmp_path, 6, {"step": 3})


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise saving.dcp.api.CheckpointException("no space", {0: (OSError("no space left"), [])})

    monkeypatch.setattr(saving.dcp, "save", fail)
    with pytest.raises(RuntimeError, match=r"save: could not write .*step-00000001\.tmp: .*no space left"):
        checkpoint.save(tmp_path, 1, {"w": torch.ones(2)})


def test_several_ranks_without_numpy_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.check_ranks("save")
    monkeypatch.setattr("fmoe.training.checkpoint.state.find_spec", lambda _: None)
    checkpoint.check_ranks("save")
    monkeypatch.setattr("fmoe.training.checkpoint.state.num_ranks", lambda: 2)
    with pytest.raises(
        ImportError, match=r"--save-every: between ranks .* needs numpy. Install it with: pip"
    ):
        checkpoint.check_ranks("--save-every")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checkpoint.json"])
@pytest.mark.parametrize("lost", ["half", "all"])
def test_a_truncated_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, lost: str) -> None:
    state = {"w": torch.randn(100)}
    older = checkpoint.save(tmp_path, 1, state)
    newer = checkpoint.save(tmp_path, 2, state)
    file = newer / name
    size = file.stat().st_size
    if lost == "half":
        os.truncate(file, size // 2)
    else:
        file.unlink()
    assert checkpoint.latest(tmp_path) == older
    left = size // 2 if lost == "half" else 0
    got = "no readable checkpoint.json" if "json" in name else f"{name} of {left} bytes, which had {size}"
    expected = (
        rf"load: .*step-00000002: got {re.escape(got)}.*, expected a whole .*resume from the one before"
    )
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(newer, state)
    again = checkpoint.save(tmp_path, 2, state)
    assert checkpoint.latest(tmp_path) == again == newer
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000002.damaged",
    ]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_bit_that_changed_is_an_error(tmp_path: Path, name: str) -> None:
    state = {"w": torch.randn(100)}
    path = checkpoint.save(tmp_path, 1, state)
    content = bytearray((path / name).read_bytes())
    bit = int(torch.randint(8 * len(content), ()))
    content[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(content)
    expected = rf"load: .*step-00000001: got {re.escape(name)} whose content changed, expected a whole check"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(path, state)


def test_a_foreign_checkpoint_is_an_error(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(
        ValueError, match=r"got no readable checkpoint.json \(FileNotFoundError: .*whole check"
    ):
        checkpoint.load(tmp_path, state)
    (tmp_path / "step-00000001").mkdir()
    description = tmp_path / "step-00000001" / "checkpoint.json"
    for text, got in [
        ("[]", "a checkpoint.json that isn't fmoe's"),
        ('{"format": "other"}', "a checkpoint.json that isn't fmoe's"),
        ('{"format": "fmoe", "version": 1}', "format version 1, where this fmoe reads 2"),
        ('{"format": "fmoe", "version": 2, "step": 1, "run": [], "leaves": {}}', "without ['files', 'run']"),
    ]:
        description.write_text(text)
        assert checkpoint.latest(tmp_path) is None
        with pytest.raises(ValueError, match=re.escape(f"{got}, expected a whole checkpoint")):
            checkpoint.load(description.parent, state)


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"load: path: got None, expected a checkpoint\. Begin without one"):
        checkpoint.load(checkpoint.latest(tmp_path), state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nowhere: got no such folder, expected .* Correct the path\."):
        checkpoint.load(tmp_path / "nowhere", state)
    checkpoint.save(tmp_path, 1, state)
    with pytest.raises(ValueError, match=r"got a folder of checkpoints, expected .*latest\(folder\) is the"):
        checkpoint.load(tmp_path, state)


def test_options_that_came_later_may_be_off(tmp_path: Path) -> None:
    """A checkpoint from before they existed goes on, unless they are used."""
    params = {"w": torch.zeros(1)}
    checkpoint.save(tmp_path, 3, params, run={"seed": 0, "model": {"dim": 8}})
    new = {"noise": 0.0, "key": None, "more": {}}
    run = {"seed": 0, "model": {"dim": 8, **new}, **new}
    assert checkpoint.start(tmp_path, params, resume=True, run=run).step == 3
    run["model"]["noise"] = 0.1
    with pytest.raises(ValueError, match=r"got run.model.noise is absent, here 0.1, expected"):
        checkpoint.start(tmp_path, params, resume=True, run=run)


def test_another_architecture_is_an_error_that_lists_every_difference(tmp_path: Path) -> None:
    def run(config: Any, seed: int) -> Any:
        return {"model": dataclasses.asdict(config), "data": {"seed": seed}}

    path = checkpoint.save(tmp_path, 1, training_state(), run=run(CONFIG, 0))
    other = dataclasses.replace(
        CONFIG, vocab_size=48, num_experts=8, router=dataclasses.replace(CONFIG.router, top_k=2)
    )
    with pytest.raises(ValueError, match="expected a checkpoint of this model and data") as caught:
        checkpoint.load(path, training_state(other, dtype=torch.float32), run=run(other, 5))
    text = str(caught.value)
    for difference in (
        "run.model.vocab_size is 32, here 48",
        "run.model.num_experts is 16, here 8",
        "run.model.router.top_k is 4, here 2",
        "run.data.seed is 0, here 5",
        "state.params.embedding is bfloat16 [32, 8], here float32 [48, 8]",
        "state.params.layers.1.mlp.router.bias_E is float32 [16], here float32 [8]",
        "state.optimizer.exp_avg.head is bfloat16 [32, 8], here float32 [48, 8]",
    ):
        assert difference in text
    assert "run.model.dim" not in text
    deeper = dataclasses.replace(CONFIG, num_layers=3, num_dense_layers=2)
    with pytest.raises(ValueError, match=r"state.params.layers.2.mlp_norm is absent, here bfloat16 \[8\]"):
        checkpoint.load(path, training_state(deeper))
    with pytest.raises(ValueError, match=r"state.optimizer.step is float32 \[\], here absent"):
        checkpoint.load(path, {"params": training_state()["params"]})


def test_a_run_starts_with_its_state_or_the_newest_checkpoint(tmp_path: Path, caplog: Any) -> None:
    def start(**options: Any) -> Any:
        state, step = checkpoint.start(tmp_path / "run", {"w": torch.zeros(1)}, run={"seed": 0}, **options)
        return step, state["w"].item()

    assert start(resume=True) == start(resume=False) == (0, 0.0)
    for step in (2, 100_000_000):
        checkpoint.save(tmp_path / "run", step, {"w": torch.full((1,), float(step))}, run={"seed": 0})
    assert start(resume=True) == (100_000_000, 1e8)
    with pytest.raises(ValueError, match=r"start: folder: got .*step-100000000 of an earlier run"):
        start(resume=False)
    with pytest.raises(ValueError, match=r"run.seed is 0, here 1"):
        checkpoint.start(tmp_path / "run", {"w": torch.zeros(1)}, resume=True, run={"seed": 1})
    assert "is damaged" not in caplog.text
    (tmp_path / "run" / "step-100000000" / ".metadata").unlink()
    assert start(resume=True) == (2, 2.0)
    assert "step-100000000 is damaged; going on from" in caplog.text
    (tmp_path / "run" / "step-00000002" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"load: .*step-100000000: got .metadata of 0 bytes"):
        start(resume=True)


FLOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 7 on a node")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    """A process that locks a folder until it is killed, or fails to."""
    command = [sys.executable, "-IS", "-c", FLOCK, str(folder / "run.lock")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    def start(name: str) -> int:
        return checkpoint.start(tmp_path / name, {"w": torch.zeros(1)}, resume=True).step

    (tmp_path / "theirs").mkdir()
    with other_process(tmp_path / "theirs") as other:
        assert other.stdout.readline() == "locked\n"
        text = f"start: folder: got {tmp_path / 'theirs'}, in which process 7 on a node trains, expected"
        with pytest.raises(ValueError, match=re.escape(text)):
            start("theirs")
        assert start("ours") == start("ours") == 0, "a process may start again in its own folder"
        other.kill()
    assert start("theirs") == 0, "a killed process holds no lock"
    for folder in ("ours", "theirs"):
        with other_process(tmp_path / folder) as other:
            assert "BlockingIOError" in other.communicate()[1]
    assert f"process {os.getpid()} on" in (tmp_path / "ours" / "run.lock").read_text()
    (tmp_path / "ours" / "run.lock").unlink()
    start("ours")
    with other_process(tmp_path / "ours") as other:
        assert "BlockingIOError" in other.communicate()[1], "a deleted lock is taken anew"


def test_where_nothing_can_be_locked_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("in the way")
    assert checkpoint.start(tmp_path / "a file", {"w": torch.zeros(1)}, resume=True).step == 0

    def unsupported(*_args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    assert checkpoint.start(tmp_path / "run", {"w": torch.zeros(1)}, resume=True).step == 0
    monkeypatch.setattr(lock, "fcntl", None)
    assert checkpoint.start(tmp_path / "another", {"w": torch.zeros(1)}, resume=True).step == 0


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def test_an_index_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"w": torch.zeros(2)}
    path = checkpoint.save("run", 1, state)
    index = path / ".metadata"
    index.write_bytes(pickle.dumps(Evil()))
    description = json.loads((path / "checkpoint.json").read_text())
    description["files"][".metadata"] = summed(index)
    (path / "checkpoint.json").write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"system has no place in the index of a checkpoint, expected readable"
    ):
        checkpoint.load(path, state)
    assert not Path("evil").exists()
    for module, name in [("torch", "load"), ("torch.serialization", "load"), ("pathlib", "os.system")]:
        with pytest.raises(pickle.UnpicklingError, match="has no place"):
            IndexUnpickler(io.BytesIO()).find_class(module, name)


class Attribute:
    """Pickled as a ``getattr``, as the first releases of Python 3.11 pickled members of enumerations."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    def __reduce__(self) -> Any:
        return getattr, self.of


def test_an_index_of_another_python_is_read_and_has_no_other_attribute() -> None:
    kind = dcp_metadata._MEM_FORMAT_ENCODING
    read = lambda *of: IndexUnpickler(io.BytesIO(pickle.dumps(Attribute(*of)))).load()  # noqa: E731
    assert all(read(kind, member.name) is member for member in kind)
    for of in ((kind, "mro"), (dcp_metadata.Metadata, "__init__"), (torch.float32, "to_complex")):
        with pytest.raises(pickle.UnpicklingError, match=f"{of[1]}.* has no place in the index"):
            read(*of)


def test_killed_saves_leave_a_checkpoint_and_two_ranks_save_one_for_others(tmp_path: Path) -> None:
    """All in one process, whose start costs more than what it does."""
    done = subprocess.run(
        [sys.executable, str(KILLED_SAVES), str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # a forked process can't use it
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    found = results["at_every_operation"]
    kills, new = found["kills"], found["new"]
    assert {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"} <= set(kills)
    assert len(new) == len(kills) + 1 > 20
    assert new == sorted(new), "the old one up to some operation, the new one after it"
    assert kills[new.index(True) - 1] == "os.rename"
    assert found["left"] == [f"step-{len(new) + 1:08d}"], "what killed saves left behind is gone"
    reached = results["at_random_moments"]["reached"]
    assert reached == sorted(reached)
    assert reached[-1] > 1
    assert results["on_two_ranks"] == {"codes": [0, 0], "equal": True}
