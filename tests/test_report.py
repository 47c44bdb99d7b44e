import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest

from dino_sparo.__main__ import main
from dino_sparo.errors import UserError
from dino_sparo.slots.page import FILES, RunFiles, all_sections, render
from dino_sparo.slots.page_figures import picture_uri
from tests.report_samples import write_run
from tests.tiny import tiny_options, write_pictures

LIMIT = 15_000_000
VOID = ("meta", "img", "link", "br", "hr")
WEBSITE = re.compile(
    r"""(?:src|href|url|srcset|action|data)\s*[=(]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE
)


class Page(HTMLParser):
    """Checks that elements are balanced; collects cells of tables, captions' files and text of commands."""

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
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figure":
            self.uncaptioned += 1
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if not self.open:
            return
        tag, kind = self.open[-1]
        if tag in ("td", "th"):
            self.rows[-1][-1] += data
        if (tag, kind) == ("code", "file"):
            self.files.append(data)
            self.uncaptioned -= any(tag == "figcaption" for tag, _ in self.open)
        if (tag, kind) == ("code", "command"):
            self.commands.append(data)


@pytest.fixture
def copied(sample, tmp_path):
    shutil.copytree(sample, tmp_path / "run")
    return tmp_path / "run"


def page_of(folder, num_slots=16, **asked):
    commands = {name: f"dino-sparo slots {name} RUN" for name in (*FILES, "knn", "linear")}
    files = RunFiles(folder, folder / "slots", commands, asked)
    return render(folder.name, {}, all_sections(files, num_slots), "seed: 0\n")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    write_run(folder, num_slots=8)
    return folder


@pytest.fixture(scope="module")
def sample_page(sample):
    return page_of(sample, 8)


def read(folder, part):
    return json.loads((folder / "slots" / FILES[part]).read_text())


def test_page_is_balanced_loads_nothing_and_names_existing_files(sample, sample_page):
    text, page = sample_page, Page(sample_page)
    assert "script" not in page.tags
    assert not WEBSITE.search(text) and "@import" not in text
    assert page.uncaptioned == 0, "a figure without the name of its file"
    for name in page.files:
        assert (sample / name).is_file() or name == "config.yaml"
    assert {f"slots/{file}" for part, file in FILES.items()} | {"results.json"} <= {*page.files} | {
        f"slots/{part}/{part}.json" for part in ("maps", "gallery")
    }
    assert {"slots/maps/grid.png", "slots/mask/mask.png", "slots/gallery/slot03.png"} <= {*page.files}
    assert page.commands == []


def test_tables_hold_the_numbers_of_the_files(sample, sample_page):
    rows = Page(sample_page).rows
    ranked, of_mask, known = read(sample, "rank"), read(sample, "mask"), read(sample, "factors")
    for encoder in ranked["encoders"]:
        for part, (knn, linear) in enumerate(zip(*encoder["alone"].values(), strict=True)):
            place = encoder["orders"]["knn"].index(part) + 1
            assert [str(part), str(place), f"{knn:.2f}", f"{linear:.2f}"] in rows
    for row in of_mask["rows"]:
        numbers = [f"{row[key]:.2f}" for key in ("initial", "masked", "relative_change", "kept")]
        assert [row["encoder"], row["over"], row["test_set"], *numbers] in rows
    for slot, scores in enumerate(known["encoders"][0]["alone"]):
        assert [f"slot {slot}", *(f"{score:.2f}" for score in scores)] in rows
    for slot in read(sample, "health")["slots"]:
        assert any(row[0] == str(slot["slot"]) and f"{slot['overlap']:.4f}" in row for row in rows)
        assert any(row[0] == str(slot["slot"]) and row[6:] == ["–", *row[7:]] for row in rows if len(row) > 6)
    assert ["knn", "20-NN", "run", "teacher", "100 %", "44.56", "91.03", "8"] in rows


def test_each_missing_part_tells_its_command(copied):
    shutil.rmtree(copied / "slots")
    assert Page(page_of(copied, 8)).commands == [f"dino-sparo slots {part} RUN" for part in FILES]
    for path in copied.iterdir():
        if path.is_file():
            path.unlink()
    assert len(Page(page_of(copied, 8)).commands) == len(FILES) + 2  # k-NN and linear


def test_an_analysis_of_others_is_not_shown(sample):
    assert Page(page_of(sample, 8, which="teacher")).commands == []
    page = Page(page_of(sample, 8, which="student"))
    assert "dino-sparo slots maps RUN" in page.commands and "slots/maps/grid.png" not in page.files
    page = Page(page_of(sample, 8, data="elsewhere"))
    assert [f"dino-sparo slots {part} RUN" for part in ("rank", "health")] == page.commands[:2]
    assert not any(name.startswith(("slots/rank", "slots/gallery")) for name in page.files)


def test_what_is_older_than_a_checkpoint_says_so(copied):
    (copied / "checkpoints").mkdir(exist_ok=True)
    newer = copied / "checkpoints" / "epoch0009.pt"
    newer.touch()
    os.utime(newer, (time.time() + 3600,) * 2)
    commands = [f"dino-sparo slots {part} RUN" for part in ("knn", "linear", *FILES)]
    assert Page(page_of(copied, 8)).commands == commands


def test_a_missing_picture_leaves_a_line(copied):
    (copied / "slots" / "maps" / "grid.png").unlink()
    assert "slots/maps/grid.png is missing" in page_of(copied, 8)


def test_a_damaged_file_is_named(copied):
    for content in ("{", "[]", '{"rows": [{}], "data": ""}'):
        (copied / "slots" / "mask" / "mask.json").write_text(content)
        with pytest.raises(UserError, match=r"mask\.json is damaged .* remove it"):
            page_of(copied, 8)


def test_names_are_escaped(tmp_path):
    folder = tmp_path / "a&b"
    write_run(folder, num_slots=2, name='<script>alert(1)<_script>&$x$" onload="alert(2)')
    page = Page(page_of(folder, 2))
    assert "script" not in page.tags and "alert(1)" not in page.tags
    assert any("<script>" in cell for row in page.rows for cell in row)


def test_many_slots_with_big_pictures_stay_under_the_limit(tmp_path, monkeypatch):
    write_run(tmp_path / "run", num_slots=64, picture_side=24)
    big = "dino_sparo.slots.page.picture_uri"
    sizes = []
    monkeypatch.setattr(big, lambda path, most: sizes.append(most) or f"data:,{'x' * (most * 4 // 3 + 30)}")
    assert len(page_of(tmp_path / "run", 64)) < LIMIT
    assert len(sizes) > 50


def test_a_big_picture_gets_smaller(tmp_path):
    write_run(tmp_path / "run", num_slots=2, picture_side=700)
    path = tmp_path / "run" / "slots" / "maps" / "grid.png"
    assert path.stat().st_size > 1_000_000
    assert len(picture_uri(path, 60_000)) < 80_050
    assert picture_uri(path, 10_000_000).startswith("data:image/png;base64,")


def test_report_of_a_run_without_analyses(run_dir, capsys):
    assert main(["slots", "report", str(run_dir), "--device", "cpu"]) == 0
    assert f"dino-sparo slots rank {run_dir} --data.path DIR" in capsys.readouterr().out
    text = (run_dir / "slots" / "report.html").read_text()
    assert "2 of 4 numbers" in text and "Training curves" in text
    assert len(Page(text).commands) == len(FILES) + 2


@pytest.mark.long
def test_report_makes_what_is_missing(tmp_path):
    from dino_sparo.cli.pretraining import pretrain

    write_pictures(tmp_path / "data", 60, classes=2)
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", optim__epochs=2))
    arguments = ["slots", "report", str(tmp_path / "run"), "--data.path", str(tmp_path / "data")]
    assert main([*arguments, "--device", "cpu", "--num_workers", "0"]) == 0
    page = Page((tmp_path / "run" / "slots" / "report.html").read_text())
    assert {f"slots/{FILES[part]}" for part in ("rank", "health", "mask")} <= {*page.files}
    for name in page.files:
        assert (tmp_path / "run" / name).is_file()


@pytest.mark.long
@pytest.mark.parametrize(
    ("folder", "reason"),
    [("data/train/class0", "not in class folders"), ("data", "validation images in a flat folder")],
)
def test_without_classes_the_report_leaves_out_what_needs_them(run_dir, tmp_path, capsys, folder, reason):
    write_pictures(tmp_path / "data", 12, classes=2)
    if folder == "data":
        (tmp_path / "data" / "val").mkdir()
        shutil.copy(next((tmp_path / "data" / "train").rglob("*.png")), tmp_path / "data" / "val")
    data, out = tmp_path / folder, tmp_path / "out"
    arguments = ["slots", "report", str(run_dir), "--data.path", str(data), "--out", str(out)]
    assert main([*arguments, "--device", "cpu", "--num_workers", "0"]) == 0
    said = capsys.readouterr().out
    left_out = [line for line in said.splitlines() if "rank" in line]
    assert len(left_out) == 1 and reason in left_out[0]
    assert left_out[0].startswith("rank and mask are left out, since they need classes: ")
    made = {part for part, file in FILES.items() if (out / file).is_file()}
    assert made == {"health", "maps", "gallery"}
    page = Page((out / "report.html").read_text())
    assert not [command for command in page.commands if f"{data} " in command and "rank" in command]


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(sample_page, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    (tmp_path / "page.html").write_text(sample_page)
    frame = f"""<title>none</title>
    <iframe id="f" src="page.html" style="width:{width}px;height:900px"></iframe>
    <script>let f = document.getElementById("f"); f.onload = () => {{
        let d = f.contentDocument.documentElement; document.title = d.scrollWidth + "/" + d.clientWidth
    }}</script>"""
    (tmp_path / "frame.html").write_text(frame)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = (tmp_path / "frame.html").as_uri()
    found = subprocess.run(
        [browser, *options, profile, "--virtual-time-budget=5000", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    sizes = re.search(r"<title>(\d+)/(\d+)</title>", found)
    assert sizes is not None, found[:300]
    assert int(sizes[1]) <= int(sizes[2]) <= width
