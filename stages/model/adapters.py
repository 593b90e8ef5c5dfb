"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear maps of a model, through peft.

A linear map W of an adapted model computes (W + scaling · B · A) x, scaling = alpha / rank; W stays
as it is, A and B are trained. peft puts the adapters into the model and its library reads what is
written here; the weights are drawn, stored, read and merged by us, so that they are the same bits
however many processes there are, and so that an adapter is used without peft.

Shape legend: I = width of what goes in, O = of what comes out, R = rank.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.config import LoraConfig
from stages.errors import ConfigError, InputError
from stages.model.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Base
from stages.model.state_files import rows_here

_NAME = "default"
"""peft's name for the one adapter that a model has."""
_FACTORS = {"A": "lora_A", "B": "lora_B"}
_STORED = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "target_modules", "fan_in_fan_out", "base_model_name_or_path", "revision",
     "inference_mode", "peft_version", "task_type"}
)  # fmt: skip
_NEUTRAL = {
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}
"""Settings without effect on a plain adapter; any other that is not empty is refused."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on its own."""

    rank: int
    alpha: float
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """From the name of a linear map to its A_RI and B_OR, in fp32 on the CPU."""

    def add_rows(self, name: str, rows: Tensor, start: int, *, transposed: bool) -> None:
        """Add to some rows of a map's fp32 weight, in place, what the adapter adds to them.

        Args:
            start: number of the first row.
            transposed: the weight is stored as I times O (GPT-2's Conv1D), not O times I.
        """
        if name not in self.factors:
            return
        a_RI, b_OR = (factor.to(rows.device) for factor in self.factors[name])
        stop = start + rows.shape[0]
        change = (b_OR @ a_RI[:, start:stop]).T if transposed else b_OR[start:stop] @ a_RI
        rows += change * (self.alpha / self.rank)


# -- Training one ---------------------------------------------------------------------------------


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("peft") is None:
        raise ConfigError(
            "train.lora needs peft, which is not installed; pip install 'spin-selfplay[peft]'"
        )


def attach(model: Any, config: LoraConfig) -> None:
    """Put adapters, whose weights `fill` gives them, on a model's maps; only they are trained.

    Raises:
        ConfigError: the recipe names a module that is no linear map, or that peft refuses.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, to no use here
    import peft

    maps = _chosen_maps(model, config.target_modules)
    try:
        peft.inject_adapter_in_model(
            _peft_config(config.rank, config.alpha, list(maps), _are_transposed(maps.values())),
            model,
            _NAME,
            low_cpu_mem_usage=True,
        )
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"train.lora: peft refuses this model ({reason})") from error
    for _, layer in _adapted(model):
        layer.cast_input_dtype_enabled = False  # autocast casts, and keeps no fp32 copy of inputs
        if model.device.type != "meta":
            for modules in (layer.lora_A, layer.lora_B):
                modules.to_empty(device=model.device)


def fill(model: Any, config: LoraConfig, seed: int, folder: Path | None) -> None:
    """Give the attached adapters their weights, or this process's rows of them.

    Args:
        seed: decides, with each map's name, the weights of a fresh adapter: A uniform as peft
            draws it, B = 0, so that the model still is what it was.
        folder: of the adapter to go on from; None draws a fresh one.

    Raises:
        ConfigError: that adapter has another rank, alpha, or other maps than the recipe says.
    """
    layers = dict(_adapted(model))
    if folder is None:
        drawn = {name: _draw(name, layer, seed) for name, layer in layers.items()}
        adapter = Adapter(config.rank, config.alpha, drawn)
    else:
        adapter = read_adapter(folder)
        _check_same(adapter, config, layers, folder)
    with torch.no_grad():
        for name, layer in layers.items():
            for factor, parameter in zip(adapter.factors[name], _factors(layer), strict=True):
                local, start = rows_here(parameter)
                local.copy_(factor[start : start + local.shape[0]])


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's own weights, without those of adapters, by the names of a plain model."""
    for name, parameter in model.named_parameters():
        if not any(f".{factor}.{_NAME}." in name for factor in _FACTORS.values()):
            yield name.replace(".base_layer.", "."), parameter


