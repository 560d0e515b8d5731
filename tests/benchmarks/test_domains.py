"""Streams from folders of domain folders."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks.domains import build_domain_stream, domain_folder_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.tensors import TensorImageDataset
from avalanche_firn.evaluation.metrics import ResultMatrixMetric

CLASSES = ("ant", "bee", "cow", "dog")
DOMAINS = {"photo": ("bee", "dog"), "clipart": ("ant", "bee"), "sketch": ("ant", "bee", "cow")}


def train_transform(image):
    return pil_to_tensor(image).float()


def eval_transform(image):
    return pil_to_tensor(image).float() + 1000


def write_class(folder, domain, name, count, start=0):
    """Images of one colour (domain, class, number): a sample shows where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        colour = (list(DOMAINS).index(domain), CLASSES.index(name), number)
        Image.new("RGB", (2, 2), colour).save(folder / f"{number:03d}.png")


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "animals"
    for domain, names in DOMAINS.items():
        for name in names:
            write_class(root / domain / name, domain, name, 5)
    (root / "licence.txt").write_text("public domain")
    return root


@pytest.fixture
def parted(tmp_path):
    root = tmp_path / "animals"
    for domain, names in DOMAINS.items():
        for name in names:
            write_class(root / domain / "train" / name, domain, name, 3)
        write_class(root / domain / "val" / "bee", domain, "bee", 2, start=50)
        for name in ("bee", "cow"):  # no region is complete: photo trains no cow and tests no dog
            write_class(root / domain / "test" / name, domain, name, 1, start=100)
    return root


def build(root, **options):
    return domain_folder_stream(root, train_transform=train_transform, eval_transform=eval_transform, **options)


def samples(experience):
    """(domain in the pixels, class in the pixels, number in the pixels, target, task label) of every sample."""
    return [(*(int(v) % 1000 for v in x[:, 0, 0]), int(y), int(t)) for x, y, t in experience.dataset]


def test_drawn_parts_hold_every_image_once(flat):
    stream = build(flat)
    assert stream.name == "animals" and stream.class_names == CLASSES
    assert stream.class_order == (0, 1, 3, 2) and stream.num_classes == 4
    assert stream.task_sizes == (2, 2, 3)  # clipart, photo, sketch: sorted
    for i, domain in enumerate(sorted(DOMAINS)):
        code = list(DOMAINS).index(domain)
        found = Counter()
        for part, each in (("train", 3), ("valid", 1), ("test", 1)):
            rows = samples(stream.benchmark.streams[part][i])
            assert all(row[0] == code and row[1] == row[3] and row[4] == 0 for row in rows)
            assert Counter(CLASSES[row[3]] for row in rows) == dict.fromkeys(DOMAINS[domain], each)
            found.update(rows)
        assert len(found) == 5 * len(DOMAINS[domain]) and set(found.values()) == {1}


def test_given_order_of_domains_and_appearance_of_classes(flat):
    stream = build(flat, domains=["photo", "sketch", "clipart"])
    assert stream.class_order == (1, 3, 0, 2) and stream.task_sizes == (2, 3, 2)
    assert [e.classes_in_this_experience for e in stream.train] == [{1, 3}, {0, 1, 2}, {0, 1}]
    assert [e.previous_classes for e in stream.train] == [set(), {1, 3}, {0, 1, 2, 3}]
    for part in ("train", "valid", "test"):
        experiences = stream.benchmark.streams[part]
        assert [e.current_experience for e in experiences] == [0, 1, 2]
        assert [e.task_label for e in experiences] == [0, 0, 0]
        assert all(e.origin_stream is experiences for e in experiences)
    few = build(flat, domains=["photo", "clipart"])
    assert few.class_names == ("ant", "bee", "dog") and few.class_order == (1, 2, 0)


def test_part_folders_may_differ_in_classes(parted):
    stream = build(parted)
    assert [len(e.dataset) for e in stream.train] == [6, 6, 9]
    assert [Counter(row[3] for row in samples(e)) for e in stream.valid] == [{1: 2}] * 3
    assert [Counter(row[3] for row in samples(e)) for e in stream.test] == [{1: 1, 2: 1}] * 3
    shutil.rmtree(parted / "sketch" / "train" / "cow")
    with pytest.raises(StreamError, match="class 'cow' has no training images in any domain"):
        build(parted)


def test_drawn_split_of_a_domain_is_that_of_its_folder(flat):
    """One domain's split doesn't depend on the others: it is what `folder_stream` draws from that folder."""
    stream = build(flat, split_seed=4)
    alone = folder_stream(
        flat / "sketch", tasks=1, train_transform=train_transform, eval_transform=eval_transform, split_seed=4
    )
    for part in ("train", "valid", "test"):
        assert sorted(samples(stream.benchmark.streams[part][2])) == sorted(samples(alone.benchmark.streams[part][0]))
    assert samples(build(flat, split_seed=5).test[2]) != samples(stream.test[2])


