"""A run so small that it takes a second: a folder of pictures and options to train on it."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_sparo.cli.parsing import given_values, options_of
from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.recipe.sections import Recipe
from dino_sparo.training import state
from dino_sparo.training.pretrain import prepare, train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import Run
from dino_sparo.training.state import StepOutput, TrainState

TINY = {
    "views.global_size": "16",
    "views.local_size": "8",
    "views.num_local_crops": "2",
    "model.arch.width": "16",
    "model.arch.depth": "3",
    "model.arch.num_heads": "2",
    "model.patch_size": "8",
    "model.drop_path_rate": "0.3",
    "model.readout.num_slots": "2",
    "model.readout.slot_dim": "4",
    "model.readout.key_dim": "4",
    "head.num_prototypes": "16",
    "head.hidden_dim": "8",
    "head.bottleneck_dim": "4",
    "optim.epochs": "3",
    "optim.warmup_epochs": "1",
    "optim.global_batch_size": "4",
    "machine.num_workers": "0",
    "machine.device": "cpu",
    "monitor.knn_every_epochs": "0",
    "log.log_every_steps": "1",
}
CLS = {f"model__readout__{key}": "null" for key in ("num_slots", "slot_dim", "key_dim", "group_size")} | {
    "model__readout__name": "cls"
}  # changes for `tiny_arguments`: the control without slots


def write_pictures(folder: Path, count: int, side: int = 24, classes: int = 1) -> None:
    """Random pictures below folder/train/class<i>."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class{number % classes}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def tiny_arguments(data: Path, run_dir: Path, **changes: Any) -> list[str]:
    """Arguments of `pretrain`; changes are written as section__key=value."""
    given = {key.replace("__", "."): str(value) for key, value in changes.items()}
    options = TINY | {"data.path": str(data), "run_dir": str(run_dir)} | given
    return ["--config", "demo", *(f"--{key}={value}" for key, value in options.items())]


def parse_options(options_class: type, arguments: list[str], *, usage: str = "") -> Any:
    """The options of a command, as its program parses them."""
    return options_of(options_class, given_values(arguments, options_class, usage=usage))


def tiny_options(data: Path, run_dir: Path, **changes: Any) -> PretrainOptions:
    return parse_options(PretrainOptions, tiny_arguments(data, run_dir, **changes), usage="")


def build_state(recipe: Recipe, device: torch.device | str = "cpu", **machine: Any) -> TrainState:
    """The state of a run of this recipe that has not begun."""
    return state.build_state(**recipe.state_arguments() | machine, device=torch.device(device))


def one_step(
    state: TrainState,
    *micro_batches: list[torch.Tensor],
    autocast: AbstractContextManager[Any] | None = None,
    **changes: Any,
) -> StepOutput:
    """A training step on groups of crops, with some hyperparameters."""
    hyper = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "teacher_temp": 0.04}
    return train_step(
        state,
        iter(micro_batches),
        len(micro_batches),
        Hyperparameters(**({**hyper, "freeze_last_layer": False} | changes)),
        clip_norm=3.0,
        autocast=autocast or nullcontext(),
    )


def prepared(options: PretrainOptions, device: str = "cpu") -> Run:
    """A run as `pretrain` prepares it; nothing has been written."""
    return prepare(options, Path(options.run_dir), torch.device(device))


def state_hash(checkpoint: dict[str, Any]) -> str:
    """SHA-256 over every tensor and value that learning changes, by name."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + str((value.dtype, value.shape)).encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list):
            for index, item in enumerate(value):
                add(f"{name}.{index}", item)
        else:
            digest.update(f"{name}={value}".encode())

    for part in ("step", "student", "teacher", "center", "optimizer", "loss_scale", "skipped"):
        add(part, checkpoint[part])
    return digest.hexdigest()
