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


@dataclass(kw_only=True)
class StudyOptions(SweepOptions):
    """Pretrain variants of a recipe, evaluate all of them alike, and write one page of tables and curves."""

    run_dir: str
    """Folder of the study: a run folder for each variant, study.md, study.json and curves.png."""
    control: str = "cls"
    """Row of the table that differences are to: the name of a variant, with what `vary` adds but seeds."""
    train_fractions: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.01])
    """Shares of the train images that linear probes learn from, the same number of each class, drawn by the
    seed of the run."""
    transfer: list[str] = field(default_factory=list)
    """Further labelled folders, each NAME=DIR: the encoders are evaluated there too, by neighbours and probes
    that learn from the train images of that folder."""
