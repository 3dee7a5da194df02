"""Remembered results in a repository with keys: who has not what they are about reads none."""

from collections.abc import Iterable
from contextlib import suppress

from him.crypto import decrypt_note, encrypt_note, keyed
from him.errors import IntegrityError
from him.ports import Memo


class EncryptedMemo:
    """`ports.Memo` over another, which holds neither what is asked for nor what is found.

    A result is encrypted under a keyed digest of its key. Keys are made of content (pixels, text, references), so what
    is remembered of shredded content goes with it, though the hash key stays.
    """

    def __init__(self, memo: Memo, hash_key: bytes) -> None:
        self._memo, self._hash_key = memo, hash_key

    def get(self, kind: str, key: bytes) -> bytes | None:
        """The result, decrypted; None where it does not decrypt."""
        about = self._about(kind, key)
        found = self._memo.get(kind, keyed(about))
        if found is not None:
            with suppress(IntegrityError):
                return decrypt_note(about, found)
        return None

    def put(self, kind: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember results, encrypted."""
        abouts = ((self._about(kind, key), value) for key, value in items)
        self._memo.put(kind, [(keyed(about), encrypt_note(about, value)) for about, value in abouts])

    def _about(self, kind: str, key: bytes) -> bytes:
        return keyed(self._hash_key, kind.encode(), key)
