"""Streams from lists of files: parts, order, drawn validation, fingerprints and refusals."""

import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks.domains import domain_folder_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.listed import listed_domain_stream, listed_stream
from avalanche_firn.benchmarks.streams import StreamError, class_order, stratified_split

NAMES = ("ant", "bee", "cow")


def train_transform(image):
    return pil_to_tensor(image).float()


def eval_transform(image):
    return pil_to_tensor(image).float() + 1000


def draw(root, path, label, number):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (label, number, 9)).save(root / path)
    return path, label


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def files(root):
    """Six training and two test images per class, listed in a mixed order."""
    mixed = np.random.RandomState(0).permutation(18)
    train = [draw(root, f"{NAMES[n % 3]}/{n:02d}.png", n % 3, n) for n in mixed.tolist()]
    test = [draw(root, f"test/{n:02d}.png", n % 3, n) for n in range(100, 106)]
    return {"train": train, "test": test}


def build(root, files, **options):
    settings = {"class_names": NAMES, "tasks": 3, "train_transform": train_transform, "eval_transform": eval_transform}
    return listed_stream("mine", root, files=files, **(settings | options))


def samples(stream, part):
    """(label in the pixels, number in the pixels, target) of every sample, in order."""
    return [
        (int(x[0, 0, 0]) % 1000, int(x[1, 0, 0]) % 1000, y)
        for experience in getattr(stream, part)
        for x, y, _ in experience.dataset
    ]


def test_parts_order_and_names(root, files):
    stream = build(root, files, tasks=[1, 2], class_order=["cow", "ant", "bee"])
    assert (stream.name, stream.class_names, stream.class_order) == ("mine", NAMES, (2, 0, 1)) and stream.valid is None
    assert [set(e.classes_in_this_experience) for e in stream.train] == [{2}, {0, 1}]
    numbers = [int(path[-6:-4]) for path, _ in files["train"]]
    assert [n for _, n, _ in samples(stream, "train") if n % 3 == 2] == [n for n in numbers if n % 3 == 2]
    assert sorted(samples(stream, "train")) == sorted((n % 3, n, n % 3) for n in range(18))
    assert sorted(samples(stream, "test")) == sorted((n % 3, n, n % 3) for n in range(100, 106))
    assert stream.test[0].dataset[0][0].min() >= 1000
    assert build(root, files, seed=5).class_order == class_order(3, 5)


def test_validation_is_drawn_per_class(root, files):
    stream = build(root, files, validation_fraction=1 / 3, split_seed=3)
    assert Counter(y for *_, y in samples(stream, "valid")) == {0: 2, 1: 2, 2: 2}
    labels = [label for _, label in files["train"]]
    rows = stratified_split(labels, validation_fraction=1 / 3, test_fraction=0, seed=3).valid
    expected = {int(files["train"][i][0][-6:-4]) for i in rows}
    assert {n for _, n, _ in samples(stream, "valid")} == expected
    assert {n for _, n, _ in samples(stream, "train")} == set(range(18)) - expected
    assert stream.fingerprint != build(root, files).fingerprint
    assert stream.fingerprint != build(root, files, validation_fraction=1 / 3, split_seed=4).fingerprint


def test_listed_validation_is_kept(root, files):
    valid = [draw(root, f"v{n}.png", n % 3, n) for n in range(200, 203)]
    stream = build(root, files | {"valid": valid}, validation_fraction=0.5)
    assert [n for _, n, _ in samples(stream, "valid")] == [200 + (c - 200) % 3 for c in range(3)]
    assert len(samples(stream, "train")) == 18


def test_same_images_as_the_folder_stream(root, files):
    """The lists of a folder give the stream that the folder gives."""
    for part, listed in files.items():
        for path, label in listed:
            new = root.parent / "folder" / part / NAMES[label] / os.path.basename(path)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes((root / path).read_bytes())
    settings = {"tasks": 3, "train_transform": train_transform, "eval_transform": eval_transform}
    folder = folder_stream(root.parent / "folder", validation_fraction=0.4, **settings)
    ordered = {part: sorted(listed, key=lambda pair: pair[::-1]) for part, listed in files.items()}
    listed = build(root, ordered, validation_fraction=0.4)
    for part in ("train", "valid", "test"):
        assert samples(listed, part) == samples(folder, part)


