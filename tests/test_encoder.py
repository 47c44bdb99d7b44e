"""Read-outs, grouping of crops and probe features."""

import pytest
import torch

from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.models.encoder import FEATURES

SMALL = {"width": 48, "depth": 4, "num_heads": 3}
SLOTS = {"num_slots": 4, "slot_dim": 6, "key_dim": 5, "group_size": 2}


def small_encoder(readout: str):
    options = SLOTS if readout == "sparo" else {}
    return build_encoder(SMALL, patch_size=8, image_size=32, readout=readout, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize(("readout", "blocks", "width"), [("sparo", 3, 24), ("cls", 4, 48), ("gap", 4, 48)])
def test_the_encoding_and_the_block_that_slots_replace(readout, blocks, width):
    encoder, images = small_encoder(readout), torch.randn(2, 3, 32, 32)
    tokens = encoder.tokens(images)
    assert tokens.shape == (2, 17, 48)
    assert len(encoder.backbone.blocks) == blocks and encoder.embed_dim == width
    expected = {"cls": tokens[:, 0], "gap": tokens[:, 1:].mean(1)}
    if encoder.readout is not None:
        expected["sparo"] = encoder.readout(tokens).flatten(1)
    torch.testing.assert_close(encoder(images), expected[readout])


@torch.no_grad()
def test_probe_features():
    images = torch.randn(2, 3, 32, 32)
    baseline = small_encoder("cls")
    blocks = [baseline.backbone.norm(x)[:, 0] for x in baseline.backbone.block_outputs(images, last=4)]
    torch.testing.assert_close(baseline.probe_features(images), torch.cat(blocks, dim=1))

    sparo = small_encoder("sparo")
    blocks = [sparo.backbone.norm(x)[:, 0] for x in sparo.backbone.block_outputs(images, last=3)]
    torch.testing.assert_close(sparo.probe_features(images), torch.cat([*blocks, sparo(images)], dim=1))
    torch.testing.assert_close(sparo.probe_features(images, num_blocks=1), sparo(images))
    with pytest.raises(ValueError, match="num_blocks is 5, expected 1 to 4"):
        sparo.probe_features(images, num_blocks=5)


@torch.no_grad()
@pytest.mark.parametrize("readout", ["sparo", "cls", "gap"])
def test_several_features_by_one_pass(readout):
    encoder, images = small_encoder(readout), torch.randn(2, 3, 32, 32)
    features, tokens = encoder.features(images, FEATURES, num_blocks=2), encoder.tokens(images)
    assert tuple(features) == FEATURES
    torch.testing.assert_close(features["encoding"], encoder(images))
    torch.testing.assert_close(features["cls"], tokens[:, 0])
    torch.testing.assert_close(features["patch_mean"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(features["probe"], encoder.probe_features(images, num_blocks=2))
    last = tokens[:, 1:].mean(1) if readout == "gap" else tokens[:, 0]
    assert features["blocks"].shape == (2, 2 * 48)
    torch.testing.assert_close(features["blocks"][:, 48:], last)
    alone = encoder.features(images, ["cls"])
    torch.testing.assert_close(alone["cls"], features["cls"])
    with pytest.raises(ValueError, match="feature 'slots' is unknown, expected some of encoding, cls"):
        encoder.features(images, ["slots"])


@torch.no_grad()
def test_grouped_crops_equal_single_crops():
    model = DinoModel(
        small_encoder("sparo"), DINOHead(24, num_prototypes=32, hidden_dim=16, bottleneck_dim=8)
    )
    groups = [torch.randn(2, 3, 3, 32, 32), torch.randn(4, 3, 3, 16, 16)]
    logits, encodings = model(groups)
    assert logits.shape == (18, 32) and encodings.shape == (18, 24)
    one_by_one = [model([crop[None]])[0] for group in groups for crop in group]
    torch.testing.assert_close(logits, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "vit_smal"}, "arch is 'vit_smal', expected one of vit_tiny, vit_small, vit_base"),
        ({"readout": "slots"}, "readout is 'slots', expected one of sparo, cls, gap"),
        ({"readout": "cls", "num_slots": 4}, "readout 'cls' takes no options, got num_slots"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**arguments)


@pytest.mark.parametrize("frozen", [False, True])
def test_in_mixed_precision_all_weights_are_cast_at_once_and_give_the_numbers_of_autocast(frozen):
    """But for SPARO's keys, used twice: autocast casts their gradients before they are added."""
    model = DinoModel(small_encoder("sparo"), DINOHead(24, 8, hidden_dim=16, bottleneck_dim=4)).train()
    model.encoder.backbone.requires_grad_(not frozen)
    groups = [torch.randn(2, 3, 3, 32, 32), torch.randn(4, 3, 3, 16, 16)]

    def by_autocast():
        tokens = model.encoder.backbone.tokens_of_sizes([crops.flatten(0, 1) for crops in groups])
        return model.head(torch.cat([model.encoder.read(tokens_BND) for tokens_BND in tokens]))

    found = []
    for logits_of in (by_autocast, lambda: model(groups)[0]):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of()
        (logits**2).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | {"logits": logits})
    assert (found[0]["encoder.backbone.cls_token"] is None) == frozen
    for name, theirs in found[0].items():
        ours = found[1][name]
        if "key_proj" in name:
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 * theirs.abs().max().item())
        else:
            assert ours is theirs is None or torch.equal(ours, theirs), name
