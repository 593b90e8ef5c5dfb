"""The one renderer of prompts: messages to tokens, and tokens back to text.

Generation, pairing and evaluation all go through `Renderer`, so that the text a model is trained
on is the text it was asked with: same template, same BOS, same end token.
"""

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from stages.artifacts.keys import canonical_json, sha256_file, sha256_text
from stages.config import ChatConfig
from stages.data.templates import Failed, Rendered, Template
from stages.errors import ConfigError, InputError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""Every message on a line of its own, assistant messages closed by the end token."""

PART_ROWS = 1024
PART_CHARACTERS = 1 << 20  # tokenizers keep some 100 bytes a character while they work
MOST_CHARACTERS = 1 << 23
"""Of a conversation: what a template's process can hold several times over."""

_USER, _ASSISTANT, _NEUTRAL = "spin⟂question", "spin⟂answer", "neutral"
_SEEN_OF_TOKENIZERS = (TypeError, ValueError, OverflowError)  # on hostile text
_log = logging.getLogger("spin")

Message = Mapping[str, str]
Conversation = Sequence[Message]
Shape = tuple[tuple[str, bool], ...]
"""Of each message: its role, and whether it says anything."""
TemplateSource = Literal["model", "recipe", "default"]
BosOrigin = Literal["template", "tokenizer", "collapsed", "none"]
A = TypeVar("A")
B = TypeVar("B")


class RowRefusedError(Exception):
    """One row cannot be rendered; the stage drops it with `reason` and goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class TextCoder:
    """Encodes and decodes many texts a call, with all cores; adds and removes nothing."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = tokenizer
        names = ("_encode_plus", "_decode", "decode")
        self._is_fast = isinstance(tokenizer, PreTrainedTokenizerFast) and all(
            getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name)
            for name in names
        )
        if self._is_fast:  # a tokenizer.json may ask to cut off or to pad
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        if not texts:
            return []
        if not self._is_fast:
            return list(self._tokenizer(list(texts), add_special_tokens=False)["input_ids"])
        # The library's own call costs half as much again, for masks that no one reads.
        backend = self._tokenizer.backend_tokenizer
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, token_ids: Sequence[list[int]]) -> list[str]:
        """Return the text of each sequence of token ids."""
        if self._is_fast:
            backend = self._tokenizer.backend_tokenizer
            return list(backend.decode_batch(token_ids, skip_special_tokens=False))
        return [
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            for ids in token_ids
        ]


class _Look(NamedTuple):
    """What decides how many special tokens a template writes around messages."""

    shape: Shape
    ask: bool


@dataclass(frozen=True)
class _Asked:
    """A part of the conversations, on its way through the template."""

    rows: list[list[Message] | RowRefusedError]
    """Completed by the recipe's system prompt and suffix."""
    shapes: list[_Look]
    """Of the rows that are not refused."""
    new_shapes: list[_Look]
    """Those whose neutral twin is rendered with them."""
    neutral: list[list[Message]]

    def conversations(self) -> list[Conversation]:
        """Return all that is to be rendered."""
        good = (row for row in self.rows if not isinstance(row, RowRefusedError))
        return [*good, *self.neutral]


