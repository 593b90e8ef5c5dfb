"""pair: each prompt gets a chosen and a rejected response, or is dropped with a reason."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
    run_root,
)
from stages.artifacts.tables import Row
from stages.config import PairConfig, RunConfig
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.data.join import grouped, inner_join
from stages.data.rows import DROPPED, GENERATIONS, PAIRS, PROMPTS, REWARDS
from stages.errors import ConfigError, InputError
from stages.model.source import resolve_model

FORMAT_VERSION = 2


@dataclass(frozen=True)
class PairInputs:
    """What pair reads."""

    data: Path
    generations: Path
    model: str
    """The opponent: human responses are tokenized with its tokenizer."""
    revision: str | None = None
    rewards: Path | None = None
    """Needed by the ranked game."""


@dataclass(frozen=True)
class Response:
    """One side of a pair."""

    token_ids: list[int]
    text: str
    source: str
    finish_reason: str
    reward: float | None = None


@dataclass(frozen=True)
class Dropped:
    """Why a pair was not made."""

    reason: str
    detail: str


def run(config: RunConfig, inputs: PairInputs, out: Path) -> Manifest:
    """Write pairs, and what was dropped.

    Raises:
        ConfigError: the ranked game without rewards.
        InputError: inputs are missing or do not belong together.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    generations = open_artifact(inputs.generations, stages=("generate",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    fingerprints = chat_fingerprints(model.path, config.chat)
    _check_belong(generations, "data", data.manifest.key)
    refs = {
        "data": data.input_ref(root),
        "generations": generations.input_ref(root),
    }
    rewards = None
    if config.pair.needs_rewards:
        if inputs.rewards is None:
            raise ConfigError(f"pair.policy={config.pair.policy} needs rewards; give --rewards")
        rewards = open_artifact(inputs.rewards, stages=("reward",), verify=config.verify)
        _check_belong(rewards, "generations", generations.manifest.key)
        refs["rewards"] = rewards.input_ref(root)
    _check_same_text(generations, fingerprints, inputs.model)
    plan = Plan(
        stage="pair",
        format_version=FORMAT_VERSION,
        config={"pair": config.pair.identity()},
        inputs=refs,
        fingerprints=fingerprints,
    )

    def fill(space: Workspace) -> Outcome:
        renderer = make_renderer(model.verified(), config.chat)
        return _fill(space, config.pair, renderer, data, generations, rewards)

    return produce(out, plan, fill)


def _fill(
    space: Workspace,
    config: PairConfig,
    renderer: Renderer,
    data: Artifact,
    generations: Artifact,
    rewards: Artifact | None,
) -> Outcome:
    dropped: Counter[str] = Counter()
    with (
        TableWriter(space.file("part-00000.parquet"), PAIRS) as table,
        TableWriter(space.file("dropped.parquet"), DROPPED) as left_out,
    ):
        for prompt, samples in _prompts_with_samples(data, generations, rewards):
            for made in pairs_of_prompt(prompt, samples, config, renderer):
                if isinstance(made, Dropped):
                    dropped[made.reason] += 1
                    left_out.append(
                        {
                            "prompt_id": prompt["prompt_id"],
                            "reason": made.reason,
                            "detail": made.detail,
                        }
                    )
                else:
                    table.append(made)
    pairs = table.num_rows
    candidates = pairs + sum(dropped.values())
    if not candidates:
        raise InputError(f"{generations.path} holds no sample for a prompt of {data.path}")
    return Outcome(
        counts={
            "candidates": candidates,
            "pairs": pairs,
            **{f"dropped_{reason}": n for reason, n in sorted(dropped.items())},
        },
        metrics={
            "identical_share": dropped["identical"] / candidates,
            "dropped_share": 1 - pairs / candidates,
        },
    )


def pairs_of_prompt(
    prompt: Mapping[str, Any], samples: list[Row], config: PairConfig, renderer: Renderer
) -> Iterator[Row | Dropped]:
    """Yield the pairs of one prompt, or why there is none: one outcome a candidate.

    A candidate is a sample in `human_vs_self`, the prompt itself in `ranked`.
    """
    if config.needs_rewards:
        candidates = [_best_and_worst(samples, config)]
    else:
        human = _human(prompt["response"], renderer)
        candidates = [
            human if isinstance(human, Dropped) else (human, _response(sample))
            for sample in samples
        ]
    seen: set[tuple[str, str]] = set()
    for pair_index, candidate in enumerate(candidates):
        if isinstance(candidate, Dropped):
            yield candidate
            continue
        chosen, rejected = candidate
        prompt_ids = samples[0]["prompt_token_ids"]
        problem = _problem(prompt_ids, chosen, rejected, config, seen)
        if problem is not None:
            yield problem
            continue
        seen.add((chosen.text, rejected.text))
        yield {
            "prompt_id": prompt["prompt_id"],
            "pair_index": pair_index,
            "prompt_token_ids": prompt_ids,
            "chosen_token_ids": chosen.token_ids,
            "rejected_token_ids": rejected.token_ids,
            "chosen": chosen.text,
            "rejected": rejected.text,
            "chosen_source": chosen.source,
            "rejected_source": rejected.source,
            "chosen_reward": chosen.reward,
            "rejected_reward": rejected.reward,
            "win_probability": None,
            "iteration": 0,
            "weight": 1.0,
        }


def _problem(
    prompt_ids: list[int],
    chosen: Response,
    rejected: Response,
    config: PairConfig,
    seen: set[tuple[str, str]],
) -> Dropped | None:
    """Return the first reason that rules a pair out, or None."""
    if chosen.text == rejected.text or chosen.token_ids == rejected.token_ids:
        return Dropped("identical", f"{chosen.source} and {rejected.source} answer the same")
    for side in (chosen, rejected):
        if not side.text.strip():
            return Dropped("empty", f"{side.source} is empty")
        if config.drop_cut_off and side.finish_reason == "length":
            return Dropped("cut_off", f"{side.source} was cut off at {len(side.token_ids)} tokens")
    longest = len(prompt_ids) + max(len(chosen.token_ids), len(rejected.token_ids))
    if longest > config.max_length:
        return Dropped("too_long", f"{longest} tokens, pair.max_length is {config.max_length}")
    if (chosen.text, rejected.text) in seen:
        return Dropped("duplicate", f"{rejected.source} repeats an earlier sample")
    return None


def _best_and_worst(samples: list[Row], config: PairConfig) -> tuple[Response, Response] | Dropped:
    """Return the samples with the highest and the lowest reward, the first of equals."""
    if len(samples) < 2:
        return Dropped("single", "fewer than two samples with a reward")
    best = max(samples, key=lambda s: s["reward"])
    worst = min(samples, key=lambda s: s["reward"])
    if best["reward"] == worst["reward"]:
        if config.tie_policy == "drop":
            return Dropped("tie", f"all {len(samples)} samples have reward {best['reward']}")
        best, worst = samples[0], samples[1]
    return _response(best), _response(worst)


def _human(text: str, renderer: Renderer) -> Response | Dropped:
    try:
        token_ids = renderer.response_tokens(text)
    except RowRefusedError as error:
        return Dropped(error.reason, f"human: {error.detail}")
    return Response(token_ids, text, "human", "stop")


def _response(sample: Row) -> Response:
    return Response(
        sample["response_token_ids"],
        sample["response"],
        f"sample {sample['sample_index']}",
        sample["finish_reason"],
        sample.get("reward"),
    )


def _prompts_with_samples(
    data: Artifact, generations: Artifact, rewards: Artifact | None
) -> Iterator[tuple[Row, list[Row]]]:
    """Yield every prompt that has samples, with them; with rewards, only samples that have one."""
    prompts = grouped(read_rows(data.files("train-"), PROMPTS), data.path)
    samples = grouped(read_rows(generations.files("part-"), GENERATIONS), generations.path)
    if rewards is not None:
        scores = grouped(read_rows(rewards.files("rewards"), REWARDS), rewards.path)
        samples = _with_rewards(samples, scores)
    for _, (prompt,), group in inner_join(prompts, samples):
        yield prompt, group


def _with_rewards(
    samples: Iterator[tuple[str, list[Row]]], scores: Iterator[tuple[str, list[Row]]]
) -> Iterator[tuple[str, list[Row]]]:
    for prompt_id, group, scored in inner_join(samples, scores):
        reward_of = {row["sample_index"]: row["reward"] for row in scored}
        yield (
            prompt_id,
            [
                {**row, "reward": reward_of[row["sample_index"]]}
                for row in group
                if row["sample_index"] in reward_of
            ],
        )


def _check_same_text(generations: Artifact, fingerprints: Mapping[str, str], model: str) -> None:
    theirs = generations.manifest.fingerprints
    differing = [name for name, mine in fingerprints.items() if theirs.get(name) != mine]
    if differing:
        words = {"template": "chat template or settings", "tokenizer": "tokenizer or stop tokens"}
        raise InputError(
            f"{generations.path} was generated with another "
            f"{' and another '.join(words[name] for name in differing)} than {model} with this "
            "recipe has; use the same model and chat settings"
        )


def _check_belong(artifact: Artifact, name: str, key: str) -> None:
    if artifact.manifest.inputs[name].key != key:
        raise InputError(
            f"{artifact.path} was made from another {name} than the one given; "
            f"give the {name} it was made from, or run {artifact.manifest.stage} again"
        )
