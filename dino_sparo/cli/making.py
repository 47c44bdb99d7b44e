"""`dino-sparo shard`."""

from dataclasses import dataclass

from dino_sparo.cli.images import ReadingOptions
from dino_sparo.recipe.typed import Workers


@dataclass
class ShardOptions(ReadingOptions):
    """Tar shards of a folder of images or parquet files, for network file systems and a random order."""

    source: str
    """Folder of images (train/<class>/... and val/<class>/..., <class>/... or flat) or of parquet files."""
    out: str
    """Folder for the shards, in train/ and val/ if the source has both; give it as `data.path` to read
    them."""
    short_side: int | None = None
    """Images whose short side exceeds this many pixels are resized to it and written as JPEG of quality 95;
    null: all files are copied as they are."""
    num_workers: Workers | None = None
    """Processes that write shards; 0: write in this process; null: one per CPU core."""


def shard(options: ShardOptions) -> None:
    """Write the shards."""
    from dino_sparo import shard as room
    from dino_sparo.data.splits import Choice

    room.shard(
        options.source, options.out, options.short_side, options.num_workers, choice=Choice.of(options)
    )
