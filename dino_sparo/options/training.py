"""Options of pretraining. Sections of the experiment have no defaults: the recipe is the whole experiment."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataOptions:
    """The images to learn from."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards or of parquet files of the
    Hugging Face hub; `hub:OWNER/NAME` for a set there; `cifar10` or `stl10`, which torchvision downloads;
    `shapes` for generated pictures."""
    max_images: int | None
    """Learn from this many images only, evenly spread over the folder; null takes all."""
    max_side: int | None
    """Images with a longer side than this many pixels are reduced to it when they are read (JPEG files while
    they are decoded), before any crop is drawn; null leaves all as they are."""
    on_bad_image: Literal["stop", "substitute"]
    """What to do about an image that cannot be read: stop and name it, or let another one stand in, drawn
    by the seed; those are listed in the run folder, and more than one image in a hundred ends the run."""


@dataclass
class ViewOptions:
    """The random views of an image: two global crops and some local ones. Lists of three are for the
    first global, the second global and the local crops."""

    global_size: int
    """Side of a global crop in pixels; the position embedding is native at it."""
    global_scale: tuple[float, float]
    """Share of the image area in a global crop, lowest and highest."""
    local_size: int
    """Side of a local crop in pixels."""
    local_scale: tuple[float, float]
    """Share of the image area in a local crop, lowest and highest."""
    num_local_crops: int
    """Local crops an image."""
    flip_probability: float
    """Probability of a horizontal flip."""
    jitter_probability: float
    """Probability of colour jitter."""
    jitter_strength: tuple[float, float, float, float]
    """Strength of brightness, contrast, saturation and hue jitter."""
    grayscale_probability: float
    """Probability of greyscale."""
    blur_probability: tuple[float, float, float]
    """Probability of Gaussian blur for first global, second global and local crops."""
    blur_radius: tuple[float, float]
    """Radius of the blur in pixels, lowest and highest."""
    solarize_probability: tuple[float, float, float]
    """Probability of solarisation for first global, second global and local crops."""


@dataclass
class ArchOptions:
    """A ViT of any size."""

    width: int
    """Token width."""
    depth: int
    """Blocks of the plain ViT; SPARO replaces the last of them."""
    num_heads: int
    """Attention heads; must divide the width."""


@dataclass
class ReadoutOptions:
    """What turns tokens into the encoding. Fields that a read-out does not have are null or left out."""

    name: Literal["sparo", "cls", "gap", "pooler", "bottleneck"]
    """`sparo`: slots in place of the last block; `cls`: class token; `gap`: mean of the patch tokens;
    `pooler`: learned queries, LayerNorm, multi-head attention in place of the last block; `bottleneck`: two
    linear layers on the class token."""
    num_slots: int | None = None
    """SPARO and pooler: number of slots L."""
    slot_dim: int | None = None
    """SPARO and pooler: numbers a slot V."""
    key_dim: int | None = None
    """SPARO: width of keys and queries of a head."""
    group_size: int | None = None
    """SPARO with separate heads: slots that share one key projection; must divide num_slots."""
    heads: Literal["separate", "multi"] | None = None
    """SPARO: a head of its own for each slot (also if null), or all `num_heads` for every slot."""
    num_heads: int | None = None
    """Pooler, and SPARO with multi heads: attention heads; they must divide the pooler's slot_dim."""
    after_last_block: bool | None = None
    """SPARO and pooler: true keeps the last transformer block and reads after it; else it is replaced."""
    output: Literal["slots", "whole"] | None = None
    """SPARO and pooler: LayerNorm and a linear layer on each slot, or on all slots as one; null has none."""
    bottleneck_dim: int | None = None
    """Bottleneck: width m of the narrow layer."""
    encoding_dim: int | None = None
    """Bottleneck: width M of the encoding."""


@dataclass
class ModelOptions:
    """Student and teacher."""

    arch: Literal["vit_tiny", "vit_small", "vit_base"] | ArchOptions
    """Named size, or width, depth and num_heads."""
    patch_size: int
    """Side of a patch in pixels; must divide both crop sizes."""
    drop_path_rate: float
    """Stochastic depth of the student's last block, rising linearly from 0; the teacher has none."""
    readout: ReadoutOptions
    """The read-out."""


@dataclass
class HeadOptions:
    """The DINO projection head."""

    num_prototypes: int
    """Outputs of the head, K."""
    hidden_dim: int
    """Width of the two hidden layers."""
    bottleneck_dim: int
    """Width of the l2-normalised bottleneck."""
    norm_last_layer: bool
    """Fix the prototypes' length at 1; steadier, official for ViT-S at 100 epochs."""


@dataclass
class LossOptions:
    """Temperatures and centre."""

    student_temp: float
    """Student temperature."""
    warmup_teacher_temp: float
    """Teacher temperature at the start."""
    teacher_temp: float
    """Teacher temperature after its warm-up."""
    warmup_teacher_temp_epochs: int
    """Epochs of linear teacher temperature warm-up."""
    center_momentum: float
    """Share of the old centre kept at each step."""


