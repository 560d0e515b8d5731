"""Image files of strangers, in every place that opens them: bounded before they are decoded, of named formats only."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import struct
import subprocess
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from avalanche_firn.benchmarks import image_bounds
from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.huggingface import HubImages
from avalanche_firn.benchmarks.image_bounds import IMAGE_FORMATS, MAX_BYTES, MAX_PIXELS, bounded_image, open_regular
from avalanche_firn.benchmarks.image_files import ImageFiles, check_files, list_classes
from avalanche_firn.benchmarks.streams import StreamError

Error = (StreamError, ValueError)  # the example raises the second


def _pretrain() -> Any:
    path = Path(__file__).parents[2] / "examples" / "pretrain.py"
    spec = importlib.util.spec_from_file_location("firn_pretrain_images", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Silent:
    def update(self) -> None: ...


def as_file(path: Path) -> Any:
    return ImageFiles([str(path)], [0])[0][0]


def checked(path: Path) -> Any:
    return check_files({"c": [path]}, {"c": 0}, Silent())


def in_memory(path: Path) -> Any:
    return read_class_images({"c": [path]}, size=4, mode="RGB")


class Rows:
    """A split of the `datasets` library, as far as `HubImages` looks at it."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.features = {"image": type("Image", (), {"decode": False})()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.row}


def of_the_hub(path: Path) -> Any:
    return HubImages(Rows({"bytes": path.read_bytes(), "path": None}), "image", [0], [0])[0][0]


def of_the_hub_by_path(path: Path) -> Any:
    return HubImages(Rows({"bytes": None, "path": str(path)}), "image", [0], [0])[0][0]


def in_the_example(path: Path) -> Any:
    for folder in ("a", "b"):
        (path.parent / "tree" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (4, 4)).save(path.parent / "tree" / folder / f"{i}.png")
    path.rename(path.parent / "tree" / "a" / "strange.png")
    return _pretrain().load_folder(path.parent / "tree", 4)


PLACES = [as_file, checked, in_memory, of_the_hub, of_the_hub_by_path, in_the_example]
places = pytest.mark.parametrize("read", PLACES)


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A pipe that is waited for ends the test instead of the suite."""

    def ring(*_: object) -> None:
        raise AssertionError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_frame_that_is_larger_than_the_header_said(monkeypatch):
    """Of a GIF, whose later frames may reach beyond its picture."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    content = bytearray(buffer.getvalue())
    second = content.rindex(b"\x2c\0\0\0\0")  # of the frame: its place, width and height
    struct.pack_into("<HH", content, second + 5, 100, 100)
    monkeypatch.setattr(image_bounds, "MAX_PIXELS", 5000)
    with (
        pytest.raises(ValueError, match=r"10,000 pixels \(100 x 100\); accepted: at most 5,000"),
        bounded_image(bytes(content)) as image,
    ):
        image.seek(1)
    with bounded_image(bytes(content)) as image:
        assert image.size == (4, 4)


# ----------------------------------------------------------------- made images
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(form: str, image: Image.Image | None = None, **options: Any) -> bytearray:
    buffer = io.BytesIO()
    (Image.new("RGB", (8, 8), (10, 20, 30)) if image is None else image).save(buffer, format=form, **options)
    return bytearray(buffer.getvalue())


def huge(form: str, edge: int) -> bytes:
    """A small file of that format whose header announces edge x edge pixels."""
    data = saved(form)
    if form == "PNG":
        return png(edge, edge)
    if form == "PPM":
        return b"P6\n%d %d\n255\n" % (edge, edge) + bytes(64)
    if form == "BMP":
        struct.pack_into("<ii", data, 18, edge, edge)
    elif form == "GIF":
        struct.pack_into("<HH", data, 6, edge, edge)
    elif form == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        struct.pack_into(">HH", data, place, edge, edge)
    elif form == "TIFF":
        first = struct.unpack_from("<I", data, 4)[0]
        for i in range(struct.unpack_from("<H", data, first)[0]):
            place = first + 2 + 12 * i
            if struct.unpack_from("<H", data, place)[0] in (256, 257):
                struct.pack_into("<HII", data, place + 2, 4, 1, edge)
    elif form == "WEBP":
        place = data.index(b"VP8 ") + 14
        struct.pack_into("<HH", data, place, edge, edge)
    return bytes(data)


