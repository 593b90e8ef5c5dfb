"""Why an engine's log-probabilities are not the trainer's: hypotheses, tried cheapest first.

A hypothesis says which numbers the engine should then have given. It holds when every row fits
either it or what was expected, so that a few wrong rows among good ones are explained too. It must
explain the gap and not only narrow it: half of what is tolerated may be left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.config import SamplingConfig
from stages.model.parity_gap import Answered, Gap, Logprobs, Tolerance, measure, row_means
from stages.model.parity_model import ParityModel, Precision, processed_logprobs
from stages.model.source import model_chain

SAMPLED_TOKENS = 64
"""Response tokens of a row that are compared where whole rows of logits are needed."""
FITTED_ROWS = 8
HEAD_TOKENS = 4
PATTERN_TOKENS = 16
"""Rows shorter than this do not tell whether differences shrink or grow."""
CLEAR = 3.0
"""Differences that change by this factor along a response show a pattern."""
PLAIN = SamplingConfig()


@dataclass(frozen=True)
class Case:
    """A sample whose gap is too large."""

    rows: Sequence[Answered]
    engine: Logprobs
    ours: Logprobs
    gap: Gap
    precision: Precision
    tolerance: Tolerance
    own_tolerance: Callable[[ParityModel, Precision, Logprobs], Tolerance]
    """What is allowed where the recipe does not say, for the trainer's numbers in a precision;
    in bf16 it rounds the model's weights."""
    load: Callable[[Path], AbstractContextManager[ParityModel]]
    model_dir: Path
    others: Mapping[str, Path]
    """Models that the engine may have run instead, by what they are to the user."""
    rendered: Callable[[str], Sequence[int]] | None
    """From a prompt's id to its tokens as the recipe renders them now."""
    sampling: SamplingConfig | None


def not_finite(engine: Logprobs, ours: Logprobs) -> str | None:
    """Return the cause where numbers are not finite, else None."""
    if not all(np.isfinite(row).all() for row in ours):
        return "wrong weights: the model's own log-probabilities are not finite (NaN or infinite)"
    if not all(np.isfinite(row).all() for row in engine):
        return (
            "dtype: the engine's log-probabilities are not finite (NaN or infinite) and the "
            "trainer's are; try generate.engine.dtype=float32, or bfloat16 where it is float16"
        )
    return None


def likely_cause(case: Case) -> str:
    """Return what explains the gap, as one clause that begins with the cause's name."""
    if found := _off_by_one(case):
        return found
    with case.load(case.model_dir) as model:
        if found := _renewed(case, model) or _cut(case, model) or _sampling(case, model):
            return found
    if found := _other_model(case):  # one model in memory at a time
        return found
    with case.load(case.model_dir) as model:
        return _rounding(case, model) or _pattern(case)


def _off_by_one(case: Case) -> str | None:
    for step, neighbour in ((1, "before"), (-1, "after")):
        moved = [_shifted(e, o, step) for e, o in zip(case.engine, case.ours, strict=True)]
        if number := _explained(case, moved):
            return (
                f"off by one: {_some(number, case)} the log-probabilities of the tokens "
                f"{neighbour} their own"
            )
    return None


def _shifted(engine: np.ndarray, ours: np.ndarray, step: int) -> np.ndarray:
    """Return ours moved by a token; the token that has no neighbour is not judged."""
    if len(ours) == 1:
        return ours
    moved = np.roll(ours, step)
    edge = 0 if step > 0 else -1
    moved[edge] = engine[edge]
    return moved


def _renewed(case: Case, model: ParityModel) -> str | None:
    """Compare the prompts with those that the recipe renders now."""
    if case.rendered is None:
        return None
    renewed = [replace(row, prompt=list(case.rendered(row.prompt_id))) for row in case.rows]
    wrong = [
        row.name for row, new in zip(case.rows, renewed, strict=True) if row.prompt != new.prompt
    ]
    if not wrong:
        return None
    says = "and the engine was asked with these" if _fits(case, model, renewed) else "for one cause"
    return (
        f"template: {len(wrong)} of {len(case.rows)} prompts are not those that the recipe's "
        f"template renders, such as that of {wrong[0]}, {says}"
    )


