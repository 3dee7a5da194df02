"""Records whose content is encrypted: what is said in the open, and what is not (docs/FORMAT.md, "Encrypted records").

In the open stand kind, codec, sizes, origin and the blob_id, which is a digest of the secret and tells nothing of it.
Encrypted are the tile's own header and its stored bytes.
"""

import struct
from typing import Final

from him.crypto import NONCE_BYTES, Sealed, decrypt_record, encrypt_record
from him.errors import IntegrityError
from him.pack.format import Draft
from him.types import HashKey, Secret

_BOUND: Final = struct.Struct("<BBQ16s16s")
_META: Final = 4
_NONCE_FILL: Final = bytes(12)


def encrypted(draft: Draft, secret: Secret, key: HashKey) -> Draft:
    """The draft of an encrypted record for what `draft` holds; its blob_id follows from the secret."""
    body = b"".join((len(draft.meta).to_bytes(_META, "little"), draft.meta, draft.stored))
    bound = _BOUND.pack(draft.kind, draft.codec, draft.raw_size, draft.origin, key.key_id)
    sealed = encrypt_record(secret, bound, body)
    return draft._replace(
        blob_id=secret.blob_id, meta=b"", stored=sealed.stored, key_id=key.key_id, nonce=sealed.nonce + _NONCE_FILL
    )


def decrypted(
    secret: Secret, kind: int, codec: int, raw_size: int, origin: bytes, key_id: bytes, nonce: bytes,
    stored: bytes | memoryview,
) -> tuple[bytes, memoryview]:  # fmt: skip
    """(the tile's header, its stored bytes) of an encrypted record.

    Raises:
        IntegrityError: any byte that is not as it was encrypted, or another record's header.
    """
    bound = _BOUND.pack(kind, codec, raw_size, origin, key_id)
    body = decrypt_record(secret, bound, Sealed(nonce[:NONCE_BYTES], stored))
    size = int.from_bytes(body[:_META], "little")
    if len(body) < _META + size or any(nonce[NONCE_BYTES:]):
        raise IntegrityError("an encrypted record is torn")
    return bytes(body[_META : _META + size]), body[_META + size :]
