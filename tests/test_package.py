"""The package as one imports it: quickly, with its public names, and typed; its pages and their picture."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino_sparo
from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.data.sources import open_images
from dino_sparo.slots.maps import slot_maps
from tests.running import finished
from tests.slurm import ROOT

IMPORT = """
import sys, time
started = time.perf_counter()
import dino_sparo
names = dir(dino_sparo)
print(time.perf_counter() - started)
assert not {"torch", "numpy", "yaml"} & set(sys.modules)
assert "load_encoder" in names and "__version__" in names
"""

USER_SCRIPT = """
from torch import Tensor
from dino_sparo import DINOHead, DINOLoss, Encoder, Sparo, build_encoder, knn_classify, load_encoder
from dino_sparo import slot_attention
from dino_sparo.training.schedules import cosine_schedule

encoder: Encoder = load_encoder("run")
reveal_type(build_encoder(arch="vit_tiny"))
reveal_type(load_encoder)
encoder.no_such_name()
load_encoder(3)
"""


def test_import_is_quick_and_brings_no_torch():
    # the best of five, for the machine may be busy
    assert any(float(finished([sys.executable, "-c", IMPORT]).stdout) < 0.2 for _ in range(5))


@pytest.mark.parametrize("name", [name for name in dino_sparo.__all__ if name != "__version__"])
def test_public_names_are_those_of_their_homes(name):
    public = getattr(dino_sparo, name)
    assert public is getattr(importlib.import_module(public.__module__), name)
    assert public.__doc__ and name in dir(dino_sparo)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dino_sparo.nothing  # noqa: B018


@pytest.mark.long
def test_types_reach_the_user(tmp_path):
    """mypy takes types from an installed package only if it says that it has them (py.typed)."""
    script = tmp_path / "script.py"
    script.write_text(USER_SCRIPT)
    place = str(Path(dino_sparo.__file__).parents[1])
    done = finished(
        [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={tmp_path}", str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": place, "PATH": "/usr/bin:/bin"},
    )
    assert "py.typed" not in done.stdout, done.stdout
    assert 'Revealed type is "dino_sparo.models.encoder.Encoder"' in done.stdout
    assert '"Encoder" has no attribute "no_such_name"' in done.stdout or "not callable" in done.stdout
    assert 'Argument 1 to "load_encoder" has incompatible type "int"' in done.stdout


PAGES = [
    page for page in ROOT.rglob("*.md") if not {".venv", "runs", "older"} & {*page.relative_to(ROOT).parts}
]


def test_tests_that_the_guide_to_operation_names_are_there():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "scripts" / "README.md").read_text()))
    assert named and all((ROOT / "tests" / name).is_file() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }, target


@pytest.mark.parametrize("folder", sorted((ROOT / "eval" / "encoders").iterdir()), ids=lambda path: path.name)
def test_encoders_are_as_their_model_cards_say(folder):
    encoder = load_encoder(folder)
    side, card = encoder.image_size, (folder / "README.md").read_text()
    said = re.search(rf"images of {side} pixels\n- encoding: (\d+) dimensions", card)
    assert said, "image size or encoding"
    with torch.no_grad():
        encodings = encoder(torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)))
    assert encodings.shape == (3, int(said[1])) and encodings.std(dim=0).min() > 0


def assert_drawn(path: Path, name: str) -> None:
    """A picture of eval/pictures is what the code draws; letters may differ, by the version of matplotlib."""
    drawn, shown = (
        np.asarray(Image.open(one).convert("RGB"), dtype=np.float64)
        for one in (path, ROOT / "eval" / "pictures" / name)
    )
    assert drawn.shape == shown.shape and np.abs(drawn - shown).mean() < 1


def test_the_first_picture_of_the_readme_is_what_the_code_draws(tmp_path):
    encoder = load_encoder(ROOT / "eval" / "encoders" / "demo")
    slot_maps(encoder, open_images("shapes", None), tmp_path, slots=[11, 15, 8, 6], images=[100, 3999, 2000])
    assert_drawn(tmp_path / "grid.png", "demo_slots.png")


@pytest.mark.long
def test_the_gallery_of_the_readme_is_what_the_code_draws(tmp_path):
    arguments = ["--data.path=shapes", "--slots=11", "--num_images=3", "--num_workers=0"]
    places = [f"--cache={tmp_path}", f"--out={tmp_path}", "--device=cpu"]
    assert main(["slots", "gallery", str(ROOT / "eval" / "encoders" / "demo"), *arguments, *places]) == 0
    assert_drawn(tmp_path / "gallery" / "slot11.png", "demo_gallery.png")