@dataclass(frozen=True)
class Renderer:
    """Renders for one tokenizer and one template; make it with `make_renderer`."""

    tokenizer: Any
    template: str
    template_source: TemplateSource
    """Who gave the template; `default` is PLAIN_TEMPLATE, where neither model nor recipe did."""
    system: str | None
    prompt_suffix: str
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response: the template's end of turn, and the model's own EOS tokens."""
    end_token_id: int
    """The token that a human response is closed with."""
    pad_token_id: int
    bos_token_id: int | None
    """What every prompt begins with, exactly once; None adds and takes away nothing."""
    bos_origin: BosOrigin
    """Who writes it: the template; the tokenizer, where the template forgets it; or both, or one
    of them several times, which is made one (`collapsed`)."""
    response_lead: str
    """Text that the template puts between the generation prompt and the response's own text."""
    fingerprints: Mapping[str, str]
    """See `chat_fingerprints`."""
    _special: re.Pattern[str]
    _is_special: np.ndarray[Any, np.dtype[np.bool_]]
    """By token id."""
    _coder: TextCoder
    _page: Template
    _neutral: dict[_Look, int | None] = field(default_factory=dict)
    """Number of special tokens that the template writes around messages of this shape."""

    @property
    def num_ids(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return len(self._is_special)

    def prompt_tokens(self, messages: Conversation) -> list[int]:
        """Return the token ids of a conversation up to where the response begins.

        Raises:
            RowRefusedError: the text is no valid Unicode, holds one of the tokenizer's special
                tokens, the template refuses the roles or goes past its limits, or the tokenizer
                fails.
        """
        return _or_raise(self.prompts_tokens([messages])[0])

    def prompts_tokens(
        self,
        conversations: Sequence[Conversation],
        most_tokens: int | None = None,
        *,
        ask: bool = True,
    ) -> list[list[int] | RowRefusedError]:
        """Return the token ids of many conversations, or why one is refused; see `prompt_tokens`.

        What a row gives does not depend on the rows beside it.

        Args:
            most_tokens: refuse texts that are sure to have more, before all of them is tokenized.
            ask: end with what opens the assistant's answer; false for conversations that hold it.

        Raises:
            ConfigError: the template goes past its limits on too many of them.
        """
        waiting: deque[_Asked] = deque()

        def asked() -> Iterator[list[Conversation]]:
            for part in _parts(conversations):
                waiting.append(self._ask(part, ask))
                yield waiting[-1].conversations()

        found: list[list[int] | RowRefusedError] = []
        with closing(self._page.render_parts(asked(), ask=ask)) as parts:
            for texts in parts:
                found += self._tokens(waiting.popleft(), texts, most_tokens)
        return found

    def prompt_text(self, messages: Conversation) -> str:
        """Return the text that the template gives; its tokens may still lack or double BOS.

        Raises:
            RowRefusedError: as `prompt_tokens`.
        """
        self._check_messages(messages)
        return _or_raise(_refused(self._page.render([self._complete(messages)])[0]))

    def response_tokens(self, text: str) -> list[int]:
        """Return the token ids of a response text, closed by exactly one end token.

        Raises:
            RowRefusedError: as `prompt_tokens`.
        """
        return _or_raise(self.responses_tokens([text])[0])

    def responses_tokens(self, texts: Sequence[str]) -> list[list[int] | RowRefusedError]:
        """Return the token ids of many responses, or why one is refused; see `response_tokens`."""
        whole = _each(texts, self._led)
        lead, *tokens = _all_at_once([self.response_lead, *whole], self._coder.encode)
        rows = [_or_raise(lead), *([] if isinstance(t, RowRefusedError) else t for t in tokens)]
        expected, *counts = self._count_special(rows).tolist()
        return [
            ids
            if isinstance(ids, RowRefusedError)
            else [*ids, self.end_token_id]
            if count == expected
            else _special_refused(count, expected)
            for ids, count in zip(tokens, counts, strict=True)
        ]

    def _led(self, text: str) -> str:
        self._check_text(text)
        return self.response_lead + text

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of response tokens, without the stop token at the end."""
        return self.texts([token_ids])[0]

    def texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of many responses; see `text`."""
        stops = frozenset(self.stop_token_ids)
        kept = [list(ids[:-1] if ids and ids[-1] in stops else ids) for ids in token_ids]
        return [text.removeprefix(self.response_lead) for text in self._coder.decode(kept)]

    def _ask(self, part: Sequence[Conversation], ask: bool) -> _Asked:
        rows = _each(part, self._checked)
        shapes = [
            _Look(_shape(messages), ask)
            for messages, row in zip(part, rows, strict=True)
            if not isinstance(row, RowRefusedError)
        ]
        new_shapes = [shape for shape in dict.fromkeys(shapes) if shape not in self._neutral]
        neutral = [
            self._complete([{"role": r, "content": _NEUTRAL * says} for r, says in look.shape])
            for look in new_shapes
        ]
        return _Asked(rows, shapes, new_shapes, neutral)

    def _tokens(
        self, asked: _Asked, rendered: Sequence[Rendered], most_tokens: int | None
    ) -> list[list[int] | RowRefusedError]:
        """Return the tokens of the part's rows, and remember what its new shapes look like."""
        texts = list(map(_refused, rendered))
        if most_tokens is not None:
            texts = _each(texts, lambda text: self._short_enough(text, most_tokens))
        tokens = _all_at_once(texts, self._coder.encode)
        counts = self._count_special([[] if isinstance(t, RowRefusedError) else t for t in tokens])
        num_good = len(asked.shapes)
        for shape, ids, count in zip(
            asked.new_shapes, tokens[num_good:], counts[num_good:].tolist(), strict=True
        ):
            # Not known for roles that the template refuses: their rows are refused by it too.
            self._neutral[shape] = None if isinstance(ids, RowRefusedError) else count
        good = iter(map(self._finished, tokens, asked.shapes, counts.tolist()))
        return [row if isinstance(row, RowRefusedError) else next(good) for row in asked.rows]

    def _finished(
        self, tokens: list[int] | RowRefusedError, shape: _Look, count: int
    ) -> list[int] | RowRefusedError:
        """Return a prompt with its one BOS, unless text of a user became a special token."""
        if isinstance(tokens, RowRefusedError):
            return tokens
        expected = self._neutral[shape]
        if expected is not None and count != expected:
            return _special_refused(count, expected)
        bos = self.bos_token_id
        if bos is not None and (tokens[:1] != [bos] or tokens[1:2] == [bos]):
            tokens[: _leading(tokens, bos)] = [bos]
        return tokens

    def _count_special(self, rows: Sequence[Sequence[int]]) -> "np.ndarray[Any, Any]":
        ends = np.cumsum([0, *map(len, rows)])
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(ends[-1]))
        sums = np.concatenate([[0], np.cumsum(self._is_special[flat])])
        counts: np.ndarray[Any, Any] = sums[ends[1:]] - sums[ends[:-1]]
        return counts

    def _short_enough(self, text: str, most_tokens: int) -> str:
        """Refuse a text whose beginning alone has too many tokens: all of it may take gigabytes."""
        sample = 16 * most_tokens + (1 << 16)
        if len(text) > sample:
            [tokens] = _all_at_once([text[:sample]], self._coder.encode)
            number = len(_or_raise(tokens))
            if number > 1.05 * most_tokens + 64:  # more: a cut may split what would be one token
                raise RowRefusedError(
                    "prompt_too_long", f"more than {number} tokens, at most {most_tokens} fit"
                )
        return text

    def _checked(self, messages: Conversation) -> list[Message]:
        self._check_messages(messages)
        return self._complete(messages)

    def _check_messages(self, messages: Conversation) -> None:
        if not messages:
            raise RowRefusedError("empty_prompt", "there is no message")
        size = _size(messages)
        if size > MOST_CHARACTERS:
            raise RowRefusedError(
                "prompt_too_long", f"{size} characters, {MOST_CHARACTERS} at most are rendered"
            )
        for message in messages:
            self._check_text(message["content"])

    def _complete(self, messages: Conversation) -> list[Message]:
        return complete(messages, self.system, self.prompt_suffix)

    def _check_text(self, text: str) -> None:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RowRefusedError("malformed_text", "a lone surrogate in the text") from None
        found = self._special.search(text)
        if found:
            raise RowRefusedError("special_token", f"{found.group()!r} stands in the text")


