"""`dino-sparo slots ...`: looking at single slots, scoring, choosing and masking them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dino_sparo.cli.images import EncodingOptions, ImagesOptions, LabeledDataOptions, choice_of, open_chosen
from dino_sparo.errors import UserError
from dino_sparo.recipe.typed import Batch, Count, Epochs, Seed
from dino_sparo.terminal import counted

if TYPE_CHECKING:
    from dino_sparo.data.sources import ImageSource
    from dino_sparo.models import Encoder
    from dino_sparo.slots.parts import CutEncoder


@dataclass(kw_only=True)
class SlotsOptions(EncodingOptions):
    """What all commands about slots take."""

    out: str | None = None
    """Folder for the results; null: `slots` in the run folder, or beside the weights file."""


@dataclass(kw_only=True)
class CachedSlotsOptions(SlotsOptions):
    """What the commands take that keep features on disk."""

    cache: str | None = None
    """Folder for stored features; null: `features` in the run folder, or beside the weights file; in `out` if
    that cannot be written."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Precision of the stored features."""


@dataclass(kw_only=True)
class ComparedSlotsOptions(CachedSlotsOptions):
    """What the commands take that compare slots with an encoding without."""

    control: str | None = None
    """Run without slots to compare with; its encoding is cut into as many equal parts as there are slots."""


@dataclass(kw_only=True)
class SlotMapsOptions(SlotsOptions):
    """Where slots look: attention over images, beside that of the CLS token in the last block.

    Of a ViT without slots, official and timm weights too: where each head of its CLS token looks."""

    data: ImagesOptions
    """The images."""
    slots: list[Count] | None = None
    """Indices of the slots to draw; null: eight that look at different places."""
    images: list[Count] | None = None
    """Indices of the images to draw; null: `num_images` images, evenly spread."""
    num_images: int = 6
    """Number of images to draw if `images` is null."""
    short_side: int | None = None
    """Draw whole images, resized to this short side in pixels; null: center crops of the size that the
    encoder was trained at."""
    control: str | None = None
    """Run or weights without slots; the heads of its CLS token are drawn on the same images."""


@dataclass(kw_only=True)
class SlotGalleryOptions(CachedSlotsOptions):
    """For each slot the images that it responds to most, and their nearest neighbors within the slot."""

    data: ImagesOptions
    """The images."""
    slots: list[Count] | None = None
    """Indices of the slots; null: all."""
    num_images: int = 6
    """Number of images per slot, those to which it responds most."""
    num_neighbors: int = 4
    """Number of nearest neighbors of each of these images."""


@dataclass(kw_only=True)
class SlotNeighborsOptions(CachedSlotsOptions):
    """Nearest neighbors of some images by their whole encodings.

    Also of encoders without slots."""

    data: ImagesOptions
    """The images."""
    num_images: int = 5
    """Number of images whose neighbors are drawn, evenly spread."""
    num_neighbors: int = 6
    """Number of nearest neighbors of each of these images."""
    max_images: int | None = None
    """Number of images to search, evenly spread; null: all."""


@dataclass(kw_only=True)
class SlotRankOptions(ComparedSlotsOptions):
    """Each slot alone by k-NN and by a linear probe, and accuracy against the number of slots kept."""

    data: LabeledDataOptions
    """The labeled images: slots are chosen on a part of train, and reported on val."""
    k: int = 20
    """Number of neighbors of k-NN."""
    select_fraction: float = 0.2
    """Fraction of the train images on which slots are scored and chosen."""
    seed: Seed = 0
    """Seed of the choice of these images."""


@dataclass(kw_only=True)
class SlotMaskOptions(ComparedSlotsOptions):
    """A mask over slots or over single numbers of the encoding, learned with a frozen encoder."""

    data: LabeledDataOptions
    """The labeled images to learn the mask on."""
    transfer: str | None = None
    """Further labeled folder, NAME=DIR, on which the learned mask is evaluated; null: none."""
    epochs: Epochs = 100
    """Number of epochs."""
    lr: float = 0.02
    """Learning rate of the mask."""
    learning_batch_size: Batch = 1024
    """Images per training step."""
    seed: Seed = 0
    """Seed of the order of the images."""


@dataclass(kw_only=True)
class SlotHealthOptions(SlotsOptions):
    """Entropy, share on CLS, dead and duplicate slots, agreement of student and teacher."""

    data: ImagesOptions
    """The images."""
    num_images: int = 1000
    """Number of images to measure, evenly spread; at least 2."""


@dataclass(kw_only=True)
class SlotFactorsOptions(ComparedSlotsOptions):
    """How well each slot tells each known factor of the generated pictures."""

    num_images: int = 2000
    """Number of generated pictures to learn from, at least 200; half as many others are for the test."""


