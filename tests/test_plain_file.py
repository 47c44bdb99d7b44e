"""Files of other people: plain values are read, anything else is refused by name and never run."""

import argparse
import os
import pickle

import pytest
import torch

from dino_sparo.errors import UserError
from dino_sparo.runs.plain_file import read_plain

FORMATS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "zip of protocol 4": {"pickle_protocol": 4},
    "legacy of protocol 4": {"pickle_protocol": 4, "_use_new_zipfile_serialization": False},
}


class Code:
    """Makes a folder when it is unpickled the usual way."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


class Settings:
    """A harmless class of ours, but a class."""


@pytest.mark.parametrize("options", [FORMATS["zip"], FORMATS["legacy"]], ids=["zip", "legacy"])
def test_plain_values_are_read(tmp_path, options):
    content = {"weights": {"x": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "names": ["a", (1, 2.5, None)]}
    torch.save(content, tmp_path / "file.pth", **options)
    read = read_plain(tmp_path / "file.pth")
    assert torch.equal(read["weights"].pop("x"), content["weights"].pop("x"))
    assert read == content


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("allow_namespace", [False, True])
def test_code_is_named_and_not_run(tmp_path, options, allow_namespace):
    content = {"weights": torch.zeros(2), "text": "unrelated", "x": Code(tmp_path / "hacked")}
    torch.save(content, tmp_path / "evil.pth", **options)
    with pytest.raises(UserError, match=r"evil.pth is refused: it would load posix\.mkdir, which"):
        read_plain(tmp_path / "evil.pth", allow_namespace=allow_namespace)
    assert not (tmp_path / "hacked").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "hacked").exists()  # so the test would have seen it


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_are_refused_by_name_too(tmp_path, protocol):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([Code(tmp_path / "hacked"), Code(tmp_path / "again")], protocol=protocol))
    with pytest.raises(UserError, match=r"would load posix\.mkdir, which"):
        read_plain(path)
    assert not (tmp_path / "hacked").exists()


def test_a_name_from_the_memo_of_a_newer_pickle(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(["posix", "mkdir", Code(tmp_path / "hacked")], protocol=4))
    with pytest.raises(UserError, match=r"would load posix\.mkdir, which"):
        read_plain(path)


@pytest.mark.parametrize("options", [FORMATS["zip"], FORMATS["legacy"]], ids=["zip", "legacy"])
def test_the_namespace_is_the_one_class_that_may_be_allowed(tmp_path, options):
    path = tmp_path / "full.pth"
    torch.save({"args": argparse.Namespace(arch="vit_small", lr=0.1)}, path, **options)
    assert read_plain(path, allow_namespace=True)["args"].arch == "vit_small"
    with pytest.raises(UserError, match=r"would load argparse\.Namespace"):
        read_plain(path)
    torch.save({"args": argparse.Namespace(a=Settings())}, path, **options)
    with pytest.raises(UserError, match=r"would load tests\.test_plain_file\.Settings"):
        read_plain(path, allow_namespace=True)


@pytest.mark.parametrize("options", [FORMATS["zip"], FORMATS["legacy"]], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, options, share):
    path = tmp_path / "file.pth"
    torch.save({"x": torch.randn(1000)}, path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"file.pth is no readable weights file") as caught:
        read_plain(path)
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path):
    path = tmp_path / "page.pth"
    for content in (b"<html>Not found</html>", bytes(range(256)) * 40):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"page.pth is no readable weights file") as caught:
            read_plain(path)
        assert "\n" not in str(caught.value)
