"""The one renderer of prompts: messages to tokens, and tokens back to text.

Generation, pairing and evaluation all go through `Renderer`, so that the text a model is trained
on is the text it was asked with: same template, same BOS, same end token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts.keys import canonical_json, sha256_file, sha256_text
from stages.config import ChatConfig
from stages.errors import ConfigError, InputError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
"""Every message on a line of its own, assistant messages closed by the end token."""

_PROBE = "spin⟂probe"

Message = Mapping[str, str]


class RowRefusedError(Exception):
    """One row cannot be rendered; the stage drops it with `reason` and goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to where the response begins.

        Raises:
            RowRefusedError: the text is no valid Unicode, holds one of the tokenizer's special
                tokens, or the template refuses the roles.
        """
        for message in messages:
            self._check_text(message["content"])
        return self._encode(self.prompt_text(messages))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return the rendered text whose tokens `prompt_tokens` returns."""
        try:
            text = self.tokenizer.apply_chat_template(
                self._complete(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # jinja raises whatever a template's author chose
            raise RowRefusedError("template_error", " ".join(str(error).split())) from error
        assert isinstance(text, str), "a template renders text"
        return text

    def response_tokens(self, text: str) -> list[int]:
        """Return the token ids of a response text, closed by exactly one end token.

        Raises:
            RowRefusedError: as `prompt_tokens`.
        """
        self._check_text(text)
        return [*self._encode(self.response_lead + text), self.end_token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of response tokens, without the stop token at the end."""
        kept = list(token_ids)
        if kept and kept[-1] in self.stop_token_ids:
            kept.pop()
        text = self.tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one text"
        return text.removeprefix(self.response_lead)

    def _complete(self, messages: Sequence[Message]) -> list[Message]:
        complete = [dict(m) for m in messages]
        if self.system is not None and (not complete or complete[0]["role"] != "system"):
            complete.insert(0, {"role": "system", "content": self.system})
        if self.prompt_suffix:
            complete[-1]["content"] += self.prompt_suffix
        return list(complete)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_text(self, text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowRefusedError("malformed_text", "a lone surrogate in the text") from None
        found = self._special.search(text)
        if found:
            raise RowRefusedError("special_token", f"{found.group()!r} stands in the text")


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
