"""What lm-evaluation-harness found, as measures and examples of ours; see `lm_eval`."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.artifacts.tables import Row
from stages.config.suites import LEADERBOARD
from stages.data.measures import Measure
from stages.data.rows import SUITE_EXAMPLES

HEADLINES = {
    "arc_challenge": (25, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
}
"""The Open LLM Leaderboard's first version: examples before each question, and what counts. MMLU is
its 57 tasks, each question counting alike, as the library's own group has it."""
AVERAGE = f"{LEADERBOARD}.average"
_HASH_CHARS = 12

Scores = dict[tuple[str, str], dict[str, float]]
"""From a task and one of the library's metrics, such as `acc,none`, to each document's score."""
Part = tuple[str, Mapping[str, float], float]
"""A task, its documents' scores, and the weight of each."""


@dataclass(frozen=True)
class Found:
    """The library's results, and the score of each document."""

    metrics: Mapping[str, Mapping[str, float | None]]
    """From a task or group to its metrics, by the library's names, such as `acc,none`."""
    groups: Mapping[str, Mapping[str, Any]]
    scores: Scores

    @classmethod
    def of(cls, results: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> "Found":
        """Take apart what the library returned.

        Of scores only those are kept whose mean is the library's metric.
        """
        scores: Scores = defaultdict(dict)
        for sample in samples:
            for metric, value in sample["metrics"].items():
                if value is not None and metric in results["means"][sample["task"]]:
                    key = f"{metric},{sample['filter']}"
                    scores[sample["task"], key][_id(sample)] = float(value)
        kept = {
            (task, key): values
            for (task, key), values in scores.items()
            if _same(results["metrics"][task].get(key), _mean(values.values()))
        }
        return cls(results["metrics"], results["groups"], kept)

    def of_tasks(self) -> Iterator[Measure]:
        """Yield each document's scores."""
        for (task, key), values in self.scores.items():
            yield from _measures(_name(task, key), [(task, values, 1.0)])

    def of_groups(self) -> Iterator[Measure]:
        """Yield those scores again whose weighted mean is a metric of a group."""
        for group, about in self.groups.items():
            for key, value in self.metrics.get(group, {}).items():
                weighted = self._weighted(about, key)
                if weighted and _same(value, _weighted_mean(weighted)):
                    yield from _measures(_name(group, key), weighted)

    def average(self) -> Iterator[Measure]:
        """Yield the six headlines' scores, each task weighing as much as all of another one.

        Nothing where one of them has no scores, or where they are not what the library's own figure
        is made of, such as a part of MMLU's tasks.
        """
        parts: list[Part] = []
        for name, (_, key) in HEADLINES.items():
            alone = {"tasks": [name], "by_task": [key.partition(",")[0]], "by_document": []}
            own = self._weighted(self.groups.get(name, alone), key)
            if not own or not _same(self.metrics[name].get(key), _weighted_mean(own)):
                return
            total = math.fsum(weight * len(values) for _, values, weight in own)
            parts += [(task, values, weight / total) for task, values, weight in own]
        yield from _measures(AVERAGE, parts)

    def exact(self, measures: Iterable[Measure]) -> dict[str, float | None]:
        """Return the library's metrics, with the standard errors of those that are not measured."""
        measured = {measure.metric for measure in measures}
        found = {}
        for task, values in self.metrics.items():
            for key, value in values.items():
                metric, _, rule = key.partition(",")
                plain = metric.removesuffix("_stderr")
                is_error = plain != metric
                if not is_error or _name(task, f"{plain},{rule}") not in measured:
                    found[_name(task, key)] = value
        return found

    def headline(self, task: str) -> str | None:
        """Return the metric of a task that its examples tell: the first with scores."""
        if task in HEADLINES and (task, HEADLINES[task][1]) in self.scores:
            return HEADLINES[task][1]
        return next((key for key in self.metrics[task] if (task, key) in self.scores), None)

    def rows(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
        """Yield the rows of SUITE_EXAMPLES: of each document's answers, those to the headline."""
        seen: dict[str, str] = {}
        for sample in samples:
            task, key = sample["task"], self.headline(sample["task"])
            rule = key.partition(",")[2] if key else seen.setdefault(task, sample["filter"])
            if sample["filter"] != rule:
                continue
            scores = self.scores[task, key] if key else {}
            for number, response in enumerate(sample["responses"] or [None]):
                yield dict.fromkeys(SUITE_EXAMPLES.names) | {
                    "prompt_id": _id(sample),
                    "task": task,
                    "sample": number if sample["drawn"] or number else -1,
                    "prompt": _valid(sample["prompt"]),
                    "human": _valid(sample["target"]),
                    "response": _valid(response),
                    "score": scores.get(_id(sample)),
                    "scored_by": _short(key) if key else None,
                }

    def _weighted(self, about: Mapping[str, Any], key: str) -> list[Part]:
        """Return what a metric of a group, `about` which is told, is the weighted mean of."""
        metric = key.partition(",")[0]
        by_task = metric in about["by_task"]
        if not by_task and metric not in about["by_document"]:
            return []
        tasks = [
            (name, self.scores[name, key]) for name in about["tasks"] if (name, key) in self.scores
        ]
        return [(name, values, 1 / len(values) if by_task else 1.0) for name, values in tasks]


def _measures(metric: str, parts: Iterable[Part]) -> Iterator[Measure]:
    for task, values, weight in parts:
        for document, value in sorted(values.items()):
            yield Measure(f"{task}/{document}", metric, value, weight)


def _id(sample: Mapping[str, Any]) -> str:
    """Return a document's number and hash: with other documents nothing is paired."""
    return f"{sample['document']:06}-{sample['hash'][:_HASH_CHARS]}"


def _name(task: str, key: str) -> str:
    return f"{task}.{_short(key)}"


def _short(key: str) -> str:
    metric, _, rule = key.partition(",")
    return metric if rule in ("none", "") else f"{metric}.{rule}"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _weighted_mean(parts: Sequence[Part]) -> float:
    total = math.fsum(weight * len(values) for _, values, weight in parts)
    return math.fsum(weight * math.fsum(values.values()) for _, values, weight in parts) / total


def _same(value: float | None, mean: float) -> bool:
    return value is not None and math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12)


def _valid(text: str | None) -> str | None:
    """Return a text that a table can hold: without lone surrogates."""
    return None if text is None else text.encode("utf-8", "replace").decode()
