import json
import re
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from fmoe.training.data import pack, unigram_entropy
from fmoe.training.documents import hold_out, python_stdlib, read_documents


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


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
    assert read_documents(folder) == [b"AZ\n", b"B"]
    assert read_documents(str(folder), suffix=".txt") == [b"notes\xff"]
    assert read_documents(folder, exclude=["a", "site-packages"]) == [b"B"]
    assert read_documents([folder / "notes.txt", folder]) == [b"notes\xff", b"AZ\n", b"B"]


def test_a_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    texts = ["one\nand more", "", "zwölf \ud800"]
    lines = "\n".join([json.dumps({"text": text, "body": text[:3], "id": 7}) for text in texts])
    folder = written(tmp_path, {"a.jsonl": b"\n" + lines.encode() + b"\n\n", "b.txt": b"no"})
    assert read_documents(folder, suffix=".jsonl") == [b"one\nand more", b"", "zwölf ?".encode()]
    assert read_documents(folder / "a.jsonl", field="body")[0] == b"one"


@pytest.mark.parametrize(
    "bad", [b'{"text": "cut', b"[1]", b'{"body": "x"}', b'{"text": 3}', b'{"text": "\xff"}', b"null"]
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, bad: bytes) -> None:
    written(tmp_path, {"a.jsonl": b'{"text": "a"}\n\n' + bad + b'\n{"text": "b"}\n'})
    expected = (
        f"read_documents: {tmp_path / 'a.jsonl'}, line 3: got {bad.decode(errors='replace')!r}, expected a "
        "JSON object whose 'text' is a string. Correct or remove the line, or name another field."
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_documents(tmp_path, suffix=".jsonl")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"read_documents: paths: got .*No such file.*absent.*, expected readable files"
    ):
        read_documents(tmp_path / "absent")
    written(tmp_path, {"empty.py": b""})
    with pytest.raises(ValueError, match=r"got 1 files and no text in .*, expected .* folder's \*\.py files"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="got 0 files and no text in no path"):
        read_documents([])


def test_the_standard_library_is_text_enough() -> None:
    documents = read_documents(python_stdlib() / "json")
    assert any(b"class JSONDecoder" in document for document in documents)
    assert 2.5 < unigram_entropy(pack(documents)) < 4.0
    assert (python_stdlib() / "argparse.py").is_file()


@hypothesis.given(st.lists(st.binary(min_size=1, max_size=40), min_size=1), st.floats(0.05, 0.95))
def test_what_is_held_out_is_not_trained_on(documents: list[bytes], share: float) -> None:
    hypothesis.assume(any(int(share * len(document)) for document in documents))
    total = sum(map(len, documents))
    hypothesis.assume(max(map(len, documents)) > 1 / (1 - share))
    train, held_out = hold_out(documents, share)
    assert train
    assert held_out
    assert 0 < sum(map(len, held_out)) <= share * total
    if len(train) + len(held_out) == len(documents):
        assert Counter(train) + Counter(held_out) == Counter(documents)
        assert not set(train) & set(held_out)
    else:  # the longest was cut
        (tail,) = held_out
        cut = [(old, new) for old, new in zip(documents, train, strict=True) if old != new]
        assert cut
        assert all(old == new + tail for old, new in cut)
        assert len({old for old, _ in cut}) == 1


def test_the_share_is_met_and_does_not_depend_on_order() -> None:
    documents = [bytes([i, j]) * 20 for i in range(20) for j in range(50)]
    train, held_out = hold_out(documents, 0.1)
    assert 0.09 < len(held_out) / len(documents) <= 0.1
    assert train + held_out != documents, "not the first or the last ones"
    assert set(hold_out(documents[::-1], 0.1)[1]) == set(held_out)
    assert hold_out(documents, 0) == (documents, [])


def test_a_single_document_is_cut_at_a_line() -> None:
    train, held_out = hold_out([b"a line\n" * 100], 0.5)
    assert train == [b"a line\n" * 50]
    assert held_out == [b"a line\n" * 50]
    assert hold_out([b"no lines at all!"], 0.25) == ([b"no lines at "], [b"all!"])
    assert hold_out([b"one\n" + b"x" * 16], 0.25) == ([b"one\n" + b"x" * 11], [b"x" * 5])


def test_a_split_without_text_on_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hold_out: share: got 1, expected a number in \[0, 1\)"):
        hold_out([b"text"], 1)
    for documents in ([b"short"], [b"", b""], []):
        with pytest.raises(ValueError, match=r"hold_out: documents: got .* is none, expected text for both"):
            hold_out(documents, 0.01)


def test_a_suffix_in_capitals_is_jsonl_too(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "hi"}\n')
    assert read_documents(tmp_path / "a.JSONL") == [b"hi"]
