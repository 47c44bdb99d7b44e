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
ROOM_OF = {"options": "recipe", "__main__": "cli"}
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES}


def room(module: str) -> str:
    """The room of a module, given as `dino_sparo.room.module`."""
    first = module.split(".")[1]
    return ROOM_OF.get(first, first)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also in functions and for types; `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_room():
    rooms = {room(name) for name in NAMES if name.count(".") and name != "dino_sparo.__init__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_the_stairway(path):
    if path == PACKAGE / "__init__.py":  # its public names are imported when they are used
        return
    own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    for name in imports(path):
        assert not name.startswith(("eval.", "tests.", "dino_sparo.__main__"))
        if name.startswith("torch.distributed"):
            assert own == "parallel", f"{name} outside of parallel/"
        if name.startswith("dino_sparo.") and name != "dino_sparo.__version__":
            assert ROOMS.index(room(name)) <= ROOMS.index(own), f"{own} imports {name}"


MAY_SEE_OPTIONS = ("cli", "recipe", "runs", "check", "study")  # and the entry of training


def test_functions_take_what_they_need():
    """No function sees a command's options or the whole recipe, but those that are about a run as a whole."""
    in_cli = {
        node.name
        for path in (PACKAGE / "cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options")
    }
    whole = in_cli | {"Recipe"}
    assert {"Recipe", "PretrainOptions", "KnnOptions"} <= whole
    seeing = set()
    for path in MODULES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if path.name == "__init__.py" or room(module) in MAY_SEE_OPTIONS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                types = [ast.unparse(one.annotation) for one in given if one.annotation is not None]
                if whole & {word for one in types for word in re.findall(r"\w+", one)}:
                    seeing.add(f"{module}.{node.name}")
    allowed = {name for name in seeing if name.startswith("dino_sparo.training.pretrain.")}
    assert seeing - allowed == set()


def test_the_scan_sees_imports_of_all_kinds(tmp_path):
    source = (
        "import a.b\nfrom c import d\ndef f():\n    from e import f\nif TYPE_CHECKING:\n    from g import h\n"
    )
    (tmp_path / "x.py").write_text(source)
    assert sorted(imports(tmp_path / "x.py")) == ["a.b", "c.d", "e.f", "g.h"]


@pytest.mark.parametrize(("function", "file"), [("Image.open", "decode.py"), ("torch.compile", "device.py")])
def test_what_strangers_could_misuse_is_called_in_one_place(function, file):
    """One starts Ghostscript without a list of formats, one unpickles what lies in a shared folder."""
    calling = {
        path.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function)
    }
    assert calling == {file}
    assert not [
        name for path in MODULES for name in imports(path) if name in ("PIL.Image.open", "torch.compile")
    ]


def test_what_is_imported_is_a_dependency():
    """An environment that has everything installed would not show a missing line."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[\[><=]", line)[0] for line in [*project["dependencies"], *extras]}
    named = {"PIL": "pillow", "docstring_parser": "docstring-parser", "faiss": "faiss-cpu", "yaml": "pyyaml"}
    imported = {name.partition(".")[0] for path in MODULES for name in imports(path)}
    foreign = imported - set(sys.stdlib_module_names) - {"dino_sparo"}
    assert foreign and {named.get(name, name) for name in foreign} <= declared
