"""Byte text: every file is training data, its bytes are the tokens, and there is no tokenizer."""

import hashlib
import itertools
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import argument_error

EXCLUDED_FOLDERS = frozenset({"site-packages", "test", "tests", "idlelib", "__pycache__"})


class Batch(NamedTuple):
    """Two int64 tensors ``(batch_size, seq_len)``; ``targets[b, i]`` is the token after ``tokens[b, i]``."""

    tokens: torch.Tensor
    targets: torch.Tensor


def python_stdlib() -> Path:
    """The folder of Python's standard library: some ten million bytes of text that every machine has."""
    return Path(sysconfig.get_path("stdlib"))


def read_text(
    paths: str | Path | Iterable[str | Path],
    *,
    suffix: str = ".py",
    exclude: Collection[str] = EXCLUDED_FOLDERS,
) -> torch.Tensor:
    """The bytes of files, joined by newlines, as a uint8 tensor ``(num_bytes,)``.

    A path to a file means that file. A path to a folder means all files below it whose names end in
    ``suffix``, sorted by path, except in folders named in ``exclude``.

    Raises ``ValueError`` where a path cannot be read or there is no text.

    >>> text = read_text(python_stdlib() / "this.py")
    >>> bytes(text[:4].tolist())
    b's = '
    """
    roots = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    files = [
        file for root in roots for file in (_files_below(root, suffix, exclude) if root.is_dir() else [root])
    ]
    try:
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise argument_error(
            "read_text", "paths", got=error, expected="readable files", remedy="Check the path."
        ) from error
    if not text:
        raise argument_error(
            "read_text",
            "paths",
            got=f"{len(files)} files and no text in {', '.join(map(str, roots)) or 'no path'}",
            expected=f"at least one byte in a file, or in a folder's *{suffix} files",
            remedy="Check the path, suffix and exclude.",
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """The entropy of the tokens' frequencies in nats: the loss of the best model that ignores context.

    ``tokens`` is an integer tensor of any shape. Raises ``ValueError`` where it is empty.

    >>> round(unigram_entropy(torch.tensor([0, 1, 0, 1])), 4)  # ln 2
    0.6931
    """
    if not tokens.numel():
        raise argument_error(
            "unigram_entropy", "tokens", got="none", expected="at least one", remedy="Pass some text."
        )
    counts = torch.bincount(tokens.flatten())
    shares = counts[counts > 0].double() / tokens.numel()
    return -(shares * shares.log()).sum().item()


def batch_at(step: int, tokens: torch.Tensor, *, batch_size: int, seq_len: int, seed: int) -> Batch:
    """The batch of one step: random windows of ``seq_len + 1`` tokens, chosen by ``(seed, step)`` alone.

    ``tokens`` is a one-dimensional integer tensor. Raises ``ValueError`` where no window fits in it.

    >>> batch_at(7, torch.arange(4), batch_size=1, seq_len=3, seed=0)
    Batch(tokens=tensor([[0, 1, 2]]), targets=tensor([[1, 2, 3]]))
    """
    if not 1 <= seq_len < len(tokens):
        raise argument_error(
            "batches",
            "seq_len",
            got=seq_len,
            expected=f"1 to {len(tokens) - 1}, as there are {len(tokens)} tokens",
            remedy="Shorten the sequences or read more text.",
        )
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    starts = torch.randint(len(tokens) - seq_len, (batch_size,), generator=generator)
    windows = tokens.unfold(0, seq_len + 1, 1)[starts.to(tokens.device)].long()
    return Batch(windows[:, :-1], windows[:, 1:])


def batches(
    tokens: torch.Tensor, *, batch_size: int, seq_len: int, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """All batches from ``start_step`` on, without end: :func:`batch_at` of each step.

    A batch does not depend on those before it, so to resume is to pass the step.

    >>> options = dict(batch_size=2, seq_len=3, seed=0)
    >>> resumed = batches(torch.arange(100), **options, start_step=1)
    >>> _, second, *_ = itertools.islice(batches(torch.arange(100), **options), 2)
    >>> torch.equal(next(resumed).tokens, second.tokens)
    True
    """
    batch_at(start_step, tokens, batch_size=batch_size, seq_len=seq_len, seed=seed)
    return (
        batch_at(step, tokens, batch_size=batch_size, seq_len=seq_len, seed=seed)
        for step in itertools.count(start_step)
    )


def _files_below(root: Path, suffix: str, exclude: Collection[str]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in exclude]
        found += [Path(folder, name) for name in names if name.endswith(suffix)]
    return sorted(found)
