"""The recipe: one typed object from YAML and back, also what a checkpoint stores. Needs no torch.

Sections of the experiment have no defaults: the recipe is the whole experiment. A rule stands beside its
field.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Annotated, Any, Literal

from dino_sparo.errors import UserError
from dino_sparo.recipe.readouts import READOUTS, ReadoutOptions
from dino_sparo.recipe.typed import (
    BY_NAME,
    Amount,
    Batch,
    BelowOne,
    Count,
    Epochs,
    Heads,
    Range,
    Seed,
    Share,
    Width,
    Workers,
    up_to,
)

AreaShare = Annotated[float, Range("above 0 and at most 1", lambda number: 0 < number <= 1)]
HueShift = Annotated[float, Range("from 0 to 0.5, half the color circle", lambda number: 0 <= number <= 0.5)]
Side = Annotated[int, up_to(16_384)]  # pixels
BlurRadius = Annotated[float, up_to(1_000, least=0)]  # pixels
PixelValue = Annotated[float, Range("that is finite", isfinite)]
ImagePixels = Annotated[int, up_to(178_956_970)]  # more are refused by Pillow
Timeout = Annotated[int, Range("from 1 to 1500", lambda number: 1 <= number <= 1500)]


def check_value_range(given: tuple[float, float] | None) -> None:
    """Raises UserError: black is not below white."""
    if given is not None and not given[0] < given[1]:
        raise UserError(
            f"data.value_range is {list(given)}; expected the value of black, then a higher one of white"
        )


@dataclass(kw_only=True)
class DataOptions:
    """The images to learn from."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards or of parquet files of the
    Hugging Face hub; `hub:OWNER/NAME` for a set there; `cifar10` or `stl10`, which torchvision downloads;
    `shapes` for generated pictures."""
    train: str | None = None
    """What of `path` to learn from: a folder, or a pattern of names in it such as 'train-*.tar'; null finds
    it by names, `.` takes all."""
    val: str | None = None
    """What of `path`, or beside it, is held out for k-NN while training; null finds it by names."""
    label_column: str | None = None
    """Column of parquet files that holds the classes; null takes `label`, `labels` or the only ClassLabel."""
    max_images: int | None = None
    """Learn from this many images only, evenly spread over the folder; null takes all."""
    max_side: Side | None = None
    """Images with a longer side than this many pixels are reduced to it when they are read (JPEG files while
    they are decoded), before any crop is drawn; null leaves all as they are."""
    max_pixels: ImagePixels | None = None
    """Pixels of the largest image that is decoded; a larger one cannot be read. One that is narrower than 512
    pixels counts as 512 wide, a WebP or AVIF twice; a file may have 4 bytes per pixel. null is 67,108,864, by
    which an image takes about 0.5 GB."""
    value_range: tuple[PixelValue, PixelValue] | None = None
    """Values of pixels of more than 8 bits (16 or 32 bits, floating point) that become black and white, such
    as [0, 4095]; null goes by their mode."""
    on_bad_image: Literal["stop", "substitute"]
    """What to do about an image that cannot be read: stop and name it, or let another one stand in, drawn
    by the seed; those are listed in the run folder, and more than one image in a hundred ends the run."""

    def __post_init__(self) -> None:
        check_value_range(self.value_range)


@dataclass
class ViewOptions:
    """The random views of an image: two global crops and some local ones. Lists of three are for the
    first global, the second global and the local crops."""

    global_size: Side
    """Side of a global crop in pixels; the position embedding is native at it."""
    global_scale: tuple[AreaShare, AreaShare]
    """Share of the image area in a global crop, lowest and highest."""
    local_size: Side
    """Side of a local crop in pixels."""
    local_scale: tuple[AreaShare, AreaShare]
    """Share of the image area in a local crop, lowest and highest."""
    num_local_crops: Annotated[int, up_to(100, least=0)]
    """Local crops per image."""
    flip_probability: Share
    """Probability of a horizontal flip."""
    jitter_probability: Share
    """Probability of color jitter."""
    jitter_strength: tuple[Amount, Amount, Amount, HueShift]
    """Strength of brightness, contrast, saturation and hue jitter."""
    grayscale_probability: Share
    """Probability of grayscale."""
    blur_probability: tuple[Share, Share, Share]
    """Probability of Gaussian blur for first global, second global and local crops."""
    blur_radius: tuple[BlurRadius, BlurRadius]
    """Radius of the blur in pixels, lowest and highest."""
    solarize_probability: tuple[Share, Share, Share]
    """Probability of solarization for first global, second global and local crops."""

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale", "blur_radius"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"views.{name} is {[low, high]}; expected the lowest, then the highest")


@dataclass
class ArchOptions:
    """A ViT of any size."""

    width: Width
    """Token width."""
    depth: Annotated[int, up_to(256)]
    """Blocks of the plain ViT; SPARO replaces the last of them."""
    num_heads: Heads
    """Attention heads; must divide the width."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"model.arch.width is {self.width}, not divisible by model.arch.num_heads {self.num_heads}; "
                f"use a multiple of the heads"
            )


