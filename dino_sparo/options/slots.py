"""Options of `dino-sparo slots ...`: looking at single slots, scoring, choosing and masking them."""

from dataclasses import dataclass
from typing import Literal

from dino_sparo.options.evaluating import LabelledDataOptions
from dino_sparo.recipe.typed import Count, Seed


@dataclass
class ImagesOptions:
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), or `shapes` for generated pictures."""


@dataclass(kw_only=True)
class SlotsOptions:
    """What all commands about slots take."""

    run: str
    """Run folder or weights file."""
    which: Literal["teacher", "student"] = "teacher"
    """Whose weights to look at."""
    out: str | None = None
    """Folder for what is written; null takes `slots` in the run folder, or beside a weights file."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    num_workers: Count | None = None
    """Processes that load images; null takes one a core, at most 16."""
    batch_size: int = 64
    """Images a forward pass."""


@dataclass(kw_only=True)
class CachedSlotsOptions(SlotsOptions):
    """What the commands take that keep features on disk."""

    cache: str | None = None
    """Folder for features on disk; null takes `features` in the run folder, or beside a weights file."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Of the features on disk."""


@dataclass(kw_only=True)
class SlotMapsOptions(SlotsOptions):
    """Where slots look: attention over images, beside that of the CLS token in the last block."""

    data: ImagesOptions
    """The images."""
    slots: list[Count] | None = None
    """Numbers of slots, from 0; null takes eight that look at different places."""
    images: list[Count] | None = None
    """Numbers of images, from 0; null takes `num_images` spread evenly."""
    num_images: int = 6
    """Images to draw if none are named."""
    short_side: int | None = None
    """Whole images with this short side in pixels; null takes centre crops of the size that the encoder was
    trained at."""


@dataclass(kw_only=True)
class SlotGalleryOptions(CachedSlotsOptions):
    """For each slot the images that it responds to most, and their nearest neighbours within the slot."""

    data: ImagesOptions
    """The images."""
    slots: list[Count] | None = None
    """Numbers of slots, from 0; null takes all."""
    num_images: int = 6
    """Images that respond most, for each slot."""
    num_neighbours: int = 4
    """Nearest neighbours of each of them."""


@dataclass(kw_only=True)
class SlotRankOptions(CachedSlotsOptions):
    """Each slot alone by k-NN and by a linear probe, and accuracy against the number of slots kept."""

    data: LabelledDataOptions
    """The labelled images: slots are chosen on a part of train, and reported on val."""
    control: str | None = None
    """A run without slots, whose encoding is cut into as many equal parts and treated alike."""
    k: int = 20
    """Neighbours of the k-NN."""
    select_fraction: float = 0.2
    """Share of the train images on which slots are scored and chosen."""
    seed: Seed = 0
    """Of that share and of the linear probes."""


@dataclass(kw_only=True)
class SlotMaskOptions(CachedSlotsOptions):
    """A mask over slots or over single numbers of the encoding, learned with a frozen encoder."""

    data: LabelledDataOptions
    """The labelled images to learn the mask on."""
    transfer: str | None = None
    """A second labelled folder, NAME=DIR, on which the learned mask is tried."""
    control: str | None = None
    """A run without slots, whose encoding is cut into as many equal parts and masked alike."""
    epochs: int = 100
    """Passes over the train images."""
    lr: float = 0.02
    """Learning rate of the mask."""
    learning_batch_size: int = 1024
    """Images a step of learning."""
    seed: Seed = 0
    """Of the order of images."""


@dataclass(kw_only=True)
class SlotHealthOptions(SlotsOptions):
    """Entropy, share on CLS, dead and duplicate slots, agreement of student and teacher."""

    data: ImagesOptions
    """The images."""
    num_images: int = 1000
    """Images to look at, spread evenly, at least 2."""


@dataclass(kw_only=True)
class SlotFactorsOptions(CachedSlotsOptions):
    """How well each slot tells each known factor of the generated pictures."""

    control: str | None = None
    """A run without slots, whose whole encoding is scored beside."""
    num_images: int = 2000
    """Pictures to learn from, at least 200; half as many others to test on."""


@dataclass(kw_only=True)
class SlotReportOptions(SlotsOptions):
    """One HTML page of a run, that opens from a file without network."""

    data: LabelledDataOptions | None = None
    """Labelled images: analyses that the run folder does not hold yet are made with them; null shows what is
    there."""
    control: str | None = None
    """A run without slots, for those analyses."""
