"""What a worker shows while it answers, and which rows a shard has."""

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from stages.answers import Asked, _Tally
from stages.artifacts import TableWriter
from stages.artifacts.keys import row_seed
from stages.data.columns import list_column
from stages.data.rows import RENDERED
from stages.engines.base import Completion


def asked(folder: Path, prompts: int, group_rows: int, samples: int) -> Asked:
    path = folder / "prompts.parquet"
    tokens = [[number] * (1 + number % 7) for number in range(prompts)]
    columns = [
        pa.array([f"{number:04d}" for number in range(prompts)]),
        pa.array([len(t) for t in tokens], pa.int32()),
        list_column(tokens, pa.int32()),
    ]
    with TableWriter(path, RENDERED, group_rows=group_rows) as table:
        table.append_batch(pa.record_batch(columns, schema=RENDERED))
    return Asked(path, "hash of the file", samples, seed=3, iteration=1)


@pytest.mark.parametrize(("group_rows", "samples"), [(1, 1), (4, 3), (10, 2), (100, 1)])
def test_shards_hold_every_row_once_with_its_seed(
    tmp_path: Path, group_rows: int, samples: int
) -> None:
    given = asked(tmp_path, 10, group_rows, samples)
    requests = [r for k in range(given.num_shards) for _, r in given.open(k).requests()]
    names = [(f"{prompt:04d}", sample) for prompt in range(10) for sample in range(samples)]
    assert [request.request_id for request in requests] == [f"{p}/{s}" for p, s in names]
    assert [request.seed for request in requests] == [row_seed(3, 1, p, s) for p, s in names]
    assert [len(r.prompt_token_ids) for r in requests] == [1 + int(p) % 7 for p, _ in names]
    assert sum(given.rows_of(k) for k in range(given.num_shards)) == len(names) == given.num_rows
    assert given.longest == 7
    assert len({given.ids_hash(k) for k in range(given.num_shards)}) == given.num_shards


def test_a_row_is_answered_once(tmp_path: Path) -> None:
    shard = asked(tmp_path, 2, 2, 1).open(0)
    shard.take(1, Completion("0001/0", [5], [-0.5], "stop"))
    with pytest.raises(AssertionError, match="answered twice"):
        shard.take(1, Completion("0001/0", [5], [-0.5], "stop"))
    assert shard.missing == 1


def test_the_tally_draws_lengths_and_tells_what_was_cut_off() -> None:
    tally = _Tally()
    assert tally.line() == ""
    for length in [1] * 8 + [2] * 4 + [12]:
        tally.count(Completion("x", [0] * length, [0.0] * length, "stop"))
    assert tally.line() == "0% cut off, tokens 1 █▄         ▁ 12"
    for _ in range(13):
        tally.count(Completion("x", [0] * 240, [0.0] * 240, "length"))
    line = tally.line()
    assert line.startswith("50% cut off, tokens 1 █")
    assert line.endswith("█ 240")
    assert len(line.split("tokens 1 ")[1].removesuffix(" 240")) == 12


def test_samples_of_hostile_models_reach_the_log_as_text(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The screen takes what could steer a terminal out of every line of the log."""
    from spin_cli.screen import set_up_messages

    set_up_messages()
    with caplog.at_level(logging.INFO, logger="spin"):
        logging.getLogger("spin").info("sample %s → %s", "a/0", "\x1b[2Jgone\nnext\u202e")
    assert capsys.readouterr().err == "sample a/0 → gone next\n"
