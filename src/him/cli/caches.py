"""`him kv save|load|prefix|list`: KV caches of transformers, with their token ids and the model they belong to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from him.cli.commands import JsonOption, RepoOption, SnapshotOption, command, group
from him.cli.files import read_bytes, read_npy
from him.cli.session import session_of
from him.cli.tiles import write_tile
from him.config import KV_FILE_BYTES_MAX, KV_TOKENS_MAX
from him.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from him.kv import Binding

BindingOption = Annotated[
    str,
    typer.Option(
        "--binding",
        metavar="FILE.json",
        help="The model it belongs to: model, tokenizer, positions, dtype, layers, kv_heads, dim.",
    ),
]
NameOption = Annotated[str, typer.Option("--frame", metavar="FRAME", help="The cache's name, such as chat-7.")]
TokensArgument = Annotated[
    str, typer.Argument(metavar="TOKENS", help="Token ids: a JSON list of integers, or an .npy array.")
]
_BINDING_BYTES_MAX = 64 * 1024


def register(program: typer.Typer) -> None:
    """Add these commands to the program."""
    kv = group(program, "kv", "KV caches of transformers: save, load, prefix, list.")
    command(
        kv,
        "save",
        [
            "him kv save cache.npy tokens.json --snapshot main --frame chat-7 --binding model.json",
            "him kv save cache.npy tokens.npy --snapshot main --frame chat-7 --binding model.json --quantise int8",
        ],
        within="kv",
    )(save)
    command(
        kv,
        "load",
        [
            "him kv load --snapshot main --frame chat-7 --binding model.json -o cache.npy",
            "him kv load --snapshot main --frame chat-7 --binding model.json --tokens 512 -o cache.npy --ids ids.json",
        ],
        within="kv",
    )(load)
    command(kv, "prefix", ["him kv prefix tokens.json --snapshot main --binding model.json --json"], within="kv")(
        prefix
    )
    command(kv, "list", ["him kv list --snapshot main", "him kv list --snapshot main --json"], within="kv")(list_)


def save(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="CACHE", help="An .npy array (layers, 2, kv heads, tokens, dim).")],
    tokens: TokensArgument,
    snapshot: Annotated[
        str, typer.Option("--snapshot", metavar="NAME", help="A branch (made if unknown) or an open snapshot.")
    ],
    frame: NameOption,
    binding: BindingOption,
    quantise: Annotated[
        str, typer.Option("--quantise", metavar="WAY", help="int8, fp8 or fp16; every bit is kept when left out.")
    ] = "",
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Store a cache with its token ids, or the same one grown: tiles that are there are not stored again."""
    from him import kv

    session = session_of(context)
    bound, ids = read_binding(session.path(binding)), read_tokens(session.path(tokens))
    tensor = of_dtype(read_npy(session.path(file), KV_FILE_BYTES_MAX), bound.dtype)
    # What is refused leaves nothing, not even the branch.
    kv.check(tensor, ids, bound, quantise)
    with session.repository(repo) as repository:
        report = kv.save(repository.writable(snapshot), frame, tensor, ids, bound, quantise)
    value = report.as_json()
    if json:
        shown = {key: value[key] for key in ("snapshot_id", "stream", "frame")} | {"tokens": len(ids)}
        session.json(shown | {key: value[key] for key in ("tiles_written", "tiles_reused", "bytes_stored", "ms")})
    else:
        session.say(
            f"{report.frame}: {len(ids)} tokens, {report.tiles_written} tiles written, {report.tiles_reused} reused, "
            f"{report.bytes_stored} bytes, {value['ms']} ms"
        )


