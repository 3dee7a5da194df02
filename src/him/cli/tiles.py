"""`him tiles put|get|ls`: single tiles in and out."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from him.cli.commands import JsonOption, NoDaemonOption, RepoOption, SnapshotOption, command, group
from him.cli.files import read_bytes, read_npy
from him.cli.session import session_of
from him.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from him.types import TileMeta

StreamOption = Annotated[
    str, typer.Option("--stream", metavar="STREAM", help="The stream, such as screen or kv_cache.")
]
FrameDefault = Annotated[
    str, typer.Option("--frame", metavar="FRAME", help="The frame; the stream's own when left out.")
]
LevelOption = Annotated[int, typer.Option("--level", min=0, max=64, help="Pyramid level; 0 is full resolution.")]
XOption = Annotated[int, typer.Option("--x", min=0, help="Column, in tiles.")]
YOption = Annotated[int, typer.Option("--y", min=0, help="Row, in tiles.")]


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    tiles = group(program, "tiles", "Single tiles: put, get, ls.")
    command(
        tiles,
        "put",
        [
            "him tiles put --stream kv_cache --snapshot main --frame chat-7 --level 0 --x 10 --y 12 tile.npy",
            "him tiles put --stream kv_cache --snapshot main --frame chat-7 --x 10 --y 12 --delta tile.delta",
        ],
        within="tiles",
    )(put)
    command(
        tiles,
        "delta",
        ["him tiles delta --stream kv_cache --snapshot main --frame chat-7 --x 10 --y 12 tile.npy -o tile.delta"],
        within="tiles",
    )(delta)
    command(
        tiles,
        "get",
        [
            "him tiles get --stream screen --snapshot main --frame login --x 0 --y 0 -o tile.npy",
            "him tiles get --stream scene --snapshot main --frame login > scene.json",
        ],
        within="tiles",
    )(get)
    command(
        tiles,
        "ls",
        ["him tiles ls --stream screen --snapshot main", "him tiles ls --snapshot main --frame login --level 1 --json"],
        within="tiles",
    )(ls)


def tile_json(tile: "TileMeta") -> dict[str, object]:
    """A tile's metadata in the form of the wire (spec §2.1)."""
    return {
        "tile_id": tile.tile_id,
        "stream": tile.stream,
        "frame": tile.frame,
        "snapshot_id": tile.snapshot_id,
        "level": tile.level,
        "x": tile.x,
        "y": tile.y,
        "shape": list(tile.shape),
        "dtype": tile.dtype,
        "parent_tile_id": tile.parent_tile_id,
        "halo": tile.halo,
        "checksum": tile.checksum,
        "size_bytes": tile.size_bytes,
    }


