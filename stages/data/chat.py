"""The one renderer of prompts: messages to tokens, and tokens back to text.

Generation, pairing and evaluation all go through `Renderer`, so that the text a model is trained
on is the text it was asked with: same template, same BOS, same end token.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stages.artifacts.keys import canonical_json, sha256_file, sha256_text
from stages.config import ChatConfig
from stages.errors import ConfigError, InputError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""Every message on a line of its own, assistant messages closed by the end token."""

PART_ROWS = 1024
PART_CHARACTERS = 1 << 20  # tokenizers keep some 100 bytes a character while they work

_PROBE = "spin⟂probe"
_SEEN_OF_TOKENIZERS = (TypeError, ValueError, OverflowError)  # on hostile text

Message = Mapping[str, str]
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


@dataclass(frozen=True)
class Renderer:
    """Renders for one tokenizer and one template; make it with `make_renderer`."""

    tokenizer: Any
    template: str
    system: str | None
    prompt_suffix: str
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response: the template's end of turn, and the model's own EOS tokens."""
    end_token_id: int
    """The token that a human response is closed with."""
    pad_token_id: int
    response_lead: str
    """Text that the template puts between the generation prompt and the response's own text."""
    fingerprint: str
    """See `chat_fingerprint`."""
    _special: re.Pattern[str]
    _backend: TextCoder

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to where the response begins.

        Raises:
            RowRefusedError: the text is no valid Unicode, holds one of the tokenizer's special
                tokens, the template refuses the roles, or the tokenizer fails.
        """
        return _or_raise(self.prompts_tokens([messages])[0])

    def prompts_tokens(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[list[int] | RowRefusedError]:
        """Return the token ids of many conversations, or why one is refused; see `prompt_tokens`.

        What a row gives does not depend on the rows beside it.
        """
        found: list[list[int] | RowRefusedError] = []
        for part in _parts(conversations):
            checked = _each(part, self._completed)
            texts = _each(checked, self._render)
            found += _all_at_once(texts, self._encode_all)
        return found

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return the rendered text whose tokens `prompt_tokens` returns.

        Raises:
            RowRefusedError: as `prompt_tokens`.
        """
        return self._render(self._completed(messages))

    def response_tokens(self, text: str) -> list[int]:
        """Return the token ids of a response text, closed by exactly one end token.

        Raises:
            RowRefusedError: as `prompt_tokens`.
        """
        self._check_text(text)
        [tokens] = _all_at_once([self.response_lead + text], self._encode_all)
        return [*_or_raise(tokens), self.end_token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of response tokens, without the stop token at the end."""
        return self.texts([token_ids])[0]

    def texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of many responses; see `text`."""
        stops = frozenset(self.stop_token_ids)
        kept = [list(ids[:-1] if ids and ids[-1] in stops else ids) for ids in token_ids]
        found = self._backend.decode(kept)
        return [text.removeprefix(self.response_lead) for text in found]

    def _completed(self, messages: Sequence[Message]) -> list[Message]:
        for message in messages:
            self._check_text(message["content"])
        complete = [dict(m) for m in messages]
        if self.system is not None and (not complete or complete[0]["role"] != "system"):
            complete.insert(0, {"role": "system", "content": self.system})
        if self.prompt_suffix:
            complete[-1]["content"] += self.prompt_suffix
        return list(complete)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # jinja raises whatever a template's author chose
            raise RowRefusedError("template_error", " ".join(str(error).split())) from error
        assert isinstance(text, str), "a template renders text"
        return text

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(texts)

    def _check_text(self, text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowRefusedError("malformed_text", "a lone surrogate in the text") from None
        found = self._special.search(text)
        if found:
            raise RowRefusedError("special_token", f"{found.group()!r} stands in the text")


def _parts(conversations: Sequence[Sequence[Message]]) -> Iterator[list[Sequence[Message]]]:
    """Yield them in parts that are bounded in number and in text."""
    part: list[Sequence[Message]] = []
    size = 0
    for messages in conversations:
        part.append(messages)
        size += sum(len(message["content"]) for message in messages)
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
        tokens = iter(encode(good))
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


def chat_fingerprint(model_dir: Path, chat: ChatConfig) -> str:
    """Return a hash of all that decides how text becomes tokens; loads no tokenizer.

    It covers the tokenizer's files, the generation config (for its stop tokens), and the chat
    settings.
    """
    names = (*TOKENIZER_FILES, "generation_config.json")
    files = {n: sha256_file(model_dir / n) for n in names if (model_dir / n).is_file()}
    return sha256_text(canonical_json([files, chat.identity()]))


def make_renderer(model_dir: Path, chat: ChatConfig) -> Renderer:
    """Return the renderer for a model folder's tokenizer.

    Raises:
        InputError: the folder has no tokenizer, no end token, or no chat template where the
            recipe gives none.
        ConfigError: the recipe's template is no valid template.
    """
    tokenizer = load_tokenizer(model_dir)
    template = _template(tokenizer, model_dir, chat)
    lead, tail = _around_response(tokenizer, template)
    end_token_id = _end_token(tokenizer, tail, model_dir)
    stop_token_ids = tuple(sorted({end_token_id, *_eos_of_model(model_dir, tokenizer)}))
    pad = tokenizer.pad_token_id
    return Renderer(
        tokenizer=tokenizer,
        template=template,
        system=chat.system,
        prompt_suffix=chat.prompt_suffix,
        stop_token_ids=stop_token_ids,
        end_token_id=end_token_id,
        pad_token_id=end_token_id if pad is None else pad,
        response_lead=lead,
        fingerprint=chat_fingerprint(model_dir, chat),
        _special=_special_pattern(tokenizer),
        _backend=TextCoder(tokenizer),
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


def _template(tokenizer: Any, model_dir: Path, chat: ChatConfig) -> str:
    if chat.template == "plain":
        return PLAIN_TEMPLATE
    template = chat.template or tokenizer.chat_template
    if template is None:
        raise InputError(
            f"{model_dir} has no chat template and the recipe gives none; "
            "set chat.template to `plain` or to a Jinja template"
        )
    if not isinstance(template, str):
        raise InputError(
            f"{model_dir} has several chat templates ({', '.join(template)}); "
            "put the one you mean into chat.template"
        )
    return template


def _around_response(tokenizer: Any, template: str) -> tuple[str, str]:
    """Return what the template writes right before and right after a response's own text."""
    question = [{"role": "user", "content": "?"}]
    answer = [*question, {"role": "assistant", "content": _PROBE}]
    try:
        prompt = tokenizer.apply_chat_template(
            question, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(answer, chat_template=template, tokenize=False)
    except Exception as error:  # jinja raises whatever a template's author chose
        reason = " ".join(str(error).split())
        raise ConfigError(f"chat template fails on a plain question: {reason}") from error
    before, found, tail = whole.partition(_PROBE)
    if not found:
        raise ConfigError("chat template leaves out the assistant's text; mend chat.template")
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return lead, tail


def _end_token(tokenizer: Any, tail: str, model_dir: Path) -> int:
    """Return the first special token that the template puts after a response, else the EOS."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    end = next((i for i in ids if i in special), tokenizer.eos_token_id)
    if end is None:
        raise InputError(
            f"{model_dir}: the tokenizer has no EOS token and the chat template none either; "
            "set eos_token in tokenizer_config.json"
        )
    return int(end)


def _eos_of_model(model_dir: Path, tokenizer: Any) -> set[int]:
    from transformers import GenerationConfig

    found = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (model_dir / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(model_dir, local_files_only=True).eos_token_id
        found |= set(eos) if isinstance(eos, list) else {eos} - {None}
    return {int(i) for i in found}


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    special = {str(t) for t in added if t.special} | set(tokenizer.all_special_tokens)
    texts = sorted((t for t in special if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")
