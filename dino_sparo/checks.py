"""What types cannot say about options: ranges, and fields that must fit together. Needs no torch."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from dino_sparo.errors import UserError
from dino_sparo.options import ArchOptions, PretrainOptions, ReadoutOptions

READOUT_FIELDS = {  # those that each read-out needs; the sizes of SPARO are those of its separate heads
    "sparo": ("num_slots", "slot_dim", "key_dim", "group_size"),
    "sparo with multi heads": ("num_slots", "slot_dim", "key_dim", "num_heads"),
    "pooler": ("num_slots", "slot_dim", "num_heads"),
    "bottleneck": ("bottleneck_dim", "encoding_dim"),
    "cls": (),
    "gap": (),
}
CHOICES = {"sparo": ("heads", "after_last_block", "output"), "pooler": ("after_last_block", "output")}
ZERO_ALLOWED = (
    "num_local_crops", "warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer_epochs",
    "clip_norm", "max_bad_steps", "knn_every_epochs", "num_workers", "checkpoint_every_epochs",
    "checkpoint_every_minutes",
    "keep_every_epochs", "final_lr", "weight_decay", "final_weight_decay", "drop_path_rate",
    "slots", "images",
)  # fmt: skip
MAX_DATA_TIMEOUT = 1500
HALF_OPEN = ("drop_path_rate", "center_momentum")


def check_options(options: Any) -> None:
    """Check every number's range, and for pretraining how the fields fit together.

    Raises:
        UserError: naming the key, its value, what was expected and the remedy.
    """
    _check_ranges("", options)
    if isinstance(options, PretrainOptions):
        _check_views(options)
        _check_model(options)
        _check_epochs(options)
        if options.optim.freeze_backbone and options.init is None:
            raise UserError(
                "optim.freeze_backbone is true, but init is null: a backbone that has learned nothing would "
                "stay as it is; give its weights by init, or leave freeze_backbone out"
            )
        if options.machine.data_timeout_seconds > MAX_DATA_TIMEOUT:
            raise UserError(
                f"machine.data_timeout_seconds is {options.machine.data_timeout_seconds}; expected at most "
                f"{MAX_DATA_TIMEOUT}, since other processes wait for this one for 30 minutes"
            )


def split_batch(global_batch_size: int, batch_size_per_gpu: int | None, processes: int) -> tuple[int, int]:
    """Images that a process takes at once, and micro-batches a step, that together make the global batch.

    Raises:
        UserError: they cannot; it proposes values that can.
    """
    if global_batch_size % processes:
        near = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        near = sorted(near, key=lambda n: abs(n - processes))[:3]
        multiple = max(1, round(global_batch_size / processes)) * processes
        raise UserError(
            f"optim.global_batch_size is {global_batch_size}, not divisible by {processes} processes; use "
            f"{_either(near)} processes, or a batch of {multiple} (another experiment)"
        )
    share = global_batch_size // processes
    if batch_size_per_gpu is None:
        return share, 1
    if share % batch_size_per_gpu:
        near = sorted(
            (n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - batch_size_per_gpu)
        )[:3]
        raise UserError(
            f"machine.batch_size_per_gpu is {batch_size_per_gpu}, which does not divide {share}, the "
            f"share of each of {processes} processes in optim.global_batch_size {global_batch_size}; use "
            f"{_either(near)}"
        )
    return batch_size_per_gpu, share // batch_size_per_gpu


def smaller_batch(share: int, batch_size: int) -> int:
    """The largest number of images at once that divides a process's share and is at most half of this one."""
    return max(size for size in range(1, max(1, batch_size // 2) + 1) if share % size == 0)


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _check_ranges(prefix: str, section: Any) -> None:
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            _check_ranges(f"{key}.", value)
            continue
        if value == "" or (value == [] and field.default_factory is not list):
            # an unset shell variable would mean the current folder
            raise UserError(f"{key} is empty; give at least one value or leave the option out")
        values = value if isinstance(value, list | tuple) else [value]
        for number in values:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            allowed, expected = _range_of(field.name)
            if not allowed(number):
                raise UserError(f"{key} is {_shown(value)}; expected {expected}")


def _range_of(name: str) -> tuple[Callable[[float], bool], str]:
    if name.endswith("probability") or name == "teacher_momentum":
        return (lambda x: 0 <= x <= 1), "0 to 1"
    if name == "seed":
        return (lambda x: 0 <= x < 2**63), "0 to 2**63 - 1"
    if name in HALF_OPEN:
        return (lambda x: 0 <= x < 1), "at least 0 and below 1"
    if name in ZERO_ALLOWED or name in ("jitter_strength", "blur_radius"):
        return (lambda x: 0 <= x < float("inf")), "a finite number of at least 0"
    return (lambda x: 0 < x < float("inf")), "a finite number above 0"


def _check_views(options: PretrainOptions) -> None:
    views, patch = options.views, options.model.patch_size
    for name in ("global_size", "local_size"):
        size = getattr(views, name)
        if size % patch:
            raise UserError(
                f"views.{name} is {size}, not divisible by model.patch_size {patch}; "
                f"use a multiple, such as {max(1, round(size / patch)) * patch}"
            )
    for name in ("global_scale", "local_scale", "blur_radius"):
        low, high = getattr(views, name)
        if low > high or (name != "blur_radius" and high > 1):
            raise UserError(
                f"views.{name} is {_shown((low, high))}; expected the lowest, then the highest, "
                f"{'in pixels' if name == 'blur_radius' else 'both above 0 and at most 1'}"
            )
    if views.jitter_strength[3] > 0.5:
        raise UserError(
            f"views.jitter_strength is {_shown(views.jitter_strength)}; expected its last number (hue) to be "
            f"at most 0.5, half the colour circle"
        )


def _check_model(options: PretrainOptions) -> None:
    model, readout = options.model, options.model.readout
    if isinstance(model.arch, ArchOptions):
        if model.arch.width % model.arch.num_heads:
            raise UserError(
                f"model.arch.width is {model.arch.width}, not divisible by model.arch.num_heads "
                f"{model.arch.num_heads}; use a multiple of the heads"
            )
        if readout.name in CHOICES and not readout.after_last_block and model.arch.depth < 2:
            raise UserError(
                f"model.arch.depth is {model.arch.depth}; expected at least 2 with {readout.name}, "
                f"which replaces the last block"
            )
    _check_readout(readout)


def _check_readout(readout: ReadoutOptions) -> None:
    """Each read-out has all of its fields and none of another's, and they fit together."""
    heads = f" with {readout.heads} heads" if readout.name == "sparo" and readout.heads else ""
    kind = "sparo with multi heads" if heads and readout.heads == "multi" else readout.name
    needed, allowed = READOUT_FIELDS[kind], CHOICES.get(readout.name, ())
    values = {field.name: getattr(readout, field.name) for field in fields(readout) if field.name != "name"}
    for name, value in values.items():
        if value is not None and name not in (*needed, *allowed):
            has = ", ".join(needed) or "no slots"
            raise UserError(
                f"model.readout.{name} is {value}, but model.readout.name is {readout.name!r}{heads}, which "
                f"has {has}; set it to null or leave it out"
            )
    missing = [name for name in needed if values[name] is None]
    if missing:
        raise UserError(f"model.readout.{missing[0]} is missing; {kind} needs {', '.join(needed)}")
    if kind == "sparo" and values["num_slots"] % values["group_size"]:
        raise UserError(
            f"model.readout.group_size is {values['group_size']}, which does not divide "
            f"model.readout.num_slots {values['num_slots']}; use a divisor"
        )
    if kind == "pooler" and values["slot_dim"] % values["num_heads"]:
        raise UserError(
            f"model.readout.num_heads is {values['num_heads']}, which does not divide "
            f"model.readout.slot_dim {values['slot_dim']}; use a divisor"
        )


def _check_epochs(options: PretrainOptions) -> None:
    epochs = options.optim.epochs
    for key, value in (
        ("optim.warmup_epochs", options.optim.warmup_epochs),
        ("loss.warmup_teacher_temp_epochs", options.loss.warmup_teacher_temp_epochs),
        ("optim.freeze_last_layer_epochs", options.optim.freeze_last_layer_epochs),
    ):
        if value > epochs:
            raise UserError(
                f"{key} is {value}, longer than the run: optim.epochs is {epochs}; use at most {epochs}"
            )


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
