"""Files in the official style: names and shapes of the official code, and the same encoder read back."""

import pytest
import torch

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.models import DINOHead, build_encoder
from dino_sparo.runs.checkpoint import load_latest
from tests.test_export import same
from tests.test_official import small_encoder
from tests.tiny import CLS, tiny_options, write_pictures


@pytest.fixture(scope="module")
def cls_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cls")
    write_pictures(folder / "data", 8)  # two steps an epoch
    pretrain(tiny_options(folder / "data", folder / "run", **CLS))
    return folder / "run"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "official.pth"


def export(source, out, *more):
    return main(["export", str(source), "--out", str(out), "--format", "official", *more])


def test_a_run_of_cls_is_read_as_official_weights(cls_run, out, golden):
    assert export(cls_run, out) == 0
    for which in ("teacher", "student"):
        same(load_encoder(out, which), load_encoder(cls_run, which))
    content = torch.load(out, weights_only=True)
    assert content.keys() == {"student", "teacher", "epoch", "num_heads"} and content["epoch"] == 3
    assert {f"module.{name}" for name in content["teacher"]} == content["student"].keys()

    # The golden arrays are named by the official code: four blocks there, three here.
    backbone = {k.removeprefix("weight.") for k in golden("backbone") if k.startswith("weight.")}
    backbone = {f"backbone.{name}" for name in backbone if not name.startswith("blocks.3.")}
    head = {
        *(f"head.mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        *("head.last_layer.weight_g", "head.last_layer.weight_v"),
    }
    assert content["teacher"].keys() == backbone | head


def test_heads_are_those_of_the_run(cls_run, out):
    """torch's own hook reads the older names, whose shapes are those of the official weight norm."""
    assert export(cls_run, out) == 0
    content, state = torch.load(out, weights_only=True), load_latest(cls_run)
    for which, prefix in (("teacher", "head."), ("student", "module.head.")):
        given = {k.removeprefix(prefix): v for k, v in content[which].items() if k.startswith(prefix)}
        assert given["last_layer.weight_g"].shape == (16, 1) and given["last_layer.weight_v"].shape == (16, 4)
        head = DINOHead(16, 16, 8, 4)
        head.load_state_dict(given)
        assert all(torch.equal(v, state[which][f"head.{name}"]) for name, v in head.state_dict().items())


def test_a_run_of_sparo_comes_back_equal(run_dir, out):
    """Though its attention heads are not 64 wide, as all official ones are."""
    assert export(run_dir, out) == 0
    content = torch.load(out, weights_only=True)
    for which, prefix in (("teacher", ""), ("student", "module.")):
        names = {name.removeprefix(prefix) for name in content[which] if "head." not in name}
        assert names == load_encoder(run_dir, which).state_dict().keys() and "readout.query" in names
        same(load_encoder(out, which), load_encoder(run_dir, which))
    with pytest.raises(UserError, match=r"arch is .* has width 16, depth 3 and 2 heads"):
        load_encoder(out, arch={"width": 16, "depth": 3, "num_heads": 4})


def test_sparo_without_heads_comes_back_equal(run_dir, tmp_path, out, capsys):
    source = build_encoder(
        {"width": 64, "depth": 3, "num_heads": 1}, 8, 16, num_slots=2, slot_dim=4, key_dim=4
    )
    names = {name.removeprefix("backbone."): value for name, value in source.state_dict().items()}
    torch.save(names, tmp_path / "dino.pth")
    for path, what in ((tmp_path / "dino.pth", tmp_path / "folder"), (run_dir, tmp_path / "narrow")):
        assert main(["export", str(path), "--out", str(what)]) == 0
    assert export(tmp_path / "folder", out) == 0
    same(load_encoder(out), source.eval())
    assert export(tmp_path / "narrow", tmp_path / "narrow.pth") == 2
    assert "has 2 attention heads at width 16, but readers of an official file" in capsys.readouterr().err


def test_what_has_no_heads_gives_the_bare_backbone(tmp_path, out, golden):
    source = small_encoder()
    torch.save({"teacher": source.backbone.state_dict()}, tmp_path / "dino.pth")
    assert main(["export", str(tmp_path / "dino.pth"), "--out", str(tmp_path / "folder")]) == 0
    for number, path in enumerate((tmp_path / "dino.pth", tmp_path / "folder")):
        bare = tmp_path / f"bare{number}.pth"
        assert export(path, bare) == 0
        same(load_encoder(bare), source, size=32)
        names = torch.load(bare, weights_only=True).keys()
        official = {k.removeprefix("weight.") for k in golden("backbone") if k.startswith("weight.")}
        assert names == {name for name in official if not name.startswith("blocks.3.")}


def test_other_read_outs_are_refused(run_dir, tmp_path, out, capsys):
    state = load_latest(run_dir)
    state["config"]["model"]["readout"]["output"] = "slots"
    torch.save(state, tmp_path / "changed.pt")
    assert export(tmp_path / "changed.pt", out) == 2
    assert "the official format has only cls and plain sparo" in capsys.readouterr().err
    assert not out.exists()


def test_mistakes_write_nothing(run_dir, tmp_path, out, capsys):
    assert export(run_dir, tmp_path / "folder") == 2
    assert "the official format needs a file; give NAME.pth" in capsys.readouterr().err
    assert export(run_dir, out, "--which", "student") == 2
    assert "will contain student and teacher; leave it out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    assert export(run_dir, out) == 2
    assert "official.pth already exists" in capsys.readouterr().err and out.read_text() == "mine"
    assert export(tmp_path / "nothing", tmp_path / "x.pth") == 2
    assert "nothing does not exist; expected a run folder" in capsys.readouterr().err
