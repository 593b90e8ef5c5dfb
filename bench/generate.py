"""Claim: `spin generate` keeps an engine as busy as the bare engine is on the same requests.

    python bench/generate.py --engine vllm --quick --json FILE
    python bench/generate.py --engine transformers --quick
    python bench/generate.py --engine fake --json FILE

The same prompts, token for token, with the same sampling parameters and a seed a row, go through
the stage and through the bare engine, each in a process of its own, in turns. `tokens_per_s` counts
response tokens from the first request that the engine pulls to the last answer that the stage has
taken, with all the stage does in between: text, Parquet, hashes. Not counted on either side: the
start of the engine, one warm-up call, and, for the stage, rendering before and committing after
(`stage_s` has the whole). Rates are those of the median repetition.

- **vllm**: bare is `LLM.generate` with token ids, no detokenizing, the arguments of our engine.
- **transformers**: bare is the fastest of that library's own ways (bench/_engines.py).
- **fake**: an engine that answers at once; bare is that engine alone. What counts is `rows_per_s`
  of the whole stage, rendering and commit included, and its memory at a tenth of the rows;
  `answered_per_s` leaves rendering out, `rows_per_s_4_samples` asks each prompt four times, and
  `tokenizer_per_s` is the library's own call alone on the same prompts.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402

from stages.engines.base import Completion, Engine, Request, Sampling  # noqa: E402

ENGINES = ("vllm", "transformers", "fake")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUM_STOPS = 16
"""Of 2,048 tokens: random weights then stop after 128 tokens on average, each row elsewhere."""
FAKE_TOKENS = 16
MOST_WORDS = 400


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--quick", action="store_true", help="fewer rows, one repetition")
    parser.add_argument("--rows", type=int, help="prompts")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--model", help="a model folder [default: random weights of --shape]")
    parser.add_argument(
        "--shape",
        choices=("tiny", "0.5b", "1.5b", "3b"),
        default="tiny",
        help="a Qwen2 of 8M weights, or one of Qwen2.5's shapes",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = Path(folder)
        report = measure_fake(arguments) if arguments.engine == "fake" else measure(arguments)
    told = {
        "hardware": hardware(arguments.device),
        "commit": commit(),
        "engine": arguments.engine,
        **report,
    }
    write(told, arguments.json)
    print(json.dumps(told, indent=1))


# -- Real engines ---------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the stage and the bare engine in turns."""
    default = (
        {"vllm": 256, "transformers": 128}
        if arguments.quick
        else {"vllm": 2048, "transformers": 512}
    )
    arguments.rows = arguments.rows or default[arguments.engine]
    repetitions = arguments.repetitions or (1 if arguments.quick else 3)
    prepare(arguments, median_words=60)
    stage, bare = [], []
    for _ in range(repetitions):
        stage.append(run_side("stage", arguments))
        bare.append(run_side("bare", arguments))
    rate, bare_rate = median(stage), median(bare)
    return {
        "tokens_per_s": round(rate, 1),
        "bare_tokens_per_s": round(bare_rate, 1),
        "ratio": round(rate / bare_rate, 3),
        "rows": arguments.rows,
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stage),
        "max_new_tokens": arguments.max_new_tokens,
        "repetitions": repetitions,
        "stage_s": [s["stage_s"] for s in stage],
        "stage": stage,
        "bare": bare,
    }


def median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["tokens"] / run["seconds"] for run in runs)


