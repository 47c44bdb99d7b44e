"""Every knob, documented. Imported before torch: `--help` and a mistake in a recipe answer at once."""

from dino_sparo.options.evaluating import LabelledDataOptions
from dino_sparo.options.files import ExportOptions, PrepareOptions, ShardOptions
from dino_sparo.options.measuring import BenchOptions
from dino_sparo.options.slots import (
    ImagesOptions,
    SlotFactorsOptions,
    SlotGalleryOptions,
    SlotHealthOptions,
    SlotMapsOptions,
    SlotMaskOptions,
    SlotRankOptions,
    SlotReportOptions,
)
from dino_sparo.options.sweeping import StudyOptions, SweepOptions
from dino_sparo.options.training import (
    ArchOptions,
    CheckOptions,
    DataOptions,
    HeadOptions,
    LogOptions,
    LossOptions,
    MachineOptions,
    ModelOptions,
    MonitorOptions,
    OptimOptions,
    PretrainOptions,
    ReadoutOptions,
    ViewOptions,
)

__all__ = [
    "ArchOptions",
    "BenchOptions",
    "CheckOptions",
    "DataOptions",
    "ExportOptions",
    "HeadOptions",
    "ImagesOptions",
    "LabelledDataOptions",
    "LogOptions",
    "LossOptions",
    "MachineOptions",
    "ModelOptions",
    "MonitorOptions",
    "OptimOptions",
    "PrepareOptions",
    "PretrainOptions",
    "ReadoutOptions",
    "ShardOptions",
    "SlotFactorsOptions",
    "SlotGalleryOptions",
    "SlotHealthOptions",
    "SlotMapsOptions",
    "SlotMaskOptions",
    "SlotRankOptions",
    "SlotReportOptions",
    "StudyOptions",
    "SweepOptions",
    "ViewOptions",
]
