"""Reads the text of a picture tile by tile, remembering every tile and every line by content.

A pure function of pixels and the reader's pin: what a Memo remembers only saves time. One changed region costs
the detection of the tiles whose pixels or halo changed, and the recognition of the lines whose pixels changed.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from him.config import OCR_HALO_PX, SCREEN_TILE_PX
from him.errors import UsageError
from him.perception.lines import Piece, cut_at_gaps, cut_at_separators, piece, stitched, tight
from him.ports import Memo, Progress, TextReader
from him.types import Box, TextLine, WidgetBox

DETECT_KIND: Final = "ocr.detect"
RECOGNISE_KIND: Final = "ocr.recognise"
_CONFIDENCE_LEAST: Final = 0.5
"""Lines read with less are noise: icons, borders, parts of photographs."""
_UPRIGHT_RATIO: Final = 2.5
"""A crop this many times as high as wide is text turned by 90°; a single narrow digit is not."""
_TEXT_HEIGHT_MAX: Final = 300
"""In a nearly empty tile the detector frames the whole tile (measured); no text on a screen is this high."""
_CROPS_PER_CALL: Final = 16
_SMALL_HEIGHT_PX: Final = (6, 40)
_SMALL_WIDTH: Final = 2.4
_SMALL_SINGLE: Final = 0.92
"""A single letter with its margin is narrower than high; discs and squares are not."""
_BADGE_LEAST_PX: Final = 12
_SMALL_COUNT_MAX: Final = 300
_SMALL_CONFIDENCE_LEAST: Final = 0.9
_SMALL_TEXT: Final = re.compile(r"[0-9]{1,3}|[A-Z]{2,3}|[a-z]{2,4}|[A-Z][a-z]{1,3}|[0-9.,]{1,4}%?|[ABDEFGHKMNPQRSWZ?]")
"""What strokes may be read as: letters that icons look like (O, V, X, …) are left out."""
_Quads = list[list[tuple[int, int]]]


class Counts(NamedTuple):
    """How much of a picture was read anew and how much was remembered."""

    tiles_detected: int
    tiles_remembered: int
    crops_recognised: int
    crops_remembered: int


class Reading(NamedTuple):
    """The lines of a picture, top to bottom then left to right, and what reading them cost."""

    lines: tuple[TextLine, ...]
    counts: Counts


class _Tile(NamedTuple):
    """A tile with its halo: where, and which of its sides (left, top, right, low) lie on the picture's border."""

    place: tuple[int, int]
    region: Box
    borders: int


