"""What the report says about each analysis, from the files in the run folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dino_sparo.evaluation.results import RESULTS_FILE, Result, read_results
from dino_sparo.runs.runlog import METRICS_FILE, read_metrics
from dino_sparo.slots.page import FILES, Picture, Pictures, RunFiles, Section, Table, analysed
from dino_sparo.slots.page_figures import Line, histogram, lines, number, picture_uri, series

MAP_IMAGES = 6
OVERLAY_BYTES, GALLERY_BYTES, PICTURE_BYTES = 60_000, 400_000, 1_200_000  # so that the page is under 15 MB
PANELS = {
    "Loss": (("loss",), "DINO loss"),
    "20-NN": (("knn20_top1", "knn20_top5"), "20-NN accuracy, per cent"),
    "Entropy": (("entropy_teacher", "entropy_mean"), "entropy of prototypes, nats"),
    "Spread": (("feature_std",), "feature_std"),
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
Slots = tuple[list[int], list[int]]  # best, worst


def curves(files: RunFiles) -> Section:
    """Loss, 20-NN and a few numbers of health over epochs, from metrics.jsonl."""
    section = Section("Training curves", "curves")
    path = files.folder / METRICS_FILE
    entries = [entry for entry in read_metrics(files.folder) if "epoch" in entry]
    of_slots = sorted({key for entry in entries for key in entry if key.startswith(("slot_", "slots_"))})
    panels = PANELS | {key: ((key,), key) for key in of_slots}
    plots = []
    for title, (keys, label) in panels.items():
        drawn: list[Line] = [(key, *series(entries, key)) for key in keys]
        drawn = [line for line in drawn if len(line[1])]
        if drawn:
            plot = lines(f"{title} over epochs", drawn, x_label="epoch", y_label=label)
            last = ", ".join(f"{key} {y[-1]:.4g} at the end" for key, _, y in drawn)
            plots.append(Picture(f"{label}: {last}", files.name(path), svg=plot))
    if plots:
        section.made = files.made(path)[0]
        section.blocks.append(Pictures("plots", plots))
    else:
        section.notes.append((f"No {METRICS_FILE} here: only the folder of a training run holds curves.", ""))
    return section


def accuracy(files: RunFiles) -> Section:
    """k-NN and linear accuracies from results.json: the official settings, then all others."""
    section = Section("Accuracy", "accuracy")
    path = files.folder / RESULTS_FILE
    results = read_results(files.folder) if path.is_file() else []
    for part, begins in (("knn", "knn"), ("linear", "linear")):
        if not any(result.protocol.startswith(begins) for result in results):
            section.notes.append((f"No {part} result yet:", files.commands[part]))
    if not results:
        return section
    section.made, old = files.made(path)
    if old:
        for part in ("knn", "linear"):
            section.notes.append(("Older than the newest checkpoint; make it anew:", files.commands[part]))
    header = ("protocol", "setting", "test set", "weights", "labels used", "top-1 %", "top-5 %", "images")
    for headline, caption in ((True, "Official settings"), (False, "All other settings")):
        rows = [_result_row(result) for result in results if result.headline == headline]
        if rows:
            table = Table(caption, files.name(path), header, rows, folded=not headline)
            section.blocks.append(table)
    return section


def _result_row(result: Result) -> list[str]:
    share = f"{100 * result.train_fraction:g} %"
    numbers = [number(float(value)) for value in (result.top1, result.top5)]
    return [
        *(result.protocol, result.name, result.test_set, result.weights, share),
        *(*numbers, str(result.num_images)),
    ]


def ranking(files: RunFiles) -> Section:
    """Every slot alone, and accuracy against the number of slots kept, from rank.json."""
    source = files.name(files.slots / FILES["rank"])

    def fill(section: Section, content: dict[str, Any]) -> None:
        section.intro = (
            f"Slots are scored and chosen on {content['num_select']} images of the train part of "
            f"{content['data']}; the curves are over {content['num_test']} test images, on which nothing is "
            f"chosen."
        )
        encoders = content["encoders"]
        plots = []
        for measure, label in (("knn", f"{content['k']}-NN"), ("linear", "linear")):
            drawn = [
                (f"{WAYS.get(way, way)}, {encoder['name']}", *_kept(points, measure))
                for encoder in encoders
                for way, points in encoder["curve"].items()
            ]
            styles = [
                "-" if encoder is encoders[0] else "--" for encoder in encoders for _ in encoder["curve"]
            ]
            title = f"{label} accuracy against the number of slots kept"
            plot = lines(title, drawn, x_label="kept", y_label=f"{label} top-1 %", styles=styles)
            plots.append(Picture(f"{title}, by the way of choosing", source, svg=plot))
        plots.append(_alone_plot(encoders, source))
        section.blocks.append(Pictures("plots", plots))
        section.blocks.append(Table("Half and all kept", source, *_halves(encoders, content["k"])))
        header = ("number", "place by k-NN", f"{content['k']}-NN %", "linear %")
        for encoder in encoders:
            rows = _alone_rows(encoder)
            name = f"{encoder['name']}: each part of {encoder['part_dim']} numbers alone"
            section.blocks.append(Table(name, source, header, rows, folded=encoder is not encoders[0]))

    return analysed(files, "rank", "Ranking of slots", fill)


def _kept(points: Sequence[dict[str, Any]], measure: str) -> tuple[list[float], list[float]]:
    held = [point for point in points if point.get(measure) is not None]
    return [point["kept"] for point in held], [point[measure] for point in held]


def _alone_plot(encoders: Sequence[dict[str, Any]], source: str) -> Picture:
    drawn: list[Line] = []
    for encoder in encoders:
        for measure, scores in encoder["alone"].items():
            ordered = sorted((score for score in scores if score is not None), reverse=True)
            places = list(range(1, len(ordered) + 1))
            drawn.append((f"{WAYS.get(measure, measure)}, {encoder['name']}", places, ordered))
    title = "Scores of single slots, best first"
    plot = lines(title, drawn, x_label="place", y_label="top-1 %")
    return Picture(f"{title}, on the part of train that chooses", source, svg=plot)


def _halves(
    encoders: Sequence[dict[str, Any]], k: int
) -> tuple[tuple[str, str, str, str, str], list[list[str]]]:
    rows = []
    for encoder in encoders:
        half = {WAYS.get(way, way): found for way, found in encoder["half"].items()}
        for way, found in (*half.items(), ("all", encoder["all"] | {"kept": encoder["num_parts"]})):
            scores = [number(found[measure]) for measure in ("knn", "linear")]
            rows.append([encoder["name"], way, str(found["kept"]), *scores])
    return ("encoder", "chosen by", "kept", f"{k}-NN %", "linear %"), rows


def _alone_rows(encoder: dict[str, Any]) -> list[list[str]]:
    place = {part: place for place, part in enumerate(encoder["orders"]["knn"], 1)}
    alone = encoder["alone"]
    return [
        [str(part), number(place.get(part)), number(knn), number(linear)]
        for part, (knn, linear) in enumerate(zip(alone["knn"], alone["linear"], strict=True))
    ]


def health(files: RunFiles) -> Section:
    """Summary, histograms and the table of all slots, from health.json."""
    source = files.name(files.slots / FILES["health"])

    def fill(section: Section, content: dict[str, Any]) -> None:
        slots = content["slots"]
        section.intro = f"Over {content['num_images']} images of {content['data']}."
        summary = [[name, number(value, 4)] for name, value in content["summary"].items()]
        section.blocks.append(Table("Summary", source, ("measure", "value"), summary))
        plots = []
        for key, label in HEALTH.items():
            values = [float(slot[key]) for slot in slots if slot.get(key) is not None]
            if values:
                plot = histogram(f"Slots by {label}", values, x_label=label)
                plots.append(Picture(f"Slots by {label}", source, svg=plot))
        section.blocks.append(Pictures("plots", plots))
        header = ("slot", *HEALTH, "nearest", "dead")
        keys = ("slot", *HEALTH, "nearest", "dead")
        rows = [[number(slot.get(key), 4) for key in keys] for slot in slots]
        section.blocks.append(Table("Every slot", source, header, rows))

    return analysed(files, "health", "Health of slots", fill)


def maps(files: RunFiles, shown: Slots) -> Section:
    """The grid of attention maps, and overlays of the best and worst slots, from maps.json."""
    folder = files.slots / "maps"

    def fill(section: Section, content: dict[str, Any]) -> None:
        section.intro = f"Attention ({content['which']}) over images of {content['data']}."
        _add(section, files, "wide", [(folder / content["grid"], "Images, CLS token, slots")], PICTURE_BYTES)
        wanted, drawn = [*shown[0], *shown[1]], content["slots"]
        chosen = [slot for slot in wanted if slot in drawn] or drawn[: len(wanted)]
        absent = [slot for slot in wanted if slot not in drawn]
        if absent:
            listed = ",".join(map(str, wanted))
            command = f"{files.commands['maps']} --slots '[{listed}]'"
            section.notes.append(
                (f"No maps of slots {', '.join(map(str, absent))}; they are drawn by", command)
            )
        overlays = zip(content["overlays"].values(), content["images"], strict=True)
        for pictures, name in list(overlays)[:MAP_IMAGES]:
            entries = [(folder / pictures["cls"], f"CLS token, {name}")] if pictures.get("cls") else []
            entries += [
                (folder / pictures[str(slot)], f"{_role(slot, shown)}, {name}")
                for slot in chosen
                if str(slot) in pictures
            ]
            _add(section, files, "small", entries, OVERLAY_BYTES)

    return analysed(files, "maps", "Where slots look", fill)


def gallery(files: RunFiles, shown: Slots) -> Section:
    """The pictures of the best and worst slots' galleries, from gallery.json."""
    folder = files.slots / "gallery"

    def fill(section: Section, content: dict[str, Any]) -> None:
        section.intro = (
            f"The images of {content['data']} that a slot responds to most, and their nearest "
            f"neighbours within the slot's own numbers."
        )
        found = {entry["slot"]: entry for entry in content["slots"]}
        wanted = [*shown[0], *shown[1]]
        absent = [slot for slot in wanted if slot not in found]
        if absent:
            listed = ", ".join(map(str, absent))
            section.notes.append((f"No gallery of slots {listed}; made by", files.commands["gallery"]))
        entries = [
            (folder / found[slot]["picture"], _role(slot, shown) + _most(found[slot]))
            for slot in wanted
            if slot in found
        ]
        _add(section, files, "wide", entries, GALLERY_BYTES)

    return analysed(files, "gallery", "Galleries of the best and worst slots", fill)