def written(folder: Path, data: bytes, name: str = "strange.png") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# ---------------------------------------------------------------------- bounds
@pytest.mark.parametrize("edge", [10_000, 16_000])  # Pillow warns at the first and raises at the second
@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_what_a_header_announces_is_bounded_before_decoding(tmp_path, form, edge, monkeypatch):
    assert MAX_PIXELS < 10_000**2 < 2 * MAX_PIXELS < 16_000**2

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    path = written(tmp_path, huge(form, edge))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings(record=True):
        for read in (as_file, checked, in_memory, of_the_hub):
            with pytest.raises(StreamError, match=rf"it announces {edge**2:,} pixels.*; accepted: at most 89,478,485"):
                read(path)
        warnings.simplefilter("error")  # Pillow's warning as an exception
        with pytest.raises(StreamError, match=rf"it announces {edge**2:,} pixels"):
            as_file(path)


@places
def test_every_place_names_file_size_and_bound(tmp_path, read):
    path = written(tmp_path, png(50_000, 40_000))
    with warnings.catch_warnings(), pytest.raises(Error, match=r"announces 2,000,000,000 pixels.*at most") as caught:
        warnings.simplefilter("ignore")
        read(path)
    assert ("row 0 of column 'image'" if "hub" in read.__name__ else "strange.png") in str(caught.value)


def test_the_bound_itself_is_accepted(tmp_path):
    with bounded_image(written(tmp_path, png(MAX_PIXELS, 1))) as image:
        assert image.size == (MAX_PIXELS, 1)
    with pytest.raises(ValueError, match="89,478,486 pixels"), bounded_image(png(MAX_PIXELS + 1, 1)):
        pass
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS  # where Pillow warns


def test_a_user_that_lifts_pillows_bound_does_not_lift_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(StreamError, match="announces 400,000,000 pixels"):
        as_file(written(tmp_path, png(20_000, 20_000)))


@pytest.mark.parametrize("read", [as_file, checked, in_memory, of_the_hub_by_path])
def test_the_bytes_of_a_file_are_bounded(tmp_path, read):
    path = written(tmp_path, png(4, 4))
    os.truncate(path, MAX_BYTES + 1)  # holes: nothing is written, and nothing may be read
    with pytest.raises(StreamError, match=r"it has 268,435,457 bytes; accepted: at most 268,435,456"):
        read(path)


@places
def test_texts_and_profiles_inside_are_bounded(tmp_path, read):
    """Compressed texts of 5 MB, a colour profile of 5 MB, and 80 texts of a megabyte, in files of 5 to 90 kB."""
    zeros = zlib.compress(bytes(5 * 10**6))
    megabyte = zlib.compress(bytes(10**6))
    extras = [
        chunk(b"zTXt", b"Comment\0\0" + zeros),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros),
        chunk(b"iCCP", b"profile\0\0" + zeros),
        b"".join(chunk(b"zTXt", b"k%d\0\0" % i + megabyte) for i in range(80)),
    ]
    for extra in extras if read is as_file else extras[:1]:
        path = written(tmp_path, png(4, 4, extra=extra, pixels=bytes(4 * 13)))
        assert path.stat().st_size < 100_000
        tracemalloc.start()
        with pytest.raises(Error, match=r"strange\.png|row 0"):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 70 * 2**20


