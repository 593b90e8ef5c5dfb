"""The pair stage on made-up artifacts: order and shards, pools, replay, the report."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import pair
from stages.artifacts import Manifest, read_manifest, read_rows
from stages.config import ChatConfig, RunConfig
from stages.data.chat import make_renderer
from stages.data.rows import DROPPED, PAIRS
from stages.errors import ConfigError, InputError
from stages.pair import PairInputs
from tests.artifact_tools import hashes
from tests.pair_artifacts import Group, Made

RANKED = {"policy": "best_vs_worst", "max_pairs": 2}
Make = Callable[..., Made]


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Any:
    return make_renderer(tiny_model_dir, ChatConfig())


@pytest.fixture
def make(tmp_path: Path, tiny_model_dir: Path, renderer: Any) -> Make:
    def made(prompts: dict[str, Group], folder: str = "", **more: Any) -> Made:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        return Made(place, tiny_model_dir, renderer).write(prompts).answer(prompts, **more)

    return made


def run(made: Made, out: str, **more: Any) -> Manifest:
    """Run pair; `more` has settings of the section, seed, chat, iteration and paths to replay."""
    known = {name: more.pop(name) for name in ("iteration",) if name in more}
    known["replay"] = more.pop("replay", ())
    if "replay_settings" in more:
        more["replay"] = more.pop("replay_settings")
    whole = {name: more.pop(name) for name in ("seed", "chat") if name in more}
    if more.get("policy", "human_vs_self") != "human_vs_self":
        whole |= {"reward": {"name": "gsm8k"}, "generate": {"num_samples": 2}}
    config = RunConfig.model_validate({"pair": more, **whole})
    inputs = PairInputs(made.data, made.generations, str(made.model), rewards=made.rewards, **known)
    return pair.run(config, inputs, made.folder / out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(read_rows([out / "part-00000.parquet"], PAIRS))


def many(number: int = 300) -> dict[str, Group]:
    """Prompts with none to four samples, some of them equal, empty, or without a reward."""
    return {
        f"{i * 7919 % 10007:05d}": (
            f"human {i % 11}",
            [
                (["", f"human {k}", f"sample {k * i % 7}", "long " * (i % 5)][(i + k) % 4],
                 None if (i + k) % 9 == 0 else (i * k % 5) / 4)
                for k in range(i % 5)
            ],
        )
        for i in range(number)
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{}, RANKED, {"policy": "random"}])
def test_shards_and_batches_of_the_inputs_change_no_byte(
    make: Make, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = make(many()), make(many(), folder="three", files=3)
    first = run(one, "pair", **settings)
    again = run(three, "pair", **settings)
    small = pair.read_batches

    def small_batches(*args: Any, **kwargs: Any) -> Any:
        return small(*args, **kwargs, batch_rows=17)

    monkeypatch.setattr(pair, "read_batches", small_batches)
    third = run(one, "small", **settings)
    assert hashes(one.folder / "pair") == hashes(three.folder / "pair")
    assert hashes(one.folder / "pair") == hashes(one.folder / "small")
    assert first.counts == again.counts == third.counts
    assert first.metrics == again.metrics == third.metrics


@pytest.mark.parametrize("settings", [{}, RANKED, {"policy": "best_vs_random"}])
def test_candidates_are_pairs_and_what_was_dropped(make: Make, settings: Any) -> None:
    made = make(many())
    manifest = run(made, "pair", **settings)
    counts = manifest.counts
    dropped = {n[8:]: count for n, count in counts.items() if n.startswith("dropped_")}
    assert counts["candidates"] == counts["pairs"] + sum(dropped.values())
    pairs, left_out = (
        rows_of(made.folder / "pair"),
        list(read_rows([made.folder / "pair/dropped.parquet"], DROPPED)),
    )
    assert len(pairs) == counts["pairs"]
    assert Counter(row["reason"] for row in left_out) == Counter(dropped)
    for rows in (pairs, left_out):
        assert [row["prompt_id"] for row in rows] == sorted(row["prompt_id"] for row in rows)
    prompts = many()
    for row in pairs:
        human, samples = prompts[row["prompt_id"]]
        texts = dict(samples)
        assert row["rejected"] in texts and row["chosen"] in {*texts, human}


def test_seed_and_iteration_change_what_is_drawn(make: Make) -> None:
    made = make(many())
    kinds = {"a": {}, "b": {"seed": 1}, "c": {"iteration": 1}}
    for name, more in kinds.items():
        run(made, name, policy="random", max_length_ratio=9.0, **more)
    drawn = [
        [(row["prompt_id"], row["chosen"], row["rejected"]) for row in rows_of(made.folder / name)]
        for name in kinds
    ]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert {row["iteration"] for row in rows_of(made.folder / "c")} == {1}


def test_pool_members_answer_their_share_and_are_named(make: Make) -> None:
    prompts = many()
    ids = sorted(prompts)
    whole = make(prompts)
    shared = make(prompts, folder="pool", parts=[ids[::2], ids[1::4], ids[3::4]])
    for settings in ({}, RANKED):
        name = f"pair{len(settings)}"
        run(whole, name, **settings)
        manifest = run(shared, name, **settings)
        assert {"generations", "generations_1", "generations_2"} < manifest.inputs.keys()
        ours, theirs = rows_of(shared.folder / name), rows_of(whole.folder / name)
        sources = {row["prompt_id"]: row["rejected_source"] for row in ours}
        assert all(sources[i].startswith("sample ") for i in ids[::2] if i in sources)
        assert all(sources[i].startswith("pool 1 sample ") for i in ids[1::4] if i in sources)
        for row in (*ours, *theirs):
            del row["rejected_source"], row["chosen_source"]
        assert ours == theirs


def test_a_prompt_that_two_answer_is_refused(make: Make) -> None:
    made = make(many(9), parts=[sorted(many(9)), sorted(many(9))[4:]])
    with pytest.raises(InputError, match="is answered by two of the generations"):
        run(made, "pair")


def test_rewards_of_other_generations_are_refused(make: Make) -> None:
    made, other = make(many(9)), make(many(12), folder="other")
    own, made.rewards = made.rewards, other.rewards
    with pytest.raises(InputError, match="reward was made from another data than the one given"):
        run(made, "pair", **RANKED)
    pooled = make(many(9), folder="pool", parts=[sorted(many(9))[:4], sorted(many(9))[4:]])
    pooled.rewards = own
    with pytest.raises(InputError, match="was made from another generations"):
        run(pooled, "pair", **RANKED)
    made.rewards = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="policy=best_vs_worst needs rewards; give --rewards"):
        run(made, "pair", **RANKED)


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (float("nan"), RANKED, "is nan and must be finite; mend"),
        (float("inf"), RANKED, "is inf and must be finite; mend"),
        (1.5, {**RANKED, "win_probability": "win_rate"}, "is 1.5 and must be in 0..1 for pair.win"),
    ],
)
def test_a_reward_that_is_no_number_is_refused(
    make: Make, reward: float, settings: Any, message: str
) -> None:
    made = make({"a": ("", [("one", 0.0), ("two", reward)])})
    with pytest.raises(InputError, match=f"the reward of sample 1 of prompt a {message}"):
        run(made, "pair", **settings)


REPLAY = {"iterations": 2, "weight": 0.5}
IDS = [f"{i:02d}" for i in range(40)]


def answers_of(day: int) -> dict[str, Group]:
    """Every second prompt, another half each day: an answer that stays, and one of that day."""
    return {i: ("yes", [("no", 0.0), (f"day {day}", 1.0)]) for i in IDS[day % 2 :: 2]}


def played(make: Make, replay: dict[str, Any], days: int = 3) -> Made:
    """A folder with the pairs of some iterations, pair0, pair1, …, each with those before."""
    made = make({i: ("yes", []) for i in IDS})
    for day in range(days):
        made.answer(answers_of(day), name=f"-{day}")
        back = range(day - 1, max(-1, day - 1 - replay["iterations"]), -1)
        paths = tuple(made.folder / f"pair{earlier}" for earlier in back)
        run(made, f"pair{day}", iteration=day, replay=paths, replay_settings=replay)
    return made


def test_replayed_pairs_are_own_ones_of_before_once_each_and_weighted(make: Make) -> None:
    made = played(make, days=4, replay=REPLAY)
    manifest = read_manifest(made.folder / "pair3")
    assert {"replay_1", "replay_2"} < manifest.inputs.keys()
    # Day 2 answered the other prompts; day 1 these ones, with one answer of the two the same.
    assert manifest.counts == {
        "candidates": 40 + 40 + 40, "pairs": 40 + 40 + 20,
        "pairs_own": 40, "pairs_replayed_1": 40, "pairs_replayed_2": 20,
        "dropped_replay_duplicate": 20,
    }  # fmt: skip
    rows = rows_of(made.folder / "pair3")
    weights = {3: 1.0, 2: 0.5, 1: 0.25}
    assert all(row["weight"] == weights[row["iteration"]] for row in rows)
    assert [(row["prompt_id"], row["pair_index"]) for row in rows] == sorted(
        (i, k) for n, i in enumerate(IDS) for k in range(3 if n % 2 else 2)
    )
    of_one = [(row["iteration"], row["rejected"]) for row in rows if row["prompt_id"] == "01"]
    assert of_one == [(3, "no"), (3, "day 3"), (1, "day 1")]
    out = list(read_rows([made.folder / "pair3/dropped.parquet"], DROPPED))
    assert {(row["reason"], row["detail"]) for row in out} == {
        ("replay_duplicate", "pair 0 of iteration 1")
    }
    report = json.loads((made.folder / "pair3/report.json").read_text())
    assert {n: f["pairs"] for n, f in report["pairs_by_iteration"].items()} == {
        "1": 20, "2": 40, "3": 40,
    }  # fmt: skip
    assert report["pairs"]["pairs"] == 100
    own = report["pairs_by_iteration"]["3"]
    assert manifest.metrics["rejected_tokens"] == own["rejected_tokens"]["mean"]


def test_the_share_is_drawn_by_seed_and_counted(make: Make) -> None:
    made = played(make, replay={"iterations": 1, "share": 0.5})
    counts = read_manifest(made.folder / "pair2").counts
    assert counts["candidates"] == counts["pairs"] + counts["dropped_replay_share"] == 80
    assert 10 < counts["pairs_replayed_1"] < 30
    kept = [row for row in rows_of(made.folder / "pair2") if row["iteration"] == 1]
    assert len(kept) == counts["pairs_replayed_1"]
    back = (made.folder / "pair1",)
    replay = {"iterations": 1, "share": 0.5}
    run(made, "again", iteration=2, replay=back, replay_settings=replay, seed=1)
    other = [row for row in rows_of(made.folder / "again") if row["iteration"] == 1]
    assert other != kept
    run(made, "more", iteration=2, replay=back, replay_settings={"iterations": 1, "share": 0.8})
    more = [row for row in rows_of(made.folder / "more") if row["iteration"] == 1]
    assert {(r["prompt_id"], r["rejected"]) for r in kept} < {
        (r["prompt_id"], r["rejected"]) for r in more
    }


def test_replayed_pairs_must_be_short_enough_too(make: Make) -> None:
    made = played(make, days=2, replay={"iterations": 1})
    long = next(r for r in rows_of(made.folder / "pair1") if r["rejected"] == "day 1")
    sizes = {side: len(long[f"{side}_token_ids"]) for side in ("prompt", "chosen", "rejected")}
    assert sizes["rejected"] > sizes["chosen"]
    made.answer({i: ("yes", [("n", None)]) for i in IDS[::2]}, name="-short")
    settings = {"max_length": sizes["prompt"] + sizes["rejected"] - 1}
    again = run(
        made, "short", iteration=2, replay=(made.folder / "pair1",),
        replay_settings={"iterations": 1}, **settings,
    )  # fmt: skip
    assert again.counts["dropped_replay_too_long"] == 20
    longest = settings["max_length"]
    for pair_row in rows_of(made.folder / "short"):
        sides = (len(pair_row[f"{side}_token_ids"]) for side in ("chosen", "rejected"))
        assert len(pair_row["prompt_token_ids"]) + max(sides) <= longest


def test_replay_that_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    made = played(make, days=2, replay={"iterations": 1})
    one, zero = made.folder / "pair1", made.folder / "pair0"
    for replay, settings, message in (
        ((one, zero), {"iterations": 1}, "takes the pairs of 1 to iteration 2, given are those of"),
        ((zero,), {"iterations": 1}, r"given are those of \[0\]; give --replay once for each"),
        ((zero, one), {"iterations": 2}, "the newest first"),
        ((), {"iterations": 1}, "given are those of none"),
        ((one,), {"iterations": 0}, "takes the pairs of no iteration to iteration 2"),
    ):
        with pytest.raises(InputError, match=message):
            run(made, "new", iteration=2, replay=replay, replay_settings=settings)
    chat = {"system": "Be brief."}
    with pytest.raises(InputError, match="made with another chat template or settings"):
        run(made, "new", iteration=2, replay=(one,), replay_settings={"iterations": 1}, chat=chat)
    other = make({"zz": ("yes", [("no", None)])}, folder="other")
    with pytest.raises(InputError, match="pair1 was made from another data than the one given"):
        run(other, "new", iteration=2, replay=(one,), replay_settings={"iterations": 1})


def test_the_report_and_the_metrics_by_hand(make: Make, renderer: Any) -> None:
    prompts: dict[str, Group] = {
        "a": ("", [("long answer", 1.0), ("short", 0.0)]),
        "b": ("", [("longer answer", 0.75), ("short", 0.5)]),
        "c": ("", [("x", 1.0), ("longest answer", 0.0)]),
        "d": ("", [("same", 0.0), ("same", 0.0)]),
    }
    made = make(prompts)
    manifest = run(made, "pair", policy="best_vs_worst")
    report = json.loads((made.folder / "pair/report.json").read_text())
    tokens = {
        text: len(renderer.response_tokens(text)) for _, g in prompts.values() for text, _ in g
    }
    chosen = [tokens[text] for text in ("long answer", "longer answer", "x")]
    rejected = [tokens[text] for text in ("short", "short", "longest answer")]
    assert report["pairs"]["chosen_tokens"]["mean"] == pytest.approx(sum(chosen) / 3)
    assert report["pairs"]["rejected_tokens"]["quantiles"]["0.5"] == sorted(rejected)[1]
    assert report["pairs"]["margin"]["quantiles"] == {
        "0": 0.25, "0.05": 0.25, "0.25": 0.25, "0.5": 1.0, "0.75": 1.0, "0.95": 1.0, "1": 1.0,
    }  # fmt: skip
    assert report["own_candidates"]["candidates"] == 4
    assert report["dropped"] == {"identical": 1}
    length = report["pairs"]["length"]
    assert (length["rule"], length["rule_accuracy"]) == ("longer", pytest.approx(2 / 3))
    metrics = manifest.metrics
    assert metrics["identical_share"] == metrics["dropped_share"] == 0.25
    assert metrics["empty_share"] == metrics["cut_off_share"] == 0
    assert metrics["chosen_longer_share"] == metrics["length_accuracy"] == pytest.approx(2 / 3)
    assert metrics["margin"] == pytest.approx(2.25 / 3)
    deviations = [
        (value - (a + b) / 2, size - (tokens[s] + tokens[t]) / 2)
        for _, ((s, a), (t, b)) in prompts.values()
        for value, size in ((a, tokens[s]), (b, tokens[t]))
    ]
    xy = sum(x * y for x, y in deviations)
    norm = (sum(x * x for x, _ in deviations) * sum(y * y for _, y in deviations)) ** 0.5
    assert metrics["reward_length_correlation"] == pytest.approx(xy / norm)


def test_what_data_says_of_contamination_is_in_the_report(
    make: Make, tmp_path: Path, tiny_model_dir: Path, renderer: Any
) -> None:
    found = {"contaminated_prompt_share": 0.125, "other": 3.0}
    prompts: dict[str, Group] = {"a": ("yes", [("no", None)])}
    made = Made(tmp_path, tiny_model_dir, renderer).write(prompts, metrics=found).answer(prompts)
    run(made, "pair")
    report = json.loads((made.folder / "pair/report.json").read_text())
    assert report["data"] == {"contaminated_prompt_share": 0.125}


def test_cut_off_samples_are_counted_where_they_are_not_dropped(make: Make) -> None:
    made = make({"a": ("yes", [("no", None), ("perhaps", None)])})
    kept = run(made, "pair", drop_cut_off=False)
    assert kept.metrics["cut_off_share"] == 0.5
    assert run(made, "other").counts["dropped_cut_off"] == 1


def test_no_sample_at_all_is_refused(make: Make) -> None:
    made = make({"a": ("yes", [])})
    with pytest.raises(InputError, match="holds no sample for a prompt of .*; run generate again"):
        run(made, "pair")
