"""The prepare stage: what goes in, what comes out, and what is refused."""

import csv
import gzip
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import prepare
from stages.artifacts import Manifest, open_artifact, read_manifest, read_rows
from stages.config import RunConfig
from stages.data import sorting
from stages.data.draw import smallest_by_hash
from stages.data.formats import prompt_id
from stages.data.rows import CONTAMINATION, DROPPED, PROMPTS
from stages.errors import ConfigError, InputError

Row = dict[str, Any]
GSM8K = Path(__file__).parent.parent / "data" / "gsm8k"
# Without the time of day, which would give a test another name in each process.
CUT_GZIP = gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9]


def run(out: Path, **section: Any) -> Manifest:
    section = {"format": "prompt_response", "heldout_size": 2, **section}
    section = {k: str(v) if isinstance(v, Path) else v for k, v in section.items()}
    return prepare.run(RunConfig.model_validate({"prepare": section}), out)


def rows_of(out: Path, part: str) -> list[Row]:
    schema = DROPPED if part == "dropped" else PROMPTS
    return list(read_rows(open_artifact(out).files(part), schema))


def bytes_of(out: Path) -> dict[str, bytes]:
    return {f.path: (out / f.path).read_bytes() for f in read_manifest(out).files}


def example(index: int) -> Row:
    return {"prompt": f"{index}+{index}?", "response": f"{2 * index}"}


def examples(count: int) -> list[Row]:
    return [example(index) for index in range(count)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_gz(path: Path, rows: Sequence[Row]) -> Path:
    plain = {".csv": write_csv, ".jsonl": write_jsonl, ".json": write_json}
    inner = path.with_suffix("")
    written = plain[inner.suffix](inner, rows)
    path.write_bytes(gzip.compress(written.read_bytes()))
    written.unlink()
    return path


def write_saved(path: Path, rows: Sequence[Row]) -> Path:
    datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path


# What comes out


def test_gsm8k_becomes_prompts_and_responses(tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = run(out, format="gsm8k", source=GSM8K / "train.jsonl", heldout_size=10)
    assert manifest.counts["rows_in"] == 40
    assert (manifest.counts["train"], manifest.counts["heldout"]) == (30, 10)
    raw = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()]
    for row in rows_of(out, "train") + rows_of(out, "heldout"):
        question = raw[row["source_row"]]["question"]
        assert row["messages"] == [{"role": "user", "content": question}]
        assert row["prompt_id"] == prompt_id(row["messages"])
        assert row["source"] == "train.jsonl"
        assert "<<" not in row["response"]
        assert row["response"].splitlines()[-1].startswith("#### ")


def test_strip_calculator_changes_the_responses_and_the_key(tmp_path: Path) -> None:
    source = {"format": "gsm8k", "source": GSM8K / "train.jsonl"}
    stripped = run(tmp_path / "a", **source)
    kept = run(tmp_path / "b", **source, strip_calculator=False)
    assert stripped.key != kept.key
    assert any("<<" in row["response"] for row in rows_of(tmp_path / "b", "train"))


def test_parts_share_no_prompt_and_every_table_is_sorted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(50) + examples(20) + [{"prompt": 1}])
    run(tmp_path / "data", source=source, heldout_size=10, max_prompts=30)
    ids = {p: [row["prompt_id"] for row in rows_of(tmp_path / "data", p)]
           for p in ("train", "heldout", "dropped")}  # fmt: skip
    assert all(found == sorted(found) for found in ids.values())
    assert not set(ids["train"]) & set(ids["heldout"])
    assert len(set(ids["train"])) == 30
    assert len(set(ids["heldout"])) == 10


