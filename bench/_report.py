"""What every report of a benchmark names, and how it is written."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def hardware(device: str = "cpu") -> str:
    """Return processor and cores, after the GPUs where `device` is not the CPU."""
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    if device == "cpu":
        return f"{cores}, no GPU used"
    return f"{' + '.join(gpus()) or 'a GPU without nvidia-smi'}; {cores}"


def gpus() -> list[str]:
    """Return the names of the GPUs."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write(report: Mapping[str, Any], path: Path | None) -> None:
    """Write a report as JSON, where a path was given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
