"""generate: rows, quarantine, shards, resume; the fake engine where the subject is the stage."""

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stages import generate
from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, produce, read_rows
from stages.artifacts.keys import row_seed, sha256_text
from stages.artifacts.tables import Row
from stages.config import RunConfig
from stages.data.chat import TextCoder, make_renderer
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS
from stages.errors import ConfigError, CorruptError, DivergedError, InputError
from stages.generate import GenerateInputs
from tests.artifact_tools import hashes
from tests.fakes import WINDOW, FakeEngine

ROOT = Path(__file__).parents[2]


def make_data(place: Path, prompts: Sequence[str], ids: Sequence[str] | None = None) -> Path:
    """A data artifact with these training prompts."""

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("train-00000.parquet"), PROMPTS) as table:
            for number, text in enumerate(prompts):
                table.append(
                    {
                        "prompt_id": ids[number] if ids else f"{number:032x}",
                        "messages": [{"role": "user", "content": text}],
                        "response": "human",
                        "source": "test",
                        "source_row": number,
                    }
                )
        return Outcome(counts={"train": len(prompts)})

    plan = Plan("prepare", 1, {"prompts": sha256_text("\n".join(prompts))}, {})
    produce(place, plan, fill)
    return place


def questions(count: int) -> list[str]:
    return [f"Ann has {number} cups, buys 7. How many?" for number in range(count)]


def config(seed: int = 3, **settings: Any) -> RunConfig:
    # The fake engine's log-probabilities are no model's.
    settings = {"max_new_tokens": 12, "shard_rows": 16, "parity": {"rows": 0}} | settings
    return RunConfig.model_validate({"seed": seed, "generate": settings})


def run(
    model: Path,
    data: Path,
    out: Path,
    settings: RunConfig | None = None,
    engine: FakeEngine | None = None,
    iteration: int = 0,
    part: tuple[int, int] | None = None,
) -> Manifest:
    inputs = GenerateInputs(model=str(model), data=data, iteration=iteration, part=part)
    engine = engine or FakeEngine()
    return generate.run(settings or config(), inputs, out, open_engine=engine.open)


def rows_of(out: Path) -> list[Row]:
    return list(read_rows(sorted(out.glob("part-*.parquet")), GENERATIONS))


def dropped_of(out: Path) -> list[Row]:
    return list(read_rows([out / "dropped.parquet"], DROPPED))