def complete(messages: Conversation, system: str | None, suffix: str) -> list[Message]:
    """Return a conversation with the recipe's system prompt and suffix."""
    found = list(messages)
    if system is not None and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    if suffix:
        found[-1] = {**found[-1], "content": found[-1]["content"] + suffix}
    return found


def _size(messages: Conversation) -> int:
    return sum([len(message["content"]) for message in messages])


def _shape(messages: Conversation) -> Shape:
    return tuple([(message["role"], bool(message["content"].strip())) for message in messages])


def _leading(tokens: Sequence[int], bos: int) -> int:
    return next((n for n, token in enumerate(tokens) if token != bos), len(tokens))


def _refused(rendered: Rendered) -> str | RowRefusedError:
    if isinstance(rendered, Failed):
        return RowRefusedError("template_error", rendered.why)
    return rendered


def _special_refused(found: int, expected: int) -> RowRefusedError:
    return RowRefusedError(
        "special_token", f"{found} special tokens, a neutral text has {expected}: one is the text's"
    )


def _parts(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Yield them in parts that are bounded in number and in text."""
    return _cut(conversations, _size)


def _bounded(texts: Sequence[str]) -> Iterator[list[str]]:
    return _cut(texts, len)


def _cut(values: Iterable[A], size_of: Callable[[A], int]) -> Iterator[list[A]]:
    part: list[A] = []
    size = 0
    for value in values:
        part.append(value)
        size += size_of(value)
        if len(part) >= PART_ROWS or size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _each(values: Iterable[A | RowRefusedError], do: Callable[[A], B]) -> list[B | RowRefusedError]:
    """Do something with every value that is not refused yet."""
    found: list[B | RowRefusedError] = []
    for value in values:
        try:
            found.append(value if isinstance(value, RowRefusedError) else do(value))
        except RowRefusedError as error:
            found.append(error)
    return found


def _all_at_once(
    texts: Sequence[str | RowRefusedError], encode: Callable[[Sequence[str]], list[list[int]]]
) -> list[list[int] | RowRefusedError]:
    """Encode what is not refused yet in one call; one by one where that fails."""

    def alone(text: str) -> list[int]:
        try:
            return encode([text])[0]
        except _SEEN_OF_TOKENIZERS as error:
            raise RowRefusedError("tokenizer_error", " ".join(str(error).split())[:200]) from error

    good = [text for text in texts if not isinstance(text, RowRefusedError)]
    try:
        tokens = iter([ids for part in _bounded(good) for ids in encode(part)])
    except _SEEN_OF_TOKENIZERS:
        return _each(texts, alone)
    return [text if isinstance(text, RowRefusedError) else next(tokens) for text in texts]


def _or_raise(value: A | RowRefusedError) -> A:
    if isinstance(value, RowRefusedError):
        raise value
    return value


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"


def chat_fingerprints(model_dir: Path | None, chat: ChatConfig) -> dict[str, str]:
    """Return hashes of all that decides how text becomes tokens; loads no tokenizer.

    - `template`: the template in force, the recipe's system prompt and its suffix.
    - `tokenizer`: the tokenizer's files, but for a template in them, and the EOS tokens of the
      model's configuration.

    Args:
        model_dir: None stands for a tokenizer that is made of the data, and leaves out its hash.

    Raises:
        InputError: the folder has several templates, and none is called default.
    """
    text, _ = template_in_force(model_dir, chat)
    # Jinja reads all line ends alike, and files are read with theirs made one.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    template = sha256_text(canonical_json([text, chat.system, chat.prompt_suffix]))
    if model_dir is None:
        return {"template": template}
    names = sorted({*TOKENIZER_FILES} - {TEMPLATE_FILE})
    files = {n: _tokenizer_hash(model_dir / n) for n in names if (model_dir / n).is_file()}
    tokenizer = sha256_text(canonical_json([files, sorted(_eos_of_model(model_dir))]))
    return {"template": template, "tokenizer": tokenizer}


def _tokenizer_hash(path: Path) -> str:
    if path.name != "tokenizer_config.json":
        return sha256_file(path)
    return sha256_text(canonical_json({**_read_json(path), "chat_template": None}))


def template_in_force(model_dir: Path | None, chat: ChatConfig) -> tuple[str, TemplateSource]:
    """Return the chat template and who gave it: the recipe, else the model, else nobody.

    Raises:
        InputError: the folder has several templates, and none is called default.
    """
    if chat.template == "plain":
        return PLAIN_TEMPLATE, "recipe"
    if chat.template is not None:
        return chat.template, "recipe"
    own = None if model_dir is None else _own_template(model_dir)
    return (PLAIN_TEMPLATE, "default") if own is None else (own, "model")


def _own_template(model_dir: Path) -> str | None:
    """Return what transformers takes for a folder's template; a file goes before the config."""
    if (model_dir / TEMPLATE_FILE).is_file():
        return (model_dir / TEMPLATE_FILE).read_text(encoding="utf-8")
    found: Any = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((model_dir / MORE_TEMPLATES).glob("*.jinja"))
    } or _read_json(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        if "default" not in found:
            raise InputError(
                f"{model_dir} has several chat templates ({', '.join(found)}) and none called "
                "default; put the one you mean into chat.template"
            )
        found = found["default"]
    return found if found is None else str(found)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a model's file; no file is an empty one.

    Raises:
        InputError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}); copy the model again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; copy the model again")
    return found