def test_every_row_is_in_a_part_or_dropped_with_its_reason(tmp_path: Path) -> None:
    heldout = [
        example(900),
        example(901),
        example(901),  # duplicate
        {"prompt": "  ", "response": "x"},  # empty_prompt
    ]
    train = [
        example(1),
        example(2),
        example(1),  # 2: duplicate
        {"prompt": "1+1?", "response": "three"},  # 3: same_prompt
        {"prompt": "900+900?", "response": "no idea"},  # 4: in_heldout
        {"prompt": "5+5?", "response": "\n"},  # 5: empty_response
        {"prompt": None, "response": "x"},  # 6: malformed
        {"prompt": "\ud83d", "response": "x"},  # 7: malformed
        {"prompt": "8+8?"},  # 8: malformed
        {"prompt": "8+8?", "response": float("inf")},  # 9: malformed
        example(10),
    ]
    manifest = run(
        tmp_path / "data",
        source=write_jsonl(tmp_path / "train.jsonl", train),
        heldout_source=write_jsonl(tmp_path / "test.jsonl", heldout),
        max_prompts=2,
    )
    assert dict(manifest.counts) == {
        "rows_in": 15,
        "train": 2,
        "heldout": 2,
        "dropped_duplicate": 2,
        "dropped_same_prompt": 1,
        "dropped_in_heldout": 1,
        "dropped_not_drawn": 1,
        "dropped_empty_prompt": 1,
        "dropped_empty_response": 1,
        "dropped_malformed": 4,
    }
    dropped = rows_of(tmp_path / "data", "dropped")
    details = {row["detail"].partition(": ")[0]: row for row in dropped}
    assert details["train.jsonl row 2"]["reason"] == "duplicate"
    assert details["train.jsonl row 2"]["detail"].endswith(
        "same prompt and response as train.jsonl row 0"
    )
    assert details["train.jsonl row 4"]["reason"] == "in_heldout"
    assert details["train.jsonl row 5"]["prompt_id"] == prompt_id(
        [{"role": "user", "content": "5+5?"}]
    )
    assert details["train.jsonl row 6"]["detail"].endswith("prompt is null, not text")
    assert details["train.jsonl row 7"]["prompt_id"] == ""
    assert "lone surrogate U+D83D" in details["train.jsonl row 7"]["detail"]
    assert "no column response; columns there: prompt" in details["train.jsonl row 8"]["detail"]
    assert details["test.jsonl row 3"]["reason"] == "empty_prompt"


def test_counts_add_up_whatever_the_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    for attempt in range(20):
        rows = [
            {"prompt": rng.choice(["", "a", "b", "c", "d", None]), "response": rng.choice("xy ")}
            for _ in range(rng.randint(30, 60))
        ]
        source = write_jsonl(tmp_path / f"{attempt}.jsonl", rows)
        heldout = write_jsonl(tmp_path / f"{attempt}-h.jsonl", [*rows[:3], example(1)])
        other = {"heldout_source": heldout} if attempt % 2 else {}
        try:
            manifest = run(tmp_path / f"{attempt}", source=source, heldout_size=1, **other)
        except InputError:
            continue
        counts = dict(manifest.counts)
        assert counts.pop("rows_in") == sum(counts.values()) == len(rows) + 4 * (attempt % 2)
        dropped = sum(n for name, n in counts.items() if name.startswith("dropped_"))
        assert len(rows_of(tmp_path / f"{attempt}", "dropped")) == dropped


