"""Merkle roots over record digests, in file order."""

from collections.abc import Sequence
from typing import Final

from blake3 import blake3

EMPTY_ROOT: Final = blake3(b"\x02").digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """32-byte root of a binary tree; an odd last node moves up unchanged.

    Leaves and inner nodes are digested with different first bytes, so that neither passes for the other
    (RFC 6962 §2.1).
    """
    if not leaves:
        return EMPTY_ROOT
    nodes = [blake3(b"\x00" + leaf).digest() for leaf in leaves]
    while len(nodes) > 1:
        paired = [blake3(b"\x01" + nodes[i] + nodes[i + 1]).digest() for i in range(0, len(nodes) - 1, 2)]
        nodes = paired + nodes[len(nodes) - len(nodes) % 2 :]
    return nodes[0]
