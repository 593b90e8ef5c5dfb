import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.errors import ConfigError
from stages.model.tokenizer import SMALLEST_VOCAB, train_tokenizer

TEXTS = [f"Ann has {n} pens, finds {n % 7}.\n{n}+{n % 7}={n + n % 7}. Café!" for n in range(200)]
TOKENIZER = train_tokenizer(TEXTS, 320)


def words_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


@settings(deadline=None, max_examples=500)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_unicode_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces , and one before a comma .\n\n\t\r\n ",
        "e\u0301 is not \u00e9, nor \ufb01 fi",  # a normaliser would merge these
        "do n't, it 's",
        "١٢٣ ½ Ⅷ 一二三",
        "👩‍👩‍👧 \x00 \ufeff \u2028 \u00a0 \U0010ffff",
        "<s> in the text </s>, <pad>",
    ],
)
def test_awkward_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_are_never_merged() -> None:
    assert TOKENIZER.tokenize("2024=1") == ["2", "0", "2", "4", "=", "1"]
    assert [w for w in words_of(TOKENIZER) if len(w) > 1 and any(c.isdigit() for c in w)] == []


def test_special_tokens_come_first_and_nothing_is_added_to_a_text() -> None:
    assert words_of(TOKENIZER)[:3] == ["<s>", "</s>", "<pad>"]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1, 2)
    assert TOKENIZER.encode("Ann") == TOKENIZER.encode("Ann", add_special_tokens=False)
    assert TOKENIZER.encode("<s>Ann")[0] == 0


def test_vocabulary_is_as_large_as_asked_where_the_texts_allow() -> None:
    assert len(train_tokenizer(TEXTS, 270)) == 270
    assert len(train_tokenizer([], 512)) == SMALLEST_VOCAB
    assert len(train_tokenizer(["no merges: ", "12345"], SMALLEST_VOCAB)) == SMALLEST_VOCAB


def test_order_of_the_texts_and_the_process_do_not_matter() -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    expected = TOKENIZER.backend_tokenizer.to_str()
    assert train_tokenizer(shuffled, 320).backend_tokenizer.to_str() == expected
    code = (
        "from tests.unit.test_tokenizer import TOKENIZER as t;"
        "print(t.backend_tokenizer.to_str(), end='')"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert done.stdout.decode() == expected


def test_saved_and_loaded_tokenizer_is_the_same(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Ann has 27 pens , finds 5.\n<s>é</s>"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=258.*at least 259"):
        train_tokenizer(TEXTS, 258)
