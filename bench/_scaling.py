"""The written model of training on several GPUs: computation, communication, memory, a step.

`bench/scaling.py` tells what it assumes, prints its tables and measures against it.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from _traces import SHAPES, Shape, draw_pairs, forward_flops, unique_tokens

from stages.data.tokens import PairTokens

# -- The written model: what is trained -----------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A Qwen2 of some shape, and what of it is sharded together."""

    name: str
    shape: Shape
    is_tied: bool

    @property
    def layer(self) -> int:
        """Weights of one layer, biases and norms too."""
        width = self.shape.hidden_size
        return self.shape.layer_weights + width + 2 * self.kv_width + 2 * width

    @property
    def layers(self) -> int:
        """Weights of all layers."""
        return self.shape.num_layers * self.layer

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def outer(self) -> int:
        """Weights around the layers: embeddings, last norm, and a head of its own if not tied."""
        return (1 if self.is_tied else 2) * self.head + self.shape.hidden_size

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers + self.outer

    @property
    def kv_width(self) -> int:
        """Width of all keys."""
        return self.shape.hidden_size // self.shape.num_heads * self.shape.num_kv_heads


MODELS = (
    Model("0.5B", SHAPES["0.5b"], is_tied=True),
    Model("1.5B", SHAPES["1.5b"], is_tied=True),
    Model("3B", SHAPES["3b"], is_tied=True),
    Model("7B", Shape(28, 3584, 28, 4, 18_944, 152_064), is_tied=False),
    Model("14B", Shape(48, 5120, 40, 8, 13_824, 152_064), is_tied=False),
    Model("32B", Shape(64, 5120, 40, 8, 27_648, 152_064), is_tied=False),
    Model("72B", Shape(80, 8192, 64, 8, 29_568, 152_064), is_tied=False),
)
"""Qwen2.5, base models."""

GPUS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (64, 512)
TRACE = "chat"
TOKEN_BUDGET = 8192
SAMPLED_PAIRS = 2048


@dataclass(frozen=True)
class Setting:
    """How a model is trained: the recipe's keys that the written model knows."""

    checkpointing: str = "none"
    """activation_checkpointing."""
    group_size: int | None = None
    """sharding.group_size."""
    reshard: bool = True
    """sharding.reshard_after_forward."""
    offload: bool = False
    """sharding.cpu_offload."""
    budget: int = TOKEN_BUDGET
    """token_budget."""

    def group(self, gpus: int) -> int:
        """Return how many ranks hold a copy together."""
        return min(self.group_size or gpus, gpus)

    def label(self, gpus: int) -> str:
        """Return a short name; docs/scaling.md explains it."""
        parts = ["full" if self.group(gpus) == gpus else "hybrid"] if gpus > 1 else ["one"]
        if gpus > 1 and self.group(gpus) == 1:
            parts = ["copies"]
        parts += {"none": [], "selective": ["sel"], "full": ["ckpt"]}[self.checkpointing]
        parts += ["keep"] if gpus > 1 and not self.reshard else []
        parts += ["off"] if self.offload else []
        parts += ["4k"] if self.budget == TOKEN_BUDGET // 2 else []
        return "+".join(parts)


@dataclass(frozen=True)
class Machine:
    """What a step runs on; rates in bytes and operations a second, of one GPU."""

    flops: float
    """Of matrix products as training reaches them."""
    gather_rate: float
    """Of an all-gather's ring inside a node."""
    reduce_rate: float
    """Of a reduce-scatter's or all-reduce's."""
    network_rate: float = math.inf
    """Of one GPU's way out of its node."""
    gpus_a_node: int = 8
    launch_s: float = 0.0
    """Of every collective."""
    hop_s: float = 0.0
    """For every further rank in a ring inside a node."""
    far_hop_s: float = 0.0
    """The same in a ring across nodes."""
    overlaps: bool = True
    """Communication of one layer runs beside the computation of another."""
    host_layer_s: float = 0.0
    """For Python to start one layer's forward pass; twice that for its backward pass."""
    host_micro_batch_s: float = 0.0
    memory_rate: float = math.inf
    """Of the memory that the optimizer's state is in."""
    host_memory_rate: float = math.inf
    """The same of the CPU's, one GPU's share."""
    host_link_rate: float = math.inf
    """Between CPU and GPU."""


