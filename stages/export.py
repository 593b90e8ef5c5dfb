"""export: a player as a plain model folder for transformers and vLLM, with a model card."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import Artifact, Manifest, open_artifact, read_manifest, run_root
from stages.artifacts.files import fsync_path, make_folder, writing
from stages.artifacts.json_file import read_object
from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.locks import hold, lock_path
from stages.artifacts.manifest import MANIFEST_NAME, check_file
from stages.artifacts.pointer import Pointer, read_pointer
from stages.artifacts.produce import check_outside_artifacts
from stages.config import RunConfig
from stages.data.measures import INTERVALS_FILE, METRICS_FILE
from stages.decisions import outcome, read_decision
from stages.errors import ConfigError, InputError, SpinError
from stages.headlines import in_order, kind_of
from stages.layout import RunLayout, is_of_start
from stages.lineage import (
    Lineage,
    flat,
    made_with,
    notable_settings,
    trace,
    without_root,
)
from stages.model.base import BASE_NAME, is_adapter
from stages.model.source import MODEL_FILES, ModelSource, resolve_model
from stages.model_card import HUB_ID, Card, Data, Evaluated, Played, model_card
from stages.recipe import Recipe
from stages.reproduce import recorded
from stages.run_record import read_recipe

log = logging.getLogger("spin")

CARD = "README.md"
LINEAGE = "lineage.json"
_METRICS = (
    "sampled_accuracy", "greedy_accuracy", "heldout_reward_accuracy", "heldout_reward_margin",
    "human_logprob_per_token", "sampled_mean_tokens",
)  # fmt: skip
"""What a card shows of the run's own evaluations, after the metric that the gate asks."""
_MAX_COLUMNS = 6


@dataclass(frozen=True)
class Export:
    """A player to be exported."""

    iteration: int
    source: ModelSource
    is_champion: bool

    @property
    def merges(self) -> bool:
        """Tell whether it is an adapter, which is merged into its base."""
        return is_adapter(self.source.path)


