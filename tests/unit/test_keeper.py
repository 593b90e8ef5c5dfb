"""The keeper: when it wakes the engine that it has, when it starts another, and that it ends it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stages.config import EngineConfig
from stages.engines import Keeper, open_engine
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.errors import EngineError, InputError
from tests.fakes import answer

VLLM = EngineConfig(name="vllm")
HOW = Sampling(1.0, 1.0, 0, 8, (3,))


@dataclass
class Recorded:
    """An engine that can be kept, and what was asked of it."""

    log: list[str]
    longest: int = 0
    whole: bool = True
    fails: list[str] = field(default_factory=list)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        return (answer(request, sampling) for request in requests)

    def sleep(self) -> None:
        self._do("sleep")

    def can_wake(self, model_dir: Path, *, max_model_len: int) -> bool:
        return self.whole and max_model_len <= self.longest

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        self._do(f"wake {model_dir.name}{' reload' if reload else ''}")

    def close(self) -> None:
        self._do("close")

    def _do(self, what: str) -> None:
        self.log.append(what)
        if what.split(maxsplit=1)[0] in self.fails:
            raise EngineError(f"{what} failed")


@dataclass
class Starter:
    """Stands in for `open_engine`."""

    log: list[str] = field(default_factory=list)
    engines: list[Recorded] = field(default_factory=list)

    def open(
        self, config: EngineConfig, model_dir: Path, *, max_model_len: int, pad_token_id: int,
        keep: bool,
    ) -> Engine:  # fmt: skip
        assert keep
        self.log.append(f"start {model_dir.name} {max_model_len}")
        self.engines.append(Recorded(self.log, max_model_len))
        return self.engines[-1]


@pytest.fixture
def starter() -> Starter:
    return Starter()


@pytest.fixture
def keeper(starter: Starter) -> Iterator[Keeper]:
    with Keeper(starter.open, spare_tokens=10) as keeper:
        yield keeper


def model(folder: Path, name: str, manifest: str | None = None, config: str = "{}") -> Path:
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 200}' if config == "{}" else config
    )
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
    return path


def use(keeper: Keeper, folder: Path, config: EngineConfig = VLLM, length: int = 50) -> None:
    engine = keeper.open(config, folder, max_model_len=length, pad_token_id=0)
    assert len(list(engine.generate([Request("a", [5], 1)], HOW))) == 1
    engine.close()
    engine.close()  # as harmless as with any engine


def test_one_engine_serves_stage_after_stage(
    keeper: Keeper, starter: Starter, tmp_path: Path
) -> None:
    plain, made = model(tmp_path, "plain"), model(tmp_path, "made", "a")
    for folder in (plain, plain, made, made, plain, made):
        use(keeper, folder)
    (made / "manifest.json").write_text("made again, and other weights")
    use(keeper, made)
    keeper.close()
    assert starter.log == [
        "start plain 64", "sleep",  # room for longer prompts and answers
        "wake plain reload", "sleep",  # nothing says what the folder holds now
        "wake made reload", "sleep",
        "wake made", "sleep",
        "wake plain reload", "sleep",
        "wake made reload", "sleep",
        "wake made reload", "sleep",
        "close",
    ]  # fmt: skip


def test_what_the_last_engine_cannot_do_starts_another(
    keeper: Keeper, starter: Starter, tmp_path: Path
) -> None:
    a, b = model(tmp_path, "a"), model(tmp_path, "b")
    use(keeper, a)
    use(keeper, b, length=64)
    use(keeper, b, length=65)  # longer than foreseen
    use(keeper, b, VLLM.model_copy(update={"max_num_seqs": 4}))  # other settings
    use(keeper, b, VLLM.model_copy(update={"max_model_len": 70}), length=70)  # the recipe's own
    assert [line for line in starter.log if line not in ("sleep", "close")] == [
        "start a 64", "wake b reload", "start b 128", "start b 64", "start b 70",
    ]  # fmt: skip
    assert starter.log.count("close") == 3


def test_the_limit_is_never_beyond_the_models_positions(
    keeper: Keeper, starter: Starter, tmp_path: Path
) -> None:
    use(keeper, model(tmp_path, "a"), length=195)
    scaled = '{"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}}'
    use(keeper, model(tmp_path, "b", config=scaled), length=300)  # where it decides the result
    assert [line for line in starter.log if line.startswith("start")] == [
        "start a 200",
        "start b 300",
    ]


def test_an_engine_that_died_is_not_kept(
    keeper: Keeper, starter: Starter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model(tmp_path, "a")
    lent = keeper.open(VLLM, folder, max_model_len=50, pad_token_id=0)
    starter.engines[0].whole = False
    lent.close()
    assert starter.log == ["start a 64", "close"]
    use(keeper, folder)
    starter.engines[1].fails.append("wake")
    use(keeper, folder)
    assert "wake a reload failed; starting another" in caplog.text
    starter.engines[2].fails.append("sleep")
    use(keeper, folder)
    assert "sleep failed; another will be started" in caplog.text
    assert starter.log[2:] == [
        "start a 64", "sleep", "wake a reload", "close",
        "start a 64", "sleep", "wake a reload", "sleep", "close",
    ]  # fmt: skip


def test_an_error_in_a_stage_ends_the_engine(starter: Starter, tmp_path: Path) -> None:
    folder = model(tmp_path, "a")
    with pytest.raises(KeyboardInterrupt), Keeper(starter.open) as keeper:
        engine = keeper.open(VLLM, folder, max_model_len=50, pad_token_id=0)
        next(engine.generate([Request("a", [5], 1)], HOW))
        raise KeyboardInterrupt
    assert starter.log == ["start a 64", "close"]


def test_an_engine_that_cannot_sleep_is_opened_for_each_stage(tmp_path: Path) -> None:
    opened = []

    class Plain:
        def generate(self, requests: Any, sampling: Any) -> Any: ...

        def close(self) -> None: ...

    def start(*args: Any, **kwargs: Any) -> Any:
        opened.append(Plain())
        return opened[-1]

    with Keeper(start) as keeper:
        for _ in range(2):
            engine = keeper.open(EngineConfig(), tmp_path, max_model_len=8, pad_token_id=0)
            assert engine is opened[-1]
            engine.close()
    assert len(opened) == 2


def test_a_kept_transformers_engine_equals_new_ones(tiny_model_dir: Path, tmp_path: Path) -> None:
    config, requests = (
        EngineConfig(batch_size=4),
        [Request(f"{i}", [5, 6 + i], i) for i in range(9)],
    )

    def ask(start: Any, length: int) -> list[Completion]:
        engine = start(config, tiny_model_dir, max_model_len=length, pad_token_id=2)
        found = list(engine.generate(requests, HOW))
        engine.close()
        return found

    with Keeper(open_engine, spare_tokens=5) as keeper:
        for length in (32, 40, 24):
            assert ask(keeper.open, length) == ask(open_engine, length)
        with pytest.raises(InputError):
            keeper.open(config, tmp_path, max_model_len=8, pad_token_id=2)
        assert ask(keeper.open, 32) == ask(open_engine, 32)
