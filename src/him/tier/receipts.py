"""What a cold tier is known to hold: a line for each pack that was copied and read back, kept on this disk."""

from collections.abc import Iterable, Iterator
from typing import Final

from him.errors import NotFoundError
from him.ports import Disk
from him.tier import lines
from him.tier.cold import Receipt

RECEIPTS: Final = "cold/receipts"


def receipts(disk: Disk) -> list[Receipt]:
    """What a cold tier is known to hold, in the order it was copied; a line that is not whole is passed over.

    What is gone on this disk is still held until a line says that it is gone there too.
    """
    try:
        file = disk.open(RECEIPTS)
    except NotFoundError:
        return []
    try:
        told = {receipt.pack: receipt for receipt, _ in lines.read(file, 0, Receipt) if receipt is not None}
        return [receipt for receipt in told.values() if receipt.digest]
    finally:
        file.close()


def receipt_lines(disk: Disk) -> Iterator[tuple[Receipt | None, int, bool]]:
    """(receipt or None, where its line begins, whether the line has an end) of every line, in order: for fsck."""
    try:
        file = disk.open(RECEIPTS)
    except NotFoundError:
        return
    try:
        start = 0
        for receipt, end in lines.read(file, 0, Receipt):
            yield receipt, start, True
            start = end
        if start < file.size():
            yield None, start, False
    finally:
        file.close()


def keep_receipts(disk: Disk, known: Iterable[Receipt]) -> None:
    """Take receipts over that were given to another repository, in place of all that are here."""
    disk.write_whole(RECEIPTS, b"".join(map(lines.encode, known)))
