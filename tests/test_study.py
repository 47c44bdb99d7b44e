"""`dino-sparo study`: training, evaluation, and the page, end to end and in parts."""

import fcntl
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import StudyOptions, study
from dino_sparo.data.splits import Choice
from dino_sparo.errors import UserError
from dino_sparo.evaluation.compare import EvaluatedRun
from dino_sparo.evaluation.results import Result, read_results
from dino_sparo.files import LOCK_OF_FILES
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.study import program, report, training
from dino_sparo.study.variants import Variant
from tests.test_results import result as made_result
from tests.tiny import parse_options, tiny_arguments, tiny_options, write_pictures

WITHOUT_SLOTS = {f"model.readout.{key}": None for key in ("num_slots", "slot_dim", "key_dim", "group_size")}
VARIANTS = {
    "cls": WITHOUT_SLOTS | {"model.readout.name": "cls"},
    "sparo": {},
    "gap": WITHOUT_SLOTS | {"model.readout.name": "gap"},
}
TWO, FEW = '--only=["cls", "sparo"]', "--train_fractions=[1.0, 0.2]"


def write_labeled(folder: Path, seed: int) -> None:
    """Two classes that an encoder can often distinguish: darker and lighter pictures."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 40), ("val", 10)):
        for number in range(count):
            path = folder / split / ("dark", "light")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 40 * (number % 2) + rng.integers(0, 80)
            pixels = rng.integers(low, low + 120, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def arguments(folder: Path, *more: str, seeds: str = "0,1", **changes) -> list[str]:
    (folder / "variants.yaml").write_text(yaml.safe_dump(VARIANTS, sort_keys=False))
    given = {"optim__epochs": 2, "optim__warmup_epochs": 0, "monitor__knn_every_epochs": 1} | changes
    return [
        *tiny_arguments(folder / "data", folder / "study", **given),
        f"--variants={folder / 'variants.yaml'}",
        f'--vary=["seed={seeds}"]',
        *more,
    ]


def run_study(folder: Path, *more: str, **changes) -> int:
    return study(parse_options(StudyOptions, arguments(folder, *more, **changes), usage=""))


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of two read-outs and two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("study")
    write_labeled(folder / "data", 0)
    write_labeled(folder / "other", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "EPOCHS", 3)
        patch.setattr(sys, "argv", ["dino-sparo", "study", "of", "a b"])
        assert main(["study", *arguments(folder, TWO, FEW, f'--transfer=["other={folder / "other"}"]')]) == 0
    return folder


@pytest.mark.long
def test_the_page_has_every_seed_and_each_mean_is_theirs(studied):
    content = json.loads((studied / "study" / "study.json").read_text())
    assert list(content) == ["cls", "sparo"]  # gap was left out
    page = re.sub(" +", " ", (studied / "study" / "study.md").read_text())
    for row, runs in content.items():
        assert [run["seed"] for run in runs] == [0, 1]
        of_knn = []
        for run in runs:
            assert [(r["data"], r["protocol"], r["train_fraction"]) for r in run["results"]] == [
                ("val", "knn", 1.0),
                ("val", "linear-cached", 1.0),
                ("val", "linear-cached", 0.2),
                ("other", "knn", 1.0),
                ("other", "linear-cached", 1.0),
                ("other", "linear-cached", 0.2),
            ]
            stored = read_results(Path(run["run"]) / "study" / "val")
            (knn,) = [r for r in stored if r.protocol == "knn"]
            assert knn.top1 == run["results"][0]["top1"]
            of_knn.append(knn.top1)
            cells = " | ".join(f"{run['results'][i]['top1']:.2f}" for i in (0, 3))
            assert f"| {row} | {run['seed']} | {cells}" in page
        assert f"{statistics.fmean(of_knn):.2f} ± {statistics.stdev(of_knn):.2f} (2 seeds)" in page
    assert "made by `dino-sparo study of 'a b'`.\n\n- commit" in page  # the runs too
    assert (
        "difference to cls" in page
        and "95 % interval by a paired bootstrap" in page
        and "20-NN, other" in page
    )
    assert (studied / "study" / "curves.png").stat().st_size > 5000


@pytest.mark.long
def test_curves_and_speed_are_those_of_the_log(studied):
    content = json.loads((studied / "study" / "study.json").read_text())
    for run in (run for runs in content.values() for run in runs):
        entries = read_metrics(Path(run["run"]))
        assert list(run["curve"]) == ["0.0", "1.0", "2.0"]
        assert run["curve"]["2.0"] == entries[-1][training.KNN]
        logged = [entry for entry in entries if "images_per_second" in entry]
        assert len(logged) == logged[-1]["step"] == 20  # one an entry, of 4 images
        assert run["seconds"] == pytest.approx(sum(4 / entry["images_per_second"] for entry in logged))
        assert run["images_per_second"] == pytest.approx(80 / run["seconds"])


@pytest.mark.long
def test_probes_are_chosen_on_train_images_that_they_have_not_seen(studied):
    folder = studied / "study" / "sparo_seed=0" / "study" / "val"
    held_out = [r for r in read_results(folder / training.HELD_OUT) if r.train_fraction == 1]
    assert {r.test_set for r in held_out} == {"held-out"}
    assert {(r.details["num_train"], r.num_images) for r in held_out} == {(32, 8)}
    reported = [r for r in read_results(folder) if r.protocol == "linear-cached" and r.train_fraction == 1]
    assert {(r.details["num_train"], r.num_images) for r in reported} == {(40, 10)}
    few = [r for r in read_results(folder) if r.train_fraction == 0.2]
    assert {r.details["num_train"] for r in few} == {8}
    assert [r.name for r in held_out] == [r.name for r in reported] and len(reported) == 16


@pytest.mark.long
def test_again_trains_nothing_and_says_the_same(studied, capsys, caplog, monkeypatch):
    monkeypatch.setattr(training, "EPOCHS", 3)
    monkeypatch.setattr(sys, "argv", ["dino-sparo", "study", "again"])
    before = (studied / "study" / "study.json").read_text()
    starts = [path.read_text() for path in sorted((studied / "study").glob("*/starts.jsonl"))]
    assert run_study(studied, TWO, FEW, f'--transfer=["other={studied / "other"}"]') == 0
    assert (studied / "study" / "study.json").read_text() == before
    assert [path.read_text() for path in sorted((studied / "study").glob("*/starts.jsonl"))] == starts
    assert "difference to cls" in capsys.readouterr().out
    numbers = [line.partition(":")[0] for line in caplog.messages if line.startswith("evaluating")]
    assert numbers == [f"evaluating {number} of 4" for number in (1, 2, 3, 4)]  # gap was left out
    page = (studied / "study" / "study.md").read_text()
    assert "`dino-sparo study again`.\n\nOther commands that made its runs:\n\n- `dino-sparo study of" in page


@pytest.mark.long
def test_the_official_probe_is_the_one_that_linear_trains(studied, tmp_path):
    shutil.copytree(studied, tmp_path / "copy")
    assert run_study(tmp_path / "copy", TWO, "--official_probe=true", "--train_fractions=[1.0]") == 0
    run, out = tmp_path / "copy" / "study" / "sparo_seed=1", tmp_path / "linear"
    data = f"--data.path={tmp_path / 'copy' / 'data'}"
    assert main(["linear", str(run), data, "--num_workers=0", f"--out={out}"]) == 0
    (expected,) = read_results(out)
    page = (tmp_path / "copy" / "study" / "study.md").read_text()
    assert "probe is that of the official protocol" in page and "cached" not in page
    row = json.loads((tmp_path / "copy" / "study" / "study.json").read_text())["sparo"][1]["results"][1]
    assert (row["protocol"], row["setting"], row["top1"]) == ("linear", expected.name, expected.top1)
    of_study = [one for one in read_results(run / "study" / "val") if one.protocol == "linear"]
    assert [one.correct.tolist() for one in of_study] == [expected.correct.tolist()]


def test_variants_trained_on_other_images_are_evaluated_on_those_of_the_study(tmp_path, monkeypatch):
    class SeenError(Exception):
        pass

    def opened(_path: str, choice: Choice) -> None:
        raise SeenError(choice)

    monkeypatch.setattr(training, "open_train_and_tests", opened)
    base = tiny_options(tmp_path, tmp_path, data__train="all", data__val="val")
    own = tiny_options(tmp_path, tmp_path, data__train="some", data__val="other", data__value_range=[0, 4095])
    variant = SimpleNamespace(base=base, recipe=own, run_dir=tmp_path)
    with pytest.raises(SeenError) as caught:
        training.measure(variant, str(tmp_path), "val", fractions=[])
    assert caught.value.args[0] == Choice("all", "val", value_range=(0, 4095))


def test_a_name_is_no_formula(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    curves = {tmp_path: SimpleNamespace(curve={0.0: 30.0, 1.0: 40.0})}
    pictures = {
        report.curves_picture([SimpleNamespace(label=label, runs=[run])], curves)
        for label in (r"$\frac$", "$x$", "x")
    }
    assert len(pictures) == 3


def result(name: str, top1: float) -> Result:
    probe = {"protocol": "linear-cached", "name": name, "headline": False, "top1": top1}
    return made_result([True], **probe)


def test_the_chosen_probe_is_best_in_the_mean_on_held_out_images_whatever_the_test_images_say():
    first = training.Probed([result("a", 50), result("b", 60)], [result("a", 99), result("b", 10)])
    second = training.Probed([result("a", 55), result("b", 50)], [result("a", 98), result("b", 11)])
    chosen = training.choose([first, second])
    assert [(one.name, one.top1, one.headline) for one in chosen] == [("b", 10, True), ("b", 11, True)]
    third = replace(second, held_out=[result("a", 70), result("b", 50)])
    assert [one.name for one in training.choose([first, third])] == ["a", "a"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--control=mean"], "control 'mean' is not a row of the table; expected one of cls, sparo, gap"),
        (["--train_fractions=[1.5]"], "train_fractions has 1.5; expected numbers above 0 and at most 1"),
        (["--train_fractions=[0.2, 0.20000001]"], "give each fraction once"),
        (['--transfer=["..=x"]'], "has no name or no folder"),
        (['--transfer=["val=x"]'], "'val' is the name of the val images of data.path"),
        (['--transfer=["a=x", "a=y"]'], "the name 'a' is given twice"),
        (['--transfer=["a=/no/such"]'], "transfer '/no/such' does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path, more, message):
    write_pictures(tmp_path / "data", 24, classes=2)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run_study(tmp_path, *more)
    assert not list((tmp_path / "study").glob("*/checkpoints"))


@pytest.mark.long
def test_a_run_without_its_last_checkpoint_is_not_complete(studied):
    run_dir = studied / "study" / "cls_seed=0"
    assert training.final_knn(run_dir, 2) is not None
    last = run_dir / "checkpoints" / "step_000000020.pt"
    last.rename(run_dir / "aside")
    try:
        assert training.final_knn(run_dir, 2) is None
    finally:
        (run_dir / "aside").rename(last)


@pytest.mark.long
def test_other_images_and_another_recipe_are_refused_before_anything_is_trained(studied, capsys):
    others, later = f'--transfer=["other={studied / "data"}"]', f'--transfer=["late={studied / "other"}"]'
    for given, message in (
        (arguments(studied, others), "holds other images than 'other' when the study in"),
        (arguments(studied, others, "--dry-run"), "holds other images than 'other' when"),
        (arguments(studied, later, optim__epochs=3), "optim.epochs was 2, is now 3"),
    ):
        assert main(["study", *given]) == 2
        assert message in capsys.readouterr().err
    assert not (studied / "study" / "gap_seed=0").exists()
    assert list(json.loads((studied / "study" / program.IMAGES_FILE).read_text())) == ["val", "other"]


@contextmanager
def as_before(folder: Path) -> Iterator[None]:
    """Restore the files directly in the folder, since other tests read them."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.long
