"""TensorBoard's files of events: records that are damaged, at the first of which its reader would stop.

A record is its length (8 bytes), the checksum of that (4), the data, and the checksum of these (4).
"""

import logging
import struct
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import xor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE
from tensorboard.summary.writer.record_writer import masked_crc32c

from dino_sparo.files import write_file

log = logging.getLogger("dino_sparo")

HEADER, BESIDE, LEAST = 12, 16, 4  # bytes before the data, without them, and of them
LANE = 256  # bytes of a record that are summed one by one, beside those of all other lanes
TABLE = np.array(CRC_TABLE, np.uint32)


def clean_events(folder: Path) -> None:
    """Write anew, without damaged records, the files in a folder that have such; for their only writer.

    A last record that is cut, as a kill leaves it, hides none behind it, and stays.

    Raises:
        OSError: a file cannot be read or written.
    """
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes() if path.is_file() else b""
        found = [*framed(data)]
        computed = checksums([data[first + HEADER : last - 4] for first, last in found])
        stored = [int.from_bytes(data[last - 4 : last], "little") for _, last in found]
        whole = [
            data[first:last]
            for (first, last), one, other in zip(found, computed, stored, strict=True)
            if one == other
        ]
        between = [first - last for (_, last), (first, _) in zip([(0, 0), *found], found, strict=False)]
        damaged = len(found) - len(whole) + sum(map(bool, between))
        if damaged:
            write_file(path, b"".join(whole))
            log.warning(
                "WARNING: %s: %d of its records cannot be read, which would hide those behind them from "
                "TensorBoard; the others are kept, and metrics.jsonl has all numbers",
                *(path, damaged),
            )


def framed(data: bytes) -> Iterator[tuple[int, int]]:
    """First and last byte, exclusive, of records whose length is intact."""
    first = 0
    while first + BESIDE + LEAST <= len(data):
        length, checksum = struct.unpack_from("<QI", data, first)
        last = first + BESIDE + length
        if LEAST <= length <= len(data) - first - BESIDE and checksum == masked_crc32c(
            data[first : first + 8]
        ):
            yield first, last
            first = last
        else:  # the next is looked for
            first += 1


def checksums(records: Sequence[bytes]) -> list[int]:
    """CRC-32C of each of some records of four bytes or more, masked as TensorBoard does; a megabyte in a
    fiftieth of a second, where `masked_crc32c` takes a second."""
    lanes = [-(-len(record) // LANE) for record in records]
    # Zeros before it leave the register alone, and inverting four bytes stands for its start.
    padded = b"".join(
        bytes(count * LANE - len(record)) + bytes(byte ^ 255 for byte in record[:4]) + record[4:]
        for record, count in zip(records, lanes, strict=True)
    )
    columns = np.frombuffer(padded, np.uint8).reshape(-1, LANE).T
    registers = iter(_advanced(np.zeros(sum(lanes), np.uint32), columns).tolist())
    lane_later = [
        _advanced(
            np.arange(256, dtype=np.uint32) << np.uint32(8 * byte), np.zeros((LANE, 1), np.uint8)
        ).tolist()
        for byte in range(4)
    ]
    found = []
    for count in lanes:
        register = 0
        for _ in range(count):
            later = (table[register >> 8 * byte & 255] for byte, table in enumerate(lane_later))
            register = reduce(xor, later, next(registers))
        register ^= 2**32 - 1
        found.append(((register >> 15 | register << 17) + 0xA282EAD8) % 2**32)
    return found


def _advanced(registers: NDArray[np.uint32], columns: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Registers (lanes,) of CRC-32C after the bytes of these columns, (bytes, lanes)."""
    for column in columns:
        registers = TABLE[(registers ^ column) & 255] ^ (registers >> np.uint32(8))
    return registers
