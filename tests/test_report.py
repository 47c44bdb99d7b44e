"""The page of `slots report` shows what a run folder holds, and names the command for what it lacks."""

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import hash_of
from dino_sparo.interop.load import load_encoder
from dino_sparo.slots import subject as subject_module
from dino_sparo.slots.findings import of_health, training
from dino_sparo.slots.page import GALLERY_BYTES, PICTURE_BYTES, picture_uri, write_page
from dino_sparo.slots.subject import FILES, Subject
from tests.tiny import write_pictures

pytestmark = pytest.mark.long
MACHINE = ("--device=cpu", "--num_workers=0")
WEBSITE = re.compile(
    r"""(?:src|href|url|srcset|action|data)\s*[=(]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE
)


class Page(HTMLParser):
    """Checks that elements are balanced; collects cells of tables, files of captions and text of commands."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.files, self.commands = [], [], [], [], []
        self.uncaptioned = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not any(name.startswith("on") for name, _ in attrs), "a script in an attribute"
        self.tags.append(tag)
        self.uncaptioned += tag == "figure"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, kind = self.open[-1] if self.open else (None, None)
        if tag in ("td", "th"):
            self.rows[-1][-1] += data
        if (tag, kind) == ("code", "file"):
            self.files.append(data)
            self.uncaptioned -= any(tag == "figcaption" for tag, _ in self.open)
        if (tag, kind) == ("code", "command"):
            self.commands.append(data)


@pytest.fixture(scope="module")
def reported(slot_runs, tmp_path_factory):
    """A run folder with everything that a report can show, and the report."""
    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(slot_runs["sparo"], run)
    data, control = f"--data.path={slot_runs['data']}", f"--control={slot_runs['cls']}"
    assert main(["knn", str(run), data, "--k=[10,20]", *MACHINE]) == 0
    assert main(["slots", "factors", str(run), control, "--num_images=200", *MACHINE]) == 0
    assert main(["slots", "report", str(run), data, control, *MACHINE]) == 0
    return run


@pytest.fixture
def copied(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "run")


def page_of(folder, **about):
    write_page(folder / "page.html", Subject(str(folder), **about), load_encoder(folder))
    return Page((folder / "page.html").read_text())


def commands(folder, *parts, **about):
    return [Subject(str(folder), **about).command(part) for part in parts]


def read(folder, part):
    return json.loads((folder / "slots" / FILES[part]).read_text())


def test_halves_of_characters_and_missing_rows_in_foreign_files_are_no_bugs(copied):
    path = copied / "slots" / FILES["rank"]
    path.write_text(json.dumps(read(copied, "rank") | {"data": "\ud800"}))
    assert page_of(copied).tags
    (copied / "slots" / FILES["mask"]).write_text('{"data": "x", "rows": []}')
    with pytest.raises(UserError, match=r"mask\.json is damaged"):
        page_of(copied)


def test_a_log_of_a_million_entries_is_read_as_a_stream(tmp_path):
    entry = {"epoch": 1.0, "loss": 3.0}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(f"{json.dumps({'step': step, **entry})}\n" for step in range(150_000))
        file.write(json.dumps({"step": 150_000, "epoch": 2.0, "knn20_top1": 50.0}) + "\n")
        file.write(json.dumps({"step": 150_001, "epoch": 3.0}) + "\n")
    metrics = Subject(str(tmp_path)).metrics
    assert 5_000 < len(metrics) <= 20_001
    assert [one["step"] for one in metrics[-2:]] == [150_000, 150_001] and metrics[0]["step"] == 0


def test_page_is_balanced_loads_nothing_and_names_existing_files(reported):
    text = (reported / "slots" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and not WEBSITE.search(text) and "@import" not in text
    assert page.uncaptioned == 0, "a figure without the name of its file"
    assert all((reported / name).is_file() for name in page.files)
    pictures = (
        "rank/curve health/health maps/grid gallery/slot02 mask/mask factors/factors neighbors/neighbors"
    )
    assert {"results.json", "metrics.jsonl", *(f"slots/{name}.png" for name in pictures.split())} <= {
        *page.files
    }
    (command,) = page.commands
    assert command.startswith(f"dino-sparo linear {reported} --data.path ")
    assert "3 of 4 dimensions" in text and "seed: 0" in text and "1 epoch, 2 steps" in text


def test_tables_hold_the_numbers_of_the_files(reported):
    rows = Page((reported / "slots" / "report.html").read_text()).rows
    known = read(reported, "factors")
    for encoder in read(reported, "rank")["encoders"]:
        for part, (knn, linear) in enumerate(zip(*encoder["alone"].values(), strict=True)):
            place = encoder["orders"]["knn"].index(part) + 1
            assert [str(part), str(place), f"{knn:.4g}", f"{linear:.4g}"] in rows
        half = encoder["half"]["knn"]
        assert [f"{half['knn']:.4g}", f"{half['linear']:.4g}"] in [row[3:] for row in rows]
    for row in read(reported, "mask")["rows"]:
        numbers = [row[key] for key in ("initial", "masked", "relative_change", "kept")]
        cells = ["–" if number is None else f"{number:.4g}" for number in numbers]
        assert [row["encoder"], row["over"], row["test_set"], *cells] in rows
    for slot, scores in enumerate(known["encoders"][0]["alone"]):
        assert [f"slot {slot}", *(f"{score:.4g}" for score in scores)] in rows
    for slot in read(reported, "health")["slots"]:
        assert any(row[0] == str(slot["slot"]) and f"{slot['overlap']:.4g}" in row for row in rows)
    for result in json.loads((reported / "results.json").read_text())["results"]:
        top1, top5 = result["top1"], result["top5"]
        error = (top1 * (100 - top1) / 12) ** 0.5
        assert [f"{top1:.4g}", f"{error:.4g}", f"{top5:.4g}", "12"] in [row[5:] for row in rows]


def test_a_run_without_slots_has_curves_accuracy_neighbors_and_maps_of_its_heads(slot_runs, tmp_path, capsys):
    run = shutil.copytree(slot_runs["cls"], tmp_path / "run")
    assert main(["slots", "report", str(run), f"--data.path={slot_runs['data']}", *MACHINE]) == 0
    shown = capsys.readouterr().out
    assert "the read-out cls has no slots: curves, accuracy, maps, and neighbors are shown" in shown
    text = (run / "slots" / "report.html").read_text()
    assert {f"slots/{name}.png" for name in ("maps/grid", "neighbors/neighbors")} <= {*Page(text).files}
    assert "slots/rank/curve.png" not in text
    assert text.index("slots/neighbors/neighbors.png") < text.index('id="curves"'), "one of the first three"
    assert "without slots" in text and "the heads of the CLS token look" in text


def test_the_page_begins_with_what_was_trained_then_says_what_was_found(reported):
    text = (reported / "slots" / "report.html").read_text()
    ranked, known = read(reported, "rank"), read(reported, "factors")
    one = ranked["encoders"][0]
    order = [
        "A ViT of 2 blocks and 16 dimensions, with 3 slots of 4 dimensions, pretrained for 1 epoch (2 steps",
        "20-NN accuracy was not measured during training: monitor.knn_every_epochs is 0.",
        "Loss over epochs",
        "Where slots look, beside the CLS token in the last block",
        f"What slot {one['orders']['knn'][0]} responds to most",
        "What was found",
        "Only 2 steps: the encoder is hardly trained.",
        "of 3 slots (",
        f"on {ranked['num_test']} test images (± ",
        f"Slot {one['orders']['knn'][0]} has the highest",
        f"on {ranked['num_select']} images for choosing slots.",
        f"On average over {read(reported, 'health')['num_images']} images, a slot attends to",
        "A learned mask over slots changes the accuracy of nearest class means from",
        "Of the known factors",
        'id="curves"',
        'id="about"',
        "2 steps</dd>",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert any(f"Of the known factors, {name} is predicted best" in text for name in known["factors"])


def test_a_gain_within_chance_and_dead_slots_are_said(reported):
    encoder = load_encoder(reported)
    metrics = [{"epoch": at, "step": at, "knn20_top1": top1} for at, top1 in ((0, 62.1), (8, 64.7))]
    config = {"optim": {"global_batch_size": 4}, "data": {"path": "photos"}}
    _, told = training(encoder, config, [*metrics[:1], metrics[1] | {"knn20_images": 153}])
    _, why_not = training(encoder, config | {"monitor": {"knn_every_epochs": 0}}, [{"epoch": 1, "step": 9}])
    assert why_not == "20-NN accuracy was not measured during training: monitor.knn_every_epochs is 0."
    _, why_not = training(encoder, config | {"monitor": {"knn_every_epochs": 1}}, [{"epoch": 1, "step": 9}])
    assert why_not.endswith("training: it needs class folders, with at least 20 train images.")
    assert told == (
        "20-NN accuracy of the teacher: 62.1 % untrained, 64.7 % trained (± 3.9, one standard error), on 153 "
        "test images; the difference is not significant (less than two standard errors)."
    )
    assert (
        "significant"
        not in training(encoder, config, [*metrics[:1], metrics[1] | {"knn20_images": 10**5}])[1]
    )
    slot = {"dead": True, "duplicate": True}
    content = {
        "slots": [slot | {"slot": 0, "nearest": 2}, slot | {"slot": 2, "nearest": 0, "dead": False}],
        "summary": {"mean_effective_patches": 3.0, "num_patches": 4, "mean_cls_share": 0.5},
        "num_images": 84,
    }
    assert of_health(content)[:2] == [
        "Dead slots (nearly constant over images): 0 (on 84 images).",
        "Duplicate slots (same attention): 0 and 2 (on 84 images).",
    ]


def test_each_missing_part_tells_its_command(copied):
    shutil.rmtree(copied / "slots")
    assert page_of(copied).commands == commands(copied, "linear", *FILES)
    for path in copied.iterdir():
        if path.is_file():
            path.unlink()
    asked = {"data": "my data", "control": "other", "which": "student"}
    shown = page_of(copied, **asked).commands
    assert shown == commands(copied, "knn", "linear", *FILES, **asked)
    assert shown[2] == (
        f"dino-sparo slots rank {copied} --data.path 'my data' --control other --which student"
    )


def test_an_analysis_of_others_is_not_shown(reported):
    page = page_of(reported, which="student")
    assert page.commands == commands(reported, "linear", *FILES, which="student")
    page = page_of(reported, data="elsewhere")
    assert page.commands == commands(
        reported, "linear", *(p for p in FILES if p != "factors"), data="elsewhere"
    )
    assert not any(name.startswith(("slots/rank", "slots/gallery")) for name in page.files)


def test_a_long_log_is_thinned_out_except_for_entries_of_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(subject_module, "MOST_ENTRIES", 100)
    entries = [{"step": step, "epoch": step / 10, "loss": 1.0} for step in range(1, 1001)]
    for entry in entries[9::100]:
        entry["knn20_top1"] = 50.0
    for entry in entries[19::100]:
        entry["slots_dead"] = 0.0
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    found = Subject(str(tmp_path)).metrics
    steps = [entry["step"] for entry in found]
    assert steps == sorted(set(steps)) and steps[-1] == 1000 and 50 < len(steps) < 150
    assert [entry["step"] for entry in found if "knn20_top1" in entry] == [*range(10, 1000, 100)]
    assert [entry["step"] for entry in found if "slots_dead" in entry] == [*range(20, 1000, 100)]


def test_an_analysis_of_another_choice_of_images_or_of_another_run_is_not_shown(reported, slot_runs):
    data = {"data": str(slot_runs["data"])}
    assert Subject(str(reported), **data).find("gallery")[1] == ""
    found, note = Subject(str(reported), **data, choice={"train": "val", "label_column": "x"}).find("gallery")
    assert found is None and "made with data.train null;" in note
    chosen = Subject(str(reported), **data, choice={"val": "my val", "value_range": [0, 9]})
    assert chosen.command("rank").endswith("--data.val 'my val' --data.value_range '[0, 9]'")
    assert "my val" not in chosen.command("gallery") and "[0, 9]" in chosen.command("gallery")
    assert (
        Subject("run", str(reported / "slots"))
        .find("health")[1]
        .startswith(f"Not shown, since it was made with run {reported};")
    )
    assert Subject(f"{reported}/", str(reported / "slots")).find("health")[1] == ""
    of_encoder = Subject(str(reported), **data, choice={"value_range": [0, 4095]})
    assert of_encoder.find("health")[1] == ""  # null means that of the encoder, which may be the same


def test_the_best_and_the_worst_slots_are_shown_or_without_a_ranking_those_of_the_maps(tmp_path):
    subject = Subject(str(tmp_path))
    assert subject.slots_to_show(3) == [0, 1, 2]
    (tmp_path / "slots" / "maps").mkdir(parents=True)
    (tmp_path / "slots" / FILES["maps"]).write_text(json.dumps({"slots": [3, 0, 2]}))
    assert subject.slots_to_show(12) == [3, 0, 2]
    (tmp_path / "slots" / "rank").mkdir(parents=True)
    order = [7, 3, 11, 0, 1, 2, 4, 5, 6, 8, 9, 10]
    content = {"encoders": [{"orders": {"knn": order}}]}
    (tmp_path / "slots" / FILES["rank"]).write_text(json.dumps(content))
    assert subject.slots_to_show(12) == [7, 3, 11, 0, 6, 8, 9, 10]


def test_slots_that_were_not_drawn_are_told(copied):
    for part in ("maps", "gallery"):
        content = read(copied, part)
        content["slots"] = [slot for slot in content["slots"] if slot != 2 and slot != content["slots"][-1]]
        (copied / "slots" / FILES[part]).write_text(json.dumps(content))
    _, maps, gallery = page_of(copied).commands
    assert maps.startswith(commands(copied, "maps")[0]) and " --slots " in maps
    assert gallery == commands(copied, "gallery")[0]


def test_what_is_older_than_a_checkpoint_says_so(copied):
    newer = copied / "checkpoints" / "step_000000009.pt"
    newer.touch()
    os.utime(newer, (time.time() + 3600,) * 2)
    assert page_of(copied).commands == commands(copied, "linear", "knn", "linear", *FILES)
    of_now = {"states": {"encoder": hash_of(load_encoder(copied))}}
    assert page_of(copied, **of_now).commands == commands(copied, "linear")  # the weights are the same
    of_now["states"]["encoder"] = "other"
    assert page_of(copied, **of_now).commands == commands(copied, "linear", "knn", "linear", *FILES)


def test_an_analysis_of_other_weights_or_images_is_made_again(reported, slot_runs):
    about, stored = {"data": str(slot_runs["data"])}, read(reported, "rank")
    states = {key: stored[key] for key in ("encoder", "control_encoder", "labeled_files")}
    states["image_files"] = read(reported, "maps")["image_files"]
    for part in FILES:
        assert Subject(str(reported), **about, states=states).find(part)[1] == ""
    for key, parts in {
        "encoder": [*FILES],
        "control_encoder": ["maps", "rank", "mask", "factors"],
        "image_files": ["health", "maps", "gallery", "neighbors"],
        "labeled_files": ["rank", "mask"],
    }.items():
        subject = Subject(str(reported), **about, states=states | {key: "another"})
        notes = {part: subject.find(part)[1] for part in FILES}
        assert {
            part for part, note in notes.items() if f"another state of {key.replace('_', ' ')};" in note
        } == {*parts}


def test_a_missing_picture_leaves_a_line(copied):
    (copied / "slots" / "maps" / "grid.png").unlink()
    page_of(copied)
    assert "slots/maps/grid.png is missing" in (copied / "page.html").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{}], "data": ""}'])
def test_a_damaged_file_is_named(copied, content):
    (copied / "slots" / "mask" / "mask.json").write_text(content)
    with pytest.raises(UserError, match=r"mask\.json is damaged .* remove it"):
        page_of(copied)


def test_names_are_escaped(copied):
    content = read(copied, "mask")
    name = '<script>alert(1)</script>&" onload="alert(2)'
    content["rows"][0]["encoder"] = name
    (copied / "slots" / FILES["mask"]).write_text(json.dumps(content))
    page = page_of(copied)
    assert "script" not in page.tags and any(row[0] == name for row in page.rows)


def test_a_big_picture_gets_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=1)
    content = (tmp_path / "noise.png").read_bytes()
    assert len(content) > 1_000_000
    assert len(picture_uri(content, 60_000)) < 80_050
    assert picture_uri(content, 10_000_000).startswith("data:image/png;base64,")
    # The page has eight galleries and ten other pictures, in base64.
    assert (8 * GALLERY_BYTES + 10 * PICTURE_BYTES) * 4 / 3 < 14_500_000