def test_a_run_is_evaluated_by_one_process_at_a_time(studied, monkeypatch):
    monkeypatch.setattr(training, "EPOCHS", 3)
    original, refused = program.measure, []

    def measure(variant, *args, **options):
        descriptor = os.open(variant.run_dir / LOCK_OF_FILES, os.O_RDWR)  # as another process would
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(variant.folder)
        finally:
            os.close(descriptor)
        return original(variant, *args, **options)

    monkeypatch.setattr(program, "measure", measure)
    with as_before(studied / "study"):
        assert run_study(studied, TWO, "--train_fractions=[1.0]") == 0
    assert refused == ["cls_seed=0", "cls_seed=1", "sparo_seed=0", "sparo_seed=1"]


@pytest.mark.long
def test_a_failed_run_is_on_the_page_with_its_reason(studied, monkeypatch, capsys):
    monkeypatch.setattr(training, "EPOCHS", 3)
    original = program.measure

    def breaking(variant, *args, **options):
        if variant.folder == "sparo_seed=1":
            raise UserError("this picture is no picture")
        return original(variant, *args, **options)

    monkeypatch.setattr(program, "measure", breaking)
    with as_before(studied / "study"):
        assert run_study(studied, TWO, "--train_fractions=[1.0]") == 1
        page = (studied / "study" / "study.md").read_text()
        assert "- sparo_seed=1 failed: this picture is no picture" in page
        assert "- not complete: gap_seed=0, gap_seed=1\n" in page
        assert run_study(studied, TWO, "--train_fractions=[1.0]", seeds="0") == 0
        page = (studied / "study" / "study.md").read_text()
        assert "- not in this command: cls_seed=1, sparo_seed=1\n" in page


