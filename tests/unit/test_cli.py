"""The command line: help, recipes, exit codes, and what reaches a terminal."""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from spin_cli import KEPT, recipes, screen, views
from spin_cli.app import app
from spin_cli.failures import BUG, INTERRUPTED, TERMINATED, UNREAD, TerminatedError, reported
from stages import errors
from stages.artifacts import locks, read_manifest
from stages.layout import RunLayout
from tests import fake_stages

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "prepare", "sft", "generate", "reward", "pair", "score", "train", "evaluate", "promote",
    "run", "init", "opponent", "adapted", "converged", "status", "verify", "push", "pull",
    "show", "lineage", "diff", "reproduce", "compare", "version", "config show", "config list",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with fake_stages.installed():
        yield
    logging.getLogger("spin").handlers.clear()


def spin(*words: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words), prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def one_line(text: str) -> str:
    """The only line of `text`."""
    lines = text.strip().split("\n")
    assert len(lines) == 1, text
    return lines[0]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, command: str) -> None:
        text = spin(*command.split(), "--help").stdout
        example = text.partition("Example:\n")[2].split("\n")[0].strip()
        assert f"spin {command}" in example
        assert text == spin(*command.split(), "-h").stdout

    def test_an_iteration_of_promote_is_that_of_a_player(self) -> None:
        text = " ".join(spin("promote", "--help").stdout.split())
        assert "Whose player to decide on, or to export." in text
        assert "Whose settings hold" not in text

    def test_help_lists_every_command_in_one_line_each(self) -> None:
        text = spin("--help").stdout
        for command in COMMANDS:
            assert re.search(rf"^  {command.split()[0]}  +\S.*[^.]\.$", text, re.MULTILINE), command
        assert "..." not in text.replace("ARGS]...", "")

    def test_help_loads_nothing_heavy(self) -> None:
        script = (
            "import sys; from typer.testing import CliRunner; from spin_cli.app import app\n"
            "CliRunner().invoke(app, ['--help'])\n"
            "heavy = {'rich', 'yaml', 'pydantic', 'pyarrow', 'torch'}\n"
            "print(sorted(heavy & sys.modules.keys()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_help_takes_at_most_0_3_s_of_processor_time(self) -> None:
        def seconds() -> float:
            before = os.times()
            subprocess.run([sys.executable, "-m", "spin_cli", "--help"], cwd=ROOT, check=True,
                           capture_output=True)  # fmt: skip
            after = os.times()
            return (after.children_user + after.children_system) - (
                before.children_user + before.children_system
            )

        assert min(seconds() for _ in range(3)) <= 0.3


class TestRecipes:
    def test_a_file_is_a_recipe(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("train: {beta: 0.7}")
        assert recipes.load(str(path), []).for_iteration().train.beta == 0.7
        assert recipes.load("./mine.yaml", []).for_iteration().train.beta == 0.7

    def test_a_shipped_recipe_goes_by_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            recipes, "__file__", str(Path("checkout/spin_cli/recipes.py").absolute())
        )
        Path("checkout/configs").mkdir(parents=True)
        Path("checkout/configs/demo.yaml").write_text("# The miniature.\nseed: 3\n")
        assert recipes.load("demo", []).for_iteration().seed == 3
        assert spin("config", "list").stdout == "demo\tThe miniature.\n"
        with pytest.raises(errors.ConfigError, match=r"'demi' is neither .* shipped are demo"):
            recipes.find("demi")

    def test_an_installed_wheel_has_them_in_the_package(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(recipes, "__file__", str(Path("site/spin_cli/recipes.py").absolute()))
        Path("site/spin_cli/configs").mkdir(parents=True)
        Path("site/spin_cli/configs/demo.yaml").write_text("seed: 4\n")
        assert recipes.find("demo") == Path("site/spin_cli/configs/demo.yaml").absolute()

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem
    )
    def test_every_shipped_recipe_resolves(self, path: Path) -> None:
        spin("config", "show", str(path), "--iteration", "0")
        assert recipes.summary(path), "a recipe's first line is a comment that says what it is"

    def test_show_prints_every_value_with_its_origin(self, tmp_path: Path) -> None:
        Path("mine.yaml").write_text("name: 'yes'\niterations: {1: {train: {beta: 5}}}")
        lines = spin("config", "show", "mine.yaml", "--iteration", "1", "seed=2").stdout.split("\n")
        assert "name: 'yes'  # mine.yaml" in lines
        assert "train.beta: 5.0  # mine.yaml, iteration 1" in lines
        assert "seed: 2  # override" in lines
        assert "train.betas: [0.9, 0.999]  # default" in lines
        assert "sft: null  # default" in lines

    def test_show_without_a_recipe_takes_overrides(self) -> None:
        assert "train.beta: 0.5  # override" in spin("config", "show", "train.beta=0.5").stdout

    def test_what_show_prints_is_a_recipe_again(self) -> None:
        import yaml

        values: dict[str, Any] = {}
        for line in spin("config", "show", "train.learning_rate=5e-7").stdout.splitlines():
            name, _, value = line.partition(": ")
            values[name] = yaml.safe_load(value)
        assert values["train.learning_rate"] == 5e-7
        assert values["train.betas"] == [0.9, 0.999]


class TestExitCodes:
    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            (errors.ConfigError, 2),
            (errors.InputError, 3),
            (errors.CorruptError, 4),
            (errors.DivergedError, 5),
            (errors.GateRefusedError, 6),
            (errors.NoSpaceError, 7),
            (errors.BusyError, 75),
        ],
    )
    def test_our_errors_are_one_line_and_a_code(
        self, kind: type[errors.SpinError], code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.failing(kind("the thing is wrong; mend it"), monkeypatch, code)
        assert one_line(result.stderr) == "spin: the thing is wrong; mend it"
        assert result.stdout == ""
        assert "Traceback" in self.failing(kind("x"), monkeypatch, code, "--verbose").stderr

    def test_a_bug_shows_a_traceback_and_asks_for_a_report(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = self.failing(KeyError("prompt_id"), monkeypatch, 1).stderr
        assert "Traceback" in text
        assert text.strip().split("\n")[-1].startswith("spin: a bug: KeyError: 'prompt_id'; please")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.failing(OSError(number, os.strerror(number)), monkeypatch, 7)
        assert "free some space, then what was finished is kept" in one_line(result.stderr)

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
    )
    def test_out_of_memory_names_what_to_lower(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "token_budget" in one_line(self.failing(error, monkeypatch, 1).stderr)

    def test_an_interrupt_while_it_is_loaded_says_the_same(self) -> None:
        script = (
            "import sys\n"
            "class Interrupted:\n"
            "    def find_spec(self, name, *others):\n"
            "        if name == 'spin_cli.app': raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupted())\n"
            "from spin_cli.__main__ import main\n"
            "main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (INTERRUPTED, "")
        assert done.stderr == f"spin: interrupted; {KEPT}\n"

    def test_an_interrupt_says_what_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = one_line(self.failing(KeyboardInterrupt(), monkeypatch, 130).stderr)
        assert "what was finished is kept: run the same command again" in text

    def test_a_sigterm_says_what_is_kept(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught, reported():
            raise TerminatedError
        assert caught.value.code == 143
        assert "terminated; what was finished is kept" in capsys.readouterr().err

    @pytest.mark.parametrize("error", [typer.Exit(9), typer.Abort()])
    def test_typers_own_endings_pass_through(self, error: Exception) -> None:
        with pytest.raises(type(error)), reported():
            raise error

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["generate"], "spin generate: missing option '--out' / '-o'; see spin generate"),
            (["nothing"], "spin: no such command 'nothing'; see spin --help"),
            (["run", "demo", "--run", "r", "--iterations", "-1"], "'--iterations'"),
            (["promote", "run"], "--iteration, --rollback"),
            (["promote", "run", "--iteration", "0", "--rollback"], "--iteration, --rollback"),
            (["--nothing"], "spin: no such option: --nothing"),
            (["status"], "spin status: missing argument 'RUN'; see"),
        ],
    )
    def test_usage_errors_are_2(self, words: list[str], message: str) -> None:
        stderr = spin(*words, expect=2).stderr
        assert message in stderr
        assert stderr.count("\n") == 1

    def failing(
        self, error: BaseException, monkeypatch: pytest.MonkeyPatch, code: int, *words: str
    ) -> Result:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("stages.prepare.run", fail)
        return spin("prepare", "--out", "data", *words, expect=code)


class TestUsersMistakes:
    """Each is one line, with the right code."""

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["status", "none"], 3, "none does not exist"),
            (["status", "."], 3, "is no run directory"),
            (["verify", "none"], 3, "none does not exist"),
            (["verify", "."], 3, "neither an artifact nor a run"),
            (["promote", "none", "--iteration", "0"], 3, "none does not exist"),
            (["promote", "none", "--rollback"], 3, "none does not exist"),
            (["run", "none", "--run", "r"], 2, "'none' is neither a file nor a shipped recipe"),
            (["run", "none.yaml", "--run", "r"], 2, "none.yaml does not exist"),
            (["prepare", "--out", "d", "prepare.sorce=x"], 2, "did you mean prepare.source?"),
            (["prepare", "--out", "d", "seed=x"], 2, "seed='x'"),
            (["prepare", "--out", "d", "x"], 2, "not of the form section.key=value"),
            (["generate", "--data", "d", "--out", "o"], 2, "no model: give --model"),
            (
                ["generate", "--model", "m", "--data", "d", "--out", "o", "--part", "2"],
                2,
                "--part 2 is not K/M, such as 0/2",
            ),
        ],
    )
    def test_in_one_line(self, words: list[str], code: int, message: str) -> None:
        result = spin(*words, expect=code)
        line = one_line(result.stderr)
        assert line.startswith("spin: ")
        assert message in line
        assert result.stdout == ""

    def test_a_run_in_a_folder_of_other_things(self) -> None:
        Path("mine.yaml").write_text("sft: {init: random}")
        Path("full").mkdir()
        Path("full/thesis.tex").touch()
        line = one_line(spin("run", "mine.yaml", "--run", "full", expect=2).stderr)
        assert "full is no run directory and not empty (it holds thesis.tex)" in line
        assert [p.name for p in Path("full").iterdir() if not p.name.startswith(".")] == [
            "thesis.tex"
        ]

    def test_two_runs_at_once(self) -> None:
        Path("mine.yaml").write_text("sft: {init: random}")
        layout = RunLayout(Path("r"))
        with locks.hold(layout.lock, "run r"):
            start = time.monotonic()
            line = one_line(spin("run", "mine.yaml", "--run", "r", expect=75).stderr)
            assert time.monotonic() - start < 1
        assert f"run r is in use by process {os.getpid()}" in line


