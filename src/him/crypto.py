"""Encryption with keys that follow from content, and wrapping of secrets: the one module that calls a cipher.

Content is named by a keyed digest of itself, its `Secret`; the key of its record follows from that, so equal content is
encrypted alike and shared, and who holds the secret of a directory can open exactly what it reaches. Nonces are keyed
digests of all that is encrypted: one key meets one nonce only with the same bytes. AES-256-GCM (NIST SP 800-38D) with
BLAKE3 as key derivation; the design and its limits are in docs/design/015-keys.md.
"""

from typing import Final, NamedTuple

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from him.errors import IntegrityError
from him.types import Secret

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_RECORD: Final = "him 2026-11-24 key of a record"
_NOTE: Final = "him 2026-11-24 key of a remembered result"
_NONCE: Final = "him 2026-11-24 nonce"


class Sealed(NamedTuple):
    """Encrypted bytes: nonce, and ciphertext with its tag."""

    nonce: bytes
    stored: bytes | memoryview


def encrypt_record(secret: Secret, bound: bytes, body: bytes) -> Sealed:
    """Encrypt a record's content under its own secret.

    Args:
        bound: what the header says, which the tag covers too.
    """
    return _encrypted(_derived(_RECORD, secret), bound, body)


def decrypt_record(secret: Secret, bound: bytes, sealed: Sealed) -> memoryview:
    """Inverse of `encrypt_record`. Raises IntegrityError for any byte that is not as it was encrypted."""
    return _decrypted(_derived(_RECORD, secret), bound, sealed)


def encrypt_note(about: bytes, value: bytes) -> bytes:
    """A remembered result, encrypted under what it is about, which who reads it must know."""
    sealed = _encrypted(_derived(_NOTE, about), b"", value)
    return b"".join(sealed)


def decrypt_note(about: bytes, data: bytes) -> bytes:
    """Inverse of `encrypt_note`. Raises IntegrityError."""
    return bytes(_decrypted(_derived(_NOTE, about), b"", Sealed(data[:NONCE_BYTES], data[NONCE_BYTES:])))


def wrap(key: bytes, bound: bytes, secret: bytes) -> bytes:
    """A secret under a wrapping key: nonce, ciphertext, tag."""
    sealed = _encrypted(key, bound, secret)
    return b"".join(sealed)


def unwrap(key: bytes, bound: bytes, wrapped: bytes) -> bytes:
    """Inverse of `wrap`. Raises IntegrityError for another key or damage."""
    return bytes(_decrypted(key, bound, Sealed(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:])))


def keyed(key: bytes, *parts: bytes) -> bytes:
    """Keyed BLAKE3 over length-prefixed parts: 32 bytes."""
    hasher = blake3(key=key)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def _derived(context: str, material: bytes) -> bytes:
    return blake3(material, derive_key_context=context).digest()


def _encrypted(key: bytes, bound: bytes, body: bytes) -> Sealed:
    hasher = blake3(len(bound).to_bytes(8, "little") + bound, key=_derived(_NONCE, key))
    hasher.update(body)
    nonce = hasher.digest()[:NONCE_BYTES]
    return Sealed(nonce, AESGCM(key).encrypt(nonce, body, bound))


def _decrypted(key: bytes, bound: bytes, sealed: Sealed) -> memoryview:
    if len(sealed.nonce) != NONCE_BYTES or len(sealed.stored) < TAG_BYTES:
        raise IntegrityError("encrypted bytes are cut short")
    try:
        return memoryview(AESGCM(key).decrypt(sealed.nonce, sealed.stored, bound))
    except InvalidTag:
        raise IntegrityError("encrypted bytes do not match their tag") from None