def _most(entry: dict[str, Any]) -> str:
    return f"; most: {entry['top'][0]['image']}" if entry["top"] else ""


def _role(slot: int, shown: Slots) -> str:
    if slot in shown[0]:
        return f"slot {slot} (best, place {shown[0].index(slot) + 1})"
    if slot in shown[1]:
        return f"slot {slot} (worst, {len(shown[1]) - shown[1].index(slot)} from the end)"
    return f"slot {slot}"


def _add(
    section: Section, files: RunFiles, kind: str, entries: Sequence[tuple[Path, str]], max_bytes: int
) -> None:
    """Add pictures from files; one that cannot be read leaves a note."""
    pictures = []
    for path, caption in entries:
        try:
            pictures.append(Picture(caption, files.name(path), uri=picture_uri(path, max_bytes)))
        except OSError:
            section.notes.append((f"{files.name(path)} is missing or no picture.", ""))
    if pictures:
        section.blocks.append(Pictures(kind, pictures))


def mask(files: RunFiles) -> Section:
    """Initial, masked and relative change, from mask.json."""
    path = files.slots / FILES["mask"]

    def fill(section: Section, content: dict[str, Any]) -> None:
        transfer = f", and tried on {content['transfer']}" if content.get("transfer") else ""
        section.intro = f"A mask learned on {content['data']} with a frozen encoder{transfer}."
        header = ("encoder", "mask over", "test set", "initial %", "masked %", "relative change %", "kept")
        keys = ("encoder", "over", "test_set", "initial", "masked", "relative_change", "kept")
        rows = [[number(row[key]) for key in keys] for row in content["rows"]]
        section.blocks.append(Table("Learned masks", files.name(path), header, rows))
        _add(section, files, "wide", [(path.with_suffix(".png"), "The learned masks")], PICTURE_BYTES)

    return analysed(files, "mask", "Learned masks", fill)


