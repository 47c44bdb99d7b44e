"""eval/tiny_imagenet.py: no image is in train and in val, and those of val are in no part for tuning."""

import json
import re
import runpy

import pytest

from dino_sparo.errors import UserError
from dino_sparo.evaluation.compare import compare_runs
from tests.slurm import ROOT

NUM_TRAIN, SEEN, NUM_VAL = 24, 10, 2


@pytest.fixture
def split():
    """The function, with fewer images per class."""
    names = runpy.run_path(str(ROOT / "eval" / "tiny_imagenet.py"))
    names["split"].__globals__.update(PER_CLASS=NUM_TRAIN // 2, TRAIN=SEEN, VAL=NUM_VAL)
    return names["split"]


def test_every_image_is_train_or_val(split, tmp_path):
    for label in range(200):
        for part, numbers in (("train", range(NUM_TRAIN)), ("val", range(NUM_VAL))):
            folder = tmp_path / "all" / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in numbers:
                (folder / f"{part}_{number:02}.jpg").write_text(f"{label} {part} {number}")
    counts = split(str(tmp_path / "all"), tmp_path / "out")
    assert counts == {"train": 1000, "dev/train": 900, "dev/val": 100, "val": 400}

    def images(part):
        return {path.read_text() for path in (tmp_path / "out" / part).rglob("*.jpg")}

    assert images("train") == {
        f"{label} train {number}" for label in range(0, 200, 2) for number in range(0, 20, 2)
    }
    assert images("val") == {
        f"{label} {name}" for label in range(0, 200, 2) for name in ("train 20", "train 22", "val 0", "val 1")
    }
    assert images("dev/val") == {f"{label} train 18" for label in range(0, 200, 2)}
    assert images("dev/train") == images("train") - images("dev/val")
    with pytest.raises(UserError, match="exists; give a new folder"):
        split(str(tmp_path / "all"), tmp_path / "out")


def test_other_images_are_refused(split, tmp_path):
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "1.jpg").touch()
    with pytest.raises(UserError, match="is not Tiny ImageNet; expected the same 200 classes in train"):
        split(str(tmp_path), tmp_path / "out")


def test_the_page_shows_what_the_results_of_the_runs_give():
    runs = sorted(str(path) for path in (ROOT / "eval" / "studies" / "tiny").iterdir())
    page = (ROOT / "eval" / "studies" / "tiny.md").read_text()
    of_seeds = [[run for run in runs if run.endswith(f"seed={seed}")] for seed in range(8)]
    of_seeds.append([run for seeds in of_seeds[:5] for run in seeds])  # those that were planned
    rows = [row for one in of_seeds if one for row in compare_runs(one).rows]
    rows += compare_runs(runs).rows
    assert len(rows) >= 20
    for number in re.findall(
        r"^[+\-\d.]+(?: \[.+?\])?", "\n".join(cell for _, *row in rows for cell in row), re.M
    ):
        assert number.replace("-", "−") in page


def test_the_page_shows_what_single_slots_give():
    folder = ROOT / "eval" / "studies"
    page = (folder / "tiny.md").read_text()
    sparo, dino = json.loads((folder / "tiny_more" / "slots" / "rank.json").read_text())["encoders"]
    for of_sparo, of_dino in zip(sparo["curve"]["knn"], dino["curve"]["knn"], strict=True):
        kept = str(of_sparo["kept"]) + " (all)" * (of_sparo["kept"] == sparo["num_parts"])
        values = [f"{one[test]:.2f}" for one in (of_sparo, of_dino) for test in ("knn", "linear")]
        assert f"| {' | '.join([kept, *values])} |" in page
    rows = json.loads((folder / "tiny_more" / "slots" / "mask.json").read_text())["rows"]
    for row in rows:
        assert all(f"{row[key]:.2f}" in page for key in ("initial", "masked"))
