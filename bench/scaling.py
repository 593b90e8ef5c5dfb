"""How training scales over processes: measured where it runs, predicted for 1 to 64 GPUs.

    python bench/scaling.py --quick --json FILE
    python bench/scaling.py --device cuda --gpus 1,2,4,8 --json FILE
    python bench/scaling.py --model-tables

Trains the same pairs of random tokens (bench/_traces.py) through the train stage: on a CPU with one
process of one thread, one of two threads, and two of one thread; with CUDA on each number of GPUs.
Losses are compared first; if they disagree the script ends with exit code 1. Counted are the steps
as timings.parquet has them, the first ones dropped; loading, checking and saving are not.

Efficiency is pairs/s over those of one process times the number of processes, or of threads.
Communication is an estimate: collectives of the very same sizes, timed by themselves.
`predicted` is what the written model says (docs/scaling.md, whose tables --model-tables prints). On
a CPU its compute rate is that of the first row, slowed by as much as matrix products slow down when
all processes do them at once; on GPUs it is the assumed one.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402
from _scaling import (  # noqa: E402
    H100,
    MFU,
    TRACE,
    Load,
    Machine,
    Message,
    Model,
    Setting,
    bytes_a_step,
    deal,
    messages,
    model_tables,
    step_seconds,
    work,
)
from _traces import (  # noqa: E402
    SHAPES,
    Shape,
    draw_pairs,
    gpu_peak,
    write_model,
    write_pairs,
)

from stages.data.tokens import PairTokens  # noqa: E402

LEARNING_RATE = 5e-4
"""High, so that losses move by far more than the tolerance within a few steps."""
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
MATMUL_SIZE = 2048
SEED = 0


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    batch: int
    warm_up: int
    """Steps that are dropped."""
    steps: int
    repetitions: int

    @property
    def pairs(self) -> int:
        """Pairs that are trained on, each once."""
        return self.batch * (self.warm_up + self.steps)


def default_size(device: str, *, quick: bool) -> Size:
    """Return what is measured unless arguments say otherwise."""
    if device == "cuda":
        return Size(64, 5, 5, 1) if quick else Size(64, 5, 15, 3)
    return Size(16, 1, 1, 1) if quick else Size(16, 1, 4, 3)


@dataclass(frozen=True)
class Ranks:
    """Processes, and threads of each."""

    processes: int
    threads: int

    @property
    def workers(self) -> int:
        """All threads; on GPUs there is one a process."""
        return self.processes * self.threads

    @property
    def name(self) -> str:
        return f"{self.processes} x {self.threads}"


@dataclass
class Measured:
    """What was seen of one number of processes."""

    step_s: list[float] = field(default_factory=list)
    """Mean of each repetition."""
    losses: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    """Peak of each rank's process."""
    gpu_bytes: int | None = None
    """Peak of what rank 0 had allocated."""
    cores: list[float] = field(default_factory=list)
    """Had on average by all ranks, loading included: fewer than threads on a busy machine."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpus", default="1,2,4,8", help="with cuda: numbers of GPUs")
    parser.add_argument("--model", choices=tuple(SHAPES), help="tiny on a CPU, else 0.5b")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on a CPU, else bf16")
    parser.add_argument("--quick", action="store_true", help="few steps, one repetition")
    parser.add_argument("--batch", type=int, help="pairs an optimizer step")
    parser.add_argument("--steps", type=int, help="steps that are timed")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--work", type=Path, help="folder for models and rows; default: temporary")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--model-tables", action="store_true", help="print docs/scaling.md's tables"
    )
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side)
    elif arguments.model_tables:
        for name, table in model_tables().items():
            print(f"<!-- {name} -->\n{table}\n")
    else:
        arguments.model = arguments.model or ("tiny" if arguments.device == "cpu" else "0.5b")
        default = "fp32" if arguments.device == "cpu" else "bf16"
        arguments.precision = arguments.precision or default
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure every number of processes in turns, print and write the figures."""
    bench = Bench(arguments, folder)
    bench.ask("prepare", 1, os.cpu_count() or 1)
    measured = {ranks: Measured() for ranks in bench.ranks}
    for _ in range(bench.size.repetitions):
        for ranks, found in measured.items():
            bench.add(ranks, found)
            compare_losses(measured, arguments.precision)
    probes = {
        processes: bench.ask("probe", processes, processes)
        for processes in sorted({ranks.processes for ranks in bench.ranks})
    }
    report = {
        "hardware": hardware(arguments.device),
        "commit": commit(),
        "device": arguments.device,
        "model": arguments.model,
        "precision": arguments.precision,
        "quick": arguments.quick,
        "overrides": arguments.set,
        "batch": bench.size.batch,
        "steps": bench.size.steps,
        "repetitions": bench.size.repetitions,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "loss_max_abs_diff": loss_difference(measured),
        "rows": [bench.row(ranks, measured, probes) for ranks in measured],
    }
    show(report["rows"])
    write(report, arguments.json)


