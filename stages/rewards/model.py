"""A reward model: a sequence classifier with one label, whose logit is the reward.

A conversation goes through the model's own chat template as a whole, the answer included.

Shape legend: B conversations of a batch, T tokens of the longest of them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from stages.config import ChatConfig, ModelRewardConfig
from stages.data.chat import Renderer, RowRefusedError, make_renderer
from stages.engines.prompts import model_room
from stages.engines.vllm import VllmScorer
from stages.errors import ConfigError, InputError
from stages.model.load import best_device
from stages.model.source import ModelSource
from stages.rewards.base import Question, Score, Scored, Unscored

WINDOW = 2048
"""Conversations that are sorted by length together."""


class Scorer(Protocol):
    """Makes logits of token ids."""

    def scores(self, rows: Sequence[list[int]]) -> Iterable[tuple[int, float]]:
        """Yield the number of a row and its logit, in any order; NaN where there is none."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


def open_model(config: ModelRewardConfig, source: ModelSource) -> "ModelReward":
    """Load the model.

    Raises:
        InputError: it is no sequence classifier with one label, or cannot be loaded.
        ConfigError: it has no chat template, or a setting of the engine is refused.
        CorruptError: it is an artifact whose bytes have changed.
    """
    folder = source.verified()
    if source.base is not None:
        raise InputError(f"reward.model.path={folder} is an adapter; merge it into its base")
    _check_classifier(folder)
    renderer = make_renderer(folder, ChatConfig(template=config.template))
    if renderer.template_source == "default":
        raise ConfigError(f"{folder} has no chat template; set reward.model.template")
    room = _room(folder, config.engine.max_model_len)
    scorer: Scorer
    if config.engine.name == "vllm":
        scorer = _VllmScorer(folder, config, room)
    else:
        scorer = TorchScorer(folder, config)
    return ModelReward(renderer, scorer, room)


class ModelReward:
    """See `Reward`."""

    def __init__(self, renderer: Renderer, scorer: Scorer, room: int) -> None:
        """Score conversations of at most `room` tokens."""
        self._renderer, self._scorer, self._room = renderer, scorer, room

    def score(self, questions: Iterable[Question]) -> Iterator[Scored]:
        """See `Reward.score`."""
        for window in _windows(questions):
            scores = iter(self._scores([one for q in window for one in _conversations(q)]))
            for question in window:
                yield Scored(tuple([next(scores) for _ in question.responses]))

    def close(self) -> None:
        """See `Reward.close`."""
        self._scorer.close()

    def _scores(self, conversations: Sequence[list[dict[str, str]]]) -> list[Score]:
        found: list[Score] = []
        rows: list[list[int]] = []
        places = []
        for number, tokens in enumerate(
            self._renderer.prompts_tokens(conversations, self._room, ask=False)
        ):
            if isinstance(tokens, RowRefusedError):
                found.append(Unscored("refused", str(tokens)))
            elif not 0 < len(tokens) <= self._room:
                most = f"the reward model takes 1 to {self._room}"
                found.append(Unscored("refused", f"it has {len(tokens)} tokens, {most}"))
            else:
                found.append(math.nan)
                rows.append(tokens)
                places.append(number)
        for row, logit in self._scorer.scores(rows):
            is_finite = math.isfinite(logit)
            why = Unscored("failed", "the reward model's logit is not finite")
            found[places[row]] = logit if is_finite else why
        return found


