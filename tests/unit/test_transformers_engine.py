"""The transformers engine against the library's own generate and full forward passes."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import EngineConfig
from stages.engines import open_engine
from stages.engines.base import Completion, Request, Sampling
from stages.engines.transformers import TransformersEngine, draw
from stages.errors import DivergedError, InputError
from stages.model.load import load_model

PAD = 2
MAX_LEN = 128
VOCAB = 259  # of the tiny model, at least


def sampling(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 12,
    stop_token_ids: tuple[int, ...] = tuple(range(3, 30)),
) -> Sampling:
    return Sampling(temperature, top_p, top_k, max_new_tokens, stop_token_ids)


def make_requests(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    rng = random.Random(seed)
    lengths = [1, 2, *(rng.randint(3, longest) for _ in range(count - 2))]
    return [
        Request(f"r{i}", [rng.randrange(3, VOCAB) for _ in range(length)], 1000 + i)
        for i, length in enumerate(lengths)
    ]


def open_tiny(model_dir: Path, batch_size: int = 16, max_model_len: int = MAX_LEN) -> Any:
    return TransformersEngine(
        model_dir,
        dtype="float32",
        max_model_len=max_model_len,
        batch_size=batch_size,
        pad_token_id=PAD,
    )


def answers(
    model_dir: Path, requests: Iterable[Request], how: Sampling, batch_size: int = 16
) -> dict[str, Completion]:
    engine = open_tiny(model_dir, batch_size)
    found = list(engine.generate(requests, how))
    engine.close()
    assert len({done.request_id for done in found}) == len(found), "each request once"
    return {done.request_id: done for done in found}


def logits_one_at_a_time(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].float()
    return logits


def test_greedy_equals_the_library(tiny_model_dir: Path) -> None:
    requests = make_requests(40)
    how = sampling(temperature=0, max_new_tokens=20, stop_token_ids=(*range(3, 12), 150, 151))
    model = load_model(tiny_model_dir)
    found = answers(tiny_model_dir, requests, how)
    for request in requests:
        prompt = torch.tensor([request.prompt_token_ids])
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=list(how.stop_token_ids),
            pad_token_id=PAD,
        )
        assert found[request.request_id].token_ids == whole[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("how", [sampling(), sampling(0.7, 0.9), sampling(1.3, 0.95, 20)])
def test_batching_and_order_change_no_token(tiny_model_dir: Path, how: Sampling) -> None:
    requests = make_requests(70)
    alone = answers(tiny_model_dir, requests, how, batch_size=1)
    shuffled = random.Random(1).sample(requests, len(requests))
    for batch_size, order in ((3, requests), (16, shuffled), (64, requests), (256, shuffled)):
        found = answers(tiny_model_dir, order, how, batch_size)
        assert found.keys() == alone.keys()
        for name, done in found.items():
            assert done.token_ids == alone[name].token_ids
            assert done.finish_reason == alone[name].finish_reason
            assert done.token_logprobs == pytest.approx(alone[name].token_logprobs, abs=1e-5)


def test_logprobs_are_the_models_own(tiny_model_dir: Path) -> None:
    requests = make_requests(30)
    model = load_model(tiny_model_dir)
    found = answers(tiny_model_dir, requests, sampling(0.6, 0.8, 50))
    for request in requests:
        done = found[request.request_id]
        whole = request.prompt_token_ids + done.token_ids
        logprobs = logits_one_at_a_time(model, whole[:-1]).log_softmax(-1)
        first = len(request.prompt_token_ids) - 1
        expected = [logprobs[first + i, token].item() for i, token in enumerate(done.token_ids)]
        assert done.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_answers_end_with_a_stop_token_or_at_the_limit(tiny_model_dir: Path) -> None:
    how = sampling(max_new_tokens=10)
    found = answers(tiny_model_dir, make_requests(80), how).values()
    assert {done.finish_reason for done in found} == {"stop", "length"}
    for done in found:
        assert len(done.token_logprobs) == len(done.token_ids)
        assert not set(done.token_ids[:-1]) & set(how.stop_token_ids)
        if done.finish_reason == "stop":
            assert done.token_ids[-1] in how.stop_token_ids
        else:
            assert len(done.token_ids) == 10
            assert done.token_ids[-1] not in how.stop_token_ids


def test_a_stop_token_in_the_last_place_counts_as_stop(tiny_model_dir: Path) -> None:
    everything = sampling(max_new_tokens=1, stop_token_ids=tuple(range(400)))
    for done in answers(tiny_model_dir, make_requests(5), everything).values():
        assert (len(done.token_ids), done.finish_reason) == (1, "stop")


def test_without_stop_tokens_all_answers_run_to_the_limit(tiny_model_dir: Path) -> None:
    found = answers(tiny_model_dir, make_requests(5), sampling(stop_token_ids=()))
    assert {len(done.token_ids) for done in found.values()} == {12}


def test_seeds_decide_the_samples(tiny_model_dir: Path) -> None:
    prompt = list(range(40, 60))
    requests = [Request(str(i), prompt, seed=i % 2) for i in range(4)]
    found = answers(tiny_model_dir, requests, sampling(stop_token_ids=()))
    assert found["0"].token_ids == found["2"].token_ids != found["1"].token_ids
    assert found["1"].token_ids == found["3"].token_ids


def test_prompt_as_long_as_the_model_allows(tiny_model_dir: Path) -> None:
    limit = 512
    requests = make_requests(3, longest=9)
    requests.append(Request("long", [7 + i % 200 for i in range(limit - 12)], 5))
    engine = open_tiny(tiny_model_dir, max_model_len=limit)
    found = {done.request_id: done for done in engine.generate(requests, sampling())}
    assert found["r2"] == answers(tiny_model_dir, requests[:3], sampling())["r2"]
    assert len(found["long"].token_ids) <= 12


@pytest.mark.parametrize(
    ("length", "message"), [(0, "bad has no prompt token"), (117, "exceed max_model_len=128")]
)
def test_a_request_that_does_not_fit_is_refused(
    tiny_model_dir: Path, length: int, message: str
) -> None:
    engine = open_tiny(tiny_model_dir)
    with pytest.raises(ValueError, match=message):
        list(engine.generate([Request("bad", [5] * length, 0)], sampling()))


def test_no_requests_no_answers(tiny_model_dir: Path) -> None:
    assert answers(tiny_model_dir, [], sampling()) == {}


def test_requests_are_pulled_as_they_are_needed(tiny_model_dir: Path) -> None:
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Request(str(pulled), [10, 11, 12], pulled)

    done = open_tiny(tiny_model_dir, batch_size=4).generate(endless(), sampling())
    for _ in range(30):
        next(done)
    assert pulled <= 30 + 9 * 4


def test_inference_mode_does_not_leak_to_the_caller(tiny_model_dir: Path) -> None:
    for _ in open_tiny(tiny_model_dir).generate(make_requests(4), sampling()):
        assert not torch.is_inference_mode_enabled()


def test_broken_weights_are_reported(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(DivergedError, match="not finite"):
        list(open_tiny(tmp_path).generate(make_requests(3), sampling()))


@pytest.mark.parametrize("kinds", ["all", "mixed"])
def test_sliding_windows_equal_the_library(tmp_path: Path, kinds: str) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6,
        "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    if kinds == "all":
        model: Any = MistralForCausalLM(MistralConfig(**shape))
    else:
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, layer_types=types))
    model.save_pretrained(tmp_path)
    plain = load_model(tmp_path)
    requests = make_requests(8, longest=30)
    engine = open_tiny(tmp_path, max_model_len=64)
    for done in engine.generate(requests, sampling(max_new_tokens=20)):
        prompt = next(r for r in requests if r.request_id == done.request_id).prompt_token_ids
        logprobs = logits_one_at_a_time(plain, (prompt + done.token_ids)[:-1]).log_softmax(-1)
        expected = logprobs[len(prompt) - 1 :].gather(1, torch.tensor(done.token_ids)[:, None])
        assert done.token_logprobs == pytest.approx(expected.squeeze(1).tolist(), abs=1e-4)


def test_models_without_plain_attention_are_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot run|cannot be loaded"):
        open_tiny(tmp_path)


def test_open_engine_gives_the_recipes_engine(tiny_model_dir: Path) -> None:
    config = EngineConfig(batch_size=4)
    engine = open_engine(config, tiny_model_dir, max_model_len=64, pad_token_id=PAD)
    assert isinstance(engine, TransformersEngine)
    assert len(list(engine.generate(make_requests(3), sampling()))) == 3
    engine.close()


def test_bfloat16_is_the_models_own_too(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(
        tiny_model_dir, dtype="bfloat16", max_model_len=64, batch_size=8, pad_token_id=PAD
    )
    found = list(engine.generate(make_requests(12), sampling()))
    assert len(found) == 12
    assert all(math.isfinite(x) for done in found for x in done.token_logprobs)


# draw


def draws(logits: Sequence[float], how: Sampling, count: int = 20_001) -> torch.Tensor:
    """Return how often each token is drawn, over evenly spread uniform numbers."""
    logits_SV = torch.tensor([logits]).repeat(count, 1)
    tokens, _ = draw(logits_SV, torch.linspace(0, 1, count + 1, dtype=torch.float64)[:-1], how)
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_draw_follows_the_softmax() -> None:
    logits = [0.3, -1.0, 2.0, -math.inf, 1.0]
    expected = torch.tensor(logits).softmax(0)
    torch.testing.assert_close(draws(logits, sampling()), expected, atol=2e-4, rtol=0)
    expected = (torch.tensor(logits) / 0.5).softmax(0)
    torch.testing.assert_close(draws(logits, sampling(0.5)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (sampling(top_k=2), [2, 4]),
        (sampling(top_k=1), [2]),
        (sampling(top_k=99), [0, 1, 2, 4]),
        (sampling(top_p=0.5), [2]),
        (sampling(top_p=0.8), [2, 4]),
        (sampling(top_p=0.9), [0, 2, 4]),
        (sampling(top_p=0.01), [2]),
        (sampling(top_p=0.85, top_k=3), [2, 4]),
        (sampling(temperature=0), [2]),
    ],
)
def test_draw_truncates_like_the_library(how: Sampling, kept: list[int]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = [0.3, -1.0, 2.0, -math.inf, 1.0]
    shares = draws(logits, how)
    assert shares.nonzero().squeeze(1).tolist() == kept
    if how.temperature > 0:
        scores: Any = torch.tensor([logits])
        warpers = [TemperatureLogitsWarper(how.temperature), TopPLogitsWarper(how.top_p)]
        if how.top_k:
            warpers.insert(1, TopKLogitsWarper(how.top_k))
        for warper in warpers:
            scores = warper(None, scores)
        torch.testing.assert_close(shares, scores[0].softmax(0), atol=2e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_uniforms_never_draw_an_impossible_token(uniform: float) -> None:
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 400:600] = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for how in (sampling(), sampling(top_p=0.7), sampling(top_k=7), sampling(0.3)):
        token, logprob = draw(logits, torch.tensor([uniform], dtype=torch.float64), how)
        assert 400 <= token.item() < 600
        assert math.isfinite(logprob.item())
