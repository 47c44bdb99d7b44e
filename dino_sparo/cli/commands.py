"""The table of all commands: their options, what runs them, and examples. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from dino_sparo.cli import bench, evaluating, exporting, pretraining, report, slots
from dino_sparo.cli.parsing import NOT_IN_RECIPES
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import leaf_keys, leaves


@dataclass(frozen=True)
class Command:
    """One program.

    Attributes:
        options: its options.
        function: what runs with them; it returns the exit status, or None for 0.
        summary: one line about it.
        examples: lines to copy, without the name of the program; what they are for stands behind a `#`.
        plan: what `--dry-run` runs instead, in one process: it takes the options and the name of the recipe.
            If it is `function` itself (`check`), the command always runs so.
        distributed: whether it can run in several processes.
    """

    options: type
    function: Callable[..., int | None]
    summary: str
    examples: tuple[str, ...]
    plan: Callable[[Any, str | None], int] | None = None
    distributed: bool = False

    @property
    def positional(self) -> str | None:
        """The option that an argument without a name stands for."""
        return next((key for key in leaf_keys(self.options) if key in ("run", "runs", "source")), None)

    def takes_from_run(self, key: str) -> bool:
        """Whether an option that is omitted has the value in the run folder."""
        needed = {field.name for field in fields(self.options) if field.default is field.default_factory}
        return key == "data.path" and {"run", "data"} <= needed

    @property
    def of_run(self) -> bool:
        """Whether its options are those of a recipe and more."""
        return issubclass(self.options, Recipe)


COMMANDS = {
    "demo": Command(
        pretraining.PretrainOptions,
        pretraining.demo,
        "train a small encoder in five minutes on a laptop, and show k-NN accuracy and slots",
        ("demo", "demo --data.path photos"),
    ),
    "pretrain": Command(
        pretraining.PretrainOptions,
        pretraining.pretrain,
        "pretrain an encoder, or resume a run",
        (
            "pretrain --config imagenet_vits16_sparo --data.path /data/imagenet --run_dir runs/sparo "
            "--nproc 8",
            "pretrain --config photos_sparo --data.path photos --run_dir runs/photos --dry-run  # print "
            "the plan only",
            "pretrain --run_dir runs/photos  # resume this run",
        ),
        plan=pretraining.plan,
        distributed=True,
    ),
    "check": Command(
        pretraining.CheckOptions,
        pretraining.check,
        "print the plan of a run; optionally measure its speed and memory, and scan every file",
        (
            "check --config imagenet_vits16_sparo --data.path /data/imagenet --nproc 8",
            "check --config imagenet_vits16_sparo --data.path /data/imagenet --nproc 8 --gpu h100 a100  # "
            "estimates for other GPUs",
            "check --config photos_sparo --data.path photos --measure --scan  # speed and memory, and "
            "every file",
        ),
        plan=pretraining.check,
    ),
    "study": Command(
        pretraining.StudyOptions,
        pretraining.study,
        "pretrain variants over seeds, evaluate all in the same way, and write a page of tables and curves",
        (
            "study --config photos_sparo --variants readouts --only cls sparo --vary seed=0,1,2 "
            "--data.path photos --run_dir runs/study",
        ),
        plan=pretraining.plan_study,
    ),
    "knn": Command(
        evaluating.KnnOptions,
        evaluating.knn,
        "k-NN accuracy of a trained encoder",
        (
            "knn runs/sparo --data.path /data/imagenet --nproc 8",
            "knn dino_deitsmall16_pretrain.pth --data.path photos  # official weights",
            "knn runs/sparo --data.path photos --untrained  # the baseline",
        ),
        distributed=True,
    ),
    "linear": Command(
        evaluating.LinearOptions,
        evaluating.linear,
        "linear-probe accuracy of a trained encoder",
        (
            "linear runs/sparo --data.path /data/imagenet --nproc 8  # the official protocol",
            "linear runs/sparo --data.path photos --cached --sweep  # on cached features, in seconds",
        ),
        distributed=True,
    ),
    "compare": Command(
        evaluating.CompareOptions,
        evaluating.compare,
        "k-NN and linear accuracy of several runs in one table",
        ("compare runs/sparo runs/dino --control runs/dino --markdown",),
    ),
    "slots maps": Command(
        slots.SlotMapsOptions,
        slots.maps,
        "where slots look: attention drawn over images",
        (
            "slots maps runs/sparo --data.path photos --short-side 448",
            "slots maps dino_deitsmall16_pretrain.pth --data.path photos  # heads of the CLS token",
        ),
    ),
    "slots gallery": Command(
        slots.SlotGalleryOptions,
        slots.gallery,
        "the images to which each slot responds most, and their nearest neighbors in this slot",
        ("slots gallery runs/sparo --data.path photos --slots 0 5",),
    ),
    "slots neighbors": Command(
        slots.SlotNeighborsOptions,
        slots.neighbors,
        "nearest neighbors by whole encodings",
        ("slots neighbors runs/sparo --data.path photos",),
    ),
    "slots rank": Command(
        slots.SlotRankOptions,
        slots.rank,
        "accuracy of each slot alone, and accuracy against the number of slots kept",
        ("slots rank runs/sparo --data.path photos --control runs/dino",),
    ),
    "slots mask": Command(
        slots.SlotMaskOptions,
        slots.mask,
        "a learned mask over slots, and its transfer to other images",
        ("slots mask runs/sparo --data.path photos --transfer drawings=/data/drawings",),
    ),
    "slots health": Command(
        slots.SlotHealthOptions,
        slots.health,
        "entropy of attention, dead and duplicate slots",
        ("slots health runs/sparo --data.path photos",),
    ),
    "slots factors": Command(
        slots.SlotFactorsOptions,
        slots.factors,
        "which slot contains which known factor of generated pictures",
        ("slots factors runs/demo",),
    ),
    "slots report": Command(
        report.SlotReportOptions,
        report.report,
        "one HTML page of a run: curves, accuracy, maps, galleries, nearest neighbors",
        ("slots report runs/sparo --data.path photos",),
    ),
    "prepare": Command(
        exporting.PrepareOptions,
        exporting.prepare,
        "make class folders from ImageNet as downloaded: tar files, flat validation folder, Kaggle's layout",
        ("prepare /data/kaggle --out /data/imagenet",),
    ),
    "shard": Command(
        exporting.ShardOptions,
        exporting.shard,
        "write a folder of images as tar shards, which network file systems read faster",
        ("shard /data/imagenet --out /data/shards --short-side 512",),
    ),
    "export": Command(
        exporting.ExportOptions,
        exporting.export,
        "export an encoder for timm and the Hugging Face hub, as ONNX, or in the official format",
        (
            "export runs/sparo --out sparo",
            "export runs/sparo --out sparo_onnx --format onnx",
            "export runs/sparo --out sparo.pth --format official",
        ),
    ),
    "embed": Command(
        exporting.EmbedOptions,
        exporting.embed,
        "write the features of images, and their names, to a file for numpy",
        ("embed runs/sparo --data.path photos --out features.npz",),
    ),
    "bench": Command(
        bench.BenchOptions,
        bench.bench,
        "measure the time of each part of training, or of the read-out; --compare adds plain PyTorch",
        ("bench --config imagenet_vits16_sparo --data.path /data/imagenet --compare", "bench --what readout"),
    ),
}


def usage(name: str) -> str:
    """How a command is called, in one line, with what it needs."""
    command = COMMANDS[name]
    optional = {field.name for field in fields(command.options) if field.default is not field.default_factory}
    needed = [
        f"--{key} {key.rpartition('.')[2].upper()}"
        for key, (field, _) in leaves(command.options).items()
        if field.default is field.default_factory  # MISSING
        and key != command.positional
        and not command.takes_from_run(key)
        and key.partition(".")[0] not in optional
        and (not command.of_run or key in NOT_IN_RECIPES)
    ]
    if command.of_run:
        needed = [] if name == "demo" else ["--config RECIPE", *needed]
    return " ".join(
        filter(None, ["dino-sparo", name, (command.positional or "").upper(), *needed, "[--key VALUE ...]"])
    )