def test_first_row_of_a_prompt_in_source_order_wins(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows" / "a.jsonl", [example(1), {"prompt": "p", "response": "first"}])
    write_jsonl(tmp_path / "rows" / "b.jsonl", [{"prompt": "p", "response": "second"}])
    run(tmp_path / "data", source=tmp_path / "rows", heldout_size=0)
    kept = [row for row in rows_of(tmp_path / "data", "train") if row["response"] != "2"]
    assert [(row["source"], row["source_row"], row["response"]) for row in kept] == [
        ("a.jsonl", 1, "first")
    ]


def test_messages_keep_their_turns(tmp_path: Path) -> None:
    turns = [("system", "Short."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": [*conversation, {"role": "assistant", "content": "4"}], "id": 7}]
    for name, write in {"a.jsonl": write_jsonl, "a.parquet": write_parquet}.items():
        out = tmp_path / f"out-{name}"
        run(out, format="messages", source=write(tmp_path / name, rows), heldout_size=0)
        (row,) = rows_of(out, "train")
        assert (row["messages"], row["response"]) == (conversation, "4")


def test_word_sums_needs_no_file(tmp_path: Path) -> None:
    section = {"format": "word_sums", "word_sums": {"num_examples": 60, "seed": 3}}
    manifest = run(tmp_path / "data", **section)
    assert (manifest.counts["train"], manifest.counts["heldout"]) == (58, 2)
    (row, *_) = rows_of(tmp_path / "data", "train")
    assert row["messages"][0]["content"].endswith("How many?")
    assert row["source"] == "word_sums"


# Equal bytes, equal draws


def test_twice_gives_equal_bytes_and_a_third_time_does_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(300) + examples(40))
    first = run(tmp_path / "a", source=source, max_prompts=100)
    second = run(tmp_path / "b", source=source, max_prompts=100)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert first.key == second.key
    before = (tmp_path / "a" / "manifest.json").stat()
    assert run(tmp_path / "a", source=source, max_prompts=100) == first
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns


def test_the_run_seed_changes_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(30))
    section = {"source": str(source), "format": "prompt_response", "heldout_size": 5}
    keys = {
        prepare.run(
            RunConfig.model_validate({"seed": seed, "prepare": section}), tmp_path / "d"
        ).key
        for seed in (0, 1)
    }
    assert len(keys) == 1


def test_order_of_rows_changes_no_part(tmp_path: Path) -> None:
    rows = examples(200)
    run(tmp_path / "a", source=write_jsonl(tmp_path / "a.jsonl", rows), max_prompts=50)
    random.Random(1).shuffle(rows)
    run(tmp_path / "b", source=write_jsonl(tmp_path / "b.jsonl", rows), max_prompts=50)
    for part in ("train", "heldout"):
        found = [
            [(row["prompt_id"], row["response"]) for row in rows_of(tmp_path / name, part)]
            for name in ("a", "b")
        ]
        assert found[0] == found[1]


def test_a_larger_heldout_part_holds_the_smaller_one(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(100))
    found = []
    for size in (10, 20):
        run(tmp_path / f"{size}", source=source, heldout_size=size)
        found.append({row["prompt_id"] for row in rows_of(tmp_path / f"{size}", "heldout")})
    assert found[0] < found[1]


def test_draw_outside_memory_equals_the_one_in_memory(tmp_path: Path) -> None:
    rows = examples(300)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    run(tmp_path / "data", source=source, heldout_size=40, max_prompts=70)
    ids = [prompt_id([{"role": "user", "content": row["prompt"]}]) for row in rows]
    heldout = smallest_by_hash(ids, 40, prepare.DRAW_SALT)
    train = smallest_by_hash(ids, 110, prepare.DRAW_SALT) - heldout
    assert {row["prompt_id"] for row in rows_of(tmp_path / "data", "heldout")} == heldout
    assert {row["prompt_id"] for row in rows_of(tmp_path / "data", "train")} == train


def test_memory_bound_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(500) + examples(100))
    run(tmp_path / "a", source=source)
    monkeypatch.setattr(sorting.LineSorter.__init__, "__defaults__", (2000,))
    monkeypatch.setattr(sorting, "FAN_IN", 3)
    run(tmp_path / "b", source=source)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_parts_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(25))
    monkeypatch.setattr(prepare, "PART_ROWS", 10)
    manifest = run(tmp_path / "data", source=source, heldout_size=5)
    rows = {file.path: file.rows for file in manifest.files}
    assert rows == {
        "contamination.parquet": 5,
        "dropped.parquet": 0,
        "heldout-00000.parquet": 5,
        "train-00000.parquet": 10,
        "train-00001.parquet": 10,
    }
    assert len({row["prompt_id"] for row in rows_of(tmp_path / "data", "train")}) == 20


def test_key_follows_content_and_name_not_place(tmp_path: Path) -> None:
    keys = [
        run(tmp_path / f"out-{i}", source=write_jsonl(tmp_path / name, rows)).key
        for i, (name, rows) in enumerate(
            [
                ("a/rows.jsonl", examples(10)),
                ("b/rows.jsonl", examples(10)),
                ("b/other.jsonl", examples(10)),
                ("c/rows.jsonl", examples(11)),
            ]
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_changed_data_at_the_same_place_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(10))
    run(tmp_path / "data", source=source)
    write_jsonl(source, examples(11))
    with pytest.raises(ConfigError, match="finished with other settings: .*source"):
        run(tmp_path / "data", source=source)


def test_nothing_but_tables_is_left(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(10))
    run(tmp_path / "data", source=source)
    names = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    assert names == [
        "contamination.parquet", "dropped.parquet", "heldout-00000.parquet", "manifest.json",
        "train-00000.parquet",
    ]  # fmt: skip


# Where rows come from


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("rows.jsonl.gz", write_gz),
        ("rows.json.gz", write_gz),
        ("rows.csv.gz", write_gz),
        ("rows", write_saved),
    ],
)
def test_every_form_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[Row]], Path]
) -> None:
    rows = [*examples(30), {"prompt": 'a "b", é\n☃', "response": "x,\ty\r\nz"}]
    run(tmp_path / "expected", source=write_jsonl(tmp_path / "rows.jsonl", rows))
    run(tmp_path / "found", source=write(tmp_path / name, rows))
    for part in ("train", "heldout"):
        expected, found = (
            [{**row, "source": ""} for row in rows_of(tmp_path / out, part)]
            for out in ("expected", "found")
        )
        assert expected == found


