"""DomainNet on a miniature tree in the public layout. Pixels say domain, class and number."""

import hashlib
import shutil
import zipfile
from collections import Counter

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import domainnet as module
from avalanche_firn.benchmarks.domainnet import (
    DOMAINNET_DOMAINS,
    DOMAINNET_IMAGES,
    domainnet_domain_stream,
    domainnet_stream,
)
from avalanche_firn.benchmarks.downloads import DownloadError
from avalanche_firn.benchmarks.streams import StreamError, class_order

CLASSES = ("aircraft_carrier", "The_Great_Wall", "t-shirt", "zigzag")  # not sorted: ids are the lists'
TRAIN, TEST = (1, 2, 3), (4, 5)  # numbers of the images of every class


def to_tensor(image):
    return pil_to_tensor(image).float()


def to_negative(image):
    return -to_tensor(image)


def file_of(domain, label, number):
    return f"{domain}/{CLASSES[label]}/{domain}_{label + 1:03d}_{number:06d}.png"


def write_tree(base, classes=(0, 1, 2, 3), numbers=TRAIN + TEST):
    for d, domain in enumerate(DOMAINNET_DOMAINS):
        for label in classes:
            for number in numbers:
                path = base / file_of(domain, label, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2, 2), (d + 1, label, number)).save(path)


def write_lists(base, folder="", lacking=(("painting", "train", 2), ("painting", "test", 3))):
    """The official lists, painting without a class as in the real ones."""
    for domain in DOMAINNET_DOMAINS:
        for part, numbers in (("train", TRAIN), ("test", TEST)):
            rows = [
                f"{file_of(domain, label, number)} {label}\n"
                for label in range(len(CLASSES))
                for number in numbers
                if (domain, part, label) not in lacking
            ]
            path = base / folder / f"{domain}_{part}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(rows))


@pytest.fixture
def root(tmp_path):
    write_tree(tmp_path / "data" / "domainnet")
    write_lists(tmp_path / "data" / "domainnet")
    return tmp_path / "data"


def build(root, **options):
    settings = {"tasks": 2, "train_transform": to_tensor, "eval_transform": to_tensor, "complete": False}
    return domainnet_stream(root, **{**settings, **options})


def build_domains(root, **options):
    settings = {"train_transform": to_tensor, "eval_transform": to_tensor, "complete": False}
    return domainnet_domain_stream(root, **{**settings, **options})


def samples(experience):
    """(domain, class and number in the pixels, target, task label) of every sample."""
    return [(*(int(v) for v in x[:, 0, 0]), int(y), int(t)) for x, y, t in experience.dataset]


def test_classes_come_in_the_numbering_of_the_lists_from_all_domains(root):
    stream = build(root)
    assert stream.name == "domainnet" and stream.class_names == CLASSES and stream.valid is None
    assert stream.class_order == (0, 1, 2, 3) and stream.task_sizes == (2, 2)
    for part, numbers, lacking in (("train", TRAIN, (3, 2)), ("test", TEST, (3, 3))):
        for i, classes in enumerate(((0, 1), (2, 3))):
            expected = {(d, c, n, c, 0) for d in range(1, 7) for c in classes for n in numbers if (d, c) != lacking}
            assert Counter(samples(stream.benchmark.streams[part][i])) == dict.fromkeys(expected, 1)


def test_some_domains_and_another_order_of_classes(root):
    stream = build(root, domains=["real", "clipart"], tasks=[1, 3], class_order=["zigzag", *CLASSES[:3]], name="two")
    assert stream.name == "two" and stream.class_order == (3, 0, 1, 2)
    assert {row[:2] for row in samples(stream.train[0])} == {(1, 3), (5, 3)}
    assert build(root, seed=5).class_order == class_order(4, 5)


def test_validation_part_is_drawn_over_all_domains(root):
    stream = build(root, validation_fraction=1 / 3, eval_transform=to_negative)
    train = Counter(row[3] for e in stream.train for row in samples(e))
    valid = Counter(row[3] for e in stream.valid for row in samples(e))
    assert train == {0: 12, 1: 12, 2: 10, 3: 12} and valid == {0: 6, 1: 6, 2: 5, 3: 6}
    assert all(row[0] < 0 for e in stream.valid for row in samples(e))
    assert stream.fingerprint not in (
        build(root).fingerprint,
        build(root, validation_fraction=1 / 3, split_seed=1).fingerprint,
    )


