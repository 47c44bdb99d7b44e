"""`dino-sparo export`: the encoder of a run, or of other weights, as files that other programs read."""

from pathlib import Path
from typing import TYPE_CHECKING

from dino_sparo.evaluation.results import RESULTS_FILE, read_results, results_folder
from dino_sparo.interop.export import write_exported
from dino_sparo.interop.load import read_stored
from dino_sparo.interop.onnx_file import write_onnx
from dino_sparo.interop.to_official import write_official

if TYPE_CHECKING:
    from dino_sparo.options import ExportOptions


def run(options: "ExportOptions") -> None:
    """Write what `--format` says, and say in one line what was written."""
    out = Path(options.out)
    if options.format == "official":
        what = write_official(Path(options.run), out, options.which, arch=options.arch)
        print(f"{out}: {what} of {options.run}")
        return
    stored = read_stored(options.run, options.which, arch=options.arch)
    if options.format == "onnx":
        path, difference = write_onnx(stored, out)
        where, check = str(path), f"; differs from torch by {difference:.1e} at most"
    else:
        source = Path(options.run).resolve()
        name = source.stem if source.is_file() else source.name
        write_exported(stored, out, name=name, measured=measured_lines(options.run, options.which))
        where, check = options.out, ""
    count = sum(value.numel() for value in stored.weights.values())
    print(f"{where}: {stored.which} of {options.run}, {count / 1e6:.2f} million parameters{check}")


def measured_lines(run: str, which: str) -> list[str]:
    """The headline results of these weights in `results.json` of a run, one line each.

    Raises:
        UserError: that file is damaged.
    """
    folder = results_folder(run)
    if not (folder / RESULTS_FILE).is_file():
        return []
    return [
        f"{result.name} ({result.protocol}) on {result.test_set}: {result.top1:.1f} % top-1, "
        f"{result.num_images} images of {result.num_classes} classes"
        for result in read_results(folder)
        if result.headline and result.weights == which and result.train_fraction == 1
    ]
