"""The report as one HTML page: read from the files of a run, each figure with the name of its file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dino_sparo.errors import UserError

NUM_BEST = 4  # slots shown from either end of the ranking
FILES = {name: f"{name}/{name}.json" for name in ("rank", "health", "maps", "gallery", "mask", "factors")}


@dataclass(frozen=True)
class Table:
    """Rows of text; `heat` colours a cell by a share of 0 to 1. A folded one shows when it is opened."""

    caption: str
    source: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    heat: Sequence[Sequence[float | None]] | None = None
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A plot (`svg`) or a picture (`uri`), with the file that it comes from."""

    caption: str
    source: str
    svg: Markup | None = None
    uri: str | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side: `plots` and `small` ones wrap, `wide` ones scroll."""

    kind: str
    pictures: Sequence[Picture]


@dataclass
class Section:
    """One part of the page; `notes` are a line of text and, if it helps, a command."""

    title: str
    anchor: str
    intro: str = ""
    made: str = ""
    blocks: list[Table | Pictures] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RunFiles:
    """Where the files of a run lie, and which command makes which part.

    folder: what `results.json` and, of a run folder, `metrics.jsonl` lie in. slots: what the commands about
    slots wrote. commands: name of a part -> the command line that makes it. asked: whose weights, and if they
    are given images and control, the page is about; an analysis of others is not shown.
    """

    folder: Path
    slots: Path
    commands: Mapping[str, str]
    asked: Mapping[str, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """As captions call a file: within the run folder if it lies there."""
        inside = path.resolve().is_relative_to(self.folder.resolve())
        return str(path.resolve().relative_to(self.folder.resolve())) if inside else str(path)

    def read(self, part: str) -> dict[str, Any] | None:
        """The JSON of one analysis, None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = self.slots / FILES[part]
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise damaged(path, error, self.commands[part]) from error
        if not isinstance(content, dict):
            raise damaged(path, TypeError("no object of names and values"), self.commands[part])
        return content

    def of_others(self, content: Mapping[str, Any]) -> str:
        """By what an analysis is not about what is asked for; empty if it is."""
        differing = [key for key, value in self.asked.items() if key in content and content[key] != value]
        return ", ".join(f"{key} {content[key]}" for key in differing)

    def made(self, path: Path) -> tuple[str, bool]:
        """When a file was written, and whether the run has a newer checkpoint."""
        seconds = path.stat().st_mtime
        checkpoints = [file.stat().st_mtime for file in (self.folder / "checkpoints").glob("*.pt")]
        when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        return when, any(newer > seconds for newer in checkpoints)


def damaged(path: Path, error: Exception, command: str) -> UserError:
    """What to say of a file that does not hold what it should."""
    reason = f"no {error}" if isinstance(error, KeyError) else error
    return UserError(f"{path} is damaged ({reason}); remove it, and make it again with `{command}`")


def slots_to_show(files: RunFiles, num_slots: int) -> tuple[list[int], list[int]]:
    """The best and the worst slots by k-NN alone, best first in both; without a ranking the first ones.

    Few slots are all shown, each once.
    """
    ranked = files.read("rank")
    if ranked and files.of_others(ranked):
        ranked = None
    try:
        order = [int(slot) for slot in ranked["encoders"][0]["orders"]["knn"]] if ranked else []
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise damaged(files.slots / FILES["rank"], error, files.commands["rank"]) from error
    order = order or list(range(min(num_slots, 2 * NUM_BEST)))
    best = order[:NUM_BEST]
    return best, [slot for slot in order[-NUM_BEST:] if slot not in best]


def analysed(
    files: RunFiles,
    part: str,
    title: str,
    fill: Callable[[Section, dict[str, Any]], None],
) -> Section:
    """The section of one analysis: filled from its JSON, or the command that makes it."""
    section = Section(title, part)
    content = files.read(part)
    path = files.slots / FILES[part]
    if content is None:
        section.notes.append(("Not made yet:", files.commands[part]))
        return section
    others = files.of_others(content)
    if others:
        section.notes.append((f"Not shown, since made with {others}; make it anew:", files.commands[part]))
        return section
    section.made, old = files.made(path)
    if old:
        section.notes.append(("Older than the newest checkpoint; make it anew:", files.commands[part]))
    try:
        fill(section, content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error, files.commands[part]) from error
    return section


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section], config: str | None) -> str:
    """The HTML of the page.

    Args:
        title: name of the run.
        facts: what the head tells, name -> text.
        sections: in their order.
        config: text of the run's config.yaml, None without.
    """
    environment = Environment(
        loader=PackageLoader("dino_sparo.slots"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    template = environment.get_template("report.html.jinja")
    return template.render(title=title, facts=facts, sections=sections, config=config, written=written)
