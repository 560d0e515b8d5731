"""Unpacks the archives of strangers: inside the folder, within stated bounds, whole or not at all.

An archive is data from outside. What ends the unpacking, with nothing left behind:

- a member, or the target of a link, whose path leaves the folder: absolute, a drive, `..`; with a colon (a drive or an
  alternate stream of NTFS), control characters, a name that the file system can't hold, more than 32 levels;
- a device, a pipe, a link to anything else than a file of the archive. Links become copies, and modes (setuid), owners
  and times are not taken over. Nothing is executed;
- a name that is there already, also where the file system takes two spellings for one;
- more than `Limits` allow: bytes, members, and bytes for each byte of the archive, counted while they are written and
  not as the archive says; or more than the disk has free.

The rules are checked here, because tarfile's own filters are missing in older patch releases of Python 3.10 and 3.11
and bound no sizes. Memory is bounded too: tarfile keeps all headers before a member (long names, maps of holes), and
zipfile decompresses bzip2 and LZMA without a bound, so that a zip may only be stored or deflated.

Cost: one pass over the archive, 60 us a member.
"""

from __future__ import annotations

import bz2
import filecmp
import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from avalanche_firn.benchmarks.member_names import DEEPEST, LONGEST, Parts, member_parts, shortened
from avalanche_firn.benchmarks.streams import StreamError

_BLOCK = 1 << 20  # bytes per read
_PIECE = 1 << 20  # bytes of all headers before a member; our choice: a long name has some hundred
_GLOBAL = 64  # entries that a tar keeps for all its members; our choice: git writes one
_BROKEN = (  # what the readers of tar, gzip, bzip2, xz and zip raise on damaged data
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(OSError, RuntimeError, NotImplementedError, ValueError, LookupError, OverflowError, AssertionError),
)


@dataclass(frozen=True)
class Limits:
    """What an archive may become. The defaults are our choice: the largest that is unpacked here has 6 GB (DomainNet).

    Attributes:
        total: bytes of all files together.
        members: files, folders and links.
        ratio: bytes for each byte of the archive. Images have about 1, text 20 and the most that gzip can do is 1,032;
            not asked of the first 64 MB.
        keep_free: bytes that stay free on the disk.

    Raises:
        StreamError: a number below 0, or a ratio below 1.
    """

    total: int = 100 * 10**9
    members: int = 1_000_000
    ratio: float = 200.0
    keep_free: int = 2**28

    def __post_init__(self) -> None:
        for name, least in (("total", 0), ("members", 0), ("ratio", 1), ("keep_free", 0)):
            if not getattr(self, name) >= least:
                raise StreamError(f"{name} is {getattr(self, name)!r}; accepted: a number from {least}")


_FREE_OF_RATIO = 64 * 10**6


def unpack(archive: str | Path, folder: str | Path, *, marker: str | None = None, limits: Limits | None = None) -> None:
    """Unpacks a tar (plain, gzip, bzip2, xz) or zip archive into `folder`.

    Everything is unpacked into a hidden folder beside and moved into place at the end, what holds the marker last. A
    link to a file of the archive becomes a copy of that file.

    Args:
        archive: the file.
        folder: gets the top-level entries of the archive; made if absent.
        marker: a path below `folder`, with forward slashes, that is there once the archive is unpacked: then there is
            nothing to do. None: always unpack.
        limits: None: the defaults of `Limits`.

    Raises:
        StreamError: no such file, no archive or a broken one; a member that the rules above refuse; more than the
            limits or the disk allow; a top-level entry that is there already with another content (it is left alone);
            an archive without the marker.
    """
    archive, folder = Path(archive), Path(folder).expanduser()
    if marker is not None and (folder / marker).exists():
        return
    if not archive.is_file():
        raise StreamError(f"{archive} is {'not a file' if archive.exists() else 'absent'}; accepted: an archive")
    with _broken_is_named(archive):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
            inside = Path(temporary)
            place = _Place(archive, inside, limits or Limits())
            with open(archive, "rb") as file:
                if (tar := _opened_tar(file, place)) is not None:
                    _unpack_tar(*tar, place)
                elif zipfile.is_zipfile(file):
                    _unpack_zip(file, place)
                else:
                    raise StreamError(f"{archive} is no archive; accepted: tar, tar.gz, tgz, tar.bz2, tar.xz or zip")
            _move(archive, inside, folder, marker)


