"""The recipe as a typed object, as in YAML files and checkpoints. Does not import torch.

Fields of the experiment have no defaults, so that a recipe states all of it. The docstrings of fields are the
text of `--help`.
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
HueShift = Annotated[float, Range("from 0 to 0.5", lambda number: 0 <= number <= 0.5)]
Side = Annotated[int, up_to(16_384)]  # pixels
BlurRadius = Annotated[float, up_to(1_000, least=0)]  # pixels
PixelValue = Annotated[float, Range("that is finite", isfinite)]
ValueRange = tuple[PixelValue, PixelValue]
ImagePixels = Annotated[int, up_to(178_956_970)]  # Pillow's limit
Timeout = Annotated[int, Range("from 1 to 1500", lambda number: 1 <= number <= 1500)]


def check_value_range(given: ValueRange | None, key: str = "data.value_range") -> None:
    """Raises UserError: black is not below white."""
    if given is not None and not given[0] < given[1]:
        raise UserError(f"{key} is {list(given)}; expected the value of black, then a higher value of white")


@dataclass(kw_only=True)
class DataOptions:
    """The training images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards, or of parquet files of the
    Hugging Face hub; `hub:OWNER/NAME` for a dataset on the hub; `cifar10` or `stl10`, which torchvision
    downloads; `shapes` for generated pictures."""
    train: str | None = None
    """Training split: a folder below `path`, or a pattern of file names such as 'train-*.tar'; `.`: all of
    `path`; null: found by its usual names."""
    val: str | None = None
    """Validation split below or beside `path`, for k-NN during training; null: found by its usual names."""
    label_column: str | None = None
    """Label column of parquet files; null: `label`, `labels`, or the only column of type ClassLabel."""
    max_images: int | None = None
    """Use only this many images, evenly spread over the dataset; null: all."""
    max_side: Side | None = None
    """Images whose longer side exceeds this many pixels are resized to it when they are read, before random
    crops (JPEG files while they are decoded); null: no image is resized."""
    max_pixels: ImagePixels | None = None
    """Largest image that is decoded, in pixels; larger ones count as unreadable. An image narrower than 512
    pixels counts as 512 pixels wide, WebP and AVIF count twice, and files may have at most 4 bytes per pixel.
    null: 67,108,864 (about 0.5 GB of memory per image)."""
    value_range: ValueRange | None = None
    """For images with more than 8 bits per channel: the pixel values that become black and white, such as
    [0, 4095]; null: a range that depends on the image mode."""
    on_bad_image: Literal["stop", "substitute"]
    """What to do if an image cannot be read: `stop` the run and name the image, or `substitute` another one,
    drawn by the seed. The run folder lists such images; if they are more than 1 % of all, the run ends."""

    def __post_init__(self) -> None:
        check_value_range(self.value_range)


@dataclass
class ViewOptions:
    """The random views of an image: two global crops and some local crops. Lists of three values are for the
    first global crop, the second global crop, and the local crops."""

    global_size: Side
    """Side of a global crop in pixels; the position embedding has the size of its patch grid."""
    global_scale: tuple[AreaShare, AreaShare]
    """Range of the area of a global crop, as a fraction of the image area."""
    local_size: Side
    """Side of a local crop in pixels."""
    local_scale: tuple[AreaShare, AreaShare]
    """Range of the area of a local crop, as a fraction of the image area."""
    num_local_crops: Annotated[int, up_to(100, least=0)]
    """Local crops per image."""
    flip_probability: Share
    """Probability of a horizontal flip."""
    jitter_probability: Share
    """Probability of color jitter."""
    jitter_strength: tuple[Amount, Amount, Amount, HueShift]
    """Strength of brightness, contrast, saturation and hue jitter (0.5: any hue)."""
    grayscale_probability: Share
    """Probability of grayscale."""
    blur_probability: tuple[Share, Share, Share]
    """Probability of Gaussian blur for the first global, the second global, and the local crops."""
    blur_radius: tuple[BlurRadius, BlurRadius]
    """Range of the blur radius in pixels."""
    solarize_probability: tuple[Share, Share, Share]
    """Probability of solarization for the first global, the second global, and the local crops."""

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale", "blur_radius"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"views.{name} is {[low, high]}; expected the lowest, then the highest")


@dataclass
class ArchOptions:
    """A ViT of any size."""

    width: Width
    """Token dimension."""
    depth: Annotated[int, up_to(256)]
    """Number of blocks of the plain ViT; SPARO replaces the last one."""
    num_heads: Heads
    """Attention heads; must divide width."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(
                f"model.arch.width is {self.width}, not divisible by model.arch.num_heads {self.num_heads}; "
                f"use a multiple of it"
            )


