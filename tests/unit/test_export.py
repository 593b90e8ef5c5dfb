"""A player as a plain model folder: what it holds, what its card says, and who may be sent it."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import (
    Outcome,
    Plan,
    move_pointer,
    open_artifact,
    produce,
    read_manifest,
    run_root,
)
from stages.artifacts.locks import hold, lock_path
from stages.artifacts.manifest import InputRef
from stages.artifacts.pointer import PointerEntry
from stages.layout import RunLayout
from stages.model.load import load_model
from stages.model_card import block, cell, code
from stages.recipe import load_recipe
from stages.run_record import start_or_resume
from tests.hub_server import serving
from tests.lora_tools import make_adapter

ROOT = Path(__file__).parents[2]
METRIC = "sampled_accuracy"
EVIL = "a`b``c|d\\|e\n# Own <script>alert(1)</script> [x](http://evil.example) ---\n---\n\u202e"
HUB_KEY = "hub:0"
DECISION = {"metric": METRIC, "value": 0.6, "champion_value": 0.5, "min_value": None,
            "min_gain": 0.0, "reasons": []}  # fmt: skip
TOKEN = "hf_thisIsNoRealTokenButLooksLikeOne"


def spin(*words: str | Path, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def make(
    out: Path,
    stage: str,
    files: Path | dict[str, Any],
    config: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    info: dict[str, Any] | None = None,
    fingerprints: dict[str, str] | None = None,
    **inputs: InputRef,
) -> InputRef:
    """An artifact with the files of a folder, or with JSON files; returns how others name it."""

    def fill(workspace: Any) -> Outcome:
        if isinstance(files, Path):
            shutil.copytree(files, workspace.path, dirs_exist_ok=True)
            pq.write_table(pa.table({"step": [1]}), workspace.file("metrics.parquet"))
            workspace.file("optimizer/state.safetensors").write_bytes(b"large")
        else:
            for name, value in files.items():
                workspace.file(name).write_text(json.dumps(value))
        return Outcome(counts={"rows": 3}, metrics=metrics or {}, info=info or {})

    where = {"out": f"{out.parent.name}/{out.name}"}
    plan = Plan(stage, 1, {**(config or {}), **where}, inputs, fingerprints or {})
    produce(out, plan, fill)
    return open_artifact(out).input_ref(run_root(out))


def evaluate(layout: RunLayout, out: Path, model: InputRef, value: float) -> None:
    metrics = {METRIC: value, "greedy_accuracy": 1.0}
    intervals = {METRIC: [value - 0.05, value + 0.05]}
    files = {"metrics.json": metrics, "intervals.json": intervals}
    make(out, "evaluate", files, metrics=metrics, model=model)


def new_run(
    folder: Path,
    model: Path,
    name: str = "mine",
    start: InputRef | None = None,
    suites: dict[str, Any] | None = None,
    judge: InputRef | None = None,
) -> RunLayout:
    """A run of two iterations with whole models: the first is champion, the second refused."""
    layout = RunLayout(folder / "run")
    recipe = load_recipe(None, [f"promote.metric={METRIC}", "train.beta=0.3"])
    recipe.base.update(name=name, suites=suites or {})
    start_or_resume(layout, recipe)
    info = {"source": name, "commits": {f"{name}@main": "0"}}
    data = make(layout.data, "prepare", {"a.json": {}}, info=info, fingerprints={"source": name})
    start = start or InputRef(path="owner/base@abc", inside_run=False, key=HUB_KEY, content="c")
    sft = make(layout.sft, "sft", model, data=data, model=start)
    evaluate(layout, layout.start_evaluation, sft, 0.5)
    opponent = sft
    for iteration, value in enumerate((0.7, 0.6)):
        others = {"reward_model": judge} if judge else {}
        pairs = make(
            layout.stage(iteration, "score"), "score", {"a.json": {}}, model=opponent, **others
        )
        config = {"train": {"beta": 0.3 + iteration, "loss": "sigmoid"}}
        train = layout.stage(iteration, "train")
        trained = make(train, "train", model, config, model=opponent, pairs=pairs)
        evaluate(layout, layout.stage(iteration, "evaluate"), trained, value)
        decision = DECISION | {
            "promoted": value > 0.65, "value": value, "reasons": [f"{METRIC} is {value}", name],
            "gain": {"metric": METRIC, "gain": value - 0.5, "low": 0.05, "high": 0.25},
        }  # fmt: skip
        make(layout.stage(iteration, "promote"), "promote", {"decision.json": decision})
        if decision["promoted"]:
            path, key = layout.relative(train), read_manifest(train).key
            entry = PointerEntry(path=path, key=key, reason=f"why {name}", decision_key="d", at="t")
            move_pointer(layout.champion, entry)
            opponent = trained
    return layout


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter, and the text below it."""
    text = (folder / "README.md").read_text()
    found = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", text, re.DOTALL)
    assert found
    front = yaml.safe_load(found[1])
    assert isinstance(front, dict)
    return front, found[2]


