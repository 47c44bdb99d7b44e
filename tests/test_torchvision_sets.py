"""Sets by name: torchvision's own download and unpacking, from a server of our own, of tiny sets."""

import gzip
import hashlib
import json
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, STL10

from dino_sparo.__main__ import main
from dino_sparo.data.scan import scan_images
from dino_sparo.data.sources import is_set, open_images, open_labeled, open_val
from dino_sparo.errors import UserError
from dino_sparo.shard import shard
from tests.imagenet_layouts import tar_of
from tests.running import at_once
from tests.tiny import tiny_arguments

SIZES = {"train": 5, "unlabeled": 4, "test": 3}
CIFAR_CLASSES = ["aeroplane", "car"]


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache" / "torchvision"


@pytest.fixture
def server(tmp_path, monkeypatch, cache):
    """Serves both archives; `asked` are the paths of all requests."""
    (tmp_path / "served").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for kind, files in ((CIFAR10, cifar10_files()), (STL10, stl10_files())):
        archive = tmp_path / "served" / kind.filename
        archive.write_bytes(gzip.compress(tar_of({f"{kind.base_folder}/{n}": d for n, d in files.items()})))
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{kind.filename}")
        monkeypatch.setattr(kind, "tgz_md5", md5(archive.read_bytes()))
        for name in ("train_list", "test_list"):
            names = [file for file, _ in getattr(kind, name) if file in files]
            monkeypatch.setattr(kind, name, [[file, md5(files[file])] for file in names])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(cifar10_files()["batches.meta"])})
    yield server
    server.shutdown()
    server.server_close()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def cifar10_files() -> dict[str, bytes]:
    """Two batches of train, one of test, in the original's pickles: rows of 3 x 32 x 32."""
    rng = np.random.default_rng(0)
    files = {}
    for name, count in (("data_batch_1", 3), ("data_batch_2", 2), ("test_batch", 3)):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": [i % 2 for i in range(count)]})
    files["batches.meta"] = pickle.dumps({"label_names": CIFAR_CLASSES})
    return files


def stl10_files() -> dict[str, bytes]:
    """As in the original: images of 3 x 96 x 96, column by column; labels from 1."""
    rng = np.random.default_rng(1)
    files = {
        f"{part}_X.bin": rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()
        for part, count in SIZES.items()
    }
    files |= {f"{part}_y.bin": bytes(1 + i % 2 for i in range(SIZES[part])) for part in ("train", "test")}
    return files | {"class_names.txt": b"airplane\nbird\n"}


def pixels(source) -> np.ndarray:
    return np.stack([np.asarray(source.load(i)) for i in range(len(source))])


def test_cifar10_is_what_torchvision_reads(server, tmp_path):
    train, test = open_labeled("cifar10")
    for ours, is_train in ((train, True), (test, False)):
        theirs = CIFAR10(tmp_path / "theirs", train=is_train, download=True)
        np.testing.assert_array_equal(pixels(ours), theirs.data)
        assert ours.labels.tolist() == theirs.targets and list(ours.classes) == theirs.classes
    np.testing.assert_array_equal(pixels(open_images("cifar10")), pixels(train))
    np.testing.assert_array_equal(pixels(open_val("cifar10")), pixels(test))


def test_stl10_is_what_torchvision_reads_with_all_images_for_pretraining(server, tmp_path):
    train, test = open_labeled("stl10")
    every = open_images("stl10")
    for ours, split in ((train, "train"), (test, "test"), (every, "train+unlabeled")):
        theirs = STL10(tmp_path / "theirs", split=split, download=True)
        np.testing.assert_array_equal(pixels(ours), theirs.data.transpose(0, 2, 3, 1))
        assert ours.classes == ("airplane", "bird")
        if split != "train+unlabeled":
            assert ours.labels.tolist() == theirs.labels.tolist()
    assert every.labels is None and len(every) == 9
    assert len({source.fingerprint() for source in (train, test, every)}) == 3


