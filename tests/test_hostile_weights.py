"""Weights of strangers: what a file says is compared with what it holds before any memory is taken."""

import io
import json
import os
import resource
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from dino_sparo import load_encoder
from dino_sparo.errors import UserError
from dino_sparo.evaluation.classifiers import load_classifier, load_official
from dino_sparo.interop.initial_weights import initialize_networks, read_networks
from dino_sparo.models import build_encoder
from dino_sparo.recipe.files import checked_encoder
from dino_sparo.runs.plain_file import MOST_PICKLE, read_plain
from tests.tiny import build_state, tiny_options

ARCH = {"width": 64, "depth": 2, "num_heads": 1}
ENCODER = {"arch": ARCH, "patch_size": 16, "image_size": 32, "readout": "cls"}
ONE = torch.zeros(1)
FEW_BYTES = 200 * 2**20  # that a refusal may take at most, where the file would take gigabytes


def of_shape(*shape):
    """A tensor that has this shape by repeating one number."""
    return ONE.as_strided(shape, (0,) * len(shape))


READOUT = {
    "readout.query": of_shape(10**8, 64),
    "readout.key_proj.weight": of_shape(64 * 10**8, 64),
    "readout.value_proj.weight": of_shape(64, 64),
}
SPARO = {"num_slots": 10**8, "slot_dim": 64, "key_dim": 64, "group_size": 1}


def claimed(**arguments):
    """The official names of an encoder of any size, in a few kilobytes."""
    with torch.device("meta"):
        names = build_encoder(**{**ENCODER, **arguments}).state_dict()
    return {name.removeprefix("backbone."): of_shape(*value.shape) for name, value in names.items()}


@pytest.fixture(scope="module")
def state():
    names = build_encoder(**ENCODER).state_dict()
    return {name.removeprefix("backbone."): value for name, value in names.items()}


