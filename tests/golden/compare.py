"""What `independent_reader` reads, told as `build.described` tells what the software reads."""

from pathlib import Path

from golden import build
from independent_reader import Repository, derived_levels


def read_independently(folder: Path) -> tuple[dict, Repository]:
    """What `build.described` says, by docs/FORMAT.md alone."""
    reader, snapshots = Repository(folder), {}
    for key, one in reader.snapshots.items():
        frames = [
            frame_of(reader, frame, one["sealed"]) for _, frame in sorted(reader.frames(one["directory"]).items())
        ]
        if one["sealed"]:
            assert reader.levels_root(one["directory"]) == one["levels_root"]
        snapshots[key] = {
            "directory": one["directory"].hex(), "levels_root": one["levels_root"].hex(), "sealed": one["sealed"],
            "lamport": one["lamport"], "tags": one["tags"], "parents": [parent[0] for parent in one["parents"]],
            "created_at": one["created_at"], "writer": one["writer"], "provenance": one["provenance"], "frames": frames,
        }  # fmt: skip
    return {"refs": {name: list(ref) for name, ref in sorted(reader.refs.items())}, "snapshots": snapshots}, reader


def frame_of(reader: Repository, frame: list, sealed: bool) -> dict:
    """One frame with all its tiles; of an open snapshot the levels are derived."""
    stream, name, tile_height, tile_width = frame[0], frame[1], frame[7], frame[8]
    tiles = []
    cells = reader.cells(frame)
    for (y, x), (blob, origin) in sorted(cells.items()):
        # Only what a record lets go may be missing.
        value = None if reader.let_go(stream, origin, blob) else reader.tile(blob)
        tiles.append([0, y, x, value, reader.tile_id(stream, name, origin, 0, x, y, blob)])
    rows, columns = -(-frame[3] // tile_height), -(-frame[4] // tile_width)
    top = (max(rows, columns) - 1).bit_length()
    if frame[10] != "none":
        named, seen = reader.levels(frame) if sealed else None, set()
        for (level, y, x), value, blob in derived_levels(frame, reader.whole(frame)):
            under = [o for (r, c), (_, o) in cells.items() if (r >> level, c >> level) == (y, x)]
            if not under:
                continue
            if named is not None:
                seen.add((level, y, x))
                assert named[level, y, x][:2] == (blob, max(under))
                if named[level, y, x][2]:
                    assert reader.tile(blob).tobytes() == value.tobytes()
            if level <= top:
                tile_id = reader.tile_id(stream, name, max(under), level, x, y, blob)
                tiles.append([level, y, x, value, tile_id])
        assert named is None or seen == set(named)
    shown = [
        [level, y, x, [], "expired", "", tile_id] if value is None else
        [level, y, x, [len(value)] if isinstance(value, bytes) else list(value.shape),
         "bytes" if isinstance(value, bytes) else value.dtype.name, build.digest(value), tile_id]
        for level, y, x, value, tile_id in tiles
    ]  # fmt: skip
    fields = ("stream", "name", "content", "height", "width", "channels", "dtype", "tile_height", "tile_width", "halo",
              "level_rule", "root", "root_height", "attributes")  # fmt: skip
    return dict(zip(fields, frame, strict=True)) | {"root": frame[11].hex(), "tiles": shown}


def same(left: dict, right: dict) -> None:
    """The same, tiles in whatever order; a difference is named by its place."""
    assert left["refs"] == right["refs"]
    assert list(left["snapshots"]) == list(right["snapshots"])
    for key, one in left["snapshots"].items():
        other = right["snapshots"][key]
        for field in one.keys() | other.keys() - {"frames"}:
            if field != "frames":
                assert one[field] == other[field], (key, field)
        for ours, theirs in zip(one["frames"], other["frames"], strict=True):
            assert sorted(ours["tiles"]) == sorted(theirs["tiles"]), (key, ours["stream"], ours["name"])
            assert {**ours, "tiles": 0} == {**theirs, "tiles": 0}