MFU = 0.4
H100 = Machine(
    flops=MFU * 989e12,
    gather_rate=350e9,
    reduce_rate=350e9,
    network_rate=40e9,
    launch_s=15e-6,
    hop_s=2e-6,
    far_hop_s=3e-6,
    host_layer_s=0.5e-3,
    host_micro_batch_s=2e-3,
    memory_rate=2.7e12,
    host_memory_rate=50e9,
    host_link_rate=50e9,
)
"""An H100 SXM in nodes of 8, as docs/scaling.md assumes it."""
USABLE_BYTES = 72e9
"""Of its memory: 84e9, less a seventh for fragmentation, CUDA, NCCL, and what this model forgot."""
HOST_BYTES = 190e9
"""Of the CPU's memory, one GPU's share: 1.5 TB a node."""

# -- The written model: communication -------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """Equal collectives of one micro-batch."""

    kind: str
    """gather, reduce (scatter) or all-reduce."""
    phase: str
    """forward or backward."""
    count: int
    size_bytes: int
    """Of the whole tensor that is gathered or added up; for an all-reduce of one rank's shard."""
    ranks: int
    ranks_a_node: int
    """How many of them share one node."""
    exposed: bool
    """Nothing can be computed meanwhile."""

    @property
    def moved_bytes(self) -> float:
        """What one rank sends, and receives, in a ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return self.count * times * self.size_bytes * (self.ranks - 1) / self.ranks

    def seconds(self, machine: Machine) -> float:
        """Return how long they take, one after another.

        A ring that leaves its node does so through the adapters of all its ranks there.
        """
        rate = machine.gather_rate if self.kind == "gather" else machine.reduce_rate
        hop_s = machine.hop_s
        if self.ranks > self.ranks_a_node:
            rate = min(rate, self.ranks_a_node * machine.network_rate)
            hop_s = machine.far_hop_s
        rounds = 2 if self.kind == "all-reduce" else 1
        waits = self.count * (machine.launch_s + rounds * (self.ranks - 1) * hop_s)
        return waits + self.moved_bytes / rate


def messages(
    model: Model,
    setting: Setting,
    gpus: int,
    *,
    is_last: bool,
    layer_bytes: int = 2,
    gpus_a_node: int = 8,
) -> list[Message]:
    """Return the collectives of one micro-batch.

    Each layer is gathered before its forward pass, and again before its backward pass if it was
    freed in between; what is around the layers likewise, in fp32. Gradients are added up in fp32.

    Args:
        is_last: the step's last micro-batch.
        layer_bytes: of a gathered weight: 2 in bf16, 4 in fp32.
    """
    group = setting.group(gpus)
    copies = gpus // group
    near = min(group, gpus_a_node)
    parts = ((1, model.outer, 4, True), (model.shape.num_layers, model.layer, layer_bytes, False))
    found = []
    for count, weights, gathered_bytes, exposed in parts:
        size = weights * gathered_bytes
        if group > 1:
            found.append(Message("gather", "forward", count, size, group, near, exposed))
            if setting.reshard:
                found.append(Message("gather", "backward", count, size, group, near, exposed))
        if group > 1 and (is_last or setting.reshard):
            found.append(Message("reduce", "backward", count, 4 * weights, group, near, exposed))
        if copies > 1 and is_last:
            found.append(
                Message(
                    "all-reduce",
                    "backward",
                    count,
                    4 * weights // group,
                    copies,
                    max(1, min(gpus_a_node, gpus) // group),
                    exposed,
                )
            )
    return found


def bytes_a_step(
    model: Model, setting: Setting, gpus: int, micro_batches: int, layer_bytes: int = 2
) -> float:
    """Return what one rank sends in an optimizer step, and receives."""
    return sum(
        message.moved_bytes
        for number in range(micro_batches)
        for message in messages(
            model, setting, gpus, is_last=number + 1 == micro_batches, layer_bytes=layer_bytes
        )
    )


# -- The written model: computation ---------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What one rank computes in one micro-batch."""

    tokens: int
    """Every prompt counted once."""
    responses: int
    """Tokens of responses."""
    seen: int
    """Tokens that tokens see, summed."""

    def is_below(self, other: "Load") -> bool:
        """Tell whether the other is another, and has no less to do of anything."""
        return self != other and (
            self.tokens <= other.tokens
            and self.responses <= other.responses
            and self.seen <= other.seen
        )


