"""One HTML page about a run, from the files in its folder; every figure names its file."""

import base64
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dino_sparo.data.decode import open_image
from dino_sparo.errors import UserError
from dino_sparo.evaluation.knn import KNN
from dino_sparo.evaluation.results import RESULTS_FILE, read_results, results_folder, standard_error
from dino_sparo.files import open_regular, parsed_json, write_file
from dino_sparo.models import Encoder
from dino_sparo.recipe.files import CONFIG_FILE
from dino_sparo.recipe.typed import read_yaml
from dino_sparo.runs.checkpoint import checkpoints_of
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import METRICS_FILE, each_metric
from dino_sparo.slots.curves import draw_all, draw_curve
from dino_sparo.slots.findings import FINDINGS, Finding, training
from dino_sparo.slots.rank import WAYS

TITLES = {
    "rank": "Ranking of slots",
    "health": "Health of slots",
    "maps": "Where slots look",
    "gallery": "Galleries of the best and worst slots",
    "mask": "Learned masks",
    "factors": "Known factors",
}
FILES = {part: f"{part}/{part}.json" for part in TITLES}
OF_CLASSES = ("rank", "mask")  # analyses that need labeled images
WITHOUT_SLOTS = ("maps",)  # analyses of any encoder
COMPARING = ("rank", "maps", "mask", "factors")  # analyses that compare with a control
LEADING = ("curves", "maps", "gallery")  # sections whose first picture is on the first screen
HEALTH = ("entropy", "effective_patches", "cls_share", "response_std", "overlap", "agreement")
MOST_ENTRIES = 20_000  # of the log, more than curves have pixels
NUM_BEST = 4  # slots shown from each end of the ranking
GALLERY_BYTES, PICTURE_BYTES = 400_000, 1_200_000  # so that the page is under 15 MB
MOST_PICTURE = 2**26  # bytes that are read from a file
SIDES = (1600, 1200, 900, 600, 400, 250)  # pixels of the longer side of a resized picture
JPEG_QUALITY = 82

Content = Mapping[str, Any]  # of the JSON of an analysis


@dataclass(frozen=True)
class Subject:
    """What a page is about, from the command's options; analyses with other weights, images, or controls are
    not shown. `has_classes`: whether the images are labeled."""

    run: str
    out: str | None = None
    which: str = "teacher"
    data: str | None = None
    control: str | None = None
    has_classes: bool = True

    @property
    def folder(self) -> Path:
        """Folder of `results.json` and, for a run folder, `metrics.jsonl`."""
        return results_folder(self.run)

    @property
    def slots(self) -> Path:
        """Folder that the commands about slots write to."""
        return Path(self.out) if self.out else self.folder / "slots"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The recipe of a run folder, or empty. Raises UserError: it is damaged."""
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return {}
        with _damage_told(path, "dino-sparo pretrain"):
            return dict(read_yaml(path))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The log of a run folder, or empty; of very many entries some, and the last one."""
        entries: list[dict[str, Any]] = []
        last, every = None, 1
        for number, last in enumerate(each_metric(self.folder)):
            if number % every == 0 or KNN in last:
                entries.append(last)
            if len(entries) > MOST_ENTRIES:
                entries, every = entries[::2], 2 * every
        return entries if last is None or entries[-1] is last else [*entries, last]

    def command(self, part: str) -> str:
        """The command line that makes a part of the page, on the given images if they are suitable."""
        words = ["dino-sparo", *(["slots"] if part in TITLES else []), part, self.run]
        if part != "factors":
            will_do = self.has_classes or part in ("health", "maps", "gallery")
            words += ["--data.path", self.data if self.data and will_do else "DIR"]
        if self.control and part in COMPARING:
            words += ["--control", self.control]
        if self.which != "teacher":
            words += ["--which", self.which]
        if self.out and part in TITLES:
            words += ["--out", self.out]
        return shlex.join(words)

    def find(self, part: str) -> tuple[dict[str, Any] | None, str]:
        """The JSON of an analysis; if there is none or it is about other options, None and a note.

        Raises:
            UserError: the file is damaged.
        """
        path = self.slots / FILES[part]
        if not path.is_file():
            return None, "Not made yet:"
        asked = {"which": self.which, "control": self.control, "data": self.data}
        with _damage_told(path, self.command(part)):
            content = dict(parsed_json(path).items())
        others = [
            f"{key} {content[key]}"
            for key, value in asked.items()
            if value not in (None, content.get(key, value))
        ]
        if others:
            return None, f"Not shown, since it was made with {', '.join(others)}; make it again:"
        return content, ""

    def slots_to_show(self, num_slots: int) -> list[int]:
        """The four best and the four worst slots by their own k-NN; without a ranking, the first eight."""
        ranked, _ = self.find("rank")
        order = list(range(min(num_slots, 2 * NUM_BEST)))
        if ranked:
            with _damage_told(self.slots / FILES["rank"], self.command("rank")):
                order = [int(slot) for slot in ranked["encoders"][0]["orders"]["knn"]] or order
        return order if len(order) < 2 * NUM_BEST else order[:NUM_BEST] + order[-NUM_BEST:]


