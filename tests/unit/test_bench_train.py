"""The parts of bench/train.py that need no training: traces, counts, figures, settings."""

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.artifacts import open_artifact
from stages.data.rows import PAIRS
from stages.data.tokens import PairTokens

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("bench_train", BENCH / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def traces(bench: ModuleType) -> ModuleType:
    return sys.modules["_traces"]


@pytest.fixture(scope="module")
def sides(bench: ModuleType) -> ModuleType:
    return sys.modules["_sides"]


@pytest.mark.parametrize("trace", ["chat", "math", "rag"])
def test_lengths_have_the_medians_of_their_trace_and_fit(traces: Any, trace: str) -> None:
    pairs = traces.draw_pairs(trace, 4000, vocab_size=100)
    for name, median in zip(PairTokens._fields, traces.MEDIANS[trace], strict=True):
        lengths = [len(getattr(pair, name)) for pair in pairs]
        # The cut takes 6% of the median off rag's prompts.
        assert statistics.median(lengths) == pytest.approx(median, rel=0.07)
        assert min(lengths) >= 1
    assert max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs) <= 1024
    ids = [token for pair in pairs[:100] for tokens in pair for token in tokens]
    assert traces.FIRST_TOKEN <= min(ids) <= max(ids) < 100


def test_pairs_depend_on_the_arguments_alone(traces: Any) -> None:
    assert traces.draw_pairs("math", 5, 50) == traces.draw_pairs("math", 5, 50)
    assert traces.draw_pairs("math", 5, 50) != traces.draw_pairs("math", 5, 50, seed=1)


def test_useful_flops_of_a_small_case_by_hand(traces: Any) -> None:
    shape = traces.Shape(
        num_layers=1,
        hidden_size=4,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=8,
        vocab_size=10,
    )
    # Queries and output 2*4*4, keys and values 2*4*2, gate, up and down 3*4*8.
    assert shape.layer_weights == 32 + 16 + 96
    pair = PairTokens(prompt=[3, 4], chosen=[5], rejected=[6])
    linear = 2 * 144 * 4  # four tokens: the prompt's two count once
    head = 2 * 10 * 4 * 2  # two response tokens
    seen = (1 + 2 + 3) + (2 + 1)  # the rejected token sees the prompt and itself
    assert traces.forward_flops(shape, [pair]) == linear + head + 4 * 4 * seen
    assert traces.unique_tokens([pair, pair]) == 8