class TorchScorer:
    """See `Scorer`: transformers, on the current CUDA device where there is one."""

    def __init__(self, folder: Path, config: ModelRewardConfig) -> None:
        """Load the model.

        Raises:
            InputError: it cannot be loaded, or lacks weights.
            ConfigError: settings that this engine does not have.
        """
        if config.engine.processes > 1 or config.engine.gpus is not None:
            raise ConfigError(
                "reward.model.engine: transformers scores in one process; leave processes and "
                "gpus out, or set reward.model.engine.name=vllm"
            )
        self._device = best_device()
        dtype = config.engine.dtype
        if dtype == "auto":
            dtype = "bfloat16" if self._device.type == "cuda" else "float32"
        self._model = _load(folder, getattr(torch, dtype)).to(self._device)
        self._most_tokens, self._most_rows = config.token_budget, config.engine.batch_size
        self._own_pad = self._model.config.get_text_config().pad_token_id

    def scores(self, rows: Sequence[list[int]]) -> Iterator[tuple[int, float]]:
        """See `Scorer.scores`.

        Raises:
            ConfigError: the GPU's memory does not hold a batch.
        """
        for batch in self._batches(rows):
            try:
                logits = self._logits([rows[number] for number in batch])
            except torch.cuda.OutOfMemoryError:
                raise ConfigError(
                    f"reward model: {len(batch)} conversations of {len(rows[batch[0]])} tokens do "
                    "not fit into the GPU's memory; lower reward.model.token_budget"
                ) from None
            yield from zip(batch, logits, strict=True)

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[list[int]]:
        """Yield numbers of rows of like length, longest first, within the budget of tokens."""
        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: (-len(rows[number]), number)):
            longest = len(rows[batch[0]]) if batch else 0
            if batch and (
                (len(batch) + 1) * longest > self._most_tokens or len(batch) >= self._most_rows
            ):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _logits(self, rows: Sequence[list[int]]) -> list[float]:
        text_config = self._model.config.get_text_config()
        pad = self._own_pad
        if pad is None and len(rows) > 1:
            pad = _absent(rows, text_config.vocab_size)
            if pad is None:
                return [self._logits([row])[0] for row in rows]
        # transformers scores at the last token that is not this one, of a lone row at the last.
        text_config.pad_token_id = pad
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        lengths_B = torch.tensor(list(map(len, rows)))
        mask_BT = (torch.arange(longest) < lengths_B[:, None]).long()
        with torch.inference_mode():
            logits_B1 = self._model(
                input_ids=ids_BT.to(self._device), attention_mask=mask_BT.to(self._device)
            ).logits
        found: list[float] = logits_B1.float().squeeze(-1).tolist()
        return found


class _VllmScorer:
    """See `Scorer`: vLLM, in a process of its own."""

    def __init__(self, folder: Path, config: ModelRewardConfig, room: int) -> None:
        self._engine = VllmScorer(folder, config.engine, max_model_len=room)
        text_config = _config(folder).get_text_config()
        self._pad = getattr(text_config, "pad_token_id", None)

    def scores(self, rows: Sequence[list[int]]) -> Iterator[tuple[int, float]]:
        """See `Scorer.scores`."""
        return self._engine.scores(self._without_padding(row) for row in rows)

    def close(self) -> None:
        """End the process."""
        self._engine.close()

    def _without_padding(self, row: list[int]) -> list[int]:
        """Leave out what transformers takes for padding where a template ends with that token."""
        end = len(row)
        while end > 1 and row[end - 1] == self._pad:
            end -= 1
        return row[:end]


def _absent(rows: Sequence[list[int]], vocab_size: int) -> int | None:
    """Return a token of the vocabulary that is in none of the rows, if there is one."""
    there = {token for row in rows for token in row}
    return next((token for token in range(vocab_size) if token not in there), None)


def _windows(questions: Iterable[Question]) -> Iterator[list[Question]]:
    window: list[Question] = []
    size = 0
    for question in questions:
        window.append(question)
        size += len(question.responses)
        if size >= WINDOW:
            yield window
            window, size = [], 0
    if window:
        yield window


def _conversations(question: Question) -> Iterator[list[dict[str, str]]]:
    for response in question.responses:
        yield [*map(dict, question.messages), {"role": "assistant", "content": response}]


def _room(folder: Path, limit: int | None) -> int:
    positions = model_room(folder, None, 0)
    if limit is not None and limit > positions:
        raise ConfigError(
            f"reward.model.engine.max_model_len={limit}: the model has {positions} positions; "
            "lower it, or leave it out"
        )
    return limit or positions


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _check_classifier(folder: Path) -> None:
    try:
        config = _config(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(folder, error) from error
    names = config.architectures or ["of no architecture"]
    if not names[0].endswith("ForSequenceClassification") or config.num_labels != 1:
        raise InputError(
            f"reward.model.path={folder} is {names[0]} with {config.num_labels} labels; a reward "
            "model is a sequence classifier with one label: name another"
        )


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # ours is the one bar
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _refusal(folder, error) from error
    if missing := sorted(told["missing_keys"]):  # the library would make them up
        raise InputError(
            f"reward.model.path={folder} lacks the weights {', '.join(missing[:3])}; name a model "
            "that was trained to give rewards"
        )
    model.config.use_cache = False
    return model.eval()


def _refusal(folder: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"reward.model.path={folder} cannot be loaded: {reason}")