def test_real_answers_of_a_real_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(20))
    settings = config(engine={"batch_size": 8}, num_samples=2, parity={"rows": 9})
    inputs = GenerateInputs(model=str(tiny_model_dir), data=data, iteration=4)
    manifest = generate.run(settings, inputs, tmp_path / "out")
    renderer = make_renderer(tiny_model_dir, settings.chat)
    rows = rows_of(tmp_path / "out")
    assert [(r["prompt_id"], r["sample_index"]) for r in rows] == [
        (f"{number:032x}", index) for number in range(20) for index in range(2)
    ]
    for number, row in enumerate(rows):
        prompt = [{"role": "user", "content": questions(20)[number // 2]}]
        assert row["prompt_token_ids"] == renderer.prompt_tokens(prompt)
        assert row["response"] == renderer.text(row["response_token_ids"])
        assert row["seed"] == row_seed(3, 4, row["prompt_id"], row["sample_index"])
        assert len(row["token_logprobs"]) == len(row["response_token_ids"])
        by_stop = row["response_token_ids"][-1] in renderer.stop_token_ids
        assert row["finish_reason"] == ("stop" if by_stop else "length")
    tokens = [len(r["prompt_token_ids"]) + len(r["response_token_ids"]) for r in rows]
    longest = max(len(r["prompt_token_ids"]) for r in rows)
    assert manifest.cost.tokens == sum(tokens)
    assert manifest.counts["rows"] == 40
    assert manifest.info["max_model_len"] == longest + 12
    assert manifest.info["longest_prompt"] == longest
    assert manifest.info["parity"]["rows"] == 9
    assert 0 < manifest.metrics["parity_mean"] <= manifest.metrics["parity_worst"] < 1e-4


def test_a_greedy_batch_changes_no_answer(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(30))
    answers = []
    for size in (3, 32):
        settings = config(temperature=0, engine={"batch_size": size})
        inputs = GenerateInputs(model=str(tiny_model_dir), data=data)
        generate.run(settings, inputs, tmp_path / f"out{size}")
        answers.append([r["response_token_ids"] for r in rows_of(tmp_path / f"out{size}")])
    assert answers[0] == answers[1]


def test_counts_and_metrics_are_those_of_the_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(50))
    manifest = run(tiny_model_dir, data, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    lengths = [len(r["response_token_ids"]) for r in rows]
    cut_off = sum(r["finish_reason"] == "length" for r in rows)
    empty = sum(not r["response"].strip() for r in rows)
    logprobs = [x for r in rows for x in r["token_logprobs"]]
    assert 0 < cut_off < 50
    assert 0 < empty < 50
    assert manifest.counts == {
        "prompts": 50, "rows": 50, "empty": empty, "finish_stop": 50 - cut_off,
        "finish_length": cut_off, "train_prompts": 50, "drawn": 50,
    }  # fmt: skip
    assert manifest.metrics["mean_response_tokens"] == sum(lengths) / 50
    assert manifest.metrics["cut_off_share"] == cut_off / 50
    assert manifest.metrics["mean_token_logprob"] == pytest.approx(sum(logprobs) / len(logprobs))


def test_engines_side_by_side_make_the_same_artifact(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(60))
    inputs = GenerateInputs(model=str(tiny_model_dir), data=data)
    made = {
        count: generate.run(
            config(engine={"batch_size": 8, "processes": count}), inputs, tmp_path / str(count)
        )
        for count in (1, 2)
    }
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert made[1].key == made[2].key


def test_an_engine_that_ran_another_model_fails_the_stage(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data", questions(20))
    with pytest.raises(DivergedError, match="likely cause: wrong weights"):
        run(tiny_model_dir, data, tmp_path / "out", config(parity={"rows": 8}))
    assert not (tmp_path / "out").exists()
    made = run(tiny_model_dir, data, tmp_path / "out", config())
    assert (made.info["parity"], made.counts["rows"]) == (None, 20)


def test_bad_prompts_are_quarantined_and_the_rest_completes(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    prompts = questions(40)
    bad = {
        3: ("x" * 5000, "prompt_too_long"),
        11: ("", "empty_prompt"),
        17: (" \n\t", "empty_prompt"),
        23: ("what is </s> for?", "special_token"),
    }
    prompts = [bad[i][0] if i in bad else text for i, text in enumerate(prompts)]
    prompts[30] = "control \x00\x1b[2J characters and {{ braces }} are text"
    data = make_data(tmp_path / "data", prompts)
    manifest = run(tiny_model_dir, data, tmp_path / "out")
    assert {(r["prompt_id"], r["reason"]) for r in dropped_of(tmp_path / "out")} == {
        (f"{number:032x}", reason) for number, (_, reason) in bad.items()
    }
    assert all(r["detail"] for r in dropped_of(tmp_path / "out"))
    asked = [int(r["prompt_id"], 16) for r in rows_of(tmp_path / "out")]
    assert asked == [number for number in range(40) if number not in bad]
    assert manifest.counts["prompts"] == manifest.counts["rows"] == 36
    assert manifest.counts["dropped_empty_prompt"] == 2
    assert manifest.counts["dropped_prompt_too_long"] == 1


def test_a_tokenizer_that_fails_costs_its_row_alone(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextCoder.encode

    def fail_on_seven(coder: TextCoder, texts: Sequence[str]) -> list[list[int]]:
        if any(" 7 cups" in text for text in texts):
            raise TypeError("TextEncodeInput must be …")
        return encode(coder, texts)

    monkeypatch.setattr(TextCoder, "encode", fail_on_seven)
    data = make_data(tmp_path / "data", questions(10))
    run(tiny_model_dir, data, tmp_path / "out")
    [row] = dropped_of(tmp_path / "out")
    assert (row["prompt_id"], row["reason"]) == (f"{7:032x}", "tokenizer_error")
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_length_limit_of_the_recipe_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", [*questions(5), "word " * 60])
    engine = FakeEngine()
    settings = config(engine={"max_model_len": 80})
    manifest = run(tiny_model_dir, data, tmp_path / "out", settings, engine)
    assert engine.limits["max_model_len"] == 80
    assert manifest.counts["dropped_prompt_too_long"] == 1
    assert "at most 68 fit" in dropped_of(tmp_path / "out")[0]["detail"]


def test_answers_longer_than_the_model_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(5))
    with pytest.raises(ConfigError, match=r"generate.max_new_tokens=512 leaves no .* 512 pos"):
        run(tiny_model_dir, data, tmp_path / "out", config(max_new_tokens=512))


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "it has none"), (["", " "], "empty_prompt: 2")]
)
def test_nothing_to_ask_is_an_input_error(
    tiny_model_dir: Path, tmp_path: Path, prompts: list[str], message: str
) -> None:
    data = make_data(tmp_path / "data", prompts)
    with pytest.raises(InputError, match=message):
        run(tiny_model_dir, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsorted_data_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(2), ids=["b" * 32, "a" * 32])
    with pytest.raises(CorruptError, match="not sorted by prompt_id"):
        run(tiny_model_dir, data, tmp_path / "out")


def test_a_draw_depends_on_seed_and_iteration_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(60))

    def drawn(name: str, count: int = 20, iteration: int = 0, seed: int = 3) -> set[str]:
        settings = config(seed, max_prompts=count)
        run(tiny_model_dir, data, tmp_path / name, settings, iteration=iteration)
        rows = rows_of(tmp_path / name)
        assert len(rows) == min(count, 60)
        return {r["prompt_id"] for r in rows}

    first = drawn("a")
    assert first < drawn("more", count=30)
    assert first != drawn("b", iteration=1)
    assert first != drawn("c", seed=4)
    assert len(drawn("all", count=100)) == 60


def ids_of(out: Path) -> list[str]:
    return [r["prompt_id"] for r in rows_of(out)]


def test_slices_take_every_prompt_once_an_epoch(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(30))

    def slices(name: str, iterations: int, seed: int = 3, **share: Any) -> list[list[str]]:
        settings = config(seed, draw="slices", **share)
        outs = [tmp_path / f"{name}{t}" for t in range(iterations)]
        for t, out in enumerate(outs):
            made = run(tiny_model_dir, data, out, settings, iteration=t)
            assert (made.counts["drawn"], made.counts["train_prompts"]) == (12, 30)
        return [ids_of(out) for out in outs]

    by_number = slices("n", 3, max_prompts=12)
    assert [len(taken) for taken in by_number] == [12, 12, 12]
    assert len({*by_number[0], *by_number[1]}) == 24
    assert len({*by_number[0], *by_number[1], *by_number[2]}) == 30
    assert slices("share", 3, prompt_share=0.4) == by_number
    assert slices("seed", 1, seed=4, max_prompts=12) != by_number[:1]


def test_a_share_draws_what_its_number_draws(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(30))
    run(tiny_model_dir, data, tmp_path / "share", config(prompt_share=0.25), iteration=2)
    run(tiny_model_dir, data, tmp_path / "number", config(max_prompts=8), iteration=2)
    assert ids_of(tmp_path / "share") == ids_of(tmp_path / "number")
    assert (
        run(tiny_model_dir, data, tmp_path / "one", config(prompt_share=1e-4)).counts["rows"] == 1
    )


def test_parts_of_a_pool_cover_the_drawn_prompts_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", [*questions(60), ""])
    settings = config(max_prompts=50, pool={"size": 2, "share": 0.5})
    whole = run(tiny_model_dir, data, tmp_path / "whole", settings, iteration=4)
    parts = {
        k: run(tiny_model_dir, data, tmp_path / f"{k}", settings, iteration=4, part=(k, 2))
        for k in range(3)
    }
    rows = [row for k in parts for row in rows_of(tmp_path / f"{k}")]
    assert sorted(rows, key=lambda row: str(row["prompt_id"])) == rows_of(tmp_path / "whole")
    assert all(made.counts["rows"] > 3 for made in parts.values())
    assert {made.counts["drawn"] for made in parts.values()} == {50}
    assert sum(made.counts["in_part"] for made in parts.values()) == 50
    assert "in_part" not in whole.counts
    assert len({made.key for made in [whole, *parts.values()]}) == 4


def test_a_part_without_prompts_is_an_artifact_without_rows(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(tmp_path / "data", questions(1))
    settings = config(pool={"size": 1, "share": 0.5}, parity={"rows": 4})
    engine = FakeEngine()
    iteration = next(
        t for t in range(9) if _part_of_only_prompt(tiny_model_dir, data, tmp_path, t) == 0
    )
    made = run(tiny_model_dir, data, tmp_path / "out", settings, engine, iteration, part=(1, 1))
    assert (made.counts["prompts"], made.counts["rows"], made.counts["in_part"]) == (0, 0, 0)
    assert made.metrics["mean_response_tokens"] is None
    assert rows_of(tmp_path / "out") == []
    assert not engine.answered
    assert not engine.closed, "no engine was started"
    assert "part 1/1 of the 1 prompts drawn has none that can be asked (none fell" in caplog.text
    assert run(tiny_model_dir, data, tmp_path / "out", settings, engine, iteration, (1, 1)) == made


def _part_of_only_prompt(model: Path, data: Path, place: Path, iteration: int) -> int:
    """Which part of two the one prompt of the data is of."""
    settings = config(pool={"size": 1, "share": 0.5})
    out = place / f"newest{iteration}"
    made = run(model, data, out, settings, iteration=iteration, part=(0, 1))
    return 1 - made.counts["rows"]


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        ((1, 1), 0, r"part 1/1 is of a pool of 1, and generate.pool.size=0; set it to 1 at least"),
        ((0, 3), 2, "part 0/3 is of a pool of 3, and generate.pool.size=2"),
        ((3, 2), 2, "there is no part 3/2; K/M is 0/M for the newest opponent"),
        ((-1, 2), 2, "there is no part -1/2"),
        ((0, 0), 2, "there is no part 0/0"),
    ],
)
def test_a_part_that_is_none_of_the_pool_is_refused(
    tiny_model_dir: Path, tmp_path: Path, part: tuple[int, int], size: int, message: str
) -> None:
    data = make_data(tmp_path / "data", questions(2))
    with pytest.raises(ConfigError, match=message):
        run(tiny_model_dir, data, tmp_path / "out", config(pool={"size": size}), part=part)


