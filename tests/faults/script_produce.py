"""Makes one small resumable artifact at argv[1]; adds a line to argv[2] for each shard begun.

Ends with the exit code of the error, as the command line does.
"""

import sys
from pathlib import Path

from stages.errors import SpinError
from tests.artifact_tools import make


def main() -> int:
    out, log = Path(sys.argv[1]), Path(sys.argv[2])

    def note(shard: int) -> None:
        with log.open("a") as file:
            file.write(f"{shard}\n")

    try:
        make(out, begun=note)
    except SpinError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