@dataclass
class ModelOptions:
    """Student and teacher."""

    arch: Literal["vit_tiny", "vit_small", "vit_base"] | ArchOptions
    """Named size, or width, depth and num_heads."""
    patch_size: Annotated[int, up_to(1_024)]
    """Side of a patch in pixels; must divide both crop sizes."""
    drop_path_rate: BelowOne
    """Stochastic depth of the student's last block, rising linearly from 0; the teacher has none."""
    readout: ReadoutOptions = field(metadata={BY_NAME: {name: one.options for name, one in READOUTS.items()}})

    def __post_init__(self) -> None:
        reads_instead = READOUTS[self.readout.name].has_slots and not getattr(
            self.readout, "after_last_block", None
        )
        if isinstance(self.arch, ArchOptions) and reads_instead and self.arch.depth < 2:
            raise UserError(
                f"model.arch.depth is {self.arch.depth}; expected at least 2 with {self.readout.name}, which "
                f"replaces the last block"
            )

    def encoder_arguments(self, image_size: int) -> dict[str, Any]:
        """The arguments of `build_encoder` at this native image size, without stochastic depth."""
        return {
            "arch": self.arch if isinstance(self.arch, str) else asdict(self.arch),
            "patch_size": self.patch_size,
            "image_size": image_size,
            **self.readout.arguments(),
        }


@dataclass
class EncoderOptions:
    """An encoder as files describe it."""

    image_size: Side
    """Side in pixels at which the position embedding is native."""
    model: ModelOptions


@dataclass
class HeadOptions:
    """The DINO projection head."""

    num_prototypes: Annotated[int, up_to(16_777_216)]
    """Outputs of the head, K."""
    hidden_dim: Width
    """Width of the two hidden layers."""
    bottleneck_dim: Width
    """Width of the l2-normalized bottleneck."""
    norm_last_layer: bool
    """Fix the prototypes' length at 1; steadier, official for ViT-S at 100 epochs."""


@dataclass
class LossOptions:
    """Temperatures and center."""

    student_temp: float
    """Student temperature."""
    warmup_teacher_temp: float
    """Teacher temperature at the start."""
    teacher_temp: float
    """Teacher temperature after its warm-up."""
    warmup_teacher_temp_epochs: Count
    """Epochs of linear teacher temperature warm-up."""
    center_momentum: BelowOne
    """Share of the old center kept at each step."""


