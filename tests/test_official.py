"""Official ViT weights: every way they are wrapped gives the same encoder, and nothing else is let in."""

import argparse

import numpy as np
import pytest
import torch

from dino_sparo import load_encoder
from dino_sparo.errors import UserError
from dino_sparo.models import DINOHead, build_encoder

SIZES = {"width": 128, "depth": 3, "num_heads": 2}


def small_encoder(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = build_encoder(
        **({"arch": SIZES, "patch_size": 8, "image_size": 32, "readout": "cls"} | changes)
    )
    for parameter in encoder.parameters():  # so that no bias is zero nor any norm one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def full_checkpoint(student, teacher):
    """As the official training writes it: student wrapped for data-parallel training, both with heads."""
    head = DINOHead(128, num_prototypes=8, hidden_dim=8, bottleneck_dim=4).state_dict()
    return {
        "student": prefixed(student, "module.backbone.") | prefixed(head, "module.head."),
        "teacher": prefixed(teacher, "backbone.") | prefixed(head, "head."),
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", patch_size=8, global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


@pytest.fixture(scope="module")
def source():
    return small_encoder()


@pytest.fixture
def state(source):
    return dict(source.backbone.state_dict())


@pytest.fixture
def file(tmp_path):
    return tmp_path / "dino.pth"


def refused(file, content, **arguments):
    torch.save(content, file)
    with pytest.raises(UserError) as caught:
        load_encoder(file, **arguments)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def same_outputs(encoder, source):
    assert not encoder.training
    images = torch.randn(2, 3, 40, 32)  # off the native size too
    for x in (images, images[:, :, :32]):
        torch.testing.assert_close(encoder(x), source(x), rtol=0, atol=0)
        torch.testing.assert_close(encoder.probe_features(x, 3), source.probe_features(x, 3), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: prefixed(state, "backbone."),
        lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
        lambda state: {**state, "head.weight": torch.zeros(10, 128)},
        lambda state: prefixed(state, "module._orig_mod.backbone."),
        lambda state: prefixed(state, "backbone._orig_mod.module."),
        lambda state: {k.replace("blocks.0", "blocks.0._orig_mod"): v for k, v in state.items()},
        lambda state: {"teacher": {"model_state_dict": state}, "epoch": 2},
        lambda state: {"state_dict": {"teacher": prefixed(state, "_orig_mod."), "student": state}},
        lambda state: {"model": {"model": {"state_dict": state}}},
    ],
)
def test_every_wrapping_gives_the_source(file, source, state, wrap):
    torch.save(wrap(state), file)
    same_outputs(load_encoder(file), source)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_full_checkpoint_has_both(file, source, zipped):
    student = small_encoder(seed=1)
    content = full_checkpoint(student.backbone.state_dict(), source.backbone.state_dict())
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    same_outputs(load_encoder(file), source)
    same_outputs(load_encoder(file, "student"), student)


def test_sizes_are_read_from_the_weights(file):
    source = small_encoder(arch={"width": 192, "depth": 11, "num_heads": 3}, patch_size=4, image_size=24)
    torch.save(source.backbone.state_dict(), file)
    backbone = load_encoder(file).backbone
    assert (backbone.patch_size, backbone.native_grid) == (4, 6)
    assert len(backbone.blocks) == 11 and backbone.blocks[0].attn.num_heads == 3


@torch.no_grad()
def test_golden_features(golden, file):
    """Three heads of 16 numbers, which only `arch` can tell."""
    arrays = golden("backbone")
    state = {k.removeprefix("weight."): torch.from_numpy(v) for k, v in arrays.items() if k[:6] == "weight"}
    assert "has width 48, which is not a multiple of 64" in refused(file, state)
    encoder = load_encoder(file, arch={"width": 48, "depth": 4, "num_heads": 3})
    for size in ("224x224", "96x96", "160x224"):
        images = torch.from_numpy(arrays[f"input.{size}"]).float()
        np.testing.assert_allclose(encoder(images), arrays[f"features.{size}"], atol=1e-5, rtol=1e-5)


def test_arch_must_fit(file, state):
    torch.save(state, file)
    assert load_encoder(file, arch={**SIZES, "num_heads": 4}).backbone.blocks[0].attn.num_heads == 4
    message = refused(file, state, arch="vit_small")
    assert "arch is 'vit_small' (width 384, depth 12 and 6 heads), but" in message
    assert "has width 128, depth 3 and 2 heads" in message
    for arch, part in (
        ("vit_huge", "expected one of vit_tiny, vit_small, vit_base, or a mapping"),
        ({"width": 128}, "mapping with width, depth, num_heads"),
    ):
        with pytest.raises(UserError, match=part):
            load_encoder(file, arch=arch)
    assert "not divisible by model.arch.num_heads 3" in refused(file, state, arch={**SIZES, "num_heads": 3})


def test_which_model(file, state):
    assert "contains only the teacher; use which='teacher'" in refused(file, state, which="student")
    assert "contains only the teacher" in refused(file, {"teacher": state}, which="student")
    assert "contains only the student" in refused(file, {"student": state})


def without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


def changed(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("norm2.bias"), "3 missing (backbone.blocks.0.norm2.bias, "),
        (without("blocks."), "model.arch.depth is 0"),
        (without("cls_token"), "only a part of a ViT backbone, without cls_token"),
        (lambda state: state | {"mask_token": torch.zeros(1)}, "1 unexpected (backbone.mask_token)"),
        (lambda state: state | {"blocks.x.y": torch.zeros(1)}, "1 unexpected (backbone.blocks.x.y)"),
        (lambda state: state | {"module.norm.bias": state["norm.bias"]}, "contains 'norm.bias' twice"),
        (changed("pos_embed", lambda x: x[:, 1:]), "pos_embed is (1, 16, 128); expected (1, 1 + a square"),
        (changed("pos_embed", lambda x: x[..., 1:]), "pos_embed (1, 17, 127) instead of (1, 17, 128)"),
        (changed("cls_token", lambda _: torch.tensor(1.0)), "backbone.cls_token () instead of (1, 1, 128)"),
        (changed("patch_embed.proj.weight", lambda x: x[..., 1:]), "proj.weight is (128, 3, 8, 7)"),
        (changed("norm.bias", lambda x: x.to(torch.int8)), "(128,) of torch.int8 instead of (128,)"),
        (changed("norm.bias", lambda _: [0.0]), "backbone.norm.bias a list instead of (128,)"),
    ],
)
def test_what_does_not_fit_is_listed(file, state, change, message):
    assert message in refused(file, change(state))


