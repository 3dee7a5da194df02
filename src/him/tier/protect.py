"""Parity groups of a repository: which packs are protected, and making lost chunks of them again."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import msgspec

from him.config import PARITY_CHUNK_BYTES, PARITY_DATA, PARITY_EXTRA, PARITY_FILES_MAX
from him.errors import BusyError, HimError, IntegrityError, NotFoundError, UsageError
from him.pack import parity as code
from him.pack.check import first_fault
from him.pack.galois import Bytes
from him.pack.parity import Group, Member, ParityFile
from him.ports import Disk, ErasureCode, Progress
from him.tier.care import Journal
from him.types import PackFinished

FOLDER: Final = "packs"
_LOCK: Final = "care/lock"
Write = Callable[[str, int, bytes | memoryview], None]
"""Put sound bytes at an offset of a pack or parity file, which is made where it is missing."""


class Shape(NamedTuple):
    """How many packs a full group has, and how many parity files."""

    data: int = PARITY_DATA
    extra: int = PARITY_EXTRA

    def checked(self) -> "Shape":
        """The shape itself. Raises UsageError where no group can be like that."""
        if self.data < 1 or self.extra < 1 or sum(self) > PARITY_FILES_MAX:
            raise UsageError(
                f"no group has {self.data} packs and {self.extra} parity files",
                fix=f"give at least 1+1, and at most {PARITY_FILES_MAX} together, such as 10+4",
            )
        return self

    def extra_of(self, packs: int) -> int:
        """The parity files of a group that is not full: in proportion, but one at least."""
        return max(1, -(-self.extra * packs // self.data))


OFF: Final = Shape(0, 0)
"""Nothing is to be protected."""


class Made(msgspec.Struct, frozen=True):
    """What an update of the parity did."""

    made_groups: int
    removed_groups: int
    mended_files: int
    written_bytes: int
    unsound: tuple[HimError, ...]
    """Of packs that nothing protects, for they are damaged."""


class ParityStatus(msgspec.Struct, frozen=True):
    """What is protected."""

    groups: int
    protected_packs: int
    protected_bytes: int
    waiting_packs: int
    """Finished packs that are in no whole group."""
    waiting_bytes: int
    parity_bytes: int
    damaged_files: int
    """Parity files that are missing, or whose head does not verify."""


class _Held(NamedTuple):
    """A group and those of its parity files that say so, by number."""

    group: Group
    names: tuple[str, ...]
    """Of all its parity files."""
    whole: frozenset[int]


class _Range(NamedTuple):
    """Bytes of a file."""

    name: str
    offset: int
    size: int


class Parity:
    """Makes, keeps and uses the parity files of a repository; several threads may mend at once.

    Args:
        disk: where packs are; through a mirror what is not here is fetched.
        finished: the packs that grow no more and are to stay.
        shape: of new groups; None leaves everything as it is.
        write: for what is made again; the disk's own files unless there is a mirror.
    """

    def __init__(
        self,
        disk: Disk,
        arithmetic: ErasureCode,
        repository_id: bytes,
        finished: Callable[[], Sequence[PackFinished]],
        journal: Journal,
        *,
        shape: Shape | None = None,
        write: Write | None = None,
        drop: Callable[[str], None] | None = None,
    ) -> None:
        self._disk, self._arithmetic, self._repository_id = disk, arithmetic, repository_id
        self._finished, self._journal, self.shape = finished, journal, shape
        self._write = write or self._write_here
        self._drop = drop or disk.remove
        self._names: Sequence[str] = ()
        self._groups: dict[bytes, _Held] = {}

    # -- what there is

    def groups(self, *, again: bool = False) -> list[_Held]:
        """The groups that at least one parity file describes; heads are read once, or `again`."""
        names = [name for name in self._disk.list(FOLDER) if name.endswith(code.SUFFIX)]
        if again or names != self._names:
            self._groups, self._names = self._read_groups(names), names
        return [self._groups[key] for key in sorted(self._groups)]

    def files(self) -> list[PackFinished]:
        """The parity files that are whole, as a cold tier takes packs."""
        return [
            PackFinished(held.names[number], self.file_size(held.names[number]), bytes(32))
            for held in self.groups()
            for number in sorted(held.whole)
        ]

    def status(self) -> ParityStatus:
        """Figures of this moment."""
        packs = {pack.pack: pack for pack in self._finished()}
        groups = [held for held in self.groups() if _stands(held.group, packs)]
        protected = {member.name for held in groups for member in held.group.members}
        waiting = [pack.size for name, pack in packs.items() if name not in protected]
        return ParityStatus(
            len(groups), len(protected), sum(packs[name].size for name in protected), len(waiting), sum(waiting),
            sum(self.file_size(held.names[number]) for held in groups for number in held.whole),
            sum(len(held.names) - len(held.whole) for held in groups),
        )  # fmt: skip

    def _read_groups(self, names: Iterable[str]) -> dict[bytes, _Held]:
        found: dict[bytes, list[ParityFile]] = {}
        for name in names:
            path = f"{FOLDER}/{name}"
            with contextlib.suppress(HimError, msgspec.MsgspecError):
                one = self._read_head(path)
                found.setdefault(bytes.fromhex(name.split(".")[0]), []).append(one)
        return {
            key: _Held(
                files[0].group,
                tuple(code.file_name(FOLDER, key, number) for number in range(len(files[0].group.parity))),
                frozenset(one.number for one in files),
            )
            for key, files in found.items()
        }

    def _read_head(self, path: str) -> ParityFile:
        file = self._disk.open(path)
        try:
            return code.read_head(file, path, self._repository_id)
        finally:
            file.close()

    def file_size(self, path: str) -> int:
        """Bytes of a pack or parity file; 0 for none."""
        try:
            file = self._disk.open(path)
        except NotFoundError:
            return 0
        try:
            return file.size()
        finally:
            file.close()

    # -- making groups

    def update(self, progress: Progress) -> Made:
        """Protect every finished pack: new groups are written before those they replace go, missing files are made.

        An interrupted update is taken up by the next one; a group it had finished stays.

        Raises:
            BusyError: another process does the same.
            StorageError: the disk refused.
        """
        if self.shape is None:
            # Never set, or its file is damaged: what is protected stays so.
            return Made(0, 0, 0, 0, ())
        with self._alone():
            unsound: dict[str, HimError] = {}
            made = removed = mended = written = 0
            while True:
                packs = {pack.pack: pack for pack in self._finished() if pack.pack not in unsound}
                kept, new = chosen(packs, [held.group for held in self.groups(again=True)], self.shape)
                broken = False
                for number, group in enumerate(new):
                    progress(number, len(new), "protecting packs")
                    try:
                        written += self._make(group)
                        made += 1
                    except _UnsoundError as error:
                        broken = True
                        if not self._mended(error.pack):
                            unsound[error.pack] = error.cause
                if not broken:
                    break
            for held in self.groups(again=True):
                names = {member.name for member in held.group.members}
                stays = held.group in kept or any(names == {pack.pack for pack in group} for group in new)
                # What is damaged may yet be mended by the group it was protected in.
                if not stays and names.isdisjoint(unsound):
                    self._remove(held)
                    removed += 1
            for held in self.groups(again=True):
                for number in sorted(set(range(len(held.names))) - held.whole):
                    mended += self._mend_file(held, number)
            self.groups(again=True)
            return Made(made, removed, mended, written, tuple(unsound.values()))

    def _mended(self, name: str) -> bool:
        with contextlib.suppress(HimError):
            return self.mend(name)
        return False

    @contextmanager
    def _alone(self) -> Generator[None]:
        file = self._disk.open(_LOCK, create=True)
        try:
            if not file.lock(wait=False):
                raise BusyError("another process takes care of the parity", place=_LOCK)
            yield
        finally:
            file.close()

    def _make(self, packs: Sequence[PackFinished]) -> int:
        """Write the parity files of a group; the bytes written."""
        assert self.shape is not None
        extra = self.shape.extra_of(len(packs))
        key = code.group_id(self._repository_id, packs, extra)
        names = [code.file_name(FOLDER, key, number) for number in range(extra)]
        group = Group(tuple(Member(pack.pack, pack.size, pack.merkle_root) for pack in packs), (b"",) * extra)
        digests: list[list[bytes]] = [[] for _ in range(len(packs) + extra)]
        for row in range(group.rows):
            chunks: list[Bytes] = []
            for number, pack in enumerate(packs):
                chunk = self._read(pack.pack, row * PARITY_CHUNK_BYTES, group.chunk_bytes(number, row))
                if chunk:
                    digests[number].append(code.digest(chunk))
                chunks.append(code.padded(chunk, group.row_bytes(row)))
            made = code.parity_of(self._arithmetic, chunks, extra)
            for number, part in enumerate(made):
                digests[len(packs) + number].append(code.digest(part.data))
                self._write(names[number], code.chunk_at(row), part.data)
        # After their chunks were digested: what these digests stand for is what was found sound.
        for pack in packs:
            self._check(pack)
        held = [b"".join(one) for one in digests]
        members = tuple(
            msgspec.structs.replace(member, digests=one) for member, one in zip(group.members, held, strict=False)
        )
        whole = Group(members, tuple(held[len(packs) :]))
        for number, name in enumerate(names):
            self._end_file(whole, number, name)
        self._disk.sync_folder(FOLDER)
        return sum(self.file_size(name) for name in names)

    def _end_file(self, group: Group, number: int, name: str) -> None:
        """What a parity file says of itself comes last, after all it tells of is durable."""
        head, at, table = code.encode_ends(self._repository_id, group, number)
        self._write(name, at, table)
        self._sync(name, at + len(table))
        self._write(name, 0, head)
        self._sync(name)

    def _sync(self, name: str, size: int | None = None) -> None:
        file = self._disk.open(name)
        try:
            if size is not None and file.size() > size:
                file.truncate(size)
            file.sync()
        finally:
            file.close()

    def _check(self, pack: PackFinished) -> None:
        error = first_fault(self._disk, pack, self._repository_id)
        if error is not None:
            raise _UnsoundError(pack.pack, error)

    def _read(self, name: str, offset: int, size: int) -> bytes:
        """A chunk while a group is made. Raises _UnsoundError when it is not there."""
        if not size:
            return b""
        try:
            file = self._disk.open(name)
            try:
                return file.read_at(offset, size)
            finally:
                file.close()
        except (NotFoundError, IntegrityError) as error:
            raise _UnsoundError(name, IntegrityError("a pack is missing", object=name, place=name)) from error

    def _remove(self, held: _Held) -> None:
        for name in held.names:
            self._drop(name)

    # -- making chunks again

    def protects(self, name: str) -> bool:
        """Whether a pack is in a group."""
        return self._find(name) is not None

    def mend(self, name: str, offset: int = 0, size: int | None = None) -> bool:
        """Make what is damaged of a pack, or of a range of it, again; whether anything was.

        Raises:
            IntegrityError: more chunks of a row are lost than the group has parity files; what could be mended is.
        """
        found = self._find(name)
        if found is None:
            return False
        held, number = found
        member = held.group.members[number]
        end = member.size if size is None else min(offset + size, member.size)
        lost: IntegrityError | None = None
        mended: list[_Range] = []
        for row in range(offset // PARITY_CHUNK_BYTES, -(-end // PARITY_CHUNK_BYTES)):
            try:
                mended += self._mend_row(held, number, row, others=size is None)
            except IntegrityError as error:
                lost = lost or error
        self._settle(mended)
        longer = size is None and self.file_size(name) > member.size
        if longer:
            self._sync(name, member.size)
        if lost is not None:
            raise lost
        return longer or bool(mended)

    def chunks(self, name: str) -> Iterator[Bytes]:
        """A pack's bytes in order, each chunk verified, or made of others; nothing is written.

        Raises:
            NotFoundError: it is in no group. IntegrityError: too much of the group is lost.
        """
        found = self._find(name)
        if found is None:
            raise NotFoundError("no parity protects the pack", object=name)
        held, number = found
        for row in range(-(-held.group.members[number].size // PARITY_CHUNK_BYTES)):
            chunk = self._chunk(held, number, row)
            if chunk is None:
                yield self._made(held, number, row)[number]
            else:
                yield code.padded(chunk, len(chunk))

    def check_file(self, name: str) -> IntegrityError | None:
        """What is wrong with a parity file of a group, if anything is."""
        for held in self.groups():
            if name in held.names:
                number = held.names.index(name)
                if number not in held.whole:
                    return IntegrityError("the head of a parity file is damaged", object=name, place=f"{name} @ 0")
                for row in range(held.group.rows):
                    if self._chunk(held, len(held.group.members) + number, row) is None:
                        place = f"{name} @ {code.chunk_at(row)}"
                        return IntegrityError("a chunk of parity is damaged", object=name, place=place)
        return None

    def mend_file(self, name: str) -> bool:
        """Make what is damaged of a parity file again; whether anything was. Raises IntegrityError."""
        held = next((held for held in self.groups() if name in held.names), None)
        return held is not None and self._mend_file(held, held.names.index(name)) > 0

    def _mend_file(self, held: _Held, number: int) -> int:
        at = len(held.group.members) + number
        mended = [one for row in range(held.group.rows) for one in self._mend_row(held, at, row)]
        self._settle(mended)
        if not mended and number in held.whole:
            return 0
        self._end_file(held.group, number, held.names[number])
        self._disk.sync_folder(FOLDER)
        self._names = ()
        return 1

    def _find(self, name: str) -> tuple[_Held, int] | None:
        for again in (False, True):
            for held in self.groups(again=again):
                for number, member in enumerate(held.group.members):
                    if member.name == name:
                        return held, number
        return None

    def _mend_row(self, held: _Held, number: int, row: int, *, others: bool = False) -> list[_Range]:
        """Make a chunk again if it is damaged, and with it `others` of its row that are; what was written."""
        if self._chunk(held, number, row) is not None:
            return []
        written: list[_Range] = []
        for one, chunk in self._made(held, number, row, others=others).items():
            name, at = self._place(held, one, row)
            self._write(name, at, chunk.data)
            written.append(_Range(name, at, len(chunk)))
        return written

    def _settle(self, mended: Sequence[_Range]) -> None:
        """Make durable what was written, and note it: neighbours as one."""
        for name in {one.name for one in mended}:
            self._sync(name)
        if mended:
            self._disk.sync_folder(FOLDER)
        runs: list[_Range] = []
        for one in sorted(mended):
            if runs and (runs[-1].name, runs[-1].offset + runs[-1].size) == (one.name, one.offset):
                one = _Range(one.name, runs[-1].offset, runs[-1].size + one.size)
                runs.pop()
            runs.append(one)
        for one in runs:
            self._journal.add("healed", one.name, one.offset, one.size, why="parity")

    def _made(self, held: _Held, number: int, row: int, *, others: bool = False) -> dict[int, Bytes]:
        """A chunk made of others, by its number, or with `others` all that are damaged. Raises IntegrityError."""
        group, have, lost = held.group, dict[int, Bytes](), [number]
        count, extra = len(group.members), len(group.parity)
        for other in range(count + extra):
            if other == number or (len(have) == count and not others):
                continue
            chunk = self._chunk(held, other, row)
            if chunk is None:
                lost.append(other)
            elif len(have) < count:
                have[other] = code.padded(chunk, group.row_bytes(row))
        name, at = self._place(held, number, row)
        if len(have) < count:
            raise IntegrityError(
                f"only {len(have)} of {count + extra} chunks are sound, and parity needs {count}",
                object=name, place=f"{name} @ {at}",
            )  # fmt: skip
        wanted = lost if others else [number]
        whole = zip(wanted, code.made_again(self._arithmetic, count, extra, have, wanted), strict=True)
        made = {one: chunk[: group.chunk_bytes(one, row)] for one, chunk in whole}
        if not all(group.verifies(one, row, chunk.data) for one, chunk in made.items()):
            raise IntegrityError("parity gives other bytes than were protected", object=name, place=f"{name} @ {at}")
        return made

    def _chunk(self, held: _Held, number: int, row: int) -> bytes | None:
        """A chunk that verifies; None for another. What cannot be read right now counts as lost."""
        name, at = self._place(held, number, row)
        size = held.group.chunk_bytes(number, row)
        if not size:
            return b""
        with contextlib.suppress(HimError):
            file = self._disk.open(name)
            try:
                chunk = file.read_at(at, size)
            finally:
                file.close()
            return chunk if held.group.verifies(number, row, chunk) else None
        return None

    def _place(self, held: _Held, number: int, row: int) -> tuple[str, int]:
        count = len(held.group.members)
        if number < count:
            return held.group.members[number].name, row * PARITY_CHUNK_BYTES
        return held.names[number - count], code.chunk_at(row)

    def _write_here(self, name: str, offset: int, data: bytes | memoryview) -> None:
        file = self._disk.open(name, create=True)
        try:
            file.write_at(offset, data)
        finally:
            file.close()


class _UnsoundError(Exception):
    """A pack is damaged, so that it cannot be protected as it is."""

    def __init__(self, pack: str, cause: HimError) -> None:
        super().__init__(pack)
        self.pack, self.cause = pack, cause


def chosen(
    packs: Mapping[str, PackFinished], groups: Sequence[Group], shape: Shape
) -> tuple[list[Group], list[list[PackFinished]]]:
    """The groups that stay, and the packs of each new one.

    A group stays while all its packs do and, where it is not full, as long as there is nothing to add to it. Packs of
    like size go together, for a parity file is as long as the largest.

    Args:
        packs: those to be protected.
    """
    if shape == OFF:
        return [], []
    standing = [group for group in groups if _stands(group, packs) and _shaped(group, shape)]
    # Of two that hold one pack (two processes chose at once) the first stays.
    taken: set[str] = set()
    kept: list[Group] = []
    for group in sorted(standing, key=lambda one: -len(one.members)):
        names = {member.name for member in group.members}
        if taken.isdisjoint(names):
            kept.append(group)
            taken |= names
    waiting = [name for name in packs if name not in taken]
    if waiting:
        for group in [one for one in kept if len(one.members) < shape.data]:
            kept.remove(group)
            waiting += [member.name for member in group.members]
    order = sorted(waiting, key=lambda name: (-packs[name].size, name))
    return kept, [[packs[name] for name in order[at : at + shape.data]] for at in range(0, len(order), shape.data)]


def _stands(group: Group, packs: Mapping[str, PackFinished]) -> bool:
    """Whether all packs of a group are there, as they were protected."""
    return all(
        (pack := packs.get(member.name)) is not None
        and (pack.size, pack.merkle_root) == (member.size, member.merkle_root)
        for member in group.members
    )


def _shaped(group: Group, shape: Shape) -> bool:
    count = len(group.members)
    return count <= shape.data and len(group.parity) == shape.extra_of(count)
