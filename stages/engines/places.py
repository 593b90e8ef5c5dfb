"""Where engines run side by side on one machine: which GPUs, or which cores, each has."""

import gc
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from stages.config import EngineConfig
from stages.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """What one engine's process gets of the machine."""

    cores: tuple[int, ...] = ()
    """The logical CPUs that it may run on; none: all of ours."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of its own."""


def engines_on(gpus: int, gpus_each: int, engine: str) -> int:
    """Return how many engines so many GPUs hold: of this machine, or of Ray's cluster.

    Raises:
        ConfigError: they are not on this machine, or do not divide.
    """
    found = gpus if engine == "ray" else _count_gpus()
    if found < gpus:
        raise ConfigError(
            f"generate.engine.gpus={gpus}: this machine has {found or 'no'} GPUs to use; lower "
            "it, or set generate.engine.processes for engines on a CPU"
        )
    if gpus % gpus_each:
        raise ConfigError(
            f"generate.engine.gpus={gpus} is no multiple of tensor_parallel_size={gpus_each}; "
            "correct one"
        )
    return gpus // gpus_each


def gpus_used(config: EngineConfig) -> int:
    """Return how many GPUs engines of a config compute on; of Ray's cluster those it names."""
    if config.gpus is not None:
        return config.gpus
    at_all = config.name != "ray" and _count_gpus() > 0
    return config.processes * config.tensor_parallel_size if at_all else 0


def divide_gpus(engine: str, processes: int, gpus_each: int) -> list[Place]:
    """Return a place with GPUs of its own for each process; one alone sees all there are.

    Raises:
        ConfigError: there are too few.
    """
    if processes == 1:
        return [Place()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        devices = [name.strip() for name in visible.split(",") if name.strip()]
    else:
        devices = [str(number) for number in range(_count_gpus())]
    needed = processes * gpus_each
    if len(devices) < needed:
        each = f" of tensor_parallel_size={gpus_each}" if gpus_each > 1 else ""
        raise ConfigError(
            f"engine {engine}: processes={processes}{each} need {needed} GPUs, and "
            f"{len(devices)} are visible; lower generate.engine.processes"
        )
    return [
        Place(environment={"CUDA_VISIBLE_DEVICES": ",".join(devices[at : at + gpus_each])})
        for at in range(0, needed, gpus_each)
    ]


def divide_cores(processes: int) -> list[Place]:
    """Return a place with cores of its own for each process, as long as there are enough.

    The threads that our own process may use are divided as well, at least one each.
    """
    if processes == 1:
        return [Place()]
    cores = _cores()
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(cores))
    environment = {"OMP_NUM_THREADS": str(max(1, min(threads, len(cores)) // processes))}
    places = []
    for number in range(processes):
        # More processes than cores: the kernel does better than we would.
        mine = cores[number * len(cores) // processes : (number + 1) * len(cores) // processes]
        enough = len(cores) >= processes
        cpus = tuple(sorted(cpu for core in mine for cpu in core)) if enough else ()
        places.append(Place(cpus, environment))
    return places


def release_gpu_memory() -> None:
    """Give back what torch in our own process keeps for reuse: engines look for free memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _cores() -> list[list[int]]:
    """Return the cores that we may use, each as its logical CPUs: two may be one core's."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = siblings.read_text()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
