"""Hostile prompts among good ones: each is answered or quarantined, and none touches the others."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import engines, generate
from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, produce, read_rows
from stages.artifacts.keys import sha256_text
from stages.artifacts.tables import Row
from stages.config import RunConfig
from stages.data.chat import RowRefusedError, make_renderer
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS
from stages.generate import GenerateInputs
from tests.fakes import FakeEngine
from tests.hostile import MARKERS, ROLES, SENTENCE, hostile_text

REASONS = {"empty_prompt", "special_token", "prompt_too_long", "template_error"}
Prompt = tuple[str, list[dict[str, str]], bool]
"""Prompt id, messages, and whether nothing is wrong with them."""


def storable(text: str) -> bool:
    """Whether Parquet holds it: a lone surrogate ends with prepare, which drops the row."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def hostile_messages(random_: random.Random, huge: int) -> list[dict[str, str]]:
    """One conversation: mostly one hostile question, at times odd roles and several turns."""
    texts: Iterator[str] = filter(storable, (hostile_text(random_, huge) for _ in iter(int, 1)))
    if random_.random() < 0.8:
        return [{"role": "user", "content": next(texts)}]
    return [
        {"role": random_.choice(ROLES), "content": next(texts)}
        for _ in range(random_.randrange(1, 6))
    ]


def mixed(count: int, seed: int, huge: int) -> list[Prompt]:
    """`count` hostile prompts and half as many good ones, among each other."""
    random_ = random.Random(seed)
    found: list[Prompt] = []
    for number in range(count + count // 2):
        if number % 3 == 2:
            text = f"Ann has {number} cups, buys 7. How many?"
            found.append((f"{number:032x}", [{"role": "user", "content": text}], True))
        else:
            found.append((f"{number:032x}", hostile_messages(random_, huge), False))
    return found


def make_data(place: Path, prompts: list[Prompt]) -> Path:
    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("train-00000.parquet"), PROMPTS) as table:
            for number, (prompt_id, messages, _) in enumerate(prompts):
                table.append(
                    {
                        "prompt_id": prompt_id,
                        "messages": messages,
                        "response": "human",
                        "source": "test",
                        "source_row": number,
                    }
                )
        return Outcome(counts={"train": len(prompts)})

    produce(place, Plan("prepare", 1, {"prompts": sha256_text(repr(prompts))}, {}), fill)
    return place


def run(model: Path, data: Path, out: Path, engine: FakeEngine | None) -> Manifest:
    # Greedy: rows in another batch may differ in their last bits, and a draw would show it.
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    settings |= {"engine": {"batch_size": 32}, "parity": {"rows": 0 if engine else 32}}
    config = RunConfig.model_validate({"seed": 3, "generate": settings})
    opened: Any = engines.open_engine if engine is None else engine.open
    return generate.run(config, GenerateInputs(str(model), data), out, open_engine=opened)


def rows_of(out: Path) -> dict[str, Row]:
    parts = sorted(out.glob("part-*.parquet"))
    return {row["prompt_id"]: row for row in read_rows(parts, GENERATIONS)}


def check(prompts: list[Prompt], manifest: Manifest, out: Path) -> None:
    """Every prompt is answered once or dropped once with a reason; good ones are answered."""
    answered = rows_of(out)
    dropped = list(read_rows([out / "dropped.parquet"], DROPPED))
    ids = [row["prompt_id"] for row in dropped]
    assert manifest.counts["rows"] == len(answered)
    assert sorted([*answered, *ids]) == [prompt_id for prompt_id, *_ in prompts]
    assert {row["reason"] for row in dropped} <= REASONS
    assert all(row["detail"] and len(row["detail"]) < 1000 for row in dropped)
    counted = {n: c for n, c in manifest.counts.items() if n.startswith("dropped_")}
    assert sum(counted.values()) == len(dropped)
    assert len(counted) >= 3
    assert {prompt_id for prompt_id, _, good in prompts if good} <= answered.keys()


def compare(model: Path, prompts: list[Prompt], folder: Path, engine: bool) -> None:
    """The good prompts' answers are the same without the bad ones beside them."""
    good = [prompt for prompt in prompts if prompt[2]]
    results = []
    for name, some in (("mixed", prompts), ("good", good)):
        data = make_data(folder / f"data-{name}", some)
        manifest = run(model, data, folder / name, FakeEngine() if engine else None)
        if some is prompts:
            check(prompts, manifest, folder / name)
        results.append(rows_of(folder / name))
    with_bad, alone = results
    ids = [prompt_id for prompt_id, *_ in good]
    assert list(alone) == ids
    columns = ["prompt_token_ids", "seed", "response_token_ids", "response", "finish_reason"]
    for prompt_id in ids:
        assert [with_bad[prompt_id][c] for c in columns] == [alone[prompt_id][c] for c in columns]


def test_some_hostile_prompts_through_the_stage(tiny_model_dir: Path, tmp_path: Path) -> None:
    compare(tiny_model_dir, mixed(300, seed=0, huge=100_000), tmp_path, engine=True)


def test_some_hostile_prompts_through_a_real_engine(tiny_model_dir: Path, tmp_path: Path) -> None:
    compare(tiny_model_dir, mixed(300, seed=1, huge=20_000), tmp_path, engine=False)


@pytest.mark.long
def test_ten_thousand_hostile_prompts_through_the_stage(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    compare(tiny_model_dir, mixed(10_000, seed=2, huge=200_000), tmp_path, engine=True)


@pytest.mark.long
def test_ten_thousand_hostile_texts_through_the_renderer(tiny_model_dir: Path) -> None:
    """With what no file holds: lone surrogates. A row gives the same alone and in a batch."""
    random_ = random.Random(4)
    texts = [hostile_text(random_, 200_000) for _ in range(10_000)]
    renderer = make_renderer(tiny_model_dir, RunConfig().chat)
    rows = renderer.prompts_tokens([[{"role": "user", "content": text}] for text in texts], 500)
    reasons = {row.reason for row in rows if isinstance(row, RowRefusedError)}
    assert reasons == {"malformed_text", "special_token", "prompt_too_long"}
    for text, row in zip(texts, rows, strict=True):
        assert isinstance(row, RowRefusedError) or storable(text)
    for text, row in list(zip(texts, rows, strict=True))[::10]:
        [alone] = renderer.prompts_tokens([[{"role": "user", "content": text}]], 500)
        if isinstance(row, RowRefusedError):
            assert isinstance(alone, RowRefusedError)
            assert (alone.reason, alone.detail) == (row.reason, row.detail)
        else:
            assert alone == row


@pytest.mark.parametrize("text", [*MARKERS, "x" * 100_000, "e" + "\u0301" * 100_000, "\0" * 999])
def test_a_text_never_changes_the_prompt_around_it(tiny_model_dir: Path, text: str) -> None:
    """What the template writes around a user's text is there, once, whatever the text says."""
    renderer = make_renderer(tiny_model_dir, RunConfig().chat)
    [row] = renderer.prompts_tokens([[{"role": "user", "content": f"{SENTENCE}{text}"}]])
    if isinstance(row, RowRefusedError):
        assert row.reason == "special_token"
        assert text in ("</s>", "<s>", "<pad>")
    else:
        assert renderer.tokenizer.decode(row) == f"user: {SENTENCE}{text}\nassistant: "
