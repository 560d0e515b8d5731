"""Fetching and unpacking: whole or absent, never half, and nothing outside the folder."""

import hashlib
import http.server
import io
import os
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from avalanche_firn.benchmarks import downloads
from avalanche_firn.benchmarks.downloads import (
    DownloadError,
    RemoteFile,
    default_root,
    download_words,
    fetch,
    locate,
    unpack,
)
from avalanche_firn.benchmarks.streams import StreamError

CONTENT = bytes(range(256)) * 40
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source" / "birds.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def of(source, **options):
    return RemoteFile(source.as_uri(), "birds.bin", **({"md5": MD5, "size": len(CONTENT)} | options))


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 5000 if self.path == "/cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """A server on this machine that sends all of it, breaks off, or has nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# ---------------------------------------------------------------------- fetch
@pytest.mark.parametrize("known", [{}, {"md5": None}, {"size": None}, {"md5": None, "size": None}])
def test_fetch_downloads_once(source, tmp_path, known):
    target = fetch(of(source, **known), tmp_path / "a" / "b")
    assert target == tmp_path / "a" / "b" / "birds.bin" and target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["birds.bin"]
    source.unlink()  # the second call needs no network
    assert fetch(of(source, **known), str(tmp_path / "a" / "b"), quiet=True) == target


def test_fetch_over_http(address, tmp_path):
    assert fetch(RemoteFile(f"{address}/whole", "x.bin", MD5), tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_that_is_there_is_left_alone(source, tmp_path):
    (tmp_path / "birds.bin").write_bytes(b"mine")
    mine = hashlib.md5(b"mine").hexdigest()
    with pytest.raises(StreamError, match=rf"birds\.bin has .*{mine} instead of {MD5}"):
        fetch(of(source, size=None), tmp_path)
    with pytest.raises(StreamError, match="has 4 bytes instead of 10240; remove it"):
        fetch(of(source, md5=None), tmp_path)
    assert (tmp_path / "birds.bin").read_bytes() == b"mine"
    (tmp_path / "d" / "birds.bin").mkdir(parents=True)
    with pytest.raises(StreamError, match="is not a file"):
        fetch(of(source), tmp_path / "d")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"md5": "0" * 32}, f"checksum {MD5} instead of {'0' * 32}"), ({"size": 3}, "10240 bytes instead of 3")],
)
def test_a_download_that_is_not_the_file_is_thrown_away(source, tmp_path, wrong, message):
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(of(source, **wrong), tmp_path / "to")
    assert source.as_uri() in str(caught.value) and f"save it as {tmp_path / 'to' / 'birds.bin'}" in str(caught.value)
    assert not list((tmp_path / "to").iterdir())


def test_unreachable_addresses_are_named(source, address, tmp_path):
    source.unlink()
    with pytest.raises(DownloadError, match=r"source/birds\.bin could not be fetched .*put the file there yourself"):
        fetch(of(source), tmp_path / "to")
    with pytest.raises(DownloadError, match=r"/absent could not be fetched .*404"):
        fetch(RemoteFile(f"{address}/absent", "x.bin"), tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_a_connection_that_breaks_is_noticed_without_a_checksum(address, tmp_path):
    with pytest.raises(DownloadError, match=r"ended after 5000 of 10240 bytes"):
        fetch(RemoteFile(f"{address}/cut", "x.bin"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_download_leaves_nothing(source, tmp_path, monkeypatch):
    class Interrupted(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise KeyboardInterrupt
            return super().read(100)

    response = Interrupted(CONTENT)
    response.headers = {}
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: response)
    with pytest.raises(KeyboardInterrupt):
        fetch(of(source), tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())
    monkeypatch.undo()
    assert fetch(of(source), tmp_path / "to").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"could not be fetched into .*file/birds"):
        fetch(of(source), tmp_path / "file")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "ftp://x/y"}, "url is 'ftp://x/y'; accepted"),
        ({"name": "../y"}, r"name is '\.\./y'; accepted"),
        ({"name": ""}, "name is ''"),
        ({"md5": "ABC"}, "md5 of y is 'ABC'; accepted: 32"),
        ({"size": -1}, "size of y is -1"),
    ],
)
def test_remote_files_are_checked(wrong, message):
    with pytest.raises(StreamError, match=message):
        RemoteFile(**({"url": "https://x/y", "name": "y"} | wrong))