@pytest.mark.parametrize("pattern", ["rows", "rows/*.csv", "rows/**/*.csv"])
def test_folder_and_glob_read_all_files_in_order_of_names(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "rows").mkdir()
    write_csv(tmp_path / "rows" / "b.csv", examples(20)[10:])
    write_csv(tmp_path / "rows" / "a.csv", examples(12))
    (tmp_path / "rows" / "README.md").write_text("not data")
    manifest = run(tmp_path / "data", source=tmp_path / pattern)
    assert manifest.counts["rows_in"] == 22
    assert manifest.counts["dropped_duplicate"] == 2
    assert all("b.csv row" in row["detail"].partition(":")[0]
               for row in rows_of(tmp_path / "data", "dropped"))  # fmt: skip


def test_folder_with_splits_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    manifest = run(
        tmp_path / "data", format="gsm8k", source=GSM8K, heldout_split="test", heldout_size=500
    )
    assert (manifest.counts["train"], manifest.counts["heldout"]) == (40, 10)
    assert {row["source"] for row in rows_of(tmp_path / "data", "heldout")} == {"test.jsonl"}
    only_train = run(tmp_path / "again", format="gsm8k", source=GSM8K)
    assert only_train.counts["rows_in"] == 40


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "eval/a.jsonl"], "train",
         ["train/a.jsonl", "train/b.jsonl"]),
        (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
         "train_sft", ["data/train_sft-00000-of-00001.jsonl"]),
        (["train_sft.jsonl", "train_gen.jsonl"], "train_gen", ["train_gen.jsonl"]),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "train",
         ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"]),
        ([".hidden/train.jsonl", "a.jsonl"], "train", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_split_of_a_folder_is_read_off_the_names(
    tmp_path: Path, names: list[str], split: str, chosen: list[str]
) -> None:
    for index, name in enumerate(names):
        write_jsonl(tmp_path / "rows" / name, [example(index)])
    run(tmp_path / "data", source=tmp_path / "rows", split=split, heldout_size=0)
    assert sorted(row["source"] for row in rows_of(tmp_path / "data", "train")) == chosen


def test_saved_data_set_dict_gives_its_splits(tmp_path: Path) -> None:
    parts = {"train": examples(20), "test": examples(25)[18:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    manifest = run(
        tmp_path / "data", source=tmp_path / "saved", heldout_split="test", heldout_size=500
    )
    assert (manifest.counts["train"], manifest.counts["heldout"]) == (18, 7)
    assert manifest.counts["dropped_in_heldout"] == 2
    with pytest.raises(InputError, match="no split valid; splits there: train, test"):
        run(tmp_path / "other", source=tmp_path / "saved", split="valid")


def test_subset_of_a_folder_is_a_folder_in_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows" / "main" / "train.jsonl", examples(5))
    write_jsonl(tmp_path / "rows" / "other" / "train.jsonl", examples(9))
    assert run(tmp_path / "data", source=tmp_path / "rows", subset="main").counts["rows_in"] == 5
    with pytest.raises(InputError, match="has no folder socratic; correct prepare.subset"):
        run(tmp_path / "x", source=tmp_path / "rows", subset="socratic")


def test_no_row_of_the_heldout_source_is_trained_on(tmp_path: Path) -> None:
    # Two of three are drawn; the third is not held out, and is not trained on either.
    manifest = run(
        tmp_path / "data",
        source=write_jsonl(tmp_path / "train.jsonl", examples(10)),
        heldout_source=write_jsonl(tmp_path / "test.jsonl", examples(3)),
        heldout_size=2,
    )
    assert manifest.counts["train"] == 7
    assert manifest.counts["dropped_in_heldout"] == 3
    assert manifest.counts["dropped_not_drawn"] == 1


def test_small_heldout_source_is_taken_whole_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "train.jsonl", examples(10))
    heldout = write_jsonl(tmp_path / "test.jsonl", examples(13)[10:])
    with caplog.at_level(logging.WARNING, "spin"):
        manifest = run(tmp_path / "d", source=source, heldout_source=heldout, heldout_size=500)
    assert manifest.counts["heldout"] == 3
    assert "test.jsonl has 3 prompts, fewer than prepare.heldout_size=500" in caplog.text


def test_long_json_list_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.sources.CHUNK_CHARACTERS", 16)
    rows = [*examples(50), {"prompt": "long" * 200, "response": "x"}, {"prompt": "y",
            "response": "]}"}]  # fmt: skip
    manifest = run(tmp_path / "data", source=write_json(tmp_path / "rows.json", rows))
    assert manifest.counts["train"] == 50


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row) for row in examples(5))
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines + "\n  \n", encoding="utf-8")
    assert run(tmp_path / "data", source=tmp_path / "rows.jsonl").counts["rows_in"] == 5