class TestTheFolder:
    def test_it_is_the_champion_as_transformers_loads_it(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["README.md", "lineage.json", *(p.name for p in tiny_model_dir.iterdir())]
        )
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.generation_config.eos_token_id is not None
        tokenizer = AutoTokenizer.from_pretrained(out)
        messages = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hello\n"
        for name, weight in load_file(tiny_model_dir / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], weight)
        mode = {path.stat().st_mode & 0o777 for path in out.iterdir()}
        assert mode == {0o666 & ~_umask()}

    def test_an_adapter_is_merged_into_its_base(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        place = layout.root / "iterations/002/adapter"
        make_adapter(layout.sft, place)
        train = layout.stage(2, "train")
        sft = open_artifact(layout.sft).input_ref(layout.root)
        make(train, "train", place, {"train": {}}, model=sft, pairs=sft)
        shutil.rmtree(place)
        spin("promote", layout.root, "--iteration", "2", "--export", out)
        assert not (out / "base.json").exists()
        assert not list(out.glob("adapter*"))
        merged, plain = load_model(train), AutoModelForCausalLM.from_pretrained(out)
        start = load_model(layout.sft).state_dict()
        for name, weight in merged.state_dict().items():
            assert torch.equal(plain.state_dict()[name], weight), name
        assert any(not torch.equal(start[n], w) for n, w in plain.state_dict().items())
        assert "were merged into the weights" in card_of(out)[1]

    def test_damage_is_found_before_anything_is_there(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        weights = layout.stage(0, "train") / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = spin("promote", layout.root, "--export", out, expect=4)
        assert "model.safetensors is damaged" in result.stderr
        assert [p.name for p in tmp_path.glob(".out.*")] in ([], [".out.lock"])
        assert not out.exists()

    def test_a_failure_leaves_nothing_and_what_a_kill_left_is_no_part_of_it(
        self, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        left = tmp_path / ".out.export.partial"
        left.mkdir()
        (left / "evil.py").touch()
        with monkeypatch.context() as patch:
            patch.setattr("stages.export.model_card", lambda _: 1 / 0)
            spin("promote", layout.root, "--export", out, expect=1)
        assert not out.exists()
        assert not left.exists()
        left.mkdir()
        (left / "evil.py").touch()
        spin("promote", layout.root, "--export", out)
        assert not (out / "evil.py").exists()
        assert not left.exists()

    def test_every_file_is_flushed_before_the_rename(
        self, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        seen: list[str] = []
        real = os.fsync

        def flushed(descriptor: int) -> None:
            seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real(descriptor)

        monkeypatch.setattr("os.fsync", flushed)
        spin("promote", layout.root, "--export", out)
        partial = tmp_path / ".out.export.partial"
        wanted = {str(partial / path.name) for path in out.iterdir()} | {str(partial)}
        assert wanted <= set(seen)
        assert seen[-1] == str(tmp_path)

    @pytest.mark.parametrize(
        ("place", "code", "message"),
        [
            ("there", 2, "exists; nothing is overwritten"),
            ("file", 2, "exists; nothing is overwritten"),
            ("run/out", 2, "lies in the run"),
            ("run/data/out", 2, "lies inside the finished artifact"),
        ],
    )
    def test_a_place_that_is_taken_is_refused(
        self, tmp_path: Path, tiny_model_dir: Path, place: str, code: int, message: str
    ) -> None:
        layout = new_run(tmp_path, tiny_model_dir)
        (tmp_path / "there").mkdir()
        (tmp_path / "file").touch()
        result = spin("promote", layout.root, "--export", tmp_path / place, expect=code)
        assert message in result.stderr
        assert list((tmp_path / "there").iterdir()) == []

    def test_two_at_once_are_refused(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        with hold(lock_path(out), "export"):
            spin("promote", layout.root, "--export", out, expect=75)

    def test_without_a_champion_or_player_there_is_nothing(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        result = spin("promote", layout.root, "--iteration", "7", "--export", out, expect=3)
        assert "iteration 7 has no player" in result.stderr
        layout.champion.unlink()
        result = spin("promote", layout.root, "--export", out, expect=3)
        assert "has no champion yet" in result.stderr
        spin("promote", layout.root, "--iteration", "0", "--export", out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestTheCard:
    def test_it_tells_figures_decisions_lineage_and_settings(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        front, text = card_of(out)
        assert front["base_model"] == "owner/base"
        assert front["pipeline_tag"] == "text-generation"
        assert {"spin", "self-play"} <= set(front["tags"])
        assert "It is the champion of its run." in text
        assert "| start | 0.5 [0.45, 0.55] | 1 |" in text
        assert "| **iteration 0** | 0.7 [0.65, 0.75] | 1 |" in text
        assert "| 0 | champion | `sampled_accuracy is 0.7`<br>`mine`<br>`sampled_accuracy " in text
        assert "on the same examples: +0.2 [+0.05, +0.25]` |" in text
        train, data = read_manifest(layout.stage(0, "train")), read_manifest(layout.data)
        assert train.key[:12] in text
        assert data.content() in text
        assert str(train.git["commit"])[:12] in text or train.git["commit"] is None
        assert "train.beta: 0.3" in text
        assert "spin reproduce RUN/iterations/000/train" in text
        lineage = json.loads((out / "lineage.json").read_text())
        assert {node["path"] for node in lineage["nodes"].values()} >= {"data", "models/sft"}
        assert "iteration 1" not in text, "what came later is not its own"

    def test_suites_have_tables_of_their_own(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        suites = {"sums": {"kind": "task", "num_samples": 4, "k": [1, 4]}}
        layout = new_run(tmp_path, tiny_model_dir, suites=suites)
        for iteration, value in ((None, 0.25), (0, 0.5), (1, 0.75)):
            files = {"metrics.json": {"pass@4": value, "prompts": 9},
                     "intervals.json": {"pass@4": [value - 0.1, value + 0.1]}}  # fmt: skip
            make(layout.suite(iteration, "sums"), "suite", files)
        spin("promote", layout.root, "--export", tmp_path / "out")
        text = card_of(tmp_path / "out")[1]
        table = text.partition("Suite `sums`:\n\n")[2].partition("\n\n")[0].splitlines()
        assert table == [
            "| model | `pass@4` | `prompts` |",
            "| --- | ---: | ---: |",
            "| start | 0.25 [0.15, 0.35] | 9 |",
            "| **iteration 0** | 0.5 [0.4, 0.6] | 9 |",
        ]
        assert "No other task was measured." not in text

    def test_a_refused_player_says_so(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        result = spin("promote", layout.root, "--iteration", "1", "--export", out)
        assert "iteration 1, not the champion" in result.stderr
        text = card_of(out)[1]
        assert "**It is not the champion of its run**" in text
        assert "| 1 | refused | " in text
        assert "train.beta=1.3`" in text, "a setting that is not the same in all iterations"

    def test_paths_of_this_machine_are_not_in_it(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        for name in ("README.md", "lineage.json"):
            assert str(tmp_path) not in (out / name).read_text()

    def test_a_start_from_no_hub_names_no_base_model(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        start = InputRef(path="demo-base", inside_run=False, key="folder:0", content="c")
        layout, out = new_run(tmp_path, tiny_model_dir, start=start), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        assert "base_model" not in card_of(out)[0]

    def test_a_model_that_gives_rewards_is_not_the_one_that_the_game_started_from(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        judge = InputRef(path="owner/judge@abc", inside_run=False, key="hub:1", content="c")
        layout, out = new_run(tmp_path, tiny_model_dir, judge=judge), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        front, text = card_of(out)
        assert front["base_model"] == "owner/base"
        assert "The game started from `owner/base@abc`." in text
        assert "owner/judge" in (out / "lineage.json").read_text(), "the test needs one"

    def test_the_settings_are_those_that_were_used(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        """In iteration 1 the recipe says 0.3, and 1.3 was trained with, as after a retry."""
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        spin("promote", layout.root, "--iteration", "1", "--export", out)
        assert "train.beta: 1.3\n" in card_of(out)[1]

    def test_the_start_is_not_called_a_champion(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        for iteration, rival in enumerate(("start/evaluate", "iterations/000/evaluate")):
            place = layout.stage(iteration, "promote")
            shutil.rmtree(place)
            gain = {"metric": METRIC, "gain": 0.2, "low": 0.1, "high": 0.3, "rival": rival}
            found = {"promoted": False, "value": 0.7, "reasons": ["r"], "gain": gain}
            make(place, "promote", {"decision.json": DECISION | found})
        spin("promote", layout.root, "--iteration", "1", "--export", out)
        first, second = re.findall("against the (.*?), on the same examples", card_of(out)[1])
        assert (first, second) == ("start", "champion before")

    def test_overlapping_intervals_are_not_said_to_decide(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        limits = card_of(out)[1].partition("## Limits")[2]
        assert "overlap do not mean that the models cannot be told apart" in limits
        assert "is no gain" not in limits

    def test_a_player_that_was_taken_back_is_rolled_back(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        train = layout.stage(1, "train")
        entry = PointerEntry(
            path=layout.relative(train), key=read_manifest(train).key, reason="r",
            decision_key="e", at="t",
        )  # fmt: skip
        move_pointer(layout.champion, entry)
        decision = layout.stage(1, "promote")
        shutil.rmtree(decision)
        make(decision, "promote", {"decision.json": DECISION | {"promoted": True}})
        spin("promote", layout.root, "--rollback")
        spin("promote", layout.root, "--iteration", "1", "--export", out)
        text = card_of(out)[1]
        assert "| 1 | rolled back | " in text
        assert "| 0 | champion | " in text

    def test_what_is_damaged_beside_the_player_is_left_out_and_named(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        for place in (
            layout.start_evaluation / "metrics.json",
            layout.stage(0, "promote") / "decision.json",
        ):
            place.write_bytes(place.read_bytes().replace(b": ", b":\t"))
        result = spin("promote", layout.root, "--iteration", "1", "--export", out)
        text = card_of(out)[1]
        problems = [line for line in text.splitlines() if line.startswith("- Problem: ")]
        assert len(problems) == 2
        assert "start is left out: start/evaluate/metrics.json is damaged" in problems[0]
        assert "iterations/000/promote/decision.json is damaged" in problems[1]
        assert result.stderr.count("its card names a problem: ") == 2
        assert "| start |" not in text
        assert "| iteration 0 | 0.7 " in text
        assert "| 0 | not known | " in text
        assert str(tmp_path) not in text
        spin("promote", layout.root, "--iteration", "1", "--export", out, "--no-verify", expect=2)
        spin("promote", layout.root, "--iteration", "1", "--export", tmp_path / "b", "--no-verify")
        assert "| start | 0.5 " in card_of(tmp_path / "b")[1]

    def test_problems_of_the_lineage_are_told_without_where_the_run_lies(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        (layout.stage(0, "score") / "manifest.json").write_text("{}")
        result = spin("promote", layout.root, "--export", out)
        assert "its card names a problem: iterations/000/score: iterations/000/score/" in (
            " ".join(result.stderr.split())
        )
        for name in ("README.md", "lineage.json"):
            text = (out / name).read_text()
            assert "iterations/000/score/manifest.json is damaged" in text
            assert str(tmp_path) not in text

    def test_hostile_names_stay_text(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        start = InputRef(path=f"{EVIL}@abc", inside_run=False, key=HUB_KEY, content="c")
        layout, out = new_run(tmp_path, tiny_model_dir, EVIL, start), tmp_path / "out"
        spin("promote", layout.root, "--export", out)
        front, text = card_of(out)
        assert front.keys() == {"library_name", "pipeline_tag", "tags"}
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        inner = [child for token in tokens for child in token.children or []]
        links = {str(t.attrGet("href")) for t in inner if t.type == "link_open"}
        assert links == {"https://arxiv.org/abs/2401.01335"}
        html = {t.content for t in [*tokens, *inner] if t.type in ("html_inline", "html_block")}
        assert html <= {"<br>"}
        headings = [t for t in tokens if t.type == "heading_open"]
        assert [t.tag for t in headings].count("h1") == 1
        assert len(headings) == text.count("\n## ") + 1
        titles = [inline.content for token, inline in pairwise(tokens)
                  if token.type == "heading_open"]  # fmt: skip
        assert not any("Own" in title for title in titles[1:])
        assert "\u202e" not in text

    @pytest.mark.parametrize(
        "text",
        ["a|b", "a\\|b", "\\", "`", "``|`", "a\\\\|b", "|", " x ", "", "\n|\n", "<b>", "a\u2028|b"],
    )
    def test_a_cell_stays_one_cell(self, text: str) -> None:
        table = f"| a | b |\n| --- | --- |\n| {cell(text)} | end |\n"
        tokens = MarkdownIt("commonmark").enable("table").parse(table)
        cells = [cell for before, cell in pairwise(tokens) if before.type == "td_open"]
        assert len(cells) == 2
        assert [child.type for child in cells[0].children or []] == ["code_inline"]
        assert cells[1].content == "end"

    @pytest.mark.parametrize("text", ["a", "`", "a ``` b", "*x*", "![x](y)", "a\n\nb", "x" * 999])
    def test_a_span_stays_a_span_and_a_block_a_block(self, text: str) -> None:
        parse = MarkdownIt("commonmark").parse
        [_, inline, _] = parse(code(text))
        assert [child.type for child in inline.children or []] == ["code_inline"]
        [fence] = parse(block(f"a\n{text}\nb"))
        assert fence.content == f"a\n{text}\nb\n"


class TestTheHistory:
    def test_it_tells_every_move_with_its_reason(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout = new_run(tmp_path, tiny_model_dir, "evil\x1b[31m\nname")
        lines = spin("promote", layout.root, "--history").stdout.splitlines()
        key = read_manifest(layout.stage(0, "train")).key[:12]
        assert lines == [f"* 0  iterations/000/train  {key}  t  why evil name"]
        layout.champion.unlink()
        result = spin("promote", layout.root, "--history")
        assert (result.stdout, "no champion yet" in result.stderr) == ("", True)

    @pytest.mark.parametrize(
        "words",
        [
            (), ("--history", "--rollback"), ("--history", "--iteration", "1"),
            ("--history", "--export", "x"), ("--rollback", "--export", "x"),
            ("--push-to-hub", "a/b"), ("--public", "--export", "x"),
            ("--iteration", "1", "--push-to-hub", "a/b"),
        ],
    )  # fmt: skip
    def test_ways_that_exclude_each_other(
        self, tmp_path: Path, tiny_model_dir: Path, words: tuple[str, ...]
    ) -> None:
        spin("promote", tmp_path, *words, expect=2)


def send(
    layout: RunLayout, out: Path, repo: str, url: str, *words: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which may speak to the server at `url`."""
    home = str(out.parent / "home")
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith("HF_")},
        "HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "spin_cli", "promote", str(layout.root), "--export", str(out),
               "--push-to-hub", repo, *words]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


class TestTheHub:
    def test_the_folder_is_sent_to_a_private_repository_and_the_token_is_written_nowhere(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout, out = new_run(tmp_path, tiny_model_dir), tmp_path / "out"
        with serving() as hub:
            done = send(layout, out, "owner/player", hub.url)
            assert done.returncode == 0, done.stderr
            assert hub.private == {"owner/player": True}
            sent = hub.files["owner/player"]
            assert sent.keys() - {".gitattributes"} == {path.name for path in out.iterdir()}
            assert all(sent[path.name] == path.read_bytes() for path in out.iterdir())
            assert f"Bearer {TOKEN}" in hub.tokens
        assert f"{hub.url}/owner/player" in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(TOKEN.encode() in path.read_bytes() for path in files)

    def test_a_public_or_strange_repository_is_refused_unless_asked_for(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout = new_run(tmp_path, tiny_model_dir)
        with serving() as hub:
            hub.private |= {"owner/open": False, "owner/full": True}
            hub.files |= {"owner/open": {}, "owner/full": {"pytorch_model.bin": b""}}
            done = send(layout, tmp_path / "a", "owner/open", hub.url)
            assert (done.returncode, hub.files["owner/open"]) == (2, {})
            assert "owner/open is public; add --public" in done.stderr
            done = send(layout, tmp_path / "b", "owner/full", hub.url)
            assert done.returncode == 2
            assert "owner/full holds pytorch_model.bin" in done.stderr
            done = send(layout, tmp_path / "c", "owner/open", hub.url, "--public")
            assert done.returncode == 0, done.stderr
            assert "README.md" in hub.files["owner/open"]

    def test_without_a_token_or_a_network_it_is_one_line(
        self, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        layout = new_run(tmp_path, tiny_model_dir)
        done = send(layout, tmp_path / "a", "owner/player", "http://127.0.0.1:9", token="")
        assert done.returncode == 2
        assert re.fullmatch(r"spin: .* needs a token, and there is none; .*\n", done.stderr)
        assert not (tmp_path / "a").exists()
        done = send(layout, tmp_path / "b", "owner/player", "http://127.0.0.1:9")
        assert done.returncode == 1
        [_, line] = done.stderr.splitlines()
        assert "the hub cannot be reached" in line
        assert "is whole: send it with: hf upload owner/player" in line
        assert (tmp_path / "b" / "README.md").is_file()

    @pytest.mark.parametrize(
        "repo", ["../evil", "a/b--c", "a/model.git", "a..b/c", f"a/{'b' * 99}"]
    )
    def test_no_name_of_a_repository_is_refused_before_anything_is_made(
        self, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, repo: str
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        layout = new_run(tmp_path, tiny_model_dir)
        words = ("--export", tmp_path / "a", "--push-to-hub", repo)
        assert "give OWNER/NAME" in spin("promote", layout.root, *words, expect=2).stderr
        assert not (tmp_path / "a").exists()