def maps(options: SlotMapsOptions) -> None:
    """Attention of chosen slots over chosen images: maps.json, grid.png and an overlay for each."""
    from dino_sparo.slots.maps import COARSE, slot_maps

    folder = _folder(options) / "maps"
    encoder = open_encoder(options, with_slots=False)
    control = open_control(options.control, options.which) if options.control else None
    source = open_chosen(options.data, encoder=encoder)
    content = slot_maps(
        *(encoder, source, folder),
        slots=options.slots,
        images=options.images,
        num_images=options.num_images,
        short_side=options.short_side,
        control=control.to(encoder.device) if control else None,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    _write(options, folder / "maps.json", content, encoder, control, source)
    numbers, drawn = ", ".join(map(str, content["slots"])), "heads of the CLS token"
    if content["slots"]:
        chosen = options.slots is None and len(content["slots"]) < encoder.num_slots
        drawn = f"slots that look at different places ({numbers})" if chosen else f"slots {numbers}"
    print(f"{drawn} on {counted(len(content['images']), 'image')}: {folder / 'grid.png'}")
    rows, columns = min(content["patches"], key=min)
    if options.short_side is None and min(rows, columns) < COARSE:
        print(f"the encoder sees {rows} × {columns} patches; slots maps --short-side 448 draws a finer map")
    if control:
        print(f"heads of the control's CLS token: {folder / 'control.png'}")


def gallery(options: SlotGalleryOptions) -> None:
    """The images that each slot responds to most: gallery.json and a picture for each slot."""
    from dino_sparo.slots.gallery import slot_gallery

    folder = _folder(options) / "gallery"
    cut = _cut(options)[0]
    source = open_chosen(options.data, encoder=cut.encoder)
    entries = slot_gallery(
        *(cut, source, folder),
        slots=options.slots,
        num_images=options.num_images,
        num_neighbors=options.num_neighbors,
    )
    _write(options, folder / "gallery.json", {"slots": entries}, cut.encoder, None, source)
    print(f"{counted(len(entries), 'slot')} over {counted(len(source), 'image')}: {folder}")


def neighbors(options: SlotNeighborsOptions) -> None:
    """Nearest neighbors by whole encodings: neighbors.json and neighbors.png."""
    from dino_sparo.data.sources import evenly
    from dino_sparo.slots.neighbors import slot_neighbors

    folder = _folder(options) / "neighbors"
    cut = _cut(options, with_slots=False)[0]
    source = open_chosen(options.data, encoder=cut.encoder)
    content = slot_neighbors(
        *(cut, evenly(source, options.max_images), folder),
        num_images=options.num_images,
        num_neighbors=options.num_neighbors,
    )
    _write(options, folder / "neighbors.json", content, cut.encoder, None, source)
    print(f"neighbors among {counted(content['num_images'], 'image')}: {folder / 'neighbors.png'}")


def rank(options: SlotRankOptions) -> None:
    """Each slot alone, and accuracy against the number of slots kept: rank.json, curve.png and a table."""
    from dino_sparo.data.sources import open_labeled
    from dino_sparo.slots.rank import rank_slots, table

    folder, cut = _folder(options) / "rank", _cut(options)
    choice = choice_of(options.data, cut[0].encoder)
    data = open_labeled(options.data.path, choice=choice)
    result = rank_slots(
        *(cut, *data, folder),
        k=options.k,
        select_fraction=options.select_fraction,
        seed=options.seed,
    )
    _write(options, folder / "rank.json", result, *_networks(cut), *data)
    print(f"{table(result)}\n{folder / 'rank.json'}, {folder / 'curve.png'}")


def mask(options: SlotMaskOptions) -> None:
    """Masks learned with a frozen encoder: mask.json, mask.png and a table."""
    from dino_sparo.data.sources import open_labeled
    from dino_sparo.evaluation.transfer import EXPECTED_BOTH, VAL, named_folder
    from dino_sparo.slots.mask import mask_slots, table

    folder, cut = _folder(options) / "mask", _cut(options)
    choice = choice_of(options.data, cut[0].encoder)
    data = {VAL: open_labeled(options.data.path, choice=choice)}
    if options.transfer:
        name, other = named_folder(options.transfer, "transfer", EXPECTED_BOTH)
        data[name] = open_labeled(other, key="transfer", choice=choice.of_pixels)
    result = mask_slots(
        *(cut, data, folder),
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.learning_batch_size,
        seed=options.seed,
    )
    content = {"transfer": options.transfer} | result
    _write(options, folder / "mask.json", content, *_networks(cut), *data[VAL])
    print(f"{table(result)}\n{folder / 'mask.json'}, {folder / 'mask.png'}")


def health(options: SlotHealthOptions) -> None:
    """Entropy of attention, dead and duplicate slots: health.json, health.png and a table."""
    from dino_sparo.data.sources import evenly
    from dino_sparo.slots.health import as_entries, draw_health, measure_health, summarize, table

    folder = _folder(options) / "health"
    encoder = open_encoder(options)
    source = open_chosen(options.data, encoder=encoder)
    chosen = evenly(source, options.num_images)
    measured = measure_health(
        *(encoder, chosen),
        other=_other_weights(options, encoder),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    slots = as_entries(measured)
    summary = summarize(slots, encoder.backbone.native_grid**2)
    folder.mkdir(parents=True, exist_ok=True)
    draw_health(slots, summary, folder / "health.png")
    content = {"num_images": len(chosen), "slots": slots, "summary": summary}
    _write(options, folder / "health.json", content, encoder, None, source)
    print(f"{options.run} ({options.which}), {len(chosen)} images, {len(slots)} slots")
    print(f"{table(slots, summary)}\n{folder / 'health.json'}, {folder / 'health.png'}")


def factors(options: SlotFactorsOptions) -> None:
    """Which slot tells which factor of generated pictures: factors.json, factors.png and a table."""
    from dino_sparo.slots.factors import slot_factors, table

    folder = _folder(options) / "factors"
    cut = _cut(options)
    content = slot_factors(cut, folder, num_images=options.num_images)
    _write(options, folder / "factors.json", content, *_networks(cut))
    print(
        f"{options.run} ({options.which}), learned from {content['num_train']} pictures, % of "
        f"{content['num_test']} others:"
    )
    print(f"{table(content['encoders'])}\n{folder / 'factors.json'}, {folder / 'factors.png'}")


def open_encoder(options: SlotsOptions, *, with_slots: bool = True) -> "Encoder":
    """The encoder of `options.run` in evaluation mode, on the device.

    Raises:
        UserError: its read-out has no slots and should, or the weights or the device cannot be had.
    """
    from dino_sparo.interop.load import load_encoder
    from dino_sparo.parallel.device import choose_device
    from dino_sparo.parallel.distributed import local_rank

    device = choose_device(options.device, local_rank())
    encoder = load_encoder(options.run, options.which)
    if with_slots and not encoder.num_slots:
        raise UserError(
            f"{options.run} has no slots (read-out {encoder.readout_name}), expected one with slots; "
            f"give a run whose recipe has model.readout.name sparo"
        )
    return encoder.to(device)


def open_control(run: str, which: str) -> "Encoder":
    """The encoder of a run, on the CPU. Raises UserError if it has slots."""
    from dino_sparo.interop.load import load_encoder

    control = load_encoder(run, which)
    if control.num_slots:
        raise UserError(
            f"control {run!r} has slots (read-out {control.readout_name}), expected a run without; give one "
            f"whose model.readout.name is cls or gap"
        )
    return control


def _other_weights(options: SlotHealthOptions, encoder: "Encoder") -> "Encoder | None":
    """The student for the teacher and the other way round; None where only one set of weights is stored."""
    from dino_sparo.interop.load import networks_in

    other = networks_in(options.run).get("student" if options.which == "teacher" else "teacher")
    return None if other is None else other.build().to(encoder.device)


def _cut(options: CachedSlotsOptions, *, with_slots: bool = True) -> "list[CutEncoder]":
    """The run, cut into its slots if it has some, then the control if one is given."""
    from dino_sparo.evaluation.results import features_folder
    from dino_sparo.slots.parts import CutEncoder, most_parts

    encoder = open_encoder(options, with_slots=with_slots)
    opened = [(encoder.readout_name, options.run, encoder, encoder.num_slots or 1)]
    if isinstance(options, ComparedSlotsOptions) and options.control:
        control = open_control(options.control, options.which).to(encoder.device)
        num_parts = most_parts(control.embed_dim, encoder.num_slots)
        opened.append((f"control ({control.readout_name})", options.control, control, num_parts))
    return [
        CutEncoder(
            *(name, run, one, num_parts, Path(options.cache or features_folder(run, _folder(options)))),
            cache_precision=options.cache_precision,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )
        for name, run, one, num_parts in opened
    ]


def _networks(cut: "list[CutEncoder]") -> "tuple[Encoder, Encoder | None]":
    """The encoder, and that of the control if there is one."""
    return cut[0].encoder, cut[1].encoder if len(cut) > 1 else None


def _folder(options: SlotsOptions) -> Path:
    """Where all commands about slots write: `out`, or `slots` among the results of the run."""
    from dino_sparo.evaluation.results import results_folder

    return Path(options.out) if options.out else results_folder(options.run) / "slots"


def further(data: ImagesOptions) -> dict[str, Any]:
    """The options of images that are not null, except the path, as in JSON."""
    given = {key: value for key, value in vars(data).items() if key != "path" and value is not None}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def _write(
    options: SlotsOptions,
    path: Path,
    content: Mapping[str, Any],
    encoder: "Encoder",
    control: "Encoder | None",
    *images: "ImageSource",
) -> None:
    """Write the JSON of an analysis, first what it is about: weights, and images and control if it takes
    them. Raises OSError."""
    from dino_sparo.evaluation.features import hash_of, hash_of_some
    from dino_sparo.files import write_file

    about: dict[str, Any] = {"run": options.run, "which": options.which, "encoder": hash_of(encoder)}
    if control:
        about["control_encoder"] = hash_of(control)
    if images:
        about["image_files" if len(images) == 1 else "labeled_files"] = hash_of_some(*images)
    if hasattr(options, "data"):
        about |= {"data": options.data.path, "choice": further(options.data)}
    if hasattr(options, "control"):
        about["control"] = options.control
    write_file(path, json.dumps(about | dict(content), indent=1, allow_nan=False) + "\n")
