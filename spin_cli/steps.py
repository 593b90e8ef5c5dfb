"""A step: one stage with its inputs, as a call in this process or as the command that equals it."""

import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import tracking
from stages.artifacts import Manifest
from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import RunConfig, TaskSuiteConfig, suite_of
from stages.errors import ConfigError
from stages.headlines import in_order, rival_of
from stages.layout import RunLayout

if TYPE_CHECKING:
    from stages.engines import OpenEngine
    from stages.evidence import PromoteInputs

MAX_FIGURES = 8
FIGURES = {
    "generate": ("rows", "drawn", "mean_response_tokens", "cut_off_share", "empty", "parity_mean"),
    "reward": ("rows", "mean_reward", "decided_share", "dropped_no_score"),
    "pair": ("pairs", "pairs_own", "identical_share", "length_accuracy"),
    "train": ("pairs", "steps", "first_loss", "last_loss", "last_accuracy", "last_margin"),
    "evaluate": (
        "sampled_accuracy", "greedy_accuracy", "heldout_reward_accuracy", "heldout_kl",
        "sampled_mean_tokens", "sampled_cut_off_share", "human_logprob_per_token", "prompts",
    ),
}  # fmt: skip
"""What is told first of each stage, where it has more figures than fit a line; of a suite see
`in_order`."""
log = logging.getLogger("spin")


class ShellText(str):
    """Text of a command that the shell is to expand: it is not quoted."""

    __slots__ = ()


@dataclass(frozen=True)
class Step:
    """One stage to run."""

    stage: str
    out: Path
    iteration: int | None = None
    """None for what is outside of iterations: prepare, sft, and the start's evaluation."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The inputs, by the names of the command's options."""
    several: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Inputs of which there may be more than one, likewise."""

    def title(self) -> str:
        """Return what the step is called in messages."""
        if "suite" in self.options:
            of = "" if self.iteration is None else f"iteration {self.iteration} "
            return f"{of}{self.stage} --suite {self.options['suite']}"
        if self.iteration is None:
            return self.stage
        title = f"iteration {self.iteration} {self.stage}"
        return f"{title} ({self.out.name})" if self.out.name.startswith("pool-") else title


def command(step: Step, settings: Sequence[str]) -> str:
    """Return the command line that does what `execute` does.

    Args:
        settings: what chooses the config: `--config RECIPE`, `--no-verify`, overrides.
    """
    words = ["spin", step.stage]
    if step.stage == "promote":
        words.append(str(step.out.parents[2]))
    given = [*step.options.items(), *((n, v) for n, vs in step.several.items() for v in vs)]
    for name, value in given:
        words += [f"--{name.replace('_', '-')}", value]
    if step.stage != "promote":
        words += ["--out", str(step.out)]
    if step.iteration is not None:
        words += ["--iteration", str(step.iteration)]
    words += settings
    return " ".join(str(w) if isinstance(w, ShellText) else shlex.quote(w) for w in words)


def execute(step: Step, config: RunConfig, open_engine: "OpenEngine | None" = None) -> Manifest:
    """Run a step in this process, and say in one line what came of it.

    Args:
        open_engine: opens the engines of generate and evaluate; None: one for each.
    """
    tracking.check(config.tracking)
    _use_threads(config.threads)
    was_there = (step.out / MANIFEST_NAME).is_file()
    start = time.monotonic()
    manifest = _call(step, config, open_engine)
    if not was_there:
        seconds = time.monotonic() - start
        log.info("%s: %.1f s%s", step.title(), seconds, _figures(manifest))
    tracking.summarize(config, step.out, manifest)
    return manifest


def _call(step: Step, config: RunConfig, open_engine: "OpenEngine | None") -> Manifest:
    """Call the stage; stages are imported here, since they import torch."""
    if step.stage not in ("sft", "score", "train") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"{step.title()} runs in one process, and a launcher started "
            f"{os.environ['WORLD_SIZE']}; start it without, and set train.processes for a whole run"
        )
    options, out = step.options, step.out
    match step.stage:
        case "prepare":
            from stages import prepare

            return prepare.run(_of_suite(config, options.get("suite")), out)
        case "sft":
            from stages import sft

            inputs = sft.SftInputs(
                data=Path(options["data"]),
                model=options.get("model"),
                revision=options.get("revision"),
            )
            return sft.run(config, inputs, out)
        case "promote":
            from stages import promote

            return promote.run(config, _promote_inputs(step, config), out)
        case _:
            return _call_of_iteration(step, config, open_engine)


def _call_of_iteration(step: Step, config: RunConfig, open_engine: "OpenEngine | None") -> Manifest:
    options, out = step.options, step.out
    model, revision = options.get("model", ""), options.get("revision")
    match step.stage:
        case "generate":
            from stages import engines, generate

            return generate.run(
                config,
                generate.GenerateInputs(
                    model=model,
                    revision=revision,
                    data=Path(options["data"]),
                    iteration=step.iteration or 0,
                    part=_part(options.get("part")),
                ),
                out,
                open_engine=open_engine or engines.open_engine,
            )
        case "reward":
            from stages import reward

            return reward.run(
                config,
                reward.RewardInputs(
                    data=Path(options["data"]), generations=_paths(step, "generations")
                ),
                out,
            )
        case "pair":
            from stages import pair

            return pair.run(
                config,
                pair.PairInputs(
                    data=Path(options["data"]),
                    generations=_paths(step, "generations"),
                    rewards=_path(options.get("rewards")),
                    model=model,
                    revision=revision,
                    iteration=step.iteration or 0,
                    replay=_paths(step, "replay"),
                ),
                out,
            )
        case "score":
            from stages import score

            pairs = Path(options["pairs"])
            return score.run(config, score.ScoreInputs(pairs, model, revision), out)
        case "train":
            from stages import train

            pairs = Path(options["pairs"])
            before = _path(options.get("optimizer_from"))
            return train.run(config, train.TrainInputs(pairs, model, revision, before), out)
        case "evaluate" if "suite" in options:
            from stages import engines, suite

            places = {n: _path(options.get(n)) for n in ("data", "answers", "against", "judged")}
            return suite.run(
                config,
                suite.SuiteInputs(options["suite"], options.get("model"), revision, **places),
                out,
                open_engine=open_engine or engines.open_engine,
            )
        case "evaluate":
            from stages import engines, evaluate

            return evaluate.run(
                config,
                evaluate.EvaluateInputs(
                    model=model,
                    revision=revision,
                    data=Path(options["data"]),
                    opponent=options.get("opponent"),
                    opponent_revision=options.get("opponent_revision"),
                    opponent_evaluation=_path(options.get("opponent_evaluation")),
                ),
                out,
                open_engine=open_engine or engines.open_engine,
            )
    raise AssertionError(f"no stage {step.stage}")


def _of_suite(config: RunConfig, name: str | None) -> RunConfig:
    """Return the config that prepares a suite's own prompts, all of which it asks."""
    if name is None:
        return config
    suite = suite_of(config, name)
    data = suite.prepares() if isinstance(suite, TaskSuiteConfig) else None
    if data is None:
        raise ConfigError(f"suites.{name} has no prompts of its own; give it a `data` section")
    return config.model_copy(update={"prepare": data})


