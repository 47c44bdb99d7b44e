"""The commands `knn`, `linear` and `compare`: their options, and what they run."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dino_sparo.cli.images import EncodingOptions, LabeledDataOptions, choice_of
from dino_sparo.errors import UserError
from dino_sparo.files import existing_part, is_writable
from dino_sparo.recipe.typed import Batch, Epochs, Processes, Seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dino_sparo.data.sources import ImageSource
    from dino_sparo.evaluation.results import Result
    from dino_sparo.evaluation.transfer import TestSet
    from dino_sparo.models import Encoder


@dataclass(kw_only=True)
class EvaluationOptions(EncodingOptions):
    """What the evaluations of one encoder share."""

    data: LabeledDataOptions
    """The labeled images."""
    untrained: bool = False
    """Evaluate the same encoder with random weights, as a baseline."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture of the weights; null: inferred from the file."""
    test: list[str] = field(default_factory=list)
    """Further test sets, each NAME=DIR, a labeled folder; classes are matched by the names of their
    folders."""
    out: str | None = None
    """Folder for results.json and, from `linear`, for log, checkpoints, and classifiers; null: the run
    folder, or a folder beside the weights file."""
    cache: str | None = None
    """Folder for stored features, shared by all machines; null: `features` in the run folder, or beside the
    results if the run folder cannot be written."""
    nproc: Processes = 1
    """Processes to start on this machine, one per GPU; leave it out if torchrun starts them."""


@dataclass(kw_only=True)
class KnnOptions(EvaluationOptions):
    """k-NN accuracy of a trained encoder."""

    k: int | list[int] | None = None
    """Numbers of neighbors; 20-NN is the headline result. null: 10, 20, 100, and 200, without those that
    exceed the number of train images."""
    feature: Literal["encoding", "cls", "patch_mean", "probe"] = "encoding"
    """Feature to compare: `encoding`: all slots, or the CLS token of an encoder without slots; `cls`: CLS
    token; `patch_mean`: mean of the patch tokens; `probe`: the feature of the linear probe."""
    search: Literal["products", "faiss"] = "products"
    """Search for the neighbors: `products`: matrix products; `faiss`: faiss on the CPU, as an independent
    check, which may crash beside torch on macOS. Both are exact."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Precision of the stored features."""


