"""Several linear classifiers on the features of one forward pass. Source: official `eval_linear.py`.

Axis letters: B images, D token width, F input dimensions, P probes, S classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_sparo.errors import UserError
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import average_gradients

Feature = Literal["encoding", "cls", "both"]

INPUTS = ("blocks", "encoding")  # features of `Encoder.features` that probes use
MAX_BLOCKS = 4  # last blocks whose tokens are in the feature `blocks`
OFFICIAL_LR = 0.001
SWEEP_LRS = (0.001, 0.01, 0.1)
WEIGHT_STD = 0.01
JOINED_NUMBERS = 2**20  # largest weight of several probes; larger ones would not fit into the cache of a CPU
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
        UserError: the encoder has fewer blocks, a feature needs slots and it has none, or a learning rate is
            not a number above 0.
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
    for rate in learning_rates or ():
        if not 0 < rate < math.inf:
            raise UserError(f"learning_rates has {rate:g}; expected numbers above 0")
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


class ProbeGroup:
    """Classifiers with the same input, whose parameters become parts of one weight (X, F) and bias (X,).

    Args:
        seen: key of their input.
        numbers: of the probes.
        parameters: weight (S, F) and bias (S,) of each.
        ratios: their learning rates divided by that of the optimizer.
    """

    def __init__(
        self,
        seen: tuple[str, int],
        numbers: list[int],
        parameters: list[list[nn.Parameter]],
        ratios: list[float],
    ) -> None:
        self.seen, self.numbers, self.parameters = seen, numbers, parameters
        weights, biases = zip(*parameters, strict=True)
        self._ratios_P1 = torch.tensor(ratios, device=weights[0].device)[:, None]
        self._weight, self._bias = torch.cat([*weights]).detach(), torch.cat([*biases]).detach()
        for classifier, part in zip(parameters, self._parts(self._weight, self._bias), strict=True):
            for parameter, value in zip(classifier, part, strict=True):
                parameter.data = value

    def logits(self, inputs: Inputs) -> Tensor:
        """Logits (B, P, S)."""
        return F.linear(inputs[self.seen], self._weight, self._bias).unflatten(1, (len(self.numbers), -1))

    def losses(self, inputs: Inputs, labels_B: Tensor) -> Tensor:
        """Mean cross-entropy of each, (P,); sets the gradients, for which autograd would take longer.

        The gradient of the logits is (softmax - one-hot label) / B, here times the ratio of learning rates.
        """
        log_probabilities_BPS = self.logits(inputs).log_softmax(dim=-1)
        labels_BP1 = labels_B[:, None, None].expand(-1, len(self.numbers), 1)
        losses_P = log_probabilities_BPS.gather(-1, labels_BP1).sum(dim=0)[:, 0] / -len(labels_B)
        of_logits_BPS = log_probabilities_BPS.exp_()
        of_logits_BPS.scatter_(-1, labels_BP1, -1.0, reduce="add")
        of_logits_BX = of_logits_BPS.mul_(self._ratios_P1 / len(labels_B)).flatten(1)
        gradients = self._parts(of_logits_BX.T @ inputs[self.seen], of_logits_BX.sum(dim=0))
        for classifier, part in zip(self.parameters, gradients, strict=True):
            for parameter, gradient in zip(classifier, part, strict=True):
                parameter.grad = gradient
        return losses_P

    def _parts(self, weight: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(weight.chunk(len(self.numbers)), bias.chunk(len(self.numbers)), strict=True)


class Probes(nn.Module):
    """The classifiers of several probes, each initialized as if it were alone: weights N(0, 0.01), bias 0.

    Small weights of probes with the same input are parts of one tensor, so that they share matrix products.

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
        self._join()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, which moves each parameter alone."""
        super()._apply(*args, **kwargs)
        self._join()
        return self

    def _join(self) -> None:
        """Make the parameters of probes with the same input parts of one weight (X, F) and one bias (X,)."""
        self._groups: list[ProbeGroup] = []
        for seen in {probe.seen: None for probe in self.probes}:
            same = [number for number, probe in enumerate(self.probes) if probe.seen == seen]
            most = max(1, JOINED_NUMBERS // next(self.classifiers[same[0]].parameters()).numel())
            for first in range(0, len(same), most):
                numbers = same[first : first + most]
                parameters = [[*self.classifiers[number].parameters()] for number in numbers]
                ratios = [
                    self.probes[number].learning_rate / self.probes[0].learning_rate for number in numbers
                ]
                self._groups.append(ProbeGroup(seen, numbers, parameters, ratios))

    @torch.no_grad()
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features (float32) by name -> logits (P, B, S)."""
        inputs = self.inputs(features)
        logits_PBS: list[Tensor] = [torch.empty(0)] * len(self.probes)
        for group in self._groups:
            for number, logits_BS in zip(group.numbers, group.logits(inputs).unbind(1), strict=True):
                logits_PBS[number] = logits_BS
        return torch.stack(logits_PBS)

    def inputs(self, features: Mapping[str, Tensor]) -> Inputs:
        """The distinct inputs of the probes."""
        one_of = {probe.seen: probe for probe in self.probes}
        return {seen: probe.select(features, self.width) for seen, probe in one_of.items()}

    @torch.no_grad()
    def step(self, inputs: Inputs, labels_B: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One optimizer step of each probe; the mean cross-entropy of each before it, (P,)."""
        losses: list[Tensor] = [torch.empty(0)] * len(self.probes)
        for group in self._groups:
            for number, loss in zip(group.numbers, group.losses(inputs, labels_B).unbind(), strict=True):
                losses[number] = loss
            parameters = [parameter for classifier in group.parameters for parameter in classifier]
            average_gradients(parameters)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
        return torch.stack(losses)

    def optimizer(self, global_batch_size: int) -> torch.optim.SGD:
        """SGD with momentum 0.9 and no weight decay.

        Its learning rate is that of the first probe, scaled to the batch size; gradients of the others are
        multiplied by the ratio of their rates, which is the same and faster than several rates.
        """
        learning_rate = self.probes[0].learning_rate * global_batch_size / 256
        return torch.optim.SGD(self.parameters(), lr=learning_rate, momentum=MOMENTUM, fused=True)


def hits(logits_PBS: Tensor, labels_B: Tensor) -> Tensor:
    """Whether top-1 and top-5 (of at most S classes) are right: bool (B, P, 2).

    A prediction whose logit is not finite is wrong.
    """
    labels_PB1 = labels_B.expand(len(logits_PBS), -1)[..., None]
    ranked_PBk = logits_PBS.topk(min(5, logits_PBS.shape[-1]), dim=-1).indices
    found_PBk = (ranked_PBk == labels_PB1) & logits_PBS.gather(-1, labels_PB1).isfinite()
    return torch.stack([found_PBk[..., 0], found_PBk.any(dim=-1)], dim=-1).transpose(0, 1)