def refused(path, **arguments):
    """The message of loading a file, which takes no memory to speak of."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        load_encoder(path, **arguments)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < FEW_BYTES // 1024
    assert str(path) in str(caught.value) and "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks.99999999.norm1.weight": torch.ones(64)}, "1 unexpected (backbone.blocks.99999999.norm1"),
        ({"blocks." + "9" * 5000 + ".norm1.weight": torch.ones(64)}, "1 unexpected (backbone.blocks.9999"),
        ({"blocks.\u0663.norm1.weight": torch.ones(64)}, "1 unexpected"),
        ({"pos_embed": of_shape(1, 4_000_001, 64)}, "bytes of weights, but contains"),
        (READOUT, "bytes of weights, but contains"),
        ({"blocks.0.mlp.fc1.weight": of_shape(256, 64)}, "bytes of weights, but contains"),
        (claimed(arch={"width": 16384, "depth": 12, "num_heads": 256}), "bytes of weights, but contains"),
        ({"cls_token": torch.zeros(1, 1, 64).to(torch.float8_e4m3fn)}, ""),  # not in the older format
        ({"cls_token": torch.zeros(1, 1, 64, dtype=torch.complex64)}, "of torch.complex64 instead"),
        ({"cls_token": torch.zeros(1, 1, 64, device="meta")}, "on meta instead of (1, 1, 64)"),
        ({"cls_token": torch.zeros(1, 1, 64).to_sparse()}, "as torch.sparse_coo instead of"),
        ({"cls_token": torch.full((1, 1, 64), 1e300, dtype=torch.float64)}, "too large for float32"),
        ({"cls_token": torch.full((1, 1, 64), float("nan"))}, "not finite, or too large for float32, in 1"),
        ({"cls_token": "text"}, "a str instead of (1, 1, 64)"),
    ],
    ids=range(14),
)
def test_official_weights(tmp_path, state, changes, reason, zipped):
    path = tmp_path / "dino.pth"
    torch.save(state | changes, path, _use_new_zipfile_serialization=zipped)
    assert reason in refused(path)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors(tmp_path, state):
    odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"):
        torch.save(state | {name: odd}, tmp_path / "dino.pth")
        assert "nested instead" in refused(tmp_path / "dino.pth") or name != "cls_token"


@pytest.mark.parametrize("num_heads", [0, True, 10**30, 2.5, "6", torch.ones(2)])
def test_a_number_of_heads_that_is_none(tmp_path, state, num_heads):
    torch.save({"teacher": state, "num_heads": num_heads}, tmp_path / "dino.pth")
    message = refused(tmp_path / "dino.pth")
    assert ("num_heads is" in message and "expected a whole number" in message) or num_heads == "6"


@pytest.mark.parametrize("told", [torch.ones(3), torch.tensor(2), "2", None])
def test_a_format_that_is_none(tmp_path, state, told):
    torch.save({"format": told, **state}, tmp_path / "run.pt")
    assert "not a checkpoint of dino-sparo with format 2" in refused(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": ARCH | {"num_heads": 0}}, "model.arch.num_heads is 0; expected a whole number"),
        ({"arch": ARCH | {"depth": 10**8}}, "model.arch.depth is 100000000"),
        ({"arch": ARCH | {"width": 65_536, "depth": 9}}, "does not fit"),
        ({"arch": "vit_huge"}, "model.arch is vit_huge; expected one of vit_tiny"),
        ({"patch_size": 0}, "model.patch_size is 0"),
        ({"image_size": 16 * 10**6}, "image_size is 16000000"),
        ({"image_size": 10**400}, "image_size is 1000"),
        ({"readout": "sparo", **SPARO}, "model.readout.num_slots is 100000000"),
        ({"readout": "pooler", "num_slots": 4, "slot_dim": 4, "num_heads": 0}, "readout.num_heads is 0"),
        ({"readout": "bottleneck", "bottleneck_dim": 10**5, "encoding_dim": 1}, "bottleneck_dim is 100000"),
        ({"readout": ["cls"]}, "model.readout.name is ['cls']"),
        ({"drop": 1}, "'model.readout.drop' is unknown"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("untrained", [False, True])
def test_exported_folders(tmp_path, state, changes, reason, untrained):
    exported(tmp_path, state, {"format": 2, "weights": "teacher", "seed": 0, "encoder": ENCODER | changes})
    assert reason in refused(tmp_path / "model.safetensors", untrained=untrained)


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ({"seed": 10**30}, "seed is 1000"),
        ({"seed": True}, "seed is True"),
        ({"weights": "\x1b[31m"}, "weights is"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"dino_sparo": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"dino_sparo": "' + "9" * 2_000_000 + '"}', "more than 1,000,000 bytes"),
    ],
    ids=range(6),
)
def test_descriptions_of_exported_folders(tmp_path, state, ours, reason):
    if not isinstance(ours, str):
        ours = {"format": 2, "weights": "teacher", "seed": 0, "encoder": ENCODER} | ours
    exported(tmp_path, state, ours)
    with pytest.raises(UserError, match=reason) as caught:
        load_encoder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def exported(folder, state, ours):
    save_file(state, folder / "model.safetensors")
    text = ours if isinstance(ours, str) else json.dumps({"dino_sparo": ours})
    (folder / "config.json").write_text(text)


def archive(path, state, change, compression=zipfile.ZIP_STORED):
    """A file of `torch.save` whose parts are changed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name.rpartition("/")[2], old.read(name)))


def pickled(*inserted):
    """A change that puts these instructions before a pickle's own."""
    return lambda name, data: data[:2] + b"".join(inserted) + data[2:] if name == "data.pkl" else data


LONG = b"X" + (50_000_000).to_bytes(4, "little") + b"a" * 50_000_000 + b"0"  # a text that is dropped
MANY = b"(" + b"}" * (MOST_PICKLE + 1) + b"l0"  # dictionaries
OF_SIZE = b"\x8a\x08" + (2 * 10**9).to_bytes(8, "little") + b"\x85R0"  # a call with a number


