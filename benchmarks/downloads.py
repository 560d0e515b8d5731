"""Fetches and unpacks the archives of public data sets, so that what lies on disk is whole or absent.

`fetch` writes below a temporary folder beside the target and renames when checksum and length are right; `unpack` does
the same for a tree. Whatever is interrupted in between leaves nothing that a later call takes for complete.

Archives are data from outside: a member whose path or link leaves the folder, a device or a pipe ends the unpacking,
nothing is executed, and file modes, owners and times are not taken over. The rules are checked here, because tarfile's
own filters are missing in older patch releases of Python 3.10 and 3.11.

Not torchvision's `download_url`: it takes a file for complete when the connection breaks in the middle and no checksum
is known, and it tries http where https fails. The checksum of a file that is there comes from torchvision.

Cost: one pass over the network data; a file that is already there is read once for its checksum (2 s per GB).
Unpacking reads the archive once.
"""

from __future__ import annotations

import filecmp
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from avalanche.benchmarks.datasets import default_dataset_location
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from avalanche_firn.benchmarks.streams import StreamError

_BLOCK = 1 << 20  # bytes per read
_TIMEOUT = 60.0  # seconds without a byte; our choice
_BROKEN = (  # what the readers of tar, gzip, bzip2, xz and zip raise on damaged data
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(OSError, RuntimeError, NotImplementedError, ValueError),
)


class DownloadError(StreamError):
    """A file couldn't be fetched. The message names its address, the target and how to do it by hand."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the network.

    Attributes:
        url: its address: https, http or file.
        name: file name under which it is kept.
        md5: its MD5 checksum, 32 hexadecimal digits. Guards against damage; None where none is published.
        size: its length in bytes, or None.

    Raises:
        StreamError: another kind of address, a name that isn't a plain file name, a malformed sum or a size below 0.
    """

    url: str
    name: str
    md5: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if not re.match(r"(https?|file)://", self.url):
            raise StreamError(
                f"url is {self.url!r}; accepted: an address that starts with https://, http:// or file://"
            )
        if not self.name or self.name in (".", "..") or re.search(r"[\\/\0]", self.name):
            raise StreamError(f"name is {self.name!r}; accepted: a file name without folders")
        if self.md5 is not None and not re.fullmatch("[0-9a-f]{32}", self.md5):
            raise StreamError(f"md5 of {self.name} is {self.md5!r}; accepted: 32 digits 0-9 a-f, or None")
        if self.size is not None and self.size < 0:
            raise StreamError(f"size of {self.name} is {self.size}; accepted: bytes, at least 0, or None")


def default_root(name: str) -> Path:
    """Where Avalanche keeps the data set `name`: `~/.avalanche/data/NAME`, unless its configuration says otherwise."""
    return Path(default_dataset_location(name))


def locate(
    root: str | Path | None,
    inner: str,
    is_tree: Callable[[Path], bool],
    *,
    archive: RemoteFile | None = None,
    download: bool = False,
) -> Path | None:
    """The folder of a data set: `root/inner`, or `root` itself if `is_tree` says so; None if it is neither.

    Args:
        root: None: `default_root(inner)`.
        archive: holds `inner` as a top-level entry; fetched into `root` and unpacked there if `download` is True and
            nothing was found. It stays there and may be deleted.

    Raises:
        StreamError: both are there; what `fetch` and `unpack` raise.
    """
    root = default_root(inner) if root is None else Path(root).expanduser()
    found = [place for place in (root / inner, root) if place.is_dir() and (place != root or is_tree(place))]
    if len(found) > 1:
        raise StreamError(f"{found[0]} stands in {root}, which looks like such a folder itself; accepted: one of them")
    if not found and download and archive is not None:
        unpack(fetch(archive, root), root, marker=inner)
        return root / inner
    return found[0] if found else None


def fetch(file: RemoteFile, folder: str | Path, *, quiet: bool = False) -> Path:
    """The file in `folder`, downloaded if it isn't there yet.

    Args:
        file: what to fetch.
        folder: where to keep it; made if absent.
        quiet: True hides the progress bar, which is hidden anyway where there is no terminal.

    Returns:
        `folder/file.name`, with the right checksum and size as far as they are known.

    Raises:
        StreamError: a file is there already and has another checksum or size. It is left alone.
        DownloadError: the address can't be reached, the connection breaks, the disk can't be written, or what came has
            another checksum or size. Nothing is left behind.
    """
    folder = Path(folder).expanduser()
    target = folder / file.name
    if target.exists():
        if not target.is_file():
            raise StreamError(f"{target} is not a file; accepted: {file.name} from {file.url}, or nothing there")
        size = target.stat().st_size
        wrong = _difference(file, size, calculate_md5(target) if file.md5 else None)
        if wrong:
            raise StreamError(f"{target} {wrong}; remove it and try again, or put the right file there ({file.url})")
        return target
    by_hand = f"or put the file there yourself: download {file.url} and save it as {target}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            part = Path(temporary) / "part"
            wrong = _difference(file, *_transfer(file, part, quiet))
            if wrong:
                raise DownloadError(f"{file.url} sent a file that {wrong}; nothing was kept; try again, {by_hand}")
            os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{file.url} could not be fetched into {target} ({error}); try again, {by_hand}") from error
    return target


