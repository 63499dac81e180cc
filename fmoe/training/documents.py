"""Text as documents: every file is one, and so is every line of a JSONL file."""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import argument_error

EXCLUDED_FOLDERS = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})


def python_stdlib() -> Path:
    """The folder of Python's standard library: ten million bytes of text that every machine has.

    >>> (python_stdlib() / "this.py").exists()
    True
    """
    return Path(sysconfig.get_path("stdlib"))


def read_documents(
    paths: str | Path | Iterable[str | Path],
    *,
    suffix: str = ".py",
    field: str = "text",
    exclude: Collection[str] = EXCLUDED_FOLDERS,
) -> list[bytes]:
    """The documents of files and folders.

    ==========  ==================================================================================
    paths       a file, a folder, or several. A folder means all files below it whose names end in
                ``suffix``, sorted by path, but for linked folders and folders named in ``exclude``
    field       a ``.jsonl`` file has a document a line: this field of a JSON object
    -> list     the bytes of each document, JSONL's as UTF-8; some may be empty
    ==========  ==================================================================================

    Raises ``ValueError`` where a path cannot be read, and where there is no text. For a line of JSONL without
    the field, it names file and line.

    >>> documents = read_documents(python_stdlib() / "this.py")
    >>> documents[0][:4]
    b's = '
    """
    roots = [*map(Path, [paths] if isinstance(paths, (str, Path)) else paths)]
    try:
        files = [file for root in roots for file in _files_of(root, suffix, exclude)]
        documents = [text for file in files for text in _documents_in(file, field)]
    except OSError as error:
        raise argument_error("read_documents", "paths", got=error, expected="readable files") from error
    if not any(documents):
        got = f"{len(files)} files and no text in {', '.join(map(str, roots)) or 'no path'}"
        expected = f"at least one byte in a file, or in a folder's *{suffix} files"
        remedy = "Check the path, suffix and exclude."
        raise argument_error("read_documents", "paths", got=got, expected=expected, remedy=remedy)
    return documents


def hold_out(documents: Sequence[bytes], share: float) -> tuple[list[bytes], list[bytes]]:
    """Documents to train on and documents to evaluate on, the latter at most ``share`` of the bytes.

    A document's content alone decides whether it is held out. So equal documents stay together, and adding
    some changes little for the others. Those too large for the share stay in the training set. If that leaves
    none to hold out, the end of the longest is cut off, at a line if there is one.

    Raises ``ValueError`` unless ``0 <= share < 1``, and where either side would be empty.

    >>> hold_out([b"a", b"a", b"b" * 18], share=0.1)
    ([b'bbbbbbbbbbbbbbbbbb'], [b'a', b'a'])
    >>> hold_out([b"one\\ntwo\\nthree\\n"], share=0.5)
    ([b'one\\ntwo\\n'], [b'three\\n'])
    """
    if not 0 <= share < 1:
        raise argument_error(
            "hold_out", "share", got=share, expected="a number in [0, 1)", remedy="Try 0.05."
        )
    if share == 0:
        return list(documents), []
    total = sum(map(len, documents))
    room, chosen = share * total, set()
    copies = Counter(documents)
    for document in sorted(copies, key=lambda document: hashlib.blake2b(document, digest_size=16).digest()):
        size = copies[document] * len(document)
        if size <= room:
            chosen.add(document)
            room -= size
    held_out = [document for document in documents if document in chosen]
    train = [document for document in documents if document not in chosen]
    if not any(held_out) and documents:
        longest = max(documents, key=len)
        cut = len(longest) - int(share * len(longest))
        line = longest.find(b"\n", cut - 1) + 1
        cut = line if 0 < line < len(longest) else cut
        train = [document[:cut] if document == longest else document for document in documents]
        held_out = [longest[cut:]]
    if not (any(train) and any(held_out)):
        got = f"{total} bytes in {len(documents)} documents, of which a share of {share} is none"
        remedy = "Read more text or raise the share."
        raise argument_error("hold_out", "documents", got=got, expected="text for both sides", remedy=remedy)
    return train, held_out


def _files_of(root: Path, suffix: str, exclude: Collection[str]) -> list[Path]:
    if not root.is_dir():
        return [root]
    found = []

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in exclude]
        found += [Path(folder, name) for name in names if name.endswith(suffix)]
    return sorted(found)


def _documents_in(file: Path, field: str) -> Iterator[bytes]:
    if file.suffix.lower() != ".jsonl":
        yield file.read_bytes()
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                record = None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                got = repr(line[:60].decode(errors="replace").rstrip("\n"))
                expected = f"a JSON object whose {field!r} is a string"
                remedy, where = "Correct or remove the line, or name another field.", f"{file}, line {number}"
                raise argument_error("read_documents", where, got=got, expected=expected, remedy=remedy)
            # A lone surrogate is valid JSON and no character.
            yield text.encode(errors="replace")