def _cut(case: Case, model: ParityModel) -> str | None:
    """Try prompts with more or less of what templates put around the text."""
    prompts = [row.prompt for row in case.rows]
    first, known = prompts[0][0], model.bos_token_ids
    have_bos = all(prompt[0] in known for prompt in prompts)
    if number := _fits(case, model, _asked(case, start=1)):
        what = f"BOS, token {first}" if have_bos else f"first token, such as {first}"
        return f"BOS: {_some(number, case)} answers to prompts without their {what}"
    for bos in sorted(known):
        if number := _fits(case, model, _asked(case, before=[bos])):
            what = "a second BOS" if have_bos else "a BOS that the rows lack"
            return f"BOS: {_some(number, case)} answers to prompts with {what}, token {bos}"
    ends = {1, _common([prompt[::-1] for prompt in prompts])} - {0}
    for length in sorted(ends):
        if number := _fits(case, model, _asked(case, stop=-length)):
            return (
                f"template: {_some(number, case)} answers to prompts without their last {length} "
                f"tokens, such as {prompts[0][-length:]}: where the answer begins was not said"
            )
    starts = {_common(prompts)} - {0, 1}
    for length in starts:
        if number := _fits(case, model, _asked(case, start=length)):
            return (
                f"template: {_some(number, case)} answers to prompts without the {length} tokens "
                "that all of them begin with, such as a system prompt"
            )
    return None


def _asked(
    case: Case, start: int = 0, stop: int | None = None, before: Sequence[int] = ()
) -> list[Answered]:
    """Return the rows with more or less in their prompts; of which nothing is left, it stays."""
    cut = [[*before, *row.prompt[start:stop]] or row.prompt for row in case.rows]
    return [replace(row, prompt=prompt) for row, prompt in zip(case.rows, cut, strict=True)]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Return with how many tokens all of them begin."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _sampling(case: Case, model: ParityModel) -> str | None:
    short = replace(
        case,
        rows=[replace(row, response=row.response[:SAMPLED_TOKENS]) for row in case.rows],
        engine=[row[:SAMPLED_TOKENS] for row in case.engine],
        ours=[row[:SAMPLED_TOKENS] for row in case.ours],
    )
    for how in _ways(short, model):
        found = [_processed(model, row, how, case.precision) for row in short.rows]
        if number := _explained(short, found):
            kept = f", top_k {how.top_k}" if how.top_k else ""
            kept += f", top_p {how.top_p:g}" if how.top_p < 1 else ""
            return (
                f"temperature: {_some(number, case)} log-probabilities after sampling's "
                f"temperature {how.temperature:.3g}{kept}, not the model's own"
            )
    return None


def _ways(case: Case, model: ParityModel) -> Iterator[SamplingConfig]:
    """Yield the ways of sampling that the engine's numbers may have gone through."""
    recipe = case.sampling
    if recipe is not None and recipe.temperature > 0:
        whole = recipe.model_copy(update={"top_p": 1.0, "top_k": 0})
        cold = recipe.model_copy(update={"temperature": 1.0})
        for how in (recipe, whole, cold):
            if (how.temperature, how.top_p, how.top_k) != (1, 1, 0):
                yield how
    yield PLAIN.model_copy(update={"temperature": _fitted_temperature(case, model)})


def _fitted_temperature(case: Case, model: ParityModel) -> float:
    """Return the temperature at which the model's numbers come closest to the engine's."""
    chosen = np.argsort(row_means(case.engine, case.ours))[::-1][:FITTED_ROWS]
    rows = [(case.rows[i], torch.from_numpy(case.engine[i])) for i in chosen]
    logits = [model.logits(row, SAMPLED_TOKENS, case.precision) for row, _ in rows]

    def distance(temperature: float) -> float:
        how = PLAIN.model_copy(update={"temperature": temperature})
        gaps = [
            processed_logprobs(l_NV, _tokens(row, l_NV), how).cpu() - engine_N
            for (row, engine_N), l_NV in zip(rows, logits, strict=True)
        ]
        return float(torch.cat(gaps).abs().mean())

    best, width = 1.0, 10.0
    for _ in range(7):  # each narrows it to a fifth
        grid = np.geomspace(best / width, best * width, 17)
        best = float(min(grid, key=distance))
        width = (grid[1] / grid[0]) ** 1.5
    return best


