"""compare: several models side by side by what their evaluations measured, paired by example.

Nothing is measured anew. Intervals of differences are those of examples that both models have, so
that what makes an example easy or hard for both does not widen them.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stages.artifacts import Artifact, Manifest, open_artifact
from stages.artifacts.json_file import read_object
from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import read_pointer
from stages.config.suites import MAIN_EVALUATION
from stages.data.alike import OF_BETA, draws, share_beta, way
from stages.data.measures import INTERVALS_FILE, METRICS_FILE, Column, read_measures
from stages.data.paired import Paired
from stages.data.paired import compare as compare_columns
from stages.errors import ConfigError, InputError, choices
from stages.headlines import rival_input, rival_of
from stages.layout import RunLayout
from stages.lineage import flat
from stages.subjects import START, find_subject

EVALUATION = MAIN_EVALUATION
"""What the main evaluation is called among the suites."""
_BETTER_HIGHER = re.compile(
    r"^(\w+_)?accuracy$|^(length_controlled_)?win_rate(_|$)|^score(_|$)|^pass@|^majority@"
    r"|^mean_reward$|^human_logprob_per_token$|^sampled_gain$"
)
_BETTER_LOWER = re.compile(r"^(sampled_|greedy_)?(cut_off|empty|unscored|unasked)_share$")
_TASK_BETTER_HIGHER = re.compile(
    r"^(acc(_norm|_bytes|_mutual_info)?|exact_match|em|f1|mc[12]|mcc|bleu|chrf|rouge\w*|average)$"
)
"""Of lm-evaluation-harness: the metric's own name, for tasks are called anything."""
_TASK_BETTER_LOWER = re.compile(r"^(\w*perplexity|bits_per_byte|brier_score|ter)$")
_OF_THE_GAME = re.compile(r"^(heldout|opponent)_")
"""Metrics that say how two players stand to each other, and nothing of either's quality."""
_OF_BOTH_SIDES = re.compile(
    r"win_rate|^tie_share$|^identical_share$|^other_|^position_flip_share$|^(heldout|opponent)_"
    r"|^sampled_gain$"
)
"""Metrics that depend on whom a model was compared with."""
Rise = Literal["better", "worse", "higher"]
_OPPOSITE = {"better": "worse", "worse": "better", "higher": "lower"}
_log = logging.getLogger("spin")


@dataclass(frozen=True)
class Model:
    """One column of the comparison."""

    name: str
    """As the user gave it; of the iterations of a run, RUN:N."""
    evaluations: Mapping[str, Path]
    """From EVALUATION, or a suite's name, to the artifact."""


@dataclass(frozen=True)
class Value:
    """A metric of one model."""

    value: float | None
    low: float | None
    """Of the 95% interval; None where the metric is no mean over examples, or all agree."""
    high: float | None
    examples: int | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Difference:
    """A metric of one model against the base's."""

    metric: str
    model: int
    """Its place among the models."""
    base: int
    paired: Paired
    """Its gain is the model's value minus the base's, whichever is better."""
    p_value: float
    """Two-sided, of no difference."""
    verdict: str
    """`better`, `worse`; `higher`, `lower` of metrics that are neither; `open` where there is no
    interval, it holds 0, or the p value does not rule out chance; `same` where no example
    differs."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        found = self.paired.figures()
        for name in ("above", "p_value"):
            del found[name]
        return {
            "metric": self.metric, "model": self.model, "base": self.base, **found,
            "p_value": self.p_value, "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class SuiteTable:
    """All models by one suite."""

    suite: str
    values: Mapping[str, Sequence[Value | None]]
    """By metric, of every model; None where it has no such metric."""
    differences: Sequence[Difference]
    """Against the first model that has this suite."""
    unpaired: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """{metric, model, base, why}: metrics that both have and that do not compare."""
    rivals: Sequence[str | None] = ()
    """Whom each model was compared with, as its manifest names it; None where with nobody."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "values": {
                metric: [value and value.to_json() for value in values]
                for metric, values in self.values.items()
            },
            "differences": [one.to_json() for one in self.differences],
            "unpaired": [dict(one) for one in self.unpaired],
            "rivals": list(self.rivals),
        }


@dataclass(frozen=True)
class Comparison:
    """Models side by side."""

    models: Sequence[Model]
    suites: Sequence[SuiteTable]
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "models": [
                {"name": m.name, "evaluations": {n: str(p) for n, p in m.evaluations.items()}}
                for m in self.models
            ],
            "confidence": 0.95,
            "suites": {table.suite: table.to_json() for table in self.suites},
            "warnings": list(self.warnings),
        }


class _UnlikeError(InputError):
    """Two models were evaluated in different ways by a suite."""


