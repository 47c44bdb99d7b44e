"""Pretraining from Python, for example in a notebook."""

import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_sparo.interop.load import load_encoder
from dino_sparo.models import Encoder
from dino_sparo.parallel.processes import STOP_SIGNALS
from dino_sparo.recipe.files import named_recipe
from dino_sparo.terminal import set_up_log
from dino_sparo.training import pretrain as training


def pretrain(
    recipe: str | Path,
    data_path: str | Path,
    run_dir: str | Path,
    changes: Mapping[str, Any] | None = None,
) -> Encoder:
    """Start or resume a run in this process; returns its teacher, as `load_encoder` does.

    An interrupt, such as the stop button of a notebook, saves the run after the step; the same call resumes.

    Args:
        recipe: a YAML file, or the name of a recipe of the package.
        data_path: the images, as for `--data.path`.
        run_dir: folder of the run.
        changes: values that replace those of the recipe, such as `{"optim.epochs": 5}`.

    Raises:
        UserError: there is a mistake in recipe or data.
        StoppedError: the run was interrupted, and is saved.
    """
    if not logging.getLogger("dino_sparo").level:
        set_up_log(logging.INFO)
    options = named_recipe(str(recipe), {"data.path": str(data_path)} | dict(changes or {}))
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        training.pretrain(options, Path(run_dir))
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number, handler in before.items():
                signal.signal(number, handler)
    return load_encoder(run_dir)
