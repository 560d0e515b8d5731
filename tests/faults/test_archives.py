"""Archives of strangers, each made here: bombs, names, links, devices. Nothing leaves the folder, nothing is left."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import io
import lzma
import os
import stat
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avalanche_firn.benchmarks import archives, downloads, member_names
from avalanche_firn.benchmarks.archives import Limits, unpack
from avalanche_firn.benchmarks.downloads import DownloadError, RemoteFile, fetch
from avalanche_firn.benchmarks.streams import StreamError

MB = 10**6
ROOMY = Limits(keep_free=0)


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def file_of(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def link_of(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice
        for name, data in files.items():
            members.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def refused(archive: Path, to: Path, message: str, limits: Limits = ROOMY) -> None:
    """The message names the archive and the reason; the folder, and what stands beside it, are as they were."""
    before = sorted(path.name for path in to.parent.iterdir()) if to.parent.exists() else []
    with pytest.raises(StreamError, match=message) as caught:
        unpack(archive, to, limits=limits)
    assert str(archive) in str(caught.value) and "accepted" in str(caught.value)
    assert not to.exists() or list(to.iterdir()) == []
    assert sorted(path.name for path in to.parent.iterdir()) == sorted({*before, to.name})


# ----------------------------------------------------------------------- bombs
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip"])
def test_bombs_are_stopped_by_their_ratio(tmp_path, kind, monkeypatch):
    """4 MB of zeros in 4 kB, and a bound that begins at 1 MB: refused before anything is written."""
    monkeypatch.setattr(archives, "_FREE_OF_RATIO", MB)
    archive = tmp_path / f"bomb.{kind}"
    if kind == "zip":
        zip_of(archive, {"a/zeros": bytes(4 * MB)})
    else:
        tar_of(archive, [file_of("a/zeros", bytes(4 * MB))], f"w:{kind}")
    assert archive.stat().st_size < 5000
    opened = []
    monkeypatch.setattr(archives._Place, "check_room", lambda self, size: opened.append(size))
    refused(archive, tmp_path / "to", r"has [\d,]+ bytes and holds more than 200 times as many; accepted: no more")
    assert opened == []
    with pytest.raises(StreamError, match="holds more than 1,000 bytes"):
        unpack(archive, tmp_path / "to", limits=Limits(total=1000, ratio=10**6))


def test_small_archives_may_have_any_ratio(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", [file_of("a/zeros", bytes(4 * MB))], "w:gz")
    assert archive.stat().st_size < 4 * MB / 200
    unpack(archive, tmp_path / "to", limits=ROOMY)
    assert (tmp_path / "to" / "a" / "zeros").stat().st_size == 4 * MB


def test_what_an_archive_says_about_sizes_is_not_believed(tmp_path):
    """A zip whose index says ten bytes for a member that has 300 kB."""
    archive = zip_of(tmp_path / "a.zip", {"a/zeros": bytes(300_000)})
    content = bytearray(archive.read_bytes())
    index = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, index + 24, 10)
    archive.write_bytes(content)
    with pytest.raises(StreamError, match=r"a\.zip could not be unpacked|is no archive"):
        unpack(archive, tmp_path / "to", limits=ROOMY)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_that_zipfile_decompresses_without_a_bound(tmp_path, method):
    """200 MB of zeros in a member that announces ten bytes: nothing of it is decompressed."""
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", method) as members, members.open("a/zeros", "w") as out:
        for _ in range(200):
            out.write(bytes(MB))
    content = bytearray(archive.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 10)
    archive.write_bytes(content)
    tracemalloc.start()
    refused(archive, tmp_path / "to", rf"holds 'a/zeros', compressed by method {method} of zip; accepted: stored or")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * MB


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_number_and_bytes_of_members(tmp_path, kind):
    files = {f"a/{i}": b"12345" for i in range(20)}
    if kind == "zip":
        archive = zip_of(tmp_path / "many", files)
    else:
        archive = tar_of(tmp_path / "many", [file_of(*item) for item in files.items()])
    refused(archive, tmp_path / "to", "holds more than 19 members", Limits(members=19, keep_free=0))
    refused(archive, tmp_path / "to", "holds more than 99 bytes", Limits(total=99, keep_free=0))
    unpack(archive, tmp_path / "to", limits=Limits(total=100, members=20, keep_free=0))
    assert len(list((tmp_path / "to" / "a").iterdir())) == 20


def test_copies_of_links_count(tmp_path):
    """A hundred hard links to one file of a megabyte are a hundred megabytes here."""
    members = [file_of("a/big", os.urandom(MB)), *(link_of(f"a/{i}", "a/big") for i in range(100))]
    archive = tar_of(tmp_path / "links.tar", members)
    refused(archive, tmp_path / "to", "holds more than 50,000,000 bytes", Limits(total=50 * MB, keep_free=0))
    refused(archive, tmp_path / "to", r"more than 1\.5 times", Limits(ratio=1.5, keep_free=0))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_disk_must_have_room(tmp_path, monkeypatch, kind):
    """A zip announces all of its bytes, a tar those of each member when it comes."""
    if kind == "zip":
        archive = zip_of(tmp_path / "a.zip", {"a": b"x" * 1000})
    else:
        archive = tar_of(tmp_path / "a.tar", [file_of("a", b"x" * 1000)])
    usage = archives.shutil._ntuple_diskusage(10**9, 10**9 - 1500, 1500)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage)
    refused(archive, tmp_path / "to", r"needs 1,000 bytes, and 1,500 are free in .*501 more", Limits(keep_free=501))
    unpack(archive, tmp_path / "to", limits=Limits(keep_free=500))


def test_headers_are_not_read_into_memory_whole(tmp_path):
    """tarfile reads long names and PAX headers in one piece: here 40 MB of them, in an archive of 40 kB."""
    for kind, name in ((tarfile.GNUTYPE_LONGNAME, "gnu"), (tarfile.XHDTYPE, "pax")):
        info = tarfile.TarInfo("././@LongLink")
        info.type = kind
        archive = tar_of(tmp_path / f"{name}.tar.gz", [(info, bytes(40 * MB)), file_of("a/b")], "w:gz")
        tracemalloc.start()
        refused(archive, tmp_path / "to", r"holds a header of [\d,]+ bytes; accepted: at most 1,048,576")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * MB


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_before_a_member_are_counted_together(tmp_path, kind):
    """Forty of 600 kB, which tarfile would keep until the member comes."""
    data = b"600000 comment=" + b"a" * (600_000 - 16) + b"\n"
    many = []
    for _ in range(40):
        info = tarfile.TarInfo("././@LongLink")
        info.type = kind
        many.append((info, data))
    archive = tar_of(tmp_path / "a.tar.gz", [*many, file_of("a/b")], "w:gz")
    tracemalloc.start()
    refused(archive, tmp_path / "to", r"holds a header of 1,2\d\d,\d+ bytes; accepted: at most 1,048,576")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15 * MB
    single = tar_of(tmp_path / "b.tar", [item for i in range(9) for item in (many[0], file_of(f"a/{str(i) * 120}"))])
    if kind == tarfile.XHDTYPE:  # each before a member of its own
        unpack(single, tmp_path / "to", limits=ROOMY)


def test_headers_for_all_members_do_not_pile_up(tmp_path):
    """Each of nine members brings one, and tarfile keeps them to the end."""
    items = []
    for i in range(9):
        info = tarfile.TarInfo("g")
        info.type = tarfile.XGLTYPE
        items += [(info, b"600000 key%d=" % i + b"a" * (600_000 - 13) + b"\n"), file_of(f"a/{i}")]
    refused(tar_of(tmp_path / "a.tar", items), tmp_path / "to", "holds a header of 2 entries for all members; accepted")
    unpack(tar_of(tmp_path / "b.tar", items[:2]), tmp_path / "to", limits=ROOMY)


def sparse_header(size: int, real: int, pieces: list[tuple[int, int]]) -> bytes:
    """A GNU sparse member: bytes that follow, bytes of the file, (offset, bytes) of the pieces that aren't holes."""
    info = tarfile.TarInfo("a/holes")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for i, (offset, count) in enumerate(pieces):
        header[386 + 24 * i : 410 + 24 * i] = b"%011o\0%011o\0" % (offset, count)
    header[483:495] = b"%011o\0" % real
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_sparse_members_count_as_what_they_become(tmp_path):
    """512 bytes, and holes of 8 GB between them."""
    (tmp_path / "s.tar").write_bytes(sparse_header(512, 8 * 10**9, [(0, 512)]) + bytes(512) + bytes(1024))
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getmembers()[0].issparse() and tar.getmembers()[0].size == 8 * 10**9  # else this test says nothing
    refused(tmp_path / "s.tar", tmp_path / "to", "times as many")
    small = sparse_header(512, 2000, [(1000, 512)]) + b"x" * 512 + bytes(1024)
    (tmp_path / "t.tar").write_bytes(small)
    unpack(tmp_path / "t.tar", tmp_path / "to", limits=ROOMY)
    assert (tmp_path / "to" / "a" / "holes").read_bytes() == bytes(1000) + b"x" * 512 + bytes(488)


