"""Every knob, documented. Sections of the experiment have no defaults: the recipe is the whole experiment.

Imported before torch, so that `--help` and a mistake in a recipe answer at once.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataOptions:
    """The images to learn from."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), or `shapes` for generated pictures."""
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
    """What turns tokens into the encoding."""

    name: Literal["sparo", "cls", "gap"]
    """`sparo`: slots in place of the last block; `cls`: class token; `gap`: mean of the patch tokens."""
    num_slots: int | None = None
    """SPARO: number of slots L; a cls or gap recipe leaves the four SPARO fields out."""
    slot_dim: int | None = None
    """SPARO: numbers a slot V."""
    key_dim: int | None = None
    """SPARO: width of keys and queries."""
    group_size: int | None = None
    """SPARO: slots that share one key projection; must divide num_slots."""


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
    """Who makes the views, of the same random numbers: workers by PIL, workers by tensors, or the training
    device, for which workers only decode. auto takes the device on a GPU; on a CPU tensors for crops of 96
    pixels or more if there is a C++ compiler, else PIL."""
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
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    """k-NN while training."""
    machine: MachineOptions = field(default_factory=MachineOptions)
    """What belongs to the machine."""
    log: LogOptions = field(default_factory=LogOptions)
    """Log and checkpoints."""
    nproc: int = 1
    """Processes to start on this machine, one a GPU; torchrun starts them too, also on several machines."""


@dataclass(kw_only=True)
class CheckOptions(PretrainOptions):
    """Look at a run before it starts: data, cost, hours, memory, disk, and what limits it."""

    run_dir: str = "runs/new"
    """Folder that the run would have; it and its disk are looked at, nothing is written."""
    scan: bool = True
    """Read every file of the data set and list what is damaged or there twice."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass
class LabelledDataOptions:
    """A labelled image folder."""

    path: str
    """Folder with train/<class>/... and val/<class>/..., or `shapes`; without val/ every fifth image is
    held out."""


@dataclass
class PrepareOptions:
    """Class folders of ImageNet as people have it."""

    source: str
    """Folder of the images or tars: Kaggle's layout, the official tars, or what was in them."""
    out: str
    """Folder that gets train/<class> and val/<class>, by links where images lie in folders, else unpacked."""
    labels: str | None = None
    """Classes of a flat folder: LOC_val_solution.csv, the devkit (folder or tar.gz), or a text file with a
    line `file_name class` for every image; null takes those that lie near ImageNet's validation images."""


@dataclass
class ShardOptions:
    """Tar shards of a folder of images, for network file systems."""

    source: str
    """Folder of images (train/<class>/... and val/<class>/..., <class>/... or flat)."""
    out: str
    """Folder that gets the shards, in train/ and val/ if the source has both; `data.path` can be it."""
    short_side: int | None = None
    """Reduce images to this short side in pixels if theirs is longer, as JPEG files of quality 95; null
    copies all files as they are."""
    num_workers: int | None = None
    """Processes that read and write, each one shard at a time; null takes one a core."""


