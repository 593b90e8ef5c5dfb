"""Adapters with weights that matter, as folders of their own."""

import shutil
from pathlib import Path
from typing import Any

import torch

from stages.artifacts.produce import RUN_MARK
from stages.config import LoraConfig
from stages.model import adapters
from stages.model.group import Group
from stages.model.load import load_model
from stages.model.save import save_adapter
from stages.model.sharding import gathered_adapter
from stages.model.source import ModelSource, resolve_model

ALONE = Group(0, 1, torch.device("cpu"))
LORA = LoraConfig(rank=3, alpha=5)


def adapted(base: Path, config: LoraConfig = LORA, seed: int = 0, noise: float = 0.1) -> Any:
    """A model with an adapter attached, whose B is random and not 0 as that of a fresh one."""
    model = load_model(base)
    adapters.attach(model, config)
    adapters.fill(model, config, seed, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, letter, parameter in adapters.factors(model):
            if letter == "B":
                parameter.copy_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def save_adapted(model: Any, base: ModelSource, folder: Path) -> Path:
    """Write the adapter of `adapted` as train does."""
    folder.mkdir(parents=True)
    adapter = gathered_adapter(model, ALONE)
    assert adapter is not None
    template = base.path / "chat_template.jinja"
    save_adapter(
        model,
        adapter,
        base.as_base(folder),
        folder,
        torch.float32,
        base.path,
        template.read_text() if template.is_file() else "",
    )
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 0, config: LoraConfig = LORA) -> Path:
    return save_adapted(adapted(base, config, seed), resolve_model(str(base)), folder)


def make_run(root: Path, base: Path) -> tuple[Path, Path]:
    """A folder that passes for a run, with a model in it; returns both."""
    root.mkdir()
    (root / RUN_MARK).write_text("{}")
    shutil.copytree(base, root / "models" / "start")
    return root, root / "models" / "start"