def test_what_is_skipped_is_bounded_too(tmp_path, monkeypatch):
    """A member that becomes nothing, and 40 MB behind it that have to be decompressed to get to the next one."""
    monkeypatch.setattr(archives, "_FREE_OF_RATIO", MB)
    raw = sparse_header(40 * MB, 0, []) + bytes(40 * MB) + file_of("b")[0].tobuf() + bytes(1024)
    (tmp_path / "skip.tar.gz").write_bytes(gzip.compress(raw))
    refused(tmp_path / "skip.tar.gz", tmp_path / "to", "times as many")


def test_known_data_sets_pass():
    """The largest archives that are unpacked here, by what is known of them: bytes, members."""
    limits = Limits()
    for size, members in ((6 * 10**9, 175_000), (2.2 * 10**9, 30_200), (1.2 * 10**9, 12_000), (0.2 * 10**9, 10)):
        assert size <= limits.total / 10 and members <= limits.members / 5
    with pytest.raises(StreamError, match=r"ratio is 0\.5; accepted: a number from 1"):
        Limits(ratio=0.5)
    with pytest.raises(StreamError, match="total is -1"):
        Limits(total=-1)


# ----------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/file.txt:hidden", "with a colon, which may be a drive or a stream"),
        ("a/C:/x", "with a colon"),
        ("//server/share/x", "leaves the folder"),
        ("\\\\?\\C:\\x", "leaves the folder"),
        ("a/" + "n" * 256, "of more than 255 bytes"),
        ("a/" + "ü" * 128, "of more than 255 bytes"),
        ("/".join("d" * 40), "a path of 40 levels; accepted: at most 32"),
        ("a/new\nline", "control characters"),
        ("a/\x1b[31mred", "control characters"),
        ("a/\u2028x", "control characters"),
    ],
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_are_refused(tmp_path, name, message, kind):
    if kind == "zip":
        archive = zip_of(tmp_path / "a", {"a/good": b"x", name: b"x"})
    else:
        archive = tar_of(tmp_path / "a", [file_of("a/good"), file_of(name)])
    refused(archive, tmp_path / "deep" / "to", message)


