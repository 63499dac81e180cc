"""Token streams: documents packed into one, and batches that depend on nothing but (seed, step)."""

import ctypes
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import argument_error
from ..models.vocabulary import IGNORED
from .documents import EXCLUDED_FOLDERS, hold_out, python_stdlib, read_documents
from .tokenizer import BYTES, Tokenizer


class Batch(NamedTuple):
    """Two int64 tensors ``(batch_size, seq_len)``; ``targets[b, i]`` is the token after ``tokens[b, i]``.

    >>> tokens, targets = batch_at(0, torch.arange(9), batch_size=2, seq_len=4, seed=0)
    >>> torch.equal(targets[:, :-1], tokens[:, 1:])
    True
    """

    tokens: torch.Tensor
    targets: torch.Tensor


class PackedBatch(NamedTuple):
    """A :class:`Batch` of packed documents, with the segment of each token: int64 ``(batch_size, seq_len)``.

    >>> options = dict(batch_size=1, seq_len=5, seed=0)
    >>> text = torch.tensor([7, 8, 0, 9, 0, 5])
    >>> batch = batch_at(0, text, **options, separator=0, ignore_boundaries=True)
    >>> batch.tokens, batch.segment_ids
    (tensor([[7, 8, 0, 9, 0]]), tensor([[1, 1, 1, 2, 2]]))
    >>> batch.targets
    tensor([[   8,    0, -100,    0, -100]])
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor


def segment_ids(tokens: torch.Tensor, separator: int) -> torch.Tensor:
    """The number of each token's document in its row, int64, from 1: ``decoder.loss`` takes these.

    ``tokens`` is an integer tensor ``(..., L)``. A separator belongs to the document that it ends. A
    separator that also occurs within documents, as the newline of bytes does, makes a segment of each line.

    >>> segment_ids(torch.tensor([7, 8, 0, 9, 0, 5]), separator=0)
    tensor([1, 1, 1, 2, 2, 3])
    """
    ends = (tokens.long() == separator).long()
    return 1 + ends.cumsum(-1) - ends


def pack(documents: Iterable[bytes], tokenizer: Tokenizer = BYTES) -> torch.Tensor:
    """The tokens of all documents as one stream, with the tokenizer's separator between two.

    The stream is uint8 ``(N,)`` where the vocabulary allows it, else int32: one or four bytes a token.
    Sequences are cut out of it wherever they fall, so none is padded. :func:`segment_ids` tells documents
    apart again.

    Raises ``ValueError`` where there is no token.

    >>> pack([b"a", b"bc"])
    tensor([97, 10, 98, 99], dtype=torch.uint8)
    """
    code, dtype = ("B", torch.uint8) if tokenizer.vocab_size <= 256 else ("i", torch.int32)
    stream = array(code)
    for i, document in enumerate(documents):
        if i:
            stream.append(tokenizer.separator)
        ids = tokenizer.encode(document)
        if code == "B" and isinstance(ids, bytes):
            stream.frombytes(ids)
        else:
            stream.extend(ids)
    if not stream:
        raise argument_error("pack", "documents", got="no token", expected="text")
    return torch.frombuffer(stream, dtype=dtype)


def read_streams(
    paths: Sequence[str | Path] | None = None,
    tokenizer: Tokenizer = BYTES,
    *,
    suffix: str = ".py",
    field: str = "text",
    held_out: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Streams of tokens to train on and to evaluate on, from files and folders.

    =============  =============================================================================
    paths          files and folders; ``None``: Python's standard library, without its tests
    suffix, field  as for :func:`~fmoe.training.documents.read_documents`
    held_out       the share of the text to evaluate on, above 0 and below 1; ``None``: nothing
    -> train       a stream, as :func:`pack` makes it
    -> held_out    another of whole documents, or ``None``
    =============  =============================================================================

    Raises ``ValueError`` for unreadable paths, for a share out of range, and if either would be empty.

    >>> text, held_out = read_streams([python_stdlib() / "this.py"], held_out=0.1)
    >>> bytes(text[:4].tolist()), len(held_out) / len(text) < 0.2
    (b's = ', True)
    """
    roots = [python_stdlib()] if paths is None else [*map(Path, paths)]
    exclude = EXCLUDED_FOLDERS if roots == [python_stdlib()] else ()
    documents = read_documents(roots, suffix=suffix, field=field, exclude=exclude)
    if held_out is None:
        return pack(documents, tokenizer), None
    if not 0 < held_out < 1:
        expected = "a share between 0 and 1, or None"
        raise argument_error("read_streams", "held_out", got=held_out, expected=expected, remedy="Try 0.05.")
    train, test = hold_out(documents, held_out)
    return pack(train, tokenizer), pack(test, tokenizer)