@contextmanager
def _damage_told(path: Path, command: str) -> Iterator[None]:
    """Raise a UserError that names a damaged file, and the command that makes it again."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is damaged ({reason}); remove it, and make it again with `{command}`"
        ) from error


def write_page(path: Path, subject: Subject, encoder: Encoder) -> None:
    """Write the page of a run as one HTML file, which opens without network.

    Args:
        encoder: that of the run; without slots, the page has only the maps of its CLS token.

    Raises:
        UserError: a file of the run is damaged.
    """
    environment = Environment(
        loader=PackageLoader("dino_sparo.slots"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = _sections(subject, encoder.num_slots)
    leading = [section for section in sections if section.leads]
    page = environment.get_template("report.html.jinja").render(
        title=Path(subject.run).resolve().name,
        lead=training(encoder, subject.config, subject.metrics),
        pictures=[(section, section.pictures.pop(0)) for section in leading],
        findings=[finding for section in sections for finding in section.findings],
        facts=_facts(subject, encoder),
        sections=sections,
        config=(subject.folder / CONFIG_FILE).read_text(encoding="utf-8") if subject.config else None,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    write_file(path, page)


def _facts(subject: Subject, encoder: Encoder) -> dict[str, str]:
    """Facts about the encoder, and about its training if there is a run folder."""
    size, num_slots = encoder.image_size, encoder.num_slots
    facts = {
        "Run": subject.run,
        "Weights": subject.which,
        "Slots": f"{num_slots} of {encoder.embed_dim // num_slots} dimensions" if num_slots else "none",
        "Encoding": f"{encoder.embed_dim} dimensions",
        "Backbone": f"{len(encoder.backbone.blocks)} blocks, width {encoder.width}",
        "Images": f"{size} × {size} pixels, patches of {encoder.backbone.patch_size}",
        "Parameters": f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
    }
    if starts := read_starts(subject.folder):
        last = starts[-1]
        command = last["command"]
        if "--config" in command[:-1]:
            facts["Recipe"] = command[command.index("--config") + 1]
        facts["Started"] = starts[0]["time"] + (f", {len(starts)} starts" if len(starts) > 1 else "")
        facts["Trained on"] = f"{last['device']}, {last['precision']}, processes: {last['processes']}"
        facts["Versions"] = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
        if last.get("git"):
            facts["Source"] = last["git"]
    if entries := subject.metrics:
        facts["Trained for"] = f"{entries[-1]['epoch']:g} epochs, {entries[-1]['step']} steps"
    return facts


@dataclass
class Section:
    """One part of the page, for the template.

    Attributes:
        path: the file with the numbers; `made`: when it was written.
        notes: lines of text, each with a command or an empty string.
        findings: sentences for the top of the page.
    """

    subject: Subject
    anchor: str
    title: str
    path: Path
    intro: str = ""
    made: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @cached_property
    def leads(self) -> bool:
        """Whether its first picture is at the top of the page."""
        return self.anchor in LEADING and bool(self.pictures)

    def source(self, path: Path) -> str:
        """A file for captions, relative to the folder of the run if it is in it."""
        folder = self.subject.folder
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def tell_age(self, *parts: str) -> None:
        """Set `made`; if the run has a newer checkpoint, add notes with the commands for these parts."""
        seconds = self.path.stat().st_mtime
        self.made = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        if any(path.stat().st_mtime > seconds for path in checkpoints_of(self.subject.folder)):
            text = "Older than the newest checkpoint; make it again:"
            self.notes += [(text, self.subject.command(part)) for part in parts]

    def add_table(
        self, caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]], folded: bool = False
    ) -> None:
        """Add a table; a folded one is shown when it is clicked."""
        cells = [[_cell(value) for value in row] for row in rows]
        table = {"caption": caption, "source": self.source(self.path), "header": header, "rows": cells}
        self.tables.append(table | {"folded": folded})

    def add_picture(self, file: str, caption: str, max_bytes: int = PICTURE_BYTES) -> None:
        """Add an image file beside that of the section; add a note if it cannot be read."""
        source = self.source(self.path.with_name(file))
        try:
            with open_regular(self.path.with_name(file)) as content:
                uri = picture_uri(content.read(MOST_PICTURE), max_bytes)
        except Exception:  # a damaged file makes Pillow raise anything
            self.notes.append((f"{source} is missing, or cannot be read as an image.", ""))
        else:
            self.pictures.append({"uri": uri, "caption": caption, "source": source})


def _cell(value: float | str | None) -> str:
    """A value for a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else f"{value}"


