"""One HTML page of a run, from the files of its folder: each figure with the name of its file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dino_sparo.errors import UserError
from dino_sparo.evaluation.results import RESULTS_FILE, read_results
from dino_sparo.files import write_file
from dino_sparo.models import Encoder
from dino_sparo.runs.rundir import CONFIG_FILE, read_starts
from dino_sparo.runs.runlog import METRICS_FILE, read_metrics
from dino_sparo.slots.page_figures import histogram, lines, number, picture_uri

FILES = {name: f"{name}/{name}.json" for name in ("rank", "health", "maps", "gallery", "mask", "factors")}
NUM_BEST = 4  # slots shown from either end of the ranking
MAP_IMAGES = 6
OVERLAY_BYTES, GALLERY_BYTES, PICTURE_BYTES = 60_000, 400_000, 1_200_000  # so that the page is under 15 MB
CURVES = {  # keys of the log, title and label of each plot
    ("loss",): ("Loss", "DINO loss"),
    ("knn20_top1", "knn20_top5"): ("20-NN", "20-NN accuracy, per cent"),
    ("entropy_teacher", "entropy_mean"): ("Entropy", "entropy of prototypes, nats"),
    ("feature_std",): ("Spread", "feature_std"),
}
WAYS = {"knn": "k-NN alone", "linear": "linear alone", "greedy": "greedy"}
HEALTH = {
    "entropy": "entropy of attention, nats",
    "effective_patches": "effective number of patches",
    "cls_share": "share of attention on CLS",
    "response_std": "spread of the response",
    "overlap": "overlap with the nearest slot",
    "agreement": "agreement of student and teacher",
}
WRONG_CONTENT = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # of a damaged file


@dataclass(frozen=True)
class RunFiles:
    """Where the files of a run lie, and which command makes which part.

    folder: what `results.json` and, of a run folder, `metrics.jsonl` lie in. slots: what the commands about
    slots wrote. commands: name of a part -> the command line that makes it. asked: whose weights, and if they
    are given images and control, the page is about; an analysis of others is not shown.
    """

    folder: Path
    slots: Path
    commands: Mapping[str, str]
    asked: Mapping[str, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """As captions call a file: within the run folder if it lies there."""
        inside = path.resolve().is_relative_to(self.folder.resolve())
        return str(path.resolve().relative_to(self.folder.resolve())) if inside else str(path)

    def read(self, part: str) -> dict[str, Any] | None:
        """The JSON of one analysis, None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = self.slots / FILES[part]
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("no object of names and values")
        except ValueError as error:
            raise self.damaged(part, error) from error
        return content

    def damaged(self, part: str, error: Exception) -> UserError:
        """What to say of an analysis whose file does not hold what it should."""
        return _damaged(self.slots / FILES[part], error, self.commands[part])

    def of_others(self, content: Mapping[str, Any]) -> str:
        """By what an analysis is not about what is asked for; empty if it is."""
        differing = [key for key, value in self.asked.items() if key in content and content[key] != value]
        return ", ".join(f"{key} {content[key]}" for key in differing)

    def lack(self, part: str) -> bool:
        """Whether an analysis is not there, or about others."""
        content = self.read(part)
        return content is None or bool(self.of_others(content))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved options of a run, empty where there are none."""
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return {}
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise _damaged(path, error, "dino-sparo pretrain") from error
        return config if isinstance(config, dict) else {}


def _damaged(path: Path, error: Exception, command: str) -> UserError:
    reason = f"no {error}" if isinstance(error, KeyError) else error
    return UserError(f"{path} is damaged ({reason}); remove it, and make it again with `{command}`")


@dataclass
class Section:
    """One part of the page: `notes` are a line of text and, if it helps, a command; blocks are tables and
    rows of pictures, as the template takes them. `path`: the file that the numbers come from."""

    title: str
    anchor: str
    files: RunFiles
    path: Path
    intro: str = ""
    made: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def source(self) -> str:
        return self.files.name(self.path)

    def note_commands(self, text: str, *parts: str) -> None:
        """A line of text with the command that makes it, for each of these parts."""
        self.notes += [(text, self.files.commands[part]) for part in parts]

    def tell_age(self, *parts: str) -> None:
        """Say when the file was written, and where the run has a newer checkpoint, what makes it again."""
        seconds = self.path.stat().st_mtime
        self.made = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        checkpoints = (self.files.folder / "checkpoints").glob("*.pt")
        if any(checkpoint.stat().st_mtime > seconds for checkpoint in checkpoints):
            self.note_commands("Older than the newest checkpoint; make it again:", *parts)

    def add_table(
        self,
        caption: str,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        heat: Sequence[Sequence[float | None]] | None = None,
        folded: bool = False,
    ) -> None:
        """Rows of text; `heat` colors a cell by a share of 0 to 1. A folded one shows when it is opened."""
        table = {"caption": caption, "source": self.source, "header": header, "rows": rows}
        self.blocks.append(table | {"kind": "table", "heat": heat, "folded": folded})

    def add_plots(self, plots: Sequence[tuple[str, Markup]]) -> None:
        """Captions and plots, side by side."""
        pictures = [{"caption": caption, "source": self.source, "svg": svg} for caption, svg in plots]
        self.blocks.append({"kind": "plots", "pictures": pictures})

    def add_pictures(self, kind: str, entries: Sequence[tuple[str, str]], max_bytes: int) -> None:
        """Picture files beside the section's, with captions, `small` or `wide`; one that cannot be read
        leaves a note."""
        pictures = []
        for file, caption in entries:
            path = self.path.with_name(file)
            try:
                uri = picture_uri(path, max_bytes)
            except OSError:
                self.notes.append((f"{self.files.name(path)} is missing or no picture.", ""))
            else:
                pictures.append({"caption": caption, "source": self.files.name(path), "uri": uri})
        if pictures:
            self.blocks.append({"kind": kind, "pictures": pictures})


def write_page(path: Path, files: RunFiles, encoder: Encoder, *, run: str, which: str) -> None:
    """Write the page of a run as one HTML file, which opens without network.

    Args:
        encoder: that of the run, with slots.
        run: run folder or weights file.
        which: whose weights the encoder has.

    Raises:
        UserError: a file of the run is damaged.
    """
    facts = describe(encoder, run, which) | describe_training(files.folder)
    config = (files.folder / CONFIG_FILE).read_text(encoding="utf-8") if files.config else None
    sections = all_sections(files, encoder.num_slots)
    write_file(path, render(Path(run).resolve().name, facts, sections, config))


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section], config: str | None) -> str:
    """The HTML of the page.

    Args:
        title: name of the run.
        facts: what the head tells, name -> text.
        sections: in their order.
        config: text of the run's config.yaml, None without.
    """
    environment = Environment(
        loader=PackageLoader("dino_sparo.slots"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, facts=facts, sections=sections, config=config, written=written)


def describe(encoder: Encoder, run: str, which: str) -> dict[str, str]:
    """What the encoder is, for the head of the page."""
    backbone, num_slots = encoder.backbone, encoder.num_slots
    side = backbone.native_grid * backbone.patch_size
    return {
        "Run": run,
        "Weights": which,
        "Slots": f"{num_slots} of {encoder.embed_dim // num_slots} numbers",
        "Encoding": f"{encoder.embed_dim} numbers",
        "Backbone": f"{len(backbone.blocks)} blocks, width {backbone.cls_token.shape[-1]}",
        "Images": f"{side} × {side} pixels, patches of {backbone.patch_size}",
        "Parameters": f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
    }


def describe_training(folder: Path) -> dict[str, str]:
    """What a run folder tells of its training; nothing beside a weights file."""
    facts: dict[str, str] = {}
    starts = read_starts(folder)
    if starts:
        first, last = starts[0], starts[-1]
        command = last["command"]
        if "--config" in command[:-1]:
            facts["Recipe"] = command[command.index("--config") + 1]
        facts["Started"] = first["time"] + (f", {len(starts)} starts" if len(starts) > 1 else "")
        facts["Trained on"] = f"{last['device']}, {last['precision']}, processes: {last['processes']}"
        facts["Versions"] = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
        if last.get("git"):
            facts["Source"] = last["git"]
    entries = [entry for entry in read_metrics(folder) if "epoch" in entry]
    if entries:
        facts["Trained for"] = f"{entries[-1]['epoch']:g} epochs, {entries[-1]['step']} steps"
    return facts


def slots_to_show(files: RunFiles, num_slots: int) -> tuple[list[int], list[int]]:
    """The best and the worst slots by k-NN alone, best first in both; without a ranking the first ones.

    Few slots are all shown, each once.
    """
    ranked = files.read("rank")
    try:
        shown = ranked if ranked and not files.of_others(ranked) else None
        order = [int(slot) for slot in shown["encoders"][0]["orders"]["knn"]] if shown else []
    except WRONG_CONTENT as error:
        raise files.damaged("rank", error) from error
    order = order or list(range(min(num_slots, 2 * NUM_BEST)))
    best = order[:NUM_BEST]
    return best, [slot for slot in order[-NUM_BEST:] if slot not in best]


def all_sections(files: RunFiles, num_slots: int) -> list[Section]:
    """Every section in the order of the page: each analysis, or the command that makes it.

    Raises:
        UserError: a file is damaged.
    """
    best, worst = slots_to_show(files, num_slots)
    roles = {slot: f"slot {slot} (best, place {place})" for place, slot in enumerate(best, 1)} | {
        slot: f"slot {slot} (worst, {len(worst) - place} from the end)" for place, slot in enumerate(worst)
    }
    fills: dict[str, tuple[str, Callable[[Section, dict[str, Any], dict[int, str]], None]]] = {
        "rank": ("Ranking of slots", _fill_rank),
        "health": ("Health of slots", _fill_health),
        "maps": ("Where slots look", _fill_maps),
        "gallery": ("Galleries of the best and worst slots", _fill_gallery),
        "mask": ("Learned masks", _fill_mask),
        "factors": ("Known factors", _fill_factors),
    }
    sections = [_curves(files), _accuracy(files)]
    for part, (title, fill) in fills.items():
        section = Section(title, part, files, files.slots / FILES[part])
        sections.append(section)
        found = files.read(part)
        if found is None:
            section.note_commands("Not made yet:", part)
        elif others := files.of_others(found):
            section.note_commands(f"Not shown, since made with {others}; make it again:", part)
        else:
            section.tell_age(part)
            try:
                fill(section, found, roles)
            except WRONG_CONTENT as error:
                raise files.damaged(part, error) from error
    return sections


def _curves(files: RunFiles) -> Section:
    """Loss, 20-NN and a few numbers of health over epochs, from metrics.jsonl."""
    section = Section("Training curves", "curves", files, files.folder / METRICS_FILE)
    entries = [entry for entry in read_metrics(files.folder) if "epoch" in entry]
    of_slots = sorted({key for entry in entries for key in entry if key.startswith(("slot_", "slots_"))})
    plots = []
    for keys, (title, label) in (CURVES | {(key,): (key, key) for key in of_slots}).items():
        drawn = []
        for key in keys:
            held = [entry for entry in entries if entry.get(key) is not None]
            if held:
                drawn.append((key, [entry["epoch"] for entry in held], [entry[key] for entry in held]))
        if drawn:
            last = ", ".join(f"{key} {y[-1]:.4g} at the end" for key, _, y in drawn)
            plot = lines(f"{title} over epochs", drawn, x_label="epoch", y_label=label)
            plots.append((f"{label}: {last}", plot))
    if plots:
        section.tell_age()
        section.add_plots(plots)
    else:
        section.notes.append((f"No {METRICS_FILE} here: only the folder of a training run holds curves.", ""))
    return section


def _accuracy(files: RunFiles) -> Section:
    """k-NN and linear accuracies from results.json: the official settings, then all others."""
    section = Section("Accuracy", "accuracy", files, files.folder / RESULTS_FILE)
    results = read_results(files.folder) if section.path.is_file() else []
    for part in ("knn", "linear"):
        if not any(result.protocol.startswith(part) for result in results):
            section.note_commands(f"No {part} result yet:", part)
    if not results:
        return section
    section.tell_age("knn", "linear")
    header = ("protocol", "setting", "test set", "weights", "labels used", "top-1 %", "top-5 %", "images")
    for headline, caption in ((True, "Official settings"), (False, "All other settings")):
        rows = [
            [
                *(result.protocol, result.name, result.test_set, result.weights),
                *(f"{100 * result.train_fraction:g} %", f"{result.top1:.2f}", f"{result.top5:.2f}"),
                str(result.num_images),
            ]
            for result in results
            if result.headline == headline
        ]
        if rows:
            section.add_table(caption, header, rows, folded=not headline)
    return section


def _fill_rank(section: Section, found: dict[str, Any], _roles: dict[int, str]) -> None:
    """Every slot alone, and accuracy against the number of slots kept."""
    section.intro = (
        f"Slots are scored and chosen on {found['num_select']} images of the train part of {found['data']}; "
        f"the curves are over {found['num_test']} test images, on which nothing is chosen."
    )
    encoders, k = found["encoders"], found["k"]
    plots = []
    for measure, label in (("knn", f"{k}-NN"), ("linear", "linear")):
        drawn = [
            (f"{WAYS[way]}, {one['name']}", [at["kept"] for at in points], [at[measure] for at in points])
            for one in encoders
            for way, points in one["curve"].items()
        ]
        styles = ["-" if one is encoders[0] else "--" for one in encoders for _ in one["curve"]]
        title = f"{label} accuracy against the number of slots kept"
        plot = lines(title, drawn, x_label="kept", y_label=f"{label} top-1 %", styles=styles)
        plots.append((f"{title}, by the way of choosing", plot))
    alone = [
        (f"{WAYS[measure]}, {one['name']}", range(1, len(scores) + 1), sorted(scores, reverse=True))
        for one in encoders
        for measure, scores in one["alone"].items()
    ]
    title = "Scores of single slots, best first"
    plot = lines(title, alone, x_label="place", y_label="top-1 %")
    section.add_plots([*plots, (f"{title}, on the part of train that chooses", plot)])
    rows = []
    for one in encoders:
        halves = {WAYS[way]: half for way, half in one["half"].items()}
        for way, at in (halves | {"all": one["all"] | {"kept": one["num_parts"]}}).items():
            rows.append([one["name"], way, str(at["kept"]), number(at["knn"]), number(at["linear"])])
    section.add_table("Half and all kept", ("encoder", "chosen by", "kept", f"{k}-NN %", "linear %"), rows)
    for one in encoders:
        place = {part: place for place, part in enumerate(one["orders"]["knn"], 1)}
        rows = [
            [str(part), str(place[part]), number(knn), number(linear)]
            for part, (knn, linear) in enumerate(
                zip(one["alone"]["knn"], one["alone"]["linear"], strict=True)
            )
        ]
        caption = f"{one['name']}: each part of {one['part_dim']} numbers alone"
        header = ("number", "place by k-NN", f"{k}-NN %", "linear %")
        section.add_table(caption, header, rows, folded=one is not encoders[0])


def _fill_health(section: Section, found: dict[str, Any], _roles: dict[int, str]) -> None:
    """Summary, histograms and the table of all slots."""
    slots = found["slots"]
    section.intro = f"Over {found['num_images']} images of {found['data']}."
    summary = [[name, number(value, 4)] for name, value in found["summary"].items()]
    section.add_table("Summary", ("measure", "value"), summary)
    plots = []
    for key, label in HEALTH.items():
        values = [float(slot[key]) for slot in slots if slot.get(key) is not None]
        if values:
            plots.append((f"Slots by {label}", histogram(f"Slots by {label}", values, x_label=label)))
    section.add_plots(plots)
    columns = ("slot", *HEALTH, "nearest", "dead")
    section.add_table(
        "Every slot", columns, [[number(slot.get(key), 4) for key in columns] for slot in slots]
    )


def _fill_maps(section: Section, found: dict[str, Any], roles: dict[int, str]) -> None:
    """The grid of attention maps, and overlays of the best and worst slots."""
    section.intro = f"Attention ({found['which']}) over images of {found['data']}."
    section.add_pictures("wide", [(found["grid"], "Images, CLS token, slots")], PICTURE_BYTES)
    drawn = found["slots"]
    absent = ", ".join(str(slot) for slot in roles if slot not in drawn)
    if absent:
        command = f"{section.files.commands['maps']} --slots '[{','.join(map(str, roles))}]'"
        section.notes.append((f"No maps of slots {absent}; they are drawn by", command))
    shown = {slot: role for slot, role in roles.items() if slot in drawn}
    shown = shown or {slot: f"slot {slot}" for slot in drawn[: len(roles)]}
    overlays = zip(found["overlays"].values(), found["images"], strict=True)
    for pictures, name in list(overlays)[:MAP_IMAGES]:
        of_slots = [(pictures[str(slot)], f"{role}, {name}") for slot, role in shown.items()]
        section.add_pictures("small", [(pictures["cls"], f"CLS token, {name}"), *of_slots], OVERLAY_BYTES)


def _fill_gallery(section: Section, found: dict[str, Any], roles: dict[int, str]) -> None:
    """The pictures of the best and worst slots' galleries."""
    section.intro = (
        f"The images of {found['data']} that a slot responds to most, and their nearest neighbors within the "
        f"slot's own numbers."
    )
    galleries = {entry["slot"]: entry for entry in found["slots"]}
    absent = ", ".join(str(slot) for slot in roles if slot not in galleries)
    if absent:
        section.note_commands(f"No gallery of slots {absent}; made by", "gallery")
    entries = []
    for slot in filter(galleries.get, roles):
        most = [top["image"] for top in galleries[slot]["top"][:1]]
        entries.append((galleries[slot]["picture"], "; most: ".join([roles[slot], *most])))
    section.add_pictures("wide", entries, GALLERY_BYTES)


