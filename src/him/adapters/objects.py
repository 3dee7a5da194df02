"""An S3 bucket as an ObjectStore, through obstore; and `open_store`, which knows a folder from a bucket.

Credentials come from the environment alone (AWS_ACCESS_KEY_ID and so on). What the library says of a failure holds
replies of the server, and they may name keys: no message of this module repeats it but for the S3 error code.
"""

import contextlib
import functools
import ipaddress
import os
import random
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from him.adapters.folder import ObjectFolder, checked_name, checked_prefix
from him.config import (
    COLD_BACKOFF_BASE,
    COLD_BACKOFF_FIRST_MS,
    COLD_BACKOFF_MAX_MS,
    COLD_CONNECT_SECONDS,
    COLD_FLIGHT_MAX,
    COLD_PART_BYTES,
    COLD_PARTS_FLIGHT_MAX,
    COLD_REQUEST_SECONDS,
    COLD_RETRIES_MAX,
    COLD_RETRY_SECONDS,
)
from him.errors import HimError, LimitError, NotFoundError, StorageError, UnavailableError, UsageError
from him.ports import ObjectStore

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
STORAGE_CLASSES: Final = ("STANDARD", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR")
"""Those of S3 whose objects are read at once; what lies deeper has to be asked for hours before."""
_OPTIONS: Final = ("endpoint", "path_style", "region")
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CREDENTIALS: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
)
_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_CONNECTING: Final = re.compile(r"kind: Connect\b")
_NO_REPLY: Final = re.compile(r"HTTP error|\b(?:InternalError|SlowDown|ServiceUnavailable)\b")
"""No connection, no whole reply in time, or a name of many that could not be deleted now."""
_FIXES: Final = {
    "NoSuchBucket": "make the bucket, or mend its name in the cold store's URL",
    "RequestTimeTooSkewed": "set this machine's clock",
    "AuthorizationHeaderMalformed": "set the bucket's region: `?region=` in the cold store's URL, or AWS_REGION",
    "PermanentRedirect": "set the bucket's region: `?region=` in the cold store's URL, or AWS_REGION",
}
_DENIED: Final = "mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or the bucket's policy"