def factors(files: RunFiles) -> Section:
    """How well each slot tells each factor, from factors.json."""
    source = files.name(files.slots / FILES["factors"])

    def fill(section: Section, content: dict[str, Any]) -> None:
        names, chance = list(content["factors"]), content["chance"]
        section.intro = (
            f"Accuracy in per cent of a probe on each slot alone, learned on {content['num_train']} and "
            f"tested on {content['num_test']} generated pictures. Colour runs from chance to 100 %."
        )
        for encoder in content["encoders"]:
            named = [(f"slot {slot}", scores) for slot, scores in enumerate(encoder.get("alone") or [])]
            named.append(("whole encoding", [encoder["whole"][name] for name in names]))
            named.append(("chance", [chance[name] for name in names]))
            rows = [[name, *(number(score) for score in scores)] for name, scores in named]
            heat = [[None, *map(_above, scores, (chance[name] for name in names))] for _, scores in named]
            section.blocks.append(Table(encoder["name"], source, ("", *names), rows, heat))

    return analysed(files, "factors", "Known factors", fill)


def _above(score: float | None, chance: float) -> float | None:
    """Where a score lies between chance and 100 per cent."""
    if score is None or chance >= 100:
        return None
    return round(min(1.0, max(0.0, (score - chance) / (100 - chance))), 3)


def all_sections(files: RunFiles, shown: Slots) -> list[Section]:
    """Every section in the order of the page."""
    plain: list[Callable[[RunFiles], Section]] = [curves, accuracy, ranking, health]
    sections = [make(files) for make in plain]
    return [*sections, maps(files, shown), gallery(files, shown), mask(files), factors(files)]