def factors(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Yield map, factor (A or B) and parameter of a model's adapters."""
    for name, layer in _adapted(model):
        for letter, parameter in zip(_FACTORS, _factors(layer), strict=True):
            yield name, letter, parameter


def transposed_maps(model: Any) -> set[str]:
    """Return the names of the maps whose weight is stored as I times O."""
    return {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }


def settings_of(model: Any) -> tuple[int, float]:
    """Return rank and alpha of a model's adapters."""
    _, layer = next(_adapted(model))
    return layer.r[_NAME], layer.lora_alpha[_NAME]


# -- On the disk ----------------------------------------------------------------------------------


def write_adapter(folder: Path, model: Any, adapter: Adapter, base: Base) -> None:
    """Write an adapter as peft does, but with equal bytes for equal adapters.

    Args:
        model: the model that it was trained in.
    """
    stored = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.contiguous()
        for name, both in adapter.factors.items()
        for letter, factor in zip(_FACTORS, both, strict=True)
    }
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    maps = [model.get_submodule(name).base_layer for name in adapter.factors]
    names = _shortest(model, list(adapter.factors))
    settings = _peft_config(adapter.rank, adapter.alpha, names, _are_transposed(maps)).to_dict()
    settings |= {"target_modules": sorted(names), "inference_mode": True}
    if base.is_on_hub:
        settings["base_model_name_or_path"], _, settings["revision"] = base.path.rpartition("@")
    elif not base.is_inside_run:
        settings["base_model_name_or_path"] = base.path
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder.

    Raises:
        InputError: it is of a kind that is more than plain LoRA, which spin does not write.
    """
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank, alpha = settings["r"], settings["lora_alpha"]
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} holds no adapter that can be read ({reason})") from error
    strange = [
        f"{name}={value!r}"
        for name, value in settings.items()
        if value and name not in _UNDERSTOOD and value != _NEUTRAL.get(name)
    ]
    found: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in tensors.items():
        match = _STORED.fullmatch(stored)
        if match is None:
            strange.append(stored)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor.float()
    strange += [name for name, both in found.items() if len(both) < len(_FACTORS)]
    if strange:
        raise InputError(
            f"{folder} holds more than plain LoRA ({', '.join(strange)[:200]}); "
            "merge it into its base with peft, and give that model"
        )
    pairs = {name: (both["A"], both["B"]) for name, both in found.items()}
    return Adapter(rank, alpha, pairs)


def merge(model: Any, folder: Path) -> None:
    """Add an adapter's changes to a plain model in fp32, in place.

    Raises:
        InputError: it belongs to another model.
    """
    adapter, transposed = read_adapter(folder), transposed_maps(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a_RI, b_OR) in adapter.factors.items():
            shape = (b_OR.shape[0], a_RI.shape[1])
            weight = parameters.get(f"{name}.weight")
            if weight is None or tuple(weight.shape) != shape[:: -1 if name in transposed else 1]:
                raise InputError(
                    f"{folder} changes {name} of shape {shape}, which its base does not have; "
                    "put the base back that it was trained on"
                )
            adapter.add_rows(name, weight, 0, transposed=name in transposed)


# -- Parts ----------------------------------------------------------------------------------------


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the maps of a model that have an adapter, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the parameters A_RI and B_OR of an adapted map."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _peft_config(rank: int, alpha: float, maps: list[str], transposed: bool) -> Any:
    import peft

    number: Any = int(alpha) if float(alpha).is_integer() else alpha  # peft says int, takes both
    return peft.LoraConfig(
        r=rank,
        lora_alpha=number,
        lora_dropout=0.0,
        target_modules=maps,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def _are_transposed(maps: Any) -> bool:
    return all(isinstance(module, Conv1D) for module in maps)


def _chosen_maps(model: Any, wish: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear maps that a recipe means, by name; the head is none of them.

    The head's weight is read as it is by the chunked loss, and may be that of the embeddings.
    """
    head = model.get_output_embeddings()
    maps: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if wish == "all-linear":
        return maps
    for part in wish:
        if not any(_means(part, name) for name in maps):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in maps}))
            raise ConfigError(
                f"train.lora.target_modules: {part!r} is no linear map in the layers of this "
                f"{model.config.model_type} model; it has {known}"
            )
    return {n: module for n, module in maps.items() if any(_means(part, n) for part in wish)}


def _means(part: str, name: str) -> bool:
    """Tell whether peft takes `part` to mean the module `name`."""
    return name == part or name.endswith(f".{part}")


def _shortest(model: Any, maps: list[str]) -> list[str]:
    """Return the last parts of some maps' names if these mean no other module, else the names."""
    parts = sorted({name.rpartition(".")[2] for name in maps})
    meant = [n for n, _ in model.named_modules() if any(_means(part, n) for part in parts)]
    return parts if sorted(meant) == sorted(maps) else maps


def _draw(name: str, layer: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Return fresh weights of one map: A as kaiming_uniform with a = √5 draws it, B = 0."""
    a_RI, b_OR = _factors(layer)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(a_RI.shape[1])
    drawn = torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator)
    return drawn, torch.zeros(b_OR.shape)


def _check_same(
    adapter: Adapter, config: LoraConfig, layers: Mapping[str, Any], folder: Path
) -> None:
    maps = ", ".join(sorted({name.rpartition(".")[2] for name in adapter.factors}))
    for name, wish, value, is_same in (
        ("rank", config.rank, adapter.rank, config.rank == adapter.rank),
        ("alpha", config.alpha, adapter.alpha, config.alpha == adapter.alpha),
        ("target_modules", config.target_modules, maps, layers.keys() == adapter.factors.keys()),
    ):
        if not is_same:
            raise ConfigError(
                f"train.lora.{name}={wish}, but the adapter {folder} that start=adapter goes on "
                f"from has {value}; set that, or start=merged for a fresh adapter"
            )
