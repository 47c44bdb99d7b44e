"""The table of all commands: their options, where they live, and how they are called."""

from dataclasses import dataclass

from dino_sparo import options as opt


@dataclass(frozen=True)
class Command:
    """One program: its options, where its function lives, and how it is called."""

    options: type
    function: str
    usage: str
    summary: str


COMMANDS = {
    "pretrain": Command(
        opt.PretrainOptions,
        "dino_sparo.training.pretrain:pretrain",
        "dino-sparo pretrain --config RECIPE --data.path DIR --run_dir DIR [--nproc N] [--key VALUE ...]",
        "pretrain an encoder, or go on with an existing run",
    ),
    "check": Command(
        opt.CheckOptions,
        "dino_sparo.check:check",
        "dino-sparo check --config RECIPE --data.path DIR [--nproc N] [--json] [--key VALUE ...]",
        "before a run: scan the data, measure speed and memory, tell hours and disk",
    ),
    "prepare": Command(
        opt.PrepareOptions,
        "dino_sparo.prepare:run",
        "dino-sparo prepare DIR --out OUT [--labels FILE]",
        "class folders of ImageNet as you have it: tars, a flat validation folder, Kaggle's layout",
    ),
    "shard": Command(
        opt.ShardOptions,
        "dino_sparo.shard:run",
        "dino-sparo shard DIR --out OUT [--short-side 512] [--num-workers N]",
        "tar shards of a folder of images, to be read like the folder, for network file systems",
    ),
    "knn": Command(
        opt.KnnOptions,
        "dino_sparo.evaluation.knn:run",
        "dino-sparo knn RUN --data.path DIR [--test NAME=DIR ...] [--nproc N] [--key VALUE ...]",
        "k-NN accuracy of a trained encoder",
    ),
    "export": Command(
        opt.ExportOptions,
        "dino_sparo.export:run",
        "dino-sparo export RUN --out DIR [--format onnx | official] [--which student] [--arch NAME]",
        "an encoder for timm and the Hugging Face hub, as ONNX, or in the official style",
    ),
    "compare": Command(
        opt.CompareOptions,
        "dino_sparo.evaluation.compare:run",
        "dino-sparo compare RUN ... [--control RUN] [--markdown]",
        "k-NN and linear accuracy of several runs in one table",
    ),
    "linear": Command(
        opt.LinearOptions,
        "dino_sparo.evaluation.linear:run",
        "dino-sparo linear RUN --data.path DIR [--sweep] [--cached] [--test NAME=DIR ...] [--nproc N] "
        "[--key VALUE ...]",
        "linear-probe accuracy of a trained encoder",
    ),
    "demo": Command(
        opt.PretrainOptions,
        "dino_sparo.demo:demo",
        "dino-sparo demo [--data.path DIR] [--section.key VALUE ...]",
        "five minutes on a laptop: train, watch k-NN rise, look at slots",
    ),
    "bench": Command(
        opt.BenchOptions,
        "dino_sparo.bench.program:bench",
        "dino-sparo bench [--recipe NAME] [--data DIR] [--compare] [--json] [--profile FILE] [--key VALUE]",
        "where the time of training goes, also against plain code; and of read-out, k-NN, probes, ...",
    ),
    "sweep": Command(
        opt.SweepOptions,
        "dino_sparo.sweep:run",
        "dino-sparo sweep --config RECIPE --data.path DIR --run_dir DIR [--variants readouts] "
        "[--vary KEY=VALUE,VALUE ...] [--key VALUE ...]",
        "pretrain variants of a recipe and fill one table, such as the paper's Table 6",
    ),
    "slots maps": Command(
        opt.SlotMapsOptions,
        "dino_sparo.slots.maps:run",
        "dino-sparo slots maps RUN --data.path DIR [--slots '[0,5]'] [--short-side 448] [--key VALUE ...]",
        "where slots look: attention drawn over images",
    ),
    "slots gallery": Command(
        opt.SlotGalleryOptions,
        "dino_sparo.slots.gallery:run",
        "dino-sparo slots gallery RUN --data.path DIR [--key VALUE ...]",
        "the images that each slot responds to most, and their neighbours within it",
    ),
    "slots rank": Command(
        opt.SlotRankOptions,
        "dino_sparo.slots.ranking:run",
        "dino-sparo slots rank RUN --data.path DIR [--control RUN] [--key VALUE ...]",
        "each slot alone, and accuracy against the number of slots kept",
    ),
    "slots mask": Command(
        opt.SlotMaskOptions,
        "dino_sparo.slots.masks:run",
        "dino-sparo slots mask RUN --data.path DIR [--transfer NAME=DIR] [--control RUN] [--key VALUE ...]",
        "a learned mask over slots, and its transfer to other images",
    ),
    "slots health": Command(
        opt.SlotHealthOptions,
        "dino_sparo.slots.health:run",
        "dino-sparo slots health RUN --data.path DIR [--key VALUE ...]",
        "entropy of attention, dead and duplicate slots",
    ),
    "slots factors": Command(
        opt.SlotFactorsOptions,
        "dino_sparo.slots.factors:run",
        "dino-sparo slots factors RUN [--control RUN] [--key VALUE ...]",
        "which slot tells which known factor of generated pictures",
    ),
    "slots report": Command(
        opt.SlotReportOptions,
        "dino_sparo.slots.report:run",
        "dino-sparo slots report RUN [--data.path DIR] [--control RUN] [--key VALUE ...]",
        "one HTML page of a run: curves, scores, maps, galleries",
    ),
}

DISTRIBUTED = ("pretrain", "knn", "linear")  # these run in several processes; check tells what such would do
# What the first argument without a name stands for.
POSITIONAL = {
    **dict.fromkeys(("knn", "linear", "export"), "--run"),
    **dict.fromkeys(("prepare", "shard"), "--source"),
    **dict.fromkeys([name for name in COMMANDS if name.startswith("slots ")], "--run"),
}
POSITIONALS = {"compare": "--runs"}  # what all arguments without a name stand for
