"""Rewards in limited processes: right on a table, and whole after texts and code that do harm."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.config import RewardConfig
from stages.errors import ConfigError, EngineError, InputError
from stages.rewards import Question, Score, Unscored, find_reward, open_reward
from stages.rewards.row_child import last_boxed, same_value
from stages.rewards.rows import Job, RowPool
from tests.hostile import hostile_texts
from tests.unit.test_rewards import score

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed 5", None),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_last_closed_box_holds(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer == last_boxed_slowly(text)


def last_boxed_slowly(text: str) -> str | None:
    """The slow twin: every box from the last one on, its braces counted from its own."""
    for box in reversed(list(re.finditer(r"\\boxed\s*(?=\{)", text))):
        depth, at = 0, box.end()
        while at < len(text):
            if text[at] == "\\":
                at += 1
            else:
                depth += (text[at] == "{") - (text[at] == "}")
                if depth == 0:
                    return text[box.end() + 1 : at]
            at += 1
    return None


@given(st.lists(st.sampled_from(["\\boxed", "{", "}", "\\", " ", "\n", "x"]), max_size=24))
def test_one_pass_finds_the_box_that_looking_at_each_finds(parts: list[str]) -> None:
    text = "".join(parts)
    assert last_boxed(text) == last_boxed_slowly(text)


@pytest.mark.parametrize("part", [r"\boxed{", r"\boxed ", r"\boxed{\boxed}", "{", "}"])
def test_the_last_box_is_found_in_a_time_that_grows_with_the_text(part: str) -> None:
    """A vote is counted in our own process: a model that says a word again must not hold it up."""
    started = time.process_time()
    last_boxed(r"\boxed{1}" + part * 100_000)
    assert time.process_time() - started < 10  # it takes 0.1 s, and took an hour


def test_a_box_that_is_too_long_for_an_answer_is_none() -> None:
    assert last_boxed(r"\boxed{" + "x" * 99_998 + "}") == "x" * 99_998
    assert last_boxed(r"\boxed{1} \boxed{" + "x" * 100_000 + "}") == "1"


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("18.", "18", True),
        ("1,000", "1000", True),
        ("1,00", "100", False),
        ("1/2", "0.5", True),
        (r"\frac{2}{4}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("-3/4", r"-\frac{3}{4}", True),
        ("1/0", "1", False),
        ("7", "8", False),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x+1", "1+x", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("x+1", "x-1", False),
        (r"(1, 2)", "(1,2)", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("(2,3]", "[2,3)", False),
        (r"50\%", "0.5", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Paris", False),
        ("10^{2}", "100", True),
        ("", "7", False),
        ("3.14", r"\pi", False),
        ("0" * 2000, "0", False),
    ],
)
def test_answers_are_compared_by_value(answer: str, gold: str, same: bool) -> None:
    assert same_value(answer, gold) is same


def maths(text: str) -> str:
    return rf"so \boxed{{{text}}}"


def test_math_scores_what_is_boxed() -> None:
    rows = [
        (maths(r"\frac{1}{2}"), maths("0.5")),
        (maths("3"), maths("4")),
        ("I do not know", maths("4")),
        (maths("4"), "four"),
    ]
    assert score(RewardConfig(name="math"), *rows) == [
        1.0, 0.0, 0.0, Unscored("no_score", r"the human response has no \boxed{}"),
    ]  # fmt: skip
    whole = RewardConfig(name="math", math={"human": "whole"})
    assert score(whole, (maths("4"), "4"), (maths("4"), " ")) == [
        1.0, Unscored("no_score", "it is empty"),
    ]  # fmt: skip


def test_math_survives_what_computes_for_ever_and_goes_on() -> None:
    towers = [r"9^{9^{9^{9}}}", r"10^{10^{8}}", r"\binom{10^9}{5 \cdot 10^8}", "(" * 200 + "1"]
    config = RewardConfig(name="math", math={"limit_s": 0.5}, processes=2)
    rows = [(maths(text), maths("7")) for text in ["7", *towers, "7.0"]]
    first, *costly, last = score(config, *rows)
    assert first == last == 1.0
    for found in costly:
        assert found == 0.0 or (isinstance(found, Unscored) and found.reason == "too_costly")
    assert isinstance(costly[0], Unscored)


def test_no_hostile_text_breaks_math_or_regex() -> None:
    texts = hostile_texts(200, seed=5, huge=5_000)
    rows = [(maths(text), maths("12")) for text in texts] + [(text, maths(text)) for text in texts]
    for config in (
        RewardConfig(name="math"),
        RewardConfig(name="regex", regex={"pattern": r"\d+", "compare": "human"}),
    ):
        found = score(config, *rows)
        assert len(found) == len(rows)
        assert all(isinstance(s, Unscored) or s in (0.0, 1.0) for s in found)


@pytest.mark.parametrize(
    ("settings", "response", "human", "reward"),
    [
        ({"pattern": r"(?i)yes"}, "Oh YES", "", 1.0),
        ({"pattern": r"^yes$"}, "yes no", "", 0.0),
        ({"pattern": r"Answer: (\w+)", "compare": "human"}, "Answer: B", "Answer: B", 1.0),
        ({"pattern": r"Answer: (\w+)", "compare": "human"}, "Answer: A", "Answer: B", 0.0),
        ({"pattern": r"Answer: (\w+)", "compare": "human"},
         "Answer: A. No: Answer: B", "Answer: B", 1.0),
        ({"pattern": r"\d+", "compare": "human"}, "1 then 22", "it is 22", 1.0),
        ({"pattern": r"\d+", "compare": "human"}, "none", "it is 22", 0.0),
        ({"pattern": r"\d+", "compare": "human"}, "22", "none",
         Unscored("no_score", "the pattern is not found in the human response")),
        ({"pattern": r"(a)|b", "compare": "human"}, "b", "a", 0.0),
        ({"pattern": r"\d*", "compare": "human"}, "it is 7", "so 7.", 1.0),
        ({"pattern": r"\d*", "compare": "human"}, "none", "so 7.", 0.0),
        ({"pattern": r"\d*", "compare": "human"}, "none", "nothing",
         Unscored("no_score", "the pattern is not found in the human response")),
        ({"pattern": r"Answer:(.*)", "compare": "human"}, "Answer: ", "Answer: ",
         Unscored("no_score", "the pattern is not found in the human response")),
    ],
)  # fmt: skip
def test_a_regular_expression_is_found_or_finds_the_same(
    settings: dict[str, Any], response: str, human: str, reward: Score
) -> None:
    assert score(RewardConfig(name="regex", regex=settings), (response, human)) == [reward]


def test_a_regular_expression_that_backtracks_for_ever_costs_one_row() -> None:
    config = RewardConfig(name="regex", regex={"pattern": r"(a+)+$", "limit_s": 0.2})
    rows = [("aaa", ""), ("a" * 60 + "b", ""), ("aa", "")]
    assert score(config, *rows) == [
        1.0, Unscored("too_costly", "it takes more than 0.2 s"), 1.0,
    ]  # fmt: skip


def test_a_pattern_that_is_none_is_refused_with_the_recipe() -> None:
    with pytest.raises(ValueError, match="no regular expression of Python's: unterminated"):
        RewardConfig(name="regex", regex={"pattern": "[a"})


def python(folder: Path, body: str, **settings: Any) -> RewardConfig:
    """A recipe whose reward is this body of a function."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file = folder / "my_reward.py"
    file.write_text(f"def reward(prompt, response, human):\n{lines}")
    given = {"timeout_s": 20, **settings}
    return RewardConfig(name="python", python={"file": str(file), **given})


