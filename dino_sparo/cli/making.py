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
    """Folder that gets the shards, in train/ and val/ if the source has both; `data.path` can be it."""
    short_side: int | None = None
    """Reduce images to this short side in pixels if theirs is longer, as JPEG files of quality 95; null
    copies all files as they are."""
    num_workers: Workers | None = None
    """Processes that read and write, each one shard at a time; null takes one per core."""


def shard(options: ShardOptions) -> None:
    """Write the shards."""
    from dino_sparo import shard as room
    from dino_sparo.data.splits import Choice

    room.shard(
        options.source, options.out, options.short_side, options.num_workers, choice=Choice.of(options)
    )