def test_field_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    rows = [*examples(5), {"prompt": "long", "response": "x" * 200_000}]
    manifest = run(tmp_path / "data", source=write_csv(tmp_path / "rows.csv", rows))
    assert manifest.counts["train"] == 4


# What is refused


def refused(tmp_path: Path, match: str, **section: Any) -> None:
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        run(tmp_path / "data", **section)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_missing_source_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "prepare.source is not set; set it to a file, a folder or")
    with pytest.raises(InputError, match=r"prepare.source=\S*nothing.jsonl does not exist"):
        run(tmp_path / "data", source=tmp_path / "nothing.jsonl")
    refused(tmp_path, "prepare.source=nothing.jsonl does not exist", source="nothing.jsonl")
    refused(tmp_path, "matches no file; correct the pattern", source=tmp_path / "*.jsonl")
    source = write_jsonl(tmp_path / "rows.jsonl", examples(5))
    refused(
        tmp_path, "prepare.heldout_source=x/y.csv does", source=source, heldout_source="x/y.csv"
    )


@pytest.mark.parametrize(
    ("name", "write", "match"),
    [
        ("a.jsonl", write_jsonl, "a.jsonl row 0: no column prompt; columns there: question, ans"),
        ("a.json", write_json, "a.json row 0: no column prompt; columns there: question, answer"),
        (
            "a.csv",
            write_csv,
            "a.csv has no column prompt; columns there: question, answer; set pre",
        ),
        ("a.parquet", write_parquet, "a.parquet has no column prompt; columns there: question, an"),
        ("a", write_saved, "has no column prompt; columns there: question, answer; set prepare.pr"),
    ],
)
def test_wrong_column_is_refused_with_those_there(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[Row]], Path], match: str
) -> None:
    source = write(tmp_path / name, [{"question": "q", "answer": "a"}] * 3)
    refused(tmp_path, match, source=source)


@pytest.mark.parametrize(("name", "write"), [("a.parquet", write_parquet), ("a", write_saved)])
def test_column_of_another_type_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path, Sequence[Row]], Path]
) -> None:
    source = write(tmp_path / name, [{"prompt": 1, "response": "a", "messages": "x"}] * 3)
    refused(tmp_path, "column prompt holds int64, text is needed; convert it", source=source)
    refused(
        tmp_path,
        r"column prompt holds int64, a list of messages \{role, content\} is needed",
        source=source,
        format="messages",
        messages_column="prompt",
    )


