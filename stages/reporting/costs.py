"""What a run has cost so far, by stage and by iteration."""

from dataclasses import dataclass

from stages.artifacts import Manifest
from stages.reporting.collect import Piece, RunView


@dataclass
class Cost:
    """A sum over artifacts."""

    name: str
    artifacts: int = 0
    seconds: float = 0.0
    tokens: int = 0
    gpu_seconds: float | None = None
    """Of the artifacts that say which devices they had; None: none did so."""
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int | None = None

    def add(self, manifest: Manifest) -> None:
        """Add one artifact's."""
        self.artifacts += 1
        self.seconds += manifest.cost.wall_s
        self.tokens += manifest.cost.tokens
        self.peak_memory_bytes = max(self.peak_memory_bytes, manifest.cost.peak_memory_bytes)
        gpus, gpu_memory = (manifest.info.get(n) for n in ("gpus", "peak_gpu_memory_bytes"))
        if isinstance(gpus, int) and gpus:
            self.gpu_seconds = (self.gpu_seconds or 0.0) + gpus * manifest.cost.wall_s
        if isinstance(gpu_memory, int):
            self.peak_gpu_memory_bytes = max(self.peak_gpu_memory_bytes or 0, gpu_memory)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of wall time; None where no tokens were counted."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def gpu_hours(self) -> float | None:
        """None where no artifact says that it had GPUs."""
        return None if self.gpu_seconds is None else self.gpu_seconds / 3600


@dataclass(frozen=True)
class Costs:
    """All costs of a run."""

    stages: tuple[Cost, ...]
    iterations: tuple[Cost, ...]
    total: Cost


def costs(view: RunView) -> Costs:
    """Return the costs of all finished artifacts; of copies within the run those of one."""
    seen: set[tuple[str, str]] = set()
    stages: dict[str, Cost] = {}
    iterations: dict[str, Cost] = {}
    total = Cost("all")
    groups = [("start", view.before), *((f"{t.index}", t.pieces) for t in view.iterations)]
    for group, pieces in groups:
        for piece in pieces:
            if piece.manifest is None:
                continue
            made = (piece.manifest.key, piece.manifest.cost.started_at)
            if made in seen:
                continue
            seen.add(made)
            stage = _stage(piece)
            stages.setdefault(stage, Cost(stage)).add(piece.manifest)
            iterations.setdefault(group, Cost(group)).add(piece.manifest)
            total.add(piece.manifest)
    return Costs(tuple(stages.values()), tuple(iterations.values()), total)


def _stage(piece: Piece) -> str:
    return "generate" if piece.name.startswith("pool-") else piece.name