@dataclass
class ModelOptions:
    """Student and teacher."""

    arch: Literal["vit_tiny", "vit_small", "vit_base"] | ArchOptions
    """Size by name, or a section with width, depth and num_heads."""
    patch_size: Annotated[int, up_to(1_024)]
    """Side of a patch in pixels; must divide both crop sizes."""
    drop_path_rate: BelowOne
    """Stochastic depth rate of the student's last block, increasing linearly from 0 at the first; the teacher
    has none."""
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
        """The arguments of `build_encoder` for this image size, without `drop_path_rate`."""
        return {
            "arch": self.arch if isinstance(self.arch, str) else asdict(self.arch),
            "patch_size": self.patch_size,
            "image_size": image_size,
            **self.readout.arguments(),
        }


@dataclass
class EncoderOptions:
    """An encoder in a file of weights."""

    image_size: Side
    """Side in pixels of the images whose patch grid is that of the position embedding."""
    model: ModelOptions


@dataclass
class HeadOptions:
    """The DINO projection head."""

    num_prototypes: Annotated[int, up_to(16_777_216)]
    """Number of prototypes K, the output dimension."""
    hidden_dim: Width
    """Dimension of the two hidden layers."""
    bottleneck_dim: Width
    """Dimension of the l2-normalized bottleneck."""
    norm_last_layer: bool
    """Fix the norm of each prototype at 1, which is more stable; the official setting for ViT-S at 100
    epochs."""


@dataclass
class LossOptions:
    """Temperatures and center of the DINO loss."""

    student_temp: float
    """Student temperature."""
    warmup_teacher_temp: float
    """Teacher temperature at the start."""
    teacher_temp: float
    """Teacher temperature after the warm-up."""
    warmup_teacher_temp_epochs: Count
    """Epochs of linear warm-up of the teacher temperature."""
    center_momentum: BelowOne
    """Momentum of the center's moving average."""


@dataclass
class OptimOptions:
    """Optimization."""

    epochs: Epochs
    """Number of epochs."""
    global_batch_size: Batch
    """Images per optimizer step, over all processes and micro-batches; the last partial batch of an epoch is
    dropped."""
    lr_per_256: float
    """Peak learning rate for a batch of 256; scaled linearly with global_batch_size."""
    final_lr: Amount
    """Learning rate at the end of its cosine schedule."""
    warmup_epochs: Count
    """Epochs of linear warm-up of the learning rate from 0."""
    weight_decay: Amount
    """Weight decay at the start."""
    final_weight_decay: Amount
    """Weight decay at the end of its cosine schedule."""
    clip_norm: Amount
    """Largest gradient norm of each parameter tensor; 0: no clipping."""
    freeze_last_layer_epochs: Count
    """Number of initial epochs in which the last layer of the head, the prototypes, is frozen."""
    teacher_momentum: Share
    """Momentum of the teacher at the start; increases to 1 on a cosine schedule."""
    max_bad_steps: Count
    """Largest number of steps that are skipped because their loss or gradients are not finite; one more ends
    the run. Counted from each start or resume; overflows of fp16, which only lower the loss scale, do not
    count."""
    freeze_backbone: bool = False
    """With `init`: freeze the backbone, without stochastic depth; only read-out and head are trained."""
    freeze_backbone_epochs: Count | None = None
    """With `init`: number of initial epochs in which the backbone is frozen, so that gradients of a new head
    do not damage it; null: none."""


@dataclass
class MonitorOptions:
    """k-NN accuracy during training; it does not change the run."""

    knn_every_epochs: Count = 10
    """Epochs between two 20-NN evaluations of the teacher, which also run before the first epoch and after
    the last; 0: never."""
    knn_path: str | None = None
    """Labeled folder (train/<class>, val/<class>) for k-NN; null: data.path if it is labeled."""
    knn_images_per_class: int | None = 50
    """Largest number of train and of test images per class for k-NN, evenly spread; null: all."""


@dataclass
class MachineOptions:
    """Settings of the machine, which do not change the experiment."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto: CUDA if there is a GPU, else the CPU."""
    batch_size_per_gpu: Batch | None = None
    """Images per process in one forward pass; gradient accumulation makes up the difference to
    optim.global_batch_size, so that the experiment stays the same. null: no accumulation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks; auto: bf16 on a GPU that supports it, fp16 (with loss scaling) on an older
    GPU; on a CPU bf16 if it multiplies bf16 in hardware (AMX, AVX-512 with BF16) and the token dimension is
    at least 384, else fp32. A run keeps that of its last start on a CPU. Prototype logits, loss, weights
    and teacher stay in float32."""
    tf32: bool = False
    """Use TF32 for float32 matrix products on a GPU: faster, with about three decimal digits."""
    deterministic: bool = False
    """Make runs on a GPU bit-identical, somewhat slower; runs on a CPU always are."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: much less memory for about a third more
    computation."""
    views: Literal["auto", "pil", "device"] = "auto"
    """Where views are made, from the same random numbers: `pil`: by PIL in the workers; `device`: on the
    training device, while the workers only decode. auto: the device on a GPU if data.max_side is set, else
    PIL."""
    capture: bool = False
    """Capture the training step as a CUDA graph: one launch per step instead of about a thousand, so that a
    fast GPU does not wait for the CPU. The graph keeps a batch of crops in memory (2 MB per image in ImageNet
    recipes). scripts/gpu_acceptance.sh checks on your GPU that captured steps equal eager ones."""
    compile: bool = False
    """Compile the transformer blocks of student and teacher with torch.compile, which takes a minute at the
    start. A step of ViT-S/16 on a GPU then moves 75 instead of 86 GB through its memory, of which it needs 5
    % less (simulated, 64 images in bf16; no GPU has run it)."""
    num_workers: Workers | None = None
    """Data loading workers per training process; 0: load in the training process; null: one per CPU core,
    shared by all training processes, at most 16 each."""
    prefetch_batches: Annotated[int, up_to(1_024)] = 2
    """Batches that each worker loads in advance."""
    data_timeout_seconds: Timeout = 600
    """Seconds without a batch of images after which the run ends with the names of the files being read;
    other processes wait 30 minutes."""