def test_names_that_are_no_text(tmp_path):
    info = tarfile.TarInfo("a/lone")
    raw = bytearray(info.tobuf())
    raw[2:6] = b"\xff\xfe\xfd\xfc"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    (tmp_path / "a.tar").write_bytes(bytes(raw) + bytes(1024))
    refused(tmp_path / "a.tar", tmp_path / "to", "bytes that are no text")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_come_twice(tmp_path, kind):
    for twice in (["a/x", "a/x"], ["a/x", "a//./x"], ["a", "a/x"], ["a/x", "a"]):
        if kind == "tar":
            archive = tar_of(tmp_path / "a", [file_of(name) for name in twice])
        else:
            with zipfile.ZipFile(tmp_path / "a", "w") as members, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name in twice:
                    members.writestr(name, b"x")
            archive = tmp_path / "a"
        with pytest.raises(StreamError, match=r"twice|as a file and as a folder|could not be unpacked"):
            unpack(archive, tmp_path / "to", limits=ROOMY)
        assert list((tmp_path / "to").iterdir()) == []


def test_spellings_that_are_one_name_on_some_disks(tmp_path, monkeypatch):
    """On a disk that doesn't tell capital letters apart, the second file would replace the first in silence."""
    pairs = [("a/Cat.png", "a/cat.png"), ("Train/x", "train/y"), ("a/\u00e9", "a/e\u0301"), ("a/STRASSE", "a/straße")]
    for one, two in pairs:
        archive = tar_of(tmp_path / "a.tar", [file_of(one, b"1"), file_of(two, b"2")])
        with monkeypatch.context() as patch:
            patch.setattr(archives, "_tells_case", lambda folder: False)
            refused(archive, tmp_path / "to", "which are one name on this disk; accepted: each name once")
    if archives._tells_case(tmp_path):
        unpack(tar_of(tmp_path / "a.tar", [file_of("Cat", b"1"), file_of("cat", b"2")]), tmp_path / "two", limits=ROOMY)
        assert sorted(path.read_bytes() for path in (tmp_path / "two").iterdir()) == [b"1", b"2"]


