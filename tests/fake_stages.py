"""Stages without a model: real artifacts with real keys and inputs, made in milliseconds.

For tests of what surrounds the stages. `python -m tests.fake_stages …` is `spin …` with them.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import stages
from stages.artifacts import Manifest, Outcome, Plan, Workspace, open_artifact, produce, run_root
from stages.artifacts.json_file import write_object
from stages.artifacts.manifest import MANIFEST_NAME, InputRef
from stages.config import RunConfig
from stages.layout import RunLayout
from stages.suites.base import SuiteInputs

PLACES = (
    "data", "rewards", "pairs", "model", "optimizer_from", "opponent", "opponent_evaluation",
    "answers", "against",
)  # fmt: skip
calls: list[str] = []
"""The stages that did work, in order; a stage that is done already is not named."""
accuracy_by_model: dict[str, float | None] = {}
"""From a model's path in its run to the accuracy that evaluate finds, where it is not the usual
0.6, 0.7, … of the start and of iterations 0, 1, …"""
accuracy_of_discriminator: dict[str, float] = {}
"""Likewise held-out reward accuracy, where it is not the usual 0.75."""
divergence_by_model: dict[str, float] = {}
"""Likewise the divergence from the opponent, where it is not the usual 4."""
before_fill: list[Callable[[str, Path], None]] = []
"""Called with stage and output as soon as the workspace is there."""


@dataclass(frozen=True)
class Inputs:
    data: Path | None = None
    generations: tuple[Path, ...] = ()
    replay: tuple[Path, ...] = ()
    part: tuple[int, int] | None = None
    optimizer_from: Path | None = None
    rewards: Path | None = None
    pairs: Path | None = None
    model: str | None = None
    revision: str | None = None
    opponent: str | None = None
    opponent_revision: str | None = None
    opponent_evaluation: Path | None = None
    answers: Path | None = None
    against: Path | None = None
    suite: str | None = None
    iteration: int | None = None


def input_refs(inputs: Inputs, root: Path | None) -> dict[str, InputRef]:
    refs = {}
    names = ["generations", *(f"generations_{i}" for i in range(1, len(inputs.generations)))]
    several = dict(zip(names, inputs.generations, strict=False))
    several |= {f"replay_{i}": path for i, path in enumerate(inputs.replay, 1)}
    for name, value in {**{name: getattr(inputs, name) for name in PLACES}, **several}.items():
        if value is None:
            continue
        if (Path(value) / MANIFEST_NAME).is_file():
            refs[name] = open_artifact(Path(value)).input_ref(root)
        else:
            key = f"folder:{value}"
            refs[name] = InputRef(path=Path(value).name, inside_run=False, key=key, content=key)
    return refs


def run_stage(stage: str, config: RunConfig, inputs: Inputs, out: Path) -> Manifest:
    root = run_root(out)
    refs = input_refs(inputs, root)
    section = getattr(config, stage, None)
    settings: dict[str, Any] = {"seed": config.seed}
    if section is not None:
        settings[stage] = section.identity()
    if inputs.iteration is not None:
        settings["iteration"] = inputs.iteration
    if inputs.part is not None:
        member, members = inputs.part
        share = config.generate.pool.share
        settings["part"] = {"member": member, "members": members, "share": share}
    if inputs.suite is not None:
        settings["suite"] = inputs.suite
    plan = Plan(stage, 1, settings, refs)

    def fill(workspace: Workspace) -> Outcome:
        for hook in before_fill:
            hook(stage, out)
        calls.append(f"{out.parent.name}/{out.name if stage == 'suite' else stage}")
        write_object(workspace.file("config.json"), {"key": plan.key})
        metrics = {"identical_share": 0.5} if stage == "pair" else {}
        if stage in ("evaluate", "suite"):
            metrics = evaluation(refs)
            write_object(workspace.file("metrics.json"), metrics)
        return Outcome(counts={"rows": 3}, metrics=metrics)

    return produce(out, plan, fill)


def evaluation(refs: dict[str, InputRef]) -> dict[str, Any]:
    path = (refs.get("model") or refs["answers"]).path
    iteration = RunLayout(Path()).iteration_of(path)
    usual = 0.6 if iteration is None else round(0.7 + iteration / 10, 3)
    accuracy = accuracy_by_model.get(path, usual)
    metrics: dict[str, Any] = {"sampled_accuracy": accuracy, "greedy_accuracy": 1.0}
    if "opponent" in refs:
        metrics |= {
            "heldout_reward_accuracy": accuracy_of_discriminator.get(path, 0.75),
            "heldout_reward_accuracy_stderr": 0.01,
            "heldout_reward_margin": 1.5,
            "heldout_kl": divergence_by_model.get(path, 4.0),
            "heldout_kl_stderr": 0.0,
            "heldout_identical_share": 0.5,
        }
    return metrics


@contextmanager
def installed() -> Iterator[None]:
    """Put the fakes in the places of the stages, all but promote, while the block runs."""
    names = ("prepare", "sft", "generate", "reward", "pair", "score", "train", "evaluate",
             "suite")  # fmt: skip
    attributes = {name: vars(stages).get(name) for name in names}
    modules = {name: sys.modules.get(f"stages.{name}") for name in names}
    for name in names:
        vars(stages)[name] = sys.modules[f"stages.{name}"] = fake(name)
    try:
        yield
    finally:
        for name in names:
            restore(vars(stages), name, attributes[name])
            restore(sys.modules, f"stages.{name}", modules[name])
        calls.clear()


def restore(table: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        del table[name]
    else:
        table[name] = value


def fake(name: str) -> Any:
    module: Any = ModuleType(f"stages.{name}")
    if name == "prepare":
        module.run = lambda config, out: run_stage("prepare", config, Inputs(), out)
    elif name == "suite":
        module.run, module.SuiteInputs = run_suite, SuiteInputs
    else:
        module.run = lambda config, inputs, out, open_engine=None: run_stage(
            name, config, inputs, out
        )
        setattr(module, f"{name.capitalize()}Inputs", input_class(name))
    return module


def run_suite(config: RunConfig, inputs: SuiteInputs, out: Path, open_engine: Any) -> Manifest:
    places = {n: getattr(inputs, n) for n in ("model", "revision", "data", "answers", "against")}
    return run_stage("suite", config, Inputs(suite=inputs.name, **places), out)


def input_class(name: str) -> Callable[..., Inputs]:
    if name in ("score", "train"):
        return lambda pairs, model, revision=None, optimizer_from=None: Inputs(
            pairs=pairs, model=model, revision=revision, optimizer_from=optimizer_from
        )
    return Inputs


if __name__ == "__main__":
    from spin_cli.__main__ import main

    def maybe_stop(stage: str, out: Path) -> None:
        """Let the test act on this process while it is in the stage that PAUSE_IN names."""
        if os.environ.get("PAUSE_IN") == f"{out.parent.name}/{stage}":
            Path(os.environ["PAUSED"]).touch()
            time.sleep(60)

    before_fill.append(maybe_stop)
    accuracy_by_model.update(json.loads(os.environ.get("ACCURACY", "{}")))
    with installed():
        main()