def kept(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_downloaded_once_and_only_the_unpacked_files_stay(server, cache, name):
    open_images(name)
    asked = len(server.asked)
    open_images(name)
    open_labeled(name)
    assert len(server.asked) == asked > 0
    files = cifar10_files() if name == "cifar10" else stl10_files()
    (folder,) = kept(cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)


def test_two_starts_at_once_download_once(server, cache):
    at_once(open_images, "cifar10")
    assert len([path for path in server.asked if path.endswith("gz")]) == 2  # the redirects, the file


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("url", "http://127.0.0.1:9/cifar.tar.gz", "refused"),
        ("filename", "x", "not found"),
        ("tgz_md5", "0" * 32, "corrupted"),
        ("train_list", [["data_batch_1", "0" * 32]], "corrupted"),  # unpacks to other files
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    server, cache, monkeypatch, attribute, value, said
):
    with monkeypatch.context() as patch:
        patch.setattr(CIFAR10, attribute, value)
        if attribute == "filename":
            patch.setattr(CIFAR10, "url", f"{CIFAR10.url}x")
        told = rf"^cifar10 cannot be downloaded from 127\.0\.0\.1 or stored \(.*{said}.*\); run .* network"
        with pytest.raises(UserError, match=told):
            open_images("cifar10")
        assert kept(cache) == []
    (cache / f"{CIFAR10.base_folder}.part").mkdir()  # of a start that was killed
    assert len(open_images("cifar10")) == 5
    assert kept(cache) == [cache / CIFAR10.base_folder]


def test_a_cache_that_cannot_be_written_is_told(server, cache):
    cache.parent.write_text("a file")
    with pytest.raises(UserError, match=r"cifar10 cannot be downloaded .*; run .* set DINO_SPARO_CACHE to a"):
        open_images("cifar10")


@pytest.mark.parametrize(("name", "file"), [("cifar10", "data_batch_2"), ("stl10", "unlabeled_X.bin")])
def test_what_was_kept_and_is_damaged_is_told(server, cache, monkeypatch, name, file):
    open_images(name)
    kept(cache)[0].rename(tmp := cache.parent / "kept")
    monkeypatch.setenv("DINO_SPARO_CACHE", str(cache.parent / "other"))  # which no process has opened yet
    folder = cache.parent / "other" / "torchvision" / (CIFAR10 if name == "cifar10" else STL10).base_folder
    folder.parent.mkdir(parents=True)
    tmp.rename(folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"the stored {name} is damaged .* remove this folder"):
        open_images(name)


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert is_set("cifar10") and not is_set("./cifar10") and not is_set("cifar")
    (tmp_path / "cifar10").mkdir()
    assert not is_set("cifar10") and "using the folder cifar10" in caplog.text


def test_workers_get_no_pixels(server):
    source = open_images("stl10")
    assert len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(pixels(again), pixels(source))
    assert source.load(0, max_side=48).size == (48, 48)
    assert source.name(6) == "stl10 image 6"
    some = source.subset(np.array([8, 2]))
    np.testing.assert_array_equal(pixels(some), pixels(source)[[8, 2]])


def test_check_and_shard_say_that_there_are_no_files(server, tmp_path):
    assert "checksum" in scan_images(open_images("cifar10"), num_workers=0, description="x").report.skipped
    with pytest.raises(UserError, match="generated pictures, or a dataset"):
        shard("cifar10", str(tmp_path / "out"))


def test_pretrain_and_knn_take_a_name(server, tmp_path, caplog):
    run = tmp_path / "run"
    arguments = tiny_arguments(Path("stl10"), run, optim__epochs=1, monitor__knn_every_epochs=1)
    assert main(["pretrain", *arguments]) == 0
    assert f"to evaluate it: dino-sparo knn {run}" in caplog.text
    assert main(["knn", str(run), "--data.path=stl10", "--num_workers=0", "--device=cpu"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert "3" in json.dumps(results) and results