@dataclass
class OptimOptions:
    """Optimization."""

    epochs: Epochs
    """Passes over the images."""
    global_batch_size: Batch
    """Images an optimizer step, over all processes and micro-batches; the last partial batch of an epoch is
    dropped."""
    lr_per_256: float
    """Peak learning rate for a batch of 256; scaled linearly with global_batch_size."""
    final_lr: Amount
    """Learning rate at the end of the cosine."""
    warmup_epochs: Count
    """Epochs of linear learning rate warm-up from 0."""
    weight_decay: Amount
    """Weight decay at the start."""
    final_weight_decay: Amount
    """Weight decay at the end of its cosine."""
    clip_norm: Amount
    """Largest norm of each parameter tensor's own gradient; 0 switches clipping off."""
    freeze_last_layer_epochs: Count
    """Epochs in which the prototypes do not learn."""
    teacher_momentum: Share
    """Momentum of the teacher at the start; rises to 1 on a cosine."""
    max_bad_steps: Count
    """Steps whose loss or gradients are not finite that a start skips before it ends; overflows of fp16,
    which only lower the loss scale, are no such steps."""
    freeze_backbone: bool = False
    """With `init`: the backbones of student and teacher stay as they are, without stochastic depth; only
    read-out and head learn."""
    freeze_backbone_epochs: Count | None = None
    """With `init`: first epochs in which only read-out and head learn, so that fresh ones do not spoil the
    backbone; null: none."""


@dataclass
class MonitorOptions:
    """k-NN and alarm while training; they change nothing of the run."""

    knn_every_epochs: Count = 10
    """20-NN of the teacher every so many epochs, also before the first and after the last; 0: never."""
    knn_path: str | None = None
    """Labeled folder (train/<class>, val/<class>) for it; null takes data.path if it is labeled."""
    knn_images_per_class: int | None = 50
    """Gallery and test images a class at most, evenly spread; null takes all."""


@dataclass
class MachineOptions:
    """What belongs to the machine, not to the experiment."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    batch_size_per_gpu: Batch | None = None
    """Images a process takes at once; gradient accumulation makes up for what is missing to
    optim.global_batch_size, so that the experiment stays the same. null takes its whole share at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the networks; auto takes bf16 on a GPU that has it, fp16 (with loss scaling) on an older one, fp32
    on the CPU. Prototype logits, loss, weights and teacher stay float32."""
    tf32: bool = False
    """Let float32 products use TF32 on a GPU: faster, about three decimal digits."""
    deterministic: bool = False
    """Bit-equal runs on a GPU too, somewhat slower; on a CPU they are bit-equal anyway."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: about a third
    more work for much less memory."""
    views: Literal["auto", "pil", "device"] = "auto"
    """Who makes the views, of the same random numbers: workers by PIL, or the training device, for which
    workers only decode. auto takes the device on a GPU if data.max_side bounds the images, else PIL."""
    capture: bool = False
    """Take the steps on a GPU as replays of one CUDA graph: a launch instead of a thousand, so that a fast
    GPU does not wait for the processor; the graph keeps its crops, in ImageNet recipes 2 MB for each image at
    once. scripts/gpu_acceptance.sh shows whether captured steps of this GPU are the eager ones."""
    compile: bool = False
    """Compile the backbones of student and teacher: minutes at every start, for 3 per cent of speed on two
    CPU cores; not measured on a GPU."""
    num_workers: Workers | None = None
    """Processes that load images, for each training process; 0 loads in the training process, null takes one
    a core and shares them among the training processes, at most 16 each."""
    prefetch_batches: Annotated[int, up_to(1_024)] = 2
    """Batches that each worker prepares ahead."""
    data_timeout_seconds: Timeout = 600
    """Without a batch of images for so long the run ends, naming the files being read. Other processes wait
    for this one for 30 minutes."""


@dataclass
class LogOptions:
    """Log and checkpoints."""

    log_every_steps: int = 10
    """Steps between two entries of the log."""
    checkpoint_every_epochs: Count = 1
    """Epochs between two checkpoints; one is always written at the end."""
    checkpoint_every_minutes: Amount = 30.0
    """Minutes between two checkpoints within an epoch, written with the next log entry; 0: none."""
    keep_every_epochs: Count = 20
    """Keep one checkpoint every so many epochs for good, besides the last two; 0: none."""


@dataclass(kw_only=True)
class Recipe:
    """A whole experiment, and how a machine runs it."""

    seed: Seed
    """Seed of every random number of the run."""
    data: DataOptions
    views: ViewOptions
    model: ModelOptions
    head: HeadOptions
    loss: LossOptions
    optim: OptimOptions
    init: str | None = None
    """Starting weights: a run folder, a checkpoint or exported encoder, or a ViT of the official DINO code
    or of timm (a file, or `timm:NAME`, which timm downloads). Blocks that the recipe builds, and whatever
    else fits, are taken; what is not there begins fresh, and the log says so. A resumed run does not need the
    file again. null begins with random weights."""
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        patch, epochs = self.model.patch_size, self.optim.epochs
        for name in ("global_size", "local_size"):
            size = getattr(self.views, name)
            if size % patch:
                raise UserError(
                    f"views.{name} is {size}, not divisible by model.patch_size {patch}; use a multiple, "
                    f"such as {max(1, round(size / patch)) * patch}"
                )
        for key, value in {
            "optim.warmup_epochs": self.optim.warmup_epochs,
            "loss.warmup_teacher_temp_epochs": self.loss.warmup_teacher_temp_epochs,
            "optim.freeze_last_layer_epochs": self.optim.freeze_last_layer_epochs,
            "optim.freeze_backbone_epochs": self.optim.freeze_backbone_epochs or 0,
        }.items():
            if value > epochs:
                raise UserError(
                    f"{key} is {value}, longer than the run: optim.epochs is {epochs}; use at most {epochs}"
                )
        for name in ("freeze_backbone", "freeze_backbone_epochs"):
            if getattr(self.optim, name) and self.init is None:
                raise UserError(
                    f"optim.{name} is {str(getattr(self.optim, name)).lower()}, but init is null: a backbone "
                    f"that has learned nothing would stay as it is; give its weights by init, or leave "
                    f"{name} out"
                )

    def encoder_arguments(self) -> dict[str, Any]:
        """The arguments of `build_encoder`, without stochastic depth."""
        return self.model.encoder_arguments(self.views.global_size)

    def state_arguments(self) -> dict[str, Any]:
        """The arguments of `training.state.build_state`, but those of the machine."""
        frozen = self.optim.freeze_backbone
        return {
            "encoder": self.encoder_arguments(),
            "head": self.head,
            "loss": self.loss,
            "seed": self.seed,
            "drop_path_rate": 0.0 if frozen else self.model.drop_path_rate,
            "freeze_backbone": frozen,
            "max_bad_steps": self.optim.max_bad_steps,
        }

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as YAML and checkpoints hold it."""
        names = [each.name for each in fields(Recipe)]  # without what belongs to one start
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name in names}))


