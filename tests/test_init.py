"""Starting weights: what a run takes of a file, what it says about it, and what it refuses."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.errors import UserError
from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.training.setup import initialize_state
from dino_sparo.training.state import TrainState
from tests.test_official import prefixed
from tests.tiny import CLS, build_state, tiny_options, write_pictures

ARCH = {"width": 16, "depth": 3, "num_heads": 2}
HEAD = {"num_prototypes": 16, "hidden_dim": 8, "bottleneck_dim": 4}
SPARO = {"readout": "sparo", "num_slots": 2, "slot_dim": 4, "key_dim": 4}


def network(seed: int, head: dict | None = None, **changes) -> DinoModel:
    """A network whose every parameter is random, so that no bias is zero nor any norm one."""
    torch.manual_seed(seed)
    readout = {} if "readout" in changes else SPARO
    encoder = build_encoder(**({"arch": ARCH, "patch_size": 8, "image_size": 16} | readout | changes))
    model = DinoModel(encoder, DINOHead(encoder.embed_dim, **(HEAD | (head or {}))))
    for parameter in model.parameters():
        if parameter.requires_grad:  # the fixed lengths of the prototypes stay 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def plain(seed: int, **changes) -> DinoModel:
    return network(seed, readout="cls", **changes)


def named(model: DinoModel, *, old_names: bool = False) -> dict[str, torch.Tensor]:
    """One network by official names: `backbone.X`, `readout.Y`, `head.Z`."""
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    if old_names:
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            state[f"head.last_layer.{old}"] = state.pop(f"head.last_layer.parametrizations.weight.{new}")
    return state


def bare(model: DinoModel) -> dict[str, torch.Tensor]:
    """A plain ViT's state dict."""
    return dict(model.encoder.backbone.state_dict())


def full(student: DinoModel, teacher: DinoModel, *, old_names: bool = False) -> dict:
    """A full checkpoint by official names."""
    of_student = prefixed(named(student, old_names=old_names), "module.")
    return {"student": of_student, "teacher": named(teacher, old_names=old_names), "epoch": 7}


def started(tmp_path, content, **changes) -> tuple[TrainState, str]:
    """A state that has begun with a file of this content, and what is said about it."""
    torch.save(content, tmp_path / "start.pth")
    return started_from(tmp_path, tmp_path / "start.pth", **changes)


def started_from(tmp_path, init, **changes) -> tuple[TrainState, str]:
    options = tiny_options(tmp_path / "data", tmp_path / "run", init=init, **changes)
    state = build_state(options)
    told = initialize_state(
        *(state, options.init, options.encoder_arguments()),
        norm_last_layer=options.head.norm_last_layer,
        frozen=options.optim.freeze_backbone,
    )
    return state, told


def refusal(tmp_path, content, **changes) -> str:
    with pytest.raises(UserError) as caught:
        started(tmp_path, content, **changes)
    assert "start.pth" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Outputs of equal weights: products of small matrices round by where these lie in memory."""
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def equal(one: DinoModel, other: DinoModel) -> bool:
    """Whether they hold the same numbers under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("old_names", [True, False], ids=["weight_g", "parametrized"])
@pytest.mark.parametrize("make", [plain, network], ids=["cls", "sparo"])
def test_a_full_checkpoint_comes_out_as_it_went_in(tmp_path, make, old_names):
    student, teacher = make(1), make(2)
    changes = CLS if make is plain else {}
    state, said = started(tmp_path, full(student, teacher, old_names=old_names), **changes)
    assert equal(state.student, student) and equal(state.teacher, teacher)
    assert not equal(student, teacher)
    number = sum(parameter.numel() for parameter in teacher.parameters())
    assert f": {number / 1e6:.2f} million parameters copied to student and teacher, the student from " in said
    assert said.endswith("new: nothing; not used: nothing")


def test_a_bare_file_with_a_readout_is_a_sparo_encoder(tmp_path):
    source = network(1)
    weights = {name.removeprefix("backbone."): value for name, value in named(source).items()}
    torch.save(weights, tmp_path / "sparo.pth")
    encoder = load_encoder(tmp_path / "sparo.pth", arch=ARCH)
    images = torch.randn(2, 3, 16, 16)
    close(encoder(images), source.encoder.eval()(images))
    state, _ = started(tmp_path, weights)
    assert equal(state.student, source) and equal(state.teacher, source)
    shared = network(1, readout="sparo", num_slots=4, slot_dim=3, key_dim=4, group_size=2)
    torch.save(named(shared), tmp_path / "sparo.pth")
    readout = load_encoder(tmp_path / "sparo.pth", arch=ARCH).readout
    assert (readout.num_slots, readout.slot_dim, readout.key_dim, readout.group_size) == (4, 3, 4, 2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("readout.query", lambda x: x[0], "a part of a read-out: readout.query is (4,); expected SPARO's"),
        ("readout.query", lambda x: x[:, :3], "readout.key_proj.weight has 8 rows; expected 2 slots x 3"),
        ("readout.key_proj.bias", lambda x: x[1:], "readout.key_proj.bias (7,) instead of (8,)"),
        ("readout.value_proj.weight", lambda _: None, "read-out: readout.value_proj.weight is ()"),
    ],
)
def test_a_readout_that_is_not_whole(tmp_path, name, change, message):
    content = named(network(1))
    assert message in refusal(tmp_path, content | {name: change(content[name])})