@pytest.mark.parametrize(
    ("change", "compression", "reason"),
    [
        (pickled(LONG), zipfile.ZIP_DEFLATED, r"unpack to \d+, but torch.save does not compress"),
        (pickled(MANY), zipfile.ZIP_BZIP2, r"unpack to \d+"),
        (lambda name, data: bytes(50_000_000) if name == "0" else data, zipfile.ZIP_DEFLATED, r"unpack to"),
        (pickled(LONG), zipfile.ZIP_STORED, f"more than {MOST_PICKLE} bytes"),
        (pickled(b"cbuiltins\nbytearray\n", OF_SIZE), zipfile.ZIP_STORED, "it contains a bytearray"),
        (
            lambda name, data: data.replace(b"K@t", OF_SIZE[:10] + b"t"),
            zipfile.ZIP_STORED,
            "not a readable weights",
        ),
    ],
    ids=["text", "many", "numbers", "long", "bytearray", "claim"],
)
def test_archives_that_would_fill_the_memory(tmp_path, state, change, compression, reason):
    archive(tmp_path / "bomb.pth", state, change, compression)
    for read in (load_encoder, read_plain):
        with pytest.raises(UserError, match=rf"bomb.pth is .*{reason}"):
            read(tmp_path / "bomb.pth")


@pytest.mark.parametrize("inserted", [LONG, pytest.param(MANY, marks=pytest.mark.long)], ids=["text", "many"])
def test_the_older_format_that_would_fill_the_memory(tmp_path, state, inserted):
    path = tmp_path / "bomb.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    place = content.index(b"\x80\x02", content.index(b"type_sizes")) + 2
    path.write_bytes(content[:place] + inserted + content[place:])
    assert f"more than {MOST_PICKLE} bytes" in refused(path)


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors", "checkpoints/step_1.pt"])
@pytest.mark.parametrize("how", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name, how):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path) if how == "pipe" else path.symlink_to("/dev/zero")
    refused(tmp_path if path.parent != tmp_path else path)


def test_a_head_that_is_not_finite_starts_no_run(tmp_path, run_dir):
    path = next((run_dir / "checkpoints").glob("*.pt"))
    content = torch.load(path, weights_only=True)
    for name, reason in (("head.mlp.0.bias", "not finite"), ("head.mlp.0.weight", "but contains")):
        changed = dict(content["teacher"])
        value = changed[name]
        changed[name] = value / 0 if value.ndim == 1 else of_shape(*value.shape)
        torch.save(content | {"teacher": changed, "student": changed}, tmp_path / "start.pt")
        recipe = tiny_options(tmp_path, tmp_path)
        built, encoder = build_state(recipe), recipe.encoder_arguments()
        with pytest.raises(UserError, match=rf"start\.pt.*{reason}"):
            initialize_networks(
                *(built.student, built.teacher, read_networks(str(tmp_path / "start.pt"), encoder), encoder),
                norm_last_layer=False,
                frozen=False,
            )


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (of_shape(10**5, 10**5), "bytes of weights, but contains"),
        (torch.full((3, 128), float("inf")), "not finite"),
        (torch.ones(3, 128, dtype=torch.complex64), "does not hold a linear classifier"),
        (torch.ones(3, 128, device="meta"), "does not hold a linear classifier"),
        (torch.ones(3, 128).to_sparse(), "does not hold a linear classifier"),
    ],
    ids=range(5),
)
def test_classifiers_of_the_official_code(tmp_path, weight, reason):
    path = tmp_path / "linear.pth"
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": torch.ones(3)}}, path)
    with pytest.raises(UserError, match=rf"linear\.pth.*{reason}"):
        load_official(path, build_encoder(**ENCODER), classes=("a", "b", "c"), encoder_hash="")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, '{"format": 1}', "\x1b"])
def test_saved_classifiers(tmp_path, text):
    path = tmp_path / "probe.safetensors"
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, path, {"dino_sparo_linear": text})
    with pytest.raises(UserError, match=r"probe\.safetensors.* is not a classifier"):
        load_classifier(path)


def test_what_a_recipe_describes_is_what_a_file_does():
    for readout in ({"readout": "cls"}, {"readout": "sparo"} | SPARO | {"num_slots": 4}):
        assert checked_encoder(ENCODER | readout) == ENCODER | readout