def export(
    layout: RunLayout, out: Path, iteration: int | None = None, *, verify: bool = True
) -> Export:
    """Write the champion, or the player of an iteration, as the folder `out`.

    It holds weights (adapters merged into them), configuration, tokenizer, chat template, the model
    card README.md, and lineage.json. It is filled in a hidden sibling, flushed, and renamed.

    Raises:
        InputError: there is no champion, or no such player.
        CorruptError: bytes are not those of the manifests.
        ConfigError: `out` exists, or lies in a run or an artifact.
        BusyError: another process is exporting to it.
        NoSpaceError: the disk is full.
    """
    _check_place(out)
    found = _find(layout, iteration, verify)
    folder = found.source.verified()
    with hold(lock_path(out), f"export to {out}"), writing(out):
        _check_place(out)
        partial = out.with_name(f".{out.name}.export.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        make_folder(partial)
        try:
            if found.merges:
                _merge(folder, partial)
            else:
                assert found.source.artifact is not None, "players are artifacts"
                _copy(found.source.artifact, partial)
            lineage = trace([folder.resolve()], layout.root.resolve())
            text = json.dumps(lineage.to_json(), indent=1, sort_keys=True) + "\n"
            (partial / LINEAGE).write_text(text, encoding="utf-8")
            card = describe(layout, found, lineage, verify=verify)
            (partial / CARD).write_text(model_card(card), encoding="utf-8")
            _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # the failure itself is what to tell
            raise
    for problem in card.problems:
        log.warning("%s: its card names a problem: %s", out, problem)
    return found


def describe(layout: RunLayout, found: Export, lineage: Lineage, *, verify: bool = True) -> Card:
    """Return what the card of an export says.

    What is damaged beside the player, such as an evaluation, is left out and named as a problem.
    """
    config = _as_used(read_recipe(layout), layout, found.iteration, lineage)
    manifest = read_manifest(found.source.path)
    problems = [lineage.relative(problem) for problem in lineage.problems()]
    measured = _measured(layout, found.iteration, config, problems, verify=verify)
    played = _played(layout, found, lineage, problems)
    start, base_model = _start(lineage)
    sources = [node.sources() for node, _ in lineage.made() if node.sources()]
    names = [
        s[n] for s in sources if s.get("commits") for n in ("source", "heldout_source") if n in s
    ]
    return Card(
        run=config.name,
        iteration=found.iteration,
        is_champion=found.is_champion,
        key=manifest.key,
        merged=found.merges,
        game={
            "policy": config.pair.policy,
            **{name: manifest.config["train"].get(name) for name in ("loss", "beta")},
        },
        start=start,
        base_model=base_model,
        datasets=sorted({name for name in names if HUB_ID.fullmatch(str(name))}),
        measured=measured,
        columns={suite: _columns(suite, rows, config) for suite, rows in measured.items()},
        played=played,
        data=[
            Data(n.path, n.key[:KEY_CHARS], n.content, m.counts, n.sources())
            for n, m in lineage.made()
            if m.stage == "prepare"
        ],
        versions={name: sorted(used) for name, used in lineage.versions().items()},
        settings=_public(notable_settings(config.identity())),
        artifact=layout.relative(layout.stage(found.iteration, "train")),
        problems=problems,
    )


def _as_used(recipe: Recipe, layout: RunLayout, iteration: int, lineage: Lineage) -> RunConfig:
    """Return the settings that an iteration's player was made with.

    Those that followed a measurement or a refusal, or were amended since, are not the recipe's.
    """
    for node, manifest in lineage.made():
        if layout.iteration_of(node.path) in (None, iteration):
            recipe = recorded(recipe, manifest, iteration)
    return recipe.for_iteration(iteration)


def _start(lineage: Lineage) -> tuple[str, str | None]:
    """Return the model that the game started from, and its id where it is from the hub.

    Other inputs from outside, such as a model that gives rewards, are no part of the player.
    """
    node = lineage.nodes[lineage.ends[0]]
    while node.manifest is not None and "model" in node.inputs:
        node = lineage.nodes[node.inputs["model"]]
    if node.manifest is not None:
        return "random weights", None
    if node.inside_run:
        return "a model that is not known any more", None
    is_of_hub = node.key.startswith("hub:")
    return node.path, (node.path.rpartition("@")[0] or None) if is_of_hub else None


def _find(layout: RunLayout, iteration: int | None, verify: bool) -> Export:
    pointer = read_pointer(layout.champion)
    champion = layout.iteration_of(pointer.path) if pointer else None
    if iteration is None:
        if pointer is None or champion is None:
            raise InputError(
                f"{layout.root} has no champion yet; promote a player, or export one as it is: "
                "--iteration N"
            )
        iteration = champion
    place = layout.stage(iteration, "train")
    if not (place / MANIFEST_NAME).is_file():
        raise InputError(f"{layout.root}: iteration {iteration} has no player ({place}); train it")
    source = resolve_model(str(place), None, layout.root, verify)
    is_champion = iteration == champion
    if is_champion and pointer is not None and source.ref.key != pointer.key:
        raise InputError(
            f"{layout.champion} points to {pointer.path} with key {pointer.key[:KEY_CHARS]}, but "
            f"{source.ref.key[:KEY_CHARS]} is there; roll back: spin promote {layout.root} "
            "--rollback"
        )
    return Export(iteration, source, is_champion)


def _check_place(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(
            f"{out} exists; nothing is overwritten: name another --export, or delete it"
        )
    check_outside_artifacts(out)
    root = run_root(out.resolve())
    if root is not None:
        raise ConfigError(
            f"{out} lies in the run {root}; name a folder outside of it: --export DIR"
        )


def _copy(player: Artifact, folder: Path) -> None:
    """Copy the files of a whole model, and check the copies' hashes."""
    for entry in player.manifest.files:
        if (
            any(Path(entry.path).match(pattern) for pattern in MODEL_FILES)
            and "/" not in entry.path
        ):
            shutil.copyfile(player.file(entry.path), folder / entry.path)
            check_file(folder / entry.path, entry, artifact=folder)


def _merge(adapter: Path, folder: Path) -> None:
    """Write an adapter with its base as one whole model."""
    from stages.model.adapters import weights
    from stages.model.load import load_model
    from stages.model.save import save_model, saved_dtype

    model = load_model(adapter, saved_dtype("auto", adapter))
    state = {name: weight.detach() for name, weight in weights(model)}
    template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    save_model(model, state, folder, adapter, template)
    assert not (folder / BASE_NAME).exists(), "a whole model has no base"


def _publish(partial: Path, out: Path) -> None:
    for path in [p for p in partial.rglob("*") if p.is_file()]:
        path.chmod(partial.stat().st_mode & 0o666)  # safetensors leaves 0600
        fsync_path(path)
    for path in [p for p in partial.rglob("*") if p.is_dir()]:
        fsync_path(path)
    fsync_path(partial)
    partial.rename(out)
    fsync_path(out.parent)


def _measured(
    layout: RunLayout, last: int, config: RunConfig, problems: list[str], *, verify: bool
) -> dict[str, list[Evaluated]]:
    """Return the evaluations of the start and of all iterations up to `last`, by suite.

    Args:
        problems: takes what is wrong with those that are damaged.
    """
    suites = ["", *config.suites]
    found: dict[str, list[Evaluated]] = {suite: [] for suite in suites}
    for iteration in [None, *(t for t in layout.iterations() if t <= last)]:
        label = "start" if iteration is None else f"iteration {iteration}"
        own = layout.start_evaluation if iteration is None else layout.stage(iteration, "evaluate")
        for suite in suites:
            place = layout.suite(iteration, suite) if suite else own
            if not (place / MANIFEST_NAME).is_file():
                continue
            try:
                metrics, intervals = _figures(place, verify=verify)
            except SpinError as error:
                problems.append(f"{label} is left out: {_public_text(layout, error)}")
                continue
            found[suite].append(Evaluated(label, metrics, intervals, iteration == last))
    return {suite: rows for suite, rows in found.items() if rows}


def _figures(place: Path, *, verify: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics of an evaluation and their intervals."""
    artifact = open_artifact(place, verify=verify)
    has = {entry.path for entry in artifact.manifest.files}
    intervals = read_object(artifact, INTERVALS_FILE) if INTERVALS_FILE in has else {}
    return read_object(artifact, METRICS_FILE), intervals


def _columns(suite: str, rows: list[Evaluated], config: RunConfig) -> list[str]:
    if not suite:
        names = [config.promote.metric, *_METRICS]
    else:
        asked = [
            name.removeprefix(f"{suite}.")
            for name in _asked(config)
            if name.startswith(f"{suite}.")
        ]
        found = [*(n for r in rows for n in r.intervals), *(n for r in rows for n in r.metrics)]
        names = [*asked, *in_order(found, kind_of(config, suite))]
    present = [n for n in dict.fromkeys(names) if any(n in row.metrics for row in rows)]
    return present[:_MAX_COLUMNS]


def _asked(config: RunConfig) -> list[str]:
    return config.promote.gate.metrics() if config.promote.gate else []


def _played(
    layout: RunLayout, found: Export, lineage: Lineage, problems: list[str]
) -> list[Played]:
    """Return the iterations up to the exported one.

    Args:
        problems: takes what is wrong with decisions that are damaged.
    """
    players = {n.path: m for n, m in lineage.made() if m.stage == "train"}
    varying = _varying(list(players.values()))
    pointer = read_pointer(layout.champion)
    rows = []
    for iteration in [t for t in layout.iterations() if t <= found.iteration]:
        path = layout.relative(layout.stage(iteration, "train"))
        trained = players.get(path)
        try:
            verdict, reasons = _verdict(layout, iteration, pointer)
        except SpinError as error:
            verdict, reasons = "not known", []
            problems.append(_public_text(layout, error))
        settings = flat(trained.config) if trained else {}
        rows.append(
            Played(
                iteration=iteration,
                opponent=trained.inputs["model"].path if trained else "",
                key=trained.key[:KEY_CHARS] if trained else "",
                pairs=trained.inputs["pairs"].key[:KEY_CHARS] if trained else "",
                own_settings={name: settings[name] for name in varying if name in settings},
                commit=made_with(trained).get("commit", "") if trained else "",
                verdict=verdict,
                reasons=reasons,
                led_here=trained is not None,
            )
        )
    return rows


def _varying(players: list[Manifest]) -> list[str]:
    """Return the settings that are not the same in all players."""
    trees = [flat(manifest.config) for manifest in players]
    names = dict.fromkeys(name for tree in trees for name in tree)
    return [n for n in names if any(tree.get(n) != trees[0].get(n) for tree in trees)]


def _verdict(layout: RunLayout, iteration: int, pointer: Pointer | None) -> tuple[str, list[str]]:
    out = layout.stage(iteration, "promote")
    if not (out / MANIFEST_NAME).is_file():
        return "not decided", []
    decision = read_decision(out)
    verdict = outcome(layout, iteration, promoted=decision.promoted, pointer=pointer)
    return verdict, [*decision.reasons, *_gain(decision.gain)]


def _gain(gain: Mapping[str, Any] | None) -> list[str]:
    """Return in words what a decision says of the player against whom it had to beat."""
    numbers = [(gain or {}).get(name) for name in ("gain", "low", "high")]
    if gain is None or not all(isinstance(number, int | float) for number in numbers):
        return []
    value, low, high = numbers
    rival = "start" if is_of_start(str(gain.get("rival"))) else "champion before"
    return [
        f"{gain.get('metric')} against the {rival}, on the same examples: {value:+.4g} "
        f"[{low:+.3g}, {high:+.3g}]"
    ]


def _public_text(layout: RunLayout, error: SpinError) -> str:
    """Return what an error says, without where the run lies on this machine."""
    return without_root(without_root(str(error), layout.root), layout.root.resolve())


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without the folders of this machine, which are no one's business."""
    return {
        name: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for name, value in settings.items()
    }