def put(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An .npy array, or any file for streams of documents.")],
    stream: StreamOption,
    snapshot: SnapshotOption,
    frame: FrameDefault = "",
    level: LevelOption = 0,
    x: XOption = 0,
    y: YOption = 0,
    as_delta: Annotated[
        bool, typer.Option("--delta", help="FILE is a delta on the tile that is there, made by `him tiles delta`.")
    ] = False,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Write one tile; an unknown branch is made, a sealed one gets a child."""
    session = session_of(context)
    path = session.path(file)
    with session.repository(repo) as repository:
        if as_delta:
            tile = repository.snapshot(snapshot).put_delta(stream, read_bytes(path), frame=frame, y=y, x=x)
        else:
            value = read_npy(path) if path.suffix == ".npy" else read_bytes(path)
            tile = repository.writable(snapshot).put(stream, value, frame=frame, level=level, y=y, x=x)
    if json:
        session.json(tile_json(tile))
    else:
        session.say(f"{tile.tile_id} ({tile.size_bytes} bytes) in {tile.snapshot_id}")


def delta(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="The new tile: an .npy array, or any file of a document.")
    ],
    stream: StreamOption,
    snapshot: SnapshotOption,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Where the delta goes.")],
    frame: FrameDefault = "",
    x: XOption = 0,
    y: YOption = 0,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Make the delta from the tile that is there to another; writes nothing to the repository."""
    session = session_of(context)
    path = session.path(file)
    value = read_npy(path) if path.suffix == ".npy" else read_bytes(path)
    with session.repository(repo) as repository:
        made = repository.snapshot(snapshot).make_delta(stream, value, frame=frame, y=y, x=x)
    if made is None:
        raise UsageError("the tiles differ by too much for a delta", fix="put the tile itself: `him tiles put`")
    session.path(output).write_bytes(made)
    if json:
        session.json({"size_bytes": len(made), "tile_bytes": path.stat().st_size})
    else:
        session.say(f"{len(made)} bytes for a tile of {path.stat().st_size}")


def get(
    context: typer.Context,
    stream: StreamOption,
    snapshot: SnapshotOption,
    frame: FrameDefault = "",
    level: LevelOption = 0,
    x: XOption = 0,
    y: YOption = 0,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="An .npy file, or any other for raw bytes.")
    ] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Read one tile, verified, into a file or as raw bytes to standard output."""
    session = session_of(context)
    if output is None and (json or session.raw is None or session.terminal):
        raise UsageError("nowhere to put the bytes", fix="name a file with -o FILE, or redirect standard output")
    with session.repository(repo) as repository:
        value = repository.snapshot(snapshot).get(stream, frame=frame, level=level, y=y, x=x)
    if output is None:
        assert session.raw is not None
        session.raw.write(raw_bytes(value))
        session.raw.flush()
        return
    target = session.path(output)
    write_tile(target, value)
    shape, dtype = ([len(value)], "bytes") if isinstance(value, bytes) else (list(value.shape), str(value.dtype))
    if json:
        session.json({"path": str(target), "shape": shape, "dtype": dtype, "size_bytes": len(raw_bytes(value))})
    else:
        session.say(f"wrote {target}: {dtype} {shape}")


def raw_bytes(value: "NDArray[np.generic] | bytes") -> bytes:
    """A tile's values in C order."""
    return value if isinstance(value, bytes) else value.tobytes()


def write_tile(target: Path, value: "NDArray[np.generic] | bytes") -> None:
    """Write a tile to a file that appears complete or not at all (a pipe or device is written directly)."""
    if target.exists() and not target.is_file():
        if target.is_dir():
            raise UsageError("this is a folder", object=str(target), fix="name a file")
        target.write_bytes(raw_bytes(value))
        return
    import numpy as np

    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            if target.suffix == ".npy" and not isinstance(value, bytes):
                np.save(file, value, allow_pickle=False)
            else:
                file.write(raw_bytes(value))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def ls(
    context: typer.Context,
    snapshot: SnapshotOption,
    stream: Annotated[str | None, typer.Option("--stream", metavar="STREAM", help="Only this stream.")] = None,
    frame: Annotated[str | None, typer.Option("--frame", metavar="FRAME", help="Only this frame.")] = None,
    level: LevelOption = 0,
    repo: RepoOption = None,
    no_daemon: NoDaemonOption = False,
    json: JsonOption = False,
) -> None:
    """List tiles."""
    session = session_of(context)
    rows: list[tuple[object, ...]] = []
    with session.repository(repo) as repository:
        handle = repository.snapshot(snapshot)
        for known in handle.frames(stream):
            if frame is not None and known.name != frame:
                continue
            if level and known.level_rule == "none":
                continue
            for tile in handle.tiles(known.stream, frame=known.name, level=level):
                if json:
                    session.json(tile_json(tile))
                else:
                    shape = "×".join(map(str, tile.shape))
                    rows.append(
                        (tile.tile_id[:15], tile.stream, tile.frame, tile.level, tile.x, tile.y, shape, tile.dtype)
                    )
    if not json:
        session.table(("tile", "stream", "frame", "level", "x", "y", "shape", "type"), rows)
