"""One HTML page about a run, from the files in its folder; every figure names its file."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dino_sparo.data.decode import open_image
from dino_sparo.evaluation.knn import KNN
from dino_sparo.evaluation.results import RESULTS_FILE, read_results, standard_error
from dino_sparo.files import open_regular, write_file
from dino_sparo.models import Encoder
from dino_sparo.recipe.files import CONFIG_FILE
from dino_sparo.runs.checkpoint import checkpoints_of
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import METRICS_FILE
from dino_sparo.slots.curves import draw_all, draw_curve
from dino_sparo.slots.findings import FINDINGS, Finding, of_curves, training
from dino_sparo.slots.health import HEADER, WORDS, summary_rows
from dino_sparo.slots.rank import WAYS
from dino_sparo.slots.statistics import HEALTH_IMAGES
from dino_sparo.slots.subject import (
    FILES,
    NUM_BEST,
    OF_CLASSES,
    TITLES,
    WITHOUT_SLOTS,
    Subject,
    made_by,
)
from dino_sparo.terminal import counted

LEADING = ("curves", "maps", "gallery", "neighbors")  # the first pictures of three lead the page
NEEDS_CLASSES = "needs images in class folders, DIR/<class>/<image>."
GALLERY_BYTES, PICTURE_BYTES = 400_000, 700_000  # so that the page is under 15 MB
MOST_PICTURE = 2**26  # bytes that are read from a file
SIDES = (1600, 1200, 900, 600, 400, 250)  # pixels of the longer side of a resized picture
JPEG_QUALITY = 82

Content = Mapping[str, Any]  # of the JSON of an analysis


def write_page(path: Path, subject: Subject, encoder: Encoder) -> None:
    """Write the page of a run as one HTML file, which opens without network.

    Args:
        encoder: that of the run; without slots, the page has only what is made of any encoder.

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
    sections = _sections(subject, encoder)
    leading = [section for section in sections if section.anchor in LEADING and section.pictures][:3]
    page = environment.get_template("report.html.jinja").render(
        title=Path(subject.run).resolve().name,
        lead=training(encoder, subject.config, subject.metrics),
        pictures=[(section, section.lead()) for section in leading],
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
        facts["Trained for"] = ", ".join(counted(entries[-1][what], what) for what in ("epoch", "step"))
    return facts


@dataclass
class Section:
    """One part of the page, for the template.

    Attributes:
        path: the file with the numbers; `made`: when it was written.
        notes: lines of text, each with a command or an empty string.
        findings: sentences for the top of the page.
        leads: whether its first picture is at the top of the page.
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
    leads: bool = False

    def lead(self) -> dict[str, str]:
        """Take the first picture out of the section, for the top of the page."""
        self.leads = True
        return self.pictures.pop(0)

    def source(self, path: Path) -> str:
        """A file for captions, relative to the folder of the run if it is in it."""
        folder = self.subject.folder
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def tell_age(self, *parts: str, encoders: Iterable[str | None] = ()) -> None:
        """Set `made`; if it was made with other weights, add notes with the commands for these parts.

        `encoders` are hashes of these weights; if none is known, they are other ones if the run has a newer
        checkpoint.
        """
        seconds, now = self.path.stat().st_mtime, self.subject.states.get("encoder")
        self.made = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        newer = (path.stat().st_mtime > seconds for path in checkpoints_of(self.subject.folder))
        known = set(encoders) - {None}
        by_hash = bool(known and now)
        if known - {now} if by_hash else any(newer):
            text = "Made with other weights" if by_hash else "Older than the newest checkpoint"
            self.notes += [(f"{text}; make it again:", self.subject.command(part)) for part in parts]

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


def _sections(subject: Subject, encoder: Encoder) -> list[Section]:
    """All sections in order: each analysis, or the command that makes it."""
    num_slots = encoder.num_slots
    shown = subject.slots_to_show(num_slots)
    sections = [_curves(subject, encoder.backbone.native_grid**2), _accuracy(subject)]
    fills = (_fill_rank, _fill_health, _fill_maps, _fill_gallery, _fill_neighbors, _fill_mask, _fill_factors)
    for part, fill in zip(TITLES, fills, strict=True):
        if not num_slots and part not in WITHOUT_SLOTS:
            continue
        section = Section(subject, part, TITLES[part], subject.slots / FILES[part])
        sections.append(section)
        found, why_not = subject.find(part)
        if found is None:
            lacks_classes = part in OF_CLASSES and not subject.has_classes
            note = ("Not made: " + NEEDS_CLASSES, "") if lacks_classes else (why_not, subject.command(part))
            section.notes.append(note)
            continue
        section.tell_age(part, encoders=[found.get("encoder")])
        with made_by(section.path, subject.command(part)):
            fill(section, found, shown)
            if part in FINDINGS:
                section.findings = [Finding(sentence, part) for sentence in FINDINGS[part](found)]
    return sections


def _curves(subject: Subject, num_patches: int) -> Section:
    """Loss, 20-NN, and health measures over epochs, from metrics.jsonl."""
    section = Section(subject, "curves", "Training", subject.folder / METRICS_FILE)
    entries = subject.metrics
    if not any("loss" in entry for entry in entries):
        section.notes.append((f"No {METRICS_FILE}: only the folder of a training run has curves.", ""))
        return section
    section.tell_age()
    first, every = io.BytesIO(), io.BytesIO()
    with made_by(section.path, subject.command("pretrain")):
        draw_curve(entries, first)
        num_prototypes = subject.config.get("head", {}).get("num_prototypes")
        draw_all(entries, every, num_patches=num_patches, num_prototypes=num_prototypes)
    if not subject.config.get("init"):
        section.findings = [Finding(sentence, section.anchor) for sentence in of_curves(entries)]
    accuracy = " and 20-NN accuracy" if any(KNN in entry for entry in entries) else ""
    measured = ""
    if any("slots_dead" in entry for entry in entries):
        measured = f"; of slots, on at most {HEALTH_IMAGES} images of one batch of each process"
    captions = f"Loss{accuracy} over epochs", f"Health measures over epochs{measured}"
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
            yet = (f"No {part} result yet:", subject.command(part))
            section.notes.append(yet if subject.has_classes else (f"No {part} result: {NEEDS_CLASSES}", ""))
    if not results:
        return section
    ours = [result.details.get("encoder") for result in results if result.weights == subject.which]
    section.tell_age("knn", "linear", encoders=ours)
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
    section.add_table("Summary", HEADER, summary_rows(found["slots"], found["summary"]))
    section.add_picture("health.png", "Slots by each measure")
    names = {name: name for name in ("slot", "dead", "duplicate")}
    columns = names | WORDS | {"nearest": "nearest slot"}
    rows = [[slot.get(key) for key in columns] for slot in found["slots"]]
    section.add_table("Every slot", [*columns.values()], rows)


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
    """The pictures of the galleries of the shown slots."""
    ranked = section.subject.find("rank")[0]
    section.intro = (
        f"The images of {found['data']} that a slot responds to most, and their nearest neighbors by this "
        "slot only"
        + (": first for the best slots by their own k-NN accuracy, then for the worst." if ranked else ".")
    )
    pictures = {entry["slot"]: entry["picture"] for entry in found["slots"]}
    shown = shown if ranked else [*pictures][: 2 * NUM_BEST]
    for slot in shown:
        if slot in pictures:
            section.add_picture(pictures[slot], f"What slot {slot} responds to most", GALLERY_BYTES)
    if absent := ", ".join(str(slot) for slot in shown if slot not in pictures):
        section.notes.append(
            (f"There are no galleries of slots {absent}; make them:", section.subject.command("gallery"))
        )


def _fill_neighbors(section: Section, found: Content, _shown: list[int]) -> None:
    """Nearest neighbors by whole encodings."""
    section.intro = (
        f"Neighbors are the most similar of {found['num_images']:,} images of {found['data']}, by the cosine "
        f"of whole encodings."
    )
    section.add_picture("neighbors.png", "Some images and their nearest neighbors")


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