def test_words_and_places():
    text = download_words("Cars", reason="its address is dead", source="https://x", place=Path("/data"))
    assert all(word in text for word in ("Cars", "its address is dead", "https://x", "/data"))
    assert default_root("cub").name == "cub"


# --------------------------------------------------------------------- unpack
FILES = {"birds/one.txt": b"one", "birds/deep/two.txt": b"two", "notes.txt": b"about birds"}


def write_tar(path, files, mode="w:gz", members=()):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o4777
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def write_zip(path, files, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        for name, data in files.items():
            members.writestr(name, data)
        for name, target, kind in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o777) << 16
            members.writestr(info, target)
    return path


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_unpack(tmp_path, kind):
    archive = tmp_path / "a.bin"  # the content counts, not the name
    write_zip(archive, FILES) if kind == "zip" else write_tar(archive, FILES, kind)
    to = tmp_path / "to"
    unpack(archive, to)
    assert tree(to) == FILES and sorted(path.name for path in to.iterdir()) == ["birds", "notes.txt"]
    assert stat.S_IMODE((to / "notes.txt").stat().st_mode) & 0o7111 == 0  # modes of the archive aren't taken over


def test_marker_says_that_nothing_is_to_be_done(tmp_path):
    archive = write_tar(tmp_path / "a.tgz", FILES)
    unpack(archive, tmp_path / "to", marker="birds/deep")
    archive.unlink()
    unpack(archive, tmp_path / "to", marker="birds/deep")
    with pytest.raises(StreamError, match=r"a\.tgz is absent; accepted: an archive"):
        unpack(archive, tmp_path / "to")
    write_tar(archive, FILES)
    with pytest.raises(StreamError, match="holds 'birds' and no 'cats'"):
        unpack(archive, tmp_path / "other", marker="cats")
    assert not list((tmp_path / "other").iterdir())


def test_moving_is_interrupted_and_done_again(tmp_path, monkeypatch):
    """What holds the marker is moved last, and what was moved before is no obstacle."""
    archive, to = write_tar(tmp_path / "a.tgz", FILES), tmp_path / "to"
    replace, moved = os.replace, []

    def once(old, new):
        if moved:
            raise KeyboardInterrupt
        moved.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(downloads.os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, to, marker="birds")
    assert moved == ["notes.txt"] and [path.name for path in to.iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    unpack(archive, to, marker="birds")
    assert tree(to) == FILES


def test_what_is_there_is_never_mixed_or_overwritten(tmp_path):
    archive = write_tar(tmp_path / "a.tgz", FILES)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "notes.txt").write_text("my own")
    with pytest.raises(StreamError, match=r"to/notes\.txt is there already and not the same"):
        unpack(archive, tmp_path / "to")
    (tmp_path / "to" / "notes.txt").unlink()
    (tmp_path / "to" / "birds").mkdir()
    with pytest.raises(StreamError, match="to/birds is there already"):
        unpack(archive, tmp_path / "to")
    assert not tree(tmp_path / "to")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "birds/../../x", "..", "C:/x", "a\\..\\..\\x", "birds/../x"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_paths_that_leave_the_folder(tmp_path, name, kind):
    files = {"birds/one.txt": b"one", name: b"out"}
    archive = write_zip(tmp_path / "a", files) if kind == "zip" else write_tar(tmp_path / "a", files)
    with pytest.raises(StreamError, match="which leaves the folder; accepted"):
        unpack(archive, tmp_path / "deep" / "to")
    assert sorted(tree(tmp_path)) == ["a"]


@pytest.mark.parametrize("target", ["../../x", "/etc/passwd", "../../../x"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, "zip"])
def test_links_that_leave_the_folder(tmp_path, target, kind):
    if kind == "zip":
        archive = write_zip(tmp_path / "a", FILES, [("birds/link", target, stat.S_IFLNK)])
    else:
        archive = write_tar(tmp_path / "a", FILES, members=[("birds/link", kind, target)])
    with pytest.raises(StreamError, match="which leaves the folder"):
        unpack(archive, tmp_path / "to")
    assert sorted(tree(tmp_path)) == ["a"]