def _fill_mask(section: Section, found: dict[str, Any], _roles: dict[int, str]) -> None:
    """Initial, masked and relative change."""
    transfer = f", and tried on {found['transfer']}" if found.get("transfer") else ""
    section.intro = f"A mask learned on {found['data']} with a frozen encoder{transfer}."
    header = ("encoder", "mask over", "test set", "initial %", "masked %", "relative change %", "kept")
    keys = ("encoder", "over", "test_set", "initial", "masked", "relative_change", "kept")
    rows = [[number(row[key]) for key in keys] for row in found["rows"]]
    section.add_table("Learned masks", header, rows)
    section.add_pictures("wide", [("mask.png", "The learned masks")], PICTURE_BYTES)


def _fill_factors(section: Section, found: dict[str, Any], _roles: dict[int, str]) -> None:
    """How well each slot tells each factor."""
    names, chance = list(found["factors"]), [found["chance"][name] for name in found["factors"]]
    section.intro = (
        f"Accuracy in per cent of a probe on each slot alone, learned on {found['num_train']} and tested on "
        f"{found['num_test']} generated pictures. Color runs from chance to 100 %."
    )
    for one in found["encoders"]:
        scores = {f"slot {slot}": row for slot, row in enumerate(one["alone"])}
        scores |= {"whole encoding": [one["whole"][name] for name in names], "chance": chance}
        heat = [
            [None, *(_above(score, guess) for score, guess in zip(row, chance, strict=True))]
            for row in scores.values()
        ]
        rows = [[name, *map(number, row)] for name, row in scores.items()]
        section.add_table(one["name"], ("", *names), rows, heat=heat)


def _above(score: float, chance: float) -> float | None:
    """Where a score lies between chance and 100 per cent."""
    return None if chance >= 100 else round(min(1.0, max(0.0, (score - chance) / (100 - chance))), 3)