class TestStageCommands:
    def test_they_pass_what_they_are_given(self) -> None:
        spin("prepare", "--source", "raw: x", "--out", "data")
        spin("sft", "--data", "data", "--out", "m", "sft.init=random")
        spin("generate", "--model", "m", "--prompts", "data", "--out", "g", "--iteration", "2")
        spin("reward", "--data", "data", "--generations", "g", "--out", "r")
        spin("pair", "--data", "data", "--generations", "g", "--rewards", "r", "--model", "m",
             "--out", "p")  # fmt: skip
        spin("score", "--pairs", "p", "--model", "m", "--out", "s")
        spin("train", "--pairs", "s", "--model", "m", "--out", "t")
        spin("evaluate", "--model", "m", "--data", "data", "--out", "e0")
        spin("evaluate", "--model", "t", "--data", "data", "--opponent", "m",
             "--opponent-evaluation", "e0", "--out", "e1")  # fmt: skip
        made = [call.partition("/")[2] for call in fake_stages.calls]
        assert made == [
            "prepare", "sft", "generate", "reward", "pair", "score", "train", "evaluate",
            "evaluate",
        ]  # fmt: skip

    def test_a_player_of_a_run_is_a_model_to_evaluate(self) -> None:
        Path("r.yaml").write_text("sft: {init: random}")
        spin("run", "r.yaml", "--run", "a", "--iterations", "1")
        words = ("evaluate", "--model", "a:0", "--opponent", "a:start")
        spin(*words, "--data", "a/data", "--out", "e")
        inputs = read_manifest(Path("e")).inputs
        assert inputs["model"].key == read_manifest(Path("a/iterations/000/train")).key
        assert inputs["opponent"].key == read_manifest(Path("a/models/sft")).key
        line = one_line(spin("evaluate", "--model", "a:1", "--out", "e", expect=3).stderr)
        assert "a:1: the run has no iteration 1; it has 0" in line
        shutil.rmtree("a/iterations/000/train")
        line = one_line(spin("evaluate", "--model", "a:0", "--out", "e", expect=3).stderr)
        assert "a:0 is no model: its player (a/iterations/000/train) was not trained yet" in line

    def test_a_finished_one_says_so_and_does_nothing(self) -> None:
        spin("prepare", "--out", "data")
        result = spin("prepare", "--out", "data")
        assert one_line(result.stderr) == "prepare: already done (data)"
        assert len(fake_stages.calls) == 1

    def test_another_setting_at_the_same_place_is_refused(self) -> None:
        spin("prepare", "--out", "data")
        line = one_line(spin("prepare", "--out", "data", "seed=1", expect=2).stderr)
        assert "finished with other settings: seed: 0 there, 1 now" in line

    def test_the_source_option_is_taken_as_it_is(self) -> None:
        recipe = recipes.load(None, [], source="5e-7: [x")
        assert recipe.for_iteration().prepare.source == "5e-7: [x"

    def test_the_model_comes_from_the_recipe_where_none_is_given(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(
            "stages.generate.run", lambda config, inputs, out, open_engine: seen.append(inputs)
        )
        monkeypatch.setattr("spin_cli.steps._figures", lambda *_: "")
        spin("generate", "--data", "d", "--out", "g", "model.path=a/b", "model.revision=r")
        assert (seen[0].model, seen[0].revision, seen[0].iteration) == ("a/b", "r", 0)

    def test_a_part_is_two_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(
            "stages.generate.run", lambda config, inputs, out, open_engine: seen.append(inputs)
        )
        monkeypatch.setattr("spin_cli.steps._figures", lambda *_: "")
        words = ["generate", "--model", "m", "--data", "d", "--out", "g"]
        spin(*words)
        spin(*words, "--part", "1/2")
        assert [inputs.part for inputs in seen] == [None, (1, 2)]

    def test_iterations_choose_their_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr("stages.train.run", lambda config, inputs, out: seen.append(config))
        monkeypatch.setattr("spin_cli.steps._figures", lambda *_: "")
        Path("mine.yaml").write_text("iterations: {0: {train: {beta: 1}}, 3: {train: {beta: 5}}}")
        words = ["train", "--pairs", "s", "--model", "m", "--out", "t", "--config", "mine.yaml"]
        spin(*words)
        spin(*words, "--iteration", "3", "--no-verify")
        spin(*words, "-t", "1")
        assert [config.train.beta for config in seen] == [1.0, 5.0, 0.1]
        assert [config.verify for config in seen] == [True, False, True]

    def test_threads_reach_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        before = torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        try:
            spin("prepare", "--out", "data", "threads=2")
            assert torch.get_num_threads() == 2
            assert os.environ["OMP_NUM_THREADS"] == "2"
        finally:
            torch.set_num_threads(before)


class TestScreen:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07text", "text"),
            ("\x1b]8;;http://x\x1b\\link", "link"),
            ("a\x00b\x08c\rd\x9be", "abcde"),
            ("\x1b", ""),
            ("a\u202eb", "ab"),
            ("tab\tand\nline", "tab\tand\nline"),
            ("[/x] [bold]", "[/x] [bold]"),
            ("\ud800", "\\ud800"),
            ("naïve β 中", "naïve β 中"),
        ],
    )
    def test_control_sequences_are_stripped(self, text: str, shown: str) -> None:
        assert screen.safe(text) == shown

    def test_errors_are_one_safe_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise errors.InputError("bad \x1b[2Jfile\nname")

        monkeypatch.setattr("stages.prepare.run", fail)
        line = one_line(spin("prepare", "--out", "d", expect=3).stderr)
        assert line == "spin: bad file name"

    def test_messages_go_to_stderr_by_level(self, capsys: pytest.CaptureFixture[str]) -> None:
        log = logging.getLogger("spin")
        for quiet, verbose, shown in [
            (False, False, ["warning: w", "i"]),
            (True, False, ["warning: w"]),
            (False, True, ["warning: w", "i", "d"]),
        ]:
            screen.set_up_messages(quiet=quiet, verbose=verbose)
            log.warning("w")
            log.info("i")
            log.debug("d")
            captured = capsys.readouterr()
            assert captured.err.splitlines() == shown
            assert captured.out == ""

    def test_one_thing_is_no_plural(self) -> None:
        told = [screen.counted(number, "problem", "problems") for number in (0, 1, 2000)]
        assert told == ["0 problems", "1 problem", "2,000 problems"]

    def test_a_table_is_aligned_text_where_there_is_no_terminal(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        screen.put_table(["name", "n", "why"], [["a", "1", "x"], ["long\x1b[1m", "100", "[/x]"]])
        assert capsys.readouterr().out == "name    n  why\na       1  x\nlong  100  [/x]\n"

    @pytest.mark.parametrize("width", [None, 80, 12])
    def test_no_cell_passes_for_a_row(
        self, width: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(screen, "terminal_width", lambda: width)
        screen.put_table(["name", "a\nb", "why"], [["x\n2  99%  champion", "1\t", "no\nrow"]])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert not {"b", "2  99%  champion", "row"} & set(lines)

    def test_a_table_on_a_terminal_takes_text_as_it_is(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 24)))
        screen.put_table(["name", "n", "why"], [["a", "1", "[/x] [bold]b[/bold]"]], caption="c")
        assert "[/x] [bold]b[/bold]" in capsys.readouterr().out

    def test_settings_are_lines_of_yaml(self) -> None:
        assert views.setting_line("a", "x: y", "f") == "a: 'x: y'  # f"
        assert views.setting_line("a", None, "default") == "a: null  # default"


def test_version_names_spin_first() -> None:
    lines = spin("version").stdout.splitlines()
    assert lines[0].startswith("spin-selfplay ")
    assert any(line.startswith("python 3.") for line in lines)


def test_a_terminal_without_unicode_is_no_bug(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spin_cli", "config", "show", "name=β"],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1:strict"},
    )  # fmt: skip
    assert "name: \\u03b2  # override" in done.stdout


def test_the_control_arm_of_the_folder_one_is_in() -> None:
    Path("mine.yaml").write_text("sft: {init: random}")
    Path("here").mkdir()
    os.chdir("here")
    line = spin("run", "../mine.yaml", "--run", ".", "--control", "--dry-run").stdout.split("\n")[0]
    assert "/here-control --config ../mine.yaml train.control=true" in line


def test_a_closed_pipe_is_no_bug() -> None:
    script = f"{sys.executable} -m spin_cli config show | head -1"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr


def test_every_exit_code_is_documented() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.SpinError)}
    text = (ROOT / "docs/exit-codes.md").read_text()
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert rows == codes | {0, BUG, INTERRUPTED, TERMINATED, UNREAD}
