"""Options of `dino-sparo sweep`: variants of one recipe, in one table."""

from dataclasses import dataclass, field

from dino_sparo.options.training import PretrainOptions


@dataclass(kw_only=True)
class SweepOptions(PretrainOptions):
    """Pretrain variants of a recipe one after the other and fill one table; the same command goes on."""

    run_dir: str
    """Folder of the sweep: a run folder for each variant, sweep.json and sweep.md."""
    variants: str | None = None
    """Named sets of changes: a YAML file of `name: {section.key: value}`, or a shipped one (`readouts`: those
    of the paper's Table 6); null takes the recipe alone."""
    only: list[str] = field(default_factory=list)
    """Names of the variants to train now; all if none are given. The table has all."""
    vary: list[str] = field(default_factory=list)
    """section.key=VALUE,VALUE,...: each variant with each value, and several such in all combinations. Runs
    that differ in seed alone share a row of the table."""
