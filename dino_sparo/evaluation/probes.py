"""Several linear classifiers on the features of one forward pass. Source: official `eval_linear.py`.

Axis letters: B images, D token width, F input dimensions, P probes, S classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_sparo.errors import UserError
from dino_sparo.models import Encoder

Feature = Literal["encoding", "cls", "both"]

INPUTS = ("blocks", "encoding")  # features of `Encoder.features` that probes use
MAX_BLOCKS = 4  # last blocks whose tokens are in the feature `blocks`
OFFICIAL_LR = 0.001
SWEEP_LRS = (0.001, 0.01, 0.1)
WEIGHT_STD = 0.01
MOMENTUM = 0.9

Inputs = Mapping[tuple[str, int], Tensor]  # inputs of the probes, each (B, F), by `Probe.seen`


@dataclass(frozen=True)
class Probe:
    """One linear classifier: its input and its learning rate.

    Attributes:
        feature: `encoding`: the encoding; `cls`: the normalized CLS tokens after the last `num_blocks` blocks
            (the mean patch tokens for a `gap` encoder); `both`: those of the last `num_blocks - 1` blocks and
            the unnormalized SPARO encoding, which counts as a block since it replaces one.
        num_blocks: 1 for `encoding`.
        learning_rate: initial value for a global batch of 256 images.
    """

    feature: Feature
    num_blocks: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Its name in tables and files."""
        blocks = "" if self.feature == "encoding" else f"{self.num_blocks} block{'s'[: self.num_blocks - 1]} "
        rate = repr(float(self.learning_rate)).removesuffix(".0")  # all digits, so that names are unique
        return f"{blocks}{self.feature} lr {rate}"

    def select(self, features: Mapping[str, Tensor], width: int) -> Tensor:
        """Its input (B, F) from the features `blocks` (B, blocks * D) and `encoding` (B, E)."""
        blocks, encoding = (features[name] for name in INPUTS)
        start, stop = self.columns(width, encoding.shape[1])
        parts = ([blocks[:, start:]] if start else []) + ([encoding] if stop else [])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    @property
    def seen(self) -> tuple[str, int]:
        """Key of its input; probes with the same key have the same input."""
        return self.feature, self.num_blocks

    def columns(self, width: int, embed_dim: int) -> tuple[int, int]:
        """Start and stop of its input in the columns [blocks, encoding]; the encoding starts at 0."""
        if self.feature == "encoding":
            return 0, embed_dim
        if self.feature == "cls":
            return -self.num_blocks * width, 0
        return (1 - self.num_blocks) * width, embed_dim

    def num_inputs(self, width: int, embed_dim: int) -> int:
        """F for an encoder with token width `width` and encoding dimension `embed_dim`."""
        start, stop = self.columns(width, embed_dim)
        return stop - start


def official_probe(encoder: Encoder) -> Probe:
    """The probe of the official protocol: 4 blocks (fewer if the encoder has fewer), with slots `both`."""
    feature: Feature = "cls" if encoder.readout is None else "both"
    return Probe(feature, _most_blocks(encoder, feature), OFFICIAL_LR)


def choose_probes(
    encoder: Encoder,
    *,
    learning_rates: Sequence[float] | None = None,
    num_blocks: Sequence[int] | None = None,
    features: Sequence[Feature] | None = None,
    sweep: bool = False,
) -> list[Probe]:
    """Probes for all combinations of learning rates, numbers of blocks, and features, each once.

    None: the value of the official protocol; with `sweep` three learning rates, 1 and 4 blocks, and all
    features, which are 12 probes for a SPARO encoder. `both` with one block is `encoding`.

    Raises:
        UserError: the encoder has fewer blocks, or a feature needs slots and it has none.
    """
    official = official_probe(encoder)
    every: Sequence[Feature] = get_args(Feature) if encoder.readout is not None else ["cls"]
    for feature in features or ():
        if feature not in every:
            raise UserError(
                f"features has {feature!r}, but this encoder has no slots (read-out "
                f"{encoder.readout_name}); set features to [cls]"
            )
    for number in num_blocks or ():
        if not 1 <= number <= official.num_blocks:
            raise UserError(f"num_blocks has {number}; expected 1 to {official.num_blocks} for this encoder")
    learning_rates = learning_rates or (SWEEP_LRS if sweep else [OFFICIAL_LR])
    features = features or (every if sweep else [official.feature])
    num_blocks = num_blocks or ([1, official.num_blocks] if sweep else [official.num_blocks])
    chosen: dict[Probe, None] = {}
    for learning_rate, feature, number in product(learning_rates, features, num_blocks):
        blocks = min(number, _most_blocks(encoder, feature))
        alone = feature == "encoding" or (feature == "both" and blocks == 1)
        chosen[Probe("encoding" if alone else feature, 1 if alone else blocks, learning_rate)] = None
    return list(chosen)


