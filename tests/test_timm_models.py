"""timm's own code path over exported folders: our numbers, and the interface that its users expect."""

import json
import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import group_parameters, save_for_hf

import dino_sparo.interop.timm_models  # noqa: F401
from dino_sparo import load_encoder
from dino_sparo.data.images import IMAGENET_MEAN, IMAGENET_STD, evaluation_crop, normalize
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.interop.timm_folder import pretrained_config, write_exported
from dino_sparo.models import build_encoder

ARCH = {"width": 16, "depth": 3, "num_heads": 2}
SIZES = {"readout": "sparo", "num_slots": 4, "slot_dim": 6}
SPARO = SIZES | {"key_dim": 8, "group_size": 2}
OTHERS = {
    "defaults": {"readout": "sparo"},
    "multi": SIZES | {"key_dim": 8, "heads": "multi", "num_heads": 2},
    "output": SPARO | {"output": "whole"},
    "after": SPARO | {"after_last_block": True},
    "pooler": SIZES | {"readout": "pooler", "num_heads": 3},
    "bottleneck": {"readout": "bottleneck", "bottleneck_dim": 5, "encoding_dim": 20},
    "cls": {"readout": "cls"},
    "gap": {"readout": "gap", "patch_size": 8, "image_size": 40},
    "patch 8": SPARO | {"patch_size": 8, "image_size": 40},
}
DEFAULTS = {"arch": ARCH, "patch_size": 4, "image_size": 16}


def export(folder, **changes):
    """A folder of random weights without zeros or ones, and its encoder."""
    arguments = DEFAULTS | changes
    encoder = build_encoder(**arguments).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stored = StoredEncoder(folder, arguments, 0, "teacher", dict(encoder.state_dict()))
    write_exported(stored, folder, name="tiny")
    return encoder


def created(folder, **arguments):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "exported"


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("readout", [SPARO, *OTHERS.values()], ids=["sparo", *OTHERS])
@torch.no_grad()
def test_registered_models_give_our_features(folder, readout):
    encoder = export(folder, **readout)
    model = created(folder)
    names = model.state_dict().keys()
    stored = load_file(folder / "model.safetensors").keys()
    cut = "backbone." if readout["readout"] in ("cls", "gap") else ""
    assert names == encoder.state_dict().keys() == {f"{cut}{name}" for name in stored}
    side = readout.get("image_size", 16)
    for size in ((side, side), (2 * side, side + 8)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(model(x), encoder(x), atol=1e-5, rtol=0)
        assert torch.equal(load_encoder(folder)(x), encoder(x))
    assert model.head_hidden_size == encoder.embed_dim and model.num_features == 16


@pytest.mark.parametrize(
    ("readout", "changes"), [("cls", {"arch": "vit_tiny"}), ("gap", {"patch_size": 8, "image_size": 40})]
)
@torch.no_grad()
def test_timms_own_vit_takes_encoders_without_slots(folder, readout, changes):
    encoder = export(folder, readout=readout, **changes)
    card = (folder / "README.md").read_text()
    assert "only: it resizes" in card
    (call,) = re.findall(r"`timm\.create_model\((.*FOLDER/model.*)\)`", card)
    own = eval(f"timm.create_model({call.replace('FOLDER', str(folder))})").eval()
    assert type(own) is timm.models.VisionTransformer
    side = (DEFAULTS | changes)["image_size"]
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(own(x), encoder(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base"])
def test_named_sizes_need_no_arguments(arch):
    """With torch's meta device nothing is computed: names and shapes only."""
    with torch.device("meta"):
        ours = build_encoder(arch).state_dict()
        model = timm.create_model(f"{arch}_patch16_sparo_224")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert model.num_classes == 0 and model.head_hidden_size == 4096
    assert timm.list_models("*sparo*", pretrained=True) == []


def test_what_differs_from_the_named_model_is_stated(folder):
    vit_tiny = {"arch": "vit_tiny", "patch_size": 16, "image_size": 224}
    different = {
        **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
        **{"num_slots": 4, "slot_dim": 6, "key_dim": 8, "group_size": 2},
    }
    for number, (changes, name, arguments) in enumerate(
        (
            (vit_tiny | {"readout": "sparo", "slot_dim": 64}, "vit_tiny_patch16_sparo_224", {}),
            (SPARO, "vit_small_patch16_sparo_224", different),
            (vit_tiny | {"readout": "cls"}, "vit_tiny_patch16_sparo_224", {"readout": {"name": "cls"}}),
        )
    ):
        export(folder / str(number), **changes)
        config = json.loads((folder / str(number) / "config.json").read_text())
        assert (config["architecture"], config["model_args"]) == (name, arguments)


def test_data_config_is_our_evaluation(folder):
    assert pretrained_config(224)["crop_pct"] == 0.875
    export(folder, **SPARO)
    data = timm.data.resolve_model_data_config(created(folder))
    assert tuple(data["mean"]) == IMAGENET_MEAN and tuple(data["std"]) == IMAGENET_STD
    assert data["interpolation"] == "bicubic" and data["input_size"] == [3, 16, 16]
    pixels = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8).numpy()
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2).copy())):
        transform = timm.data.create_transform(**data, is_training=False)
        torch.testing.assert_close(transform(image), normalize(evaluation_crop(image, 16)), atol=1e-5, rtol=0)


def test_timm_resizes_to_the_same_short_side():
    for size in range(8, 1025, 8):
        config = pretrained_config(size)
        data = {key: config[key] for key in ("input_size", "interpolation", "crop_pct", "mean", "std")}
        resize = timm.data.create_transform(**data, is_training=False).transforms[0]
        assert resize.size == round(size * 256 / 224)