def test_domains_share_the_classes(root):
    stream = build_domains(root)
    assert stream.name == "domainnet-domains" and stream.class_names == CLASSES
    assert stream.task_sizes == (4, 4, 3, 4, 4, 4) and stream.valid is None
    for d, (train, test) in enumerate(zip(stream.train, stream.test, strict=True), start=1):
        assert {row[0] for row in samples(train)} == {row[0] for row in samples(test)} == {d}
        assert all(row[1] == row[3] and row[4] == 0 for row in samples(train) + samples(test))
        assert train.classes_in_this_experience == ({0, 1, 3} if d == 3 else {0, 1, 2, 3})
        assert test.classes_in_this_experience == ({0, 1, 2} if d == 3 else {0, 1, 2, 3})
    few = build_domains(root, domains=("sketch", "painting"), validation_fraction=1 / 3)
    assert [{row[0] for row in samples(e)} for e in few.train] == [{6}, {3}]
    assert [Counter(row[3] for row in samples(e)) for e in few.valid] == [{0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 1: 1, 3: 1}]


@pytest.mark.parametrize("folder", ["", "splits", "txt"])
@pytest.mark.parametrize("inside", [True, False])
def test_layouts(tmp_path, folder, inside):
    base = tmp_path / "d" / ("domainnet" if inside else "")
    write_tree(base)
    write_lists(base, folder)
    stream = build_domains(tmp_path / "d")
    assert [len(e.dataset) for e in stream.train] == [12, 12, 9, 12, 12, 12]


def test_order_of_the_file_system_and_place_do_not_matter(root, tmp_path):
    other = tmp_path / "other" / "domainnet"
    write_lists(other)
    write_tree(other, classes=(3, 1, 0, 2), numbers=(5, 2, 4, 1, 3))
    assert build(other).fingerprint == build(root).fingerprint
    assert samples(build(other).train[1]) == samples(build(root).train[1])
    assert build_domains(other).fingerprint == build_domains(root).fingerprint != build(root).fingerprint


def test_complete_demands_the_official_numbers(root, monkeypatch):
    with pytest.raises(StreamError, match=r"clipart_train\.txt lists 12 images; accepted: 33525, the cleaned version"):
        build(root, complete=True)
    with pytest.raises(StreamError, match=r"clipart_train\.txt lists 12 images"):
        build_domains(root, complete=True)
    monkeypatch.setattr(module, "DOMAINNET_IMAGES", dict.fromkeys(DOMAINNET_DOMAINS, (12, 8)) | {"painting": (9, 6)})
    with pytest.raises(StreamError, match=r"lists 4 classes; accepted: 345, or complete=False"):
        build(root, complete=True)
    monkeypatch.setattr(module, "DOMAINNET_CLASSES", 4)
    assert build(root, complete=True).num_classes == 4


def test_official_numbers():
    train, test = (sum(pair[i] for pair in DOMAINNET_IMAGES.values()) for i in (0, 1))
    assert (train, test, train + test) == (409832, 176743, 586575)


def test_painting_alone_lacks_classes(root):
    with pytest.raises(StreamError, match=r"class 't-shirt' without files in 'train'"):
        build(root, domains=["painting"])
    with pytest.raises(StreamError, match=r"class 't-shirt' without files in any domain's 'train'"):
        build_domains(root, domains=["painting"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("clipart/zigzag/a.png", "line 2, is 'clipart/zigzag/a.png'; accepted: 'clipart/CLASS/FILE NUMBER'"),
        ("real/zigzag/a.png 3", "line 2, is 'real/zigzag/a.png 3'"),
        ("clipart/a.png 3", "line 2, is 'clipart/a.png 3'"),
        ("clipart/zigzag/a.png -1", "line 2, is"),
        ("clipart/zag/a.png 0", "calls class 0 'zag', before it was 'aircraft_carrier'"),
        ("clipart/aircraft_carrier/a.png 4", "give 'aircraft_carrier' the ids 0 and 4"),
        ("clipart/zag/a.png 9", "have ids up to 9 and none is 4"),
        ("clipart/../a.png 4", r"lists 'clipart/\.\./a\.png'"),
    ],
)
def test_malformed_lists(root, line, message):
    path = root / "domainnet" / "clipart_train.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(StreamError, match=message):
        build(root)


