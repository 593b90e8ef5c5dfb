"""show: what it says of each kind of artifact, which rows it picks, and what it lets through."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from spin_cli.show_views import PIPED_WIDTH
from stages import prepare
from stages.artifacts import (
    Outcome,
    Plan,
    PointerEntry,
    TableWriter,
    Workspace,
    move_pointer,
    open_artifact,
    produce,
    roll_back,
)
from stages.artifacts.json_file import write_object
from stages.artifacts.manifest import Artifact, read_manifest
from stages.data.rows import DROPPED, PAIRS, REWARDS, SCORED_PAIRS, SUITE_EXAMPLES, TRAIN_METRICS
from stages.data.word_sums import THINGS
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.run_record import start_or_resume
from stages.show import Query, read_shown
from tests.made_runs import write_run

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07[red]bold[/red] \u202egnp.exe\nrejected  a forged line\x9b1m\ud7ff"
)


def spin(*words: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def pair_row(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_id": f"{index:032x}",
        "pair_index": 0,
        "prompt_token_ids": [1, 2],
        "chosen_token_ids": [3] * (index % 5 + 1),
        "rejected_token_ids": [4, 5],
        "chosen": f"right {index}",
        "rejected": f"wrong {index}",
        "chosen_source": "human",
        "rejected_source": "sample 0",
        "chosen_reward": None,
        "rejected_reward": None,
        "win_probability": None,
        "iteration": 0,
        "weight": 1.0,
        **changes,
    }


def make(
    out: Path,
    stage: str,
    tables: dict[str, tuple[Any, list[dict[str, Any]]]],
    objects: dict[str, Any] | None = None,
    inputs: dict[str, Artifact] | None = None,
    root: Path | None = None,
    **outcome: Any,
) -> Path:
    def fill(space: Workspace) -> Outcome:
        for name, (schema, rows) in tables.items():
            with TableWriter(space.file(name), schema, group_rows=64) as table:
                table.extend(rows)
        for name, value in (objects or {}).items():
            write_object(space.file(name), value)
        for name, text in outcome.get("texts", {}).items():
            space.file(name).write_text(text)
        return Outcome(counts=outcome.get("counts", {}), metrics=outcome.get("metrics", {}))

    refs = {name: each.input_ref(root) for name, each in (inputs or {}).items()}
    settings = {"seed": 0, **outcome.get("settings", {})}
    produce(out, Plan(stage, 1, settings, inputs=refs), fill)
    return out


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    """A run with prompts, and pairs of some of them with scores that rise with the prompt id."""
    layout = RunLayout(tmp_path / "run")
    recipe = load_recipe(
        None,
        [
            "prepare.format=word_sums",
            "prepare.word_sums.num_examples=300",
            "prepare.heldout_size=20",
        ],
    )
    start_or_resume(layout, recipe)
    prepare.run(recipe.for_iteration(), layout.data)
    data = open_artifact(layout.data)
    ids = sorted(r["prompt_id"] for r in read_shown(data, Query(rows=10**6)).rows)[::2]
    rows = [
        pair_row(i, prompt_id=prompt_id, chosen_reward=float(i % 7), rejected_reward=0.0)
        for i, prompt_id in enumerate(ids)
    ]
    gone = [{"prompt_id": ids[0], "reason": "identical", "detail": "the very same"}]
    make(
        layout.stage(0, "pair"),
        "pair",
        {"part-00000.parquet": (PAIRS, rows), "dropped.parquet": (DROPPED, gone)},
        inputs={"data": data},
        root=layout.root,
        counts={"pairs": len(rows), "dropped_identical": 1, "dropped_refused": 0},
    )
    scored = [
        {**row, "chosen_reward": None, "rejected_reward": None,
         "reference_chosen_logprob": -float(i), "reference_rejected_logprob": -3.0}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    pairs = open_artifact(layout.stage(0, "pair"))
    make(
        layout.stage(0, "score"),
        "score",
        {
            "part-00000.parquet": (SCORED_PAIRS, scored[:70]),
            "part-00001.parquet": (SCORED_PAIRS, scored[70:]),
        },
        inputs={"pairs": pairs},
        root=layout.root,
    )
    return layout


def rows_of(place: Path, **query: Any) -> list[dict[str, Any]]:
    return read_shown(open_artifact(place), Query(**query)).rows


class TestRows:
    def test_each_has_its_own_prompt_though_it_lies_in_another_artifact(
        self, run: RunLayout
    ) -> None:
        texts = {r["prompt_id"]: r["prompt"] for r in rows_of(run.data, rows=10**6)}
        for stage in ("pair", "score"):
            found = rows_of(run.stage(0, stage), rows=10**6)
            assert len(found) > 100
            assert all(row["prompt"] == texts[row["prompt_id"]] for row in found)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize(
        ("stage", "sort", "key"),
        [
            ("score", "margin",
             lambda r: r["reference_chosen_logprob"] - r["reference_rejected_logprob"]),
            ("pair", "margin", lambda r: r["chosen_reward"] - r["rejected_reward"]),
            ("pair", "reward", lambda r: r["chosen_reward"]),
            ("pair", "length", lambda r: r["chosen_tokens"] + r["rejected_tokens"]),
        ],
    )  # fmt: skip
    def test_sorted_ones_are_those_of_a_plain_sort(
        self, run: RunLayout, stage: str, sort: str, key: Any, reverse: bool
    ) -> None:
        place = run.stage(0, stage)
        everything = rows_of(place, rows=10**6)
        plain = sorted(everything, key=key, reverse=not reverse)  # stable: ties by prompt id
        assert rows_of(place, rows=9, offset=4, sort=sort, reverse=reverse) == plain[4:13]

    def test_by_prompt_is_the_tables_order_and_backwards(self, run: RunLayout) -> None:
        everything = rows_of(run.stage(0, "score"), rows=10**6)
        assert rows_of(run.stage(0, "score"), rows=5, offset=2) == everything[2:7]
        backwards = rows_of(run.stage(0, "score"), rows=5, offset=2, sort="prompt", reverse=True)
        assert backwards == everything[::-1][2:7]

    def test_a_row_without_the_value_comes_last_either_way(self, tmp_path: Path) -> None:
        rewards = [0.5, None, float("nan"), 2.0]
        rows = [pair_row(i, chosen_reward=r, rejected_reward=0.0) for i, r in enumerate(rewards)]
        place = make(tmp_path / "pair", "pair", {"part-00000.parquet": (PAIRS, rows)})
        for reverse, first in ((False, [3, 0]), (True, [0, 3])):
            found = rows_of(place, rows=4, sort="reward", reverse=reverse)
            assert [int(row["prompt_id"], 16) for row in found] == [*first, 1, 2]

    def test_a_text_is_found_in_prompts_and_answers_whatever_its_case(self, run: RunLayout) -> None:
        place = run.stage(0, "pair")
        everything = rows_of(place, rows=10**6)
        name = everything[5]["prompt"][0]["content"].split()[0]
        found = rows_of(place, rows=10**6, find=name.upper())
        assert found == [r for r in everything if name in r["prompt"][0]["content"]] != everything
        assert [r["chosen"] for r in rows_of(place, rows=9, find="RIGHT 17")] == ["right 17"]

    def test_one_prompt_by_its_id_or_the_beginning_of_it(self, run: RunLayout) -> None:
        everything = rows_of(run.stage(0, "pair"), rows=10**6)
        wanted = everything[7]["prompt_id"]
        assert rows_of(run.stage(0, "pair"), rows=9, prompt_id=wanted) == [everything[7]]
        begun = [row for row in everything if row["prompt_id"].startswith(wanted[:2])]
        assert rows_of(run.stage(0, "pair"), rows=99, prompt_id=wanted[:2]) == begun

    def test_steps_of_training_are_spread_over_all_of_it(self, tmp_path: Path) -> None:
        place = tmp_path / "train"
        rows = [{n: float(i) if n != "step" else i for n in TRAIN_METRICS.names} | {
            "pairs": 1, "tokens": 1} for i in range(101)]  # fmt: skip
        make(place, "train", {"metrics.parquet": (TRAIN_METRICS, rows)})
        assert [row["step"] for row in rows_of(place, rows=3)] == [0, 50, 100]
        assert [row["step"] for row in rows_of(place, rows=3, offset=7)] == [7, 8, 9]

    def test_memory_does_not_grow_with_the_table(self, tmp_path: Path) -> None:
        """400,000 rows with 200 MB of text are sorted, searched and counted from the end."""
        place = tmp_path / "big"
        text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 480))

        def fill(space: Workspace) -> Outcome:
            with TableWriter(space.file("examples.parquet"), SUITE_EXAMPLES) as table:
                for index in range(400_000):
                    table.append({
                        "prompt_id": f"{index:032x}", "task": "t", "sample": 0, "prompt": None,
                        "human": None, "response": text[index % 50:] + str(index),
                        "response_tokens": index % 1000, "finish_reason": None, "seed": None,
                        "score": float(index % 99_991), "scored_by": None, "other": None,
                    })  # fmt: skip
            return Outcome(counts={})

        produce(place, Plan("suite", 1, {"suite": "big"}, inputs={}), fill)
        script = (
            "import sys, resource; from spin_cli.app import app\n"
            "try: app(sys.argv[1:])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks = []
        for words in (["--rows", "1"], ["--sort", "reward"], ["--sort", "length", "--rows", "50"],
                      ["--sort", "prompt", "--reverse"], ["--find", "ABC99999"]):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", script, "show", str(place), *words, "--no-verify"],
                capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
            peaks.append(int(done.stdout.split("\n")[-2]) / 1024)
        assert max(peaks) < peaks[0] + 80, peaks


class TestArtifacts:
    def test_the_summary_says_counts_reasons_files_and_schema(self, run: RunLayout) -> None:
        text = spin("show", run.stage(0, "pair")).stdout
        for said in (
            "dropped   identical 1\n",
            "from      data data\n",
            "part-*.parquet  1",
            "chosen_reward double",
            "chosen    human, 1 tokens, reward 0\n            right 0\n",
        ):
            assert said in text, text
        assert "refused" not in text  # nothing was

    def test_metrics_have_their_intervals(self, tmp_path: Path) -> None:
        bounds = {"intervals.json": {"accuracy": [0.5, 0.75]}}
        make(tmp_path / "e", "evaluate", {}, bounds, metrics={"accuracy": 0.625, "kl": 2.0})
        text = spin("show", tmp_path / "e").stdout
        assert "accuracy  0.625  [0.5, 0.75]\n" in text
        assert "kl        2\n" in text

    def test_a_decision_shows_its_tree_of_conditions(self, tmp_path: Path) -> None:
        verdict = {
            "kind": "all", "passed": False, "text": "1 of 2", "figures": {},
            "children": [
                {"kind": "better", "passed": True, "text": "it is better", "children": [],
                 "figures": {"gain": 0.125, "p_value": 3.57e-50, "low": None}},
                {"kind": "length_within", "passed": False, "text": "too long", "children": []},
            ],
        }  # fmt: skip
        decision = {"promoted": False, "reasons": ["too long"], "alarms": [], "verdict": verdict}
        make(tmp_path / "p", "promote", {}, {"decision.json": decision})
        lines = spin("show", tmp_path / "p").stdout
        assert "decision  refused\n" in lines
        assert "verdict   failed  all: 1 of 2\n" in lines
        assert "              passed  better: it is better\n" in lines
        assert "gain 0.125, one-sided p 3.6e-50\n" in lines
        assert "              failed  length_within: too long\n" in lines

    def test_a_decision_says_each_sentence_once(self, tmp_path: Path) -> None:
        def leaf(kind: str, text: str) -> dict[str, Any]:
            return {"kind": kind, "passed": False, "text": text, "children": []}

        def both(*children: dict[str, Any]) -> dict[str, Any]:
            text = " and ".join(child["text"] for child in children)
            return {**leaf("all", text), "children": list(children)}

        fell, dear, long = "the reward fell by 6.93", "it is too dear", "it is too long"
        alarm = {"name": "accuracy_drop", "action": "refuse", "text": fell}
        verdict = both(
            leaf("alarms_clear", f"alarm accuracy_drop: {fell}"),
            both(leaf("better", dear), leaf("length_within", long)),
        )
        decision = {
            "promoted": False, "alarms": [alarm], "verdict": verdict,
            "reasons": [f"alarm accuracy_drop: {fell}", dear, f"passed: {long}", "it is 0.5"],
        }  # fmt: skip
        make(tmp_path / "p", "promote", {}, {"decision.json": decision})
        text = spin("show", tmp_path / "p").stdout
        assert [text.count(each) for each in (fell, dear, long, "it is 0.5")] == [1, 1, 1, 1]
        assert "failed  all\n" in text
        assert "failed  alarms_clear\n" in text

    def test_damage_is_told_once(self, tmp_path: Path) -> None:
        place = make(tmp_path / "p", "promote", {}, {"decision.json": {"promoted": True}})
        (place / "decision.json").write_bytes(b"x" * (place / "decision.json").stat().st_size)
        done = spin("show", place, expect=4)
        assert " ".join(done.output.split()).count("its SHA-256 does not match") == 1
        assert done.stderr == f"spin: {place}: what is damaged is named above\n"
        done = spin("show", place, "--json", expect=4)
        assert done.stderr.count("its SHA-256 does not match") == 1

    def test_conditions_keep_their_indentation_and_tell_the_gain_first(
        self, tmp_path: Path
    ) -> None:
        figures = {"metric": "m", "value": 0.5, "losses": 3, "wins": 7, "p_value": 0.1, "high": 0.3,
                   "low": -0.1, "gain": 0.2}  # fmt: skip
        verdict: dict[str, Any] = {"kind": "at_least", "passed": True, "text": "so " * 60,
                                   "figures": figures, "children": []}  # fmt: skip
        for _ in range(2):
            verdict = {"kind": "all", "passed": True, "text": "1 of 1", "children": [verdict]}
        decision = {"promoted": True, "reasons": [], "alarms": [], "verdict": verdict}
        make(tmp_path / "p", "promote", {}, {"decision.json": decision})
        text = spin("show", tmp_path / "p").stdout
        lines = text.partition("verdict")[2].partition("  files")[0].splitlines()[2:]
        own, *after = [len(line) - len(line.lstrip()) for line in lines]
        assert own == 12 + 2 * 2
        assert len(after) > 2
        assert set(after) == {own + 8}
        order = "gain 0.2, low -0.1, high 0.3, one-sided p 0.1, wins 7, losses 3, metric m"
        assert order in " ".join(text.split())

    def test_dropped_rows_have_their_reasons(self, run: RunLayout) -> None:
        text = spin("show", run.stage(0, "pair"), "--dropped").stdout
        assert "reason identical" in text
        assert "detail    the very same" in text

    def test_another_table_goes_by_its_name(self, run: RunLayout) -> None:
        text = spin("show", run.data, "--file", "heldout", "--rows", 1).stdout
        assert "\nheldout-*.parquet\n" in text
        message = spin("show", run.data, "--file", "nothing", expect=3).stderr
        assert "has no table nothing; it has" in message

    def test_answers_of_a_suite_are_laid_beside_what_they_were_compared_with(
        self, tmp_path: Path
    ) -> None:
        row = dict.fromkeys(SUITE_EXAMPLES.names) | {
            "prompt_id": "a", "task": "duel", "sample": 0, "prompt": "Ask?", "response": "Mine",
            "other": "Theirs", "score": 1.0,
        }  # fmt: skip
        place = make(tmp_path / "s", "suite", {"examples.parquet": (SUITE_EXAMPLES, [row])})
        text = spin("show", place, "--pairs").stdout
        assert text.index("Ask?") < text.index("Mine") < text.index("Theirs")

    @pytest.mark.parametrize(("asks", "part"), [("heldout", "heldout-"), ("all", "train-")])
    def test_answers_of_a_suite_have_the_prompts_that_it_asked(
        self, asks: str, part: str, run: RunLayout
    ) -> None:
        data = open_artifact(run.data)
        asked = read_shown(data, Query(rows=1, file=f"{part}*.parquet")).rows[0]
        gone = [{"prompt_id": asked["prompt_id"], "reason": "no_answer", "detail": "none"}]
        place = make(
            run.suite(0, "quiz"),
            "suite",
            {"unscored.parquet": (DROPPED, gone)},
            inputs={"data": data},
            root=run.root,
            settings={"asks": asks},
        )
        found = read_shown(open_artifact(place), Query(dropped=True))
        assert found.rows[0]["prompt"] == asked["prompt"]
        assert not found.notes

    def test_files_that_are_no_tables_are_shown_as_json_or_refused(self, tmp_path: Path) -> None:
        place = make(tmp_path / "a", "suite", {}, {"x.json": {"a": 1}})
        assert json.loads(spin("show", place, "--file", "x.json", "--json").stdout)["rows"] == [
            {"a": 1}
        ]
        lines = "".join(json.dumps({"n": n}) + "\n" for n in range(5))
        texts = {"said.jsonl": lines, "bad.jsonl": "[" * 200_000, "notes.txt": "text"}
        place = make(tmp_path / "b", "suite", {}, texts=texts)
        words = ("--file", "said.jsonl", "--rows", "2", "--offset", "1", "--json")
        assert json.loads(spin("show", place, *words).stdout)["rows"] == [{"n": 1}, {"n": 2}]
        assert "is no JSON" in spin("show", place, "--file", "bad.jsonl", expect=4).stderr
        refused = spin("show", place, "--file", "notes.txt", expect=3).stderr
        assert "notes.txt is no table and no JSON" in refused

    def test_a_table_of_numbers_is_a_table(self, tmp_path: Path) -> None:
        rows = [{"prompt_id": "a", "sample_index": i, "reward": i / 2} for i in range(3)]
        place = make(tmp_path / "r", "reward", {"part-00000.parquet": (REWARDS, rows)})
        assert "reward 0.5" in spin("show", place).stdout

    def test_nothing_to_sort_by_is_said_with_what_would_do(self, tmp_path: Path) -> None:
        rows = [pair_row(0)]
        place = make(tmp_path / "pair", "pair", {"part-00000.parquet": (PAIRS, rows)})
        message = spin("show", place, "--sort", "margin", expect=3).stderr
        assert "has no margin to sort its rows by; sort by length or prompt" in message
        message = spin("show", place, "--sort", "beauty", expect=2).stderr
        assert "sorted by margin, reward, length, prompt" in message


class TestPlaces:
    def test_a_run_and_an_iteration_point_further(self, run: RunLayout) -> None:
        text = spin("show", run.root).stdout
        assert f"spin status {run.root}, one iteration: spin show {run.root}:0" in text
        text = spin("show", f"{run.root}:0").stdout
        assert text.index("  pair ") < text.index("  score ")
        assert str(run.stage(0, "score")) in text

    def test_pairs_say_of_which_artifact_they_are(
        self, run: RunLayout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(run.root.parent)  # a long path would be cut to the width of the screen
        first = spin("show", "run:0", "--pairs", "--rows", 1).stdout.splitlines()[0]
        assert first.startswith("score  run/iterations/000/score  ")

    def test_what_is_sought_in_one_table_names_the_other(self, run: RunLayout) -> None:
        for words in (("--find", "cards"), ("--prompt-id", "0")):
            assert "in train alone; also: --file heldout" in spin("show", run.data, *words).stdout
            assert "also:" not in spin("show", run.data, *words, "--file", "heldout").stdout
        assert "also:" not in spin("show", run.data).stdout
        assert "also:" not in spin("show", run.stage(0, "pair"), "--find", "cards").stdout

    def test_a_run_names_its_champion_and_what_was_decided(self, run: RunLayout) -> None:
        assert "champion: none yet" in spin("show", run.root).stdout
        decision = {"promoted": False, "reasons": ["too long", "too dear"]}
        make(run.stage(0, "promote"), "promote", {}, {"decision.json": decision})
        assert "promote  refused: too long; too dear" in spin("show", f"{run.root}:0").stdout
        path = run.relative(run.stage(0, "train"))
        entry = PointerEntry(path=path, key="k", reason="it is better", decision_key="d")
        move_pointer(run.champion, entry)
        text = spin("show", run.root).stdout
        assert "champion: iterations/000/train (it is better)\n" in text
        assert json.loads(spin("show", run.root, "--json").stdout)["champion"] == path

    def test_a_decision_that_was_rolled_back_says_so(self, tmp_path: Path) -> None:
        made = write_run(tmp_path / "made", 2)
        words = ("show", f"{made.root}:1")
        assert spin(*words).stdout.count("promoted") == 1
        roll_back(made.champion)
        assert "promoted, and rolled back since" in spin(*words).stdout
        assert "rolled back" not in spin("show", f"{made.root}:0").stdout
        made.champion.write_text("{}")
        assert "rolled back" not in spin(*words).stdout, "nobody knows"

    @pytest.mark.parametrize(
        "words",
        [["--sort", "margn"], ["--find", "zzz"], ["--rows", "5"], ["--full"], ["--dropped"]],
    )
    @pytest.mark.parametrize("part", ["", ":0", ":start"])
    def test_what_chooses_rows_is_refused_where_there_are_many_tables(
        self, run: RunLayout, part: str, words: list[str]
    ) -> None:
        done = spin("show", f"{run.root}{part}", *words, expect=2)
        assert done.stdout == ""
        assert f"{words[0]} is of the rows of one artifact" in done.stderr
        assert (f"spin show {run.root}:0 --pairs" in done.stderr) == (part != ":start")

    def test_hints_keep_what_was_typed(
        self, run: RunLayout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(run.root.parent)
        for words in (("run",), ("run:0",), ("run/iterations/000",), ("run:0", "--pairs")):
            text = spin("show", *words).stdout
            assert str(run.root) not in text
            assert "run:0" in text or words == ("run:0", "--pairs")

    def test_the_folder_of_an_iteration_is_that_iteration(self, run: RunLayout) -> None:
        folder = spin("show", run.root / "iterations" / "000", "--json").stdout
        assert json.loads(folder) == json.loads(spin("show", f"{run.root}:0", "--json").stdout)

    def test_pairs_of_an_iteration_are_the_scored_ones(self, run: RunLayout) -> None:
        text = spin("show", f"{run.root}:0", "--pairs", "--rows", 1).stdout
        assert "reference logprob" in text
        assert (
            "is a whole run; name an iteration"
            in spin("show", run.root, "--pairs", expect=2).stderr
        )

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("nowhere", "does not exist"),
            ("run:7", "has no iteration 7; it has 0"),
            ("run/data:0", "does not exist; name a folder with manifest.json, a run, RUN:N"),
            ("run/run.json", "run.json is a file, and no artifact and no champion pointer"),
            ("run/data/manifest.json", "manifest.json is a file, and no artifact"),
            ("run/iterations", "is no artifact"),
        ],
    )
    def test_what_is_not_there_is_one_line(
        self, place: str, message: str, run: RunLayout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(run.root.parent)
        result = spin("show", place, expect=3)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


class TestJson:
    def test_it_is_one_object_with_the_rows(self, run: RunLayout) -> None:
        place = run.stage(0, "score")
        found = json.loads(spin("show", place, "--json", "--rows", 2, "--sort", "margin").stdout)
        assert found["artifact"]["key"] == read_manifest(place).key
        assert found["artifact"]["files"][0]["columns"]["chosen"] == "string"
        assert found["rows"] == rows_of(place, rows=2, sort="margin")
        assert found["sorted_by"] == "reference_chosen_logprob - reference_rejected_logprob"
        assert json.loads(spin("show", run.root, "--json").stdout)["iterations"] == [0]

    def test_numbers_that_json_lacks_are_null(self, tmp_path: Path) -> None:
        row = pair_row(0, chosen_reward=float("inf"))
        place = make(tmp_path / "p", "pair", {"part-00000.parquet": (PAIRS, [row])})
        assert json.loads(spin("show", place, "--json").stdout)["rows"][0]["chosen_reward"] is None


class TestDamage:
    @pytest.mark.parametrize("words", [(), ("--pairs",), ("--json",)])
    def test_a_damaged_table_is_told_after_all_that_is_sound(
        self, run: RunLayout, words: tuple[str, ...]
    ) -> None:
        file = run.stage(0, "pair") / "part-00000.parquet"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        result = spin("show", run.stage(0, "pair"), *words, expect=4)
        assert "part-00000.parquet is damaged" in result.stderr
        assert result.stderr.count("\n") == 1
        if not words:
            assert "counts    pairs" in result.stdout

    def test_truncated_and_missing_files_are_told(self, run: RunLayout) -> None:
        place = run.stage(0, "pair")
        file = place / "part-00000.parquet"
        file.write_bytes(file.read_bytes()[:-100])
        assert "its manifest says" in " ".join(spin("show", place, expect=4).stdout.split())
        file.unlink()
        assert "is missing" in " ".join(spin("show", place, expect=4).stdout.split())

    def test_a_damaged_manifest_is_one_line(self, run: RunLayout) -> None:
        file = run.stage(0, "pair") / "manifest.json"
        file.write_text(file.read_text().replace("pairs", "spairs"))
        result = spin("show", file.parent, expect=4)
        assert "is damaged (its hash does not match)" in result.stderr

    @pytest.mark.parametrize("place", ["", ":0"])
    def test_a_listing_tells_damage_after_all_that_is_sound(
        self, run: RunLayout, place: str
    ) -> None:
        run.champion.write_text("{}")
        (run.stage(0, "pair") / "manifest.json").write_text("{}")
        weights = run.stage(0, "train") / "model.bin"
        make(run.stage(0, "train"), "train", {}, texts={weights.name: "weights"})
        make(run.suite(0, "quiz"), "suite", {}, settings={"suite": "quiz"})
        weights.write_text("weigh")
        result = spin("show", f"{run.root}{place}", expect=4)
        lines = result.stdout.splitlines()
        kinds = [line.split()[0] for line in lines if line.startswith("  ")]
        number = 2 if place else 3
        assert kinds[-number:] == ["DAMAGED"] * number, result.stdout
        assert set(kinds[:-number]) >= {"score", "suite"}
        assert "model.bin has 5 bytes, its manifest says 7" in result.stdout
        assert "  suite quiz " in result.stdout
        assert ("champion is damaged" in result.stdout) == (not place)
        assert result.stderr.endswith(": what is damaged is named above\n")
        about = json.loads(spin("show", f"{run.root}{place}", "--json", expect=4).stdout)
        assert [("problem" in each) for each in about["artifacts"]][-2:] == [True, True]

    @pytest.mark.parametrize("name", ["train-00000.parquet", "manifest.json"])
    def test_rows_are_shown_without_prompts_that_are_damaged(
        self, run: RunLayout, name: str
    ) -> None:
        file = run.data / name
        file.write_bytes(file.read_bytes()[:-9])
        result = spin("show", f"{run.root}:0", "--pairs", expect=4)
        assert f"data/{name} " in result.stderr
        assert "what leads to them is damaged" in result.stdout
        assert "not in this run" not in result.stdout
        assert "right 0" in result.stdout

    def test_prompts_of_other_bytes_are_no_prompts(self, run: RunLayout) -> None:
        file = run.data / "train-00000.parquet"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        result = spin("show", run.stage(0, "pair"), expect=4)
        assert "train-00000.parquet is damaged" in result.stderr

    def test_rows_are_shown_without_prompts_where_the_data_is_gone(self, run: RunLayout) -> None:
        shutil.rmtree(run.data)
        text = spin("show", run.stage(0, "pair"), "--rows", 1).stdout
        assert "the prompts are not in this run" in text
        assert "right 0" in text


class TestTerminal:
    def hostile(self, folder: Path) -> Path:
        row = pair_row(0, chosen=HOSTILE, rejected="", rejected_source=HOSTILE)
        return make(folder / "p", "pair", {"part-00000.parquet": (PAIRS, [row])})

    @pytest.mark.parametrize("words", [[], ["--pairs"], ["--full"], ["--find", "owned"]])
    def test_nothing_of_a_model_steers_it_or_passes_for_ours(
        self, tmp_path: Path, words: list[str]
    ) -> None:
        for text in (spin("show", self.hostile(tmp_path), *words).stdout, self.on_a_terminal(
            ["show", str(self.hostile(tmp_path)), *words], 130
        )):  # fmt: skip
            ours = text.replace("\r\n", "\n")
            for code in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[1;32m", "\x1b[32m", "\x1b[1;31m"):
                ours = ours.replace(code, "")
            assert not set(ours) & {"\x1b", "\x9b", "\x07", "\u202e"}, ascii(ours)
            if words != ["--find", "owned"]:
                assert "[red]bold[/red]" in ours
            forged = [line for line in ours.split("\n") if line.startswith("  rejected  a forged")]
            assert not forged

    def test_no_color_is_no_style_either(self, tmp_path: Path) -> None:
        words = ["show", str(self.hostile(tmp_path)), "--pairs"]
        assert "\x1b[1m" in self.on_a_terminal(words, 130)
        assert "\x1b" not in self.on_a_terminal(words, 130, NO_COLOR="1")

    def on_a_terminal(self, words: list[str], width: int, **settings: str) -> str:
        """What `spin` writes to a terminal of some width."""
        import fcntl
        import pty
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        environment.pop("NO_COLOR", None)
        environment |= settings
        with subprocess.Popen(
            [sys.executable, "-m", "spin_cli", *words], stdout=theirs, cwd=ROOT, env=environment
        ) as process:
            os.close(theirs)
            found = b""
            while True:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
                if not part:
                    break
                found += part
        os.close(ours)
        assert process.returncode == 0
        return found.decode()

    def test_lines_fit_and_roles_have_colours(self, run: RunLayout) -> None:
        import re

        words = ["show", f"{run.root}:0", "--pairs", "--rows", "2"]
        for width in (60, 130):
            text = self.on_a_terminal(words, width)
            assert "\x1b[1;32m" in text
            lines = re.sub(r"\x1b\[[\d;]*m", "", text).split("\r\n")
            assert max(map(len, lines)) <= width
            beside = any("chosen" in line and "rejected" in line for line in lines)
            assert beside == (width == 130)

    def test_piped_text_depends_on_no_terminal(
        self, run: RunLayout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ("show", f"{run.root}:0", "--pairs")
        plain = spin(*words).stdout
        monkeypatch.setenv("COLUMNS", "50")
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert spin(*words).stdout == plain
        assert "\x1b" not in plain
        assert max(map(len, plain.split("\n"))) <= PIPED_WIDTH

    def test_long_texts_are_cut_unless_asked_for(self, tmp_path: Path) -> None:
        text = "word " * 1000 + "\u0301" * 100_000 + " the end"
        row = pair_row(0, chosen=text)
        place = make(tmp_path / "p", "pair", {"part-00000.parquet": (PAIRS, [row])})
        short = spin("show", place).stdout
        assert f"… cut; {len(text):,} characters in all: --full" in short
        assert "the end" not in short
        assert "the end" in spin("show", place, "--full").stdout

    def test_a_closed_pipe_ends_it_quietly(self, run: RunLayout) -> None:
        line = f"{sys.executable} -m spin_cli show {run.stage(0, 'score')} --rows 140 | head -1"
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert done.stdout.startswith("score  ")


def test_the_words_that_its_help_looks_for_are_in_the_demo() -> None:
    words = re.findall(r"--find\s+([a-z]+)", spin("show", "--help").output)
    assert words
    assert set(words) <= set(THINGS)