def _promote_inputs(step: Step, config: RunConfig) -> "PromoteInputs":
    from stages.evidence import find_evidence

    assert step.iteration is not None, "an iteration's player is promoted"
    return find_evidence(RunLayout(step.out.parents[2]), config.promote, step.iteration)


def _paths(step: Step, name: str) -> tuple[Path, ...]:
    return tuple(Path(text) for text in step.several.get(name, ()))


def _part(text: str | None) -> tuple[int, int] | None:
    """Return (K, M) of a text K/M; see `GenerateInputs.part`."""
    if text is None:
        return None
    member, slash, members = text.partition("/")
    if not (slash and member.isdecimal() and members.isdecimal()):
        raise ConfigError(
            f"--part {text} is not K/M, such as 0/2 (the newest opponent's part beside a pool of "
            "2) or 1/2 (that of the pool's first member)"
        )
    return int(member), int(members)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _use_threads(count: int | None) -> None:
    """Make torch use `count` CPU threads, without importing it here."""
    if count is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(count)  # torch reads it when a stage imports it
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def _figures(manifest: Manifest) -> str:
    """Return a stage's key figures, as many as fit a line; of a suite also whom it compares with.

    Of a suite it is told how many are left out: which they are depends on the recipe.
    """
    figures = {name: value for name, value in ordered(manifest).items() if value is not None}
    shown = [f"{name} {_figure(value)}" for name, value in list(figures.items())[:MAX_FIGURES]]
    if manifest.stage == "suite":
        rival = rival_of(manifest)
        shown = [f"against {rival}", *shown] if rival else shown
        more = len(figures) - MAX_FIGURES
        shown += [f"and {more} more"] if more > 0 else []
    return "".join(f", {text}" for text in shown)


def ordered(manifest: Manifest) -> dict[str, Any]:
    """Return a stage's key figures, then its other metrics and counts."""
    happened = {n: v for n, v in manifest.counts.items() if v or not n.startswith("dropped_")}
    figures = {**manifest.metrics, **happened}
    if manifest.stage == "suite":
        first = in_order(manifest.metrics, manifest.config.get("kind"))
    else:
        first = [name for name in FIGURES.get(manifest.stage, ()) if name in figures]
    return {name: figures[name] for name in [*first, *figures]}


def _figure(value: float | int | str | bool) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
