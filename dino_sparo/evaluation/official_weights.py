"""Linear classifiers of the official DINO code, scored as they are. Source: `eval_linear.py --evaluate`.

Axis letters: S classes, F numbers that the classifier sees.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.classifiers import SavedClassifier
from dino_sparo.evaluation.probes import OFFICIAL_LR, Probe, possible_probes
from dino_sparo.models import Encoder
from dino_sparo.runs.plain_file import read_plain

PROTOCOL = "linear-weights"
PREFIXES = ("module.", "linear.")
SHOWN_KEYS = 5


def load_official(
    path: Path, encoder: Encoder, *, classes: tuple[str, ...], encoder_hash: str
) -> SavedClassifier:
    """The classifier in a file `{"state_dict": {"module.linear.weight": (S, F), "module.linear.bias": ...}}`.

    What it sees is told by F: the class token of so many last blocks, or with slots the encoding too. That
    the weights belong to this encoder, and their rows to the classes in this order, the file cannot tell.

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
        "protocol": PROTOCOL,
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
        while name.startswith(PREFIXES):
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
    width = encoder.backbone.cls_token.shape[-1]
    every = {
        probe: probe.num_inputs(width, encoder.embed_dim) for probe in possible_probes(encoder, OFFICIAL_LR)
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
