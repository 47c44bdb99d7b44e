"""Trained probes: their accuracy, their files, and linear weights of the official DINO code.

A file is safetensors with `weight` and `bias`; everything else about the probe is in its metadata.

Axis letters: S classes, F input dimensions, P probes, B images, N images of a test set.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.features import Wanted, cached_features, hash_of, hash_of_images
from dino_sparo.evaluation.probe_batches import Features, feature_rows
from dino_sparo.evaluation.probes import (
    INPUTS,
    OFFICIAL_LR,
    Probe,
    Probes,
    choose_probes,
    hits,
    official_probe,
)
from dino_sparo.evaluation.results import Result, result_on
from dino_sparo.evaluation.transfer import TestSet, as_test_sets, restrict
from dino_sparo.files import parsed_json, read_as, write_file
from dino_sparo.interop.official import without_wrapping
from dino_sparo.interop.stored import check_finite, check_stored, is_plain
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import gather_rows, rank, world_size
from dino_sparo.runs.plain_file import read_plain
from dino_sparo.terminal import few

METADATA_KEY = "dino_sparo_linear"
FORMAT = 1
OFFICIAL_PROTOCOL = "linear-weights"
SHOWN_KEYS = 5
ROWS_AT_ONCE = 1024  # features scored at a time


@dataclass(frozen=True)
class SavedClassifier:
    """The content of a classifier file: weight (S, F), bias (S,), class names by number."""

    probe: Probe
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    encoder: str
    """Hash of the encoder that it was trained on."""
    details: dict[str, Any]
    """How it was trained: protocol, epochs, batch size, best accuracy, ..."""

    def fitted(
        self, path: str, *, classes: Sequence[str], num_inputs: int, encoder_hash: str
    ) -> dict[str, Tensor]:
        """Weight (S, F) and bias (S,) with rows in the order of `classes`.

        Raises:
            UserError: it was trained on other classes or another encoder; the message names `path`.
        """
        different = sorted(set(self.classes) ^ set(classes))
        if different:
            raise UserError(
                f"evaluate {path!r} has {len(self.classes)} classes, data.path has {len(classes)}: "
                f"{different[0]!r} is in only one of them ({len(different)} such classes); give the images "
                f"that it was trained on, and score other folders with --test NAME=DIR"
            )
        if self.weight.shape != (len(classes), num_inputs):
            raise UserError(
                f"evaluate {path!r} has weights of shape {tuple(self.weight.shape)}, but this encoder needs "
                f"{(len(classes), num_inputs)} ({self.probe.name}); give a classifier trained on it"
            )
        if self.encoder != encoder_hash:
            raise UserError(
                f"evaluate {path!r} was trained on an encoder with other weights (SHA-256 "
                f"{self.encoder[:12]}, now {encoder_hash[:12]}); give the encoder that it was trained on"
            )
        rows = [self.classes.index(name) for name in classes]
        return {"weight": self.weight[rows], "bias": self.bias[rows]}


def save_classifier(path: Path, saved: SavedClassifier) -> None:
    """Write a classifier file."""
    content = {
        "format": FORMAT,
        "feature": saved.probe.feature,
        "num_blocks": saved.probe.num_blocks,
        "learning_rate": saved.probe.learning_rate,
        "classes": saved.classes,
        "encoder": saved.encoder,
        "details": saved.details,
    }
    metadata = {METADATA_KEY: json.dumps(content)}  # one key: safetensors does not keep the order of several
    tensors = {"weight": saved.weight, "bias": saved.bias}
    write_file(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def load_classifier(path: Path) -> SavedClassifier:
    """Read a file written by `save_classifier`.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it is not a classifier file, or it is damaged.
    """
    _check_is_there(path)
    with read_as(
        f"evaluate {str(path)!r} is not a classifier of format {FORMAT}, or incomplete",
        "give a file that `dino-sparo linear` saved",
    ):
        with safe_open(path, "pt") as file:
            content = parsed_json((file.metadata() or {})[METADATA_KEY])
            weight, bias = (file.get_tensor(name) for name in ("weight", "bias"))
        if content["format"] != FORMAT or weight.shape != (len(content["classes"]), weight.shape[1]):
            raise ValueError("another format")
        if not 0 < content["learning_rate"] < math.inf:
            raise ValueError("a learning rate that is not above 0")
        check_finite({"weight": weight, "bias": bias}, f"evaluate {str(path)!r}")
        return SavedClassifier(
            Probe(content["feature"], content["num_blocks"], content["learning_rate"]),
            weight,
            bias.view(len(weight)),
            tuple(content["classes"]),
            content["encoder"],
            content["details"],
        )


def load_official(
    path: Path, encoder: Encoder, *, classes: tuple[str, ...], encoder_hash: str
) -> SavedClassifier:
    """The classifier in a file `{"state_dict": {"module.linear.weight": (S, F), "module.linear.bias": ...}}`.

    Source: `eval_linear.py --evaluate`. Its input is inferred from F: the CLS tokens of the last blocks, with
    slots also the encoding. The file does not contain the encoder that it was trained on or the order of its
    classes, so neither is checked.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it does not hold such a classifier, or the shapes do not fit the encoder or the classes.
    """
    _check_is_there(path)
    content = read_plain(path, allow_namespace=True)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    state = state if isinstance(state, Mapping) else {}
    found: dict[str, Any] = {
        without_wrapping(key).removeprefix("linear."): value for key, value in state.items()
    }
    tensors = [found[name] for name in ("weight", "bias") if is_plain(found.get(name))]
    if len(found) != 2 or [tensor.ndim for tensor in tensors] != [2, 1]:
        held = few([*found], SHOWN_KEYS) or type(content).__name__
        raise UserError(
            f"evaluate {str(path)!r} does not hold a linear classifier, but {held}; expected a state_dict "
            f"with module.linear.weight and module.linear.bias, as the official eval_linear.py writes it"
        )
    check_stored(found, f"evaluate {str(path)!r}")
    check_finite(found, f"evaluate {str(path)!r}")
    weight, bias = (tensor.float() for tensor in tensors)
    if len(weight) != len(bias):
        raise UserError(
            f"evaluate {str(path)!r}: the weight has {len(weight)} rows, the bias {len(bias)}; download it "
            f"again"
        )
    if len(weight) != len(classes):
        raise UserError(
            f"evaluate {str(path)!r} is for {len(weight)} classes, but data.path has {len(classes)}; give "
            f"images of the classes that it was trained on"
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


def _check_is_there(path: Path) -> None:
    if not path.is_file():
        raise UserFileNotFoundError(
            f"evaluate {str(path)!r} does not exist; give a saved classifier or official linear weights"
        )


def _probe(path: Path, encoder: Encoder, num_inputs: int) -> Probe:
    """The probe whose input has `num_inputs` dimensions."""
    every = choose_probes(
        encoder,
        learning_rates=[OFFICIAL_LR],
        num_blocks=range(1, 1 + official_probe(encoder).num_blocks),
        sweep=True,
    )
    numbers = [probe.num_inputs(encoder.width, encoder.embed_dim) for probe in every]
    fitting = [probe for probe, number in zip(every, numbers, strict=True) if number == num_inputs]
    if not fitting:
        raise UserError(
            f"evaluate {str(path)!r} has {num_inputs} inputs, but the features of this encoder have "
            f"{', '.join(map(str, sorted(set(numbers))))}; give the weights of a probe on this encoder"
        )
    if len(fitting) > 1 or (fitting[0].feature, fitting[0].num_blocks) == ("cls", 2):
        several = " or ".join(f"{probe.num_blocks} of {probe.feature}" for probe in fitting)
        raise UserError(
            f"evaluate {str(path)!r} has {num_inputs} inputs, which is ambiguous (blocks: {several}, or the "
            f"last one with the mean patch token, as in the official ViT-B); train a probe instead, without "
            f"evaluate"
        )
    return fitting[0]


# --- Accuracy


def score_classifier(
    path: str,
    encoder: Encoder,
    test: ImageSource | Sequence[TestSet],
    classes: Sequence[str],
    *,
    weights: str = "teacher",
    cache: Path | None = None,
    num_workers: int | None = 0,
) -> list[Result]:
    """Score a saved classifier (`.safetensors`), or linear weights of the official DINO code, on test images.

    Args:
        path: the file.
        test: labeled images, or several test sets.
        classes: names of the train classes by number.
        weights: name of the encoder in the results: teacher, student, or untrained.
        cache, num_workers: as in `cached_features`.

    Raises:
        UserError: it was trained on another encoder or other classes, or the file is damaged.
    """
    hash_now, num_classes = hash_of(encoder), len(classes)
    if path.endswith(".safetensors"):
        saved = load_classifier(Path(path))
    else:
        saved = load_official(Path(path), encoder, classes=tuple(classes), encoder_hash=hash_now)
    num_inputs = saved.probe.num_inputs(encoder.width, encoder.embed_dim)
    fitted = saved.fitted(path, classes=classes, num_inputs=num_inputs, encoder_hash=hash_now)
    probes = Probes([saved.probe], width=encoder.width, embed_dim=encoder.embed_dim, num_classes=num_classes)
    probes.load_state_dict({f"classifiers.0.{name}": tensor for name, tensor in fitted.items()})
    probes.to(encoder.device)
    test_sets = as_test_sets(test, classes)
    features = cached_features(encoder, wanted_of(test_sets), INPUTS, cache=cache, num_workers=num_workers)
    return results_of(encoder, [saved], probes, test_sets, features, weights)


def wanted_of(test_sets: Sequence[TestSet]) -> list[Wanted]:
    """The features that scoring needs."""
    return [Wanted(one.source, f"{one.name} features", "float32") for one in test_sets]


@torch.no_grad()
def score(probes: Probes, test_set: TestSet, features: Features) -> NDArray[np.bool_]:
    """Whether each probe is right for each image, top-1 and top-5: bool (N, P, 2), in every process."""
    device = next(probes.parameters()).device
    total = len(test_set.labels)
    found = [torch.empty(0, len(probes.probes), 2, dtype=torch.uint8)]
    share = np.arange(rank(), total, world_size())
    for start in range(0, len(share), ROWS_AT_ONCE):
        rows = share[start : start + ROWS_AT_ONCE]
        logits_PBS = probes(feature_rows(features, rows, device))
        allowed = restrict(logits_PBS.flatten(0, 1), test_set.classes).view_as(logits_PBS)
        labels = torch.from_numpy(test_set.labels[rows]).to(device)
        found.append(hits(allowed, labels).to("cpu", torch.uint8))
    return gather_rows(torch.cat(found), total).numpy().astype(bool)


def results_of(
    encoder: Encoder,
    classifiers: Sequence[SavedClassifier],
    probes: Probes,
    test_sets: Sequence[TestSet],
    features: Sequence[Features],
    weights: str,
) -> list[Result]:
    """Results of every probe on every test set; `classifiers` describe the probes, in the same order."""
    results, of_encoder = [], hash_of(encoder)
    for test_set, found in zip(test_sets, features, strict=True):
        right = score(probes, test_set, found)
        images = hash_of_images(test_set.source)  # outside the loop, since it stats every file
        for number, classifier in enumerate(classifiers):
            name = classifier.probe.name
            if "weights_file" in classifier.details:  # official weights, whose learning rate is unknown
                name = name.partition(" lr ")[0]
            top1, top5 = 100 * right[:, number].mean(axis=0)
            result = result_on(
                test_set,
                right[:, number, 0],
                protocol=classifier.details["protocol"],
                name=name,
                headline=classifier.probe == official_probe(encoder),
                weights=weights,
                top1=float(top1),
                top5=float(top5),
                details=classifier.details | {"encoder": of_encoder},
                images=images,
            )
            results.append(result)
    return results
