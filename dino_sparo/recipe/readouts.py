"""The read-outs by name: what each takes and where its module is. A new one is its file and an entry here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dino_sparo.errors import UserError
from dino_sparo.recipe.typed import Heads, Width


@dataclass(kw_only=True)
class ReadoutOptions:
    """What turns tokens into the encoding. Fields that a read-out does not have are left out."""

    name: Literal["sparo", "cls", "gap", "pooler", "bottleneck"]
    """`sparo`: slots in place of the last block; `cls`: class token; `gap`: mean of the patch tokens;
    `pooler`: learned queries, LayerNorm, multi-head attention in place of the last block; `bottleneck`: two
    linear layers on the class token."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `build_encoder` that these options stand for."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {"readout": given.pop("name"), **given}


@dataclass(kw_only=True)
class SlotReadoutOptions(ReadoutOptions):
    """What read-outs with slots have in common."""

    num_slots: Width
    """SPARO and pooler: number of slots L."""
    slot_dim: Width
    """SPARO and pooler: numbers per slot V."""
    after_last_block: bool | None = None
    """SPARO and pooler: true keeps the last transformer block and reads after it; else it is replaced."""
    output: Literal["slots", "whole"] | None = None
    """SPARO and pooler: LayerNorm and a linear layer on each slot, or on all slots as one; null has none."""


@dataclass(kw_only=True)
class SparoOptions(SlotReadoutOptions):
    """SPARO, and its form in which all slots share the heads (Table 6)."""

    key_dim: Width
    """SPARO: width of keys and queries of a head."""
    group_size: Width | None = None
    """SPARO with separate heads: slots that share one key projection; must divide num_slots."""
    heads: Literal["separate", "multi"] | None = None
    """SPARO: a head of its own for each slot (also if null), or all `num_heads` for every slot."""
    num_heads: Heads | None = None
    """Pooler, and SPARO with multi heads: attention heads; they must divide the pooler's slot_dim."""

    def __post_init__(self) -> None:
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
    """Attentional pooler (Table 6)."""

    num_heads: Heads
    """Pooler, and SPARO with multi heads: attention heads; they must divide the pooler's slot_dim."""

    def __post_init__(self) -> None:
        if self.slot_dim % self.num_heads:
            raise UserError(
                f"model.readout.num_heads is {self.num_heads}, which does not divide "
                f"model.readout.slot_dim {self.slot_dim}; use a divisor"
            )


@dataclass(kw_only=True)
class BottleneckOptions(ReadoutOptions):
    """Two linear layers on the class token (appendix B.2)."""

    bottleneck_dim: Width
    """Bottleneck: width m of the narrow layer."""
    encoding_dim: Width
    """Bottleneck: width M of the encoding."""


@dataclass(frozen=True)
class Readout:
    """A read-out: the class of its options, whether its encoding has slots, and what builds its module.

    Attributes:
        module: `module:name` of a class or function, called with the width of the tokens and the options; it
            reads all tokens of an image if it has slots, else the class token. None has no module.
    """

    options: type[ReadoutOptions]
    has_slots: bool = False
    module: str | None = None


READOUTS: Mapping[str, Readout] = {
    "sparo": Readout(SparoOptions, True, "dino_sparo.models.readouts:sparo_readout"),
    "cls": Readout(ReadoutOptions),
    "gap": Readout(ReadoutOptions),
    "pooler": Readout(PoolerOptions, True, "dino_sparo.models.readouts:pooler_readout"),
    "bottleneck": Readout(BottleneckOptions, False, "dino_sparo.models.readouts:LinearBottleneck"),
}
