"""Adapters: a raw row of some data set becomes a prompt and its human response, or is malformed.

An adapter changes no text that it takes over (GSM8K's calculator marks aside), so that a prompt's
id is the hash of what the data set says.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from stages.artifacts.keys import canonical_json, sha256_text

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
PROMPT_ID_DIGITS = 32
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_SHOWN_CHARACTERS = 40
_SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class Column:
    """A column that an adapter reads."""

    name: str
    kind: Literal["text", "messages"]
    """`messages` is a list of {role, content}, or its JSON text."""
    remedy: str
    """What to do when there is no such column."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, the last message of which is the user's, and the human response to it."""

    messages: list[Message]
    response: str

    def emptiness(self) -> Literal["empty_prompt", "empty_response"] | None:
        """Return the drop reason of an example whose prompt or response is only white space."""
        if not self.messages[-1]["content"].strip():
            return "empty_prompt"
        return None if self.response.strip() else "empty_response"


class MalformedRowError(Exception):
    """A row is not what its format says; the message tells what is wrong, in ASCII where quoted."""


class Adapter(Protocol):
    """Reads rows of one format."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that it reads; a row's other columns are ignored."""
        ...

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a row holds.

        Raises:
            MalformedRowError: a column is missing, is no text, holds a lone surrogate, or the
                roles make no conversation.
        """
        ...


def prompt_id(messages: Sequence[Message]) -> str:
    """Return the identity of a prompt: 32 hex digits of a hash of its roles and contents."""
    return sha256_text(canonical_json(list(messages)))[:PROMPT_ID_DIGITS]


def missing_column(column: Column, there: Sequence[str]) -> str:
    """Return the one sentence that says that a column is not there, and what to do."""
    names = ", ".join(bare(name) for name in there[:_SHOWN_NAMES]) or "none"
    more = ", …" if len(there) > _SHOWN_NAMES else ""
    return f"no column {bare(column.name)}; columns there: {names}{more}; {column.remedy}"


@dataclass(frozen=True, slots=True)
class PromptResponse:
    """Two columns of text: the prompt becomes one user message."""

    prompt_column: str = "prompt"
    response_column: str = "response"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Prompt and response."""
        return (
            Column(self.prompt_column, "text", "set prepare.prompt_column to one of them"),
            Column(self.response_column, "text", "set prepare.response_column to one of them"),
        )

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a row holds; see `Adapter`."""
        prompt, response = (_text(_value(row, c), c.name) for c in self.columns)
        return Example([{"role": "user", "content": prompt}], response)


@dataclass(frozen=True, slots=True)
class Gsm8k:
    """GSM8K's `question` and `answer`; the answer ends in `#### N`."""

    strip_calculator: bool = True
    """Remove the calculator marks: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Question and answer."""
        remedy = "set prepare.format to what the data is"
        return Column("question", "text", remedy), Column("answer", "text", remedy)

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a row holds; see `Adapter`."""
        question, answer = (_text(_value(row, c), c.name) for c in self.columns)
        if self.strip_calculator:
            answer = CALCULATOR_MARK.sub("", answer)
        return Example([{"role": "user", "content": question}], answer)


@dataclass(frozen=True, slots=True)
class Messages:
    """One column of conversations, each a list of {role, content}.

    The last assistant message is the response and all before it are the prompt: several turns
    are kept, what follows the response is left out. Other keys of a message are ignored.
    """

    messages_column: str = "messages"

    @property
    def columns(self) -> tuple[Column, ...]:
        """The conversation."""
        remedy = "set prepare.messages_column to one of them, or another prepare.format"
        return (Column(self.messages_column, "messages", remedy),)

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a row holds; see `Adapter`."""
        (column,) = self.columns
        messages = _conversation(_value(row, column), column.name)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None:
            raise MalformedRowError(f"{column.name} has no assistant message to be the response")
        if last == 0 or messages[last - 1]["role"] != "user":
            before = "nothing" if last == 0 else f"a message of {messages[last - 1]['role']}"
            raise MalformedRowError(
                f"{column.name}[{last}], the response, follows {before}, not a user's message"
            )
        return Example(messages[:last], messages[last]["content"])


def _value(row: Mapping[str, Any], column: Column) -> Any:
    try:
        return row[column.name]
    except KeyError:
        raise MalformedRowError(missing_column(column, list(row))) from None


def _conversation(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):  # a CSV cell, or a JSON column of some exports
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise MalformedRowError(f"{name} is text that is no JSON list of messages") from None
    if not isinstance(value, list) or not value:
        raise MalformedRowError(f"{name} is {_described(value)}, not a list of messages")
    return [_message(item, f"{name}[{i}]", first=i == 0) for i, item in enumerate(value)]


def _message(item: Any, where: str, *, first: bool) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise MalformedRowError(f"{where} is {_described(item)}, not a message {{role, content}}")
    role = item["role"]
    if role not in ROLES:
        raise MalformedRowError(
            f"{where} has role {_described(role)}, not one of {', '.join(ROLES)}"
        )
    if role == "system" and not first:
        raise MalformedRowError(f"{where} is a system message; only the first message may be")
    return {"role": role, "content": _text(item["content"], f"{where}.content")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedRowError(f"{where} is {_described(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # A tokenizer raises TypeError on these, and no file in UTF-8 can hold them.
        raise MalformedRowError(
            f"{where} holds the lone surrogate U+{ord(value[error.start]):04X} "
            f"at character {error.start}, which is no Unicode text"
        ) from None
    return value


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | Mapping) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'mapping'}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(bare(str(key)) for key in list(value)[:5])}"
    if isinstance(value, list):
        return "a list"
    return quoted(value)


def quoted(value: Any) -> str:
    """Return a short printable form of a value from data: ASCII, no control characters."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def bare(name: str) -> str:
    """Return a name from data as it is where that is safe to print, quoted otherwise."""
    safe = name.isascii() and name.isprintable() and 0 < len(name) <= _SHOWN_CHARACTERS
    return name if safe else quoted(name)