def test_a_study_in_a_place_that_cannot_be_is_answered_in_a_sentence(tmp_path, capsys):
    write_labeled(tmp_path / "data", 0)
    (tmp_path / "study").write_text("a file")
    assert main(["study", *arguments(tmp_path)]) == 2
    assert f"error: {tmp_path / 'study'} cannot be read or written (File exists)" in capsys.readouterr().err
    (tmp_path / "study").unlink()
    (tmp_path / "study").mkdir()
    for damaged in ("{", "[]"):
        (tmp_path / "study" / program.IMAGES_FILE).write_text(damaged)
        with pytest.raises(UserError, match=r"images\.json cannot be read .* restore it"):
            run_study(tmp_path)


def test_data_sets_of_two_commands_at_once_are_both_remembered(tmp_path):
    """Another process holds the lock of the folder and has not written yet."""
    run_dir = tmp_path / "study"
    run_dir.mkdir()
    with ThreadPoolExecutor() as pool:
        with program.alone_in(run_dir):
            ours = pool.submit(program.remember_images, run_dir, {"val": "a folder"}, {"val": "c d"})
            with pytest.raises(TimeoutError):
                ours.result(timeout=1)
            (run_dir / program.IMAGES_FILE).write_text('{"theirs": "a b"}')
        ours.result(timeout=30)
    assert list(json.loads((run_dir / program.IMAGES_FILE).read_text())) == ["theirs", "val"]


