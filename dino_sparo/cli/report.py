"""`dino-sparo slots report`: what is missing is made by the other commands about slots, then the page."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dino_sparo.cli import slots
from dino_sparo.cli.images import ImagesOptions, LabeledDataOptions, choice_of
from dino_sparo.errors import TooFewImagesError, UnlabeledError

if TYPE_CHECKING:
    from dino_sparo.slots.subject import Subject

MOST_SEARCHED = 5000  # images of which the report shows neighbors, for encoders without slots


@dataclass
class ReportDataOptions(LabeledDataOptions):
    """Any images; in class folders, slots are ranked and masks learned too."""


@dataclass(kw_only=True)
class SlotReportOptions(slots.SlotsOptions):
    """One HTML page of a run, that opens from a file without network."""

    data: ReportDataOptions | None = None
    """Images for the analyses that the run folder lacks; null: show only those that exist."""
    control: str | None = None
    """Run without slots to compare with in these analyses."""


def report(options: SlotReportOptions) -> None:
    """Make what is missing or about others if there is data for it, then write `report.html` beside it."""
    from dino_sparo.data.sources import open_images, open_labeled
    from dino_sparo.evaluation.features import hash_of, hash_of_some
    from dino_sparo.slots.page import write_page
    from dino_sparo.slots.subject import FILES, OF_CLASSES, WITHOUT_SLOTS, Subject

    encoder = slots.open_encoder(options, with_slots=False)
    states = {"encoder": hash_of(encoder)}
    if options.control:
        states["control_encoder"] = hash_of(slots.open_control(options.control, options.which))
    data, no_classes = options.data, ""
    if data:
        states["image_files"] = hash_of_some(open_images(data.path, choice=choice_of(_images(data), encoder)))
        try:
            labeled = open_labeled(data.path, choice=choice_of(data, encoder))
            states["labeled_files"] = hash_of_some(*labeled)
        except (TooFewImagesError, UnlabeledError) as error:
            no_classes = str(error)
    path, choice = (data.path, slots.further(data)) if data else (None, {})
    subject = Subject(
        *(options.run, options.out, options.which, path, options.control, not no_classes, choice, states)
    )
    if data:
        _make_missing(options, subject, data, encoder.num_slots)
    page = subject.slots / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, subject, encoder)
    parts = FILES if encoder.num_slots else WITHOUT_SLOTS
    for name in parts:
        if not (subject.slots / FILES[name]).is_file() and not (no_classes and name in OF_CLASSES):
            print(f"not on the page: {name}; to make it:  {subject.command(name)}")
    if not encoder.num_slots:
        shown = "curves, accuracy, maps, and neighbors are shown"
        print(f"the read-out {encoder.readout_name} has no slots: {shown}")
    elif no_classes:
        print(f"rank and mask are left out: {no_classes}")
    print(f"report ({page.stat().st_size / 1e6:.1f} MB): {page}")


def _make_missing(
    options: SlotReportOptions, subject: "Subject", labeled: LabeledDataOptions, num_slots: int
) -> None:
    """Run the commands whose results are not there; the ranking first, as it chooses what is drawn.

    What needs classes is left out for images without, and factors for pictures whose factors are unknown.
    """
    from dino_sparo.data.shapes import SHAPES

    common: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("run", "which", "out", "device", "num_workers", "batch_size")
    }
    images = _images(labeled)
    compared = common | {"control": options.control}

    def lacks(part: str) -> bool:
        return subject.find(part)[0] is None

    if num_slots and subject.has_classes and lacks("rank"):
        try:
            slots.rank(slots.SlotRankOptions(**compared, data=labeled))
        except TooFewImagesError as error:  # the rest of the page needs no ranking
            print(f"no ranking of slots: {error}")
    drawn = subject.slots_to_show(num_slots) or None
    if lacks("maps"):
        slots.maps(slots.SlotMapsOptions(**compared, data=images, slots=drawn))
    if num_slots and lacks("gallery"):
        slots.gallery(slots.SlotGalleryOptions(**common, data=images, slots=drawn))
    if lacks("neighbors"):
        most = None if num_slots else MOST_SEARCHED  # with slots, the gallery has encoded all of them
        slots.neighbors(slots.SlotNeighborsOptions(**common, data=images, max_images=most))
    if not num_slots:
        return
    if subject.has_classes and lacks("mask"):
        slots.mask(slots.SlotMaskOptions(**compared, data=labeled))
    if lacks("health"):
        slots.health(slots.SlotHealthOptions(**common, data=images))
    if SHAPES in (subject.config.get("data", {}).get("path"), labeled.path) and lacks("factors"):
        slots.factors(slots.SlotFactorsOptions(**compared))


def _images(labeled: LabeledDataOptions) -> ImagesOptions:
    """The same images, with or without labels."""
    return ImagesOptions(
        labeled.path, labeled.train, max_pixels=labeled.max_pixels, value_range=labeled.value_range
    )
