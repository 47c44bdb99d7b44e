"""The read-outs by name: options and module of each. To add one, write its module and add an entry here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dino_sparo.errors import UserError
from dino_sparo.recipe.typed import Heads, Width


@dataclass(kw_only=True)
class ReadoutOptions:
    """The read-out, which turns tokens into the encoding. Omit fields that it does not have."""

    name: Literal["sparo", "cls", "gap", "pooler", "bottleneck"]
    """`sparo`: slots that replace the last block; `cls`: CLS token; `gap`: mean of the patch tokens;
    `pooler`: attentional pooler that replaces the last block; `bottleneck`: two linear layers on the CLS
    token."""

    def arguments(self) -> dict[str, Any]:
        """These options as arguments of `build_encoder`."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {"readout": given.pop("name"), **given}


@dataclass(kw_only=True)
class SlotReadoutOptions(ReadoutOptions):
    """Options of all read-outs with slots."""

    num_slots: Width
    """SPARO and pooler: number of slots L."""
    slot_dim: Width
    """SPARO and pooler: slot dimension V."""
    after_last_block: bool | None = None
    """SPARO and pooler: read the output of the last block, instead of replacing this block; null: false."""
    output: Literal["slots", "whole"] | None = None
    """SPARO and pooler: LayerNorm and linear layer on each slot (`slots`) or on all slots concatenated
    (`whole`); null: none."""

    def __post_init__(self) -> None:
        self.after_last_block = self.after_last_block or None  # so that equal recipes are written equally


@dataclass(kw_only=True)
class SparoOptions(SlotReadoutOptions):
    """SPARO, also with heads shared by all slots (Table 6 of the paper)."""

    key_dim: Width
    """SPARO: dimension of keys and queries per head."""
    group_size: Width | None = None
    """SPARO with separate heads: number of slots that share a key projection; must divide num_slots."""
    heads: Literal["separate", "multi"] | None = None
    """SPARO: one head per slot (`separate` or null), or `num_heads` heads shared by all slots (`multi`)."""
    num_heads: Heads | None = None
    """Pooler, and SPARO with multi heads: attention heads; must divide slot_dim for the pooler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = None if self.heads == "separate" else self.heads
        needed, other = ("num_heads", "group_size") if self.heads == "multi" else ("group_size", "num_heads")
        kind = f"'sparo' with {self.heads or 'separate'} heads"
        if getattr(self, other) is not None:
            raise UserError(
                f"model.readout.{other} is {getattr(self, other)}, but model.readout.name is {kind}, which "
                f"has {needed} instead; set it to null"
            )
        if getattr(self, needed) is None:
            raise UserError(f"model.readout.{needed} is missing; {kind} needs it")
        if self.group_size is not None and self.num_slots % self.group_size:
            raise UserError(
                f"model.readout.group_size is {self.group_size}, which does not divide "
                f"model.readout.num_slots {self.num_slots}; use a divisor"
            )


@dataclass(kw_only=True)
class PoolerOptions(SlotReadoutOptions):
    """Attentional pooler (Table 6 of the paper)."""

    num_heads: Heads
    """Pooler, and SPARO with multi heads: attention heads; must divide slot_dim for the pooler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slot_dim % self.num_heads:
            raise UserError(
                f"model.readout.num_heads is {self.num_heads}, which does not divide "
                f"model.readout.slot_dim {self.slot_dim}; use a divisor"
            )


@dataclass(kw_only=True)
class BottleneckOptions(ReadoutOptions):
    """Two linear layers on the CLS token (appendix B.2 of the paper)."""

    bottleneck_dim: Width
    """Bottleneck: output dimension m of the first layer."""
    encoding_dim: Width
    """Bottleneck: dimension M of the encoding."""


@dataclass(frozen=True)
class Readout:
    """A read-out: the class of its options, whether its encoding has slots, and its module.

    Attributes:
        words: of an encoder with it, for a model card.
        module: `module:name` of a class or function that is called with token width and options, so that
            torch is not imported here. With slots it reads all tokens, else the CLS token. None: no module.
    """

    options: type[ReadoutOptions]
    words: str
    has_slots: bool = False
    module: str | None = None


READOUTS: Mapping[str, Readout] = {
    "sparo": Readout(
        *(SparoOptions, "with the SPARO read-out (arXiv 2404.15721)"),
        has_slots=True,
        module="dino_sparo.models.readouts:sparo_readout",
    ),
    "cls": Readout(ReadoutOptions, "with the CLS token as its encoding"),
    "gap": Readout(ReadoutOptions, "with the mean of its patch tokens as its encoding"),
    "pooler": Readout(
        *(PoolerOptions, "with an attentional pooler (arXiv 2205.01917)"),
        has_slots=True,
        module="dino_sparo.models.readouts:pooler_readout",
    ),
    "bottleneck": Readout(
        *(BottleneckOptions, "with two linear layers on its CLS token"),
        module="dino_sparo.models.readouts:LinearBottleneck",
    ),
}