def compare(
    names: Sequence[str],
    suites: Sequence[str] = (),
    *,
    mixed: bool = False,
    verify: bool = True,
) -> Comparison:
    """Compare what `names` stand for; see `models_of`.

    Args:
        suites: the only ones to look at, EVALUATION among them; none: all that two models have.
        mixed: compare even where settings or data differ, with a warning.
        verify: check the SHA-256 of what is read.

    Raises:
        InputError: a name stands for nothing, no suite is common to two models, or they were
            evaluated in different ways.
        ConfigError: one model alone is named, one of them twice, or a suite that none of them has.
        CorruptError: an evaluation is damaged.
    """
    models, warnings = models_of(names)
    tables, unlike = [], {}
    for name in _common(models, suites):
        try:
            tables.append(_table(name, models, warnings, mixed=mixed, verify=verify))
        except _UnlikeError as error:
            unlike[name] = str(error)
    if unlike:
        rest = " ".join(f"--suite {table.suite}" for table in tables)
        others = f", or compare by what is alike: {rest}" if rest else ""
        raise InputError(
            f"{next(iter(unlike.values()))}; evaluate them alike, or add --mixed to compare all "
            f"the same{others}"
        )
    for text in warnings:
        _log.warning("%s", text)
    return Comparison(models, tables, warnings)


def _common(models: Sequence[Model], suites: Sequence[str]) -> list[str]:
    """Return the evaluations that two models have; of `suites` alone, where there are any.

    Raises:
        ConfigError: none of them has one that is asked for.
        InputError: one of them alone has it, or they have nothing in common.
    """
    found = [name for model in models for name in model.evaluations]
    for name in suites:
        if name not in found:
            raise ConfigError(f"--suite {name}: {choices(name, set(found), 'they have')}")
    common = [name for name in dict.fromkeys(found) if found.count(name) > 1]
    unknown = [name for name in suites if name not in common]
    if unknown or not common:
        having = "; ".join(f"{m.name}: {', '.join(m.evaluations) or 'none'}" for m in models)
        what = f"--suite {unknown[0]} is not" if unknown else "no evaluation is"
        raise InputError(
            f"{what} common to two of them ({having}); evaluate what is missing: spin evaluate"
        )
    return [name for name in common if not suites or name in suites]


def models_of(names: Sequence[str]) -> tuple[list[Model], list[str]]:
    """Return the models that names stand for, and a warning for each that is left out.

    An evaluation stands for itself; a player, RUN:N, or the folder of an iteration, for that
    iteration's evaluations; RUN:start for the first opponent's; a run for its champion's, or where
    it is the only name for those of the start and all iterations.

    Raises:
        InputError: a name stands for no evaluation, or a run has one model only.
        ConfigError: one model alone is named, or two names stand for one.
        CorruptError: a pointer or manifest is damaged.
    """
    if len(names) == 1:
        models, warnings = _whole_run(names[0])
    else:
        models, warnings = [_model(name) for name in names], []
    for model in models:
        if not model.evaluations:
            raise InputError(f"{model.name} has no evaluation; run spin evaluate first")
    places = [{name: p.resolve() for name, p in model.evaluations.items()} for model in models]
    for index, model in enumerate(models):
        first = places.index(places[index])
        if first < index:
            raise ConfigError(
                f"{models[first].name} and {model.name} are the same model; name others"
            )
    return models, warnings


def _whole_run(name: str) -> tuple[list[Model], list[str]]:
    """Return the evaluated models of a run, and a warning for each other one."""
    subject = find_subject(name)
    if subject.kind != "run" or subject.layout is None:
        raise ConfigError(f"{name} is one model; name two or more, or a run for all its iterations")
    layout = subject.layout
    numbers = [None, *layout.iterations()]
    models = [_of_iteration(f"{name}:{_numbered(number)}", layout, number) for number in numbers]
    found = [model for model in models if model.evaluations]
    if len(found) < 2:
        one = "1 evaluated model" if found else "no evaluated model"
        raise InputError(f"{name} has {one}; a comparison needs two")
    pointer = read_pointer(layout.champion)
    champion = None if pointer is None else layout.iteration_of(pointer.path)
    return found, [
        f"{model.name}{', the champion,' if number is not None and number == champion else ''} has "
        "no evaluation and is left out; spin evaluate makes one"
        for number, model in zip(numbers, models, strict=True)
        if not model.evaluations
    ]


def _numbered(iteration: int | None) -> str:
    return START if iteration is None else str(iteration)


def _model(name: str) -> Model:
    subject = find_subject(name)
    if subject.artifact is not None:
        return _of_artifact(name, subject.artifact, subject.layout)
    layout = subject.layout
    assert layout is not None, "runs and iterations have a layout"
    if subject.kind == "iteration":
        return _of_iteration(name, layout, subject.iteration)
    pointer = read_pointer(layout.champion)
    if pointer is None:
        raise InputError(
            f"{name} has no champion yet; name an iteration ({name}:0), or {name}:{START}"
        )
    return _of_iteration(name, layout, layout.iteration_of(pointer.path))


