"""An encoder as a folder in timm's layout of the Hugging Face hub, ready to be pushed, and read back.

`model.safetensors` holds the one set of weights, by the names of timm's model; `config.json` tells timm how
to build that, and under a key of ours how to build the Encoder and whose weights they are; `README.md` is
the model card. No file needs pickle.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import write_file
from dino_sparo.interop.model_card import model_card
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.interop.timm_config import from_timm_names, timm_config, to_timm_names

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
OUR_KEY = "dino_sparo"  # of config.json, beside those of timm
FORMAT = 2
READABLE = (1, FORMAT)  # format 1 was what is now under our key, alone


def write_exported(stored: StoredEncoder, folder: Path, *, name: str, measured: Sequence[str] = ()) -> None:
    """Write the files into a new or empty folder.

    Args:
        name: of the model, for its card.
        measured: lines for the card, one a result.

    Raises:
        UserError: the folder holds something already, or the weights do not fit.
        OSError: it cannot be written.
    """
    encoder = stored.build()
    weights = to_timm_names(encoder.state_dict(), stored.arguments)
    config = timm_config(stored.arguments, num_features=encoder.backbone.cls_token.shape[-1])
    config[OUR_KEY] = {
        "format": FORMAT,
        "weights": stored.which,
        "seed": stored.seed,
        "encoder": stored.arguments,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"out: {folder} is not empty; choose another folder or empty it")
    write_file(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_file(folder / CARD_FILE, model_card(stored, encoder, name, measured))
    # Last, so that a folder with it is whole.
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_exported(weights_path: Path, which: str) -> StoredEncoder:
    """Read the weights of an exported folder and the description beside them.

    Raises:
        UserFileNotFoundError: one of its two files is missing.
        UserError: a file is damaged, or it holds the weights of another than `which`.
    """
    config_path = weights_path.with_name(CONFIG_FILE)
    for path in (weights_path, config_path):
        if not path.is_file():
            raise UserFileNotFoundError(
                f"{path} does not exist; an exported encoder is a folder with {WEIGHTS_FILE} and "
                f"{CONFIG_FILE}"
            )
    config = _read_config(config_path)
    if config["weights"] != which:
        raise UserError(
            f"{weights_path} holds the {config['weights']} only; ask for which={config['weights']!r}, or "
            f"export the {which} from its run"
        )
    try:
        weights = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{weights_path} is no readable safetensors file, or only a part of one ({error}); get it again"
        ) from error
    weights = from_timm_names(weights, config["encoder"])
    return StoredEncoder(weights_path, config["encoder"], config["seed"], which, weights)


def _read_config(path: Path) -> dict[str, Any]:
    """What is under our key."""
    kinds = {"format": int, "weights": str, "seed": int, "encoder": dict}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable JSON file ({error}); get it again") from error
    config = config.get(OUR_KEY, config) if isinstance(config, dict) else {}
    wrong = not isinstance(config, dict) or any(
        not isinstance(config.get(key), kind) for key, kind in kinds.items()
    )
    if wrong or config["format"] not in READABLE or not {"arch", "readout"} <= config["encoder"].keys():
        raise UserError(
            f"{path} describes no exported encoder of format {FORMAT}; expected what dino-sparo export writes"
        )
    return config
