"""Read-outs of the ablations: who shares what, shapes, attention, gradients, and runs with each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_sparo import load_encoder
from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.models import Sparo, build_encoder
from dino_sparo.models.cost import count_parameters, encoder_cost
from dino_sparo.models.readouts import AttentionalPooler, MultiHeadSlots, ProjectedSlots
from tests.tiny import CLS, tiny_options, write_pictures

D, L, V, H, A = 24, 6, 8, 5, 4
ARCH = {"width": D, "depth": 3, "num_heads": 2}
SIZES = {"num_slots": L, "slot_dim": V, "key_dim": H}
READOUTS = {
    "sparo": {"readout": "sparo", **SIZES, "group_size": 2},
    "after": {"readout": "sparo", **SIZES, "group_size": 1, "after_last_block": True},
    "multi": {"readout": "sparo", **SIZES, "heads": "multi", "num_heads": A},
    "slotwise": {"readout": "sparo", **SIZES, "output": "slots", "after_last_block": False},
    "whole": {"readout": "sparo", **SIZES, "group_size": 1, "output": "whole"},
    "multi whole": {"readout": "sparo", **SIZES, "heads": "multi", "num_heads": A, "output": "whole"},
    "pooler": {"readout": "pooler", "num_slots": L, "slot_dim": V, "num_heads": A},
}
READOUTS["pooler after"] = READOUTS["pooler"] | {"after_last_block": True, "output": "slots"}
BOTTLENECK = {"readout": "bottleneck", "bottleneck_dim": 5, "encoding_dim": 40}

SEPARATE = L * H + L * H * (D + 1) + V * (H + 1)  # a query and a key projection for each slot, one W for all
MULTI = L * A * H + A * H * (D + 1) + V * (A * H + 1)  # a query for each slot, one key projection, one W
POOLER = L * V + 2 * V + 2 * D + V * (V + 1) + 2 * V * (D + 1) + V * (V + 1)
PARAMETERS = {
    "sparo": L * H + L // 2 * H * (D + 1) + V * (H + 1),  # two slots share a key projection
    "after": SEPARATE,
    "multi": MULTI,
    "slotwise": SEPARATE + 2 * V + V * (V + 1),
    "whole": SEPARATE + 2 * L * V + L * V * (L * V + 1),
    "multi whole": MULTI + 2 * L * V + L * V * (L * V + 1),
    "pooler": POOLER,
    "pooler after": POOLER + 2 * V + V * (V + 1),
}
BLOCK = 12 * D**2 + 13 * D


def small_encoder(name: str):
    options = BOTTLENECK if name == "bottleneck" else READOUTS[name]
    return build_encoder(ARCH, patch_size=8, image_size=32, **options)


@pytest.mark.parametrize("name", READOUTS)
def test_who_shares_what(name):
    cost = encoder_cost(small_encoder(name), 32)
    assert cost["readout_parameters"] == PARAMETERS[name]
    backbone = count_parameters(build_encoder(ARCH, patch_size=8, image_size=32, readout="cls"))
    stays = READOUTS[name].get("after_last_block", False)
    assert cost["parameters"] == backbone - (0 if stays else BLOCK) + PARAMETERS[name]


def test_bottleneck_counts_and_is_linear_in_cls():
    encoder, images = small_encoder("bottleneck"), torch.randn(2, 3, 32, 32)
    assert encoder_cost(encoder, 32)["readout_parameters"] == 5 * (D + 1) + 40 * (5 + 1)
    assert (encoder.num_slots, encoder.readout, encoder.embed_dim) == (0, None, 40)
    assert len(encoder.backbone.blocks) == 3
    tokens = encoder.tokens(images)
    first, second = encoder.bottleneck.narrow, encoder.bottleneck.wide
    expected = F.linear(F.linear(tokens[:, 0], first.weight, first.bias), second.weight, second.bias)
    torch.testing.assert_close(encoder(images), expected)
    assert torch.linalg.matrix_rank((second.weight @ first.weight).detach()) == 5
    plain = build_encoder(ARCH, patch_size=8, image_size=32, readout="cls")
    plain.backbone.load_state_dict(encoder.backbone.state_dict())
    torch.testing.assert_close(encoder.probe_features(images, 3), plain.probe_features(images, 3))


@torch.no_grad()
@pytest.mark.parametrize("name", READOUTS)
def test_shapes_and_rows_of_attention(name):
    encoder, images = small_encoder(name).eval(), torch.randn(2, 3, 32, 32)
    tokens = encoder.tokens(images)
    slots, attention = encoder.readout(tokens), encoder.readout.attention(tokens)
    assert (encoder.num_slots, encoder.readout.num_slots, encoder.readout.slot_dim) == (L, L, V)
    assert slots.shape == (2, L, V) and attention.shape == (2, L, 17)
    assert attention.min() >= 0
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, L))
    assert encoder.embed_dim == L * V
    torch.testing.assert_close(encoder(images), slots.flatten(1))
    depth = 3 if READOUTS[name].get("after_last_block") else 2
    assert len(encoder.backbone.blocks) == depth
    features = encoder.probe_features(images, num_blocks=3)
    assert features.shape == (2, 2 * D + L * V)
    torch.testing.assert_close(features[:, 2 * D :], slots.flatten(1))


@pytest.mark.parametrize("name", [*READOUTS, "bottleneck"])
def test_gradients_reach_every_parameter(name):
    encoder = small_encoder(name)
    weights = torch.randn(2, encoder.embed_dim)
    (encoder(torch.randn(2, 3, 32, 32)) * weights).sum().backward()
    # A bias of keys that are no values adds one constant to all logits of a query: the softmax drops it.
    dropped = {"readout.key_proj.bias", "readout.slots.key_proj.bias"} if "pooler" in name else set()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert key in dropped or parameter.grad.abs().max() > 1e-9, key


@torch.no_grad()
def test_multi_head_is_equation_1_head_by_head():
    multi = MultiHeadSlots(D, L, V, H, num_heads=A).double()
    nn.init.normal_(multi.key_proj.bias)
    tokens = torch.randn(2, 9, D, dtype=torch.float64)
    pooled, maps = [], []
    for head in range(A):
        rows = slice(head * H, (head + 1) * H)
        keys = tokens @ multi.key_proj.weight[rows].T + multi.key_proj.bias[rows]
        maps.append((multi.query[:, rows] @ keys.transpose(1, 2) / H**0.5).softmax(-1))
        pooled.append(maps[-1] @ keys)
    expected = torch.cat(pooled, dim=-1) @ multi.value_proj.weight.T + multi.value_proj.bias
    torch.testing.assert_close(multi(tokens), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(multi.attention(tokens), sum(maps) / A, atol=1e-12, rtol=0)


@torch.no_grad()
def test_pooler_is_torchs_attention_between_layer_norms():
    pooler = AttentionalPooler(D, L, V, num_heads=A).double()
    for parameter in pooler.parameters():
        nn.init.normal_(parameter)  # fresh biases and norms would hide missing terms
    tokens = torch.randn(2, 9, D, dtype=torch.float64)
    reference = nn.MultiheadAttention(V, A, kdim=D, vdim=D, batch_first=True).double()
    projections = (pooler.query_proj, pooler.key_proj, pooler.value_proj)
    for name, projection in zip(("q", "k", "v"), projections, strict=True):
        getattr(reference, f"{name}_proj_weight").copy_(projection.weight)
    reference.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    reference.out_proj.load_state_dict(pooler.out_proj.state_dict())
    normed = F.layer_norm(tokens, (D,), pooler.token_norm.weight, pooler.token_norm.bias, eps=1e-6)
    query = F.layer_norm(pooler.query, (V,), pooler.query_norm.weight, pooler.query_norm.bias, eps=1e-6)
    expected, maps = reference(query.expand(2, -1, -1), normed, normed)
    torch.testing.assert_close(pooler(tokens), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(pooler.attention(tokens), maps, atol=1e-12, rtol=0)


@torch.no_grad()
def test_only_a_whole_projection_mixes_slots():
    for whole in (False, True):
        projected = ProjectedSlots(Sparo(D, L, V, H), whole=whole)
        tokens = torch.randn(1, 9, D)
        before = projected(tokens)
        projected.slots.query[0].normal_()
        changed = (projected(tokens) != before).any(dim=-1)[0]
        assert changed[0] and changed[1:].any() == whole
        torch.testing.assert_close(projected.attention(tokens), projected.slots.attention(tokens))


def test_flops_of_a_block_that_stays_are_counted():
    replaced, after = (encoder_cost(small_encoder(name), 32) for name in ("slotwise", "after"))
    block = 2 * (17 * 12 * D**2 + 2 * 17 * 17 * D)
    assert after["flops"] - after["readout_flops"] - replaced["flops"] + replaced["readout_flops"] == block
    assert replaced["readout_flops"] - after["readout_flops"] == 2 * L * V * V


def test_counting_leaves_the_encoder_as_it_is():
    encoder = build_encoder(
        ARCH, patch_size=8, image_size=32, drop_path_rate=0.5, **READOUTS["multi"]
    ).train()
    before = torch.random.get_rng_state()
    encoder_cost(encoder, 32)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert encoder.training and all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "sparo", "heads": "many"}, "heads is 'many', expected separate or multi"),
        ({"readout": "pooler", "slot_dim": 6, "num_heads": 4}, "slot_dim 6 is not divisible by num_heads 4"),
        ({"readout": "sparo", "output": "all"}, "output is 'all', expected slots, whole or None"),
    ],
)
def test_wrong_choices(options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(ARCH, patch_size=8, image_size=32, **options)
    with pytest.raises(TypeError, match="heads"):
        build_encoder(ARCH, patch_size=8, image_size=32, readout="pooler", num_heads=4, heads="multi")


CHANGES = {
    "after": {"after_last_block": "true"},
    "multi": {"heads": "multi", "num_heads": 2, "group_size": "null"},
    "slotwise": {"output": "slots"},
    "whole": {"output": "whole"},
    "pooler": {"name": "pooler", "num_heads": 2, "group_size": "null", "key_dim": "null"},
    "bottleneck": {"bottleneck_dim": 3, "encoding_dim": 20},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_its_checkpoint_and_its_export(tmp_path, name):
    write_pictures(tmp_path / "data", 4)
    changes = {f"model__readout__{key}": value for key, value in CHANGES[name].items()}
    if name == "bottleneck":
        changes |= CLS | {"model__readout__name": name}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", **changes))
    encoder, images = load_encoder(tmp_path / "run"), torch.randn(2, 3, 16, 16)
    assert encoder.num_slots == (0 if name == "bottleneck" else 2)
    assert encoder.embed_dim == (20 if name == "bottleneck" else 8)
    untrained = load_encoder(tmp_path / "run", "student", untrained=True)
    trained = load_encoder(tmp_path / "run", "student")
    learned = dict(trained.named_parameters())
    for key, value in untrained.named_parameters():
        constant = name == "pooler" and key == "readout.key_proj.bias"  # which softmax drops
        assert constant or not torch.equal(value, learned[key]), key
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "out")(images), encoder(images))


def test_the_start_of_a_run_tells_its_cost(tmp_path, caplog):
    write_pictures(tmp_path / "data", 4)
    with caplog.at_level("INFO", "dino_sparo"):
        pretrain(tiny_options(tmp_path / "data", tmp_path / "run", optim__epochs=1))
    (line,) = [text for text in caplog.messages if "GFLOPs per image" in text]
    assert line.startswith("encoder with read-out sparo: 0.01 M parameters (0.00 M in the read-out), ")
