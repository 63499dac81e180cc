import itertools
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fmoe.data import batch_at, batches, python_stdlib, read_text, unigram_entropy


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def text(tokens: torch.Tensor) -> bytes:
    assert tokens.dtype == torch.uint8
    return bytes(tokens.tolist())


def test_a_folder_is_read_in_order_without_what_is_excluded(tmp_path: Path) -> None:
    files = {
        "b.py": b"B",
        "a/z.py": b"AZ\n",
        "a/tests/t.py": b"test",
        "a/__pycache__/c.py": b"cache",
        "site-packages/p.py": b"package",
        "notes.txt": b"notes\xff",
    }
    folder = written(tmp_path / "tests", files)
    assert text(read_text(folder)) == b"AZ\n\nB"
    assert text(read_text(str(folder), suffix=".txt")) == b"notes\xff"
    assert text(read_text(folder, exclude=["a", "site-packages"])) == b"B"
    assert text(read_text([folder / "notes.txt", folder])) == b"notes\xff\nAZ\n\nB"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"read_text: paths: got .*No such file.*absent.*, expected readable files"
    ):
        read_text(tmp_path / "absent")
    written(tmp_path, {"empty.py": b""})
    with pytest.raises(ValueError, match=r"got 1 files and no text in .*, expected .* folder's \*\.py files"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="got 0 files and no text in no path"):
        read_text([])


def test_the_standard_library_is_text_enough() -> None:
    tokens = read_text(python_stdlib() / "json")
    assert b"class JSONDecoder" in text(tokens)
    assert 2.5 < unigram_entropy(tokens) < 4.0
    assert (python_stdlib() / "argparse.py").is_file()


def test_entropy_by_hand() -> None:
    assert unigram_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(math.log(256))
    assert unigram_entropy(torch.full((2, 5), 7)) == 0.0
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(torch.tensor([3, 9, 3, 3], dtype=torch.uint8)) == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="unigram_entropy: tokens: got none"):
        unigram_entropy(torch.empty(0, dtype=torch.uint8))


@hypothesis.given(
    seed=st.integers(0, 2**70),
    step=st.integers(0, 10**9),
    length=st.integers(2, 60),
    batch_size=st.integers(1, 4),
    data=st.data(),
)
def test_windows_occur_in_the_text(
    seed: int, step: int, length: int, batch_size: int, data: st.DataObject
) -> None:
    seq_len = data.draw(st.integers(1, length - 1))
    tokens = torch.randperm(length).to(torch.uint8)
    batch = batch_at(step, tokens, batch_size=batch_size, seq_len=seq_len, seed=seed)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.shape == batch.targets.shape == (batch_size, seq_len)
    windows = {tuple(tokens[i : i + seq_len + 1].tolist()) for i in range(length - seq_len)}
    for row, target in zip(batch.tokens.tolist(), batch.targets.tolist()):
        assert (*row, target[-1]) in windows
        assert row[1:] == target[:-1]


@hypothesis.given(seed=st.integers(), start=st.integers(0, 20))
def test_resuming_equals_continuing(seed: int, start: int) -> None:
    tokens, options = torch.arange(1000), {"batch_size": 2, "seq_len": 5, "seed": seed}
    continued = itertools.islice(batches(tokens, **options), start, start + 3)
    resumed = itertools.islice(batches(tokens, **options, start_step=start), 3)
    for step, (a, b) in enumerate(zip(continued, resumed, strict=True), start):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.tokens, batch_at(step, tokens, **options).tokens)


def test_seeds_and_steps_differ_and_global_randomness_plays_no_part() -> None:
    tokens = torch.arange(100_000)
    starts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        stream = batches(tokens, batch_size=1, seq_len=1, seed=seed)
        starts |= {batch.tokens.item() for batch in itertools.islice(stream, 5)}
    assert len(starts) == 25
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    next(batches(tokens, batch_size=1, seq_len=1, seed=0))
    assert torch.equal(torch.rand(1), expected)


def test_every_window_can_be_drawn() -> None:
    batch = batch_at(0, torch.arange(6), batch_size=200, seq_len=3, seed=0)
    assert sorted(set(batch.tokens[:, 0].tolist())) == [0, 1, 2]


def test_a_sequence_longer_than_the_text_is_refused_at_the_call() -> None:
    expected = (
        "batches: seq_len: got 8, expected 1 to 7, as there are 8 tokens. "
        "Shorten the sequences or read more text."
    )
    with pytest.raises(ValueError, match=expected):
        batches(torch.arange(8), batch_size=1, seq_len=8, seed=0)
