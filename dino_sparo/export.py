"""Export of an encoder to files for other programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dino_sparo.evaluation.features import hash_of
from dino_sparo.evaluation.results import RESULTS_FILE, read_results, results_folder
from dino_sparo.interop.load import networks_in, one_of
from dino_sparo.interop.official import write_official
from dino_sparo.interop.onnx_file import write_onnx
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.interop.timm_folder import write_exported
from dino_sparo.terminal import log


def export(
    run: str,
    out: str,
    format: Literal["timm", "onnx", "official"] = "timm",
    *,
    which: str = "teacher",
    arch: str | Mapping[str, int] | None = None,
    license: str | None = None,
) -> str:
    """Write an encoder for other programs.

    Args:
        run: as the path of `load_encoder`.
        out: for `timm` a new folder, for `onnx` a folder for model.onnx, for `official` a new file NAME.pth.
        format: `official` writes the parameter names of the official code: of a run both networks with their
            heads, else the encoder.
        which: teacher or student; not used for an official file of a run, which holds both.
        arch: as for `load_encoder`.
        license: of the weights, for the model card and ONNX.

    Returns:
        One line of text about what was written.

    Raises:
        UserError: the weights are refused or do not fit, or `out` exists.
        OSError: `out` cannot be written.
    """
    networks = networks_in(run, arch)
    stored, where, check = one_of(networks, which, arch), out, ""
    if stored.epochs is None and (left_out := stored.left_out()):
        check = f"; left out: {', '.join(left_out)}"
    if format == "official":
        if stored.value_range:
            log.warning(
                "WARNING: the official format does not hold data.value_range %s; give it to evaluate %s",
                *(list(stored.value_range), out),
            )
        return f"{out}: {write_official(stored, networks, Path(out))} of {run}"
    measured = measured_lines(run, stored)
    if format == "onnx":
        path, difference = write_onnx(stored, Path(out), license=license, measured=measured)
        where, check = str(path), f"; largest difference from torch: {difference:.1e}{check}"
    else:
        source = Path(run).resolve()
        name = source.stem if source.is_file() else source.name
        write_exported(stored, Path(out), name=name, license=license, measured=measured)
    count = sum(value.numel() for value in stored.weights.values())
    return f"{where}: {which} of {run}, {count / 1e6:.2f} million parameters{check}"


def measured_lines(run: str, stored: StoredEncoder) -> list[str]:
    """Lines about the headline results of these weights in `results.json` of a run, which may also hold those
    of other weights: earlier ones of the run, or of a file with the same stem.

    Raises:
        UserError: the file is damaged, or the weights do not fit.
    """
    folder = results_folder(run)
    if not (folder / RESULTS_FILE).is_file():
        return []
    of_encoder = hash_of(stored.build())
    return [
        f"{result.name} ({result.protocol}) on {result.test_set}: {result.top1:.1f} % top-1, "
        f"{result.num_images} images of {result.num_classes} classes"
        for result in read_results(folder)
        if result.headline
        and result.weights == stored.which
        and result.train_fraction == 1
        and result.details.get("encoder", of_encoder) == of_encoder  # older results do not say it
    ]