def test_settings_that_decide_nothing_leave_the_key(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(8))
    keys = [
        run(tiny_model_dir, data, tmp_path / name, config(**settings), part=part).key
        for name, settings, part in [
            ("plain", {}, None),
            ("pool", {"pool": {"size": 2, "share": 0.5}}, None),
            ("part", {"pool": {"size": 2, "share": 0.5}}, (0, 2)),
            ("larger", {"pool": {"size": 3, "share": 0.5}}, (0, 2)),
            ("share", {"pool": {"size": 2, "share": 0.4}}, (0, 2)),
        ]
    ]
    assert keys[0] == keys[1], "before there are older opponents a pool changes nothing"
    assert keys[2] == keys[3], "nor does one that is larger than the opponents there are"
    assert len(set(keys)) == 3
    with pytest.raises(ConfigError, match=r"part: absent there, \{.* now"):
        run(tiny_model_dir, data, tmp_path / "plain", config(pool={"size": 1}), part=(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draw": "slices"}, "generate.draw=slices takes a part of the prompts each iteration"),
        ({"max_prompts": 3, "prompt_share": 0.5}, "exclude each other; set one"),
        ({"prompt_share": 0}, "greater than 0"),
        ({"prompt_share": 1.5}, "less than or equal to 1"),
        ({"pool": {"size": 1, "share": 1}}, "less than 1"),
    ],
)
def test_draws_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_sharding_changes_no_row_and_no_key(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(30))
    made = {
        size: run(tiny_model_dir, data, tmp_path / str(size), config(shard_rows=size))
        for size in (7, 100)
    }
    assert rows_of(tmp_path / "7") == rows_of(tmp_path / "100")
    assert made[7].key == made[100].key
    assert made[7].counts == made[100].counts
    parts = [f.path for f in made[7].files if f.path.startswith("part-")]
    assert parts == [f"part-{k:05d}.parquet" for k in range(5)]
    assert [f.rows for f in made[7].files if f.path.startswith("part-")] == [7, 7, 7, 7, 2]


