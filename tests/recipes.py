"""Parsing recipes and collecting what a mistake in them is answered."""

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.errors import UserError
from dino_sparo.recipe.files import recipes
from dino_sparo.recipe.typed import flattened
from tests.tiny import parse_options

REQUIRED = ("--data.path", "x", "--run_dir", "y")


def parse(*arguments: str, options_class: type = PretrainOptions) -> Any:
    return parse_options(options_class, list(arguments), usage="usage")


def parsed(recipe: str) -> dict[str, Any]:
    """A shipped recipe by dotted key."""
    return flattened(parse("--config", recipe, *REQUIRED).as_dict())


def content(recipe: str = "photos_sparo") -> dict[str, Any]:
    return yaml.safe_load(recipes()[recipe].read_text())


def differences(one: str, other: str) -> dict[str, Any]:
    """What another shipped recipe has instead, by dotted key."""
    before, now = parsed(one), parsed(other)
    return {key: now.get(key) for key in before | now if before.get(key) != now.get(key)}


def changed(key: str, value: Any = MISSING) -> str:
    """The photo recipe as text, with another value at a key, or without the key."""
    recipe = content()
    *sections, name = key.split(".")
    place = recipe
    for section in sections:
        place = place.setdefault(section, {})
    if value is MISSING:
        del place[name]
    else:
        place[name] = value
    return yaml.safe_dump(recipe)


def refused(tmp_path: Path, recipe: str, *arguments: str) -> str:
    """The message about a recipe with this text."""
    (tmp_path / "recipe.yaml").write_text(recipe)
    required = REQUIRED[2:] if "\n  path:" in recipe else REQUIRED
    return refusal("--config", str(tmp_path / "recipe.yaml"), *required, *arguments)


def refusal(*arguments: str, options_class: type = PretrainOptions) -> str:
    with pytest.raises(UserError) as caught:
        parse(*arguments, options_class=options_class)
    assert "\n" not in str(caught.value)
    return str(caught.value)