@pytest.mark.parametrize("name", ["tiny", "0.5b"])
def test_a_shape_counts_the_weights_of_the_real_model(traces: Any, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(traces.model_config(traces.SHAPES[name]))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert traces.SHAPES[name].num_weights == matrices


def test_a_gpu_is_known_by_its_name(traces: Any) -> None:
    assert traces.gpu_peak("NVIDIA H100 80GB HBM3; x86_64, 16 cores") == 989e12
    assert traces.gpu_peak("NVIDIA H100 PCIe") == 756e12
    assert traces.gpu_peak("a GPU of tomorrow") is None


def test_pairs_are_written_as_the_pair_stage_writes_them(traces: Any, tmp_path: Path) -> None:
    pairs = traces.draw_pairs("math", 3, 50)
    traces.write_pairs(pairs, tmp_path / "pairs")
    artifact = open_artifact(tmp_path / "pairs", stages=("pair",))
    (part,) = artifact.files("part-")
    table = pq.read_table(part)
    assert table.schema.equals(PAIRS)
    assert table["chosen_token_ids"].to_pylist() == [pair.chosen for pair in pairs]
    assert artifact.manifest.counts["pairs"] == 3


def measured(bench: Any, seconds: list[float], peak_mib: int, losses: list[float]) -> Any:
    side = bench.Measured()
    answer = {"peak_bytes": peak_mib << 20, "settings": {"a": 1}, "losses": losses}
    answer |= {"cpu_s": 1.0, "wall_s": 2.0, "peak_flops": [100e9]}
    side.add(answer | {"reference_s": 9.0, "train_s": 9.0}, warm_up=True)
    for value in seconds:
        parts = {"reference_s": value / 4, "train_s": value * 3 / 4, "outside_s": 0.5}
        side.add(answer | parts, warm_up=False)
    return side


def test_the_json_has_the_promised_form(bench: Any, traces: Any, capsys: Any) -> None:
    pairs = traces.draw_pairs("chat", 8, 8192)
    found = {
        "ours": measured(bench, [4.0, 1.0, 2.0], 1000, [0.7, 0.6]),
        "t0": measured(bench, [10.0, 20.0, 30.0], 5000, [0.7, 0.6002]),
        "t1": measured(bench, [8.0, 8.0, 9.0], 4000, [0.7001, 0.6]),
    }
    size = bench.Size(pairs=8, batch=4, repetitions=3)
    row = bench.figures(traces.SHAPES["tiny"], pairs, size, found, peak=100e9)
    promised = {
        "pairs_per_s": 4.0,  # 8 pairs in the median 2.0 s
        "t0_pairs_per_s": 0.4,
        "t1_pairs_per_s": 1.0,
        "ratio_t0": 10.0,
        "ratio_t1": 4.0,
        "memory_ratio_t1": 0.25,
    }
    assert promised.items() <= row.items()
    assert row["loss_max_abs_diff"] == pytest.approx(2e-4)
    train_flops = 3 * traces.forward_flops(traces.SHAPES["tiny"], pairs)
    assert row["share_of_peak"] == pytest.approx(train_flops / 1.5 / 100e9, abs=1e-3)
    assert (row["warmup_steps"], row["repetitions"]) == (2, 3)
    assert row["t1"]["cores"] == [0.5, 0.5, 0.5]

    bench.show({"chat": row})
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["trace", "pairs/s"]
    assert line.split()[:6] == ["chat", "4.00", "0.40", "1.00", "10.00x", "4.00x"]


def test_losses_that_disagree_end_it(bench: Any) -> None:
    sides = {
        "ours": measured(bench, [1.0], 1, [0.7, 0.6]),
        "t1": measured(bench, [1.0], 1, [0.7, 0.602]),
    }
    bench.check_losses("chat", sides, "bf16")
    with pytest.raises(SystemExit, match=r"chat: losses differ by 2.00e-03, more than 0.001"):
        bench.check_losses("chat", sides, "fp32")
    sides["t1"].losses.pop()
    with pytest.raises(SystemExit, match=r"\[2, 1\] steps"):
        bench.check_losses("chat", sides, "bf16")


def spec(sides: Any, side: str, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "side": side,
        "model": "model",
        "pairs": "pairs",
        "few_pairs": "few",
        "folder": "folder",
        "device": "cpu",
        "precision": "fp32",
        "batch": 8,
        "order": [2, 0, 1],
        "learning_rate": 1e-4,
        "repetitions": 3,
    }
    return sides.Spec(**values | changes)


def test_a_spec_survives_its_file(sides: Any, tmp_path: Path) -> None:
    told = spec(sides, "t1", dpo={"torch_compile": True})
    told.write(tmp_path / "spec.json")
    assert sides.Spec.read(tmp_path / "spec.json") == told


def test_t0_is_trl_as_it_comes_and_t1_what_is_fastest(sides: Any) -> None:
    t0 = sides.trl_options(spec(sides, "t0", micro=4))
    t1 = sides.trl_options(spec(sides, "t1", micro=1, dpo={"torch_compile": True}))
    for options in (t0, t1):
        passes = options["gradient_accumulation_steps"]
        assert options["per_device_train_batch_size"] * passes == 8
        assert (options["bf16"], options["beta"]) == (False, sides.BETA)
    chosen = {"gradient_checkpointing", "precompute_ref_log_probs", "optim"}
    assert chosen.isdisjoint(t0)
    assert t1["gradient_checkpointing"] is False
    assert t1["precompute_ref_log_probs"] is True
    assert t1["train_sampling_strategy"] == "group_by_length"
    assert t1["torch_compile"] is True


def test_only_the_first_epoch_of_a_sampler_is_given(sides: Any) -> None:
    orders = sides.Orders([2, 0, 1], lambda: [0, 1, 2])
    assert [list(orders), list(orders), len(orders)] == [[2, 0, 1], [0, 1, 2], 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("trace", ["chat", "math", "rag"])
def test_a_full_run_drops_ten_steps_and_repeats_thrice(bench: Any, device: str, trace: str) -> None:
    size = bench.default_size(device, trace, quick=False)
    assert size.pairs == 10 * size.batch
    assert size.repetitions == 3
