"""Optimizers and learning-rate schedules as recipes name them; optimizer state as tensors."""

import importlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stages.config import OptimConfig
from stages.errors import ConfigError

_EIGHT_BIT_LIBRARIES = {"adamw_8bit_torchao": "torchao", "adamw_8bit_bnb": "bitsandbytes"}
_CONSTANT_STATE = frozenset({"qmap", "qmap1", "qmap2"})
"""The meaning of the 256 codes: the same for every parameter, and made with the state."""


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the recipe names, with weight decay on all of `parameters`.

    The 8-bit ones keep both of AdamW's moments as one byte a value with an fp32 scale every 256
    (arXiv 2110.02861), those of tensors below 4,096 values in fp32; torchao also where the size
    of this process's share is no multiple of 256. torchao compiles its step, which takes seconds
    for each shape of parameter, and on a CPU a C++ compiler. bitsandbytes cannot shard, and waits
    for the GPU after every parameter.

    Raises:
        ConfigError: an 8-bit optimizer's library is missing, or cannot work on sharded parameters.
    """
    parameters = list(parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            parameters,
            lr=config.learning_rate,
            alpha=config.betas[1],
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "adamw_8bit_bnb" and any(isinstance(p, DTensor) for p in parameters):
        raise ConfigError(
            "optimizer=adamw_8bit_bnb: bitsandbytes cannot train sharded parameters; set "
            "optimizer=adamw_8bit_torchao, or train in one process"
        )
    optimizer: torch.optim.Optimizer = _eight_bit_adamw(config.optimizer)(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optimizer


def _eight_bit_adamw(name: str) -> Any:
    library = _EIGHT_BIT_LIBRARIES[name]
    logging.getLogger(library).setLevel(logging.ERROR)  # both warn of kernels that are not used
    try:
        return importlib.import_module(f"{library}.optim").AdamW8bit
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"optimizer={name}: {library} cannot be imported ({reason}); "
            "pip install 'spin-selfplay[optim8]', or set optimizer=adamw"
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; torchao keeps it in a tensor, the others do not."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def step_unless(optimizer: torch.optim.Optimizer, stop: Tensor) -> None:
    """Make a step unless `stop` is 1, when parameters and state stay as they are, bit for bit.

    `stop` is an fp32 scalar, 0 or 1, on the parameters' device, equal on all ranks. Fused AdamW
    hands it to its kernel (as torch's GradScaler does), so nobody waits for a GPU. The others,
    and parameters that are offloaded to the CPU, wait until it is known.
    """
    assert stop.dtype == torch.float32 and stop.ndim == 0, f"stop is {stop.dtype}, {stop.shape}"
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not bool(stop):
            optimizer.step()
        return
    device = optimizer.param_groups[0]["params"][0].device
    fused: Any = optimizer
    # Blocking where it copies: torch's own copy to the CPU would not wait for the value.
    fused.grad_scale, fused.found_inf = None, stop.to(device)
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def export_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return the state as plain tensors: from a parameter's place in order to name to tensor.

    The tensors are the live ones, so clone what must survive the next step. Of sharded parameters
    they are this process's shares. By optimizer (P = the parameter's shape, or its share's; an
    8-bit moment has ceil(numel / 256) scales):
        adamw               step (), exp_avg P, exp_avg_sq P
        rmsprop             step (), square_avg P
        adamw_8bit_torchao  step (), exp_avg.codes P uint8, exp_avg.scale, exp_avg_sq. likewise
        adamw_8bit_bnb      step () int64, state1 and state2 P uint8, absmax1, absmax2
    Small tensors' moments are fp32 in the 8-bit ones too: exp_avg, exp_avg_sq; state1, state2.
    A parameter that had no gradient yet has no entry.
    """
    parameters = _parameters(optimizer)
    with torch.no_grad():
        return {
            index: _plain_tensors(optimizer.state[parameter])
            for index, parameter in enumerate(parameters)
            if optimizer.state.get(parameter)
        }


def import_state(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Replace the state by copies of what `export_state` returned, from tensors on any device.

    Raises:
        ConfigError: it is not the state of such an optimizer over such parameters; 8-bit moments
            also have other scales where a parameter is divided among another number of processes.
    """
    optimizer.state.clear()
    with torch.no_grad():
        for index, parameter in enumerate(_parameters(optimizer)):
            if index in state:
                _fill(optimizer, index, parameter, state[index])


def _fill(
    optimizer: torch.optim.Optimizer, index: int, parameter: Tensor, given: Mapping[str, Tensor]
) -> None:
    blank = _blank_state(optimizer, index, parameter)
    plain = _plain_tensors(blank)
    for name in sorted(plain.keys() | given.keys()):
        ours, theirs = (_form(tensors.get(name)) for tensors in (plain, given))
        if ours != theirs:
            raise ConfigError(
                f"optimizer state: {name} of parameter {index} is {theirs}, this run needs {ours}; "
                "resume with the same model, optimizer and number of processes, or train anew"
            )
        if isinstance(blank.get(name), int):
            blank[name] = int(given[name])
        else:
            plain[name].copy_(given[name])
    optimizer.state[parameter] = blank


def _blank_state(optimizer: torch.optim.Optimizer, index: int, parameter: Tensor) -> dict[str, Any]:
    """Return a parameter's state as its optimizer makes it before the first step."""
    maker: Any = optimizer
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        maker.init_state(optimizer.param_groups[0], parameter, 0, index)
        blank: dict[str, Any] = optimizer.state[parameter]
        return blank
    if hasattr(optimizer, "_new_buffer"):  # torchao
        return {
            "step": torch.tensor(0.0),
            "exp_avg": maker._new_buffer(parameter, True),
            "exp_avg_sq": maker._new_buffer(parameter, False),
        }
    if isinstance(optimizer, torch.optim.RMSprop):
        return {"step": torch.zeros(()), "square_avg": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), device=parameter.device),  # where fused AdamW has it
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return one parameter's state without subclasses of tensors, sharing their memory."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _CONSTANT_STATE:
            continue
        if isinstance(value, int):
            plain[name] = torch.tensor(value)
            continue
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        if type(local) is Tensor:
            plain[name] = local
            continue
        for inner in local.__tensor_flatten__()[0]:
            if inner not in _CONSTANT_STATE:
                plain[f"{name}.{inner}"] = getattr(local, inner)
    return plain


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    assert len(optimizer.param_groups) == 1, "make_optimizer makes one group"
    return list(optimizer.param_groups[0]["params"])


def count_steps(num_rows: int, config: OptimConfig) -> int:
    """Return the number of optimizer steps; the last batch of an epoch may be smaller."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_an_epoch(num_rows, config)))


def steps_an_epoch(num_rows: int, config: OptimConfig) -> int:
    """Return how many optimizer steps see every row once."""
    return math.ceil(num_rows / config.batch_size)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Warm-up rises linearly from 0 (which the first step gets), as in transformers' schedules;
    then linear and cosine fall to 0 after the last step.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate
