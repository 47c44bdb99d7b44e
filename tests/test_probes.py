"""Several probes on one forward pass: each is trained as if it were alone."""

from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dino_sparo.data.loader import BatchOrder
from dino_sparo.data.shapes import ShapesSource
from dino_sparo.errors import UserError
from dino_sparo.evaluation import probe_batches, probes
from dino_sparo.evaluation.classifiers import (
    METADATA_KEY,
    SavedClassifier,
    load_classifier,
    save_classifier,
)
from dino_sparo.evaluation.probe_batches import features_of_rows
from dino_sparo.evaluation.probes import (
    INPUTS,
    Probe,
    Probes,
    choose_probes,
    hits,
    official_probe,
)
from dino_sparo.models import build_encoder
from dino_sparo.runs.runlog import RunLog

ARCH = {"width": 16, "depth": 6, "num_heads": 2}
SPARO = {"readout": "sparo", "num_slots": 2, "slot_dim": 4, "key_dim": 4}


def encoder(**readout):
    return build_encoder(arch=ARCH, patch_size=8, image_size=16, **readout).eval()


def features_of(model, count=3):
    images = torch.randn(count, 3, 16, 16)
    with torch.no_grad():
        return images, model.features(images, INPUTS)


@pytest.mark.parametrize("readout", [SPARO, {"readout": "cls"}, {"readout": "gap"}])
def test_the_official_probe_sees_what_the_protocol_says(readout):
    model = encoder(**readout)
    images, features = features_of(model)
    probe = official_probe(model)
    assert probe == Probe("both" if readout is SPARO else "cls", 4, 0.001)
    seen = probe.select(features, 16)
    with torch.no_grad():
        assert torch.equal(seen, model.probe_features(images, 4))
    assert seen.shape[1] == probe.num_inputs(16, model.embed_dim) == (56 if readout is SPARO else 64)


def test_each_probe_sees_its_own_part():
    model = encoder(**SPARO)
    _, features = features_of(model)
    blocks = features["blocks"]
    assert torch.equal(Probe("cls", 2, 0.1).select(features, 16), blocks[:, 32:])
    assert torch.equal(Probe("encoding", 1, 0.1).select(features, 16), features["encoding"])
    both = Probe("both", 2, 0.1).select(features, 16)
    assert torch.equal(both, torch.cat([blocks[:, 48:], features["encoding"]], dim=1))
    for probe in (Probe("cls", 2, 0.1), Probe("encoding", 1, 0.1), Probe("both", 3, 0.1)):
        assert probe.select(features, 16).shape[1] == probe.num_inputs(16, model.embed_dim)


def test_names():
    names = [Probe("both", 4, 0.001).name, Probe("cls", 1, 0.1).name, Probe("encoding", 1, 0.12345678).name]
    assert names == ["4 blocks both lr 0.001", "1 block cls lr 0.1", "encoding lr 0.12345678"]


def test_default_is_the_official_probe_alone_and_a_sweep_has_twelve():
    model = encoder(**SPARO)
    assert choose_probes(model) == [official_probe(model)]
    sweep = choose_probes(model, sweep=True)
    assert len(sweep) == len({probe.name for probe in sweep}) == 12
    assert official_probe(model) in sweep
    given = choose_probes(model, learning_rates=[0.01, 0.1], num_blocks=[1, 3], features=["both"])
    assert [probe.name for probe in given] == [
        *("encoding lr 0.01", "3 blocks both lr 0.01", "encoding lr 0.1", "3 blocks both lr 0.1")
    ]
    assert len(choose_probes(encoder(readout="cls"), sweep=True)) == 6


def test_a_shallow_encoder_has_fewer_blocks():
    model = build_encoder(arch=ARCH | {"depth": 2}, patch_size=8, image_size=16, **SPARO)
    assert official_probe(model).name == "2 blocks both lr 0.001"
    assert {probe.name for probe in choose_probes(model, sweep=True, learning_rates=[0.1])} == {
        *("encoding lr 0.1", "1 block cls lr 0.1", "2 blocks both lr 0.1")
    }
    with pytest.raises(UserError, match="num_blocks has 3; expected 1 to 2 for this encoder"):
        choose_probes(model, num_blocks=[1, 3])
    with pytest.raises(UserError, match="features has 'both', but this encoder has no slots"):
        choose_probes(encoder(readout="cls"), features=["both"])
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"learning_rates has {rate:g}; expected numbers above 0"):
            choose_probes(model, learning_rates=[0.1, rate])


@pytest.mark.parametrize("most", [2**20, 1], ids=["joined", "alone"])
def test_a_probe_among_others_learns_as_alone(most, monkeypatch):
    monkeypatch.setattr(probes, "JOINED_NUMBERS", most)
    model = encoder(**SPARO)
    _, features = features_of(model, count=8)
    labels = torch.arange(8) % 3
    chosen = choose_probes(model, sweep=True)
    several = Probes(chosen, width=16, embed_dim=8, num_classes=3, seed=5).double().float()  # moved
    optimizer = several.optimizer(512)
    inputs, losses = several.inputs(features), []
    for _ in range(3):
        losses.append(several.step(inputs, labels, optimizer))
    for number, probe in enumerate(chosen):
        alone = torch.nn.Linear(probe.num_inputs(16, 8), 3)
        torch.nn.init.normal_(alone.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(5))
        torch.nn.init.zeros_(alone.bias)
        reference = torch.optim.SGD(
            alone.parameters(), probe.learning_rate * 2, momentum=0.9, weight_decay=0.0
        )
        for of_step in losses:
            reference.zero_grad()
            loss = F.cross_entropy(alone(probe.select(features, 16)), labels)
            loss.backward()
            reference.step()
            torch.testing.assert_close(of_step[number], loss.detach(), rtol=1e-5, atol=1e-7)
        for name in ("weight", "bias"):
            ours = several.state_dict()[f"classifiers.{number}.{name}"]
            torch.testing.assert_close(ours, alone.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "chosen",
    [
        [Probe("cls", 2, 0.1)],
        [Probe("encoding", 1, 0.1)],
        [Probe("both", 3, 0.1), Probe("both", 3, 0.2)],
        [Probe("cls", 1, 0.1), Probe("cls", 4, 0.1), Probe("encoding", 1, 0.1), Probe("both", 2, 0.1)],
    ],
)
def test_features_are_held_in_memory_where_they_fit_and_are_the_same(chosen, tmp_path, monkeypatch, caplog):
    rng = np.random.default_rng(0)
    features = {
        n: rng.normal(size=(11, width)).astype(np.float16) for n, width in (("blocks", 64), ("encoding", 8))
    }
    source = ShapesSource.of(0, np.arange(11), np.arange(11) % 3)
    several = Probes(chosen, width=16, embed_dim=8, num_classes=3)
    found = []
    caplog.set_level("INFO")
    for free in (0, 10**9):
        monkeypatch.setattr(probe_batches, "memory_free", lambda free=free: free)
        order = BatchOrder(num_samples=11, global_batch_size=4, epochs=2, seed=0)
        with RunLog(tmp_path, first_step=0, steps_per_epoch=2, total_steps=4, silent=True) as log:
            found.append([*features_of_rows(features, source, order, log, torch.device("cpu"), several)])
    assert "read from disk" in caplog.messages[0] and "held in memory" in caplog.messages[1]
    assert len(found[0]) == 4
    for streamed, held in zip(*found, strict=True):
        assert streamed[0].keys() == held[0].keys() and torch.equal(streamed[1], held[1])
        assert all(torch.equal(value, held[0][seen]) for seen, value in streamed[0].items())
        assert streamed[2] and held[2]


