"""Imports go down the flow only: pictures, networks, learning, measuring, looking inside."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dino_sparo"
PROGRAMS = (
    *("check_report", "sweep", "variants"),
    *("pretrain", "setup", "rundir", "check", "prepare", "shard", "knn", "demo", "export"),
    "slots/report",
    *("study/program", "study/measuring"),
    *(
        "bench/program",
        "bench/safety",
        "bench/training",
        "bench/contenders",
        "__main__",
        "commands",
        "config",
        "checks",
        "plan",
    ),
)
FORBIDDEN = {
    "models": ("data", "training", "evaluation", "slots", "interop", "options", "config"),
    "data": ("models", "training", "evaluation", "slots", "interop", "options"),
    "training": ("interop", "slots"),
    "evaluation": ("training.pretrain",),
    "slots": ("training.pretrain",),
    "interop": ("data", "training.pretrain", "evaluation", "slots"),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Everything that a module imports as `package.module.name`, but for types only."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return list(walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_flow(path):
    barred = [f"dino_sparo.{room}" for room in FORBIDDEN.get(path.relative_to(PACKAGE).parts[0], ())]
    barred += ["dino_sparo.__main__", "eval", "tests"]
    barred += [] if path.parent.name == "bench" else ["dino_sparo.bench"]
    sees_options = path.parent.name == "options" or any(
        path.with_suffix("").match(program) for program in PROGRAMS
    )
    barred += [] if sees_options else ["dino_sparo.options"]
    barred += [] if path.name in ("distributed.py", "launch.py") else ["torch.distributed"]
    if path.parent.name == "training" and path.name == "setup.py":  # starting weights of a run
        barred.remove("dino_sparo.interop")
    wrong = [name for name in imports(path) for bar in barred if f"{name}.".startswith(f"{bar}.")]
    assert not wrong


def test_images_are_opened_in_one_place():
    """Pillow's own list of formats holds one that starts a program."""
    opening = {
        path.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    }
    assert opening == {"decode.py"}


def test_the_scan_sees_imports():
    assert "torch.distributed" in imports(PACKAGE / "distributed.py")
    assert "dino_sparo.interop.load.load_encoder" in imports(PACKAGE / "evaluation" / "knn.py")


def test_what_is_imported_is_a_dependency():
    """An environment that has everything installed would not show a missing line."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[\[><=]", line)[0] for line in [*project["dependencies"], *extras]}
    named = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml"}
    imported = {name.partition(".")[0] for path in MODULES for name in imports(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"dino_sparo"}
    assert foreign and {named.get(name, name) for name in foreign} <= declared
