"""The table of all commands: their options, where they live, and how they are called. Needs no torch."""

from dataclasses import dataclass

from dino_sparo.cli import evaluating, exporting, pretraining, slots
from dino_sparo.cli.bench import BenchOptions
from dino_sparo.cli.making import ShardOptions


@dataclass(frozen=True)
class Command:
    """One program.

    Attributes:
        options: what it takes.
        function: `module:name` of what runs with them; it returns the exit status, or None for 0.
        usage, summary: how it is called, and one line about it.
        examples: lines to copy, without the name of the program; what they are for stands behind a `#`.
        plan: `module:name` of what `--dry-run` runs instead, in one process: it takes the options and the
            name of the recipe, and returns the exit status.
    """

    options: type
    function: str
    usage: str
    summary: str
    examples: tuple[str, ...]
    plan: str | None = None


COMMANDS = {
    "pretrain": Command(
        pretraining.PretrainOptions,
        "dino_sparo.cli.pretraining:pretrain",
        "dino-sparo pretrain --config RECIPE --data.path DIR --run_dir DIR [--nproc N] [--dry-run] "
        "[--key VALUE ...]",
        "pretrain an encoder, or resume a run",
        (
            "pretrain --config imagenet_vits16_sparo --data.path /data/imagenet --run_dir runs/sparo "
            "--nproc 8",
            "pretrain --config photos_sparo --data.path photos --run_dir runs/photos --dry-run  # the "
            "plan only",
            "pretrain --run_dir runs/photos  # resume it",
        ),
        plan="dino_sparo.cli.pretraining:plan",
    ),
    "check": Command(
        pretraining.CheckOptions,
        "dino_sparo.cli.pretraining:check",
        "dino-sparo check --config RECIPE --data.path DIR [--nproc N] [--measure] [--scan] [--json] "
        "[--key VALUE ...]",
        "before a run: the plan, and if asked for its speed and memory, and a look at every file",
        (
            "check --config imagenet_vits16_sparo --data.path /data/imagenet --nproc 8",
            "check --config photos_sparo --data.path photos --measure --scan  # speed and memory, and "
            "every file",
        ),
        plan="dino_sparo.cli.pretraining:check",
    ),
    "prepare": Command(
        exporting.PrepareOptions,
        "dino_sparo.cli.exporting:prepare",
        "dino-sparo prepare DIR --out OUT [--labels FILE]",
        "class folders of ImageNet as you have it: tars, a flat validation folder, Kaggle's layout",
        ("prepare /data/kaggle --out /data/imagenet",),
    ),
    "shard": Command(
        ShardOptions,
        "dino_sparo.cli.making:shard",
        "dino-sparo shard DIR --out OUT [--short-side 512] [--num-workers N]",
        "tar shards of a folder of images, to be read like the folder, for network file systems",
        ("shard /data/imagenet --out /data/shards --short-side 512",),
    ),
    "knn": Command(
        evaluating.KnnOptions,
        "dino_sparo.cli.evaluating:knn",
        "dino-sparo knn RUN --data.path DIR [--test NAME=DIR ...] [--nproc N] [--key VALUE ...]",
        "k-NN accuracy of a trained encoder",
        (
            "knn runs/sparo --data.path /data/imagenet --nproc 8",
            "knn dino_deitsmall16_pretrain.pth --data.path photos  # official weights",
            "knn runs/sparo --data.path photos --untrained  # the baseline",
        ),
    ),
    "export": Command(
        exporting.ExportOptions,
        "dino_sparo.cli.exporting:export",
        "dino-sparo export RUN --out OUT [--format onnx | official] [--which student] [--arch NAME]",
        "an encoder for timm and the Hugging Face hub, as ONNX, or in the official style",
        (
            "export runs/sparo --out sparo",
            "export runs/sparo --out sparo_onnx --format onnx",
            "export runs/sparo --out sparo.pth --format official",
        ),
    ),
    "compare": Command(
        evaluating.CompareOptions,
        "dino_sparo.cli.evaluating:compare",
        "dino-sparo compare RUN ... [--control RUN] [--markdown]",
        "k-NN and linear accuracy of several runs in one table",
        ("compare runs/sparo runs/dino --control runs/dino --markdown",),
    ),
    "linear": Command(
        evaluating.LinearOptions,
        "dino_sparo.cli.evaluating:linear",
        "dino-sparo linear RUN --data.path DIR [--sweep] [--cached] [--test NAME=DIR ...] [--nproc N] "
        "[--key VALUE ...]",
        "linear-probe accuracy of a trained encoder",
        (
            "linear runs/sparo --data.path /data/imagenet --nproc 8  # the official protocol",
            "linear runs/sparo --data.path photos --cached --sweep  # a look in seconds",
        ),
    ),
    "demo": Command(
        pretraining.PretrainOptions,
        "dino_sparo.cli.demo:demo",
        "dino-sparo demo [--data.path DIR] [--key VALUE ...]",
        "five minutes on a laptop: train, watch k-NN rise, look at slots",
        ("demo", "demo --data.path photos"),
    ),
    "bench": Command(
        BenchOptions,
        "dino_sparo.cli.bench:bench",
        "dino-sparo bench [--config RECIPE] [--data.path DIR] [--compare] [--json] [--profile FILE] "
        "[--key VALUE ...]",
        "where the time of training goes, also against plain code; and of read-out and k-NN",
        ("bench --config imagenet_vits16_sparo --data.path /data/imagenet --compare", "bench --what readout"),
    ),
    "sweep": Command(
        pretraining.StudyOptions,
        "dino_sparo.cli.pretraining:sweep",
        "dino-sparo sweep --config RECIPE --data.path DIR --run_dir DIR [--variants readouts] "
        "[--vary KEY=VALUE,VALUE ...] [--dry-run] [--key VALUE ...]",
        "the former name of study --evaluate false: variants of a recipe in one table of sizes and k-NN",
        (
            "sweep --config photos_sparo --variants readouts --vary seed=0,1 --data.path photos "
            "--run_dir runs/readouts",
            "sweep --config photos_sparo --vary model.readout.num_slots=4,8,16 --data.path photos "
            "--run_dir runs/slots",
        ),
        plan="dino_sparo.cli.pretraining:plan_sweep",
    ),
    "study": Command(
        pretraining.StudyOptions,
        "dino_sparo.cli.pretraining:study",
        "dino-sparo study --config RECIPE --data.path DIR --run_dir DIR --variants readouts "
        "--vary seed=0,1,2 [--transfer NAME=DIR ...] [--dry-run] [--key VALUE ...]",
        "pretrain variants over seeds, evaluate all of them alike, write one page of tables and curves",
        (
            "study --config photos_sparo --variants readouts --only cls sparo --vary seed=0,1,2 "
            "--data.path photos --run_dir runs/study",
        ),
        plan="dino_sparo.cli.pretraining:plan_study",
    ),
    "slots maps": Command(
        slots.SlotMapsOptions,
        "dino_sparo.cli.slots:maps",
        "dino-sparo slots maps RUN --data.path DIR [--slots '[0,5]'] [--short-side 448] [--key VALUE ...]",
        "where slots look: attention drawn over images",
        ("slots maps runs/sparo --data.path photos --short-side 448",),
    ),
    "slots gallery": Command(
        slots.SlotGalleryOptions,
        "dino_sparo.cli.slots:gallery",
        "dino-sparo slots gallery RUN --data.path DIR [--key VALUE ...]",
        "the images that each slot responds to most, and their neighbours within it",
        ("slots gallery runs/sparo --data.path photos --slots '[0,5]'",),
    ),
    "slots rank": Command(
        slots.SlotRankOptions,
        "dino_sparo.cli.slots:rank",
        "dino-sparo slots rank RUN --data.path DIR [--control RUN] [--key VALUE ...]",
        "each slot alone, and accuracy against the number of slots kept",
        ("slots rank runs/sparo --data.path photos --control runs/dino",),
    ),
    "slots mask": Command(
        slots.SlotMaskOptions,
        "dino_sparo.cli.slots:mask",
        "dino-sparo slots mask RUN --data.path DIR [--transfer NAME=DIR] [--control RUN] [--key VALUE ...]",
        "a learned mask over slots, and its transfer to other images",
        ("slots mask runs/sparo --data.path photos --transfer drawings=/data/drawings",),
    ),
    "slots health": Command(
        slots.SlotHealthOptions,
        "dino_sparo.cli.slots:health",
        "dino-sparo slots health RUN --data.path DIR [--key VALUE ...]",
        "entropy of attention, dead and duplicate slots",
        ("slots health runs/sparo --data.path photos",),
    ),
    "slots factors": Command(
        slots.SlotFactorsOptions,
        "dino_sparo.cli.slots:factors",
        "dino-sparo slots factors RUN [--control RUN] [--key VALUE ...]",
        "which slot tells which known factor of generated pictures",
        ("slots factors runs/demo",),
    ),
    "slots report": Command(
        slots.SlotReportOptions,
        "dino_sparo.cli.slots:report",
        "dino-sparo slots report RUN [--data.path DIR] [--control RUN] [--key VALUE ...]",
        "one HTML page of a run: curves, scores, maps, galleries",
        ("slots report runs/sparo --data.path photos",),
    ),
}

# How the overview groups them, in the order in which one uses them.
GROUPS = {
    "train": ("demo", "pretrain", "sweep", "study"),
    "evaluate": ("knn", "linear", "compare"),
    "slots": tuple(name for name in COMMANDS if name.startswith("slots ")),
    "data": ("prepare", "shard"),
    "weights": ("export",),
    "measure": ("check", "bench"),
}
DISTRIBUTED = ("pretrain", "knn", "linear")  # these run in several processes; check tells what such would do
# The option that arguments without a name stand for.
POSITIONAL = {
    **dict.fromkeys(("knn", "linear", "export"), "run"),
    **dict.fromkeys(("prepare", "shard"), "source"),
    **dict.fromkeys([name for name in COMMANDS if name.startswith("slots ")], "run"),
    "compare": "runs",
}