def test_transform_groups(flat):
    stream = build(flat)
    for part, offset in (("train", 0), ("valid", 1000), ("test", 1000)):
        for experience in stream.benchmark.streams[part]:
            assert all(int(x[0, 0, 0]) // 1000 * 1000 == offset for x, *_ in experience.dataset)
            assert all(int(x[0, 0, 0]) >= 1000 for x, *_ in experience.dataset.eval())
            assert all(int(x[0, 0, 0]) < 1000 for x, *_ in experience.dataset.train())


def test_no_validation_stream_at_fraction_0(flat):
    assert build(flat, validation_fraction=0).valid is None
    with pytest.raises(StreamError, match="photo has no folder test and test_fraction is 0"):
        build(flat, domains=["photo"], test_fraction=0)


def test_fingerprint(flat):
    base = build(flat).fingerprint
    assert build(flat).fingerprint == base
    others = [
        build(flat, split_seed=1),
        build(flat, validation_fraction=0),
        build(flat, domains=["photo", "sketch", "clipart"]),
        build(flat, domains=["photo", "sketch"]),
    ]
    (flat / "photo" / "bee" / "000.png").rename(flat / "photo" / "bee" / "900.png")
    others.append(build(flat))
    assert len({base, *(stream.fingerprint for stream in others)}) == 6


def test_layouts_refused(flat, parted, tmp_path):
    # both fixtures write below the same root: flat domains have classes beside train
    with pytest.raises(StreamError, match=r"stands beside .*train; accepted: root/DOMAIN/CLASS"):
        build(parted)
    mixed = tmp_path / "mixed"
    write_class(mixed / "photo" / "bee", "photo", "bee", 5)
    for part in ("train", "test"):
        write_class(mixed / "sketch" / part / "bee", "sketch", "bee", 5)
    with pytest.raises(StreamError, match="domain 'sketch' has a folder for test and 'photo' has none"):
        build(mixed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StreamError, match="empty holds no domain folders"):
        build(tmp_path / "empty")
    with pytest.raises(StreamError, match="nowhere is absent"):
        build(tmp_path / "nowhere")
    Image.new("RGB", (2, 2)).save(mixed / "loose.png")
    with pytest.raises(StreamError, match=r"loose.png is an image outside any domain folder"):
        build(mixed)


def test_parts_are_no_domains(parted):
    with pytest.raises(StreamError, match=r"test is named like a part and not like a domain.*folder_stream"):
        build(parted / "photo")


def test_a_folder_of_classes_is_no_folder_of_domains(flat):
    with pytest.raises(StreamError, match=r"photo.bee holds no class folders; accepted: root/DOMAIN/CLASS"):
        build(flat / "photo")


def test_domains_refused(flat):
    cases = {
        "domain 'draw' is no folder of": ["draw"],
        "domain 'photo' is named twice": ["photo", "sketch", "photo"],
        "domains is 'photo'; accepted": "photo",
        r"domains is \[\]; accepted": [],
    }
    for message, domains in cases.items():
        with pytest.raises(StreamError, match=message):
            build(flat, domains=domains)
    with pytest.raises(StreamError, match="train_transform is None"):
        domain_folder_stream(flat, train_transform=None, eval_transform=eval_transform)


def test_too_few_images_and_broken_ones_name_the_domain(flat):
    (flat / "sketch" / "cow" / "001.png").write_bytes(b"no image")
    with pytest.raises(StreamError, match=r"sketch/cow/001.png cannot be read as an image"):
        build(flat)
    for path in sorted((flat / "sketch" / "cow").iterdir())[1:]:
        path.unlink()
    with pytest.raises(StreamError, match=r"domain 'sketch': class 'cow' has 1 image\(s\); a 3-way split needs 3"):
        build(flat)


def tensor_images(labels):
    pixels = (torch.tensor(labels) * 60).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return TensorImageDataset(pixels.contiguous(), labels)


def test_build_domain_stream_refuses():
    def make(train, test, names="abc", valid=None):
        return build_domain_stream(
            "d",
            train=[tensor_images(labels) for labels in train],
            test=[tensor_images(labels) for labels in test],
            valid=valid,
            class_names=list(names),
            fingerprint="",
        )

    assert make([[0, 2], [1, 2]], [[0], [1]]).task_sizes == (2, 2)
    cases = {
        "d has {'train': 2, 'test': 1} domains": ([[0], [1]], [[0]]),
        "d has {'train': 0, 'test': 0} domains": ([], []),
        "d: test data 1 holds 3; accepted: labels among 0..2": ([[0, 1], [2]], [[0], [3]]),
        "the classes b have no training images": ([[0], [2]], [[0], [1]]),
    }
    for message, parts in cases.items():
        with pytest.raises(StreamError, match=message):
            make(*parts)


def test_matrix_and_joint_training(flat):
    torch.manual_seed(0)
    stream = build(flat, domains=["photo", "clipart"])
    metric = ResultMatrixMetric(image=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-4),
        train_mb_size=4,
        eval_mb_size=4,
        evaluator=EvaluationPlugin(metric, loggers=[]),
    )
    for experience in stream.train:
        strategy.train(experience)
        strategy.eval(stream.test)
    matrix = metric.result()
    assert matrix.accuracy.shape == (2, 2) and np.isfinite(matrix.accuracy).all()
    assert matrix.classes == [[1, 2], [0, 1]] and matrix.total.tolist() == [2, 2]
    joint = stream.joint()
    assert joint.task_sizes == (3,) and joint.test is stream.test
    assert joint.train[0].classes_in_this_experience == {0, 1, 2}
    assert sorted(samples(joint.train[0])) == sorted(row for e in stream.train for row in samples(e))