@pytest.mark.parametrize("extra", [{}, {"head.weight": torch.zeros(10, 16), "fc_norm.bias": torch.zeros(16)}])
def test_a_plain_vit_starts_a_sparo_encoder(tmp_path, extra):
    source = plain(1)
    state, said = started(tmp_path, bare(source) | extra)
    fresh = build_state(tiny_options(tmp_path / "data", tmp_path / "run")).student.state_dict()
    given = source.encoder.backbone.state_dict()
    for model in (state.student, state.teacher):
        for name, value in model.state_dict().items():
            short = name.removeprefix("encoder.backbone.")
            assert torch.equal(value, given[short] if short != name else fresh[name]), name
    assert len(state.student.encoder.backbone.blocks) == 2
    for part in (
        "parameters copied to student and teacher, the same to both;",
        "new: read-out sparo (the file has cls), head (the file has none);",
        "not used: blocks.2 (the read-out replaces it)",
        "the final norm normalized the output of block 2 in the file",
    ):
        assert part in said
    assert ("head (1 tensors), fc_norm (1 tensors)" in said) == bool(extra)


def test_a_head_is_taken_and_what_else_lies_beside_is_listed(tmp_path):
    source = plain(1)
    _, said = started(tmp_path, named(source) | {"masked_embed": torch.zeros(1, 16)}, **CLS)
    assert "new: nothing; not used: masked_embed (1 tensors)" in said


def test_a_readout_after_the_last_block_takes_all_blocks(tmp_path):
    source = plain(1)
    state, said = started(tmp_path, bare(source), model__readout__after_last_block="true")
    assert "not used: nothing" in said and "final norm" not in said
    given = source.encoder.backbone.state_dict()
    assert all(torch.equal(v, given[k]) for k, v in state.teacher.encoder.backbone.state_dict().items())


def test_timms_own_model_by_file_and_by_name(tmp_path, monkeypatch, caplog):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**sizes).eval()
    weights = model.state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: {"vit": model}[name])
    images = torch.randn(2, 3, 16, 16)
    for init in (tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin", "timm:vit"):
        state, said = started_from(tmp_path, init, **CLS)
        tokens = state.teacher.encoder.tokens(images)
        torch.testing.assert_close(tokens, model.forward_features(images), atol=1e-5, rtol=1e-5)
        assert "not used: head (2 tensors)" in said
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.229, 0.224, 0.225)}
    started_from(tmp_path, "timm:vit", **CLS)
    assert "init timm:vit was trained on images normalized with mean (0.5, 0.5, 0.5), but here" in caplog.text
    timms = {
        "architecture": "vit",
        "model_args": {"num_heads": 2},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(timms))
    for init in (tmp_path / "model.safetensors", tmp_path):  # a folder as the hub has it
        caplog.clear()
        started_from(tmp_path, init, **CLS)
        assert (
            "safetensors was trained on images normalized with mean [0.5, 0.5, 0.5] and std 3" in caplog.text
        )
    with pytest.raises(UserError, match=r"init timm:vit has attention heads 2 \(the recipe has 4\)"):
        started_from(tmp_path, "timm:vit", **CLS, model__arch__num_heads=4)


