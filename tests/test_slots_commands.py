"""Common behavior of all slots commands: errors are one sentence, and nothing is written."""

import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.export import export
from dino_sparo.interop.load import load_encoder

COMMANDS = ("maps", "gallery", "neighbors", "rank", "mask", "health", "factors", "report")
OF_ANY_ENCODER = ("maps", "neighbors", "report")


@pytest.fixture
def refused(slot_runs, tmp_path, capsys):
    """The error message of a command: one line on standard error; nothing is written."""

    def run(command: str, *options: str, run: str = "sparo", data: str = "") -> str:
        given = [] if command == "factors" else [f"--data.path={data or slot_runs['data']}"]
        arguments = ["slots", command, str(slot_runs[run]), *given, f"--out={tmp_path / 'out'}"]
        assert main([*arguments, "--num_workers=0", "--device=cpu", *options]) == 2
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
        return said

    return run


def test_health_of_weights_without_a_student(slot_runs, tmp_path):
    export(str(slot_runs["sparo"]), str(tmp_path / "exported"))
    weights = load_encoder(slot_runs["sparo"]).state_dict()
    torch.save({"model": weights, "num_heads": 2}, tmp_path / "encoder.pth")
    for name in ("exported", "encoder.pth"):
        given = [str(tmp_path / name), f"--data.path={slot_runs['data']}", f"--out={tmp_path / 'out'}"]
        assert main(["slots", "health", *given, "--num_workers=0", "--device=cpu"]) == 0


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OF_ANY_ENCODER])
def test_an_encoder_without_slots(refused, slot_runs, command):
    said = refused(command, run="cls")
    assert f"{slot_runs['cls']} has no slots (read-out cls), expected one with slots" in said


@pytest.mark.parametrize("command", ["maps", "rank", "mask", "factors", "report"])
def test_a_control_has_no_slots(refused, slot_runs, command):
    said = refused(command, f"--control={slot_runs['sparo']}")
    assert "has slots (read-out sparo), expected a run without" in said


@pytest.mark.parametrize("command", ["maps", "gallery", "neighbors", "rank", "mask", "health", "report"])
def test_images_that_are_not_there(refused, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "'/nowhere' does not exist" in refused(command, data="/nowhere")
    assert str(tmp_path / "empty") in refused(command, data=str(tmp_path / "empty"))


@pytest.mark.parametrize("command", ["maps", "gallery", "neighbors", "rank", "mask", "health", "report"])
def test_what_is_taken_of_the_images_can_be_chosen(refused, command):
    assert "data.train 'none*' is not a folder" in refused(command, "--data.train=none*")


@pytest.mark.parametrize("command", ["rank", "mask"])
def test_images_without_classes(refused, slot_runs, command):
    assert "not in class folders" in refused(command, data=str(slot_runs["data"] / "train" / "class0"))


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("maps", "--slots=[0,3]", "slots has 3; expected numbers from 0 to 2, since there are 3 slots"),
        ("maps", "--slots=[-1]", "slots is [-1]; expected a list, each a whole number of at least 0"),
        ("maps", "--slots=[1,1]", "slots has 1 more than once; give it once"),
        ("maps", "--images=[60]", "images has 60; expected numbers from 0 to 59, since there are 60 images"),
        ("gallery", "--num_neighbors=0", "num_neighbors is 0; expected a whole number above 0"),
        ("maps", "--short_side=7", "short_side is 7; expected at least 8"),
        ("neighbors", "--num_images=0", "num_images is 0; expected a whole number above 0"),
        ("rank", "--k=40", "k is 40; expected 1 to 39"),
        ("rank", "--select-fraction=1", "select_fraction is 1.0; expected a number above 0 and below 1"),
        ("mask", "--transfer=/somewhere", "transfer '/somewhere' has no name or no folder"),
        ("health", "--num_images=1", "num_images is 1"),
        ("factors", "--num_images=199", "num_images is 199; expected at least 200"),
    ],
)
def test_numbers_that_do_not_suit(refused, command, option, message):
    assert message in refused(command, option)