def test_only_malformed_rows_are_refused_early_and_the_first_is_named(tmp_path: Path) -> None:
    bad = [{"prompt": 7, "response": "x"}]
    refused(
        tmp_path,
        "all of the first 3 rows of a.jsonl are malformed; a.jsonl row 0: prompt is 7, not text",
        source=write_jsonl(tmp_path / "a.jsonl", bad * 3),
    )
    refused(
        tmp_path,
        "all of the first 1000 rows of b.jsonl are malformed",
        source=write_jsonl(tmp_path / "b.jsonl", bad * 1000 + examples(10)),
    )
    late = write_jsonl(tmp_path / "c.jsonl", bad * 999 + examples(10))
    assert run(tmp_path / "data", source=late).counts["dropped_malformed"] == 999


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b"", "a.jsonl holds no rows; name another source"),
        ("a.json", b"", "a.json holds no rows"),
        ("a.json", b" [ ] ", "a.json holds no rows"),
        ("a.csv", b"", "a.csv holds no rows"),
        ("a.csv", b"prompt,response\n", "a.csv holds no rows"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n\n{"a": \n', "line 3 is no valid JSON"),
        ("a.jsonl", b"[1, 2]\n", r"line 1 is \[1, 2\], not an object; write one object a row"),
        ("a.jsonl", b'{"prompt": "a\xff"}\n', "line 1 is not UTF-8 text; convert"),
        ("a.jsonl", b"\x1f\x8b garbage", "line 1 is not UTF-8 text"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no valid JSON .nested too deeply"),
        ("a.json", b'[{"prompt": "a"}, {"prompt"', "element 1 is no valid JSON"),
        ("a.json", b'[{"prompt": "a"} {"prompt": "b"}]', "element 1: the list neither ends nor"),
        ("a.json", b'[{"prompt": "a"}', "element 1: the list neither ends nor goes on"),
        ("a.json", b'[{"prompt": "a"},]', "element 1 is no valid JSON"),
        ("a.json", b'[{"prompt": "a"}] x', "a.json goes on after its list"),
        ("a.json", b"[3]", "element 0 is 3, not an object"),
        ("a.json", b'["\xff"]', "a.json is not UTF-8 text"),
        ("a.csv", b"prompt,response\na,b\na,b,c\n", "line 3 has 3 fields, its header has 2"),
        ("a.csv", b'prompt,response\na,"b\n', "line 2 is no valid CSV"),
        ("a.csv", b"prompt,prompt,response\na,b,c\n", "a.csv names a column twice"),
        ("a.parquet", b"PAR1 not really", "a.parquet cannot be read as Parquet"),
        ("a.arrow", b"not really", "a.arrow cannot be read as Arrow"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is a damaged gzip file"),
        ("a.jsonl.gz", CUT_GZIP, "is a damaged gzip file"),
        ("a.txt", b"text", "a.txt is of no known kind; name a file ending in .jsonl, .json"),
        ("a.parquet.gz", b"x", "a.parquet.gz is of no known kind"),
    ],
)  # fmt: skip
def test_unreadable_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, match, source=tmp_path / name)


def test_folder_without_data_or_of_several_kinds_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    refused(tmp_path, "rows holds no file ending in .jsonl", source=folder)
    write_jsonl(folder / "a.jsonl", examples(3))
    write_csv(folder / "b.csv", examples(3))
    refused(
        tmp_path,
        r"holds files of several kinds \(.csv, .jsonl\); name those of one kind, such as \S+/\*",
        source=folder,
    )


def test_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "has no split validation; splits there: test, train; set prepare.split",
        source=GSM8K,
        split="validation",
        format="gsm8k",
    )


def test_too_few_prompts_are_refused_with_the_numbers(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(5) * 2)
    refused(
        tmp_path,
        "rows.jsonl has 5 different prompts with a response; prepare.heldout_size=5 and one to "
        "train on need 6: use more data, or a smaller prepare.heldout_size",
        source=source,
        heldout_size=5,
    )
    refused(
        tmp_path,
        r"rows.jsonl has no prompt with a response that the held-out source rows.jsonl \(5 prompts",
        source=source,
        heldout_source=source,
    )
    refused(
        tmp_path,
        "the held-out source h.jsonl has no prompt with a response",
        source=source,
        heldout_source=write_jsonl(tmp_path / "h.jsonl", [{"prompt": "", "response": ""}]),
    )


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(5))
    with pytest.raises(ConfigError, match="has no splits; set prepare.heldout_source, or unset"):
        run(tmp_path / "data", source=source, heldout_split="test")
    with pytest.raises(ConfigError, match="format=word_sums makes its own rows; unset prepare.sou"):
        run(tmp_path / "data", source=source, format="word_sums")