def open_store(url: str, storage_class: str = "") -> ObjectStore:
    """The object store a URL names; nothing is asked of a bucket yet.

    Args:
        url: a folder (`/data/cold`, `file:///data/cold`), or `s3://bucket/prefix` with the options `endpoint`,
            `region` and `path_style` as a query or as AWS_ENDPOINT_URL and AWS_REGION in the environment.
        storage_class: of a bucket's large objects, one of STORAGE_CLASSES; empty: the bucket's own.

    Raises:
        UsageError: no such kind of store, an unknown option, credentials in the URL, http beyond this machine; a
            storage class of a folder, or one that is none or cannot be read at once.
        StorageError: the folder cannot be made, or the environment holds no credentials.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UsageError("not a cold store's URL", fix="give a folder or s3://bucket/prefix") from None
    if parts.scheme == "s3":
        return _bucket(parts, storage_class)
    if storage_class:
        raise UsageError("a folder has no storage classes", fix="leave --storage-class out")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or parts.query or not parts.path.startswith("/"):
            raise UsageError("a file URL names a folder of this machine", fix="write file:///folder")
        return ObjectFolder(Path(unquote(parts.path)))
    if not url or "://" in url:
        raise UsageError("no such kind of cold store", fix="give a folder or s3://bucket/prefix")
    return ObjectFolder(Path(url).expanduser().absolute())


def _bucket(parts: SplitResult, storage_class: str) -> "ObjectBucket":
    """The bucket of an s3 URL, after every check that needs no request."""
    if storage_class and storage_class not in STORAGE_CLASSES:
        raise UsageError(
            f"no storage class whose objects are read at once: {storage_class[:40]}",
            fix=f"use one of: {', '.join(STORAGE_CLASSES)}",
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc or any(re.search("key|secret|token|cred|sign|pass", name.lower()) for name in options):
        raise UsageError(
            "a cold store's URL holds credentials", fix="remove them, and set AWS_ACCESS_KEY_ID and so on instead"
        )
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise UsageError(f"no such option of a bucket: {unknown[0][:40]}", fix=f"options: {', '.join(_OPTIONS)}")
    if not _BUCKET.fullmatch(parts.netloc):
        raise UsageError("not a bucket's name", fix="write s3://bucket/prefix")
    if options.get("path_style", "true") not in ("true", "false"):
        raise UsageError("path_style is true or false", fix="write path_style=true")
    if not any(os.environ.get(name) for name in _CREDENTIALS):
        raise StorageError(
            "the environment holds no credentials for the cold store",
            place=f"s3://{parts.netloc}",
            fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    prefix = parts.path.strip("/")
    return ObjectBucket(
        parts.netloc,
        checked_name(prefix) if prefix else "",
        endpoint=_checked_endpoint(options.get("endpoint") or _from_environment(_ENDPOINTS)),
        region=options.get("region") or _from_environment(("AWS_REGION", "AWS_DEFAULT_REGION")) or "us-east-1",
        path_style=options.get("path_style", "true") == "true",
        storage_class=storage_class,
    )


def _from_environment(names: Sequence[str]) -> str:
    return next((value for name in names if (value := os.environ.get(name))), "")


def _checked_endpoint(endpoint: str) -> str:
    """The endpoint itself (or nothing: Amazon's own), if requests to it cannot be read on the way."""
    if not endpoint:
        return ""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if "@" in parts.netloc:
        raise UsageError("a cold store's endpoint holds credentials", fix="remove them: set AWS_ACCESS_KEY_ID instead")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or port == 0:
        raise UsageError("not an endpoint", fix="write https://host or https://host:port")
    if parts.scheme == "http" and not _loopback(host):
        raise UsageError(f"http to {host[:100]} could be read on the way", fix="use an https endpoint")
    return endpoint.rstrip("/")


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class ObjectBucket:
    """Objects below a prefix of a bucket.

    A request that failed by 5xx, 429 or the connection is tried again after a wait with jitter, up to `retries` times
    and COLD_RETRY_SECONDS. Safe in threads; not across a fork.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str = "",
        region: str = "us-east-1",
        path_style: bool = True,
        retries: int = COLD_RETRIES_MAX,
        storage_class: str = "",
    ) -> None:
        self._attributes = {"Storage-Class": storage_class} if storage_class else None
        self._url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._retries = retries
        if endpoint and not path_style:
            scheme, _, host = endpoint.partition("://")
            endpoint = f"{scheme}://{bucket}.{host}"
        settings: dict[str, Any] = {"region": region, "virtual_hosted_style_request": not path_style}
        if endpoint:
            settings["endpoint"] = endpoint
        open_bucket = functools.partial(_obstore("store").S3Store, bucket, prefix=prefix or None, config=settings)
        client = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=COLD_CONNECT_SECONDS),
            "timeout": timedelta(seconds=COLD_REQUEST_SECONDS),
            "pool_max_idle_per_host": str(COLD_FLIGHT_MAX),
        }
        try:
            self._store = open_bucket(client_options=client, retry_config=_retry(retries))
            # The library retries a conditional put after a 5xx too, and then takes its own object for another's.
            self._once = open_bucket(client_options=client, retry_config=_retry(0))
        except (_obstore("exceptions").BaseError, ValueError):
            raise StorageError(
                "the bucket's settings are refused", place=self._url, fix="mend AWS_* settings"
            ) from None
        self._flight = ThreadPoolExecutor(COLD_FLIGHT_MAX, thread_name_prefix="cold")

    def size(self, name: str) -> int | None:
        """HEAD; None for 404 (which a missing bucket answers too)."""
        try:
            with self._asking(name):
                return int(_obstore().head(self._store, checked_name(name))["size"])
        except NotFoundError:
            return None

    def get(self, name: str, limit: int) -> bytes:
        """GET; its body is not read above `limit`."""
        with self._asking(name):
            reply = _obstore().get(self._store, checked_name(name))
            if (size := int(reply.meta["size"])) > limit:
                raise LimitError(f"the object has {size:,} bytes, above {limit:,}", place=self._place(name))
            return bytes(reply.bytes())

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """At most COLD_FLIGHT_MAX GETs in flight, for all callers together. An empty range costs none."""
        checked_name(name)
        if len(ranges) == 1:
            return [self._range(name, *ranges[0])]
        flight = [self._flight.submit(self._range, name, offset, size) for offset, size in ranges]
        try:
            for one in wait(flight, return_when=FIRST_EXCEPTION).done:
                one.result()
        finally:
            # Those in flight end by themselves; nothing is begun any more for a call that failed.
            for one in flight:
                one.cancel()
        return [one.result() for one in flight]

    def put(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """One PUT, by If-None-Match with `if_absent`."""
        checked_name(name)
        if if_absent:
            return self._put_absent(name, data)
        with self._asking(name, writes=True):
            _obstore().put(self._store, name, data, use_multipart=False)
        return True

    def upload(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Multipart, COLD_PARTS_FLIGHT_MAX parts of COLD_PART_BYTES in flight; given up when `parts` raises.

        Parts must stay as they are until this returns: they are not copied.
        """
        checked_name(name)
        handed = _Handed()
        with ThreadPoolExecutor(1, thread_name_prefix="cold-upload") as sender:
            # Not here: the library would take the next part in a thread in which it cannot be called again.
            sent = sender.submit(self._send, name, handed)
            handed.fill(parts)
            sent.result()

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The pages of ListObjectsV2, sorted again: not every store sorts them."""
        # The library's prefixes are whole folders.
        folder = checked_prefix(prefix).rpartition("/")[0]
        with self._asking(prefix, writes=True):
            pages = _obstore().list(self._store, folder or None, chunk_size=1_000)
            found = [(str(one["path"]), int(one["size"])) for page in pages for one in page]
        yield from sorted(one for one in found if one[0].startswith(prefix))

    def delete(self, names: Sequence[str]) -> None:
        """DeleteObjects, a thousand names at once."""
        if names:
            with self._asking(names[0], writes=True):
                _obstore().delete(self._store, [checked_name(name) for name in names])

    def _place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _range(self, name: str, offset: int, size: int) -> memoryview:
        if not size:
            return memoryview(b"")
        with self._asking(name):
            part = memoryview(_obstore().get_range(self._store, name, start=offset, length=size))
        if len(part) != size:
            raise NotFoundError("the object ends before the range does", place=self._place(name))
        return part

    def _send(self, name: str, handed: "_Handed") -> None:
        with handed.closing(), self._asking(name, writes=True):
            _obstore().put(
                self._store,
                name,
                handed.taken(),
                attributes=self._attributes,
                use_multipart=True,
                chunk_size=COLD_PART_BYTES,
                max_concurrency=COLD_PARTS_FLIGHT_MAX,
            )

    def _put_absent(self, name: str, data: bytes) -> bool:
        """Retried by hand: once a try that failed may have been carried out, "taken" says nothing."""
        errors, place, lost = _obstore("exceptions"), self._place(name), False
        pauses, deadline = _pauses(self._retries), time.monotonic() + COLD_RETRY_SECONDS
        while True:
            try:
                _obstore().put(self._once, name, data, mode="create", use_multipart=False)
                return True
            except (errors.BaseError, FileNotFoundError) as error:
                said, taken = str(error), isinstance(error, errors.AlreadyExistsError)
            # 409 is another conditional put or delete under way: nothing was decided.
            if taken and _status(said) != 409:
                if not lost:
                    return False
                raise UnavailableError(
                    "a reply was lost: whose object this is remains open", place=place, fix="read what is there"
                )
            failure = _refused(said, place, writes=True)
            if not isinstance(failure, UnavailableError):
                raise failure
            lost = lost or not (taken or _CONNECTING.search(said))
            pause = next(pauses, None)
            if pause is None or time.monotonic() + pause > deadline:
                raise failure
            time.sleep(pause)

    @contextlib.contextmanager
    def _asking(self, name: str, *, writes: bool = False) -> Generator[None]:
        """Turn what the library raises into HimErrors."""
        try:
            yield
        except (_obstore("exceptions").BaseError, FileNotFoundError) as error:
            raise _refused(str(error), self._place(name), writes=writes) from None


class _GivenUpError(Exception):
    """Tells the library to abort an upload."""


class _Handed:
    """Parts of an upload on their way from the thread that makes them to the one that sends them, one at a time."""

    def __init__(self) -> None:
        self._queue: Queue[bytes | memoryview | None] = Queue(1)
        self._closed = False
        self._whole = False
        self._ended = False

    def fill(self, parts: Iterable[bytes | memoryview]) -> None:
        """Hand on all parts, or as many as are wanted; whatever `parts` raises aborts the upload and passes."""
        try:
            for part in parts:
                self._queue.put(part)
                if self._closed:
                    return
            self._whole = True
        finally:
            self._queue.put(None)

    def taken(self) -> Iterator[bytes | memoryview]:
        """The parts, in the sender's thread."""
        while (part := self._next()) is not None:
            yield part
        if not self._whole:
            raise _GivenUpError

    @contextlib.contextmanager
    def closing(self) -> Generator[None]:
        """For the sender: once it ends, nothing more is wanted, and `fill` is not left waiting."""
        try:
            yield
        except BaseException:
            self._closed = True
            while not self._ended:
                self._next()
            raise

    def _next(self) -> bytes | memoryview | None:
        part = self._queue.get()
        self._ended = part is None
        return part


def _refused(said: str, place: str, *, writes: bool) -> HimError:
    """The HIM error for what the library said. A 404 for a write means that its bucket, or its upload, is gone."""
    status, code = _status(said), next(iter(_CODE.findall(said)), "")
    named = f"HTTP {status}{' ' * bool(code)}{code}" if status else "no reply"
    if code in _FIXES:
        return StorageError(f"the cold store refused ({named})", place=place, fix=_FIXES[code])
    if status == 404 and not writes:
        return NotFoundError("no such object in the cold store", place=place)
    if status == 416:
        return NotFoundError("the object ends before the range does", place=place)
    if status in (401, 403):
        return StorageError(f"the cold store refused ({named})", place=place, fix=_DENIED)
    if status in (501, 505, 507):
        return StorageError(f"the cold store cannot do this ({named})", place=place, fix="use another, or free space")
    if status in (404, 408, 409, 429) or status >= 500 or (not status and _NO_REPLY.search(said)):
        return UnavailableError(f"the cold store does not answer ({named})", place=place)
    if status:
        return StorageError(f"the cold store refused ({named})", place=place, fix="mend the cold store's URL")
    return StorageError("the cold store's reply is not one of S3's", place=place, fix="mend the cold store's endpoint")


def _status(said: str) -> int:
    """HTTP status of the last reply; 0 when there was none."""
    found = _STATUS.search(said)
    return int(found.group(1)) if found else 0


def _retry(retries: int) -> Mapping[str, Any]:
    """The library's own retries: the same pauses as `_pauses`."""
    return {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=COLD_RETRY_SECONDS),
        "backoff": {
            "init_backoff": timedelta(milliseconds=COLD_BACKOFF_FIRST_MS),
            "max_backoff": timedelta(milliseconds=COLD_BACKOFF_MAX_MS),
            "base": COLD_BACKOFF_BASE,
        },
    }


def _pauses(retries: int) -> Iterator[float]:
    """Seconds before each retry: exponential, with jitter that does not keep writers in step."""
    pause = COLD_BACKOFF_FIRST_MS
    for _ in range(retries):
        yield pause / 1_000
        pause = min(COLD_BACKOFF_MAX_MS, random.uniform(COLD_BACKOFF_FIRST_MS, pause * COLD_BACKOFF_BASE))


def _obstore(part: str = "") -> Any:
    """The library, loaded when it is first used: whoever has a folder does without it."""
    return import_module(f"obstore.{part}" if part else "obstore")


__all__ = ["STORAGE_CLASSES", "ObjectBucket", "open_store"]
