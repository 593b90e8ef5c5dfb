"""Adapters: what each takes for a prompt and a response, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.data.formats import (
    Adapter,
    Gsm8k,
    MalformedRowError,
    Messages,
    PromptResponse,
    missing_column,
    prompt_id,
)

GSM8K = Path(__file__).parent.parent / "data" / "gsm8k"


def turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def gsm8k_rows() -> list[dict[str, str]]:
    lines = (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_gsm8k_marks_are_removed_and_nothing_else() -> None:
    row = gsm8k_rows()[0]
    example = Gsm8k(strip_calculator=True)(row)
    assert example.messages == [turn("user", row["question"])]
    assert example.response == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )


def test_gsm8k_marks_stay_when_asked() -> None:
    row = gsm8k_rows()[0]
    assert Gsm8k(strip_calculator=False)(row).response == row["answer"]


def test_no_mark_is_left_in_real_rows() -> None:
    for row in gsm8k_rows():
        assert "<<" not in Gsm8k()(row).response
        assert ">>" not in Gsm8k()(row).response


def test_prompt_response_takes_the_named_columns_as_they_are() -> None:
    adapter = PromptResponse("q", "a")
    example = adapter({"q": " one? ", "a": "two\n", "other": 3})
    assert example.messages == [turn("user", " one? ")]
    assert example.response == "two\n"
    assert [column.name for column in adapter.columns] == ["q", "a"]


def test_messages_last_assistant_message_is_the_response() -> None:
    conversation = [
        turn("system", "Be brief."),
        turn("user", "1+1?"),
        turn("assistant", "2"),
        turn("user", "And 2+2?"),
        turn("assistant", "4"),
    ]
    example = Messages()({"messages": conversation})
    assert example.messages == conversation[:4]
    assert example.response == "4"


def test_messages_after_the_response_are_left_out() -> None:
    conversation = [turn("user", "1+1?"), turn("assistant", "2"), turn("user", "Thanks.")]
    example = Messages()({"messages": conversation})
    assert example.messages == conversation[:1]
    assert example.response == "2"


def test_messages_may_be_json_text_and_their_other_keys_are_ignored() -> None:
    plain = [turn("user", "1+1?"), turn("assistant", "2")]
    decorated = [{**message, "name": "x", "weight": 1} for message in plain]
    adapter = Messages("chat")
    assert adapter({"chat": json.dumps(decorated)}) == adapter({"chat": plain})


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (None, "messages is null, not a list of messages"),
        ([], "messages is an empty list, not a list of messages"),
        ("hello", "messages is text that is no JSON list of messages"),
        (float("nan"), "messages is nan, not a list of messages"),
        ({"role": ["user"]}, "messages is a mapping of role, not a list of messages"),
        (["hello"], r"messages\[0\] is 'hello', not a message"),
        ([{"from": "human", "value": "hi"}], r"messages\[0\] is a mapping of from, value, not a"),
        ([turn("human", "hi")], r"messages\[0\] has role 'human', not one of system, user, assist"),
        ([turn(None, "hi")], r"messages\[0\] has role null"),
        ([turn("user", None)], r"messages\[0\].content is null, not text"),
        ([turn("user", [])], r"messages\[0\].content is an empty list, not text"),
        ([turn("user", "hi")], "messages has no assistant message to be the response"),
        ([turn("assistant", "hi")], r"messages\[0\], the response, follows nothing"),
        (
            [turn("system", "x"), turn("assistant", "hi")],
            r"messages\[1\], the response, follows a message of system, not a user's",
        ),
        (
            [turn("user", "x"), turn("assistant", "y"), turn("assistant", "z")],
            r"messages\[2\], the response, follows a message of assistant",
        ),
        (
            [turn("user", "x"), turn("system", "y"), turn("assistant", "z")],
            r"messages\[1\] is a system message; only the first message may be",
        ),
    ],
)
def test_messages_that_are_no_conversation_are_malformed(conversation: Any, message: str) -> None:
    with pytest.raises(MalformedRowError, match=message):
        Messages()({"messages": conversation})


@pytest.mark.parametrize("adapter", [PromptResponse("question", "answer"), Gsm8k()])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "answer is null, not text"),
        (42, "answer is 42, not text"),
        (float("nan"), "answer is nan, not text"),
        (float("inf"), "answer is inf, not text"),
        (True, "answer is True, not text"),
        (["a"], "answer is a list, not text"),
        ("ab\ud800c", r"answer holds the lone surrogate U\+D800 at character 2"),
    ],
)
def test_a_value_that_is_no_text_is_malformed(adapter: Adapter, value: Any, message: str) -> None:
    with pytest.raises(MalformedRowError, match=message):
        adapter({"question": "q", "answer": value})


def test_what_is_wrong_is_told_in_printable_ascii() -> None:
    hostile = "\x1b[31m\ud800" + "é" * 1000
    with pytest.raises(MalformedRowError) as caught:
        Messages()({"messages": [turn(hostile, "x")]})
    assert str(caught.value).isascii() or "…" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_missing_column_is_named_with_those_there_and_the_remedy() -> None:
    (prompt, _) = PromptResponse().columns
    assert missing_column(prompt, ["question", "answer"]) == (
        "no column prompt; columns there: question, answer; "
        "set prepare.prompt_column to one of them"
    )
    with pytest.raises(MalformedRowError, match="no column response; columns there: prompt, x"):
        PromptResponse()({"prompt": "p", "x": "r"})


@pytest.mark.parametrize(
    ("prompt", "response", "reason"),
    [
        ("p", "r", None),
        ("", "r", "empty_prompt"),
        (" \n\t", "r", "empty_prompt"),
        ("", "", "empty_prompt"),
        ("p", "", "empty_response"),
        ("p", " \u00a0\n", "empty_response"),
    ],
)
def test_white_space_is_empty(prompt: str, response: str, reason: str | None) -> None:
    assert PromptResponse()({"prompt": prompt, "response": response}).emptiness() == reason


def test_prompt_ids_never_change() -> None:
    # Written down by hand: every artifact ever made joins on these.
    assert prompt_id([turn("user", "1+1?")]) == "cc65b384f235935dd378e28ba748ba39"
    assert (
        prompt_id([turn("system", "é"), turn("user", "1+1?")]) == "af07bd5c853aeac7e6fa12a2e70f0155"
    )


def test_prompt_ids_tell_roles_and_borders_apart() -> None:
    prompts = [
        [turn("user", "ab")],
        [turn("system", "ab")],
        [turn("user", "a"), turn("user", "b")],
        [turn("user", "a"), turn("assistant", "b")],
        [turn("user", "ab ")],
    ]
    assert len({prompt_id(messages) for messages in prompts}) == len(prompts)
    assert prompt_id([{"content": "ab", "role": "user"}]) == prompt_id([turn("user", "ab")])