def _processed(
    model: ParityModel, row: Answered, how: SamplingConfig, precision: Precision
) -> np.ndarray:
    logits_NV = model.logits(row, SAMPLED_TOKENS, precision)
    found: np.ndarray = processed_logprobs(logits_NV, _tokens(row, logits_NV), how).cpu().numpy()
    return found


def _tokens(row: Answered, logits_NV: Tensor) -> Tensor:
    return torch.tensor(row.response[: len(logits_NV)], device=logits_NV.device)


def _rounding(case: Case, model: ParityModel) -> str | None:
    """Tell whether the gap is of the size of rounding. Rounds the model's weights."""
    if case.own_tolerance(model, case.precision, case.ours).allows(case.gap):
        return (
            f"rounding: the differences are as large as {case.precision} makes them; the "
            "recipe's tolerance is too small"
        )
    if case.precision == "bf16":
        return None  # what ran in fp32 is within its tolerance
    found = model.logprobs(case.rows, "bf16")
    rounding = measure(found, case.ours).mean
    is_close = case.own_tolerance(model, "bf16", found).allows(measure(case.engine, found))
    if not is_close or case.gap.mean < rounding / CLEAR:
        return None
    return (
        "dtype: the differences are those of half precision, so the engine did not run in "
        "float32 (look at generate.engine.dtype and extra), or it ran weights that are almost these"
    )


def _other_model(case: Case) -> str | None:
    bases = model_chain(case.model_dir)[:-1]
    below = {f"its base {base}, without the adapter": base for base in bases}
    for name, folder in {**below, **case.others}.items():
        if folder.resolve() == case.model_dir.resolve():
            continue
        with case.load(folder) as model:
            if number := _fits(case, model, case.rows):
                return f"wrong weights: {_some(number, case)} answers of {name}"
    return None


def _pattern(case: Case) -> str:
    """Return what the course of the differences along the responses hints at."""
    gaps = [np.abs(e - o) for e, o in zip(case.engine, case.ours, strict=True)]
    long = [row for row in gaps if len(row) >= PATTERN_TOKENS]
    if long:
        head = float(np.mean([row[:HEAD_TOKENS].mean() for row in long]))
        rest = float(np.mean([row[len(row) // 2 :].mean() for row in long]))
        course = f"{head:.3g} a token at the start of responses and {rest:.3g} in their second half"
        if head > CLEAR * rest:
            return (
                f"template: the differences shrink, {course}, so the engine saw another prompt "
                "than the rows hold"
            )
        if rest > CLEAR * head:
            return (
                f"positions: the differences grow, {course}, so engine and trainer treat long "
                "texts differently (rope scaling, a sliding window)"
            )
    return (
        "wrong weights: the differences are everywhere, and neither BOS, temperature nor dtype "
        "explains them; the engine ran another model or other weights, or saw prompts unlike "
        "those of the rows"
    )


def _fits(case: Case, model: ParityModel, rows: Sequence[Answered]) -> int:
    """Return how many answers are those to other prompts, or by another model.

    0 if not all is explained.
    """
    fitting = [
        new if len(new.prompt) + len(new.response) <= model.max_positions else old
        for new, old in zip(rows, case.rows, strict=True)
    ]
    return _explained(case, model.logprobs(fitting, case.precision))


def _explained(case: Case, supposed: Logprobs) -> int:
    """Return how many rows fit what is supposed better, if that leaves no gap; else 0."""
    better = row_means(case.engine, supposed) < row_means(case.engine, case.ours)
    mixed = [new if b else o for new, o, b in zip(supposed, case.ours, better, strict=True)]
    half = Tolerance(case.tolerance.mean / 2, case.tolerance.tail / 2)
    return int(better.sum()) if half.allows(measure(case.engine, mixed)) else 0


def _some(number: int, case: Case) -> str:
    if number == len(case.rows):
        return "all rows hold"
    return f"{number} rows hold" if number > 1 else "1 row holds"
