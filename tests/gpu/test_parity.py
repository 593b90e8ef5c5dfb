"""The parity gate on a GPU: both precisions, by the kernels of training, and no memory left."""

from pathlib import Path

import pytest
import torch

from stages.config import EngineConfig, ForwardConfig, ParityConfig
from stages.engines.base import Request, Sampling
from stages.engines.transformers import TransformersEngine
from stages.model.parity import check_parity
from stages.model.parity_gap import Answered
from tests.families import PAD, VOCABULARY, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_engines_answers_pass(tmp_path: Path, family: str, dtype: str) -> None:
    tiny_model(family, attention="eager").save_pretrained(tmp_path)
    engine = TransformersEngine(
        tmp_path, dtype=dtype, max_model_len=64, batch_size=16, pad_token_id=PAD
    )
    asked = {f"p{i}": list(range(1, 5 + i)) for i in range(12)}
    requests = [Request(name, prompt, i) for i, (name, prompt) in enumerate(asked.items())]
    done = list(engine.generate(requests, Sampling(1, 1, 0, 24, (VOCABULARY - 1,))))
    engine.close()
    rows = [
        Answered(a.request_id, 0, asked[a.request_id], a.token_ids, a.token_logprobs) for a in done
    ]
    before = torch.cuda.memory_allocated()
    report = check_parity(
        tmp_path,
        rows,
        ParityConfig(),
        EngineConfig(dtype=dtype),  # type: ignore[arg-type]
        forward=ForwardConfig(),
        pad_token_id=PAD,
        where="generate",
    )
    assert report is not None
    assert report.precision == ("fp32" if dtype == "float32" else "bf16")
    assert torch.cuda.memory_allocated() == before