class Bench:
    """One measurement: what is trained, and by whom."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        size = default_size(arguments.device, quick=arguments.quick)
        self.size = Size(
            arguments.batch or size.batch,
            size.warm_up,
            arguments.steps or size.steps,
            arguments.repetitions or size.repetitions,
        )
        self.arguments, self.folder = arguments, folder
        self.ranks = [Ranks(1, 1), Ranks(1, 2), Ranks(2, 1)]
        if arguments.device == "cuda":
            counts = [int(text) for text in arguments.gpus.split(",")]
            self.ranks = [Ranks(count, 1) for count in sorted(counts)]
        self.model = Model(arguments.model, SHAPES[arguments.model], is_tied=True)

    def ask(self, task: str, processes: int, threads: int) -> dict[str, Any]:
        """Let a process of its own do something; return its answer.

        Raises:
            SystemExit: it ended without one.
        """
        answer, log = self.folder / "answer.json", self.folder / f"{task}.log"
        answer.unlink(missing_ok=True)
        spec = {
            "task": task,
            "processes": processes,
            "folder": str(self.folder),
            "device": self.arguments.device,
            "precision": self.arguments.precision,
            "model": self.arguments.model,
            "overrides": self.arguments.set,
            "size": asdict(self.size),
        }
        (self.folder / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--side", str(self.folder / "spec.json")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("w") as out:
            subprocess.run(command, stdout=out, stderr=out, env=environment, check=False)
        if not answer.is_file():
            tail = "".join(log.read_text().splitlines(keepends=True)[-25:])
            raise SystemExit(f"bench/scaling.py: {task} of {processes} processes failed:\n{tail}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def add(self, ranks: Ranks, found: Measured) -> None:
        """Train once more with some ranks."""
        answer = self.ask("train", ranks.processes, ranks.workers)
        timed = answer["seconds"][self.size.warm_up :]
        found.step_s.append(sum(timed) / len(timed))
        found.losses = answer["losses"]
        found.memory_bytes = answer["memory_bytes"]
        found.gpu_bytes = answer["gpu_bytes"]
        found.cores.append(answer["cores"])

    def row(
        self,
        ranks: Ranks,
        measured: Mapping[Ranks, Measured],
        probes: Mapping[int, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return one number of processes' row of the table."""
        found, base = measured[ranks], next(iter(measured))
        base_s, step_s = (statistics.median(measured[r].step_s) for r in (base, ranks))
        processes, setting, batches = ranks.processes, self.setting(), self.batches(ranks.processes)
        counts = [len(loads) for loads in batches]
        sent_s = statistics.fmean(
            sum(probe_seconds(probes[processes], self.model, setting, processes, count))
            for count in counts
        )
        sent_bytes = statistics.fmean(
            bytes_a_step(self.model, setting, processes, count, self.layer_bytes)
            for count in counts
        )
        predicted = None
        if self.arguments.device == "cuda" or ranks != base:  # a CPU's rate is that of its base
            machine = self.machine(ranks, base_s, probes)
            seconds = statistics.fmean(
                step_seconds(self.model, setting, processes, loads, machine, self.layer_bytes)
                for loads in batches
            )
            seconds += sent_s if self.arguments.device == "cpu" else 0.0
            predicted = round(self.size.batch / seconds, 3)
        return {
            "processes": processes,
            "threads": ranks.threads,
            "pairs_per_s": round(self.size.batch / step_s, 3),
            "efficiency": round(base_s * base.workers / step_s / ranks.workers, 3),
            "predicted_pairs_per_s": predicted,
            "communication_s": round(sent_s, 4),
            "communication_share": round(sent_s / step_s, 4),
            "bytes_a_step": round(sent_bytes),
            "micro_batches": statistics.fmean(counts),
            "step_s": [round(seconds, 4) for seconds in found.step_s],
            "cores": [round(cores, 2) for cores in found.cores],
            "memory_bytes": found.memory_bytes,
            "gpu_bytes": found.gpu_bytes,
            "probe": dict(probes[processes]),
            "losses": [round(loss, 6) for loss in found.losses],
        }

    @property
    def layer_bytes(self) -> int:
        """Of a gathered weight of a layer."""
        return 2 if self.arguments.precision == "bf16" else 4

    def setting(self) -> Setting:
        """Return what the overrides say of sharding."""
        config = recipe_config(self.arguments.device, 1, self.size, self.arguments.set).train
        sharding = config.sharding
        return Setting(
            config.activation_checkpointing,
            sharding.group_size,
            sharding.reshard_after_forward,
            sharding.cpu_offload,
        )

    def batches(self, processes: int) -> list[list[list[Load]]]:
        """Return the loads of the steps that are timed."""
        from stages.data.store import epoch_order

        config = recipe_config(self.arguments.device, 1, self.size, self.arguments.set)
        pairs = self.pairs()
        order = [pairs[int(row)] for row in epoch_order(len(pairs), config.seed, 0)]
        size = self.size
        starts = range(size.warm_up * size.batch, size.pairs, size.batch)
        budget = config.train.token_budget
        return [deal(order[s : s + size.batch], processes, budget) for s in starts]

    def pairs(self) -> list[PairTokens]:
        """Return what is trained on."""
        return draw_pairs(TRACE, self.size.pairs, self.model.shape.vocab_size, SEED)

    def machine(
        self, ranks: Ranks, one_s: float, probes: Mapping[int, Mapping[str, Any]]
    ) -> Machine:
        """Return what the written model is to run on."""
        if self.arguments.device == "cuda":
            peak = gpu_peak(hardware("cuda"))
            return replace(H100, flops=MFU * peak) if peak else H100
        batches = self.batches(1)
        works = [
            work(self.model, self.setting(), load)
            for batch in batches
            for loads in batch
            for load in loads
        ]
        done = sum(w.forward + w.backward for w in works) / len(batches)
        busy = probes[ranks.processes]["matmul_flops"] / probes[1]["matmul_flops"]
        # Communication is timed, not modelled, and nothing overlaps where cores do both.
        rate = done / one_s * ranks.threads * min(1.0, busy)
        return Machine(rate, math.inf, math.inf, overlaps=False)


