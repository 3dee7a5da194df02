"""Small JSON files that carry their own digest, so that rot is told from what newer software wrote (docs/FORMAT.md).

The last member of the object is `"digest"`: BLAKE3, in hex, of the bytes before the comma in front of it. Software that
knows nothing of it reads the file all the same; members of the future are covered without being known.
"""

from typing import Final

import msgspec
from blake3 import blake3

_BEFORE: Final = b',"digest":"'
_AFTER: Final = b'"}\n'
_DIGITS: Final = 64


def sealed(value: msgspec.Struct) -> bytes:
    """The bytes of a file: a struct that has at least one field and none called `digest`."""
    body = msgspec.json.encode(value)[:-1]
    return body + _BEFORE + blake3(body).hexdigest().encode() + _AFTER


def holds(data: bytes) -> bool:
    """Whether these are the bytes of such a file, with a digest that is theirs."""
    size = len(_BEFORE) + _DIGITS + len(_AFTER)
    body, tail = data[:-size], data[-size:]
    return len(data) > size and tail == _BEFORE + blake3(body).hexdigest().encode() + _AFTER