def test_another_iteration_has_other_seeds_and_another_key(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data", questions(5))
    first = run(tiny_model_dir, data, tmp_path / "0")
    second = run(tiny_model_dir, data, tmp_path / "1", iteration=1)
    assert first.key != second.key
    seeds = [{r["seed"] for r in rows_of(tmp_path / name)} for name in "01"]
    assert not seeds[0] & seeds[1]
    with pytest.raises(ConfigError, match="iteration: 0 there, 1 now"):
        run(tiny_model_dir, data, tmp_path / "0", iteration=1)


def test_a_finished_stage_opens_no_engine(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", questions(5))
    engine = FakeEngine()
    made = run(tiny_model_dir, data, tmp_path / "out", engine=engine)
    assert engine.closed
    untouched = FakeEngine()
    assert run(tiny_model_dir, data, tmp_path / "out", engine=untouched) == made
    assert not untouched.answered
    assert not untouched.closed


def test_the_engine_is_closed_when_it_fails(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Broken(FakeEngine):
        def generate(self, requests: Any, sampling: Any) -> Any:
            yield from list(super().generate(requests, sampling))[:20]
            raise RuntimeError("the engine broke")

    data = make_data(tmp_path / "data", questions(64))
    engine = Broken()
    with pytest.raises(RuntimeError, match="the engine broke"):
        run(tiny_model_dir, data, tmp_path / "out", engine=engine)
    assert engine.closed
    assert not (tmp_path / "out").exists()


def test_resume_after_kill_equals_uninterrupted(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL twice; finished shards are kept, and no row is asked again in them."""
    count, shard_rows, samples = 1500, 64, 2
    total = count * samples
    data = make_data(tmp_path / "data", questions(count))
    job = {
        "generate": {
            "max_new_tokens": 12, "shard_rows": shard_rows, "num_samples": samples,
            "parity": {"rows": 0},
        }
    }  # fmt: skip
    script = textwrap.dedent(
        """
        import json, sys
        from pathlib import Path
        from stages import generate
        from stages.config import RunConfig
        from tests.fakes import FakeEngine
        job, model, data, out, kill_after = sys.argv[1:]
        generate.run(
            RunConfig.model_validate(json.loads(job)),
            generate.GenerateInputs(model=model, data=Path(data)),
            Path(out),
            open_engine=FakeEngine(kill_after=int(kill_after)).open,
        )
        """
    )
    out = tmp_path / "out"
    for kill_after in (WINDOW + 100, 3):
        command = [sys.executable, "-c", script, json.dumps(job), str(tiny_model_dir), str(data)]
        done = subprocess.run(
            [*command, str(out), str(kill_after)], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not out.exists()
    [partial] = tmp_path.glob(".out.*.partial")
    kept = len(list(partial.glob("part-*.parquet")))
    assert kept == WINDOW // shard_rows, "all shards whose rows were answered"

    settings = RunConfig.model_validate(job)
    resumed, whole = FakeEngine(), FakeEngine()
    manifest = run(tiny_model_dir, data, out, settings, resumed)
    unbroken = run(tiny_model_dir, data, tmp_path / "whole", settings, whole)
    assert resumed.answered == total - kept * shard_rows
    assert whole.answered == total
    assert hashes(out) == hashes(tmp_path / "whole")
    assert manifest.counts == unbroken.counts
    assert manifest.metrics == unbroken.metrics
    assert manifest.cost.tokens == unbroken.cost.tokens
    assert manifest.content() == unbroken.content()


def test_all_shards_done_need_no_engine(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "data", questions(40))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "_summary", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tiny_model_dir, data, tmp_path / "out")
    engine = FakeEngine()
    manifest = run(tiny_model_dir, data, tmp_path / "out", engine=engine)
    assert (engine.answered, manifest.counts["rows"]) == (0, 40)


def test_memory_is_flat_in_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        data = make_data(tmp_path / f"data{count}", questions(count))
        settings = config(shard_rows=512)
        manifest = run(tiny_model_dir, data, tmp_path / f"out{count}", settings)
        assert manifest.counts["rows"] == count
        peaks.append(manifest.cost.peak_memory_bytes)
    # 18,000 rows held as Python objects would take 60 MB and more.
    assert peaks[1] - peaks[0] < 30e6