@dataclass
class OptimOptions:
    """Optimisation."""

    epochs: int
    """Passes over the images."""
    global_batch_size: int
    """Images an optimiser step, over all processes and micro-batches; the last partial batch of an epoch is
    dropped."""
    lr_per_256: float
    """Peak learning rate for a batch of 256; scaled linearly with global_batch_size."""
    final_lr: float
    """Learning rate at the end of the cosine."""
    warmup_epochs: int
    """Epochs of linear learning rate warm-up from 0."""
    weight_decay: float
    """Weight decay at the start."""
    final_weight_decay: float
    """Weight decay at the end of its cosine."""
    clip_norm: float
    """Largest norm of each parameter tensor's own gradient; 0 switches clipping off."""
    freeze_last_layer_epochs: int
    """Epochs in which the prototypes do not learn."""
    teacher_momentum: float
    """Momentum of the teacher at the start; rises to 1 on a cosine."""
    max_bad_steps: int
    """Steps whose loss or gradients are not finite that a start skips before it ends; overflows of fp16,
    which only lower the loss scale, are no such steps."""
    freeze_backbone: bool = False
    """With `init`: the backbones of student and teacher stay as they are, without stochastic depth; only
    read-out and head learn."""


@dataclass
class MonitorOptions:
    """k-NN and alarm while training; they change nothing of the run."""

    knn_every_epochs: int = 10
    """20-NN of the teacher every so many epochs, also before the first and after the last; 0: never."""
    knn_path: str | None = None
    """Labelled folder (train/<class>, val/<class>) for it; null takes data.path if it is labelled."""
    knn_images_per_class: int | None = 50
    """Gallery and test images a class at most, evenly spread; null takes all."""


@dataclass
class MachineOptions:
    """What belongs to the machine, not to the experiment."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    batch_size_per_gpu: int | None = None
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
    views: Literal["auto", "pil", "tensor", "device"] = "auto"
    """Who makes the views, of the same random numbers: workers by PIL, or the training device, for which
    workers only decode. auto takes the device on a GPU if data.max_side bounds the images, else PIL; tensor,
    which older recipes may have, is read as pil."""
    compile: bool = False
    """Compile the backbones of student and teacher: minutes at every start, for 3 per cent of speed on two
    CPU cores; not measured on a GPU."""
    num_workers: int | None = None
    """Processes that load images, for each training process; 0 loads in the training process, null takes one
    a core and shares them among the training processes, at most 16 each."""
    prefetch_batches: int = 2
    """Batches that each worker prepares ahead."""
    data_timeout_seconds: int = 600
    """Without a batch of images for so long the run ends, naming the files being read."""


@dataclass
class LogOptions:
    """Log and checkpoints."""

    log_every_steps: int = 10
    """Steps between two entries of the log."""
    checkpoint_every_epochs: int = 1
    """Epochs between two checkpoints; one is always written at the end."""
    checkpoint_every_minutes: float = 30.0
    """Minutes between two checkpoints within an epoch, written with the next log entry; 0: none."""
    keep_every_epochs: int = 20
    """Keep one checkpoint every so many epochs for good, besides the last two; 0: none."""


@dataclass
class PretrainOptions:
    """Pretrain an encoder with DINO."""

    run_dir: str
    """Folder of the run; an existing run goes on where it stopped."""
    seed: int
    """Seed of every random number of the run."""
    data: DataOptions
    """The images to learn from."""
    views: ViewOptions
    """The random views of an image."""
    model: ModelOptions
    """Student and teacher."""
    head: HeadOptions
    """The DINO projection head."""
    loss: LossOptions
    """Temperatures and centre."""
    optim: OptimOptions
    """Optimisation."""
    init: str | None = None
    """Starting weights: a run folder, a checkpoint or exported encoder, or a ViT of the official DINO code
    or of timm (a file, or `timm:NAME`, which timm downloads). Blocks that the recipe builds, and whatever
    else fits, are taken; what is not there begins fresh, and the log says so. A run that goes on does not
    need the file again. null begins with random weights."""
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    """k-NN while training."""
    machine: MachineOptions = field(default_factory=MachineOptions)
    """What belongs to the machine."""
    log: LogOptions = field(default_factory=LogOptions)
    """Log and checkpoints."""
    nproc: int = 1
    """Processes to start on this machine, one a GPU; torchrun starts them too, also on several machines."""
    resume_unverified: bool = False
    """Resume from a checkpoint whose .sha256 file is missing, although it may be damaged."""


@dataclass(kw_only=True)
class CheckOptions(PretrainOptions):
    """Look at a run before it starts: data, cost, hours, memory, disk, and what limits it."""

    run_dir: str = "runs/new"
    """Folder that the run would have; it and its disk are looked at, nothing is written."""
    scan: bool = True
    """Read every file of the data set and list what is damaged or there twice."""
    json: bool = False
    """Print one JSON object instead of text."""