def test_what_another_process_has_trained_has_not_failed(tmp_path, monkeypatch):
    """A run that another process trained meanwhile counts as complete."""
    write_labeled(tmp_path / "data", 0)
    busy = {"cls_seed=0": "in use", "cls_seed=1": "in use"}
    evaluated: list[str] = []

    def stop(variant: Variant, *_, **__) -> None:
        evaluated.append(variant.folder)
        raise UserError("seen")

    monkeypatch.setattr(training, "train", lambda *_, **__: dict(busy))
    monkeypatch.setattr(training, "final_knn", lambda place, _: 50.0 if place.name == "cls_seed=0" else None)
    monkeypatch.setattr(program, "measure", stop)
    monkeypatch.setattr(program, "alone_in", lambda _: nullcontext())
    assert run_study(tmp_path) == 1
    assert evaluated == ["cls_seed=0"]


def test_seconds_of_a_resumed_run_are_those_of_its_steps(tmp_path):
    """The run stops after 3 of 6 steps with 2 in the log, so the entry after resuming covers one step."""
    entries = [
        {"step": 2, "epoch": 1.0, "seconds": 2.0, "images_per_second": 4.0},
        {"step": 4, "epoch": 2.0, "seconds": 1.0, "images_per_second": 4.0},
        {"step": 6, "epoch": 3.0, "seconds": 2.0, "images_per_second": 4.0, training.KNN: 50.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = report.training_of(EvaluatedRun(tmp_path, {"optim.global_batch_size": 4}, 0, {}))
    assert (found.curve, found.seconds, found.images_per_second) == ({3.0: 50.0}, 6.0, 4.0)
