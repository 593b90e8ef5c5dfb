"""The processes that work together on one stage: how they start, agree, and end.

A rank is one process with one GPU, or with a share of the CPU. Three ways lead to several:
`processes=N` starts them here, on this machine; `torchrun` and `accelerate launch` start the whole
command N times, on one machine or many. Then rank 0 makes the artifact as a single process would,
and the others follow it: they only work.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.artifacts import Manifest, read_manifest
from stages.artifacts.produce import peak_memory_bytes
from stages.config import OptimConfig, ParallelConfig
from stages.errors import ConfigError, SpinError

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    import torch

log = logging.getLogger("spin")

STOP_GRACE_S = 60.0
"""After a signal, for ranks that write their last checkpoint."""
FAIL_GRACE_S = 2.0
"""After one rank failed, for the others to notice by themselves."""
TIMEOUT_S = 24 * 3600
"""Of waiting for other ranks on the CPU: rank 0 may hash and read for hours before it trains."""
_PR_SET_PDEATHSIG = 1
_SIGNAL_EXIT = 128

Job = TypeVar("Job")
Report = TypeVar("Report")


@dataclass(frozen=True)
class Group:
    """One process's view of the ranks that work together."""

    rank: int
    num_ranks: int
    device: "torch.device"

    def highest(self, value: int) -> int:
        """Return the highest of all ranks' values; waits for the others, not for a GPU."""
        if self.num_ranks == 1:
            return value
        import torch
        import torch.distributed as dist

        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        self.highest(0)

    def add_up(self, tensor: "torch.Tensor") -> None:
        """Replace a tensor on this rank's device by its sum over all ranks."""
        if self.num_ranks > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)


def open_group(config: ParallelConfig) -> Group:
    """Join accelerate's process group, as the environment tells it, and take a device.

    Precision stays ours (`pairs.autocast`): accelerate's is one for the whole process, while the
    stages of a run may differ. One process joins a group of itself where offloading needs one.

    Raises:
        ConfigError: GPUs are asked for, and there are fewer than processes.
    """
    import datetime

    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and torch.cuda.device_count() < local_ranks:
        raise ConfigError(
            f"{local_ranks} processes on this machine, and torch sees {torch.cuda.device_count()} "
            "GPUs: start as many processes as there are GPUs, or train on the CPU (device=cpu)"
        )
    launched = is_launched()
    offloads = isinstance(config, OptimConfig) and config.sharding.cpu_offload
    if (launched or offloads) and not dist.is_initialized():
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        if launched:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if launched:
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        state = PartialState(cpu=on_cpu)
        device, rank, num_ranks = state.device, state.process_index, state.num_processes
    else:
        cuda = torch.device("cuda", 0 if on_cpu else torch.cuda.current_device())
        device, rank, num_ranks = torch.device("cpu") if on_cpu else cuda, 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Group(rank, num_ranks, device)


@dataclass(frozen=True)
class Resources:
    """What one rank took for its part of a stage, for the manifest that rank 0 writes."""

    processes: int
    peak_memory_bytes: int
    """The most memory that the rank had at a time."""
    peak_gpu_memory_bytes: int | None
    """The same of its GPU, None without one."""
    threads: int | None = None
    """Of a CPU that computes: sums come out otherwise with another number. None on a GPU."""

    def info(self) -> dict[str, int]:
        """Return what a manifest tells of it."""
        found = {"processes": self.processes}
        if self.threads is not None:
            found["threads"] = self.threads
        if self.peak_gpu_memory_bytes is not None:
            found |= {"gpus": self.processes, "peak_gpu_memory_bytes": self.peak_gpu_memory_bytes}
        return found


def resources(group: Group) -> Resources:
    """Return what this rank took until now."""
    import torch

    gpu = None
    if group.device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(group.device)
    threads = torch.get_num_threads() if group.device.type == "cpu" else None
    return Resources(group.num_ranks, peak_memory_bytes(), gpu, threads)