def check_vocabulary(ids: torch.Tensor | Tokenizer, vocab_size: int) -> None:
    """Raise ``ValueError`` unless the ids of a stream, or of a tokenizer, are in a model's vocabulary.

    >>> check_vocabulary(BYTES, 256)
    >>> check_vocabulary(torch.tensor([3, 256]), 256)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: check_vocabulary: ids: got token ids from 3 to 256, expected 0 to 255, as the model's ...
    """
    if isinstance(ids, torch.Tensor):
        low, high = (int(x) for x in ids.aminmax())
    else:
        low, high = 0, ids.vocab_size - 1
    if low < 0 or high >= vocab_size:
        got = f"token ids from {low} to {high}"
        expected = f"0 to {vocab_size - 1}, as the model's vocab_size is {vocab_size}"
        remedy = "Give the model a larger vocabulary, or use another tokenizer."
        raise argument_error("check_vocabulary", "ids", got=got, expected=expected, remedy=remedy)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """The entropy of the tokens' frequencies in nats: the loss of the best model that ignores context.

    ``tokens`` is an integer tensor of any shape. Raises ``ValueError`` where it is empty.

    >>> round(unigram_entropy(torch.tensor([0, 1, 0, 1])), 4)  # ln 2
    0.6931
    """
    if not tokens.numel():
        raise argument_error("unigram_entropy", "tokens", got="none", expected="at least one")
    counts = torch.bincount(tokens.flatten())
    shares = counts[counts > 0].double() / tokens.numel()
    return -(shares * shares.log()).sum().item()


def fingerprint(tokens: torch.Tensor) -> str:
    """A digest of a stream's dtype and tokens. It tells a resumed run that its data is the same.

    >>> fingerprint(pack([b"a", b"bc"]))
    '900f945e01dca2e3'
    """
    whole = tokens.contiguous().cpu()
    memory = (ctypes.c_ubyte * whole.nbytes).from_address(whole.data_ptr())
    return hashlib.blake2b(memory, digest_size=8, key=str(whole.dtype).encode()).hexdigest()


def batch_at(
    step: int,
    tokens: torch.Tensor,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    part: tuple[int, int] = (0, 1),
    device: str | torch.device | None = None,
    separator: int | None = None,
    ignore_boundaries: bool = False,
) -> Batch | PackedBatch:
    """The batch of one step: random windows of ``seq_len + 1`` tokens, chosen by ``(seed, step)`` alone.

    ``tokens`` is a one-dimensional integer tensor. With ``part=(i, n)`` only part ``i`` of ``n`` equal ones
    of the batch is read, as each device reads its own. The batch goes to ``device``, by default that of the
    tokens.

    With a ``separator``, such as the tokenizer's, the batch has the :func:`segment_ids` of its windows. With
    ``ignore_boundaries``, a target in the document after its token's is -100, which the loss leaves out.

    Raises ``ValueError`` where no window fits, for a part that isn't one of ``n``, for a batch without ``n``
    equal parts, and for boundaries to ignore without a separator.

    >>> batch_at(7, torch.arange(4), batch_size=1, seq_len=3, seed=0)
    Batch(tokens=tensor([[0, 1, 2]]), targets=tensor([[1, 2, 3]]))
    """
    if not 1 <= seq_len < len(tokens):
        expected = f"1 to {len(tokens) - 1}, as there are {len(tokens)} tokens"
        remedy = "Shorten the sequences or read more text."
        raise argument_error("batch_at", "seq_len", got=seq_len, expected=expected, remedy=remedy)
    index, count = part
    if not (count >= 1 and 0 <= index < count):
        expected = "(i, n) with 0 <= i < n"
        raise argument_error("batch_at", "part", got=part, expected=expected, remedy="Parts count from 0.")
    if batch_size < 1 or batch_size % count:
        got, expected = f"{batch_size} sequences for {count} devices", "a positive multiple"
        raise argument_error("batch_at", "batch_size", got=got, expected=expected)
    if ignore_boundaries and separator is None:
        expected, remedy = "False without a separator", "Pass separator=tokenizer.separator."
        raise argument_error("batch_at", "ignore_boundaries", got=True, expected=expected, remedy=remedy)
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    starts = torch.randint(len(tokens) - seq_len, (batch_size,), generator=generator, device="cpu")
    mine = starts.chunk(count)[index]
    windows = tokens.unfold(0, seq_len + 1, 1)[mine.to(tokens.device)].long().to(device)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if separator is None:
        return Batch(inputs, targets)
    if ignore_boundaries:
        targets = targets.masked_fill(inputs == separator, IGNORED)
    return PackedBatch(inputs, targets, segment_ids(inputs, separator))


def batches(tokens: torch.Tensor, *, start_step: int = 0, **cut: Any) -> Iterator[Batch | PackedBatch]:
    """All batches from ``start_step`` on, without end: :func:`batch_at` of each step, with its options.

    A batch does not depend on those before it, so to resume is to pass the step.

    >>> options = dict(batch_size=2, seq_len=3, seed=0)
    >>> resumed = batches(torch.arange(100), **options, start_step=1)
    >>> _, second, *_ = itertools.islice(batches(torch.arange(100), **options), 2)
    >>> torch.equal(next(resumed).tokens, second.tokens)
    True
    """
    batch_at(start_step, tokens, **cut)  # raises now what is wrong with the options
    return (batch_at(step, tokens, **cut) for step in itertools.count(start_step))
