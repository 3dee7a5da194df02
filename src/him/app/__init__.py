"""The composition root: puts adapters behind the ports and offers the whole as `Repository`.

with him.open("memory", create=True) as repo:
    repo.writable("main").put_image(picture, "login")
    answer = repo.query("find button 'Submit'", "main")
"""

from him.app.opening import check, clone, heal, open, restore
from him.app.repository import Repository, answer_line
from him.app.rings import create_ring, open_ring
from him.catalog.restore import Restored
from him.catalog.transfer import TransferReport
from him.errors import HimError
from him.handle import SnapshotHandle

__all__ = [
    "HimError",
    "Repository",
    "Restored",
    "SnapshotHandle",
    "TransferReport",
    "answer_line",
    "check",
    "clone",
    "create_ring",
    "heal",
    "open",
    "open_ring",
    "restore",
]
