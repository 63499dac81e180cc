import itertools
import math
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fmoe.training.data import (
    Batch,
    batch_at,
    batches,
    check_vocabulary,
    pack,
    read_streams,
    segment_ids,
    unigram_entropy,
)
from fmoe.training.documents import EXCLUDED_FOLDERS, hold_out, python_stdlib, read_documents
from fmoe.training.tokenizer import Tokenizer


def word_tokenizer(documents: list[bytes], vocab_size: int = 1000) -> Tokenizer:
    words = sorted({word for document in documents for word in document.split()})
    return Tokenizer(
        lambda text: [words.index(word) for word in text.split()],
        lambda ids: " ".join(words[i].decode() for i in ids),
        vocab_size,
        separator=vocab_size - 1,
    )


def test_documents_are_packed_with_a_separator_between_two() -> None:
    stream = pack([b"B", b"", b"\xff\x00"])
    assert stream.dtype == torch.uint8
    assert bytes(stream.tolist()) == b"B\n\n\xff\x00"
    documents = [b"to be or", b"not to be"]
    stream = pack(documents, word_tokenizer(documents))
    assert stream.dtype == torch.int32, "four bytes a token"
    assert stream.tolist() == [3, 0, 2, 999, 1, 3, 0]
    with pytest.raises(ValueError, match="pack: documents: got no token, expected text"):
        pack([b""], word_tokenizer([]))


@hypothesis.given(st.lists(st.binary(min_size=1).filter(lambda text: b"\n" not in text), min_size=1))
def test_packing_loses_nothing(documents: list[bytes]) -> None:
    assert bytes(pack(documents).tolist()).split(b"\n") == documents


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    check_vocabulary(torch.tensor([0, 299], dtype=torch.int32), 300)
    expected = (
        "check_vocabulary: ids: got token ids from 2 to 300, expected 0 to 299, as the model's vocab_size "
        "is 300. Give the model a larger vocabulary, or use another tokenizer."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_vocabulary(torch.tensor([2, 300], dtype=torch.int32), 300)
    with pytest.raises(ValueError, match="got token ids from -1 to 1"):
        check_vocabulary(torch.tensor([1, -1]), 300)
    with pytest.raises(ValueError, match="got token ids from 0 to 999, expected 0 to 255"):
        check_vocabulary(word_tokenizer([]), 256)


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
        "batch_at: seq_len: got 8, expected 1 to 7, as there are 8 tokens. "
        "Shorten the sequences or read more text."
    )
    with pytest.raises(ValueError, match=expected):
        batches(torch.arange(8), batch_size=1, seq_len=8, seed=0)


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    for size in (3, 0, -2):
        expected = f"batch_at: batch_size: got {size} sequences for 2 devices, expected a positive multiple"
        with pytest.raises(ValueError, match=expected):
            batch_at(0, torch.arange(9), batch_size=size, seq_len=4, seed=0, part=(1, 2))


@pytest.mark.parametrize("part", [(-1, 4), (4, 4), (5, 4), (0, 0), (0, -4), (-1, -4)])
def test_a_part_that_is_none_of_the_batch_is_refused(part: tuple[int, int]) -> None:
    expected = f"batch_at: part: got {part}, expected (i, n) with 0 <= i < n"
    for call in (batch_at, lambda step, tokens, **cut: batches(tokens, start_step=step, **cut)):
        with pytest.raises(ValueError, match=re.escape(expected)):
            call(0, torch.arange(100), batch_size=8, seq_len=3, seed=0, part=part)


@hypothesis.given(
    documents=st.lists(st.binary(max_size=6).filter(lambda text: b"\n" not in text), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
)
def test_segments_of_a_window_are_its_documents(documents: list[bytes], seed: int) -> None:
    stream = pack([*documents, b"the last one"])
    cut = dict(batch_size=3, seq_len=9, seed=seed)
    plain, packed = (batch_at(0, stream, **cut, **how) for how in ({}, {"separator": 10}))
    assert type(plain) is Batch
    assert torch.equal(packed.tokens, plain.tokens) and torch.equal(packed.targets, plain.targets)
    ignoring = batch_at(0, stream, **cut, separator=10, ignore_boundaries=True)
    for row, ids, targets in zip(plain.tokens, packed.segment_ids, ignoring.targets):
        ends = [i for i, token in enumerate(row.tolist()) if token == 10]
        by_hand = [1 + sum(end < i for end in ends) for i in range(9)]
        assert ids.tolist() == by_hand and ids.dtype == torch.int64
        assert [i for i, target in enumerate(targets.tolist()) if target == -100] == ends
    kept = ignoring.targets != -100
    assert torch.equal(ignoring.targets[kept], plain.targets[kept])


def test_boundaries_are_ignored_only_where_a_separator_tells_them() -> None:
    expected = (
        "batch_at: ignore_boundaries: got True, expected False without a separator. "
        "Pass separator=tokenizer.separator."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        batches(torch.arange(9), batch_size=1, seq_len=3, seed=0, ignore_boundaries=True)
    stream = torch.tensor([3, 0, 4, 0, 0, 5], dtype=torch.uint8)
    assert segment_ids(stream, 0).tolist() == [1, 1, 2, 2, 3, 4]


def test_streams_of_files_are_packed_documents(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 5)
    documents = read_documents(tmp_path, suffix=".txt")
    text, none = read_streams([tmp_path], suffix=".txt")
    assert none is None
    assert torch.equal(text, pack(documents))
    for stream, side in zip(read_streams([tmp_path], suffix=".txt", held_out=0.2), hold_out(documents, 0.2)):
        assert torch.equal(stream, pack(side))
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"read_streams: held_out: got .*, expected a share"):
            read_streams([tmp_path], suffix=".txt", held_out=share)
    assert len(read_streams()[0]) == len(pack(read_documents(python_stdlib(), exclude=EXCLUDED_FOLDERS)))
    assert batch_at(0, text, batch_size=1, seq_len=2, seed=0, device="meta").targets.is_meta
