"""Variants of a recipe: the runs of a study, read and checked before any is trained."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.recipe.files import checked_keys, merged, recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import build, flattened, leaf_keys, read_yaml

VARIANTS_FOLDER = "variants"
Changes = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One run of them."""

    name: str
    """Of the set of changes that it comes from; empty for the recipe alone."""
    row: str
    """What its row of the table is called, the same for all seeds."""
    run_dir: Path
    """Its run folder, below that of the study."""
    changes: Changes
    """What it has instead of the recipe, by dotted key."""
    recipe: Recipe
    """What it is trained by."""
    base: Recipe
    """The recipe that is changed."""
    chosen: bool
    """Whether it is to be trained now."""

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return self.run_dir.name


def plan_runs(
    recipe: Recipe, folder: Path, *, variants: str | None, vary: Sequence[str], only: Sequence[str]
) -> list[Variant]:
    """All runs, also those that `only` leaves out: variants x values of each `vary`, checked.

    Raises:
        UserError: a key or value is wrong, naming the variant; or two variants are the same.
    """
    named, varied = read_variants(variants, only), dict(map(parse_vary, vary))
    if len(varied) < len(vary):
        raise UserError("vary names a key twice; give all its values at once, as KEY=VALUE,VALUE")
    planned: dict[str, Variant] = {}
    for (name, changes), values in product(named.items(), product(*varied.values())):
        chosen = dict(zip(varied, values, strict=True))
        title = _title(name, chosen)
        row = _title(name, {key: value for key, value in chosen.items() if key != "seed"}) or "recipe"
        place = re.sub(r"[^\w.=+-]+", "_", title) or "recipe"
        every = changes | chosen
        try:
            over = checked_keys(every, leaf_keys(Recipe), "key")
            changed: Recipe = build(Recipe, merged(flattened(recipe.as_dict()), over))
        except UserError as error:
            raise UserError(f"variant {title!r}: {error}") from error
        if place in planned:
            raise UserError(f"run {place!r} is planned twice; give each variant and value once")
        if any((other.row, other.recipe.seed) == (row, changed.seed) for other in planned.values()):
            raise UserError(f"seed {changed.seed} of {row!r} is planned twice; give it once")
        to_train = not only or name in only
        planned[place] = Variant(name, row, folder / place, every, changed, recipe, to_train)
    return list(planned.values())


def read_variants(name: str | None, only: Sequence[str]) -> dict[str, Changes]:
    """Named sets of changes from a YAML file, by its path or among the shipped ones.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it is none, or lacks a name that is in `only`.
    """
    if name is None:
        if only:
            raise UserError(f"only is {list(only)}, but variants is not given; give a file of variants")
        return {"": {}}
    folder = next(iter(recipes().values())).parent / VARIANTS_FOLDER
    shipped = {path.stem: path for path in folder.glob("*.yaml")}
    path = Path(name) if Path(name).is_file() else shipped.get(name)
    if path is None:
        raise UserFileNotFoundError(
            f"variants {name!r} does not exist; give a YAML file or one of the shipped ones: "
            f"{', '.join(sorted(shipped))}"
        )
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(f"{path}: expected names of variants, each with a section of section.key: value")
    variants = {str(key): value for key, value in content.items()}
    unknown = [one for one in only if one not in variants]
    if unknown:
        raise UserError(f"only has {unknown[0]!r}, which is not in {path}; it has {', '.join(variants)}")
    return variants


def parse_vary(text: str) -> tuple[str, list[str]]:
    """`key=value,value` as the key and its values; commas in brackets separate none.

    Raises:
        UserError: it has no key or a value is empty.
    """
    key, _, listed = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[]*\])", listed)]
    if not key or "" in values:
        raise UserError(f"vary has {text!r}; expected section.key=VALUE,VALUE,...")
    return key.strip(), values


def _title(name: str, chosen: Changes) -> str:
    """`name key=value key=value`, each key by its last part if that is enough."""
    last = [key.rpartition(".")[2] for key in chosen]
    short = last if len(set(last)) == len(last) else list(chosen)
    values = [f"{key}={value}" for key, value in zip(short, chosen.values(), strict=True)]
    return " ".join(filter(None, [name, *values]))