@cache
def trace_pairs(trace: str = TRACE) -> list[PairTokens]:
    """Return pairs of a trace; their lengths are what counts."""
    return draw_pairs(trace, SAMPLED_PAIRS, vocab_size=100)


def load_of(pairs: Sequence[PairTokens]) -> Load:
    """Return the load of some pairs."""
    unit = Shape(1, 1, 1, 1, 0, 0)  # one operation a weight and token, and four a token seen
    tokens = unique_tokens(pairs)
    seen = (forward_flops(unit, pairs) - 2 * unit.layer_weights * tokens) // 4
    return Load(tokens, sum(len(p.chosen) + len(p.rejected) for p in pairs), seen)


def deal(pairs: Sequence[PairTokens], ranks: int, budget: int) -> list[list[Load]]:
    """Return [micro-batch][rank] of a global batch, dealt as the trainer deals it."""
    parts = _dealer().micro_batches(pairs, budget, 8, ranks)
    loads = [[load_of([pairs[i] for i in part or (0,)]) for part in rank] for rank in parts]
    return [list(of_ranks) for of_ranks in zip(*loads, strict=True)]


@cache
def _dealer() -> Any:
    """Return the trainer's own way of dealing; it looks at lengths only."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from stages.model.pairs import PairForward

    with torch.device("meta"):
        config = Qwen2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        model = AutoModelForCausalLM.from_config(config)
    return PairForward(model, "shared", 0)


@cache
def sampled_batches(
    batch: int, ranks: int, budget: int = TOKEN_BUDGET
) -> tuple[list[list[Load]], ...]:
    """Return some global batches of the trace, dealt to ranks."""
    pairs = trace_pairs()
    starts = range(0, min(len(pairs), 8 * batch), batch)
    return tuple(deal(pairs[start : start + batch], ranks, budget) for start in starts)


@cache
def slowest_ranks(
    batch: int, ranks: int, budget: int = TOKEN_BUDGET
) -> tuple[list[list[Load]], ...]:
    """Return `sampled_batches` without the ranks that another one has no less to do than."""
    return tuple(
        [[load for load in set(loads) if not any(map(load.is_below, loads))] for loads in batches]
        for batches in sampled_batches(batch, ranks, budget)
    )


@dataclass(frozen=True)
class Work:
    """Operations of one micro-batch on one rank."""

    forward: float
    backward: float
    """What checkpointing computes again is part of it."""


def work(model: Model, setting: Setting, load: Load) -> Work:
    """Return the operations of matrix products and attention.

    Backward takes twice as many as forward; the head thrice, whose logits are computed again.
    `full` computes a layer again but its last product, `selective` queries, values and gate.
    """
    shape = model.shape
    count, width = shape.num_layers, shape.hidden_size
    products = 2 * count * shape.layer_weights * load.tokens
    attention = 4 * count * width * load.seen
    head = 2 * model.head * load.responses
    last = width * shape.intermediate_size
    again = {
        "none": 0,
        "selective": 2 * count * load.tokens * width * (width + model.kv_width + last // width),
        "full": products - 2 * count * load.tokens * last + attention,
    }[setting.checkpointing]
    layers = products + attention
    return Work(layers + head, 2 * layers + 3 * head + again)


# -- The written model: a step --------------------------------------------------------------------


def step_seconds(
    model: Model,
    setting: Setting,
    gpus: int,
    batch: Sequence[Sequence[Load]],
    machine: Machine = H100,
    layer_bytes: int = 2,
) -> float:
    """Return how long a global batch, [micro-batch][rank], takes.

    In each micro-batch the slowest rank counts, since all wait for each other at every layer.
    Forward and backward pass each take the longest of computation, communication, the CPU's
    starting of kernels, and the way to offloaded weights, plus what nothing can overlap.
    """
    total = optimizer_seconds(model, setting, gpus, machine)
    for number, loads in enumerate(batch):
        sent = messages(
            model,
            setting,
            gpus,
            is_last=number + 1 == len(batch),
            layer_bytes=layer_bytes,
            gpus_a_node=machine.gpus_a_node,
        )
        works = [work(model, setting, load) for load in loads]
        for phase, slowest in (
            ("forward", max(w.forward for w in works)),
            ("backward", max(w.backward for w in works)),
        ):
            computed = slowest / machine.flops
            exposed, hidden = _communication(sent, phase, model.shape.num_layers, machine)
            if machine.overlaps:
                host = _host_seconds(model, setting, phase, machine)
                fetched = _offload_seconds(model, setting, gpus, machine)
                total += exposed + max(computed, hidden, host, fetched)
            else:
                total += exposed + hidden + computed
        total += machine.host_micro_batch_s
    return total


@cache
def ideal_seconds(model: Model, gpus: int, batch: int, machine: Machine = H100) -> float:
    """Return what the matrix products of the sampled batches would take, divided evenly.

    Without checkpointing, and with nothing else in the way.
    """
    loads = [load for loads in sampled_batches(batch, 1) for load in itertools.chain(*loads)]
    works = [work(model, Setting(), load) for load in loads]
    return sum(w.forward + w.backward for w in works) / gpus / machine.flops


def _communication(
    sent: Sequence[Message], phase: str, num_layers: int, machine: Machine
) -> tuple[float, float]:
    """Return seconds that nothing overlaps, and the others; one layer's share is never hidden."""
    exposed = hidden = 0.0
    for message in (m for m in sent if m.phase == phase):
        seconds = message.seconds(machine)
        alone = seconds if message.exposed else seconds / num_layers
        exposed += alone
        hidden += seconds - alone
    return exposed, hidden


