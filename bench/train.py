"""Claim: our trainer does the work of TRL's DPOTrainer faster and in less memory, to the same loss.

    python bench/train.py --device cpu --traces chat,math,rag --quick --json FILE
    python bench/train.py --device cuda --model 0.5b --traces chat --sweep --json FILE
    python bench/train.py --sides ours --breakdown

Three sides train the same pairs of random tokens (bench/_traces.py) from the same random weights,
with the same AdamW, rate, precision and global batch: **ours**, the score and the train stage as
commands call them; **T0**, DPOTrainer as it comes (live reference model, gradient checkpointing,
8 pairs a forward pass); **T1**, DPOTrainer at its best: reference log-probabilities precomputed
over rows sorted by length, no gradient checkpointing, fused AdamW, length-grouped sampling by an
own `length` column, the fastest attention, and the micro-batch that was fastest here (T1_MICRO);
`--sides ours,t0,t1,t1_8` adds T1 at 8 pairs a forward pass, DPOTrainer's own number.

First the losses of one epoch are compared, every global batch holding the same pairs on all sides;
they must agree, or the script ends with exit code 1. That epoch is also the warm-up, and dropped:
ten optimizer steps (--quick: fewer; the JSON says how many). Then each repetition times one epoch
over all pairs **and the reference pass**, the sides in turns (on a GPU each in a fresh process,
since they do not fit beside each other). Rates are those of the median repetition. What is counted
and what is not stands at `_run_ours` and `_run_trl` in bench/_sides.py.

Memory is the peak of the whole process, or what it had allocated on the GPU. `share_of_peak`:
floating-point operations that the training steps cannot do without, prompts counted once, against
a plain 2048^3 matrix product in the same process and precision (CPU) or the GPU's stated peak.

What was tried for T1, TRL 1.16, one CPU thread, fp32, pairs/s on chat (the machine was shared, so
rates are by CPU time, good to 10%):
- pairs a forward pass 1, 2, 4, 8: 0.56, 0.53, 0.43, 0.28; on math 1.87, 1.79, 1.21, 1.03. So 1: its
  head holds logits of all tokens of a forward pass several times over. --sweep searches anew, on
  two global batches, and every JSON with it has the figures.
- glibc told to keep freed memory (T1_ENVIRONMENT): 0.53 to 0.65, and 1,493 to 1,758 MiB. Taken,
  since T1 is to be fast. Our side gains nothing from it.
- torch_compile: 5 to 7% more, after 50 to 140 s of compiling. Left out, as ours does not compile
  either; `--dpo torch_compile=true` tries it.
- On a CPU its chunked head scores prompts and padding too, and no option changes that;
  `padding_free` is switched off in 1.16; FlashAttention and Liger's kernels need a GPU, and are
  taken there where they are installed.

--breakdown also runs our side with its parts added one after another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402
from _sides import FEW, Spec, run_side  # noqa: E402
from _traces import (  # noqa: E402
    MEDIANS,
    SHAPES,
    Shape,
    draw_pairs,
    forward_flops,
    gpu_peak,
    unique_tokens,
    write_model,
    write_pairs,
)

from stages.data.store import epoch_order  # noqa: E402
from stages.data.tokens import PairTokens  # noqa: E402

SIDES = ("ours", "t0", "t1")
AT_8 = "t1_8"
"""T1 with 8 pairs a forward pass, which is DPOTrainer's own number, and a plain environment."""
SEED = 0
LEARNING_RATES = {"tiny": 5e-4, "0.5b": 2e-5, "1.5b": 2e-5, "3b": 1e-5}
"""High for random weights, so that losses move by more than the tolerance within a few steps."""
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
BREAKDOWN: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("padded rows", {"attention": "padded", "log_every": "1"}, True),
    ("+ packing", {"attention": "packed", "log_every": "1"}, True),
    ("+ head in chunks", {"attention": "packed", "log_every": "1"}, False),
    ("+ shared prompts", {"attention": "shared", "log_every": "1"}, False),
    ("+ no synchronisation a step", {"attention": "shared"}, False),
)
"""Name, settings of train (score gets those it has), and whether the head is one chunk.

Padded rows have logits of every token; in one chunk means those of all response tokens at once.
Loading ahead of the computation has no switch of its own.
"""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    pairs: int
    batch: int
    repetitions: int