class _Place:
    """Where members go, and what has been written there."""

    def __init__(self, archive: Path, inside: Path, limits: Limits) -> None:
        self.archive, self.inside, self.limits = archive, inside, limits
        self.size = archive.stat().st_size
        self.written = self.members = 0
        self._spellings: dict[Parts, Parts] | None = None if _tells_case(inside) else {}

    def refused(self, what: str) -> StreamError:
        return StreamError(f"{self.archive} {what}")

    def count_member(self) -> None:
        self.members += 1
        if self.members > self.limits.members:
            raise self.refused(f"holds more than {self.limits.members:,} members; accepted: no more")

    def check_total(self, known: int) -> None:
        """Refuses an archive that is known to hold so many bytes, written or not."""
        if known > self.limits.total:
            raise self.refused(f"holds more than {self.limits.total:,} bytes; accepted: no more")
        if known > max(_FREE_OF_RATIO, self.limits.ratio * self.size):
            raise self.refused(
                f"has {self.size:,} bytes and holds more than {self.limits.ratio:g} times as many; accepted: no more "
                "(is it a bomb?)"
            )

    def check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.inside).free
        if size + self.limits.keep_free > free:
            raise self.refused(
                f"needs {size:,} bytes, and {free:,} are free in {self.inside.parent}; accepted: so many and "
                f"{self.limits.keep_free:,} more"
            )

    def parts(self, name: str, base: Parts = ()) -> Parts:
        """The components of a member's path, or of a link's target as seen from `base`, if they may be used."""
        try:
            return member_parts(name, base)
        except ValueError as error:
            raise self.refused(f"holds {error}") from None

    def folder(self, parts: Parts) -> Path:
        """The folder, made if absent."""
        path = self.inside.joinpath(*parts)
        self._check_spelling(parts)
        if path.is_file():
            raise self.refused(f"holds {shortened('/'.join(parts))} as a file and as a folder; accepted: one of them")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, source: IO[bytes], parts: Parts, size: int) -> None:
        """Copies a file's content, `size` bytes as the archive says, to its place."""
        if not parts:
            raise self.refused("holds a file without a name; accepted: names")
        path = self.folder(parts[:-1]) / parts[-1]
        self._check_spelling(parts)
        self.check_total(self.written + size)
        self.check_room(size)
        try:
            out = open(path, "xb")  # noqa: SIM115  a link is never written through: none is made
        except FileExistsError:
            raise self.refused(f"holds {shortened('/'.join(parts))} twice; accepted: each name once") from None
        length = 0
        with out:
            while block := source.read(_BLOCK):
                self.written += len(block)
                self.check_total(self.written)
                out.write(block)
                length += len(block)
        if length != size:
            raise EOFError(f"{path.name} ends after {length} of {size} bytes")

    def _check_spelling(self, parts: Parts) -> None:
        if self._spellings is None:
            return
        for end in range(1, len(parts) + 1):
            folded = tuple(unicodedata.normalize("NFC", part).casefold() for part in parts[:end])
            if self._spellings.setdefault(folded, parts[:end]) != parts[:end]:
                one, two = (shortened("/".join(p)) for p in (self._spellings[folded], parts[:end]))
                raise self.refused(f"holds {one} and {two}, which are one name on this disk; accepted: each name once")


