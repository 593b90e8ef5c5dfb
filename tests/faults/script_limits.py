"""Makes an artifact at argv[1] under a limit of this process, argv[2]: file-size or open-files."""

import resource
import sys
from pathlib import Path

from stages.artifacts import Outcome, Workspace, produce
from stages.errors import NoSpaceError, SpinError
from tests.artifact_tools import fill_shards, hashes, make, plan, write_table


def limited(which: int, limit: int, out: Path, expected: type[SpinError], words: str) -> None:
    soft, hard = resource.getrlimit(which)

    def fill(workspace: Workspace) -> Outcome:
        outcome = fill_shards()(workspace)
        resource.setrlimit(which, (limit, hard))
        write_table(workspace.file("big.parquet"), num_rows=20_000)
        return outcome

    try:
        produce(out, plan(config={"big": True}), fill)
    except SpinError as error:
        assert type(error) is expected, repr(error)
        assert words in str(error), error
    else:
        raise AssertionError("there was no limit")
    finally:
        resource.setrlimit(which, (soft, hard))


def main() -> None:
    out, kind = Path(sys.argv[1]), sys.argv[2]
    make(out / "earlier")
    if kind == "file-size":
        limited(resource.RLIMIT_FSIZE, 65536, out / "out", NoSpaceError, "no room to write (")
    else:
        files = len(list(Path("/proc/self/fd").iterdir()))
        limited(
            resource.RLIMIT_NOFILE, files, out / "out", SpinError, "raise the limit (ulimit -n)"
        )
    assert len(hashes(out / "earlier")) == 4
    make(out / "out", plan(config={"big": True}))


if __name__ == "__main__":
    main()
