"""Made-up evaluations: what the samples browser of the report reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import evaluate
from stages.artifacts import Outcome, Plan, TableWriter, Workspace, open_artifact, produce, run_root
from stages.artifacts.manifest import InputRef
from stages.data.measures import write_measures
from stages.data.rows import EXAMPLES, PROMPTS
from stages.layout import RunLayout


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, and what was answered."""

    prompt: str
    human: str
    player: str
    opponent: str | None = None
    greedy: str | None = None
    player_reward: float | None = None
    opponent_reward: float | None = None
    margin: float = 0.5
    cut_off: bool = False
    system: str | None = None

    @property
    def prompt_id(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:32]

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.prompt}]


def write_samples(run: Path, evaluations: Mapping[int | None, Sequence[Sample]]) -> RunLayout:
    """Write the data and the evaluation of some iterations (None: of the start) into a run."""
    layout = RunLayout(run)
    run.mkdir(parents=True, exist_ok=True)
    if not layout.record.exists():
        layout.record.write_text("{}")
    write_data(layout.data, [s for samples in evaluations.values() for s in samples])
    for iteration, samples in evaluations.items():
        out = layout.start_evaluation if iteration is None else layout.stage(iteration, "evaluate")
        write_evaluation(out, samples, layout.data)
    return layout


def write_data(out: Path, samples: Sequence[Sample]) -> None:
    by_id = {sample.prompt_id: sample for sample in samples}
    rows = [
        {"prompt_id": i, "messages": by_id[i].messages(), "response": by_id[i].human,
         "source": "here", "source_row": 0}
        for i in sorted(by_id)
    ]  # fmt: skip

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("heldout-00000.parquet"), PROMPTS) as table:
            table.extend(rows)
        return Outcome(counts={"heldout": len(rows)})

    produce(out, Plan("prepare", 1, {"made": len(rows)}, {}, {}), fill)


def write_evaluation(
    out: Path, samples: Sequence[Sample], data: Path, config: Mapping[str, Any] | None = None
) -> None:
    rows = [_row(sample) for sample in sorted(samples, key=lambda s: s.prompt_id)]
    compared = any(sample.opponent is not None for sample in samples)
    inputs = {
        "data": open_artifact(data).input_ref(run_root(out)),
        **{name: _model(name) for name in (("model", "opponent") if compared else ("model",))},
    }

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("examples.parquet"), EXAMPLES) as table:
            table.extend(rows)
        metrics = write_measures(space, evaluate.measured(rows), evaluate.summarize(rows))
        return Outcome(counts={"prompts": len(rows)}, metrics=metrics)

    # Keys differ as those of real evaluations do; seeds decide draws, and not what is measured.
    settings = {"seed": out.parent.name, **(config or {})}
    produce(out, Plan("evaluate", evaluate.FORMAT_VERSION, settings, inputs, {}), fill)


def _model(name: str) -> InputRef:
    return InputRef(path=f"models/{name}", inside_run=True, key=name, content=name)


def _row(sample: Sample) -> dict[str, Any]:
    compared = sample.opponent is not None
    finish = "length" if sample.cut_off else "stop"
    return dict.fromkeys(EXAMPLES.names) | {
        "prompt_id": sample.prompt_id,
        "human": sample.human,
        "human_token_ids": _tokens(sample.human),
        "human_logprob": -1.0,
        "sampled": sample.player,
        "sampled_seed": 0,
        "sampled_token_ids": _tokens(sample.player),
        "sampled_finish_reason": finish,
        "sampled_logprob": -1.0,
        "sampled_reward": sample.player_reward,
        "greedy": sample.greedy,
        "greedy_finish_reason": None if sample.greedy is None else "stop",
        "opponent_sample": sample.opponent,
        "opponent_sample_token_ids": _tokens(sample.opponent) if compared else None,
        "opponent_sample_finish_reason": "stop" if compared else None,
        "opponent_sample_reward": sample.opponent_reward,
        **{
            name: value if compared else None
            for name, value in {
                "opponent_human_logprob": -2.0,
                "opponent_sample_logprob": -3.0,
                "player_opponent_sample_logprob": -3.5,
                "human_margin": sample.margin,
                "opponent_margin": 0.0,
            }.items()
        },
    }


def _tokens(text: str | None) -> list[int]:
    return list(range(len((text or "").split()) + 1))
