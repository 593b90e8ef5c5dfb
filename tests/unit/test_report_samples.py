"""The samples browser of the report, as far as Python makes it; tests/browser tries it out."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stages.layout import RunLayout
from stages.reporting.samples import Limits, SamplesBlock, samples_block, script_json
from tests.hostile import hostile_texts
from tests.made_samples import Sample, write_data, write_samples


class Page(HTMLParser):
    """The elements of a page, as a browser would read them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.data: dict[str, str] = {}
        self._id = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._id = str(dict(attrs).get("id")) if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._id = ""

    def handle_data(self, data: str) -> None:
        if self._id:
            self.data[self._id] = self.data.get(self._id, "") + data


def unpacked(block: SamplesBlock) -> dict[str, Any]:
    """What a browser unpacks of the page, by the ids of its elements."""
    data = {name: json.loads(text) for name, text in Page(str(block.html)).data.items()}
    return {
        name: json.loads(gzip.decompress(base64.b64decode(value)))
        if isinstance(value, str)
        else value
        for name, value in data.items()
    }


def some(count: int, **changes: Any) -> list[Sample]:
    return [
        Sample(
            **{"prompt": f"Question {i}?", "human": f"human {i}", "player": f"player {i}"} | changes
        )
        for i in range(count)
    ]


def test_a_page_holds_what_the_artifacts_hold(tmp_path: Path) -> None:
    whole = Sample(
        "Ask", "a human answer", "a player's answer",
        opponent="an opponent's", greedy="a greedy one",
        player_reward=1.0, opponent_reward=0.0, margin=1 / 3, cut_off=True, system="Be kind.",
    )  # fmt: skip
    block = samples_block(write_samples(tmp_path, {None: [Sample("Ask", "h", "p")], 0: [whole]}))
    data = unpacked(block)
    assert [(e["name"], e["rows"]) for e in data["samples-index"]] == [("start", 1), ("0", 1)]
    assert data["samples-prompts"]["ids"] == [whole.prompt_id]
    assert data["samples-prompts"]["prompts"] == [[["system", "Be kind."], ["user", "Ask"]]]
    columns = {name: value and value[0] for name, value in data["samples-of-0"].items()}
    assert columns == {
        "prompt": 0, "player": "a player's answer", "opponent": "an opponent's",
        "greedy": "a greedy one", "player_finish": "length", "opponent_finish": "stop",
        "greedy_finish": "stop", "player_reward": 1.0, "opponent_reward": 0.0,
        "greedy_reward": None, "human_margin": 0.333333, "opponent_margin": 0.0,
        "human_tokens": 4, "player_tokens": 4, "opponent_tokens": 3,
    }  # fmt: skip
    assert data["samples-of-start"]["opponent"] is None, "a column without values is left out"
    assert (block.rows, block.left_out, block.problems) == (2, 0, ())


def test_a_prompt_and_its_human_answer_stand_in_the_page_once(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {t: some(3, opponent="x") for t in (None, 0, 1)})
    data = unpacked(samples_block(layout))
    assert len(data["samples-prompts"]["ids"]) == 3
    assert len(data["samples-prompts"]["humans"]) == 3
    for name in ("samples-of-start", "samples-of-0", "samples-of-1"):
        assert sorted(data[name]["prompt"]) == [0, 1, 2]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {0: some(20)})
    assert samples_block(layout) == samples_block(layout)


def test_rows_beyond_the_limit_are_left_out_and_the_page_says_how_many(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {t: some(1200) for t in (None, 0)})
    block = samples_block(layout, limits=Limits(rows=7))
    data = unpacked(block)
    ids = sorted(sample.prompt_id for sample in some(1200))
    assert data["samples-prompts"]["ids"] == ids[:7], "the first by id, the same in each evaluation"
    assert (block.rows, block.left_out) == (14, 2386)
    assert "1,193 are not in this page" in " ".join(str(block.html).split())


def test_every_evaluation_gets_an_equal_part_of_the_page(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {t: some(50, player="x" * 1000) for t in (None, 0)})
    block = samples_block(layout, limits=Limits(characters=20_300))
    rows = {e["name"]: e["rows"] for e in unpacked(block)["samples-index"]}
    assert rows == {"start": 10, "0": 10}


