"""What a mistake in a recipe's suites is told as."""

import pytest

from stages.config import RunConfig, suite_kinds
from stages.errors import ConfigError
from stages.recipe import load_recipe


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (
            ["suites.a.kind=task", "suites.a.num_sampels=3"],
            r"unknown key suites\.a\.num_sampels; did you mean suites\.a\.num_samples\?",
        ),
        (
            ["suites.a.kind=task", "suites.a.engine.nam=vllm"],
            r"unknown key suites\.a\.engine\.nam; did you mean suites\.a\.engine\.name\?",
        ),
        # a key that is a kind's name too
        (["suites.a.kind=task", "suites.a.task=4"], r"unknown key suites\.a\.task; "),
        (["suites.a.kind=task", "suites.a.tasks=[x]"], r"unknown key suites\.a\.tasks; "),
        (["suites.a.kind=tsk"], r"suites\.a\.kind='tsk': .* but task, lm_.*; did you mean task\?"),
        (["suites.a.kind=[1]"], r"suites\.a\.kind=\[1\]: there is no such kind of suite, but task"),
        (
            ["suites.gsm8k.kind=task", "suites.gsmk.num_samples=4"],
            r"suites\.gsmk has no kind; set .*\.kind to one of .*; or did you mean suites\.gsm8k\?",
        ),
        (["suites.a.num_samples=4"], r"suites\.a has no kind; .*alpaca_eval$"),
        (["suites.a.kind=lm_eval"], r"suites\.a\.tasks is missing; set it"),
        (["suites.a.kind=task", "suites.a.num_samples=-1"], r"suites\.a\.num_samples=-1: Input sh"),
        (["suites.a.kind=task", "suites.a.k=[0]"], r"suites\.a\.k\.0=0: Input should be greater"),
        (["suites.a.kind=task", "suites.a.k=[4]"], r"suites\.a: k=4 is above num_samples=1; draw"),
        (
            ["suites.a.kind=task", "suites.a.reward.name=python"],
            r"suites\.a\.reward: .* needs .*python\.file",
        ),
        (
            ["generate.engine.name=vllm", "suites.a.kind=task", "suites.a.temperature=3"],
            r"suites\.a\.temperature=3.0: vLLM has 0",
        ),
        (["suites.a/b.kind=task"], r"'a/b' is no name of a suite; use letters, digits, - and _"),
        (
            ["suites.evaluate.kind=task"],
            r"'evaluate' is the run's own evaluation and no name of a suite; give it another",
        ),
        (["suites.a=3"], r"suites\.a=3: "),
    ],
)
def test_a_mistake_in_a_suite_is_told_where_it_is(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load_recipe(None, overrides)
    assert "\n" not in str(caught.value)


def test_an_engine_of_its_own_has_temperatures_of_its_own() -> None:
    settings = {"kind": "task", "temperature": 3, "engine": {"name": "transformers"}}
    values = {"generate": {"engine": {"name": "vllm"}}, "suites": {"a": settings}}
    assert RunConfig.model_validate(values).suites["a"].kind == "task"


def test_kinds_of_suites_are_found_by_their_names() -> None:
    assert list(suite_kinds()) == ["task", "lm_eval", "win_rate", "mt_bench", "alpaca_eval"]
    for name, kind in suite_kinds().items():
        assert kind.__name__.lower() == f"{name.replace('_', '')}suiteconfig"
