"""From text to token ids and back: bytes, or a ``tokenizer.json``."""

import json
import secrets
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import argument_error

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "[SEP]")


class Tokenizer(NamedTuple):
    """Two pure functions, the number of ids, and the id that is put between documents.

    >>> BYTES.encode(b"ab"), BYTES.decode([104, 105]), BYTES.vocab_size, BYTES.separator
    (b'ab', 'hi', 256, 10)
    """

    encode: Callable[[bytes], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    separator: int


# A token is a byte and a newline separates documents; decoding replaces what isn't UTF-8.
# Ids that are no byte, which an untrained model may draw, read as question marks.
BYTES = Tokenizer(
    bytes,
    lambda ids: bytes(i if i < 256 else ord("?") for i in ids).decode(errors="replace"),
    256,
    ord("\n"),
)


def load_tokenizer(path: str | Path, *, separator: str | None = None) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, through the package ``tokenizers``.

    ============  =============================================================================
    path          a file as ``tokenizers`` and ``transformers`` write it
    separator     the token between documents; ``None``: the vocabulary's usual end of text
    -> Tokenizer  encodes UTF-8 (what isn't becomes U+FFFD) without adding special tokens
    ============  =============================================================================

    Text that quotes the separator, or a token that the file calls special, is text like any other. It never
    becomes that token.

    Raises ``ImportError`` without the package, and ``ValueError`` for a file it cannot read or a
    vocabulary without the separator.

    >>> import tempfile, tokenizers
    >>> words = {"<eos>": 0, "<unk>": 1, "hello": 2, "there": 3}
    >>> model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    >>> model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/tokenizer.json")
    ...     tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    >>> tokenizer.encode(b"hello there"), tokenizer.separator, tokenizer.vocab_size
    ([2, 3], 0, 4)
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"load_tokenizer: reading {path} needs the package tokenizers. "
            "Install it with: pip install tokenizers. Without it, train on bytes."
        ) from error
    try:
        # The package raises plain Exception for everything.
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise argument_error(
            "load_tokenizer", "path", got=f"{path}: {error}", expected="a tokenizer.json"
        ) from error
    # Settings for feeding models sequence by sequence, and for training with noise: here text is one stream.
    loaded.no_truncation()
    loaded.no_padding()
    if getattr(loaded.model, "dropout", None):
        loaded.model.dropout = None
    names = END_OF_TEXT if separator is None else (separator,)
    found = [(i, name) for name in names if (i := loaded.token_to_id(name)) is not None]
    if not found:
        raise argument_error(
            "load_tokenizer",
            "separator",
            got=repr(separator),
            expected=f"a token of {path}" + (f", which has none of {names}" if separator is None else ""),
            remedy="Name the token that shall stand between documents.",
        )
    # Ids may have gaps, so this is one more than the largest and not their number.
    vocab_size = 1 + max(loaded.get_vocab(with_added_tokens=True).values())
    separator_id, name = found[0]
    _read_as_text(loaded, name)
    return Tokenizer(
        lambda text: loaded.encode(text.decode(errors="replace"), add_special_tokens=False).ids,
        lambda ids: loaded.decode(list(ids), skip_special_tokens=False),
        vocab_size,
        separator_id,
    )


def _read_as_text(tokenizer: Any, separator: str) -> None:
    """Make text never become the separator or a special token, though these keep their ids."""
    tokenizer.add_special_tokens([separator])
    tokenizer.encode_special_tokens = True  # the package's word for not looking for them in text
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    # The model may know them as words, too.
    model = _without(json.loads(tokenizer.to_str())["model"], special)
    tokenizer.model = tokenizer.from_str(json.dumps({"version": "1.0", "model": model})).model


def _without(model: dict[str, Any], words: Collection[str]) -> dict[str, Any]:
    """The model of a ``tokenizer.json`` without these words, except the one that stands for unknown text."""
    if isinstance(model["vocab"], list):  # of words and scores, where the position is the id
        unknown, secret = model.get("unk_id"), secrets.token_hex(16)
        hidden = [
            [word + secret if word in words and i != unknown else word, score]
            for i, (word, score) in enumerate(model["vocab"])
        ]
        return model | {"vocab": hidden}
    gone = {*words} - {model.get("unk_token")}
    found = model | {"vocab": {word: i for word, i in model["vocab"].items() if word not in gone}}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        found["merges"] = [[a, b] for a, b in pairs if not gone & {a, b, a + b[prefix:]}]
    return found