def test_a_long_text_is_cut_and_says_how_long_it_was(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {0: [Sample("q" * 31, "h" * 30, "p" * 32)]})
    data = unpacked(samples_block(layout, limits=Limits(characters_per_text=30)))
    assert data["samples-of-0"]["player"] == [["p" * 30, 32]]
    assert data["samples-prompts"]["humans"] == ["h" * 30]
    assert data["samples-prompts"]["prompts"] == [[["user", ["q" * 30, 31]]]]


def test_one_text_larger_than_the_page_may_be_leaves_a_page(tmp_path: Path) -> None:
    block = samples_block(write_samples(tmp_path, {0: some(3, player="x" * 900)}),
                          limits=Limits(characters=100))  # fmt: skip
    assert (block.rows, block.left_out) == (1, 2)


def test_a_run_without_evaluations_has_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    block = samples_block(RunLayout(tmp_path))
    assert "No evaluation is finished yet" in block.html
    assert Page(str(block.html)).data == {}


def test_a_damaged_evaluation_is_left_out_and_named(tmp_path: Path) -> None:
    layout = write_samples(tmp_path, {None: some(3), 0: some(3)})
    file = layout.stage(0, "evaluate") / "examples.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    block = samples_block(layout)
    assert [e["name"] for e in unpacked(block)["samples-index"]] == ["start"]
    assert len(block.problems) == 1
    assert "iterations/000/evaluate/examples.parquet" in block.problems[0]
    assert "iterations/000/evaluate/examples.parquet" in block.html
    assert str(tmp_path) not in block.html, "a report is sent to others: no path of this machine"


def test_prompts_that_the_data_lack_are_told_and_their_answers_kept(tmp_path: Path) -> None:
    layout = write_samples(tmp_path / "run", {0: some(3)})
    write_data(tmp_path / "other", some(2))
    layout.data.rename(tmp_path / "old")
    (tmp_path / "other").rename(layout.data)
    block = samples_block(layout)
    assert block.rows == 3
    assert "1 of 3 evaluated prompts" in block.problems[0]
    texts = unpacked(block)["samples-prompts"]["prompts"]
    assert sum(text is None for text in texts) == 1


HOSTILE = (
    "</script><script>window.__hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "]]>\u2028\u2029'\"&lt;",
    *hostile_texts(60, seed=3, huge=30_000),
)


@pytest.mark.parametrize("letter", ["<", ">", "&", "\u2028", "\u2029"])
def test_json_in_a_script_element_holds_no_letter_that_ends_it(letter: str) -> None:
    text = script_json({f"a{letter}": [f"</script>{letter}"]})
    assert letter not in text
    assert json.loads(text) == {f"a{letter}": [f"</script>{letter}"]}


def test_hostile_texts_make_no_element_and_come_back_whole(tmp_path: Path) -> None:
    texts = [t.encode("utf-8", "replace").decode() for t in HOSTILE]
    plain = samples_block(write_samples(tmp_path / "plain", {0: some(len(texts), opponent="x")}))
    samples = [
        Sample(f"{i} {t}", t, t, opponent=t, greedy=t, system=t) for i, t in enumerate(texts)
    ]
    block = samples_block(write_samples(tmp_path / "hostile", {0: samples}))
    page = Page(str(block.html))
    assert page.tags == Page(str(plain.html)).tags
    shown = unpacked(block)["samples-of-0"]
    wanted = [s.player for s in sorted(samples, key=lambda s: s.prompt_id)]
    assert [t[0] if isinstance(t, list) else t for t in shown["player"]] == [
        t[:20_000] for t in wanted
    ]


def test_nothing_in_the_page_runs_or_asks_for_anything(tmp_path: Path) -> None:
    block = samples_block(write_samples(tmp_path, {0: some(2)}))
    page = Page(str(block.html))
    assert not [
        name for name in page.attributes if name.startswith("on") or name in {"style", "src"}
    ]
    assert not re.search(r"url\(|@import|http", block.css)
    runs = r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write"
    asks = r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|https?:"
    assert not re.search(f"{runs}|{asks}", block.js)