def test_fingerprint(root, files):
    before = build(root, files).fingerprint
    assert build(root, files, seed=4, tasks=1).fingerprint == before
    root.rename(root.parent / "moved")
    root = root.parent / "moved"
    assert build(root, files).fingerprint == before
    turned = files | {"train": files["train"][::-1]}
    assert build(root, turned).fingerprint != before
    (path, label), *rest = files["train"]
    assert build(root, files | {"train": [(path, (label + 1) % 3), *rest]}).fingerprint != before
    with open(root / path, "ab") as file:
        file.write(b"x")
    assert build(root, files).fingerprint != before


def test_files_are_not_opened_before_they_are_read(root, files):
    broken, label = files["train"][0]
    (root / broken).write_bytes(b"no image")
    stream = build(root, files)
    data = stream.train[stream.class_order.index(label)].dataset
    with pytest.raises(StreamError, match=f"{broken} cannot be decoded"):
        [data[i] for i in range(len(data))]


def refused(message, root, files, **options):
    with pytest.raises(StreamError, match=message):
        build(root, files, **options)


def test_refuses_files_that_are_not_there(root, files):
    for path, _ in files["train"][:5]:
        (root / path).unlink()
    (root / files["train"][5][0]).unlink()
    (root / files["train"][5][0]).mkdir()
    first = ", ".join(path for path, _ in files["train"][:3])
    refused(f"mine: 6 of 24 listed files are not in .*data: {first} and 3 more", root, files)
    refused("nowhere is absent", root / "nowhere", files)
    refused("png is not a folder", root / files["test"][0][0], files)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.png", "ant/../x.png", "./x.png", "ant//x.png", "a\\b.png", "", ".", ".."]
)
def test_refuses_paths_that_leave_the_root(root, files, path):
    refused("'train' of files lists .*accepted: a path relative", root, files | {"train": [(path, 0), *files["train"]]})


def test_refuses_lists_that_do_not_fit(root, files):
    train, test = files["train"], files["test"]
    path = train[0][0]
    refused(f"'{path}' is listed in 'train' of files and again in 'train'", root, files | {"train": [*train, train[0]]})
    refused(f"'{path}' is listed in 'train' of files and again in 'test'", root, files | {"test": [*test, train[0]]})
    refused("has the parts 'train'; accepted: 'train' and 'test'", root, {"train": train})
    refused("has the parts 'train', 'test', 'dev'", root, files | {"dev": test})
    refused(r"gives 'x\.png' the class 3; accepted: 0\.\.2", root, files | {"test": [*test, ("x.png", 3)]})
    refused(r"gives 'x\.png' the class -1", root, files | {"test": [*test, ("x.png", -1)]})
    refused(r"gives 'x\.png' the class True", root, files | {"test": [*test, ("x.png", True)]})
    refused("classes 'bee', 'cow' without files in 'test'", root, files | {"test": [p for p in test if p[1] == 0]})
    refused("class 'ant' without files in 'train'", root, files | {"train": [p for p in train if p[1] != 0]})
    refused("class 'bee' without files in 'valid'", root, files | {"test": test[:3], "valid": test[4:]})


def test_refuses_names_orders_and_fractions(root, files):
    refused("class_names holds 'ant' twice", root, files, class_names=("ant", "ant", "bee"))
    refused("class_names is 'abc'", root, files, class_names="abc")
    refused("unknown classes 'yak'", root, files, class_order=["ant", "bee", "yak"])
    refused("tasks is 4", root, files, tasks=4)
    refused("validation_fraction is 1.5", root, files, validation_fraction=1.5)
    few = [next(pair for pair in files["train"] if pair[1] == c) for c in range(3)]
    refused(r"class 'ant' has 1 image\(s\)", root, files | {"train": few}, validation_fraction=0.5)
    refused("train_transform is None", root, files, train_transform=None)


# -------------------------------------------------------------------- domains
@pytest.fixture
def domains(root):
    """photo knows all classes, sketch lacks the ant in both parts and has a test image of it."""
    found = {}
    for d, (domain, held) in enumerate({"photo": (0, 1, 2), "sketch": (1, 2)}.items()):
        train = [draw(root, f"{domain}/{c}{n}.png", c, 10 * d + n) for n in range(4) for c in held]
        found[domain] = {"train": train, "test": [draw(root, f"{domain}/t{c}.png", c, 10 * d + 9) for c in (0, 2)]}
    return found


