"""Makes the artifact argv[1]/copy, which argv[1]/source equals where it is there already."""

import sys
from pathlib import Path

from stages.artifacts import Manifest, Outcome, Workspace, produce
from tests.artifact_tools import plan, write_table


def make(run: Path, name: str, made: list[str]) -> Manifest:
    def fill(space: Workspace) -> Outcome:
        made.append(name)
        write_table(space.file("rows.parquet"))
        space.file("inner/text.txt").write_text("plain\n")
        return Outcome(counts={"rows": 40})

    return produce(run / name, plan(), fill, reuse=True)


def main() -> int:
    made: list[str] = []
    make(Path(sys.argv[1]), "copy", made)
    return len(made)


if __name__ == "__main__":
    sys.exit(main())