def _eos_of_model(model_dir: Path) -> set[int]:
    """Return the EOS tokens that the generation config names, or else the model's config."""
    eos = _read_json(model_dir / "generation_config.json").get("eos_token_id")
    if eos is None:
        config = _read_json(model_dir / "config.json")
        text = config.get("text_config")
        eos = config.get("eos_token_id") or (text or {}).get("eos_token_id")
    return set() if eos is None else {int(i) for i in (eos if isinstance(eos, list) else [eos])}


def make_renderer(model_dir: Path, chat: ChatConfig) -> Renderer:
    """Return the renderer for a model folder's tokenizer.

    Raises:
        InputError: the folder has no tokenizer, no end token, or several templates.
        ConfigError: the template is none, or is of no use: it fails on a plain question, goes past
            its limits, or leaves out what is said.
    """
    template, source = template_in_force(model_dir, chat)
    tokenizer = load_tokenizer(model_dir)
    if source == "default":
        _log.info("%s has no chat template: prompts are plain lines (chat.template)", model_dir)
    coder = TextCoder(tokenizer)
    page = Template(template, dict(tokenizer.special_tokens_map))
    prompt, whole = _probe(page, chat)
    before, _, tail = whole.partition(_ASSISTANT)
    end_token_id = _end_token(tokenizer, coder, tail, model_dir)
    eos = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    stop_token_ids = tuple(sorted({end_token_id, *eos, *_eos_of_model(model_dir)}))
    pad = tokenizer.pad_token_id
    bos_token_id, bos_origin = _bos(tokenizer, coder, prompt)
    return Renderer(
        tokenizer=tokenizer,
        template=template,
        template_source=source,
        system=chat.system,
        prompt_suffix=chat.prompt_suffix,
        stop_token_ids=stop_token_ids,
        end_token_id=end_token_id,
        pad_token_id=end_token_id if pad is None else pad,
        bos_token_id=bos_token_id,
        bos_origin=bos_origin,
        response_lead=before.removeprefix(prompt) if before.startswith(prompt) else "",
        fingerprints=chat_fingerprints(model_dir, chat),
        _special=_special_pattern(tokenizer, stop_token_ids),
        _is_special=_special_table(tokenizer, stop_token_ids),
        _coder=coder,
        _page=page,
    )


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of a model folder; never runs code from it.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((model_dir / name).exists() for name in names):
        raise InputError(
            f"{model_dir} has no tokenizer (no tokenizer.json); "
            "copy the tokenizer files of its base model there"
        )
    try:
        return AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{model_dir}: its tokenizer cannot be loaded ({reason})") from error


