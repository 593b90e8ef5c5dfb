"""The parity gate: healthy answers pass; each way in which an engine can be wrong is named."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages.artifacts import TableWriter
from stages.config import EngineConfig, ForwardConfig, ParityConfig, RunConfig, SamplingConfig
from stages.data.columns import list_column
from stages.data.rows import GENERATIONS
from stages.engines.base import Request, Sampling
from stages.engines.transformers import TransformersEngine
from stages.errors import DivergedError
from stages.model import parity, parity_model
from stages.model.load import load_model
from stages.model.parity import ParityReport, bounded, check_parity, draw_rows
from stages.model.parity_gap import Answered, measure
from stages.model.parity_model import processed_logprobs
from tests.families import PAD, VOCABULARY, tiny_model
from tests.lora_tools import make_adapter
from tests.random_llama import save_random_llama

BOS, VOCAB = 1, 256
ROWS, LONGEST = 12, 40
PLAIN = Sampling(1, 1, 0, LONGEST, (2,))


def save_llama(folder: Path, seed: int) -> Path:
    return save_random_llama(
        folder,
        seed,
        scale=6,
        generation={"bos_token_id": BOS, "eos_token_id": 2},
        vocab_size=VOCAB,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=PAD,
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("parity") / "model", seed=0)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("parity") / "other", seed=1)


def prompts(count: int = ROWS, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[BOS, *rng.integers(3, vocab, 6 + 2 * i).tolist()] for i in range(count)]


def answered(
    model_dir: Path,
    asked: Sequence[list[int]],
    dtype: str = "float32",
    how: Sampling = PLAIN,
) -> list[Answered]:
    """Answers of the real engine, once for each question."""
    return list(_answered(model_dir, tuple(map(tuple, asked)), dtype, how))


@functools.cache
def _answered(
    model_dir: Path, asked: tuple[tuple[int, ...], ...], dtype: str, how: Sampling
) -> list[Answered]:
    engine = TransformersEngine(
        model_dir, dtype=dtype, max_model_len=128, batch_size=16, pad_token_id=PAD
    )
    requests = [Request(f"p{i:02}", list(prompt), i) for i, prompt in enumerate(asked)]
    done = {answer.request_id: answer for answer in engine.generate(requests, how)}
    engine.close()
    return [
        Answered(r.request_id, 0, r.prompt_token_ids, a.token_ids, a.token_logprobs)
        for r, a in ((r, done[r.request_id]) for r in requests)
    ]


def check(model_dir: Path, rows: Sequence[Answered], **changes: Any) -> ParityReport:
    config = changes.pop("config", ParityConfig())
    dtype = changes.pop("dtype", "float32")
    report = check_parity(
        model_dir,
        rows,
        config,
        EngineConfig(dtype=dtype),
        **{"forward": ForwardConfig(), "pad_token_id": PAD, "where": "generate", **changes},
    )
    assert report is not None
    return report


@pytest.fixture(scope="module")
def healthy(model_dir: Path) -> list[Answered]:
    return answered(model_dir, prompts())


@pytest.mark.parametrize("mode", ["auto", "packed", "padded", "single"])
def test_the_engines_answers_pass_in_fp32(
    model_dir: Path, healthy: list[Answered], mode: Any
) -> None:
    report = check(model_dir, healthy, forward=ForwardConfig(attention=mode))
    assert report.precision == "fp32"
    assert report.gap.mean < 1e-5
    assert report.gap.worst < 1e-4
    assert report.gap.tokens == sum(len(row.response) for row in healthy)
    assert report.metrics() == {"parity_mean": report.gap.mean, "parity_worst": report.gap.worst}


def test_the_engines_answers_pass_in_bf16(model_dir: Path) -> None:
    report = check(model_dir, answered(model_dir, prompts(), "bfloat16"), dtype="bfloat16")
    assert report.precision == "bf16"
    assert 1e-3 < report.gap.mean < report.tolerance.mean / 2
    assert report.gap.tail < report.tolerance.tail / 2
    assert abs(report.gap.bias) < report.gap.mean / 2


def test_an_engine_in_fp32_passes_where_bf16_was_asked_for(
    model_dir: Path, healthy: list[Answered]
) -> None:
    assert check(model_dir, healthy, dtype="bfloat16").gap.mean > 1e-3


def test_answers_drawn_at_another_temperature_pass(model_dir: Path) -> None:
    rows = answered(model_dir, prompts(), how=Sampling(0.6, 0.8, 20, LONGEST, (2,)))
    how = SamplingConfig(temperature=0.6, top_p=0.8, top_k=20)
    assert check(model_dir, rows, sampling=how).gap.worst < 1e-4


FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {}, "shared"),
    ("mistral", {"sliding_window": 16}, "packed"),
    ("gemma3_text", {"sliding_window": 16, "sliding_window_pattern": 2}, "packed"),
    # Soft-capped scores and logits: neither packed nor torch's attention.
    (
        "gemma2",
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "sliding_window": 16},
        "padded",
    ),
    ("gpt_oss", {"sliding_window": 16, "num_local_experts": 4}, "padded"),
]


@pytest.mark.parametrize(("family", "changes", "attention"), FAMILIES)
def test_families_pass_by_the_way_that_training_takes(
    tmp_path: Path, family: str, changes: dict[str, Any], attention: str
) -> None:
    tiny_model(family, attention="eager", **changes).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        rows = answered(tmp_path, prompts(6, VOCABULARY), dtype)
        report = check(tmp_path, rows, dtype=dtype)
        assert report.attention == attention
        assert report.gap.mean < (1e-5 if dtype == "float32" else report.tolerance.mean / 2)


def with_prompts(rows: Sequence[Answered], asked: Sequence[list[int]]) -> list[Answered]:
    """The rows as if their answers had been to other prompts."""
    return [replace(row, prompt=prompt) for row, prompt in zip(rows, asked, strict=True)]


def processed(model_dir: Path, rows: Sequence[Answered], how: SamplingConfig) -> list[Answered]:
    """The rows with the log-probabilities of what was drawn from."""
    model = load_model(model_dir)
    found = []
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.tensor([row.prompt + row.response])).logits[0]
        logits = logits[len(row.prompt) - 1 : -1].float()
        logprobs = processed_logprobs(logits, torch.tensor(row.response), how)
        found.append(replace(row, logprobs=logprobs.tolist()))
    return found


def shifted(rows: Sequence[Answered], by: int) -> list[Answered]:
    return [replace(row, logprobs=np.roll(row.logprobs, by).tolist()) for row in rows]


Corrupt = Callable[[Path, Path], tuple[Sequence[Answered], dict[str, Any]]]
HOW = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20)
DRAWN = Sampling(0.7, 0.9, 20, LONGEST, (2,))
WITHOUT = [prompt[1:] for prompt in prompts()]
TWICE = [[BOS, *prompt] for prompt in prompts()]
SYSTEM = [[BOS, *range(30, 54), *prompt[1:]] for prompt in prompts()]


def of_both(model: Path, other: Path) -> list[Answered]:
    return [*answered(model, prompts())[:-3], *answered(other, prompts())[-3:]]


def broken(rows: Sequence[Answered], value: float) -> list[Answered]:
    """The rows with one number that is not finite."""
    return [*rows[:-1], replace(rows[-1], logprobs=[value, *rows[-1].logprobs[1:]])]


CAUSES: dict[str, tuple[str, Corrupt]] = {
    "bos dropped": (
        r"BOS: all rows hold answers to prompts without their BOS, token 1",
        lambda m, _: (with_prompts(answered(m, WITHOUT), prompts()), {}),
    ),
    "bos twice": (
        r"BOS: all rows hold answers to prompts with a second BOS, token 1",
        lambda m, _: (with_prompts(answered(m, TWICE), prompts()), {}),
    ),
    "bos lacking": (
        r"BOS: all rows hold answers to prompts with a BOS that the rows lack, token 1",
        lambda m, _: (with_prompts(answered(m, prompts()), WITHOUT), {}),
    ),
    "first token lost": (
        r"BOS: all rows hold answers to prompts without their first token, such as",
        lambda m, _: (with_prompts(answered(m, [p[1:] for p in WITHOUT]), WITHOUT), {}),
    ),
    "bos in bf16": (
        r"BOS: all rows hold answers to prompts without their BOS",
        lambda m, _: (
            with_prompts(answered(m, WITHOUT, "bfloat16"), prompts()),
            {"dtype": "bfloat16"},
        ),
    ),
    "bf16 for fp32": (
        r"dtype: the differences are those of half precision",
        lambda m, _: (answered(m, prompts(), "bfloat16"), {}),
    ),
    "temperature": (
        r"temperature: all rows hold log-probabilities after sampling's temperature 0\.7, not",
        lambda m, _: (
            processed(m, answered(m, prompts()), SamplingConfig(temperature=0.7)),
            {"sampling": SamplingConfig(temperature=0.7)},
        ),
    ),
    "temperature and kept tokens": (
        r"temperature: all rows hold .* temperature 0\.7, top_k 20, top_p 0\.9, not",
        lambda m, _: (processed(m, answered(m, prompts(), how=DRAWN), HOW), {"sampling": HOW}),
    ),
    "a temperature of which the recipe knows nothing": (
        r"temperature: all rows hold .* temperature 1\.37, not",
        lambda m, _: (
            processed(m, answered(m, prompts()), SamplingConfig(temperature=1.37)),
            {"sampling": SamplingConfig()},
        ),
    ),
    "template, with the renderer": (
        r"template: 12 of 12 prompts are not those .* such as that of p00/0, and the engine was",
        lambda m, _: (
            with_prompts(answered(m, SYSTEM), prompts()),
            {"rendered": lambda name: SYSTEM[int(name[1:])]},
        ),
    ),
    "template without its end": (
        r"template: all rows hold answers to prompts without their last 3 tokens, .* \[7, 8, 9]",
        lambda m, _: (with_prompts(answered(m, prompts()), [[*p, 7, 8, 9] for p in prompts()]), {}),
    ),
    "template without its end's end": (
        r"template: all rows hold answers to prompts without their last 1 tokens, such as \[9]",
        lambda m, _: (
            with_prompts(
                answered(m, [[*p, 7, 8] for p in prompts()]), [[*p, 7, 8, 9] for p in prompts()]
            ),
            {},
        ),
    ),
    "template without its beginning": (
        r"template: all rows hold answers to prompts without the 25 tokens that all",
        lambda m, _: (with_prompts(answered(m, WITHOUT), SYSTEM), {}),
    ),
    "off by one": (
        r"off by one: all rows hold the log-probabilities of the tokens before their own",
        lambda m, _: (shifted(answered(m, prompts()), 1), {}),
    ),
    "off by one, backwards": (
        r"off by one: all rows hold the log-probabilities of the tokens after their own",
        lambda m, _: (shifted(answered(m, prompts()), -1), {}),
    ),
    "another model": (
        r"wrong weights: the differences are everywhere",
        lambda _, other: (answered(other, prompts()), {}),
    ),
    "a known model": (
        r"wrong weights: all rows hold answers of iteration 1's model",
        lambda _, other: (answered(other, prompts()), {"others": {"iteration 1's model": other}}),
    ),
    "a known model in some rows": (
        r"wrong weights: 3 rows hold answers of iteration 1's model",
        lambda m, other: (of_both(m, other), {"others": {"iteration 1's model": other}}),
    ),
    "NaN": (
        r"dtype: the engine's log-probabilities are not finite",
        lambda m, _: (broken(answered(m, prompts()), float("nan")), {}),
    ),
    "infinite": (
        r"dtype: the engine's log-probabilities are not finite",
        lambda m, _: (broken(answered(m, prompts()), -float("inf")), {"dtype": "bfloat16"}),
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_named(model_dir: Path, other_dir: Path, cause: str) -> None:
    message, corrupt = CAUSES[cause]
    rows, told = corrupt(model_dir, other_dir)
    with pytest.raises(DivergedError, match=f"^generate: .*likely cause: {message}") as caught:
        check(model_dir, rows, **told)
    assert "\n" not in str(caught.value)


def test_differences_that_shrink_along_the_response_mean_another_prompt(tmp_path: Path) -> None:
    # A window of 6 in two layers: after ten tokens nothing of the prompt is seen any more.
    tiny_model("mistral", sliding_window=6).save_pretrained(tmp_path)
    asked = prompts(6, VOCABULARY)
    other = [[BOS, *reversed(prompt[1:])] for prompt in asked]
    rows = with_prompts(answered(tmp_path, other, how=Sampling(1, 1, 0, LONGEST, ())), asked)
    with pytest.raises(DivergedError, match="likely cause: template: the differences shrink"):
        check(tmp_path, rows)


def test_differences_that_grow_along_the_response_mean_other_positions(tmp_path: Path) -> None:
    # The engine knows of the window, which is longer than any prompt; the trainer does not.
    asked = prompts(6, VOCABULARY)
    tiny_model("mistral", sliding_window=24).save_pretrained(tmp_path / "engine")
    tiny_model("mistral").save_pretrained(tmp_path / "trainer")
    rows = answered(tmp_path / "engine", asked, how=Sampling(1, 1, 0, LONGEST, ()))
    with pytest.raises(DivergedError, match="likely cause: positions: the differences grow"):
        check(tmp_path / "trainer", rows)


def test_an_adapter_that_the_engine_left_out_is_named(model_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter")
    check(adapter, answered(adapter, prompts()))
    with pytest.raises(DivergedError, match="wrong weights: all rows .* without the adapter"):
        check(adapter, answered(model_dir, prompts()))


def test_weights_that_are_not_finite_are_named(
    model_dir: Path, tmp_path: Path, healthy: list[Answered]
) -> None:
    model = load_model(model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(DivergedError, match="wrong weights: the model's own .* not finite"):
        check(tmp_path, healthy)


def test_prompts_that_the_recipe_renders_otherwise_are_no_matter_while_the_numbers_agree(
    model_dir: Path, healthy: list[Answered]
) -> None:
    check(model_dir, healthy, rendered=lambda _: [BOS, 3, 4])


def test_one_token_in_a_thousand_may_be_far_off(model_dir: Path) -> None:
    rows = answered(model_dir, prompts(30), how=Sampling(1, 1, 0, LONGEST, ()))
    odd = replace(rows[3], logprobs=[*rows[3].logprobs[:5], -9, *rows[3].logprobs[6:]])
    report = check(model_dir, [*rows[:3], odd, *rows[4:]], config=ParityConfig(mean_tolerance=0.01))
    assert report.gap.tokens == 1200
    assert report.gap.worst > 1
    assert report.gap.tail < 1e-4
    assert (report.worst_row, report.gap.token) == ("p03/0", 5)
    assert report.info()["worst_token"] == 5
    with pytest.raises(DivergedError, match="1200 tokens"):
        check(model_dir, [*rows[:2], odd, odd, *rows[4:]])


def test_the_recipes_tolerances_decide(model_dir: Path) -> None:
    rows = answered(model_dir, prompts(), "bfloat16")
    loose = ParityConfig(mean_tolerance=0.1, worst_tolerance=1)
    assert check(model_dir, rows, config=loose).tolerance.mean == 0.1
    for tight in (
        loose.model_copy(update={"mean_tolerance": 1e-6}),
        loose.model_copy(update={"worst_tolerance": 1e-6}),
    ):
        with pytest.raises(DivergedError, match=r"1e-06"):
            check(model_dir, rows, config=tight, dtype="bfloat16")


def test_tolerances_change_no_key() -> None:
    plain, other = (
        RunConfig(),
        RunConfig.model_validate({"generate": {"parity": {"rows": 3, "mean_tolerance": 1}}}),
    )
    assert plain.generate.identity() == other.generate.identity()


def test_a_quantized_engine_is_held_to_less(model_dir: Path) -> None:
    rows = answered(model_dir, prompts(), "bfloat16")
    report = check_parity(
        model_dir,
        rows,
        ParityConfig(),
        EngineConfig(name="vllm", dtype="float32", quantization="fp8"),
        forward=ForwardConfig(),
        pad_token_id=PAD,
        where="generate",
    )
    assert report is not None
    assert report.tolerance.mean > 0.3


def test_rows_without_a_token_are_left_out(model_dir: Path, healthy: list[Answered]) -> None:
    empty = replace(healthy[0], response=[], logprobs=[])
    report = check(model_dir, [empty, *healthy[1:]])
    assert report.rows == len(healthy) - 1
    arguments: Any = {"forward": ForwardConfig(), "pad_token_id": PAD, "where": "generate"}
    for rows in ([], [empty]):
        found = check_parity(model_dir, rows, ParityConfig(), EngineConfig(), **arguments)
        assert found is None


def test_a_gap_is_placed_and_signed() -> None:
    engine = [np.array([-1.0, -2.0]), np.array([-3.0])]
    gap = measure(engine, [np.array([-1.0, -1.0]), np.array([-3.5])])
    assert (gap.mean, gap.worst, gap.tail) == (0.5, 1.0, 1.0)
    assert gap.bias == pytest.approx(-1 / 6)
    assert (gap.row, gap.token, gap.tokens) == (0, 1, 3)


def make_shard(path: Path, numbers: Sequence[int], samples: int = 2) -> Path:
    names = [(f"id{number:04}", k) for number in numbers for k in range(samples)]
    size = len(names)
    tokens = [[int(name[2:]), k, 5] for name, k in names]
    columns = {
        "prompt_id": pa.array([name for name, _ in names], pa.string()),
        "sample_index": pa.array([k for _, k in names], pa.int32()),
        "seed": pa.array(range(size), pa.int64()),
        "prompt_token_ids": list_column(tokens, pa.int32()),
        "response_token_ids": list_column(tokens, pa.int32()),
        "response": pa.array(["x"] * size, pa.string()),
        "finish_reason": pa.array(["stop"] * size, pa.string()),
        "token_logprobs": list_column([[-0.5, -1, 0]] * size, pa.float32()),
    }
    with TableWriter(path, GENERATIONS, group_rows=64) as table:
        table.append_batch(pa.record_batch(list(columns.values()), schema=GENERATIONS))
    return path


def test_the_rows_drawn_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    one = [make_shard(tmp_path / "all.parquet", range(500))]
    many = [make_shard(tmp_path / f"{k}.parquet", range(k, k + 50)) for k in range(0, 500, 50)]
    drawn = draw_rows(one, 20, "parity/0/1")
    assert draw_rows(many, 20, "parity/0/1") == drawn
    assert len({row.name for row in drawn}) == 20
    assert draw_rows(one, 20, "parity/0/2") != drawn
    assert len({row.prompt_id for row in drawn}) > 15, "spread over the prompts"
    first = drawn[0]
    assert first.prompt == first.response == [int(first.prompt_id[2:]), first.sample_index, 5]
    assert first.logprobs == [-0.5, -1, 0]
    assert draw_rows(one, 0, "parity/0/1") == []
    assert len(draw_rows(one, 5000, "parity/0/1", max_tokens=10**6)) == 1000


def test_the_tokens_of_a_sample_are_bounded() -> None:
    rows = [Answered("a", k, [1] * 10, [2] * 20, [-1.0] * 20) for k in range(5)]
    cut = list(bounded(rows, 75))
    assert [len(row.response) for row in cut] == [20, 20, 5]
    assert [len(row.logprobs) for row in cut] == [20, 20, 5]
    assert [len(row.response) for row in bounded(rows, 70)] == [20, 20]
    assert [len(row.response) for row in bounded(rows, 5)] == [1]
    assert list(bounded([], 5)) == []
    long = Answered("b", 0, [1] * 100, [2], [-1.0])
    assert [row.name for row in bounded([rows[0], long, rows[1]], 75)] == ["a/0", "a/1"]


def test_a_recipe_that_tolerates_less_than_rounding_is_told(model_dir: Path) -> None:
    tight = ParityConfig(mean_tolerance=1e-9)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(DivergedError, match="cause: rounding: .* tolerance is too small"):
            check(model_dir, answered(model_dir, prompts(), dtype), dtype=dtype, config=tight)


def test_weights_that_are_almost_the_same_are_told_from_rounding(
    model_dir: Path, tmp_path: Path, healthy: list[Answered]
) -> None:
    model = load_model(model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 2e-4
    model.save_pretrained(tmp_path)
    with pytest.raises(DivergedError, match="wrong weights: the differences are everywhere"):
        check(tmp_path, healthy)
    with pytest.raises(DivergedError, match="wrong weights: all rows hold answers of the opponent"):
        check(tmp_path, healthy, others={"the opponent": model_dir})


def test_a_model_too_large_for_the_gpu_is_checked_on_the_cpu(
    model_dir: Path, healthy: list[Answered], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any) -> Any:
        if args[-1].type == "cuda":
            raise torch.OutOfMemoryError
        return parity_model.loaded(*args)

    monkeypatch.setattr(parity, "best_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(parity, "loaded", loaded)
    monkeypatch.setattr(parity, "CPU_TOKENS", 200)
    report = check(model_dir, healthy, dtype="auto")
    assert report.precision == "bf16", "auto is what it is on the GPU"
    assert 0 < report.gap.tokens < 200
