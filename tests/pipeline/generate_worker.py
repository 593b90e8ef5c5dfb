"""One worker of a generate stage with the fake engine: what a process of its own runs."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from spin_cli.failures import reported
from spin_cli.screen import set_up_messages
from stages import generate
from stages.config import RunConfig
from tests.fakes import FakeEngine


def work(job: dict[str, Any]) -> None:
    """Run the stage; what it says goes to `job["log"]`, the number of its answers to "answered"."""
    with Path(job["log"]).open("wb") as log:
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gate = Path(job["gate"]) if job["gate"] else None
    engine = FakeEngine(job["kill_after"], job["delay_s"], 16, gate, job["gate_after"])
    set_up_messages()
    try:
        with reported():
            generate.run(
                RunConfig.model_validate(job["config"]),
                generate.GenerateInputs(model=job["model"], data=Path(job["data"])),
                Path(job["out"]),
                open_engine=engine.open,
            )
    except typer.Exit as error:
        sys.exit(error.exit_code)
    Path(job["answered"]).write_text(str(engine.answered))