@pytest.mark.parametrize("name", ["a/CON", "a/nul.png", "a/com1", "a/x.", "a/x ", "a/what?", "a/<x>"])
def test_names_that_windows_gives_a_meaning(tmp_path, name, monkeypatch):
    archive = tar_of(tmp_path / "a.tar", [file_of(name)])
    unpack(archive, tmp_path / "here", limits=ROOMY)  # a name as any other elsewhere
    monkeypatch.setattr(member_names, "_WINDOWS", True)
    refused(archive, tmp_path / "to", "which Windows can't hold; accepted: other names")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(st.sampled_from("aA.b/\\:\0~ ü\u202e\n") | st.characters(max_codepoint=0x2FFF), min_size=1, max_size=12)
        | st.sampled_from(["..", "../x", "/x", "a/../../x", "C:x", ".", "a/", "~/x", "a/b/c", "__MACOSX/x"]),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(["tar", "zip"]),
)
def test_random_names_stay_inside(tmp_path_factory, names, kind):
    """Whatever the names: outside of the folder nothing changes; inside there is all or nothing."""
    base = tmp_path_factory.mktemp("names")
    to, archive = base / "deep" / "to", base / "a"
    contents = {name: str(i).encode() for i, name in enumerate(dict.fromkeys(names))}
    try:
        if kind == "zip":
            zip_of(archive, contents)
        else:
            tar_of(archive, [file_of(name, data) for name, data in contents.items()])
    except (ValueError, UnicodeError):
        return  # a name that can't be written
    try:
        unpack(archive, to, limits=ROOMY)
    except StreamError as error:
        assert str(archive) in str(error)
        assert not to.exists() or list(to.iterdir()) == []
    else:
        found = [path for path in to.rglob("*") if path.is_file()]
        assert all(path.read_bytes() in contents.values() and not path.is_symlink() for path in found)
    assert {path.name for path in base.iterdir()} <= {"a", "deep"}
    assert {path.name for path in (base / "deep").iterdir()} <= {"to"}


# ----------------------------------------------------------- links and devices
def test_links_to_links(tmp_path):
    chain = [file_of("a/real", b"data"), link_of("a/one", "a/real"), link_of("a/two", "a/one")]
    unpack(tar_of(tmp_path / "a.tar", chain), tmp_path / "to", limits=ROOMY)
    found = list((tmp_path / "to" / "a").iterdir())
    assert len(found) == 3 and all(path.read_bytes() == b"data" and path.stat().st_nlink == 1 for path in found)
    for wrong in (
        [link_of("a/one", "a/two"), link_of("a/two", "a/one")],
        [file_of("a/real"), link_of("a/two", "a/one"), link_of("a/one", "a/real")],  # before what it points to
        [file_of("a/real"), link_of("a/real", "a/real")],
        [link_of("a/dir", ".", tarfile.SYMTYPE), file_of("a/dir/x")],
    ):
        archive = tar_of(tmp_path / "b.tar", wrong)
        with pytest.raises(StreamError, match=r"a link to no file|twice|as a file and as a folder"):
            unpack(archive, tmp_path / "no", limits=ROOMY)
        assert list((tmp_path / "no").iterdir()) == []


