"""Suites of kind task: what is asked, what is measured, what is refused."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate, prepare, suite
from stages.artifacts import (
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
)
from stages.artifacts.keys import row_seed
from stages.config import ChatConfig, PrepareConfig, RewardConfig, RunConfig, TaskSuiteConfig
from stages.data.chat import make_renderer
from stages.data.measures import read_measures
from stages.data.rows import DROPPED, EXAMPLES, JUDGEMENTS, PROMPTS, SUITE_EXAMPLES
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.errors import ConfigError, InputError
from stages.evaluate import EvaluateInputs
from stages.model.source import resolve_model
from stages.rewards.votes import vote_of
from stages.suites.base import SuiteInputs
from stages.suites.task import measured
from tests.fakes import FakeEngine
from tests.judge_server import longer_wins, running_judge

OWN = {"format": "prompt_response"}


def prompt_id(number: int) -> str:
    return f"{number:032x}"


def make_data(place: Path, own: bool = False, **parts: Mapping[int, str]) -> Path:
    """Prompts by number with their human answers; `own`: as the suite's `data` section asks."""

    def fill(space: Workspace) -> Outcome:
        for part, humans in parts.items():
            with TableWriter(space.file(f"{part}-00000.parquet"), PROMPTS) as table:
                for number, human in sorted(humans.items()):
                    messages = [{"role": "user", "content": f"Question {number}?"}]
                    row = {"prompt_id": prompt_id(number), "messages": messages}
                    table.append(row | {"response": human, "source": "x", "source_row": number})
        return Outcome(counts={})

    section = PrepareConfig.model_validate(OWN | {"heldout_size": 0 if own else 5})
    produce(place, Plan("prepare", 1, {"prepare": section.identity()}, {}), fill)
    return place


class Scripted:
    """Answers with texts that are given by number of the prompt and of the sample."""

    def __init__(self, model: Path, texts: Mapping[tuple[int, int], str]) -> None:
        self.renderer = make_renderer(model, ChatConfig())
        self.texts = texts
        self.asked: list[tuple[Request, Sampling]] = []

    def open(self, config: Any, model_dir: Path, **limits: int) -> Engine:
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            self.asked.append((request, sampling))
            name, _, sample = request.request_id.rpartition("/")
            text = self.texts[int(name, 16), int(sample)]
            tokens = self.renderer.response_tokens(text.removesuffix("…"))
            end = "length" if text.endswith("…") else "stop"  # `…` for one that was cut off
            tokens = tokens[:-1] if end == "length" else tokens
            yield Completion(request.request_id, tokens, [-1.0] * len(tokens), end)

    def close(self) -> None:
        pass


def ask(
    out: Path, model: Path, data: Path, by: Any = None, /, *, of_run: Any = None, **settings: Any
) -> Manifest:
    values = {"suites": {"quiz": {"kind": "task", "max_new_tokens": 8, **settings}}}
    config = RunConfig.model_validate(values | (of_run or {"reward": {"name": "gsm8k"}}))
    inputs = SuiteInputs("quiz", str(model), data=data)
    return suite.run(config, inputs, out, open_engine=(by or FakeEngine()).open)


def examples(place: Path) -> list[dict[str, Any]]:
    return list(read_rows([open_artifact(place).file("examples.parquet")], SUITE_EXAMPLES))