def default_size(device: str, trace: str, quick: bool) -> Size:
    """Return what is measured unless arguments say otherwise."""
    if device == "cuda":
        return Size(pairs=96, batch=32, repetitions=1) if quick else Size(320, 32, 3)
    if trace == "math":
        return Size(pairs=32, batch=16, repetitions=1) if quick else Size(160, 16, 3)
    return Size(pairs=12, batch=6, repetitions=1) if quick else Size(80, 8, 3)


T1_MICRO = {"cpu": 1, "cuda": 8}
"""Pairs a forward pass with which T1 is fastest; that of CUDA is a guess: use --sweep there."""
SWEPT = {"cpu": (1, 2, 4, 8), "cuda": (2, 4, 8, 16, 32)}
T1_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
"""Without it a fifth of T1's time on a CPU goes into pages that are returned and fetched again."""
OURS = {"cpu": ("train.token_budget=2048", "score.token_budget=2048"), "cuda": ()}
"""Our settings that are no defaults: on a CPU 2,048 tokens are as fast as 8,192, in less memory."""


@dataclass
class Measured:
    """What one side did on one trace."""

    reference_s: list[float] = field(default_factory=list)
    train_s: list[float] = field(default_factory=list)
    outside_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, answer: Mapping[str, Any], *, warm_up: bool) -> None:
        """Take a repetition's answer; of the warm-up only losses, memory and settings."""
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        self.settings = answer["settings"]
        if warm_up:
            self.losses = answer["losses"]
            return
        self.reference_s.append(answer["reference_s"])
        self.train_s.append(answer["train_s"])
        self.cpu_s.append(answer["cpu_s"])
        self.wall_s.append(answer["wall_s"])
        self.outside_s += [answer["outside_s"]] if "outside_s" in answer else []
        self.peak_flops += answer.get("peak_flops", [])

    @property
    def cores(self) -> list[float]:
        """Cores that each repetition had, on average: fewer than threads on a shared machine."""
        return [cpu / wall for cpu, wall in zip(self.cpu_s, self.wall_s, strict=True)]

    @property
    def seconds(self) -> list[float]:
        """Each repetition's seconds for all pairs, reference pass included."""
        return [a + b for a, b in zip(self.reference_s, self.train_s, strict=True)]