@dataclass(kw_only=True)
class LinearOptions(EvaluationOptions):
    """Linear probes on a frozen encoder: by default exactly the official one."""

    epochs: Epochs = 100
    """Number of epochs, over which the learning rate decreases to 0 on a cosine schedule."""
    batch_size: Batch = 1024
    """Images per step, over all processes; the learning rate is scaled linearly with it."""
    learning_rates: list[float] | None = None
    """Learning rates for a batch of 256, one probe for each; null: the official 0.001."""
    num_blocks: list[int] | None = None
    """Numbers of last blocks to read, from 1 to 4, one probe for each; the encoding counts as one block.
    null: the official 4, or all blocks of an encoder with fewer."""
    features: list[Literal["encoding", "cls", "both"]] | None = None
    """Features to read, one probe for each: the encoding, the CLS tokens of the last blocks (`cls`), or both;
    null: `both` with slots, else `cls`, as the official protocol."""
    sweep: bool = False
    """Train many probes in about the time of one: where learning_rates, num_blocks, or features is null, take
    0.001, 0.01, and 0.1; 1 and 4; all features. With slots, these are 12 probes."""
    cached: bool = False
    """Train on features of center crops, computed once: seconds instead of hours, but not the official
    protocol."""
    train_fraction: float = 1.0
    """Fraction of the train images to learn from, the same number of each class."""
    evaluate: str | None = None
    """Trained classifier to score, instead of training: a saved one (`.safetensors`), or linear weights of
    the official DINO code (`.pth`). The encoder must be the one that it was trained on."""
    seed: Seed = 0
    """Seed of initial weights, order, crops, and the choice of train_fraction."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """With `cached`: precision of the stored features of train images; those of test images are float32."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the encoder on train crops; auto: bf16 on a GPU that supports it, fp16 on an older GPU,
    fp32 on the CPU. Probes are float32."""
    views: Literal["auto", "pil", "device"] = "auto"
    """Where train crops are made: `pil`: by PIL in the workers; `device`: on the device, while the workers
    only decode. auto: the device on a GPU, else PIL."""
    resume_unverified: bool = False
    """Resume from a checkpoint whose .sha256 file is missing, although it may be damaged."""
    tensorboard: str | None = None
    """Folder for the probes' curves in TensorBoard, best outside of that of the runs; null: they are only in
    metrics.jsonl."""


@dataclass
class CompareOptions:
    """One table of the evaluations of several runs."""

    runs: list[str] | None = None
    """Run folders or weights files with results of `knn` or `linear`; runs that differ only in seed are
    averaged."""
    control: str | None = None
    """Run whose recipe the others are compared with; null: the only recipe whose read-out is not sparo."""
    markdown: bool = False
    """Print a Markdown table instead of one aligned for a terminal."""


def knn(options: KnnOptions) -> None:
    """Print the k-NN accuracies of a trained encoder, and add them to results.json."""
    from dino_sparo.evaluation import knn as evaluation

    with _opened(options) as (encoder, train, test_sets):
        results = evaluation.knn_results(
            *(encoder, train, test_sets),
            k=options.k,
            feature=options.feature,
            by_faiss=options.search == "faiss",
            cache_precision=options.cache_precision,
            batch_size=options.batch_size,
            **_common(options),
        )
        _report(options, results, evaluation.table)


def linear(options: LinearOptions) -> None:
    """Train probes, resume them or score a saved one; print the results and add them to results.json.

    Raises:
        UserError: for a mistake in options or data; what earlier starts have done is kept.
    """
    from dino_sparo.evaluation import linear as evaluation
    from dino_sparo.evaluation.classifiers import score_classifier

    _check_nothing_is_trained(options)
    if options.tensorboard and not (found := existing_part(Path(options.tensorboard))).is_dir():
        raise UserError(
            f"tensorboard {options.tensorboard!r}: {found} is a file; give a folder, which may be new"
        )
    with _opened(options) as (encoder, train, test_sets):
        common = _common(options)
        if options.evaluate is not None:
            results = score_classifier(options.evaluate, encoder, test_sets, train.classes, **common)
        else:
            results = evaluation.linear_probe(
                *(encoder, train, test_sets, _folder(options)),
                learning_rates=options.learning_rates,
                num_blocks=options.num_blocks,
                features=options.features,
                sweep=options.sweep,
                epochs=options.epochs,
                batch_size=options.batch_size,
                train_fraction=options.train_fraction,
                seed=options.seed,
                cached=options.cached,
                cache_precision=options.cache_precision,
                precision=options.precision,
                views=options.views,
                resume_unverified=options.resume_unverified,
                tensorboard=Path(options.tensorboard) if options.tensorboard else None,
                **common,
            )
        _report(options, results, evaluation.table)


def compare(options: CompareOptions) -> None:
    """Print one table of several runs."""
    from dino_sparo.evaluation.compare import compare_runs

    comparison = compare_runs(options.runs or [], options.control)
    print(comparison.markdown() if options.markdown else comparison.text())


@contextmanager
def _opened(options: EvaluationOptions) -> "Iterator[tuple[Encoder, ImageSource, list[TestSet]]]":
    """Encoder, train images and test sets, in a group of all processes."""
    from dino_sparo.evaluation.transfer import open_train_and_tests
    from dino_sparo.interop.load import load_encoder
    from dino_sparo.parallel.device import choose_device
    from dino_sparo.parallel.distributed import local_rank, process_group

    device = choose_device(options.device, local_rank())
    _check_writable(_folder(options))
    with process_group(device):
        encoder = load_encoder(options.run, options.which, untrained=options.untrained, arch=options.arch)
        choice = choice_of(options.data, encoder)
        train, test_sets = open_train_and_tests(options.data.path, options.test, choice)
        yield encoder.to(device).requires_grad_(False), train, test_sets


def _folder(options: EvaluationOptions) -> Path:
    from dino_sparo.evaluation.results import results_folder

    return Path(options.out or results_folder(options.run))


def _check_writable(folder: Path) -> None:
    """Refuse at once a folder for results that cannot be written. Raises UserError."""
    if not is_writable(folder):
        raise UserError(
            f"{folder} cannot be written, so results cannot be saved there; give another folder with --out"
        )


def _common(options: EvaluationOptions) -> dict[str, Any]:
    """Arguments of all evaluations."""
    from dino_sparo.evaluation.results import features_folder

    return {
        "weights": "untrained" if options.untrained else options.which,
        "cache": Path(options.cache or features_folder(options.run, _folder(options))),
        "num_workers": options.num_workers,
    }


def _report(
    options: EvaluationOptions, results: "list[Result]", table: "Callable[[str, list[Result]], str]"
) -> None:
    """Print the table of the results, then save them, in one of the processes."""
    from dino_sparo.evaluation.results import RESULTS_FILE, save_results
    from dino_sparo.parallel.distributed import rank

    if rank() == 0:
        print(table(options.run, results), flush=True)
        try:
            save_results(_folder(options), results)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be written ({error.strerror}), so the results above are not "
                f"saved; give another folder with --out"
            ) from error
        print(f"results: {_folder(options) / RESULTS_FILE}; to compare runs: dino-sparo compare RUN RUN")


def _check_nothing_is_trained(options: LinearOptions) -> None:
    """Refuse options of training beside a classifier that is only to be scored."""
    if options.evaluate is None:
        return
    keys = ("sweep", "cached", "learning_rates", "num_blocks", "features", "tensorboard")
    given = [key for key in keys if getattr(options, key) not in (None, False)]
    if not options.evaluate.endswith(".safetensors"):  # which cannot tell of these
        given += ["train_fraction"] * (options.train_fraction != 1) + ["untrained"] * options.untrained
    if given:
        raise UserError(
            f"evaluate {options.evaluate} scores the saved classifier, and {', '.join(given)} would train "
            f"others; leave {'this' if len(given) == 1 else 'these'} out"
        )