def test_nothing_is_written_through_a_link(tmp_path):
    """The classic: a link to a folder outside, then a file below it."""
    (tmp_path / "outside").mkdir()
    for target in (str(tmp_path / "outside"), "../../outside", "/tmp"):
        members = [link_of("a/door", target, tarfile.SYMTYPE), file_of("a/door/x", b"out")]
        refused(tar_of(tmp_path / "a.tar", members), tmp_path / "deep" / "to", "leaves the folder")
    assert list((tmp_path / "outside").iterdir()) == []


def test_modes_owners_and_times_are_not_taken_over(tmp_path):
    info, data = file_of("a/tool", b"#!/bin/sh")
    info.mode, info.uid, info.gid, info.mtime = 0o6777, 1234, 1234, 1
    folder = tarfile.TarInfo("a/open")
    folder.type, folder.mode = tarfile.DIRTYPE, 0o7777
    unpack(tar_of(tmp_path / "a.tar", [(info, data), (folder, b"")]), tmp_path / "to", limits=ROOMY)
    found = (tmp_path / "to" / "a" / "tool").stat()
    assert stat.S_IMODE(found.st_mode) & 0o7111 == 0 and found.st_uid == os.getuid() and found.st_mtime > 1000
    assert stat.S_IMODE((tmp_path / "to" / "a" / "open").stat().st_mode) & 0o7002 == 0
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as members:
        entry = zipfile.ZipInfo("tool")
        entry.external_attr = (stat.S_IFREG | 0o6777) << 16
        members.writestr(entry, b"x")
    unpack(tmp_path / "z.zip", tmp_path / "zipped", limits=ROOMY)
    assert stat.S_IMODE((tmp_path / "zipped" / "tool").stat().st_mode) & 0o7111 == 0


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V", b"M"])
def test_devices_and_unknown_kinds(tmp_path, kind):
    info = tarfile.TarInfo("a/null")
    info.type, info.devmajor, info.devminor = kind, 1, 3
    with pytest.raises(StreamError, match=r"a device or a pipe|holds no files"):
        unpack(tar_of(tmp_path / "a.tar", [(info, b"")]), tmp_path / "to", limits=ROOMY)
    assert list((tmp_path / "to").iterdir()) == []


def test_an_archive_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")  # is not waited for
    with pytest.raises(StreamError, match=r"pipe\.tar is not a file"):
        unpack(tmp_path / "pipe.tar", tmp_path / "to")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_that_are_no_tar(tmp_path, compress):
    (tmp_path / "x.tgz").write_bytes(compress(b"only a text, no archive" * 100))
    with pytest.raises(StreamError, match=r"x\.tgz is no archive; accepted: tar"):
        unpack(tmp_path / "x.tgz", tmp_path / "to", limits=ROOMY)


# ------------------------------------------------------------------- downloads
class Endless(http.server.BaseHTTPRequestHandler):
    """Sends without saying how much: /endless for ever, /long 3 MB; /liar announces 50 GB."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/liar":
            self.send_header("Content-Length", str(50 * 10**9))
        self.end_headers()
        try:
            for _ in range(3 if self.path == "/long" else 10_000):
                self.wfile.write(bytes(MB))
        except OSError:
            pass  # the reader has gone

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_downloads_are_bounded_while_they_come(address, tmp_path):
    with pytest.raises(DownloadError, match=r"/endless could not be fetched .*sends more than 5000000 bytes"):
        fetch(RemoteFile(f"{address}/endless", "x.bin"), tmp_path, max_size=5 * MB)
    with pytest.raises(DownloadError, match=r"sends more than 1000 bytes"):  # a known size is the bound
        fetch(RemoteFile(f"{address}/endless", "x.bin", size=1000), tmp_path)
    with pytest.raises(DownloadError, match=r"announces 50000000000 bytes instead of 20000000000"):
        fetch(RemoteFile(f"{address}/liar", "x.bin"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    content = bytes(3 * MB)
    file = RemoteFile(f"{address}/long", "x.bin", hashlib.md5(content).hexdigest())
    assert fetch(file, tmp_path, max_size=3 * MB).read_bytes() == content


def test_a_download_needs_room(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(bytes(2000))
    usage = downloads.shutil._ntuple_diskusage(10**9, 10**9 - 1500, 1500)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="it has 2000 bytes, and 1500 are free there"):
        fetch(RemoteFile((tmp_path / "source").as_uri(), "x.bin"), tmp_path / "to")
