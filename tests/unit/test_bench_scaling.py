"""The written model of bench/scaling.py: by hand, against the trainer, and in docs/scaling.md."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench._traces import model_config
from stages.config import ShardingConfig
from stages.data.tokens import PairTokens
from stages.model.attention import ATTENTION_NAME, build_layout
from stages.model.group import Group
from stages.model.memory import apply_activation_checkpointing
from stages.model.pairs import PairForward, autocast
from stages.model.sharding import shard, synchronise_gradients
from stages.objective.logprobs import CPU_CHUNK_LOGITS
from tests.parity.test_memory import LiveBytes

ROOT = Path(__file__).parents[2]
PAIRS = [PairTokens([3, 4, 5], [6, 7], [8, 9, 10])] * 2


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The written model, as a module."""
    return load("_scaling")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The measurement, as a module."""
    return load("scaling")


def load(name: str) -> ModuleType:
    folder = ROOT / "bench"
    sys.path.append(str(folder))  # its scripts import each other by their names
    spec = importlib.util.spec_from_file_location(f"bench_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(bench: ModuleType) -> Any:
    """2 layers of width 4, 2 heads, 1 of keys; 6 wide inside; 10 words."""
    return bench.Model("toy", bench.Shape(2, 4, 2, 1, 6, 10), is_tied=False)


def torch_model(shape: Any, *, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = model_config(shape)
    config.tie_word_embeddings = tied
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


# -- Sizes ----------------------------------------------------------------------------------------


def test_weights_are_those_of_the_published_models(bench: ModuleType) -> None:
    published = [
        494_032_768,
        1_543_714_304,
        3_085_938_688,
        7_615_616_512,
        14_770_033_664,
        32_763_876_352,
        72_706_203_648,
    ]
    assert [model.weights for model in bench.MODELS] == published


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_transformers(bench: ModuleType, toy: Any, tied: bool) -> None:
    model = torch_model(toy.shape, tied=tied)
    assert replace(toy, is_tied=tied).weights == model.num_parameters()
    assert toy.layer == sum(p.numel() for p in model.model.layers[0].parameters())


# -- Communication --------------------------------------------------------------------------------


def test_messages_worked_by_hand(bench: ModuleType, toy: Any) -> None:
    # A layer: q, o 16 each, k, v 8 each, MLP 72, biases 4 + 2 + 2, norms 8. Around: 40 + 40 + 4.
    assert (toy.layer, toy.outer) == (136, 84)
    sent = bench.messages(toy, bench.Setting(), 4, is_last=False)
    # In bf16 twice 272 a layer, gradients 544; around them in fp32. A ring sends 3/4 of each.
    assert sum(m.moved_bytes for m in sent) == 0.75 * (2 * (2 * 272 + 544) + 3 * 4 * 84)
    assert bench.bytes_a_step(toy, bench.Setting(), 4, 2) == 2 * sum(m.moved_bytes for m in sent)
    kept = bench.Setting(reshard=False)
    once = 0.75 * (2 * 272 + 4 * 84)
    assert bench.bytes_a_step(toy, kept, 4, 3) == 3 * once + 0.75 * (2 * 544 + 4 * 84)
    # Copies of 2 ranks each: a ring of 2 sends half; a copy's half of 544 goes there and back.
    hybrid = bench.messages(toy, bench.Setting(group_size=2), 4, is_last=True)
    assert sum(m.moved_bytes for m in hybrid) == (
        0.5 * (2 * (2 * 272 + 544) + 3 * 4 * 84) + 2 * 0.5 * (2 * 544 + 4 * 84) / 2
    )
    assert bench.messages(toy, bench.Setting(), 1, is_last=True) == []


def test_a_ring_is_as_fast_as_its_way_out_of_the_node(bench: ModuleType) -> None:
    machine = bench.Machine(
        1.0, gather_rate=100.0, reduce_rate=50.0, network_rate=10.0, launch_s=1.0, hop_s=0.5,
        far_hop_s=2.0,
    )  # fmt: skip

    def seconds(kind: str, ranks: int, near: int) -> float:
        message = bench.Message(kind, "forward", 3, 800, ranks, near, exposed=False)
        return float(message.seconds(machine))

    assert seconds("gather", 8, 8) == pytest.approx(3 * (1 + 7 * 0.5) + 3 * 700 / 100)
    assert seconds("reduce", 8, 8) == pytest.approx(3 * (1 + 7 * 0.5) + 3 * 700 / 50)
    assert seconds("gather", 16, 8) == pytest.approx(3 * (1 + 15 * 2) + 3 * 750 / 80)
    assert seconds("all-reduce", 2, 1) == pytest.approx(3 * (1 + 2 * 2) + 3 * 800 / 10)


@pytest.fixture(params=[(8, True), (16, False)], ids=["8-tied", "16-untied"])
def fake_group(request: pytest.FixtureRequest) -> Iterator[tuple[Group, bool]]:
    """A rank of several that are not there: collectives have sizes, but no results."""
    ranks, tied = request.param
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    yield Group(0, ranks, torch.device("cpu")), tied
    dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """The kind of every collective, and its larger tensor's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {
            "c10d::_allgather_base_": "gather",
            "c10d::_reduce_scatter_base_": "reduce",
            "c10d::allreduce_": "all-reduce",
        }
        if func.name().startswith("c10d::"):
            leaves = torch.utils._pytree.tree_leaves(args)
            sizes = [x.untyped_storage().nbytes() for x in leaves if isinstance(x, torch.Tensor)]
            self.found.append((kinds[func.name()], max(sizes)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("group_size", "precision"), [(None, "bf16"), (4, "bf16"), (1, "fp32")])
def test_messages_are_those_of_the_trainer(
    bench: ModuleType,
    fake_group: tuple[Group, bool],
    group_size: int | None,
    reshard: bool,
    precision: str,
) -> None:
    group, tied = fake_group
    shape = bench.Shape(2, 64, 4, 2, 128, 256)  # every tensor's rows are a multiple of 16
    forward = PairForward(torch_model(shape, tied=tied), "shared", 0, 64)
    config = ShardingConfig(group_size=group_size, reshard_after_forward=reshard)
    shard(forward, group, config, precision)
    forward.train()
    with Sent() as sent:
        for number in range(3):
            synchronise_gradients(forward, is_last=number == 2, every=reshard)
            with autocast(group.device, precision):
                out = forward(forward.lay_out(PAIRS))
            out.chosen_B.sum().backward()
    expected = [
        (message.kind, message.size_bytes)
        for number in range(3)
        for message in bench.messages(
            bench.Model("", shape, is_tied=tied),
            bench.Setting(group_size=group_size, reshard=reshard),
            group.num_ranks,
            is_last=number == 2,
            layer_bytes=2 if precision == "bf16" else 4,
        )
        for _ in range(message.count)
    ]
    assert sorted(sent.found) == sorted(expected)


# -- Computation ----------------------------------------------------------------------------------


def test_work_worked_by_hand(bench: ModuleType, toy: Any) -> None:
    # 10 tokens meet 120 weights in each of 2 layers; 7 of them the head's 40; 30 are seen.
    load = bench.Load(tokens=10, responses=7, seen=30)
    layers = 2 * 2 * 120 * 10 + 4 * 2 * 4 * 30
    head = 2 * 40 * 7
    plain = bench.work(toy, bench.Setting(), load)
    assert (plain.forward, plain.backward) == (layers + head, 2 * layers + 3 * head)
    full = bench.work(toy, bench.Setting("full"), load)
    assert full.backward - plain.backward == layers - 2 * 2 * 10 * 4 * 6
    selective = bench.work(toy, bench.Setting("selective"), load)
    assert selective.backward - plain.backward == 2 * 2 * 10 * (4 * 4 + 4 * 2 + 4 * 6)


def test_loads_worked_by_hand(bench: ModuleType) -> None:
    # 3 + 2 tokens see 1 + … + 5; the other 3 see the prompt each, and 1 + 2 + 3.
    assert bench.load_of(PAIRS[:1]) == bench.Load(tokens=8, responses=5, seen=15 + 9 + 6)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_every_pair_is_dealt_once(bench: ModuleType, ranks: int) -> None:
    pairs = bench.trace_pairs()[:64]
    dealt = bench.deal(pairs, ranks, 8192)
    assert {len(loads) for loads in dealt} == {ranks}
    loads = [load for of_ranks in dealt for load in of_ranks]
    whole = bench.load_of(pairs)
    assert sum(load.tokens for load in loads) == whole.tokens
    assert sum(load.seen for load in loads) == whole.seen


def test_a_step_takes_the_longest_of_what_overlaps(bench: ModuleType, toy: Any) -> None:
    light, heavy = bench.Load(10, 5, 20), bench.Load(20, 10, 80)
    work = bench.work(toy, bench.Setting(), heavy)
    machine = bench.Machine(
        flops=100.0, gather_rate=1e9, reduce_rate=1e9, memory_rate=10.0, host_micro_batch_s=3.0
    )
    computed = (work.forward + work.backward) / 100 + 3
    optimizer = 40 * toy.weights / 2 / 10

    def seconds(machine: Any, batch: Any) -> float:
        return float(bench.step_seconds(toy, bench.Setting(), 2, batch, machine))

    batch = [[light, heavy], [heavy, light]]
    assert seconds(machine, batch) == pytest.approx(2 * computed + optimizer, rel=1e-4)
    slow = replace(machine, gather_rate=1e-3, reduce_rate=1e-3)
    sent = bench.bytes_a_step(toy, bench.Setting(), 2, 2) / 1e-3
    # One layer's gathering and reducing is never hidden; the other's hides the computation.
    assert seconds(slow, batch) == pytest.approx(sent + 6 + optimizer)
    alone = replace(slow, overlaps=False)
    assert seconds(alone, batch) == pytest.approx(sent + 2 * computed + optimizer)
    host = replace(machine, host_layer_s=1e4)
    assert seconds(host, batch) == pytest.approx(2 * 3 * 2 * 1e4 + 6 + optimizer, rel=1e-4)


# -- Memory ---------------------------------------------------------------------------------------


def counted(bench: ModuleType, shape: Any, mode: Any) -> dict[str, float]:
    """Bytes a token that one layer adds: what autograd saves, and all tensors that live on."""
    layout = build_layout([PairTokens([3] * 30, [4] * 50, [5] * 40)] * 6, share=False)
    tokens = layout.input_ids_T.numel()
    found = []
    for layers in (1, 3):
        model = torch_model(replace(shape, num_layers=layers), tied=True).train()
        model.set_attn_implementation(ATTENTION_NAME)
        apply_activation_checkpointing(model, mode)
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            if tokens in tensor.shape:  # weights and their bf16 copies are counted elsewhere
                storage = tensor.untyped_storage()
                saved[storage._cdata] = storage.nbytes()
            return tensor

        autograd = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with LiveBytes() as live, autograd, torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(
                input_ids=layout.input_ids_T.unsqueeze(0),
                position_ids=layout.position_ids_T.unsqueeze(0),
                use_cache=False,
                spin_segments=layout.segments,
            ).last_hidden_state
            living = live.now
        del hidden
        casts = 2 * layers * bench.Model("", shape, is_tied=True).shape.layer_weights
        found.append((sum(saved.values()), living - casts))
    (saved_1, living_1), (saved_3, living_3) = found
    return {"saved": (saved_3 - saved_1) / 2 / tokens, "living": (living_3 - living_1) / 2 / tokens}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_kept_bytes_are_what_is_kept_on_a_cpu(bench: ModuleType, mode: Any) -> None:
    shape = bench.Shape(1, 128, 4, 2, 320, 64)
    found = counted(bench, shape, mode)
    formula = bench.kept_bytes(bench.Model("", shape, is_tied=True), mode, on_cpu=True)
    assert found["living"] == pytest.approx(formula, abs=1)
    if mode == "none":  # checkpointing keeps its tensors elsewhere
        assert found["saved"] == pytest.approx(formula, abs=1)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_peak_is_near_the_formula(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    kept = bench.kept_bytes
    monkeypatch.setattr(bench, "HEAD_CHUNK", CPU_CHUNK_LOGITS)
    monkeypatch.setattr(bench, "kept_bytes", lambda model, how: kept(model, how, on_cpu=True))
    shape = bench.Shape(6, 128, 4, 2, 512, 4096)
    model = torch_model(shape, tied=True).train()
    apply_activation_checkpointing(model, mode)
    forward = PairForward(model, "shared", 0, 1024)
    layout: Any = forward.lay_out(bench.trace_pairs()[:2])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        with autocast(torch.device("cpu"), "bf16"):
            out = forward(layout)
        out.chosen_B.sum().backward()
    formula = bench.memory.__wrapped__(
        bench.Model("", shape, is_tied=True), bench.Setting(mode), 1, len(layout.input_ids_T), 1
    )
    # Above it by what a CPU's attention keeps twice, below it where not all worst things meet.
    assert 0.75 < live.peak / (formula.total - formula.state) < 1.05


def test_memory_worked_by_hand(bench: ModuleType, toy: Any) -> None:
    assert toy.weights == 2 * 136 + 84 == 356
    kept = bench.kept_bytes(toy, "none")
    assert kept == 26 * 4 + 8 * 6 + (8 + 4 * 2) + 4 * 4 + round(4 * 1.2 * 2)
    assert bench.kept_bytes(toy, "full") == 4 * 4
    found = bench.memory(toy, bench.Setting(), 4, 10, 1)
    assert found.state == 16 * 356 / 4
    assert found.gathered == 4 * 84  # the head's buffers are larger than a layer's
    assert found.head == 8 * 40 + 8 * bench.HEAD_CHUNK
    assert found.activations == 2 * 10 * kept + 20 * 4 * 10
    offloaded = bench.memory(toy, bench.Setting(offload=True), 4, 10, 1)
    assert (offloaded.state, offloaded.host) == (0, found.state)
    # Gathered weights stay, and whole gradients where several micro-batches add up.
    kept_weights = bench.Setting(reshard=False)
    assert bench.memory(toy, kept_weights, 4, 10, 1).gathered == 4 * 84 + 2 * 272
    assert bench.memory(toy, kept_weights, 4, 10, 2).gathered == 4 * 84 + 2 * 272 + 4 * 356
    assert bench.memory(toy, bench.Setting(), 1, 10, 1).gathered == 2 * 272


# -- What to take, and the document ---------------------------------------------------------------


def test_settings_that_do_not_fit_are_not_taken(bench: ModuleType) -> None:
    largest = bench.MODELS[-1]
    assert bench.best(largest, 1, 64) is None
    taken = bench.best(largest, 64, 512)
    assert taken.memory.total <= bench.USABLE_BYTES
    assert taken.setting.label(64).startswith("full+")
    assert bench.best(bench.MODELS[0], 1, 512).setting == bench.Setting()


def test_labels_name_what_is_set(bench: ModuleType) -> None:
    assert bench.Setting().label(1) == "one"
    assert bench.Setting("selective", None, False).label(8) == "full+sel+keep"
    assert bench.Setting("full", 8, True, True, 4096).label(16) == "hybrid+ckpt+off+4k"
    assert bench.Setting(group_size=8).label(8) == "full"
    assert bench.Setting(group_size=1).label(8) == "copies"


def test_tables_of_the_document_are_those_of_the_formulas(bench: ModuleType) -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- ([\w-]+) -->\n((?:\|.*\n)+)", text))
    tables = {name: f"{table}\n" for name, table in bench.model_tables().items()}
    assert found == tables, "python bench/scaling.py --model-tables prints them anew"


# -- The measurement ------------------------------------------------------------------------------


def test_losses_are_compared_with_the_first(script: ModuleType) -> None:
    curves = {
        script.Ranks(1, 1): script.Measured(losses=[0.7, 0.6]),
        script.Ranks(2, 1): script.Measured(losses=[0.7, 0.61]),
        script.Ranks(1, 2): script.Measured(),
    }
    assert script.loss_difference(curves) == pytest.approx(0.01)
    script.compare_losses(curves, "bf16")
    with pytest.raises(SystemExit, match=r"losses differ by 1.00e-02, more than 0.001"):
        script.compare_losses(curves, "fp32")
    curves[script.Ranks(2, 1)].losses[0] = float("nan")
    with pytest.raises(SystemExit, match="losses differ by nan"):
        script.compare_losses(curves, "bf16")


def test_communication_is_summed_over_the_step(script: ModuleType, toy: Any) -> None:
    probe = {"gather layer": 1.0, "gather outer": 10.0, "reduce layer": 100.0, "reduce outer": 1e3}
    seconds = sum(script.probe_seconds(probe, toy, script.Setting(), 2, 3))
    assert seconds == 3 * (2 * 2 * 1 + 2 * 10 + 2 * 100 + 1000)
    kept = script.Setting(reshard=False)
    assert sum(script.probe_seconds(probe, toy, kept, 2, 3)) == 3 * (2 + 10) + 2 * 100 + 1000