def test_report_of_a_run_without_analyses(run_dir, capsys):
    assert main(["slots", "report", str(run_dir), "--device", "cpu"]) == 0
    assert f"dino-sparo slots rank {run_dir} --data.path DIR" in capsys.readouterr().out
    page = Page((run_dir / "slots" / "report.html").read_text())
    assert page.commands == commands(run_dir, "knn", "linear", *FILES)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("data/train/class0", "not in class folders"),
        ("data", "validation images in a flat folder"),
        ("few", "too few to hold out every fifth as val"),
    ],
)
def test_without_classes_the_report_leaves_out_what_needs_them(run_dir, tmp_path, capsys, folder, reason):
    write_pictures(tmp_path / "data", 12, classes=2)
    write_pictures(tmp_path / "few", 4, classes=2)
    if folder == "data":
        (tmp_path / "data" / "val").mkdir()
        shutil.copy(next((tmp_path / "data" / "train").rglob("*.png")), tmp_path / "data" / "val")
    data, out = tmp_path / folder, tmp_path / "out"
    assert main(["slots", "report", str(run_dir), f"--data.path={data}", f"--out={out}", *MACHINE]) == 0
    (left_out,) = [line for line in capsys.readouterr().out.splitlines() if "rank" in line]
    assert left_out.startswith("rank and mask are left out: ") and reason in left_out
    assert {part for part, file in FILES.items() if (out / file).is_file()} == {
        *("health", "maps", "gallery", "neighbors")
    }
    text = (out / "report.html").read_text()
    assert Page(text).commands == commands(run_dir, "factors", out=str(out))
    for said in ("No knn result", "No linear result", "Not made"):
        assert f"{said}: needs images in class folders" in text
    assert "k-NN accuracy, then" not in text