def _most_blocks(encoder: Encoder, feature: Feature) -> int:
    return min(MAX_BLOCKS, len(encoder.backbone.blocks) + (feature == "both"))


class Probes(nn.Module):
    """The classifiers of several probes, each initialized as if it were alone: weights N(0, 0.01), bias 0.

    Args:
        width: D of the encoder.
        embed_dim: dimension of its encoding.
    """

    def __init__(
        self, probes: Sequence[Probe], *, width: int, embed_dim: int, num_classes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.probes, self.width = list(probes), width
        self.classifiers = nn.ModuleList()
        for probe in probes:
            classifier = nn.Linear(probe.num_inputs(width, embed_dim), num_classes)
            nn.init.normal_(classifier.weight, std=WEIGHT_STD, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(classifier.bias)
            self.classifiers.append(classifier)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features (float32) by name -> logits (P, B, S)."""
        return self.logits(self.inputs(features))

    def inputs(self, features: Mapping[str, Tensor]) -> Inputs:
        """The distinct inputs of the probes."""
        one_of = {probe.seen: probe for probe in self.probes}
        return {seen: probe.select(features, self.width) for seen, probe in one_of.items()}

    def logits(self, inputs: Inputs) -> Tensor:
        """Logits (P, B, S); probes with the same input share one matrix product."""
        logits_PBS: list[Tensor] = [torch.empty(0)] * len(self.probes)
        for seen, input_BF in inputs.items():
            numbers = [number for number, probe in enumerate(self.probes) if probe.seen == seen]
            several = [[*self.classifiers[number].parameters()] for number in numbers]
            weight, bias = several[0] if len(several) == 1 else map(torch.cat, zip(*several, strict=True))
            logits_BX = F.linear(input_BF, weight, bias)
            for number, logits_BS in zip(numbers, logits_BX.chunk(len(several), dim=1), strict=True):
                logits_PBS[number] = logits_BS
        return torch.stack(logits_PBS)

    def optimizer(self, global_batch_size: int) -> torch.optim.SGD:
        """SGD with momentum 0.9, no weight decay, and each probe's learning rate scaled to the batch size."""
        groups = [
            {"params": list(classifier.parameters()), "lr": probe.learning_rate * global_batch_size / 256}
            for probe, classifier in zip(self.probes, self.classifiers, strict=True)
        ]
        return torch.optim.SGD(groups, momentum=MOMENTUM)


def losses(logits_PBS: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cross-entropy of each probe, (P,); backward of their sum trains each probe independently."""
    each_PB = F.cross_entropy(
        logits_PBS.flatten(0, 1), labels_B.repeat(len(logits_PBS)), reduction="none"
    ).view(len(logits_PBS), -1)
    return each_PB.mean(dim=1)


def hits(logits_PBS: Tensor, labels_B: Tensor) -> Tensor:
    """Whether top-1 and top-5 (of at most S classes) are right: bool (B, P, 2).

    A prediction whose logit is not finite is wrong.
    """
    labels_PB1 = labels_B.expand(len(logits_PBS), -1)[..., None]
    ranked_PBk = logits_PBS.topk(min(5, logits_PBS.shape[-1]), dim=-1).indices
    found_PBk = (ranked_PBk == labels_PB1) & logits_PBS.gather(-1, labels_PB1).isfinite()
    return torch.stack([found_PBk[..., 0], found_PBk.any(dim=-1)], dim=-1).transpose(0, 1)
