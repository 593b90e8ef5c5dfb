"""Training that is cut off goes on from its checkpoint, and ends in the same bytes."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stages import train
from stages.artifacts import read_manifest
from stages.config import RunConfig
from stages.errors import DivergedError
from stages.model import fit
from tests.scored_pairs import random_rows, scored_artifact, train_inputs

NUM_PAIRS = 24
STEPS = 60
SETTINGS = {
    "learning_rate": 1e-3,
    "batch_size": 6,
    "max_steps": STEPS,
    "precision": "fp32",
    "checkpoint": {"every_steps": 5},
}
BARRIER_S = 60.0


@pytest.fixture(scope="session")
def scored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate({"score": {"precision": "fp32"}})
    folder = tmp_path_factory.mktemp("scored")
    return scored_artifact(random_rows(NUM_PAIRS), tiny_model_dir, folder, config)


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"train": {**SETTINGS, **settings}})


@pytest.fixture(scope="session")
def unbroken(scored: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "train"
    train.run(config(), train_inputs(scored, tiny_model_dir), out)
    return out


def bytes_of(out: Path) -> dict[str, str]:
    return {f.path: f.sha256 for f in read_manifest(out).files if not f.volatile}


def start(
    scored: Path, model_dir: Path, out: Path, *overrides: str, own_group: bool = False
) -> subprocess.Popen[str]:
    """`spin train` as a user starts it, slow enough to be cut off where one likes."""
    settings = [f"train.{k}={v}" for k, v in SETTINGS.items() if k != "checkpoint"]
    command = [sys.executable, "-m", "tests.faults.slow_train", "--pairs", scored, "--out", out]
    command += ["--model", model_dir, *settings, "train.checkpoint.every_steps=5", *overrides]
    return subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=own_group,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def steps_kept(out: Path) -> list[int]:
    """The steps of the whole checkpoints beside `out`."""
    found = out.parent.glob(f".{out.name}.*.partial/.shards/.shards/aside/step-*/*.json")
    return sorted({int(path.parent.name.removeprefix("step-")) for path in found})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BARRIER_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2))])
def test_killed_at_a_random_step_it_ends_in_the_same_bytes(
    scored: Path, tiny_model_dir: Path, unbroken: Path, tmp_path: Path, seed: int
) -> None:
    out, draw = tmp_path / "train", random.Random(seed)
    target = 5 * draw.randint(1, 6)
    process = start(scored, tiny_model_dir, out)
    wait_until(lambda: bool(steps_kept(out)) and steps_kept(out)[-1] >= target)
    time.sleep(0.05 * draw.random())
    process.kill()
    process.communicate()
    assert steps_kept(out), "a checkpoint outlived it"
    again = start(scored, tiny_model_dir, out)
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert f"of {STEPS}, from a checkpoint" in said
    assert bytes_of(out) == bytes_of(unbroken)
    assert not list(tmp_path.glob(".*.partial"))


def test_killed_in_an_iteration_that_carries_the_optimizer_it_ends_in_the_same_bytes(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first, unbroken, out = (tmp_path / name for name in ("first", "unbroken", "train"))
    carries = {"carry_optimizer": True, "schedule": "constant", "warmup_steps": 70}
    train.run(config(**carries, max_steps=10), train_inputs(scored, tiny_model_dir), first)
    inputs = train.TrainInputs(scored, str(first), optimizer_from=first)
    train.run(config(**carries), inputs, unbroken)
    words = ["--optimizer-from", str(first)]
    words += [f"train.{name}={value}" for name, value in carries.items()]
    process = start(scored, first, out, *words)
    wait_until(lambda: bool(steps_kept(out)) and steps_kept(out)[-1] >= 20)
    process.kill()
    process.communicate()
    again = start(scored, first, out, *words)
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert f"of {STEPS}, from a checkpoint" in said
    assert bytes_of(out) == bytes_of(unbroken)
    assert "optimizer/state.json" in bytes_of(out)


def stop_and_resume(scored: Path, model_dir: Path, out: Path, number: signal.Signals) -> str:
    process = start(scored, model_dir, out, "train.checkpoint.every_steps=1000")
    wait_until(lambda: out.with_name("step-8").exists())  # slow_train makes it
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=BARRIER_S)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], said
    assert time.monotonic() - began < 25
    (step,) = steps_kept(out)
    assert 8 <= step < STEPS
    again = start(scored, model_dir, out)
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert f"after step {step} of {STEPS}, from a checkpoint" in said
    return said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_writes_a_checkpoint_and_leaves(
    scored: Path, tiny_model_dir: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    stop_and_resume(scored, tiny_model_dir, tmp_path / "train", number)
    assert bytes_of(tmp_path / "train") == bytes_of(unbroken)


@pytest.mark.long
def test_fifty_signals_mid_step_and_mid_save(
    scored: Path, tiny_model_dir: Path, unbroken: Path, tmp_path: Path
) -> None:
    for attempt in range(50):
        out, draw = tmp_path / f"train-{attempt}", random.Random(attempt)
        process = start(scored, tiny_model_dir, out, "train.checkpoint.every_steps=1")
        wait_until(lambda out=out: bool(steps_kept(out)))
        time.sleep(0.5 * draw.random())
        began = time.monotonic()
        process.terminate()
        _, said = process.communicate(timeout=BARRIER_S)
        assert process.returncode in (0, 143), said
        assert time.monotonic() - began < 25
        again = start(scored, tiny_model_dir, out)
        _, said = again.communicate(timeout=BARRIER_S)
        assert again.returncode == 0, said
        assert bytes_of(out) == bytes_of(unbroken)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.long)])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    scored: Path, tiny_model_dir: Path, unbroken: Path, tmp_path: Path, first: int, then: int
) -> None:
    out = tmp_path / "train"
    process = start(scored, tiny_model_dir, out, f"train.processes={first}")
    wait_until(lambda: bool(steps_kept(out)) and steps_kept(out)[-1] >= 20)
    process.terminate()
    _, said = process.communicate(timeout=BARRIER_S)
    assert process.returncode == 143, said
    assert steps_kept(out)[-1] < STEPS
    again = start(scored, tiny_model_dir, out, f"train.processes={then}")
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert "from a checkpoint" in said
    ours, theirs = (load_file(p / "model.safetensors") for p in (out, unbroken))
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-4, name


def test_a_killed_parent_leaves_no_rank_behind(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    process = start(scored, tiny_model_dir, out, "train.processes=2")
    wait_until(lambda: bool(steps_kept(out)))
    ranks = children(process.pid)
    assert len(ranks) >= 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks))


def children(parent: int) -> list[int]:
    listing = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    return [int(pid) for pid in listing.split()]


def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_taken(
    scored: Path, tiny_model_dir: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    process = start(scored, tiny_model_dir, out)
    wait_until(lambda: len(steps_kept(out)) == 2)
    process.kill()
    process.communicate()
    older, newest = steps_kept(out)[-2:]
    (file,) = out.parent.glob(f".train.*.partial/.shards/aside/step-{newest:08d}/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    again = start(scored, tiny_model_dir, out)
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert f"after step {older} of {STEPS}" in said
    assert bytes_of(out) == bytes_of(unbroken)


@pytest.mark.parametrize("bad_step", [1, STEPS // 2, STEPS - 1])
@pytest.mark.parametrize("steps_unread", [1, 7])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny_model_dir: Path,
    scored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad_step: int,
    steps_unread: int,
) -> None:
    """As on a GPU too, where metrics are read late: no step after the bad one changes anything."""
    weights: list[Any] = []
    monkeypatch.setattr(fit, "_steps_unread", lambda group, config: steps_unread)
    real_take = fit._Loop._take

    def take(self: Any, step: int, batch: Any, interruption: Any) -> bool:
        objective = self.objective
        if step == bad_step:
            real_loss = objective.loss
            objective.loss = lambda micro: (real_loss(micro)[0] * math.nan, real_loss(micro)[1])
        done = real_take(self, step, batch, interruption)
        if step == bad_step:
            del objective.loss
        if step >= bad_step - 1:
            weights.append([p.detach().clone() for p in self.parameters.values()])
        return done

    monkeypatch.setattr(fit._Loop, "_take", take)
    with pytest.raises(DivergedError, match=f"step {bad_step}: the loss is nan; stopped before"):
        train.run(config(), train_inputs(scored, tiny_model_dir), tmp_path / "train")
    for later in weights[1:]:
        assert all(bool((a == b).all()) for a, b in zip(weights[0], later, strict=True))
    kept = list(tmp_path.glob(".train.*.partial/.shards/aside/*/*.safetensors"))
    assert bool(kept) == (bad_step > 5)
    for file in kept:
        assert all(bool(t.isfinite().all()) for t in load_file(file).values())
    assert not (tmp_path / "train").exists()


def test_checkpoints_leave_no_trace_in_the_artifact(unbroken: Path) -> None:
    assert not [p for p in unbroken.rglob("*") if "step-" in p.name or p.name == ".shards"]
    beside = {path.name for path in unbroken.parent.iterdir()}
    assert beside == {unbroken.name, ".train.lock"}


def test_a_signal_to_the_whole_process_group_is_one_request(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """As a batch system sends it: to the ranks, and to their parent, which passes it on."""
    out = tmp_path / "train"
    settings = ("train.processes=2", "train.checkpoint.every_steps=1000")
    process = start(scored, tiny_model_dir, out, *settings, own_group=True)
    wait_until(lambda: out.with_name("step-8").exists())
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=BARRIER_S)
    assert process.returncode == 143, said
    assert len(steps_kept(out)) == 1, "the checkpoint that the signal asked for"
    again = start(scored, tiny_model_dir, out, "train.processes=2")
    _, said = again.communicate(timeout=BARRIER_S)
    assert again.returncode == 0, said
    assert "from a checkpoint" in said