def _host_seconds(model: Model, setting: Setting, phase: str, machine: Machine) -> float:
    passes = 1 if phase == "forward" else 2 + (setting.checkpointing != "none")
    return passes * model.shape.num_layers * machine.host_layer_s


def _offload_seconds(model: Model, setting: Setting, gpus: int, machine: Machine) -> float:
    """Each pass reads the shard in fp32; gradients go the other way meanwhile."""
    shard = 4 * model.weights / setting.group(gpus)
    return shard / machine.host_link_rate if setting.offload else 0.0


def optimizer_seconds(model: Model, setting: Setting, gpus: int, machine: Machine) -> float:
    """Return the time of clipping and AdamW.

    AdamW reads 16 bytes a weight and writes 12; clipping reads the gradient twice, writes it once.
    """
    touched = 40 * model.weights / setting.group(gpus)
    return touched / (machine.host_memory_rate if setting.offload else machine.memory_rate)


# -- The written model: memory --------------------------------------------------------------------

HEAD_CHUNK = 1 << 27
"""`CUDA_CHUNK_LOGITS` of stages/objective/logprobs.py."""
KEYS_A_TOKEN = 1.2
"""Keys that CUDA's attention gathers, a token of the row: prompts twice."""


def kept_bytes(model: Model, checkpointing: str, *, on_cpu: bool = False) -> int:
    """Return what autograd keeps of one token in one layer, in bytes, under bf16 autocast.

    The residual stream is fp32: both norms keep their input and what they scaled (16 a width);
    the five products that read a norm keep a bf16 copy each (10), as does the output's (2, which
    attention shares on CUDA). Attention keeps queries, keys, values and output, on a CPU in fp32.
    The MLP keeps gate, its activation, up and their product (8 an intermediate width). `full`
    keeps a layer's input alone, `selective` also what attention, keys, output and up put out.
    """
    shape = model.shape
    width, inner = shape.hidden_size, shape.intermediate_size
    small = 8 + 4 * shape.num_heads  # of the norms, and the log-sum-exp of attention
    if checkpointing == "full":
        return 4 * width
    if checkpointing == "selective":
        outputs = 2 * model.kv_width + 2 * width + 2 * inner  # keys, attention's output, up
        return 4 * width + outputs + (4 if on_cpu else 2) * width + 4 * shape.num_heads
    common = (16 + 10) * width + 8 * inner + small
    if on_cpu:
        return common + (2 + 8) * width + 8 * model.kv_width
    return common + 4 * width + round(2 * 2 * KEYS_A_TOKEN * model.kv_width)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the worst moment of a step."""

    state: float
    """fp32 weights, gradients and both moments of this rank."""
    gathered: float
    """Weights and gradients that are whole for a while."""
    activations: float
    head: float
    """Buffers of the head's chunks, its bf16 copy and gradient."""
    host: float
    """Of the CPU."""

    @property
    def total(self) -> float:
        """All of the GPU's."""
        return self.state + self.gathered + self.activations + self.head

    @property
    def fits(self) -> bool:
        """Whether that much is there."""
        return self.total <= USABLE_BYTES and self.host <= HOST_BYTES