def test_a_function_sees_prompt_response_and_human_response(tmp_path: Path) -> None:
    body = "return len(prompt[-1]['content']) + 10 * len(response) + 100 * len(human)"
    source = find_reward(python(tmp_path, body), None)
    assert source is not None
    asked = Question("0", [{"role": "user", "content": "abc"}], "12345", ("", "xy", "\ud800"))
    with open_reward(source) as reward:
        [scored] = reward.score([asked])
    assert scored.scores == (503.0, 523.0, 513.0)


CRASH = "import ctypes; ctypes.string_at(0)"


@pytest.mark.parametrize(
    ("body", "reason", "why"),
    [
        ("raise ValueError('no\\nidea')", "failed", r"^ValueError: no idea \(line 3\)$"),
        ("return 1 / 0", "failed", r"^ZeroDivisionError: division by zero \(line 3\)$"),
        ("return float('nan')", "failed", "it returned nan; return a finite number"),
        ("return float('-inf')", "failed", "it returned -inf; return a finite number"),
        ("return None", "failed", "it returned NoneType; return a finite number"),
        ("return '1'", "failed", "it returned str; return a finite number"),
        ("raise SystemExit(0)", "failed", "^SystemExit"),
        ("raise MemoryError", "too_costly", "too much memory"),
        ("raise Sly", "failed", "^Sly"),
        ("print('oh'); import os; os._exit(3)", "failed", "with status 3; its last words: oh"),
        (CRASH, "failed", 'ended with SIGSEGV; .*eward.py", line 3 in reward'),
    ],
)
def test_a_function_that_fails_gives_no_score_and_the_next_row_is_scored(
    tmp_path: Path, body: str, reason: str, why: str
) -> None:
    body = f"if response == 'bad':\n    {body}\nreturn 1"
    config = python(tmp_path, body)
    file = Path(config.python.file or "")
    sly = "class Sly(Exception):\n    def __str__(self):\n        raise Sly\n"
    file.write_text(f"{file.read_text()}\n{sly}")
    first, found, last = score(config, ("good", ""), ("bad", ""), ("good", ""))
    assert (first, last) == (1.0, 1.0)
    assert isinstance(found, Unscored)
    assert found.reason == reason
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found.detail)


