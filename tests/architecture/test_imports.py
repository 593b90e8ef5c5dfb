"""The layering of shared/design.md, read off the imports, those inside functions too."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAGES = {
    "prepare", "sft", "generate", "reward", "pair", "score", "train", "evaluate", "promote",
    "suite", "report",
}  # fmt: skip
BASE = {"artifacts", "config", "errors"}
BELOW_STAGES = BASE | {
    "layout", "decisions", "progress", "journal", "tracking", "answers", "data", "objective",
    "model", "engines", "rewards", "remote", "alarms", "gates", "evidence",
}  # fmt: skip
OF_A_RUN = {"layout", "run_record", "decisions", "recipe"}
# Room → the rooms it may import from. A room is a module or package right below stages/.
ALLOWED = {
    "errors": set[str](),
    "config": {"errors"},
    "recipe": {"config", "errors"},
    "artifacts": {"errors"},
    "layout": {"artifacts", "errors"},
    "alarms": {"config", "errors"},
    "headlines": BASE,
    "objective": {"errors"},
    "progress": {"errors"},
    "remote": {"artifacts", "errors"},
    "data": BASE,
    "model": BASE | {"data", "objective"},
    "engines": BASE | {"data", "objective", "model"},
    "rewards": BASE | {"data", "objective", "model", "engines"},
    "tracking": BASE | {"layout"},
    "journal": BASE | {"data", "model", "progress", "tracking"},
    "answers": BASE | {"data", "engines", "progress"},
    "suites": BASE | {"data", "model", "engines", "rewards", "progress"},
    **dict.fromkeys(STAGES, BELOW_STAGES),
    **dict.fromkeys(("evaluate", "suite"), BELOW_STAGES | {"suites"}),
    "report": BASE | {"reporting"},
    # A run as a whole.
    "reporting": BASE
    | OF_A_RUN
    | {"alarms", "convergence", "data", "ending", "headlines", "lineage", "status"},
    "run_record": BASE | {"layout", "recipe"},
    "ending": BASE | {"layout"},
    "decisions": BASE | {"layout", "recipe", "run_record"},
    "gates": BASE | {"alarms", "data"},
    "evidence": BASE | {"alarms", "data", "decisions", "gates", "layout"},
    "adaptation": BASE | {"decisions", "layout", "recipe"},
    "convergence": BASE | {"decisions", "layout", "recipe"},
    "status": BASE | OF_A_RUN | {"convergence", "data", "ending"},
    "verify": BASE | OF_A_RUN,
    "show": BASE | {"data", "decisions", "layout", "subjects"},
    "subjects": BASE | {"layout"},
    "lineage": BASE | {"subjects"},
    "difference": BASE | OF_A_RUN | {"lineage", "subjects"},
    "reproduce": BASE | OF_A_RUN | {"data", "lineage", "subjects"},
    "compare": BASE | {"data", "headlines", "layout", "lineage", "subjects"},
    "model_card": BASE,
    "export": BASE
    | OF_A_RUN
    | {"data", "headlines", "lineage", "model", "model_card", "reproduce"},
    "hub": BASE | {"model_card"},
    "transfer": BASE | OF_A_RUN | {"progress", "remote"},
    "spin_cli": BASE
    | STAGES
    | OF_A_RUN
    | {
        "adaptation",
        "compare",
        "convergence",
        "difference",
        "ending",
        "engines",
        "evidence",
        "export",
        "gates",
        "headlines",
        "hub",
        "lineage",
        "model",
        "progress",
        "reporting",
        "reproduce",
        "show",
        "status",
        "subjects",
        "tracking",
        "transfer",
        "verify",
    },
}


@dataclass(frozen=True)
class Import:
    """One name that a file imports, such as `stages.data.rows`."""

    file: str
    line: int
    name: str
    top_level: bool

    @property
    def library(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str | None:
        """The room that an import of our own code is from."""
        parts = self.name.split(".")
        if parts[0] == "spin_cli":
            return "spin_cli"
        return parts[1] if parts[0] == "stages" and len(parts) > 1 else None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports_of(path: Path, root: Path = ROOT) -> list[Import]:
    """All imports of a file; `from stages import pair` counts as one of `stages.pair`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    file = path.relative_to(root).as_posix()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write imports in full, not relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(file, node.lineno, name, id(node) not in inner) for name in names]
    return found