def _probe(page: Template, chat: ChatConfig) -> tuple[str, str]:
    """Return a question as it is asked, and the same one answered.

    Raises:
        ConfigError: the template cannot be used.
    """
    question = [{"role": "user", "content": _USER}]
    asked = _needed(page, question, "fails on a plain question", ask=True)
    if _USER not in asked:
        raise ConfigError("chat template leaves out the user's text; mend chat.template")
    answer = [*question, {"role": "assistant", "content": _ASSISTANT}]
    whole = _needed(page, answer, "fails on a plain answer", ask=False)
    if _ASSISTANT not in whole:
        raise ConfigError("chat template leaves out the assistant's text; mend chat.template")
    if chat.system is not None:
        completed = complete(question, chat.system, chat.prompt_suffix)
        told = _needed(page, completed, "refuses chat.system, leave it out", ask=True)
        if chat.system.strip() not in told:
            raise ConfigError(
                "chat template leaves out chat.system: it has no system prompts; put what you "
                "want to say into chat.prompt_suffix, or mend chat.template"
            )
    return asked, whole


def _needed(page: Template, messages: Conversation, problem: str, *, ask: bool) -> str:
    [text] = page.render([messages], ask=ask)
    if isinstance(text, Failed):
        raise ConfigError(f"chat template {problem}: {text.why}; mend or set chat.template")
    return text


def _bos(tokenizer: Any, coder: TextCoder, prompt: str) -> tuple[int | None, BosOrigin]:
    """Return the token that prompts begin with, if any, and who writes it.

    A tokenizer that has a BOS token and never writes it (GPT-2, Qwen) asks for none.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None, "none"
    adds = _leading(tokenizer(_USER)["input_ids"], bos)
    written = _leading(coder.encode([prompt])[0], bos)
    if not adds and not written:
        return None, "none"
    if not written:
        return int(bos), "tokenizer"
    return int(bos), "template" if written == 1 else "collapsed"


def _end_token(tokenizer: Any, coder: TextCoder, tail: str, model_dir: Path) -> int:
    """Return the token that the template puts after a response, else the EOS.

    It is the first special one, or where none is, the first that was added to the vocabulary.
    """
    [ids] = coder.encode([tail])
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if str(t).strip()}
    for kind in (_special_texts(tokenizer, ()).keys(), added):
        for token in ids:
            if token in kind:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{model_dir}: the tokenizer has no EOS token and the chat template none either; "
            "set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _special_texts(tokenizer: Any, stop_token_ids: Sequence[int]) -> dict[int, str]:
    """Return the tokens that only a template may write; an end of turn is one, whatever it says."""
    added = {
        int(i): str(t)
        for i, t in tokenizer.added_tokens_decoder.items()
        if t.special or i in stop_token_ids
    }
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | {int(i): str(t) for i, t in named}


def _special_pattern(tokenizer: Any, stop_token_ids: Sequence[int]) -> re.Pattern[str]:
    special = set(_special_texts(tokenizer, stop_token_ids).values())
    texts = sorted((t for t in special if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


def _special_table(
    tokenizer: Any, stop_token_ids: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    special = _special_texts(tokenizer, stop_token_ids).keys() - {tokenizer.unk_token_id}
    table = np.zeros(max([len(tokenizer), *special, *tokenizer.get_vocab().values()]) + 1, bool)
    table[list(special)] = True  # not the unknown token: odd characters of a user become it
    return table