def split_batch(global_batch_size: int, batch_size_per_gpu: int | None, processes: int) -> tuple[int, int]:
    """Images that a process takes at once, and micro-batches a step, that together make the global batch.

    Raises:
        UserError: they cannot; it proposes values that can.
    """
    if global_batch_size % processes:
        multiple = max(1, round(global_batch_size / processes)) * processes
        raise UserError(
            f"optim.global_batch_size is {global_batch_size}, not divisible by {processes} processes; use "
            f"{_divisors(global_batch_size, processes)} processes, or a batch of {multiple} (another "
            f"experiment)"
        )
    share = global_batch_size // processes
    if batch_size_per_gpu is None:
        return share, 1
    if share % batch_size_per_gpu:
        raise UserError(
            f"machine.batch_size_per_gpu is {batch_size_per_gpu}, which does not divide {share}, the "
            f"share of each of {processes} processes in optim.global_batch_size {global_batch_size}; use "
            f"{_divisors(share, batch_size_per_gpu)}"
        )
    return batch_size_per_gpu, share // batch_size_per_gpu


def smaller_batch(share: int, batch_size: int) -> int:
    """The largest number of images at once that divides a process's share and is at most half of this one."""
    return max(size for size in range(1, max(1, batch_size // 2) + 1) if share % size == 0)


def _divisors(number: int, near: int) -> str:
    """The three divisors nearest to another number, as `1 or 2 or 4`."""
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda one: abs(one - near))[:3])))