def picture_uri(content: bytes, max_bytes: int) -> str:
    """A PNG file as a data URI: unchanged if it has at most `max_bytes`, else resized and as JPEG.

    Raises:
        OSError: it is not an image.
    """
    kind = "png"
    with open_image(content) as image:
        image.load()
        for side in SIDES:
            if len(content) <= max_bytes:
                break
            smaller, buffer = image.convert("RGB"), io.BytesIO()
            smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
            smaller.save(buffer, "JPEG", quality=JPEG_QUALITY)
            kind, content = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _sections(subject: Subject, num_slots: int) -> list[Section]:
    """All sections in order: each analysis, or the command that makes it."""
    shown = subject.slots_to_show(num_slots)
    sections = [_curves(subject), _accuracy(subject)]
    fills = (_fill_rank, _fill_health, _fill_maps, _fill_gallery, _fill_mask, _fill_factors)
    for (part, title), fill in zip(TITLES.items(), fills, strict=True):
        if not num_slots and part not in WITHOUT_SLOTS:
            continue
        section = Section(subject, part, title, subject.slots / FILES[part])
        sections.append(section)
        found, note = subject.find(part)
        if found is None:
            section.notes.append((note, subject.command(part)))
            continue
        section.tell_age(part)
        with _damage_told(section.path, subject.command(part)):
            fill(section, found, shown)
            if part in FINDINGS:
                section.findings = [Finding(sentence, part) for sentence in FINDINGS[part](found)]
    return sections


def _curves(subject: Subject) -> Section:
    """Loss, 20-NN, and health measures over epochs, from metrics.jsonl."""
    section = Section(subject, "curves", "Training", subject.folder / METRICS_FILE)
    entries = subject.metrics
    if not any("loss" in entry for entry in entries):
        section.notes.append((f"No {METRICS_FILE}: only the folder of a training run has curves.", ""))
        return section
    section.tell_age()
    first, every = io.BytesIO(), io.BytesIO()
    with _damage_told(section.path, subject.command("pretrain")):
        draw_curve(entries, first)
        draw_all(entries, every)
    captions = "Loss and 20-NN accuracy over epochs", "Health measures over epochs"
    for buffer, caption in zip((first, every), captions, strict=True):
        uri = picture_uri(buffer.getvalue(), PICTURE_BYTES)
        section.pictures.append({"uri": uri, "caption": caption, "source": section.source(section.path)})
    return section


def _accuracy(subject: Subject) -> Section:
    """k-NN and linear accuracies from results.json: main settings first, then all others."""
    section = Section(subject, "accuracy", "Accuracy", subject.folder / RESULTS_FILE)
    results = read_results(subject.folder) if section.path.is_file() else []
    for part in ("knn", "linear"):
        if not any(result.protocol.startswith(part) for result in results):
            section.notes.append((f"No {part} result yet:", subject.command(part)))
    if not results:
        return section
    section.tell_age("knn", "linear")
    header = (
        "protocol",
        "setting",
        "test set",
        "weights",
        "labels used %",
        "top-1 %",
        "± one standard error",
        "top-5 %",
        "images",
    )
    for headline, caption in ((True, "Main settings"), (False, "All other settings")):
        rows = [
            [
                *(result.protocol, result.name, result.test_set, result.weights),
                100 * result.train_fraction,
                *(result.top1, standard_error(result.top1, result.num_images)),
                *(result.top5, result.num_images),
            ]
            for result in results
            if result.headline == headline
        ]
        if rows:
            section.add_table(caption, header, rows, folded=not headline)
    return section


