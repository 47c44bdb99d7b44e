"""Every knob, documented. Imported before torch: `--help` and a mistake in a recipe answer at once."""

from dino_sparo.options.evaluating import CompareOptions, KnnOptions, LabelledDataOptions, LinearOptions
from dino_sparo.options.files import ExportOptions, PrepareOptions
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
    "CheckOptions",
    "CompareOptions",
    "DataOptions",
    "ExportOptions",
    "HeadOptions",
    "ImagesOptions",
    "KnnOptions",
    "LabelledDataOptions",
    "LinearOptions",
    "LogOptions",
    "LossOptions",
    "MachineOptions",
    "ModelOptions",
    "MonitorOptions",
    "OptimOptions",
    "PrepareOptions",
    "PretrainOptions",
    "ReadoutOptions",
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
