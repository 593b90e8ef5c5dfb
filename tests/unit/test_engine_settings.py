"""What the recipe's `engine` says, and what vLLM is then started with; no engine runs here."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config import EngineConfig
from stages.engines import gpus_used, open_engine
from stages.engines import vllm as engine_vllm
from stages.engines.fleet import Fleet
from stages.engines.vllm import CPU_KV_CACHE_BYTES, VllmEngine, architecture
from stages.errors import ConfigError, InputError
from stages.recipe import load_recipe


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def started(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """What engines were started with, on a machine of each kind."""
    calls: list[dict[str, Any]] = []

    def start(
        self: Fleet, kind: Any, arguments: Any, places: Any, environment: Any, **more: Any
    ) -> None:
        calls.append({**arguments["arguments"], "extra": arguments["extra"], "places": places})
        self._max_model_len, self._is_open, self._processes = more["max_model_len"], True, []

    monkeypatch.setattr(Fleet, "__init__", start)
    monkeypatch.setattr(engine_vllm, "find_spec", lambda _: object())
    monkeypatch.setattr(engine_vllm, "is_cpu_build", lambda: request.param)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return calls


def start(model_dir: Path, **settings: Any) -> None:
    config = EngineConfig(name="vllm", **settings)
    open_engine(config, model_dir, max_model_len=64, pad_token_id=0)


def test_each_key_reaches_vllm_and_an_unset_one_is_left_to_it(
    started: list[dict[str, Any]], tiny_model_dir: Path
) -> None:
    chosen = {
        "quantization": "fp8",
        "enable_prefix_caching": False,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 99,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "dtype": "bfloat16",
    }
    extra = {"hf_overrides": {"rope": [1, {"a": None}]}, "kv_cache_memory_bytes": 5}
    start(tiny_model_dir)
    start(tiny_model_dir, **chosen, extra=extra, processes=2)
    default, full = started
    unset = {"quantization", "enable_prefix_caching", "max_num_seqs", "max_num_batched_tokens"}
    assert not unset & default.keys()
    assert {name: full[name] for name in chosen} == chosen
    assert full["extra"] == extra
    assert (len(default["places"]), len(full["places"])) == (1, 2)
    on_cpu = engine_vllm.is_cpu_build()
    devices = [place.environment.get("CUDA_VISIBLE_DEVICES") for place in full["places"]]
    assert devices == ([None, None] if on_cpu else ["0,1", "2,3"])
    assert default.get("kv_cache_memory_bytes") == (CPU_KV_CACHE_BYTES if on_cpu else None)
    assert "kv_cache_memory_bytes" not in full, "said in extra"
    assert default["enable_sleep_mode"] is False


def test_only_a_kept_engine_on_a_gpu_pays_for_sleep_mode(
    started: list[dict[str, Any]], tiny_model_dir: Path
) -> None:
    VllmEngine(tiny_model_dir, EngineConfig(name="vllm"), max_model_len=8, keep=True)
    assert started[0]["enable_sleep_mode"] is not engine_vllm.is_cpu_build()


def test_weights_are_exchanged_only_where_that_is_known_to_work(
    started: list[dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    def engine(**settings: Any) -> VllmEngine:
        config = EngineConfig(name="vllm", **settings)
        return VllmEngine(tiny_model_dir, config, max_model_len=64, keep=True)

    kept = engine()
    assert kept.can_wake(tiny_model_dir, max_model_len=64)
    assert not kept.can_wake(tiny_model_dir, max_model_len=65)
    assert not kept.can_wake(tmp_path, max_model_len=64), "no model"
    assert not engine(quantization="fp8").can_wake(tiny_model_dir, max_model_len=64)
    compiled = engine(enforce_eager=False)
    assert compiled.can_wake(tiny_model_dir, max_model_len=64) is not engine_vllm.is_cpu_build()


def test_models_of_another_architecture_are_told_apart(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def changed(name: str, **values: Any) -> object:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((tiny_model_dir / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        for file in tiny_model_dir.glob("*.safetensors"):
            (folder / file.name).symlink_to(file)
        return architecture(folder)

    mine = architecture(tiny_model_dir)
    assert mine is not None
    assert changed("same", transformers_version="0", dtype="float64") == mine
    assert changed("other", rms_norm_eps=1e-3) != mine
    assert changed("longrope", rope_parameters={"rope_type": "longrope"}) is None
    assert changed("quantized", quantization_config={"bits": 4}) is None
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    assert architecture(bare) != mine, "other weights than those"


def test_keys_that_only_change_speed_stay_out_of_the_identity() -> None:
    plain = EngineConfig(name="vllm")
    quick = EngineConfig(
        name="vllm", processes=4, max_num_seqs=9, max_num_batched_tokens=99,
        enable_prefix_caching=True, gpu_memory_utilization=0.5, enforce_eager=True,
    )  # fmt: skip
    assert quick.identity() == plain.identity()
    assert EngineConfig(batch_size=1).identity() == EngineConfig().identity()
    assert EngineConfig(name="vllm", quantization="fp8").identity() != plain.identity()
    extra = {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}, "seed": 3}
    assert (
        json.loads(json.dumps(EngineConfig(name="vllm", extra=extra).identity()))["extra"] == extra
    )


def test_a_recipe_and_an_override_can_nest_lists_and_maps(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("generate: {engine: {name: vllm, extra: {a: {b: [1, {c: null}]}}}}")
    words = ["generate.engine.extra.sizes=[1, 2]", "generate.engine.extra.a.d=x"]
    extra = load_recipe(recipe, words).for_iteration().generate.engine.extra
    assert extra == {"a": {"b": [1, {"c": None}], "d": "x"}, "sizes": [1, 2]}
    with pytest.raises(ConfigError, match=r"generate\.engine\.extra"):
        load_recipe(None, ["generate.engine.extra=[1]"])
    with pytest.raises(ConfigError, match="processes=0"):
        load_recipe(None, ["generate.engine.processes=0"])


@pytest.mark.parametrize(
    "word",
    ["quantization=fp8", "extra={kv_cache_dtype: fp8}", "tensor_parallel_size=4", "max_num_seqs=3",
     "enforce_eager=true", "gpu_memory_utilization=0.1", "enable_prefix_caching=false"],
)  # fmt: skip
def test_keys_of_vllm_are_refused_where_another_engine_answers(word: str) -> None:
    name = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"generate\.engine: {name} is vLLM's") as caught:
        load_recipe(None, [f"generate.engine.{word}"])
    assert len(str(caught.value)) < 200
    load_recipe(None, ["generate.engine.name=vllm", f"generate.engine.{word}"])


@pytest.mark.parametrize("stage", ["generate", "evaluate"])
@pytest.mark.parametrize("temperature", ["0.001", "5"])
def test_a_temperature_that_vllm_lacks_is_refused_before_anything_starts(
    stage: str, temperature: str
) -> None:
    words = ["generate.engine.name=vllm", f"{stage}.temperature={temperature}"]
    with pytest.raises(ConfigError, match=rf"{stage}\.temperature={temperature}.*: vLLM has 0"):
        load_recipe(None, words)
    load_recipe(None, words[1:])
    load_recipe(None, [words[0], f"{stage}.temperature=0"])


def test_too_few_gpus_are_told_before_anything_starts(
    started: list[dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    if not engine_vllm.is_cpu_build():
        with pytest.raises(ConfigError, match="need 6 GPUs, and 4 are visible"):
            start(tiny_model_dir, processes=3, tensor_parallel_size=2)
    with pytest.raises(InputError, match="has no config"):
        start(tmp_path)
    assert not started


@pytest.mark.parametrize(
    ("settings", "found", "used"),
    [
        ({}, 0, 0),
        ({}, 8, 1),
        ({"name": "vllm", "processes": 2, "tensor_parallel_size": 2}, 8, 4),
        ({"name": "vllm", "gpus": 6, "tensor_parallel_size": 2}, 8, 6),
        ({"name": "ray"}, 8, 0),
        ({"name": "ray", "gpus": 4}, 0, 4),
    ],
)
def test_how_many_gpus_engines_compute_on(
    settings: dict[str, Any], found: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    assert gpus_used(EngineConfig(**settings)) == used