def test_names_are_compared_over_domains(root):
    path = root / "domainnet" / "sketch_test.txt"
    path.write_text(path.read_text().replace("/zigzag/", "/zagzig/"))
    with pytest.raises(StreamError, match=r"sketch_test\.txt, line 7, calls class 3 'zagzig', before it was 'zigzag'"):
        build_domains(root)


def test_absent_things_are_named(root):
    base = root / "domainnet"
    (base / file_of("real", 1, 4)).unlink()
    (base / file_of("real", 1, 5)).unlink()
    with pytest.raises(StreamError, match=r"2 of 115 listed files are not in .*real/The_Great_Wall/real_002_000004"):
        build(root)
    (base / "quickdraw_test.txt").unlink()
    with pytest.raises(StreamError, match=r"quickdraw_test\.txt is absent; accepted: the official list, https://csr"):
        build(root)
    shutil.rmtree(base / "infograph")
    with pytest.raises(StreamError, match=r"infograph is absent; .*fetches https://csr.*/multi-source/infograph\.zip"):
        build_domains(root)
    with pytest.raises(StreamError, match=r"nowhere/domainnet/clipart is absent; .*groundtruth/clipart\.zip"):
        build(root / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["clipart", "photo"]}, "domains names 'photo'; accepted: some of clipart, infograph"),
        ({"domains": ["clipart", "clipart"]}, "domains names 'clipart' twice"),
        ({"domains": "clipart"}, "domains is 'clipart'"),
        ({"domains": ()}, r"domains is \(\)"),
        ({"eval_transform": None}, "eval_transform is None"),
        ({"validation_fraction": -0.1}, r"validation_fraction is -0\.1"),
        ({"split_seed": 2**32}, "seed of the split is 4294967296"),
    ],
)
def test_wrong_arguments_are_refused_first(tmp_path, options, message):
    for make in (build, build_domains):
        with pytest.raises(StreamError, match=message):
            make(tmp_path / "nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": 346}, r"tasks is 346; accepted: 1\.\.345"), ({"seed": -1}, "seed of the class or")],
)
def test_wrong_tasks_and_seeds_are_refused_before_a_download(tmp_path, options, message):
    with pytest.raises(StreamError, match=message):
        build(tmp_path / "nowhere", complete=True, download=True, **options)


def test_default_folder_is_avalanches(root, monkeypatch):
    monkeypatch.setattr(module, "default_root", lambda name: root / name)
    assert build(None).fingerprint == build(root).fingerprint


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_what_is_absent_is_fetched_and_unpacked(root, tmp_path, monkeypatch):
    expected = build(root, domains=["clipart", "real"]).fingerprint
    server = tmp_path / "server"
    sums = {}
    (server / "groundtruth").mkdir(parents=True)
    (server / "domainnet" / "txt").mkdir(parents=True)
    base = root / "domainnet"
    for domain, folder in (("clipart", "groundtruth"), ("real", "")):
        archive = server / folder / f"{domain}.zip"
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted((base / domain).rglob("*.png")):
                out.write(path, path.relative_to(base))
        lists = [server / "domainnet" / "txt" / f"{domain}_{part}.txt" for part in ("train", "test")]
        for path in lists:
            shutil.copy(base / path.name, path)
        sums[domain] = (f"{folder}/" if folder else "", md5(archive), *map(md5, lists))
    monkeypatch.setattr(module, "_BASE", server.as_uri())
    monkeypatch.setattr(module, "_ARCHIVES", sums)
    new = tmp_path / "new"
    options = {"domains": ["clipart", "real"], "download": True}
    assert build(new, **options).fingerprint == expected
    assert (new / "domainnet" / "clipart_train.txt").is_file() and not (new / "domainnet" / "sketch").exists()
    shutil.rmtree(server)  # nothing is asked for again
    assert build(new, **options).fingerprint == expected
    (new / "domainnet" / "real_test.txt").unlink()
    with pytest.raises(DownloadError, match=r"real_test\.txt could not be fetched"):
        build(new, **options)


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch):
    server = tmp_path / "server"
    (server / "groundtruth").mkdir(parents=True)
    (server / "groundtruth" / "clipart.zip").write_bytes(b"PK")
    monkeypatch.setattr(module, "_BASE", server.as_uri())
    with pytest.raises(DownloadError, match=r"MD5 checksum [0-9a-f]{32} instead of cd0d8f2d77a4e181449b78ed62bccf1e"):
        build(tmp_path / "new", domains=["clipart"], download=True)
    assert not (tmp_path / "new" / "domainnet" / "clipart.zip").exists()
