"""Which prompts can be asked: rendered, not blank, and with room left for a whole answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.data.chat import Renderer, RowRefusedError
from stages.errors import InputError

NO_LIMIT = 1 << 30  # positions, for models that have no limit


def model_room(model_dir: Path, max_model_len: int | None, max_new_tokens: int) -> int:
    """Return the most tokens that a prompt and its answer may have together.

    Args:
        max_model_len: the recipe's own limit, if any.

    Raises:
        InputError: an answer of `max_new_tokens` leaves no room for a prompt.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model_dir, trust_remote_code=False, local_files_only=True
    ).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    room = int(min(positions, max_model_len or positions))
    if room <= max_new_tokens:
        raise InputError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: {model_dir.name} is "
            f"run with {room} positions; lower it"
        )
    return room


def askable_tokens(
    messages: Sequence[Mapping[str, str]], renderer: Renderer, limit: int
) -> list[int]:
    """Return a prompt's tokens.

    Args:
        limit: the most tokens that it may have.

    Raises:
        RowRefusedError: it cannot be asked.
    """
    if not messages or not messages[-1]["content"].strip():
        raise RowRefusedError("empty_prompt", "only white space in its last message")
    try:
        tokens = renderer.prompt_tokens(messages)
    except (TypeError, ValueError, OverflowError) as error:  # seen on hostile text
        raise RowRefusedError("tokenizer_error", " ".join(str(error).split())[:200]) from error
    if not tokens:
        raise RowRefusedError("empty_prompt", "it renders to no token")
    if len(tokens) > limit:
        raise RowRefusedError("prompt_too_long", f"{len(tokens)} tokens, at most {limit} fit")
    return tokens
