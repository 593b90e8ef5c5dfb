"""pair: each prompt gets chosen and rejected responses, or is dropped with a reason.

docs/pairing.md has the policies, the reasons and the report.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.alarms import sound
from stages.artifacts import (
    Artifact,
    InputRef,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_batches,
    run_root,
)
from stages.config import PairConfig, RunConfig
from stages.data.ahead import ahead
from stages.data.aligned import SortedTable, aligned
from stages.data.chat import Renderer, chat_fingerprints, make_renderer
from stages.data.draw import drawn_number
from stages.data.pair_report import PairReport
from stages.data.pair_rows import Replay, Sides
from stages.data.pairing import Floats, Ints, Rule
from stages.data.rows import DROPPED, DROPPED_FILE, GENERATIONS, PAIRS, PROMPTS, REWARDS
from stages.errors import ConfigError, CorruptError, InputError
from stages.model.source import ModelSource, resolve_model

_log = logging.getLogger("spin")

FORMAT_VERSION = 2
REPORT_NAME = "report.json"
_SAMPLE_COLUMNS = (
    "prompt_id",
    "sample_index",
    "prompt_token_ids",
    "response_token_ids",
    "response",
    "finish_reason",
)


@dataclass(frozen=True)
class PairInputs:
    """What pair reads."""

    data: Path
    generations: tuple[Path, ...]
    """The opponent's, then those of pool members, which answer other prompts."""
    model: str
    """The opponent: human responses are tokenized with its tokenizer."""
    revision: str | None = None
    rewards: Path | None = None
    """Needed by policies that rank."""
    iteration: int = 0
    replay: tuple[Path, ...] = ()
    """Pair artifacts of the iterations before, the newest first; their own pairs are taken."""


@dataclass(frozen=True)
class _Job:
    """What was opened, and what decides the rows."""

    config: PairConfig
    seed: int
    iteration: int
    data: Artifact
    generations: tuple[Artifact, ...]
    rewards: Artifact | None
    replay: tuple[Artifact, ...]

    def refs(self, root: Path | None) -> dict[str, InputRef]:
        """Return all inputs by their names in the manifest."""
        refs = {"data": self.data.input_ref(root)}
        for number, artifact in enumerate(self.generations):
            refs[_numbered("generations", number)] = artifact.input_ref(root)
        if self.rewards is not None:
            refs["rewards"] = self.rewards.input_ref(root)
        for number, artifact in enumerate(self.replay):
            refs[f"replay_{number + 1}"] = artifact.input_ref(root)
        return refs


def run(config: RunConfig, inputs: PairInputs, out: Path) -> Manifest:
    """Write pairs, what was dropped, and a report.

    Raises:
        ConfigError: the policy ranks and there are no rewards.
        InputError: inputs are missing or do not belong together.
    """
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    fingerprints = chat_fingerprints(model.path, config.chat)
    job = _open(config, inputs, fingerprints)
    plan = Plan(
        stage="pair",
        format_version=FORMAT_VERSION,
        config={
            "seed": config.seed,
            "iteration": inputs.iteration,
            "pair": _what_decides(config.pair, inputs.iteration),
        },
        inputs=job.refs(root),
        fingerprints=fingerprints,
    )
    return produce(out, plan, lambda space: _fill(space, config, model, job))


def _what_decides(config: PairConfig, iteration: int) -> dict[str, Any]:
    """Return the settings that decide the pairs of an iteration.

    Those of replay do not before there is anything to replay.
    """
    settings = config.identity()
    reached = min(config.replay.iterations, iteration)
    settings["replay"] = {**settings["replay"], "iterations": reached} if reached else None
    return settings


def _open(config: RunConfig, inputs: PairInputs, fingerprints: Mapping[str, str]) -> _Job:
    """Open all inputs, and check that they belong together."""

    def opened(paths: Sequence[Path], stage: str) -> tuple[Artifact, ...]:
        return tuple(open_artifact(p, stages=(stage,), verify=config.verify) for p in paths)

    [data] = opened([inputs.data], "prepare")
    generations = opened(inputs.generations, "generate")
    if not generations:
        raise InputError("pair: no generations are given; give --generations at least once")
    rewards = None
    if config.pair.needs_rewards:
        if inputs.rewards is None:
            raise ConfigError(f"pair.policy={config.pair.policy} needs rewards; give --rewards")
        [rewards] = opened([inputs.rewards], "reward")
        _check_belong(rewards, "data", data.manifest.key)
        for number, artifact in enumerate(generations):
            _check_belong(rewards, _numbered("generations", number), artifact.manifest.key)
    replay = opened(inputs.replay, "pair")
    for artifact in (*generations, *replay):
        _check_belong(artifact, "data", data.manifest.key)
        _check_same_text(artifact, fingerprints, inputs.model)
    _check_ages(replay, inputs.iteration, config.pair.replay.iterations)
    return _Job(config.pair, config.seed, inputs.iteration, data, generations, rewards, replay)


