"""`dino-sparo knn`: the same results for any number of processes, saved in the run folder."""

import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.data.sources import open_labeled
from dino_sparo.evaluation.knn import evaluate_knn
from dino_sparo.evaluation.results import read_results
from dino_sparo.interop.load import load_encoder
from tests.tiny import tiny_arguments, write_pictures

KS = [1, 3, 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Pictures of three classes, and a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "data", 101, classes=3)
    options = tiny_arguments(folder / "data", folder / "run", optim__epochs=1, optim__global_batch_size=40)
    assert main(["pretrain", *options]) == 0
    return folder / "data", folder / "run"


def arguments(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    places = [str(run), "--data.path", str(data), "--out", str(out), "--cache", str(out / "features")]
    return ["knn", *places, "--k", str(KS), "--num-workers=0", "--batch-size", "8", *more]


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> tuple[Path, str]:
    """Results of one process, and what it printed."""
    data, run = trained
    out = tmp_path_factory.mktemp("alone")
    few = out / "few"  # two of the classes and a foreign one
    for name in ("class0", "class2"):
        shutil.copytree(data / "train" / name, few / name)
    shutil.copytree(data / "train" / "class1", few / "class9")
    with redirect_stdout(StringIO()) as shown:
        assert main(arguments(run, data, out, "--test", f"again={data / 'train'}", f"few={few}")) == 0
    return out, shown.getvalue()


def test_results_are_those_of_the_votes(trained, alone):
    data, run = trained
    train, val = open_labeled(str(data))
    encoder = load_encoder(run)
    expected = evaluate_knn(encoder, train, val, k=KS)
    results = {result.name: result for result in read_results(alone[0]) if result.test_set == "val"}
    assert list(results) == ["1-NN", "3-NN", "20-NN"]
    for k in KS:
        result = results[f"{k}-NN"]
        assert result.num_images == len(val) == 20 and result.headline == (k == 20)
        assert (result.top1, result.top5) == (expected[k].top1, expected[k].top5)
        assert result.top1 == pytest.approx(100 * result.correct.mean())
        labels = val.labels
        of_class = {val.classes[n]: 100 * result.correct[labels == n].mean() for n in range(3)}
        assert result.details["top1_by_class"] == pytest.approx(of_class)


def test_a_second_test_set(trained, alone):
    out, shown = alone
    results = {(r.test_set, r.name): r for r in read_results(out)}
    again = results["again", "1-NN"]
    assert again.num_images == 101 and again.top1 > 75  # 81 of them are the gallery's own
    few = results["few", "1-NN"]
    assert few.num_images == 67 and few.num_classes == 2 and again.num_classes == 3
    for k, better in ((1, np.greater_equal), (20, np.greater)):  # class1 is no possible answer
        every = results["again", f"{k}-NN"].correct
        same_images = np.concatenate([every[:34], every[68:]])
        right = results["few", f"{k}-NN"].correct
        assert (right >= same_images).all() and better(right.sum(), same_images.sum())
    assert "\nfew: 1 of the 3 train classes has no image here (class1); class folders left out" in shown
    assert shown.count("<- headline") == 3 and "101 test images" in shown


@pytest.mark.long
def test_processes_give_the_same(trained, alone, tmp_path):
    data, run = trained
    command = [sys.executable, "-m", "dino_sparo", *arguments(run, data, tmp_path), "--nproc=2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours, theirs = ((*read_results(folder),)[:3] for folder in (tmp_path, alone[0]))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.name, one.top1, one.top5) == (other.name, other.top1, other.top5)
        assert np.array_equal(one.correct, other.correct)
    rows = [next((folder / "features").glob("*/encoding.float16")).name for folder in (tmp_path, alone[0])]
    assert rows[0] == rows[1]
    assert printed.count("\n20-NN ") == printed.count("hardest classes") == 1  # one process speaks


def test_faiss_searches_if_it_is_asked_to_and_finds_the_same(trained, tmp_path, monkeypatch):
    data, run = trained
    searches, search = [], faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda *args, **more: searches.append(args) or search(*args, **more))
    found = []
    for number, more in enumerate(([], ["--search", "faiss"])):
        out = tmp_path / str(number)
        assert main(arguments(run, data, out, *more)) == 0
        assert bool(searches) == bool(more)
        found.append([(r.name, r.top1, r.top5, r.correct.tolist()) for r in read_results(out)])
    assert found[0] == found[1]


def test_other_features_and_weights_stand_beside(trained, tmp_path, capsys):
    data, run = trained
    common = ["knn", str(run), "--data.path", str(data), "--out", str(tmp_path), "--k=20", "--num-workers=0"]
    for more in ([], ["--feature=probe"], ["--untrained"], ["--which", "student"], []):
        assert main([*common, *more]) == 0
    assert [(r.name, r.weights) for r in read_results(tmp_path)] == [
        *(("20-NN probe", "teacher"), ("20-NN", "untrained"), ("20-NN", "student"), ("20-NN", "teacher"))
    ]


def test_damaged_weights_are_told(trained, tmp_path, capsys):
    data, run = trained
    path = max((run / "checkpoints").glob("*.pt"))
    state = torch.load(path)
    for value in state["teacher"].values():
        value.fill_(0)
    torch.save(state, tmp_path / "zero.pt")
    zero = str(tmp_path / "zero.pt")
    assert main(["knn", zero, "--data.path", str(data), "--k=1", "--num-workers=0"]) == 2
    said = capsys.readouterr().err
    assert f"feature 'encoding' of {open_labeled(str(data))[1].name(0)} is zero: the weights" in said
    assert not (tmp_path / "zero_evaluation" / "results.json").exists()