def compare_losses(measured: Mapping[Ranks, Measured], precision: str) -> None:
    """Compare the losses that are there.

    Raises:
        SystemExit: they disagree.
    """
    worst = loss_difference(measured)
    if not worst <= LOSS_TOLERANCE[precision]:
        curves = "\n".join(f"{ranks.name}: {found.losses}" for ranks, found in measured.items())
        raise SystemExit(
            f"bench/scaling.py: losses differ by {worst:.2e}, more than "
            f"{LOSS_TOLERANCE[precision]}: the processes do not compute the same\n{curves}"
        )


def loss_difference(measured: Mapping[Ranks, Measured]) -> float:
    """Return the largest difference from the first curve's losses."""
    curves = [found.losses for found in measured.values() if found.losses]
    pairs = [pair for curve in curves[1:] for pair in zip(curves[0], curve, strict=True)]
    gaps = [abs(a - b) for a, b in pairs]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=0.0)


def probe_seconds(
    probe: Mapping[str, Any], model: Model, setting: Setting, processes: int, micro_batches: int
) -> Iterator[float]:
    """Yield the seconds of a step's collectives, from what one of each size took."""
    for number in range(micro_batches):
        is_last = number + 1 == micro_batches
        for message in messages(model, setting, processes, is_last=is_last):
            part = "outer" if message.exposed else "layer"
            yield message.count * float(probe[f"{message.kind} {part}"])


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    heads = ("proc x thr", "pairs/s", "predicted", "efficiency", "commun.", "MB sent", "MiB a rank")
    print("  ".join(f"{head:>10}" for head in heads))
    for row in rows:
        cells = (
            f"{row['processes']} x {row['threads']}",
            f"{row['pairs_per_s']:.2f}",
            f"{row['predicted_pairs_per_s']:.2f}" if row["predicted_pairs_per_s"] else "-",
            f"{row['efficiency']:.0%}",
            f"{row['communication_share']:.1%}",
            f"{row['bytes_a_step'] / 1e6:,.0f}",
            " ".join(f"{peak / 2**20:,.0f}" for peak in row["memory_bytes"]),
        )
        print("  ".join(f"{cell:>10}" for cell in cells), flush=True)


# -- One process of the measurement ---------------------------------------------------------------


def recipe_config(device: str, processes: int, size: Size, overrides: Sequence[str]) -> Any:
    """Return the config of a run."""
    from stages.recipe import load_recipe

    settings = [
        f"seed={SEED}",
        "chat.template=plain",
        f"train.device={device}",
        f"train.processes={processes}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.schedule=constant",
        "train.warmup_steps=0",
        f"train.batch_size={size.batch}",
        f"train.log_every={size.warm_up}",
    ]
    return load_recipe(None, [*settings, *overrides]).for_iteration(None)


def run_side(path: Path) -> None:
    """Do one task, and write its answer beside the spec."""
    spec = json.loads(path.read_text())
    size = Size(**spec["size"])
    folder = Path(spec["folder"])
    overrides = [f"{stage}.precision={spec['precision']}" for stage in ("score", "train")]
    overrides += spec["overrides"]
    config = recipe_config(spec["device"], spec["processes"], size, overrides)
    shape = SHAPES[spec["model"]]
    if spec["task"] == "prepare":
        answer = _prepare(folder, shape, size, config, spec["device"])
    elif spec["task"] == "train":
        answer = _train(folder, config)
    else:
        from stages.model.group import together

        job = Probe(Model(spec["model"], shape, is_tied=True), spec["precision"], config.train)
        answer = together(probe_collectives, job, config.train)
    scratch = folder / "answer.tmp"
    scratch.write_text(json.dumps(answer))
    scratch.rename(folder / "answer.json")