def unpack(archive: str | Path, folder: str | Path, *, marker: str | None = None) -> None:
    """Unpacks a tar (plain, gzip, bzip2, xz) or zip archive into `folder`.

    Everything is unpacked into a hidden folder beside and moved into place at the end, what holds the marker last. A
    link to a file of the archive becomes a copy of that file.

    Args:
        archive: the file.
        folder: gets the top-level entries of the archive; made if absent.
        marker: a path below `folder`, with forward slashes, that is there once the archive is unpacked: then there is
            nothing to do. None: always unpack.

    Raises:
        StreamError: no such file, no archive or a broken one; a member with an absolute path, with `..`, a device, or
            a link to anything else than a file of the archive; a top-level entry that is there already with another
            content (it is left alone); an archive without the marker.
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
            if tarfile.is_tarfile(archive):
                _unpack_tar(archive, inside)
            elif zipfile.is_zipfile(archive):
                _unpack_zip(archive, inside)
            else:
                raise StreamError(f"{archive} is no archive; accepted: tar, tar.gz, tgz, tar.bz2, tar.xz or zip")
            _move(archive, inside, folder, marker)


def download_words(what: str, *, reason: str, source: str, place: str | Path) -> str:
    """The text of a StreamError about data that can't be fetched from here.

    Args:
        what: name of the data set.
        reason: why it isn't fetched, as half a sentence: "its address is dead", "its licence has to be accepted".
        source: where a person finds it.
        place: where to put it, a folder or file; layouts may follow in words.
    """
    return f"{what} is not downloaded from here: {reason}. Get it by hand ({source}) and put it at {place}"


def _difference(file: RemoteFile, size: int, md5: str | None) -> str | None:
    """What is wrong with a file of that size and sum, as the rest of a sentence."""
    wrong = []
    if file.size is not None and size != file.size:
        wrong.append(f"{size} bytes instead of {file.size}")
    if file.md5 is not None and md5 != file.md5:
        wrong.append(f"the MD5 checksum {md5} instead of {file.md5}")
    return "has " + " and ".join(wrong) if wrong else None


def _transfer(file: RemoteFile, part: Path, quiet: bool) -> tuple[int, str]:
    """Writes what the address sends to `part`; returns its length in bytes and its MD5 checksum."""
    md5 = hashlib.md5(usedforsecurity=False)
    request = urllib.request.Request(file.url, headers={"User-Agent": "avalanche-firn"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(part, "wb") as out:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdigit() else None
        size = 0
        with tqdm(
            total=total, desc=file.name, unit="B", unit_scale=True, disable=True if quiet else None, leave=False
        ) as bar:
            while block := response.read(_BLOCK):
                out.write(block)
                md5.update(block)
                size += len(block)
                bar.update(len(block))
    if total is not None and size != total:  # urllib ends a broken connection like a finished one
        raise OSError(f"the connection ended after {size} of {total} bytes")
    return size, md5.hexdigest()


@contextmanager
def _broken_is_named(archive: Path) -> Iterator[None]:
    try:
        yield
    except StreamError:
        raise
    except _BROKEN as error:
        raise StreamError(f"{archive} could not be unpacked ({error}); if it is damaged, fetch it again") from error


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


def _unpack_tar(archive: Path, inside: Path) -> None:
    links: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            parts = _inside(member.name, archive)
            if member.isdir():
                inside.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                source = tar.extractfile(member)
                assert source is not None  # it is a regular file
                with source:
                    _write(source, inside.joinpath(*parts), member.size)
            elif member.issym():
                links.append((parts, _inside(member.linkname, archive, parts[:-1])))
            elif member.islnk():
                links.append((parts, _inside(member.linkname, archive)))
            else:
                raise StreamError(f"{archive} holds {member.name!r}, a device or a pipe; accepted: files and folders")
    _copy_links(links, inside, archive)


def _unpack_zip(archive: Path, inside: Path) -> None:
    links: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    with zipfile.ZipFile(archive) as members:
        for info in members.infolist():
            parts = _inside(info.filename, archive)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                inside.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            elif kind == stat.S_IFLNK:
                links.append((parts, _inside(members.read(info).decode(), archive, parts[:-1])))
            elif kind in (0, stat.S_IFREG):
                with members.open(info) as source:
                    _write(source, inside.joinpath(*parts), info.file_size)
            else:
                raise StreamError(f"{archive} holds {info.filename!r}, a device or a pipe; accepted: files and folders")
    _copy_links(links, inside, archive)


def _inside(name: str, archive: Path, base: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The components of a member's path, or of a link's target as seen from `base`; refuses what leaves the folder."""
    parts = list(base)
    outside = not name or bool(re.match(r"[\\/]|[A-Za-z]:", name)) or "\0" in name
    for part in re.split(r"[\\/]", name):
        if part == "..":
            outside = outside or not parts or not base
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    if outside:
        raise StreamError(f"{archive} holds the path {name!r}, which leaves the folder; accepted: paths inside it")
    return tuple(parts)


def _write(source: IO[bytes], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as out:  # a link is never written through: none is made
        shutil.copyfileobj(source, out, _BLOCK)
        if out.tell() != size:
            raise EOFError(f"{path.name} ends after {out.tell()} of {size} bytes")


def _copy_links(links: list[tuple[tuple[str, ...], tuple[str, ...]]], inside: Path, archive: Path) -> None:
    for parts, target in links:
        source, path = inside.joinpath(*target), inside.joinpath(*parts)
        if not source.is_file() or source == path:
            raise StreamError(
                f"{archive} holds {'/'.join(parts)!r}, a link to no file; accepted: links to its own files"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)


__all__ = ["DownloadError", "RemoteFile", "default_root", "download_words", "fetch", "locate", "unpack"]