def _of_artifact(name: str, path: Path, layout: RunLayout | None) -> Model:
    manifest = open_artifact(path).manifest
    if manifest.stage == EVALUATION:
        return Model(name, {EVALUATION: path})
    if manifest.stage == "suite":
        return Model(name, {str(manifest.config["suite"]): path})
    if manifest.stage not in ("train", "sft") or layout is None:
        raise InputError(
            f"{name} is the output of {manifest.stage!r} and no evaluation; name one, or a player "
            "of a run"
        )
    return _of_iteration(name, layout, layout.iteration_of(layout.relative(path)))


def _of_iteration(name: str, layout: RunLayout, iteration: int | None) -> Model:
    """Return the evaluations of a player; None: of the first opponent."""
    main = layout.start_evaluation if iteration is None else layout.stage(iteration, EVALUATION)
    places = {EVALUATION: main}
    prefix = layout.suite(iteration, "").name
    for path in sorted(main.parent.glob(f"{prefix}*")):
        places[path.name.removeprefix(prefix)] = path
    return Model(name, {n: p for n, p in places.items() if (p / MANIFEST_NAME).is_file()})


@dataclass(frozen=True)
class _Evaluation:
    artifact: Artifact
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float | None]]
    columns: Mapping[str, Column]

    def value(self, metric: str) -> Value | None:
        if metric not in self.metrics:
            return None
        low, high = self.intervals.get(metric, (None, None))
        column = self.columns.get(metric)
        return Value(self.metrics[metric], low, high, len(column.values) if column else None)


def _open(path: Path, verify: bool) -> _Evaluation:
    artifact = open_artifact(path, stages=(EVALUATION, "suite"), verify=verify)
    if not any(file.path == METRICS_FILE for file in artifact.manifest.files):
        raise InputError(
            f"{path} was written by an earlier version of spin, without measures; evaluate again"
        )
    columns = read_measures(artifact)
    metrics = read_object(artifact, METRICS_FILE)
    ordered = {name: metrics[name] for name in [*columns, *metrics] if name in metrics}
    return _Evaluation(artifact, ordered, read_object(artifact, INTERVALS_FILE), columns)


def _table(
    suite: str, models: Sequence[Model], warnings: list[str], *, mixed: bool, verify: bool
) -> SuiteTable:
    opened = {
        index: _open(model.evaluations[suite], verify)
        for index, model in enumerate(models)
        if suite in model.evaluations
    }
    metrics = list(dict.fromkeys(name for one in opened.values() for name in one.metrics))
    values = {
        name: [opened[i].value(name) if i in opened else None for i in range(len(models))]
        for name in metrics
    }
    base, *others = opened
    differences: list[Difference] = []
    unpaired: list[dict[str, Any]] = []
    for index in others:
        names = f"{models[base].name} and {models[index].name}"
        _check_alike(suite, names, opened[base], opened[index], warnings, mixed=mixed)
        both = (opened[base].artifact.manifest, opened[index].artifact.manifest)
        for metric in opened[index].columns:
            if metric not in opened[base].columns:
                continue
            why = _why_unpaired(metric, *both)
            found = None if why else _difference(metric, index, base, opened)
            if found is not None:
                differences.append(found)
            else:
                why = why or "no example is in both"
                unpaired.append({"metric": metric, "model": index, "base": base, "why": why})
        _warn_of_unmatched(suite, names, [d for d in differences if d.model == index], warnings)
    made = {index: one.artifact.manifest for index, one in opened.items()}
    told = dict(zip(made, _rivals(list(made.values())), strict=True))
    rivals = [told.get(index) for index in range(len(models))]
    return SuiteTable(suite, values, differences, unpaired, rivals)


def _rivals(made: Sequence[Manifest]) -> list[str | None]:
    """Return whom each was compared with: one name for one rival, and for each its own.

    A rival from outside of the run that another evaluation has inside its own is called by its
    place there.
    """
    refs = [rival_input(each) for each in made]
    places = {ref.key: ref.path for ref in refs if ref is not None and ref.inside_run}
    names = [
        (places.get(ref.key) if ref is not None else None) or rival_of(each)
        for each, ref in zip(made, refs, strict=True)
    ]
    keys: dict[str | None, set[str]] = {}
    for name, ref in zip(names, refs, strict=True):
        keys.setdefault(name, set()).add(ref.key if ref is not None else "")
    return [
        f"{name} (key {ref.key.rpartition(':')[2][:KEY_CHARS]})"
        if ref is not None and len(keys[name]) > 1
        else name
        for name, ref in zip(names, refs, strict=True)
    ]