def _prepare(folder: Path, shape: Shape, size: Size, config: Any, device: str) -> dict[str, Any]:
    """Write model and scored pairs."""
    from stages import score

    write_model(shape, folder / "model", device)
    write_pairs(draw_pairs(TRACE, size.pairs, shape.vocab_size, SEED), folder / "pairs")
    inputs = score.ScoreInputs(folder / "pairs", str(folder / "model"))
    score.run(config, inputs, folder / "score")
    return {}


def _train(folder: Path, config: Any) -> dict[str, Any]:
    """Train once, from the start."""
    import shutil

    import pyarrow.parquet as pq

    from stages import train

    shutil.rmtree(folder / "train", ignore_errors=True)
    inputs = train.TrainInputs(folder / "score", str(folder / "model"))
    wall, cpu = time.perf_counter(), _cpu_seconds()
    with PeakMemory() as peaks:
        manifest = train.run(config, inputs, folder / "train")
    return {
        "cores": (_cpu_seconds() - cpu) / (time.perf_counter() - wall),
        "seconds": pq.read_table(folder / "train/timings.parquet")["seconds"].to_pylist(),
        "losses": pq.read_table(folder / "train/metrics.parquet")["loss"].to_pylist(),
        "memory_bytes": [manifest.cost.peak_memory_bytes, *peaks.found()[1:]],
        "gpu_bytes": manifest.info.get("peak_gpu_memory_bytes"),
    }


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its ranks that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


class PeakMemory:
    """Looks at the peak memory of this process's ranks until they end."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def found(self) -> list[int]:
        """Return the peaks in bytes, in the order in which the ranks were started."""
        return [self._peaks[process] for process in sorted(self._peaks)]

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for process in _children():
                try:
                    if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                        status = Path(f"/proc/{process}/status").read_text()
                        peak = status.partition("VmHWM:")[2].split()
                        self._peaks[process] = int(peak[0]) * 1024
                except (OSError, IndexError):
                    continue  # it has just ended


def _children() -> list[int]:
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # not on Linux: the other ranks' memory stays unknown
        return []
    return [int(part) for part in text.split()]


@dataclass(frozen=True)
class Probe:
    """What is timed by itself."""

    model: Model
    precision: str
    train: Any


def probe_collectives(job: Probe) -> dict[str, float]:
    """Return the seconds of one collective of each size, and the rate of a matrix product.

    All ranks multiply at the same time.
    """
    import torch

    from stages.model.group import open_group

    group = open_group(job.train)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    found = {"matmul_flops": _matmul_flops(group, dtype)}
    if group.num_ranks == 1:
        return found
    sharding = job.train.sharding
    setting = Setting(group_size=sharding.group_size)
    for message in messages(
        job.model, setting, group.num_ranks, is_last=True, layer_bytes=dtype.itemsize
    ):
        name = f"{message.kind} {'outer' if message.exposed else 'layer'}"
        if name not in found:
            found[name] = _collective_seconds(group, message)
    return found


def _collective_seconds(group: Any, message: Message) -> float:
    import torch
    import torch.distributed as dist

    ranks = dist.new_group(list(range(message.ranks)))
    if group.rank >= message.ranks:
        group.highest(0)
        return 0.0
    share = -(-message.size_bytes // 4 // message.ranks)
    whole = torch.zeros(share * message.ranks, device=group.device)
    part = torch.zeros(share, device=group.device)

    def once() -> None:
        if message.kind == "gather":
            dist.all_gather_into_tensor(whole, part, group=ranks)
        elif message.kind == "reduce":
            dist.reduce_scatter_tensor(part, whole, group=ranks)
        else:
            dist.all_reduce(whole, group=ranks)

    once()
    seconds = [_seconds(group, once) for _ in range(5)]
    group.highest(0)
    return statistics.median(seconds)


def _matmul_flops(group: Any, dtype: Any) -> float:
    import torch

    shape = (MATMUL_SIZE, MATMUL_SIZE)
    left, right = (torch.randn(shape, device=group.device).to(dtype) for _ in range(2))
    group.highest(0)
    seconds = [_seconds(group, lambda: torch.mm(left, right)) for _ in range(8)]
    group.highest(0)
    return 2 * MATMUL_SIZE**3 / statistics.median(seconds)


def _seconds(group: Any, once: Any) -> float:
    import torch

    if group.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    once()
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
