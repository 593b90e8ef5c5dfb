"""Which prompts can be asked: rendered, not blank, and with room left for a whole answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.data.chat import Message, Renderer, RowRefusedError
from stages.errors import ConfigError

NO_LIMIT = 1 << 30  # positions, for models that have no limit


def model_room(
    model_dir: Path, max_model_len: int | None, max_new_tokens: int, section: str = "generate"
) -> int:
    """Return the most tokens that a prompt and its answer may have together.

    Args:
        max_model_len: the recipe's own limit, if any.
        section: the part of the recipe that `max_new_tokens` stands in.

    Raises:
        ConfigError: an answer of `max_new_tokens` leaves no room for a prompt; or the model has
            fewer positions than the recipe's limit.
    """
    return room_of(
        model_dir.name, model_positions(model_dir), max_model_len, max_new_tokens, section
    )


def model_positions(model_dir: Path) -> int:
    """Return how many positions a model folder's config names; NO_LIMIT where it names none."""
    return int(getattr(_config(model_dir), "max_position_embeddings", None) or NO_LIMIT)


def room_of(
    model: str, positions: int, max_model_len: int | None, max_new_tokens: int, section: str
) -> int:
    """Return what `model_room` does, of a model with so many positions.

    Raises:
        ConfigError: see `model_room`.
    """
    if max_model_len is not None and max_model_len > positions:
        raise ConfigError(
            f"generate.engine.max_model_len={max_model_len}: {model} has {positions} "
            "positions; lower it, or leave it out"
        )
    if max_model_len is not None and max_model_len <= max_new_tokens:
        raise ConfigError(
            f"generate.engine.max_model_len={max_model_len} leaves no room for a prompt beside "
            f"{section}.max_new_tokens={max_new_tokens}; raise the one, or lower the other"
        )
    if positions <= max_new_tokens:
        raise ConfigError(
            f"{section}.max_new_tokens={max_new_tokens} leaves no room for a prompt: {model} is "
            f"run with {positions} positions; lower it"
        )
    return min(positions, max_model_len or positions)


def model_vocab_size(model_dir: Path) -> int | None:
    """Return how many tokens the model knows, or None where its config does not tell."""
    size = getattr(_config(model_dir), "vocab_size", None)
    return None if size is None else int(size)


def _config(model_dir: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model_dir, trust_remote_code=False, local_files_only=True
    ).get_text_config()


def askable_tokens(
    messages: Sequence[Message], renderer: Renderer, limit: int, vocab_size: int | None = None
) -> list[int]:
    """Return one prompt's tokens; see `askable_batch`.

    Raises:
        RowRefusedError: it cannot be asked.
    """
    [found] = askable_batch([messages], renderer, limit, vocab_size)
    if isinstance(found, RowRefusedError):
        raise found
    return found


def askable_batch(
    conversations: Sequence[Sequence[Message]],
    renderer: Renderer,
    limit: int,
    vocab_size: int | None = None,
) -> list[list[int] | RowRefusedError]:
    """Return every prompt's tokens, or why it cannot be asked.

    Args:
        limit: the most tokens that a prompt may have.
        vocab_size: how many tokens the model knows; None leaves ids unchecked.
    """
    blank = [not messages or not messages[-1]["content"].strip() for messages in conversations]
    asked = [messages for messages, is_blank in zip(conversations, blank, strict=True)
             if not is_blank]  # fmt: skip
    rendered = iter(renderer.prompts_tokens(asked, limit))
    if vocab_size is not None and renderer.num_ids <= vocab_size:
        vocab_size = None  # as almost always: no row needs to be looked at
    return [
        RowRefusedError("empty_prompt", "only white space in its last message")
        if is_blank
        else _checked(next(rendered), limit, vocab_size)
        for is_blank in blank
    ]


def _checked(
    tokens: list[int] | RowRefusedError, limit: int, vocab_size: int | None
) -> list[int] | RowRefusedError:
    if isinstance(tokens, RowRefusedError):
        return tokens
    if not tokens:
        return RowRefusedError("empty_prompt", "it renders to no token")
    if len(tokens) > limit:
        return RowRefusedError("prompt_too_long", f"{len(tokens)} tokens, at most {limit} fit")
    if vocab_size is not None and max(tokens) >= vocab_size:
        return RowRefusedError(
            "token_out_of_vocabulary", f"token {max(tokens)}, the model knows {vocab_size}"
        )
    return tokens