@pytest.mark.parametrize(("device", "says"), [("cuda", "held in memory"), ("cpu", "read from disk")])
def test_each_gpu_holds_one_copy_of_the_features_and_a_machine_one_for_each_process(
    device, says, monkeypatch, caplog
):
    several = Probes([Probe("both", 1, 0.1)], width=16, embed_dim=8, num_classes=3)
    features = {name: np.zeros((11, width), np.float16) for name, width in (("blocks", 64), ("encoding", 8))}
    twice_one_copy = 2 * 4 * 11 * 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (twice_one_copy, 10**9))
    monkeypatch.setattr(probe_batches, "memory_free", lambda: 7 * twice_one_copy)
    caplog.set_level("INFO")
    with suppress(AssertionError, RuntimeError):  # there is no GPU
        probe_batches.in_memory(features, several, torch.device(device))
    assert says in caplog.text


def test_hits():
    logits = torch.tensor([[[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 4, [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 4])
    found = hits(logits, torch.tensor([0, 4, 5, 1]))  # (B, P, 2)
    assert found[:, 0].tolist() == [[True, True], [False, True], [False, False], [False, True]]
    assert found[:, 1].tolist() == [[False, False], [False, True], [True, True], [False, True]]
    logits[0] = torch.nan
    assert not hits(logits, torch.tensor([0, 4, 5, 1]))[:, 0].any()
    of_three = hits(logits[1:, :, :3], torch.tensor([0, 1, 2, 2]))
    assert of_three[:, 0].tolist() == [[False, True], [False, True], [True, True], [True, True]]


def test_a_classifier_file_holds_all_that_belongs_to_it(tmp_path):
    saved = SavedClassifier(
        Probe("both", 4, 0.001), torch.randn(3, 56), torch.randn(3), ("a", "ü", "c"), "abc", {"epochs": 7}
    )
    save_classifier(tmp_path / "x.safetensors", saved)
    again = load_classifier(tmp_path / "x.safetensors")
    assert torch.equal(again.weight, saved.weight) and torch.equal(again.bias, saved.bias)
    assert (again.probe, again.classes) == (saved.probe, saved.classes)
    assert (again.encoder, again.details) == (saved.encoder, saved.details)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    for number in range(4):
        save_classifier(tmp_path / f"{number}", saved)
        assert (tmp_path / f"{number}").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classes": ("a", "b", "d")},
            "evaluate 'f' has 3 classes, data.path has 3: 'c' is in only one of them",
        ),
        (
            {"num_inputs": 32},
            r"evaluate 'f' has weights of shape \(3, 16\), but this encoder needs \(3, 32\)",
        ),
        ({"encoder_hash": "y"}, "evaluate 'f' was trained on an encoder with other weights"),
    ],
)
def test_a_classifier_of_something_else(changes, message):
    weight, bias = torch.randn(3, 16), torch.randn(3)
    saved = SavedClassifier(Probe("cls", 1, 0.1), weight, bias, ("a", "b", "c"), "x", {})
    fitting = {"classes": ("c", "a", "b"), "num_inputs": 16, "encoder_hash": "x"}
    fitted = saved.fitted("f", **fitting)
    assert torch.equal(fitted["weight"], weight[[2, 0, 1]]) and torch.equal(fitted["bias"], bias[[2, 0, 1]])
    with pytest.raises(UserError, match=message):
        saved.fitted("f", **(fitting | changes))


def test_a_classifier_that_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="does not exist; give a saved classifier"):
        load_classifier(tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"no classifier")
    with pytest.raises(UserError, match=r"broken.* is not a classifier of format 1, or incomplete"):
        load_classifier(tmp_path / "broken")


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        ("{", (3, 5)),
        ("[]", (3, 5)),
        ('{"format": 1}', (4, 5)),
        ('{"format": 7}', (3,)),
        (None, (3, 5)),
        ('{"format": 1, "classes": ["a", "b", "c"], "learning_rate": 0}', (3, 5)),
    ],
)
def test_a_file_that_is_no_classifier_of_ours(tmp_path, content, shape):
    tensors = {"weight": torch.zeros(shape), "bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "x.safetensors", {METADATA_KEY: content} if content else None)
    with pytest.raises(UserError, match="is not a classifier of format 1"):
        load_classifier(tmp_path / "x.safetensors")