class Session:
    """A side's process."""

    def __init__(self, name: str, spec: Spec, folder: Path, threads: int) -> None:
        self._name = name
        self._log = folder / f"{name}.log"
        spec.write(folder / f"{name}.json")
        command = [sys.executable, str(Path(__file__).resolve())]
        command += ["--side", spec.side, "--spec", str(folder / f"{name}.json")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            **(T1_ENVIRONMENT if name == "t1" else {}),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def repeat(self) -> dict[str, Any]:
        """Let the side do its next repetition, and return its answer.

        Raises:
            SystemExit: it ended without one.
        """
        assert self._process.stdin is not None and self._process.stdout is not None, "both piped"
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended before it was asked; its log says why
        line = self._process.stdout.readline()
        if not line:
            tail = "".join(self._log.read_text().splitlines(keepends=True)[-25:])
            raise SystemExit(f"bench/train.py: {self._name} failed:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--traces", default=",".join(MEDIANS))
    parser.add_argument("--model", choices=tuple(SHAPES), help="tiny on a CPU, else 0.5b")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 on a CPU, else bf16")
    parser.add_argument("--quick", action="store_true", help="fewer pairs, one repetition")
    parser.add_argument("--pairs", type=int, help="pairs an epoch, a multiple of --batch")
    parser.add_argument("--batch", type=int, help="pairs an optimizer step")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--sides",
        default=",".join(SIDES),
        help=f"ours is always among them; {AT_8}: T1 at 8 pairs a forward pass",
    )
    parser.add_argument("--t1-micro", type=int, help="T1's pairs a forward pass")
    parser.add_argument("--sweep", action="store_true", help="search T1's micro-batch first")
    parser.add_argument("--breakdown", action="store_true", help="what each of our parts brings")
    parser.add_argument("--set", action="append", default=[], help="ours: section.key=value")
    parser.add_argument("--dpo", action="append", default=[], help="T1: DPOConfig's key=JSON value")
    parser.add_argument("--work", type=Path, help="folder for models and rows; default: temporary")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model or ("tiny" if arguments.device == "cpu" else "0.5b")
    arguments.precision = arguments.precision or ("fp32" if arguments.device == "cpu" else "bf16")
    if arguments.side:
        run_side(Spec.read(arguments.spec))
    elif arguments.make_model:
        write_model(SHAPES[arguments.model], arguments.make_model, arguments.device)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure every trace; print and write the figures as they come."""
    arguments.model_folder = folder / "model"
    make_model(arguments, arguments.model_folder)
    report: dict[str, Any] = {
        "hardware": hardware(arguments.device),
        "commit": commit(),
        "device": arguments.device,
        "model": arguments.model,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "quick": arguments.quick,
        "learning_rate": LEARNING_RATES[arguments.model],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "traces": {},
    }
    for trace in arguments.traces.split(","):
        bench = Bench(arguments, trace, folder / trace)
        report["traces"][trace] = bench.compare()
        write(report, arguments.json)
        show(report["traces"])
        if arguments.breakdown:
            report.setdefault("breakdown", {})[trace] = bench.breakdown()
            write(report, arguments.json)
            show_breakdown(trace, report["breakdown"][trace])


class Bench:
    """One trace."""

    def __init__(
        self, arguments: argparse.Namespace, trace: str, folder: Path, size: Size | None = None
    ) -> None:
        """Draw the pairs and write them where the sides read them."""
        self.arguments, self.trace, self.folder = arguments, trace, folder
        usual = default_size(arguments.device, trace, arguments.quick)
        self.size = size or Size(
            arguments.pairs or usual.pairs,
            arguments.batch or usual.batch,
            arguments.repetitions or usual.repetitions,
        )
        if self.size.pairs % self.size.batch or self.size.pairs <= FEW:
            raise SystemExit(
                f"--pairs {self.size.pairs}: more than {FEW}, and a multiple of --batch, "
                f"{self.size.batch}"
            )
        self.shape = SHAPES[arguments.model]
        self.pairs = draw_pairs(trace, self.size.pairs, self.shape.vocab_size, SEED)
        write_pairs(self.pairs, folder / "pairs")
        by_length = sorted(self.pairs, key=lambda pair: sum(map(len, pair)))
        few = [by_length[(self.size.pairs - 1) * i // (FEW - 1)] for i in range(FEW)]
        write_pairs(few, folder / "few")

    def spec(self, side: str, **changes: Any) -> Spec:
        """Return what a side is told."""
        arguments = self.arguments
        spec = Spec(
            side=side,
            model=str(arguments.model_folder),
            pairs=str(self.folder / "pairs"),
            few_pairs=str(self.folder / "few"),
            folder=str(self.folder / side),
            device=arguments.device,
            precision=arguments.precision,
            batch=self.size.batch,
            order=[int(i) for i in epoch_order(self.size.pairs, SEED, 0)],
            learning_rate=LEARNING_RATES[arguments.model],
            repetitions=self.size.repetitions,
            overrides=[f"seed={SEED}", *OURS[arguments.device], *arguments.set],
            micro=(arguments.t1_micro or T1_MICRO[arguments.device]) if side == "t1" else 8,
            dpo=dpo_arguments(arguments.dpo) if side == "t1" else {},
        )
        return replace(spec, **changes)

    def compare(self) -> dict[str, Any]:
        """Return the figures of all sides on one trace."""
        asked = ["ours", *(side for side in self.arguments.sides.split(",") if side != "ours")]
        specs = {side: self.spec(side) for side in asked if side != AT_8}
        if AT_8 in asked:
            specs[AT_8] = self.spec("t1", micro=8, folder=str(self.folder / AT_8))
        swept: dict[int, float] = {}
        if self.arguments.sweep and "t1" in specs:
            few = Size(2 * self.size.batch, self.size.batch, repetitions=1)
            swept = Bench(self.arguments, self.trace, self.folder / "sweep", few).sweep()
            specs["t1"] = replace(specs["t1"], micro=max(swept, key=lambda micro: swept[micro]))
        measured = self.run(specs)
        row = figures(self.shape, self.pairs, self.size, measured, self.peak(measured["ours"]))
        return row | ({"t1_sweep": swept} if swept else {})

    def sweep(self) -> dict[int, float]:
        """Return T1's pairs/s for every micro-batch that fits."""
        found = {}
        for micro in SWEPT[self.arguments.device]:
            if micro > self.size.batch:
                continue
            try:
                measured = self.run({"t1": self.spec("t1", micro=micro)})["t1"]
            except SystemExit as error:  # out of memory, most likely
                sys.stderr.write(f"t1 with {micro} pairs a forward pass: {error}\n")
                continue
            found[micro] = round(self.size.pairs / measured.seconds[0], 3)
            sys.stderr.write(
                f"t1 with {micro} pairs a forward pass: {found[micro]} pairs/s, "
                f"{measured.peak_bytes / 2**20:.0f} MiB\n"
            )
        if not found:
            raise SystemExit("bench/train.py: T1 fits with no micro-batch")
        return found

    def run(self, specs: Mapping[str, Spec]) -> dict[str, Measured]:
        """Let all sides do their repetitions in turns, and compare their losses first.

        Raises:
            SystemExit: a side failed, or losses disagree.
        """
        measured = {name: Measured() for name in specs}
        turns = self._turns if self.arguments.device == "cpu" else self._fresh_turns
        for warm_up, name, answer in turns(specs):
            measured[name].add(answer, warm_up=warm_up)
            if warm_up:
                check_losses(self.trace, measured, self.arguments.precision)
        return measured

    def _turns(self, specs: Mapping[str, Spec]) -> Iterator[tuple[bool, str, dict[str, Any]]]:
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(closing(self._start(name, spec)))
                for name, spec in specs.items()
            }
            for repetition in range(1 + max(spec.repetitions for spec in specs.values())):
                for name, session in sessions.items():
                    yield repetition == 0, name, session.repeat()

    def _fresh_turns(self, specs: Mapping[str, Spec]) -> Iterator[tuple[bool, str, dict[str, Any]]]:
        for _ in range(max(spec.repetitions for spec in specs.values())):
            for name, spec in specs.items():
                with closing(self._start(name, replace(spec, repetitions=1))) as session:
                    yield True, name, session.repeat()
                    yield False, name, session.repeat()

    def _start(self, name: str, spec: Spec) -> Session:
        return Session(name, spec, self.folder, self.arguments.threads)

    def peak(self, ours: Measured) -> float | None:
        """Return the operations a second that our share is taken of."""
        if self.arguments.device == "cuda":
            return gpu_peak(hardware("cuda"))
        return statistics.median(ours.peak_flops)

    def breakdown(self) -> list[dict[str, Any]]:
        """Return pairs/s and memory of our side with its parts added one after another."""
        specs = {}
        for number, (_, settings, whole_head) in enumerate(BREAKDOWN):
            spec = self.spec("ours", whole_head=whole_head)
            changes = [f"train.{key}={value}" for key, value in settings.items()]
            changes.append(f"score.attention={settings['attention']}")
            # Padded rows get the size that suits T1, whose rows are padded too.
            micro = T1_MICRO[self.arguments.device]
            changes += [f"{stage}.micro_batch_size={micro}" for stage in ("score", "train")]
            specs[f"part-{number}"] = replace(spec, overrides=[*spec.overrides, *changes])
        rows: list[dict[str, Any]] = []
        for (part, _, _), measured in zip(BREAKDOWN, self.run(specs).values(), strict=True):
            rate = self.size.pairs / statistics.median(measured.seconds)
            rows.append(
                {
                    "part": part,
                    "pairs_per_s": round(rate, 3),
                    "gain": round(rate / rows[-1]["pairs_per_s"], 3) if rows else 1.0,
                    "peak_bytes": measured.peak_bytes,
                    "cores": [round(cores, 2) for cores in measured.cores],
                    "settings": measured.settings,
                }
            )
        return rows


