"""Ways to need less memory or time in a layer, none of which may change what it computes."""

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from stages.data.tokens import PairTokens
from stages.model import attention
from stages.model.attention import ATTENTION_NAME, build_layout
from stages.model.memory import apply_activation_checkpointing, compile_layers
from stages.model.pair_forward import pair_logprobs_shared
from tests.parity.test_shared_prompts import (
    PAIRS,
    assert_same,
    make_pairs,
    results,
    shared,
    tiny_model,
)

FAMILIES = ["gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"]
Mode = Literal["none", "full", "selective"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that tiny rows are cut like long ones."""
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", 7)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of one process, for `fully_shard`."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def model_with(family: str, mode: Mode, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.set_attn_implementation(ATTENTION_NAME)
    apply_activation_checkpointing(model, mode)
    return model


def assert_same_bits(
    ours: tuple[Tensor, dict[str, Tensor]], twin: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert torch.equal(ours[0], twin[0])
    assert ours[1].keys() == twin[1].keys()
    for name, grad in twin[1].items():
        assert torch.equal(ours[1][name], grad), name


def sharded_results(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The results of a model whose layers are sharded over one process."""
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    sums, grads = results(model, shared)
    return sums, {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made while it lasts that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_every_bit(family: str) -> None:
    twin = results(model_with(family, "none"), shared)
    for mode in ("full", "selective"):
        model = model_with(family, mode)
        assert_same_bits(results(model, shared), twin)
        assert_same_bits(results(model, shared), twin)  # nothing is left from the first time


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_keeps_every_bit_under_autocast(mode: Mode) -> None:
    def autocast(model: PreTrainedModel) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return shared(model)

    twin = results(model_with("qwen2", "none"), autocast)
    assert_same_bits(results(model_with("qwen2", mode), autocast), twin)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_keeps_every_bit_of_lora(mode: Mode) -> None:
    peft = pytest.importorskip("peft")

    def with_lora(mode: Mode) -> PreTrainedModel:
        model = tiny_model("llama")
        model.set_attn_implementation(ATTENTION_NAME)
        torch.manual_seed(0)
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, adapter).base_model.model
        apply_activation_checkpointing(model, mode)
        return model.train()

    assert_same_bits(results(with_lora(mode), shared), results(with_lora("none"), shared))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_checkpointing_works_in_sharded_layers(mode: Mode, one_process: None) -> None:
    twin = results(model_with("qwen2", "none"), shared)
    model = model_with("qwen2", mode)
    assert_same_bits(sharded_results(model), twin)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_full_keeps_less_than_selective_and_that_less_than_none(family: str) -> None:
    layout = build_layout(make_pairs([(20, 40, 30)] * 4), share=True)
    kept, peak = {}, {}
    for mode in ("none", "full", "selective"):
        model = model_with(family, mode)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            out = pair_logprobs_shared(model, layout, chunk_size=8)
            kept[mode] = live.now
            out.chosen_B.sum().backward()
        peak[mode] = live.peak
    assert kept["full"] < 0.6 * kept["selective"], kept
    assert kept["selective"] < 0.7 * kept["none"], kept
    assert peak["full"] < peak["selective"] < peak["none"], peak


def test_selective_computes_no_attention_again_and_half_of_the_products() -> None:
    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in ("none", "full", "selective"):
        with Calls() as calls:
            results(model_with("llama", mode, num_hidden_layers=1), shared)
        flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
        counts[mode] = (calls.names.count("aten::mm"), calls.names.count(flash))
    products, pieces = counts["none"]
    # A layer has 7 products: q k v o gate up down. The last is never needed again.
    assert counts["full"] == (products + 6, 2 * pieces)
    assert counts["selective"] == (products + 3, pieces)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("multiple", [16, 64, 1000])
def test_padding_changes_no_result(share: bool, multiple: int) -> None:
    model = model_with("gpt2", "none")  # its table of positions has 64 rows

    def padded(model: PreTrainedModel) -> Any:
        return pair_logprobs_shared(model, build_layout(PAIRS, share, multiple))

    twin = results(model, lambda m: pair_logprobs_shared(m, build_layout(PAIRS, share)))
    assert_same(results(model, padded), twin)


def test_padding_worked_by_hand() -> None:
    pairs = [PairTokens([10, 11], [20, 21], [30])]
    layout = build_layout(pairs, share=True, pad_to_multiple=12)
    assert layout.input_ids_T.tolist() == [10, 11, 20, 21, 30, 0, 0, 0, 0, 0, 0, 0]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3, 0, 1, 2]
    assert layout.segments.parts == ((0, 4, 0, 0), (4, 1, 0, 2), (5, 4, 0, 0), (9, 3, 0, 0))
    assert layout.num_tokens == 12 and layout.num_padding == 7 and layout.num_pairs == 1
    assert layout.to("cpu").num_padding == 7
    assert layout.predictor_N.tolist() == [1, 2, 1]
    assert build_layout(pairs, share=True, pad_to_multiple=5).num_padding == 0


def test_padding_fits_the_window_that_its_row_fits() -> None:
    model = model_with("mistral", "none", sliding_window=43)  # the longest sequence has 43 tokens
    layout = build_layout(PAIRS, share=True, pad_to_multiple=1000)
    assert layout.num_padding > 43
    out = pair_logprobs_shared(model, layout)
    plain = pair_logprobs_shared(model, build_layout(PAIRS, share=True))
    torch.testing.assert_close(out.rejected_B, plain.rejected_B, rtol=1e-5, atol=0)


def compiled(mode: Mode) -> PreTrainedModel:
    model = model_with("qwen2", mode)
    plain = results(model, shared)
    compile_layers(model)
    assert_same(results(model, shared), plain)
    return model


@needs_compiler
def test_compiled_layers_give_the_same() -> None:
    torch._dynamo.reset()
    model = compiled("none")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0

    def longer(model: PreTrainedModel) -> Any:
        return pair_logprobs_shared(model, build_layout([*PAIRS, *PAIRS[2:]], share=True))

    compiled_results = results(model, longer, num_pairs=8)
    assert_same(compiled_results, results(model_with("qwen2", "none"), longer, num_pairs=8))
    # One code for rows of every length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@needs_compiler
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_layers_give_the_same_when_checkpointed(mode: Mode) -> None:
    torch._dynamo.reset()
    compiled(mode)


@needs_compiler
@pytest.mark.long
def test_compiled_layers_give_the_same_when_sharded(one_process: None) -> None:
    torch._dynamo.reset()
    twin = results(model_with("qwen2", "none"), shared)
    model = model_with("qwen2", "none")
    compile_layers(model)
    assert_same(sharded_results(model), twin)