def build_domains(root, domains, **options):
    settings = {"class_names": NAMES, "train_transform": train_transform, "eval_transform": eval_transform}
    return listed_domain_stream("mine", root, domains=domains, **(settings | options))


def test_one_experience_per_domain_in_the_given_order(root, domains):
    stream = build_domains(root, {"sketch": domains["sketch"], "photo": domains["photo"]})
    assert stream.class_order == (1, 2, 0) and stream.task_sizes == (2, 3) and stream.valid is None
    assert [e.classes_in_this_experience for e in stream.train] == [{1, 2}, {0, 1, 2}]
    assert [e.classes_in_this_experience for e in stream.test] == [{0, 2}, {0, 2}]
    for e, domain in zip(stream.train, ("sketch", "photo"), strict=True):
        numbers = [int(x[1, 0, 0]) for x, _, _ in e.dataset]
        assert numbers == [10 * (domain == "sketch") + int(path[-5]) for path, _ in domains[domain]["train"]]
    other = build_domains(root, domains)
    assert other.fingerprint != stream.fingerprint and other.class_order == (0, 1, 2)


def test_validation_of_domains_is_drawn_in_each(root, domains):
    stream = build_domains(root, domains, validation_fraction=0.25)
    assert [Counter(y for _, y, _ in e.dataset) for e in stream.valid] == [{0: 1, 1: 1, 2: 1}, {1: 1, 2: 1}]
    assert [len(e.dataset) for e in stream.train] == [9, 6]
    listed = {domain: parts | {"valid": parts["test"][:1]} for domain, parts in domains.items()}
    for parts in listed.values():
        parts["test"] = parts["test"][1:]
    stream = build_domains(root, listed, validation_fraction=0.25)
    assert [len(e.dataset) for e in stream.valid] == [1, 1] and [len(e.dataset) for e in stream.train] == [12, 8]


def test_same_images_as_the_folder_of_domains(root, domains):
    folder = root.parent / "folder"
    for domain, parts in domains.items():
        for part, listed in parts.items():
            for path, label in listed:
                new = folder / domain / part / NAMES[label] / os.path.basename(path)
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes((root / path).read_bytes())
    settings = {"train_transform": train_transform, "eval_transform": eval_transform, "validation_fraction": 0.25}
    expected = domain_folder_stream(folder, **settings)
    ordered = {
        domain: {part: sorted(listed, key=lambda pair: pair[::-1]) for part, listed in parts.items()}
        for domain, parts in domains.items()
    }
    stream = build_domains(root, ordered, validation_fraction=0.25)
    for part in ("train", "valid", "test"):
        assert samples(stream, part) == samples(expected, part)


def test_refuses_domains_that_do_not_fit(root, domains):
    def refuse(message, changed, **options):
        with pytest.raises(StreamError, match=message):
            build_domains(root, changed, **options)

    photo, sketch = domains["photo"], domains["sketch"]
    refuse("domains is empty", {})
    refuse("domain 'sketch' has the parts 'train'; accepted", domains | {"sketch": {"train": sketch["train"]}})
    refuse("'sketch' has the parts test, train, valid and 'photo'", domains | {"sketch": sketch | {"valid": []}})
    refuse("domain 'sketch' has no files in 'test'", domains | {"sketch": sketch | {"test": []}})
    refuse("is listed in 'train' of domain 'photo' and again in", domains | {"sketch": photo})
    refuse("class 'ant' without files in any domain's 'train'", {"sketch": sketch})
    refuse(
        r"domain 'photo': class 'ant' has 1 image\(s\)",
        {"photo": photo | {"train": photo["train"][:3]}},
        validation_fraction=0.5,
    )
    (root / sketch["test"][1][0]).unlink()
    refuse(r"1 of 24 listed files are not in .*data: sketch/t2\.png; accepted", domains)


def test_each_file_is_looked_up_once_and_none_is_opened(root, files, monkeypatch):
    stat, asked = os.stat, Counter()

    def counted(path, **options):
        asked[str(path)] += 1
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", counted)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    stream = build(root, files, validation_fraction=0.5)
    paths = [f"{root}/{path}" for listed in files.values() for path, _ in listed]
    assert {path: asked[path] for path in paths} == dict.fromkeys(paths, 1)
    assert sum(len(e.dataset) for part in (stream.train, stream.valid, stream.test) for e in part) == len(paths)