def test_source_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(5))
    adapt = prepare._adapt

    def adapt_and_append(*arguments: Any) -> Any:
        with source.open("a") as file:
            file.write(json.dumps(example(9)) + "\n")
        monkeypatch.setattr(prepare, "_adapt", adapt)
        return adapt(*arguments)

    monkeypatch.setattr(prepare, "_adapt", adapt_and_append)
    refused(tmp_path, "rows.jsonl changed while it was read", source=source)


def test_refusal_leaves_no_spilled_rows_and_a_good_run_follows(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(5))
    refused(tmp_path, "need 101", source=source, heldout_size=100)
    assert not list(tmp_path.rglob("*spill*"))
    assert run(tmp_path / "data", source=source).counts["train"] == 3


# Contamination


SENTENCE = "Please tell me in your own words why the sky is blue on a clear day"


def test_heldout_prompts_in_training_rows_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heldout = [
        {"prompt": f"{SENTENCE}?", "response": "x"},
        {"prompt": "How many?", "response": "x"},
        *examples(18),
    ]
    train = [
        {"prompt": f"A quiz: {SENTENCE.upper()}", "response": "y"},
        {"prompt": "Count.", "response": "how MANY"},
        *examples(30)[20:],
    ]
    section = {
        "source": write_jsonl(tmp_path / "a.jsonl", train),
        "heldout_source": write_jsonl(tmp_path / "b.jsonl", heldout),
        "heldout_size": 20,
    }
    manifest = run(tmp_path / "data", **section)
    report = list(read_rows([tmp_path / "data" / "contamination.parquet"], CONTAMINATION))
    train_ids = {row["response"]: row["prompt_id"] for row in rows_of(tmp_path / "data", "train")}
    heldout_rows = rows_of(tmp_path / "data", "heldout")
    assert [row["prompt_id"] for row in report] == [row["prompt_id"] for row in heldout_rows]
    texts = {row["prompt_id"]: row["messages"][0]["content"] for row in heldout_rows}
    dirty = {texts[row["prompt_id"]]: row for row in report if row["example_prompt_id"]}
    assert set(dirty) == {f"{SENTENCE}?", "How many?"}
    assert dirty[f"{SENTENCE}?"]["share_in_prompts"] == 1
    assert dirty[f"{SENTENCE}?"]["example_prompt_id"] == train_ids["y"]
    assert dirty["How many?"]["share_in_responses"] == 1
    assert dirty["How many?"]["example_prompt_id"] == train_ids["how MANY"]
    ngrams = sum(row["ngrams"] for row in report)
    assert manifest.metrics == {
        "contaminated_prompt_share": 0.1,
        "contaminated_ngram_share": (dirty[f"{SENTENCE}?"]["ngrams"] + 1) / ngrams,
    }
    assert "2 of 20 held-out prompts (10.0%) stand in training rows" in caplog.text
    caplog.clear()
    quiet = run(tmp_path / "quiet", **section, contamination={"warn_share": 0.1})
    assert quiet.key == manifest.key
    assert "held-out prompts (" not in caplog.text


def test_contamination_can_be_turned_off_and_needs_a_heldout_part(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", examples(30))
    reported = run(tmp_path / "on", source=source)
    assert reported.metrics == {"contaminated_prompt_share": 0, "contaminated_ngram_share": 0}
    off = run(tmp_path / "off", source=source, contamination={"ngram": 0})
    none = run(tmp_path / "none", source=source, heldout_size=0)
    for name, manifest in (("off", off), ("none", none)):
        assert not manifest.metrics
        assert not (tmp_path / name / "contamination.parquet").exists()
    other = run(tmp_path / "other", source=source, contamination={"ngram": 5})
    assert len({reported.key, off.key, other.key}) == 3


def test_the_length_of_ngrams_decides_what_is_found(tmp_path: Path) -> None:
    heldout = write_jsonl(tmp_path / "h.jsonl", [{"prompt": SENTENCE, "response": "x"}])
    words = SENTENCE.split()
    train = write_jsonl(tmp_path / "t.jsonl", [{"prompt": " ".join(words[:8]), "response": "y"}])
    for ngram, share in ((8, 1), (9, 0)):
        made = run(
            tmp_path / str(ngram),
            source=train,
            heldout_source=heldout,
            contamination={"ngram": ngram},
        )
        assert made.metrics["contaminated_prompt_share"] == share
