"""An encoder from a file: the arguments to build it, and weights that must fit it exactly."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.data.images import IMAGENET_MEAN, IMAGENET_STD
from dino_sparo.errors import UserError
from dino_sparo.models import Encoder, build_encoder
from dino_sparo.models.encoder import WITH_SLOTS, architecture
from dino_sparo.recipe.files import checked_encoder
from dino_sparo.terminal import counted, few, shown

MODELS = ("teacher", "student")
SHOWN_NAMES = 20
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that weights may be stored in


@dataclass(frozen=True)
class StoredEncoder:
    """One set of weights, and the encoder that they belong to.

    Attributes:
        path: the file, for messages.
        arguments: those of `build_encoder`, plain values.
        seed: of the initial weights, for the untrained encoder.
        which: teacher or student.
        weights: state dict of the Encoder, not checked yet: values may have any type.
        beside: other parameters of the network in the file, by name, not checked either: the DINO head
            (`head.mlp.0.weight`, ...), the classifier of a plain ViT, parts for masking and decoding.
        epochs: complete epochs that they were trained for; None if they are not of a run.
        trained: data and recipe of the run, for readers of an exported file.
        value_range: as the attribute of Encoder.
    """

    path: Path
    arguments: dict[str, Any]
    seed: int
    which: str
    weights: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    trained: dict[str, str] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None

    def left_out(self, taken: Collection[str] = ()) -> list[str]:
        """Parameters beside the encoder that are not in `taken`, in words, such as `head (8 tensors)`."""
        kinds = [name.partition(".")[0] for name in self.beside if name not in taken]
        return [f"{shown(kind)} ({kinds.count(kind)} tensors)" for kind in dict.fromkeys(kinds)]

    def facts(self, license: str | None, measured: Sequence[str]) -> dict[str, str]:
        """What users of the exported encoder need to know, by short names.

        Args:
            license: of the weights.
            measured: results, one line each.
        """
        side, slots = self.arguments["image_size"], self.arguments.get("num_slots")
        arch, readout = architecture(self.arguments["arch"]), self.arguments["readout"]
        replaces = readout in WITH_SLOTS and not self.arguments.get("after_last_block")
        blocks = counted(arch["depth"] - replaces, "block")
        if readout in WITH_SLOTS:
            blocks += f" and the {'SPARO' if readout == 'sparo' else readout} read-out"
        pixels = "RGB"
        if self.value_range:
            pixels += ", of more than 8 bits from {:g} (black) to {:g} (white)".format(*self.value_range)
        return {
            "weights": self.which,
            "vit": f"{blocks}, width {arch['width']}, {arch['num_heads']} heads, patches of "
            f"{self.arguments['patch_size']} pixels",
            "preprocessing": f"{pixels}, short side to {round(side * 256 / 224)} pixels (bicubic), center "
            f"crop of {side} x {side}, divided by 255, minus {IMAGENET_MEAN}, divided by {IMAGENET_STD}",
            "readout": self.arguments["readout"],
            "slots": str(slots or 0),
            **self.trained,
            "accuracy": "; ".join(measured) or "not measured",
            "license": license or "not stated",
        }

    def build(self, *, untrained: bool = False) -> Encoder:
        """The encoder in evaluation mode, on the CPU, with these weights or its initial ones.

        Raises:
            UserError: it cannot be built, or the weights do not fit, also if untrained (one message names all
                that is missing, unexpected, or misshapen), or are not finite.
        """
        check_stored(self.weights, str(self.path))
        try:
            arguments = checked_encoder(self.arguments)
            with torch.device("meta"):  # no memory is allocated before names and shapes are checked
                encoder = build_encoder(**arguments)
        except (RuntimeError, TypeError, ValueError) as error:  # the arguments may be anything
            raise UserError(f"{self.path} does not describe an encoder of dino-sparo: {error}") from error
        expected = encoder.state_dict()
        if listed := misfits(self.weights, expected):
            raise UserError(
                f"{self.path} does not fit an encoder with {in_words(self.arguments['arch'])} and read-out "
                f"{self.arguments['readout']!r}: {listed} of {len(expected)} parameters; give all weights of "
                f"such an encoder"
            )
        if untrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                encoder = build_encoder(**arguments)
        else:
            encoder.to_empty(device="cpu").load_state_dict(self.weights)
            check_finite(encoder.state_dict(), str(self.path))
        encoder.value_range = self.value_range
        return encoder.eval()


def check_stored(weights: Mapping[str, Any], what: str) -> None:
    """Raises UserError: tensors share memory, so that they have more numbers than the file contains."""
    plain = [value for value in weights.values() if is_plain(value)]
    claimed = sum(value.nbytes for value in plain)
    storages = [value.untyped_storage() for value in plain]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > held:
        raise UserError(
            f"{what} claims {claimed} bytes of weights, but contains {held}, since tensors share memory; "
            f"save a copy of each tensor (tensor.clone())"
        )


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError: numbers are not finite in float32."""
    if wrong := [name for name, value in weights.items() if not value.float().isfinite().all()]:
        raise UserError(
            f"{what} contains numbers that are not finite, or too large for float32, in {len(wrong)} "
            f"parameters ({few(wrong, SHOWN_NAMES)}); give weights of a run that has not diverged"
        )


def misfits(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """All that is missing, unexpected, or misshapen in a state dict, in words; empty if it fits exactly."""
    wrong = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": [
            f"{name} {_kind(given[name])} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and _kind(given[name]) != str(tuple(value.shape))
        ],
    }
    return ", ".join(
        f"{len(names)} {what} ({few(names, SHOWN_NAMES)})" for what, names in wrong.items() if names
    )


def in_words(arch: str | Mapping[str, int]) -> str:
    """An architecture for a message."""
    return "width {width}, depth {depth} and {num_heads} heads".format(**architecture(arch))


def _kind(value: Any) -> str:
    """Shape of a tensor, and its other differences from a dense float tensor on the CPU."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    shape = "nested" if value.is_nested else tuple(value.shape)
    layout = "" if value.layout == torch.strided else f" as {value.layout}"
    numbers = "" if value.dtype in NUMBERS else f" of {value.dtype}"
    place = "" if value.device.type == "cpu" else f" on {value.device.type}"
    return f"{shape}{layout}{numbers}{place}"


def is_plain(value: Any) -> bool:
    """Whether this is a dense tensor on the CPU with one of the dtypes NUMBERS."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in NUMBERS
    )