def _difference(
    metric: str, model: int, base: int, opened: Mapping[int, _Evaluation]
) -> Difference | None:
    mine, theirs = opened[model].columns[metric], opened[base].columns[metric]
    found, reverse = compare_columns(mine, theirs), compare_columns(theirs, mine)
    if found is None or reverse is None:
        return None
    p_value = min(1.0, 2 * min(found.p_value, reverse.p_value))
    rise = meaning_of_a_rise(metric, opened[model].artifact.manifest.config)
    return Difference(metric, model, base, found, p_value, verdict(found, p_value, rise))


def verdict(found: Paired, p_value: float, rise: Rise) -> str:
    """Return what a difference means; see `Difference.verdict`.

    Args:
        p_value: two-sided.
        rise: what a higher value means.
    """
    if found.wins == found.losses == 0:
        return "same"
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "open"
    if p_value > 1 - found.confidence:
        return "open"
    return rise if found.low > 0 else _OPPOSITE[rise]


def meaning_of_a_rise(metric: str, config: Mapping[str, Any]) -> Rise:
    """Return whether a higher value of a metric is better, worse, or just higher.

    Args:
        config: of the evaluation's manifest: of one by lm-evaluation-harness metrics are called
            TASK.METRIC or TASK.METRIC.FILTER, and METRIC alone tells.
    """
    higher, lower, name = _BETTER_HIGHER, _BETTER_LOWER, metric
    if config.get("kind") == "lm_eval":
        higher, lower = _TASK_BETTER_HIGHER, _TASK_BETTER_LOWER
        name = _without_task(metric, config).partition(".")[0]
    elif _OF_THE_GAME.search(metric):
        return "higher"
    if higher.search(name):
        return "better"
    return "worse" if lower.search(name) else "higher"


def _without_task(metric: str, config: Mapping[str, Any]) -> str:
    """Return METRIC[.FILTER]: what stands after the longest task there is, which may have dots."""
    known = {*config.get("tasks", ()), *config.get("asked", ())}
    starts = [task for task in known if metric.startswith(f"{task}.")]
    task = max(starts, key=len, default=metric.partition(".")[0])
    return metric.removeprefix(f"{task}.")


def _same_rival(one: Manifest, other: Manifest) -> bool:
    """Tell whether both were compared with the same model, if with any."""
    rivals = [
        [ref and ref.key for ref in map(each.inputs.get, ("opponent", "against"))]
        for each in (one, other)
    ]
    return rivals[0] == rivals[1]


def _why_unpaired(metric: str, one: Manifest, other: Manifest) -> str | None:
    if _OF_BOTH_SIDES.search(metric) and not _same_rival(one, other):
        return "each was compared with another model"
    if metric in OF_BETA and not share_beta(one, other):
        return "each has a train.beta of its own, which is its unit"
    return None


def _check_alike(
    suite: str,
    names: str,
    base: _Evaluation,
    other: _Evaluation,
    warnings: list[str],
    *,
    mixed: bool,
) -> None:
    """Check that two models were evaluated in one way.

    Raises:
        _UnlikeError: they were not, and `mixed` is off.
    """
    manifests = base.artifact.manifest, other.artifact.manifest
    differing = _differing(*(way(each) for each in manifests))
    what = f"{suite}: {names} were evaluated in different ways ({'; '.join(differing[:6])})"
    if differing and not mixed:
        raise _UnlikeError(what)
    if differing:
        warnings.append(what)
    drawn = _differing(*(draws(each) for each in manifests))
    if drawn:
        warnings.append(
            f"{suite}: answers of {names} were drawn differently ({'; '.join(drawn)}), so that "
            "differences hold the luck of draws, too"
        )
    prints = [one.artifact.manifest.fingerprints for one in (base, other)]
    if prints[0].get("tokenizer") != prints[1].get("tokenizer"):
        warnings.append(
            f"{suite}: {names} have different tokenizers; numbers of tokens, and log-probabilities "
            "a token, do not compare"
        )


def _differing(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in words in which settings two trees of them differ."""
    leaves = flat(base), flat(other)
    return [
        f"{name}: {_short(values[0])} and {_short(values[1])}"
        for name in sorted(leaves[0].keys() | leaves[1].keys())
        if (values := [each.get(name, "absent") for each in leaves])[0] != values[1]
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _warn_of_unmatched(
    suite: str, names: str, differences: Sequence[Difference], warnings: list[str]
) -> None:
    missing = max((one.paired.unmatched for one in differences), default=0)
    if missing:
        warnings.append(
            f"{suite}: up to {missing} examples are of one of {names} only, and left out of "
            "differences"
        )