def room_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return "spin_cli" if parts[0] == "spin_cli" else parts[1]


def our_files() -> list[Path]:
    files = [*(ROOT / "stages").rglob("*.py"), *(ROOT / "spin_cli").rglob("*.py")]
    return sorted(path for path in files if path != ROOT / "stages" / "__init__.py")


ALL = [found for path in our_files() for found in imports_of(path)]


def in_room(room: str) -> list[Import]:
    return [found for found in ALL if room_of(found.file) == room]


def offenders(found: list[Import]) -> str:
    return "\n".join(map(str, found))


def test_every_room_has_its_place_in_the_layering() -> None:
    assert {room_of(path.relative_to(ROOT).as_posix()) for path in our_files()} <= ALLOWED.keys()


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_down_only(room: str) -> None:
    wrong = [f for f in in_room(room) if f.room not in {None, room} | ALLOWED[room]]
    assert not wrong, offenders(wrong)


def test_the_layering_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        free = {room for room in ALLOWED if room not in done and ALLOWED[room] <= done}
        assert free, f"a cycle among {sorted(ALLOWED.keys() - done)}"
        done |= free


def test_stages_meet_in_artifacts_only() -> None:
    wrong = [f for f in ALL if room_of(f.file) in STAGES and f.room in STAGES - {room_of(f.file)}]
    assert not wrong, offenders(wrong)


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("vllm", "stages/engines/vllm.py"),
        ("ray", "stages/engines/ray.py"),
        ("peft", "stages/model/adapters.py"),
        ("lm_eval", "stages/suites/lm_eval_child.py"),
    ],
)
def test_one_file_alone_imports_an_optional_library(library: str, home: str) -> None:
    wrong = [f for f in ALL if f.library == library and f.file != home]
    assert not wrong, offenders(wrong)


def test_the_command_line_touches_neither_torch_nor_rows() -> None:
    heavy = {"torch", "transformers", "accelerate", "datasets", "pyarrow"}
    wrong = [f for f in in_room("spin_cli") if f.library in heavy]
    wrong += [f for f in in_room("spin_cli") if f.name.startswith("stages.data.rows")]
    assert not wrong, offenders(wrong)


def test_artifacts_do_without_torch() -> None:
    wrong = [f for f in in_room("artifacts") if f.library in {"torch", "transformers", "numpy"}]
    assert not wrong, offenders(wrong)


def test_objective_is_pure_tensors() -> None:
    files = {"pathlib", "os", "io", "shutil", "yaml", "json", "pyarrow", "safetensors"}
    wrong = [f for f in in_room("objective") if f.library in files]
    wrong += [f for f in in_room("objective") if f.name.startswith("torch.distributed")]
    assert not wrong, offenders(wrong)


def test_the_reader_of_imports_sees_those_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "stages" / "pair.py"
    file.parent.mkdir()
    file.write_text(
        "import json\nfrom stages import score\nif True:\n    import os.path\n"
        "class A:\n    def f(self):\n        from stages.train import run\n"
        "def g():\n    import torch, vllm.engine\n"
    )
    found = imports_of(file, tmp_path)
    assert [(f.name, f.top_level) for f in found if f.top_level] == [
        ("json", True), ("stages.score", True), ("os.path", True),
    ]  # fmt: skip
    assert [f.name for f in found if not f.top_level] == [
        "torch",
        "vllm.engine",
        "stages.train.run",
    ]
    assert [f.room for f in found] == [None, "score", None, None, None, "train"]


@pytest.mark.parametrize("module", ["spin_cli.__main__", "spin_cli.app"])
def test_starting_the_command_line_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "transformers", "pydantic", "pyarrow", "numpy", "datasets", "matplotlib"]
    script = f"import sys, {module}; print(*sorted(set({heavy!r}) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
