"""Contamination: the hashes of whole batches say what sets of words say, of any text."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data import contamination
from stages.data.contamination import (
    DIGIT,
    DROP,
    JOIN,
    SIGN,
    SINGLE,
    SPACE,
    HeldoutNgrams,
    Texts,
    character,
    prompt_texts,
    response_texts,
)
from stages.data.rows import PROMPTS

Words = tuple[str, ...]
Conversation = list[str]
"""The user messages of a prompt."""


class Example(NamedTuple):
    prompt: Conversation
    response: str


# The slow twin


def words_of(text: str) -> Words:
    """The words of a text, one character after the other."""
    found = [character(char) for char in text]
    kept = [(chr(code), kinds) for code, kinds in found if kinds != DROP]
    words, open_word = list[str](), ""
    for place, (char, kinds) in enumerate(kept):
        follow = [kinds for _, kinds in kept[place + 1 : place + 3]] + [0, 0]
        if kinds & JOIN:
            open_word += char
            continue
        words += [open_word] if open_word else []
        open_word = ""
        is_sign = kinds & SIGN and (follow[0] & DIGIT or (follow[0] & SPACE and follow[1] & DIGIT))
        words += [char] if kinds & SINGLE or is_sign else []
    return tuple(words + ([open_word] if open_word else []))


def ngrams_of(conversation: Conversation, n: int) -> set[Words]:
    words = tuple(word for text in conversation for word in words_of(text))
    if len(words) < n:
        return {("whole", *words)} if words else set()
    return {words[i : i + n] for i in range(len(words) - n + 1)}


def slow_report(
    heldout: dict[str, Conversation], rows: Sequence[Example], n: int
) -> list[tuple[str, int, float, float]]:
    ours = {name: ngrams_of(texts, n) for name, texts in heldout.items()}
    times: dict[Words, int] = {}
    for ngram in (g for found in ours.values() for g in found):
        times[ngram] = times.get(ngram, 0) + 1
    common = {g for g, number in times.items() if number > max(3, 0.1 * len(ours))}
    in_prompts = set[Words]().union(*(ngrams_of(row.prompt, n) for row in rows))
    in_responses = set[Words]().union(*(ngrams_of([row.response], n) for row in rows))
    report = []
    for name, found in ours.items():
        found -= common
        total = max(1, len(found))
        shares = (len(found & in_prompts) / total, len(found & in_responses) / total)
        report.append((name, len(found), *shares))
    return report


# The two compared


def texts_of(conversations: Sequence[Conversation]) -> Texts:
    pieces = [text.encode("utf-8", "surrogatepass") for texts in conversations for text in texts]
    bounds = np.concatenate([[0], np.cumsum([len(texts) for texts in conversations])])
    return Texts(pa.array(pieces, pa.binary()), bounds.astype(np.int64))


def scanned(
    heldout: dict[str, Conversation], rows: Sequence[Example], n: int, batch_rows: int = 3
) -> HeldoutNgrams:
    found = HeldoutNgrams(list(heldout), [texts_of(list(heldout.values()))], n)
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        ids = pa.array([f"row {start + k}" for k in range(len(batch))])
        found.scan(
            ids, texts_of([r.prompt for r in batch]), texts_of([[r.response] for r in batch])
        )
    return found


def report_of(found: HeldoutNgrams) -> list[tuple[Any, ...]]:
    return [tuple(row.values())[:4] for row in found.report().to_pylist()]


alphabet = st.sampled_from("aabbA 5  +-.\n'éßÉけ的ก\u0301\u200d\ud800\xa0−𝐀🙂")
text = st.text(alphabet, max_size=30)
conversation = st.lists(text, min_size=1, max_size=3)
example = st.builds(Example, conversation, text)


@settings(max_examples=150)
@given(st.lists(conversation, max_size=7), st.lists(example, max_size=7), st.integers(1, 6))
def test_hashes_say_what_sets_say(heldout: list[Conversation], rows: list[Example], n: int) -> None:
    named = {f"h{k}": texts for k, texts in enumerate(heldout)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "CHUNK_BYTES", 40)
        found = scanned(named, rows, n)
    slow = slow_report(named, rows, n)
    assert report_of(found) == slow
    dirty = [row for row in slow if row[2] or row[3]]
    assert found.metrics()["contaminated_prompt_share"] == len(dirty) / max(1, len(slow))
    for row, (_, _, *shares) in zip(found.report().to_pylist(), slow, strict=True):
        assert (row["example_prompt_id"] is not None) == any(shares)


@given(st.text(max_size=60), st.text(max_size=60))
def test_words_of_any_text_are_those_of_the_slow_twin(one: str, two: str) -> None:
    words = list(contamination._chunks(texts_of([[one], [two, one]])))
    bounds = [len(words_of(one)), len(words_of(two)) + 2 * len(words_of(one))]
    got = [*words[0][1].bounds[1:].tolist()] if words else [0, 0]
    assert got == bounds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's  a\tdog-house!", "it s a dog house"),
        ("ÉCOLE e\u0301cole ＥＣＯＬＥ", "ecole ecole ecole"),
        ("Straße ΣΊΣΥΦΟΣ", "straße σισυφοσ"),
        ("27+5 is not 27-5, 27 - 5, 27−5", "27 + 5 is not 27 - 5 27 - 5 27 - 5"),
        ("3.5 and 35, -5", "3 5 and 35 - 5"),
        ("- a list, x-y, and/or", "a list x y and or"),
        ("so\u00adft zero\u200bwidth \ufefftext", "soft zerowidth text"),
        ("我有3个苹果。", "我 有 3 个 苹 果"),
        ("りんごが a1", "り ん こ か a1"),
        ("한국어 문장", "한국어 문장"),
        ("?!… 🙂 \n", ""),
        ("x²_y", "x2 y"),
    ],
)  # fmt: skip
def test_what_a_word_is(text: str, words: str) -> None:
    assert words_of(text) == tuple(words.split())


SENTENCE = "the quick brown fox jumps over the lazy dog near a river in may"


def test_a_prompt_is_found_whatever_its_case_and_punctuation() -> None:
    heldout = {
        "long": [SENTENCE],
        "short": ["How many?"],
        "new": ["Nothing of this stands anywhere else in all of the rows that are trained on, no."],
    }
    rows = [
        Example(["How many cups?"], "many"),
        Example(["Say: " + SENTENCE.upper().replace(" ", ",  ")], "how—many..."),
        Example([SENTENCE.partition(" ")[2]], ""),
    ]
    report = {row["prompt_id"]: row for row in scanned(heldout, rows, 13).report().to_pylist()}
    long, short, new = (report[name] for name in heldout)
    assert (long["ngrams"], long["share_in_prompts"], long["share_in_responses"]) == (2, 1.0, 0.0)
    assert long["example_prompt_id"] == "row 1"
    assert (short["ngrams"], short["share_in_prompts"], short["share_in_responses"]) == (1, 0, 1)
    assert short["example_prompt_id"] == "row 1"
    assert (new["share_in_prompts"], new["example_prompt_id"]) == (0, None)


def test_an_instruction_that_prompts_share_says_nothing_of_them() -> None:
    suffix = SENTENCE
    rows = [Example([f"another question {suffix}"], "")]
    many = {f"{k}": [f"question number {k} is this: {suffix}"] for k in range(40)}
    found = scanned(many, rows, 13)
    assert found.metrics()["contaminated_prompt_share"] == 0
    assert found.num_common == 4
    few = dict(list(many.items())[:3])
    assert scanned(few, rows, 13).metrics()["contaminated_prompt_share"] == 1


def test_user_messages_are_what_is_compared() -> None:
    def row(*turns: tuple[str, str]) -> dict[str, Any]:
        messages = [{"role": role, "content": text} for role, text in turns]
        return {
            "prompt_id": "x",
            "messages": messages,
            "response": "r",
            "source": "",
            "source_row": 0,
        }

    rows = [
        row(("system", "be brief"), ("user", "a b"), ("assistant", "c"), ("user", "d")),
        row(("user", "e")),
        row(("system", "s"), ("user", "f")),
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=PROMPTS)
    for part, wanted in [(batch, [["a b", "d"], ["e"], ["f"]]), (batch.slice(1), [["e"], ["f"]])]:
        pieces, bounds = prompt_texts(part["messages"])
        texts = [pieces[a:b].to_pylist() for a, b in pairwise(bounds)]
        assert texts == wanted
    sliced = response_texts(batch["response"].slice(2))
    assert [words.bounds.tolist() for _, words in contamination._chunks(sliced)] == [[0, 1]]


@pytest.mark.parametrize(
    "text",
    ["", "e" + "\u0301" * 100_000, "?!" * 300_000, "a" * 600_000, "的" * 400_000, "\ud83d " * 9],
)
def test_hostile_text_is_compared_like_any_other(text: str) -> None:
    heldout = {"hostile": [text], "usual": ["one two three"]}
    rows = [Example([text], "One, two; three"), Example(["x"], text)]
    hostile, usual = report_of(scanned(heldout, rows, 13))
    has_words = bool(words_of(text[:1000]))
    assert hostile == ("hostile", int(has_words), float(has_words), float(has_words))
    assert usual == ("usual", 1, 0.0, 1.0)


def test_of_a_very_long_text_the_beginning_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "MOST_BYTES", 13)
    monkeypatch.setattr(contamination, "CHUNK_BYTES", 4)
    heldout = {"cut": ["ab cd", "ef ghéé ij"], "next": ["kl mn"]}  # cut within the second é
    for prompt, share in [("ab cd ef gh", 0.0), ("ab cd ef ghé", 1.0), ("ab cd ef ghee", 0.0)]:
        report = report_of(scanned(heldout, [Example([prompt], "kl mn")], 9))
        assert report == [("cut", 1, share, 0.0), ("next", 1, 0.0, 1.0)]


def test_batches_and_chunks_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def sentence(length: int) -> str:
        return " ".join(f"w{k}" for k in rng.integers(0, 30, length))

    heldout = {f"{k}": [sentence(12)] for k in range(60)}
    rows = [Example([sentence(40)], sentence(80)) for _ in range(90)]
    found = scanned(heldout, rows, 3, batch_rows=90)
    assert report_of(found) == slow_report(heldout, rows, 3)
    monkeypatch.setattr(contamination, "CHUNK_BYTES", 300)
    assert scanned(heldout, rows, 3, batch_rows=90).report().equals(found.report())
