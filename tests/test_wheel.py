"""A wheel, installed away from the checkout, runs the three uses from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.running import finished
from tests.tiny import TINY, write_pictures

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}", str(ROOT))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and sees the dependencies installed here.

    Folders named in a .pth file have theirs not read, so the checkout that is installed here is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = Path(sysconfig.get_path("scripts", "venv", scheme))
    pip(str(programs / "python"), "install", "--no-deps", "--ignore-installed", str(wheel))
    return programs


def pip(python: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", f"--python={python}", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def run(programs: Path, folder: Path, program: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = finished([str(programs / program), *arguments], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_three_uses_run_from_an_empty_folder(elsewhere, tmp_path):
    where = run(elsewhere, tmp_path, "python", "-c", "import dino_sparo; print(dino_sparo.__file__)")
    assert Path(where.strip()).is_relative_to(elsewhere.parent)

    data = tmp_path / "data"
    write_pictures(data, 60, classes=2)
    tiny = [f"--{key}={value}" for key, value in (TINY | {"optim.epochs": "1"}).items()]
    run(
        *(elsewhere, tmp_path, "dino-sparo", "pretrain"),
        *("--config", "demo", "--data.path", str(data), "--run_dir", "run", *tiny),
    )
    here = ("run", "--data.path", str(data), "--device", "cpu")
    assert "20-NN" in run(elsewhere, tmp_path, "dino-sparo", "knn", *here)
    assert "top-1" in run(elsewhere, tmp_path, "dino-sparo", "linear", *here, "--cached", "--batch_size", "4")
    run(elsewhere, tmp_path, "dino-sparo", "slots", "report", *here)
    assert (tmp_path / "run" / "slots" / "report.html").is_file()


def test_the_wheel_holds_recipes_template_and_types(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    recipes = {
        f"dino_sparo/configs/{path.relative_to(ROOT / 'configs')}" for path in ROOT.glob("configs/**/*.yaml")
    }
    assert recipes and recipes <= held
    assert {"dino_sparo/slots/templates/report.html.jinja", "dino_sparo/py.typed"} <= held
    assert not any(name.startswith(("tests/", "eval/", "scripts/")) for name in held)