# --------------------------------------------------------------------- formats
@places
def test_formats_are_told_by_the_content(tmp_path, read, monkeypatch):
    """An EPS file called .png would have Pillow start Ghostscript."""

    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "call", started)
    others = {form: bytes(saved(form)) for form in ("EPS", "ICO", "SGI", "TGA", "PCX", "IM")}
    others |= {"text": b"<html>404</html>", "nothing": b"", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    for data in others.values():
        path = written(tmp_path, data)
        with pytest.raises(Error, match="no image of a known format; accepted: BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
            read(path)


@pytest.mark.parametrize("form", IMAGE_FORMATS)
@pytest.mark.parametrize("read", [as_file, of_the_hub])
def test_accepted_formats_are_read_whatever_their_name(tmp_path, form, read):
    image = read(written(tmp_path, bytes(saved(form))))
    assert image.mode == "RGB" and image.size == (8, 8)
    assert np.abs(np.asarray(image).astype(int) - (10, 20, 30)).max() <= 12  # JPEG and WebP lose some


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("read", [as_file, of_the_hub])
def test_the_first_frame_of_an_animation_is_used(tmp_path, form, read):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(form, frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3  # else this test says nothing
    assert read(written(tmp_path, bytes(data))).getpixel((3, 3)) == (200, 0, 0)


# ----------------------------------------------------------------------- modes
@pytest.mark.parametrize("read", [as_file, of_the_hub])
def test_modes_become_rgb_as_documented(tmp_path, read):
    def pixel(data: bytes | bytearray) -> tuple[int, ...]:
        image = read(written(tmp_path, bytes(data)))
        assert image.mode == "RGB"
        return image.getpixel((1, 1))

    assert pixel(saved("PNG", Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(saved("PNG", Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(saved("PNG", Image.new("RGBA", (4, 4), (9, 8, 7, 0)))) == (9, 8, 7)  # transparent: the colour below
    assert pixel(saved("PNG", Image.new("LA", (4, 4), (50, 3)))) == (50, 50, 50)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 11, 22, 33])
    assert pixel(saved("PNG", palette, transparency=1)) == (11, 22, 33)
    # CMYK: 255 - min(255, C + K) per channel as Pillow has it, no profile
    found = pixel(saved("TIFF", Image.new("CMYK", (4, 4), (55, 105, 155, 0))))
    assert found == (200, 150, 100)
    deep = png(4, 4, depth=16, pixels=(b"\0" + b"\x12\xff\x34\xff\x56\xff" * 4) * 4)
    assert pixel(deep) == (0x12, 0x34, 0x56)  # the upper 8 of 16 bits


@places
def test_deep_greys_and_floats_are_refused(tmp_path, read):
    values = np.full((4, 4), 40_000)
    grey = saved("PNG", Image.fromarray(values.astype(np.uint16)))
    floats = saved("TIFF", Image.fromarray(values.astype(np.float32)))
    for data in (grey, floats):
        with pytest.raises(Error, match=r"pixels of mode (I;16|F); accepted: 8 bits per channel or fewer"):
            read(written(tmp_path, bytes(data)))


# ----------------------------------------------------------------- not a file
def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def gone(path: Path) -> None:
    path.symlink_to(path.parent / "absent")


@pytest.mark.parametrize("swap", [pipe, folder, device, gone])
@pytest.mark.parametrize("read", [as_file, checked, in_memory, of_the_hub_by_path])
def test_a_file_that_became_something_else(tmp_path, swap, read):
    """Listed as a file, then exchanged: refused at once, by name."""
    path = tmp_path / "data" / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(path)
    (listed,) = list_classes(tmp_path / "data")["cat"]
    assert read(listed) is not None
    path.unlink()
    swap(path)
    with pytest.raises(StreamError) as caught:
        read(listed)
    assert ("row 0" if read is of_the_hub_by_path else str(path)) in str(caught.value)
    if swap is not gone:
        assert "it is a folder, a pipe or a device; accepted: a file" in str(caught.value)


def test_a_link_to_a_file_is_followed(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert as_file(tmp_path / "link.png").getpixel((0, 0)) == (1, 2, 3)


def test_no_handle_stays_open(tmp_path):
    path, before = written(tmp_path, b"no image"), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(StreamError):
            as_file(path)
        with pytest.raises(OSError):
            open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------ fuzz
SOURCES = {form: bytes(saved(form, Image.effect_noise((24, 24), 80).convert("RGB"))) for form in IMAGE_FORMATS}


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(IMAGE_FORMATS),
    cut=st.integers(0, 4000),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=6)), max_size=5),
)
def test_damaged_bytes_give_an_image_or_an_error_that_is_named(form, cut, changes):
    data = bytearray(SOURCES[form])
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new
    data = data[: len(data) - cut % (len(data) + 1)] if cut % 3 == 0 else data
    images = HubImages(Rows({"bytes": bytes(data), "path": None}), "image", [0], [0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = images[0][0]
        except StreamError as error:
            assert str(error).startswith("row 0 of column 'image' cannot be decoded: ")
        else:
            assert image.mode == "RGB" and image.size[0] * image.size[1] <= MAX_PIXELS


def test_errors_of_the_loop_itself_are_not_taken_for_broken_images():
    """Out of memory, and an interrupt, go on as what they are."""
    assert not any(issubclass(kind, image_bounds.BROKEN_IMAGE) for kind in (MemoryError, KeyboardInterrupt, SystemExit))


def test_every_opening_of_an_image_goes_through_the_bounds():
    """No other call of Pillow's in the package and the examples."""
    root, found = Path(__file__).parents[2], []
    opening: Callable[[str], bool] = lambda line: "Image.open(" in line and "TensorImage" not in line  # noqa: E731
    for folder_name in ("models", "benchmarks", "plugins", "evaluation", "strategies", "experiments", "examples"):
        for path in sorted((root / folder_name).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{path.name}: {line.strip()}" for line in lines if opening(line)]
    assert found == ["image_bounds.py: return Image.open(file, formats=IMAGE_FORMATS)"]