def run_side(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--engine", arguments.engine, "--side", side]
    command += ["--work", str(arguments.work), "--rows", str(arguments.rows)]
    command += ["--max-new-tokens", str(arguments.max_new_tokens), "--device", arguments.device]
    command += ["--quick"] if arguments.quick else []
    command += ["--model", str(arguments.model), "--samples", str(arguments.samples)]
    environment = dict(os.environ)
    if side == "bare" and arguments.engine == "vllm":
        from stages.engines.vllm import child_environment, is_cpu_build

        environment = child_environment(is_cpu_build(), eager=is_cpu_build())
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=ROOT
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


class Timed:
    """Lends another engine, and remembers when it was first asked and last answered."""

    def __init__(self) -> None:
        self.first_s = self.last_s = 0.0
        self.tokens = 0

    def open(self, *arguments: Any, **settings: Any) -> Engine:
        """Stand in for `open_engine`."""
        from stages.engines import open_engine

        self._engine = open_engine(*arguments, **settings)
        sampling = Sampling(1.0, 1.0, 0, 8, ())
        for _ in self._engine.generate([Request("warm", [1, 2, 3], 1)] * 1, sampling):
            pass
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        self.first_s = self.first_s or time.perf_counter()
        for answer in self._engine.generate(requests, sampling):
            self.tokens += len(answer.token_ids)
            yield answer
            self.last_s = time.perf_counter()

    def close(self) -> None:
        self._engine.close()


def run_stage(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the stage; keep what it asked, for the bare engine."""
    from stages import generate
    from stages.artifacts import read_rows
    from stages.data.rows import GENERATIONS

    out, timed = arguments.work / f"out-{time.monotonic_ns()}", Timed()
    inputs = generate.GenerateInputs(model=str(arguments.model), data=arguments.work / "data")
    started = time.perf_counter()
    manifest = generate.run(recipe(arguments), inputs, out, open_engine=timed.open)
    stage_s = time.perf_counter() - started
    columns = ["prompt_token_ids", "seed"]
    rows = read_rows(sorted(out.glob("part-*.parquet")), GENERATIONS, columns=columns)
    requests = [[row["prompt_token_ids"], row["seed"]] for row in rows]
    stops = list(stop_tokens(arguments))
    asked = {"requests": requests, "max_model_len": manifest.info["max_model_len"], "stops": stops}
    (arguments.work / "requests.json").write_text(json.dumps(asked))
    return {
        "tokens": timed.tokens,
        "seconds": timed.last_s - timed.first_s,
        "stage_s": round(stage_s, 2),
        "peak_memory_bytes": manifest.cost.peak_memory_bytes,
    }


def run_bare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the bare engine on what the stage asked."""
    asked = json.loads((arguments.work / "requests.json").read_text())
    sampling = Sampling(1.0, 1.0, 0, arguments.max_new_tokens, tuple(asked["stops"]))
    requests = [
        Request(str(number), tokens, seed)
        for number, (tokens, seed) in enumerate(asked["requests"])
    ]
    if arguments.engine == "vllm":
        return bare_vllm(arguments, requests, sampling, asked["max_model_len"])
    return bare_transformers(arguments, requests, sampling)


def bare_vllm(
    arguments: argparse.Namespace, requests: list[Request], sampling: Sampling, max_model_len: int
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    from stages.engines.vllm import engine_arguments, sampling_arguments

    settings = recipe(arguments).generate.engine
    llm = LLM(**engine_arguments(Path(arguments.model), settings, max_model_len))

    def answer(some: list[Request]) -> int:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=request.prompt_token_ids) for request in some],
            [SamplingParams(**sampling_arguments(sampling, request.seed)) for request in some],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    answer(requests[:1])
    started = time.perf_counter()
    tokens = answer(requests)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def bare_transformers(
    arguments: argparse.Namespace, requests: list[Request], sampling: Sampling
) -> dict[str, Any]:
    from _engines import library_generate

    ways = {}
    for way in ("continuous",) if arguments.quick else ("continuous", "static"):
        tokens, seconds = library_generate(Path(arguments.model), requests, sampling, way)
        ways[way] = {"tokens": tokens, "seconds": round(seconds, 3)}
    best = max(ways, key=lambda way: ways[way]["tokens"] / ways[way]["seconds"])
    return {**ways[best], "way": best, "ways": ways}


# -- The fake engine ------------------------------------------------------------------------------


class Fake:
    """Answers at once with tokens that are there already."""

    def __init__(self) -> None:
        self._tokens = [[(17 * k + i) % 1500 + 300 for i in range(FAKE_TOKENS)] for k in range(256)]
        self._logprobs = [-(i + 1) / 8 for i in range(FAKE_TOKENS)]

    def open(self, *arguments: Any, **settings: Any) -> Engine:
        """Stand in for `open_engine`."""
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        self.first_s = time.perf_counter()
        for request in requests:
            tokens = self._tokens[request.seed % 256]
            yield Completion(request.request_id, tokens, self._logprobs, "length")

    def close(self) -> None:
        self.last_s = time.perf_counter()


def measure_fake(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the stage at a tenth of the rows, at all, and with four samples a prompt."""
    rows = arguments.rows or 200_000
    repetitions = arguments.repetitions or (1 if arguments.quick else 3)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, prompts, samples in (
        ("tenth", rows // 10, 1), ("whole", rows, 1), ("4 samples", rows // 4, 4),
    ):  # fmt: skip
        arguments.rows, arguments.samples = prompts, samples
        prepare(arguments, median_words=6)
        runs[name] = [run_side("fake", arguments) for _ in range(repetitions)]
    whole, four = (
        sorted(runs[name], key=lambda run: run["stage_s"])[repetitions // 2]
        for name in ("whole", "4 samples")
    )
    return {
        "tokens_per_s": round(whole["tokens"] / whole["stage_s"], 1),
        "bare_tokens_per_s": round(whole["tokens"] / whole["bare_s"], 1),
        "ratio": round(whole["bare_s"] / whole["stage_s"], 4),
        "rows": rows,
        "rows_per_s": round(rows / whole["stage_s"]),
        "answered_per_s": round(rows / whole["answer_s"]),
        "rows_per_s_4_samples": round(rows / four["stage_s"]),
        "tokenizer_per_s": round(rows / whole["tokenizer_s"]),
        "peak_memory_bytes": whole["peak_memory_bytes"],
        "peak_memory_bytes_tenth": max(run["peak_memory_bytes"] for run in runs["tenth"]),
        "repetitions": repetitions,
        "runs": runs,
    }


def run_fake(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch  # noqa: F401  as in a run of many stages, where libraries are imported once
    import transformers  # noqa: F401

    from stages import generate

    out, fake = arguments.work / f"out-{time.monotonic_ns()}", Fake()
    inputs = generate.GenerateInputs(model=str(arguments.model), data=arguments.work / "data")
    started = time.perf_counter()
    manifest = generate.run(recipe(arguments), inputs, out, open_engine=fake.open)
    stage_s, answer_s = time.perf_counter() - started, fake.last_s - fake.first_s
    rows = arguments.rows * arguments.samples
    requests = (Request(str(i), [1] * 20, i) for i in range(rows))
    started = time.perf_counter()
    for _ in fake.generate(requests, Sampling(1.0, 1.0, 0, FAKE_TOKENS, ())):
        pass
    bare_s = time.perf_counter() - started
    return {
        "tokens": rows * FAKE_TOKENS,
        "stage_s": round(stage_s, 3),
        "answer_s": round(answer_s, 3),
        "tokenizer_s": round(tokenizer_seconds(arguments), 3),
        "bare_s": bare_s,
        "prompt_tokens": manifest.cost.tokens - rows * FAKE_TOKENS,
        "peak_memory_bytes": manifest.cost.peak_memory_bytes,
    }


def tokenizer_seconds(arguments: argparse.Namespace) -> float:
    """Return what the tokenizers library alone takes for the prompts, in one call."""
    from transformers import AutoTokenizer

    from stages.artifacts import read_rows
    from stages.data.rows import PROMPTS

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_rows([arguments.work / "data" / "train-00000.parquet"], PROMPTS)
    texts = [
        f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        for row in rows
    ]
    started = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - started


SIDES = {"stage": run_stage, "bare": run_bare, "fake": run_fake}


# -- What is asked --------------------------------------------------------------------------------


def recipe(arguments: argparse.Namespace) -> Any:
    from stages.config import RunConfig

    engine = {} if arguments.engine == "fake" else {"name": arguments.engine}
    generate = {"max_new_tokens": arguments.max_new_tokens, "engine": engine}
    if arguments.engine == "fake":
        generate |= {"max_new_tokens": FAKE_TOKENS, "parity": {"rows": 0}}
        generate |= {"num_samples": arguments.samples}
    return RunConfig.model_validate({"generate": generate})


def stop_tokens(arguments: argparse.Namespace) -> tuple[int, ...]:
    from stages.data.chat import make_renderer

    return make_renderer(Path(arguments.model), recipe(arguments).chat).stop_token_ids


def prepare(arguments: argparse.Namespace, median_words: int) -> None:
    """Write the model, where none is named, and a data artifact of random words."""
    rng = random.Random(arguments.rows)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 7))) for _ in range(400)]
    if not arguments.model:
        arguments.model = arguments.work / "model"
        make_model(arguments.model, words, arguments.shape, arguments.device)
    texts = []
    for _ in range(arguments.rows):
        count = min(MOST_WORDS, max(1, round(rng.lognormvariate(0, 0.6) * median_words)))
        texts.append(" ".join(rng.choices(words, k=count)))
    write_data(arguments.work / "data", texts)


def make_model(folder: Path, words: list[str], name: str, device: str) -> None:
    import torch
    from _traces import SHAPES, model_config
    from transformers import AutoModelForCausalLM, GenerationConfig

    from stages.model.tokenizer import train_tokenizer

    rng = random.Random(0)
    corpus = [f"user {' '.join(rng.choices(words, k=40))} assistant" for _ in range(2000)]
    tokenizer = train_tokenizer(corpus, vocab_size=2040)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = model_config(SHAPES[name], **special)
    if name == "tiny":
        config.vocab_size = len(tokenizer)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    stops = [tokenizer.eos_token_id, *range(len(tokenizer) - NUM_STOPS - 2, len(tokenizer) - 3)]
    model.generation_config = GenerationConfig(**{**special, "eos_token_id": stops})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(place: Path, texts: list[str]) -> None:
    import shutil

    from stages.artifacts import Outcome, Plan, TableWriter, Workspace, produce
    from stages.data.rows import PROMPTS

    shutil.rmtree(place, ignore_errors=True)

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("train-00000.parquet"), PROMPTS) as table:
            for number, text in enumerate(texts):
                table.append(
                    {
                        "prompt_id": f"{number:032x}",
                        "messages": [{"role": "user", "content": text}],
                        "response": "x",
                        "source": "bench",
                        "source_row": number,
                    }
                )
        return Outcome(counts={"train": len(texts)})

    produce(place, Plan("prepare", 1, {"texts": len(texts)}, {}), fill)


if __name__ == "__main__":
    main()