OTHERS = {  # what the training files of other programs hold beside the encoder
    "ibot": {"masked_embed": (1, 128), "head.mlp.0.weight": (8, 128), "head.last_layer2.weight_v": (8, 4)},
    "mae": {
        "mask_token": (1, 1, 64),
        "decoder_embed.weight": (64, 128),
        "decoder_pos_embed": (1, 17, 64),
        "decoder_blocks.0.norm1.weight": (64,),
        "decoder_pred.bias": (192,),
    },
    "deit": {"head.weight": (10, 128), "head.bias": (10,)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_beside_a_plain_vit_is_left_out_and_listed(file, source, state, name, caplog):
    torch.save({"model": state | {key: torch.zeros(shape) for key, shape in OTHERS[name].items()}}, file)
    with caplog.at_level("INFO", "dino_sparo"):
        same_outputs(load_encoder(file), source)
    (said,) = [message for message in caplog.messages if "not used: " in message]
    for kind in {key.partition(".")[0] for key in OTHERS[name]}:
        assert f"{kind} (" in said


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"register_tokens": (1, 4, 128), "mask_token": (1, 128)}, "register tokens, as in DINOv2"),
        ({"blocks.0.ls1.gamma": (128,), "blocks.0.ls2.gamma": (128,)}, "LayerScale, as in DINOv2, DeiT III"),
        ({"blocks.1.gamma_1": (128,)}, "LayerScale"),
        ({"blocks.0.mlp.w12.weight": (8, 128), "blocks.0.mlp.w3.weight": (128, 4)}, "SwiGLU, as in DINOv2"),
        ({"blocks.0.0.norm1.weight": (128,)}, "blocks in chunks, as in training of DINOv2"),
        ({"dist_token": (1, 1, 128), "head_dist.weight": (10, 128), "pos_embed": (1, 18, 128)}, "DeiT"),
        ({"norm.weight": None, "norm.bias": None, "fc_norm.weight": (128,)}, "as in fine-tuned MAE"),
        ({"rope_embed.periods": (16,), "pos_embed": None, "storage_tokens": (1, 4, 128)}, "DINOv3"),
        ({"blocks.0.attn.relative_position_bias_table": (9, 2), "pos_embed": None}, "BEiT"),
    ],
)
def test_another_kind_of_vit_is_named_and_a_plain_one_offered(file, state, extra, what):
    weights = state | {key: torch.zeros(shape) for key, shape in extra.items() if shape}
    weights = {key: value for key, value in weights.items() if extra.get(key, True)}
    for content in (weights, {"teacher": prefixed(weights, "backbone.")}):
        message = refused(file, content)
        assert what in message and "give a plain ViT, such as timm:vit_" in message


def test_huge_vits_have_sixteen_heads(file):
    sizes = {"width": 1280, "depth": 1, "num_heads": 16}
    torch.save(small_encoder(arch=sizes).backbone.state_dict(), file)
    assert load_encoder(file).backbone.num_heads == 16


def test_a_file_that_holds_itself_is_refused(file):
    content = {}
    content["model"] = content
    assert "contains no parameter of a ViT backbone, but 1 entries: 'model'" in refused(file, content)


def test_files_without_a_backbone_say_what_they_hold(file):
    probe = {"epoch": 1, "state_dict": {"module.linear.weight": torch.zeros(2, 2)}, "best_acc": 75.0}
    assert "but 1 entries: 'module.linear.weight'; expected" in refused(file, probe)
    heads = {"teacher": {f"head.{number}": torch.zeros(1) for number in range(9)}}
    assert "9 entries: 'head.0', 'head.1', 'head.2', 'head.3', 'head.4', ..." in refused(file, heads)
    assert "0 entries: none" in refused(file, {})
    assert "contains a list; expected a state dict (parameters by name" in refused(file, [torch.zeros(1)])
    assert "contains a Tensor; expected" in refused(file, {"teacher": torch.zeros(1)})