def _fill(space: Workspace, config: RunConfig, model: ModelSource, job: _Job) -> Outcome:
    renderer = make_renderer(model.verified(), config.chat) if job.config.chooses_human else None
    pairer, report = _Pairer(job, renderer), PairReport(job.iteration)
    with (
        TableWriter(space.file("part-00000.parquet"), PAIRS) as table,
        TableWriter(space.file(DROPPED_FILE), DROPPED) as left_out,
    ):
        for answers in ahead(map(pairer.read, _chunks(job))):
            pairs, dropped = pairer.pair(answers, report)
            report.made(pairs)
            report.left_out(dropped["reason"])
            for writer, rows in ((table, pairs), (left_out, dropped)):
                for batch in rows.combine_chunks().to_batches():
                    writer.append_batch(batch)
    if not report.candidates:
        raise InputError(
            f"{job.generations[0].path} holds no sample for a prompt of {job.data.path}; "
            "run generate again, with more prompts"
        )
    known = job.data.manifest.metrics.items()
    about_data = {name: value for name, value in known if name.startswith("contaminat")}
    text = json.dumps({**report.to_json(), "data": about_data}, indent=1, sort_keys=True)
    space.file(REPORT_NAME).write_text(text + "\n")
    counts = report.counts(job.config.replay.iterations)
    if not counts["pairs"]:
        _log.warning(
            "pair: none of %d candidates became a pair (%s); docs/pairing.md tells which setting "
            "each reason is of",
            report.candidates,
            ", ".join(f"{n} {v}" for n, v in counts.items() if n.startswith("dropped_") and v),
        )
    metrics = report.metrics()
    sound("pair", metrics, config.alarms)
    return Outcome(counts=counts, metrics=metrics)


@dataclass(frozen=True)
class _Chunk:
    """The rows of some prompts, all of them."""

    prompts: pa.Table
    generations: list[pa.Table]
    rewards: pa.Table | None
    replay: list[pa.Table]


def _chunks(job: _Job) -> Iterator[_Chunk]:
    prompt_columns = ["prompt_id", *(["response"] if job.config.chooses_human else [])]
    tables = [
        _table(job.data, "train-", PROMPTS, prompt_columns),
        *(_table(one, "part-", GENERATIONS, _SAMPLE_COLUMNS) for one in job.generations),
        *(_table(one, "part-", PAIRS, PAIRS.names) for one in job.replay),
    ]
    if job.rewards is not None:
        tables.append(_table(job.rewards, "rewards", REWARDS, REWARDS.names))
    last = 1 + len(job.generations)
    for parts in aligned(tables):
        rewards = None if job.rewards is None else parts.pop()
        yield _Chunk(parts[0], parts[1:last], rewards, parts[last:])


def _table(artifact: Artifact, prefix: str, schema: pa.Schema, names: Sequence[str]) -> SortedTable:
    narrow = pa.schema([schema.field(name) for name in names])
    batches = read_batches(artifact.files(prefix), schema, columns=names)
    return SortedTable((batch.select(names) for batch in batches), narrow, artifact.path)


@dataclass(frozen=True)
class _Answers:
    """A chunk with its responses, all as tokens."""

    chunk: _Chunk
    samples: pa.Table
    prompt_S: Ints
    sides: Sides