def check_losses(trace: str, measured: Mapping[str, Measured], precision: str) -> None:
    """Compare the losses of all sides that have some.

    Raises:
        SystemExit: they disagree.
    """
    worst = loss_difference(measured)
    if worst > LOSS_TOLERANCE[precision]:
        curves = "\n".join(f"{name}: {side.losses}" for name, side in measured.items())
        raise SystemExit(
            f"bench/train.py: {trace}: losses differ by {worst:.2e}, more than "
            f"{LOSS_TOLERANCE[precision]}: the sides do not compute the same, and no rate of "
            f"theirs can be compared\n{curves}"
        )


def loss_difference(measured: Mapping[str, Measured]) -> float:
    """Return the largest difference between our losses and another side's; 0.0 without others."""
    curves = [side.losses for side in measured.values() if side.losses]
    if len({len(curve) for curve in curves}) > 1:
        raise SystemExit(
            f"the sides took {[len(curve) for curve in curves]} steps, not equally many"
        )
    return max(
        (abs(a - b) for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True)),
        default=0.0,
    )


def figures(
    shape: Shape,
    pairs: Sequence[PairTokens],
    size: Size,
    measured: Mapping[str, Measured],
    peak: float | None,
) -> dict[str, Any]:
    """Return a trace's part of the JSON."""
    ours = measured["ours"]
    flops = forward_flops(shape, pairs)
    rates = {name: size.pairs / statistics.median(m.seconds) for name, m in measured.items()}
    row: dict[str, Any] = {"pairs_per_s": round(rates["ours"], 3)}
    for name in ("t0", "t1", AT_8):
        if name in measured:
            row[f"{name}_pairs_per_s"] = round(rates[name], 3)
            row[f"ratio_{name}"] = round(rates["ours"] / rates[name], 3)
            row[f"memory_ratio_{name}"] = round(ours.peak_bytes / measured[name].peak_bytes, 3)
    train_s = statistics.median(ours.train_s)
    row |= {
        "loss_max_abs_diff": loss_difference(measured),
        "steps_compared": len(ours.losses),
        "share_of_peak": round(3 * flops / train_s / peak, 3) if peak else None,
        "share_of_peak_with_reference": (
            round(4 * flops / statistics.median(ours.seconds) / peak, 3) if peak else None
        ),
        "peak_gflops": round(peak / 1e9, 1) if peak else None,
        "useful_gflops_a_pair": round(3 * flops / size.pairs / 1e9, 3),
        "pairs": size.pairs,
        "batch": size.batch,
        "unique_tokens": unique_tokens(pairs),
        "warmup_steps": size.pairs // size.batch,
        "repetitions": len(ours.train_s),
    }
    # Weights, and AdamW's two moments of each, in fp32: what both sides hold whatever they do.
    state_bytes = 12 * shape.num_weights
    if "t1" in measured:
        row["memory_ratio_t1_above_state"] = round(
            (ours.peak_bytes - state_bytes) / (measured["t1"].peak_bytes - state_bytes), 3
        )
    for name, side in measured.items():
        row[name] = {
            "peak_bytes": side.peak_bytes,
            "reference_s": [round(s, 3) for s in side.reference_s],
            "train_s": [round(s, 3) for s in side.train_s],
            "cores": [round(cores, 2) for cores in side.cores],
            "losses": [round(loss, 6) for loss in side.losses],
            "settings": side.settings,
        }
    row["ours"]["outside_s"] = [round(s, 3) for s in ours.outside_s]
    return row


