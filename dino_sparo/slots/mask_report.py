"""What learned masks did, as a table to read and a picture to look at."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def table(result: dict[str, Any]) -> str:
    """The rows of `mask.json` as lines of text, a Markdown table in the layout of SPARO's table 5."""
    lines = [
        f"a mask learned on {result['data']}, {result['epochs']} epochs; nearest class mean by the masked "
        f"cosine, top-1 in per cent",
        *result["remarks"],
        "",
        "| encoder | mask over | test set | initial | masked | relative change | above one half |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        change = "-" if row["relative_change"] is None else f"{row['relative_change']:+.2f} %"
        lines.append(
            f"| {row['encoder']} | {row['over']} | {row['test_set']} | {row['initial']:.2f} | "
            f"{row['masked']:.2f} | {change} | {100 * row['kept']:.0f} % |"
        )
    return "\n".join(lines)


def draw_masks(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: one row an encoder, its mask over slots as bars and that over dimensions as an image."""
    parts: dict[str, int] = result["parts"]
    figure = Figure(figsize=(10, 3.2 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 2, squeeze=False)
    for (bars, picture), (name, num_parts) in zip(axes, parts.items(), strict=True):
        bars.bar(range(num_parts), result["masks"][f"{name} slots"])
        bars.set(title=f"{name}: over slots", xlabel="slot", ylabel="mask", ylim=(0, 1))
        of_dimensions = np.array(result["masks"][f"{name} dimensions"]).reshape(num_parts, -1)
        shown = picture.imshow(of_dimensions, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        picture.set(title=f"{name}: over dimensions", xlabel="number within the slot", ylabel="slot")
        figure.colorbar(shown, ax=picture)
    figure.savefig(path, dpi=110)
