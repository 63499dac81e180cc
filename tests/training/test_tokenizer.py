import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

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
        ImportError, match=r"needs the package tokenizers. Install it with: pip install -e '.\[tokenizers"
    ):
        load_tokenizer(path)
