"""One side of bench/train.py, in a process of its own: our two stages, or TRL's DPOTrainer.

A side is told `go` on stdin before each repetition, answers each with a line of JSON on stdout,
and sleeps in between, so that the sides can take turns. Repetition 0 is the warm-up; its losses
are those that are compared.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.artifacts import read_manifest
from stages.data.tokens import pair_tokens

BETA = 0.1
MATMUL_SIZE = 2048
FEW = 4
"""Pairs that tell what score costs whatever the number of pairs."""


@dataclass(frozen=True)
class Spec:
    """What a side is told."""

    side: str
    """ours, t0 or t1."""
    model: str
    pairs: str
    few_pairs: str
    """The same as `pairs`, for FEW of them."""
    folder: str
    """The side's own place for files."""
    device: str
    precision: str
    batch: int
    """Pairs an optimizer step."""
    order: list[int]
    """Pairs in the order of our first epoch."""
    learning_rate: float
    repetitions: int
    """After the warm-up."""
    overrides: list[str] = field(default_factory=list)
    """Ours: `section.key=value`."""
    whole_head: bool = False
    """Ours: the head in one chunk, whatever its size."""
    micro: int = 8
    """TRL: pairs a forward pass."""
    dpo: dict[str, Any] = field(default_factory=dict)
    """TRL: further arguments of DPOConfig."""

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(path: Path) -> "Spec":
        """Read what `write` wrote."""
        return Spec(**json.loads(path.read_text()))