@pytest.mark.parametrize(
    "body",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        "3 ** 10 ** 9",  # one call of C, which no signal handler interrupts
        "import time\n    while True:\n        try: time.sleep(60)\n        except: pass",
        "import signal, time; signal.pthread_sigmask(0, range(1, 64)); time.sleep(60)",
    ],
    ids=["sleeps", "loops", "computes", "swallows", "masks"],
)
def test_a_function_that_never_ends_costs_its_time_limit(tmp_path: Path, body: str) -> None:
    body = f"if response == 'bad':\n    {body}\nreturn 1"
    config = python(tmp_path, body, timeout_s=1)
    began = time.monotonic()
    found = score(config, ("good", ""), ("bad", ""), ("good", ""))
    assert found == [1.0, Unscored("too_costly", "it takes more than 1 s"), 1.0]
    assert time.monotonic() - began < 45  # it sleeps for 60


@pytest.mark.parametrize(
    "leave", ["raise SystemExit(0)", "return -1", "os._exit(0)"], ids=["exits", "returns", "ends"]
)
def test_a_function_that_forks_answers_each_row_once(tmp_path: Path, leave: str) -> None:
    body = f"import os\nif (pid := os.fork()) == 0:\n    {leave}\nos.waitpid(pid, 0)\n"
    config = python(tmp_path, body + "return int(response)")
    assert score(config, *[(str(n), "") for n in range(40)]) == [float(n) for n in range(40)]


def test_a_file_that_forks_is_one_process(tmp_path: Path) -> None:
    config = python(tmp_path, "return int(response)")
    file = Path(config.python.file or "")
    file.write_text("import os\nos.fork()\n" + file.read_text())
    assert score(config, *[(str(n), "") for n in range(40)]) == [float(n) for n in range(40)]


def test_an_answer_for_another_row_is_not_taken(tmp_path: Path) -> None:
    body = (
        "import json, os, socket, sys\n"
        "data = json.dumps([int(response) + 1, 9.0]).encode()\n"
        "if response == '3':\n"
        "    os.write(int(sys.argv[1]), len(data).to_bytes(8, 'big') + data)\n"
        "return int(response)"
    )
    found = score(python(tmp_path, body), *[(str(n), "") for n in range(6)])
    assert found.pop(3) == Unscored("failed", "its process answered for another row")
    assert found == [0.0, 1.0, 2.0, 4.0, 5.0]


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    body = (
        "import os, subprocess\n"
        f"child = subprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'pid')!r}, 'w')"
        ".write(str(child.pid))\nos._exit(0)"
    )
    [found] = score(python(tmp_path, body), ("a", ""))
    assert isinstance(found, Unscored)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    deadline = time.monotonic() + 10
    while is_running(status) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(status)


