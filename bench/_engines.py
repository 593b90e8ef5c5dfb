"""What transformers itself does with the requests of our engine, at its best.

    python bench/_engines.py --requests 256

prints tokens/s of our own loop, of continuous batching and of static batches, in turn and with the
same model, requests and threads; `library_generate` is for other benches.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _report import commit, hardware, write
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from stages.engines.base import Request, Sampling
from stages.engines.transformers import TransformersEngine
from stages.model.load import best_device, load_model

Way = Literal["static", "continuous"]
PAD = 0
PAGE = 64  # positions a page: of 16, 64 and 256 the fastest here, with 64 rows and with 256
BATCH = 256  # rows decoded together, as in the engine's default


def library_generate(
    model_dir: Path,
    requests: Sequence[Request],
    sampling: Sampling,
    way: Way,
    *,
    batch_size: int = BATCH,
    model: Any = None,
) -> tuple[int, float]:
    """Answer requests with transformers alone; return the tokens that it drew, and the seconds.

    Loading is not counted. Seeds are not heeded, since the library has none a request.

    Args:
        way: `static` sorts by length and calls `generate` a batch, `continuous` is
            `generate_batch` with a cache that just holds `batch_size` rows: sized by default, on a
            CPU, it takes most of the memory and is slower by two orders of magnitude.
        model: the loaded model, else it is loaded here.
    """
    if model is None:
        model = load_model(model_dir, torch.float32).to(best_device())
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_token_ids) or None,
        pad_token_id=PAD,
    )
    began = time.monotonic()
    if way == "static":
        with torch.inference_mode():
            tokens = _static(model, requests, config, batch_size)
    else:  # which has a thread of its own, and updates what it made outside of inference mode
        tokens = _continuous(model, requests, config, batch_size)
    return tokens, time.monotonic() - began


def _static(
    model: Any, requests: Sequence[Request], config: GenerationConfig, batch_size: int
) -> int:
    stops = torch.tensor(config.eos_token_id or [], device=model.device)
    by_length = sorted((r.prompt_token_ids for r in requests), key=len, reverse=True)
    tokens = 0
    for at in range(0, len(by_length), batch_size):
        prompts = by_length[at : at + batch_size]
        width = len(prompts[0])
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
        )
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers = output[:, width:]
        ended = torch.isin(answers, stops).cumsum(1)
        # Up to the first stop token, with it: what follows is padding.
        tokens += int(((ended == 0) | ((ended == 1) & torch.isin(answers, stops))).sum())
    return tokens


def _continuous(
    model: Any, requests: Sequence[Request], config: GenerationConfig, batch_size: int
) -> int:
    longest = max(len(r.prompt_token_ids) for r in requests) + (config.max_new_tokens or 0)
    bounded = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=batch_size * -(-longest // PAGE),
        max_batch_tokens=max(512, 2 * batch_size),
        max_requests_per_batch=batch_size,
    )
    outputs = model.generate_batch(
        [r.prompt_token_ids for r in requests],
        generation_config=config,
        continuous_batching_config=bounded,
        progress_bar=False,
    )
    failed = [output.error for output in outputs.values() if output.error]
    if failed or len(outputs) != len(requests):
        raise RuntimeError(
            f"generate_batch answered {len(outputs)} of {len(requests)}: {failed[:1]}"
        )
    return sum(len(output.generated_tokens) for output in outputs.values())


def our_generate(
    model_dir: Path, requests: Sequence[Request], sampling: Sampling, batch_size: int = BATCH
) -> tuple[int, float]:
    """Answer requests with our own loop; return tokens and seconds, loading not counted."""
    longest = max(len(r.prompt_token_ids) for r in requests) + sampling.max_new_tokens
    engine = TransformersEngine(
        model_dir,
        dtype="float32",
        max_model_len=longest,
        batch_size=batch_size,
        pad_token_id=PAD,
    )
    began = time.monotonic()
    tokens = sum(len(done.token_ids) for done in engine.generate(requests, sampling))
    seconds = time.monotonic() - began
    engine.close()
    return tokens, seconds


def small_model(folder: Path, hidden_size: int = 256, layers: int = 4, vocab: int = 4096) -> Path:
    """Save a Llama with random weights; every answer ends by chance, or at the limit."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def mixed_requests(count: int, vocab: int = 4096, longest: int = 200) -> list[Request]:
    """Return prompts of 8 to `longest` tokens, most of them short."""
    rng = random.Random(0)
    lengths = [min(longest, 8 + int(rng.expovariate(1 / 50))) for _ in range(count)]
    return [
        Request(f"{i}", [rng.randrange(1, vocab) for _ in range(length)], i)
        for i, length in enumerate(lengths)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    requests = mixed_requests(arguments.requests)
    # One token in 48 ends an answer, so that lengths are spread up to the limit.
    sampling = Sampling(1.0, 1.0, 0, arguments.new_tokens, tuple(range(1, 4096, 48)))
    rates: dict[str, list[float]] = {"ours": [], "continuous": [], "static": []}
    with TemporaryDirectory() as folder:
        model_dir = small_model(Path(folder))
        for _ in range(arguments.repeats):
            for way, found in rates.items():
                size = arguments.batch_size
                if way == "ours":
                    tokens, seconds = our_generate(model_dir, requests, sampling, size)
                else:
                    kind: Way = "static" if way == "static" else "continuous"
                    tokens, seconds = library_generate(
                        model_dir, requests, sampling, kind, batch_size=size
                    )
                found.append(round(tokens / seconds, 1))
                print(f"{way:>10}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f}/s")
    report = {
        "hardware": hardware(best_device().type),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": 1,
        "requests": arguments.requests,
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.new_tokens,
        "tokens_per_s": rates,
        "ours_over_best_of_library": round(
            max(rates["ours"]) / max(*rates["continuous"], *rates["static"]), 3
        ),
    }
    print(f"ours over the best of the library's: {report['ours_over_best_of_library']}")
    write(report, arguments.json)


if __name__ == "__main__":
    main()
