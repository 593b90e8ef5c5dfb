"""How a recipe resolves: defaults, file, iteration blocks, overrides; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import RunConfig, TaskSuiteConfig
from stages.config.fields import Section, place
from stages.errors import ConfigError
from stages.layout import RunLayout
from stages.recipe import known_keys, load_recipe, recipe_from_json
from stages.run_record import read_recipe, start_or_resume

RECIPE = """
name: example
seed: 7
model: {path: recipe://base, revision: abc}
prepare: {source: raw.jsonl}
sft: {epochs: 2}
train:
  beta: 0.2
  learning_rate: 5e-7
iterations:
  3: {train: {beta: 5.0}}
"""


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "example.yaml"
    path.write_text(text)
    return path


def test_values_rise_from_default_to_file_to_iteration_to_override(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    recipe = load_recipe(path)
    assert recipe.for_iteration().train.label_smoothing == 0.0
    assert recipe.for_iteration().train.beta == 0.2
    assert recipe.for_iteration(2).train.beta == 0.2
    assert recipe.for_iteration(3).train.beta == 5.0
    assert recipe.for_iteration(3).train.learning_rate == 5e-7
    assert load_recipe(path, ["train.beta=0.05"]).for_iteration(3).train.beta == 0.05


def test_the_last_of_two_overrides_wins() -> None:
    recipe = load_recipe(None, ["train.beta=1", "train.beta=2"])
    assert recipe.for_iteration().train.beta == 2.0


def test_an_override_may_be_of_some_iterations(tmp_path: Path) -> None:
    words = ["train.beta=0.3", "iterations.1-2.train.beta=0.4", "iterations.4+.train.beta=0.5"]
    recipe = load_recipe(recipe_file(tmp_path), words)
    betas = [recipe.for_iteration(t).train.beta for t in (None, 0, 1, 2, 3, 4, 9)]
    assert betas == [0.3, 0.3, 0.4, 0.4, 0.3, 0.5, 0.5]
    assert {0, 1, 3, 4} <= set(recipe.turning_points())
    assert recipe_from_json(recipe.to_json()).for_iteration(4).train.beta == 0.5
    assert {n: o for n, _, o in recipe.origins(1)}["train.beta"] == "override"


def test_the_last_override_wins_whether_of_all_or_of_some_iterations() -> None:
    recipe = load_recipe(None, ["iterations.1.train.beta=0.4", "train.beta=0.3"])
    assert recipe.for_iteration(1).train.beta == 0.3
    again = recipe.with_overrides(["iterations.1.train.beta=0.4"])
    assert again.for_iteration(1).train.beta == 0.4


def test_the_order_of_overrides_survives_the_runs_record(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "iterations: {2-3: {train: {beta: 0.2}}, 1-2: {train: {beta: 0.1}}, 4: {train: {beta: 1}}}"
    )
    recipe = load_recipe(path, ["train.epochs=2", "iterations.1+.train.epochs=3"])
    layout = RunLayout(tmp_path / "run")
    start_or_resume(layout, recipe)
    recorded = read_recipe(layout)
    for iteration in range(5):
        assert recorded.for_iteration(iteration) == recipe.for_iteration(iteration)
    swapped = load_recipe(path, ["iterations.1+.train.epochs=3", "train.epochs=2"])
    with pytest.raises(ConfigError, match="started with another recipe: train.epochs"):
        start_or_resume(layout, swapped)


def test_a_mistake_in_a_block_names_the_iteration(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("iterations: {2+: {train: {bta: 1}}}")
    with pytest.raises(ConfigError, match=r"r\.yaml, iteration 2: unknown key train\.bta"):
        load_recipe(path)


def test_more_overrides_go_on_top_of_a_recipes_own(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path), ["seed=8", "train.beta=1"])
    more = recipe.with_overrides(["train.beta=2"])
    assert (more.for_iteration().seed, more.for_iteration().train.beta) == (8, 2.0)
    with pytest.raises(ConfigError, match=r"train\.beta='x'"):
        recipe.with_overrides(["train.beta=x"])


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.0000005", "+5e-7", "5.0e-07"])
def test_scientific_notation_is_a_number(text: str, tmp_path: Path) -> None:
    override = load_recipe(None, [f"train.learning_rate={text}"])
    assert override.for_iteration().train.learning_rate == 5e-7
    file = load_recipe(recipe_file(tmp_path, f"train: {{learning_rate: {text}}}"))
    assert file.for_iteration().train.learning_rate == 5e-7


def test_an_override_may_be_null_or_a_list_or_a_text() -> None:
    recipe = load_recipe(None, ["train.betas=[0.9, 0.98]", "generate.max_prompts=null", "name=a b"])
    config = recipe.for_iteration()
    assert config.train.betas == (0.9, 0.98)
    assert config.generate.max_prompts is None
    assert config.name == "a b"


def test_an_override_makes_an_optional_section() -> None:
    assert load_recipe(None).for_iteration().sft is None
    config = load_recipe(None, ["sft.init=random"]).for_iteration()
    assert config.sft is not None
    assert (config.sft.init, config.sft.learning_rate) == ("random", 2e-5)


def test_every_value_has_its_origin(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path), ["seed=9"])
    origins = {name: (value, origin) for name, value, origin in recipe.origins(3)}
    assert origins["seed"] == (9, "override")
    assert origins["train.learning_rate"] == (5e-7, "example.yaml")
    assert origins["train.beta"] == (5.0, "example.yaml, iteration 3")
    assert origins["train.loss"] == ("sigmoid", "default")
    assert {n: o for n, _, o in recipe.origins()}["train.beta"] == "example.yaml"


def test_a_section_given_as_one_override_has_its_origin() -> None:
    recipe = load_recipe(None, ["train={beta: 0.5}"])
    origins = {name: (value, origin) for name, value, origin in recipe.origins()}
    assert origins["train.beta"] == (0.5, "override")
    assert origins["train.loss"] == ("sigmoid", "default")


def test_origins_name_every_setting_once() -> None:
    names = [
        name for name, _, _ in load_recipe(None, ["sft.init=random", "train.lora={}"]).origins()
    ]
    assert len(names) == len(set(names))
    leaves = {n for n in known_keys() if not any(k.startswith(f"{n}.") for k in known_keys())}
    unset = ("evaluate.engine", "promote.gate")
    below = {n for n in leaves if n.startswith(tuple(f"{name}." for name in unset))}
    assert set(names) == leaves - below | set(unset)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bta=1", r"unknown key train\.bta; did you mean train\.beta\?"),
        ("trian.beta=1", r"unknown key trian.*; did you mean train"),
        ("generate.engine.nam=vllm", r"did you mean generate\.engine\.name\?"),
        ("zzzzzz=1", r"unknown key zzzzzz; `spin config show` lists all keys"),
        ("train.beta=much", r"train\.beta='much': .*number"),
        ("train.beta=0", r"train\.beta=0: .*greater than 0"),
        ("train.loss=dpo", r"train\.loss='dpo': .*'sigmoid'"),
        ("train.lora.rank=0", r"train\.lora\.rank=0: .*greater than or equal to 1"),
        ("train.lora.target_modules=q_proj", r"target_modules='q_proj': give a list of names"),
        ("train.lora.target_modules=[]", r"target_modules=\[\]: give a list of names"),
        ("generate.num_samples=1.5", r"generate\.num_samples=1\.5: .*integer"),
        ("seed=-1", r"seed=-1: .*greater than or equal to 0"),
        ("seed.x=1", r"seed=.*integer"),
        ("pair.policy=best_vs_worst", r"pair\.policy=best_vs_worst needs reward\.name"),
        ("train.beta", r"override 'train\.beta' is not of the form section\.key=value"),
        ("=1", r"override '=1' is not of the form"),
        ("iterations.x.train.beta=1", r"is not of the form iterations\.N\.section\.key=value"),
        ("iterations.1=2", r"is not of the form iterations\.N\.section\.key=value"),
        ("iterations.1.train.bta=1", r"iteration 1: unknown key train\.bta"),
        ("iterations.1.evaluate.greedy=false", r"evaluate holds for the whole run"),
        ("train.beta=[1", r"override 'train\.beta=\[1': .* no valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_with_a_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {bta: 1}", r"example\.yaml: unknown key train\.bta; did you mean train\.beta"),
        ("iterations: {2: {train: {bta: 1}}}", r"unknown key train\.bta"),
        ("iterations: [1]", r"iterations holds a list, a mapping is needed"),
        ("iterations: {2-1: {}}", r"iterations\.2-1"),
        ("iterations: {2+: 3}", r"iterations\.2\+ holds a int"),
        ("shrink: [1]", r"shrink holds a list"),
        ("iterations: {1: {seed: 1}, 1: {seed: 2}}", r"1 stands there twice; merge the two"),
        ("train: {beta: 1}\npair: {}\ntrain: {beta: 2}", r"train stands there twice"),
        ("iterations: {1: {}, 1-1: {}}", r"iterations\.1-1: these iterations stand there twice"),
        ("iterations: {1: {sft: {epochs: 2}}}", r"iterations\.1\.sft: sft holds for the whole run"),
        ("iterations: {first: {}}", r"iterations\.first: iterations are numbered 0, 1, 2"),
        ("iterations: {-1: {}}", r"iterations\.-1"),
        ("[1, 2]", r"holds a list, a mapping is needed"),
        ("a: b: c", r"is no valid YAML"),
        ("!!python/object/apply:os.system [ls]", r"is no valid YAML"),
        ("train: 3", r"train=3"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(recipe_file(tmp_path, "")).for_iteration() == RunConfig()


def test_recipe_paths_lie_beside_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(recipe_file(tmp_path)).for_iteration().model.path == str(tmp_path / "base")
    with pytest.raises(ConfigError, match="no recipe file to be beside"):
        load_recipe(None, ["model.path=recipe://base"])


def test_a_chat_template_may_be_a_file_and_is_known_by_its_text(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    identities = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "mine.jinja").write_text(text)
        path = recipe_file(folder, "chat: {template: 'recipe://mine.jinja'}")
        config = load_recipe(path).for_iteration()
        assert config.chat.template == text
        identities.append(config.identity())
    inline = load_recipe(None, [f"chat.template='{text}'"]).for_iteration()
    by_path = load_recipe(None, [f"chat.template={tmp_path}/here/mine.jinja"]).for_iteration()
    assert inline.chat == by_path.chat
    assert [*identities, inline.identity(), by_path.identity()] == [identities[0]] * 4
    assert len(identities[0]["chat"]["template"]) == 64
    assert "content" not in str(identities[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jinja", "No such file"), ("folder.jinja", "Is a directory"), ("x.jinja", "no UTF-8")],
)
def test_a_chat_template_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe")
    path = recipe_file(tmp_path, f"chat: {{template: 'recipe://{name}'}}")
    with pytest.raises(ConfigError, match=rf"chat.template=.*{name}.*cannot be read \({reason}"):
        load_recipe(path)


def test_a_recipe_survives_its_json(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path), ["train.beta=0.05"])
    again = recipe_from_json(recipe.to_json())
    assert again == recipe
    assert again.for_iteration(3) == recipe.for_iteration(3)


def test_places_and_speed_are_no_part_of_the_identity(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    other = recipe.with_overrides(
        ["model.path=elsewhere", "generate.shard_rows=9", "verify=false", "threads=1"]
    )
    assert recipe.settings() == other.settings()
    assert recipe.settings() != recipe.with_overrides(["train.beta=0.3"]).settings()
    assert recipe.settings(3)["train.beta"] == 5.0


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]


SPANS = """
train: {beta: 0.1}
iterations:
  2: {train: {beta: 0.5}}
  1+: {train: {beta: 0.2, learning_rate: 1.0e-6}, seed: 3}
  2-3: {train: {beta: 0.3}}
"""


@pytest.mark.parametrize(
    ("iteration", "beta", "seed"),
    [(None, 0.1, 0), (0, 0.1, 0), (1, 0.2, 3), (2, 0.5, 3), (3, 0.3, 3), (4, 0.2, 3), (99, 0.2, 3)],
)
def test_the_narrower_block_of_iterations_wins(
    iteration: int | None, beta: float, seed: int, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(SPANS)
    recipe = load_recipe(tmp_path / "r.yaml")
    stored = recipe_from_json(json.loads(json.dumps(recipe.to_json(), sort_keys=True)))
    for form in (recipe, stored):
        config = form.for_iteration(iteration)
        assert (config.train.beta, config.seed) == (beta, seed)


def test_every_iteration_where_settings_change_is_a_turning_point(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SPANS)
    recipe = load_recipe(tmp_path / "r.yaml")
    changes = [t for t in range(1, 20) if recipe.settings(t) != recipe.settings(t - 1)]
    assert set(changes) <= set(recipe.turning_points())


SHRINK = """
train: {beta: 0.4, batch_size: 64}
iterations: {1: {train: {beta: 5.0, learning_rate: 1.0e-7}}}
shrink:
  model: {path: tiny}
  train: {batch_size: 2}
  iterations: {1: {train: {batch_size: 3}}}
"""


def test_the_reduced_form_changes_what_it_names_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SHRINK)
    whole, small = load_recipe(path), load_recipe(path, shrink=True)
    differing = {
        t: {name for name, value in small.settings(t).items() if whole.settings(t)[name] != value}
        for t in (0, 1)
    }
    assert differing == {0: {"train.batch_size"}, 1: {"train.batch_size"}}
    assert small.for_iteration(1).train.batch_size == 3
    assert small.for_iteration(1).model.path == "tiny"
    assert "r.yaml --shrink" in {origin for *_, origin in small.origins()}


GATES = """
promote: {gate: {all: [{better: {metric: a, by: 0.1}}]}}
iterations:
  1+: {promote: {gate: {not_worse: {metric: a, margin: 0.1}}}}
  2: {promote: {gate: {not_worse: {metric: b, margin: 0.2}}, retry: {times: 1}}}
shrink: {promote: {gate: {at_least: {metric: a, value: 0.5}}}}
"""


def test_a_gate_takes_the_place_of_another_as_a_whole(tmp_path: Path) -> None:
    """In every layer: half of one tree of conditions means nothing in another."""
    path = tmp_path / "r.yaml"
    path.write_text(GATES)

    def gate(iteration: int, *overrides: str, shrink: bool = False) -> dict[str, Any]:
        config = load_recipe(path, overrides, shrink=shrink).for_iteration(iteration)
        assert config.promote.gate is not None
        return {name: dict(inner) for name, inner in config.promote.gate if inner is not None}

    assert gate(1).keys() == {"not_worse"}
    assert gate(0, shrink=True).keys() == {"at_least"}
    assert gate(2)["not_worse"].items() >= {"metric": "b", "margin": 0.2}.items()
    better = "promote.gate={better: {metric: sampled_accuracy}}"
    assert [gate(t, better).keys() for t in (0, 1, 2)] == [{"better"}] * 3
    later = f"iterations.2+.{better.replace('sampled', 'greedy')}"
    assert gate(2, better, later)["better"]["metric"] == "greedy_accuracy"
    assert gate(1, better, later)["better"]["metric"] == "sampled_accuracy"
    # a name inside it changes that alone
    assert gate(1, "iterations.1.promote.gate.not_worse.margin=0.3") == gate(1) | {
        "not_worse": gate(1)["not_worse"] | {"margin": 0.3}
    }
    retry = load_recipe(path, ["promote.retry.factor=0.1"]).for_iteration(2).promote.retry
    assert (retry.times, retry.factor) == (1, 0.1), "other sections are merged as ever"


def test_what_was_replaced_is_no_origin(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "promote: {gate: {better: {metric: a, by: 0.1}}}")
    recipe = load_recipe(path, ["promote.gate={better: {metric: b}}"])
    origins = {name: (value, origin) for name, value, origin in recipe.origins()}
    assert origins["promote.gate.better.metric"] == ("b", "override")
    assert origins["promote.gate.better.by"] == (0.0, "default")


def test_a_suite_of_another_kind_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    task = "suites: {q: {kind: task, reward: {name: gsm8k}, temperature: 0.5, every: 2}}"
    path = recipe_file(tmp_path, task)
    config = load_recipe(path, ["suites.q={kind: win_rate, reward: {name: gsm8k}}"]).for_iteration()
    assert (config.suites["q"].kind, config.suites["q"].every) == ("win_rate", 1)
    same = load_recipe(path, ["suites.q={kind: task, every: 3}"]).for_iteration().suites["q"]
    assert isinstance(same, TaskSuiteConfig)
    assert (same.temperature, same.every) == (0.5, 3)


def test_a_recipe_without_a_reduced_form_says_so(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"r\.yaml has no reduced form; add a `shrink` section"):
        load_recipe(tmp_path / "r.yaml", shrink=True)


QUIZ = (
    "suites: {{quiz: {{kind: task, data: {{source: 'recipe://{source}', format: {format}}}, "
    "every: {every}}}, duel: {{kind: win_rate, against: {against}}}}}"
)


def settings_of(folder: Path, **changed: str) -> dict[str, Any]:
    given = {"source": "a.jsonl", "format": "gsm8k", "every": "1", "against": "start"}
    folder.mkdir()
    return load_recipe(recipe_file(folder, QUIZ.format(**{**given, **changed}))).settings()


def test_where_a_suites_prompts_lie_is_no_setting_of_the_run(tmp_path: Path) -> None:
    """A project that was moved, suites and all, goes on where it stopped."""
    there = settings_of(tmp_path / "old")
    assert settings_of(tmp_path / "new", source="b.jsonl") == there
    assert "suites.quiz.data.source" not in there


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"format": "messages"}, "suites.quiz.data.format"),
        ({"every": "2"}, "suites.quiz.every"),
        ({"against": "champion"}, "suites.duel.against"),
    ],
)
def test_what_a_run_makes_of_a_suite_is_one(
    changed: dict[str, str], name: str, tmp_path: Path
) -> None:
    one, other = settings_of(tmp_path / "a"), settings_of(tmp_path / "b", **changed)
    assert {key for key in one if one[key] != other[key]} == {name}


def test_sections_in_mappings_and_lists_are_asked_for_what_decides() -> None:
    class Inner(Section):
        decides: int = 1
        path: str = place("a")

    class Outer(Section):
        by_name: dict[str, Inner]
        listed: tuple[Inner, ...]
        plain: dict[str, list[int]]

    outer = Outer(by_name={"x": Inner()}, listed=(Inner(), Inner()), plain={"y": [1, 2]})
    assert outer.identity() == {
        "by_name": {"x": {"decides": 1}}, "listed": [{"decides": 1}] * 2, "plain": {"y": [1, 2]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("promote.on_refusal=retyr", "retry"),
        ("pair.policy=human_vs_slef", "human_vs_self"),
        ("tracking.trackers=[tensorbord]", "tensorboard"),
        ("promote.gate={better: {metric: a, against: champoin}}", "champion"),
    ],
)
def test_a_choice_that_is_nearly_one_is_told(override: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"; did you mean {near}\?$"):
        load_recipe(None, [override])
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, ["promote.on_refusal=xyz"])
    assert "did you mean" not in str(caught.value)