def test_fewer_images_than_neighbors_leave_out_the_ranking_only(run_dir, tmp_path, capsys):
    write_pictures(tmp_path / "data", 12, classes=2)
    out = tmp_path / "out"
    about = [f"--data.path={tmp_path / 'data'}", f"--out={out}", *MACHINE]
    assert main(["slots", "report", str(run_dir), *about]) == 0
    assert "no ranking of slots: k is 20; expected 1 to" in capsys.readouterr().out
    made = {part for part, file in FILES.items() if (out / file).is_file()}
    assert made == {"health", "maps", "gallery", "neighbors", "mask"}


def test_an_image_that_cannot_be_read_ends_the_report_at_once(run_dir, tmp_path, capsys):
    write_pictures(tmp_path / "data", 60, classes=2)
    (tmp_path / "data" / "train" / "class0" / "000.png").write_bytes(b"x")
    about = [f"--data.path={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", *MACHINE]
    assert main(["slots", "report", str(run_dir), *about]) == 2
    assert "000.png" in capsys.readouterr().err and not (tmp_path / "out" / "maps").exists()


def test_the_report_reads_images_as_it_is_told(run_dir, tmp_path, capsys):
    write_pictures(tmp_path, 2, classes=1)
    data = [f"--data.path={tmp_path / 'train' / 'class0'}", "--data.max_pixels=10"]
    assert main(["slots", "report", str(run_dir), *data, f"--out={tmp_path / 'out'}", *MACHINE]) != 0
    assert "max_pixels" in capsys.readouterr().err
