import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fmoe.training.data import pack
from fmoe.training.tokenizer import BYTES, load_tokenizer

VOCABULARY = {"def": 0, "f": 1, "x": 2, "[UNK]": 3, "</s>": 7, "<sep>": 5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    words = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["[CLS]"])
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 6)]
    )
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_bytes_survive_a_round_trip() -> None:
    text = "zwölf\n"
    assert BYTES.decode(list(BYTES.encode(text.encode()))) == text
    assert BYTES.decode([0x61, 256, 2000]) == "a??"
    assert BYTES.decode([0x61, 0xFF]) == "a�"


def test_a_tokenizer_file(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode(b"def f x") == [0, 1, 2], "and no special token"
    assert tokenizer.encode(b"def \xff") == [0, 3]
    assert tokenizer.decode([0, 1, 7]) == "def f </s>"
    assert tokenizer.vocab_size == 8, "ids may have gaps: there are seven"
    assert tokenizer.separator == 7
    assert load_tokenizer(path, separator="<sep>").separator == 5
    assert pack([b"def f", b"x"], tokenizer).tolist() == [0, 1, 7, 2]


def test_text_is_one_stream_whatever_the_file_says_of_sequences(path: Path) -> None:
    words = tokenizers.Tokenizer.from_file(str(path))
    words.enable_truncation(2)
    words.enable_padding(length=6)
    words.save(str(path))
    assert load_tokenizer(path).encode(b"def f x f") == [0, 1, 2, 1]


def test_what_is_wrong_with_a_tokenizer_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="load_tokenizer: separator: got '<eod>', expected a token of"):
        load_tokenizer(path, separator="<eod>")
    path.write_text(path.read_text().replace("</s>", "<end>"))
    with pytest.raises(ValueError, match=r"which has none of .*endoftext.*Name the token that shall stand"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"load_tokenizer: path: got .*tokenizer.json: .*, expected a"):
        load_tokenizer(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ImportError, match=r"needs the package tokenizers. Install it with: pip install tokenizers"
    ):
        load_tokenizer(path)


QUOTED = ["</s>", "<sep>", "<mask>", "a </s> b", "</s></s>", "<sep></s>x", " </s>\n</s>", "x</s>y <mask>"]


def of_words() -> tokenizers.Tokenizer:
    words = ["<unk>", "</s>", "<sep>", "<mask>", "a", "b", "x", "y"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


def of_word_pieces() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "</s>", "<sep>", "<mask>", *"abxy<>/s", *(f"##{letter}" for letter in "abxy<>/s")]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


def of_bytes(ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """It has learnt the special tokens as words, since it was trained on text that quotes them."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(QUOTED * 10, trainer)
    for name in ("<mask>", "<sep>", "</s>"):
        if found.token_to_id(name) is None:
            found.add_tokens([name])
    found.model.ignore_merges = ignore_merges
    return found


def of_unigrams() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "</s>", "<sep>", "<mask>"]
    vocabulary = [(piece, 0.0) for piece in pieces] + [(letter, -3.0) for letter in "▁abxy<>/sepmk"]
    found = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return found


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("special", ["words of the model", "special", "special but the separator"])
@pytest.mark.parametrize(
    "make", [of_words, of_word_pieces, of_bytes, lambda: of_bytes(ignore_merges=True), of_unigrams]
)
def test_text_that_quotes_special_tokens_is_text(
    tmp_path: Path, make: Any, special: str, normalized: bool
) -> None:
    words = make()
    names = {"words of the model": ["<mask>"], "special": ["</s>", "<mask>"]}.get(special, ["<mask>"])
    words.add_special_tokens([tokenizers.AddedToken(name, normalized=normalized) for name in names])
    if special == "special but the separator":
        words.add_tokens([tokenizers.AddedToken("</s>", normalized=normalized)])
    words.add_tokens(["added"])
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    ids = {name: words.token_to_id(name) for name in ("</s>", "<mask>")}
    assert tokenizer.separator == ids["</s>"]
    for text in QUOTED:
        found = tokenizer.encode(text.encode())
        assert found, text
        assert not {*ids.values()} & {*found}, text
        if make not in (of_words, of_word_pieces, of_unigrams):
            assert tokenizer.decode(found) == text
    assert pack([b"a </s> b", b"</s>"], tokenizer).tolist().count(ids["</s>"]) == 1
    assert words.token_to_id("added") in tokenizer.encode(b"a added b"), "what isn't special stays a token"
    assert tokenizer.decode([ids["</s>"]]) == "</s>"
    assert tokenizer.vocab_size == 1 + max(words.get_vocab().values())
    plain = "a b x y"
    assert tokenizer.encode(plain.encode()) == words.encode(plain, add_special_tokens=False).ids
