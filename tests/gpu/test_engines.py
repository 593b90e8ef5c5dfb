"""vLLM on a GPU: asleep it gives its memory back, and awake it has the new model's weights."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from stages.config import EngineConfig
from stages.engines.vllm import VllmEngine
from tests.pipeline.test_vllm_engine import (
    DRAWN,
    MAX_MODEL_LEN,
    by_id,
    prompts,
    reference_logprobs,
    save_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.timeout(900)
def test_a_kept_engine_sleeps_and_wakes_with_other_weights(tmp_path: Path) -> None:
    models = [save_model(tmp_path / f"{seed}", seed) for seed in (0, 1)]
    before, total = torch.cuda.mem_get_info()
    config = EngineConfig(
        name="vllm", dtype="float32", gpu_memory_utilization=0.5, enforce_eager=True
    )
    engine = VllmEngine(models[0], config, max_model_len=MAX_MODEL_LEN, keep=True)
    try:
        for model_dir in (models[0], models[1], models[0]):
            found = by_id(engine.generate(prompts(20), DRAWN))
            for request in prompts(20)[:5]:
                answer = found[request.request_id]
                expected = reference_logprobs(model_dir, request.prompt_token_ids, answer.token_ids)
                assert answer.token_logprobs == pytest.approx(expected.tolist(), abs=1e-2)
            engine.sleep()
            asleep, _ = torch.cuda.mem_get_info()
            assert before - asleep < 0.1 * total
            after = models[1] if model_dir == models[0] else models[0]
            assert engine.can_wake(after, max_model_len=MAX_MODEL_LEN)
            engine.wake(after, max_model_len=MAX_MODEL_LEN, reload=True)
    finally:
        engine.close()