def checked(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture itself, if it is (h, w, 3) uint8 with at least one pixel.

    Raises:
        UsageError: it is not.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise UsageError(f"a picture is (h, w, 3) uint8 RGB, this is {picture.shape} {picture.dtype}")
    return picture


def read(
    picture: NDArray[np.uint8],
    reader: TextReader,
    memo: Memo,
    progress: Progress | None = None,
    widgets: Sequence[WidgetBox] = (),
) -> Reading:
    """All text of a picture.

    Args:
        picture: (h, w, 3) uint8 RGB.
        reader: finds and reads text; its pin is part of every key.
        memo: remembers results by content.
        progress: called with (done, total, "detect" or "recognise").
        widgets: boxes found in the same picture: a text ends at a control's side, and small strokes that the
            detector passed over (single digits, mostly) are read too.

    Raises:
        UsageError: the picture has another shape or dtype.
    """
    checked(picture)
    pin = reader.pin().encode()
    pieces, anew = _detected(picture, reader, memo, pin, progress)
    marks = [one.box for one in widgets if one.kind in ("check", "radio")]
    controls = [one.box for one in widgets if one.kind in ("button", "field")]
    boxes = [part for box in stitched(pieces) for part in cut_at_gaps(picture, box, controls, marks)]
    small = _overlooked(boxes, widgets, picture.shape[0], picture.shape[1])
    crops = [_crop(picture, box) for box in boxes + small]
    texts, fresh = _recognised(crops, reader, memo, pin, progress)
    lines = [
        TextLine(tight(picture, part), item, round(confidence, 4))
        for box, (text, confidence) in zip(boxes, texts, strict=False)
        if text.strip() and confidence >= _CONFIDENCE_LEAST
        for part, item in cut_at_separators(picture, box, text)
    ]
    lines += [
        TextLine(tight(picture, box), text.strip(), round(confidence, 4))
        for box, (text, confidence) in zip(small, texts[len(boxes) :], strict=True)
        if confidence >= _SMALL_CONFIDENCE_LEAST and _SMALL_TEXT.fullmatch(text.strip())
        if len(text.strip()) > 1 or box.w <= _SMALL_SINGLE * box.h
    ]
    lines.sort(key=lambda line: (line.box.y, line.box.x, line.box.h, line.box.w, line.text))
    tiles = len(_tiles(picture.shape[0], picture.shape[1]))
    return Reading(tuple(lines), Counts(anew, tiles - anew, fresh, len(crops) - fresh))


def _overlooked(boxes: Sequence[Box], widgets: Sequence[WidgetBox], height: int, width: int) -> list[Box]:
    """Small strokes outside every detected line, in reading order, with a margin."""
    low, high = _SMALL_HEIGHT_PX
    taken = np.array(boxes or [(0, 0, 0, 0)])
    whole = Box(0, 0, width, height)
    found: list[Box] = []
    for one in widgets:
        box = one.box
        if one.kind not in ("icon", "check", "radio") or not low <= box.h <= high or box.w > _SMALL_WIDTH * box.h:
            continue
        shared_x = np.minimum(taken[:, 0] + taken[:, 2], box.x + box.w) - np.maximum(taken[:, 0], box.x)
        shared_y = np.minimum(taken[:, 1] + taken[:, 3], box.y + box.h) - np.maximum(taken[:, 1], box.y)
        if int((np.maximum(shared_x, 0) * np.maximum(shared_y, 0)).max()) * 4 > box.area:
            continue
        if one.kind == "icon":
            found.append(box.grown(max(3, box.h // 3)).intersection(whole))
        elif box.w >= _BADGE_LEAST_PX:
            # A counter in a disc looks like a chosen radio: read what is inside its outline.
            found.append(Box(box.x + 3, box.y + 2, box.w - 6, box.h - 4))
    return found[:_SMALL_COUNT_MAX]


def _tiles(height: int, width: int) -> list[_Tile]:
    """Every tile of a picture with its halo, row by row."""
    found: list[_Tile] = []
    for row, y in enumerate(range(0, height, SCREEN_TILE_PX)):
        for column, x in enumerate(range(0, width, SCREEN_TILE_PX)):
            left, top = max(0, x - OCR_HALO_PX), max(0, y - OCR_HALO_PX)
            right = min(width, x + SCREEN_TILE_PX + OCR_HALO_PX)
            low = min(height, y + SCREEN_TILE_PX + OCR_HALO_PX)
            sides = (x == 0, y == 0, x + SCREEN_TILE_PX >= width, y + SCREEN_TILE_PX >= height)
            borders = sum(1 << bit for bit, side in enumerate(sides) if side)
            found.append(_Tile((row, column), Box(left, top, right - left, low - top), borders))
    return found


def _detected(
    picture: NDArray[np.uint8], reader: TextReader, memo: Memo, pin: bytes, progress: Progress | None
) -> tuple[list[Piece], int]:
    """The pieces of text seen by all tiles, and how many tiles had to be looked at anew."""
    height, width = picture.shape[:2]
    tiles = _tiles(height, width)
    pieces: list[Piece] = []
    anew = 0
    for done, tile in enumerate(tiles):
        box = tile.region
        pixels = np.ascontiguousarray(picture[box.y : box.y + box.h, box.x : box.x + box.w])
        key = _key(pixels, pin, bytes((tile.borders,)))
        known = memo.get(DETECT_KIND, key)
        if known is None:
            anew += 1
            quads = reader.detect(pixels) if bool((pixels != pixels[0, 0]).any()) else []
            memo.put(DETECT_KIND, [(key, msgspec.msgpack.encode(quads))])
        else:
            quads = msgspec.msgpack.decode(known, type=_Quads)
        found = (piece(quad, tile.place, box, (height, width)) for quad in quads)
        pieces += [one for one in found if one.box.h < _TEXT_HEIGHT_MAX]
        if progress is not None:
            progress(done + 1, len(tiles), "detect")
    return pieces, anew


def _recognised(
    crops: Sequence[NDArray[np.uint8]], reader: TextReader, memo: Memo, pin: bytes, progress: Progress | None
) -> tuple[list[tuple[str, float]], int]:
    """(text, confidence) of every crop, and how many distinct crops had to be read anew."""
    keys = [_key(crop, pin, b"") for crop in crops]
    known: dict[bytes, tuple[str, float]] = {}
    missing: dict[bytes, NDArray[np.uint8]] = {}
    for key, crop in zip(keys, crops, strict=True):
        if key not in known and key not in missing:
            stored = memo.get(RECOGNISE_KIND, key)
            if stored is None:
                missing[key] = crop
            else:
                known[key] = msgspec.msgpack.decode(stored, type=tuple[str, float])
    for some in _chunks(list(missing.items())):
        results = reader.recognise([crop for _, crop in some])
        read_now = {key: (text, float(value)) for (key, _), (text, value) in zip(some, results, strict=True)}
        memo.put(RECOGNISE_KIND, [(key, msgspec.msgpack.encode(result)) for key, result in read_now.items()])
        known.update(read_now)
        if progress is not None:
            progress(len(known), len(known.keys() | missing.keys()), "recognise")
    return [known[key] for key in keys], len(missing)


def _chunks(items: list[tuple[bytes, NDArray[np.uint8]]]) -> Iterable[list[tuple[bytes, NDArray[np.uint8]]]]:
    """The items, a call's worth at a time, so that progress shows and an interrupted read keeps what it has."""
    return (items[start : start + _CROPS_PER_CALL] for start in range(0, len(items), _CROPS_PER_CALL))


def _crop(picture: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """The pixels of one line, turned upright."""
    crop = picture[box.y : box.y + box.h, box.x : box.x + box.w]
    if box.h >= _UPRIGHT_RATIO * box.w:
        crop = np.rot90(crop)
    return np.ascontiguousarray(crop)


def _key(pixels: NDArray[np.uint8], pin: bytes, flags: bytes) -> bytes:
    """BLAKE3 over pixels, shape, flags and pin, each length-prefixed."""
    digest = blake3()
    shape = b"".join(size.to_bytes(4, "little") for size in pixels.shape)
    for part in (pixels.tobytes(), shape, flags, pin):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
