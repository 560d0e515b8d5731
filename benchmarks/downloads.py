"""Fetches the archives of public data sets, so that what lies on disk is whole or absent.

`fetch` writes below a temporary folder beside the target and renames when checksum and length are right; `unpack` (in
`archives`) does the same for a tree. Whatever is interrupted in between leaves nothing that a later call takes for
complete. A file of known length may have no more; others are bounded, and counted while they come.

Not torchvision's `download_url`: it takes a file for complete when the connection breaks in the middle and no checksum
is known, and it tries http where https fails. The checksum of a file that is there comes from torchvision.

Cost: one pass over the network data; a file that is already there is read once for its checksum (2 s per GB).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avalanche.benchmarks.datasets import default_dataset_location
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from avalanche_firn.benchmarks.archives import Limits, unpack
from avalanche_firn.benchmarks.streams import StreamError

_BLOCK = 1 << 20  # bytes per read
_TIMEOUT = 60.0  # seconds without a byte; our choice
MAX_DOWNLOAD = 20 * 10**9  # bytes, of a file whose length isn't known; our choice: DomainNet's largest has 6 GB


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


def fetch(file: RemoteFile, folder: str | Path, *, quiet: bool = False, max_size: int = MAX_DOWNLOAD) -> Path:
    """The file in `folder`, downloaded if it isn't there yet.

    Args:
        file: what to fetch.
        folder: where to keep it; made if absent.
        quiet: True hides the progress bar, which is hidden anyway where there is no terminal.
        max_size: bytes at most, where `file` has no size.

    Returns:
        `folder/file.name`, with the right checksum and size as far as they are known.

    Raises:
        StreamError: a file is there already and has another checksum or size. It is left alone.
        DownloadError: the address can't be reached, the connection breaks, the disk can't be written or has no room, or
            what came has another checksum or size, or more bytes than accepted. Nothing is left behind.
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
            wrong = _difference(file, *_transfer(file, part, quiet, max_size if file.size is None else file.size))
            if wrong:
                raise DownloadError(f"{file.url} sent a file that {wrong}; nothing was kept; try again, {by_hand}")
            os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{file.url} could not be fetched into {target} ({error}); try again, {by_hand}") from error
    return target


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


def _transfer(file: RemoteFile, part: Path, quiet: bool, most: int) -> tuple[int, str]:
    """Writes what the address sends to `part`; returns its length in bytes and its MD5 checksum. OSError for more."""
    md5 = hashlib.md5(usedforsecurity=False)
    request = urllib.request.Request(file.url, headers={"User-Agent": "avalanche-firn"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(part, "wb") as out:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdigit() else None
        if total is not None and total > most:
            raise OSError(f"it announces {total} bytes instead of {file.size if file.size is not None else most}")
        if total is not None and total > (free := shutil.disk_usage(part.parent).free):
            raise OSError(f"it has {total} bytes, and {free} are free there")
        size = 0
        with tqdm(
            total=total, desc=file.name, unit="B", unit_scale=True, disable=True if quiet else None, leave=False
        ) as bar:
            while block := response.read(_BLOCK):
                size += len(block)
                if size > most:
                    raise OSError(f"it sends more than {most} bytes; accepted: no more")
                out.write(block)
                md5.update(block)
                bar.update(len(block))
    if total is not None and size != total:  # urllib ends a broken connection like a finished one
        raise OSError(f"the connection ended after {size} of {total} bytes")
    return size, md5.hexdigest()


__all__ = [
    "MAX_DOWNLOAD",
    "DownloadError",
    "Limits",
    "RemoteFile",
    "default_root",
    "download_words",
    "fetch",
    "locate",
    "unpack",
]
