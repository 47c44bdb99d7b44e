"""Imports go up the stairway only: a room takes from the rooms above it, never from one below."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dino_sparo"
# From the top. Inside a room modules may import each other.
ROOMS = (
    *("errors", "files", "terminal", "parallel", "recipe", "models", "data", "runs", "interop", "evaluation"),
    *("slots", "training", "export", "prepare", "shard", "check", "bench", "study", "demo", "cli"),
)
MODULES = {  # by their names within the package
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAY_SEE_OPTIONS = ("cli", "__main__", "recipe", "runs", "check", "study")  # and the entry of training


def room(module: str) -> int:
    """The number of the room of a module, given by its name within the package."""
    first = module.partition(".")[0]
    return ROOMS.index("cli" if first == "__main__" else first)


def imports(module: str) -> Iterator[str]:
    """Every module that one imports, also in functions and for types; `from a import b` as `a.b`."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "module", sorted(MODULES.keys() - {"__init__"})
)  # whose names are imported when they are used
def test_imports_go_up_the_stairway(module):
    own = room(module)
    for name in imports(module):
        assert not name.startswith(("eval.", "tests.", "dino_sparo.__main__"))
        assert not name.startswith("torch.distributed") or module.startswith("parallel.")
        if name.startswith("dino_sparo.") and name != "dino_sparo.__version__":
            assert room(name.removeprefix("dino_sparo.")) <= own, f"{module} imports {name}"


def test_functions_take_what_they_need():
    """No function sees a command's options or the whole recipe, but those that are about a run as a whole."""
    whole = {"Recipe"} | {
        node.name
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if module.startswith("cli.") and isinstance(node, ast.ClassDef) and node.name.endswith("Options")
    }
    assert {"PretrainOptions", "KnnOptions"} <= whole
    for module, tree in MODULES.items():
        if module.startswith((*MAY_SEE_OPTIONS, "training.pretrain")):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation is not None:
                seen = whole & set(re.findall(r"\w+", ast.unparse(node.annotation)))
                assert not seen, f"{module} takes {seen} as {node.arg}"


@pytest.mark.parametrize(
    ("function", "home"), [("Image.open", "data.decode"), ("torch.compile", "parallel.device")]
)
def test_what_strangers_could_misuse_is_called_in_one_place(function, home):
    """One starts Ghostscript without a list of formats, one unpickles what lies in a shared folder."""
    calls = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function)
    }
    assert calls == {home}
    assert not {"PIL.Image.open", "torch.compile"} & {name for module in MODULES for name in imports(module)}


def test_what_is_imported_is_a_dependency():
    """An environment that has everything installed would not show a missing line."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[\[><=]", line)[0] for line in [*project["dependencies"], *extras]}
    named = {"PIL": "pillow", "docstring_parser": "docstring-parser", "faiss": "faiss-cpu", "yaml": "pyyaml"}
    imported = {name.partition(".")[0] for module in MODULES for name in imports(module)}
    foreign = imported - set(sys.stdlib_module_names) - {"dino_sparo"}
    assert foreign and {named.get(name, name) for name in foreign} <= declared
