"""Trained probes as files: our own, and linear weights of the official DINO code.

Ours are safetensors with `weight` and `bias`, and what they belong to as metadata.

Axis letters: S classes, F numbers that the classifier sees.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.probes import OFFICIAL_LR, Probe, possible_probes
from dino_sparo.files import write_file
from dino_sparo.models import Encoder
from dino_sparo.runs.plain_file import read_plain

METADATA_KEY = "dino_sparo_linear"
FORMAT = 1
OFFICIAL_PROTOCOL = "linear-weights"
OFFICIAL_PREFIXES = ("module.", "linear.")
SHOWN_KEYS = 5


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


# --- Weights of the official code


def load_official(
    path: Path, encoder: Encoder, *, classes: tuple[str, ...], encoder_hash: str
) -> SavedClassifier:
    """The classifier in a file `{"state_dict": {"module.linear.weight": (S, F), "module.linear.bias": ...}}`.

    Source: `eval_linear.py --evaluate`. What it sees is told by F: the class token of so many last blocks, or
    with slots the encoding too. That the weights belong to this encoder, and their rows to the classes in
    this order, the file cannot tell.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it holds no such classifier, or one that does not fit encoder or classes.
    """
    if not path.is_file():
        raise UserFileNotFoundError(
            f"evaluate {str(path)!r} does not exist; give a saved classifier or official linear weights"
        )
    content = read_plain(path, allow_namespace=True)
    weight, bias = _tensors(content, path)
    if len(weight) != len(classes):
        raise UserError(
            f"evaluate {str(path)!r} is for {len(weight)} classes, data.path has {len(classes)}; give the "
            f"images whose classes it was trained on"
        )
    epochs = content.get("epoch")
    probe = _probe(path, encoder, weight.shape[1])
    details = {
        "protocol": OFFICIAL_PROTOCOL,
        "feature": probe.feature,
        "num_blocks": probe.num_blocks,
        "weights_file": path.name,
        "epochs": epochs if isinstance(epochs, int) else None,
    }
    return SavedClassifier(probe, weight, bias, classes, encoder_hash, details)


def _tensors(content: Any, path: Path) -> tuple[Tensor, Tensor]:
    """Weight (S, F) and bias (S,)."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    found: dict[str, Any] = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        name = str(key)
        while name.startswith(OFFICIAL_PREFIXES):
            name = name.partition(".")[2]
        found[name] = value
    tensors = [found[name] for name in ("weight", "bias") if isinstance(found.get(name), Tensor)]
    if found.keys() != {"weight", "bias"} or [tensor.ndim for tensor in tensors] != [2, 1]:
        held = ", ".join([*found][:SHOWN_KEYS]) or type(content).__name__
        held += ", ..." if len(found) > SHOWN_KEYS else ""
        raise UserError(
            f"evaluate {str(path)!r} holds no linear classifier, but {held}; expected a state_dict of "
            f"module.linear.weight and module.linear.bias, as the official eval_linear.py writes it"
        )
    weight, bias = (tensor.to(torch.float32) for tensor in tensors)
    if len(weight) != len(bias):
        raise UserError(
            f"evaluate {str(path)!r}: {len(weight)} rows and {len(bias)} biases; get the file again"
        )
    return weight, bias


def _probe(path: Path, encoder: Encoder, num_inputs: int) -> Probe:
    """What a classifier with so many inputs sees."""
    every = {
        probe: probe.num_inputs(encoder.width, encoder.embed_dim)
        for probe in possible_probes(encoder, OFFICIAL_LR)
    }
    fitting = [probe for probe, number in every.items() if number == num_inputs]
    if not fitting:
        raise UserError(
            f"evaluate {str(path)!r} takes {num_inputs} numbers, but this encoder gives "
            f"{', '.join(map(str, sorted(set(every.values()))))}; give the weights of a probe on it"
        )
    if len(fitting) > 1 or (fitting[0].feature, fitting[0].num_blocks) == ("cls", 2):
        several = " or ".join(f"{probe.num_blocks} of {probe.feature}" for probe in fitting)
        raise UserError(
            f"evaluate {str(path)!r} takes {num_inputs} numbers, which does not tell what it sees (blocks: "
            f"{several}, or the last one with its mean patch token, as the official ViT-B does); train a "
            f"probe instead, without weights"
        )
    return fitting[0]