def is_running(status: Path) -> bool:
    """Tell it of a process that nobody may reap in a container."""
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("is_seen", [False, True])
def test_a_process_that_ends_while_it_is_idle_costs_no_row(is_seen: bool) -> None:
    pool = RowPool(Job("regex", {"pattern": "a", "compare": "found"}, 1.0), 2 if is_seen else 1)
    try:
        for _ in range(3):
            assert list(pool.scores([["a", ""]])) == [1.0]
            for pid in pool.pids[-1:]:
                os.kill(pid, 9)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert list(pool.scores([["a", ""], ["b", ""], ["a", ""]])) == [1.0, 0.0, 1.0]
    finally:
        pool.close()


def test_what_a_function_prints_stays_out_of_our_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "import os\nprint('x' * 100_000)\nos.system('echo child')\nreturn True"
    assert score(python(tmp_path, body), ("a", ""), ("b", "")) == [1.0, 1.0]
    body = "import os\nos.closerange(0, 3)\nreturn True"
    assert score(python(tmp_path, body), ("a", ""), ("b", "")) == [1.0, 1.0]
    assert capfd.readouterr() == ("", "")


def test_several_processes_keep_the_order(tmp_path: Path) -> None:
    body = "import time\ntime.sleep(int(response) % 7 / 1000)\nreturn int(response)"
    config = python(tmp_path, body).model_copy(update={"processes": 3})
    rows = [(str(n), "") for n in range(200)]
    assert score(config, *rows) == [float(n) for n in range(200)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def reward(:", r"SyntaxError"),
        ("import no_such_library", r"No module named 'no_such_library' \(line 1\)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os._exit(4)", "ended with status 4"),
        ("other = 1", "it has no function 'reward'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path: Path, text: str, why: str) -> None:
    config = python(tmp_path, "return 1")
    file = Path(config.python.file or "")
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"reward python: {file}: .*{why}.*; correct it"):
        score(config, ("a", "b"))


def test_a_function_that_ends_its_process_on_every_row_is_given_up(tmp_path: Path) -> None:
    config = python(tmp_path, "import os; os._exit(3)")
    with pytest.raises(EngineError, match="ended 20 times without a score in between"):
        score(config, *[("a", "b")] * 30)


def test_the_bytes_of_the_file_enter_the_key_and_its_place_does_not(tmp_path: Path) -> None:
    config = python(tmp_path, "return 1")
    first = find_reward(config, None)
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = find_reward(python(other, "return 1"), None)
    changed = find_reward(python(tmp_path, "return 2"), None)
    assert first is not None
    assert moved is not None
    assert changed is not None
    assert first.identity == moved.identity != changed.identity
    # What was hashed is what runs, whatever the file holds by then.
    with open_reward(first) as reward:
        [scored] = reward.score([Question("0", [], "", ("",))])
    assert scored.scores == (1.0,)
    with pytest.raises(InputError, match="cannot be read .No such file"):
        find_reward(RewardConfig(name="python", python={"file": str(other / "none.py")}), None)


def test_processes_end_with_the_block_and_with_us(tmp_path: Path) -> None:
    pool = RowPool(Job("regex", {"pattern": "a", "compare": "found"}, 1.0), 2)
    pids = pool.pids
    assert list(pool.scores([["a", ""], ["b", ""]])) == [1.0, 0.0]
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    script = (
        "import os\nfrom stages.rewards.rows import Job, RowPool\n"
        "job = Job('regex', {'pattern': 'a', 'compare': 'found'}, 1.0)\n"
        "print(RowPool(job, 1).pids[0], flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_limited_processes_do_not_see_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIN_TEST_SECRET", "1")
    assert "SPIN_TEST_SECRET" not in Job("math", {}, 1.0).environment()
    assert "SPIN_TEST_SECRET" in Job("python", {}, 1.0, is_users_code=True).environment()
    assert os.environ["SPIN_TEST_SECRET"] == "1"


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    file = tmp_path / "my_reward.py"
    file.write_text(page.split("```python\n")[1].split("```")[0])
    config = RewardConfig(name="python", python={"file": str(file)})
    right, wrong, none = score(config, ("so 12", "#### 12"), ("", "#### 12"), ("1", "none"))
    assert right == pytest.approx(1 - 5 / 10_000)
    assert wrong == 0.0
    assert isinstance(none, Unscored)
    assert none.detail.startswith("IndexError: list index out of range (line ")
