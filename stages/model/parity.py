"""The parity gate: the engine's log-probabilities against those of the trainer's own forward pass.

Both should come from one model: same weights, same tokens. Where they do not, the player would be
trained against answers of somebody else, and nothing later would notice.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.artifacts import count_rows, read_batches
from stages.config import EngineConfig, ForwardConfig, ParityConfig, SamplingConfig
from stages.data.rows import GENERATIONS
from stages.errors import DivergedError
from stages.model.load import best_device
from stages.model.parity_causes import Case, likely_cause, not_finite
from stages.model.parity_gap import OUTLIERS, Answered, Gap, Logprobs, Tolerance, measure
from stages.model.parity_model import ParityModel, Precision, loaded

MAX_TOKENS = 16384
"""Prompt and response tokens of a sample."""
CPU_TOKENS = 2048
"""Likewise where the trainer's model does not fit the GPU, and the CPU computes."""

FP32 = {"cpu": Tolerance(1e-4, 1e-2), "cuda": Tolerance(5e-3, 0.1)}
"""Seen on a CPU: 3e-6 a token and 2e-5 at worst; on GPUs others report 2e-3 a token."""
BF16_LEAST = Tolerance(2e-3, 0.3)
BF16_MOST = Tolerance(0.3, 5.0)
BF16_ROUNDINGS = Tolerance(3.0, 4.0)
"""In units of the model's own rounding: vLLM and transformers in bf16 were seen at 0.8 to 1.1 of
it, over models of 2 to 48 layers whose differences were 0.001 to 0.05 a token."""
QUANTIZED = Tolerance(0.4, 5.0)
"""Not measured: 4-bit weights are said to cost 0.02 to 0.05 nats of divergence a token, which is
differences of 0.2 to 0.3."""

log = logging.getLogger("spin")


@dataclass(frozen=True)
class ParityReport:
    """What the gate found."""

    gap: Gap
    tolerance: Tolerance
    precision: Precision
    attention: str
    """How the trainer's model ran; see `PairForward`."""
    rows: int
    worst_row: str
    """`prompt_id/sample_index` of the worst token."""

    def metrics(self) -> dict[str, float]:
        """Return the manifest's metrics."""
        return {"parity_mean": self.gap.mean, "parity_worst": self.gap.worst}

    def info(self) -> dict[str, Any]:
        """Return the manifest's further facts."""
        return {
            "rows": self.rows,
            "tokens": self.gap.tokens,
            "bias": self.gap.bias,
            "tail": self.gap.tail,
            "mean_tolerance": self.tolerance.mean,
            "worst_tolerance": self.tolerance.tail,
            "precision": self.precision,
            "attention": self.attention,
            "worst_row": self.worst_row,
            "worst_token": self.gap.token,
        }


def draw_rows(
    shards: Sequence[Path], count: int, salt: str, max_tokens: int = MAX_TOKENS
) -> list[Answered]:
    """Return `count` rows of GENERATIONS, the same however they lie in shards.

    Drawn by their numbers, so that of millions of rows only the drawn ones are looked at. Fewer
    where they have more than `max_tokens` tokens together; the last one's response is cut off
    then, which changes none of its other tokens' log-probabilities.
    """
    ends = list(accumulate(count_rows([shard]) for shard in shards))
    total = ends[-1] if ends else 0
    drawn = random.Random(salt).sample(range(total), min(count, total))
    found: dict[int, Answered] = {}
    for shard, end, start in zip(shards, ends, [0, *ends], strict=False):
        here = [number for number in drawn if start <= number < end]
        if here:
            found |= zip(here, _read_rows(shard, [n - start for n in here]), strict=True)
    return list(bounded([found[number] for number in drawn], max_tokens))


def bounded(rows: Sequence[Answered], max_tokens: int) -> Iterator[Answered]:
    """Yield rows as long as they fit, the last one cut; one token of the first fits always."""
    left = max_tokens
    for number, row in enumerate(rows):
        room = left - len(row.prompt)
        if number == 0:
            room = max(room, 1)
        if room < 1:
            continue
        left = room - len(row.response)
        yield Answered(
            row.prompt_id, row.sample_index, row.prompt, row.response[:room], row.logprobs[:room]
        )
        if left <= 0:
            return


def check_parity(
    model_dir: Path,
    rows: Sequence[Answered],
    config: ParityConfig,
    engine: EngineConfig,
    *,
    forward: ForwardConfig,
    pad_token_id: int,
    where: str,
    sampling: SamplingConfig | None = None,
    rendered: Callable[[str], Sequence[int]] | None = None,
    others: Mapping[str, Path] | None = None,
) -> ParityReport | None:
    """Compute the log-probabilities of answers again and compare; None where there is no token.

    The model runs as score and train run it: `forward`'s attention and budgets, fp32 weights, and
    matrix products in bf16 where the engine was not in fp32. Its memory is freed on return. The
    engine must be closed: both do not fit a GPU.

    Args:
        model_dir: the model that the engine was to run; verified by the caller.
        engine: how it ran; decides the tolerances.
        where: the answers' place, for the message.
        sampling: how the answers were drawn, to recognise numbers that went through it.
        rendered: from a prompt's id to its tokens as the recipe renders them, to recognise
            another template.
        others: further models that the engine may have run instead, by what they are to the user,
            such as that of the iteration before.

    Raises:
        DivergedError: the differences are larger than the recipe tolerates; the message names the
            cause that explains them.
        InputError: the model cannot be loaded.
    """
    for row in rows:
        assert len(row.logprobs) == len(row.response), f"{row.name}: a number a token"
    rows = [row for row in rows if row.response]
    if not rows:
        return None
    check = partial(
        _Check, model_dir, config, engine, forward, pad_token_id, where, sampling, rendered,
        others or {}, best_device(),
    )  # fmt: skip
    try:
        return check(rows, best_device()).run()
    except torch.OutOfMemoryError:
        if best_device().type == "cpu":
            raise
    log.warning("parity: the GPU's memory does not hold the trainer's model; on the CPU instead")
    torch.cuda.empty_cache()
    return check(list(bounded(rows, CPU_TOKENS)), torch.device("cpu")).run()


