"""One model over several processes: sharded, filled from disk part by part, gathered again.

FSDP2 (`torch.distributed.fsdp.fully_shard`): every process keeps its rows of each weight and of
the optimizer's state, and gathers a layer's weights only while it computes them.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from stages.config import ShardingConfig
from stages.errors import ConfigError
from stages.model.adapters import (
    Adapter,
    factors,
    read_adapter,
    settings_of,
    transposed_maps,
    weights,
)
from stages.model.group import Group
from stages.model.load import load_model, load_skeleton
from stages.model.pairs import PairForward
from stages.model.source import model_chain
from stages.model.state_files import rows_here


def shard(forward: PairForward, group: Group, config: ShardingConfig, precision: str) -> None:
    """Shard a model, layer by layer, over the ranks of a group.

    In bf16 each layer's weights are gathered in bf16 and its gradients added up in fp32; what
    stands around the layers (embeddings, last norm, head) stays fp32 under autocast, so that the
    residual stream is the same as in one process.

    Raises:
        ConfigError: the ranks cannot be divided into groups of `config.group_size`.
    """
    forward.compute_device = group.device
    mesh = _mesh(group, config.group_size)
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=group.device.type == "cuda")
    half = torch.bfloat16 if precision == "bf16" else None
    inner = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = config.reshard_after_forward
    for layer in layers_of(forward.model):
        fully_shard(
            layer, mesh=mesh, mp_policy=inner, offload_policy=offload, reshard_after_forward=reshard
        )
    fully_shard(
        forward, mesh=mesh, mp_policy=outer, offload_policy=offload, reshard_after_forward=reshard
    )


def layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of a transformers model, in order."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    return [m for m in found if not isinstance(m, nn.Embedding)]


def open_sharded(
    model_dir: Path,
    wrap: Callable[[Any], PairForward],
    group: Group,
    config: ShardingConfig,
    precision: str,
) -> PairForward:
    """Open a model of which no process ever holds the whole, in fp32.

    It is made without weights, sharded, and each process reads its own rows from the safetensors
    files, and adds those of the folder's adapters. Where their names are not those of the model,
    and transformers would translate them, rank 0 loads the whole instead and hands it out.

    Args:
        wrap: makes the module that is sharded from the model. The weights of adapters that it
            attaches are left to `adapters.fill`.
    """
    model = load_skeleton(model_dir)
    forward = wrap(model)
    shard(forward, group, config, precision)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    forward.to_empty(device="cpu" if config.cpu_offload else group.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    _to_device(model, group)
    whole, *adapters = model_chain(model_dir)
    places = _files_of(whole)
    if all(name in places for name, _ in weights(model)):
        _read_rows(model, places, [read_adapter(folder) for folder in adapters])
    else:
        _hand_out(model, model_dir, group)
    return forward


def gathered(model: Any, group: Group, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """Return all weights on rank 0, on the CPU, None elsewhere; every rank must call it.

    An attached adapter is merged into them in fp32.
    """
    adapter, transposed = gathered_adapter(model, group), transposed_maps(model)
    state = {}
    for name, parameter in weights(model):
        full = _whole(parameter, group)
        if group.rank == 0:
            changed = name.removesuffix(".weight")
            if adapter is not None and changed in adapter.factors:
                full = full.detach().float().clone()
                adapter.add_rows(changed, full, 0, transposed=changed in transposed)
            state[name] = full.detach().to("cpu", dtype)
    return state if group.rank == 0 else None


def gathered_adapter(model: Any, group: Group) -> Adapter | None:
    """Return the attached adapter on rank 0, on the CPU, None elsewhere or where there is none.

    Every rank must call it.
    """
    found: dict[str, list[Tensor]] = {}
    for name, _, parameter in factors(model):
        found.setdefault(name, []).append(_whole(parameter, group).detach().to("cpu"))
    if group.rank > 0 or not found:
        return None
    return Adapter(*settings_of(model), {name: (a, b) for name, (a, b) in found.items()})


def synchronise_gradients(forward: nn.Module, *, is_last: bool, every: bool) -> None:
    """Say what the next backward pass does with gradients, of a micro-batch of a step.

    Shards are added up in the last one, or in every one, so that whole gradients are never kept;
    the copies of hybrid sharding only in the last.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(is_last or every)
        forward.set_requires_all_reduce(is_last)


def sharded_parameters(forward: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters as the optimizer is to see them: each rank's own rows."""
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves them gathered
    return dict(model.named_parameters())


def _whole(parameter: Tensor, group: Group) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    on_device: Any = parameter.to(group.device)
    full: Tensor = on_device.full_tensor()
    return full


def _mesh(group: Group, group_size: int | None) -> DeviceMesh:
    size = group_size or group.num_ranks
    if group.num_ranks % size:
        raise ConfigError(
            f"sharding.group_size={size} does not divide {group.num_ranks} processes; "
            "take a divisor, such as the GPUs of one machine"
        )
    if size == group.num_ranks:
        return init_device_mesh(group.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        group.device.type, (group.num_ranks // size, size), mesh_dim_names=("copy", "shard")
    )


def _to_device(model: Any, group: Group) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(group.device))


def _files_of(model_dir: Path) -> dict[str, Path]:
    """Return the file of every tensor of a model folder, by its name."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: model_dir / file for name, file in names.items()}
    found: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            file: Any = opened
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read_rows(model: Any, places: dict[str, Path], adapters: Sequence[Adapter]) -> None:
    files: dict[Path, Any] = {}
    transposed = transposed_maps(model)
    with torch.no_grad():
        for name, parameter in weights(model):
            path = places[name]
            if path not in files:
                files[path] = safe_open(path, framework="pt")
            local, start = rows_here(parameter)
            if local.numel():
                local.copy_(files[path].get_slice(name)[start : start + local.shape[0]])
            changed = name.removesuffix(".weight")
            for adapter in adapters:
                adapter.add_rows(changed, local, start, transposed=changed in transposed)


def _hand_out(model: Any, model_dir: Path, group: Group) -> None:
    whole = dict(load_model(model_dir).named_parameters()) if group.rank == 0 else {}
    with torch.no_grad():
        for name, parameter in weights(model):
            full = torch.empty(parameter.shape, device=group.device)
            if group.rank == 0:
                full.copy_(whole[name])
            dist.broadcast(full, src=0)
            local, start = rows_here(parameter)
            local.copy_(full[start : start + local.shape[0]])
