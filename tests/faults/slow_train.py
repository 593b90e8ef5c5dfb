"""`spin train` with pauses between its steps, and a file `step-8` beside the output after eight."""

import sys
import time
from pathlib import Path
from typing import Any

from spin_cli.__main__ import main
from stages.model import fit

PAUSE_S = 0.02


def slowly(self: Any, steps: int) -> None:
    attend(self, steps)
    if steps == 8:
        out = Path(sys.argv[sys.argv.index("--out") + 1])
        out.with_name("step-8").touch()
    time.sleep(PAUSE_S)


attend = fit._Loop._attend
fit._Loop._attend = slowly  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