TEXTS = {
    (1, 0): "#### 1", (1, 1): "so #### 1", (1, 2): "#### 2…", (1, -1): "#### 1",
    (2, 0): "#### 7", (2, 1): "no number…", (2, 2): "no number", (2, -1): "#### 7…",
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Two held-out prompts, three samples and a greedy answer to each."""
    folder = tmp_path_factory.mktemp("asked")
    data = make_data(folder / "data", train={9: "#### 9"}, heldout={1: "#### 1", 2: "#### 2"})
    engine = Scripted(tiny_model_dir, TEXTS)
    ask(folder / "out", tiny_model_dir, data, engine, num_samples=3, k=[1, 2, 3])
    return folder / "out"


def test_there_is_a_row_for_every_answer(asked: Path) -> None:
    rows = examples(asked)
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [
        (prompt_id(n), k) for n in (1, 2) for k in (-1, 0, 1, 2)
    ]
    for row in rows:
        text = TEXTS[int(row["prompt_id"], 16), row["sample"]]
        assert row["response"] == text.removesuffix("…")
        assert row["finish_reason"] == ("length" if text.endswith("…") else "stop")
        assert row["score"] == float("#### 1" in text)
        assert (row["task"], row["scored_by"], row["other"]) == ("quiz", "gsm8k", None)
        assert (row["seed"] is None) == (row["sample"] == -1)
    assert rows[0]["prompt"] == "Question 1?"
    assert rows[0]["human"] == "#### 1"


def test_metrics_are_the_means_of_their_measures(asked: Path) -> None:
    artifact = open_artifact(asked)
    metrics = artifact.manifest.metrics
    columns = read_measures(artifact)
    assert {name: metrics[name] for name in columns} == {
        name: pytest.approx(column.mean()) for name, column in columns.items()
    }
    assert metrics == json.loads(artifact.file("metrics.json").read_text())
    assert metrics.keys() - columns.keys() == {"prompts"}
    assert all(column.example_ids == [prompt_id(1), prompt_id(2)] for column in columns.values())
    wanted = {
        "prompts": 2, "accuracy": (2 / 3 + 0) / 2, "greedy_accuracy": 0.5,
        "pass@1": 1 / 3, "pass@2": 1 / 2, "pass@3": 1 / 2,
        # of prompt 1, pairs: 1 1, 1 2, 1 2; a tie counts one half
        "majority@1": 1 / 3, "majority@2": (1 + 0.5 + 0.5) / 3 / 2, "majority@3": 1 / 2,
        "cut_off_share": 2 / 6, "greedy_cut_off_share": 1 / 2,
        "unscored_share": 0, "greedy_unscored_share": 0,
    }  # fmt: skip
    lengths = {name: metrics[name] for name in ("mean_tokens", "greedy_mean_tokens")}
    intervals = json.loads(artifact.file("intervals.json").read_text())
    told = {name: intervals[name] for name in intervals.keys() - lengths.keys()}
    assert told["pass@1"] == told["accuracy"] == [0.0, 1.0]  # two prompts tell nothing
    assert all(low is None or 0 <= low <= high <= 1 for low, high in told.values())
    assert metrics == pytest.approx(wanted | lengths)
    tokens = [r["response_tokens"] for r in examples(asked) if r["sample"] >= 0]
    assert lengths["mean_tokens"] == pytest.approx(sum(tokens) / 6)


def test_the_manifest_says_what_was_asked_of_whom(asked: Path, tiny_model_dir: Path) -> None:
    manifest = open_artifact(asked).manifest
    assert manifest.stage == "suite"
    assert manifest.config["suite"] == "quiz"
    assert manifest.config["kind"] == "task"
    assert manifest.config["asks"] == "heldout"
    assert manifest.inputs.keys() == {"data", "model"}
    assert manifest.inputs["model"] == resolve_model(str(tiny_model_dir)).ref
    assert manifest.counts == {"prompts": 2, "answers": 8, "dropped_refused": 0}
    assert manifest.cost.tokens == sum(r["response_tokens"] for r in examples(asked))


def test_sample_0_and_the_greedy_answer_are_those_of_the_main_evaluation(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = make_data(tmp_path / "data", heldout={n: f"#### {n}" for n in range(20)})
    sampling = {"max_new_tokens": 8, "max_prompts": 12}
    of_run = {"reward": {"name": "gsm8k"}, "evaluate": {**sampling, "precision": "fp32"}}
    config = RunConfig.model_validate(of_run)
    inputs = EvaluateInputs(str(tiny_model_dir), data)
    main = evaluate.run(config, inputs, tmp_path / "main", open_engine=FakeEngine().open)
    own = ask(tmp_path / "own", tiny_model_dir, data, of_run=of_run, num_samples=2, **sampling)
    rows = examples(tmp_path / "own")
    file = open_artifact(tmp_path / "main").file("examples.parquet")
    theirs = {r["prompt_id"]: r for r in read_rows([file], EXAMPLES)}
    assert {r["prompt_id"] for r in rows} == theirs.keys()
    assert len(theirs) == 12
    for row in rows:
        their = theirs[row["prompt_id"]]
        if row["sample"] == 0:
            assert (row["response"], row["seed"]) == (their["sampled"], their["sampled_seed"])
            assert row["score"] == their["sampled_reward"]
        elif row["sample"] == -1:
            assert (row["response"], row["score"]) == (their["greedy"], their["greedy_reward"])
        else:
            assert row["seed"] != their["sampled_seed"]
    assert own.metrics["greedy_accuracy"] == main.metrics["greedy_accuracy"]


def test_samples_are_drawn_as_the_suite_says(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = make_data(tmp_path / "data", heldout={1: "#### 1"})
    engine = Scripted(tiny_model_dir, TEXTS)
    drawn = {"temperature": 0.5, "top_p": 0.75, "top_k": 3, "max_new_tokens": 9}
    of_run = {"reward": {"name": "gsm8k"}, "seed": 4, "evaluate": {"engine": {"dtype": "bfloat16"}}}
    made = ask(tmp_path / "a", tiny_model_dir, data, engine, of_run=of_run, num_samples=2, **drawn)
    samples, greedy = engine.asked[:2], engine.asked[2:]
    for request, sampling in samples:
        assert {name: getattr(sampling, name) for name in drawn} == drawn
        sample = int(request.request_id.rpartition("/")[2])
        assert request.seed == row_seed(4, -1, prompt_id(1), sample)
    assert [sampling.temperature for _, sampling in greedy] == [0.0]
    assert made.config["engine"]["dtype"] == "bfloat16"
    engine_of_its_own = {"dtype": "float32"}
    own = ask(tmp_path / "b", tiny_model_dir, data, of_run=of_run, engine=engine_of_its_own)
    assert own.config["engine"]["dtype"] == "float32"


def test_a_suite_with_data_of_its_own_asks_all_of_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = make_data(tmp_path / "own", own=True, train={5: "a", 3: "b"}, heldout={4: "c"})
    made = ask(
        tmp_path / "out", tiny_model_dir, data, data=OWN, reward={"name": "exact"}, of_run={}
    )
    assert [int(r["prompt_id"], 16) for r in examples(tmp_path / "out") if r["sample"] == 0] == [
        3, 4, 5,
    ]  # fmt: skip
    assert made.config["asks"] == "all"
    of_the_run = make_data(tmp_path / "run", train={5: "a"}, heldout={4: "c"})
    with pytest.raises(ConfigError, match=r"is not the data of suites.quiz: .*heldout_size: 5 th"):
        ask(tmp_path / "wrong", tiny_model_dir, of_the_run, data=OWN)


def test_the_prompts_of_another_suite_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Two suites may differ in nothing but their source, which is a place and in no key."""
    for name in ("first", "second"):
        row = {"prompt": f"The {name}?", "response": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sections = {
        name: OWN | {"source": str(tmp_path / f"{name}.jsonl"), "heldout_size": 0}
        for name in ("first", "second")
    }
    made = tmp_path / "prompts"
    prepare.run(RunConfig.model_validate({"prepare": sections["first"]}), made)
    exact = {"reward": {"name": "exact"}, "of_run": {}}
    ask(tmp_path / "a", tiny_model_dir, made, data=sections["first"], **exact)
    moved = tmp_path / "elsewhere" / "first.jsonl"
    moved.parent.mkdir()
    (tmp_path / "first.jsonl").rename(moved)
    ask(tmp_path / "b", tiny_model_dir, made, data=sections["first"], **exact)  # it is not here
    ask(tmp_path / "c", tiny_model_dir, made, data=OWN | {"source": str(moved)}, **exact)
    wrong = r"is not the data of suites.quiz: it was made of another source than .*second.jsonl"
    with pytest.raises(ConfigError, match=wrong):
        ask(tmp_path / "d", tiny_model_dir, made, data=sections["second"], **exact)
    with pytest.raises(ConfigError, match="another source than org/other"):  # the hub is not asked
        ask(tmp_path / "e", tiny_model_dir, made, data=OWN | {"source": "org/other"}, **exact)
    moved.write_text(moved.read_text() * 2)
    with pytest.raises(ConfigError, match="or of what that held before; make it by spin prepare"):
        ask(tmp_path / "f", tiny_model_dir, made, data=OWN | {"source": str(moved)}, **exact)


def test_what_has_no_score_is_left_out_and_told(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r.py").write_text(
        "def reward(prompt, response, human):\n    return {'a': 1.0, 'b': 0.0}.get(response)\n"
    )
    reward = {"name": "python", "python": {"file": str(tmp_path / "r.py")}}
    data = make_data(tmp_path / "data", heldout={1: "", 2: "", 3: ""})
    texts = {(1, 0): "a", (1, 1): "x", (1, 2): "b", (1, -1): "x", (2, 0): "x", (2, 1): "y"}
    texts |= {(2, 2): "z", (2, -1): "a", (3, 0): "a", (3, 1): "a", (3, 2): "b", (3, -1): "b"}
    engine = Scripted(tiny_model_dir, texts)
    settings: dict[str, Any] = {"num_samples": 3, "k": [2, 3]}
    made = ask(tmp_path / "out", tiny_model_dir, data, engine, reward=reward, **settings)
    assert made.counts["unscored"] == 5
    assert made.metrics["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert made.metrics["unscored_share"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert made.metrics["greedy_accuracy"] == 0.5
    columns = read_measures(open_artifact(tmp_path / "out"))
    assert columns["pass@2"].example_ids == [prompt_id(1), prompt_id(3)]
    assert columns["pass@3"].example_ids == [prompt_id(3)]
    assert columns["majority@2"].values.tolist() == pytest.approx([0.5, (1 + 0.5 + 0.5) / 3])
    path = open_artifact(tmp_path / "out").file("unscored.parquet")
    told = [
        (int(r["prompt_id"], 16), r["detail"].split(":")[0]) for r in read_rows([path], DROPPED)
    ]
    assert told == [
        (1, "sample 1"), (1, "greedy"), (2, "sample 0"), (2, "sample 1"), (2, "sample 2"),
    ]  # fmt: skip
    assert "suite quiz: 5 of 12 answers cannot be scored, such as to prompt" in caplog.text
    with pytest.raises(InputError, match=r"suite quiz: 5 of 12 answers cannot be scored"):
        ask(tmp_path / "stop", tiny_model_dir, data, engine,
            reward=reward | {"on_error": "stop"}, **settings)  # fmt: skip


def test_a_judge_is_shown_each_answer_beside_the_human_one(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    data = make_data(tmp_path / "data", heldout={1: "xxx"})
    engine = Scripted(tiny_model_dir, {(1, 0): "x", (1, 1): "xxxxx", (1, -1): "xxxx"})
    with running_judge(longer_wins) as judge:
        reward = {"name": "judge", "judge": {"url": judge.url, "model": "m"}}
        made = ask(tmp_path / "out", tiny_model_dir, data, engine, reward=reward, num_samples=2)
    assert made.metrics["accuracy"] == 0.5
    assert made.metrics["greedy_accuracy"] == 1.0
    path = open_artifact(tmp_path / "out").file("judgements.parquet")
    assert [(r["a"], r["b"]) for r in read_rows([path], JUDGEMENTS)] == [
        (a, -1) for a in (0, 1, 2) for _ in range(2)
    ]


def row(sample: int, response: str = "", score: float | None = 0.0) -> dict[str, Any]:
    values = {"prompt_id": "p", "sample": sample, "response": response, "score": score}
    return values | {"finish_reason": "stop", "response_tokens": 3}


def metrics(rows: list[dict[str, Any]], reward: str = "gsm8k", **settings: Any) -> Any:
    section = TaskSuiteConfig.model_validate({"kind": "task", "num_samples": len(rows), **settings})
    found = measured(rows, section, RewardConfig.model_validate({"name": reward}))
    assert {m.weight for m in found} == {1.0}
    return {m.metric: m.value for m in found}


def test_a_response_passes_from_pass_reward_on() -> None:
    rows = [row(0, "a", 0.4), row(1, "b", 0.6), row(2, "c", 0.8)]
    assert metrics(rows, k=[1])["pass@1"] == 0
    assert metrics(rows, k=[1], pass_reward=0.6)["pass@1"] == pytest.approx(2 / 3)
    assert metrics(rows, k=[1])["accuracy"] == pytest.approx(0.6)


def test_answers_vote_and_responses_without_one_do_not() -> None:
    said = ["well, #### 4", "#### 4", "#### 3", "nothing", "nothing", "nothing"]
    rows = [row(i, text, float("4" in text)) for i, text in enumerate(said)]
    assert metrics(rows, k=[6])["majority@6"] == 1.0
    assert metrics(rows, "exact", k=[6])["majority@6"] == 0.0  # whole texts vote


def test_greedy_answers_alone_have_no_pass_at_k() -> None:
    found = metrics([row(-1, "#### 1", 1.0)], num_samples=0)
    assert found == {
        "greedy_accuracy": 1, "greedy_cut_off_share": 0, "greedy_mean_tokens": 3,
        "greedy_unscored_share": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "response", "vote"),
    [
        ("gsm8k", "so it is #### 1,200.", "1200"),
        ("gsm8k", "1200", None),
        ("math", r"hence \boxed{ x + 1 }.", "x + 1"),
        ("math", r"hence \boxed{0.50}", "1/2"),
        ("math", r"hence \boxed{1/2}", "1/2"),
        ("math", "no box", None),
        ("exact", " Yes ", "Yes"),
        ("python", " Yes ", " Yes "),
    ],
)
def test_what_a_response_votes_for(name: str, response: str, vote: str | None) -> None:
    settings = {"name": name, "python": {"file": "x.py"}}
    assert vote_of(response, RewardConfig.model_validate(settings)) == vote


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"k": [2]}, r"k=2 is above num_samples=1; draw more"),
        ({"num_samples": 0, "greedy": False}, "answer nothing; set one of them"),
        ({"num_samples": 2, "temperature": 0.0}, "temperature=0 draws the same answer"),
        ({"num_samples": 1001}, "less than or equal to 1000"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TaskSuiteConfig.model_validate({"kind": "task", **settings})


def test_wrong_inputs_are_told_in_one_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = make_data(tmp_path / "data", heldout={1: "#### 1"})
    bare = make_data(tmp_path / "bare", train={1: "#### 1"})
    other = tmp_path / "other"
    produce(other, Plan("pair", 1, {}, {}), lambda space: Outcome(counts={}))

    def refused(error: type[Exception], why: str, **changes: Any) -> None:
        given = {"name": "quiz", "model": str(tiny_model_dir), "data": data, **changes}
        of_run = given.pop("of_run", {"reward": {"name": "gsm8k"}})
        quiz = {"kind": "task", "max_new_tokens": 8, **given.pop("settings", {})}
        config = RunConfig.model_validate({"suites": {"quiz": quiz}, **of_run})
        with pytest.raises(error, match=why) as caught:
            suite.run(config, SuiteInputs(**given), tmp_path / "x", open_engine=FakeEngine().open)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x").exists()

    refused(ConfigError, "--suite quizz: .* no such suite; it has quiz", name="quizz")
    refused(ConfigError, r"suites.quiz: reward.name=none scores nothing; set su", of_run={})
    refused(ConfigError, "asks a model; name one by --model", model=None)
    refused(ConfigError, "asks prompts; name them by --data .the run's output of", data=None)
    refused(ConfigError, "--data .spin prepare --suite quiz --out DIR", data=None,
            settings={"data": OWN})  # fmt: skip
    refused(ConfigError, "--against=.*is of kind task, which has no use for it", against=data)
    refused(ConfigError, "--answers=.*leave it out", answers=data)
    refused(InputError, "is the output of 'pair', but prepare is needed", data=other)
    refused(InputError, "bare has no held-out prompt to ask; set prepare.heldout", data=bare)
    refused(InputError, "none of the 1 prompts .* lower it", settings={"max_new_tokens": 505})
    refused(InputError, "nowhere", model="./nowhere")


OTHER_RESULTS: list[dict[str, Any]] = [
    {"reward": {"name": "exact"}}, {"num_samples": 3}, {"greedy": False}, {"k": [1]},
    {"pass_reward": 0.5}, {"max_prompts": 1}, {"engine": {"max_model_len": 200}},
    {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 3}, {"max_new_tokens": 9},
]  # fmt: skip


def test_every_setting_that_changes_answers_or_metrics_changes_the_key(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = make_data(tmp_path / "data", heldout={1: "#### 1", 2: "#### 2"})
    first = {"num_samples": 2, "k": [1, 2]}
    base = ask(tmp_path / "base", tiny_model_dir, data, **first)
    keys = {base.key}
    for number, change in enumerate(OTHER_RESULTS):
        keys.add(ask(tmp_path / f"{number}", tiny_model_dir, data, **{**first, **change}).key)
    assert len(keys) == 1 + len(OTHER_RESULTS)
    assert TaskSuiteConfig.model_fields.keys() - {k for c in OTHER_RESULTS for k in c} == {
        "kind", "every", "data",
    }  # fmt: skip
    assert ask(tmp_path / "again", tiny_model_dir, data, **first, every=2).key == base.key


def test_in_a_run_an_evaluation_is_not_made_twice(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    data = make_data(tmp_path / "data", heldout={1: "#### 1", 2: "#### 2"})
    engine = FakeEngine()
    first = ask(tmp_path / "start/suite-quiz", tiny_model_dir, data, engine)
    assert engine.answered == 4
    assert ask(tmp_path / "iterations/000/suite-quiz", tiny_model_dir, data, engine) == first
    config = RunConfig.model_validate({"evaluate": {"max_new_tokens": 8, "precision": "fp32"}})
    inputs = EvaluateInputs(str(tiny_model_dir), data)
    main = evaluate.run(config, inputs, tmp_path / "start/evaluate", open_engine=engine.open)
    assert engine.answered == 6
    again = evaluate.run(config, inputs, tmp_path / "elsewhere", open_engine=engine.open)
    assert again == main
    assert engine.answered == 6


def test_the_text_of_a_conversation_is_kept_whole(tmp_path: Path, tiny_model_dir: Path) -> None:
    def fill(space: Workspace) -> Outcome:
        talk = [("system", "Be brief."), ("user", "One?")]
        messages = [{"role": role, "content": text} for role, text in talk]
        row = {"prompt_id": prompt_id(1), "messages": messages, "response": "yes"}
        with TableWriter(space.file("heldout-00000.parquet"), PROMPTS) as table:
            table.append(row | {"source": "x", "source_row": 0})
        return Outcome(counts={})

    produce(tmp_path / "data", Plan("prepare", 1, {"prepare": {}}, {}), fill)
    ask(tmp_path / "out", tiny_model_dir, tmp_path / "data", reward={"name": "exact"})
    assert examples(tmp_path / "out")[0]["prompt"] == "system: Be brief.\n\nuser: One?"