@cache
def memory(model: Model, setting: Setting, gpus: int, tokens: int, micro_batches: int) -> Memory:
    """Return what one GPU holds.

    The worst of two moments counts: the head's backward pass, or that of the last layer.

    Args:
        tokens: of the largest micro-batch.
        micro_batches: of a rank, a step.
    """
    shape, group = model.shape, setting.group(gpus)
    width, inner = shape.hidden_size, shape.intermediate_size
    state = 16 * model.weights / group
    is_sharded = gpus > 1 or setting.offload
    if not is_sharded:
        around = 2.0 * model.layers  # autocast's bf16 copies
        buffers = 0.0
    elif setting.reshard:
        around = 4.0 * model.outer
        buffers = 16.0 * model.layer  # two gathered and one on its way, gradients bf16 and fp32
    else:
        accumulated = 4 * model.weights if micro_batches > 1 else 0
        around = 4.0 * model.outer + 2.0 * model.layers + accumulated
        buffers = 10.0 * model.layer
    kept = shape.num_layers * tokens * kept_bytes(model, setting.checkpointing)
    again = 0 if setting.checkpointing == "none" else tokens * kept_bytes(model, "none")
    passing = tokens * (12 * width + 6 * inner)  # gradients of activations in one layer
    after_layers = 20 * width * tokens  # hidden states of the head, and their gradients
    # bf16 copy, fp32 gradient and one bf16 product; logits in bf16 and fp32, one residual.
    head = 8.0 * model.head + 8.0 * HEAD_CHUNK
    at_head = Memory(state, around, kept + after_layers, head, 0.0)
    in_layer = Memory(state, around + buffers, kept + again + passing, 4.0 * model.head, 0.0)
    worst = max(at_head, in_layer, key=lambda m: m.total)
    return replace(worst, state=0.0, host=state) if setting.offload else worst


# -- The written model: what to take --------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What the written model says of one setting."""

    setting: Setting
    pairs_per_s: float
    efficiency: float
    """`ideal_seconds` over the predicted ones."""
    memory: Memory


def predict(
    model: Model, setting: Setting, gpus: int, batch: int, machine: Machine = H100
) -> Prediction:
    """Return the mean over some global batches of the trace, and the memory of the largest."""
    batches = slowest_ranks(batch, gpus, setting.budget)
    seconds = sum(step_seconds(model, setting, gpus, loads, machine) for loads in batches)
    ideal = ideal_seconds(model, gpus, batch, machine)
    needed = needed_memory(model, setting, gpus, batch)
    return Prediction(setting, batch * len(batches) / seconds, ideal / seconds, needed)


def needed_memory(model: Model, setting: Setting, gpus: int, batch: int) -> Memory:
    """Return the memory that the largest micro-batch of the sampled global batches takes."""
    batches = sampled_batches(batch, gpus, setting.budget)
    tokens = max(load.tokens for loads in batches for ranks in loads for load in ranks)
    return memory(model, setting, gpus, tokens, max(len(loads) for loads in batches))


SIMPLER = 0.97
"""A simpler setting is taken if it reaches this share of the fastest one's rate."""
CHECKPOINTING = ("none", "selective", "full")