def _fill_rank(section: Section, found: Content, _shown: list[int]) -> None:
    """Accuracy by number of slots kept, and of every slot alone."""
    section.intro = (
        f"Slots are scored and chosen on {found['num_select']} training images of {found['data']}; the "
        f"curves are measured on {found['num_test']} test images, which are not used for choosing."
    )
    section.add_picture("curve.png", "Accuracy by number of slots kept")
    encoders, measures = found["encoders"], (f"{found['k']}-NN %", "linear %")
    rows = []
    for one in encoders:
        kept = {WAYS.get(way, way): half for way, half in one["half"].items()}
        kept["all"] = one["all"] | {"kept": one["num_parts"]}
        rows += [[one["name"], way, at["kept"], at["knn"], at["linear"]] for way, at in kept.items()]
    section.add_table("Half and all kept", ("encoder", "chosen by", "kept", *measures), rows)
    for one in encoders:
        place = {part: place for place, part in enumerate(one["orders"]["knn"], 1)}
        alone = zip(one["alone"]["knn"], one["alone"]["linear"], strict=True)
        rows = [[part, place[part], *scores] for part, scores in enumerate(alone)]
        caption = f"{one['name']}: each part of {one['part_dim']} dimensions alone"
        header = ("number", "place by k-NN", *measures)
        section.add_table(caption, header, rows, folded=one is not encoders[0])


def _fill_health(section: Section, found: Content, _shown: list[int]) -> None:
    """Summary, histograms and the table of all slots."""
    section.intro = f"Over {found['num_images']} images of {found['data']}."
    section.add_table("Summary", ("measure", "value"), [*found["summary"].items()])
    section.add_picture("health.png", "Slots by each measure")
    columns = ("slot", *HEALTH, "nearest", "dead")
    rows = [[slot.get(key) for key in columns] for slot in found["slots"]]
    section.add_table("Every slot", columns, rows)


def _fill_maps(section: Section, found: Content, shown: list[int]) -> None:
    """The attention maps of slots, and of the control's heads."""
    section.intro = f"Attention of the {found['which']} on images of {found['data']}."
    looks = "slots look, beside the CLS token" if found["slots"] else "the heads of the CLS token look"
    section.add_picture(found["grid"], f"Where {looks} in the last block")
    if found.get("control_grid"):
        section.add_picture(
            found["control_grid"], f"Heads of the CLS token of {found['control']}, without slots"
        )
    if absent := ", ".join(str(slot) for slot in shown if slot not in found["slots"]):
        command = f"{section.subject.command('maps')} --slots {' '.join(map(str, shown))}"
        section.notes.append((f"There are no maps of slots {absent}; make them:", command))


def _fill_gallery(section: Section, found: Content, shown: list[int]) -> None:
    """The pictures of the best and worst slots' galleries."""
    section.intro = (
        f"The images of {found['data']} that a slot responds to most, and their nearest neighbors by this "
        f"slot only: first for the best slots by their own k-NN accuracy, then for the worst."
    )
    pictures = {entry["slot"]: entry["picture"] for entry in found["slots"]}
    for slot in shown:
        if slot in pictures:
            section.add_picture(pictures[slot], f"What slot {slot} responds to most", GALLERY_BYTES)
    if absent := ", ".join(str(slot) for slot in shown if slot not in pictures):
        section.notes.append(
            (f"There are no galleries of slots {absent}; make them:", section.subject.command("gallery"))
        )


def _fill_mask(section: Section, found: Content, _shown: list[int]) -> None:
    """Accuracies without and with the mask."""
    transfer = f", and tested on {found['transfer']}" if found.get("transfer") else ""
    section.intro = f"A mask learned on {found['data']} with a frozen encoder{transfer}."
    header = ("encoder", "mask over", "test set", "initial %", "masked %", "relative change %", "kept")
    keys = ("encoder", "over", "test_set", "initial", "masked", "relative_change", "kept")
    section.add_table("Learned masks", header, [[row[key] for key in keys] for row in found["rows"]])
    section.add_picture("mask.png", "The learned masks")


def _fill_factors(section: Section, found: Content, _shown: list[int]) -> None:
    """How well each slot predicts each factor."""
    section.intro = (
        f"Accuracy in percent of a probe on each slot alone, trained on {found['num_train']} and tested on "
        f"{found['num_test']} generated pictures."
    )
    section.add_picture("factors.png", "Accuracy by factor, of each slot and of whole encodings")
    names = list(found["factors"])
    for one in found["encoders"]:
        rows = [[f"slot {slot}", *scores] for slot, scores in enumerate(one["alone"])]
        rows.append(["whole encoding", *(one["whole"][name] for name in names)])
        rows.append(["chance", *(found["chance"][name] for name in names)])
        section.add_table(one["name"], ("", *names), rows)
