"""An encoder as a file holds it: how to build it, and weights that must fit it exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.models import Encoder, build_encoder
from dino_sparo.models.encoder import architecture

MODELS = ("teacher", "student")
SHOWN_NAMES = 20


@dataclass(frozen=True)
class StoredEncoder:
    """One set of weights and what it belongs to.

    Attributes:
        path: where it was read, for messages.
        arguments: those of `build_encoder`, plain values.
        seed: of the initial weights, for the untrained encoder.
        which: whose weights they are, teacher or student.
        weights: state dict of the Encoder, not checked yet: anything may be among its values.
        beside: what else the network has in the file, by name, not checked either: the DINO head
            (`head.mlp.0.weight`, ...), or the classifier of a plain ViT.
        epochs: whole epochs that a run has trained them; None if they are not of a run.
    """

    path: Path
    arguments: dict[str, Any]
    seed: int
    which: str
    weights: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    def build(self, *, untrained: bool = False) -> Encoder:
        """The encoder in evaluation mode, on the CPU, with these weights or its initial ones.

        Raises:
            UserError: it cannot be built so, or the weights do not fit (all that is missing, unexpected or
                misshapen in one message, also if untrained) or are not finite.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                torch.manual_seed(self.seed)
                encoder = build_encoder(**self.arguments)
            # A description may be anything.
            except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
                raise UserError(f"{self.path} describes no encoder of dino-sparo: {error}") from error
        expected = encoder.state_dict()
        if listed := misfits(self.weights, expected):
            raise UserError(
                f"{self.path} does not fit an encoder with {in_words(self.arguments['arch'])} and read-out "
                f"{self.arguments['readout']!r}: {listed} of {len(expected)} parameters; give the whole "
                f"weights of such an encoder"
            )
        if not untrained:
            wrong = [name for name, value in self.weights.items() if not value.isfinite().all()]
            if wrong:
                raise UserError(
                    f"{self.path} holds numbers that are not finite, in {len(wrong)} parameters "
                    f"({_first(wrong)}); give weights of a training that has not diverged"
                )
            encoder.load_state_dict(self.weights)
        return encoder.eval()


def misfits(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """All that is missing, unexpected or misshapen in a state dict, in words; empty if it fits exactly."""
    wrong = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": [
            f"{name} {_kind(given[name])} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and _kind(given[name]) != str(tuple(value.shape))
        ],
    }
    return ", ".join(f"{len(names)} {what} ({_first(names)})" for what, names in wrong.items() if names)


def in_words(arch: str | Mapping[str, int]) -> str:
    """An architecture for a message."""
    return "width {width}, depth {depth} and {num_heads} heads".format(**architecture(arch))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def _kind(value: Any) -> str:
    """Shape of a tensor, and what else sets it apart from a plain one of real numbers on the CPU."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f" as {value.layout}"
    numbers = "" if value.is_floating_point() else f" of {value.dtype}"
    place = "" if value.device.type == "cpu" else f" on {value.device.type}"
    return f"{tuple(value.shape)}{layout}{numbers}{place}"
