"""Evaluations made by hand: real artifacts whose answers and measures a test decides."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, open_artifact, produce
from stages.artifacts.manifest import InputRef
from stages.config import ChatConfig
from stages.data.chat import make_renderer
from stages.data.measures import Measure, write_measures
from stages.data.rows import EXAMPLES, PROMPTS
from stages.engines.base import Completion, Engine, Request, Sampling


def prompt_id(number: int) -> str:
    return f"{number:032x}"


def make_data(place: Path, humans: Mapping[int, str]) -> Path:
    """Held-out prompts by number with their human answers."""

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("heldout-00000.parquet"), PROMPTS) as table:
            for number, human in sorted(humans.items()):
                messages = [{"role": "user", "content": f"Question {number}?"}]
                row = {"prompt_id": prompt_id(number), "messages": messages}
                table.append(row | {"response": human, "source": "x", "source_row": number})
        return Outcome(counts={})

    produce(place, Plan("prepare", 1, {"humans": sorted(humans.items())}, {}), fill)
    return place


def outside(key: str) -> InputRef:
    """An input that is no artifact of the run, such as a model."""
    return InputRef(path=key, inside_run=False, key=key, content=key)


def make_evaluation(
    place: Path,
    model: str,
    measures: Iterable[Measure] = (),
    *,
    answers: Mapping[int, tuple[str, str | None]] | None = None,
    inputs: Mapping[str, InputRef] | None = None,
    config: Mapping[str, Any] | None = None,
    stage: str = "evaluate",
    fingerprints: Mapping[str, str] | None = None,
    others: Mapping[str, float | None] | None = None,
) -> Path:
    """An evaluation of the model with the key `model`.

    Args:
        answers: by number of the prompt, sampled and greedy.
        inputs: beside the model.
    """

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("examples.parquet"), EXAMPLES) as table:
            for number, (sampled, greedy) in sorted((answers or {}).items()):
                table.append(_row(number, sampled, greedy))
        metrics = write_measures(space, measures, others or {})
        return Outcome(counts={}, metrics=metrics)

    refs = {"data": outside("data"), "model": outside(model), **(inputs or {})}
    settings = {"seed": 0} if config is None else config
    produce(place, Plan(stage, 3, settings, refs, fingerprints or {}), fill)
    return place


def _row(number: int, sampled: str, greedy: str | None) -> dict[str, Any]:
    return dict.fromkeys(EXAMPLES.names) | {
        "prompt_id": prompt_id(number),
        "human": "h",
        "sampled": sampled,
        "sampled_seed": 0,
        "sampled_finish_reason": "stop",
        "sampled_token_ids": [1],
        "sampled_logprob": -1.0,
        "greedy": greedy,
        "human_logprob": -1.0,
        "human_token_ids": [1],
    }


class Replies:
    """An engine that answers with the text that a test gives for a request's id."""

    def __init__(self, model: Path, text: Callable[[str], str]) -> None:
        self._renderer, self._text = make_renderer(model, ChatConfig()), text
        self.asked: dict[str, tuple[str, Sampling]] = {}
        """By request id: the prompt as a text, and how it was to be answered."""
        self.opened = 0

    def open(self, config: Any, model_dir: Path, **limits: int) -> Engine:
        self.opened += 1
        self.config = config
        self.limits = limits
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            [prompt] = self._renderer.texts([request.prompt_token_ids])
            self.asked[request.request_id] = (prompt, sampling)
            tokens = self._renderer.response_tokens(self._text(request.request_id))
            assert (
                len(request.prompt_token_ids) + sampling.max_new_tokens
                <= (self.limits["max_model_len"])
            )
            yield Completion(request.request_id, tokens, [-1.0] * len(tokens), "stop")

    def close(self) -> None:
        pass


def rates(place: Path) -> dict[str, Any]:
    """The metrics of an artifact."""
    return dict(open_artifact(place).manifest.metrics)


def counts(manifest: Manifest) -> dict[str, int]:
    return dict(manifest.counts)


def column(metric: str, values: Sequence[float], start: int = 0) -> list[Measure]:
    """A metric of prompts by number."""
    return [Measure(prompt_id(start + i), metric, float(v)) for i, v in enumerate(values)]