class _Pairer:
    """Makes the pairs of a chunk."""

    def __init__(self, job: _Job, renderer: Renderer | None) -> None:
        self._job, self._renderer = job, renderer
        self._rule = Rule(job.config)
        self._replay = Replay(job.config, job.seed, job.iteration)

    def read(self, chunk: _Chunk) -> _Answers:
        """Return the samples and the human responses; these are tokenized, which takes longest."""
        samples = _samples(chunk)
        used, prompt_S = np.unique(self._prompts_of(chunk, samples), return_inverse=True)
        human = None
        if self._job.config.chooses_human:
            human = chunk.prompts["response"].combine_chunks().take(pa.array(used))
        return _Answers(chunk, samples, prompt_S, Sides.of(samples, human, self._renderer))

    def pair(self, answers: _Answers, report: PairReport) -> tuple[pa.Table, pa.Table]:
        """Return rows of PAIRS and of DROPPED, and count them."""
        chunk, samples, sides = answers.chunk, answers.samples, answers.sides
        rewards = self._rewards_of(chunk, samples)
        responses = sides.responses(samples, answers.prompt_S, rewards, self._draws_of(samples))
        found = self._rule.candidates(responses)
        verdict = self._rule.judge(responses, found)
        report.judged(responses, found, verdict)
        pairs = sides.pairs(responses, found, verdict, self._job.iteration)
        dropped = sides.dropped(responses, found, verdict)
        if chunk.replay:
            earlier = [
                table.filter(pc.equal(table["iteration"], self._job.iteration - number - 1))
                for number, table in enumerate(chunk.replay)
            ]
            pairs, left_out, number = self._replay.add(pairs, earlier)
            report.replay_candidates += number
            dropped = pa.concat_tables([dropped, left_out])
            dropped = dropped.take(pc.sort_indices(dropped["prompt_id"]))
        return pairs, dropped

    def _prompts_of(self, chunk: _Chunk, samples: pa.Table) -> Ints:
        """Return the number of each sample's prompt in the chunk."""
        numbers = pc.index_in(samples["prompt_id"], chunk.prompts["prompt_id"])
        if numbers.null_count:
            stray = samples["prompt_id"].filter(pc.is_null(numbers))[0]
            raise CorruptError(
                f"{self._job.generations[0].path} answers prompt {stray}, which "
                f"{self._job.data.path} does not have; run generate again"
            )
        found: Ints = numbers.to_numpy().astype(np.int64)
        return found

    def _rewards_of(self, chunk: _Chunk, samples: pa.Table) -> Floats:
        """Return each sample's reward; NaN where there is none."""
        if chunk.rewards is None:
            return np.full(samples.num_rows, np.nan)
        self._check_rewards(chunk.rewards)
        keys = [_keys(table, chunk.prompts) for table in (samples, chunk.rewards)]
        places = pc.index_in(pa.array(keys[0]), pa.array(keys[1]))
        reward_S: Floats = (
            chunk.rewards["reward"].combine_chunks().take(places).to_numpy(zero_copy_only=False)
        )
        return reward_S

    def _check_rewards(self, rewards: pa.Table) -> None:
        assert self._job.rewards is not None
        values = rewards["reward"].to_numpy()
        is_right, must_be = np.isfinite(values), "finite"
        if self._job.config.win_probability == "win_rate":
            is_right = (values >= 0) & (values <= 1)
            must_be = "in 0..1 for pair.win_probability=win_rate"
        [wrong] = np.nonzero(~is_right)
        if len(wrong):
            place = int(wrong[0])
            raise InputError(
                f"{self._job.rewards.path}: the reward of sample {rewards['sample_index'][place]} "
                f"of prompt {rewards['prompt_id'][place]} is {values[place]} and must be "
                f"{must_be}; mend the reward and run its stage again"
            )

    def _draws_of(self, samples: pa.Table) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        if not self._rule.draws:
            return np.zeros(samples.num_rows, np.uint64)
        which = zip(
            samples["prompt_id"].to_pylist(), samples["sample_index"].to_pylist(), strict=True
        )
        seed, iteration = self._job.seed, self._job.iteration
        return np.array([drawn_number("pair", seed, iteration, *one) for one in which], np.uint64)


def _samples(chunk: _Chunk) -> pa.Table:
    """Return the samples of all opponents, each with the name of its source."""
    seen, parts = chunk.generations[0]["prompt_id"].slice(0, 0), []
    for number, table in enumerate(chunk.generations):
        twice = pc.is_in(table["prompt_id"], seen)
        if pc.any(twice).as_py():
            raise InputError(
                f"prompt {table['prompt_id'].filter(twice)[0]} is answered by two of the "
                "generations; give those of one iteration's parts, each once"
            )
        name = f"pool {number} sample " if number else "sample "
        index = table["sample_index"].cast(pa.string())
        parts.append(table.append_column("source", pc.binary_join_element_wise(name, index, "")))
        seen = pa.chunked_array([*seen.chunks, *table["prompt_id"].chunks], pa.string())
    return pa.concat_tables(parts).combine_chunks()


def _keys(table: pa.Table, prompts: pa.Table) -> Ints:
    """Return a number for each sample: of its prompt in the chunk, and its own."""
    prompt = pc.fill_null(pc.index_in(table["prompt_id"], prompts["prompt_id"]), -1).to_numpy()
    keys: Ints = (prompt.astype(np.int64) << 32) + table["sample_index"].to_numpy()
    return keys


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _check_ages(replay: Sequence[Artifact], iteration: int, most: int) -> None:
    """Check that all iterations are replayed that should be, and no others.

    Raises:
        InputError: otherwise.
    """
    wanted = [iteration - back for back in range(1, min(most, iteration) + 1)]
    given = [artifact.manifest.config.get("iteration") for artifact in replay]
    if given != wanted:
        names = " and ".join(map(str, wanted)) or "no iteration"
        raise InputError(
            f"pair: pair.replay.iterations={most} takes the pairs of {names} to iteration "
            f"{iteration}, given are those of {given or 'none'}; give --replay once for each, the "
            "newest first"
        )


def _check_same_text(artifact: Artifact, fingerprints: Mapping[str, str], model: str) -> None:
    theirs = artifact.manifest.fingerprints
    differing = [name for name, mine in fingerprints.items() if theirs.get(name) != mine]
    if differing:
        words = {"template": "chat template or settings", "tokenizer": "tokenizer or stop tokens"}
        raise InputError(
            f"{artifact.path} was made with another "
            f"{' and another '.join(words[name] for name in differing)} than {model} with this "
            "recipe has; use the same model and chat settings"
        )


def _check_belong(artifact: Artifact, name: str, key: str) -> None:
    ref = artifact.manifest.inputs.get(name)
    if ref is None or ref.key != key:
        raise InputError(
            f"{artifact.path} was made from another {name} than the one given; "
            f"give the {name} it was made from, or run {artifact.manifest.stage} again"
        )