@dataclass
class LogOptions:
    """Log and checkpoints."""

    log_every_steps: int = 10
    """Steps between two log entries."""
    checkpoint_every_epochs: Count = 1
    """Epochs between two checkpoints; 0: none. One is always written at the end."""
    checkpoint_every_minutes: Amount = 30.0
    """Minutes between two checkpoints within an epoch, written with the next log entry; 0: none."""
    keep_every_epochs: Count = 20
    """Epochs between two checkpoints that are kept forever, besides the last two; 0: none."""


@dataclass(kw_only=True)
class Recipe:
    """A whole experiment, and settings of the machine that runs it."""

    seed: Seed
    """Seed of all random numbers of the run."""
    data: DataOptions
    views: ViewOptions
    model: ModelOptions
    head: HeadOptions
    loss: LossOptions
    optim: OptimOptions
    init: str | None = None
    """Initial weights: a run folder, a checkpoint, an exported encoder, or a ViT of the official DINO code or
    of timm (a file, or `timm:NAME`, which timm downloads). The backbone must fit the recipe; a read-out or
    head that is missing or different is initialized randomly. The log lists what was loaded. Not needed to
    resume. null: random weights."""
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
                    f"optim.{name} is {str(getattr(self.optim, name)).lower()}, but init is null, so a "
                    f"backbone with random weights would be frozen; set init to weights, or remove {name}"
                )

    def encoder_arguments(self) -> dict[str, Any]:
        """The arguments of `build_encoder`, without `drop_path_rate`."""
        return self.model.encoder_arguments(self.views.global_size)

    def state_arguments(self, precision: str | None = None) -> dict[str, Any]:
        """The arguments of `build_state` except `device`; without a precision only for counting."""
        frozen = self.optim.freeze_backbone
        return {
            "encoder": self.encoder_arguments(),
            "head": self.head,
            "loss": self.loss,
            "seed": self.seed,
            "drop_path_rate": 0.0 if frozen else self.model.drop_path_rate,
            "freeze_backbone": frozen,
            "max_bad_steps": self.optim.max_bad_steps,
            "loss_scaling": precision == "fp16",
            "activation_checkpointing": self.machine.activation_checkpointing,
            "compiled": self.machine.compile and precision is not None,
        }

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain nested values, for YAML and checkpoints."""
        names = [each.name for each in fields(Recipe)]  # without the options of a subclass
        return json.loads(json.dumps({name: value for name, value in asdict(self).items() if name in names}))


def split_batch(global_batch_size: int, batch_size_per_gpu: int | None, processes: int) -> tuple[int, int]:
    """Images per process and forward pass, and micro-batches per step, for the given global batch size.

    Raises:
        UserError: the sizes do not divide; the message proposes values that do.
    """
    if global_batch_size % processes:
        multiple = max(1, round(global_batch_size / processes)) * processes
        raise UserError(
            f"optim.global_batch_size is {global_batch_size}, not divisible by {processes} processes; use "
            f"{_divisors(global_batch_size, processes)} processes, or a batch of {multiple} (which changes "
            f"the experiment)"
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
    """The largest divisor of a process's share of the batch that is at most half of `batch_size`."""
    return max(size for size in range(1, max(1, batch_size // 2) + 1) if share % size == 0)


def less_memory(share: int, batch_size: int, checkpointing: bool) -> str:
    """What makes a step need less GPU memory than with `batch_size` images, after the word `use`."""
    smaller = smaller_batch(share, batch_size)
    ways = [f"machine.batch_size_per_gpu {smaller} (the experiment stays the same)"] * (smaller < batch_size)
    ways += ["machine.activation_checkpointing true"] * (not checkpointing)
    return " or ".join(ways or ["a smaller model", "a GPU with more memory"])


def _divisors(number: int, near: int) -> str:
    """The three divisors of a number that are nearest to `near`, such as `1 or 2 or 4`."""
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda one: abs(one - near))[:3])))
