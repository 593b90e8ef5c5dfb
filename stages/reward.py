"""reward: one score a sample, kept apart so that it can be made again without generating."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
from stages.config import RunConfig
from stages.data.join import grouped, inner_join
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS, REWARDS
from stages.errors import InputError
from stages.rewards import Reward, open_reward

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RewardInputs:
    """What reward reads."""

    data: Path
    generations: Path


def run(config: RunConfig, inputs: RewardInputs, out: Path) -> Manifest:
    """Score every sample; a sample that cannot be scored goes to dropped.parquet.

    Raises:
        ConfigError: the recipe names no reward.
        InputError: inputs are missing, do not belong together, or no sample can be scored.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    generations = open_artifact(inputs.generations, stages=("generate",), verify=config.verify)
    reward = open_reward(config.reward.name)
    root = run_root(out)
    plan = Plan(
        stage="reward",
        format_version=FORMAT_VERSION,
        config={"reward": config.reward.identity()},
        inputs={"data": data.input_ref(root), "generations": generations.input_ref(root)},
    )
    return produce(out, plan, lambda space: _fill(space, reward, data, generations))


def _fill(space: Workspace, reward: Reward, data: Artifact, generations: Artifact) -> Outcome:
    total, dropped, summed = 0, 0, 0.0
    with (
        TableWriter(space.file("rewards.parquet"), REWARDS) as table,
        TableWriter(space.file("dropped.parquet"), DROPPED) as left_out,
    ):
        for human, sample in _samples(data, generations):
            total += 1
            try:
                score = reward(sample["response"], human)
            except ValueError as error:
                dropped += 1
                detail = f"sample {sample['sample_index']}: {error}"
                left_out.append(
                    {"prompt_id": sample["prompt_id"], "reason": "no_score", "detail": detail}
                )
                continue
            summed += score
            table.append(
                {
                    "prompt_id": sample["prompt_id"],
                    "sample_index": sample["sample_index"],
                    "reward": score,
                }
            )
    if dropped == total:
        raise InputError(
            f"{generations.path}: none of {total} samples can be scored; "
            "is reward.name right for this data?"
        )
    return Outcome(
        counts={"samples": total, "rows": total - dropped, "dropped_no_score": dropped},
        metrics={"mean_reward": summed / (total - dropped)},
    )


def _samples(data: Artifact, generations: Artifact) -> Iterator[tuple[str, Row]]:
    prompts = grouped(
        read_rows(data.files("train-"), PROMPTS, columns=["prompt_id", "response"]), data.path
    )
    columns = ["prompt_id", "sample_index", "response"]
    samples = grouped(
        read_rows(generations.files("part-"), GENERATIONS, columns=columns), generations.path
    )
    for _, (prompt,), group in inner_join(prompts, samples):
        for sample in group:
            yield prompt["response"], sample