class Channel:
    """The line to the parent; whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._wall = self._cpu = 0.0

    def wait(self) -> None:
        """Sleep until the next repetition may begin."""
        if sys.stdin.readline() != "go\n":
            raise SystemExit("the parent is gone")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def send(self, **answer: Any) -> None:
        """Answer a repetition, with its wall and CPU time as a whole."""
        cpu_s, wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self._out.write(json.dumps(answer | {"cpu_s": cpu_s, "wall_s": wall_s}) + "\n")


def run_side(spec: Spec) -> None:
    """Serve one side until its repetitions are done."""
    channel = Channel()
    Path(spec.folder).mkdir(parents=True, exist_ok=True)
    if spec.side == "ours":
        _run_ours(spec, channel)
    else:
        _run_trl(spec, channel)


def _run_ours(spec: Spec, channel: Channel) -> None:
    """Run the score and the train stage, each as a command would.

    Counted: what score takes for all pairs, less what it takes for few of them (loading, its
    check of four rows against the slow twin), scaled up by the few; and all steps of train's
    second epoch, as timings.parquet has them. Not counted, as on the other side: loading; nor the
    checks before step 0 and saving, which the other side does not do: once a stage, whatever the
    number of pairs. `outside_s` is all that train does beside its steps.
    """
    from stages.objective import logprobs

    if spec.whole_head:
        logprobs.CPU_CHUNK_LOGITS = logprobs.CUDA_CHUNK_LOGITS = 1 << 50
    for repetition in range(1 + spec.repetitions):
        channel.wait()
        folder = Path(spec.folder, f"repetition-{repetition}")
        answer = _our_repetition(spec, folder, warm_up=repetition == 0)
        shutil.rmtree(folder)
        channel.send(**answer)


def _our_repetition(spec: Spec, folder: Path, *, warm_up: bool) -> dict[str, Any]:
    from stages import score, train
    from stages.recipe import load_recipe

    num_pairs, steps = len(spec.order), len(spec.order) // spec.batch
    settings = [
        "chat.template=plain",
        f"score.precision={spec.precision}",
        f"train.precision={spec.precision}",
        f"train.beta={BETA}",
        f"train.learning_rate={spec.learning_rate}",
        "train.schedule=constant",
        "train.warmup_steps=0",
        f"train.batch_size={spec.batch}",
        f"train.epochs={1 if warm_up else 2}",
        # On a GPU steps are timed between two readings: one must come at the epoch's end.
        f"train.log_every={max(n for n in range(1, 11) if steps % n == 0)}",
    ]
    config = load_recipe(None, [*settings, *spec.overrides]).for_iteration(None)

    def score_pairs(pairs: str, name: str) -> Any:
        return score.run(config, score.ScoreInputs(Path(pairs), spec.model), folder / name)

    peak_flops = [_matmul_flops(spec)]
    few_s, peak_bytes = _timed(lambda: score_pairs(spec.few_pairs, "few")), _peak_bytes(spec)
    all_s = _timed(lambda: score_pairs(spec.pairs, "score"))
    peak_bytes = max(peak_bytes, _peak_bytes(spec))  # every stage starts it anew
    inputs = train.TrainInputs(folder / "score", spec.model)
    whole_s = _timed(lambda: train.run(config, inputs, folder / "train"))
    peak_bytes = max(peak_bytes, _peak_bytes(spec))
    peak_flops.append(_matmul_flops(spec))
    seconds = pq.read_table(folder / "train/timings.parquet")["seconds"].to_pylist()
    losses = pq.read_table(folder / "train/metrics.parquet")["loss"].to_pylist()
    return {
        "reference_s": max(0.0, all_s - few_s) * num_pairs / (num_pairs - FEW),
        "train_s": sum(seconds[0 if warm_up else steps :]),
        "outside_s": whole_s - sum(seconds),
        "losses": losses[:steps],
        "peak_flops": peak_flops,
        "peak_bytes": peak_bytes,
        "settings": {
            "attention": read_manifest(folder / "train").info["attention"],
            "token_budget": config.train.token_budget,
            "optimizer": config.train.optimizer,
            "overrides": spec.overrides,
        },
    }


def _run_trl(spec: Spec, channel: Channel) -> None:
    """Run DPOTrainer: one epoch a repetition.

    Counted: the epoch, and with stored reference log-probabilities the pass that computes them,
    done anew for every repetition. Not counted: loading, tokenizing (there is none), hashing.

    t1's rows are sorted by length before that pass, so that it too has little padding, and its
    epochs are drawn by transformers' own length-grouped sampling, with mega-batches as large as
    it makes them of big data sets (50 batches); of few rows it would make four.
    """
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    best = spec.side == "t1"
    rows = [pair_tokens(row) for row in _read_rows(Path(spec.pairs))]
    lengths = [len(row.prompt) + max(len(row.chosen), len(row.rejected)) for row in rows]
    order = sorted(spec.order, key=lambda i: -lengths[i]) if best else spec.order
    columns: dict[str, list[Any]] = {
        "prompt_ids": [rows[i].prompt for i in order],
        "chosen_ids": [rows[i].chosen for i in order],
        "rejected_ids": [rows[i].rejected for i in order],
    }
    if best:
        columns["length"] = [lengths[i] for i in order]
    dataset = Dataset.from_dict(columns)
    place = {number: position for position, number in enumerate(order)}
    first_epoch = [place[number] for number in spec.order]
    generator = torch.Generator().manual_seed(0)

    def later_epoch() -> list[int]:
        if not best:
            drawn: list[int] = torch.randperm(len(order), generator=generator).tolist()
            return drawn
        from transformers.trainer_pt_utils import get_length_grouped_indices

        mega_batch = min(50, len(order) // spec.batch)
        grouped: list[int] = get_length_grouped_indices(
            columns["length"], spec.batch, mega_batch, generator
        )
        return grouped

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenized already

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Orders(first_epoch, later_epoch)

    class Repetitions(transformers.TrainerCallback):
        """Takes the time of every epoch, and waits for the other sides in between."""

        trainer: Any
        repetition = 0
        reference_s = started = 0.0

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.repetition:
                channel.wait()
                self.reference_s = self._reference_pass(args) if best else 0.0
            _synchronize(spec)
            self.started = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _synchronize(spec)
            train_s = time.perf_counter() - self.started
            history = [entry["loss"] for entry in state.log_history if "loss" in entry]
            channel.send(
                reference_s=self.reference_s,
                train_s=train_s,
                losses=history[: len(spec.order) // spec.batch],
                peak_bytes=_peak_bytes(spec),
                settings=settings,
            )
            state.logging_steps = 10  # its default again; only the first losses are compared
            self.repetition += 1

        def _reference_pass(self, args: Any) -> float:
            # Another hash is another cache file: the values are computed anew, and thrown away.
            self.trainer._precompute_model_hash = f"repetition {self.repetition}"
            _synchronize(spec)
            return _timed(
                lambda: self.trainer._precompute_ref_logps(
                    dataset, "train", args.precompute_ref_batch_size
                )
            )

    channel.wait()
    options = trl_options(spec)
    attention = options.pop("attn_implementation")
    timer = Repetitions()
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=torch.float32, attn_implementation=attention
        ),
        args=DPOConfig(**options),
        train_dataset=dataset,
        processing_class=transformers.AutoTokenizer.from_pretrained(spec.model),
        callbacks=[timer],
    )
    timer.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    args = trainer.args
    settings = {
        "attn_implementation": attention,
        "optim": str(getattr(args.optim, "value", args.optim)),
        **{name: getattr(args, name) for name in SHOWN_ARGUMENTS},
        **spec.dpo,
    }
    trainer.train()


SHOWN_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "train_sampling_strategy",
    "bf16",
    "use_liger_kernel",
)


def trl_options(spec: Spec) -> dict[str, Any]:
    """Return DPOConfig's arguments, and `attn_implementation` for the model."""
    micro = min(spec.micro, spec.batch)
    common = {
        "output_dir": str(Path(spec.folder, "output")),
        "attn_implementation": "sdpa",
        "beta": BETA,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1 + spec.repetitions,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch // micro,
        "bf16": spec.precision == "bf16",
        "use_cpu": spec.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if spec.side == "t0":
        return common | spec.dpo
    flash, liger = (
        spec.device == "cuda" and importlib.util.find_spec(name) is not None
        for name in ("flash_attn", "liger_kernel")
    )
    best = {
        "use_liger_kernel": liger,
        "attn_implementation": "flash_attention_2" if flash else "sdpa",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": micro if spec.device == "cpu" else 2 * micro,
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
    }
    return common | best | spec.dpo


class Orders:
    """A sampler whose first epoch is given, and whose later ones are drawn."""

    def __init__(self, first: list[int], later: Callable[[], list[int]]) -> None:
        self._next, self._later = first, later

    def __len__(self) -> int:
        return len(self._next)

    def __iter__(self) -> Iterator[int]:
        order, self._next = self._next, self._later()
        return iter(order)


def _read_rows(artifact: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(artifact / "part-00000.parquet").to_pylist()
    return rows


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _synchronize(spec: Spec) -> None:
    if spec.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_bytes(spec: Spec) -> int:
    """Return the peak of the process's memory, or of what it had allocated on the GPU."""
    if spec.device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak too
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _matmul_flops(spec: Spec) -> float:
    """Return the rate of a plain matrix product in the run's precision, the best of a few."""
    import torch

    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right = (torch.randn(shape, device=spec.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        _synchronize(spec)
        started = time.perf_counter()
        torch.mm(left, right)
        _synchronize(spec)
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(seconds)