def show(traces: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    columns = (
        ("pairs/s", "pairs_per_s", "{:.2f}"),
        ("T0", "t0_pairs_per_s", "{:.2f}"),
        ("T1", "t1_pairs_per_s", "{:.2f}"),
        ("/ T0", "ratio_t0", "{:.2f}x"),
        ("/ T1", "ratio_t1", "{:.2f}x"),
        ("/ T1 at 8", f"ratio_{AT_8}", "{:.2f}x"),
        ("memory / T1", "memory_ratio_t1", "{:.2f}x"),
        ("of peak", "share_of_peak", "{:.0%}"),
        ("loss diff.", "loss_max_abs_diff", "{:.1e}"),
    )
    print("  ".join(f"{head:>11}" for head in ("trace", *(name for name, _, _ in columns))))
    for trace, row in traces.items():
        values = [(row.get(key), form) for _, key, form in columns]
        cells = [form.format(value) if value is not None else "-" for value, form in values]
        print("  ".join(f"{cell:>11}" for cell in (trace, *cells)), flush=True)


def show_breakdown(trace: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what each part brings."""
    print(f"{trace:<28}{'pairs/s':>9}{'gain':>8}{'memory':>12}")
    for row in rows:
        memory = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        print(f"{row['part']:<28}{row['pairs_per_s']:>9.2f}{row['gain']:>7.2f}x{memory:>12}")
    sys.stdout.flush()


def make_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the model in a process of its own: this one loads no torch and holds no GPU."""
    command = [sys.executable, str(Path(__file__).resolve()), "--make-model", str(folder)]
    command += ["--device", arguments.device, "--model", arguments.model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench/train.py: the model cannot be made:\n{done.stderr}")


def dpo_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return `key=JSON value` arguments as a mapping."""
    parts = [text.partition("=") for text in texts]
    return {key: json.loads(value) for key, _, value in parts}


if __name__ == "__main__":
    main()