def is_launched() -> bool:
    """Tell whether this process is one of several that a launcher, or `together`, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


# -- Several processes that a launcher started ----------------------------------------------------


def led(
    config: ParallelConfig, work: Callable[[Any], Any], out: Path, lead: Callable[[], Manifest]
) -> Manifest:
    """Make an artifact as one process, or as each of several that a launcher started.

    Rank 0 calls `lead`, which writes `out`; whenever it calls `together`, the others call `work`.

    Returns:
        The manifest that rank 0 wrote or found.

    Raises:
        SpinError: rank 0 failed, and this is another one; it tells why.
    """
    if not is_launched():
        return lead()
    group = open_group(config)
    if group.rank == 0:
        manifest = _lead(lead)
        _close(group)
        return manifest
    _follow(work)
    _close(group)
    return read_manifest(out)


def _lead(lead: Callable[[], Manifest]) -> Manifest:
    """Let the followers go when `lead` ends, however it does."""
    _Sent.job = False
    try:
        manifest = lead()
    except BaseException:
        if not _Sent.job:  # else they failed as well, or will see that this process is gone
            _broadcast(("failed", None))
        raise
    _broadcast(("done", None))
    return manifest


def _follow(work: Callable[[Any], Any]) -> None:
    """Do every job that rank 0 sends, until it says that it is done."""
    while True:
        try:
            kind, job = _broadcast(None)
        except RuntimeError as error:  # its connection is gone
            raise SpinError("rank 0 ended early; see its message") from error
        if kind == "failed":
            raise SpinError("rank 0 failed; see its message")
        if kind == "done":
            return
        work(job)


class _Sent:
    job = False


def _close(group: Group) -> None:
    """Leave the process group together: one that ends alone breaks what others still wait for."""
    import torch.distributed as dist

    group.wait_for_all()
    dist.destroy_process_group()


def _broadcast(message: Any) -> Any:
    import torch
    import torch.distributed as dist

    box = [message]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


# -- Work together --------------------------------------------------------------------------------


def together(work: Callable[[Job], Report], job: Job, config: ParallelConfig) -> Report:
    """Call `work(job)` in every rank and return rank 0's report.

    With one process it is a plain call; under a launcher rank 0 tells the job to those that
    follow; else `config.processes` are started, which end with this one however it ends.

    Args:
        work: a function of a module, so that another process can find it.
        job: can be pickled, like the report.

    Raises:
        SpinError: a rank raised it, or ended without a word.
    """
    if is_launched():
        if config.processes not in (1, int(os.environ["WORLD_SIZE"])):
            raise ConfigError(
                f"processes={config.processes}, but the launcher started "
                f"{os.environ['WORLD_SIZE']}; leave one of the two out"
            )
        _broadcast(("job", job))
        _Sent.job = True
        return work(job)
    if config.processes == 1:
        return work(job)
    report: Report = _Crew(work, job, config.processes).report()
    return report


class _Crew:
    """Ranks started by this process, and watched by it."""

    def __init__(self, work: Callable[[Any], Any], job: Any, num_ranks: int) -> None:
        self._work, self._job, self._num_ranks = work, job, num_ranks
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def report(self) -> Any:
        """Start all ranks and wait for them; see `together`."""
        try:
            self._start()
            return self._receive()
        except BaseException as error:
            self._stop(None if isinstance(error, SpinError) else signal.SIGTERM)
            raise
        finally:
            for pipe in self._pipes:
                pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port, level = _free_port(), log.getEffectiveLevel()
        for rank in range(self._num_ranks):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            place = _Place(rank, self._num_ranks, port, level, os.getpid())
            arguments = (place, self._work, self._job, theirs)
            process = context.Process(target=_serve, args=arguments, name=f"spin rank {rank}")
            self._processes.append(process)
            process.start()
            theirs.close()

    def _receive(self) -> Any:
        """Wait until all ranks ended well; the first that did not decides the error."""
        reports: dict[int, Any] = {}
        while len(reports) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in reports]
            for pipe in wait(waiting):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                reports[rank] = self._message(rank)
        for process in self._processes:
            process.join()
        return reports[0]

    def _message(self, rank: int) -> Any:
        try:
            kind, content = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(FAIL_GRACE_S)
            raise self._lost(rank) from None
        if kind == "bug":  # it may only have noticed that another one is gone
            time.sleep(FAIL_GRACE_S)
            for other, process in enumerate(self._processes):
                if process.exitcode is not None and process.exitcode < 0:
                    raise self._lost(other)
            raise RuntimeError(f"rank {rank} of {self._num_ranks}:\n{content}")
        if kind == "error":
            raise content
        return content

    def _lost(self, rank: int) -> SpinError:
        code = self._processes[rank].exitcode
        if code == _SIGNAL_EXIT + signal.SIGTERM:
            return SpinError(
                f"rank {rank} of {self._num_ranks} was asked to end; run the same command again to "
                "go on from its checkpoint"
            )
        return SpinError(
            f"rank {rank} of {self._num_ranks} ended without a word ({_ending(code)}); the "
            "system's log may tell more"
        )

    def _stop(self, number: int | None) -> None:
        """End all ranks: with a signal they may write a checkpoint first."""
        started = [process for process in self._processes if process.pid is not None]
        deadline = time.monotonic() + (FAIL_GRACE_S if number is None else STOP_GRACE_S)
        for process in started:
            if number is not None and process.is_alive() and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        try:
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:  # also where a second signal does not want to wait
            for process in started:
                if process.is_alive():
                    process.kill()
                process.join()


@dataclass(frozen=True)
class _Place:
    rank: int
    num_ranks: int
    port: int
    log_level: int
    parent: int


def _serve(place: _Place, work: Callable[[Any], Any], job: Any, pipe: Connection) -> None:
    """Be one rank, in a process of its own."""
    _end_with(place.parent)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent tells us
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.num_ranks),
        "LOCAL_WORLD_SIZE": str(place.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place.port),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(_threads(place.num_ranks))),
    }
    log.addHandler(logging.StreamHandler())
    log.setLevel(place.log_level if place.rank == 0 else logging.ERROR)  # the others say the same
    try:
        message = ("report", work(job))
    except SystemExit as error:
        os._exit(int(error.code or 0))
    except (SpinError, OSError) as error:
        message = ("error", error)
    except Exception:  # noqa: BLE001 told to the parent, which ends with it
        message = ("bug", traceback.format_exc())
    with contextlib.suppress(OSError):
        pipe.send(message)
    pipe.close()
    sys.stderr.flush()
    os._exit(0)  # process groups and threads of libraries are left behind, not waited for


def _threads(num_ranks: int) -> int:
    """Return one rank's share of the CPU's threads; torch reads it when it is first imported."""
    all_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return max(1, all_threads // num_ranks)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(_SIGNAL_EXIT + number)


def _end_with(parent: int) -> None:
    """End this process with its parent, whatever it is doing: it must not write on alone."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; the thread does elsewhere
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ending(code: int | None) -> str:
    if code is None:
        return "still there"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
