"""Trained probes as files: safetensors with `weight` and `bias`, and what they belong to as metadata."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.probes import Probe
from dino_sparo.files import write_file

METADATA_KEY = "dino_sparo_linear"
FORMAT = 1


@dataclass(frozen=True)
class SavedClassifier:
    """A trained probe as its file holds it: weight (S, F), bias (S,), class names by number."""

    probe: Probe
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    encoder: str
    """Hash of the weights of the encoder that it was trained on."""
    details: dict[str, Any]
    """How it was trained: protocol, epochs, batch size, best accuracy ..."""

    def fitted(
        self, path: str, *, classes: Sequence[str], num_inputs: int, encoder_hash: str
    ) -> dict[str, Tensor]:
        """Weight (S, F) and bias (S,) for classes of these names, in this order, and this encoder.

        Raises:
            UserError: it was trained on other classes or another encoder; the message names `path`.
        """
        different = sorted(set(self.classes) ^ set(classes))
        if different:
            raise UserError(
                f"evaluate {path!r} has {len(self.classes)} classes, data.path has {len(classes)}: "
                f"{different[0]!r} is in one of them only ({len(different)} such); give one of these "
                f"classes, or score further folders by --test NAME=DIR"
            )
        if self.weight.shape != (len(classes), num_inputs):
            raise UserError(
                f"evaluate {path!r} has weights {tuple(self.weight.shape)}, this encoder needs "
                f"{(len(classes), num_inputs)} ({self.probe.name}); give a classifier trained on it"
            )
        if self.encoder != encoder_hash:
            raise UserError(
                f"evaluate {path!r} was trained on an encoder with other weights (SHA-256 "
                f"{self.encoder[:12]}, now {encoder_hash[:12]}); give the encoder it belongs to"
            )
        rows = [self.classes.index(name) for name in classes]
        return {"weight": self.weight[rows], "bias": self.bias[rows]}


def save_classifier(path: Path, saved: SavedClassifier) -> None:
    """Write it as safetensors `weight` and `bias`, with all else as JSON in the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "feature": saved.probe.feature,
        "num_blocks": saved.probe.num_blocks,
        "learning_rate": saved.probe.learning_rate,
        "classes": saved.classes,
        "encoder": saved.encoder,
        "details": saved.details,
    }
    metadata = {METADATA_KEY: json.dumps(content)}  # the order of several keys would differ between files
    tensors = {"weight": saved.weight, "bias": saved.bias}
    write_file(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def is_saved(path: str) -> bool:
    """Whether a file is what `save_classifier` writes, by its ending; else it is of the official code."""
    return path.endswith(".safetensors")


def load_classifier(path: Path) -> SavedClassifier:
    """Read what `save_classifier` wrote.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it is no classifier of this project.
    """
    if not path.is_file():
        raise UserFileNotFoundError(f"evaluate {str(path)!r} does not exist; give a saved classifier")
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[METADATA_KEY])
            weight, bias = (file.get_tensor(name) for name in ("weight", "bias"))
        if content["format"] != FORMAT or weight.shape != (len(content["classes"]), weight.shape[1]):
            raise ValueError("another format")
        return SavedClassifier(
            Probe(content["feature"], content["num_blocks"], content["learning_rate"]),
            weight,
            bias.view(len(weight)),
            tuple(content["classes"]),
            content["encoder"],
            content["details"],
        )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"evaluate {str(path)!r} is no whole safetensors file ({error}); save it anew"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"evaluate {str(path)!r} is no classifier of `dino-sparo linear` in format {FORMAT}; give one "
            f"that it saved"
        ) from error
