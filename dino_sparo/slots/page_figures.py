"""Figures of the report: plots as inline SVG in the colors of the page, pictures as data URIs.

A plot's ink is the page's text color, so that it is right in the light and in the dark scheme.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dino_sparo.data.decode import open_image

INK = "#010203"  # stands for the page's text color
COLORS = ("#3b82c4", "#e07b39", "#4a9d5b", "#9466c2", "#cf4f5a", "#2a9d9d")  # read on white and on black
MAX_POINTS = 600  # of a line
SIDES = (1600, 1200, 900, 600, 400, 250)  # pixels of the longer side that a smaller picture may have
QUALITY = 82  # of JPEG
Line = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.4, 2.9)) -> Markup:
    """What `draw` puts into the axes, as an SVG element that scales with the page.

    name: unique on the page; says what is seen to who cannot see it.
    """
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    settings |= {"font.size": 10.0, "axes.facecolor": "none", "figure.facecolor": "none"}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(settings | dict.fromkeys(inked, INK)):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", opening)
    rest = re.sub(r' id="[A-Za-z][A-Za-z0-9.]*_\d+"', "", rest)  # every plot has the same
    label = Markup.escape(name)
    return Markup(f'{opening} role="img" aria-label="{label}">{rest.replace(INK, "currentColor")}')


def lines(
    name: str, drawn: Sequence[Line], *, x_label: str, y_label: str, styles: Sequence[str] = ()
) -> Markup:
    """A plot of lines; long ones are thinned evenly. styles: one a line, of matplotlib."""

    def draw(axes: Axes) -> None:
        handles = []
        for number, (_, x, y) in enumerate(drawn):
            shown = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int)
            handles += axes.plot(
                np.asarray(x)[shown],
                np.asarray(y)[shown],
                styles[number] if styles else "-",
                color=COLORS[number % len(COLORS)],
                marker="o" if len(x) <= 40 else None,
                markersize=3.5,
                linewidth=1.6,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(drawn) > 1:
            axes.legend(handles, [label for label, _, _ in drawn], frameon=False, fontsize=8.5)

    return svg(name, draw)


def histogram(name: str, values: Sequence[float], *, x_label: str) -> Markup:
    """How many slots have which value."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins=min(24, max(6, len(values) // 2)), color=COLORS[0])
        axes.set_xlabel(x_label)
        axes.set_ylabel("slots")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(name, draw, (4.0, 2.4))


def picture_uri(path: Path, max_bytes: int) -> str:
    """A picture file as a data URI: as it is if it has at most `max_bytes`, else smaller and as JPEG.

    Raises:
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    with open_image(content) as image:
        image.load()
        kind = image.format
        if kind not in ("PNG", "JPEG") or len(content) > max_bytes:
            content, kind = _smaller(image, max_bytes), "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


def _smaller(image: Image.Image, max_bytes: int) -> bytes:
    """The best JPEG with at most `max_bytes`, or the smallest that there is."""
    plain = Image.new("RGB", image.size, "white")
    plain.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
    longest = max(plain.size)
    for side in [min(longest, SIDES[0]), *(side for side in SIDES[1:] if side < longest)]:
        plain.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        plain.save(buffer, "JPEG", quality=QUALITY)
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


def number(value: float | str | bool | None, digits: int = 2) -> str:
    """A value for a table: numbers with `digits` decimals, whole ones without, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value}"
