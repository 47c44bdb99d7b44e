"""Files of other people: plain values are read, anything else is refused by name and never run."""

import argparse
import os
import pickle

import pytest
import torch

from dino_sparo.errors import UserError
from dino_sparo.runs.plain_file import read_plain

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Code:
    """Makes a folder when it is unpickled the usual way."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


class Settings:
    """A harmless class of ours, but a class."""


@both_formats
def test_plain_values_are_read(tmp_path, zipped):
    content = {"weights": {"x": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "names": ["a", (1, 2.5, None)]}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    read = read_plain(tmp_path / "file.pth")
    assert torch.equal(read["weights"].pop("x"), content["weights"].pop("x"))
    assert read == content


@both_formats
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("allow_namespace", [False, True])
def test_code_is_refused_and_not_run(tmp_path, zipped, protocol, allow_namespace):
    content = {"weights": torch.zeros(2), "text": "unrelated", "x": Code(tmp_path / "hacked")}
    path = tmp_path / "evil.pth"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    named = (
        r"is refused: it would load posix\.mkdir, which"  # torch names what it does not load up to protocol 3
    )
    unnamed = "contains more than tensors and plain values"
    with pytest.raises(UserError, match=rf"evil.pth .*{named if protocol == 2 else unnamed}"):
        read_plain(path, allow_namespace=allow_namespace)
    assert not (tmp_path / "hacked").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "hacked").exists()  # so the test would have seen it


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_are_refused_too(tmp_path, protocol):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([Code(tmp_path / "hacked"), Code(tmp_path / "again")], protocol=protocol))
    with pytest.raises(UserError, match=r"evil.pkl is (refused|not a readable weights file)"):
        read_plain(path)
    assert not (tmp_path / "hacked").exists()


@both_formats
def test_the_namespace_is_the_one_class_that_may_be_allowed(tmp_path, zipped):
    path = tmp_path / "full.pth"
    args = argparse.Namespace(arch="vit_small", lr=0.1)
    torch.save({"args": args}, path, _use_new_zipfile_serialization=zipped)
    assert read_plain(path, allow_namespace=True)["args"].arch == "vit_small"
    with pytest.raises(UserError, match=r"would load argparse\.Namespace"):
        read_plain(path)
    args.a = Settings()
    torch.save({"args": args}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would load tests\.test_plain_file\.Settings"):
        read_plain(path, allow_namespace=True)


@both_formats
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, zipped, share):
    torch.save({"x": torch.randn(1000)}, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "file.pth").read_bytes()
    assert_no_weights(tmp_path / "file.pth", content[: int(share * len(content))])


def test_other_files(tmp_path):
    for content in (b"<html>Not found</html>", bytes(range(256)) * 40):
        assert_no_weights(tmp_path / "page.pth", content)


def assert_no_weights(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is not a readable weights file") as caught:
        read_plain(path)
    assert "\n" not in str(caught.value)