@dataclass
class KnnOptions:
    """k-NN accuracy of a trained encoder."""

    run: str
    """Run folder or weights file."""
    data: LabelledDataOptions
    """The labelled images."""
    k: int | list[int] | None = None
    """Numbers of neighbours; 20 is the headline. null takes those of 10, 20, 100, 200 that the gallery
    has images for."""
    which: Literal["teacher", "student"] = "teacher"
    """Whose weights to evaluate."""
    untrained: bool = False
    """Evaluate the same encoder with fresh random weights instead, as a baseline."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture that the weights must have; null tells it from the file."""
    feature: Literal["encoding", "cls", "patch_mean", "probe"] = "encoding"
    """What to compare: the encoding (all slots, or the CLS token without slots), the CLS token, the mean
    patch token, or the linear probe's feature."""
    test: list[str] = field(default_factory=list)
    """Further labelled folders to classify, each NAME=DIR; classes are matched by the names of folders."""
    out: str | None = None
    """Folder for results.json; null takes the run folder, or one beside a weights file."""
    cache: str | None = None
    """Folder for features on disk, shared by all machines; null takes `features` beside the results."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Of the features on disk."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    num_workers: int | None = None
    """Processes that load images, for each process; null takes one a core, at most 16 in all."""
    batch_size: int = 64
    """Images a forward pass."""
    nproc: int = 1
    """Processes to start on this machine, one a GPU; under torchrun leave it out."""


@dataclass
class ExportOptions:
    """An encoder as a folder of plain files: model.safetensors and config.json."""

    run: str
    """Run folder, checkpoint file, or official DINO weights of a ViT."""
    out: str
    """New folder for the two files."""
    which: Literal["teacher", "student"] = "teacher"
    """Whose weights to export."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture of official weights, which do not tell their number of heads; null takes one for 64
    numbers of width."""


@dataclass
class CompareOptions:
    """One table of the evaluations of several runs."""

    runs: list[str] | None = None
    """Run folders or weights files with results of `knn` or `linear`; seeds of one recipe are averaged."""
    control: str | None = None
    """One of the runs: differences are to its recipe. null takes the one recipe whose read-out is not
    sparo."""
    markdown: bool = False
    """Print a Markdown table instead of one aligned for a terminal."""


@dataclass
class LinearOptions:
    """Linear probes on a frozen encoder: by default exactly the official one."""

    run: str
    """Run folder or weights file."""
    data: LabelledDataOptions
    """The labelled images."""
    epochs: int = 100
    """Passes over the train images; the learning rate falls to 0 over them, along a cosine."""
    batch_size: int = 1024
    """Images a step, of all processes together; a learning rate is for 256 and grows with it."""
    learning_rates: list[float] | None = None
    """A probe for each, for a batch of 256; null takes the official 0.001."""
    num_blocks: list[int] | None = None
    """A probe for each number of last blocks, 1 to 4, the encoding counting as one; null takes the official
    4, or all of a shallower encoder."""
    features: list[Literal["encoding", "cls", "both"]] | None = None
    """A probe for each: the encoding only, the class token of the last blocks only, or both; null takes the
    official one, both with slots and cls without."""
    sweep: bool = False
    """Where these three are null take all features, 1 and 4 blocks, learning rates 0.001, 0.01 and 0.1: with
    slots 12 probes, for about the time of one."""
    cached: bool = False
    """Learn from features of centre crops, computed once: seconds instead of hours, but not the official
    protocol."""
    train_fraction: float = 1.0
    """Share of the train images to learn from, the same number of each class."""
    test: list[str] = field(default_factory=list)
    """Further labelled folders to score, each NAME=DIR; classes are matched by the names of folders."""
    evaluate: str | None = None
    """A saved classifier to score instead of training any."""
    which: Literal["teacher", "student"] = "teacher"
    """Whose weights to evaluate."""
    untrained: bool = False
    """Evaluate the same encoder with fresh random weights instead, as a baseline."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture that the weights must have; null tells it from the file."""
    seed: int = 0
    """Of initial weights, order, crops and the chosen fraction."""
    out: str | None = None
    """Folder for results.json, and for log, checkpoints and classifiers in `linear` below it; null takes the
    run folder, or one beside a weights file."""
    cache: str | None = None
    """Folder for features on disk, shared by all machines; null takes `features` beside the results."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Of the train features on disk with `cached`; those of test images are float32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoder on training crops; auto takes bf16 or fp16 on a GPU, fp32 on the CPU. Probes are
    float32."""
    views: Literal["auto", "pil", "tensor", "device"] = "auto"
    """Who makes the training crops: workers by PIL, workers by tensors, or the device, for which workers only
    decode. auto takes the device on a GPU, tensors on a CPU with a C++ compiler, else PIL."""
    num_workers: int | None = None
    """Processes that load images, for each process; null takes one a core, at most 16 in all."""
    nproc: int = 1
    """Processes to start on this machine, one a GPU; under torchrun leave it out."""


@dataclass
class BenchOptions:
    """Where the time of training by a recipe goes, and against plain code; or time and memory of the SPARO
    read-out against its direct form and the block it replaces, of starting on a folder of many images, of the
    search of nearest neighbours, of many linear probes against one, or of what lets a run be stopped, watched
    and saved."""

    what: Literal["training", "readout", "index", "knn", "probes", "safety"] = "training"
    """What to measure. training takes the fields from recipe to device; readout takes batch_size, rounds,
    device and num_tokens; index those with `index_`; knn those with `knn_`, rounds and device; probes
    batch_size, rounds and device; safety recipe and rounds."""
    recipe: str = "photos_sparo"
    """Recipe, by name or path, whose training is measured."""
    data: str | None = None
    """Folder of images or `shapes`; null takes generated pictures."""
    keep_files: bool = False
    """Read the files of data as they are; else its images are first written as JPEG of ImageNet's usual
    size, 500 x 375 pixels, in the folder for temporary files: small files decode too cheaply."""
    num_images: int = 256
    """Images to read, at least a batch."""
    batch_size: int = 16
    """Images a step, or a pass."""
    rounds: int = 15
    """Interleaved rounds; the medians are reported."""
    seconds: float | None = 10.0
    """Of training end to end, from files; null leaves it out."""
    compare: bool = False
    """Measure a plain implementation beside ours, round by round, and print the ratios."""
    json: bool = False
    """Print one JSON object; the table goes to standard error."""
    profile: str | None = None
    """File for a trace of some steps, for chrome://tracing; tells too how often the host waits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As machine.precision; auto takes the recipe's."""
    num_workers: int | None = None
    """As machine.num_workers; null takes the recipe's."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    num_tokens: int = 197
    """Tokens an image."""
    index_files: int = 1_300_000
    """Empty files to make, in the folder for temporary files; they are removed at the end."""
    index_processes: int = 2
    """Training processes that start together."""
    index_workers: int = 2
    """Worker processes of each."""
    knn_train: int = 200_000
    """Generated features to search, in a folder for temporary files."""
    knn_test: int = 10_000
    """Features to search for."""
    knn_width: int = 4096
    """Numbers of a feature."""
