"""`dino-sparo slots report`: one HTML page of a run, and the analyses that it lacks."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dino_sparo.data.generated import SHAPES
from dino_sparo.data.sources import open_labelled
from dino_sparo.errors import UnlabelledError, UserError
from dino_sparo.evaluation.results import results_folder
from dino_sparo.files import write_file
from dino_sparo.models import Encoder
from dino_sparo.runs.rundir import CONFIG_FILE, STARTS_FILE
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.slots.compared import open_control
from dino_sparo.slots.page import FILES, RunFiles, damaged, render, slots_to_show
from dino_sparo.slots.page_sections import all_sections
from dino_sparo.slots.program import open_slots, output_folder, slots_folder

if TYPE_CHECKING:
    from dino_sparo.options.slots import SlotReportOptions

PAGE_FILE = "report.html"
OF_CLASSES = ("rank", "mask")  # analyses that need labelled images


def run(options: "SlotReportOptions") -> None:
    """Make what is missing or about others if there is data for it, then write `report.html` beside it."""
    encoder, _ = open_slots(options)
    assert encoder.readout is not None
    folder = results_folder(options.run)
    asked = {"which": options.which} | ({"data": options.data.path} if options.data is not None else {})
    if options.control:
        open_control(options.control, options.which)
        asked["control"] = options.control
    no_classes = without_classes(options.data.path) if options.data is not None else ""
    files = RunFiles(folder, slots_folder(options), commands(options, not no_classes), asked)
    config = read_config(folder)
    if options.data is not None:
        trained_on = config.get("data", {}).get("path")
        has_factors = SHAPES in (trained_on, options.data.path)
        make_missing(options, files, encoder.readout.num_slots, not no_classes, has_factors)
    shown = slots_to_show(files, encoder.readout.num_slots)
    text = render(
        Path(options.run).resolve().name,
        describe(options, encoder) | describe_training(folder),
        all_sections(files, shown),
        (folder / CONFIG_FILE).read_text(encoding="utf-8") if config else None,
    )
    path = output_folder(options, ".") / PAGE_FILE
    write_file(path, text)
    missing = [name for name, file in FILES.items() if not (files.slots / file).is_file()]
    for name in missing:
        print(f"not on the page: {name}; made by  {files.commands[name]}")
    if no_classes:
        print(f"rank and mask are left out, since they need classes: {no_classes}")
    print(f"report ({path.stat().st_size / 1e6:.1f} MB): {path}")


def without_classes(path: str) -> str:
    """Why rank and mask cannot be made of these images; empty if they can.

    Raises:
        UserError: there is another mistake in the images.
    """
    try:
        open_labelled(path)
    except UnlabelledError as error:
        return str(error)
    return ""


def commands(options: "SlotReportOptions", has_classes: bool) -> dict[str, str]:
    """For each part of the page the command line that makes it, on the given images if they will do."""
    data = shlex.quote(options.data.path) if options.data is not None else "DIR"
    labelled = data if has_classes else "DIR"
    which = "" if options.which == "teacher" else f" --which {options.which}"
    out = f" --out {shlex.quote(options.out)}" if options.out else ""
    control = f" --control {shlex.quote(options.control)}" if options.control else ""
    run = shlex.quote(options.run)
    found = {name: f"dino-sparo {name} {run} --data.path {labelled}{which}" for name in ("knn", "linear")}
    for name in FILES:
        needs = "" if name == "factors" else f" --data.path {labelled if name in OF_CLASSES else data}"
        compared = control if name in ("rank", "mask", "factors") else ""
        found[name] = f"dino-sparo slots {name} {run}{needs}{compared}{which}{out}"
    return found


def make_missing(
    options: "SlotReportOptions", files: RunFiles, num_slots: int, has_classes: bool, has_factors: bool
) -> None:
    """Run the commands whose results are not there; the ranking first, as it chooses what is drawn.

    What needs classes is left out for images without, and factors for pictures whose factors are unknown.
    """
    from dino_sparo.options.evaluating import LabelledDataOptions
    from dino_sparo.options.slots import (
        ImagesOptions,
        SlotFactorsOptions,
        SlotGalleryOptions,
        SlotHealthOptions,
        SlotMapsOptions,
        SlotMaskOptions,
        SlotRankOptions,
    )
    from dino_sparo.slots import factors, gallery, health, maps, masks, ranking

    assert options.data is not None
    common: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("run", "which", "out", "device", "num_workers", "batch_size")
    }
    images, labelled = ImagesOptions(options.data.path), LabelledDataOptions(options.data.path)
    compared = common | {"control": options.control}

    def lacks(name: str) -> bool:
        content = files.read(name)
        return content is None or bool(files.of_others(content))

    if has_classes and lacks("rank"):
        ranking.run(SlotRankOptions(**compared, data=labelled))
    best, worst = slots_to_show(files, num_slots)
    if has_classes and lacks("mask"):
        masks.run(SlotMaskOptions(**compared, data=labelled))
    if lacks("health"):
        health.run(SlotHealthOptions(**common, data=images))
    if lacks("maps"):
        maps.run(SlotMapsOptions(**common, data=images, slots=[*best, *worst]))
    if lacks("gallery"):
        gallery.run(SlotGalleryOptions(**common, data=images, slots=[*best, *worst]))
    if has_factors and lacks("factors"):
        factors.run(SlotFactorsOptions(**compared))


def describe(options: "SlotReportOptions", encoder: Encoder) -> dict[str, str]:
    """What the encoder is, for the head of the page."""
    assert encoder.readout is not None
    backbone, num_slots = encoder.backbone, encoder.readout.num_slots
    side = backbone.native_grid * backbone.patch_size
    return {
        "Run": options.run,
        "Weights": options.which,
        "Slots": f"{num_slots} of {encoder.embed_dim // num_slots} numbers",
        "Encoding": f"{encoder.embed_dim} numbers",
        "Backbone": f"{len(backbone.blocks)} blocks, width {backbone.cls_token.shape[-1]}",
        "Images": f"{side} × {side} pixels, patches of {backbone.patch_size}",
        "Parameters": f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
    }


def describe_training(folder: Path) -> dict[str, str]:
    """What a run folder tells of its training; nothing beside a weights file."""
    facts: dict[str, str] = {}
    path = folder / STARTS_FILE
    if path.is_file():
        try:
            starts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            first, last = starts[0], starts[-1]
            command = last["command"]
            if "--config" in command[:-1]:
                facts["Recipe"] = command[command.index("--config") + 1]
            facts["Started"] = first["time"] + (f", {len(starts)} starts" if len(starts) > 1 else "")
            facts["Trained on"] = f"{last['device']}, {last['precision']}, processes: {last['processes']}"
            facts["Versions"] = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
            if last.get("git"):
                facts["Source"] = last["git"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}), expected one JSON object a line; restore or remove it"
            ) from error
    entries = [entry for entry in read_metrics(folder) if "epoch" in entry]
    if entries:
        facts["Trained for"] = f"{entries[-1]['epoch']:g} epochs, {entries[-1]['step']} steps"
    return facts


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved options of a run, empty where there are none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise damaged(path, error, "dino-sparo pretrain") from error
    return config if isinstance(config, dict) else {}