@dataclass(frozen=True)
class _Check:
    model_dir: Path
    config: ParityConfig
    engine_config: EngineConfig
    forward: ForwardConfig
    pad_token_id: int
    where: str
    sampling: SamplingConfig | None
    rendered: Callable[[str], Sequence[int]] | None
    others: Mapping[str, Path]
    engine_device: torch.device
    rows: Sequence[Answered]
    device: torch.device

    def run(self) -> ParityReport:
        precision = self._precision()
        engine = [np.array(row.logprobs, np.float64) for row in self.rows]
        with self._load(self.model_dir) as model:
            ours, mode = model.logprobs(self.rows, precision), model.mode
            if cause := not_finite(engine, ours):
                raise DivergedError(f"{self.where}: likely cause: {cause}; {self._remedy()}")
            tolerance = self._tolerance(model, precision, ours)
        gap = measure(engine, ours)
        worst_row = self.rows[gap.row].name
        report = ParityReport(gap, tolerance, precision, mode, len(self.rows), worst_row)
        if tolerance.allows(gap):
            return report
        case = Case(
            self.rows, engine, ours, gap, precision, tolerance, self._own_tolerance,
            self._load, self.model_dir, self.others, self.rendered, self.sampling,
        )  # fmt: skip
        raise DivergedError(
            f"{self._found(report)}; likely cause: {likely_cause(case)}; {self._remedy()}"
        )

    def _load(self, folder: Path) -> AbstractContextManager[ParityModel]:
        return loaded(folder, self.forward, self.pad_token_id, self.rows, self.device)

    def _precision(self) -> Precision:
        """Return what the trainer computes in, to be as close to the engine as it can."""
        dtype = self.engine_config.dtype
        if dtype == "auto":
            dtype = "float32" if self.engine_device.type == "cpu" else "bfloat16"
        return "fp32" if dtype == "float32" and not is_lossy(self.engine_config) else "bf16"

    def _tolerance(self, model: ParityModel, precision: Precision, ours: Logprobs) -> Tolerance:
        """Return what is allowed; in bf16 by the model's own rounding, and its weights are rounded.

        Args:
            ours: the log-probabilities in this precision.
        """
        mean, worst = self.config.mean_tolerance, self.config.worst_tolerance
        if mean is not None and worst is not None:
            return Tolerance(mean, worst)
        own = self._own_tolerance(model, precision, ours)
        return Tolerance(mean or own.mean, worst or own.tail)

    def _own_tolerance(self, model: ParityModel, precision: Precision, ours: Logprobs) -> Tolerance:
        if is_lossy(self.engine_config):
            return QUANTIZED
        if precision == "fp32":
            return FP32[self.engine_device.type]
        model.round_weights()
        rounding = measure(model.logprobs(self.rows, "fp32"), ours)
        return Tolerance(
            min(max(BF16_LEAST.mean, BF16_ROUNDINGS.mean * rounding.mean), BF16_MOST.mean),
            min(max(BF16_LEAST.tail, BF16_ROUNDINGS.tail * rounding.tail), BF16_MOST.tail),
        )

    def _found(self, report: ParityReport) -> str:
        gap, allowed = report.gap, report.tolerance
        return (
            f"{self.where}: the engine's log-probabilities are not those of the trainer's "
            f"{self.model_dir}: {gap.mean:.3g} apart a token ({allowed.mean:.3g} tolerated) and "
            f"{gap.tail:.3g} at worst, one token in {OUTLIERS} left out ({allowed.tail:.3g}), over "
            f"{report.rows} rows and {gap.tokens} tokens in {report.precision}; {gap.worst:.3g} "
            f"at token {gap.token} of {report.worst_row}"
        )

    def _remedy(self) -> str:
        return (
            "mend it and delete the answers, which are kept; or, where only the tolerance is too "
            "small, raise generate.parity.mean_tolerance and worst_tolerance and run again"
        )


def is_lossy(engine: EngineConfig) -> bool:
    """Tell whether the engine runs a coarser copy of the model on purpose."""
    cache = engine.extra.get("kv_cache_dtype", "auto")
    return bool(engine.quantization or engine.extra.get("quantization")) or "fp8" in str(cache)


def _read_rows(shard: Path, numbers: Sequence[int]) -> list[Answered]:
    """Return the rows of these numbers, in their order."""
    columns = [
        "prompt_id", "sample_index", "prompt_token_ids", "response_token_ids", "token_logprobs",
    ]  # fmt: skip
    found: dict[int, Answered] = {}
    start = 0
    for batch in read_batches([shard], GENERATIONS, columns=columns):
        here = [number for number in numbers if start <= number < start + batch.num_rows]
        rows = batch.take([number - start for number in here]).to_pylist()
        for number, row in zip(here, rows, strict=True):
            found[number] = Answered(*(row[name] for name in columns))
        start += batch.num_rows
    return [found[number] for number in numbers]
