"""What a page is about: a run or weights, the files of its analyses, and the commands that make them."""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from dino_sparo.evaluation.knn import KNN
from dino_sparo.evaluation.results import results_folder
from dino_sparo.files import parsed_json, read_as
from dino_sparo.recipe.files import CONFIG_FILE
from dino_sparo.recipe.typed import read_yaml
from dino_sparo.runs.runlog import each_metric

TITLES = {
    "rank": "Ranking of slots",
    "health": "Health of slots",
    "maps": "Where slots look",
    "gallery": "Galleries of slots",
    "neighbors": "Nearest neighbors",
    "mask": "Learned masks",
    "factors": "Known factors",
}
FILES = {part: f"{part}/{part}.json" for part in TITLES}
OF_CLASSES = ("rank", "mask")  # analyses that need labeled images
LABELS = ("val", "label_column")  # options of images that only these have
PIXELS = ("max_pixels", "value_range")  # where they are null, those of the run or the defaults apply
WITHOUT_SLOTS = ("maps", "neighbors")  # analyses of any encoder
COMPARING = ("rank", "maps", "mask", "factors")  # analyses that compare with a control
NUM_BEST = 4  # slots shown from each end of the ranking
MOST_ENTRIES = 20_000  # of the log, more than curves have pixels
RARE = {KNN, "slots_dead"}  # one of these is in about one entry per epoch


@dataclass(frozen=True)
class Subject:
    """What a page is about, from the command's options; analyses with other weights, images, or controls are
    not shown. `has_classes`: whether the images are labeled; `choice`: further options of `data`;
    `states`: hashes of encoder, control_encoder, image_files, and labeled_files, as analyses contain them."""

    run: str
    out: str | None = None
    which: str = "teacher"
    data: str | None = None
    control: str | None = None
    has_classes: bool = True
    choice: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of `results.json` and, for a run folder, `metrics.jsonl`."""
        return results_folder(self.run)

    @property
    def slots(self) -> Path:
        """Folder that the commands about slots write to."""
        return Path(self.out) if self.out else self.folder / "slots"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The recipe of a run folder, or empty. Raises UserError: it is damaged."""
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return {}
        with made_by(path, "dino-sparo pretrain"):
            return dict(read_yaml(path))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The log of a run folder by step, or empty. Of very many entries these are some, and the last one;
        the few of epochs, with k-NN or statistics of slots, are thinned out by themselves."""
        of_epochs, others = (
            some(one for one in each_metric(self.folder) if RARE.isdisjoint(one) != rare)
            for rare in (True, False)
        )
        return sorted([*others, *of_epochs], key=itemgetter("step"))

    def command(self, part: str) -> str:
        """The command line that makes a part of the page, on the given images if they are suitable."""
        words = ["dino-sparo", *(["slots"] if part in TITLES else []), part, self.run]
        if part != "factors":
            will_do = self.has_classes or (part in TITLES and part not in OF_CLASSES)
            words += ["--data.path", self.data if self.data and will_do else "DIR"]
            for key, value in self._chosen(part).items() if will_do else ():
                words += [f"--data.{key}", value if isinstance(value, str) else json.dumps(value)]
        if self.control and part in COMPARING:
            words += ["--control", self.control]
        if self.which != "teacher":
            words += ["--which", self.which]
        if self.out and part in TITLES:
            words += ["--out", self.out]
        return shlex.join(words)

    def find(self, part: str) -> tuple[dict[str, Any] | None, str]:
        """The JSON of an analysis; if there is none or it is about other options, None and a note.

        Raises:
            UserError: the file is damaged.
        """
        path = self.slots / FILES[part]
        if not path.is_file():
            return None, "Not made yet:"
        asked = {"which": self.which, "control": self.control, "data": self.data}
        with made_by(path, self.command(part)):
            content = dict(parsed_json(path).items())
            chosen = self._chosen(part)
            found = dict(content.get("choice", chosen)) if self.data else chosen
        others = [
            f"{key} {content[key]}"
            for key, value in asked.items()
            if value not in (None, content.get(key, value))
        ]
        others += [
            f"data.{key} {found.get(key, 'null')}"
            for key in {**chosen, **found}
            if found.get(key) != chosen.get(key)
            and not (key in PIXELS and None in (found.get(key), chosen.get(key)))
        ]
        run = str(content.get("run", self.run))
        # The folder of a run may have moved, but one that was chosen may be that of another run.
        others += [f"run {run}"] if self.out and os.path.realpath(run) != os.path.realpath(self.run) else []
        if self.data:  # else what exists is shown, and its age is told
            states = self.states.items()
            others += [
                f"another state of {key.replace('_', ' ')}"
                for key, now in states
                if content.get(key, now) != now
            ]
        if others:
            return None, f"Not shown, since it was made with {', '.join(others)}; make it again:"
        return content, ""

    def _chosen(self, part: str) -> dict[str, Any]:
        """The further options of the images of an analysis."""
        others = LABELS if part in TITLES and part not in OF_CLASSES else ()
        return {key: value for key, value in self.choice.items() if part != "factors" and key not in others}

    def slots_to_show(self, num_slots: int) -> list[int]:
        """The four best and the four worst slots by their own k-NN; without a ranking, those of the maps,
        or the first eight."""
        if ranked := self.find("rank")[0]:
            with made_by(self.slots / FILES["rank"], self.command("rank")):
                order = [int(slot) for slot in ranked["encoders"][0]["orders"]["knn"]]
            return order if len(order) < 2 * NUM_BEST else order[:NUM_BEST] + order[-NUM_BEST:]
        order = list(range(num_slots))
        if drawn := self.find("maps")[0]:
            with made_by(self.slots / FILES["maps"], self.command("maps")):
                order = [int(slot) for slot in drawn["slots"]] or order
        return order[: 2 * NUM_BEST]


def some(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a log, evenly thinned out to about `MOST_ENTRIES`, and the last one."""
    kept: list[dict[str, Any]] = []
    every, last = 1, None
    for number, last in enumerate(entries):
        if number % every == 0:
            kept.append(last)
        if len(kept) > MOST_ENTRIES:
            kept, every = kept[::2], 2 * every
    return kept if last is None or kept[-1] is last else [*kept, last]


def made_by(path: Path, command: str) -> AbstractContextManager[None]:
    """`read_as` for a file that a command can make again."""
    return read_as(f"{path} is damaged", f"remove it, and make it again with `{command}`")