@torch.no_grad()
def test_stages_classifier_and_slots(folder, images):
    encoder = export(folder, **SPARO)
    model = created(folder)
    tokens = model.forward_features(images)
    torch.testing.assert_close(tokens, encoder.tokens(images))
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), encoder(images))
    torch.testing.assert_close(model.slots(images), encoder.readout(tokens))
    torch.testing.assert_close(model.attention(images), encoder.readout.attention(tokens))
    assert model.slots(images).shape == (2, 4, 6) and model.attention(images).shape == (2, 4, 17)

    model.reset_classifier(7)
    assert model.get_classifier() is model.head and model.head.in_features == 24
    torch.testing.assert_close(model(images), model.head(encoder(images)))
    assert model(images).shape == (2, 7) and model.num_classes == 7
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), encoder(images))
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), encoder(images))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(images), tokens)
    model.reset_classifier(3)  # the pooling stays
    torch.testing.assert_close(model(images), model.head(tokens))
    assert model(images).shape == (2, 17, 3)
    with pytest.raises(ValueError, match="global_pool is 'avg', expected 'readout'"):
        model.reset_classifier(0, "avg")
    export(folder / "no_slots", **OTHERS["bottleneck"])
    for see in (created(folder / "no_slots").slots, created(folder / "no_slots").attention):
        with pytest.raises(ValueError, match="'bottleneck' has no slots"):
            see(images)


@torch.no_grad()
def test_created_with_classes_or_another_size(folder, images):
    encoder = export(folder, **SPARO)
    model = created(folder, num_classes=5)
    torch.testing.assert_close(model(images), model.head(encoder(images)))
    assert model(images).shape == (2, 5)
    larger = created(folder, img_size=32)
    assert larger.backbone.native_grid == 8
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(larger(x), encoder(x), atol=1e-5, rtol=0)
    dropping = created(folder, num_classes=5, drop_rate=0.5, drop_path_rate=0.2)
    assert dropping.head_drop.p == 0.5 and dropping.backbone.blocks[-1].drop_path1.drop_prob == 0.2
    for arguments, part in (({"in_chans": 1}, "RGB images only"), ({"img_size": (16, 32)}, "a square")):
        with pytest.raises(ValueError, match=part):
            timm.create_model("vit_tiny_patch16_sparo_224", **arguments)


@pytest.mark.parametrize("readout", [SPARO, {"readout": "cls"}, {"readout": "gap"}])
@torch.no_grad()
def test_other_sizes_give_our_encoding_or_are_refused(folder, readout):
    encoder = export(folder, **readout)
    x = torch.randn(2, 3, 24, 32)
    resized = created(folder)
    resized.set_input_size((24, 32))
    for model in (resized, created(folder, dynamic_img_size=True), created(folder)):
        torch.testing.assert_close(model(x), encoder(x), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"\(24, 32\), expected a square; leave it out, since any"):
        created(folder, img_size=(24, 32))
    for arguments, part in ((((24, 30),), "multiples of the patch size 4"), ((32, 8), "patch_size is 8")):
        with pytest.raises(ValueError, match=part):
            resized.set_input_size(*arguments)


@torch.no_grad()
def test_feature_extraction_by_timms_own_wrapper(folder, images):
    encoder = export(folder, **SPARO)
    outputs = encoder.backbone.block_outputs(images, last=2)
    model = created(folder, features_only=True, out_indices=(0, 1))
    assert model.feature_info.channels() == [16, 16] and model.feature_info.reduction() == [4, 4]
    for feature, x_BND in zip(model(images), outputs, strict=True):
        torch.testing.assert_close(feature, x_BND[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4))
    first = created(folder, features_only=True, out_indices=[-2])
    assert not [name for name, _ in first.named_parameters() if "blocks.1" in name or "readout" in name]
    torch.testing.assert_close(first(images)[0], model(images)[0])

    whole = created(folder)
    x = torch.randn(2, 3, 8, 16)
    final, pairs = whole.forward_intermediates(x, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC")
    torch.testing.assert_close(final, encoder.tokens(x))
    torch.testing.assert_close(torch.cat(pairs[0][::-1], dim=1), final)
    maps = whole.forward_intermediates(x, [0], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 2, 4)]


def test_groups_and_weight_decay_as_of_a_vit(folder):
    export(folder, **SPARO)
    model = created(folder, num_classes=3)
    groups = group_parameters(model, model.group_matcher())
    layer_of = {name: layer for layer, names in groups.items() for name in names}
    assert layer_of["backbone.pos_embed"] == layer_of["backbone.patch_embed.proj.bias"] == 0
    assert layer_of["backbone.blocks.0.norm1.weight"] == 1 and layer_of["backbone.norm.bias"] == 2
    assert layer_of["backbone.blocks.1.norm1.weight"] == 2 and layer_of["readout.query"] == 3
    assert layer_of["head.weight"] == 4
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_gradient_checkpointing_changes_no_gradient(folder, images):
    export(folder, **SPARO)
    model = created(folder, num_classes=3).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.backbone.activation_checkpointing == enable
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(model.backbone.pos_embed.grad.clone())
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_timm_saves_what_it_loads(folder, tmp_path, images):
    export(folder, **OTHERS["pooler"])
    model = created(folder, num_classes=3)
    save_for_hf(model, tmp_path / "again", safe_serialization=True)
    torch.testing.assert_close(created(tmp_path / "again")(images), model(images))
