"""Remove damaged records from TensorBoard's event files, because its reader stops at the first one.

A record is the length of its data (8 bytes), a checksum of the length (4), the data, and their checksum (4).
"""

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
from dino_sparo.terminal import log

HEADER, BESIDE, LEAST = 12, 16, 4  # bytes before the data, around the data, and of the shortest data
LANE = 256  # records are cut into lanes of so many bytes, whose checksums are computed in parallel
TABLE = np.array(CRC_TABLE, np.uint32)


def clean_events(folder: Path) -> None:
    """Rewrite the event files in a folder that have damaged records, without these.

    Only for the one process that writes these files. An incomplete last record, which a killed process leaves
    behind, is kept: no record follows it.

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
    """Start and end (exclusive) of the records whose length matches its checksum."""
    first = 0
    while first + BESIDE + LEAST <= len(data):
        length, checksum = struct.unpack_from("<QI", data, first)
        last = first + BESIDE + length
        if LEAST <= length <= len(data) - first - BESIDE and checksum == masked_crc32c(
            data[first : first + 8]
        ):
            yield first, last
            first = last
        else:  # search for the next record
            first += 1


def checksums(records: Sequence[bytes]) -> list[int]:
    """The masked CRC-32C of records of at least four bytes, 50 times faster than `masked_crc32c`."""
    lanes = [-(-len(record) // LANE) for record in records]
    # Leading zeros keep a register of 0, and inverting the first four bytes replaces its initial value.
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
    """Registers (lanes,) of CRC-32C after the bytes of columns (bytes, lanes)."""
    for column in columns:
        registers = TABLE[(registers ^ column) & 255] ^ (registers >> np.uint32(8))
    return registers
