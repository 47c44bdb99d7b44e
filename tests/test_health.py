"""`slots health` measures a folder of images, independent of the batch size, and reports errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.data.sources import open_images
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import build_encoder
from dino_sparo.slots.health import as_entries, measure_health, summarize, table
from tests.tiny import write_pictures

KEYS = {"slot", "entropy", "effective_patches", "cls_share", "response_std", "dead", "nearest", "overlap"}
KEYS |= {"duplicate", "agreement"}
ARCH = {"width": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "pictures", 7, classes=2)
    return tmp_path / "pictures"


@torch.no_grad()
def with_planted_slots():
    """Slot 1 has the query and the key projection of slot 0; slot 3 is constant over images."""
    encoder = build_encoder(ARCH, 4, 16, num_slots=5, slot_dim=4, key_dim=4).eval()
    readout = encoder.readout
    readout.query.mul_(4)
    keys = readout.key_proj.weight.view(5, 4, -1)
    readout.query[1], keys[1] = readout.query[0], keys[0]
    keys[3] = 0
    return encoder


def test_planted_slots_are_found(pictures):
    health = measure_health(with_planted_slots(), open_images(str(pictures)))
    slots = as_entries(health)
    assert [slot["slot"] for slot in slots if slot["dead"]] == [3]
    assert [slot["slot"] for slot in slots if slot["duplicate"]] == [0, 1]
    assert [slots[number]["nearest"] for number in (0, 1)] == [1, 0]
    assert slots[3]["effective_patches"] == pytest.approx(16, rel=1e-5)
    assert slots[3]["cls_share"] == pytest.approx(1 / 17)
    summary = summarize(slots, num_patches=16)
    assert (summary["num_dead"], summary["num_duplicate"]) == (1, 2)
    assert summary["mean_overlap"] == pytest.approx(sum(slot["overlap"] for slot in slots) / 5)
    assert summary["mean_agreement"] is None
    lines = table(slots, summary).splitlines()
    assert "1 (3)" in next(line for line in lines if line.startswith("dead"))
    assert "2 (0, 1)" in next(line for line in lines if line.startswith("duplicate"))


def health_json(out):
    return json.loads((out / "health" / "health.json").read_text())


def run(*arguments):
    return main(["slots", "health", *map(str, arguments), "--num_workers=0"])


def test_the_program_end_to_end(run_dir, pictures, capsys):
    assert run(run_dir, "--data.path", pictures, "--batch_size=3") == 0
    found = health_json(run_dir / "slots")
    assert found["data"] == str(pictures) and found["num_images"] == 7
    assert [slot["slot"] for slot in found["slots"]] == [0, 1]
    assert all(slot.keys() == KEYS for slot in found["slots"])
    assert found["summary"]["num_slots"] == 2 and found["summary"]["num_patches"] == 4
    student, teacher = (load_encoder(run_dir, which) for which in ("student", "teacher"))
    expected = measure_health(teacher, open_images(str(pictures)), other=student)
    assert [slot["agreement"] for slot in found["slots"]] == pytest.approx(expected.agreement.tolist())
    assert [slot["cls_share"] for slot in found["slots"]] == pytest.approx(expected.cls_share.tolist())
    picture = np.asarray(Image.open(run_dir / "slots" / "health" / "health.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300 and picture.std() > 10
    shown = capsys.readouterr().out
    for line in ("effective patches", "attention on CLS", "dead slots", "duplicate slots", "student and"):
        assert line in shown


def test_the_student_is_compared_with_the_teacher(run_dir, pictures, tmp_path):
    for which in ("student", "teacher"):
        options = ("--num_images=3", f"--which={which}", f"--out={tmp_path / which}")  # spread evenly
        assert run(run_dir, "--data.path", pictures, *options) == 0
    student, teacher = (health_json(tmp_path / which) for which in ("student", "teacher"))
    assert student["num_images"] == 3
    for one, other in zip(student["slots"], teacher["slots"], strict=True):
        assert one["agreement"] == pytest.approx(other["agreement"], rel=1e-6)
        assert one["cls_share"] != other["cls_share"]


def test_an_exported_folder_has_no_agreement(run_dir, pictures, tmp_path, capsys):
    assert main(["export", str(run_dir), "--out", str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert run(tmp_path / "exported", "--data.path", pictures, f"--out={tmp_path / 'out'}") == 0
    found = health_json(tmp_path / "out")
    assert [slot["agreement"] for slot in found["slots"]] == [None, None]
    assert found["summary"]["mean_agreement"] is None
    assert "student" not in capsys.readouterr().out
