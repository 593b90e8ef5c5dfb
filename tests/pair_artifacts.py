"""Made-up artifacts that pair reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.artifacts import Outcome, Plan, TableWriter, open_artifact, produce
from stages.config import ChatConfig
from stages.data.chat import chat_fingerprints
from stages.data.rows import GENERATIONS, PROMPTS, REWARDS

Group = tuple[str, Sequence[tuple[str, float | None]]]
"""The human response, and samples with their rewards; the text `perhaps` is cut off."""


class Made:
    """A folder with the artifacts before pair, for prompts given by hand."""

    def __init__(self, folder: Path, model: Path, renderer: Any) -> None:
        self.folder, self.model, self.renderer = folder, model, renderer
        self.data, self.rewards = folder / "data", folder / "reward"
        self.generations: tuple[Path, ...] = ()

    def write(
        self, prompts: Mapping[str, Group], *, metrics: Mapping[str, float] | None = None
    ) -> "Made":
        """Write the artifact of prepare."""
        rows = [
            {"prompt_id": i, "messages": [{"role": "user", "content": f"Question {i}?"}],
             "response": prompts[i][0], "source": "here", "source_row": 0}
            for i in sorted(prompts)
        ]  # fmt: skip
        self._produce(self.data, "prepare", {"train-00000.parquet": (PROMPTS, rows)}, {}, metrics)
        return self

    def answer(
        self,
        prompts: Mapping[str, Group],
        *,
        name: str = "",
        files: int = 1,
        parts: Sequence[Sequence[str]] | None = None,
    ) -> "Made":
        """Write artifacts of generate and reward.

        Args:
            name: added to the names of their folders.
            files: the shards of each artifact of generate.
            parts: the prompts that each of several artifacts of generate answers.
        """
        ids = sorted(prompts)
        data = {"data": open_artifact(self.data).input_ref(None)}
        places = [self.folder / f"generate{name}{k or ''}" for k in range(len(parts or [0]))]
        for place, part in zip(places, parts or [ids], strict=True):
            samples = [row for i in sorted(part) for row in self._samples(i, prompts[i])]
            size = -(-len(samples) // files)
            shards = {
                f"part-{k:05d}.parquet": (GENERATIONS, samples[k * size : (k + 1) * size])
                for k in range(files)
            }
            self._produce(place, "generate", shards, data)
        self.generations, self.rewards = tuple(places), self.folder / f"reward{name}"
        refs = [open_artifact(place).input_ref(None) for place in places]
        inputs = {f"generations_{k}" if k else "generations": ref for k, ref in enumerate(refs)}
        scored = [
            {"prompt_id": i, "sample_index": k, "reward": reward}
            for i in ids
            for k, (_, reward) in enumerate(prompts[i][1])
            if reward is not None
        ]
        files_of_rewards = {"rewards.parquet": (REWARDS, scored)}
        self._produce(self.rewards, "reward", files_of_rewards, {**data, **inputs})
        return self

    def _samples(self, prompt_id: str, group: Group) -> list[dict[str, Any]]:
        prompt = self.renderer.prompt_tokens([{"role": "user", "content": f"{prompt_id}?"}])
        return [
            {
                "prompt_id": prompt_id,
                "sample_index": index,
                "seed": index,
                "prompt_token_ids": prompt,
                "response_token_ids": self.renderer.response_tokens(text),
                "response": text,
                "finish_reason": "length" if text == "perhaps" else "stop",
                "token_logprobs": [],
            }
            for index, (text, _) in enumerate(group[1])
        ]

    def _produce(self, out: Path, stage: str, files: Any, inputs: Any, metrics: Any = None) -> None:
        def fill(space: Any) -> Outcome:
            for name, (schema, rows) in files.items():
                with TableWriter(space.file(name), schema) as table:
                    table.extend(rows)
            return Outcome(counts={}, metrics=metrics or {})

        fingerprints = chat_fingerprints(self.model, ChatConfig()) if stage == "generate" else {}
        config = {"rows": repr([rows for _, rows in files.values()])}
        produce(out, Plan(stage, 1, config, inputs, fingerprints), fill)