def load(
    context: typer.Context,
    snapshot: SnapshotOption,
    frame: NameOption,
    binding: BindingOption,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE.npy", help="Where the tensor goes.")],
    ids: Annotated[
        str | None, typer.Option("--ids", metavar="FILE", help="Where the token ids go: .npy, or JSON otherwise.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", min=1, help="Only the first N tokens.")] = None,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Read a cache, verified, into an .npy file; refused for another model than it is bound to."""
    from him import kv

    session = session_of(context)
    bound, target = read_binding(session.path(binding)), session.path(output)
    if target.suffix != ".npy":
        raise UsageError("a tensor goes into an .npy file", object=output, fix="name one with -o FILE.npy")
    with session.repository(repo) as repository:
        found = kv.load(repository.snapshot(snapshot), frame, bound, tokens=tokens)
    write_tile(target, found.tensor)
    if ids is not None:
        beside = session.path(ids)
        write_tile(
            beside, found.token_ids if beside.suffix == ".npy" else msgspec.json.encode(found.token_ids.tolist())
        )
    shape = list(found.tensor.shape)
    if json:
        session.json(
            {
                "path": str(target), "ids_path": None if ids is None else str(session.path(ids)), "frame": frame,
                "tokens": len(found.token_ids), "shape": shape, "dtype": bound.dtype,
                "size_bytes": found.tensor.nbytes,
            }
        )  # fmt: skip
    else:
        session.say(f"wrote {target}: {bound.dtype} {shape}")


def prefix(
    context: typer.Context,
    tokens: TokensArgument,
    snapshot: SnapshotOption,
    binding: BindingOption,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """Find the cache that shares the longest beginning with a row of token ids."""
    from him import kv

    session = session_of(context)
    bound, ids = read_binding(session.path(binding)), read_tokens(session.path(tokens))
    with session.repository(repo) as repository:
        found = kv.longest_prefix(repository.snapshot(snapshot), ids, bound)
    if json:
        told = {"frame": None, "tokens": 0, "quantise": None} if found is None else found._asdict()
        session.json({"found": found is not None, **told})
    elif found is None:
        session.say("no cache begins with the first of these tokens")
    else:
        session.say(f"{found.frame}: the first {found.tokens} of {len(ids)} tokens ({found.quantise or 'lossless'})")


def list_(
    context: typer.Context,
    snapshot: SnapshotOption,
    repo: RepoOption = None,
    json: JsonOption = False,
) -> None:
    """List the KV caches of a snapshot."""
    from him import kv

    session = session_of(context)
    with session.repository(repo) as repository:
        found = kv.caches(repository.snapshot(snapshot))
    if json:
        for one in found:
            head = {"frame": one.frame, "tokens": one.tokens, "quantise": one.quantise}
            session.json({**head, "binding": one.binding.fields()})
        return
    rows = [(one.frame, one.tokens, one.quantise or "lossless", one.binding.dtype, one.binding.model) for one in found]
    session.table(("frame", "tokens", "kept as", "type", "model"), rows)


def read_binding(path: Path) -> "Binding":
    """The binding in a file. Raises UsageError, LimitError, OSError."""
    from him.kv import Binding

    try:
        return msgspec.json.decode(read_bytes(path, _BINDING_BYTES_MAX), type=Binding)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(
            f"this is no binding: {error}",
            object=str(path),
            fix='give {"model","tokenizer","positions","dtype","layers","kv_heads","dim"}',
        ) from error


def read_tokens(path: Path) -> list[int]:
    """The token ids in a file. Raises UsageError, LimitError, OSError."""
    if path.suffix == ".npy":
        import numpy as np

        found = read_npy(path, 8 * KV_TOKENS_MAX)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise UsageError("token ids are integers in one row", object=str(path))
        return found.astype(object).tolist()
    try:
        return msgspec.json.decode(read_bytes(path, 16 * KV_TOKENS_MAX), type=list[int])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(
            f"these are no token ids: {error}", object=str(path), fix="give a JSON list of integers"
        ) from error


def of_dtype(tensor: "NDArray[np.generic]", name: str) -> "NDArray[np.generic]":
    """The tensor as its binding calls it: .npy files know no bfloat16 and hold it as two bytes without a meaning."""
    if name == "bfloat16" and tensor.dtype.kind == "V" and tensor.dtype.itemsize == 2:
        import ml_dtypes

        return tensor.view(ml_dtypes.bfloat16)
    return tensor
