"""results.json: which results are replaced or kept, and damaged files."""

import dataclasses
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.results import Result, read_results, results_folder, save_results


def result(correct: list[bool] | None = None, **changes: object) -> Result:
    right = np.array([True, False, True] if correct is None else correct)
    given = {
        "protocol": "knn",
        "name": "20-NN",
        "headline": True,
        "test_set": "val",
        "weights": "teacher",
        "top1": 100 * float(right.mean()),
        "top5": 100.0,
        "num_images": len(right),
        "num_classes": 7,
        "details": {"k": 20, "class_top1": [50.0, None]},
        "correct": right,
        "images": "abc",
    }
    return Result(**(given | changes))


def assert_same(found: list[Result], expected: list[Result]) -> None:
    def plain(results: list[Result]) -> list[dict[str, object]]:
        return [dataclasses.asdict(r) | {"correct": r.correct.tolist()} for r in results]

    assert plain(found) == plain(expected)
    assert all(r.correct.dtype == np.bool_ for r in found)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1001])
def test_what_is_saved_is_read_back_whole(tmp_path, count):
    right = (np.random.default_rng(count).random(count) < 0.6).tolist()
    saved = [result(right), result(right[::-1], name="ü/10-NN", headline=False, top5=1 / 3)]
    save_results(tmp_path / "new" / "run", saved)
    assert_same(read_results(tmp_path / "new" / "run"), saved)
    assert [path.name for path in (tmp_path / "new" / "run").glob("[!.]*")] == ["results.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "linear"},
        {"name": "10-NN"},
        {"test_set": "sketch"},
        {"weights": "untrained"},
        {"images": "of another folder"},
        {"details": {"train_fraction": 0.1}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_result_of_another_kind_is_kept(tmp_path, changes):
    first, other = result(top1=1.0), result(top1=2.0, **changes)
    save_results(tmp_path, [first])
    save_results(tmp_path, [other])
    assert_same(read_results(tmp_path), [first, other])
    again = result([False], top1=3.0)
    save_results(tmp_path, [again])
    assert_same(read_results(tmp_path), [other, again])  # the newest last


def test_results_of_other_weights_are_replaced_aloud(tmp_path, caplog):
    caplog.set_level("INFO", "dino_sparo")
    for encoder, told in (("a", False), ("a", False), ("b", True)):
        caplog.clear()
        save_results(tmp_path, [result(details={"encoder": encoder})])
        assert ("replaced 1 result of other weights, such as 20-NN" in caplog.text) is told


def test_the_whole_train_set_is_one_kind_however_it_is_said(tmp_path):
    for details in ({}, {"train_fraction": None}, {"train_fraction": 1}):
        save_results(tmp_path, [result(details=details)])
    assert len((tmp_path / "results.json").read_text().splitlines()) == 3  # one per result, for people too


def test_two_programs_that_finish_together_both_get_in(tmp_path, monkeypatch):
    """The first program waits between reading and writing until the second had time to do both."""
    replace, both = os.replace, threading.Event()

    def slow(old: Path, new: Path) -> None:
        both.wait(0.3)
        replace(old, new)

    monkeypatch.setattr(os, "replace", slow)
    names = ["10-NN", "20-NN", "100-NN"]
    threads = [threading.Thread(target=save_results, args=(tmp_path, [result(name=name)])) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.name for found in read_results(tmp_path)) == sorted(names)


def test_a_crash_while_writing_leaves_the_old_results(tmp_path, monkeypatch):
    save_results(tmp_path, [result()])
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
        save_results(tmp_path, [result(top1=0.0)])
    assert_same(read_results(tmp_path), [result()])
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["results.json"]


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "list": lambda _: "[]",
    "field missing": lambda text: text.replace('"top5"', '"top6"'),
    "wrong type": lambda text: text.replace('"knn"', "7"),
    "bits": lambda text: text.replace('"num_images": 3', '"num_images": 9'),
    "no base64": lambda text: text.replace('"correct": "', '"correct": "#'),
    "huge": lambda text: text.replace('"num_images": 3', f'"num_images": {10**30}'),
    "no number": lambda text: text.replace('"num_images": 3', '"num_images": "3"'),
    "not finite": lambda text: re.sub(r'"top1": [0-9.]+', '"top1": NaN', text),
    "no truth value": lambda text: text.replace('"headline": true', '"headline": "yes"'),
    "no details": lambda text: re.sub(r'"details": \{.*?\}', '"details": [["a", 1]]', text),
    "no share": lambda text: text.replace('"details": {', '"details": {"train_fraction": [1], '),
    "a number out of range": lambda text: re.sub(r'"top5": [0-9.]+', '"top5": 1e300', text),
    "no zlib": lambda text: text.replace('"correct": "', '"correct": "AAAA'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_with_a_remedy_and_new_results_survive_it(tmp_path, how, caplog):
    save_results(tmp_path, [result()])
    path = tmp_path / "results.json"
    damaged = DAMAGE[how](path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(UserError, match=r"results\.json is damaged \(.+\); restore it from a backup, or rem"):
        read_results(tmp_path)
    save_results(tmp_path, [result(name="10-NN")])
    assert_same(read_results(tmp_path), [result(name="10-NN")])
    assert (tmp_path / "results.json.damaged").read_text() == damaged
    assert "is damaged" in caplog.text and "results.json.damaged" in caplog.text


def test_other_formats_and_no_results(tmp_path):
    with pytest.raises(UserFileNotFoundError, match=r"results\.json does not exist; evaluate the run first"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 2, "results": []}')
    with pytest.raises(UserError, match="has format 2, expected 1"):
        read_results(tmp_path)


def test_where_results_go(tmp_path):
    assert results_folder(str(tmp_path)) == tmp_path
    (tmp_path / "dino.vits16.pth").touch()
    assert results_folder(str(tmp_path / "dino.vits16.pth")) == tmp_path / "dino.vits16_evaluation"


def test_results_that_are_a_folder_are_called_that(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json is not a regular file"):
        read_results(tmp_path)
