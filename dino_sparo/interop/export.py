"""`dino-sparo export`: an encoder as a folder of two files that need no pickle, and such a folder read back.

`model.safetensors` holds the state dict of the Encoder, `config.json` how to build it and whose weights
they are.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.interop.stored import StoredEncoder

if TYPE_CHECKING:
    from dino_sparo.options import ExportOptions

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1


def write_exported(stored: StoredEncoder, folder: Path) -> None:
    """Write the two files into a new or empty folder.

    Raises:
        UserError: the folder holds something already, cannot be written, or the weights do not fit.
    """
    weights = stored.build().state_dict()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"out: {folder} is not empty; choose another folder or empty it")
        _write(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        config = {
            "format": FORMAT,
            "weights": stored.which,
            "seed": stored.seed,
            "encoder": stored.arguments,
        }
        # Last, so that a folder with it is whole.
        _write(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"out: {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error


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
    return StoredEncoder(weights_path, config["encoder"], config["seed"], which, weights)


def _read_config(path: Path) -> dict[str, Any]:
    kinds = {"format": int, "weights": str, "seed": int, "encoder": dict}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable JSON file ({error}); get it again") from error
    wrong = [
        key
        for key, kind in kinds.items()
        if not isinstance(config, dict) or not isinstance(config.get(key), kind)
    ]
    if wrong or config["format"] != FORMAT or not {"arch", "readout"} <= config["encoder"].keys():
        raise UserError(
            f"{path} describes no exported encoder of format {FORMAT}; expected what dino-sparo export writes"
        )
    return config


def _write(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk and rename: the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def run(options: "ExportOptions") -> None:
    """`dino-sparo export`: write the encoder of a run, or of official weights, as plain files."""
    from dino_sparo.interop.load import read_stored

    stored = read_stored(options.run, options.which, arch=options.arch)
    write_exported(stored, Path(options.out))
    count = sum(value.numel() for value in stored.weights.values())
    print(f"{options.out}: {stored.which} of {options.run}, {count / 1e6:.2f} million parameters")