def settings(gpus: int) -> Iterator[Setting]:
    """Yield all settings, the simpler ones first."""
    groups = [None, *(size for size in (8, 1) if size < gpus)]
    budgets = (TOKEN_BUDGET, TOKEN_BUDGET // 2)
    for offload, group, mode, budget, reshard in product(
        (False, True), groups, CHECKPOINTING, budgets, (True, False)
    ):
        if reshard or (gpus > 1 and not offload):
            yield Setting(mode, group, reshard, offload, budget)


@cache
def best(model: Model, gpus: int, batch: int, machine: Machine = H100) -> Prediction | None:
    """Return the setting to take; None if none fits."""
    return best_of(model, gpus, batch, tuple(settings(gpus)), machine)


def best_of(
    model: Model,
    gpus: int,
    batch: int,
    candidates: Sequence[Setting],
    machine: Machine = H100,
) -> Prediction | None:
    """Return the first of those settings that fit which is nearly as fast as the fastest."""
    fitting = [s for s in candidates if needed_memory(model, s, gpus, batch).fits]
    found = [predict(model, setting, gpus, batch, machine) for setting in fitting]
    if not found:
        return None
    fastest = max(prediction.pairs_per_s for prediction in found)
    return next(p for p in found if p.pairs_per_s >= SIMPLER * fastest)


# -- The written model: tables --------------------------------------------------------------------


def model_tables() -> dict[str, str]:
    """Return the tables of docs/scaling.md, by name."""
    return {
        "trace": _trace_table(),
        "models": _models_table(),
        "loads": _loads_table(),
        "memory": _memory_table(),
        "traffic": _traffic_table(),
        "sharding": _sharding_table(),
        **{f"take-{batch}": _take_table(batch) for batch in reversed(BATCHES)},
        "rent": _rent_table(),
        "otherwise": _otherwise_table(),
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _trace_table() -> str:
    pairs = trace_pairs()
    load = load_of(pairs)
    rows = [["tokens of a pair, mean", f"{load.tokens / len(pairs):.0f}"]]
    rows.append(["of these in responses", f"{load.responses / len(pairs):.0f}"])
    for batch in BATCHES:
        bins = statistics.fmean(len(loads) for loads in sampled_batches(batch, 1))
        rows.append([f"micro-batches in {batch} pairs, mean", f"{bins:.1f}"])
    return _table(["chat trace", ""], rows)


def _models_table() -> str:
    rows = []
    pairs = trace_pairs()
    load = load_of(pairs)
    for model in MODELS:
        shape, done = model.shape, work(model, Setting(), load)
        heads = f"{shape.num_heads} / {shape.num_kv_heads}"
        rows.append(
            [
                model.name,
                shape.num_layers,
                shape.hidden_size,
                heads,
                f"{shape.intermediate_size:,}",
                "tied" if model.is_tied else "own",
                f"{model.weights / 1e9:.2f}",
                f"{model.layer / 1e6:.0f}",
                f"{model.outer / 1e9:.2f}",
                f"{(done.forward + done.backward) / len(pairs) / 1e12:.1f}",
            ]
        )
    head = ["model", "layers", "width", "heads / kv", "MLP", "head", "weights, G", "a layer, M"]
    return _table([*head, "around the layers, G", "TFLOP a pair"], rows)


def _loads_table() -> str:
    rows = []
    for batch in BATCHES:
        cells = []
        for gpus in GPUS:
            batches = sampled_batches(batch, gpus)
            micros = [[load.tokens for load in ranks] for loads in batches for ranks in loads]
            count = len(micros) / len(batches)
            tokens = statistics.fmean(max(micro) for micro in micros)
            even = sum(map(sum, micros)) / gpus / sum(map(max, micros))
            cells.append(f"{count:.0f} x {tokens / 1e3:.1f}k, {100 * even:.0f}%")
        rows.append([f"{batch} pairs", *cells])
    return _table(["GPUs", *map(str, GPUS)], rows)


def _memory_table() -> str:
    rows = []
    for model in MODELS:
        found = [memory(model, Setting(mode), 8, TOKEN_BUDGET, 1) for mode in CHECKPOINTING]
        states = [f"{16 * model.weights / gpus / 1e9:.1f}" for gpus in (1, 8, 64)]
        whole = max(m.gathered + m.head for m in found)
        kept = [f"{m.activations / 1e9:.0f}" for m in found]
        totals = [f"{m.total / 1e9:.0f}" for m in found]
        cells = (" / ".join(numbers) for numbers in (states, kept, totals))
        state, activations, total = cells
        rows.append([model.name, state, f"{whole / 1e9:.1f}", activations, total])
    head = ["GB", "state on 1 / 8 / 64 GPUs", "whole for a while, up to"]
    return _table([*head, "activations none / sel / ckpt", "in all on 8 GPUs, likewise"], rows)


SHOWN = {
    "full": Setting(),
    "hybrid": Setting(group_size=8),
    "full+keep": Setting(reshard=False),
    "hybrid+keep": Setting(group_size=8, reshard=False),
}


def _traffic_table() -> str:
    rows = []
    for model in MODELS:
        cells = []
        for gpus, setting in [(8, Setting()), *((64, setting) for setting in SHOWN.values())]:
            sent = messages(model, setting, gpus, is_last=True)
            seconds = sum(message.seconds(H100) for message in sent)
            gigabytes = sum(message.moved_bytes for message in sent) / 1e9
            cells.append(f"{gigabytes:.1f}, {1e3 * seconds:.0f} ms")
        load = load_of(trace_pairs())
        done = work(model, Setting(), load)
        seconds = TOKEN_BUDGET / load.tokens * (done.forward + done.backward) / H100.flops
        rows.append([model.name, *cells, f"{1e3 * seconds:,.0f} ms"])
    names = ["full on 8", *(f"{name} on 64" for name in SHOWN)]
    return _table(["GB sent, time", *names, "compute"], rows)


def _sharding_table() -> str:
    rows = []
    for model in MODELS:
        cells = []
        for gpus, setting in product((16, 64), SHOWN.values()):
            candidates = [replace(setting, checkpointing=mode) for mode in CHECKPOINTING]
            found = best_of(model, gpus, 512, candidates)
            cells.append(_short(found.pairs_per_s) if found else "–")
        rows.append([model.name, *cells])
    return _table(["pairs/s", *(f"{gpus}: {name}" for gpus in (16, 64) for name in SHOWN)], rows)


def _take_table(batch: int) -> str:
    rows = []
    for model in MODELS:
        cells = []
        for gpus in GPUS:
            found = best(model, gpus, batch)
            cells.append(f"{_rate(found, gpus)} {found.memory.total / 1e9:.0f}" if found else "–")
        rows.append([model.name, *cells])
    return _table([f"{batch} pairs", *(str(gpus) for gpus in GPUS)], rows)


def _rate(found: Prediction, gpus: int) -> str:
    efficiency = f"({100 * found.efficiency:.0f}%)"
    return f"{_short(found.pairs_per_s)} {efficiency} {found.setting.label(gpus)}"


ITERATION_PAIRS = 50_000
WORTHWHILE = 0.6
"""Efficiency below which a GPU more is not worth its rent."""


def _rent_table() -> str:
    rows = []
    for model in MODELS:
        cells: list[str] = []
        for batch in BATCHES:
            found = {g: p for g in GPUS if (p := best(model, g, batch)) is not None}
            worth = [g for g, p in found.items() if p.efficiency >= WORTHWHILE]
            fewest = next((g for g, p in found.items() if not p.setting.offload), None)
            cells += [str(fewest)] if not cells else []
            if not worth:
                cells += ["–", "–"]
                continue
            gpus = max(worth)
            seconds = ITERATION_PAIRS / found[gpus].pairs_per_s
            shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            cells += [str(gpus), f"{shown}, {gpus * seconds / 3600:.1f}"]
        rows.append([model.name, *cells])
    head = ["model", "fewest without offload"]
    for batch in BATCHES:
        head += [f"up to, {batch} pairs", "50,000 pairs: time, GPU-hours"]
    return _table(head, rows)


def _otherwise_table() -> str:
    slow = replace(H100, network_rate=10e9)
    one = replace(H100, network_rate=40e9 / 8)
    brisk = replace(H100, flops=0.5 * 989e12)
    rows = []
    for model, gpus in product((MODELS[0], MODELS[3], MODELS[6]), (16, 64)):
        cells = []
        for machine in (H100, brisk, slow, one):
            found = best(model, gpus, 512, machine)
            assert found is not None, "it fits on 16"
            cells.append(_rate(found, gpus))
        rows.append([f"{model.name} on {gpus}", *cells])
    head = ["512 pairs", "as above", "MFU 50%", "100 Gbit/s a GPU", "one 400 Gbit/s a node"]
    return _table(head, rows)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
