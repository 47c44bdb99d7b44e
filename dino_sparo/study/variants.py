"""Variants of a recipe: the runs of a study, checked before training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.recipe.files import checked_keys, merged, recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import build, flattened, leaf_keys, read_yaml, with_sections_read

VARIANTS_FOLDER = "variants"
Changes = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One run of a study."""

    name: str
    """Name in the file of variants; empty without one."""
    row: str
    """Label of its row in the table, the same for all seeds."""
    run_dir: Path
    """Its run folder, in that of the study."""
    changes: Changes
    """Changed fields of the recipe by dotted key."""
    recipe: Recipe
    """The changed recipe."""
    base: Recipe
    """The recipe before the changes."""
    chosen: bool
    """Whether to train it now."""

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return self.run_dir.name


def plan_runs(
    recipe: Recipe, folder: Path, *, variants: str | None, vary: Sequence[str], only: Sequence[str]
) -> list[Variant]:
    """All combinations of variants and values of each `vary`, including variants that are not in `only`.

    Raises:
        UserError: a key or value is wrong, or two runs are the same.
    """
    named, varied = read_variants(variants, only), dict(map(parse_vary, vary))
    if len(varied) < len(vary):
        raise UserError(f"vary is {list(vary)}, with a key twice; give all values of a key together")
    planned: dict[str, Variant] = {}
    for (name, changes), values in product(named.items(), product(*varied.values())):
        chosen = dict(zip(varied, values, strict=True))
        title = _title(name, chosen)
        row = _title(name, {key: value for key, value in chosen.items() if key != "seed"}) or "recipe"
        place = re.sub(r"[^\w.=+-]+", "_", title) or "recipe"
        every = changes | chosen
        try:
            keys = leaf_keys(Recipe)
            over = checked_keys(with_sections_read(every, keys), keys, "key")
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
    """Read a YAML file of variants: name -> changed fields.

    Args:
        name: path of the file, or the name of a shipped one. None: one variant without changes.
        only: names that the file must have.

    Raises:
        UserFileNotFoundError: there is no such file.
        UserError: it is not a file of variants, or lacks a name in `only`.
    """
    if name is None:
        if only:
            raise UserError(f"only is {list(only)}, but there is no file of variants; set variants")
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
        raise UserError(
            f"{path} is not a file of variants; expected names, each with fields section.key: value"
        )
    variants = {str(key): value for key, value in content.items()}
    unknown = [one for one in only if one not in variants]
    if unknown:
        raise UserError(f"only has {unknown[0]!r}; expected variants of {path}: {', '.join(variants)}")
    return variants


def parse_vary(text: str) -> tuple[str, list[str]]:
    """Split `key=value,value` into the key and its values, which commas outside brackets separate.

    Raises:
        UserError: the key or a value is empty.
    """
    key, _, listed = text.partition("=")
    opened = list(accumulate((char in "[{") - (char in "]}") for char in listed))
    cut = [-1, *(at for at, char in enumerate(listed) if char == "," and opened[at] == 0), len(listed)]
    values = [listed[one + 1 : other].strip() for one, other in pairwise(cut)]
    if not key or "" in values:
        raise UserError(f"vary has {text!r}; expected section.key=VALUE,VALUE,...")
    return key.strip(), values


def _title(name: str, chosen: Changes) -> str:
    """`name key=value key=value`, with only the last part of each key if these are unique."""
    last = [key.rpartition(".")[2] for key in chosen]
    short = last if len(set(last)) == len(last) else list(chosen)
    values = [f"{key}={value}" for key, value in zip(short, chosen.values(), strict=True)]
    return " ".join(filter(None, [name, *values]))
