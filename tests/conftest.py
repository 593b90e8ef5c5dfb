"""Settings and fixtures that all tests share."""

import os

# Before torch is imported, and inherited by the processes that tests start: results that are
# compared bit for bit must not depend on the number of cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A test's time says more of the machine's other work than of the test.
settings.register_profile("spin", deadline=None)
settings.load_profile("spin")

SENTENCES = (
    "user: Ann has 12 cups, buys 7. How many?",
    "assistant: 12+7=19. #### 19",
    "user: Ben has 40 pens, gives 8, finds 3. How many?",
    "assistant: 40-8=32. 32+3=35. #### 35",
    "What is the capital of France? The capital of France is Paris.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


SLOW_FIRST = ("pipeline", "faults", "parity", "browser")
"""Folders whose files take minutes: begun last, one of them would run alone for as long."""


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 32 with random weights, the same in every session.

    A plain Hugging Face folder: weights as safetensors, byte-level tokenizer with `</s>` as its
    end and pad token apart, chat template, generation config. Not to be written to.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from stages.model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU without one, and put slow folders first; make test keeps this order."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FIRST)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _no_process_group_outlives_its_test() -> Iterator[None]:
    """A stage that offloads joins a group of itself for as long as its process lives."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_test() -> Iterator[None]:
    """The command line adds a handler to the log; the next test must not write to it."""
    yield
    logging.getLogger("spin").handlers.clear()