def test_links_to_files_become_copies(tmp_path):
    members = [("birds/soft", tarfile.SYMTYPE, "../birds/one.txt"), ("hard", tarfile.LNKTYPE, "birds/deep/two.txt")]
    unpack(write_tar(tmp_path / "a", FILES, members=members), tmp_path / "to")
    assert tree(tmp_path / "to") == FILES | {"birds/soft": b"one", "hard": b"two"}
    assert not any(path.is_symlink() for path in (tmp_path / "to").rglob("*"))
    unpack(write_zip(tmp_path / "z", FILES, [("soft", "notes.txt", stat.S_IFLNK)]), tmp_path / "zipped")
    assert (tmp_path / "zipped" / "soft").read_bytes() == b"about birds"


@pytest.mark.parametrize(
    "member", [("birds/link", tarfile.SYMTYPE, "."), ("link", tarfile.SYMTYPE, "link"), ("l", tarfile.LNKTYPE, "no")]
)
def test_links_to_folders_and_to_nothing_are_refused(tmp_path, member):
    with pytest.raises(StreamError, match="a link to no file; accepted"):
        unpack(write_tar(tmp_path / "a", FILES, members=[member]), tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_devices_and_pipes(tmp_path):
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        with pytest.raises(StreamError, match="'birds/x', a device or a pipe"):
            unpack(write_tar(tmp_path / "a", FILES, members=[("birds/x", kind, "")]), tmp_path / "to")
    with pytest.raises(StreamError, match="'x', a device or a pipe"):
        unpack(write_zip(tmp_path / "a", FILES, [("x", "", stat.S_IFIFO)]), tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_damaged_archives_leave_nothing(tmp_path, kind):
    noise = {"birds/noise": os.urandom(60_000)} | FILES
    archive = tmp_path / "a.bin"
    write_zip(archive, noise) if kind == "zip" else write_tar(archive, noise, kind)
    data = bytearray(archive.read_bytes())
    if kind == "zip":
        data[30_000] ^= 255  # its index is at the end: damage instead of a cut
    archive.write_bytes(data if kind == "zip" else data[:30_000])
    with pytest.raises(StreamError, match=r"a\.bin could not be unpacked|a\.bin is no archive"):
        unpack(archive, tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())


def test_what_is_no_archive_or_empty(tmp_path):
    (tmp_path / "page.tgz").write_text("<html>404</html>")
    with pytest.raises(StreamError, match=r"page\.tgz is no archive; accepted: tar"):
        unpack(tmp_path / "page.tgz", tmp_path / "to")
    with pytest.raises(StreamError, match="is not a file; accepted: an archive"):
        unpack(tmp_path, tmp_path / "to")
    with pytest.raises(StreamError, match="holds no files"):
        unpack(write_zip(tmp_path / "z", {"__MACOSX/._x": b"x"}), tmp_path / "to")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StreamError, match="could not be unpacked"):
        unpack(write_tar(tmp_path / "t", FILES), tmp_path / "file")


# --------------------------------------------------------------------- locate
def test_locate_finds_one_of_both_layouts(tmp_path, monkeypatch):
    def is_tree(path):
        return (path / "notes.txt").is_file()

    archive = write_tar(tmp_path / "birds.tgz", FILES)
    remote = RemoteFile(archive.as_uri(), "birds.tgz")
    root = tmp_path / "root"
    assert locate(root, "birds", is_tree, archive=remote) is None and not root.exists()
    assert locate(root, "birds", is_tree, download=True) is None  # nothing is known to download
    assert locate(root, "birds", lambda path: False, archive=remote, download=True) == root / "birds"
    archive.unlink()
    monkeypatch.setattr(downloads, "default_root", lambda name: root)
    assert locate(None, "birds", lambda path: False, archive=remote, download=True) == root / "birds"
    with pytest.raises(StreamError, match=r"root/birds stands in .*accepted: one of them"):
        locate(root, "birds", is_tree)
    (root / "birds").rename(root / "other")
    assert locate(str(root), "birds", is_tree) == root