def _tells_case(folder: Path) -> bool:
    """Whether the file system of a folder tells capital letters from small ones."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="case-") as probe:
        return not os.path.exists(os.path.join(folder, os.path.basename(probe.name).upper()))


@contextmanager
def _broken_is_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except StreamError:
        raise
    except _BROKEN as error:
        raise StreamError(f"{archive} could not be unpacked ({error}); if it is damaged, fetch it again") from error


# ------------------------------------------------------------------------- tar
class _Counted(io.RawIOBase):
    """A stream that tarfile reads: few bytes of headers, and not beyond what may come out of the archive."""

    def __init__(self, stream: Any, place: _Place) -> None:
        self._stream, self._place = stream, place
        self._headers: int | None = 0  # bytes since the last member; None while a content is read

    def next_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        """The next member, after headers of a bounded size: tarfile keeps all of them until it comes."""
        self._headers = 0
        member = tar.next()
        self._headers = None
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        kept = tar.pax_headers  # those of all members
        if len(kept) > _GLOBAL or sum(len(key) + len(str(value)) for key, value in kept.items()) > _PIECE:
            raise self._place.refused(f"holds a header of {len(kept)} entries for all members; accepted: a short one")
        return member

    def _check(self, position: int) -> None:
        self._place.check_total(position - 2048 * (self._place.members + 8192))  # without headers and padding

    def read(self, size: int = -1) -> bytes:
        known = max(size, 0) + (self._headers or 0)
        if size < 0 or known > _PIECE:
            raise self._place.refused(f"holds a header of {known:,} bytes; accepted: at most {_PIECE:,}")
        data: bytes = self._stream.read(size)
        if self._headers is not None:
            self._headers = known
        self._check(self._stream.tell())
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        while (left := offset - self._stream.tell()) > _BLOCK:  # decompressed on the way
            if not self._stream.read(min(left, _BLOCK)):
                break
            self._check(self._stream.tell())
        return int(self._stream.seek(offset))

    def tell(self) -> int:
        return int(self._stream.tell())


def _opened_tar(file: IO[bytes], place: _Place) -> tuple[tarfile.TarFile, _Counted] | None:
    """The archive as a tar, and what it reads; None if it is none."""
    magic = file.read(6)
    file.seek(0)
    stream: Any = file
    if magic.startswith(b"\x1f\x8b"):
        stream = gzip.GzipFile(fileobj=file)
    elif magic.startswith(b"BZh"):
        stream = bz2.BZ2File(file)
    elif magic == b"\xfd7zXZ\x00":
        stream = lzma.LZMAFile(file)  # noqa: SIM115  as long as the file
    counted = _Counted(stream, place)
    try:
        return tarfile.TarFile(fileobj=counted, mode="r"), counted  # type: ignore[arg-type]
    except StreamError:
        raise
    except _BROKEN:
        file.seek(0)
        return None


def _unpack_tar(tar: tarfile.TarFile, counted: _Counted, place: _Place) -> None:
    links: list[tuple[Parts, Parts]] = []
    while (member := counted.next_member(tar)) is not None:
        place.count_member()
        parts = place.parts(member.name)
        if member.isdir():
            place.folder(parts)
        elif member.isreg():
            source = tar.extractfile(member)
            assert source is not None  # it is a regular file
            with source:
                place.write(source, parts, member.size)
        elif member.issym():
            links.append((parts, place.parts(member.linkname, parts[:-1])))
        elif member.islnk():
            links.append((parts, place.parts(member.linkname)))
        else:
            raise place.refused(f"holds {shortened(member.name)}, a device or a pipe; accepted: files and folders")
    _copy_links(links, place)


# ------------------------------------------------------------------------- zip
def _unpack_zip(file: IO[bytes], place: _Place) -> None:
    links: list[tuple[Parts, Parts]] = []
    with zipfile.ZipFile(file) as members:
        announced = sum(info.file_size for info in members.infolist())
        if odd := [i for i in members.infolist() if i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
            raise place.refused(
                f"holds {shortened(odd[0].filename)}, compressed by method {odd[0].compress_type} of zip; accepted: "
                "stored or deflated members"
            )
        place.check_total(announced)
        place.check_room(announced)
        for info in members.infolist():
            place.count_member()
            parts = place.parts(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                place.folder(parts)
            elif kind == stat.S_IFLNK:
                with members.open(info) as source:
                    links.append((parts, place.parts(source.read(LONGEST * DEEPEST).decode(), parts[:-1])))
            elif kind in (0, stat.S_IFREG):
                with members.open(info) as source:
                    place.write(source, parts, info.file_size)
            else:
                raise place.refused(
                    f"holds {shortened(info.filename)}, a device or a pipe; accepted: files and folders"
                )
    _copy_links(links, place)


# ----------------------------------------------------------------------- both
def _copy_links(links: list[tuple[Parts, Parts]], place: _Place) -> None:
    for parts, target in links:
        source = place.inside.joinpath(*target)
        if not source.is_file() or parts == target:
            raise place.refused(
                f"holds {shortened('/'.join(parts))}, a link to no file; accepted: links to its own files, after them"
            )
        with open(source, "rb") as content:
            place.write(content, parts, source.stat().st_size)


def _move(archive: Path, inside: Path, folder: Path, marker: str | None) -> None:
    """Moves the top-level entries from `inside` to `folder`, what holds the marker last."""
    entries = sorted(path for path in inside.iterdir() if path.name != "__MACOSX")
    if not entries:
        raise StreamError(f"{archive} holds no files; accepted: an archive with the data in it")
    if marker is not None and not (inside / marker).exists():
        raise StreamError(f"{archive} holds {entries[0].name!r} and no {marker!r}; accepted: an archive with it")
    for path in entries:
        old = folder / path.name
        same = path.is_file() and old.is_file() and filecmp.cmp(path, old, shallow=False)
        if os.path.lexists(old) and not same:
            if marker is not None and (folder / marker).exists():
                return  # another process was faster
            raise StreamError(
                f"{old} is there already and not the same as in {archive}; accepted: a folder without it; move it "
                "away if it is left from an earlier attempt"
            )
    last = None if marker is None else marker.split("/")[0]
    for path in sorted(entries, key=lambda path: path.name == last):
        os.replace(path, folder / path.name)


__all__ = ["Limits", "unpack"]