@torch.no_grad()
def test_timms_own_model_in_a_folder_has_its_number_of_heads(tmp_path):
    """Not one head per 64 dimensions."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=sizes)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load_encoder(tmp_path)(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "local-dir:.", "hf_hub:x", "../vit", "someone/vit", "C:\\vit", ""]
)
def test_timm_is_asked_for_its_own_models_alone(tmp_path, monkeypatch, name):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    for ask in (lambda: load_encoder(f"timm:{name}"), lambda: started_from(tmp_path, f"timm:{name}")):
        with pytest.raises(UserError, match="is not a model of timm itself; expected a name from") as caught:
            ask()
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_model_of_timm_stands_wherever_a_run_does(tmp_path, monkeypatch, capsys):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**sizes).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: {"vit_x.dino": model}[name])
    images = torch.randn(2, 3, 16, 16)
    expected = model.forward_features(images)[:, 0]
    torch.testing.assert_close(load_encoder("timm:vit_x.dino")(images), expected, atol=1e-5, rtol=1e-5)
    write_pictures(tmp_path / "data", 60, classes=2)
    monkeypatch.chdir(tmp_path)
    assert main(["knn", "timm:vit_x.dino", "--data.path", "data", "--num_workers", "0"]) == 0
    assert (tmp_path / "timm_vit_x.dino_evaluation" / "results.json").is_file()
    assert main(["export", "timm:vit_x.dino", "--out", "out"]) == 0
    assert "left out: head (2 tensors)" in capsys.readouterr().out
    torch.testing.assert_close(load_encoder("out")(images), expected, atol=1e-5, rtol=1e-5)


def test_what_timm_cannot_give_is_one_sentence(tmp_path, monkeypatch):
    def create_model(name, pretrained):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(UserError, match=r"init 'timm:vit' .* from timm \(no route to host\)") as caught:
        started_from(tmp_path, "timm:vit")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="is a Linear; expected a plain VisionTransformer"):
        started_from(tmp_path, "timm:vit")


@torch.no_grad()
def test_the_position_embedding_is_resized_once(tmp_path):
    source = plain(1, image_size=40)
    state, said = started(tmp_path, bare(source), **CLS)
    assert "position embedding resized from 5 x 5 to 2 x 2 patches" in said
    images = torch.randn(2, 3, 16, 16)
    close(state.teacher.encoder(images), source.encoder.eval()(images))
    assert state.student.encoder.backbone.pos_embed.shape == (1, 5, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_prototypes": 8}, "that of the file does not fit: 2 misshapen (last_layer.parametrizations"),
        ({"norm_last_layer": False}, "prototypes of the file do not have norm 1"),
    ],
)
def test_a_head_that_does_not_fit_is_fresh(tmp_path, change, reason):
    source = plain(1, head=change)
    state, said = started(tmp_path, named(source), **CLS)
    assert f"new: head ({reason}" in said and "not used: head (8 tensors)" in said
    assert state.student.head.mlp[0].bias.eq(0).all()
    assert torch.equal(state.student.encoder.backbone.norm.bias, source.encoder.backbone.norm.bias)


def test_a_head_of_another_encoding_is_fresh_even_if_its_shapes_fit(tmp_path):
    state, said = started(tmp_path, named(plain(1)), model__readout__num_slots=4)
    assert state.student.encoder.embed_dim == 16
    assert "head (that of the file reads another" in said and state.student.head.mlp[0].bias.eq(0).all()


def test_a_frozen_backbone_is_the_teachers_in_both(tmp_path):
    student, teacher = network(1), network(2)
    state, said = started(tmp_path, full(student, teacher), optim__freeze_backbone="true")
    assert equal(state.student, teacher) and equal(state.teacher, teacher)
    assert "the same to both" in said


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (lambda: bare(plain(1, arch=ARCH | {"width": 64})), {}, "has width 64 (the recipe has 16), att"),
        (lambda: bare(plain(1, patch_size=4)), {}, "has patch size 4 (the recipe has 8); set model.arch"),
        (lambda: bare(plain(1, arch=ARCH | {"depth": 5})), {}, "read-out sparo; expected 2, or 3 of a plain"),
        (lambda: named(network(1)), CLS, "has 2 blocks, but this recipe builds 3 with read-out cls"),
        (lambda: named(network(1, arch=ARCH | {"depth": 4})), {}, "has 3 blocks, but this recipe builds 2"),
        (
            lambda: named(network(1)),
            {"model__readout__num_slots": 4, "model__readout__key_dim": 8},
            "a read-out sparo with key_dim 4 (the recipe has 8), num_slots 2 (the recipe has 4)",
        ),
        (
            lambda: bare(plain(1)) | {"blocks.2.ls1.gamma": torch.zeros(16)},
            {},
            "1 unexpected (blocks.2.ls1.gamma)",
        ),
        (
            lambda: full(network(1, head={"num_prototypes": 8}), network(2)),
            {},
            "student and teacher have different",
        ),
        (
            lambda: bare(plain(1)) | {"norm.bias": torch.full((16,), torch.nan)},
            {},
            "not finite, or too large for float32, in 1 para",
        ),
    ],
)
def test_what_the_rules_do_not_explain_is_refused(tmp_path, content, changes, message):
    assert message in refusal(tmp_path, content(), **changes)


@pytest.mark.parametrize(("name", "value"), [("freeze_backbone", "true"), ("freeze_backbone_epochs", 1)])
def test_a_frozen_backbone_needs_weights(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, but init is null"):
        tiny_options(tmp_path / "data", tmp_path / "run", **{f"optim__{name}": value})
